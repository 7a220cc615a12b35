//! The package managers, and the command lines of each.

use crate::mirror;
use oven_distro::{Job, Package, Refused, Step, Upgrade};
use oven_rpm::{Spelling, words};

/// A package manager. If an image has several, the first one of this list is used. `/usr/bin/dnf` may be dnf 4 or 5. On
/// all but the oldest systems, `/usr/bin/yum` is only another name of dnf.
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

const PRIORITIES_YUM: &str = "/etc/yum/pluginconf.d/priorities.conf";

pub const LOOK_FOR: [&str; 7] =
    [PATHS[0].1, PATHS[1].1, PATHS[2].1, PATHS[3].1, VERSIONLOCK_DNF, VERSIONLOCK_YUM, PRIORITIES_YUM];

/// The directories of all package managers' downloads. microdnf uses one of these directories. Its release determines
/// which one.
pub const CACHES: [&str; 3] = ["/var/cache/dnf", DNF5_CACHE, "/var/cache/yum"];
pub const DNF5_CACHE: &str = "/var/cache/libdnf5";

impl Manager {
    pub fn detect(has: impl Fn(&str) -> bool) -> Option<Self> {
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

    /// Sets a locale that the system has. Systems with yum do not have `C.UTF-8` yet.
    pub fn with_locale(self, mut step: Step) -> Step {
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
        Spelling { named: spell_package, group: |name| format!("@{name}"), missing, missing_group }
    }

    /// The options of every call. With them, an unreachable repository is an error and not a warning, unless the
    /// repository's own file sets `skip_if_unavailable`. Only the newest version of a package is accepted. The image's
    /// own settings decide whether signatures are checked.
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
                return Err(Refused(
                    "packages: microdnf does not support groups; list packages instead".to_owned(),
                ));
            }
        }
        match &job.ca_file {
            Some(_) if self == Self::Microdnf => {
                let why = "ca_file: microdnf uses only the image's certificates; add yours to the base image";
                return Err(Refused(why.to_owned()));
            }
            Some(path) => options.push(format!("--setopt=sslcacert={path}")),
            None => {}
        }
        options.extend(mirror::options(job)?);
        Ok(options)
    }

    /// Checks that the package manager heeds the priorities of repositories.
    pub fn ensure_priorities(self, job: &Job) -> Result<(), Refused> {
        let preferred = job.repositories.iter().find(|repository| repository.priority.is_some());
        match preferred {
            Some(repository) if self == Self::Yum && job.present.get(PRIORITIES_YUM) != Some(&true) => {
                Err(Refused(format!(
                    "[[repository]] `{}`: `priority` needs yum's priorities plugin, but the image has no \
                     {PRIORITIES_YUM}; install yum-plugin-priorities in the base image",
                    repository.name
                )))
            }
            _ => Ok(()),
        }
    }

    /// The directory of the package manager's downloads. `None` for microdnf, because its directory differs between
    /// releases.
    pub fn cache(self) -> Option<&'static str> {
        match self {
            Self::Dnf5 => Some(DNF5_CACHE),
            Self::Dnf => Some("/var/cache/dnf"),
            Self::Yum => Some("/var/cache/yum"),
            Self::Microdnf => None,
        }
    }

    pub fn refresh_command(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Microdnf => words(["makecache", "--refresh"]),
            // yum has no `--refresh`. Without this setting, it would use metadata that may be as old as the base image.
            Self::Yum => words(["--setopt=metadata_expire=0", "makecache", "fast"]),
        }
    }

    /// Options with which a command only downloads. The command changes nothing except the list of trusted keys.
    pub fn download_options(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Yum => words(["--downloadonly"]),
            // microdnf has no option for this. But if rpm only tests the transaction, microdnf still downloads the
            // packages first.
            Self::Microdnf => words(["--setopt=tsflags=test"]),
        }
    }

    /// Options with which a command uses downloaded packages and does not search for newer ones.
    pub fn cache_only_options(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Yum => words(["-C"]),
            // microdnf does not need an option, because it never searches for newer metadata by itself.
            Self::Microdnf => Vec::new(),
        }
    }

    /// The command that prints the versions of the package `{name}`, from the indexes of the last refresh. Empty for
    /// microdnf, which cannot list them in this form.
    pub fn versions_command(self, options: &[String]) -> Vec<String> {
        let (query, filter): (&[_], _) = match self {
            Self::Dnf5 => (&["repoquery", "--queryformat", "%{evr}\\n"], "cat"),
            Self::Dnf => (&["repoquery", "--showduplicates", "--queryformat", "%{evr}"], "cat"),
            // The columns of a row are the package, its version and its repository. Other lines have no third column.
            Self::Yum => (
                &["list", "available", "--showduplicates"],
                r"sed -n 's/^[^ ]\{1,\}  *\([^ ]\{1,\}\)  *[^ ]\{1,\} *$/\1/p'",
            ),
            Self::Microdnf => return Vec::new(),
        };
        let query = words(["-q", "-C"].iter().chain(query).chain(&["{name}"]).copied());
        oven_rpm::list_versions(self.argv(&[options, &query]), filter)
    }

    /// The command that upgrades packages, if the job asks for an upgrade.
    pub fn upgrade_command(self, job: &Job) -> Result<Option<Vec<String>>, Refused> {
        let mut verb = match (job.upgrade, self) {
            (Upgrade::None, _) => return Ok(None),
            (Upgrade::All, Self::Yum) => words(["update"]),
            (Upgrade::All, _) => words(["upgrade"]),
            (Upgrade::Security, Self::Dnf5 | Self::Dnf) => words(["upgrade", "--security"]),
            (Upgrade::Security, Self::Yum) => words(["update", "--security"]),
            (Upgrade::Security, Self::Microdnf) => {
                let why = "upgrade: microdnf cannot select security upgrades; install dnf in the base image";
                return Err(Refused(why.to_owned()));
            }
        };
        // Held packages are excluded from the upgrade, because some of them are locked only later. For microdnf, this
        // is not needed, because the plugin refuses to hold packages if the image has microdnf.
        verb.extend(
            job.hold.iter().filter(|_| self != Self::Microdnf).map(|name| format!("--exclude={name}")),
        );
        Ok(Some(verb))
    }

    /// The command that locks packages at their installed version. It needs no repositories.
    pub fn hold_command(self, has: impl Fn(&str) -> bool) -> Result<Vec<String>, Refused> {
        let missing = match self {
            Self::Dnf5 => None,
            Self::Dnf => Some(VERSIONLOCK_DNF).filter(|path| !has(path)),
            Self::Yum => Some(VERSIONLOCK_YUM).filter(|path| !has(path)),
            Self::Microdnf => {
                return Err(Refused(
                    "hold: microdnf cannot hold packages; install dnf in the base image".to_owned(),
                ));
            }
        };
        match missing {
            Some(path) => Err(Refused(format!(
                "hold: {} needs its versionlock plugin, but the image has no {path}; install the plugin in the base \
                 image",
                self.name()
            ))),
            None => Ok(words(["-y", "--disablerepo=*", "versionlock", "add"])),
        }
    }

    pub fn clean_metadata_command(self) -> Vec<String> {
        match self {
            Self::Dnf5 | Self::Dnf | Self::Yum => words([self.name(), "clean", "metadata"]),
            Self::Microdnf => words([self.name(), "clean", "all"]),
        }
    }

    pub fn clean_all_command(self) -> Vec<String> {
        match self {
            // Without this option, yum does not remove the files of disabled repositories.
            Self::Yum => words(["--enablerepo=*", "clean", "all"]),
            Self::Dnf5 | Self::Dnf | Self::Microdnf => words(["clean", "all"]),
        }
    }
}

/// Spells a package as `NAME-EPOCH:VERSION-RELEASE.ARCHITECTURE`. The epoch is always given, because without it the
/// package managers would accept any epoch.
fn spell_package(name: &str, architecture: Option<&str>, version: Option<&str>) -> String {
    let mut text = name.to_owned();
    if let Some(version) = version {
        let epoch = if version.contains(':') || version.starts_with('*') { "" } else { "0:" };
        text += &format!("-{epoch}{version}");
        // The package managers accept an architecture only after a release.
        if architecture.is_some() && !version.contains('-') && !version.ends_with('*') {
            text += "-*";
        }
    }
    match architecture {
        Some(architecture) => format!("{text}.{architecture}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_dnf_spells_them() {
        assert_eq!(spell_package("jq", None, None), "jq");
        assert_eq!(spell_package("jq", Some("i686"), None), "jq.i686");
        assert_eq!(spell_package("jq", None, Some("1.6")), "jq-0:1.6");
        assert_eq!(spell_package("bind", None, Some("32:9.*")), "bind-32:9.*");
        assert_eq!(spell_package("jq", Some("i686"), Some("1.6")), "jq-0:1.6-*.i686");
        assert_eq!(spell_package("jq", Some("i686"), Some("1.6-2.el9")), "jq-0:1.6-2.el9.i686");
        assert_eq!(spell_package("jq", None, Some("*-2.el9")), "jq-*-2.el9");
    }

    #[test]
    fn versions_are_listed_newest_first() {
        let of_yum = "Available Packages\ncurl.x86_64     7.29.0-9.el7     base\ncurl.i686       7.29.0-9.el7     base\n\
                      curl.x86_64     7.29.0-59.el7_9.1     updates\nError: x\n";
        for (manager, output, versions) in [
            (Manager::Yum, of_yum, "7.29.0-59.el7_9.1\n7.29.0-9.el7\n"),
            (Manager::Dnf, "1.9-1\n1.10-1\n1.9-1\n", "1.10-1\n1.9-1\n"),
            (Manager::Dnf5, "", ""),
        ] {
            let command = manager.versions_command(&words(["-y"]));
            assert_eq!(command[3..7], words(["sh", manager.name(), "-y", "-q"]));
            assert_eq!(command.last().unwrap(), "{name}");
            let mut sh = std::process::Command::new("sh");
            let listed = sh.args(&command[1..4]).args(["printf", "%s", output]).output().unwrap();
            assert_eq!(String::from_utf8(listed.stdout).unwrap(), versions, "{manager:?}");
        }
        assert!(Manager::Microdnf.versions_command(&[]).is_empty());
    }

    #[test]
    fn dnf_is_preferred_to_yum_which_may_be_a_name_of_it() {
        assert_eq!(Manager::detect(|path| path != "/usr/bin/dnf5"), Some(Manager::Dnf));
        assert_eq!(Manager::detect(|path| path == "/usr/bin/yum"), Some(Manager::Yum));
        assert_eq!(Manager::detect(|_| true), Some(Manager::Dnf5));
        assert_eq!(Manager::detect(|_| false), None);
    }
}
