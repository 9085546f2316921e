#!/usr/bin/env bash
# Lint, format, types and the whole test suite, warnings as errors, on a fresh machine.
# Usage: scripts/test.sh [pytest argument...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
scripts/install_learn2learn.sh

ruff check .
ruff format --check .
mypy
# One thread a process: two processes of one thread beat one process of two. One more than there are cores, since some tests wait.
export OMP_NUM_THREADS=1
workers=$(python -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))')
exec pytest -W error -n "$workers" "$@"
