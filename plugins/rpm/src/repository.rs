//! Validates a repository before it is written into a configuration file, and converts its priority.

use oven_distro::{MAX_PRIORITY, Refused, Repository};

/// apt's priority of a usual repository.
const USUAL: u16 = 500;
/// The priority of a usual repository in dnf and zypper, where a smaller number is preferred.
const DEFAULT: u16 = 99;

/// Refuses values that would add a section or a setting to the configuration file, or a directory to the file's path.
pub fn check(repository: &Repository) -> Result<(), Refused> {
    let Repository { name, url, suite, components, .. } = repository;
    let refuse = |why: &str| Err(Refused(format!("[[repository]] `{name}`: {why}")));
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    {
        return refuse("this is not a valid repository name");
    }
    if suite.is_some() || !components.is_empty() {
        return refuse("`suite` and `components` are only for Debian: remove them");
    }
    if !url.contains("://") || url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return refuse(&format!("`{url}` is not a valid address"));
    }
    match repository.priority {
        Some(priority) if !(1..=MAX_PRIORITY).contains(&priority) => {
            refuse(&format!("`priority` is {priority}: it must be 1 to {MAX_PRIORITY}"))
        }
        _ => Ok(()),
    }
}

/// The line of the repository's file that sets its priority.
pub fn priority_line(repository: &Repository) -> String {
    repository.priority.map(|priority| format!("priority={}\n", converted(priority))).unwrap_or_default()
}

/// Converts apt's priority. 500 becomes 99, the default of dnf and zypper. The numbers above it become 98 to 1, so several
/// of them become the same. The numbers below it become larger ones, one by one.
fn converted(priority: u16) -> u16 {
    let Some(above) = priority.checked_sub(USUAL) else { return DEFAULT + (USUAL - priority) };
    DEFAULT - (above * (DEFAULT - 1)).div_ceil(MAX_PRIORITY - USUAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_converted_in_the_inverse_sense() {
        for (apt, rpm) in
            [(1, 598), (100, 499), (499, 100), (500, 99), (501, 98), (600, 79), (990, 2), (1000, 1)]
        {
            assert_eq!(converted(apt), rpm, "{apt}");
        }
        assert!((1..MAX_PRIORITY).all(|priority| converted(priority) >= converted(priority + 1)));
    }
}
