#!/usr/bin/env python3
"""oven's plugin for @NAME@. It reads a request from standard input and writes the answer to standard output. Both are JSON.

The plugin only plans, and does nothing itself. oven runs it as user nobody and without a network.
`oven plugin check @NAME@.py` says what is missing. The guide is docs/plugins.md of oven.
"""

import json
import re
import sys

API = 1
PKG = "/usr/bin/pkg"  # the package manager
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*\Z")  # anything else, such as an option or a script, is refused
# The fields of a job that this plugin supports, and those that it may ignore. A job with another field is refused.
SUPPORTED = {"os_release", "architecture", "present", "texts", "packages", "network"}
IGNORED = {"recommends", "conffiles", "mirror", "ca_file", "tools"}


class Refused(Exception):
    """The plugin does not support the definition. The message is for the author of the definition."""


def claims(request):
    refuse_unknown(request, {"api", "os_release"}, "the request")
    os = request["os_release"]
    claim = "exact" if os.get("ID") == "@NAME@" else "family" if "@NAME@" in os.get("ID_LIKE", "").split() else "no"
    return {"claim": claim, "look_for": [PKG]}  # the job will say which of these paths the image has


def plan(request):
    refuse_unknown(request, {"api", "job"}, "the request")
    job = request["job"]
    refuse_unknown(job, SUPPORTED | IGNORED | {"upgrade"}, "the job")
    if job.get("upgrade", "none") != "none":
        raise Refused("upgrade: this plugin does not upgrade yet")
    names = [name_of(package) for package in job.get("packages", [])]
    if not names:
        return {"plan": {}}
    if not job["present"].get(PKG):
        raise Refused(f"packages cannot be installed: the image has no {PKG}")

    def step(phase, why, *argv, **more):
        return {"phase": phase, "why": why, "argv": [PKG, *argv], "timeout": 3600, **more}

    count = f"{len(names)} package{'s' if len(names) > 1 else ''}"
    return {
        "plan": {
            "steps": [
                # These steps have the network, and do not run code of packages.
                step("fetch", "refreshing the package index", "update", network=True, retries=2, timeout=900),
                step("fetch", f"downloading {count}", "fetch", "--", *names, network=True, retries=2),
                # This step runs code of packages. It has the network only if the definition asks for it.
                step("install", f"installing {count}", "install", "--", *names, network=job.get("network", False)),
                step("clean", "removing downloaded packages", "clean", timeout=300),
            ],
            # This command prints name, version and architecture of each installed package, separated by tabs. oven
            # checks that the expected packages are among them.
            "facts": {"packages": [PKG, "list"]},
            "expect": {"packages": [{"name": name} for name in names]},
            # Explains a line of output to the definition's author.
            "troubles": [{"output": "*no such package: *", "means": "there is no package `{2}`", "package": "{2}"}],
        }
    }


def name_of(package):
    if package.get("kind") != "named":
        raise Refused(f"packages: a {package.get('kind')} is not supported yet: list names")
    refuse_unknown(package, {"kind", "name", "version"}, "a package")
    if not NAME.match(package["name"]):
        raise Refused(f"packages: {package['name']!r} is not a valid package name")
    if package.get("version") is not None:
        raise Refused(f"packages: {package['name']}: a version cannot be chosen")
    return package["name"]


def refuse_unknown(table, known, what):
    unknown = sorted(set(table) - known)
    if unknown:
        raise Refused(f"{what} has `{unknown[0]}`, which this plugin does not support")


def main():
    verbs = {"claims": claims, "plan": plan}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        sys.exit("usage: @NAME@.py claims|plan")
    request = json.load(sys.stdin)
    try:
        if request.get("api") != API:
            raise Refused(f"the request has version {request.get('api')} of the contract; this plugin supports version {API}")
        answer = verbs[sys.argv[1]](request)
    except Refused as refused:
        answer = {"refused": str(refused)}
    json.dump({"api": API, **answer}, sys.stdout, sort_keys=True)


main()
