"""Processes and what they cost: seconds, CPU seconds, memory."""
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
# Memory is looked at so often: what lives shorter is a step's helper of a few MiB.
LOOK = 0.02
# So long the machine is watched while nothing is measured: its clock ticks a hundred times a second.
BACKGROUND = 1.0


class Failed(Exception):
    """A command that had to end well did not."""


@dataclasses.dataclass
class Cost:
    seconds: float
    # Of the process and all that it waited for.
    cpu_seconds: float
    # MiB: of all processes of the program that ran at the same time, the sum of their peaks.
    peak_mib: int
    # Until it said its first line.
    first_line: float
    out: str


def say(text):
    print(f"  {text}", file=sys.stderr, flush=True)


def sh(*argv, **more):
    return subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL, **more)


def output(*argv, **more):
    return subprocess.check_output([str(a) for a in argv], text=True, **more)


def descendants(pid):
    """The process and all below it."""
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
    """Follows the peaks (VmHWM: gone with the process) of those below `pid` whose program is `program`."""

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
    """Runs it to its good end. `program`: whose memory counts. `look`: how often, in seconds."""
    argv = [str(a) for a in argv]
    settle()
    start = time.monotonic()
    # Standard error into a file: it is shown where it failed, and a pipe that nobody reads would fill.
    with open(TOP / "target/bench.stderr", "w+b") as told:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=told, stdin=subprocess.DEVNULL, **more)
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
            told.seek(0)
            lines = told.read().decode(errors="replace").splitlines()[-20:]
            words = " ".join(word for word in argv if "\n" not in word)
            raise Failed(f"{words}\nended with {process.returncode}:\n" + "\n".join([*lines, out[-2000:]]))
    return Cost(seconds, usage.ru_utime + usage.ru_stime, memory.peak, first_line, out)


def settle():
    """Waits until what was written is on the disk: nobody pays for what the one before left."""
    os.sync()


def busy():
    """CPU seconds that all of the machine has worked so far, the kernel's threads included."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, open("/proc/stat").readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def background():
    """CPU seconds that the machine works in each second though nothing is measured."""
    worked, start = busy(), time.monotonic()
    time.sleep(BACKGROUND)
    return (busy() - worked) / (time.monotonic() - start)


def build(profile):
    """The programs, in one feature set: another would build it all twice."""
    sh(TOP / "scripts/setup", "--demo")
    flags = ["--release"] if profile == "release" else []
    sh("cargo", "build", "--locked", "--quiet", "--workspace", "--features", "root", *flags, cwd=TOP)
    return TOP / "target" / ("release" if profile == "release" else "debug")
