"""Rewrites the tables and the picture of transfer in README.md from result.json files.

    python scripts/transfer_table.py [RUN_FOLDER ...]

Each run folder's result.json is first copied to scripts/results/transfer/, in place of an earlier one of the same run. Runs
with a learning curve go to the table of approaches and the picture, runs tested on a target as they are (recipe=domain_adaptation) to
the table of adaptation, where runs that differ in their seed alone make a row.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

import results_table
from metarun.report.target import learning_curve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "transfer"
PICTURE = ROOT / "scripts" / "results" / "transfer" / "learning_curve.png"
START, END = "<!-- made by scripts/transfer_table.py -->", "<!-- end of what scripts/transfer_table.py made -->"
ADAPT_START, ADAPT_END = START.replace("-->", "(adaptation) -->"), END.replace("-->", "(adaptation) -->")
APPROACHES = {  # in the order of the rows
    "scratch": "from scratch",
    "linear_probe": "pretraining, linear probe",
    "fine_tuning": "pretraining, fine-tuning",
    "maml": "MAML, fine-tuning",
    "protonet": "ProtoNet, fine-tuning",
    "mtl": "pretraining, MTL, linear probe",
}


def load() -> list[dict[str, Any]]:
    """The kept results."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def approaches(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results of the study by the names of their rows."""
    found = {result["choices"].get("approach"): result for result in results if "target/curve" in result}
    return {name: found[key] for key, name in APPROACHES.items() if key in found}


def percent(point: dict[str, Any], name: str) -> str:
    return f"{point[name]:.1%} ± {point[f'{name}_ci95']:.1%}"


def approach_table(results: list[dict[str, Any]]) -> str:
    """Accuracy for each number of training images, the best of each column in bold, and AUROC for the most."""
    rows = approaches(results)
    curves = [result["target/curve"] for result in rows.values()]
    sizes = [point["train_images"] for point in curves[0]]
    best = [max(curve[place]["acc"] for curve in curves) for place in range(len(sizes))]
    lines = []
    for name, result in rows.items():
        curve = result["target/curve"]
        cells = [
            f"**{percent(point, 'acc')}**" if point["acc"] == top else percent(point, "acc")
            for point, top in zip(curve, best, strict=True)
        ]
        lines.append([name, *cells, percent(curve[-1], "balanced_acc"), percent(curve[-1], "auroc")])
    last = f"{sizes[-1]} images: "
    columns = ["Approach", *(f"{size} images" for size in sizes), f"{last}balanced accuracy", f"{last}AUROC"]
    return results_table.markdown(columns, lines)


def adaptation_table(results: list[dict[str, Any]]) -> str:
    """Accuracy on the target's test images: the mean over seeds with a 95% interval by Student's t, and each seed's."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if "target/curve" not in result:
            groups[re.sub(r" seed=\d+", "", result["command"])].append(result)
    lines = []
    for command, runs in groups.items():
        values = np.array([run["target/acc"] for run in sorted(runs, key=lambda run: str(run["command"]))])
        n = len(values)
        width = stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        lines.append(
            (values.mean(), [method(runs[0]), f"**{values.mean():.1%}** ± {width:.1%}", str(n), f"`{command}`"])
        )
    lines.sort(key=lambda line: line[0])
    return results_table.markdown(("Method", "Accuracy on the target", "Seeds", "Command"), [line for _, line in lines])


def method(result: dict[str, Any]) -> str:
    """What a run of adaptation is called."""
    choices = result["choices"]
    if choices["data"] == choices["target"]:
        return "trained on the target's labels (upper line)"
    return "source alone (lower line)" if choices["algo"] == "baseline" else choices["algo"].upper()


def rewritten(readme: str) -> str:
    """README's text with the tables of today."""
    results = load()
    readme = results_table.between(readme, START, END, approach_table(results))
    return results_table.between(readme, ADAPT_START, ADAPT_END, adaptation_table(results))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        results_table.keep(Path(argument), RESULTS)
    rows = approaches(load())
    first = next(iter(rows.values()))
    PICTURE.write_bytes(
        learning_curve({name: result["target/curve"] for name, result in rows.items()}, chance=first["target/chance"])
    )
    readme = results_table.README
    readme.write_text(rewritten(readme.read_text()))
