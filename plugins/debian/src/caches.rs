//! The directories of apt's downloads: indexes and packages.
//!
//! In every bake, apt asks its repositories whether they have newer indexes than the cached ones. But before apt uses a
//! cached package, it compares only the package's name and size. So the cached packages are first verified with the
//! checksums in the indexes.
//!
//! During an installation, dpkg spends half of the time on decompressing packages, one after the other. So packages are
//! decompressed beforehand on all processors, and the result is cached. dpkg's `PATH` begins with a directory that has
//! oven's wrapper of `dpkg-deb`. The wrapper uses the decompressed packages of the cache.

use crate::{LISTS, conf};
use oven_distro::{Cache, Holds, Shim};

const ARCHIVES: &str = "/var/cache/apt";

/// The files that define where packages come from, who signs them, and with which credentials they are downloaded.
/// Settings and pins are included, because they select what is downloaded.
const SOURCES: [&str; 15] = [
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d",
    conf::MIRROR_SOURCES,
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

/// `downloads` is true if the plan has steps that download packages. If it is false, oven does not cache the
/// directories, and only verifies that no files remain in them.
pub fn caches(downloads: bool) -> Vec<Cache> {
    let cache = |path: &str, holds| {
        let sources = SOURCES.into_iter().chain([conf::IMAGE_MAIN_CONFIG]).filter(|_| downloads);
        Cache { path: path.to_owned(), holds, sources: sources.map(str::to_owned).collect() }
    };
    vec![cache(LISTS, Holds::Indexes), cache(ARCHIVES, Holds::Packages)]
}

pub const PRUNE_WHY: &str = "verifying cached packages";
pub const PRUNE: &str = "/run/oven/prune-cache";
pub const DECOMPRESS_WHY: &str = "decompressing packages";
pub const DECOMPRESS: &str = "/run/oven/decompress";
/// The `PATH` of dpkg.
pub const PATH: &str = "/run/oven/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub fn shims() -> [Shim; 3] {
    let script = |path: &str, content: &str| Shim { path: path.into(), content: content.into(), mode: 0o755 };
    [
        script(PRUNE, PRUNE_SCRIPT),
        script(DECOMPRESS, DECOMPRESS_SCRIPT),
        script("/run/oven/bin/dpkg-deb", DPKG_DEB_SCRIPT),
    ]
}

/// The script uses grep because it is fast: it searches all of Debian's index in some hundredths of a second. If a
/// repository lists no SHA256 for its packages, the script removes these packages, and they are downloaded again.
const PRUNE_SCRIPT: &str = r#"#!/bin/sh
# Removes cached packages that no index lists (any more), and their decompressed copies: apt would use one in place of
# a new package of the same name and size.
export LC_ALL=C
cd /var/cache/apt || exit 0
sums=$(find archives -maxdepth 1 -type f -name '*.deb' -print0 | xargs -0 -r -n 16 -P "$(nproc)" sha256sum) || exit 1
if [ -n "$sums" ]; then
    lines=$(echo "$sums" | sed 's/^/SHA256: /; s/  .*//' | grep -shxF -f - /var/lib/apt/lists/*Packages)
    printf '%s\n' "$lines" "$sums" |
        awk '$1 == "SHA256:" { listed[$2] = 1; next } NF && !($1 in listed) { print substr($0, 67) }' |
        while read -r deb; do
            echo "$deb is not in the package index: removing it from the cache"
            rm -- "$deb" || exit 1
        done || exit 1
fi
for unpacked in oven/*; do
    deb=${unpacked#oven/}
    [ -e "archives/${deb%.*}" ] || rm -rf "$unpacked"
done
exit 0
"#;

/// If this script cannot decompress a package, the bake does not fail, because dpkg-deb then decompresses the package
/// during the installation.
const DECOMPRESS_SCRIPT: &str = r#"#!/bin/sh
# Decompresses downloaded packages for bin/dpkg-deb: NAME.tar has the files, NAME.control the control files. NAME.sum
# has the package's checksum, as another repository may use the same name for another file.
cd /var/cache/apt || exit 0
status() { { echo "$1" >&3; } 2> /dev/null; }
if [ $# = 0 ]; then
    # Only if the cache is not on the image's own disk, and has 4 GiB of free space.
    [ "$(stat -c %d .)" != "$(stat -c %d ..)" ] || exit 0
    [ $(($(stat -f -c %a .) / 1024 * $(stat -f -c %S .) / 1048576)) -ge 4 ] || exit 0
    mkdir -p oven
    status "unpack:$(find archives -maxdepth 1 -type f -name '*.deb' | wc -l) packages"
    find archives -maxdepth 1 -type f -name '*.deb' -print0 | xargs -0 -r -n 4 -P "$(nproc)" "$0"
    exit 0
fi
plain_files() {
    # Other files are not cached, so that dpkg sees and judges them itself.
    [ -z "$(LC_ALL=C find "$1" -mindepth 1 ! '(' -type f -links 1 ! -name '*[!0-9A-Za-z._-]*' ')')" ]
}
for deb; do
    unpacked=oven/${deb#archives/} sum=$(sha256sum < "$deb") was=
    [ -e "$unpacked.tar" ] && read -r was < "$unpacked.sum"
    name=${deb##*/} name=${name%%_*}
    [ "$sum" != "$was" ] || { status "unpacked:$name"; continue; }
    rm -rf "$unpacked.tar" "$unpacked.control"
    dpkg-deb --control "$deb" "$unpacked.control" && plain_files "$unpacked.control" && echo "$sum" > "$unpacked.sum" &&
        dpkg-deb --fsys-tarfile "$deb" > "$unpacked.part" && mv "$unpacked.part" "$unpacked.tar" ||
        rm -rf "$unpacked.part" "$unpacked.control" "$unpacked.sum"
    status "unpacked:$name"
done
exit 0
"#;

const DPKG_DEB_SCRIPT: &str = r#"#!/bin/sh
# Exists while oven bakes: uses packages that are already decompressed. Compares the file, not only its name.
case $2 in
/tmp/apt-dpkg-install-*/*) deb=${2##*/} deb=${deb#*-} ;;
*) deb=${2##*/} ;;
esac
unpacked=/var/cache/apt/oven/$deb
if [ -e "$unpacked.tar" ] && [ "$2" -ef "/var/cache/apt/archives/$deb" ]; then
    case $#$1 in
    2--fsys-tarfile) exec cat -- "$unpacked.tar" ;;
    3--control) [ -e "$3" ] || exec cp -R --preserve=mode,ownership,timestamps -- "$unpacked.control" "$3" ;;
    esac
fi
exec /usr/bin/dpkg-deb "$@"
"#;
