//! What a repository has to be, before it becomes a file of settings.

use oven_distro::{Refused, Repository};

/// Refuses names and addresses that would be more than that in the file: a path, another section, another setting.
pub fn check(repository: &Repository) -> Result<(), Refused> {
    let Repository { name, url, suite, components, .. } = repository;
    let refuse = |why: &str| Err(Refused(format!("repositories: `{name}`: {why}")));
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    {
        return refuse("not the name of a repository");
    }
    if suite.is_some() || !components.is_empty() {
        return refuse(
            "suites and components are Debian's: a repository of rpm packages is its address alone",
        );
    }
    if !url.contains("://") || url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return refuse(&format!("`{url}` is not an address"));
    }
    Ok(())
}
