"""Modes on the EC2-shaped server: bakes compared with Packer, uploads and downloads with coldsnap."""
import filecmp
import shutil

from . import peers
from .blocks import changed_blocks
from .machine import Failed, say
from .oven import Aws, seconds_between
from .plain import plain
from .results import Result
from .server import Server

# A usual server.
PACKAGES = ["nginx-light"]
# (of Packer at its own polling, at one second), as ratios of its time to ours.
BARS = {"attached": (3.0, 1.3), "direct": (6.0, 2.5)}


def bakes(bench, latency):
    """Bakes on one server: oven, cold and warm, attached and direct; Packer; the plain commands."""
    result = Result("bakes", latency=latency, runs=bench.runs, packages=" ".join(PACKAGES))
    if bench.peers:
        peers.packer()
    with Server(bench.bins, bench.work / "server", latency, bench.base) as server:
        warm = {}
        for disks in bench.disks:
            warm[disks] = Aws(bench.bins, bench.work / f"warm-{disks}", server, disks)
            server.forget(new(warm[disks], f"warms the caches, {disks}").image)
            again(server, result, warm[disks], "noop", f"warms the caches, {disks}")
        for run in range(bench.runs):
            def ours():
                for disks in bench.disks:
                    server.calls()
                    bake = new(warm[disks], f"warm, {disks}, {run}")
                    result.add(f"{disks} warm", bake.seconds)
                    result.add(f"  {disks} warm, apt", bake.apt)
                    result.add(f"  {disks} peak MiB", bake.cost.peak_mib)
                    result.facts[f"{disks} warm, phases of the last"] = bake.phases
                    only_what_changed(server, result, bake, disks)
                    server.forget(bake.image)
                    cold = Aws(bench.bins, bench.work / f"cold-{disks}-{run}", server, disks)
                    bake = new(cold, f"cold, {disks}, {run}")
                    result.add(f"{disks} cold", bake.seconds)
                    result.add(f"  {disks} cold peak MiB", bake.cost.peak_mib)
                    server.forget(bake.image)
                    shutil.rmtree(cold.dir)
                if server.left():
                    raise Failed(f"leftover volumes: {server.left()}")

            def theirs():
                for name, poll in (("packer, its polling", None), ("packer, 1 s", 1)) if bench.peers else ():
                    cost, image = peers.packer_bake(server, bench.work / "packer", PACKAGES, f"packer-{poll}-{run}", poll)
                    result.add(name, cost.seconds)
                    server.forget(image)
                result.add("plain chroot", plain(bench.work, bench.base, PACKAGES)[0])

            bench.turns(run, ours, theirs)
            result.print_run(run, bench.runs)
    slow = latency == "plausible"
    for disks in bench.disks:
        if bench.peers:
            bars = BARS[disks] if slow else (None, None)
            result.ratio(f"packer, its polling / {disks} warm", "packer, its polling", f"{disks} warm", at_least=bars[0])
            result.ratio(f"packer, 1 s / {disks} warm", "packer, 1 s", f"{disks} warm", at_least=bars[1])
        result.ratio(f"{disks} warm / plain chroot", f"{disks} warm", "plain chroot")
        peak = result.series[f"  {disks} peak MiB"] + result.series[f"  {disks} cold peak MiB"]
        result.fact(f"{disks} peak MiB", max(peak), at_most=256)
    return result


def new(aws, mark):
    """Bakes a new image. The kind of disk does not change the inputs, so the mark has to."""
    bake = aws.bake(PACKAGES, mark)
    if not bake.is_new:
        raise Failed(f"{bake.image} existed already: {mark}")
    return bake


def again(server, result, aws, name, mark):
    """Bakes the same again, which has to find the image."""
    server.calls()
    bake = aws.bake(PACKAGES, mark)
    changing = [call["action"] for call in server.calls() if not call["action"].startswith(("Describe", "List"))]
    result.facts[f"{aws.disks} {name}, seconds"] = round(bake.seconds, 3)
    if "CreateSnapshot" in changing or "StartSnapshot" in changing:
        raise Failed(f"an existing image was baked again: {changing}")


def only_what_changed(server, result, bake, disks):
    """Fails unless exactly the blocks that differ between both snapshots were sent."""
    calls = server.calls()
    put = {int(index) for call in calls if call["action"] == "PutSnapshotBlock" and (index := block_of(call)) is not None}
    if disks != "direct":
        return
    base = server.disk(server.snapshot_of(server.base))
    changed = changed_blocks(base, server.disk(server.snapshot_of(bake.image)))
    result.add("  direct: blocks sent", len(put))
    result.add("  direct: blocks that differ", len(changed))
    result.add("  direct: blocks fetched", sum(call["action"] == "GetSnapshotBlock" for call in calls))
    if put != changed:
        raise Failed(f"sent but unchanged: {sorted(put - changed)}; changed but not sent: {sorted(changed - put)}")


def block_of(call):
    """The index of the block that a call is about."""
    return call["params"].get("BlockIndex")


def transfer(bench, latency):
    """Uploads a raw image, and downloads it again."""
    result = Result("transfer", latency=latency, runs=bench.runs)
    if bench.peers:
        peers.coldsnap()
    with Server(bench.bins, bench.work / "server", latency) as server:
        for run in range(bench.runs):
            aws = Aws(bench.bins, bench.work / "transfer", server, "direct")
            target = {name: bench.work / f"{name}.raw" for name in ("oven", "coldsnap")}

            def ours():
                trace = aws.dir / "trace.json"
                cost = aws.run("--quiet", "--trace", trace, "import", bench.base, "--name", f"base-{run}")
                result.add("oven's blocks up", seconds_between(trace, "StartSnapshot", "CompleteSnapshot"))
                result.add("oven import", cost.seconds)
                result.add("  oven import, peak MiB", cost.peak_mib)
                snapshot = server.snapshot_of(cost.out.split()[0])
                same(bench.base, server.disk(snapshot))
                cost = aws.run("--quiet", "export", snapshot, target["oven"])
                result.add("oven export", cost.seconds)
                result.add("  oven export, peak MiB", cost.peak_mib)
                same(bench.base, target["oven"])
                target["oven"].unlink()
                server.disk(snapshot).unlink()

            def theirs():
                cost, snapshot = peers.coldsnap_upload(server, bench.base, bench.work)
                result.add("coldsnap upload", cost.seconds)
                # It prints the snapshot's id after the last block, and begins to wait.
                result.add("coldsnap's blocks up", cost.first_line)
                result.add("  coldsnap upload, peak MiB", cost.peak_mib)
                same(bench.base, server.disk(snapshot))
                cost = peers.coldsnap_download(server, snapshot, target["coldsnap"], bench.work)
                result.add("coldsnap download", cost.seconds)
                result.add("  coldsnap download, peak MiB", cost.peak_mib)
                same(bench.base, target["coldsnap"])
                target["coldsnap"].unlink()
                server.disk(snapshot).unlink()

            bench.turns(run, ours, theirs if bench.peers else lambda: None)
            result.print_run(run, bench.runs)
    for ours, theirs in (("oven import", "coldsnap upload"), ("oven export", "coldsnap download")) if bench.peers else ():
        result.ratio(f"{theirs} / {ours}", theirs, ours, at_least=1.0)
        # Both figures include more than blocks: coldsnap's polling interval, and oven's registration of the image.
        if theirs == "coldsnap upload":
            result.ratio("coldsnap / oven, blocks up", "coldsnap's blocks up", "oven's blocks up", at_least=1.0)
        result.ratio(f"{ours} / {theirs}, memory", f"  {ours}, peak MiB", f"  {theirs}, peak MiB", at_most=0.99)
    for verb in ("import", "export"):
        result.fact(f"oven {verb}, peak MiB", max(result.series[f"  oven {verb}, peak MiB"]), at_most=256)
    return result


def same(before, after):
    different = changed_blocks(before, after)
    if different:
        raise Failed(f"{after} differs from {before}: blocks {sorted(different)[:10]}")
