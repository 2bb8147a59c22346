#!/bin/sh
# Install the Debian packages that some tests drive. Where that is not possible the tests that need them are
# skipped, each saying what it misses.
set -eu

missing=""
command -v promtool >/dev/null || missing="$missing prometheus"
command -v kubectl >/dev/null || missing="$missing kubernetes-client"
command -v systemd-analyze >/dev/null || missing="$missing systemd"
command -v g++ >/dev/null || missing="$missing g++"
command -v faketime >/dev/null || missing="$missing faketime"
command -v fiu-run >/dev/null || missing="$missing fiu-utils"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "not installed (needs root and apt-get):$missing; the tests that need them will be skipped" >&2
fi
