#!/bin/sh
# Runs in the image, after its packages and files are there; without the network.
set -eu
rm /etc/nginx/sites-enabled/default
systemctl enable nginx
