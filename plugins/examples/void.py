#!/usr/bin/env python3
"""oven's plugin for Void Linux: xbps. It reads a request from standard input and writes the answer to standard output. Both are JSON.

The plugin only plans, and does nothing itself. oven runs it as user nobody and without a network.
"""

import json
import re
import sys

API = 1
VERSION = re.compile(r"[A-Za-z0-9.+~]+_[0-9]+\Z")
INSTALL, QUERY = "/usr/bin/xbps-install", "/usr/bin/xbps-query"
# Name, version, architecture and state of each package: `ii tree-2.1.1_1   Recursive directory listing`.
LIST = "xbps-query -l | sed -n 's/^\\(..\\) \\([^ ]*\\)-\\([^- ]*_[0-9]*\\) .*/\\2\\t\\3\\t'$(xbps-uhelper arch)'\\t\\1/p'"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*\Z")  # an invalid name could become an option, or part of a script
# The fields of a job that this plugin supports, and those that it may ignore. Others are refused, not ignored.
SUPPORTED = {"os_release", "architecture", "present", "texts", "packages", "upgrade", "hold", "network"}
IGNORED = {"recommends", "conffiles", "mirror", "ca_file", "tools"}


class Refused(Exception):
    """The plugin does not support the definition. The message is for the definition's author."""


def claims(request):
    refuse_unknown(request, {"api", "os_release"}, "the request")
    os = request["os_release"]
    claim = "exact" if os.get("ID") == "void" else "family" if "void" in os.get("ID_LIKE", "").split() else "no"
    return {"claim": claim, "look_for": [INSTALL, QUERY]}


def plan(request):
    refuse_unknown(request, {"api", "job"}, "the request")
    job = request["job"]
    refuse_unknown(job, SUPPORTED | IGNORED, "the job")
    upgrade = job.get("upgrade", "none")
    if upgrade == "security":
        raise Refused("upgrade: Void does not mark security updates: upgrade all packages, or none")
    packages = [package_of(package) for package in job.get("packages", [])]
    hold = [check_name(name, "hold") for name in job.get("hold", [])]
    changes = packages or hold or upgrade != "none"
    missing = [path for path in (INSTALL, QUERY) if not job["present"].get(path)]
    if changes and missing:
        raise Refused(f"packages cannot be installed: the image has no {missing[0]}")
    if not changes:
        return {"plan": {}}

    def step(phase, why, *argv, **more):
        return {"phase": phase, "why": why, "argv": list(argv), "timeout": 3600, **more}

    def fetch(why, *argv):
        return step("fetch", why, "xbps-install", *argv, network=True, retries=2)

    network = job.get("network", False)
    wanted = [name if version is None else f"{name}-{version}" for name, version in packages]
    count = f"{len(wanted)} package{'s' if len(wanted) != 1 else ''}"
    steps = [fetch("refreshing the package index", "-S")]
    if upgrade == "all":
        # If there is an update of xbps itself, the option -u first selects only this update.
        steps.append(fetch("downloading upgrades", "-yuD"))
        steps.append(fetch(f"downloading {count} and dependencies", "-yD", "--", *wanted)) if wanted else None
        steps.append(step("upgrade", "upgrading packages", "xbps-install", "-yu", network=network))
    elif wanted:
        steps.append(fetch(f"downloading {count} and dependencies", "-yD", "--", *wanted))
    if wanted:
        steps.append(step("install", f"installing {count}", "xbps-install", "-y", "--", *wanted, network=network))
    if hold:
        steps.append(step("install", "holding packages", "xbps-pkgdb", "-m", "hold", "--", *hold, timeout=60))
    steps.append(step("clean", "removing downloaded packages", "xbps-remove", "-yO", timeout=300))
    expected = [{"name": name} if version is None else {"name": name, "version": version} for name, version in packages]
    return {
        "plan": {
            "steps": steps,
            "facts": {"packages": ["sh", "-c", LIST]},
            "expect": {"sound": ["ii"], "packages": expected},
            "troubles": [
                {
                    "output": "Package '*' not found in repository pool.",
                    "means": "no repository of the image has the package `{1}`",
                    "hint": "Check its spelling, and which repositories the base image has.",
                    "package": "{1}",
                },
                {
                    "output": "ERROR: [reposync] failed to fetch file '*': *",
                    "means": "{1}: {2}",
                    "hint": "Is the address reachable? `[network]` of oven.toml sets the proxy.",
                },
            ],
        }
    }


def package_of(package):
    """The name, and the version or None."""
    kind = package.get("kind")
    if kind != "named":
        raise Refused(f"packages: packages of kind {kind} are not supported: list packages of the image's repositories")
    refuse_unknown(package, {"kind", "name", "version"}, "a package")
    name, version = check_name(package["name"], "packages"), package.get("version")
    if version is not None and not VERSION.match(version):
        raise Refused(f"packages: {name}: {version!r} is not a full version of xbps, such as 2.1.1_1")
    return name, version


def check_name(name, key):
    if not NAME.match(name):
        raise Refused(f"{key}: {name!r} is not a valid package name")
    return name


def refuse_unknown(table, known, what):
    unknown = sorted(set(table) - known)
    if unknown:
        raise Refused(f"{what} has `{unknown[0]}`, which this plugin does not support")


def main():
    verbs = {"claims": claims, "plan": plan}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        sys.exit("usage: void.py claims|plan")
    request = json.load(sys.stdin)
    try:
        if request.get("api") != API:
            raise Refused(f"the request has version {request.get('api')} of the contract; this plugin supports version {API}")
        answer = verbs[sys.argv[1]](request)
    except Refused as refused:
        answer = {"refused": str(refused)}
    json.dump({"api": API, **answer}, sys.stdout, sort_keys=True)


main()
