"""Markdown of the tables, from the stored results."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from metarun.ops.measures import ACCURACY, AUROC, BALANCED_ACCURACY, ERROR, MACRO_F1
from metarun.report.published import find
from metarun.report.statistics import over_seeds, paired
from metarun.report.target import overlap
from metarun.report.text import half, task_text
from metarun.runs.result import (
    CHOICES,
    GIT_COMMIT,
    PROTOCOL,
    SETS,
    STAGES,
    TARGET_ACCURACY,
    TARGET_CHANCE,
    TARGET_CLASSES,
    TARGET_CONFUSION,
    TARGET_CURVE,
    TARGET_INTERVAL,
    TARGET_VALUES,
    TEST,
    TEST_ACCURACY,
    TEST_AFTER_INNER_STEPS,
    TEST_EPISODES,
    TEST_ERROR,
    TRAIN_SECONDS,
    TRAIN_STEPS,
    TRANSDUCTIVE,
    UNTRAINED,
    half_of,
    key,
    of_set,
)

from . import store
from .changed import ROOT, Checkout
from .rows import DATA, Row, Run, Table
from .short_runs import ShortRuns

STEPS = ("1", "5", "10")  # inner steps whose errors are shown, as in the MAML paper
CHANGED = "; code changed since"
UNCOMMITTED = " with uncommitted changes"
OTHER_COMMAND = "; settings changed since"
NOTHING_YET = "No run of this table has been stored yet."
ITEMS = "images"  # what the items of a target are called where a table says nothing else


class Made(NamedTuple):
    """A run with its stored result."""

    run: Run
    result: dict[str, Any]


Marks = Callable[[Made], str]


def stored(row: Row, data: Path = DATA) -> list[Made]:
    """The stored results of a row's runs."""
    pairs = [(run, store.load(run.stored(data))) for run in row.runs]
    return [Made(run, result) for run, result in pairs if result is not None]


def marks(checkout: Checkout | None, short: ShortRuns | None = None) -> Marks:
    """Says of a stored result at which commit it was made, and what no longer holds of it.

    Args:
        checkout: The checkout whose code is compared with that of the result; None for no comparison.
        short: What short runs of changed code came to; None for those that are kept.
    """
    short = short or ShortRuns()

    def mark(made: Made) -> str:
        commits = commits_of(made.result)
        text = f"`{commits[0].rstrip('+')[:7]}`"
        uncommitted = any(commit.endswith("+") for commit in commits)
        if uncommitted:
            text += UNCOMMITTED
        if checkout and any(checkout.since(commit.rstrip("+"), made.result[CHOICES]) for commit in commits):
            text += CHANGED + ("" if uncommitted else short.mark(made.run, set(commits)))
        return text + settings_mark(made)

    return mark


def settings_mark(made: Made) -> str:
    """Nothing, or that the row's command is another one by now."""
    return "" if store.is_of(made.result, made.run.words) else OTHER_COMMAND


def commits_of(result: dict[str, Any]) -> list[str]:
    """The commits that a result was made at: of the run, and of the stages that it took over."""
    stages = [stage.get(GIT_COMMIT) for stage in result.get(STAGES, {}).values()]
    return [str(commit) for commit in (result[GIT_COMMIT] or "unknown", *stages) if commit]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def mark_of_all(runs: list[Made], mark: Marks) -> str:
    """The marks of several runs, each once."""
    return ", ".join(dict.fromkeys(mark(made) for made in runs))


# Tables of test tasks: a run a row.


def tasks(table: Table, mark: Marks, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """A row for each run: accuracy or error on test tasks, with its interval and what was published."""
    columns = (
        "Method",
        "Test tasks",
        "Ours",
        "Published",
        "Test episodes",
        "Transductive",
        "Trained",
        "Command",
        "Made at",
    )
    runs = [made for row in table.rows if not only or row.name in only for made in stored(row, data)]
    return markdown(columns, ([*task_cells(made), mark(made)] for made in runs))


def task_cells(made: Made) -> list[str]:
    """The cells of one run but the last."""
    result, protocol = made.result, made.result[PROTOCOL]
    test, regression = protocol["test"], TEST_ERROR in made.result
    published = find(result[CHOICES], test)
    split = f" ({protocol['split']} split)" if protocol["split"] else ""
    tasks = f"{test['shots']} points, {test['queries']} queries" if regression else task_text(test)
    return [
        made.run.row.label or name_of("algo", result[CHOICES]["algo"]),
        f"{result[CHOICES]['data']}{split}, {tasks}; norm {protocol['norm']}",
        errors(result)
        if regression
        else f"**{result[TEST_ACCURACY]:.2%}** {half(result[half_of(TEST_ACCURACY)], '.2%')}",
        "none collected" if published is None else str(published),
        f"{result[TEST_EPISODES]:,}",
        "yes" if protocol[TRANSDUCTIVE] else "no",
        trained(result),
        f"`{made.run.command}`",
    ]


def errors(result: dict[str, Any]) -> str:
    """Mean squared errors with their intervals after 1, 5 and 10 inner steps, and how many tasks diverged."""
    after = result[TEST_AFTER_INNER_STEPS]
    steps = [step for step in STEPS if step in after]
    values = " / ".join(f"**{after[step][ERROR]:.3f}** {half(after[step][half_of(ERROR)], '.3f')}" for step in steps)
    diverged = max(after[step]["diverged"] for step in steps)
    return f"MSE {values} after {' / '.join(steps)} steps" + (f"; {diverged} tasks diverged" if diverged else "")


def trained(result: dict[str, Any]) -> str:
    """Steps, time and hardware of the training."""
    if not result.get(TRAIN_STEPS):
        return "nothing"
    return f"{result[TRAIN_STEPS]:,} steps, {duration(result[TRAIN_SECONDS])}, {device(result['hardware'])}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def device(hardware: dict[str, Any]) -> str:
    """What a run was computed on, in words."""
    processes = hardware.get("processes", 1)
    threads = f"{processes * hardware['threads']} CPU thread{'s' if processes * hardware['threads'] > 1 else ''}"
    precision = "" if hardware["precision"] == "float32" else f", {hardware['precision']}"
    return (hardware["gpu"] or threads) + precision


# The table of methods: a table for each kind of task, the best first.


def methods(table: Table, mark: Marks, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """A table for each kind of test task, the best method first."""
    columns = ("Method", "Ours", "Published", "Untrained", "Transductive", "Trained", "Command", "Made at")
    runs = [made for row in table.rows if not only or row.name in only for made in stored(row, data)]
    runs.sort(key=lambda made: -made.result[TEST_ACCURACY])
    kinds = sorted({kind(made.result) for made in runs})
    return "\n\n".join(
        f"#### {ways}-way {shots}-shot\n\n"
        + markdown(columns, ([*method_cells(made), mark(made)] for made in runs if kind(made.result) == (ways, shots)))
        for ways, shots in kinds
    )


def kind(result: dict[str, Any]) -> tuple[int, int]:
    """Ways and shots of the test tasks."""
    test = result[PROTOCOL]["test"]
    return test["ways"], test["shots"]


def method_cells(made: Made) -> list[str]:
    """The cells of one run but the last."""
    result = made.result
    choices = result[CHOICES]
    # The published values are of plain methods, trained on right labels.
    plain = not (choices.get("wrapper") or result[PROTOCOL].get("train_noise"))
    published = find(choices, result[PROTOCOL]["test"]) if plain else None
    return [
        label(result),
        f"**{result[TEST_ACCURACY]:.2%}** {half(result[half_of(TEST_ACCURACY)], '.2%')}",
        ("none collected" if plain else "") if published is None else str(published),
        f"{result[key(UNTRAINED, ACCURACY)]:.1%}" if key(UNTRAINED, ACCURACY) in result else "",
        "yes" if result[PROTOCOL][TRANSDUCTIVE] else "no",
        trained(result),
        f"`{made.run.command}`",
    ]


def label(result: dict[str, Any]) -> str:
    """A method with its paper, its wrapper, and the noise of its training tasks."""
    choices = result[CHOICES]
    wrapper = f", trained with {paper('wrapper', choices['wrapper'])}" if choices.get("wrapper") else ""
    noise = result[PROTOCOL].get("train_noise")
    noisy = f", {noise['tasks']:.0%} of the training tasks with {noise['labels']:.0%} wrong labels" if noise else ""
    return paper("algo", choices["algo"]) + wrapper + noisy


def name_of(group: str, choice: str) -> str:
    """A choice's name, as its file begins."""
    text = (ROOT / "conf" / group / f"{choice}.yaml").read_text(encoding="utf-8")
    called = re.search(r"^# ([^@(,:;]+?)(?: \(|,|:|;)", text, re.MULTILINE)
    if not called:
        raise SystemExit(f"results: conf/{group}/{choice}.yaml does not begin with a name")
    return called[1]


def paper(group: str, choice: str) -> str:
    """A choice's name with the link to its paper and the authors, from the docstring of its module."""
    config = OmegaConf.load(ROOT / "conf" / group / f"{choice}.yaml")
    target = str((OmegaConf.select(config, group) or config)._target_)
    module = target.rpartition(".")[0]
    about = (
        ast.get_docstring(ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")))
        or ""
    )
    head, link = about.partition("\n\n")[0].replace("\n", " "), re.search(r"https://\S+", about)
    authors = re.fullmatch(r"[^(]+\(([^()]+)\)\.", head)
    if not authors or not link:
        raise SystemExit(f"results: {module} does not begin with 'Name: title of the paper (authors year).' and a link")
    return f"[{name_of(group, choice)}]({link[0]}) ({authors[1]})"


# Several data sets: a row for each method, a column for each set.


def domains(table: Table, mark: Marks, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """Accuracy on each of the data sets that a method was tested on, and what was published of the one that it was trained on."""
    rows = [made for row in table.rows if not only or row.name in only for made in stored(row, data)]
    if not rows:
        return NOTHING_YET
    sets = list(dict.fromkeys(name for made in rows for name in made.result[PROTOCOL][SETS]))
    columns = ("Method", "Tasks", *sets, "Published", "Transductive", "Trained", "Command", "Made at")
    return markdown(columns, ([*domain_cells(made, sets), mark(made)] for made in rows))


def domain_cells(made: Made, sets: Sequence[str]) -> list[str]:
    """The cells of one run but the last; a set whose tasks have other ways than the rest says so."""
    result, protocol = made.result, made.result[PROTOCOL]
    cells = []
    for name in sets:
        score = key(of_set(TEST, name), ACCURACY)
        if score not in result:
            cells.append("")
            continue
        task = protocol[SETS][name]["task"]
        other = "" if task["ways"] == protocol["test"]["ways"] else f", {task['ways']}-way"
        cells.append(f"**{result[score]:.2%}** {half(result[half_of(score)], '.2%')}{other}")
    published = find(result[CHOICES], protocol["test"])
    return [
        made.run.row.label or name_of("algo", result[CHOICES]["algo"]),
        task_text(protocol["test"]),
        *cells,
        "none collected" if published is None else str(published),
        "yes" if protocol[TRANSDUCTIVE] else "no",
        trained(result),
        f"`{made.run.command}`",
    ]


# A target without labels: a row for each method, over seeds, beside the control.


def adaptation(table: Table, mark: Marks, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """Accuracy on the target over the seeds, and the difference from the control on the same seeds."""
    columns = ("Method", "Accuracy on the target", "Seeds", "Difference from the control", "Command", "Made at")
    rows = {row.name: stored(row, data) for row in table.rows}
    control = {made.run.seed: made.result[TARGET_ACCURACY] for made in rows[table.options["control"]]}
    lines = []
    confusion = next((np.array(runs[0].result[TARGET_CONFUSION]) for runs in rows.values() if runs), None)
    if confusion is not None:
        lines.append(["the commonest class", f"**{confusion.sum(1).max() / confusion.sum():.1%}**", "", "", "", ""])
    for row in table.rows:
        runs = rows[row.name]
        if not runs or (only and row.name not in only):
            continue
        values = [made.result[TARGET_ACCURACY] for made in runs]
        pairs = [made.result[TARGET_ACCURACY] - control[made.run.seed] for made in runs if made.run.seed in control]
        found = paired(np.array(pairs)) if row.name != table.options["control"] else None
        lines.append(
            [
                row.label,
                f"**{np.mean(values):.1%}**{', one seed' if len(values) == 1 else ' ' + half(over_seeds(values), '.1%')}",
                str(len(values)),
                ""
                if found is None
                else f"{found.mean * 100:+.1f} {half(points(found.half), '.1f')} points ({found.pairs} pairs)",
                f"`{row.command}`",
                mark_of_all(runs, mark),
            ]
        )
    return markdown(columns, lines)


# A small labelled target: a row for each approach, a column for each number of training images.


def approaches(table: Table, mark: Marks, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """Accuracy for each number of training items, beside the commonest class; a cell is empty where a row was not made with so many.

    The best of each column is in bold, unless the rows are of different targets (`best: false`); `items` are called images where
    nothing else is said.
    """
    rows = {row: stored(row, data) for row in table.rows}
    rows = {row: runs for row, runs in rows.items() if runs}
    if not rows:
        return NOTHING_YET
    first = next(iter(rows.values()))[0].result
    sizes = sorted(set[int]().union(*(sizes_of([made]) for runs in rows.values() for made in runs)))
    means = {
        row: {size: mean_of(runs, size, ACCURACY) for size in sizes if size in sizes_of(runs)}
        for row, runs in rows.items()
    }
    compared = table.options.get("best", True)
    best = {
        size: max((mean[size] for mean in means.values() if size in mean), default=None) for size in sizes if compared
    }
    items = table.options.get("items", ITEMS)
    majority, classes = first[TARGET_CHANCE], len(first[TARGET_CLASSES])
    last = f"{sizes[-1]} {items}: "
    columns = ["Approach", "Trained on the source", *(f"{size} {items}" for size in sizes)]
    scores = {BALANCED_ACCURACY: (f"{last}balanced accuracy", f"{1 / classes:.1%}")}
    if all(AUROC in point for runs in rows.values() for made in runs for point in made.result[TARGET_CURVE]):
        scores[AUROC] = (f"{last}AUROC", "50.0%")  # of two classes
    elif all(MACRO_F1 in point for runs in rows.values() for made in runs for point in made.result[TARGET_CURVE]):
        scores[MACRO_F1] = (f"{last}macro F1", "")
    scratch = [runs for row, runs in rows.items() if row.name == "scratch"]
    columns += (
        [title for title, _ in scores.values()] + [f"{last}difference from scratch" for _ in scratch] + ["Made at"]
    )
    of_majority = [value for _, value in scores.values()]
    lines = [["the commonest class", "", *[f"{majority:.1%}"] * len(sizes), *of_majority, *["" for _ in scratch], ""]]
    for row, runs in rows.items():
        if only and row.name not in only:
            continue
        cells = []
        for size in sizes:
            cell = over_draws(runs, size, ACCURACY)
            cells.append(f"**{cell}**" if cell and means[row][size] == best.get(size) else cell)
        cells += [over_draws(runs, sizes[-1], name) for name in scores]
        differences = [against(runs, other, sizes[-1]) for other in scratch]
        lines.append([row.label, source_training(runs), *cells, *differences, mark_of_all(runs, mark)])
    return markdown(columns, lines)


def sizes_of(runs: list[Made]) -> set[int]:
    """The numbers of training images that each of some runs was made with."""
    return set.intersection(*({point["train_images"] for point in made.result[TARGET_CURVE]} for made in runs))


def place_of(made: Made, size: int) -> int:
    """Where a number of training images stands in the curve of a run."""
    return [point["train_images"] for point in made.result[TARGET_CURVE]].index(size)


def mean_of(runs: list[Made], size: int, name: str) -> float:
    """The mean of a score over the source seeds, with `size` training images."""
    return float(np.mean([made.result[TARGET_CURVE][place_of(made, size)][name] for made in runs]))


def values_of(runs: list[Made], size: int) -> np.ndarray:
    """The accuracy of each draw with `size` training images, the source seeds averaged."""
    means: np.ndarray = np.mean([made.result[TARGET_VALUES][place_of(made, size)] for made in runs], axis=0)
    return means


def over_draws(runs: list[Made], size: int, name: str) -> str:
    """The mean over source seeds and draws, and half its 95% interval, see `half_of_draws`; empty for a size that a seed lacks."""
    if size not in sizes_of(runs):
        return ""
    mean = f"{mean_of(runs, size, name):.1%}"
    told = len(runs) == 1 or (name == ACCURACY and all(TARGET_VALUES in made.result for made in runs))
    return f"{mean} {half(half_of_draws(runs, size, name), '.1%')}" if told else mean


def half_of_draws(runs: list[Made], size: int, name: str) -> float | None:
    """Half the 95% interval of a score: over the draws, the source seeds averaged first, with the images that draws share in mind.

    Of one run it is the stored one, which earlier versions of metarun computed as if draws shared no images.
    """
    result = runs[0].result
    point = result[TARGET_CURVE][place_of(runs[0], size)]
    if len(runs) > 1:
        return over_seeds(list(values_of(runs, size)), overlap(result))
    width: float | None = point[half_of(name)]
    if width is None or "Student" not in result[TARGET_INTERVAL] or "share" in result[TARGET_INTERVAL]:
        return width
    return width * math.sqrt(1 + point["repeats"] * overlap(result))


def against(runs: list[Made], scratch: list[Made], size: int) -> str:
    """The paired difference of accuracy from training from scratch with `size` images, over the draws."""
    both = [*runs, *scratch]
    if runs is scratch or not all(TARGET_VALUES in made.result for made in both) or size not in sizes_of(both):
        return ""
    found = paired(values_of(runs, size) - values_of(scratch, size), overlap(runs[0].result))
    if found is None:
        return ""
    return f"{found.mean * 100:+.1f} {half(points(found.half), '.1f')} points"


def points(share: float | None) -> float | None:
    """A share in percentage points."""
    return None if share is None else share * 100


def source_training(runs: list[Made]) -> str:
    """Steps of each stage on the source, over the seeds."""
    steps: dict[str, list[int]] = {}
    for made in runs:
        for stage in ("pretrain", "train"):
            if f"{stage}/steps" in made.result:
                steps.setdefault(stage, []).append(made.result[f"{stage}/steps"])
    text = [f"{stage}: {', '.join(f'{count:,}' for count in counts)} steps" for stage, counts in steps.items()]
    seeds = f", {len(runs)} seed{'s' if len(runs) > 1 else ''}"
    return ("; ".join(text) or "nothing") + (seeds if text else "")


KINDS = {"tasks": tasks, "methods": methods, "domains": domains, "adaptation": adaptation, "approaches": approaches}


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a table in a text."""
    return f"<!-- made by python -m scripts.results: {name} -->", f"<!-- end of {name} -->"


def rewritten(text: str, tables: dict[str, Table], mark: Marks, data: Path = DATA) -> str:
    """A text with the tables of today between its markers.

    Args:
        text: Markdown with markers `<!-- made by python -m scripts.results: TABLE -->`; `TABLE ROW ROW...` takes some rows.
        tables: The tables by name.
        mark: What to say of where a result was made.
        data: The folder of stored results.

    Returns:
        The new text.
    """
    pattern = re.compile(r"<!-- made by python -m scripts\.results: ([\w ]+) -->.*?<!-- end of \1 -->", re.DOTALL)

    def replaced(found: re.Match[str]) -> str:
        name, *only = found[1].split()
        start, end = markers(found[1])
        table = tables[name]
        if unknown := sorted(set(only) - {row.name for row in table.rows}):
            raise SystemExit(f"results: a marker names the row {name}/{unknown[0]}, which rows.yaml does not have")
        return f"{start}\n{KINDS[table.kind](table, mark, data, only)}\n{end}"

    return pattern.sub(replaced, text)


def unmarked(text: str) -> str:
    """A text without what later commits change in it: which results are of older code."""
    return re.sub(re.escape(CHANGED) + r"(, short run [a-z ]+ at `\w+`)?", "", text)
