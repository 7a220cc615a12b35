#!/usr/bin/env python3
"""oven's plugin for @NAME@. It reads a request from standard input and writes the answer to standard output, in JSON.

It only decides: it runs as nobody, without a network, and knows nothing but the request.
`oven plugin check @NAME@.py` says what is missing; oven's plugins/README.md is the guide.
"""

import json
import re
import sys

API = 1
PKG = "/usr/bin/pkg"  # the package manager
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*\Z")  # anything else is refused, such as an option
# The parts of a job that this plugin uses, and those that it may ignore. Any other part is refused.
HEEDED = {"os_release", "architecture", "present", "texts", "packages", "network"}
NEUTRAL = {"recommends", "conffiles", "mirror", "ca_file", "tools"}


class Refused(Exception):
    """This plugin does not support the definition. Its author sees the message."""


def claims(request):
    only(request, {"api", "os_release"}, "the request")
    os = request["os_release"]
    claim = "exact" if os.get("ID") == "@NAME@" else "family" if "@NAME@" in os.get("ID_LIKE", "").split() else "no"
    return {"claim": claim, "look_for": [PKG]}  # the job will say which of these the image has


def plan(request):
    only(request, {"api", "job"}, "the request")
    job = request["job"]
    only(job, HEEDED | NEUTRAL | {"upgrade"}, "the job")
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
                # These have the network, and run no package's code.
                step("fetch", "refreshing the package index", "update", network=True, retries=2, timeout=900),
                step("fetch", f"downloading {count}", "fetch", "--", *names, network=True, retries=2),
                # This runs packages' code, without the network unless the definition allows it.
                step("install", f"installing {count}", "install", "--", *names, network=job.get("network", False)),
                step("clean", "removing what was downloaded", "clean", timeout=300),
            ],
            # Lines of name, version and architecture, separated by tabs: oven checks that all are installed.
            "facts": {"packages": [PKG, "list"]},
            "expect": {"packages": [{"name": name} for name in names]},
            # What a line of output means for the author of the definition.
            "troubles": [{"output": "*no such package: *", "means": "there is no package `{2}`", "package": "{2}"}],
        }
    }


def name_of(package):
    if package.get("kind") != "named":
        raise Refused(f"packages: a {package.get('kind')} is not supported yet, only names are")
    only(package, {"kind", "name", "version"}, "a package")
    if not NAME.match(package["name"]):
        raise Refused(f"packages: {package['name']!r} is not the name of a package")
    if package.get("version") is not None:
        raise Refused(f"packages: {package['name']}: a version cannot be pinned")
    return package["name"]


def only(table, known, what):
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
            raise Refused(f"the request is of version {request.get('api')} of the contract, but this plugin has {API}")
        answer = verbs[sys.argv[1]](request)
    except Refused as refused:
        answer = {"refused": str(refused)}
    json.dump({"api": API, **answer}, sys.stdout, sort_keys=True)


main()
