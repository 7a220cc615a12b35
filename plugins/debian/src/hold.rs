//! Packages that no upgrade changes.

use crate::STATUS;
use oven_distro::{Job, Package, Refused, Wanted};

/// Refuses what apt-mark would take for something else than a name.
pub fn check(job: &Job) -> Result<(), Refused> {
    for name in &job.hold {
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "+.-:".contains(c));
        if !plain || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || name.ends_with('-') {
            return Err(Refused(format!("hold: `{name}`: not the name of a package")));
        }
    }
    Ok(())
}

/// Those that the image has to have already, and those that this job installs: these can be held only then.
pub fn split(job: &Job) -> (Vec<String>, Vec<String>) {
    let bare = |name: &str| name.split(':').next().unwrap_or_default().to_owned();
    let installs = |held: &String| {
        job.packages.iter().any(|package| match package {
            Package::Named { name, .. } | Package::File { name, .. } => bare(name) == bare(held),
            Package::Group { .. } => false,
        })
    };
    job.hold.iter().cloned().partition(|held| !installs(held))
}

/// What `apt-mark showhold` says, in its words: that one makes an index of all packages first, and asks dpkg for its
/// architectures over and over.
pub fn query() -> Vec<String> {
    ["awk", SHOW, STATUS].map(str::to_owned).to_vec()
}

/// dpkg itself is of the image's own architecture; packages of others are named with theirs.
const SHOW: &str = r#"/^Package: / { name = $2; hold = 0 }
/^Status: hold / { held[++count] = name; hold = 1 }
/^Architecture: / { if (name == "dpkg") own = $2; if (hold) of[count] = $2 }
END { for (i = 1; i <= count; i++) print held[i] (of[i] == "" || of[i] == own || of[i] == "all" ? "" : ":" of[i]) }"#;

/// A package that is held has to be there: apt-mark takes the name of any that a repository has.
pub fn wanted(job: &Job, mut wanted: Vec<Wanted>) -> Vec<Wanted> {
    for held in &job.hold {
        let (name, architecture) =
            held.split_once(':').map_or((held.as_str(), None), |(name, of)| (name, Some(of.to_owned())));
        if !wanted.iter().any(|w| w.name == name) {
            wanted.push(Wanted { name: name.to_owned(), architecture, version: None });
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_first_is_held_afterwards() {
        let named = |name: &str| Package::Named { name: name.into(), version: None };
        let hold = ["jq", "libc6:i386", "tree"].map(str::to_owned).to_vec();
        let job = Job { packages: vec![named("jq"), named("libc6")], hold, ..Job::default() };
        assert_eq!(split(&job), (vec!["tree".to_owned()], vec!["jq".to_owned(), "libc6:i386".to_owned()]));
        let names: Vec<_> = wanted(&job, Vec::new()).into_iter().map(|w| (w.name, w.architecture)).collect();
        let i386 = Some("i386".to_owned());
        assert_eq!(names, [("jq".to_owned(), None), ("libc6".to_owned(), i386), ("tree".to_owned(), None)]);
    }

    #[test]
    fn options_and_patterns_are_no_names() {
        for name in ["", "-y", "a b", "a*", "a/b", "a-", "?installed"] {
            assert!(check(&Job { hold: vec![name.into()], ..Job::default() }).is_err(), "{name}");
        }
    }
}
