//! The summary of a bake for people: what came out, what changed, and where the time went. It fits on one screen.

use crate::text::list_first;
use std::time::Duration;

/// The maximal number of packages that are named.
const NAMED_MAX: usize = 12;
/// The maximal number of characters of a list of packages. Three such lists fit on a screen of 40 columns and 24 rows.
const LIST_MAX: usize = 180;
/// Phases that are shorter than this are not named.
const SHORT_PHASE: Duration = Duration::from_millis(50);
/// The maximal number of phases that are named.
const PHASES_MAX: usize = 6;

/// The packages of an image that differ from those of its base. Each text names a package and its version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackageChanges {
    pub installed: Vec<String>,
    /// Packages with another version than before.
    pub changed: Vec<String>,
    pub removed: Vec<String>,
}

impl PackageChanges {
    /// Returns text such as `12 installed, 3 changed, 1 removed`, or `None` if nothing changed.
    pub fn counts(&self) -> Option<String> {
        let Self { installed, changed, removed } = self;
        let parts = [(installed, "installed"), (changed, "changed"), (removed, "removed")];
        let parts = parts.into_iter().filter(|(packages, _)| !packages.is_empty());
        let parts: Vec<_> = parts.map(|(packages, what)| format!("{} {what}", packages.len())).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// What a bake changed, and how long it took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BakeSummary {
    /// `None` if the packages are not known.
    pub packages: Option<PackageChanges>,
    /// The phases and their times, in the order of their first step.
    pub phases: Vec<(String, Duration)>,
    pub total: Duration,
}

impl BakeSummary {
    /// Returns the lines after the name of the image.
    pub fn lines(&self, size_gib: u64) -> Vec<String> {
        let mut lines = vec![format!("size: {size_gib} GiB")];
        if let Some(packages) = &self.packages {
            let counts = packages.counts().unwrap_or_else(|| "the same as in the base image".to_owned());
            lines.push(format!("packages: {counts}"));
            let PackageChanges { installed, changed, removed } = packages;
            for (what, packages) in [("installed", installed), ("changed", changed), ("removed", removed)] {
                if !packages.is_empty() {
                    lines.push(format!("  {what}: {}", package_list(packages)));
                }
            }
        }
        lines.push(self.times());
        lines
    }

    /// Returns the total time, and the times of the longest phases.
    fn times(&self) -> String {
        let mut long: Vec<_> = self.phases.iter().filter(|(_, time)| *time >= SHORT_PHASE).collect();
        long.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        long.truncate(PHASES_MAX);
        let words: Vec<_> =
            long.iter().map(|(phase, time)| format!("{phase} {:.1}", time.as_secs_f64())).collect();
        let phases = if words.is_empty() { String::new() } else { format!(" ({})", words.join(", ")) };
        format!("time: {:.1} s{phases}", self.total.as_secs_f64())
    }

    /// Returns a short text for the line of one of several images.
    pub fn line(&self, size_gib: u64) -> String {
        let packages = self.packages.as_ref().and_then(PackageChanges::counts);
        let packages = packages.map(|counts| format!(", packages: {counts}")).unwrap_or_default();
        format!("{size_gib} GiB, {:.1} s{packages}", self.total.as_secs_f64())
    }
}

/// Lists the first packages, as many as fit, and the number of the others.
fn package_list(packages: &[String]) -> String {
    let lists = (1..=NAMED_MAX).rev().map(|count| list_first(packages, count, ", "));
    let fitting = lists.into_iter().find(|list| list.chars().count() <= LIST_MAX);
    fitting.unwrap_or_else(|| format!("{} packages", packages.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(installed: usize) -> BakeSummary {
        let ms = Duration::from_millis;
        let installed = (0..installed).map(|n| format!("package-{n} 1.{n}")).collect();
        let changed = vec!["tzdata 2024a -> 2024b".to_owned()];
        BakeSummary {
            packages: Some(PackageChanges { installed, changed, removed: Vec::new() }),
            phases: [("checkout", 1200), ("fetch", 20_300), ("files", 3)]
                .map(|(p, t)| (p.to_owned(), ms(t)))
                .to_vec(),
            total: ms(42_120),
        }
    }

    #[test]
    fn the_end_names_what_changed_and_where_the_time_went() {
        assert_eq!(
            summary(2).lines(8),
            [
                "size: 8 GiB",
                "packages: 2 installed, 1 changed",
                "  installed: package-0 1.0, package-1 1.1",
                "  changed: tzdata 2024a -> 2024b",
                "time: 42.1 s (fetch 20.3, checkout 1.2)",
            ]
        );
        let many = summary(500).lines(8);
        assert!(many[2].ends_with(", and 489 more") && many.concat().len() < 24 * 40, "{many:?}");
        let none = BakeSummary { packages: Some(PackageChanges::default()), ..BakeSummary::default() };
        assert_eq!(none.lines(1), ["size: 1 GiB", "packages: the same as in the base image", "time: 0.0 s"]);
        assert_eq!(
            BakeSummary::default().lines(1),
            ["size: 1 GiB", "time: 0.0 s"],
            "the packages are not known"
        );
    }

    #[test]
    fn the_end_fits_a_small_screen() {
        for name in ["a", "linux-image-6.1.0-28-cloud-amd64 6.1.119-1", &"long-".repeat(100)] {
            let names = || (0..90).map(|n| format!("{name}{n}")).collect::<Vec<_>>();
            let packages = PackageChanges { installed: names(), changed: names(), removed: names() };
            let lines = BakeSummary { packages: Some(packages), ..summary(0) }.lines(8);
            let rows: usize = lines.iter().map(|line| (line.len() + 2).div_ceil(40)).sum();
            assert!(rows <= 21, "{rows} rows: {lines:#?}");
        }
    }

    #[test]
    fn one_of_several_images_has_one_line() {
        assert_eq!(summary(2).line(8), "8 GiB, 42.1 s, packages: 2 installed, 1 changed");
        assert_eq!(BakeSummary::default().line(8), "8 GiB, 0.0 s");
    }
}
