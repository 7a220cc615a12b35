//! What apt downloads: indexes, and packages. It asks its repositories in every bake whether they have newer ones, by the
//! date of what it has.

use crate::{LISTS, conf};
use oven_distro::{Cache, Holds};

const ARCHIVES: &str = "/var/cache/apt";

/// What says where packages come from, who signs them, and with which name and password they are asked for. Settings and
/// pins count as well: they choose what of it is fetched.
const SOURCES: [&str; 15] = [
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d",
    conf::SOURCES,
    "/etc/apt/mirrors",
    "/etc/apt/trusted.gpg",
    "/etc/apt/trusted.gpg.d",
    "/etc/apt/keyrings",
    "/usr/share/keyrings",
    "/run/oven/keyrings",
    "/etc/apt/auth.conf",
    "/etc/apt/auth.conf.d",
    "/etc/apt/preferences",
    "/etc/apt/preferences.d",
    "/etc/apt/apt.conf.d",
    "/var/lib/dpkg/arch",
];

pub fn all() -> Vec<Cache> {
    let cache = |path: &str, holds| {
        let sources = SOURCES.into_iter().chain([conf::IMAGES_MAIN]).map(str::to_owned).collect();
        Cache { path: path.to_owned(), holds, sources }
    };
    vec![cache(LISTS, Holds::Indexes), cache(ARCHIVES, Holds::Packages)]
}
