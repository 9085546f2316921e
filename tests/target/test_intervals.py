"""What an interval is over, that it is never of no width, and how a target's images are divided from repeat to repeat."""

from __future__ import annotations

import csv
import itertools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import hardware, toy_images
from PIL import Image
from scipy import stats
from shell import make_images, metarun, result

from metarun.config import TargetSettings as Settings
from metarun.core import Batch
from metarun.data.image_batches import Labelled
from metarun.data.image_source import ImageSource
from metarun.ops import metrics
from metarun.ops.measures import overlap_of
from metarun.report import statistics
from metarun.report.text import half
from metarun.runs.logger import RunLogger
from metarun.target import predictions
from metarun.target.base import TargetClassifier, TargetMethod
from metarun.target.predictions import Predicted
from metarun.target.target import Target

SOURCE = toy_images(classes=3, per_class=20)
SHARED = ", corrected for the images that they share"


def with_parts(train: int, test: int) -> ImageSource:
    """The same images in parts of their own."""
    source = toy_images(classes=3, per_class=20)
    source.table.metadata["parts"] = {"train": [train] * 3, "val": [20 - train - test] * 3, "test": [test] * 3}
    return source


class Sure(TargetClassifier):
    """Right of a share of the images, by a rule of the image."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.double().mean((1, 2, 3))
        return torch.stack([means * 0, (means * 1e4 % 1 >= self.wrong) * 1.0, means * 0], dim=1)


class Rule(TargetMethod):
    """Learns nothing, and draws a number that it does not use unless it `draws` none."""

    def __init__(self, wrong: float = 0.0, *, draws: bool = True) -> None:
        self.wrong, self.draws = wrong, draws

    def fit(self, train: Batch, classes: int) -> Sure:
        torch.rand(int(self.draws))
        return Sure(self.wrong)

    restore = None  # type: ignore[assignment]


def measured(source: ImageSource, folder: Path, rule: TargetMethod | None = None, **settings: Any) -> dict[str, Any]:
    return Target(source, Settings(**settings)).measure(
        rule or Rule(0.5), 0, hardware(), folder / "target", RunLogger(None)
    )


# Division


@pytest.mark.parametrize("own", [True, False])
def test_copies_of_training_images_among_the_test_images_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    """Of each repeat, by a comparison of all pixels; a blank image is no copy."""
    source = with_parts(10, 5) if own else toy_images(classes=3, per_class=20)
    images = source.table.images
    images[[15, 16, 35]] = images[[0, 1, 2]]  # of another class too
    images[[3, 17]] = 7
    with caplog.at_level("WARNING", "metarun"):
        told = measured(source, tmp_path, repeats=4)["target/copied_test_images"]
    expected = []
    for repeat in range(4):
        known, asked = (images[part.rows] for part in Target(source, Settings()).subset(None, repeat))
        same = (known[None] == asked[:, None]).all((2, 3, 4)).any(1)
        expected.append(int((same & (asked != 7).any((1, 2, 3))).sum()))
    assert told == expected
    assert max(told) > 0
    (said,) = [record.getMessage() for record in caplog.records]
    counts = "3" if own else f"{min(told)} to {max(told)}"
    assert said.startswith(
        f"target: {counts} of its {15 if own else 12} test images are copies of training images, with"
    )


def test_nothing_is_said_where_no_test_image_is_a_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "metarun"):
        assert measured(SOURCE, tmp_path, repeats=2)["target/copied_test_images"] == [0, 0]
    assert not caplog.records


def test_images_without_a_test_part_are_divided_anew_in_each_repeat() -> None:
    target = Target(SOURCE, Settings())
    tests = []
    for repeat in range(10):
        train, test = target.subset(None, repeat)
        assert not set(train.rows) & set(test.rows)
        assert sorted([*train.rows, *test.rows]) == list(range(60))
        assert train.counts.tolist() == [16] * 3
        assert test.counts.tolist() == [4] * 3
        assert [list(part.rows) for part in target.subset(None, repeat)] == [list(train.rows), list(test.rows)]
        tests.append(set(test.rows))
    assert all(one != other for one, other in itertools.combinations(tests, 2))
    assert len(set.union(*tests)) > 45
    other = Target(SOURCE, Settings(subset_seed=1))
    assert set(other.subset(None, 0)[1].rows) != tests[0]


def test_smaller_subsets_lie_in_larger_ones_and_never_among_the_test_images() -> None:
    target = Target(SOURCE, Settings(train_images=[3, 10, 30], test_images=6))
    for repeat in range(4):
        parts = [target.subset(size, repeat) for size in target.sizes]
        for (small, test), (large, again) in itertools.pairwise(parts):
            assert set(small.rows) < set(large.rows)
            assert list(test.rows) == list(again.rows)
            assert not set(large.rows) & set(test.rows)


def test_a_test_part_of_its_own_stays() -> None:
    target = Target(with_parts(12, 5), Settings(train_images=9))
    tests = [list(target.subset(9, repeat)[1].rows) for repeat in range(5)]
    assert all(test == tests[0] for test in tests)
    assert tests[0] == list(target.test.rows)
    assert len({tuple(target.subset(9, repeat)[0].rows) for repeat in range(5)}) == 5


def test_all_rotations_of_an_image_are_on_one_side() -> None:
    target = Target(toy_images(classes=2, per_class=10, rotations=True), Settings())
    assert len(target.names) == 8
    for repeat in range(5):
        train, test = target.subset(None, repeat)
        assert not set(train.rows) & set(test.rows)
        assert len(train) + len(test) == 80


# What varied


@pytest.mark.parametrize(
    ("parts", "settings", "over", "said"),
    [
        (
            False,
            {},
            "repeats",
            f"95%, over 4 repeats (division into training and test images, draws), Student's t{SHARED}",
        ),
        (
            False,
            {"train_images": 9},
            "repeats",
            f"95%, over 4 repeats (division into training and test images, training subset, draws), Student's t{SHARED}",
        ),
        (
            False,
            {"train_images": 9, "test_images": 6},
            "repeats",
            f"95%, over 4 repeats (division into training and test images, training subset, test subset, draws), Student's t{SHARED}",
        ),
        (True, {}, "test images", "95%, over the 15 test images, Wilson; 4 repeats (draws) have the same images"),
        (
            True,
            {"train_images": 36},
            "test images",
            "95%, over the 15 test images, Wilson; 4 repeats (draws) have the same images",
        ),
        (
            True,
            {"test_images": 6},
            "repeats",
            f"95%, over 4 repeats (test subset, draws), Student's t{SHARED}",
        ),
        (False, {"repeats": 1}, "test images", "95%, over the 12 test images, Wilson"),
    ],
)
def test_the_interval_says_over_what_it_is(
    parts: bool, settings: dict[str, Any], over: str, said: str, tmp_path: Path
) -> None:
    found = measured(with_parts(12, 5) if parts else SOURCE, tmp_path, **{"repeats": 4, **settings})
    assert found["target/interval"] == said
    assert found["target/over"] == over
    assert found["target/acc_ci95"] > 0
    accuracies = [json.loads(path.read_text())["acc"] for path in (tmp_path / "target").iterdir()]
    if over == "repeats":
        pool, tested = (15 if parts else 60), found["target/test_images"]
        shared = tested / (pool - tested) if tested < pool else 0
        expected = stats.t.ppf(0.975, 3) * stats.sem(accuracies) * np.sqrt(1 + 4 * shared)
        assert found["target/acc_ci95"] == pytest.approx(expected)
    else:
        low, high = stats.binomtest(
            round(found["target/acc"] * found["target/test_images"]), found["target/test_images"]
        ).proportion_ci(method="wilson")
        mean = found["target/acc"]
        assert found["target/acc_ci95"] == pytest.approx(max(high - mean, mean - low), rel=1e-4)
        scores = np.load(tmp_path / "test_scores.npz")
        assert scores["right"].shape == (found["target/test_images"],)
        assert scores["right"].mean() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("parts", "settings", "said"),
    [
        (True, {}, "95%, over the 15 test images, Wilson; 4 repeats are one"),
        (True, {"repeats": 1}, "95%, over the 15 test images, Wilson"),
        (
            True,
            {"test_images": 6},
            f"95%, over 4 repeats (test subset), Student's t{SHARED}",
        ),
        (
            False,
            {},
            f"95%, over 4 repeats (division into training and test images), Student's t{SHARED}",
        ),
    ],
)
def test_draws_are_named_where_a_way_draws(parts: bool, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = with_parts(12, 5) if parts else SOURCE
    found = measured(source, tmp_path, Rule(0.5, draws=False), **{"repeats": 4, **settings})
    assert found["target/interval"] == said
    assert found["target/drawn"] is False


def test_on_the_same_test_images_other_training_subsets_vary(tmp_path: Path) -> None:
    class Drawn(Rule):
        def fit(self, train: Batch, classes: int) -> Sure:
            return Sure(float(torch.rand(())))

    found = measured(with_parts(12, 5), tmp_path, Drawn(), train_images=9, repeats=4)
    assert (
        found["target/interval"]
        == "95%, over 4 repeats (training subset, draws) on the same 15 test images, Student's t"
    )


def test_repeats_that_agree_have_the_interval_of_their_test_images(tmp_path: Path) -> None:
    found = measured(SOURCE, tmp_path, Rule(0.0), repeats=2)  # all images are of class 1: a third is right in each
    assert found["target/acc"] == pytest.approx(1 / 3)
    assert (
        found["target/interval"]
        == "95%, 2 repeats (division into training and test images, draws) agree: over the 12 test images of one, Wilson"
    )
    low, high = metrics.wilson(1 / 3, 12)
    assert found["target/acc_ci95"] == pytest.approx(max(high - 1 / 3, 1 / 3 - low))
    assert found["target/over"] == "repeats"  # which other methods are paired with


def test_every_point_of_a_curve_is_over_what_varied_there(tmp_path: Path) -> None:
    found = measured(with_parts(12, 5), tmp_path, train_images=[9, 36], repeats=3)
    assert [point["over"] for point in found["target/curve"]] == ["repeats", "test images"]
    assert all(point["acc_ci95"] > 0 for point in found["target/curve"])


# Predictions


def test_each_prediction_is_in_a_table(tmp_path: Path) -> None:
    found = measured(SOURCE, tmp_path, repeats=3, train_images=[4, 9])
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert found["target/predictions"] == {"file": "predictions.csv", "train_images": 9, "repeats": 3}
    assert len(rows) == 3 * 12
    assert np.mean([row["truth"] == row["prediction"] for row in rows]) == pytest.approx(found["target/acc"])
    assert [row["right"] == "1" for row in rows] == [row["truth"] == row["prediction"] for row in rows]
    for row in rows:
        assert row["file"].rpartition("/")[0] == row["truth"]
        shares = [float(row[f"probability of class {number}"]) for number in range(3)]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    first = Target(SOURCE, Settings(train_images=9)).subset(9, 0)[1]
    expected = [f"class {row // 20}/{row % 20}" for row in first.rows]
    assert [row["file"] for row in rows if row["repeat"] == "0"] == expected


def test_a_run_that_is_taken_up_again_has_the_same_table(tmp_path: Path) -> None:
    measured(SOURCE, tmp_path, repeats=3)
    whole = (tmp_path / "predictions.csv").read_bytes()
    for name in ("target/all-1.json", "predictions/all-2.npz", "predictions.csv"):
        (tmp_path / name).unlink()
    measured(SOURCE, tmp_path, repeats=3)
    assert (tmp_path / "predictions.csv").read_bytes() == whole


def test_seconds_are_those_of_all_sittings(tmp_path: Path) -> None:
    first = measured(SOURCE, tmp_path, repeats=3)["target/seconds"]
    assert first > 0
    assert measured(SOURCE, tmp_path, repeats=3)["target/seconds"] == first  # all repeats are there already


@pytest.mark.parametrize(("transductive", "sizes"), [(False, [4, 4, 4]), (True, [12])])
def test_images_are_scored_together_only_where_they_depend_on_each_other(
    transductive: bool, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watched(Sure):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images)

    class Way(Rule):
        def fit(self, train: Batch, classes: int) -> Sure:
            found = Watched(self.wrong)
            found.transductive = transductive
            return found

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = measured(SOURCE, tmp_path / "whole", repeats=1)
    monkeypatch.setattr("metarun.target.target.IMAGES_AT_ONCE", 5)
    found = measured(SOURCE, tmp_path / "parts", Way(0.5), repeats=1)
    assert seen == sizes
    assert found["target/confusion"] == whole["target/confusion"]


# Mathematics


def test_repeats_that_test_the_same_images_are_not_independent() -> None:
    """Of 60 images each repeat tests 12: the interval covers the true accuracy as often as it says, and two equal classifiers agree."""
    draw, covered, told_apart = np.random.default_rng(0), 0, 0
    shared = overlap_of(12, 60)
    for _ in range(1000):
        right = draw.random((2, 60)) < 0.7
        tests = np.argsort(draw.random((10, 60)), axis=1)[:, :12]
        repeats = [
            {
                "train_images": 48,
                "test_images": 12,
                "acc": float(right[0, each].mean()),
                "confusion": [[int(right[0, each].sum()), int((~right[0, each]).sum())], [0, 0]],
            }
            for each in tests
        ]
        found = metrics.over_repeats(repeats, overlap=shared)
        covered += abs(found["acc"] - 0.7) <= (found["acc_ci95"] or 0)
        pairs = statistics.paired(right[0, tests].mean(1) - right[1, tests].mean(1), shared)
        told_apart += pairs is not None and pairs.p < 0.05
    assert 920 < covered < 980  # 730 where they are taken for independent
    assert told_apart < 80  # 250


@pytest.mark.parametrize("n", [1, 2, 7, 400])
def test_wilson_is_scipys_and_never_of_no_width(n: int) -> None:
    for successes in {0, n // 3, n}:
        low, high = stats.binomtest(successes, n).proportion_ci(method="wilson")
        found = metrics.wilson(successes / n, n)
        assert found == pytest.approx((low, high), rel=1e-3, abs=1e-4)
        assert metrics.reach(successes / n, found) > 0


def test_of_one_class_more_or_less_balanced_accuracy_covers_the_truth() -> None:
    """Recalls 0.9 of 30 images and 0.6 of 200: 19 intervals in 20 hold their mean."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(2000):
        one, other = draw.binomial(30, 0.9), draw.binomial(200, 0.6)
        confusion = np.array([[one, 30 - one], [200 - other, other]])
        half = metrics.over_images(confusion)["balanced_acc"]
        assert half is not None
        held += abs((one / 30 + other / 200) / 2 - 0.75) <= half
    assert 0.94 < held / 2000 < 0.99


def test_the_interval_of_macro_f1_is_that_of_its_draws() -> None:
    """Counts of four classes, one of them never there and never predicted: the deviation is that from draw to draw."""
    draw = np.random.default_rng(0)
    shares = np.zeros((4, 4))
    shares[:3, :3] = [[0.3, 0.1, 0.02], [0.05, 0.2, 0.03], [0.1, 0.05, 0.15]]
    counts = draw.multinomial(400, shares.ravel(), 2000).reshape(-1, 4, 4)
    values, halves = zip(*(metrics.macro_f1(one) for one in counts), strict=True)
    assert np.mean(halves) == pytest.approx(1.96 * np.std(values), rel=0.05)
    right = 2 * np.diag(shares)[:3] / (shares.sum(0) + shares.sum(1))[:3]
    assert np.mean(values) == pytest.approx(right.mean(), abs=0.005)
    assert metrics.macro_f1(np.diag([3, 4])) == (1.0, None)


def test_the_interval_of_an_auroc_is_that_of_its_draws() -> None:
    """Two Gaussians that are one apart: the interval's deviation is that of the AUROC from draw to draw."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(400):
        positive, negative = draw.normal(1, 1, 40), draw.normal(0, 1, 60)
        found.append((positive[:, None] > negative).mean())
    half = metrics.over_images(np.array([[40, 20], [10, 30]]), float(np.mean(found)))["auroc"]
    assert half == pytest.approx(1.96 * np.std(found), rel=0.1)
    assert metrics.over_images(np.array([[60, 0], [0, 40]]), 1.0)["auroc"] is None


@pytest.mark.parametrize("sizes", [(10, 90), (90, 10)])
def test_the_interval_of_an_auroc_is_as_wide_whichever_class_is_the_rare_one(sizes: tuple[int, int]) -> None:
    draw, (negatives, positives) = np.random.default_rng(0), sizes
    found = [(draw.normal(2, 1, positives)[:, None] > draw.normal(0, 1, negatives)).mean() for _ in range(1000)]
    half = metrics.over_images(np.diag(sizes), float(np.mean(found)))["auroc"]
    assert half == pytest.approx(1.96 * np.std(found), rel=0.15)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [2, 600])
def test_equal_accuracies_have_the_widest_interval_that_they_could(n: int, value: float) -> None:
    mean, ci95 = metrics.interval(torch.full((n,), value), shares=True)
    assert mean == pytest.approx(value)
    assert ci95 == pytest.approx(metrics.reach(value, metrics.wilson(value, n)))
    assert ci95 > 0


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7], [2.0] * 50])
def test_too_few_for_an_interval_is_said(values: list[float]) -> None:
    assert metrics.interval(torch.tensor(values))[1] is None
    assert statistics.over_seeds(values) is None
    assert half(None, ".2%") == "(too few for an interval)"
    assert half(0.012, ".2%") == "± 1.20%"


def test_seeds_without_an_interval_have_none_together() -> None:
    assert statistics.over_episodes([0.1, None]) is None
    assert statistics.over_episodes([0.3, 0.4]) == pytest.approx(0.25)


# From the shell


def photos(root: Path) -> Path:
    draw = np.random.default_rng(0)
    for number in range(2):
        folder = root / f"kind{number}"
        folder.mkdir(parents=True)
        for image in range(20):
            pixels = (draw.integers(0, 120, (16, 16, 3)) + 60 * number).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"photo, {image}.png")
    return root


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_ones_own_photos(norm: str, tmp_path: Path) -> None:
    """The command of the README, with its defaults."""
    images, target = make_images(tmp_path / "source"), photos(tmp_path / "photos")
    outcome = metarun(
        "recipe=transfer", "data=folder", f"data.root={images}", "data.image_size=16", "backbone.channels=4", "task.ways=3",
        "task.queries=2", "train.steps=2", "train.tasks_per_step=4", "train.validate_episodes=4", "target=folder",
        f"target.data.root={target}", "target.data.image_size=16", "transfer=nearest_centroid", f"backbone.norm={norm}",
        f"outputs={tmp_path / 'out'}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("result.json")}
    found = result(folder)
    assert found["target/test_images"] == 8
    assert found["target/acc_ci95"] > 0
    assert "division into training and test images" in " ".join(outcome.out.split())
    assert "± 0.00%" not in outcome.out
    assert found["protocol"]["transductive"] is False
    assert found["protocol"]["labelled_images"] == {
        "batch": "those of up to 256 training images, kept for every test image",
        "running": "running averages of the training",
    }[norm]  # fmt: skip
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 * 8
    assert all((target / row["file"]).is_file() for row in rows)
    assert all(row["file"].startswith(row["truth"] + "/") for row in rows)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_domain_adaptation_is_inductive_with_any_norm(norm: str, tmp_path: Path) -> None:
    target = photos(tmp_path / "photos")
    outcome = metarun(
        "recipe=domain_adaptation", "algo=baseline", "data=folder", f"data.root={target}", "data.image_size=16", "backbone.channels=4",
        "train.steps=4", "train.tasks_per_step=8", "train.validate_every=2", "target=folder", f"target.data.root={target}",
        "target.data.image_size=16", f"backbone.norm={norm}", f"outputs={tmp_path / 'out'}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("result.json")}
    found = result(folder)
    assert found["protocol"]["transductive"] is False
    assert found["protocol"]["labelled_images"].startswith("those of up to 256 training images")
    assert found["target/interval"] == "95%, over the 4 test images, Wilson"
    assert found["target/acc_ci95"] > 0
    with open(folder / "predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_the_probabilities_of_a_repeat_are_let_go_before_the_next_but_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, held = list[weakref.ref[np.ndarray]](), list[int]()
    images = Labelled(np.arange(4), np.zeros(4, np.int64), np.array([0, 1, 0, 1]), ["a", "b"], toy_images().reader)

    def repeats(folder: Path) -> Iterator[Predicted]:
        for repeat in range(6):
            shares = np.full((4, 2), 0.5)
            known.append(weakref.ref(shares))
            held.append(sum(one() is not None for one in known))
            yield Predicted(repeat, 2, images, np.array([0, 1, repeat % 2, 1]), shares)

    monkeypatch.setattr(predictions, "LIMIT", 8)  # two repeats
    target: Any = SimpleNamespace(_predictions=repeats)
    point = {"over": "test images", "train_images": 2}
    told = Target._keep_predictions(target, tmp_path, point, [[0.75] * 6], "test_scores.npz")
    assert told["target/predictions"]["repeats"] == 2
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 2 * 4
    assert np.load(tmp_path / "test_scores.npz")["right"].tolist() == [1, 1, 0.5, 1]
    assert len(held) == 6
    assert max(held) == 2
