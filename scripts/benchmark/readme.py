"""Rewrites the speed table of README.md from a benchmark's JSON, which is first copied to scripts/results/.

python -m scripts.benchmark.readme [FILE]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULT = ROOT / "scripts" / "results" / "speed" / "benchmark.json"
START, END = "<!-- made by scripts/benchmark/readme.py -->", "<!-- end of what scripts/benchmark/readme.py made -->"


def table(result: dict[str, Any]) -> str:
    """The lines that are measured in tasks a second, medians with their ranges, and what was measured where."""
    machine, versions = result["machine"], result["versions"]
    rows = ["| work | metarun, tasks/s | learn2learn, tasks/s | ratio |", "| --- | --- | --- | --- |"]
    for line in result["lines"].values():
        if line.get("unit") == "tasks/s":
            sides = ["{median:.4g} ({min:.4g}–{max:.4g})".format(**line[side]) for side in ("ours", "peer")]
            rows.append(f"| {line['title']} | {sides[0]} | {sides[1]} | {line['ratio']:.2f}× |")
    where = (
        f"{machine['cores']} cores ({machine['processor']}), torch {versions['torch']}; medians and ranges of "
        f"{result['rounds']} rounds."
    )
    return "\n".join([*rows, "", where])


def rewritten(readme: str, result: dict[str, Any]) -> str:
    """`readme` with the table of `result` between its marks."""
    before, rest = readme.split(START)
    return f"{before}{START}\n{table(result)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    if len(sys.argv) > 1:
        RESULT.parent.mkdir(exist_ok=True)
        shutil.copy(sys.argv[1], RESULT)
    README.write_text(rewritten(README.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
