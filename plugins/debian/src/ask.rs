//! The packages that a definition asks for, as apt's arguments and as what is expected afterwards.

use oven_distro::{Job, Package, Refused, Wanted};

#[derive(Debug, Default)]
pub struct Asks {
    pub arguments: Vec<String>,
    pub wanted: Vec<Wanted>,
}

impl Asks {
    pub fn of(job: &Job) -> Result<Self, Refused> {
        let mut asks = Self::default();
        for package in &job.packages {
            let (argument, wanted) = match package {
                Package::Named { name, version } => named(name, version.as_deref())?,
                Package::Group { name } => {
                    let why = "a group is for dnf and zypper: name Debian's packages, or a metapackage";
                    return Err(Refused(format!("packages: `@{name}`: {why}")));
                }
                Package::File { path, name, version, architecture } => {
                    check_file(job, path, architecture)?;
                    let (name, version) = (name.clone(), Some(version.clone()));
                    (path.clone(), Wanted { name, architecture: Some(architecture.clone()), version })
                }
            };
            let same = |w: &&Wanted| w.name == wanted.name && w.architecture == wanted.architecture;
            match asks.wanted.iter().find(same) {
                Some(earlier) if earlier.version == wanted.version => continue,
                Some(_) => {
                    return Err(Refused(format!("packages: `{}` is asked for in two versions", wanted.name)));
                }
                None => {}
            }
            asks.arguments.push(argument);
            asks.wanted.push(wanted);
        }
        Ok(asks)
    }
}

fn named(spelt: &str, version: Option<&str>) -> Result<(String, Wanted), Refused> {
    let refuse = |why: &str| Err(Refused(format!("packages: `{spelt}`: {why}")));
    let (name, architecture) = match spelt.split_once(':') {
        Some((name, architecture)) => (name, Some(architecture)),
        None => (spelt, None),
    };
    // apt would take these for something else than a name: a file, a suite, a removal, a task, a pattern.
    if spelt.contains('/') {
        return refuse("a suite cannot be chosen by name; pin a version, such as `NAME=*~bpo12*`");
    }
    if name.ends_with('-') {
        return refuse("a trailing `-` would remove the package; do that in a script");
    }
    let plain = |text: &str, also: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
    };
    if !plain(name, "+.-") || !architecture.is_none_or(|a| plain(a, "-")) {
        return refuse("not the name of a package");
    }
    if let Some(version) = version
        && (version.is_empty() || !version.chars().all(|c| c.is_ascii_alphanumeric() || ".+~:-*".contains(c)))
    {
        return refuse(&format!("`{version}` is not a version, and not one with `*`"));
    }
    let argument = match version {
        Some(version) => format!("{spelt}={version}"),
        None => spelt.to_owned(),
    };
    // apt's own words for "whatever fits".
    let architecture = architecture.filter(|a| !["any", "native"].contains(a)).map(str::to_owned);
    Ok((argument, Wanted { name: name.to_owned(), architecture, version: version.map(str::to_owned) }))
}

fn check_file(job: &Job, path: &str, architecture: &str) -> Result<(), Refused> {
    let file = path.rsplit('/').next().unwrap_or(path);
    if !file.ends_with(".deb") {
        return Err(Refused(format!("packages: `{file}`: this image takes Debian packages (.deb)")));
    }
    let images = match job.architecture.as_str() {
        "x86_64" => "amd64",
        other => other,
    };
    // Other foreign architectures may have been added to the image: apt knows.
    if ["amd64", "arm64"].contains(&architecture) && architecture != images {
        return Err(Refused(format!("packages: `{file}` is for {architecture}, and the image is {images}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(name: &str, version: Option<&str>) -> Result<Asks, String> {
        let package = Package::Named { name: name.into(), version: version.map(str::to_owned) };
        Asks::of(&Job { packages: vec![package], ..Job::default() }).map_err(|r| r.0)
    }

    #[test]
    fn names_versions_and_architectures() {
        assert_eq!(ask("g++", None).unwrap().arguments, ["g++"]);
        assert_eq!(ask("redis-server", Some("5:7.0.*")).unwrap().arguments, ["redis-server=5:7.0.*"]);
        let asks = ask("libc6:i386", None).unwrap();
        assert_eq!(asks.arguments, ["libc6:i386"]);
        assert_eq!(
            (asks.wanted[0].name.as_str(), asks.wanted[0].architecture.as_deref()),
            ("libc6", Some("i386"))
        );
        assert_eq!(ask("hello:native", None).unwrap().wanted[0].architecture, None);
    }

    #[test]
    fn what_apt_would_take_for_something_else_is_refused() {
        for name in [
            "",
            "-y",
            "nginx-",
            "nginx/bookworm-backports",
            "task^",
            "?installed",
            "~i",
            "a b",
            "a*",
            "ä",
            "x:",
        ] {
            let refused = ask(name, None).unwrap_err();
            assert!(refused.contains(&format!("`{name}`")), "{refused}");
        }
        for version in ["", "1 2", "1/2", "[1-9]", "$(id)"] {
            assert!(ask("nginx", Some(version)).is_err(), "{version}");
        }
    }

    #[test]
    fn the_same_twice_is_once_and_two_versions_are_refused() {
        let named = |version: &str| Package::Named { name: "jq".into(), version: Some(version.into()) };
        let of = |packages| Asks::of(&Job { packages, ..Job::default() });
        assert_eq!(of(vec![named("1.6*"), named("1.6*")]).unwrap().arguments, ["jq=1.6*"]);
        assert!(of(vec![named("1.6*"), named("1.7*")]).unwrap_err().0.contains("`jq`"));
    }

    #[test]
    fn a_file_has_to_fit_the_image() {
        let file = |path: &str, architecture: &str| Package::File {
            path: path.into(),
            name: "site".into(),
            version: "1.0".into(),
            architecture: architecture.into(),
        };
        let of = |package| {
            Asks::of(&Job { architecture: "x86_64".into(), packages: vec![package], ..Job::default() })
        };
        assert!(of(file("/run/oven/packages/0-site.deb", "all")).is_ok());
        assert!(of(file("/run/oven/packages/0-site.deb", "amd64")).is_ok());
        assert!(of(file("/run/oven/packages/0-site.deb", "arm64")).unwrap_err().0.contains("0-site.deb"));
        assert!(of(file("/run/oven/packages/0-site.rpm", "noarch")).unwrap_err().0.contains("0-site.rpm"));
    }
}
