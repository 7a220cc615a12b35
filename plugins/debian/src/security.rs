//! Upgrades of security alone.
//!
//! apt knows no such thing; it knows priorities (apt_preferences(5)). While the upgrade runs, what is installed has 100,
//! every repository 99, and so nothing of it replaces what is installed, though it may be installed beside; the suites of
//! security have 500. What a definition asks for by name is not installed under these pins.

use oven_distro::{Job, Shim, Upgrade};

/// The image's own pins of the one file that ours stands for; those of preferences.d are read anyway.
pub const IMAGES_PREFERENCES: &str = "/etc/apt/preferences";
const PINS: &str = "/run/oven/security.pref";

/// apt-get's arguments.
pub const UPGRADE: &[&str] = &["-o", "Dir::Etc::preferences=/run/oven/security.pref", "dist-upgrade"];

pub const LOOKING: &str = "looking for a security suite among the image's repositories";
/// Ends with 1 where there is none: an upgrade of nothing would look like one that was not needed.
pub const LOOK: &[&str] = &[
    "grep",
    "-rlE",
    "--include=*Release",
    "^(Label: Debian-Security|(Suite|Codename): [^ ]*-security)$",
    "/var/lib/apt/lists",
];

/// Of each repository, the first that fits counts; pins of single packages, which only the image has, count before.
const ROWS: [(&str, u32); 6] = [
    ("release a=now", 100), // what is installed
    ("release l=Debian-Security", 500),
    ("release a=*-security", 500), // Ubuntu's, and those of extended support
    ("release n=*-security", 500),
    ("release *", 99),
    ("origin *", 99), // what says nothing of itself
];

pub fn pins(job: &Job) -> Option<Shim> {
    if job.upgrade != Upgrade::Security {
        return None;
    }
    let rows = ROWS.map(|(pin, priority)| format!("Package: *\nPin: {pin}\nPin-Priority: {priority}\n\n"));
    let content = rows.concat() + job.texts.get(IMAGES_PREFERENCES).map_or("", String::as_str);
    Some(Shim { path: PINS.into(), content, mode: 0o644 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_own_pins_come_after() {
        let mut job = Job { upgrade: Upgrade::Security, ..Job::default() };
        job.texts
            .insert(IMAGES_PREFERENCES.into(), "Package: jq\nPin: version 1.6\nPin-Priority: 1001\n".into());
        let pins = pins(&job).unwrap();
        assert!(pins.content.starts_with("Package: *\nPin: release a=now\nPin-Priority: 100\n\n"));
        assert!(
            pins.content.ends_with("Pin-Priority: 99\n\nPackage: jq\nPin: version 1.6\nPin-Priority: 1001\n")
        );
        assert!(UPGRADE[1].ends_with(PINS));
        assert_eq!(super::pins(&Job::default()), None);
    }
}
