#!/usr/bin/env bash
# Installs learn2learn 0.2.0, which algo=learn2learn/... and data=learn2learn use, into the environment of the `python` on
# PATH, beside the torch that is there. Needs a C compiler and Python's headers. Does nothing where it is there and imports.
# Usage: scripts/install_learn2learn.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pip=(python -m pip install --quiet --disable-pip-version-check)

fail() {
    echo "metarun: $1" >&2
    exit 1
}

there() {
    PYTHONPATH="$root" python -c '
from importlib.metadata import version
from metarun import optional
optional.learn2learn()
print("learn2learn", version("learn2learn"), "with torchvision", version("torchvision"))'
}

if found=$(there 2>/dev/null) && [[ $found == "learn2learn 0.2.0 "* ]]; then
    echo "$found is installed already"
    exit
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# What metarun needs and what the extra says that learn2learn imports; the torch that is there stays, and chooses its torchvision.
python -c '
import sys, tomllib
from importlib.metadata import version
print("torch==" + version("torch"), file=open(sys.argv[2], "w"))
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["learn2learn"], sep="\n")' "$root/pyproject.toml" "$scratch/torch" >"$scratch/needed" 2>/dev/null ||
    fail "$(command -v python) is not Python 3.11 or newer with torch; install metarun first (pip install -e .)"
"${pip[@]}" --constraint "$scratch/torch" --requirement "$scratch/needed"

# Its C files are older than Python 3.11 and have to be made anew, which its setup.py does for build_ext alone; for the
# same reason Cython cannot come by build isolation. The tools stay out of the environment.
"${pip[@]}" --target "$scratch/tools" cython==3.3.1 setuptools==84.2.1
PYTHONPATH="$scratch/tools" "${pip[@]}" --no-deps --no-build-isolation --use-pep517 \
    --config-settings=--global-option=build_ext learn2learn==0.2.0
there
