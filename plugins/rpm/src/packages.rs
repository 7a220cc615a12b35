//! The packages that a definition requests, as arguments of the package manager, and as packages that must be installed
//! afterwards.

use crate::{architecture, trouble};
use oven_distro::{Job, Package, Refused, Trouble, Wanted};

/// The architectures of rpm, which may follow a name, as in `glibc.i686`.
const ARCHITECTURES: [&str; 7] = ["aarch64", "armv7hl", "i386", "i586", "i686", "noarch", "x86_64"];

/// How a package manager spells packages, and its messages about packages that it does not find.
#[derive(Clone, Copy)]
pub struct Spelling {
    /// Spells a package by name, architecture and version.
    pub named: fn(&str, Option<&str>, Option<&str>) -> String,
    pub group: fn(&str) -> String,
    /// The messages if a package is not found. `{}` stands for the argument.
    pub missing: &'static [&'static str],
    /// The messages if a group is not found. `{}` stands for its name.
    pub missing_group: &'static [&'static str],
}

#[derive(Debug, Default)]
pub struct PackageRequests {
    pub arguments: Vec<String>,
    pub wanted: Vec<Wanted>,
    /// Explanations of the package manager's messages if it does not find a package.
    pub troubles: Vec<Trouble>,
    /// Whether any of the packages is a file.
    pub files: bool,
}

impl PackageRequests {
    pub fn from_job(job: &Job, spelling: &Spelling) -> Result<Self, Refused> {
        let mut requests = Self::default();
        for package in &job.packages {
            let (argument, wanted) = match package {
                Package::Named { name, suite: Some(suite), .. } => {
                    return Err(Refused(format!(
                        "packages: `{name}/{suite}`: only apt has suites; set the `priority` of the [[repository]] that \
                         the package should come from"
                    )));
                }
                Package::Named { name, version, suite: None } => {
                    parse_name(name, version.as_deref(), spelling)?
                }
                Package::Group { name } => {
                    let argument = spell_group(name, spelling)?;
                    if !requests.arguments.contains(&argument) {
                        requests.add_not_found(name, None, name, spelling.missing_group);
                        requests.arguments.push(argument);
                    }
                    continue;
                }
                Package::File { path, name, version, architecture } => {
                    check_file(job, path, architecture)?;
                    requests.files = true;
                    let (name, version) = (name.clone(), Some(version.clone()));
                    (path.clone(), Wanted { name, architecture: Some(architecture.clone()), version })
                }
            };
            let same = |w: &&Wanted| w.name == wanted.name && w.architecture == wanted.architecture;
            match requests.wanted.iter().find(same) {
                Some(earlier) if earlier.version == wanted.version => continue,
                Some(_) => {
                    return Err(Refused(format!("packages: `{}` is listed with two versions", wanted.name)));
                }
                None => {}
            }
            if let Package::Named { name, version: Some(version), .. } = package {
                requests.add_not_found(name, Some(version), &argument, spelling.missing);
            }
            requests.arguments.push(argument);
            requests.wanted.push(wanted);
        }
        Ok(requests)
    }

    /// Adds explanations of the messages that a version or a group was not found. The explanations use the definition's
    /// spelling, and not the spelling of the argument.
    fn add_not_found(&mut self, name: &str, version: Option<&str>, argument: &str, missing: &[&str]) {
        let (means, hint) = match version {
            Some(version) => (
                format!("no repository of the image has version `{version}` of `{name}`"),
                "`*` stands for any text; an epoch, such as the `1:` of `1:9.2`, is part of a version.",
            ),
            None => (
                format!("no repository of the image has the group `{name}`"),
                "Check its spelling: use the group's id, not its title.",
            ),
        };
        let package = version.map_or_else(|| format!("@{name}"), |_| name.to_owned());
        let rows = missing
            .iter()
            .map(|row| trouble(&row.replace("{}", argument), &means, Some(hint), Some(&package)));
        self.troubles.extend(rows);
    }
}

fn parse_name(given: &str, version: Option<&str>, spelling: &Spelling) -> Result<(String, Wanted), Refused> {
    let refuse = |why: &str| Err(Refused(format!("packages: `{given}`: {why}")));
    // The architecture is spelled as in Debian, `glibc:i686`, or as in rpm, `glibc.i686`.
    let (name, architecture) = match given.split_once(':').or_else(|| given.rsplit_once('.')) {
        Some((name, architecture)) if ARCHITECTURES.contains(&architecture) => (name, Some(architecture)),
        Some((_, architecture)) if given.contains(':') => {
            return refuse(&format!("`{architecture}` is not an architecture of rpm"));
        }
        _ => (given, None),
    };
    let plain = |text: &str, also: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
    };
    if !plain(name, "+.-_") {
        return refuse("this is not a valid package name");
    }
    if let Some(version) = version
        && (!version.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '*')
            || !version.chars().all(|c| c.is_ascii_alphanumeric() || ".+~^_:-*".contains(c)))
    {
        return refuse(&format!("`{version}` is neither a version nor a pattern with `*`"));
    }
    let argument = (spelling.named)(name, architecture, version);
    let wanted = Wanted {
        name: name.to_owned(),
        architecture: architecture.map(str::to_owned),
        version: version.map(version_pattern),
    };
    Ok((argument, wanted))
}

/// The pattern of a version. A version without a release matches every release. Neither a version nor a release
/// contains a `-`, so a `-` means that a release is given.
fn version_pattern(version: &str) -> String {
    if version.contains('-') || version.ends_with('*') { version.to_owned() } else { format!("{version}-*") }
}

fn spell_group(name: &str, spelling: &Spelling) -> Result<String, Refused> {
    let bare = name.strip_prefix('^').unwrap_or(name);
    let allowed = |c: char| c.is_ascii_alphanumeric() || " +-._:()".contains(c);
    if !bare.starts_with(|c: char| c.is_ascii_alphanumeric()) || !bare.chars().all(allowed) {
        return Err(Refused(format!("packages: `@{name}`: this is not a valid group name")));
    }
    Ok((spelling.group)(name))
}

fn check_file(job: &Job, path: &str, file_architecture: &str) -> Result<(), Refused> {
    let file = path.rsplit('/').next().unwrap_or(path);
    if !file.ends_with(".rpm") {
        return Err(Refused(format!("packages: `{file}`: this image needs rpm packages (.rpm)")));
    }
    let image_architecture = architecture(job);
    let fits = match file_architecture {
        "noarch" => true,
        "i386" | "i486" | "i586" | "i686" => image_architecture == "x86_64",
        // `x86_64_v2` and so on are accepted, because rpm itself checks what the machine supports.
        other => other == image_architecture || other.starts_with(&format!("{image_architecture}_v")),
    };
    if !fits {
        return Err(Refused(format!(
            "packages: `{file}` is for {file_architecture}, but the image is {image_architecture}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPELLING: Spelling = Spelling {
        named: |name, architecture, version| format!("{name} {architecture:?} {version:?}"),
        group: |name| format!("@{name}"),
        missing: &["none for {}"],
        missing_group: &["no group {}"],
    };

    fn of(packages: Vec<Package>) -> Result<PackageRequests, String> {
        let job = Job { architecture: "x86_64".into(), packages, ..Job::default() };
        PackageRequests::from_job(&job, &SPELLING).map_err(|refused| refused.0)
    }

    fn ask(name: &str, version: Option<&str>) -> Result<PackageRequests, String> {
        of(vec![Package::Named { name: name.into(), version: version.map(str::to_owned), suite: None }])
    }

    #[test]
    fn names_versions_and_architectures() {
        for (given, name, architecture) in [
            ("glibc", "glibc", None),
            ("glibc:i686", "glibc", Some("i686")),
            ("glibc.i686", "glibc", Some("i686")),
            ("python3.11", "python3.11", None),
            ("java-17-openjdk_x", "java-17-openjdk_x", None),
        ] {
            let wanted = ask(given, None).unwrap().wanted.remove(0);
            assert_eq!((wanted.name.as_str(), wanted.architecture.as_deref()), (name, architecture));
        }
        for (version, pattern) in [
            ("1.0", "1.0-*"),
            ("1.0-1.el9", "1.0-1.el9"),
            ("1:1.0", "1:1.0-*"),
            ("1.*", "1.*"),
            ("1.*.2", "1.*.2-*"),
        ] {
            assert_eq!(ask("x", Some(version)).unwrap().wanted[0].version.as_deref(), Some(pattern));
        }
    }

    #[test]
    fn invalid_names_are_refused() {
        for name in ["", "-y", "@web", "a b", "a*", "ä", "x:", "x:arm64", "/usr/bin/x", "(a or b)", "a,b"] {
            let refused = ask(name, None).unwrap_err();
            assert!(refused.contains(&format!("`{name}`")), "{refused}");
        }
        for version in ["", "1 2", "1/2", "[1-9]", "$(id)", "-1"] {
            assert!(ask("nginx", Some(version)).is_err(), "{version}");
        }
        for name in ["", "-x", "a;b", "^", "web*"] {
            assert!(of(vec![Package::Group { name: name.into() }]).is_err(), "{name}");
        }
    }

    #[test]
    fn duplicates_are_merged_and_two_versions_are_refused() {
        let named =
            |version: &str| Package::Named { name: "jq".into(), version: Some(version.into()), suite: None };
        let group = || Package::Group { name: "^web server".into() };
        let requests = of(vec![named("1.6"), group(), named("1.6"), group()]).unwrap();
        assert_eq!(requests.arguments, ["jq None Some(\"1.6\")", "@^web server"]);
        assert!(of(vec![named("1.6"), named("1.7")]).unwrap_err().contains("`jq`"));
    }

    #[test]
    fn a_missing_package_is_reported_in_the_definitions_words() {
        let requests = ask("jq", Some("9.*")).unwrap();
        assert_eq!(requests.troubles[0].output, "none for jq None Some(\"9.*\")");
        assert_eq!(requests.troubles[0].means, "no repository of the image has version `9.*` of `jq`");
        assert_eq!(requests.troubles[0].package.as_deref(), Some("jq"));
    }

    #[test]
    fn a_file_for_another_architecture_or_distribution_is_refused() {
        let file = |path: &str, architecture: &str| Package::File {
            path: path.into(),
            name: "site".into(),
            version: "1.0-1".into(),
            architecture: architecture.into(),
        };
        for architecture in ["noarch", "x86_64", "x86_64_v2", "i686"] {
            assert!(of(vec![file("/run/oven/packages/0-site.rpm", architecture)]).unwrap().files);
        }
        let refused = of(vec![file("/run/oven/packages/0-site.rpm", "aarch64")]).unwrap_err();
        assert_eq!(refused, "packages: `0-site.rpm` is for aarch64, but the image is x86_64");
        assert!(of(vec![file("/run/oven/packages/0-site.deb", "all")]).unwrap_err().contains("0-site.deb"));
    }
}
