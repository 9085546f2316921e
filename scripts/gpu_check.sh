#!/usr/bin/env bash
# Checks metarun on a machine with one CUDA GPU, Python 3.11 or newer and torch, in less than eight minutes; leaves one JSON.
# Usage: scripts/gpu_check.sh [--dry-run] [--wheels FOLDER] [--json FILE] [--seconds 470] [--only PART...]
#        scripts/gpu_check.sh --download FOLDER    fetches the wheels that --wheels takes, on a machine with a network
# What is not there by then is installed from FOLDER into a folder of its own; the environment stays as it is. Omniglot is
# looked for in METARUN_DATA. learn2learn is compared with where it is installed (scripts/install_learn2learn.sh).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

needed() { # what metarun needs besides torch, and the tests; one a line
    python -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *extras.get("pretrained", []), "pytest>=8", "pytest-timeout>=2.3"]
print(*(one for one in wanted if not one.startswith(("torch>", "torch=", "timm", "torchvision", "metarun"))), sep="\n")'
}

wheels=
given=()
while (($#)); do
    case $1 in
    --wheels) wheels=$2 && shift 2 ;;
    --download)
        needed >"${TMPDIR:-/tmp}/metarun-wheels.$$"
        python -m pip download --quiet --only-binary=:all: --dest "$2" --requirement "${TMPDIR:-/tmp}/metarun-wheels.$$"
        rm "${TMPDIR:-/tmp}/metarun-wheels.$$"
        exit
        ;;
    *) given+=("$1") && shift ;;
    esac
done
there() { # whether all that is needed is installed
    needed | python -c '
import re, sys
from importlib.metadata import version
for line in sys.stdin:
    version(re.match(r"[\w.-]+", line)[0])' 2>/dev/null
}

if [[ $wheels ]] && ! there; then
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
    needed >"$place/needed"
    # torch and what came with it stay: their own wheels are not in the folder.
    python -m pip install --quiet --no-deps --no-index --target "$place/site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$place/site"
fi
python -m scripts.gpu_check "${given[@]}"
