"""A short run of a row, at the commit that made it and in this tree: whether what changed in the code since moves its numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metarun.runs import contents
from metarun.runs.result import CHOICES, TARGET_CURVE, TRAIN_STEPS, UNTRAINED, key

from .. import same_numbers
from . import store
from .changed import ROOT
from .rows import DATA, Run

FILE = "short_runs.json"
STEPS = 4
EQUAL, CLOSE = "the same to the last bit", "the same but for rounding"
# Of CLOSE: the relative rounding of losses after a few steps, by precision, and a few answers of some hundred.
ROUNDING, ANSWERS = {"float32": 1e-3, "bfloat16": 1e-2}, 1e-2
DOOR = "from metarun.cli import main; main()"  # every version has it
UNCOMPARED = ("protocol", "data", "choices", "stages", "hardware", "versions")
# No table shows a calibration; intervals of so few tasks depend on the formula for few, which the tables' thousands do not; and a
# best step follows from scores that are compared.
LEFT_OUT = ("calibration", "ci95", "selected_step")


class Verdict(NamedTuple):
    """What the short runs of two versions came to.

    Attributes:
        text: EQUAL, CLOSE, or the first number that is another one, or why there is nothing to compare.
        numbers: How many numbers were compared.
    """

    text: str
    numbers: int


def shortened(result: Mapping[str, Any]) -> list[str]:
    """The overrides that make a run with this result short: a few steps of each training, and few tasks, orders or draws of each test."""
    words = []
    for steps, settings in ((key("pretrain", "steps"), "pretrain.train"), (TRAIN_STEPS, "train")):
        if result.get(steps):
            each = {"steps": STEPS, "validate_every": STEPS // 2, "validate_episodes": 4, "log_every": 1}
            words += [f"{settings}.{name}={value}" for name, value in each.items()]
    if result[CHOICES].get("recipe") == "continual":
        words += ["continual.orders=2"]
    elif any(name.startswith("test/") and name.endswith("episodes") for name in result):
        words += ["test.episodes=8"]
    if any(name.startswith(UNTRAINED) for name in result):
        words += ["test.baseline_episodes=4"]
    if TARGET_CURVE in result:
        sizes = [point["train_images"] for point in result[TARGET_CURVE]]
        words += ["target.repeats=2", f"target.train_images=[{min(sizes)}]"]
    return words


def carry_out(code: Path, words: Sequence[str], outputs: Path, cache: Path) -> dict[str, float] | str:
    """Carries a run out with the code of a tree.

    Args:
        code: The tree.
        words: What stands after `metarun`.
        outputs: A new folder for the run.
        cache: The folder of tables.

    Returns:
        The numbers of its result and of its log, or the last line of what it said where it failed.
    """
    own = {"PYTHONPATH": str(code), "METARUN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    given = [os.path.expandvars(word) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", DOOR, *given, f"outputs={outputs}", "name=short"],
        cwd=code,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    results = sorted(outputs.glob("short/*/" + contents.RESULT))
    if done.returncode or len(results) != 1:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        return said[-1] if said else f"it ended with exit status {done.returncode}"
    return dict(numbers(results[0].parent))


def numbers(folder: Path) -> Iterator[tuple[str, float]]:
    """The numbers of a run's result that neither an hour nor a machine decides, and the losses of its log."""
    result = json.loads((folder / contents.RESULT).read_text(encoding="utf-8"))
    for name, value in same_numbers.numbers(result):
        if not name.startswith(UNCOMPARED) and not any(part in name for part in LEFT_OUT):
            yield name, value
    log = folder / contents.METRICS
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        entry = json.loads(line)
        for name in entry:
            if name.endswith("loss"):
                yield f"{name} of step {entry.get('step')}", entry[name]


def compared(before: dict[str, float] | str, now: dict[str, float] | str, rounding: float) -> Verdict:
    """Judges the numbers of two versions, of those that both have.

    Args:
        before: The numbers of the first, or why there are none.
        now: Those of the second.
        rounding: By how much, relative to it, a loss may move by rounding.
    """
    for which, numbers in (("then", before), ("now", now)):
        if isinstance(numbers, str):
            return Verdict(f"not compared: {which} {numbers}", 0)
    assert isinstance(before, dict)
    assert isinstance(now, dict)
    shared = [name for name in before if name in now]
    if not shared:
        return Verdict("not compared: no number has one name in both", 0)
    if all(repr(before[name]) == repr(now[name]) for name in shared):
        return Verdict(EQUAL, len(shared))
    for name in shared:
        then, today = before[name], now[name]
        answers = 0.0 if "loss" in name else ANSWERS
        if repr(then) != repr(today) and not math.isclose(then, today, rel_tol=rounding, abs_tol=answers):
            return Verdict(f"{name} was {then:.6g} and is {today:.6g}", len(shared))
    return Verdict(CLOSE, len(shared))


class ShortRuns:
    """The verdicts that are kept, in `data/short_runs.json`: table/row -> commit that made it -> verdict.

    Args:
        path: The file.
    """

    def __init__(self, path: Path = DATA / FILE) -> None:
        self.path = path
        self.kept: dict[str, dict[str, dict[str, Any]]] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )

    def mark(self, run: Run, commits: Iterable[str]) -> str:
        """What the tables say of a run whose code changed since these commits; nothing where one of them was not compared."""
        found = [self.kept.get(run.row.id, {}).get(commit) for commit in commits]
        verdicts = [entry for entry in found if entry]
        if not verdicts or len(verdicts) < len(found):
            return ""
        other = next((entry for entry in verdicts if entry["verdict"] not in (EQUAL, CLOSE)), None)
        if other:
            return f", short run differs at `{other['at'][:7]}`"
        rounding = "" if all(entry["verdict"] == EQUAL for entry in verdicts) else " but for rounding"
        return f", short run the same{rounding} at `{verdicts[0]['at'][:7]}`"

    def compare(self, run: Run, commit: str, at: str, folder: Path, root: Path = ROOT) -> Verdict:
        """Carries out a run's short run at a commit and in a tree, and keeps the verdict if there is one.

        Args:
            run: A run with a stored result.
            commit: The commit that made it.
            at: The commit of the tree.
            folder: Where old trees, tables and run folders are kept; equal for all runs.
            root: The tree.

        Returns:
            The verdict.
        """
        result = store.load(run.stored(self.path.parent))
        assert result is not None
        code = folder / "trees" / commit
        if not code.is_dir():
            begun = code.with_name(f"{commit}.unfinished")  # a kill leaves no half of a tree under its name
            shutil.rmtree(begun, ignore_errors=True)
            try:
                same_numbers.extract(commit, begun, root)
            except ValueError as error:
                return Verdict(f"not compared: {error}", 0)
            begun.rename(code)
        shorter, outputs = shortened(result), folder / "runs"
        shutil.rmtree(outputs, ignore_errors=True)
        before = carry_out(code, [*store.words_of(result), *shorter], outputs / "then", folder / "tables_then")
        now = carry_out(root, [*run.words, *shorter], outputs / "now", folder / "tables")
        shutil.rmtree(outputs, ignore_errors=True)
        verdict = compared(before, now, ROUNDING[result["hardware"]["precision"]])
        if verdict.numbers:
            entry = {"at": at, "verdict": verdict.text, "numbers": verdict.numbers}
            self.kept.setdefault(run.row.id, {})[commit] = entry
            self.path.write_text(json.dumps(self.kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return verdict
