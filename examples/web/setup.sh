#!/bin/sh
# Runs in the image without network, after packages and files are installed.
set -eu
rm /etc/nginx/sites-enabled/default
systemctl enable nginx
