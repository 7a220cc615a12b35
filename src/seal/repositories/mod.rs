//! Finds repositories of version control in an image whose history holds data that the clean-up removes. For example,
//! etckeeper commits all files of `/etc` while packages are installed, also the keys that the clean-up removes later.
//! Their content would stay in the history, and all instances would share it.

#[cfg(test)]
mod tests;

use super::first_boot::{add_unit, has_systemd};
use super::identities::IDENTITIES;
use super::lint::credentials::{PUBLIC_CODE, SIZE_MAX, credential_in, start_of};
use super::package_made::suspicion;
use super::rules::{self, is_excluded};
use crate::identity::checksum::hex;
use crate::image::file_version::FileVersion;
use crate::image::limits::StoredPaths;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::text::escape_name;
use anyhow::{Context, Result};
use flate2::read::ZlibDecoder;
use rustix::fs::FileType;
use sha1::Digest;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// The directories that are searched for repositories.
const SEARCHED: [&str; 7] = ["/etc", "/home", "/opt", "/root", "/srv", "/usr/local", "/var"];
/// The names of other systems' repositories. Their history is compressed, so oven cannot search it. etckeeper commits
/// all of `/etc`, so a repository in `/etc` has the keys of `/etc`.
const OTHER: [&str; 3] = [".hg", ".bzr", "_darcs"];
const ETC: &str = "/etc";
const ETCKEEPER: &str = "/usr/bin/etckeeper";
const UNIT: &str = "oven-etckeeper.service";
const UNIT_CONTENT: &str = "\
# Added by oven: the history of /etc is not cloned, each instance begins its own.
[Unit]
Description=Begin the history of /etc
Documentation=man:etckeeper(8)
{conditions}After=oven-ssh-keys.service oven-snakeoil.service

[Service]
Type=oneshot
RemainAfterExit=yes
Environment=HOME=/root
ExecStart=/usr/bin/etckeeper init
ExecStart=-/usr/bin/etckeeper commit \"Initial commit\"

[Install]
WantedBy=multi-user.target
";
/// The maximum number of removed files, of files that are examined because `[clean] remove` matches them, and of
/// repositories, pack indexes and objects.
const FILES_MAX: usize = 1000;
const EXAMINED_MAX: usize = 50_000;
const REPOSITORIES_MAX: usize = 1000;
const PACKS_MAX: usize = 1000;
const OBJECTS_MAX: usize = 50_000;
/// The magic number and the version of a pack's index. The first version has no magic number.
const INDEX_MAGIC: &[u8] = b"\xfftOc\0\0\0\x02";
const FANOUT: u64 = 256 * 4;
/// The content of a machine id that no machine has yet. Many repositories may have it.
const UNINITIALIZED: &[u8] = b"uninitialized\n";

/// A file that the clean-up may remove, with the names that git gives its content.
#[derive(Debug, Clone)]
struct RemovedFile {
    path: String,
    version: FileVersion,
    sha1: Vec<u8>,
    sha256: Vec<u8>,
}

/// The files with keys, ids and secrets that the clean-up may remove.
#[derive(Debug, Default)]
pub struct RemovedFiles {
    files: Vec<RemovedFile>,
    /// The limits that were met: what was not examined completely.
    limits: BTreeSet<&'static str>,
}

/// A repository with the removed data in its history.
#[derive(Debug, PartialEq, Eq)]
pub struct UncleanRepository {
    pub path: String,
    pub what: String,
}

impl RemovedFiles {
    /// Reads the files. Call this before the clean-up. `removed` has the patterns of `[clean] remove`. Of the files that
    /// they match, only those count that look like keys, ids or secrets.
    pub fn read(inside: &ImageTree, removed: &[String]) -> Result<Self> {
        let rules = rules::FILES.iter().map(|(pattern, _)| *pattern);
        let known = [rules::MACHINE_ID, rules::HOST_KEYS, rules::SNAKEOIL];
        let identities = IDENTITIES.iter().flat_map(|identity| identity.files).map(|file| file.path);
        let mut read = Self::default();
        for pattern in rules.chain(known).chain(identities) {
            for (path, kind) in inside.expand(pattern)? {
                if kind == FileType::RegularFile {
                    read.read_file(inside, &path, &|content| content != UNINITIALIZED)?;
                }
            }
        }
        let mut examined = 0;
        for pattern in removed {
            for (path, kind) in inside.expand(pattern)? {
                match kind {
                    FileType::RegularFile if examined < EXAMINED_MAX => {
                        examined += 1;
                        read.read_file(inside, &path, &|content| suspicion(&path, content).is_some())?;
                    }
                    FileType::RegularFile => _ = read.limits.insert("removed files"),
                    FileType::Directory => read.read_directory(inside, &path, &mut examined)?,
                    _ => {}
                }
            }
        }
        Ok(read)
    }

    /// Reads a file at a path that is not longer than the kernel permits.
    fn read_file(
        &mut self,
        inside: &ImageTree,
        path: &str,
        is_relevant: &dyn Fn(&[u8]) -> bool,
    ) -> Result<()> {
        let Some(version) = inside.version(path)? else { return Ok(()) };
        if !(1..=SIZE_MAX).contains(&version.size) {
            return Ok(());
        }
        let content = inside.read_start(path, SIZE_MAX)?.unwrap_or_default();
        if is_relevant(&content) {
            self.add(path, version, &content);
        }
        Ok(())
    }

    /// Reads the files in a directory that `[clean] remove` names.
    fn read_directory(&mut self, inside: &ImageTree, top: &str, examined: &mut usize) -> Result<()> {
        let mut stored = StoredPaths::new(inside.meter(), top);
        inside.walk_entries(top, &mut |entry| {
            inside.meter().check()?;
            if entry.kind() == FileType::Directory && PUBLIC_CODE.contains(&entry.name()) {
                return Ok(Walk::Past);
            }
            let size = u64::try_from(entry.stat.st_size).unwrap_or_default();
            if entry.kind() != FileType::RegularFile || !(1..=SIZE_MAX).contains(&size) {
                return Ok(Walk::On);
            }
            if *examined >= EXAMINED_MAX {
                self.limits.insert("removed files");
                return Ok(Walk::Past);
            }
            *examined += 1;
            let (Some(version), Some(file)) = (entry.version()?, entry.open_file()?) else {
                return Ok(Walk::On);
            };
            let content = start_of(file).with_context(|| format!("reading {}", entry.shown_path()))?;
            if suspicion(entry.path, &content).is_some() {
                stored.count(entry.path)?;
                self.add(entry.path, version, &content);
            }
            Ok(Walk::On)
        })
    }

    fn add(&mut self, path: &str, version: FileVersion, content: &[u8]) {
        if content.trim_ascii().is_empty() {
            return;
        }
        if self.files.len() == FILES_MAX {
            self.limits.insert("removed files");
            return;
        }
        let header = format!("blob {}\0", content.len());
        let sha1 = sha1::Sha1::new().chain_update(&header).chain_update(content).finalize().to_vec();
        let sha256 = sha2::Sha256::new().chain_update(&header).chain_update(content).finalize().to_vec();
        self.files.push(RemovedFile { path: path.to_owned(), version, sha1, sha256 });
    }

    /// Finds the repositories whose history holds one of the removed files, except those in `keep`. Call this after the
    /// clean-up.
    pub fn find_repositories(
        &mut self,
        inside: &ImageTree,
        keep: &[String],
    ) -> Result<Vec<UncleanRepository>> {
        // `[clean] keep`, a file of the definition, or an identity that nothing makes again may have prevented a removal.
        let mut removed = Vec::new();
        for file in std::mem::take(&mut self.files) {
            if inside.version(&file.path)? != Some(file.version) {
                removed.push(file);
            }
        }
        self.files = removed;
        let mut unclean = Vec::new();
        for path in self.repositories(inside, keep)? {
            let held = match path.rsplit('/').next() {
                Some(name) if OTHER.contains(&name) => self.held_by_other(&path),
                _ => self.held_by_git(inside, &path)?,
            };
            if let Some(held) = held {
                unclean.push(UncleanRepository { path, what: format!("a repository whose history {held}") });
            }
        }
        Ok(unclean)
    }

    /// Returns a warning about the limits that were met.
    pub fn limit_warning(&self) -> Option<String> {
        let limits: Vec<_> = self.limits.iter().copied().collect();
        (!limits.is_empty()).then(|| {
            format!(
                "the image has so many {} that not all repositories were searched completely for removed keys, ids and \
                 secrets",
                limits.join(" and ")
            )
        })
    }

    fn held_by_other(&self, path: &str) -> Option<String> {
        let mut of_etc = self.files.iter().filter(|file| file.path.starts_with("/etc/"));
        let file = of_etc.next().filter(|_| path.starts_with("/etc/"))?;
        Some(format!("may hold {}, which the clean-up removes", escape_name(&file.path)))
    }

    /// Returns a description of the data in the history of a git repository. For a repository in `/etc`, other private
    /// keys count as well, because a script may have removed them before.
    fn held_by_git(&mut self, inside: &ImageTree, path: &str) -> Result<Option<String>> {
        let config = inside.read_text(&format!("{path}/config"))?.to_ascii_lowercase();
        let is_sha256 = config.lines().any(|line| line.replace(' ', "").trim() == "objectformat=sha256");
        let id_of = |file: &RemovedFile| if is_sha256 { file.sha256.clone() } else { file.sha1.clone() };
        let ids: Vec<_> = self.files.iter().map(id_of).collect();
        let held = |at: usize| {
            let file = escape_name(&self.files[at].path);
            Ok(Some(format!("holds {file}, which the clean-up removes")))
        };
        for (at, id) in ids.iter().enumerate() {
            let name = hex(id);
            let (start, end) = name.split_at(2);
            if inside.kind_of(&format!("{path}/objects/{start}/{end}"))?.is_some() {
                return held(at);
            }
        }
        // A repository's path may contain `*`, so it cannot be a part of a pattern.
        let packs = format!("{path}/objects/pack");
        let names = if inside.is_directory(&packs)? { inside.list(&packs)? } else { Vec::new() };
        let names = names.iter().filter_map(|name| name.to_str()).filter(|name| name.ends_with(".idx"));
        for (count, name) in names.enumerate() {
            if count == PACKS_MAX {
                self.limits.insert("packs of git");
                break;
            }
            let index = format!("{packs}/{name}");
            if inside.kind_of(&index)? != Some(FileType::RegularFile) {
                continue;
            }
            let Some(file) = inside.open_file(&index)? else { continue };
            for (at, id) in ids.iter().enumerate() {
                if index_has(&file, id).with_context(|| format!("reading {}", escape_name(&index)))? {
                    return held(at);
                }
            }
        }
        let has_key = path.starts_with("/etc/") && self.has_private_key(inside, path)?;
        Ok(has_key.then(|| "holds a private key".to_owned()))
    }

    /// Returns the paths of the repositories, except those in `keep`. For git, it is the directory with `objects`.
    fn repositories(&mut self, inside: &ImageTree, keep: &[String]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for top in SEARCHED {
            if !inside.is_directory(top)? {
                continue;
            }
            let mut stored = StoredPaths::new(inside.meter(), top);
            inside.walk_entries(top, &mut |entry| {
                inside.meter().check()?;
                if entry.kind() != FileType::Directory {
                    return Ok(Walk::On);
                }
                if is_excluded(keep, entry.path) {
                    return Ok(Walk::Past);
                }
                let is_other = OTHER.iter().any(|name| name.as_bytes() == entry.name());
                let path = match entry.path.strip_suffix("/objects") {
                    _ if is_other => entry.path,
                    Some(path) if is_git(inside, path)? => path,
                    _ => return Ok(Walk::On),
                };
                if found.len() >= REPOSITORIES_MAX {
                    self.limits.insert("repositories");
                    return Ok(Walk::Past);
                }
                stored.count(path)?;
                found.push(path.to_owned());
                Ok(Walk::Past)
            })?;
        }
        Ok(found)
    }

    /// Returns whether an object of a git repository that is not in a pack has a private key.
    fn has_private_key(&mut self, inside: &ImageTree, path: &str) -> Result<bool> {
        let (mut is_found, mut examined) = (false, 0);
        inside.walk_entries(&format!("{path}/objects"), &mut |entry| {
            inside.meter().check()?;
            let size = u64::try_from(entry.stat.st_size).unwrap_or_default();
            if is_found || entry.kind() != FileType::RegularFile || size > SIZE_MAX {
                return Ok(Walk::On);
            }
            if examined >= OBJECTS_MAX {
                self.limits.insert("objects of git");
                return Ok(Walk::Past);
            }
            examined += 1;
            let Some(file) = entry.open_file()? else { return Ok(Walk::On) };
            let mut content = Vec::new();
            // An object that cannot be decompressed has no key that somebody could read.
            let read = ZlibDecoder::new(file.take(SIZE_MAX)).take(SIZE_MAX).read_to_end(&mut content);
            is_found = read.is_ok() && content.starts_with(b"blob ") && credential_in(&content).is_some();
            Ok(Walk::On)
        })?;
        Ok(is_found)
    }
}

/// Returns whether a directory with `objects` is a repository of git.
fn is_git(inside: &ImageTree, path: &str) -> Result<bool> {
    let has_head = inside.kind_of(&format!("{path}/HEAD"))?.is_some_and(|kind| kind != FileType::Directory);
    Ok(has_head && inside.is_directory(&format!("{path}/refs"))?)
}

/// Removes the repositories that etckeeper can begin again at the first boot. Returns notes about them. The others stay
/// in `unclean`.
pub fn replace_etckeepers(inside: &ImageTree, unclean: &mut Vec<UncleanRepository>) -> Result<Vec<String>> {
    if !inside.exists(ETCKEEPER)? || !has_systemd(inside)? {
        return Ok(Vec::new());
    }
    let is_etckeepers = |repository: &UncleanRepository| {
        let parts = repository.path.rsplit_once('/');
        parts.is_some_and(|(parent, name)| parent == ETC && (name == ".git" || OTHER.contains(&name)))
    };
    let (replaced, others): (Vec<_>, Vec<_>) = unclean.drain(..).partition(is_etckeepers);
    *unclean = others;
    if replaced.is_empty() {
        return Ok(Vec::new());
    }
    // etckeeper begins only one repository. It must not commit again at each boot because the others are missing.
    let condition = |repository: &UncleanRepository| format!("ConditionPathExists=!{}\n", repository.path);
    let conditions: String = replaced.iter().map(condition).collect();
    let content = UNIT_CONTENT.replace("{conditions}", &conditions);
    add_unit(inside, UNIT, &content, "multi-user.target")?;
    let mut notes = Vec::new();
    for UncleanRepository { path, what } in replaced {
        inside.remove_tree(&path, &|_| false)?;
        notes.push(format!("removed {path} with its history ({what})"));
    }
    notes.push(format!("added {UNIT}, which begins a new history of /etc when an instance first boots"));
    Ok(notes)
}

/// Returns whether the index of a pack has an object. The ids in an index are sorted.
fn index_has(file: &File, id: &[u8]) -> std::io::Result<bool> {
    let size = file.metadata()?.len();
    let mut magic = [0; INDEX_MAGIC.len()];
    if size < FANOUT + INDEX_MAGIC.len() as u64 {
        return Ok(false);
    }
    file.read_exact_at(&mut magic, 0)?;
    // In the first version, the object's position in the pack precedes each id.
    let (header, before) = if magic == INDEX_MAGIC { (INDEX_MAGIC.len() as u64, 0) } else { (0, 4) };
    let count_at = |byte: u64| -> std::io::Result<u64> {
        let mut count = [0; 4];
        file.read_exact_at(&mut count, header + byte * 4)?;
        Ok(u32::from_be_bytes(count).into())
    };
    let Some(first) = id.first().map(|byte| u64::from(*byte)) else { return Ok(false) };
    let mut low = if first == 0 { 0 } else { count_at(first - 1)? };
    let mut high = count_at(first)?;
    let entry = before + id.len() as u64;
    let mut found = vec![0; id.len()];
    while low < high {
        let middle = low + (high - low) / 2;
        let at = header + FANOUT + middle * entry + before;
        if at + id.len() as u64 > size {
            return Ok(false); // the index is damaged
        }
        file.read_exact_at(&mut found, at)?;
        match found.as_slice().cmp(id) {
            std::cmp::Ordering::Equal => return Ok(true),
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    Ok(false)
}
