//! Finds repositories of version control in an image whose history holds data that the clean-up removes. For example,
//! etckeeper commits all files of `/etc` while packages are installed, also the keys that the clean-up removes later.
//! Their content would stay in the history, and all instances would share it.

use super::first_boot::{add_unit, has_systemd};
use super::identities::IDENTITIES;
use super::lint::credentials::{SIZE_MAX, credential_in};
use super::rules::{self, is_excluded};
use crate::identity::checksum::hex;
use crate::image::limits::StoredPaths;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::text::escape_name;
use anyhow::{Context, Result};
use flate2::read::ZlibDecoder;
use rustix::fs::FileType;
use sha1::Digest;
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
ConditionPathExists=|!/etc/.git
After=oven-ssh-keys.service oven-snakeoil.service

[Service]
Type=oneshot
RemainAfterExit=yes
Environment=HOME=/root
ExecStart=/usr/bin/etckeeper init
ExecStart=-/usr/bin/etckeeper commit \"Initial commit\"

[Install]
WantedBy=multi-user.target
";
/// The maximum number of removed files, repositories, pack indexes and objects that are examined.
const FILES_MAX: usize = 1000;
const REPOSITORIES_MAX: usize = 1000;
const PACKS_MAX: usize = 1000;
const OBJECTS_MAX: usize = 50_000;
/// The magic number and the version of a pack's index. The first version has no magic number.
const INDEX_MAGIC: &[u8] = b"\xfftOc\0\0\0\x02";
const FANOUT: u64 = 256 * 4;

/// A file that the clean-up removes, with the names that git gives its content.
#[derive(Debug, Clone)]
struct RemovedFile {
    path: String,
    sha1: Vec<u8>,
    sha256: Vec<u8>,
}

/// The files with keys and ids that the clean-up is about to remove.
#[derive(Debug, Default)]
pub struct RemovedFiles(Vec<RemovedFile>);

/// A repository with the removed data in its history.
#[derive(Debug, PartialEq, Eq)]
pub struct UncleanRepository {
    pub path: String,
    pub what: String,
}

impl RemovedFiles {
    /// Reads the files. Call this before the clean-up. `removed` has the patterns of `[clean] remove`.
    pub fn read(inside: &ImageTree, removed: &[String]) -> Result<Self> {
        let rules = rules::FILES.iter().map(|(pattern, _)| *pattern);
        let known = [rules::MACHINE_ID, rules::HOST_KEYS, rules::SNAKEOIL];
        let identities = IDENTITIES.iter().flat_map(|identity| identity.files).map(|file| file.path);
        let removed = removed.iter().map(String::as_str);
        let mut files = Vec::new();
        for pattern in rules.chain(known).chain(identities).chain(removed) {
            for (path, kind) in inside.expand(pattern)? {
                let stat = inside.metadata(&path)?;
                let size = stat.map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or_default());
                if kind != FileType::RegularFile
                    || !(1..=SIZE_MAX).contains(&size)
                    || files.len() == FILES_MAX
                {
                    continue;
                }
                let content = inside.read_start(&path, SIZE_MAX)?.unwrap_or_default();
                let header = format!("blob {}\0", content.len());
                let sha1 = sha1::Sha1::new().chain_update(&header).chain_update(&content).finalize();
                let sha256 = sha2::Sha256::new().chain_update(&header).chain_update(&content).finalize();
                files.push(RemovedFile { path, sha1: sha1.to_vec(), sha256: sha256.to_vec() });
            }
        }
        Ok(Self(files))
    }

    /// Finds the repositories whose history holds one of the files, except those in `keep`. Call this after the clean-up.
    pub fn find_repositories(&self, inside: &ImageTree, keep: &[String]) -> Result<Vec<UncleanRepository>> {
        let mut unclean = Vec::new();
        for path in repositories(inside, keep)? {
            let held = match path.rsplit('/').next() {
                Some(name) if OTHER.contains(&name) => {
                    path.starts_with("/etc/").then(|| "the files of /etc".to_owned())
                }
                _ => self.held_by_git(inside, &path)?,
            };
            if let Some(held) = held {
                let what = format!("a repository whose history holds {held}, which the clean-up removes");
                unclean.push(UncleanRepository { path, what });
            }
        }
        Ok(unclean)
    }

    /// Returns a description of the data in the history of a git repository. For a repository in `/etc`, other private
    /// keys count as well, because a script may have removed them before.
    fn held_by_git(&self, inside: &ImageTree, path: &str) -> Result<Option<String>> {
        let config = inside.read_text(&format!("{path}/config"))?.to_ascii_lowercase();
        let is_sha256 = config.lines().any(|line| line.replace(' ', "").trim() == "objectformat=sha256");
        let ids: Vec<_> =
            self.0.iter().map(|file| if is_sha256 { &file.sha256 } else { &file.sha1 }).collect();
        let held = |at: usize| Ok(Some(escape_name(&self.0[at].path)));
        for (at, id) in ids.iter().enumerate() {
            let name = hex(id);
            let (start, end) = name.split_at(2);
            if inside.kind_of(&format!("{path}/objects/{start}/{end}"))?.is_some() {
                return held(at);
            }
        }
        for (index, kind) in inside.expand(&format!("{path}/objects/pack/*.idx"))?.into_iter().take(PACKS_MAX)
        {
            if kind != FileType::RegularFile {
                continue;
            }
            let Some(file) = inside.open_file(&index)? else { continue };
            for (at, id) in ids.iter().enumerate() {
                if index_has(&file, id).with_context(|| format!("reading {}", escape_name(&index)))? {
                    return held(at);
                }
            }
        }
        if path.starts_with("/etc/") && has_private_key(inside, path)? {
            return Ok(Some("a private key".to_owned()));
        }
        Ok(None)
    }
}

/// Removes the repositories that etckeeper can begin again at the first boot. Returns a note about them. The others stay
/// in `unclean`.
pub fn replace_etckeepers(
    inside: &ImageTree,
    unclean: &mut Vec<UncleanRepository>,
) -> Result<Option<String>> {
    if !inside.exists(ETCKEEPER)? || !has_systemd(inside)? {
        return Ok(None);
    }
    let is_etckeepers = |repository: &UncleanRepository| {
        repository
            .path
            .rsplit_once('/')
            .is_some_and(|(parent, name)| parent == ETC && (name == ".git" || OTHER.contains(&name)))
    };
    let Some(at) = unclean.iter().position(is_etckeepers) else { return Ok(None) };
    let UncleanRepository { path, what } = unclean.remove(at);
    let name = path.rsplit('/').next().unwrap_or_default();
    add_unit(
        inside,
        UNIT,
        &UNIT_CONTENT.replace("/etc/.git", &format!("{ETC}/{name}")),
        "multi-user.target",
    )?;
    inside.remove_tree(&path, &|_| false)?;
    Ok(Some(format!(
        "removed {path} with its history ({what}), and added {UNIT}, which begins a new history when an instance first \
         boots"
    )))
}

/// Returns the paths of the repositories, except those in `keep`. For git, it is the directory with `objects`.
fn repositories(inside: &ImageTree, keep: &[String]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for top in SEARCHED {
        if !inside.is_directory(top)? {
            continue;
        }
        let (mut candidates, mut stored) = (Vec::new(), StoredPaths::new(inside.meter(), top));
        inside.walk_entries(top, &mut |entry| {
            inside.meter().check()?;
            if entry.kind() != FileType::Directory || candidates.len() >= REPOSITORIES_MAX {
                return Ok(Walk::On);
            }
            if is_excluded(keep, entry.path) {
                return Ok(Walk::Past);
            }
            let is_other = OTHER.iter().any(|name| name.as_bytes() == entry.name());
            if is_other || entry.name() == b"objects" {
                let path = if is_other { entry.path } else { entry.path.trim_end_matches("/objects") };
                stored.count(path)?;
                candidates.push((path.to_owned(), is_other));
                return Ok(Walk::Past);
            }
            Ok(Walk::On)
        })?;
        for (path, is_other) in candidates {
            let is_git = !is_other
                && inside.kind_of(&format!("{path}/HEAD"))? == Some(FileType::RegularFile)
                && inside.is_directory(&format!("{path}/refs"))?;
            if is_other || is_git {
                found.push(path);
            }
        }
    }
    Ok(found)
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

/// Returns whether an object of a git repository that is not in a pack has a private key.
fn has_private_key(inside: &ImageTree, path: &str) -> Result<bool> {
    let (mut is_found, mut examined) = (false, 0);
    inside.walk_entries(&format!("{path}/objects"), &mut |entry| {
        inside.meter().check()?;
        let size = u64::try_from(entry.stat.st_size).unwrap_or_default();
        if is_found || entry.kind() != FileType::RegularFile || size > SIZE_MAX || examined >= OBJECTS_MAX {
            return Ok(Walk::On);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;
    use std::process::Command;

    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj\n";

    fn path_of(tree: &Tree) -> std::path::PathBuf {
        let tree = tree.tree();
        std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&tree.dir()))).unwrap()
    }

    fn git(tree: &Tree, dir: &str, arguments: &[&str]) {
        let dir = path_of(tree).join(dir);
        let identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"];
        let ran = Command::new("git").arg("-C").arg(dir).args(identity).args(arguments).output().unwrap();
        assert!(ran.status.success(), "{arguments:?}: {ran:?}");
    }

    fn commit(tree: &Tree, dir: &str) {
        git(tree, dir, &["add", "-A", "-f"]);
        git(tree, dir, &["commit", "-q", "-m", "first"]);
    }

    /// An image with keys, and etckeeper.
    fn image() -> Tree {
        let tree = Tree::new();
        for path in ["usr/lib/systemd/systemd", "usr/bin/etckeeper"] {
            tree.file(path, "x");
        }
        for (path, content) in [
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
            ("etc/ssh/ssh_host_rsa_key", "host key"),
            ("etc/ssl/private/ssl-cert-snakeoil.key", "snakeoil"),
            ("etc/nvme/hostid", "an id"),
            ("etc/hostname", "x\n"),
            ("srv/app/secret", "removed on request"),
            ("srv/app/main.py", "pass\n"),
        ] {
            tree.file(path, content);
        }
        tree
    }

    fn unclean(tree: &Tree, keep: &[&str]) -> Vec<(String, String)> {
        let keep: Vec<_> = keep.iter().map(|path| (*path).to_owned()).collect();
        let removed = RemovedFiles::read(&tree.tree(), &["/srv/app/secret".to_owned()]).unwrap();
        for path in ["etc/machine-id", "etc/ssh", "etc/ssl", "etc/nvme", "srv/app/secret"] {
            tree.remove(path);
        }
        let found = removed.find_repositories(&tree.tree(), &keep).unwrap();
        found.into_iter().map(|found| (found.path, found.what)).collect()
    }

    #[test]
    fn repositories_with_removed_files_are_found() {
        for only in [
            "etc/machine-id",
            "etc/ssh/ssh_host_rsa_key",
            "etc/ssl/private/ssl-cert-snakeoil.key",
            "etc/nvme/hostid",
        ] {
            for packed in [false, true] {
                let tree = image();
                git(&tree, "etc", &["init", "-q"]);
                git(&tree, "etc", &["add", "-f", only.strip_prefix("etc/").unwrap()]);
                git(&tree, "etc", &["commit", "-q", "-m", "first"]);
                git(&tree, "etc", &["rm", "-q", "--cached", only.strip_prefix("etc/").unwrap()]);
                git(&tree, "etc", &["commit", "-q", "--allow-empty", "-m", "second"]);
                if packed {
                    git(&tree, "etc", &["gc", "-q"]);
                }
                let found = unclean(&tree, &[]);
                assert!(
                    found.len() == 1 && found[0].0 == "/etc/.git" && found[0].1.contains(only),
                    "{only}: {found:?}"
                );
            }
        }
    }

    #[test]
    fn bare_repositories_other_formats_and_other_systems_are_found() {
        let tree = image();
        tree.file("var/x", "x");
        git(&tree, "srv/app", &["init", "-q", "--object-format=sha256"]);
        commit(&tree, "srv/app");
        git(
            &tree,
            "etc",
            &["init", "-q", "--separate-git-dir", path_of(&tree).join("var/backup").to_str().unwrap()],
        );
        commit(&tree, "etc");
        for other in ["etc/.hg/store", "etc/_darcs/x", "srv/code/.hg/store"] {
            tree.file(other, "x");
        }
        let paths: Vec<_> = unclean(&tree, &[]).into_iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["/etc/.hg", "/etc/_darcs", "/srv/app/.git", "/var/backup"]);
    }

    #[test]
    fn a_key_that_a_script_removed_is_found_in_etc_only() {
        let tree = image();
        for dir in ["etc/app", "srv/code"] {
            tree.file(&format!("{dir}/test.key"), KEY);
            git(&tree, dir, &["init", "-q"]);
            commit(&tree, dir);
            tree.remove(&format!("{dir}/test.key"));
        }
        let found = unclean(&tree, &[]);
        assert!(found.len() == 1 && found[0].1.contains("a private key"), "{found:?}");
        assert_eq!(found[0].0, "/etc/app/.git");
    }

    #[test]
    fn clean_and_accepted_repositories_stay() {
        let tree = image();
        git(&tree, "srv/app", &["init", "-q"]);
        git(&tree, "srv/app", &["add", "main.py"]);
        git(&tree, "srv/app", &["commit", "-q", "-m", "first"]);
        git(&tree, "etc", &["init", "-q"]);
        commit(&tree, "etc");
        tree.file("srv/objects/x", "not a repository");
        tree.file("srv/damaged/objects/pack/x.idx", "short");
        tree.file("srv/damaged/HEAD", "ref: x\n");
        tree.file("srv/damaged/refs/x", "x");
        assert_eq!(unclean(&tree, &["/etc/.git"]), []);
    }

    #[test]
    fn etckeepers_repository_begins_again() {
        let tree = image();
        git(&tree, "etc", &["init", "-q"]);
        commit(&tree, "etc");
        let removed = RemovedFiles::read(&tree.tree(), &[]).unwrap();
        let mut unclean = removed.find_repositories(&tree.tree(), &[]).unwrap();
        unclean.push(UncleanRepository { path: "/srv/x/.git".to_owned(), what: String::new() });
        let without = Tree::new();
        let mut same = vec![UncleanRepository { path: "/etc/.git".to_owned(), what: String::new() }];
        assert_eq!(replace_etckeepers(&without.tree(), &mut same).unwrap(), None);
        assert_eq!(same.len(), 1, "without etckeeper, the lint reports it");
        let note = replace_etckeepers(&tree.tree(), &mut unclean).unwrap().unwrap();
        assert!(note.contains("/etc/.git") && note.contains(UNIT), "{note}");
        assert_eq!(unclean.iter().map(|left| left.path.as_str()).collect::<Vec<_>>(), ["/srv/x/.git"]);
        assert!(!tree.has("etc/.git") && tree.has("etc/hostname"));
        assert!(tree.link_of("etc/systemd/system/multi-user.target.wants/oven-etckeeper.service").is_some());
        assert_eq!(replace_etckeepers(&tree.tree(), &mut unclean).unwrap(), None);
    }
}
