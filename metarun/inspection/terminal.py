"""What `recipe=inspect` prints; it fits 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.table import Table
from rich.text import Text

from metarun.core import TaskShape
from metarun.data.source import Split
from metarun.inspection.words import asked, class_line, duplicate_lines, text_lines, time_lines
from metarun.terminal import Terminal
from metarun.text import bytes_text, counted, printable, shape_text, text_width

SHOWN = 5  # bad files, sizes


def show(found: list[dict[str, Any]], time: dict[str, Any], tasks: dict[Split, TaskShape]) -> None:
    """Prints what was found."""
    for one in found:
        _show_one(one, tasks)
    for line in time_lines(time):
        _say(line)


def _show_one(one: dict[str, Any], tasks: dict[Split, TaskShape]) -> None:
    print()
    _say(f"{one['name']} ({one['class']})")
    if told := one.get("files"):
        _say(f"files    {counted(told['count'], 'image')}, {bytes_text(told['bytes'])}, in {told['root']}")
        if told["not_read"]:
            _say(f"         and {counted(told['not_read'], 'image file')} of no class, not read")
        sizes = ", ".join(f"{each['size']} ({each['files']:,})" for each in told["sizes"][:SHOWN])
        more = f", and {told['different_sizes'] - SHOWN:,} other sizes" if told["different_sizes"] > SHOWN else ""
        if sizes:  # else no file can be read
            _say(f"sizes    {sizes}{more}")
            _say("depths   " + ", ".join(f"{name} ({count:,})" for name, count in told["depths"].items()))
            _say("formats  " + ", ".join(f"{name} ({count:,})" for name, count in told["formats"].items()))
        if told["unreadable_count"]:
            _say(f"bad      {counted(told['unreadable_count'], 'file')} cannot be read:")
            for bad in told["unreadable"][:SHOWN]:
                _say(f"         {printable(bad['file'])}: {printable(bad['reason'])}")
    if one["problem"]:
        _say(f"PROBLEM  {one['problem']}")
        return
    if "note" in one:
        _say(f"note     {one['note']}")
    for line in text_lines(one.get("texts")) or [shape_text(one["input_shape"])]:
        _say(f"items    {line}")
    if "mean" in one:
        pairs = zip(one["mean"], one["deviation"], strict=True)
        _say("pixels   mean ± deviation of training images: " + ", ".join(f"{m:.3f} ± {d:.3f}" for m, d in pairs))
    if one["splits"]:
        table = Table("split", title_justify="left")
        for column in ("classes", "items", "smallest", "median", "largest", "ways", "shots+queries"):
            table.add_column(column, justify="right")
        for split, told in one["splits"].items():
            cells = (
                f"{told[key]:,.0f}" for key in ("classes", "items", "smallest", "median", "largest", "largest_ways")
            )
            table.add_row(split, *cells, f"{told['largest_shots_and_queries']:,}")
        Terminal().show(table)
        _say(
            "ways and shots+queries: the largest tasks that a split can serve; smallest, median, largest: items a class"
        )
    else:
        _say(f"classes  {class_line(one)}")
    if one["same_classes"] and one["splits"]:
        _say("All classes are in every split: these data can be a target, and cannot be meta-tested on new classes.")
    if one["parts"]:
        _say(
            "parts    "
            + ", ".join(f"{part} {count:,}" for part, count in one["parts"].items())
            + f" {'texts' if 'texts' in one else 'images'}, the data set's own"
        )
    for line in asked(one, tasks):
        _say(f"tasks    {line}")
    for line in duplicate_lines(one.get("duplicates")):
        _say(f"twice    {line}")


def _say(line: str) -> None:
    indent = " " * 9 if line[8:9] == " " or line[:9].isspace() else "  "
    for part in textwrap.wrap(line, text_width(), subsequent_indent=indent, break_on_hyphens=False) or [""]:
        Terminal().print(Text(part), soft_wrap=True)
