"""The figures of a report."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from reported import GENERATOR, make_run, sections, with_target
from shell import ROOT

from metarun import report
from metarun.report import figures, rendering, tables
from metarun.report.collect import collect
from metarun.report.target import learning_curve


def test_the_same_weights_have_one_colour_and_name_on_each_of_several_data_sets(tmp_path: Path) -> None:
    """A set that was trained on is tested on its held-out classes, and is another set of tasks than all of its classes."""
    classes = {"digits": ("all 10 classes", "its 2 test classes, since it is trained on too")}
    classes["glyphs"] = ("all 1472 classes", "its 289 test classes, since it is trained on too")
    task, bins = {"ways": 5, "shots": 1, "queries": 15}, [{"count": 20, "confidence": 0.5, "accuracy": 0.4}]
    for source in classes:
        protocol: dict[str, Any] = {"norm": "batch", "transductive": False, "test": task, "split": None, "sets": {}}
        found: dict[str, Any] = {"test/acc": 0.5, "test/acc_ci95": 0.1, "protocol": protocol, "test/sets": {}}
        for name, told in classes.items():
            protocol["sets"][name] = {"task": task, "classes": told[name == source]}
            found["test/sets"][name] = {"fingerprint": f"{name}{name == source}", "classes": {"test": 2}}
            found |= {f"test/{name}/acc": 0.5, f"test/{name}/acc_ci95": 0.1, f"test/{name}/calibration": {"bins": bins}}
        make_run(tmp_path / source, f"data={source}", choices={"data": source}, result=found)
    found_sections = sections(tmp_path)
    assert [section.title.rpartition(", ")[2] for section in found_sections] == [
        "all 10 classes", "its 2 test classes", "all 1472 classes", "its 289 test classes",
    ]  # fmt: skip
    assert [tables.section_table(section).headings[0] for section in found_sections] == ["trained on"] * 4
    lines = csv.DictReader(io.StringIO(rendering.as_csv(found_sections)))
    assert [(line["data"], line["trained_on"]) for line in lines] == [
        ("digits", "glyphs"), ("digits", "digits"), ("glyphs", "digits"), ("glyphs", "glyphs"),
    ]  # fmt: skip
    made = figures._reliability(found_sections)
    assert made is not None
    assert [text.get_text() for text in made[2].legends[0].get_texts()] == ["glyphs", "digits"]
    drawn = [axes.lines[0].get_color() for axes in made[2].axes]
    assert drawn == [figures.COLOURS[at] for at in (0, 1, 1, 0)]


def test_a_name_in_a_figure_is_of_the_same_settings_in_each_panel(tmp_path: Path) -> None:
    for shots, steps in ((1, 10), (5, 10), (5, 50)):
        words, config = [f"train.steps={steps}"], {"train": {"steps": steps}}
        make_run(tmp_path / f"{shots}{steps}", *words, scores=[0.5, 1], shots=shots, config=config, curve=[0.1, 0.2])
    made = figures._learning_curves(sections(tmp_path))
    assert made is not None
    assert sorted(text.get_text() for text in made[2].legends[0].get_texts()) == ["steps 10", "steps 50"]


def test_a_reliability_diagram_has_points_of_enough_predictions(tmp_path: Path) -> None:
    bins = [
        {"count": count, "confidence": n / 15 - 0.01, "accuracy": n / 20}
        for n, count in ((5, 6), (9, 6), (15, 30), (3, 2))
    ]
    merged = figures._merged({n: np.array([each["count"], 0.0, 0.0]) for n, each in enumerate(bins)})
    assert merged[:, 0].tolist() == [12, 32]
    assert figures._merged({3: np.array([2.0, 1, 1])}).tolist() == [[2, 1, 1]]
    with_target(tmp_path / "target", "maml", 0.5, **{"target/calibration": {"bins": bins}})
    make_run(tmp_path / "test" / "maml", "algo=maml", scores=[0.5, 1], result={"test/calibration": {"bins": bins}})
    for name in ("target", "test"):
        assert "reliability" in {drawing.name for drawing in figures.draw(sections(tmp_path / name))}


def test_line_colours_are_seen_on_both_grounds() -> None:
    """WCAG's contrast of at least 3 with white and with the dark ground of the page."""

    def luminance(colour: str) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
        return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))

    grounds = re.findall(r"--ground: (#\w+)", (ROOT / "metarun" / "report" / "style.html").read_text())
    assert len(grounds) == 2
    for colour in figures.COLOURS:
        for ground in grounds:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)
    assert len(set(figures.COLOURS)) == len(figures.MARKERS) == 10


def test_band_of_curves(tmp_path: Path) -> None:
    """The mean, lowest and highest of two seeds, of which one began later, stopped earlier and validated at other steps."""
    for seed, points in enumerate(({10: 0.2, 20: 0.4, 30: 0.6}, {15: 0.4, 20: 0.8})):
        folder = make_run(tmp_path / str(seed), seed=seed)
        lines = [json.dumps({"step": step, "val/acc": value, "train/loss": 1.0}) for step, value in points.items()]
        (folder / "metrics.jsonl").write_text(
            "\n".join([*lines, '{"step": 40, "val/acc": NaN}', '{"step": 50, "val/a'])
        )
    (group,) = collect([tmp_path], tmp_path / "report").groups
    band = figures._band(group, lambda run: run.curve(("val/acc",)))
    assert band is not None
    np.testing.assert_allclose(band, [[15, 20], [0.35, 0.6], [0.3, 0.4], [0.4, 0.8]])


def test_the_curve_of_regression_is_named_after_what_it_is_of(tmp_path: Path) -> None:
    make_run(tmp_path / "run", measure="mse", scores=[1.0, 2.0], curve=[0.3, 0.2])  # of `val/mse_median`
    made = figures._learning_curves(sections(tmp_path))
    assert made is not None
    assert made[2].axes[0].get_ylabel() == "validation error (median)"


def test_many_groups_keep_a_short_legend(tmp_path: Path) -> None:
    for number in range(14):
        config = {"algo": {"inner_lr": number}}
        make_run(tmp_path / str(number), f"algo.inner_lr={number}", scores=[0.5, 1], config=config, curve=[0.1, 0.2])
    made = figures._learning_curves(sections(tmp_path))
    assert made is not None
    shown = [text.get_text() for text in made[2].legends[0].get_texts()]
    assert len(shown) == 11
    assert shown[-1] == "others"
    assert len(made[2].axes[0].lines) == 14


def with_curves(folder: Path, *words: str, factor: float = 1.0, **options: Any) -> Path:
    """A tested run whose method measured two losses, of which one spans much, and an entropy."""
    curves = {
        "loss_learned": {"mean": [2.0 * factor, 0.2 * factor, 0.02 * factor], "ci95": [0.3, 0.1, 0.04]},
        "loss_sgd": {"mean": [2.0 * factor, 1.5 * factor, 1.0 * factor], "ci95": [0.3, 0.2, 0.1]},
        "entropy": {"mean": [1.0, math.nan, 3.0], "ci95": [0.1, math.nan, 0.1]},
    }
    return make_run(folder, *words, scores=[0.5, 1], result={"test/curves": curves}, **options)


def test_curves_of_a_method_have_a_panel_for_each_quantity(tmp_path: Path) -> None:
    """Lines and bands are those of result.json; the mean over two seeds, whose errors are independent."""
    for seed in (0, 1):
        with_curves(tmp_path / f"a{seed}", "algo=one", seed=seed, factor=1 + seed, choices={"algo": "one"})
    with_curves(tmp_path / "b", "algo=two", choices={"algo": "two"})
    make_run(tmp_path / "none", "algo=three", scores=[0.5, 1], choices={"algo": "three"})
    made = figures._test_curves(sections(tmp_path))
    assert made is not None
    panels = [axes for axes in made[2].axes if axes.get_visible()]
    assert [(axes.get_title(), axes.get_ylabel(), axes.get_yscale()) for axes in panels] == [
        ("one", "loss", "log"), ("one", "entropy", "linear"), ("two", "loss", "log"), ("two", "entropy", "linear"),
    ]  # fmt: skip
    assert [text.get_text() for text in made[2].legends[0].get_texts()] == ["learned", "sgd", "entropy"]
    learned, sgd = panels[0].lines
    np.testing.assert_allclose(learned.get_ydata(), [3, 0.3, 0.03])
    np.testing.assert_allclose(sgd.get_ydata(), [3, 2.25, 1.5])
    assert learned.get_color() == panels[2].lines[0].get_color() != sgd.get_color()
    band = panels[0].collections[1].get_paths()[0].vertices  # of sgd
    half = np.array([0.3, 0.2, 0.1]) / math.sqrt(2)
    for x in range(3):
        for edge in (sgd.get_ydata()[x] - half[x], sgd.get_ydata()[x] + half[x]):
            assert np.isclose(band[band[:, 0] == x][:, 1], edge).any()
    assert panels[0].get_ylim()[0] > 0


def test_curves_are_in_the_report_of_runs_that_have_them(tmp_path: Path) -> None:
    for number in range(9):
        config = {"algo": {"inner_lr": number}}
        with_curves(tmp_path / str(number), f"algo.inner_lr={number}", config=config)
    found = report.write([tmp_path], tmp_path / "report", "curves")
    assert found is not None
    assert "of 18 panels the first 8" in found.read_text()
    with Image.open(found.parent / "test_curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_the_line_of_the_commonest_class_is_named_beside_a_single_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[list[str]] = []
    monkeypatch.setattr(Axes, "legend", lambda axes, **place: named.append(axes.get_legend_handles_labels()[1]))
    points = [{"train_images": size, "acc": size / 20, "acc_ci95": 0.1} for size in (5, 10)]
    for chance in (None, 0.3):
        assert learning_curve({"": points}, chance=chance)
    assert named == [["the commonest class"]]


def test_files_of_figures(written: Path) -> None:
    for kind in ("png", "svg"):
        assert {path.stem for path in written.glob(f"*.{kind}")} == {"cost", "inner_steps", "learning_curves"}
    for path in written.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 250
            assert np.asarray(picture.convert("L")).std() > 5
    for path in written.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("}svg")
        assert not list(root.iter("{http://www.w3.org/2000/svg}text"))  # paths: they need no font


def test_a_pair_of_dollars_in_a_name_is_no_mathematics(tmp_path: Path) -> None:
    for name in ("a_$x^{2$", "b_$x^{2$"):
        weights = {"backbone": {"weights": name}}
        words = [f"backbone.weights={name}"]
        make_run(tmp_path / name[0], *words, scores=GENERATOR.random(5), curve=[0.1, 0.2], config=weights)
    assert figures.draw(sections(tmp_path))


def test_names_in_letters_that_the_font_lacks_are_drawn_without_a_warning() -> None:
    figure = Figure()
    figure.suptitle("日本")
    assert figures._drawing("a", "", figure).svg
