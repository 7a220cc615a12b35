#!/bin/sh
# Checks what images based on this one rely on.
set -eu
curl --version >/dev/null
test "$(echo '{"a": 1}' | jq .a)" = 1
