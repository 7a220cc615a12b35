"""The EC2-shaped server of tools/ec2-server, which answers at once or as slowly as AWS."""
import json
import pathlib
import shutil
import subprocess
import time

from .machine import Failed, TOP


# Packer expects the device of an `attached` volume at once, but a busy machine needs some time to name it.
AT_ONCE = '{"attaching": 300}'


class Server:
    instance, zone = "i-0123456789abcdef0", "us-east-1a"

    def __init__(self, bins, directory, latency, base=None):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self.dir, self.calls_file = directory / "region", directory / "calls.jsonl"
        argv = [bins / "oven-ec2-server", "--region-dir", self.dir, "--attach", "loop", "--record", self.calls_file]
        argv += ["--plausible"] if latency == "plausible" else ["--delays", AT_ONCE]
        argv += ["--import", f"bench-base={base}"] if base else []
        self.log = open(directory / "server.log", "w+")
        self.process = subprocess.Popen([str(a) for a in argv], stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while True:
            lines = (directory / "server.log").read_text().splitlines()
            if lines and lines[-1].startswith("http"):
                self.endpoint = lines[-1].strip()
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise Failed("the server did not start:\n" + "\n".join(lines))
            time.sleep(0.02)
        self.base = lines[0].split()[0] if base else None
        self.read = 0

    def environment(self):
        # No keys: the SDK gets the role's keys from IMDS, which the server offers at the same address.
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint,
                "AWS_REGION": "us-east-1"}

    def calls(self):
        """The calls since the last time this was called."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        new, self.read = lines[self.read:], len(lines)
        return [json.loads(line) for line in new]

    def world(self):
        return json.loads((self.dir / "ec2.json").read_text())

    def snapshot_of(self, image):
        return self.world()["images"][image]["mappings"][0]["snapshot"]

    def disk(self, snapshot):
        """The file of a snapshot."""
        return self.dir / "snapshots" / f"{snapshot}.img"

    def left(self):
        return [volume["id"] for volume in self.world()["volumes"].values() if not volume["gone_at"]]

    def forget(self, image):
        """Removes a snapshot that will not be read again, to free its space."""
        self.disk(self.snapshot_of(image)).unlink(missing_ok=True)

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
