"""Rewrites the results table of README.md, and the picture above it, from result.json files.

    python scripts/results_table.py [RUN_FOLDER ...]

Each run folder's result.json is first copied to scripts/results/, in place of an earlier one of the same run name. The
table has a row for every file there, in the order of scripts/published.yaml. The published values are those that the
report over many runs shows too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import picture
from metarun.report.published import find

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
START, END = "<!-- made by scripts/results_table.py -->", "<!-- end of what scripts/results_table.py made -->"
COLUMNS = ("Method", "Test tasks", "Ours", "Published", "Test episodes", "Transductive", "Trained", "Command")
UNSHOWN = ("outputs=", "resume=")  # of a command: they change no number
STEPS = ("1", "5", "10")  # inner steps whose errors are shown, as in the MAML paper


def keep(run_folder: Path, into: Path = RESULTS) -> None:
    """Copies the run's result.json to <into>/<name>.json, or <name>,<overrides>.json where there were any."""
    source = run_folder / "result.json" if run_folder.is_dir() else run_folder
    result = json.loads(source.read_text())
    result["command"] = " ".join(word for word in result["command"].split() if not word.startswith(UNSHOWN))
    name, overrides = source.absolute().parts[-3:-1]
    into.mkdir(exist_ok=True)
    target = into / f"{name if overrides.startswith('default') else f'{name},{overrides}'}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")


def load() -> dict[str, dict[str, Any]]:
    """The kept results by file stem, in the order of the rows."""
    order = list(entries())
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    for stem in results:
        if run_name(stem) not in order:
            raise SystemExit(
                f"results_table: scripts/published.yaml has no entry {run_name(stem)}; add its method and data"
            )
    return {stem: results[stem] for stem in sorted(results, key=lambda stem: (order.index(run_name(stem)), stem))}


def entries() -> dict[str, Any]:
    """The entries of scripts/published.yaml."""
    found = OmegaConf.to_container(OmegaConf.load(HERE / "published.yaml"))
    assert isinstance(found, dict)
    return {str(name): entry for name, entry in found.items()}


def run_name(stem: str) -> str:
    return stem.partition(",")[0]


def row(result: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """One row of the table, in the order of COLUMNS."""
    protocol = result["protocol"]
    test = protocol["test"]
    regression = "test/mse" in result
    published = find(entry["published"], test["ways"], test["shots"]) if "published" in entry else None
    split = f" ({protocol['split']} split)" if protocol["split"] else ""
    tasks = f"{test['shots']} points" if regression else f"{test['ways']}-way {test['shots']}-shot"
    queries = f"{test['queries']} queries{'' if regression else ' a class'}"
    return [
        entry["method"],
        f"{entry['data']}{split}, {tasks}, {queries}; norm {protocol['norm']}",
        errors(result) if regression else f"**{result['test/acc']:.2%}** ± {result['test/acc_ci95']:.2%}",
        str(published or "none"),
        f"{result['test/episodes']:,}",
        "yes" if protocol["transductive"] else "no",
        f"{result['train/steps']:,} steps, {duration(result['train/seconds'])}, {device(result['hardware'])}",
        f"`{result['command']}`",
    ]


def errors(result: dict[str, Any]) -> str:
    """Mean squared errors with their intervals after 1, 5 and 10 inner steps, and how many tasks diverged."""
    after = result["test/after_inner_steps"]
    steps = [step for step in STEPS if step in after]
    values = " / ".join(f"**{after[step]['mse']:.3f}** ± {after[step]['mse_ci95']:.3f}" for step in steps)
    diverged = max(after[step]["diverged"] for step in steps)
    return f"MSE {values} after {' / '.join(steps)} steps" + (f"; {diverged} tasks diverged" if diverged else "")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def device(hardware: dict[str, Any]) -> str:
    """What it was computed on, in words."""
    processes = hardware.get("processes", 1)
    threads = f"{processes * hardware['threads']} CPU thread{'s' if processes * hardware['threads'] > 1 else ''}"
    precision = "" if hardware["precision"] == "float32" else f", {hardware['precision']}"
    return (hardware["gpu"] or threads) + precision


def table() -> str:
    """What stands between the markers of README.md."""
    known = entries()
    results = load()
    text = markdown(COLUMNS, (row(result, known[run_name(stem)]) for stem, result in results.items()))
    torch = sorted({result["versions"]["torch"] for result in results.values()})
    return (
        f"{text}\n\nMade with torch {', '.join(torch)}; the whole `result.json` of each row is in `scripts/results/`."
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def between(readme: str, start: str, end: str, text: str) -> str:
    """README's text with `text` between two markers; raises `SystemExit` where these are gone."""
    pattern = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(readme):
        raise SystemExit(f"README.md has lost its markers {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{text}\n{end}", readme)


def rewritten(readme: str) -> str:
    """README's text with the table of today."""
    return between(readme, START, END, table())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep(Path(argument))
    README.write_text(rewritten(README.read_text()))
    picture.draw()
