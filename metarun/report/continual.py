"""What is shown of classes that arrive one after the other: the table at the end of a run, and the curve over classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from metarun.report.target import items_of_data
from metarun.report.text import half
from metarun.runs.result import ACCURACY, CONTINUAL, PROTOCOL, half_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "online": "online head, each {item} once",
    "online_learned": "the same on the {item}s it learned",
    "online_so_far": "online head",
    "prototypes": "nearest class mean",
    "linear_probe": "linear probe on all {item}s so far",
}
AMONG_ALL = ("online", "online_learned")  # choose among all classes of the sequence, before the last one has come too


def table(result: dict[str, Any], what: str) -> Table:
    """The accuracies after the last class."""
    found, protocol, items = result[CONTINUAL], result[PROTOCOL], items_of_data(result)
    task = protocol["test"]
    title = (
        f"{what}{task['ways']} classes one after the other, {task['shots']} {items} each, {task['queries']} to test; "
        "after the last one, an answer is any of them; "
        f"norm {protocol['norm']}; {result['interval']}"
    )
    shown = Table("", "accuracy", "95% interval", title=title, title_justify="left", min_width=60)
    for name, label in LABELS.items():
        if name == "online_so_far":  # after the last class it is `online`
            continue
        label = label.format(item=items.removesuffix("s"))
        shown.add_row(label, f"{found[name][ACCURACY]:.2%}", half(found[name][half_of(ACCURACY)], ".2%"))
    shown.add_row("chance", f"{1 / found['classes']:.2%}", "")
    return shown


def class_curve(curves: Mapping[str, Mapping[str, Any]], points: Sequence[int], item: str = "image") -> bytes:
    """A PNG of the accuracy on all classes so far against their number, dashed where an answer may be one that has yet to come.

    Args:
        curves: By name the `mean` and half of the 95% interval, `ci95`, at each point.
        points: The numbers of classes.
        item: What one of what is learned is called.
    """
    from metarun.report.figures import picture, with_bars

    def draw(axes: Axes) -> None:
        for number, (name, curve) in enumerate(curves.items()):
            axes.errorbar(
                points,
                curve["mean"],
                [math.nan if value is None else value for value in curve["ci95"]],
                label=f"{LABELS.get(name, name).format(item=item)}, among {'all classes' if name in AMONG_ALL else 'those so far'}",
                linestyle="--" if name in AMONG_ALL else "-",
                **with_bars(number),
            )
        axes.set_xlabel("classes so far")
        axes.set_ylabel("accuracy on all classes so far")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False)

    return picture(draw)
