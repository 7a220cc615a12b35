//! The packages that a definition requests, as arguments of apt, and as packages that must be installed afterwards.

use oven_distro::{Job, Package, Refused, Wanted};

#[derive(Debug, Default)]
pub struct PackageRequests {
    /// The packages of each suite that the definition names, in the order of the definition. The last element, without a
    /// suite, has all other packages. There are no empty elements.
    pub groups: Vec<PackageGroup>,
    pub wanted: Vec<Wanted>,
}

/// Packages that one run of apt installs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PackageGroup {
    /// The suite that apt prefers, also for the packages' dependencies.
    pub suite: Option<String>,
    pub arguments: Vec<String>,
}

impl PackageRequests {
    pub fn from_job(job: &Job) -> Result<Self, Refused> {
        let mut requests = Self::default();
        for package in &job.packages {
            let (argument, wanted) = match package {
                Package::Named { name, version, suite } => {
                    parse_name(name, version.as_deref(), suite.as_deref())?
                }
                Package::Group { name } => {
                    let why = "groups exist only with dnf and zypper: list Debian packages or a metapackage";
                    return Err(Refused(format!("packages: `@{name}`: {why}")));
                }
                Package::File { path, name, version, architecture } => {
                    check_file(job, path, architecture)?;
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
            let suite = match package {
                Package::Named { suite, .. } => suite.clone(),
                _ => None,
            };
            requests.add(suite, argument);
            requests.wanted.push(wanted);
        }
        // Packages of suites are first: apt keeps what is installed if it can, and others may depend on them.
        requests.groups.sort_by_key(|group| group.suite.is_none());
        Ok(requests)
    }

    fn add(&mut self, suite: Option<String>, argument: String) {
        match self.groups.iter_mut().find(|group| group.suite == suite) {
            Some(group) => group.arguments.push(argument),
            None => self.groups.push(PackageGroup { suite, arguments: vec![argument] }),
        }
    }
}

impl PackageGroup {
    /// Returns text such as `2 packages of bookworm-backports`.
    pub fn title(&self) -> String {
        let count = match self.arguments.len() {
            1 => "1 package".to_owned(),
            n => format!("{n} packages"),
        };
        match &self.suite {
            Some(suite) => format!("{count} of {suite}"),
            None => count,
        }
    }
}

fn parse_name(
    spelling: &str,
    version: Option<&str>,
    suite: Option<&str>,
) -> Result<(String, Wanted), Refused> {
    let refuse = |why: &str| Err(Refused(format!("packages: `{spelling}`: {why}")));
    let (name, architecture) = match spelling.split_once(':') {
        Some((name, architecture)) => (name, Some(architecture)),
        None => (spelling, None),
    };
    // Some texts are refused, because apt would not read them as a name, but as a file, a removal, a task or a pattern.
    if name.ends_with('-') {
        return refuse("a trailing `-` would remove the package; remove it in a script instead");
    }
    let plain = |text: &str, also: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
    };
    if !plain(name, "+.-") || !architecture.is_none_or(|a| plain(a, "-")) {
        return refuse("this is not a valid package name");
    }
    if let Some(version) = version
        && (version.is_empty() || !version.chars().all(|c| c.is_ascii_alphanumeric() || ".+~:-*".contains(c)))
    {
        return refuse(&format!("`{version}` is neither a version nor a pattern with `*`"));
    }
    if let Some(suite) = suite
        && !plain(suite, "._+~-")
    {
        return refuse(&format!("`{suite}` is not the name of a suite"));
    }
    let argument = match (suite, version) {
        (_, Some(version)) => format!("{spelling}={version}"),
        // Without the suite's name here, apt would take another suite's package if this suite does not have it.
        (Some(suite), None) => format!("{spelling}/{suite}"),
        (None, None) => spelling.to_owned(),
    };
    // `any` and `native` are apt's names for any suitable architecture.
    let architecture = architecture.filter(|a| !["any", "native"].contains(a)).map(str::to_owned);
    Ok((argument, Wanted { name: name.to_owned(), architecture, version: version.map(str::to_owned) }))
}

fn check_file(job: &Job, path: &str, architecture: &str) -> Result<(), Refused> {
    let file = path.rsplit('/').next().unwrap_or(path);
    if !file.ends_with(".deb") {
        return Err(Refused(format!("packages: `{file}`: this image needs Debian packages (.deb)")));
    }
    let image_architecture = match job.architecture.as_str() {
        "x86_64" => "amd64",
        other => other,
    };
    // A file for any other architecture is accepted, because the image may have been configured for foreign
    // architectures. apt checks this.
    if ["amd64", "arm64"].contains(&architecture) && architecture != image_architecture {
        return Err(Refused(format!(
            "packages: `{file}` is for {architecture}, but the image is {image_architecture}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(name: &str, version: Option<&str>) -> Result<PackageRequests, String> {
        let package = Package::Named { name: name.into(), version: version.map(str::to_owned), suite: None };
        PackageRequests::from_job(&Job { packages: vec![package], ..Job::default() }).map_err(|r| r.0)
    }

    #[test]
    fn names_versions_and_architectures() {
        assert_eq!(ask("g++", None).unwrap().groups[0].arguments, ["g++"]);
        assert_eq!(
            ask("redis-server", Some("5:7.0.*")).unwrap().groups[0].arguments,
            ["redis-server=5:7.0.*"]
        );
        let requests = ask("libc6:i386", None).unwrap();
        assert_eq!(requests.groups, [PackageGroup { suite: None, arguments: vec!["libc6:i386".into()] }]);
        assert_eq!(
            (requests.wanted[0].name.as_str(), requests.wanted[0].architecture.as_deref()),
            ("libc6", Some("i386"))
        );
        assert_eq!(ask("hello:native", None).unwrap().wanted[0].architecture, None);
    }

    #[test]
    fn packages_of_a_suite_are_a_group() {
        let of = |name: &str, suite: &str, version: Option<&str>| {
            let (version, suite) = (version.map(str::to_owned), Some(suite.to_owned()));
            let packages = vec![Package::Named { name: name.into(), version, suite }];
            PackageRequests::from_job(&Job { packages, ..Job::default() }).map_err(|r| r.0)
        };
        for (name, suite, version, argument) in [
            ("golang-go", "bookworm-backports", None, "golang-go/bookworm-backports"),
            ("golang-go", "bookworm-backports", Some("2:1.2*"), "golang-go=2:1.2*"),
            ("libc6:i386", "trixie", Some("2.41-12"), "libc6:i386=2.41-12"),
        ] {
            let requests = of(name, suite, version).unwrap();
            let group = PackageGroup { suite: Some(suite.into()), arguments: vec![argument.into()] };
            assert_eq!(requests.groups, [group]);
            assert_eq!(requests.wanted[0].version.as_deref(), version);
        }
        for suite in ["", "-y", "a b", "a/b", "$(id)", "a*"] {
            assert!(of("jq", suite, None).is_err(), "{suite}");
        }
        let named = |name: &str, suite: Option<&str>| Package::Named {
            name: name.into(),
            version: None,
            suite: suite.map(str::to_owned),
        };
        let packages = [("a", None), ("b", Some("two")), ("c", Some("one")), ("d", None), ("e", Some("two"))];
        let packages = packages.map(|(name, suite)| named(name, suite)).to_vec();
        let requests = PackageRequests::from_job(&Job { packages, ..Job::default() }).unwrap();
        let groups: Vec<_> =
            requests.groups.iter().map(|group| (group.title(), group.arguments.join(" "))).collect();
        let expected =
            [("2 packages of two", "b/two e/two"), ("1 package of one", "c/one"), ("2 packages", "a d")];
        assert_eq!(groups, expected.map(|(title, arguments)| (title.to_owned(), arguments.to_owned())));
    }

    #[test]
    fn names_that_apt_would_misread_are_refused() {
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
    fn duplicates_are_merged_and_two_versions_are_refused() {
        let named =
            |version: &str| Package::Named { name: "jq".into(), version: Some(version.into()), suite: None };
        let of = |packages| PackageRequests::from_job(&Job { packages, ..Job::default() });
        assert_eq!(of(vec![named("1.6*"), named("1.6*")]).unwrap().groups[0].arguments, ["jq=1.6*"]);
        assert!(of(vec![named("1.6*"), named("1.7*")]).unwrap_err().0.contains("`jq`"));
    }

    #[test]
    fn a_file_for_another_architecture_or_distribution_is_refused() {
        let file = |path: &str, architecture: &str| Package::File {
            path: path.into(),
            name: "site".into(),
            version: "1.0".into(),
            architecture: architecture.into(),
        };
        let of = |package| {
            PackageRequests::from_job(&Job {
                architecture: "x86_64".into(),
                packages: vec![package],
                ..Job::default()
            })
        };
        assert!(of(file("/run/oven/packages/0-site.deb", "all")).is_ok());
        assert!(of(file("/run/oven/packages/0-site.deb", "amd64")).is_ok());
        assert!(of(file("/run/oven/packages/0-site.deb", "arm64")).unwrap_err().0.contains("0-site.deb"));
        assert!(of(file("/run/oven/packages/0-site.rpm", "noarch")).unwrap_err().0.contains("0-site.rpm"));
    }
}
