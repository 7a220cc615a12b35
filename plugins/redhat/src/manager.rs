//! The package managers, and how each is asked for the same.

use crate::mirror;
use oven_distro::{Job, Package, Refused, Step, Upgrade};
use oven_rpm::{Spelling, words};

/// In the order in which they are taken, where an image has several: `/usr/bin/dnf` may be either one's name, and
/// `/usr/bin/yum` is a name of dnf's on all but the oldest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manager {
    Dnf5,
    /// dnf 4 and before.
    Dnf,
    Yum,
    Microdnf,
}

const PATHS: [(Manager, &str); 4] = [
    (Manager::Dnf5, "/usr/bin/dnf5"),
    (Manager::Dnf, "/usr/bin/dnf"),
    (Manager::Yum, "/usr/bin/yum"),
    (Manager::Microdnf, "/usr/bin/microdnf"),
];
const VERSIONLOCK_DNF: &str = "/etc/dnf/plugins/versionlock.conf";
const VERSIONLOCK_YUM: &str = "/etc/yum/pluginconf.d/versionlock.conf";

pub const LOOK_FOR: [&str; 6] =
    [PATHS[0].1, PATHS[1].1, PATHS[2].1, PATHS[3].1, VERSIONLOCK_DNF, VERSIONLOCK_YUM];

impl Manager {
    pub fn of(has: impl Fn(&str) -> bool) -> Option<Self> {
        PATHS.into_iter().find(|(_, path)| has(path)).map(|(manager, _)| manager)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Dnf5 => "dnf5",
            Self::Dnf => "dnf",
            Self::Yum => "yum",
            Self::Microdnf => "microdnf",
        }
    }

    pub fn argv(self, parts: &[&[String]]) -> Vec<String> {
        std::iter::once(self.name().to_owned())
            .chain(parts.iter().flat_map(|part| part.iter().cloned()))
            .collect()
    }

    /// yum's systems have no `C.UTF-8` yet.
    pub fn spoken_to(self, mut step: Step) -> Step {
        if self == Self::Yum {
            step.env.insert("LC_ALL".to_owned(), "C".to_owned());
        }
        step
    }

    pub fn spelling(self) -> Spelling {
        let (missing, missing_group): (&[_], &[_]) = match self {
            Self::Dnf5 => {
                (&["No match for argument: {}"], &["No match for argument: {}", "No match for argument: @{}"])
            }
            Self::Dnf => (&["No match for argument: {}"], &["Module or Group '{}' is not available."]),
            Self::Yum => (&["No package {} available."], &["Warning: Group {} does not exist."]),
            Self::Microdnf => (&["error: No package matches '{}'"], &[]),
        };
        Spelling { named, group: |name| format!("@{name}"), missing, missing_group }
    }

    /// What every call says. A repository that cannot be reached is an error, not a warning, unless its own file says
    /// otherwise; of a name, the newest version or none. Signatures are looked at as the image's own settings say.
    pub fn options(self, job: &Job) -> Result<Vec<String>, Refused> {
        let weak = if job.recommends { "install_weak_deps=1" } else { "install_weak_deps=0" };
        let settings: &[&str] = match self {
            Self::Dnf5 => &["best=1", "skip_unavailable=0", "skip_if_unavailable=0", "keepcache=1", weak],
            Self::Dnf => &["best=1", "strict=1", "skip_if_unavailable=0", "keepcache=1", weak],
            Self::Yum => &["skip_if_unavailable=0", "keepcache=1"],
            Self::Microdnf => &["keepcache=1", weak],
        };
        let mut options = words(["-y"]);
        options.extend(settings.iter().map(|setting| format!("--setopt={setting}")));
        if self == Self::Microdnf {
            options.push("--best".to_owned());
            if job.packages.iter().any(|package| matches!(package, Package::Group { .. })) {
                return Err(Refused("packages: microdnf knows no groups: name packages".to_owned()));
            }
        }
        match &job.ca_file {
            Some(_) if self == Self::Microdnf => {
                let why =
                    "ca_file: microdnf is told of certificates by the image alone: add them to the base";
                return Err(Refused(why.to_owned()));
            }
            Some(path) => options.push(format!("--setopt=sslcacert={path}")),
            None => {}
        }
        options.extend(mirror::options(job)?);
        Ok(options)
    }

    /// Where it keeps what it downloads; microdnf has another place in each release.
    pub fn cache(self) -> Option<&'static str> {
        match self {
            Self::Dnf5 => Some("/var/cache/libdnf5"),
            Self::Dnf => Some("/var/cache/dnf"),
            Self::Yum => Some("/var/cache/yum"),
            Self::Microdnf => None,
        }
    }

    pub fn refresh(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Microdnf => words(["makecache", "--refresh"]),
            // It has no `--refresh`: what is there may be as old as the base.
            Self::Yum => words(["--setopt=metadata_expire=0", "makecache", "fast"]),
        }
    }

    /// Downloads, and changes nothing but the list of keys that are trusted.
    pub fn fetching(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Yum => words(["--downloadonly"]),
            // It has no such option, and downloads before it tests whether rpm would take the packages.
            Self::Microdnf => words(["--setopt=tsflags=test"]),
        }
    }

    /// Takes what was downloaded, and looks for nothing newer.
    pub fn cached(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Yum => words(["-C"]),
            // It never looks for newer metadata unless it is told to.
            Self::Microdnf => Vec::new(),
        }
    }

    /// The command that upgrades, if the job wants one.
    pub fn upgrade(self, job: &Job) -> Result<Option<Vec<String>>, Refused> {
        let mut verb = match (job.upgrade, self) {
            (Upgrade::None, _) => return Ok(None),
            (Upgrade::All, Self::Yum) => words(["update"]),
            (Upgrade::All, _) => words(["upgrade"]),
            (Upgrade::Security, Self::Dnf5 | Self::Dnf) => words(["upgrade", "--security"]),
            (Upgrade::Security, Self::Yum) => words(["update", "--security"]),
            (Upgrade::Security, Self::Microdnf) => {
                let why =
                    "upgrade: microdnf cannot tell which upgrades are for security: install dnf in the base";
                return Err(Refused(why.to_owned()));
            }
        };
        // The lock may not be known to this call yet, and microdnf knows none.
        verb.extend(
            job.hold.iter().filter(|_| self != Self::Microdnf).map(|name| format!("--exclude={name}")),
        );
        Ok(Some(verb))
    }

    /// The command that locks packages at the version that they are at. Repositories have no say in it.
    pub fn hold(self, has: impl Fn(&str) -> bool) -> Result<Vec<String>, Refused> {
        let lacks = match self {
            Self::Dnf5 => None,
            Self::Dnf => Some(VERSIONLOCK_DNF).filter(|path| !has(path)),
            Self::Yum => Some(VERSIONLOCK_YUM).filter(|path| !has(path)),
            Self::Microdnf => {
                return Err(Refused(
                    "hold: microdnf cannot hold packages: install dnf in the base".to_owned(),
                ));
            }
        };
        match lacks {
            Some(path) => Err(Refused(format!(
                "hold: the image's {} needs its plugin versionlock, and there is no {path}: install it in the base",
                self.name()
            ))),
            None => Ok(words(["-y", "--disablerepo=*", "versionlock", "add"])),
        }
    }

    pub fn clean_metadata(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Yum => words([self.name(), "clean", "metadata"]),
            Self::Microdnf => words([self.name(), "clean", "all"]),
        }
    }

    pub fn clean_all(self) -> Vec<String> {
        match self {
            // It leaves what belongs to repositories that are switched off.
            Self::Yum => words(["--enablerepo=*", "clean", "all"]),
            Self::Dnf5 | Self::Dnf | Self::Microdnf => words(["clean", "all"]),
        }
    }
}

/// Each takes `NAME-EPOCH:VERSION-RELEASE.ARCHITECTURE`, and a missing epoch for any: it is always said.
fn named(name: &str, architecture: Option<&str>, version: Option<&str>) -> String {
    let mut spelt = name.to_owned();
    if let Some(version) = version {
        let epoch = if version.contains(':') || version.starts_with('*') { "" } else { "0:" };
        spelt += &format!("-{epoch}{version}");
        // Before an architecture there has to be a release.
        if architecture.is_some() && !version.contains('-') && !version.ends_with('*') {
            spelt += "-*";
        }
    }
    match architecture {
        Some(architecture) => format!("{spelt}.{architecture}"),
        None => spelt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_dnf_spells_them() {
        assert_eq!(named("jq", None, None), "jq");
        assert_eq!(named("jq", Some("i686"), None), "jq.i686");
        assert_eq!(named("jq", None, Some("1.6")), "jq-0:1.6");
        assert_eq!(named("bind", None, Some("32:9.*")), "bind-32:9.*");
        assert_eq!(named("jq", Some("i686"), Some("1.6")), "jq-0:1.6-*.i686");
        assert_eq!(named("jq", Some("i686"), Some("1.6-2.el9")), "jq-0:1.6-2.el9.i686");
        assert_eq!(named("jq", None, Some("*-2.el9")), "jq-*-2.el9");
    }

    #[test]
    fn dnf_is_taken_before_what_is_only_a_name_of_it() {
        assert_eq!(Manager::of(|path| path != "/usr/bin/dnf5"), Some(Manager::Dnf));
        assert_eq!(Manager::of(|path| path == "/usr/bin/yum"), Some(Manager::Yum));
        assert_eq!(Manager::of(|_| true), Some(Manager::Dnf5));
        assert_eq!(Manager::of(|_| false), None);
    }
}
