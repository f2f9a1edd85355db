#!/bin/sh
# Runs tests where programs often fail: a read-only tree in a path with a space and letters of three scripts, as
# a user id that nobody has, without HOME, under LC_ALL=C.
#
#   sudo sh tests/odd_places.sh [any option of pytest]       # as root; the fast tests, unless others are named
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "error: run it as root, which alone can become another user" >&2; exit 2; }
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
tree="$home/α б 写真"
mkdir "$tree" "$home/work"
(cd "$root" && git ls-files -z | tar --null -T - -cf -) | tar -xf - -C "$tree"
chmod -R a+rX,a-w "$tree"
chown 61234:61234 "$home/work"
chmod 755 "$home"
python=$(readlink -f "$root/.venv" 2>/dev/null || echo "$root/.venv")/bin/python
cd "$tree"
# may read everything: the Python installation may lie in root's own folder
setpriv --reuid 61234 --regid 61234 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search env -i PATH="$PATH" LC_ALL=C TMPDIR="$home/work" \
  HDB_CACHE="$home/work/cache" HYPOTHESIS_STORAGE_DIRECTORY="$home/work/hypothesis" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$tree/src" \
  "$python" -m pytest -q -p no:cacheprovider --basetemp "$home/work/tests" "$@"
