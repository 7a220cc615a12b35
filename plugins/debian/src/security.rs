//! Security upgrades.
//!
//! apt has no command for them, but it has priorities (apt_preferences(5)). During the upgrade installed packages have
//! priority 100 and packages of every repository 99, so they replace no installed package, though they may be
//! installed as new dependencies; the security suites have 500. Packages that a definition asks for by name are not
//! installed under these pins.

use oven_distro::{Job, Shim, Upgrade};

/// The image's own file of pins, which our file replaces. apt still reads the pins of preferences.d.
pub const IMAGE_PREFERENCES: &str = "/etc/apt/preferences";
const PINS: &str = "/run/oven/security.pref";

/// apt-get's arguments.
pub const UPGRADE: &[&str] = &["-o", "Dir::Etc::preferences=/run/oven/security.pref", "dist-upgrade"];

pub const FIND_SUITE_WHY: &str = "looking for a security suite among the image's repositories";
/// Exits with 1 if there is none: otherwise an upgrade without security suites would look as if there were no updates.
pub const FIND_SUITE: &[&str] = &[
    "grep",
    "-rlE",
    "--include=*Release",
    "^(Label: Debian-Security|(Suite|Codename): [^ ]*-security)$",
    "/var/lib/apt/lists",
];

/// For each repository the first matching row applies. Pins of single packages, which only the image has, take
/// precedence.
const PRIORITIES: [(&str, u32); 5] = [
    ("release a=now", 100), // installed packages
    ("release l=Debian-Security", 500),
    ("release a=*-security", 500), // Ubuntu, and extended support
    ("release n=*-security", 500),
    ("release *", 99), // also repositories without fields
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
