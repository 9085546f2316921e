"""What is shown of results on a target: the table at the end of a run, and the learning curve over its training images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from metarun.ops.measures import ACCURACY, AUROC, BALANCED_ACCURACY, MACRO_F1, overlap_of
from metarun.report.text import half, mode_text
from metarun.runs.result import (
    CONTENT,
    DATA,
    PROTOCOL,
    TARGET,
    TARGET_CHANCE,
    TARGET_CLASSES,
    TARGET_CLASSIFIER,
    TARGET_CURVE,
    TARGET_INTERVAL,
    TARGET_TEST_IMAGES,
    half_of,
    key,
    mode,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {ACCURACY: "accuracy", BALANCED_ACCURACY: "balanced accuracy", MACRO_F1: "macro F1", AUROC: "AUROC"}


def table(result: dict[str, Any], what: str) -> Table:
    """Accuracy, balanced accuracy, and macro F1 or AUROC, of each number of training images; `what` begins the title."""
    begins = key(TARGET, "")
    curve = result.get(TARGET_CURVE) or [
        {name.removeprefix(begins): value for name, value in result.items() if name.startswith(begins)}
    ]
    # Beside AUROC, which is of two classes, there is no room for macro F1.
    known = [name for name in TITLES if name in curve[0] and not (name == MACRO_F1 and AUROC in curve[0])]
    how = mode_text(mode(result, TARGET), f"test {kind(result)}")
    title = f"{what}target, {len(result[TARGET_CLASSES])} classes; norm {result[PROTOCOL]['norm']}, {how}; {result[TARGET_INTERVAL]}"
    shown = Table("", *(TITLES[name] for name in known), title=title, title_justify="left", min_width=60)
    for point in curve:
        images = f"{point['train_images']} {kind(result)}, " if "train_images" in point else ""
        own = f", over the {_over(point)}" if _over(point) != _over(curve[-1]) else ""
        shown.add_row(f"{images}{point['test_images']} to test{own}", *(_value(point, name) for name in known))
    if TARGET_CHANCE in result:
        shown.add_row("the commonest class", f"{result[TARGET_CHANCE]:.2%}", *[""] * (len(known) - 1))
    return shown


def _over(point: dict[str, Any]) -> str | None:
    """Over what the interval of a point is."""
    return "test images of one, as they agree" if point.get("agree") else point.get("over")


def kind(result: dict[str, Any]) -> str:
    """What the items of the target are called: `images` or `texts`."""
    return _called(result.get(CONTENT, {}))


def items_of_data(result: dict[str, Any]) -> str:
    """What the items of the source are called: `images` or `texts`."""
    return _called(result.get(DATA, {}))


def _called(described: dict[str, Any]) -> str:
    return "texts" if described.get("items") == "text" else "images"


def overlap(result: dict[str, Any]) -> float:
    """How far the repeats of a target test the same images, see `overlap_of`; 0 where nothing is said of how many there are."""
    images = result.get(CONTENT, {}).get("images", {})
    every = images.get("all", images.get("test"))
    return overlap_of(int(result[TARGET_TEST_IMAGES]), every) if every else 0.0


def kept(result: dict[str, Any]) -> str:
    """A line about the classifier that a run keeps, whose own accuracy is not the mean over repeats; empty where there is none."""
    found = result.get(TARGET_CLASSIFIER)
    if found is None or "repeat" not in found:
        return ""
    return (
        f"{found['file']} is that of repeat {found['repeat']} with {found['train_images']} {kind(result)}: {found[ACCURACY]:.2%} of its "
        f"{result[TARGET_TEST_IMAGES]} test {kind(result)}"
    )


def _value(point: dict[str, Any], name: str) -> str:
    if half_of(name) not in point:
        return f"{point[name]:.2%}"
    return f"{point[name]:.2%} {half(point[half_of(name)], '.2%')}"


def learning_curve(
    curves: Mapping[str, Sequence[dict[str, Any]]],
    chance: float | None = None,
    items: str = "images",
) -> bytes:
    """A PNG of the accuracy against the number of training items: a line for each of the named curves, bars the intervals."""
    from metarun.report.figures import picture, with_bars

    def draw(axes: Axes) -> None:
        sizes = sorted({point["train_images"] for curve in curves.values() for point in curve})
        for number, (name, curve) in enumerate(curves.items()):
            # Shifted a little from each other, so that no bar hides another.
            shift = 1.03 ** (number - (len(curves) - 1) / 2)
            axes.errorbar(
                [point["train_images"] * shift for point in curve],
                [point[ACCURACY] for point in curve],
                [math.nan if point.get(half_of(ACCURACY)) is None else point[half_of(ACCURACY)] for point in curve],
                label=name or None,
                **with_bars(number),
            )
        if chance is not None:
            axes.axhline(chance, color="grey", linestyle=":", label="the commonest class")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(f"training {items} of the target")
        axes.set_ylabel(TITLES[ACCURACY])
        axes.grid(alpha=0.3)
        if len(curves) > 1 or chance is not None:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return picture(draw)
