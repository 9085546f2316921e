#!/usr/bin/env bash
# A first result on a fresh machine: ProtoNet, meta-trained and meta-tested on the built-in glyphs.
# Usage: scripts/demo.sh [override...], with the overrides that `metarun` takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

metarun "$@"

cat <<END

To see the curves:  $root/.venv/bin/tensorboard --logdir $root/outputs   then open http://localhost:6006
To go on:           source $root/.venv/bin/activate && metarun algo=maml data=omniglot
END
