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
    r"/etc/resolv\.conf": "the plain chroot needs the builder's to fetch; oven puts it over for the step alone",
    r"/etc/(machine-id|hostname)": "oven empties what must not be cloned",
    r"/var/lib/dbus/machine-id": "the same",
    r"/var/lib/(systemd/(random-seed|credential\.secret)|cloud)(/.*)?": "the same",
    r"/etc/ssh/ssh_host_.*": "the same: keys of a host",
    r"/etc/ssl/(certs|private)/ssl-cert-snakeoil\.(pem|key)|/etc/ssl/certs/[0-9a-f]{8}\.\d": "the same: its own key",
    r"/var/log(/.*)?": "logs have times, and oven's clean takes them away",
    r"/var/cache(/.*)?": "caches: apt's packages and indexes, debconf, ldconfig's aux-cache, fontconfig, man-db",
    r"/var/lib/apt(/.*)?": "the lists, and when they were fetched",
    r"/var/lib/dpkg/.*-old": "the state before the last transaction: there may be other transactions",
    r"/var/lib/dpkg/(lock|triggers/Lock|lock-frontend)": "empty files, made when somebody first looks",
    r"/(etc|var/lib|usr/lib)(/.*)?/(\.placeholder|\.wh\..*)": "of nobody's content",
    r"/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?": "lines in the order of the packages' scripts, days of passwords",
    r"/var/lib/ucf(/.*)?": "times of files in its registry",
    r"/var/lib/systemd/deb-systemd-helper-enabled(/.*)?|/var/lib/systemd/deb-systemd-user-helper-enabled(/.*)?":
        "the same links, written at another time",
    r"/etc/ld\.so\.cache": "in the order in which packages came",
    r"/(tmp|run|root/\.cache|var/tmp)(/.*)?": "of no build",
    r"/lost\+found(/.*)?": "of the file system",
    r".*/__pycache__(/.*)?": "compiled with the time of the source in it",
    r"/etc/alternatives/README|/var/lib/misc(/.*)?": "dates",
}
PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in LISTED))


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
    """(paths that differ and are not listed, how many differ and are)"""
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
    unlisted = [path for path in paths if not PATTERN.fullmatch(path)]
    return unlisted, len(paths) - len(unlisted)


if __name__ == "__main__":
    json.dump(tree(sys.argv[1]), sys.stdout)
