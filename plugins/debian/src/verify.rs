//! Verifies signatures faster when apt refreshes an index.
//!
//! apt calls `apt-key verify` for each repository, even if nothing is new. apt-key starts some sixty programs to
//! collect the keys, and one to verify the signature. Starting these programs takes a fourth of the time of a small
//! bake. The script in this file collects the same keys with five programs, and calls the image's own gpgv in the same
//! way. If gpgv accepts the signature, the script accepts it, too. In all other cases, the script calls the image's
//! apt-key, which decides.

use oven_distro::Shim;

pub const APT_KEY: &str = "/run/oven/apt-key";

pub fn shim() -> Shim {
    Shim { path: APT_KEY.into(), content: SCRIPT.into(), mode: 0o755 }
}

const SCRIPT: &str = r##"#!/bin/sh
# Exists while oven bakes: apt calls it to verify signatures.
home=
trap '[ -z "$home" ] || rm -rf "$home"' 0
trap 'exit 1' HUP INT TERM

# Collects the keys of all keyrings into one that gpgv reads. Like apt-key, it skips empty keyrings.
collect() {
    for key; do
        shift
        [ -s "$key" ] || continue
        [ -f "$key" ] && [ -r "$key" ] || return 1
        case $key in
        *.asc) set -- "$@" "$key" ;;
        *.gpg)
            # The first byte of a keyring; gpg has other formats, too.
            case $(od -A n -t x1 -N 1 "$key") in
            *98 | *99 | *c6) cat "$key" >> "$home/keys" || return 1 ;;
            *) return 1 ;;
            esac
            ;;
        *) return 1 ;;
        esac
    done
    [ $# != 0 ] || return 0
    awk 'FNR == 1 { x = 0; }
/^-----BEGIN/{ x = 1; }
/^$/{ if (x == 1) { x = 2; }; }
/^[^=-]/{ if (x == 2) { print $0; }; }
/^-----END/{ x = 0; }' "$@" | base64 -d >> "$home/keys"
}

good() {
    [ "$1 $2" = '--quiet --readonly' ] || return 1
    shift 2
    only=
    if [ "$1" = --keyring ]; then
        only=$2
        [ -s "$only" ] || return 1
        shift 2
    fi
    [ $# = 5 ] && [ "$1 $2" = 'verify --status-fd' ] || return 1
    case $3 in [3-9]) ;; *) return 1 ;; esac
    fd=$3 signature=$4 signed=$5
    file= parts= other=
    settings=$(apt-config shell file Dir::Etc::Trusted/f parts Dir::Etc::TrustedParts/d other Apt::Key::gpgvcommand) || return 1
    eval "$settings"
    [ -z "$other" ] && command -v gpgv > /dev/null || return 1
    home=$(mktemp -d) && : > "$home/keys" || return 1
    if [ -n "$only" ]; then
        collect "$only" || return 1
    else
        parts=${parts%/}
        [ -n "$file" ] && [ -n "$parts" ] || return 1
        collect "$file" "$parts"/*.gpg "$parts"/.?*.gpg "$parts"/*.asc "$parts"/.?*.asc || return 1
    fi
    gpgv --homedir "$home" --keyring "$home/keys" --ignore-time-conflict --status-fd 3 \
        "$signature" "$signed" 3> "$home/status" 2> /dev/null || return 1
    cat "$home/status" >&"$fd"
}

good "$@" && exit 0
[ -z "$home" ] || rm -rf "$home"
exec /usr/bin/apt-key "$@"
"##;
