"""Runs oven for the bench: on its own local region, or on the EC2-shaped server."""
import dataclasses
import json
import os
import pathlib
import shutil

from .machine import Cost, Failed, measure, output, sh

# If not empty, directories in which the traces of all bakes are stored.
TRACES = []
STATE = pathlib.Path("/var/lib/oven")
APT_PHASES = {"fetch", "upgrade", "install"}


@dataclasses.dataclass
class Bake:
    cost: Cost
    image: str
    # Seconds of each phase, from the trace.
    phases: dict
    # The trace's counters: sums by name.
    counted: dict

    @property
    def seconds(self):
        return self.cost.seconds

    @property
    def is_new(self):
        return "register" in self.phases

    @property
    def apt(self):
        return sum(seconds for phase, seconds in self.phases.items() if phase in APT_PHASES)


def define(directory, name, base, packages, mark, more=""):
    """A definition. `mark`: a text that makes it different from earlier ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "image.toml").write_text(
        f'# {mark}\nname = "{name}"\nfrom = {{ name = "{base}", owner = "self" }}\npackages = {json.dumps(packages)}\n{more}')
    return directory


def events_of(path):
    for directory in TRACES:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, directory / f"{len(list(directory.iterdir())):03}-{path.parent.name}.json")
    return json.loads(path.read_text())["traceEvents"]


def seconds_between(path, first, last):
    """Seconds from the beginning of the first call named `first` to the end of the last one named `last`."""
    spans = [event for event in events_of(path) if event["ph"] == "X"]
    begin = min(event["ts"] for event in spans if event["name"] == first)
    return (max(event["ts"] + event["dur"] for event in spans if event["name"] == last) - begin) / 1e6


def read_trace(path):
    """(seconds by phase, sums by counter)"""
    events = events_of(path)
    phases, counted = {}, {}
    for event in events:
        if event["ph"] == "X" and "phase" in event["args"]:
            phase = event["args"]["phase"]
            phases[phase] = phases.get(phase, 0) + event["dur"] / 1e6
        if event["ph"] == "C":
            key = (event["pid"], event["name"])
            counted[key] = max(counted.get(key, 0), event["args"]["sum"])
    sums = {}
    for (_, name), value in counted.items():
        sums[name] = sums.get(name, 0) + value
    return {phase: round(seconds, 3) for phase, seconds in phases.items()}, sums


class Region:
    """A local region without caches: these are in its directory."""

    def __init__(self, bins, directory, base, disks):
        self.oven, self.dir, self.disks, self.base = bins / "oven", directory, disks, base
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        sh(self.oven, "--quiet", "--region-dir", self.dir / "region", "import", base, "--name", "bench-base")

    def argv(self, *verb):
        # A branch without the setting only has attached disks.
        disks = ["--disks", self.disks] if self.disks != "attached" else []
        return [self.oven, "--region-dir", self.dir / "region", *disks, *verb]

    def bake(self, packages, mark, name="bench", more=""):
        image = define(self.dir / name, name, "bench-base", packages, mark, more)
        return self.bake_all([image], 1)

    def bake_all(self, images, jobs, **more):
        trace = self.dir / "trace.json"
        argv = self.argv("--quiet", "--trace", trace, "bake", "--jobs", jobs, *images)
        cost = measure(argv, self.oven, **more)
        return Bake(cost, cost.out.split()[0], *read_trace(trace))

    def disk_of(self, image):
        """The file of its snapshot."""
        shown = json.loads(output(*self.argv("--json", "images", "show", image)).splitlines()[-1])
        found = list((self.dir / "region").rglob(f"{shown['snapshot']}.img"))
        if len(found) != 1:
            raise Failed(f"{shown['snapshot']} has not exactly one file: {found}")
        return found[0]

    def remove(self, *images):
        """Removes images, to free space for the next run."""
        sh(*self.argv("--quiet", "images", "remove", *images), stderr=None)


class Aws:
    """oven with `cloud = "aws"`, on the server. It has its own state directory, without caches if it is new."""

    def __init__(self, bins, directory, server, disks):
        self.bins, self.dir, self.server, self.disks = bins, directory, server, disks
        self.state = directory / "state"
        self.state.mkdir(parents=True, exist_ok=True)

    def environment(self):
        return {"PATH": os.environ["PATH"], "HOME": str(self.dir), **self.server.environment()}

    def run(self, *verb):
        """Runs the program. Its state directory, /var/lib/oven, is replaced in a mount namespace."""
        STATE.mkdir(parents=True, exist_ok=True)
        script = 'mount --bind "$0" /var/lib/oven && exec "$@"'
        argv = ["unshare", "--mount", "sh", "-c", script, self.state, self.bins / "oven", "--cloud", "aws",
                "--instance-id", self.server.instance, "--zone", self.server.zone, *verb]
        return measure(argv, self.bins / "oven", env=self.environment())

    def bake(self, packages, mark):
        image = define(self.dir / "bench", "bench", "bench-base", packages, mark)
        trace = self.dir / "trace.json"
        if self.disks == "direct":
            cost = self.run("--quiet", "--disks", "direct", "--trace", trace, "bake", image)
            return Bake(cost, cost.out.split()[0], *read_trace(trace))
        # Volumes are not NVMe disks here: the tests' program only differs in how it finds a volume's device.
        environment = {**self.environment(), "OVEN_TEST_DIR": str(self.server.dir), "OVEN_TEST_SLOW": "1",
                       "OVEN_TEST_STATE": str(self.state), "OVEN_TEST_TRACE": str(trace)}
        program = self.bins / "oven-test-ec2"
        cost = measure([program, image], program, env=environment)
        return Bake(cost, cost.out.split()[-1], *read_trace(trace))
