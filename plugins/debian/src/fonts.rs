//! Avoids a pause of two seconds in fontconfig's maintainer script. Other scripts of packages are not replaced, because
//! none of them takes so long.

use oven_distro::Shim;

/// A replacement of `fc-cache`, in a directory of [`crate::caches::PATH`].
pub fn shim() -> Shim {
    Shim { path: "/run/oven/bin/fc-cache".into(), content: FC_CACHE.into(), mode: 0o755 }
}

const FC_CACHE: &str = r#"#!/bin/sh
# Exists while oven bakes. After fc-cache has written its caches, it waits two seconds, so that later changes get a
# later time on file systems that store whole seconds. Every other program that uses fonts writes the same caches if
# they are missing or old, and does not wait. So fc-list writes them, and fc-cache has nothing to do.
written=/var/cache/fontconfig
case $* in
'-s -v') ;;
'-s -f -v') ls $written/*.cache-* > /dev/null 2>&1 && exec /usr/bin/fc-cache "$@" ;; # existing caches are to be rebuilt
*) exec /usr/bin/fc-cache "$@" ;;
esac
HOME=/nonexistent XDG_CACHE_HOME=/nonexistent XDG_DATA_HOME=/nonexistent /usr/bin/fc-list > /dev/null 2>&1
case $(stat -c %y $written/*.cache-* 2> /dev/null) in
*.000000000*) sleep 2 ;;
esac
exec /usr/bin/fc-cache -s -v
"#;
