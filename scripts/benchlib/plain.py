"""The same by hand: a copy of the base is mounted through a loop device, and apt runs in a chroot."""
import json
import pathlib
import subprocess
import time

from .machine import Failed, output, settle

# It runs in a private mount namespace, so that no mounts are left if it is interrupted.
SCRIPT = r"""set -eu
    mount -o loop,offset=$1 "$2" "$3"
    mount -t proc proc "$3/proc"; mount -t sysfs sys "$3/sys"; mount --bind /dev "$3/dev"
    cp -L /etc/resolv.conf "$3/etc/resolv.conf"
    printf '#!/bin/sh\nexit 101\n' > "$3/usr/sbin/policy-rc.d"; chmod 755 "$3/usr/sbin/policy-rc.d"
    export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
    before=$(date +%s%N)
    root=$3; shift 3
    chroot "$root" apt-get -q update
    chroot "$root" apt-get -q -y --no-install-recommends install "$@"
    echo $(($(date +%s%N) - before)) > "$root.ns"
    chroot "$root" apt-get clean
    rm "$root/usr/sbin/policy-rc.d"
    umount "$root/dev" "$root/sys" "$root/proc" "$root"
"""


def root_offset(disk):
    """The offset of the root partition, in bytes: it is the largest one."""
    table = json.loads(output("sfdisk", "--json", disk))["partitiontable"]
    return max(table["partitions"], key=lambda part: part["size"])["start"] * 512


def plain(work, base, packages, keep=None):
    """(seconds, seconds of apt alone). `keep`: the path of the disk; without it the disk is removed."""
    disk, root = keep or work / "plain.raw", work / "plain"
    root.mkdir(exist_ok=True)
    settle()
    start = time.monotonic()
    subprocess.run(["cp", "--sparse=always", base, disk], check=True)
    argv = ["unshare", "--mount", "sh", "-c", SCRIPT, "plain", str(root_offset(disk)), disk, root, *packages]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"the plain chroot: {done.stderr[-2000:]}")
    total = time.monotonic() - start
    if not keep:
        disk.unlink()
    return total, int(pathlib.Path(f"{root}.ns").read_text()) / 1e9
