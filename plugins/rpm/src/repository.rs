//! Validates a repository before it is written into a configuration file.

use oven_distro::{Refused, Repository};

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
    Ok(())
}
