//! Finds private keys and credentials that the bake added. Everybody who may start an instance of the image could read
//! them, and all instances would share them.
//!
//! Two searches find them: the paths at which programs store credentials ([`rules::CREDENTIALS`]), and the content of
//! small files below [`SEARCHED`]. Files that are as in the base image are not reported.

use super::Finding;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::seal::rules::{self, CredentialRule};
use crate::seal::secret_scan::BakeStart;
use crate::sys::signals::ensure_not_stopped;
use anyhow::Result;
use rustix::fs::{FileType, Stat};
use std::collections::{BTreeSet, HashMap};

/// The directories whose files are searched for private keys.
const SEARCHED: [&str; 3] = ["/etc", "/home", "/root"];
/// Directories with public code, which often contains keys for tests. Their files are not searched.
const PUBLIC_CODE: [&str; 5] = ["node_modules", "site-packages", "dist-packages", "testdata", ".git"];
/// The maximum size of a file that is searched. Keys and files of settings are small.
const SIZE_MAX: u64 = 64 << 10;
/// The maximum number of files that are searched, so that an image with millions of files does not take hours.
const FILES_MAX: usize = 50_000;
/// The maximum number of files whose state before the bake is recorded.
const RECORDED_MAX: usize = 200_000;
/// The maximum number of lines with attributes before the data of a private key.
const ATTRIBUTES_MAX: usize = 8;
/// The minimum length of the first line of a private key's data.
const DATA_MIN: usize = 16;

/// The files of the base image that may contain credentials.
pub struct CredentialBaseline {
    start: BakeStart,
    files: HashMap<String, FileState>,
}

/// The inode, size and modification time of a file. They do not change if only the owner or the mode changes.
type FileState = (u64, i64, i64, i64);

/// The credentials in an image, and whether all files were searched.
pub struct FoundCredentials {
    pub findings: Vec<Finding>,
    pub is_complete: bool,
}

impl CredentialBaseline {
    pub fn of(inside: &ImageTree) -> Result<Self> {
        let mut files = HashMap::new();
        for (path, _) in at_known_paths(inside)? {
            if let Some(stat) = inside.metadata(&path)? {
                files.insert(path, state(&stat));
            }
        }
        for dir in SEARCHED {
            walk_files(inside, dir, &mut |path, stat| {
                if files.len() < RECORDED_MAX {
                    files.insert(path.to_owned(), state(stat));
                }
                Ok(())
            })?;
        }
        Ok(Self { start: BakeStart::now(), files })
    }

    fn is_added(&self, path: &str, stat: &Stat) -> bool {
        self.start.includes(stat) && self.files.get(path) != Some(&state(stat))
    }

    /// Finds the credentials that the bake added. `is_accepted` returns whether a path is in `[clean] keep`.
    pub fn find(&self, inside: &ImageTree, is_accepted: &dyn Fn(&str) -> bool) -> Result<FoundCredentials> {
        let mut findings = Vec::new();
        for (path, rule) in at_known_paths(inside)? {
            let Some(stat) = inside.metadata(&path)? else { continue };
            let is_candidate = stat.st_size > 0 && self.is_added(&path, &stat) && !is_accepted(&path);
            if is_candidate && contains_one_of(inside, &path, rule.contains)? {
                findings.push(Finding { path, what: rule.what.to_owned() });
            }
        }
        let found: BTreeSet<_> = findings.iter().map(|finding| finding.path.clone()).collect();
        let mut searched = 0;
        for dir in SEARCHED {
            walk_files(inside, dir, &mut |path, stat| {
                let is_small = (1..=SIZE_MAX).contains(&u64::try_from(stat.st_size).unwrap_or_default());
                if !is_small || !self.is_added(path, stat) || found.contains(path) || is_accepted(path) {
                    return Ok(());
                }
                searched += 1;
                if searched <= FILES_MAX {
                    let content = inside.read_start(path, SIZE_MAX)?.unwrap_or_default();
                    let what = credential_in(&content);
                    findings
                        .extend(what.map(|what| Finding { path: path.to_owned(), what: what.to_owned() }));
                }
                Ok(())
            })?;
        }
        Ok(FoundCredentials { findings, is_complete: searched <= FILES_MAX })
    }
}

#[allow(clippy::unnecessary_cast, reason = "their types depend on the machine")]
fn state(stat: &Stat) -> FileState {
    (stat.st_ino as u64, stat.st_size as i64, stat.st_mtime as i64, stat.st_mtime_nsec as i64)
}

/// Returns all regular files at the paths of the rules.
fn at_known_paths(inside: &ImageTree) -> Result<Vec<(String, &'static CredentialRule)>> {
    let mut all = Vec::new();
    let mut add = |pattern: &str, rule| -> Result<()> {
        for (path, kind) in inside.expand(pattern)? {
            if kind == FileType::RegularFile && !rule_excludes(rule, &path) {
                all.push((path, rule));
            }
        }
        Ok(())
    };
    for rule in rules::CREDENTIALS.iter().filter(|rule| rule.path.starts_with('/')) {
        add(rule.path, rule)?;
    }
    let in_home: Vec<_> = rules::CREDENTIALS.iter().filter(|rule| !rule.path.starts_with('/')).collect();
    for home in rules::homes(inside)? {
        ensure_not_stopped()?;
        if !inside.is_directory(&home)? {
            continue;
        }
        let names: BTreeSet<_> =
            inside.list(&home)?.into_iter().filter_map(|name| name.into_string().ok()).collect();
        for rule in &in_home {
            let first = rule.path.split('/').next().unwrap_or_default();
            if names.contains(first) {
                add(&format!("{}/{}", home.trim_end_matches('/'), rule.path), *rule)?;
            }
        }
    }
    Ok(all)
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
fn walk_files(inside: &ImageTree, dir: &str, visit: &mut dyn FnMut(&str, &Stat) -> Result<()>) -> Result<()> {
    if !inside.is_directory(dir)? {
        return Ok(());
    }
    inside.walk(dir, &mut |path, stat| {
        ensure_not_stopped()?;
        let name = path.rsplit('/').next().unwrap_or_default();
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => visit(path, stat)?,
            FileType::Directory if PUBLIC_CODE.contains(&name) => return Ok(Walk::Past),
            _ => {}
        }
        Ok(Walk::On)
    })
}

/// Returns the description of a credential that the content of a file contains.
fn credential_in(content: &[u8]) -> Option<&'static str> {
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
