//! fontconfig's script waits two seconds for nothing: the longest of all that packages run.

use oven_distro::Shim;

/// In a directory of [`crate::caches::PATH`].
pub fn shim() -> Shim {
    Shim { path: "/run/oven/bin/fc-cache".into(), content: FC_CACHE.into(), mode: 0o755 }
}

const FC_CACHE: &str = r#"#!/bin/sh
# There while oven bakes. When fc-cache has written, it waits two seconds, so that whatever changes later is later in time
# where that is kept in seconds, too. All that use fonts write the same files where they are absent or old, and do not wait.
# So they are written by one of those, and fc-cache finds nothing to do.
written=/var/cache/fontconfig
case $* in
'-s -v') ;;
'-s -f -v') ls $written/*.cache-* > /dev/null 2>&1 && exec /usr/bin/fc-cache "$@" ;; # what is there is to be made anew
*) exec /usr/bin/fc-cache "$@" ;;
esac
HOME=/nonexistent XDG_CACHE_HOME=/nonexistent XDG_DATA_HOME=/nonexistent /usr/bin/fc-list > /dev/null 2>&1
case $(stat -c %y $written/*.cache-* 2> /dev/null) in
*.000000000*) sleep 2 ;;
esac
exec /usr/bin/fc-cache -s -v
"#;
