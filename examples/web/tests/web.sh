#!/bin/sh
# The exit status decides whether there is an image. What a test writes or starts is thrown away.
set -eu
nginx
curl --silent --fail --retry 5 --retry-connrefused http://127.0.0.1:8080/ | grep -q 'Baked by oven'
