#!/usr/bin/env bash
# A first result on a fresh machine: ProtoNet, meta-trained and meta-tested on the built-in glyphs.
# Usage: scripts/demo.sh [override...], with the overrides that `metarun` takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

metarun "$@"

printf '\nTo see the curves:  %q --logdir %q   then open http://localhost:6006\n' "$root/.venv/bin/tensorboard" "$root/outputs"
printf 'To go on:           source %q && metarun algo=maml train.max_seconds=120    (another method, in 3 minutes)\n' "$root/.venv/bin/activate"
