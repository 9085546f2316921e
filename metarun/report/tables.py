"""The tables of a report: for the terminal, as Markdown, LaTeX and CSV; the page shows the same cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metarun.ops.measures import ACCURACY, AUROC, BALANCED_ACCURACY, CONFUSION, ERROR, MACRO_F1
from metarun.report.finished import Setting
from metarun.report.statistics import Paired, over_seeds, tied
from metarun.report.summary import Point, Row, Section, apart, shown, target_measure, target_points
from metarun.report.target import TITLES
from metarun.report.text import TOO_FEW, error_form
from metarun.runs.result import TARGET, TARGET_CLASSES, TRANSDUCTIVE, key, mode
from metarun.text import printable

SOME = "seeds: 2 of 3"  # what is explained where some seeds have no finite number

MINUS = "minus the best,"  # begins the headings of paired differences
DIVISIONS = "mean ± over divisions"
MIXED_UP = "mixed up most"  # heads what classes of a target are taken for
DRAWN = {
    "episodes": "the drawn test episodes (Student's t, or Wilson's interval where all have the same accuracy)",
    "orders": "the orders in which the classes come, each with other images of them (Student's t)",
    "repeats": "the repeats, each with other images of the target (Student's t, corrected for the images that repeats share: Nadeau and "
    "Bengio 2003), or, where a cell says so since all repeats agree, "
    "over the test images of one (Wilson's interval)",
    "test images": "the test images (Wilson's interval)",
}
EXPLAINED = {
    "± over seeds": "95% interval of the mean over seeds (Student's t): it speaks of the method with this budget, whatever the "
    "seed. One seed cannot have it, nor can seeds that all agree.",
    **{
        f"± over {over}": f"95% interval of the same mean over {what}: it says how well the accuracy or error of these "
        "trained weights is known, and nothing of other seeds."
        for over, what in DRAWN.items()
    },
    **{
        f"{MINUS} over {over}": f"paired t test on the {over} that both were tested on (same seed, same "
        f"{over.removesuffix('s')}), with its 95% interval: whether these trained weights differ."
        for over in DRAWN
    },
    f"{MINUS} over seeds": "paired t test with one number for each seed that both have: whether the methods "
    "differ with this budget.",
    DIVISIONS: "the mean accuracy over what differs in the data alone, with its 95% interval over these (Student's t): it counts the "
    "luck of the division, and of the one training on each.",
    SOME: "the mean and its intervals are of 2 of the 3 seeds; the other has no finite number, as its training or its test diverged.",
    "mean rank": "the mean over the data sets of a method's rank among those that were tested on all of them, 1 being the highest "
    "accuracy.",
    "supposes balanced": "whether the method supposes that each class has as many of the queries (of a target: test items) as any other, "
    "which it cannot know.",
    TITLES[
        BALANCED_ACCURACY
    ]: "the mean over the classes of the share of its test items that are right; of unequal classes chance is one "
    "in so many, whatever the commonest is.",
    TITLES[
        AUROC
    ]: "of two classes: how often an item of the second has a higher probability of it than one of the first; 50% is chance.",
    MIXED_UP: "the class of which the largest share of test items is taken for one other class, over all repeats and seeds.",
    "p": "Holm-adjusted over all comparisons of its kind in this report. The best was chosen by these same results, "
    "which flatters it a little.",
}


@dataclass
class ReportTable:
    """Text cells under headings.

    Attributes:
        title: What stands above them.
        headings: The columns' names.
        rows: The cells, row by row.
        numbers_from: The first column that is aligned to the right.
        best: The places `(row, column)` of what is printed in bold.
        ranked: Whether the best row comes first.
        kept: The column of results that stays in sight on a page which is too narrow for all; None for none.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    numbers_from: int
    best: set[tuple[int, int]] = field(default_factory=set)
    ranked: bool = False
    kept: int | None = None


def explained(shown: Sequence[ReportTable]) -> dict[str, str]:
    """What the headings of these tables mean."""
    headings = {heading.rpartition(": ")[2].removesuffix(" (points)") for table in shown for heading in table.headings}
    paired = any(heading.startswith(MINUS) for heading in headings)
    some = {
        SOME
        for table in shown
        for row in table.rows
        if "seeds" in table.headings and " of " in row[table.headings.index("seeds")]
    }
    return {term: meaning for term, meaning in EXPLAINED.items() if term in headings | some or (term == "p" and paired)}


def name(column: str, crossed: bool = False) -> str:
    """A swept key as a heading: `task.ways` is read more easily as `ways`, and the choice of `data` is what was trained on.

    Args:
        column: The key.
        crossed: Whether there are tests on other data than those of the training.
    """
    if column == "data" or (crossed and column.startswith("data.")):
        return "trained on" if column == "data" else f"trained on {column}"
    for prefix, readable in (("test.task.", "test "), ("train.task.", "training "), ("task.", "")):
        if column.startswith(prefix):
            return readable + column.removeprefix(prefix)
    return column


def number(value: float | None, measure: str) -> str:
    """An accuracy in percent, or an error."""
    if value is None:
        return "–"
    if measure == ACCURACY:
        return f"{value:.2%}"
    return f"{value:{error_form(value)}}"


def section_table(section: Section) -> ReportTable:
    """A setting's table; a heading whose cells would all be empty is left out."""
    rows, measure = section.rows, section.setting.measure
    swept = {
        name(column, section.crossed): [shown(row.group.values[column]) for row in rows] for column in section.columns
    }
    swept = swept or {"runs": [row.label for row in rows]}
    results = _tested(rows, measure, section.setting.over) if section.setting.tested else _validated(rows, measure)
    columns = swept | {"seeds": [_seeds(row) for row in rows]} | results
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    measured = len(swept) + 1  # behind the number of seeds
    best = {(index, measured) for index, row in enumerate(rows) if row.best}
    title = section.title if section.setting.tested else f"{section.title}: validation"
    cells = [list(cells) for cells in zip(*columns.values(), strict=True)]
    return ReportTable(title, list(columns), cells, len(swept), best, not section.setting.tested, measured)


def _seeds(row: Row) -> str:
    """How many seeds a row is of; `2 of 3` where its mean is of those alone that have a finite number."""
    return str(row.n) if row.counted == row.n else f"{row.counted} of {row.n}"


def _tested(rows: Sequence[Row], measure: str, over: str) -> dict[str, list[str]]:
    regression = measure == ERROR
    cells = {
        "MSE" if regression else "accuracy": [number(row.mean, measure) for row in rows],
        "± over seeds": ["one seed" if row.n == 1 else _half(row.mean, row.seeds_half, measure) for row in rows],
        f"± over {over}": [
            _half(row.mean, row.episodes_half, measure) + _unlike(row.episodes_half, row.over, over) for row in rows
        ],
    }
    if regression:
        cells["median MSE"] = [number(row.median, measure) for row in rows]
        cells["diverged tasks"] = [str(row.diverged) if any(row.diverged for row in rows) else "" for row in rows]
    modes = [mode(row.group.runs[0].result, row.group.runs[0].tested) for row in rows]
    transductive = [found.get(TRANSDUCTIVE) for found in modes]
    cells["transductive"] = [("yes" if each else "no") if any(transductive) else "" for each in transductive]
    balanced = [bool(found.get("assumes_balanced_queries")) for found in modes]
    cells["supposes balanced"] = [("yes" if each else "no") if any(balanced) else "" for each in balanced]
    saw = [row.group.runs[0].saw_these_classes for row in rows]
    if "yes" in saw:
        cells["pretrained on these classes"] = saw
    if len(rows) > 1:
        points = "" if regression else " (points)"
        best = next((row for row in rows if row.best), None)
        on_episodes, on_seeds = (
            ["the best" if row is best else _against(getattr(row, test), without, measure) for row in rows]
            for test, without in (("on_episodes", f"no common {over}"), ("on_seeds", "–"))
        )
        cells[f"{MINUS} over {over}{points}"] = on_episodes
        cells[f"{MINUS} over seeds{points}"] = on_seeds if any(row.on_seeds for row in rows) else ["" for _ in rows]
    cells["published"] = [str(row.published or "") for row in rows]
    return cells


def _half(mean: float | None, half: float | None, measure: str) -> str:
    return TOO_FEW if half is None and mean is not None else number(half, measure)


def _unlike(half: float | None, own: str, over: str) -> str:
    """What an interval is over, to follow it, where that is not what the heading says."""
    return "" if half is None or own == over else f" over {own}"


def _against(paired: Paired | None, without: str, measure: str) -> str:
    """`−1.20 ± 0.31, p 0.004`: in percentage points, or in errors."""
    if paired is None:
        return without
    scale, digits = (100, ".2f") if measure == ACCURACY else (1, error_form(paired.mean))
    p = "p <0.001" if paired.p < 0.001 else f"p {paired.p:.3f}"
    half = f" ± {scale * paired.half:{digits}}" if paired.half is not None else " in all"
    return f"{scale * paired.mean:+{digits}}{half}, {p}".replace("-", "−")


def _validated(rows: Sequence[Row], measure: str) -> dict[str, list[str]]:
    heading = "validation accuracy" if measure == ACCURACY else "validation error (median)"
    sign = 1 if measure == ACCURACY else -1  # the score of regression is minus the median error
    scores = [None if row.validation is None else sign * row.validation for row in rows]
    halves = ["one seed" if row.n == 1 else _half(row.validation, row.validation_half, measure) for row in rows]
    return {heading: [number(score, measure) for score in scores], "± over seeds": halves}


def overview(sections: Sequence[Section]) -> ReportTable | None:
    """A row for each method, a column for each setting; None if there is one setting, or nothing that goes across them."""
    sections = [section for section in sections if section.setting.tested]
    columns = list(dict.fromkeys(column for section in sections for column in section.columns))
    many = [index for index, section in enumerate(sections) if section.setting.one_of_many]
    families: dict[Setting, list[int]] = {}
    for index, section in enumerate(sections):
        if section.division and not many and section.setting.measure == ACCURACY:
            families.setdefault(section.setting._replace(content=""), []).append(index)
    families = {family: indices for family, indices in families.items() if len(indices) > 1}
    if len(sections) < 2 or not (columns or many or families):
        return None
    places: dict[tuple[str, ...], dict[int, Row]] = {}
    for index, section in enumerate(sections):
        for each in section.rows:
            places.setdefault(tuple(shown(each.group.values[column]) for column in columns), {})[index] = each
    if all(len(across) == 1 for across in places.values()):
        return None
    common, titles = apart([section.title for section in sections])
    beside: dict[str, list[str]] = {}
    together = _tested_together(sections, many)
    shared = [", ".join(apart([titles[index] for index in of_one])[0]) for of_one in together]
    for number_of, (of_one, of) in enumerate(zip(together, shared, strict=True), 1):
        of = (of if of and shared.count(of) == 1 else f"tests {number_of}") if len(together) > 1 else ""
        beside |= across_sets(list(places.values()), of_one, len(sections), of)
    for family in families.values():
        of_these = apart([titles[index] for index in family])[0] if len(families) > 1 else []
        beside |= across_divisions(list(places.values()), family, ", ".join(of_these))
    rows: list[list[str]] = []
    best = set()
    for place, across in places.items():
        cells = []
        for index, section in enumerate(sections):
            row = across.get(index)
            half = row.seeds_half if row and row.n > 1 else None
            measure = section.setting.measure
            spread = f" ± {number(half, measure)}" if half is not None else ""
            cells.append(number(row.mean, measure) + spread if row else "")
            if row and row.best:
                best.add((len(rows), max(1, len(columns)) + index))
        rows.append([*(place or [row_label(across)]), *cells, *(column[len(rows)] for column in beside.values())])
    all_of = "All data sets" if len(many) == len(sections) else "All settings"
    title = f"{', '.join([all_of, *common])}: mean over seeds ± its 95% interval over seeds"
    left = [name(column, sections[0].crossed) for column in columns] or ["runs"]
    return ReportTable(title, [*left, *titles, *beside], rows, len(left), best, kept=len(left) + len(titles) - 1)


def _tested_together(sections: Sequence[Section], many: Sequence[int]) -> list[list[int]]:
    """The sections of several data sets, those together that the same runs tested: at one shot, say, and at five apart."""
    found: list[tuple[set[Path], list[int]]] = []
    for index in many:
        folders, members = {run.folder for row in sections[index].rows for run in row.group.runs}, [index]
        for other in [other for other in found if other[0] & folders]:
            found.remove(other)
            folders, members = folders | other[0], other[1] + members
        found.append((folders, members))
    return [sorted(members) for _, members in found]


def row_label(across: Mapping[int, Row]) -> str:
    """What the rows of one group are called where nothing was swept."""
    return next(iter(across.values())).label


def across_sets(
    groups: Sequence[Mapping[int, Row]], many: Sequence[int], sections: int, of: str
) -> dict[str, list[str]]:
    """Columns over the data sets that the same weights were tested on: the mean accuracy, and where groups can be compared the mean rank.

    A group that lacks a data set has neither number.

    Args:
        groups: The row of each group by the number of its section.
        many: The sections that are of such data sets.
        sections: The number of all sections.
        of: What they have in common, where there are others.
    """
    complete, values = _whole(groups, many)
    if len(many) < 2 or not complete:
        return {}
    before = f"{of}: " if of else ""
    title = "mean" if of or len(many) == sections else f"mean of the {len(many)} data sets"
    means = [f"{value:.2%}" for value in values.mean(1)]
    columns = {f"{before}{title}": means, **_ranked(values, f"{before}mean rank")}
    return _spread(columns, complete, len(groups))


def across_divisions(groups: Sequence[Mapping[int, Row]], divisions: Sequence[int], of: str) -> dict[str, list[str]]:
    """Columns over divisions of one data set, each with weights of its own: the mean accuracy with its interval, and the mean rank.

    A group that lacks a division has neither number.

    Args:
        groups: The row of each group by the number of its section.
        divisions: The sections that are of these.
        of: What they have in common, where there are others.
    """
    complete, values = _whole(groups, divisions)
    if not complete:
        return {}
    halves = [over_seeds(row) for row in values]
    means = [f"{row.mean():.2%}" + (f" ± {half:.2%}" if half else "") for row, half in zip(values, halves, strict=True)]
    before = f"{of}: " if of else ""
    columns = {f"{before}{DIVISIONS}": means, **_ranked(values, f"{before}mean rank")}
    return _spread(columns, complete, len(groups))


def _whole(groups: Sequence[Mapping[int, Row]], sections: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """The groups that have a number in each of some sections, and these numbers, `[groups, sections]`."""
    complete = [
        at
        for at, across in enumerate(groups)
        if all(index in across and across[index].mean is not None for index in sections)
    ]
    return complete, np.array([[groups[at][index].mean for index in sections] for at in complete], dtype=np.float64)


def _ranked(values: np.ndarray, heading: str) -> dict[str, list[str]]:
    """The mean rank of each of several groups, whose accuracies on some data sets are `[groups, sets]`.

    Ranks are within a data set, 1 for the highest accuracy, ties sharing the mean of theirs (Demsar 2006).
    """
    alike = tied(values[:, None], values[None])
    above = (values[:, None] > values[None]) & ~alike
    ranks = above.sum(0) + (alike.sum(0) + 1) / 2
    return {heading: [f"{rank:.2f}" for rank in ranks.mean(1)]} if len(values) > 1 else {}


def _spread(columns: Mapping[str, Sequence[str]], places: Sequence[int], rows: int) -> dict[str, list[str]]:
    """Columns with their cells at some places of all rows, the others being empty."""
    found = {heading: [""] * rows for heading in columns}
    for heading, cells in columns.items():
        for place, cell in zip(places, cells, strict=True):
            found[heading][place] = cell
    return found


def target_curve(section: Section) -> ReportTable | None:
    """A row for each group, a column for each number of training images of a target; None where all groups have one number."""
    found = [target_points(row.group) for row in section.rows]
    sizes = sorted({size for points in found for size in points})
    if len(sizes) < 2:
        return None
    swept = {name(column): [shown(row.group.values[column]) for row in section.rows] for column in section.columns}
    swept = swept or {"runs": [row.label for row in section.rows]}
    over = section.setting.over
    means = [[points[size].mean if size in points else -math.inf for size in sizes] for points in found]
    rows = [
        [*own, *(_point(points[size], over) if size in points else "" for size in sizes)]
        for own, points in zip(zip(*swept.values(), strict=True), found, strict=True)
    ]
    best = {
        (row, len(swept) + column)
        for row, values in enumerate(means)
        for column, value in enumerate(values)
        if len(rows) > 1 and tied(value, max(other[column] for other in means))
    }
    title = f"{section.setting.data} as the target, accuracy by training {section.setting.items} ± over {over}"
    headings = [*swept, *(f"{size} {section.setting.items}" for size in sizes)]
    return ReportTable(title, headings, rows, len(swept), best, kept=len(headings) - 1)


def target_measures(section: Section) -> ReportTable | None:
    """What accuracy does not tell of a target, at its largest number of training items; None for other tests and where runs lack it.

    That is balanced accuracy, AUROC (of two classes) or macro F1, and which class is taken for which other one most often.
    """
    results = [run.result for row in section.rows for run in row.group.runs]
    known = [
        name for name in (BALANCED_ACCURACY, AUROC, MACRO_F1) if all(key(TARGET, name) in found for found in results)
    ]
    known = known[:2]  # beside AUROC, macro F1 tells little more
    if not known or not all(key(TARGET, CONFUSION) in found for found in results):
        return None
    swept = {name(column): [shown(row.group.values[column]) for row in section.rows] for column in section.columns}
    swept = swept or {"runs": [row.label for row in section.rows]}
    columns = {
        TITLES[measure]: [_point(target_measure(row.group, measure), section.setting.over) for row in section.rows]
        for measure in known
    }
    columns[MIXED_UP] = [_mixed_up([run.result for run in row.group.runs]) for row in section.rows]
    rows = [list(cells) for cells in zip(*swept.values(), *columns.values(), strict=True)]
    title = f"{section.title}: beside accuracy, ± over {section.setting.over}"
    return ReportTable(title, [*swept, *columns], rows, len(swept), kept=len(swept))


def _mixed_up(results: Sequence[Mapping[str, Any]]) -> str:
    """The class of which the largest share is taken for one other class, `cat for dog, 12.5%`; `none` where all is right."""
    counts = np.sum([result[key(TARGET, CONFUSION)] for result in results], axis=0)
    names = results[0][TARGET_CLASSES]
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(wrong, 0)
    true, taken = np.unravel_index(wrong.argmax(), wrong.shape)
    if not wrong[true, taken]:
        return "none"
    return f"{printable(names[true])} for {printable(names[taken])}, {wrong[true, taken]:.1%}"


def _point(point: Point, over: str) -> str:
    half = "" if point.half is None else f" ± {number(point.half, ACCURACY)}"
    return number(point.mean, ACCURACY) + half + _unlike(point.half, point.over, over)
