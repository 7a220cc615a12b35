#!/bin/sh
# oven's plugin for @NAME@. It reads a request from standard input and writes the answer to standard output, in JSON,
# with jq.
#
# It only decides: it runs as nobody, without a network, and knows nothing but the request.
# `oven plugin check @NAME@.sh` says what is missing; oven's plugins/README.md is the guide.
set -eu

case ${1-} in
    claims | plan) ;;
    *) echo "usage: @NAME@.sh claims|plan" >&2; exit 2 ;;
esac

exec jq --compact-output --arg verb "$1" '
def refused($why): {api: 1, refused: $why};
def only($known): (keys - $known)[0];

# The parts of a job that this plugin uses, and those that it may ignore. Any other part is refused.
def heeded: ["os_release", "architecture", "present", "texts", "packages", "network"];
def neutral: ["recommends", "conffiles", "mirror", "ca_file", "tools"];

# Anything else is refused as a name, such as an option.
def is_name: test("\\A[A-Za-z0-9][A-Za-z0-9.+_-]*\\z");

def claims:
    .os_release as $os
    | (if $os.ID == "@NAME@" then "exact"
       elif ($os.ID_LIKE // "") | split(" ") | index("@NAME@") then "family"
       else "no" end) as $claim
    | {api: 1, claim: $claim, look_for: ["/usr/bin/pkg"]};    # the job will say which of these the image has

def steps($names): [
    # These have the network, and run no package'"'"'s code.
    {phase: "fetch", why: "refreshing the package index", argv: ["pkg", "update"],
     network: true, retries: 2, timeout: 900},
    {phase: "fetch", why: "downloading packages", argv: (["pkg", "fetch", "--"] + $names),
     network: true, retries: 2, timeout: 3600},
    # This runs packages'"'"' code, without the network unless the definition allows it.
    {phase: "install", why: "installing packages", argv: (["pkg", "install", "--"] + $names),
     network: (.network // false), timeout: 3600},
    {phase: "clean", why: "removing what was downloaded", argv: ["pkg", "clean"], timeout: 300}
];

def plan:
    [.packages[]? | .name] as $names
    | if only(heeded + neutral + ["upgrade"]) then refused("the job has `\(only(heeded + neutral + ["upgrade"]))`")
      elif (.upgrade // "none") != "none" then refused("upgrade: this plugin does not upgrade yet")
      elif any(.packages[]?; only(["kind", "name"]) or .kind != "named" or (.name | is_name | not))
      then refused("packages: only names are supported yet")
      elif $names == [] then {api: 1, plan: {}}
      elif .present["/usr/bin/pkg"] | not then refused("packages cannot be installed: the image has no /usr/bin/pkg")
      else {api: 1, plan: {
          steps: steps($names),
          # Lines of name, version and architecture, separated by tabs: oven checks that all are installed.
          facts: {packages: ["pkg", "list"]},
          expect: {packages: [$names[] | {name: .}]},
          # What a line of output means for the author of the definition.
          troubles: [{output: "*no such package: *", means: "there is no package `{2}`", package: "{2}"}]
      }} end;

if .api != 1 then refused("the request is of version \(.api) of the contract, but this plugin has 1")
elif $verb == "claims" and only(["api", "os_release"]) then refused("the request has `\(only(["api", "os_release"]))`")
elif $verb == "plan" and only(["api", "job"]) then refused("the request has `\(only(["api", "job"]))`")
elif $verb == "claims" then claims
else .job | plan end'
