"""Rewrites the speed tables of README.md beside this file from benchmarks' JSON, tables for each file of scripts/results/speed/.

    python -m scripts.benchmark.readme [FILE ...]

Each FILE is first copied there, in place of one of its name.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from .measure import of_predicting, spread

ROOT = Path(__file__).parents[2]
README = Path(__file__).with_name("README.md")
RESULTS = ROOT / "scripts" / "results" / "speed"
START, END = "<!-- made by scripts/benchmark/readme.py -->", "<!-- end of what scripts/benchmark/readme.py made -->"


def table(result: dict[str, Any]) -> str:
    """All that was measured, medians with their ranges, and on what machine."""
    machine, versions, lines = result["machine"], result["versions"], result["lines"]
    rows: list[str] = []
    if any(line.get("unit") == "tasks/s" for line in lines.values()):
        rows = [
            "| work | metarun, tasks/s | peer, tasks/s | ratio | of the machine |",
            "| --- | --- | --- | --- | --- |",
        ]
    for line in lines.values():
        if line.get("unit") == "tasks/s":
            share = f"{line['machine']['fraction_ours']:.0%}" if "machine" in line else ""
            sides = f"{spread(line['ours'])} | {spread(line['peer'])}"
            rows.append(f"| {line['title']} | {sides} | {line['ratio']:.2f}× | {share} |")
    if "peak_memory" in lines:
        memory = lines["peak_memory"]
        kinds = {"metarun": memory["ours"]["plain"], "metarun, `algo.recompute=true`": memory["ours"]["recompute"]}
        kinds["learn2learn"] = memory["peer"]["plain"]
        rows += ["", f"| {memory['title']}, MB | {' | '.join(f'inner steps: {n}' for n in kinds['metarun'])} |"]
        memory_rounds = len(next(iter(kinds["metarun"].values()))["values"])
        rows += [f"| --- |{' --- |' * len(kinds['metarun'])}"]
        for kind, by_steps in kinds.items():
            rows.append(f"| {kind} | {' | '.join(spread(found, 1e6) for found in by_steps.values())} |")
    if "ratio" in lines.get("encoding", {}):
        line = lines["encoding"]
        rows += ["", "| work | metarun, images/s | the bare network, images/s | ratio |", "| --- | --- | --- | --- |"]
        rows.append(f"| {line['title']} | {spread(line['ours'])} | {spread(line['peer'])} | {line['ratio']:.2f}× |")
    if "ratio" in lines.get("encoding_memory", {}):
        line = lines["encoding_memory"]
        rows += ["", f"{line['title'][0].upper()}{line['title'][1:]}: {line['ratio']:.2f} times."]
    if "startup" in lines:
        rows += ["", "| from the start of the process | seconds |", "| --- | --- |"]
        for name, values in (lines["startup"]["ours"] | lines["startup"]["peer"]).items():
            rows.append(f"| {name} | {spread(values)} |")
    if "share" in lines.get("predict", {}):
        line = lines["predict"]
        memory = f"MB, {line['images']:,} images by {line['growth_with']}"
        rows += [
            "",
            f"| images/s of one thread, {line['title']} | metarun, from files | its bare network | share | {memory} |",
        ]
        rows += ["| --- | --- | --- | --- | --- |"]
        rows.append(f"| predict | {' | '.join(of_predicting(line))} |")
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""  # files made before it could be one have no such key
    rounds = memory_rounds if set(lines) == {"peak_memory"} else result["rounds"]  # it is measured in fewer
    where = (
        f"{gpu}{machine['cores']} cores ({machine['processor']}), torch {versions['torch']}; medians and ranges of "
        f"{rounds} rounds."
    )
    return "\n".join([*rows, "", where]).lstrip()


def rewritten(readme: str) -> str:
    """`readme` with the tables of today between its marks."""
    tables = "\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json")))
    before, rest = readme.split(START)
    return f"{before}{START}\n{tables}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Copies the files that are named, and writes the tables."""
    RESULTS.mkdir(exist_ok=True)
    for file in sys.argv[1:]:
        shutil.copy(file, RESULTS)
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
