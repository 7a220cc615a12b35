//! Finds private keys and credentials that the bake added. Everybody who may start an instance of the image could read
//! them, and all instances would share them.
//!
//! Two searches find them: the paths at which programs store credentials ([`rules::CREDENTIALS`]), and the content of
//! small files below [`SEARCHED`]. Files that are as in the base image are not reported.

use super::bake_period::{BakeMoment, BakePeriod};
use super::findings::LintFindings;
use crate::image::file_version::{FileId, FileVersion};
use crate::image::tree::ImageTree;
use crate::image::walk::{Walk, WalkEntry};
use crate::seal::rules::{self, CredentialRule};
use crate::seal::secret_scan::BakeStart;
use anyhow::{Context, Result};
use rustix::fs::FileType;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;

/// The directories whose files are searched for private keys.
const SEARCHED: [&str; 3] = ["/etc", "/home", "/root"];
/// Directories with public code, which often contains keys for tests. Their files are not searched.
pub(in crate::seal) const PUBLIC_CODE: [&[u8]; 5] =
    [b"node_modules", b"site-packages", b"dist-packages", b"testdata", b".git"];
/// The maximum size of a file that is searched. Keys and files of settings are small.
pub(in crate::seal) const SIZE_MAX: u64 = 64 << 10;
/// The maximum number of files that are searched, so that an image with millions of files does not take hours.
const FILES_MAX: usize = 50_000;
/// The maximum number of files whose version before the bake is recorded.
const RECORDED_MAX: usize = 100_000;
/// The maximum number of lines with attributes before the data of a private key.
const ATTRIBUTES_MAX: usize = 8;
/// The minimum length of the first line of a private key's data.
const DATA_MIN: usize = 16;

/// Distinguishes the files of the base image from those that the bake added or wrote.
///
/// Only the files at the known paths are recorded before the bake. Below [`SEARCHED`] may be very many others, and to
/// examine them all would delay each bake. Their times show whether the bake created or wrote them. One case is not
/// found: a step overwrites a file of the base without replacing it, and then sets an old modification time. If the file
/// system does not record when a file was created, a new file with an old modification time is not found either.
pub struct CredentialBaseline {
    start: BakeStart,
    moment: BakeMoment,
    /// The files of the base image at the known paths.
    recorded: HashMap<FileId, FileVersion>,
}

/// Recognizes the files that the bake added or wrote.
struct AddedFiles<'a> {
    baseline: &'a CredentialBaseline,
    period: BakePeriod,
}

impl CredentialBaseline {
    pub fn of(inside: &ImageTree) -> Result<Self> {
        let mut recorded = HashMap::new();
        visit_known_paths(inside, &mut |path, _| {
            if recorded.len() < RECORDED_MAX {
                recorded.extend(inside.version(path)?.map(|version| (version.id, version)));
            }
            Ok(())
        })?;
        Ok(Self { start: BakeStart::now(), moment: BakeMoment::now()?, recorded })
    }

    /// Finds the credentials that the bake added. Returns whether all files were searched.
    pub fn find(&self, inside: &ImageTree, findings: &mut LintFindings<'_>) -> Result<bool> {
        let added = AddedFiles { baseline: self, period: self.moment.until_now() };
        visit_known_paths(inside, &mut |path, rule| {
            let Some(stat) = inside.metadata(path)? else { return Ok(()) };
            if stat.st_size == 0 || !self.start.includes(&stat) || findings.is_kept(path) {
                return Ok(());
            }
            let is_added = inside.version(path)?.is_some_and(|version| added.includes(&version));
            if is_added && contains_one_of(inside, path, rule.contains)? {
                findings.add(path, rule.what);
            }
            Ok(())
        })?;
        let mut searched = 0;
        for dir in SEARCHED {
            walk_files(inside, dir, &mut |entry| {
                let is_small =
                    (1..=SIZE_MAX).contains(&u64::try_from(entry.stat.st_size).unwrap_or_default());
                if !is_small || !self.start.includes(entry.stat) {
                    return Ok(());
                }
                let is_added = entry.version()?.is_some_and(|version| added.includes(&version));
                if !is_added || findings.has(entry.path) || findings.is_kept(entry.path) {
                    return Ok(());
                }
                searched += 1;
                if searched <= FILES_MAX
                    && let Some(file) = entry.open_file()?
                {
                    let read = start_of(file);
                    let content = read.with_context(|| format!("reading {}", entry.shown_path()))?;
                    if let Some(what) = credential_in(&content) {
                        findings.add(entry.path, what);
                    }
                }
                Ok(())
            })?;
        }
        Ok(searched <= FILES_MAX)
    }
}

impl AddedFiles<'_> {
    /// Returns whether the bake created or wrote a file whose inode changed during the bake. The inode also changes if a
    /// step only changes the owner, the mode, the name or the links of a file.
    fn includes(&self, version: &FileVersion) -> bool {
        match self.baseline.recorded.get(&version.id) {
            Some(recorded) => version != recorded,
            None => {
                let is_created = version.created.is_some_and(|time| self.period.includes(time));
                is_created || self.period.includes(version.modified)
            }
        }
    }
}

pub(in crate::seal) fn start_of(file: File) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(SIZE_MAX).read_to_end(&mut content)?;
    Ok(content)
}

/// Visits all regular files at the paths of the rules.
fn visit_known_paths(
    inside: &ImageTree,
    visit: &mut dyn FnMut(&str, &'static CredentialRule) -> Result<()>,
) -> Result<()> {
    let mut visit_pattern = |pattern: &str, rule: &'static CredentialRule| -> Result<()> {
        for (path, kind) in inside.expand(pattern)? {
            if kind == FileType::RegularFile && !rule_excludes(rule, &path) {
                visit(&path, rule)?;
            }
        }
        Ok(())
    };
    for rule in rules::CREDENTIALS.iter().filter(|rule| rule.path.starts_with('/')) {
        visit_pattern(rule.path, rule)?;
    }
    let in_home: Vec<_> = rules::CREDENTIALS.iter().filter(|rule| !rule.path.starts_with('/')).collect();
    for home in rules::homes(inside)? {
        let names = inside.list(&home)?;
        for rule in &in_home {
            let first = rule.path.split('/').next().unwrap_or_default();
            if names.binary_search_by(|name| name.as_os_str().cmp(OsStr::new(first))).is_ok() {
                visit_pattern(&format!("{}/{}", home.trim_end_matches('/'), rule.path), rule)?;
            }
        }
    }
    Ok(())
}

fn rule_excludes(rule: &CredentialRule, path: &str) -> bool {
    rule.except.is_some_and(|end| path.ends_with(end))
}

fn contains_one_of(inside: &ImageTree, path: &str, needles: &[&str]) -> Result<bool> {
    if needles.is_empty() {
        return Ok(true);
    }
    let content = inside.read_start(path, SIZE_MAX)?.unwrap_or_default();
    Ok(needles.iter().any(|needle| memchr::memmem::find(&content, needle.as_bytes()).is_some()))
}

/// Visits the regular files below a directory, except those in directories with public code.
fn walk_files(
    inside: &ImageTree,
    dir: &str,
    visit: &mut dyn FnMut(&WalkEntry<'_>) -> Result<()>,
) -> Result<()> {
    if !inside.is_directory(dir)? {
        return Ok(());
    }
    inside.walk_entries(dir, &mut |entry| {
        inside.meter().check()?;
        match entry.kind() {
            FileType::RegularFile => visit(entry)?,
            FileType::Directory if PUBLIC_CODE.contains(&entry.name()) => return Ok(Walk::Past),
            _ => {}
        }
        Ok(Walk::On)
    })
}

/// Returns the description of a credential that the content of a file contains.
pub(in crate::seal) fn credential_in(content: &[u8]) -> Option<&'static str> {
    let has = |text: &[u8]| memchr::memmem::find(content, text).is_some();
    if has_private_key(content) || (has(b"PuTTY-User-Key-File-") && has(b"Private-Lines:")) {
        return Some("it contains a private key");
    }
    if has(b"AGE-SECRET-KEY-1") {
        return Some("it contains a private key of age");
    }
    (has_access_key_id(content) && (has(b"ecret") || has(b"SECRET"))).then_some("it contains AWS access keys")
}

/// Returns whether a text contains a private key in PEM, of OpenSSH or of PGP. The name of such a key without its data,
/// as in a script that searches for keys, does not count.
fn has_private_key(content: &[u8]) -> bool {
    const BEGIN: &[u8] = b"-----BEGIN ";
    memchr::memmem::find_iter(content, BEGIN).any(|at| {
        let rest = &content[at + BEGIN.len()..];
        let Some(end) = memchr::memmem::find(&rest[..rest.len().min(64)], b"-----") else { return false };
        let (label, data) = (&rest[..end], &rest[end + 5..]);
        let is_private = label.ends_with(b"PRIVATE KEY") || label.ends_with(b"PRIVATE KEY BLOCK");
        is_private && label.iter().all(|b| b.is_ascii_alphanumeric() || *b == b' ') && begins_with_data(data)
    })
}

/// Returns whether base64 data follows, perhaps after attributes such as `Proc-Type: 4,ENCRYPTED`. In JSON, newlines are
/// escaped.
fn begins_with_data(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(&text[..text.len().min(2048)]).replace("\\r", "").replace("\\n", "\n");
    let lines = text.lines().map(|line| line.trim_matches([' ', '\t', '\r', '"', '\'', ',']));
    let mut lines = lines.filter(|line| !line.is_empty() && !line.contains(": ")).take(ATTRIBUTES_MAX);
    let is_base64 = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=');
    lines.next().is_some_and(|line| line.len() >= DATA_MIN && line.chars().take(64).all(|c| is_base64(&c)))
}

/// Returns whether a text contains the id of an AWS access key. The ids in AWS's documentation end with `EXAMPLE`.
fn has_access_key_id(content: &[u8]) -> bool {
    const LENGTH: usize = 20;
    let is_id = |at: usize| {
        let Some(id) = content.get(at..at + LENGTH) else { return false };
        let is_word = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let is_longer = is_word(content.get(at + LENGTH)) || at > 0 && is_word(content.get(at - 1));
        !is_longer
            && id.iter().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
            && !id.ends_with(b"EXAMPLE")
    };
    [&b"AKIA"[..], b"ASIA"].iter().any(|start| memchr::memmem::find_iter(content, start).any(is_id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    #[test]
    fn only_files_at_the_known_paths_are_recorded() {
        let tree = Tree::new();
        (0..100).for_each(|number| tree.file(&format!("root/deep/{number}.pem"), "x"));
        tree.file("root/.ssh/id_rsa", "x");
        tree.hard_link("root/.ssh/id_rsa", "root/.ssh/id_link");
        assert_eq!(CredentialBaseline::of(&tree.tree()).unwrap().recorded.len(), 1);
    }

    #[test]
    fn private_keys_and_access_keys_are_recognized() {
        const DATA: &str = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ==";
        let key = |label: &str, between: &str| format!("x\n-----BEGIN {label}-----{between}{DATA}\n");
        for text in [
            key("OPENSSH PRIVATE KEY", "\n"),
            key("PRIVATE KEY", "\r\n"),
            key("RSA PRIVATE KEY", "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n"),
            key("ENCRYPTED PRIVATE KEY", "\n    "),
            key("PGP PRIVATE KEY BLOCK", "\nVersion: GnuPG v2\n\n"),
            format!(
                "{{\"private_key\": \"-----BEGIN PRIVATE KEY-----\\n{DATA}\\n-----END PRIVATE KEY-----\\n\"}}"
            ),
            "PuTTY-User-Key-File-3: ssh-ed25519\nPrivate-Lines: 1\nAAAA\n".to_owned(),
            "AGE-SECRET-KEY-1QQPQ".to_owned(),
            "aws_access_key_id = AKIAABCDEFGHIJKLMNOP\naws_secret_access_key = x\n".to_owned(),
            "export AWS_ACCESS_KEY_ID=ASIA0123456789ABCDEF AWS_SECRET_ACCESS_KEY=x".to_owned(),
        ] {
            assert!(credential_in(text.as_bytes()).is_some(), "{text}");
        }
        for text in [
            key("CERTIFICATE", "\n"),
            key("PUBLIC KEY", "\n"),
            "grep -q -- '-----BEGIN RSA PRIVATE KEY-----' \"$file\"\n".to_owned(),
            "# -----BEGIN PRIVATE KEY-----\n# your key\n".to_owned(),
            "-----BEGIN PRIVATE KEY-----".to_owned(),
            "aws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = x\n".to_owned(),
            "AKIAABCDEFGHIJKLMNOP alone".to_owned(),
            "secret AKIAABCDEFGHIJKLMNOPQ".to_owned(),
        ] {
            assert_eq!(credential_in(text.as_bytes()), None, "{text}");
        }
    }
}
