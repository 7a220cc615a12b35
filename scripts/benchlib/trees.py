"""Compares the trees of files of two disks."""
import hashlib
import json
import os
import re
import subprocess
import sys

from .machine import Failed, TOP
from .plain import root_offset

# What may differ, and why, by patterns of whole paths.
LISTED = {
    r"/etc/resolv\.conf": "the plain chroot needs the builder's file to download; oven mounts it over the image's file, only during steps",
    r"/etc/machine-id": "oven empties machine-specific data",
    r"/var/log/(alternatives|dpkg|fontconfig)\.log|/var/log/apt/(eipp\.log\.xz|history\.log|term\.log)":
        "logs: oven removes them",
    r"/var/lib/apt/lists/.*": "the package indexes: oven removes them",
    r"/var/cache/apt/archives/partial": "apt changes its owner when it downloads; oven's downloads are in another directory",
    r"/var/cache/apt/archives/lock|/var/lib/dpkg/(lock|lock-frontend|triggers/Lock)": "empty lock files",
    r"/var/cache/debconf/config\.dat(-old)?": "the order of questions, and the list of owners",
    r"/var/cache/fontconfig/[0-9a-f]+-[a-z0-9]+\.cache-\d+|/var/cache/ldconfig/aux-cache": "caches with times and inodes in them",
    r"/run/.*": "a step has its own /run, which is not part of the image",
}


def tree(root):
    """Describes each path: type, mode, owner and content, but not times."""
    found = {}
    for directory, subdirectories, files in os.walk(root):
        for name in subdirectories + files:
            path = os.path.join(directory, name)
            about = os.lstat(path)
            what = [oct(about.st_mode), about.st_uid, about.st_gid]
            if os.path.islink(path):
                what.append(os.readlink(path))
            elif os.path.isfile(path):
                what.append(hashlib.file_digest(open(path, "rb"), "sha1").hexdigest())
            found["/" + os.path.relpath(path, root)] = what
    return found


def compare(work, ours, theirs):
    """(paths that differ and are not listed, listed ones by their patterns, the number of all paths)"""
    trees = []
    for disk in (ours, theirs):
        at = work / "tree"
        at.mkdir(exist_ok=True)
        script = 'mount -o ro,noload,loop,offset=$1 "$2" "$3" && cd "$4" && exec "$5" -m benchlib.trees "$3"'
        argv = ["unshare", "--mount", "sh", "-c", script, "compare", str(root_offset(disk)), disk, at, TOP / "scripts",
                sys.executable]
        done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"reading the tree of {disk}: {done.stderr}")
        trees.append(json.loads(done.stdout))
    a, b = trees
    paths = sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))
    listed = {pattern: [path for path in paths if re.fullmatch(pattern, path)] for pattern in LISTED}
    known = {path for found in listed.values() for path in found}
    return [path for path in paths if path not in known], listed, len(a)


if __name__ == "__main__":
    json.dump(tree(sys.argv[1]), sys.stdout)
