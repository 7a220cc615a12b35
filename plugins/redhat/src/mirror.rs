//! A mirror that replaces the distribution's own repositories while packages are fetched.
//!
//! Other repositories of the image are not replaced. Signatures are still checked with the keys that the image's own
//! repository files name.

use oven_distro::{Job, Refused};
use oven_rpm::architecture;

/// The repositories of a distribution, each with its path below a mirror. In a path, `{v}` is the release and `{a}` the
/// architecture.
const FEDORA: &[(&str, &str)] =
    &[("fedora", "releases/{v}/Everything/{a}/os/"), ("updates", "updates/{v}/Everything/{a}/")];
const ENTERPRISE: &[(&str, &str)] = &[
    ("baseos", "{v}/BaseOS/{a}/os/"),
    ("appstream", "{v}/AppStream/{a}/os/"),
    ("extras", "{v}/extras/{a}/os/"),
];

pub fn options(job: &Job) -> Result<Vec<String>, Refused> {
    let Some(mirror) = &job.mirror else { return Ok(Vec::new()) };
    let refuse = |why: &str| Err(Refused(format!("mirror: {why}")));
    let uri = mirror.trim_end_matches('/');
    if !uri.contains("://")
        || uri.contains(|c: char| c.is_whitespace() || c.is_control() || "\"'$,".contains(c))
    {
        return refuse(&format!("`{mirror}` is not the address of an archive"));
    }
    let os = &job.os_release;
    let version = os.get("VERSION_ID").and_then(|version| version.split('.').next()).unwrap_or_default();
    if version.is_empty() || !version.bytes().all(|b| b.is_ascii_digit()) {
        return refuse("the image's os-release has no VERSION_ID");
    }
    let repositories = match os.id() {
        "fedora" => FEDORA,
        "almalinux" | "rocky" => ENTERPRISE,
        other => {
            return refuse(&format!(
                "the layout of an archive of `{other}` is unknown; add [[repository]] entries instead"
            ));
        }
    };
    let of = |(id, place): &(&str, &str)| {
        let place = place.replace("{v}", version).replace("{a}", architecture(job));
        // The lists of mirrors are removed, because otherwise `baseurl` would not be used.
        [("metalink", String::new()), ("mirrorlist", String::new()), ("baseurl", format!("{uri}/{place}"))]
            .map(|(key, value)| format!("--setopt={id}.{key}={value}"))
    };
    Ok(repositories.iter().flat_map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::OsRelease;

    fn of(os: &str, mirror: &str) -> Result<Vec<String>, String> {
        let (os_release, mirror) = (OsRelease::parse(os), Some(mirror.to_owned()));
        options(&Job { os_release, mirror, architecture: "arm64".into(), ..Job::default() }).map_err(|r| r.0)
    }

    #[test]
    fn each_repository_has_its_path() {
        let options = of("ID=rocky\nVERSION_ID=9.4\n", "http://mirror.local/rocky/").unwrap();
        assert_eq!(options[0], "--setopt=baseos.metalink=");
        assert_eq!(options[2], "--setopt=baseos.baseurl=http://mirror.local/rocky/9/BaseOS/aarch64/os/");
        let options = of("ID=fedora\nVERSION_ID=42\n", "http://m/fedora").unwrap();
        assert_eq!(options[5], "--setopt=updates.baseurl=http://m/fedora/updates/42/Everything/aarch64/");
    }

    #[test]
    fn unusable_mirrors_are_refused() {
        for (os, mirror) in [
            ("ID=rocky\nVERSION_ID=9\n", "mirror.local"),
            ("ID=rocky\nVERSION_ID=9\n", "http://m/a http://b"),
            ("ID=rocky\n", "http://m/a"),
            ("ID=amzn\nVERSION_ID=2023\n", "http://m/a"),
        ] {
            assert!(of(os, mirror).unwrap_err().starts_with("mirror: "), "{os} {mirror}");
        }
    }
}
