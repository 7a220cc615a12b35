#!/bin/sh
# The exit status decides whether the image is registered. Files that a test writes are discarded, and its processes
# are ended.
set -eu
nginx
curl --silent --fail --retry 5 --retry-connrefused http://127.0.0.1:8080/ | grep -q 'Baked by oven'
