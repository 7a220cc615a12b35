"""Two builds of oven, which take turns: how many seconds the later one takes more."""
import math
import os
import statistics

from .local import LARGE, SMALL
from .machine import Failed, measure
from .oven import Region
from .results import Result

# Student's t for a two-sided interval of 95 %, by degrees of freedom, from 1 to 30.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
SIDES = ["before", "after"]


def interval(differences):
    """(mean, lower end, upper end) of the 95 % interval of the differences."""
    mean, degrees = statistics.mean(differences), len(differences) - 1
    half = T_95[min(degrees, len(T_95)) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def compare(bench, mode, disks=None):
    """Measures a mode with both builds. Each has a region of its own, and so caches of its own."""
    result = Result(f"{mode}, before and after", runs=bench.runs, **({"disks": disks} if disks else {}))
    rounds = MODES[mode](bench, disks)
    for run in range(bench.runs):
        measured = {}
        bench.turns(run, *(lambda side=side: measured.update({side: rounds(side, run)}) for side in SIDES))
        for name in measured["before"]:
            for side in SIDES:
                result.add(f"{name}, {side}", measured[side][name], digits=4)
        result.print_run(run, bench.runs)
    for name in measured["before"]:
        before, after = (result.series[f"{name}, {side}"] for side in SIDES)
        mean, low, high = interval([b - a for a, b in zip(before, after)])
        usual = statistics.mean(before)
        shown = {"seconds": [round(value, 4) for value in (mean, low, high)],
                 "percent": [round(100 * value / usual, 2) for value in (mean, low, high)]}
        result.fact(f"{name}: after - before, mean and 95 % interval", shown)
        result.bar(f"{name}: the interval begins at, in percent", shown["percent"][1], bench.slower_by)
    return result


def regions(bench, disks):
    return {side: Region(bins, bench.work / side, bench.base, disks)
            for side, bins in zip(SIDES, (bench.before, bench.bins))}


def small(bench, disks):
    warm = regions(bench, disks)
    for side in SIDES:
        warm[side].remove(warm[side].bake(["less"], "warms the caches").image)

    def round_of(side, run):
        region, package = warm[side], SMALL[run % len(SMALL)]
        adds = region.bake([package], f"adds, {run}")
        again = region.bake([package], f"again, {run}")
        region.remove(adds.image, again.image)
        cold = Region(region.oven.parent, bench.work / f"cold-{side}", bench.base, disks).bake([package], f"cold, {run}")
        # The network's share of a bake differs from run to run; what oven does itself is the rest.
        return {"a new package, without apt": adds.seconds - adds.apt, "the same again": again.seconds,
                "cold, without apt": cold.seconds - cold.apt, "a new package": adds.seconds, "cold": cold.seconds}
    return round_of


def large(bench, disks):
    warm = regions(bench, disks)
    for side in SIDES:
        warm[side].remove(warm[side].bake(LARGE, "warms the caches").image)

    def round_of(side, run):
        again = warm[side].bake(LARGE, f"again, {run}")
        warm[side].remove(again.image)
        return {"the same again": again.seconds}
    return round_of


def noop(bench, disks):
    warm = regions(bench, disks)
    first = {side: warm[side].bake(["tree"], "once").image for side in SIDES}

    def round_of(side, _run):
        # A hit takes milliseconds: the median of several is one value.
        hits = [warm[side].bake(["tree"], "once") for _ in range(5)]
        if any(hit.image != first[side] for hit in hits):
            raise Failed("an existing image was baked again")
        return {"a hit": statistics.median(hit.seconds for hit in hits)}
    return round_of


def checksum(bench, _disks):
    tree = bench.work / "tree"
    tree.mkdir()
    for index in range(512):
        (tree / f"{index:04}").write_bytes(os.urandom(4 << 20))
    bins = dict(zip(SIDES, (bench.before, bench.bins)))

    def round_of(side, _run):
        return {"2 GiB": measure([bins[side] / "oven", "checksum", tree], bins[side] / "oven").seconds}
    return round_of


MODES = {"small": small, "large": large, "noop": noop, "checksum": checksum}
