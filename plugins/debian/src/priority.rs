//! The priorities of repositories, as pins of apt (apt_preferences(5)).
//!
//! A pin cannot name a repository. It selects either the host of the address or the suite. So the pin selects the host,
//! unless other repositories have the same host. In that case the pin selects the suite.

use oven_distro::{Job, MAX_PRIORITY, Refused, Repository, Shim};

/// The files in which an image lists its own archive.
pub const IMAGE_SOURCES: [&str; 3] = [
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/debian.sources",
    "/etc/apt/sources.list.d/ubuntu.sources",
];

const APT: &str = "/etc/apt";

/// The hosts of the distributions' own archives end with one of these.
const OWN_HOSTS: [&str; 2] = ["debian.org", "ubuntu.com"];

/// The file with the pins of a repository that has a priority.
pub fn pins(job: &Job, repository: &Repository) -> Result<Option<Shim>, Refused> {
    let Some(priority) = repository.priority else { return Ok(None) };
    let Repository { name, suite, .. } = repository;
    let refuse = |why: String| Err(Refused(format!("[[repository]] `{name}`: `priority` {why}")));
    if !(1..=MAX_PRIORITY).contains(&priority) {
        return refuse(format!("is {priority}: it must be 1 to {MAX_PRIORITY}"));
    }
    let host = host(&repository.url);
    let selectors = if !is_shared(job, repository, host) {
        vec![format!("origin \"{host}\"")]
    } else {
        let own = job.os_release.get("VERSION_CODENAME");
        match suite.as_deref() {
            // A suite has two names: Debian's backports are found by the codename, and Ubuntu's by the other name.
            Some(suite) if !suite.ends_with('/') && Some(suite) != own => {
                vec![format!("release n={suite}"), format!("release a={suite}")]
            }
            _ => {
                return refuse(format!(
                    "cannot be set, because apt distinguishes repositories by host or by suite, and another repository \
                     has the same {host} and no other suite"
                ));
            }
        }
    };
    let explanation = explanation(name);
    let pins = selectors
        .iter()
        .map(|selector| format!("{explanation}\nPackage: *\nPin: {selector}\nPin-Priority: {priority}\n"));
    let content = pins.collect::<Vec<_>>().join("\n");
    Ok(Some(Shim { path: path(name), content, mode: 0o644 }))
}

fn path(name: &str) -> String {
    format!("{APT}/preferences.d/{name}.pref")
}

/// The first line of a file with pins.
fn explanation(name: &str) -> String {
    format!("Explanation: the priority of the repository {name}")
}

pub const REMOVE_WHY: &str = "removing earlier priorities of repositories";
/// Removes the pins of repositories that stay in the image and have no priority any more. The base image may have such
/// pins, if its definition had the same repository with a priority. Files that oven did not write are not removed.
/// `None` if there are no such repositories.
pub fn removal(job: &Job) -> Option<Vec<String>> {
    let mut found = Vec::new();
    for Repository { name, .. } in job.repositories.iter().filter(|one| one.keep && one.priority.is_none()) {
        let (path, explanation) = (path(name), explanation(name));
        let or = if found.is_empty() { &[][..] } else { &["-o"] };
        let test = ["-path", &path, "-exec", "grep", "-qxF", &explanation, "{}", ";"];
        found.extend(or.iter().chain(&test).map(|word| (*word).to_owned()));
    }
    let wrap = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let all = [wrap(&["find", APT, "-type", "f", "("]), found, wrap(&[")", "-delete"])];
    (!all[1].is_empty()).then(|| all.concat())
}

/// The host of an address, without a port.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split('/').next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Whether other repositories may have the same host. Of the image's files, only `IMAGE_SOURCES` are known, because a
/// plugin can only read files whose paths it knows before.
fn is_shared(job: &Job, repository: &Repository, host: &str) -> bool {
    let is_own = OWN_HOSTS
        .iter()
        .any(|own| host.strip_suffix(own).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')));
    let mut others = job.repositories.iter().filter(|other| other.name != repository.name);
    let mut texts = IMAGE_SOURCES.iter().filter_map(|path| job.texts.get(*path));
    let named =
        |text: &String| text.split_whitespace().any(|word| word.contains("://") && self::host(word) == host);
    is_own
        || job.mirror.as_deref().map(self::host) == Some(host)
        || others.any(|other| self::host(&other.url) == host)
        || texts.any(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::OsRelease;

    fn repository(name: &str, url: &str, suite: Option<&str>, priority: u16) -> Repository {
        Repository {
            name: name.into(),
            url: url.into(),
            key: None,
            suite: suite.map(str::to_owned),
            components: Vec::new(),
            keep: true,
            priority: Some(priority),
        }
    }

    /// The pins of the first repository, and its selectors.
    fn selectors(job: &Job) -> Result<Vec<String>, String> {
        let pins = pins(job, &job.repositories[0]).map_err(|refused| refused.0)?.unwrap();
        assert_eq!(pins.path, "/etc/apt/preferences.d/x.pref");
        let lines = pins.content.lines().filter_map(|line| line.strip_prefix("Pin: "));
        Ok(lines.map(str::to_owned).collect())
    }

    fn job(repositories: Vec<Repository>) -> Job {
        let os_release = OsRelease::parse("ID=debian\nVERSION_CODENAME=bookworm\n");
        Job { os_release, repositories, ..Job::default() }
    }

    #[test]
    fn a_pin_selects_the_host_or_the_suite() {
        let backports = ["release n=bookworm-backports", "release a=bookworm-backports"];
        for (url, suite, expected) in [
            (
                "https://download.docker.com/linux/debian",
                Some("bookworm"),
                vec!["origin \"download.docker.com\""],
            ),
            ("http://packages.example:8080/flat", None, vec!["origin \"packages.example\""]),
            ("https://notdebian.org/x", Some("stable"), vec!["origin \"notdebian.org\""]),
            ("http://deb.debian.org/debian", Some("bookworm-backports"), backports.to_vec()),
            ("http://own.example/debian", Some("bookworm-backports"), backports.to_vec()),
        ] {
            let mut job = job(vec![repository("x", url, suite, 600)]);
            let sources = "deb [signed-by=/a] http://own.example/debian bookworm main\n";
            job.texts.insert(IMAGE_SOURCES[0].into(), sources.into());
            assert_eq!(selectors(&job).unwrap(), expected, "{url}");
        }
        let two = |suite| {
            let other = repository("y", "https://x.example/b", Some("stable"), 500);
            job(vec![repository("x", "https://x.example/a", suite, 600), other])
        };
        assert_eq!(selectors(&two(Some("testing"))).unwrap(), ["release n=testing", "release a=testing"]);
        for suite in [None, Some("bookworm"), Some("flat/")] {
            let refused = selectors(&two(suite)).unwrap_err();
            assert!(refused.starts_with("[[repository]] `x`: `priority` cannot be set"), "{refused}");
        }
    }

    #[test]
    fn earlier_pins_are_removed_from_repositories_that_stay_without_a_priority() {
        let without = |name: &str| Repository { priority: None, ..repository(name, "http://x/", None, 1) };
        let temporary = Repository { keep: false, ..without("d") };
        let with = repository("c", "http://x/", None, 600);
        assert_eq!(removal(&job(vec![with.clone(), temporary.clone()])), None);
        let argv = removal(&job(vec![without("a"), with, temporary, without("b")])).unwrap();
        let expected = "find /etc/apt -type f ( -path /etc/apt/preferences.d/a.pref -exec grep -qxF \
                        Explanation: the priority of the repository a {} ; -o -path /etc/apt/preferences.d/b.pref \
                        -exec grep -qxF Explanation: the priority of the repository b {} ; ) -delete";
        assert_eq!(argv.join(" "), expected);
    }

    #[test]
    fn the_file_has_one_pin_for_each_name_of_the_suite() {
        let job = job(vec![repository("x", "http://deb.debian.org/debian", Some("bookworm-backports"), 500)]);
        let pins = pins(&job, &job.repositories[0]).unwrap().unwrap();
        let pin = |name: char| {
            format!(
                "Explanation: the priority of the repository x\nPackage: *\nPin: release {name}=bookworm-backports\n\
                 Pin-Priority: 500\n"
            )
        };
        assert_eq!(pins.content, format!("{}\n{}", pin('n'), pin('a')));
        for priority in [0, 1001] {
            let job = Job { repositories: vec![repository("x", "http://x/", None, priority)], ..job.clone() };
            assert!(super::pins(&job, &job.repositories[0]).is_err(), "{priority}");
        }
    }
}
