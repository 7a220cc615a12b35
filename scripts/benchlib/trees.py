"""Whether two disks hold the same tree."""
import hashlib
import json
import os
import re
import subprocess
import sys

from .machine import Failed, TOP
from .plain import root_offset

# What may differ, and why. Patterns of whole paths.
LISTED = {
    r"/etc/resolv\.conf": "the plain chroot needs the builder's to fetch; oven puts it over the image's for a step alone",
    r"/etc/machine-id": "oven empties what must not be cloned",
    r"/var/log/(alternatives|dpkg|fontconfig)\.log|/var/log/apt/(eipp\.log\.xz|history\.log|term\.log)":
        "logs: oven takes them away",
    r"/var/lib/apt/lists/.*": "the package indexes: oven takes them away",
    r"/var/cache/apt/archives/partial": "apt gives it to its own user where it downloads; oven's downloads go elsewhere",
    r"/var/cache/apt/archives/lock|/var/lib/dpkg/(lock|lock-frontend|triggers/Lock)": "empty files of whoever looked",
    r"/var/cache/debconf/config\.dat(-old)?": "in which order questions were asked, and the owners' list",
    r"/var/cache/fontconfig/[0-9a-f]+-[a-z0-9]+\.cache-\d+|/var/cache/ldconfig/aux-cache": "caches with times and inodes in them",
    r"/run/.*": "a step has a /run of its own: what scripts put there is of no image",
}


def tree(root):
    """What each path is: type, mode, owner, and what a file holds. No times."""
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
    """(paths that differ and are not listed, those that are by their patterns, how many there are in all)"""
    trees = []
    for disk in (ours, theirs):
        at = work / "tree"
        at.mkdir(exist_ok=True)
        script = 'mount -o ro,noload,loop,offset=$1 "$2" "$3" && cd "$4" && exec "$5" -m benchlib.trees "$3"'
        argv = ["unshare", "--mount", "sh", "-c", script, "compare", str(root_offset(disk)), disk, at, TOP / "scripts",
                sys.executable]
        done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"looking at the tree of {disk}: {done.stderr}")
        trees.append(json.loads(done.stdout))
    a, b = trees
    paths = sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))
    listed = {pattern: [path for path in paths if re.fullmatch(pattern, path)] for pattern in LISTED}
    known = {path for found in listed.values() for path in found}
    return [path for path in paths if path not in known], listed, len(a)


if __name__ == "__main__":
    json.dump(tree(sys.argv[1]), sys.stdout)
