#!/bin/sh
# oven's plugin for @NAME@. It reads a request from standard input and writes the answer to standard output. Both are JSON.
#
# The plugin only plans, and does nothing itself. oven runs it as user nobody and without a network.
# `oven plugin check @NAME@.sh` says what is missing. The guide is docs/plugins.md of oven. This plugin needs jq.
set -eu

case ${1-} in
    claims | plan) ;;
    *) echo "usage: @NAME@.sh claims|plan" >&2; exit 2 ;;
esac

exec jq --compact-output --arg verb "$1" '
def refused($why): {api: 1, refused: $why};
def only($known): (keys - $known)[0];

# The fields of a job that this plugin supports, and those that it may ignore. A job with another field is refused.
def supported: ["os_release", "architecture", "present", "texts", "packages", "network"];
def ignored: ["recommends", "conffiles", "mirror", "ca_file", "tools"];

# A text that is not a name, such as an option or a script, is refused.
def is_name: test("\\A[A-Za-z0-9][A-Za-z0-9.+_-]*\\z");

def claims:
    .os_release as $os
    | (if $os.ID == "@NAME@" then "exact"
       elif ($os.ID_LIKE // "") | split(" ") | index("@NAME@") then "family"
       else "no" end) as $claim
    | {api: 1, claim: $claim, look_for: ["/usr/bin/pkg"]};    # the job will say which of these paths the image has

def steps($names): [
    # These steps have the network, and do not run code of packages.
    {phase: "fetch", why: "refreshing the package index", argv: ["pkg", "update"],
     network: true, retries: 2, timeout: 900},
    {phase: "fetch", why: "downloading packages", argv: (["pkg", "fetch", "--"] + $names),
     network: true, retries: 2, timeout: 3600},
    # This step runs code of packages. It has the network only if the definition asks for it.
    {phase: "install", why: "installing packages", argv: (["pkg", "install", "--"] + $names),
     network: (.network // false), timeout: 3600},
    {phase: "clean", why: "removing downloaded packages", argv: ["pkg", "clean"], timeout: 300}
];

def plan:
    [.packages[]? | .name] as $names
    | if only(supported + ignored + ["upgrade"]) then refused("the job has `\(only(supported + ignored + ["upgrade"]))`")
      elif (.upgrade // "none") != "none" then refused("upgrade: this plugin does not upgrade yet")
      elif any(.packages[]?; only(["kind", "name"]) or .kind != "named" or (.name | is_name | not))
      then refused("packages: only names are supported yet")
      elif $names == [] then {api: 1, plan: {}}
      elif .present["/usr/bin/pkg"] | not then refused("packages cannot be installed: the image has no /usr/bin/pkg")
      else {api: 1, plan: {
          steps: steps($names),
          # This command prints name, version and architecture of each installed package, separated by tabs. oven
          # checks that the expected packages are among them.
          facts: {packages: ["pkg", "list"]},
          expect: {packages: [$names[] | {name: .}]},
          # Explains a line of output to the author of the definition.
          troubles: [{output: "*no such package: *", means: "there is no package `{2}`", package: "{2}"}]
      }} end;

if .api != 1 then refused("the request has version \(.api) of the contract; this plugin supports version 1")
elif $verb == "claims" and only(["api", "os_release"]) then refused("the request has `\(only(["api", "os_release"]))`")
elif $verb == "plan" and only(["api", "job"]) then refused("the request has `\(only(["api", "job"]))`")
elif $verb == "claims" then claims
else .job | plan end'
