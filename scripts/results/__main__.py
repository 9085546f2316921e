"""Runs the commands of the tables, stores what they gave, and writes the tables into the Markdown files.

    python -m scripts.results                      # all that is missing or of older code, one after the other
    python -m scripts.results --only methods       # a table, a row (methods/maml), or a pattern (*/maml*)
    python -m scripts.results --list               # every row: its command, and the state of its stored result
    python -m scripts.results --dry-run            # which runs would be made
    python -m scripts.results --write              # the tables alone, from what is stored
    python -m scripts.results --compare            # short runs of rows of older code, at their commit and in this tree

A killed run goes on where it was when the same line is given again. Run folders lie in OUTPUTS/CODE, where CODE names the
code that made them, so that a run never goes on from what other code began.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from metarun.runs.result import CHOICES

from . import picture, short_runs, store
from .changed import ROOT, Checkout
from .rows import DATA, HERE, Run, load, selected
from .short_runs import ShortRuns
from .tables import commits_of, marks, rewritten

TEXTS = (HERE / "README.md", ROOT / "README.md")


def state(run: Run, checkout: Checkout) -> str:
    """Empty if the stored result of a run is of today's code and settings, else why it is not."""
    result = store.load(run.stored())
    if result is None:
        return "missing"
    if any(commit.endswith("+") for commit in commits_of(result)):
        return "made with uncommitted changes"
    if not store.is_of(result, run.words):
        return "made by another command"
    for commit in commits_of(result):
        if changed := checkout.since(commit, result[CHOICES]):
            return f"made at {commit[:7]}; changed since: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
    return ""


def make(run: Run, outputs: Path, data: Path = DATA) -> dict[str, Any]:
    """Runs a row's command, or goes on with it, and stores the result.

    Args:
        run: What to run.
        outputs: The folder for run folders of today's code.
        data: The folder of stored results.

    Returns:
        The stored result.

    Raises:
        SystemExit: The run failed, or left no result.
    """
    words = [*run.arguments, f"name={run.name}", f"outputs={outputs}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "metarun", *words], cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"results: {run.id} ended with exit status {done.returncode}; the same line goes on there")
    results = sorted((outputs / run.name).glob("*/result.json"))
    if len(results) != 1:
        raise SystemExit(
            f"results: {outputs / run.name} has {len(results)} results, not one; remove what is not wanted"
        )
    return store.keep(results[0].parent, run.stored(data), run.places)


def compare(runs: list[Run], checkout: Checkout, folder: Path, data: Path = DATA) -> None:
    """Compares short runs of older code with this tree's, one for each row and commit, but for those of which it is known.

    Args:
        runs: Runs; those without a result of their command are passed over.
        checkout: The checkout of this tree.
        folder: Where old trees, tables and run folders are kept.
        data: The folder of stored results.
    """
    short, head = ShortRuns(data / short_runs.FILE), checkout.git("rev-parse", "HEAD").strip()
    seen: set[tuple[str, str]] = set()
    for run in runs:
        result = store.load(run.stored(data))
        if result is None or not store.is_of(result, run.words):
            continue
        commits = set(commits_of(result))
        if any(commit.endswith("+") for commit in commits):  # the code that made it is in no commit
            continue
        for commit in commits:
            known = short.kept.get(run.row.id, {}).get(commit)
            if (run.row.id, commit) in seen or (known and not checkout.since(known["at"], result[CHOICES])):
                continue
            seen.add((run.row.id, commit))
            verdict = short.compare(run, commit, head, folder, checkout.root)
            print(f"results: {run.id} of {commit[:7]}: {verdict.text} ({verdict.numbers} numbers)", flush=True)


def write(checkout: Checkout) -> None:
    """Writes the tables of today, and the pictures that are made of them."""
    tables = load()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        path.write_text(rewritten(text, tables, marks(checkout)), encoding="utf-8")
    picture.draw()
    for table in tables.values():
        if table.kind == "approaches":
            picture.draw_curves(table)


def main(words: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m scripts.results", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="tables, rows or runs")
    parser.add_argument("--list", action="store_true", help="show every row, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="show which runs would be made, and run nothing")
    parser.add_argument("--write", action="store_true", help="write the tables alone")
    parser.add_argument(
        "--compare", action="store_true", help="see whether older code gives the same numbers in short runs"
    )
    parser.add_argument("--again", action="store_true", help="store the runs anew whose result is of today's code too")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "results", help="folder of run folders")
    asked = parser.parse_args(words)
    checkout = Checkout()
    if asked.write:
        write(checkout)
        return 0
    known = load()
    if idle := [pattern for pattern in asked.only if not selected(known, [pattern])]:
        print(f"results: no row matches {' '.join(idle)}; --list shows all", file=sys.stderr)
        return 2
    runs = selected(known, asked.only)
    states = {run: state(run, checkout) for run in runs}
    wanted = [run for run in runs if states[run] or asked.again]
    if asked.list or asked.dry_run:
        for run in runs if asked.list else wanted:
            print(f"{run.id}  {run.command}  [{states[run] or 'up to date'}]")
        return 0
    if dirty := checkout.dirty():
        shown = ", ".join(dirty[:3])
        print(f"results: uncommitted changes ({shown}); commit them first, so that a row has a commit", file=sys.stderr)
        return 2
    if asked.compare:
        compare([run for run in runs if states[run]], checkout, asked.outputs.absolute() / "short")
        write(checkout)
        return 0
    outputs = asked.outputs.absolute() / checkout.code()
    for number, run in enumerate(wanted, 1):
        print(f"results: {number} of {len(wanted)}: {run.command}  ({states[run] or 'again'})", flush=True)
        make(run, outputs)
    write(checkout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
