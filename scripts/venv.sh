# Sourced by demo.sh and test.sh: enters the repository and its virtual environment `.venv`, which is made on first use
# and made anew when what it was made from has changed. PYTHON=/path/to/python chooses the interpreter.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() {
    echo "metarun: $1" >&2
    exit 1
}

# The interpreter itself rather than a virtual environment's or a shim, since `.venv` may be on PATH already.
find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1); print(sys._base_executable)' 2>/dev/null && return
    done
    return 1
}

made_from="$root $(cat pyproject.toml metarun/__init__.py scripts/constraints.txt | cksum)"

if [ "$(cat .venv/made-from 2>/dev/null)" != "$made_from" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    [ -L .venv ] && [ -n "$(ls -A .venv/ 2>&1)" ] && fail ".venv is a link to $(readlink .venv), and making it anew would empty that; remove the link"
    python=$(find_python) || fail "needs Python 3.11 or newer, and found none${PYTHON:+ at $PYTHON}; install one, or set PYTHON=/path/to/python"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python cannot make virtual environments; install its venv package (apt install python3-venv)"
    echo "making .venv with $("$python" --version) (once; PyTorch is large)" >&2
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable '.[dev]'
    echo "$made_from" >.venv/made-from
fi
export PATH="$root/.venv/bin:$PATH"
