"""The figures of a report, each as PNG, as SVG, and as SVG for the page; drawn without a display."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from metarun.ops.calibration import BINS
from metarun.ops.measures import ACCURACY, MEDIAN_ERROR
from metarun.report.finished import FinishedRun
from metarun.report.grouping import Group
from metarun.report.statistics import over_episodes
from metarun.report.summary import Row, Section, apart, joint_labels, target_points
from metarun.runs.result import (
    CALIBRATION,
    TEST_AFTER_INNER_STEPS,
    TEST_CURVES,
    TEST_POINTS,
    VALIDATION_ACCURACY,
    VALIDATION_MEDIAN,
    key,
)

INK = "#010203"  # stands for the colour of the text around the figure
# Each has a contrast of at least 3 with white and with the page's dark background.
COLOURS = ("#2f7fd0", "#d9692a", "#1f9a63", "#c04fa0", "#8b6fd8", "#a8851c", "#1f97a3", "#d64a5f", "#6f9a1f", "#97694a")
MARKERS = "osD^vPX<>*"
FAINT = "#8d949e"  # lines beyond the tenth
MOST_BARS = 30
FEWEST = 10  # predictions of a point of the reliability diagram
MOST_PANELS = 8  # of the curves that methods measure
WIDE = 20.0  # the ratio of two positive values on an axis from which it is logarithmic
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "legend.frameon": False, "legend.fontsize": 9, "axes.titlelocation": "left",
}  # fmt: skip

BLACK = STYLE | {"text.color": "black", "axes.edgecolor": "black", "axes.labelcolor": "black"}  # with no text around it

Curve = Callable[[FinishedRun], tuple[np.ndarray, np.ndarray]]
Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # places, mean, lower and upper edge, each [n]
NAMES = ("learning_curves", "target_curves", "inner_steps", "test_curves", "reliability", "cost")


@dataclass(frozen=True)
class Drawing:
    """A figure in its three forms."""

    name: str  # of its files
    caption: str
    png: bytes
    svg: bytes
    inline: str  # for the page: its text in the colour around it, its ids its own


def picture(fill: Callable[[Axes], None]) -> bytes:
    """A PNG of one panel, with no text around it.

    Args:
        fill: Draws into the panel.
    """
    with mpl.rc_context(BLACK):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        fill(figure.subplots())
        whole = io.BytesIO()
        FigureCanvasAgg(figure).print_png(whole)
    return whole.getvalue()


def with_bars(number: int) -> dict[str, Any]:
    """How `Axes.errorbar` draws the line of this number."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "capsize": 2, "linewidth": 1.5, "markersize": 5}


def draw(sections: Sequence[Section]) -> list[Drawing]:
    """Those figures for which there are numbers."""
    with mpl.rc_context(STYLE):
        made = [
            _learning_curves(sections),
            _target_curves(sections),
            _inner_steps(sections),
            _test_curves(sections),
            _reliability(sections),
            _costs(sections),
        ]
        return [_drawing(*each) for each in made if each]


def _learning_curves(sections: Sequence[Section]) -> tuple[str, str, Figure] | None:
    def curve(run: FinishedRun) -> tuple[np.ndarray, np.ndarray]:
        return run.curve((VALIDATION_ACCURACY, VALIDATION_MEDIAN))

    caption = "Validation during training: the mean over seeds, and the band from the lowest to the highest seed"
    band = partial(_band, curve=curve)
    accuracy, error = "validation accuracy", "validation error (median)"
    return _lines("learning_curves", caption, sections, band, "training step", accuracy, error)


def _target_curves(sections: Sequence[Section]) -> tuple[str, str, Figure] | None:
    def band(group: Group) -> Band | None:
        found = target_points(group)
        if len(found) < 2:
            return None
        means = np.array([point.mean for point in found.values()])
        halves = np.array([math.nan if point.half is None else point.half for point in found.values()])
        return np.array(list(found)), means, means - halves, means + halves

    def dress(axes: Axes, drawn: dict[str, Band]) -> None:
        sizes = sorted({int(size) for x, *_ in drawn.values() for size in x})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(max(axes.get_ylim()[0], 0), min(axes.get_ylim()[1], 1.02))

    items = " or ".join(sorted({one.setting.items for one in sections if one.setting.target})) or "images"
    caption = (
        f"Accuracy on the target against the number of training {items}: the mean over seeds, and its 95% band over repeats or "
        f"test {items}"
    )
    across = f"training {items} of the target"
    # A setting is named after its largest training subsets, and the curve has the others too.
    named = [
        replace(one, title=re.sub(r", (\d+ training (?:images|texts))", r", up to \1", one.title, count=1))
        for one in sections
    ]
    return _lines("target_curves", caption, named, band, across, "test accuracy", "test error", dress)


def _merged(sums: dict[int, np.ndarray]) -> np.ndarray:
    """The sums of neighbouring bins `[n, 3]`, of which the first is the number of predictions, `FEWEST` at least."""
    found: list[np.ndarray] = []
    for place in sorted(sums):
        if found and found[-1][0] < FEWEST:
            found[-1] = found[-1] + sums[place]
        else:
            found.append(sums[place])
    if len(found) > 1 and found[-1][0] < FEWEST:
        found[-2:] = [found[-2] + found[-1]]
    return np.array(found)


def _reliability(sections: Sequence[Section]) -> tuple[str, str, Figure] | None:
    def band(group: Group) -> Band | None:
        sums: dict[int, np.ndarray] = {}
        for run in group.runs:
            for one in run.result.get(key(run.tested, CALIBRATION), {}).get("bins", ()):
                of_all = one["count"] * np.array([1.0, one["confidence"], one["accuracy"]])
                place = math.ceil(one["confidence"] * BINS)
                sums[place] = sums.get(place, 0.0) + of_all
        if not sums:
            return None
        counts, confidence, accuracy = _merged(sums).T
        return confidence / counts, accuracy / counts, accuracy / counts, accuracy / counts

    def dress(axes: Axes, drawn: dict[str, Band]) -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":", zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))

    caption = (
        "Reliability of the probabilities, at the temperature that a run fitted: the accuracy of predictions against their "
        f"probability, of all seeds, {FEWEST} predictions at least a point; on the dotted line they mean what they say"
    )
    return _lines("reliability", caption, sections, band, "probability of the predicted class", "accuracy", "", dress)


def _percent(value: float, place: object) -> str:
    return f"{100 * value:.4g}%"


def _inner_steps(sections: Sequence[Section]) -> tuple[str, str, Figure] | None:
    def curve(run: FinishedRun) -> tuple[np.ndarray, np.ndarray]:
        after = run.result.get(TEST_AFTER_INNER_STEPS, {})
        known = {int(step): numbers.get(ACCURACY, numbers.get(MEDIAN_ERROR)) for step, numbers in after.items()}
        finite = sorted(step for step, value in known.items() if value is not None and math.isfinite(value))
        return (np.array(finite), np.array([known[step] for step in finite])) if len(finite) > 1 else (_NONE, _NONE)

    caption = "Test result against the number of inner steps: the mean over seeds, and the band from the lowest to the highest seed"
    band = partial(_band, curve=curve)
    return _lines(
        "inner_steps", caption, sections, band, "inner steps at test time", "test accuracy", "test error (median)"
    )


_NONE = np.empty(0)


def _lines(
    name: str,
    caption: str,
    sections: Sequence[Section],
    curve: Callable[[Group], Band | None],
    across: str,
    accuracy: str,
    error: str,
    dress: Callable[[Axes, dict[str, Band]], None] | None = None,
) -> tuple[str, str, Figure] | None:
    """A panel for each setting with curves, a line for each group; the eleventh and further groups are thin and grey."""
    panels, labelled = [], joint_labels(sections)
    for section in sections:
        curves = {labelled[id(row)]: curve(row.group) for row in _ranked(section)}
        drawn = {label: band for label, band in curves.items() if band is not None}
        if drawn:
            panels.append((section, drawn))
    if not panels:
        return None
    everywhere = list(dict.fromkeys(labelled[id(row)] for section in sections for row in _ranked(section)))
    here = list(dict.fromkeys(label for _, drawn in panels for label in drawn))
    # The same colours in every figure, if they suffice.
    labels = everywhere if len(everywhere) <= len(COLOURS) else here
    figure, grid = _grid(len(panels))
    handles: dict[str, Any] = {}
    common, titles = apart([section.title for section, _ in panels])
    if len(panels) == 1:  # beside the legend there is no room for it
        common, titles = titles, [""]
    for axes, title, (section, drawn) in zip(grid, titles, panels, strict=True):
        for label, (x, mean, low, high) in reversed(drawn.items()):  # the best on top
            place = labels.index(label)
            few = place < len(COLOURS)
            colour = COLOURS[place] if few else FAINT
            marker = MARKERS[place % len(MARKERS)] if few and len(x) <= 30 else ""
            (line,) = axes.plot(x, mean, color=colour, marker=marker, markersize=4, linewidth=1.6 if few else 0.6)
            if (high > low).any():
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            handles.setdefault(label if few else "others", line)
        _dress(axes, title, section, across, accuracy, error)
        if dress is not None:
            dress(axes, drawn)
    order = [label for label in [*labels[: len(COLOURS)], "others"] if label in handles]
    figure.legend([handles[label] for label in order], [_short(label) for label in order], loc="outside right upper")
    return name, ", ".join([caption, *common]), figure


def _grid(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in two columns, and their axes, row by row."""
    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.4 * columns + 2.4, 3.2 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.set_visible(False)
    return figure, grid[:panels]


def _dress(axes: Axes, title: str, section: Section, across: str, accuracy: str, error: str) -> None:
    axes.set_title(_plain(title))
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.5)
    if section.setting.measure == ACCURACY:
        axes.set_ylabel(accuracy)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    else:
        axes.set_ylabel(error)
        bottom, top = axes.dataLim.intervaly
        if _wide(bottom, top):
            axes.set_yscale("log")


def _wide(bottom: float, top: float) -> bool:
    return bottom > 0 and top > WIDE * bottom


def _test_curves(sections: Sequence[Section]) -> tuple[str, str, Figure] | None:
    """A panel for each group and quantity, which is the word before the first underscore of its curves' names."""
    found = [
        (f"{section.title}, {row.label}", quantity, curves, _points(row.group))
        for section in sections
        for row in _ranked(section)
        for quantity, curves in _measured(row.group).items()
    ]
    if not found:
        return None
    panels = found[:MOST_PANELS]
    labels = list(dict.fromkeys(label for _, _, curves, _ in panels for label in curves))
    figure, grid = _grid(len(panels))
    handles: dict[str, Any] = {}
    common, titles = apart([title for title, _, _, _ in panels])
    for axes, title, (_, quantity, curves, (name, places)) in zip(grid, titles, panels, strict=True):
        means = np.concatenate([mean[np.isfinite(mean)] for mean, _ in curves.values()])
        bottom, top = (means.min(), means.max()) if len(means) else (0.0, 0.0)
        for label, (mean, half) in curves.items():
            place = labels.index(label)
            colour = COLOURS[place] if place < len(COLOURS) else FAINT
            x = places[: len(mean)] if places else list(range(len(mean)))
            (handles[label],) = axes.plot(x, mean, color=colour, linewidth=1.6)
            low = np.maximum(mean - half, bottom / 2) if _wide(bottom, top) else mean - half
            axes.fill_between(x, low, mean + half, color=colour, alpha=0.18, linewidth=0)
        axes.set_title(_plain(title))
        axes.set_xlabel(name)
        axes.set_ylabel(quantity)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(color=FAINT, alpha=0.3, linewidth=0.5)
        if _wide(bottom, top):
            axes.set_yscale("log")
    figure.legend([handles[label] for label in labels], [_short(label) for label in labels], loc="outside right upper")
    dropped = f" (of {len(found)} panels the first {MOST_PANELS})" if len(found) > len(panels) else ""
    caption = (
        "Curves that were measured in the test: the mean, and its 95% band over episodes (or sequences of classes)"
    )
    return "test_curves", ", ".join([caption, *common]) + dropped, figure


def _points(group: Group) -> tuple[str, list[int]]:
    """What the points of a group's curves are, and where they lie; an empty list where they are counted."""
    kept = group.runs[0].result.get(TEST_POINTS)
    return (kept["name"], list(kept["at"])) if kept else ("point of the curve", [])


def _measured(group: Group) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For each quantity its curves by name: the mean over seeds and half its 95% interval over episodes, both `[n]`.

    Several tests of the same weights are one seed, of which it is the mean.
    """
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    kept = [[(run.seed, run.result.get(TEST_CURVES, {})) for run in together] for together in group.trainings]
    for name in dict.fromkeys(name for together in kept for _, curves in together for name in curves):
        seeds = [[(seed, curves[name]) for seed, curves in together if name in curves] for together in kept]
        seeds = [together for together in seeds if together]
        tests = [(*test, 1 / len(together) / len(seeds)) for together in seeds for test in together]
        draws, shares = [seed for seed, _, _ in tests], [share for _, _, share in tests]
        length = min(len(curve["mean"]) for _, curve, _ in tests)
        means = np.array([curve["mean"][:length] for _, curve, _ in tests], dtype=float)  # null is no number
        mean = np.array(shares) @ means
        halves = zip(*(curve["ci95"][:length] for _, curve, _ in tests), strict=True)
        half = np.array([over_episodes(each, draws, shares) for each in halves], dtype=float)  # NaN where there is none
        quantity, _, rest = name.partition("_")
        found.setdefault(quantity, {})[rest or name] = (mean, half)
    return found


def _ranked(section: Section) -> list[Row]:
    """The best first, whatever the order of the table."""
    sign = 1 if section.higher_is_better else -1
    scores = {id(row): row.mean if section.setting.tested else row.validation for row in section.rows}

    def rank(row: Row) -> float:
        score = scores[id(row)]
        return math.inf if score is None else -sign * score

    return sorted(section.rows, key=rank)


def _band(group: Group, curve: Curve) -> Band | None:
    """The places, mean, lowest and highest over seeds, each `[n]`, where every seed has been; between its points, on a line.

    Several tests of the same weights are one seed, of which it is the mean.
    """
    found = [[(x, y) for x, y in map(curve, together) if len(x)] for together in group.trainings]
    trainings = [together for together in found if together]
    curves = [points for together in trainings for points in together]
    if not curves:
        return None
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = np.unique(np.concatenate([x for x, _ in curves]))
    places = places[(places >= first) & (places <= last)]
    if not len(places):
        return None
    values = np.array([np.mean([np.interp(places, x, y) for x, y in together], axis=0) for together in trainings])
    return places, values.mean(0), values.min(0), values.max(0)


def _costs(sections: Sequence[Section]) -> tuple[str, str, Figure] | None:
    """Bars of the time and the memory of each group."""
    common, titles = apart([section.title for section in sections])
    several = len(sections) > 1
    ranked = [(title, row) for title, section in zip(titles, sections, strict=True) for row in _ranked(section)]
    rows = [(title, row) for title, row in ranked if row.seconds is not None or row.memory is not None]
    if not rows:
        return None
    kept = rows[:MOST_BARS]
    names = [_short(f"{row.label}; {title}" if several else row.label, 60) for title, row in kept]
    panels = [
        ("training time (s)", "seconds of training", [row.seconds for _, row in kept], COLOURS[0]),
        (
            "peak memory (GiB)",
            "peak memory",
            [None if row.memory is None else row.memory / 2**30 for _, row in kept],
            COLOURS[1],
        ),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel[2])]
    width = 3.2 * len(panels) + 0.07 * max(map(len, names))
    figure = Figure(figsize=(width, 1.0 + 0.28 * len(kept)), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
    for axes, (heading, _, values, colour) in zip(grid, panels, strict=True):
        bars = axes.barh(range(len(kept)), [value or 0 for value in values], color=colour, height=0.7)
        axes.bar_label(bars, ["–" if value is None else f"{value:.3g}" for value in values], padding=3, color=INK)
        axes.set_title(_plain(heading))
        axes.margins(x=0.18)
        axes.set_yticks(range(len(kept)), names)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.axes[0].invert_yaxis()
    dropped = f" (of {len(rows)} groups the first {MOST_BARS})" if len(rows) > len(kept) else ""
    measured = " and ".join(what for _, what, _, _ in panels)
    caption = ", ".join([f"{measured.capitalize()} of a run: the mean over seeds", *common])
    return "cost", caption + dropped, figure


def _short(label: str, longest: int = 36) -> str:
    return _plain(label if len(label) <= longest else f"{label[: longest - 1]}…")


def _plain(text: str) -> str:
    """A text whose dollars are no marks of mathematics, as which Matplotlib takes a pair of them, for a name of a file, say."""
    return text.replace("$", r"\$")


def _drawing(name: str, caption: str, figure: Figure) -> Drawing:
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": name}):  # the same numbers give the same file
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in letters that the font has not
        figure.savefig(png, format="png", dpi=150, facecolor="white")
        figure.set_layout_engine("none")  # it is laid out by now
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(name, caption, png.getvalue(), svg.getvalue(), inline(svg.getvalue().decode(), name, caption))


def inline(svg: str, name: str, caption: str) -> str:
    """An SVG for a page: ink in the text's colour, every id marked with `name`; it shrinks to 80% and not further."""
    svg = re.sub(
        r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.S
    )
    width = float(re.findall(r' width="([\d.]+)pt"', svg)[0]) * 4 / 3  # pixels
    size = f' style="max-width: {width:.0f}px; min-width: {0.8 * width:.0f}px"'
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="|(?<=href="#)|(?<=url\(#)', lambda found: f"{found[0]}{name}-", svg)
    described = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{described}"{size}', 1)
