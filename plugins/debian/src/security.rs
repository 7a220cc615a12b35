//! Security upgrades.
//!
//! apt has no command for security upgrades, but it has priorities (apt_preferences(5)). During the upgrade, installed
//! packages have priority 100, packages of the security suites 500, and packages of all other repositories 99. So only
//! packages of the security suites replace installed packages. Packages of other repositories can only be installed as
//! new dependencies. These pins do not apply when the packages of the definition are installed.

use oven_distro::{Job, Shim, Upgrade};

/// The image's own file of pins. During the upgrade, apt reads the file `PINS` instead of this file. apt still reads
/// the pins in preferences.d.
pub const IMAGE_PREFERENCES: &str = "/etc/apt/preferences";
const PINS: &str = "/run/oven/security.pref";

/// The arguments of apt-get for the upgrade.
pub const UPGRADE: &[&str] = &["-o", "Dir::Etc::preferences=/run/oven/security.pref", "dist-upgrade"];

pub const FIND_SUITE_WHY: &str = "looking for a security suite among the image's repositories";
/// Exits with 1 if the image has no security suite. Without this check, the upgrade would do nothing in such an image,
/// as if there were no updates.
pub const FIND_SUITE: &[&str] = &[
    "grep",
    "-rlE",
    "--include=*Release",
    "^(Label: Debian-Security|(Suite|Codename): [^ ]*-security)$",
    "/var/lib/apt/lists",
];

/// The priorities of repositories. The first matching row applies. If the image has pins of single packages, these take
/// precedence.
const PRIORITIES: [(&str, u32); 5] = [
    ("release a=now", 100), // installed packages
    ("release l=Debian-Security", 500),
    ("release a=*-security", 500), // Ubuntu, and extended support
    ("release n=*-security", 500),
    ("release *", 99), // all others, including repositories without these fields
];

pub fn pins(job: &Job) -> Option<Shim> {
    if job.upgrade != Upgrade::Security {
        return None;
    }
    let rows =
        PRIORITIES.map(|(pin, priority)| format!("Package: *\nPin: {pin}\nPin-Priority: {priority}\n\n"));
    let content = rows.concat() + job.texts.get(IMAGE_PREFERENCES).map_or("", String::as_str);
    Some(Shim { path: PINS.into(), content, mode: 0o644 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_own_pins_come_after() {
        let mut job = Job { upgrade: Upgrade::Security, ..Job::default() };
        job.texts
            .insert(IMAGE_PREFERENCES.into(), "Package: jq\nPin: version 1.6\nPin-Priority: 1001\n".into());
        let pins = pins(&job).unwrap();
        assert!(pins.content.starts_with("Package: *\nPin: release a=now\nPin-Priority: 100\n\n"));
        assert!(
            pins.content.ends_with("Pin-Priority: 99\n\nPackage: jq\nPin: version 1.6\nPin-Priority: 1001\n")
        );
        assert!(UPGRADE[1].ends_with(PINS));
        assert_eq!(super::pins(&Job::default()), None);
    }
}
