"""Rewrites the table of methods in README.md from the result.json files of `experiment=omniglot_short/...` runs.

    python scripts/methods_table.py [RUN_FOLDER ...]

Each run folder's result.json is first copied to scripts/results/methods/, in place of an earlier one of the same run. What a
method is called, and its paper, stand at the head of its file.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import results_table
from metarun.renamed import current_choices
from metarun.report.published import find

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "methods"
START, END = "<!-- made by scripts/methods_table.py -->", "<!-- end of what scripts/methods_table.py made -->"
COLUMNS = ("Method", "Ours", "Published", "Untrained", "Transductive", "Trained", "Command")


def paper(group: str, choice: str) -> str:
    """A choice's name, as its file begins, with the link to its paper and the authors in the docstring of its module."""
    file = ROOT / "conf" / group / f"{choice}.yaml"
    config, called = OmegaConf.load(file), re.search(r"^# ([^@(,:;]+?)(?: \(|,|:|;)", file.read_text(), re.MULTILINE)
    module = (OmegaConf.select(config, group) or config)._target_.rpartition(".")[0]
    about = ast.get_docstring(ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())) or ""
    head, link = about.partition("\n\n")[0].replace("\n", " "), re.search(r"https://\S+", about)
    authors = re.fullmatch(r"[^(]+\(([^()]+)\)\.", head)
    if not called or not authors or not link:
        raise SystemExit(
            f"methods_table: {file} does not begin with a name, or {module} not with 'Name: title of the paper (authors "
            "year).' and a link"
        )
    return f"[{called[1]}]({link[0]}) ({authors[1]})"


def label(result: dict[str, Any]) -> str:
    choices = current_choices(result["choices"])
    wrapper = f", trained with {paper('wrapper', choices['wrapper'])}" if choices.get("wrapper") else ""
    noise = result["protocol"].get("train_noise")
    noisy = f", {noise['tasks']:.0%} of the training tasks with {noise['labels']:.0%} wrong labels" if noise else ""
    return paper("algo", choices["algo"]) + wrapper + noisy


def row(result: dict[str, Any]) -> list[str]:
    """One row, in the order of COLUMNS."""
    choices, protocol = current_choices(result["choices"]), result["protocol"]
    test = protocol["test"]
    # The published values are of plain methods.
    published = None if choices.get("wrapper") else find(choices, test["ways"], test["shots"])
    seconds, hardware = result["train/seconds"], result["hardware"]
    untrained = f"{result['untrained/acc']:.1%}" if "untrained/acc" in result else ""
    return [
        label(result),
        f"**{result['test/acc']:.2%}** ± {result['test/acc_ci95']:.2%}",
        str(published or "none"),
        untrained,
        "yes" if protocol["transductive"] else "no",
        f"{result['train/steps']:,} steps, {seconds:.0f} s, {results_table.device(hardware)}",
        f"`{result['command']}`",
    ]


def table() -> str:
    """What stands between the markers of README.md: a table for each kind of task, the best first."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    results.sort(key=lambda result: -result["test/acc"])
    kinds = sorted({kind(result) for result in results})
    return "\n\n".join(
        f"#### {ways}-way {shots}-shot\n\n"
        + results_table.markdown(COLUMNS, (row(result) for result in results if kind(result) == (ways, shots)))
        for ways, shots in kinds
    )


def kind(result: dict[str, Any]) -> tuple[int, int]:
    """Ways and shots of the test tasks."""
    test = result["protocol"]["test"]
    return test["ways"], test["shots"]


def rewritten(readme: str) -> str:
    """README's text with the table of today."""
    return results_table.between(readme, START, END, table())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        results_table.keep(Path(argument), RESULTS)
    readme = results_table.README
    readme.write_text(rewritten(readme.read_text()))
