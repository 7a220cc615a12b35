"""Runs processes and measures their cost: seconds, CPU seconds, memory."""
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
# Seconds between samples of memory: only a step's helper of a few MiB runs for a shorter time.
LOOK = 0.02
# Seconds for which the idle machine is sampled: its CPU clock has a hundred ticks per second.
BACKGROUND = 1.0


class Failed(Exception):
    """A command that had to succeed failed."""


@dataclasses.dataclass
class Cost:
    seconds: float
    # Of the process and all children that it waited for.
    cpu_seconds: float
    # MiB: the highest sum of the peaks of the program's concurrent processes.
    peak_mib: int
    # Until its first line of output.
    first_line: float
    out: str


def say(text):
    print(f"  {text}", file=sys.stderr, flush=True)


def sh(*argv, **more):
    return subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL, **more)


def output(*argv, **more):
    return subprocess.check_output([str(a) for a in argv], text=True, **more)


def descendants(pid):
    """The process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                todo += [int(child) for child in open(f"/proc/{one}/task/{task}/children").read().split()]
        except OSError:
            pass
    return found


class Memory(threading.Thread):
    """Samples the peaks (VmHWM, which is lost when a process ends) of the descendants of `pid` that run `program`."""

    def __init__(self, pid, program, look):
        super().__init__(daemon=True)
        self.pid, self.program, self.look = pid, os.path.realpath(program), look
        self.peak, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(self.look):
            total = 0
            for pid in descendants(self.pid):
                try:
                    if os.readlink(f"/proc/{pid}/exe") != self.program:
                        continue
                    for line in open(f"/proc/{pid}/status"):
                        if line.startswith("VmHWM"):
                            total += int(line.split()[1])
                except OSError:
                    pass
            self.peak = max(self.peak, total // 1024)


def measure(argv, program, look=LOOK, **more):
    """Runs a command that has to succeed. `program`: the program whose memory counts. `look`: seconds between samples."""
    argv = [str(a) for a in argv]
    settle()
    start = time.monotonic()
    # Standard error goes to a file, which is shown after a failure; a pipe that nobody reads would fill up.
    with open(TOP / "target/bench.stderr", "w+b") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, **more)
        memory = Memory(process.pid, program, look)
        memory.start()
        first = process.stdout.readline()
        first_line = time.monotonic() - start
        out = (first + process.stdout.read()).decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        memory.over.set()
        memory.join()
        if process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()[-20:]
            words = " ".join(word for word in argv if "\n" not in word)
            raise Failed(f"{words}\nexited with {process.returncode}:\n" + "\n".join([*lines, out[-2000:]]))
    return Cost(seconds, usage.ru_utime + usage.ru_stime, memory.peak, first_line, out)


def settle():
    """Flushes all writes to disk, so that nobody pays for writes of the previous run."""
    os.sync()


def busy():
    """CPU seconds that the whole machine has used so far, including the kernel's threads."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, open("/proc/stat").readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def background():
    """CPU seconds that the idle machine uses per second."""
    worked, start = busy(), time.monotonic()
    time.sleep(BACKGROUND)
    return (busy() - worked) / (time.monotonic() - start)


def build(profile):
    """Builds the programs, with one feature set: a second one would build everything twice."""
    sh(TOP / "scripts/setup", "--demo")
    flags = ["--release"] if profile == "release" else []
    sh("cargo", "build", "--locked", "--quiet", "--workspace", "--features", "root", *flags, cwd=TOP)
    return TOP / "target" / ("release" if profile == "release" else "debug")
