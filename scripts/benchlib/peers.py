"""Tools that a user would otherwise run. They are only installed and run with --peers."""
import json
import os
import shutil
import subprocess

from .machine import TOP, Failed, measure, output, say, sh

# The newest version that builds with this repository's toolchain.
COLDSNAP = "0.12.0"
ROOT = TOP / "target/peers"

# Imitates udev, which creates the device nodes of a volume and its partitions on an instance: a watcher does so in a
# private /dev.
PACKER = r"""set -eu
    attached=$1; shift
    mount -t tmpfs -o mode=755 tmpfs /mnt
    mkdir /mnt/dev
    cp -a /dev/. /mnt/dev/ 2>/dev/null || true
    mount --bind /mnt/dev /dev
    mount -t devpts devpts /dev/pts 2>/dev/null || true
    watch() {
        while sleep 0.02; do
            found=
            for note in "$attached"/vol-*.json; do
                [ -e "$note" ] || continue
                found=1
                [ -b /dev/xvdz ] && continue
                node=$(sed 's/.*"node":"\([^"]*\)".*/\1/' "$note")
                name=${node#/dev/}
                mknod "/dev/$name" b 7 "${name#loop}" 2>/dev/null || true
                partx --add "$node" 2>/dev/null || true
                for part in /sys/class/block/"$name"p*; do
                    [ -e "$part/dev" ] || continue
                    numbers=$(tr : ' ' < "$part/dev")
                    mknod "/dev/xvdz${part##*p}" b $numbers
                done
                mknod /dev/xvdz b 7 "${name#loop}"
            done
            [ -n "$found" ] || rm -f /dev/xvdz*
        done
    }
    watch & watcher=$!
    status=0
    "$@" || status=$?
    kill $watcher 2>/dev/null || true
    exit $status
"""


def coldsnap():
    """The path of coldsnap, which is built if it is missing."""
    program = ROOT / "bin/coldsnap"
    if not program.exists():
        say(f"installing coldsnap {COLDSNAP}: compiling takes some minutes")
        sh("cargo", "install", "--quiet", "coldsnap", "--version", COLDSNAP, "--locked", "--root", ROOT,
           "--target-dir", ROOT / "build")
    return program


def packer():
    if not shutil.which("packer"):
        sh("apt-get", "install", "-qq", "packer", env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    return shutil.which("packer")


def versions():
    """The versions of the tools, for the file of results."""
    found = {"coldsnap": COLDSNAP}
    if shutil.which("packer"):
        found["packer"] = output("dpkg-query", "-W", "-f", "${Version}", "packer").strip()
    return found


def environment(server, home):
    return {"PATH": os.environ["PATH"], "HOME": str(home), "CHECKPOINT_DISABLE": "1", **server.environment()}


def coldsnap_upload(server, raw, home):
    """(cost, snapshot). As oven does, it leaves out zeros and waits until the snapshot is complete."""
    cost = measure([coldsnap(), "--endpoint", server.endpoint, "upload", "--no-progress", "--omit-zero-blocks", "--wait",
                    raw], coldsnap(), env=environment(server, home))
    return cost, cost.out.split()[0]


def coldsnap_download(server, snapshot, target, home):
    return measure([coldsnap(), "--endpoint", server.endpoint, "download", "--no-progress", snapshot, target],
                   coldsnap(), env=environment(server, home))


def packer_bake(server, directory, packages, name, poll):
    """(cost, image). `poll`: seconds between polls; None: Packer's own default."""
    directory.mkdir(parents=True, exist_ok=True)
    commands = ["export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8",
                r"printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d",
                "apt-get -q update", "apt-get -q -y --no-install-recommends install " + " ".join(packages),
                "apt-get clean", "rm /usr/sbin/policy-rc.d"]
    template = {"builders": [{
        "type": "amazon-chroot", "ami_name": name, "region": "us-east-1",
        "custom_endpoint_ec2": server.endpoint, "skip_region_validation": True, "device_path": "/dev/xvdz",
        "mount_partition": "1", "ena_support": True, "sriov_support": True,
        "source_ami_filter": {"filters": {"name": "bench-base", "virtualization-type": "hvm",
                                          "root-device-type": "ebs"}, "owners": ["self"], "most_recent": True}}],
        "provisioners": [{"type": "shell", "inline_shebang": "/bin/sh -e", "inline": commands}]}
    file = directory / "template.json"
    file.write_text(json.dumps(template, indent=1))
    polling = {} if poll is None else {"AWS_POLL_DELAY_SECONDS": str(poll), "AWS_MAX_ATTEMPTS": "600"}
    argv = ["unshare", "--mount", "sh", "-c", PACKER, "packer", server.dir / "attached", packer(), "build",
            "-color=false", file]
    cost = measure(argv, packer(), env={**environment(server, directory), **polling})
    images = [image for image in server.world()["images"].values() if image["name"] == name and not image["gone_at"]]
    if len(images) != 1:
        raise Failed(f"packer made {images}:\n{cost.out[-2000:]}")
    return cost, images[0]["id"]
