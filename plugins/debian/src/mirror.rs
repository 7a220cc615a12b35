//! A mirror that replaces the distribution's own archive while packages are fetched.
//!
//! Other repositories of the image (files of its own in `sources.list.d`) stay as they are.

use crate::conf;
use oven_distro::{Job, Refused, Shim};

const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const UBUNTU_KEYRING: &str = "/usr/share/keyrings/ubuntu-archive-keyring.gpg";
/// Where the distributions list their own archive, beside sources.list.
const OWN_SOURCES: [&str; 2] =
    ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list.d/ubuntu.sources"];

pub const LOOK_FOR: [&str; 4] = [DEBIAN_KEYRING, UBUNTU_KEYRING, OWN_SOURCES[0], OWN_SOURCES[1]];

pub fn shims(job: &Job) -> Result<Vec<Shim>, Refused> {
    let Some(mirror) = &job.mirror else { return Ok(Vec::new()) };
    let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
    let shim = |path: &str, content: String| Shim { path: path.into(), content, mode: 0o644 };
    let mut shims = vec![shim(conf::SOURCES, sources(job, mirror, has)?)];
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
        return refuse("the image's VERSION_CODENAME is not the name of a release");
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
                return refuse("only releases of Debian have one; this is testing or unstable");
            };
            let Some(security) = security(uri) else {
                return refuse(&format!(
                    "`{mirror}` has no path segment `debian`, beside which `debian-security` would be"
                ));
            };
            let signed = signed(DEBIAN_KEYRING);
            // Firmware became a component of its own with 12, and the security archive was renamed with 11.
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
        other => refuse(&format!("how an archive of `{other}` is laid out is not known")),
    }
}

/// Debian's security archive is beside the main one.
fn security(uri: &str) -> Option<String> {
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
    fn debian_has_its_security_archive_beside() {
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
    fn ubuntu_has_it_in_the_same_place() {
        let text = lines("ID=ubuntu\nVERSION_CODENAME=noble\n", "http://m/ubuntu").unwrap();
        assert!(text.contains("http://m/ubuntu noble-security main restricted universe multiverse"));
        assert!(text.contains("ubuntu-archive-keyring"));
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
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
