//! Held packages. No upgrade changes them.

use crate::STATUS;
use oven_distro::{Job, Package, Refused, Wanted};

/// Refuses texts that apt-mark would not read as a package name, but for example as a pattern.
pub fn check_names(job: &Job) -> Result<(), Refused> {
    for name in &job.hold {
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "+.-:".contains(c));
        if !plain || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || name.ends_with('-') {
            return Err(Refused(format!("hold: `{name}` is not a valid package name")));
        }
    }
    Ok(())
}

/// Splits the held packages into packages that the image must already have, and packages that this job installs. The
/// latter can be held only after their installation.
pub fn split_by_time(job: &Job) -> (Vec<String>, Vec<String>) {
    let bare = |name: &str| name.split(':').next().unwrap_or_default().to_owned();
    let installs = |held: &String| {
        job.packages.iter().any(|package| match package {
            Package::Named { name, .. } | Package::File { name, .. } => bare(name) == bare(held),
            Package::Group { .. } => false,
        })
    };
    job.hold.iter().cloned().partition(|held| !installs(held))
}

/// Lists held packages in the format of `apt-mark showhold`. That command is slower, because it builds an index of all
/// packages, and runs dpkg many times to get its architectures.
pub fn list_command() -> Vec<String> {
    ["awk", LIST_SCRIPT, STATUS].map(str::to_owned).to_vec()
}

/// If a package has a foreign architecture, its name is printed as `NAME:ARCHITECTURE`. The script takes the image's
/// own architecture from the package dpkg, because dpkg is always installed with this architecture.
const LIST_SCRIPT: &str = r#"/^Package: / { name = $2; hold = 0 }
/^Status: hold / { held[++count] = name; hold = 1 }
/^Architecture: / { if (name == "dpkg") own = $2; if (hold) of[count] = $2 }
END { for (i = 1; i <= count; i++) print held[i] (of[i] == "" || of[i] == own || of[i] == "all" ? "" : ":" of[i]) }"#;

/// Adds the held packages to the expected packages, so that oven checks that they are installed. apt-mark does not
/// check this.
pub fn add_expected(job: &Job, mut wanted: Vec<Wanted>) -> Vec<Wanted> {
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
    fn packages_of_this_job_are_held_after_their_installation() {
        let named = |name: &str| Package::Named { name: name.into(), version: None, suite: None };
        let hold = ["jq", "libc6:i386", "tree"].map(str::to_owned).to_vec();
        let job = Job { packages: vec![named("jq"), named("libc6")], hold, ..Job::default() };
        assert_eq!(
            split_by_time(&job),
            (vec!["tree".to_owned()], vec!["jq".to_owned(), "libc6:i386".to_owned()])
        );
        let names: Vec<_> =
            add_expected(&job, Vec::new()).into_iter().map(|w| (w.name, w.architecture)).collect();
        let i386 = Some("i386".to_owned());
        assert_eq!(names, [("jq".to_owned(), None), ("libc6".to_owned(), i386), ("tree".to_owned(), None)]);
    }

    #[test]
    fn options_and_patterns_are_refused() {
        for name in ["", "-y", "a b", "a*", "a/b", "a-", "?installed"] {
            assert!(check_names(&Job { hold: vec![name.into()], ..Job::default() }).is_err(), "{name}");
        }
    }
}
