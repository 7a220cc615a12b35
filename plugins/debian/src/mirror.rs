//! A mirror that replaces the distribution's own archive while packages are fetched.
//!
//! Other repositories of the image, which are in files of `sources.list.d`, are not replaced.

use crate::conf;
use oven_distro::{Job, Refused, Shim};

const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const UBUNTU_KEYRING: &str = "/usr/share/keyrings/ubuntu-archive-keyring.gpg";
/// Files in which distributions list their own archive, in addition to sources.list.
const OWN_SOURCES: [&str; 2] =
    ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list.d/ubuntu.sources"];

pub const LOOK_FOR: [&str; 4] = [DEBIAN_KEYRING, UBUNTU_KEYRING, OWN_SOURCES[0], OWN_SOURCES[1]];

pub fn shims(job: &Job) -> Result<Vec<Shim>, Refused> {
    let Some(mirror) = &job.mirror else { return Ok(Vec::new()) };
    let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
    let shim = |path: &str, content: String| Shim { path: path.into(), content, mode: 0o644 };
    let mut shims = vec![shim(conf::MIRROR_SOURCES, sources(job, mirror, has)?)];
    let own = OWN_SOURCES.into_iter().filter(|path| has(path));
    shims.extend(own.map(|path| shim(path, "# oven uses a mirror while it bakes.\n".to_owned())));
    Ok(shims)
}

fn sources(job: &Job, mirror: &str, has: impl Fn(&str) -> bool) -> Result<String, Refused> {
    let refuse = |why: &str| Err(Refused(format!("mirror: {why}")));
    let os = &job.os_release;
    let uri = mirror.trim_end_matches('/');
    if !uri.contains(":/")
        || uri.contains(|c: char| c.is_whitespace() || c.is_control() || "[]\"#".contains(c))
    {
        return refuse(&format!("`{mirror}` is not the address of an archive"));
    }
    let Some(codename) = os.get("VERSION_CODENAME") else {
        return refuse("the image's os-release has no VERSION_CODENAME");
    };
    if !codename.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return refuse("the image's os-release has an invalid VERSION_CODENAME");
    }
    let signed = |keyring: &str| if has(keyring) { format!(" [signed-by={keyring}]") } else { String::new() };
    match os.id() {
        "ubuntu" => {
            let signed = signed(UBUNTU_KEYRING);
            let lines = ["", "-updates", "-security"].map(|pocket| {
                format!("deb{signed} {uri} {codename}{pocket} main restricted universe multiverse\n")
            });
            Ok(lines.concat())
        }
        "debian" => {
            let Some(version) = os.get("VERSION_ID").and_then(|v| v.split('.').next()?.parse::<u32>().ok())
            else {
                return refuse(
                    "a mirror works only for releases of Debian, but the image is testing or unstable",
                );
            };
            let Some(security) = security_archive(uri) else {
                return refuse(&format!(
                    "`{mirror}` must have a path segment `debian`, which oven replaces with `debian-security`"
                ));
            };
            let signed = signed(DEBIAN_KEYRING);
            // Since Debian 12, firmware is a separate component. Since Debian 11, the suite of the security archive has
            // another name.
            let components = if version >= 12 {
                "main contrib non-free non-free-firmware"
            } else {
                "main contrib non-free"
            };
            let suite =
                if version >= 11 { format!("{codename}-security") } else { format!("{codename}/updates") };
            Ok(format!(
                "deb{signed} {uri} {codename} {components}\n\
                 deb{signed} {uri} {codename}-updates {components}\n\
                 deb{signed} {security} {suite} {components}\n"
            ))
        }
        other => refuse(&format!("the layout of an archive of `{other}` is unknown")),
    }
}

/// The address of Debian's security archive, which is in the same directory as the main archive.
fn security_archive(uri: &str) -> Option<String> {
    let mut segments: Vec<&str> = uri.split('/').collect();
    let last = segments.iter().rposition(|segment| *segment == "debian")?;
    segments[last] = "debian-security";
    Some(segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::OsRelease;

    fn lines(os: &str, mirror: &str) -> Result<String, String> {
        sources(&Job { os_release: OsRelease::parse(os), ..Job::default() }, mirror, |_| true)
            .map_err(|r| r.0)
    }
    const DEBIAN_12: &str = "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n";

    #[test]
    fn debians_security_archive_is_in_the_directory_of_the_main_one() {
        let text = lines(DEBIAN_12, "http://mirror.local/debian/").unwrap();
        let of = |line: usize| text.lines().nth(line).unwrap().split_once("] ").unwrap().1.to_owned();
        assert_eq!(of(0), "http://mirror.local/debian bookworm main contrib non-free non-free-firmware");
        assert!(of(2).starts_with("http://mirror.local/debian-security bookworm-security main"));
        let snapshot =
            lines(DEBIAN_12, "https://snapshot.debian.org/archive/debian/20250101T000000Z").unwrap();
        assert!(snapshot.contains("/archive/debian-security/20250101T000000Z bookworm-security"));
        assert_eq!(text.matches("signed-by=/usr/share/keyrings/debian-archive-keyring.gpg").count(), 3);
    }

    #[test]
    fn ubuntus_security_suite_is_in_the_main_archive() {
        let text = lines("ID=ubuntu\nVERSION_CODENAME=noble\n", "http://m/ubuntu").unwrap();
        assert!(text.contains("http://m/ubuntu noble-security main restricted universe multiverse"));
        assert!(text.contains("ubuntu-archive-keyring"));
    }

    #[test]
    fn unusable_mirrors_are_refused() {
        for (os, mirror) in [
            (DEBIAN_12, "http://mirror.local/deb"),
            (DEBIAN_12, "http://mirror.local/debian evil main\ndeb http://x"),
            (DEBIAN_12, "mirror.local"),
            ("ID=debian\nVERSION_CODENAME=forky\n", "http://mirror.local/debian"),
            ("ID=debian\nVERSION_ID=12\n", "http://mirror.local/debian"),
            ("ID=kali\nID_LIKE=debian\nVERSION_CODENAME=kali-rolling\n", "http://mirror.local/debian"),
        ] {
            assert!(lines(os, mirror).unwrap_err().starts_with("mirror: "), "{os} {mirror}");
        }
    }
}
