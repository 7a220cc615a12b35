//! What apt downloads: indexes, and packages. It asks its repositories in every bake whether they have newer ones, by the
//! date of what it has. A package it takes by its name and size: so what is kept is held against the indexes first.
//!
//! Half of what installing costs is decompressing packages, one after the other. So that is done ahead, on all processors,
//! and kept: dpkg calls `dpkg-deb`, and finds ours first, which knows what is there.

use crate::{LISTS, conf};
use oven_distro::{Cache, Holds, Shim};

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

pub const HOLDING: &str = "holding kept packages against the index";
pub const HOLD: &str = "/run/oven/listed";
pub const DECOMPRESSING: &str = "decompressing packages";
pub const DECOMPRESS: &str = "/run/oven/decompress";
/// Where dpkg looks for programs.
pub const PATH: &str = "/run/oven/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub fn shims() -> [Shim; 3] {
    let script = |path: &str, content: &str| Shim { path: path.into(), content: content.into(), mode: 0o755 };
    [script(HOLD, LISTED), script(DECOMPRESS, AHEAD), script("/run/oven/bin/dpkg-deb", DPKG_DEB)]
}

/// Whole lines are what grep finds fast: all of Debian's index in some hundredths of a second. A repository that tells no
/// SHA256 has its packages downloaded again.
const LISTED: &str = r#"#!/bin/sh
# Removes packages that are in no index (any more): apt would take one for another of its name and size, which a repository
# has put in its place. What was unpacked of them goes as well.
export LC_ALL=C
cd /var/cache/apt || exit 0
sums=$(find archives -maxdepth 1 -type f -name '*.deb' -print0 | xargs -0 -r -n 16 -P "$(nproc)" sha256sum) || exit 1
if [ -n "$sums" ]; then
    lines=$(echo "$sums" | sed 's/^/SHA256: /; s/  .*//' | grep -shxF -f - /var/lib/apt/lists/*Packages)
    printf '%s\n' "$lines" "$sums" |
        awk '$1 == "SHA256:" { listed[$2] = 1; next } NF && !($1 in listed) { print substr($0, 67) }' |
        while read -r deb; do
            echo "$deb is in no index: it is not used"
            rm -- "$deb" || exit 1
        done || exit 1
fi
for made in oven/*; do
    deb=${made#oven/}
    [ -e "archives/${deb%.*}" ] || rm -rf "$made"
done
exit 0
"#;

/// Nothing in it fails the bake: what is not decompressed here, dpkg-deb decompresses.
const AHEAD: &str = r#"#!/bin/sh
# Unpacks what was downloaded, for bin/dpkg-deb: NAME.tar, and NAME.control with what is about the package. NAME.sum tells
# of which file: a repository may give another one the same name.
cd /var/cache/apt || exit 0
if [ $# = 0 ]; then
    # Not onto the image's own disk, and not where 8 GiB would not fit.
    [ "$(stat -c %d .)" != "$(stat -c %d ..)" ] || exit 0
    [ $(($(stat -f -c %a .) / 1024 * $(stat -f -c %S .) / 1048576)) -ge 8 ] || exit 0
    mkdir -p oven
    find archives -maxdepth 1 -type f -name '*.deb' -print0 | xargs -0 -r -n 4 -P "$(nproc)" "$0"
    exit 0
fi
plain_files() {
    # Anything else is not kept; dpkg is to see it, and to judge.
    [ -z "$(LC_ALL=C find "$1" -mindepth 1 ! '(' -type f -links 1 ! -name '*[!0-9A-Za-z._-]*' ')')" ]
}
for deb; do
    made=oven/${deb#archives/} sum=$(sha256sum < "$deb") was=
    [ -e "$made.tar" ] && read -r was < "$made.sum"
    [ "$sum" != "$was" ] || continue
    rm -rf "$made.tar" "$made.control"
    dpkg-deb --control "$deb" "$made.control" && plain_files "$made.control" && echo "$sum" > "$made.sum" &&
        dpkg-deb --fsys-tarfile "$deb" > "$made.part" && mv "$made.part" "$made.tar" ||
        rm -rf "$made.part" "$made.control" "$made.sum"
done
exit 0
"#;

const DPKG_DEB: &str = r#"#!/bin/sh
# There while oven bakes: what was unpacked ahead is not unpacked again. Told by the file, not by its name.
case $2 in
/tmp/apt-dpkg-install-*/*) deb=${2##*/} deb=${deb#*-} ;;
*) deb=${2##*/} ;;
esac
made=/var/cache/apt/oven/$deb
if [ -e "$made.tar" ] && [ "$2" -ef "/var/cache/apt/archives/$deb" ]; then
    case $#$1 in
    2--fsys-tarfile) exec cat -- "$made.tar" ;;
    3--control) [ -e "$3" ] || exec cp -R --preserve=mode,ownership,timestamps -- "$made.control" "$3" ;;
    esac
fi
exec /usr/bin/dpkg-deb "$@"
"#;
