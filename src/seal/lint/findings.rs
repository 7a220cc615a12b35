//! Collects what the lint finds.

use crate::seal::rules::is_excluded;
use crate::seal::secret_scan::shorten;
use crate::secrets::Secrets;
use crate::text::escape_name;
use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// The maximum number of findings in an error message.
const NAMED_MAX: usize = 20;
/// The number of findings whose paths are recognized if they are found again. Beyond it, a path may count twice.
const RECOGNIZED_MAX: usize = 100_000;

/// A path that must not be in the image, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    path: String,
    what: String,
}

/// The findings of the lint, except the paths in `[clean] keep`. Only the first findings are stored, because an image may
/// have millions, with paths of any length.
pub struct LintFindings<'a> {
    keep: &'a [String],
    secrets: &'a Secrets,
    first: Vec<Finding>,
    /// The number of all findings.
    count: usize,
    /// The hashes of the paths.
    known: HashSet<u64>,
    hasher: RandomState,
}

impl<'a> LintFindings<'a> {
    pub fn new(keep: &'a [String], secrets: &'a Secrets) -> Self {
        let (known, hasher) = (HashSet::new(), RandomState::new());
        Self { keep, secrets, first: Vec::new(), count: 0, known, hasher }
    }

    /// Adds a path, unless it was added already or is in `[clean] keep`.
    pub fn add(&mut self, path: &str, what: &str) {
        let hash = self.hasher.hash_one(path);
        if self.is_kept(path) || self.known.contains(&hash) {
            return;
        }
        if self.known.len() < RECOGNIZED_MAX {
            self.known.insert(hash);
        }
        self.count += 1;
        if self.first.len() < NAMED_MAX {
            let path = shorten(&escape_name(&*self.secrets.mask(path)));
            self.first.push(Finding { path, what: what.to_owned() });
        }
    }

    pub fn is_kept(&self, path: &str) -> bool {
        is_excluded(self.keep, path)
    }

    pub fn has(&self, path: &str) -> bool {
        self.known.contains(&self.hasher.hash_one(path))
    }

    /// Sorts the findings that an error message names.
    pub fn sort(&mut self) {
        self.first.sort();
    }

    /// Returns the path of the first finding, and the lines of the error message.
    pub fn list(&self) -> Option<(&str, String)> {
        let first = self.first.first()?;
        let lines = self.first.iter().map(|finding| format!("{}: {}", finding.path, finding.what));
        let mut list = lines.collect::<Vec<_>>().join("\n    ");
        if self.count > self.first.len() {
            list += &format!("\n    and {} more", self.count - self.first.len());
        }
        Some((&first.path, list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_findings_are_stored_and_all_are_counted_once() {
        let (keep, secrets) = (["/tmp/keep".to_owned()], Secrets::default());
        let mut findings = LintFindings::new(&keep, &secrets);
        let path = |number: usize| format!("/tmp/{number}/{}", "x".repeat(1 << 20));
        for number in (0..50).chain(0..50) {
            findings.add(&path(number), "a temporary file");
        }
        findings.add("/tmp/keep/x", "a temporary file");
        assert!(findings.has(&path(49)) && !findings.has("/tmp/keep/x"));
        let (first, list) = findings.list().unwrap();
        assert!(first.starts_with("/tmp/0/xxx") && first.len() < 4096, "{}", first.len());
        assert!(list.ends_with(": a temporary file\n    and 30 more"), "{}", list.len());
        assert!(list.len() < 20 * 4096);
    }

    #[test]
    fn a_secret_in_a_long_path_is_masked_before_the_path_is_shortened() {
        let secrets = Secrets::of_test(&[("TOKEN", "hunter2-hunter2")]);
        let mut findings = LintFindings::new(&[], &secrets);
        findings.add(&format!("/{}hunter2-hunter2{}", "x".repeat(503), "y".repeat(5000)), "a log");
        let (path, _) = findings.list().unwrap();
        assert!(!path.contains("hunter2") && path.contains('…'), "{path}");
    }
}
