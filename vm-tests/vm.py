"""A virtual machine for the tests: boots, runs commands, gets disks plugged in and out, and leaves nothing behind.

The machine is a q35 with an NVMe root disk, as EC2's are, and with root ports for NVMe controllers that come and go by
QMP, each with a volume's id as its serial. KVM is used where it works, else QEMU's own emulation: slower by ten times,
and the same otherwise. Needs no root; only Python's standard library, qemu-system-x86_64, OVMF, ssh and e2fsprogs.

Run as a program, it hands a guest's connection to the metadata service on: `vm.py PORT`.
"""

import base64
import ctypes
import json
import os
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

# A guest under emulation boots in 15 to 40 s; with 17 others waiting for two CPUs it took 212 s.
BOOT_SECONDS = 400
# Plugging takes a second at most, also on a busy machine.
PLUG_SECONDS = 30
PORTS = 12
IDLE = ["e2scrub_reap.service", "apt-daily.timer", "apt-daily-upgrade.timer", "fstrim.timer"]
OVMF = "/usr/share/ovmf/OVMF.fd"
# EC2's addresses, and those that a guest of ours has instead of its subnet's.
IMDS, NAMES, HOST, FIRST = "169.254.169.254", "169.254.169.253", "169.254.0.2", "169.254.10.15"
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
EC2_SERIAL = "vol0000000000000000"     # of the root disk; 20 characters with the digit that follows


class Failed(Exception):
    """What a test found wrong, or what did not happen in time."""


def say(text):
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


STARTED = time.monotonic()


def accelerator():
    """kvm where it really works: /dev/kvm alone says little, it may be there without the CPU's support for it."""
    chosen = os.environ.get("OVEN_VM_ACCEL")
    if chosen:
        return chosen
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        virtual = re.search(r"\b(vmx|svm)\b", cpuinfo.read())
    return "kvm" if virtual and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def lacking():
    """Why there can be no virtual machine here, or None."""
    if os.uname().machine != "x86_64":
        return f"the guests are x86_64, this machine is {os.uname().machine}"
    for tool in ["qemu-system-x86_64", "ssh", "ssh-keygen", "debugfs", "sfdisk", "mkfs.ext4"]:
        if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            return f"there is no {tool}"
    return None if os.path.exists(OVMF) else f"there is no {OVMF}"


def end_on_signals():
    """SIGTERM and SIGHUP unwind as Control-C does: what is open is cleaned up."""
    def stop(number, _frame):
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)


def child_of_ours():
    """In a child before exec: it ends when this process does, however that ends, and has no terminal: an ssh that touches
    one stops everybody in the background with it."""
    os.setsid()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_partition(raw):
    table = json.loads(subprocess.run(
        ["/usr/sbin/sfdisk", "--json", raw], check=True, capture_output=True).stdout)["partitiontable"]
    return next(p for p in table["partitions"] if re.search(r"[^0-9]1$", p["node"]))


def root_start(raw):
    """Where the root file system begins, in bytes."""
    return first_partition(raw)["start"] * 512


class Qmp:
    """QEMU's monitor. Its events are kept until somebody asks for them."""

    def __init__(self, path, deadline):
        self.events = []
        self.buffer = b""
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise Failed(f"nobody listens on {path}") from None
                time.sleep(0.02)
        self.receive(deadline)
        self.run("qmp_capabilities")

    def receive(self, deadline):
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            data = self.socket.recv(65536)
            if not data:
                raise Failed("QEMU closed its monitor")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def run(self, command, seconds=PLUG_SECONDS, **arguments):
        message = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = self.receive(deadline)
            except TimeoutError:
                raise Failed(f"QEMU did not answer {command}") from None
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise Failed(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_for(self, event, matches=lambda data: True, seconds=PLUG_SECONDS):
        """The data of the next event of this name; earlier ones count, each once."""
        deadline = time.monotonic() + seconds
        while True:
            for index, found in enumerate(self.events):
                if found["event"] == event and matches(found.get("data", {})):
                    del self.events[index]
                    return found.get("data", {})
            try:
                self.events.append(self.receive(deadline))
            except TimeoutError:
                raise Failed(f"no {event} within {seconds} s") from None


class Vm:
    """Use it in a `with`: at its end the machine is gone, and all that it needed.

    firmware: "bios" or "efi" boots as EC2 does; None takes kernel and initramfs out of the image, which is quicker.
    root: "nvme"; the image is never written to, except with writable=True.
    ssh: whether a key is handed in for commands.
    imds: a port of this machine's loopback that answers to the guest's 169.254.169.254:80. Such a guest reaches this
    machine at HOST.
    """

    def __init__(self, image, firmware=None, memory_mib=1024, ssh=True, forwards=(), extra=(), writable=False, imds=None):
        self.image, self.firmware, self.memory_mib = str(image), firmware, memory_mib
        self.ssh, self.forwards, self.extra, self.writable = ssh, dict(forwards), list(extra), writable
        self.imds = imds
        self.dir = self.process = self.qmp = None
        self.volumes = {}
        self.shells = []
        self.patience = 2

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="oven-vm-")
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_ignored):
        for shell in self.shells:
            shell.close()
        if self.process:
            self.process.kill()
            self.process.wait()
        if self.dir:
            shutil.rmtree(self.dir)
        self.dir = self.process = None

    def path(self, name):
        return os.path.join(self.dir, name)

    @property
    def monitor(self):
        """A second monitor, for whoever else attaches disks (`oven-ec2-server --attach qmp:SOCKET`)."""
        return self.path("monitor.sock")

    def console(self):
        with open(self.path("console"), encoding="utf-8", errors="replace") as text:
            return text.read()

    # ---- starting ----

    def start(self):
        accel = accelerator()
        port = free_port()
        self.port = port
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in self.forwards.items())
        # Multi-threaded emulation hung two of eight guests, and QEMU itself died in two of two stress runs.
        cpus = ["-smp", "2", "-cpu", "host"] if accel == "kvm" else ["-smp", "1", "-cpu", "max"]
        disk = f"file={self.image.replace(',', ',,')},if=none,id=root,format=raw,cache=unsafe"
        disk += "" if self.writable else ",snapshot=on"
        boot = "" if self.firmware is None else ",bootindex=0"
        network = self.network_of_ec2() if self.imds else ""
        command = [
            "qemu-system-x86_64", "-machine", f"q35,accel={accel}", *cpus, "-m", str(self.memory_mib),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{self.path('console')}",
            "-qmp", f"unix:{self.path('qmp.sock')},server=on,wait=off",
            "-qmp", f"unix:{self.monitor},server=on,wait=off",
            "-drive", disk, "-device", f"nvme,drive=root,serial={EC2_SERIAL}0{boot}",
            "-netdev", f"user,id=net{network},hostfwd=tcp:127.0.0.1:{port}-:22{forwards}",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            # The guest's random numbers, at once: keys are made at its first boot.
            "-device", "virtio-rng-pci",
        ]
        for number in range(PORTS):
            slot = number + 1
            command += ["-device", f"pcie-root-port,id=rp{number},bus=pcie.0,chassis={slot},slot={slot}"]
        if self.ssh:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.path("key")], check=True)
            with open(self.path("key.pub"), "rb") as key:
                public = base64.b64encode(key.read()).decode()
            # systemd takes it for root's authorized_keys; nothing of it is in the image.
            credential = f"value=io.systemd.credential.binary:ssh.authorized_keys.root={public}"
            command += ["-smbios", f"type=11,{credential}"]
        if self.firmware == "efi":
            command += ["-bios", OVMF]
        elif self.firmware is None:
            command += self.direct_boot()
        self.process = subprocess.Popen(
            command + self.extra, stdin=subprocess.DEVNULL, preexec_fn=child_of_ours,
            env={**os.environ, "TMPDIR": self.dir})
        self.qmp = Qmp(self.path("qmp.sock"), time.monotonic() + 20)

    def network_of_ec2(self):
        """The addresses that instances know, in a network that has them all."""
        hand_on = shlex.join([sys.executable, "-I", os.path.abspath(__file__), str(self.imds)]).replace(",", ",,")
        return f",net=169.254.0.0/16,host={HOST},dns={NAMES},dhcpstart={FIRST},guestfwd=tcp:{IMDS}:80-cmd:{hand_on}"

    def direct_boot(self):
        """Kernel and initramfs as files, out of the image's first partition; nothing is mounted."""
        first = first_partition(self.image)
        source = f"{self.image}?offset={first['start'] * 512}"

        def debugfs(request):
            done = subprocess.run(["/usr/sbin/debugfs", "-R", request, source], check=True, capture_output=True)
            return done.stdout.decode()

        names = re.findall(r"(?:vmlinuz|initrd\.img)-\S+", debugfs("ls /boot"))
        kernel = sorted(name for name in names if name.startswith("vmlinuz-"))[-1]
        for name in [kernel, kernel.replace("vmlinuz", "initrd.img")]:
            debugfs(f"dump /boot/{name} {self.path(name.split('-')[0])}")
        # The kernel has NVMe and ext4 built in: the initramfs would cost three seconds.
        line = f"root=PARTUUID={first['uuid'].lower()} ro console=ttyS0,115200 quiet"
        # Work of their own, which a guest that lives for minutes need not do.
        line += "".join(f" systemd.mask={unit}" for unit in IDLE)
        return ["-kernel", self.path("vmlinuz"), "-append", line]

    # ---- commands ----

    def ssh_command(self, *command):
        return [
            "ssh", "-F", "none", "-i", self.path("key"), "-p", str(self.port), "-o", "BatchMode=yes",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
            "-o", "ConnectTimeout=10", "-o", f"ControlPath={self.path('ssh.sock')}", "-o", "ControlMaster=auto",
            "-o", "ControlPersist=600", "root@127.0.0.1", *command]

    def answers(self):
        """Whether ssh works by now. QEMU takes connections before anybody listens in the guest."""
        if self.process.poll() is not None:
            raise Failed(f"QEMU ended with {self.process.returncode}\n{self.console()[-2000:]}")
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=self.patience) as probe:
                if probe.recv(4) != b"SSH-":
                    return False
        except OSError:
            # On a busy machine sshd itself takes seconds to greet.
            self.patience = min(self.patience + 0.5, 15)
            return False
        done = subprocess.run(self.ssh_command("true"), capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
                              check=False, preexec_fn=child_of_ours)
        return done.returncode == 0

    def wait_for_ssh(self, seconds=BOOT_SECONDS):
        wait_for_all([self], seconds)

    def run(self, command, seconds=60, check=True, stream=False):
        """Runs a shell's command as root, and answers (status, output)."""
        pipe = None if stream else subprocess.PIPE
        try:
            done = subprocess.run(
                self.ssh_command(command), stdin=subprocess.DEVNULL, stdout=pipe, timeout=seconds, check=False,
                stderr=None if stream else subprocess.STDOUT, preexec_fn=child_of_ours)
        except subprocess.TimeoutExpired:
            raise Failed(f"in the guest, not done within {seconds} s: {command}") from None
        output = "" if stream else done.stdout.decode(errors="replace")
        if check and done.returncode != 0:
            raise Failed(f"in the guest, status {done.returncode}: {command}\n{output}")
        return done.returncode, output

    def begin(self, command):
        """A shell's command as a process: for one that ends the machine."""
        return subprocess.Popen(
            self.ssh_command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=child_of_ours)

    def copy(self, source, target, seconds=120):
        """A file into the guest, executable if it is here."""
        mode = "755" if os.access(source, os.X_OK) else "644"
        target = shlex.quote(target)
        with open(source, "rb") as content:
            subprocess.run(
                self.ssh_command(f"cat > {target} && chmod {mode} {target}"), stdin=content, timeout=seconds,
                check=True, preexec_fn=child_of_ours)

    def talk(self, command):
        """A program in the guest that answers a line to each line."""
        shell = Talk(self.ssh_command(command))
        self.shells.append(shell)
        return shell

    def power_off(self, seconds=60):
        """As EC2 stops an instance: by the power button."""
        self.qmp.run("system_powerdown")
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"the guest did not power off within {seconds} s\n{self.console()[-2000:]}") from None

    # ---- disks ----

    def plug(self, volume, file, port, **properties):
        """Hot-plugs a raw file as an NVMe controller. `volume` is `vol-…`; `port` a number from 0."""
        block, device = f"b-{volume}", f"d-{volume}"
        storage = {"driver": "file", "filename": str(file), "cache": {"no-flush": True}}
        self.qmp.run("blockdev-add", driver="raw", **{"node-name": block}, file=storage)
        # With its slot: without one QEMU 7.2 takes a second device for a port, and no guest sees it.
        self.qmp.run("device_add", driver="nvme", id=device, drive=block, serial=volume.replace("-", ""),
                     bus=f"rp{port}", addr="0", **properties)
        self.volumes[volume] = (block, device)

    def start_unplug(self, volume):
        self.qmp.run("device_del", id=self.volumes[volume][1])

    def finish_unplug(self, volume):
        block, device = self.volumes.pop(volume)
        self.qmp.wait_for("DEVICE_DELETED", lambda data: data.get("device") == device)
        self.qmp.run("blockdev-del", **{"node-name": block})

    def unplug(self, volume):
        """Takes it out, whether or not the guest uses it."""
        self.start_unplug(volume)
        self.finish_unplug(volume)


def wait_for_all(machines, seconds=BOOT_SECONDS):
    """Until there is ssh on each. Answers how long each took from now on, by the machines' order."""
    began = time.monotonic()
    took = {}
    while len(took) < len(machines):
        for machine in machines:
            if machine not in took and machine.answers():
                took[machine] = time.monotonic() - began
            elif machine not in took and time.monotonic() - began > seconds:
                raise Failed(f"no ssh within {seconds} s\n{machine.console()[-2000:]}")
        time.sleep(0.1)
    return [took[machine] for machine in machines]


class Talk:
    def __init__(self, command):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=child_of_ours)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.buffer = b""

    def ask(self, line, seconds=60):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0, deadline - time.monotonic())):
                raise Failed(f"no answer within {seconds} s to: {line}")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise Failed(f"the program in the guest ended; asked was: {line}")
            self.buffer += data
        answer, self.buffer = self.buffer.split(b"\n", 1)
        return answer.decode(errors="replace")

    def close(self):
        self.selector.close()
        self.process.kill()
        self.process.wait()


def main(run):
    """Runs a test: 0, 1 with what it found wrong, or 77 where there can be no virtual machine."""
    end_on_signals()
    reason = lacking()
    if reason:
        print(f"skipped: {reason}")
        return 77
    try:
        run()
    except Failed as failed:
        say(f"FAILED: {failed}")
        return 1
    return 0


def hand_on(port):
    """Standard input and output are a guest's connection; it goes on to this port here."""
    with socket.create_connection(("127.0.0.1", port)) as there:
        sources = [0, there]
        while there in sources:
            for source in select.select(sources, [], [])[0]:
                data = os.read(0, 65536) if source == 0 else there.recv(65536)
                if not data:
                    sources.remove(source)
                    if source == 0:
                        there.shutdown(socket.SHUT_WR)
                elif source == 0:
                    there.sendall(data)
                else:
                    while data:
                        data = data[os.write(1, data):]


if __name__ == "__main__":
    hand_on(int(sys.argv[1]))
