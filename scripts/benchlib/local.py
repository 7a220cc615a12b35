"""Modes on a local region: without the cloud's time, only that of oven and apt is measured."""
import os
import shutil
import subprocess
import time

from .blocks import changed_blocks
from .machine import Failed, background, busy, measure, output, say, sh
from .oven import Region, define
from .plain import plain, root_offset
from .results import Result
from .trees import compare

# Small packages without dependencies. Each run takes the next one, so that it is not cached yet.
SMALL = ["tree", "bc", "psmisc", "unzip", "time", "lsof", "zip", "hexedit"]
LARGE = """git nginx-light redis-server postgresql-client python3-venv python3-requests build-essential vim-nox tmux htop
strace tcpdump rsync unzip zip p7zip-full imagemagick graphviz sqlite3 mariadb-client haproxy squid memcached php-cli
ruby nodejs gnupg2 bind9-dnsutils nmap socat iptables jq curl wget tree lsof psmisc bc file less
man-db""".split()
MEMORY_MIB = 256
AT_ONCE = [1, 2, 4, 8]
# For concurrent bakes: sampling the memory of all their processes every LOOK seconds would cost a tenth of a core.
SELDOM = 0.1


def small(bench, disks):
    """A rebake that adds one small package, compared with apt by hand on the same base."""
    result = Result("small", disks=disks, runs=bench.runs)
    warm = Region(bench.bins, bench.work / "warm", bench.base, disks)
    # The caches then have the base's blocks and the indexes, but none of the packages of the runs.
    warm.remove(warm.bake(["less"], "warms the caches").image)
    for run in range(bench.runs):
        package = SMALL[run % len(SMALL)]

        def ours():
            adds = warm.bake([package], f"adds, {run}")
            result.add("oven warm, a new package", adds.seconds)
            again = warm.bake([package], f"again, {run}")
            result.add("oven warm, the same again", again.seconds)
            result.add("  of that apt", again.apt)
            result.add("  peak MiB", again.cost.peak_mib)
            sent_is_changed(bench, result, again, warm)
            warm.remove(adds.image, again.image)
            cold = Region(bench.bins, bench.work / "cold", bench.base, disks)
            first = cold.bake([package], f"cold, {run}")
            result.add("oven cold", first.seconds)
            result.add("  cold peak MiB", first.cost.peak_mib)

        def theirs():
            total, apt = plain(bench.work, bench.base, [package])
            result.add("plain chroot", total)
            result.add("plain apt alone", apt)

        bench.turns(run, ours, theirs)
        result.print_run(run, bench.runs)
    result.ratio("warm, a new package / plain apt", "oven warm, a new package", "plain apt alone", at_most=0.5)
    result.ratio("warm, the same again / plain apt", "oven warm, the same again", "plain apt alone", at_most=0.5)
    result.ratio("cold / plain chroot", "oven cold", "plain chroot")
    result.fact("peak MiB", max(result.series["  peak MiB"] + result.series["  cold peak MiB"]), at_most=MEMORY_MIB)
    return result


def sent_is_changed(bench, result, bake, region):
    """Fails unless exactly the blocks that differ between both snapshots were sent, if blocks are sent at all."""
    if "blocks sent" in bake.counted:
        changed = len(changed_blocks(bench.base, region.disk_of(bake.image)))
        result.add("blocks sent", bake.counted["blocks sent"])
        result.add("blocks that differ", changed)
        if bake.counted["blocks sent"] != changed:
            raise Failed(f"{bake.counted['blocks sent']} blocks were sent, but {changed} differ")


def large(bench, disks):
    """A large set of packages, and whether the result equals that of apt by hand."""
    result = Result("large", disks=disks, runs=bench.runs, packages=len(LARGE))
    warm = Region(bench.bins, bench.work / "warm", bench.base, disks)
    warm.remove(warm.bake(LARGE, "warms the caches").image)
    by_hand = bench.work / "by-hand.raw"
    last = None
    for run in range(bench.runs):
        def ours():
            nonlocal last
            again = warm.bake(LARGE, f"again, {run}")
            result.add("oven warm", again.seconds)
            result.add("  of that apt", again.apt)
            result.add("  peak MiB", again.cost.peak_mib)
            if last:
                warm.remove(last)
            last = again.image
            cold = Region(bench.bins, bench.work / "cold", bench.base, disks)
            first = cold.bake(LARGE, f"cold, {run}")
            result.add("oven cold", first.seconds)
            result.add("  cold peak MiB", first.cost.peak_mib)
            shutil.rmtree(cold.dir)

        def theirs():
            by_hand.unlink(missing_ok=True)
            total, apt = plain(bench.work, bench.base, LARGE, keep=by_hand)
            result.add("plain chroot", total)
            result.add("plain apt alone", apt)

        bench.turns(run, ours, theirs)
        result.print_run(run, bench.runs)
    result.ratio("warm / plain chroot", "oven warm", "plain chroot", at_most=0.6)
    result.ratio("warm / plain apt", "oven warm", "plain apt alone")
    result.ratio("cold / plain chroot", "oven cold", "plain chroot")
    result.fact("peak MiB", max(result.series["  peak MiB"] + result.series["  cold peak MiB"]), at_most=MEMORY_MIB)
    differ, listed, paths = compare(bench.work, warm.disk_of(last), by_hand)
    result.fact("paths", paths)
    result.fact("paths that differ, as listed", {pattern: len(found) for pattern, found in listed.items() if found})
    result.fact("paths that differ, not listed", len(differ), at_most=0)
    for path in differ[:40]:
        say(f"differs: {path}")
    return result


def noop(bench, disks):
    """The image exists: only its keys are computed and looked up."""
    result = Result("noop", disks=disks, runs=bench.runs)
    region = Region(bench.bins, bench.work / "warm", bench.base, disks)
    first = region.bake(["tree"], "once")
    for run in range(bench.runs):
        again = region.bake(["tree"], "once")
        if again.image != first.image:
            raise Failed("an existing image was baked again")
        result.add("oven", again.seconds)
        result.add("cpu", again.cost.cpu_seconds)
        result.print_run(run, bench.runs)
    return result


def parallel(bench, disks):
    """Different images concurrently, and whether each has its own files and none of another image."""
    cores = os.cpu_count()
    result = Result("parallel", disks=disks, runs=bench.runs, cores=cores)
    region = Region(bench.bins, bench.work / "warm", bench.base, disks)
    most = max(AT_ONCE)

    def images(mark):
        definitions = []
        for index in range(most):
            name = f"image-{index}"
            (region.dir / name).mkdir(exist_ok=True)
            (region.dir / name / "marker").write_text(f"this is {name}\n")
            file = f'[[file]]\nsource = "marker"\ntarget = "/etc/marker"\n'
            definitions.append(define(region.dir / name, name, "bench-base", [SMALL[index]], mark, file))
        return definitions

    # After this everything is cached.
    warmed = region.bake_all(images("warms the caches"), 1)
    region.remove(*names(warmed))

    def measured(name, chosen, jobs):
        """Bakes the images, `jobs` at a time. Returns the CPU seconds of the machine and of the processes."""
        others = background()
        worked = busy()
        bake = region.bake_all(chosen, jobs, look=SELDOM)
        worked = busy() - worked
        # The CPU time of the processes, and of the kernel's threads that work for these bakes.
        machine = max(worked - others * bake.seconds, bake.cost.cpu_seconds)
        result.add(name, bake.seconds)
        result.add(f"  cpu of {name}", bake.cost.cpu_seconds)
        result.add(f"  machine's cpu of {name}", machine)
        result.add(f"  background before {name}", others)
        result.add(f"  peak MiB of {name}", bake.cost.peak_mib)
        ids = names(bake)
        no_crosstalk(region, ids)
        region.remove(*ids)
        return machine, bake.cost.cpu_seconds

    for run in range(bench.runs):
        for at_once in AT_ONCE:
            measured(f"{at_once} at once", images(f"{run}, {at_once}")[:at_once], at_once)
        # The time of the same images if all cores only did the CPU work of baking them one by one.
        machine, processes = measured(f"{most} in a row", images(f"{run}, in a row"), 1)
        result.add(f"CPU-bound sum of {most}", machine / cores)
        result.add("  of processes alone", processes / cores)
        result.print_run(run, bench.runs)
    result.ratio("8 at once / CPU-bound sum", "8 at once", "CPU-bound sum of 8", at_most=1.3)
    result.ratio("8 at once / that of processes alone", "8 at once", "  of processes alone")
    result.ratio("8 at once / 8 x 1", "8 at once", "1 at once")
    result.ratios["8 at once / 8 x 1"] = round(result.ratios["8 at once / 8 x 1"] / most, 3)
    result.fact("peak MiB of one", max(result.series["  peak MiB of 1 at once"]), at_most=MEMORY_MIB)
    result.fact("peak MiB of 8", max(result.series["  peak MiB of 8 at once"]))
    return result


def names(bake):
    """The ids of the images. A single image is printed without its name."""
    return [line.split()[0] for line in bake.cost.out.splitlines()]


def no_crosstalk(region, ids):
    """Fails unless each image has its own marker and package, and no other image's. Reads the snapshots."""
    for index, image in enumerate(ids):
        disk = region.disk_of(image)
        where = f"{disk}?offset={root_offset(disk)}"

        def debugfs(command):
            done = subprocess.run(["debugfs", "-R", command, where], capture_output=True, text=True)
            return done.stdout

        marker = debugfs("cat /etc/marker")
        if marker != f"this is image-{index}\n":
            raise Failed(f"image-{index} ({image}) has the marker {marker!r}")
        listed = debugfs("ls -p /var/lib/dpkg/info")
        for other, package in enumerate(SMALL):
            if (f"/{package}.list/" in listed) != (other == index):
                raise Failed(f"image-{index} ({image}): {package} is {'' if other != index else 'not '}in it")


def checksum(bench):
    """A tree of 2 GiB in 512 files, compared with sha1sum on all cores."""
    result = Result("checksum", runs=bench.runs)
    tree = bench.work / "tree"
    tree.mkdir()
    for index in range(512):
        (tree / f"{index:04}").write_bytes(os.urandom(4 << 20))
    for run in range(bench.runs):
        def ours():
            cost = measure([bench.bins / "oven", "checksum", tree], bench.bins / "oven")
            result.add("oven", cost.seconds)
            result.add("  peak MiB", cost.peak_mib)

        def theirs():
            start = time.monotonic()
            sh("sh", "-c", f"find '{tree}' -type f -print0 | xargs -0 -P{os.cpu_count()} -n32 sha1sum")
            result.add("sha1sum", time.monotonic() - start)

        bench.turns(run, ours, theirs)
        result.print_run(run, bench.runs)
    shutil.rmtree(tree)
    result.ratio("oven / sha1sum", "oven", "sha1sum")
    result.fact("peak MiB", max(result.series["  peak MiB"]), at_most=MEMORY_MIB)
    return result
