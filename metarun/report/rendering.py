"""A table of a report on the terminal, in Markdown, in LaTeX and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from metarun.report.published import cited
from metarun.report.summary import Row, Section, shown
from metarun.report.tables import ReportTable
from metarun.terminal import NARROW, Terminal

LONGEST = 20  # rows of a table of validation scores on the terminal: a search can have hundreds of trials


def show(tables: Sequence[ReportTable]) -> None:
    """Prints the tables; piped output keeps its lines whole, a terminal is as wide as it is."""
    console, whole = Terminal(), not sys.stdout.isatty()
    width = sys.maxsize if console.width < NARROW else console.width  # there numbers stand below each other
    for given in tables:
        table, left_out = (given, []) if whole else narrowed(without_unpublished(given), width)
        rich = RichTable(title=Text(table.title), title_justify="left")
        for index, heading in enumerate(table.headings):
            setting = index < table.numbers_from  # which is one word, and is read as a whole
            whole_words = setting and needed(table) <= console.width
            rich.add_column(Text(heading), justify="left" if setting else "right", overflow="fold", no_wrap=whole_words)
        long = table.ranked and len(table.rows) > LONGEST
        for row, cells in enumerate(table.rows[: LONGEST if long else None]):
            # A narrow screen wants a line for the p-value; the sources of published values stand in the files.
            shortened = [
                re.sub(r" \([^()]*\)$", "", cell) if heading == "published" else cell
                for heading, cell in zip(table.headings, cells, strict=True)
            ]
            texts = [
                cell.replace(", p ", ",\np ") if at >= table.numbers_from else cell for at, cell in enumerate(shortened)
            ]
            rich.add_row(*(Text(text, style="bold" * ((row, at) in table.best)) for at, text in enumerate(texts)))
        console.show(rich, whole=whole)
        if left_out:
            print(f"for want of room without {', '.join(left_out)}, which the files below have")
        if long:
            print(f"and {len(table.rows) - LONGEST} more, in the files below")


def needed(table: ReportTable) -> int:
    """The columns of a screen that a table needs at least, its lines broken between words alone."""
    words = [max(map(len, " ".join(cells).split() or [""])) for cells in zip(table.headings, *table.rows, strict=True)]
    return sum(words) + 3 * len(words) + 1


def narrowed(table: ReportTable, width: int) -> tuple[ReportTable, list[str]]:
    """A table that fits a screen, and the headings of what was left out.

    Left out are first what says that there is one seed, then settings, from the right, that tell no two rows apart.
    """
    left_out: list[str] = []
    while needed(table) > width and (column := _dispensable(table)) is not None:
        left_out.append(table.headings[column])
        table = _without(table, column)
    return table, left_out


def _dispensable(table: ReportTable) -> int | None:
    cells = list(zip(*table.rows, strict=True))
    for column, (heading, own) in enumerate(zip(table.headings, cells, strict=True)):
        if column >= table.numbers_from and {heading, *own} in ({"seeds", "1"}, {"± over seeds", "one seed"}):
            return column
    for column in reversed(range(table.numbers_from)):
        others = [tuple(row[:column] + row[column + 1 : table.numbers_from]) for row in table.rows]
        if table.numbers_from > 1 and len(set(others)) == len(others):
            return column
    return None


def without_unpublished(table: ReportTable) -> ReportTable:
    """A table for a narrow screen: without its last column where that only says that nothing was published."""
    last = [cells[-1] for cells in table.rows]
    if (
        not table.headings
        or table.headings[-1] != "published"
        or any(cell and not cell.startswith("none") for cell in last)
    ):
        return table
    return _without(table, len(table.headings) - 1)


def _without(table: ReportTable, column: int) -> ReportTable:
    def rest(cells: list[str]) -> list[str]:
        return cells[:column] + cells[column + 1 :]

    return replace(
        table,
        headings=rest(table.headings),
        rows=[rest(cells) for cells in table.rows],
        numbers_from=table.numbers_from - (column < table.numbers_from),
        best={(row, at - (at > column)) for row, at in table.best},
    )


# What Markdown takes for formatting: an underscore inside of a word is none.
MARKDOWN = re.compile(r"[\\`*|\[\]~]|(?<![^\W_])_|_(?![^\W_])")


def in_markdown(text: str) -> str:
    """A text that Markdown shows as it stands."""
    return MARKDOWN.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))


def markdown(table: ReportTable) -> str:
    """A table of GitHub's Markdown under its title."""

    def cell(place: tuple[int, int], text: str) -> str:
        return f"**{in_markdown(text)}**" if place in table.best else in_markdown(text)

    rule = ["---" if index < table.numbers_from else "---:" for index in range(len(table.headings))]
    rows = [[cell((row, index), text) for index, text in enumerate(cells)] for row, cells in enumerate(table.rows)]
    headings = [cell((-1, -1), heading) for heading in table.headings]
    return f"## {in_markdown(table.title)}\n\n" + "".join(
        "| " + " | ".join(line) + " |\n" for line in (headings, rule, *rows)
    )


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "<": "$<$", ">": "$>$",
    "|": r"\textbar{}",
    "[": "{[}", "]": "{]}",  # behind \\ and \midrule a bracket would begin a length
}  # fmt: skip


def latex_file(tables: Sequence[ReportTable]) -> str:
    """Tables as a file that another one includes; each has a label of its own, behind a colon numbered where titles are alike."""
    labels = [label(table) for table in tables]
    numbered = [
        f"{name}:{labels[: at + 1].count(name)}" if labels.count(name) > 1 else name for at, name in enumerate(labels)
    ]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(map(latex, tables, numbered))


def label(table: ReportTable) -> str:
    """What LaTeX refers to a table by, made of its title: `tab:omniglot-5-way-1-shot`."""
    return f"tab:{'-'.join(re.findall('[a-z0-9]+', table.title.lower())) or 'table'}"


def latex(table: ReportTable, label: str) -> str:
    """A `table` for the package booktabs; methods have their names and papers, `Prototypical networks (Snell et al. 2017)`.

    Args:
        table: The table.
        label: What it is referred to by.
    """

    def cell(place: tuple[int, int], text: str) -> str:
        escaped = "".join(LATEX.get(character, character) for character in text)
        return rf"\textbf{{{escaped}}}" if place in table.best else escaped

    align = "l" * table.numbers_from + "r" * (len(table.headings) - table.numbers_from)
    methods = [heading == "algo" for heading in table.headings]
    lines = [
        [cell((row, index), cited(text) if methods[index] else text) for index, text in enumerate(cells)]
        for row, cells in enumerate(table.rows)
    ]
    body = [" & ".join(line) + r" \\" for line in ([cell((-1, -1), heading) for heading in table.headings], *lines)]
    return "\n".join(
        [r"\begin{table}", r"\centering", rf"\caption{{{cell((-1, -1), table.title)}}}\label{{{label}}}", rf"\begin{{tabular}}{{{align}}}",
         r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    )  # fmt: skip


def as_csv(sections: Sequence[Section]) -> str:
    """A line for each group, numbers in full precision; what does not apply is empty."""
    lines = [_record(section, row) for section in sections for row in section.rows]
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, headings, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _record(section: Section, row: Row) -> dict[str, Any]:
    setting, seeds = section.setting, [str(together[0].training_seed)[:20] for together in row.group.trainings]
    record: dict[str, Any] = {
        "setting": section.title, "data": setting.data, "split": setting.split, "ways": setting.ways, "shots": setting.shots,
        "queries": setting.queries,
        **{column: None if value is None else shown(value) for column, value in row.group.values.items() if column != "data"},
        "trained_on": row.group.runs[0].choices.get("data"),
        "seeds": " ".join(seeds), "measure": setting.measure, "mean": row.mean, "half_over_seeds": row.seeds_half,
        "half_over_episodes": row.episodes_half, "interval_over": row.over, "seeds_in_mean": row.counted,
        "median": row.median, "diverged": row.diverged, "best": int(row.best),
        "validation_score": row.validation, "validation_half_over_seeds": row.validation_half,
        "train_seconds": row.seconds, "peak_memory_bytes": row.memory,
    }  # fmt: skip
    for kind, test in (("episodes", row.on_episodes), ("seeds", row.on_seeds)):
        for part in ("mean", "half", "p", "pairs"):
            heading = {"mean": "minus_best", "half": "minus_best_half", "p": "p_holm", "pairs": "pairs"}[part]
            record[f"{heading}_over_{kind}"] = getattr(test, part) if test else None
    published = row.published
    record |= {"published": published.value if published else None, "source": published.source if published else None}
    return {
        key: "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
        for key, value in record.items()
    }
