//! Package repositories that a definition adds to the image's own.
//!
//! Each repository has its own file (deb822), which names the keys that may sign the repository. So no key is trusted
//! for another repository. A repository with `keep = false` exists only while the plan's steps run. Keys are separate
//! files, because apt reads keys in a deb822 file only since version 2.3.10.

use crate::priority;
use oven_distro::{Job, Refused, Repository, Shim, Trouble};

const KEYRINGS: &str = "/etc/apt/keyrings";
const TEMPORARY_KEYRINGS: &str = "/run/oven/keyrings";
const PARTS: &str = "/etc/apt/sources.list.d";
/// The names of the distribution's own files. A repository of a definition must not have one of these names.
const RESERVED: [&str; 2] = ["debian", "ubuntu"];
const END: &str = "-----END PGP PUBLIC KEY BLOCK-----\n";

/// The parts of a plan that come from a job's repositories.
#[derive(Debug, Default)]
pub struct Repositories {
    pub files: Vec<Shim>,
    pub shims: Vec<Shim>,
    /// Warnings of apt that make the bake fail.
    pub failures: Vec<Trouble>,
}

pub fn from_job(job: &Job) -> Result<Repositories, Refused> {
    let mut all = Repositories::default();
    for repository in &job.repositories {
        let Repository { name, keep, .. } = repository;
        let refuse = |why: &str| Err(Refused(format!("[[repository]] `{name}`: {why}")));
        if RESERVED.contains(&name.to_ascii_lowercase().as_str()) {
            return refuse("the distribution's own repository has this name: choose another name");
        }
        // The values are checked, because they become parts of configuration files and of patterns for apt's messages.
        let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && c != '/');
        if !plain(name) || name.starts_with('.') {
            return refuse("a name can only have letters, digits, `-`, `_` and `.`");
        }
        if !repository.url.contains("://")
            || !repository.url.chars().all(|c| c.is_ascii_graphic() && c != '*')
        {
            return refuse("`url` is not a valid address");
        }
        let suites = suites(repository)?;
        let keyrings = if *keep { KEYRINGS } else { TEMPORARY_KEYRINGS };
        let keys: Vec<_> = split_keys(repository.key.as_deref().unwrap_or_default())
            .enumerate()
            .map(|(index, block)| {
                let number = if index == 0 { String::new() } else { format!("-{}", index + 1) };
                shim(format!("{keyrings}/{name}{number}.asc"), block.to_owned())
            })
            .collect();
        if repository.key.is_some() && keys.is_empty() {
            return refuse("`key` contains no ASCII-armoured public key");
        }
        let signed = match keys.iter().map(|key| key.path.as_str()).collect::<Vec<_>>().join(" ") {
            paths if paths.is_empty() => "Trusted: yes\n".to_owned(),
            paths => format!("Signed-By: {paths}\n"),
        };
        let text = format!("Types: deb\nURIs: {}\n{suites}{signed}", repository.url);
        let source = shim(format!("{PARTS}/{name}.sources"), text);
        let pins = priority::pins(job, repository)?;
        let to = if *keep { &mut all.files } else { &mut all.shims };
        to.extend(keys.into_iter().chain([source]).chain(pins));
        all.failures.extend(missing_component_warnings(repository));
    }
    Ok(all)
}

fn shim(path: String, content: String) -> Shim {
    Shim { path, content, mode: 0o644 }
}

/// Splits a file of keys into blocks, because apt reads only the first block of a file.
fn split_keys(key: &str) -> impl Iterator<Item = &str> {
    key.split_inclusive(END).filter(|block| block.ends_with(END))
}

fn suites(repository: &Repository) -> Result<String, Refused> {
    let Repository { name, suite, components, .. } = repository;
    let refuse = |why: &str| Err(Refused(format!("[[repository]] `{name}`: {why}")));
    let mut words = suite.iter().chain(components);
    if words.any(|word| word.is_empty() || !word.chars().all(|c| c.is_ascii_graphic())) {
        return refuse("`suite` or one of `components` is not a single word");
    }
    match suite.as_deref() {
        // These are apt's rules: a path that ends with a slash must have no components, and a suite must have at least
        // one.
        None if components.is_empty() => Ok("Suites: ./\n".to_owned()),
        None => refuse("`components` needs a `suite`, such as \"bookworm\""),
        Some(path) if path.ends_with('/') && components.is_empty() => Ok(format!("Suites: {path}\n")),
        Some(path) if path.ends_with('/') => {
            refuse(&format!("`{path}` is the path of a flat repository, which has no `components`"))
        }
        Some(suite) if components.is_empty() => refuse(&format!(
            "the suite `{suite}` needs `components`, such as [\"main\"]; a flat repository's path ends with `/`"
        )),
        Some(suite) => Ok(format!("Suites: {suite}\nComponents: {}\n", components.join(" "))),
    }
}

/// Matches apt's warning about a misspelt component. After this warning, apt would continue without the component, so
/// the bake fails.
fn missing_component_warnings(repository: &Repository) -> [Trouble; 2] {
    let Repository { name, url, suite, .. } = repository;
    let (url, suite) = (url.trim_end_matches('/'), suite.as_deref().unwrap_or("./"));
    let start = format!("W: Skipping acquire of configured file '*' as repository '{url} {suite} *'");
    let trouble = |end: &str, means: String| Trouble {
        output: format!("{start} {end}"),
        means,
        hint: Some("Check `url`, `suite` and `components` of its [[repository]] in image.toml.".to_owned()),
        package: None,
    };
    [
        trouble(
            "doesn't have the component '*'*",
            format!("the repository `{name}` has no component `{{3}}`"),
        ),
        trouble("does not seem to provide it*", format!("the repository `{name}` has no {{1}}")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n";

    fn repository(suite: Option<&str>, components: &[&str]) -> Repository {
        Repository {
            name: "tools".into(),
            url: "https://repo.example/debian".into(),
            key: Some(KEY.into()),
            suite: suite.map(str::to_owned),
            components: components.iter().map(|c| (*c).to_owned()).collect(),
            keep: true,
            priority: None,
        }
    }

    fn one(repository: Repository) -> Result<Repositories, String> {
        from_job(&Job { repositories: vec![repository], ..Job::default() }).map_err(|refused| refused.0)
    }

    #[test]
    fn each_has_a_file_and_a_key_of_its_own() {
        let all = one(repository(Some("bookworm"), &["main", "extra"])).unwrap();
        let text = "Types: deb\nURIs: https://repo.example/debian\nSuites: bookworm\nComponents: main extra\n\
                    Signed-By: /etc/apt/keyrings/tools.asc\n";
        assert_eq!(all.shims, []);
        assert_eq!(
            all.files,
            [
                shim("/etc/apt/keyrings/tools.asc".into(), KEY.into()),
                shim("/etc/apt/sources.list.d/tools.sources".into(), text.into())
            ]
        );
    }

    #[test]
    fn a_temporary_repository_leaves_no_file() {
        let all = one(Repository { keep: false, ..repository(None, &[]) }).unwrap();
        assert_eq!(all.files, []);
        let paths: Vec<_> = all.shims.iter().map(|shim| shim.path.as_str()).collect();
        assert_eq!(paths, ["/run/oven/keyrings/tools.asc", "/etc/apt/sources.list.d/tools.sources"]);
        assert!(all.shims[1].content.contains("Suites: ./\nSigned-By: /run/oven/keyrings/tools.asc\n"));
    }

    #[test]
    fn every_key_of_a_file_is_used_and_without_a_key_the_repository_is_trusted() {
        let all = one(Repository { key: Some(KEY.repeat(2)), ..repository(None, &[]) }).unwrap();
        assert_eq!(all.files.len(), 3);
        let both = "Signed-By: /etc/apt/keyrings/tools.asc /etc/apt/keyrings/tools-2.asc\n";
        assert!(all.files[2].content.ends_with(both), "{}", all.files[2].content);
        let unsigned = one(Repository { key: None, ..repository(None, &[]) }).unwrap();
        assert!(unsigned.files[0].content.ends_with("Trusted: yes\n"));
        assert!(one(Repository { key: Some("x".into()), ..repository(None, &[]) }).is_err());
    }

    #[test]
    fn invalid_repositories_are_refused_by_name() {
        for (suite, components, why) in [
            (None, &["main"][..], "needs a `suite`"),
            (Some("bookworm"), &[], "needs `components`"),
            (Some("bookworm/"), &["main"], "has no `components`"),
            (Some("a b"), &["main"], "is not a single word"),
            (Some("a\nTrusted: yes"), &["main"], "is not a single word"),
        ] {
            let refused = one(repository(suite, components)).unwrap_err();
            assert!(refused.starts_with("[[repository]] `tools`: ") && refused.contains(why), "{refused}");
        }
        for name in ["debian", "Ubuntu", "", "a/b", ".a", "a b"] {
            assert!(one(Repository { name: name.into(), ..repository(None, &[]) }).is_err(), "{name}");
        }
        assert!(one(Repository { url: "https://x/ bookworm".into(), ..repository(None, &[]) }).is_err());
    }
}
