#!/bin/sh
# The smallest plugin. It is for a system whose ID is `tiny` and whose package manager is /bin/pkg. It needs jq.
exec jq -c --arg verb "$1" '[.job.packages[]?.name] as $names
| if .api != 1 or (keys - ["api", if $verb == "plan" then "job" else "os_release" end]) != []
     or ((.job // {upgrade: "none"}) | del(.os_release, .architecture, .present, .packages, .tools, .recommends, .conffiles, .network, .mirror, .ca_file)) != {upgrade: "none"}
     or any(.job.packages[]?; del(.name) != {kind: "named"} or (.name | test("\\A[a-z0-9][a-z0-9.+-]*\\z") | not))
  then {api: 1, refused: "the smallest plugin only installs packages by name"}
  elif $verb == "claims" then {api: 1, claim: (if .os_release.ID == "tiny" then "exact" else "no" end)}
  else {api: 1, plan: {facts: {packages: ["/bin/pkg", "list"]}, expect: {packages: [$names[] | {name: .}]},
    steps: [{phase: "install", why: "installing packages", argv: (["/bin/pkg", "add"] + $names), timeout: 600} | select($names != [])]}}
  end'
