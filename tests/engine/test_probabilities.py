"""Queries of classes that are in no support set, and calibration on episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build, compose, episodes, hardware, toy_images
from scipy.special import log_softmax, logsumexp
from shell import done, make_images, metarun, result
from sklearn.metrics import roc_auc_score

import metarun as metarun_api
from metarun.core import Episodes, TaskShape
from metarun.engine.probabilities import KNOWN, UNKNOWN, known_and_unknown, tell_apart, with_unknown
from metarun.ops.certainty import auroc, certainties, tells, threshold
from metarun.runs import contents

SMALL = [
    "algo=protonet",
    "data=folder",
    "data.image_size=16",
    "backbone.channels=4",
    "task.ways=2",
    "task.queries=3",
    "train.steps=2",
    "train.validate_every=2",
    "train.validate_episodes=6",
    "test.episodes=8",
    "test.baseline_episodes=0",
]


def test_auroc_counts_ties_half() -> None:
    draw = np.random.default_rng(0)
    known, unknown = draw.integers(0, 5, 50) + 0.5, draw.integers(0, 4, 40) + 0.5
    expected = roc_auc_score([1] * 50 + [0] * 40, np.concatenate([known, unknown]))
    assert auroc(known, unknown) == pytest.approx(expected, rel=1e-12)
    assert auroc(known, known) == 0.5


@pytest.mark.parametrize("n", [1, 19, 20, 21, 1000])
def test_a_threshold_keeps_its_share_and_no_higher_one_does(n: int) -> None:
    known = np.random.default_rng(n).normal(size=n)
    found = threshold(known)
    assert (known >= found).mean() >= 0.95
    higher = known[known > found]
    assert not len(higher) or (known >= higher.min()).mean() < 0.95


NOTHING = [[np.nan, 1, 2], [np.inf, 0, 0], [-np.inf] * 3]


def test_a_prediction_that_says_nothing_is_the_least_certain() -> None:
    scores = np.concatenate([NOTHING, np.random.default_rng(0).normal(size=(20, 3))])
    near = -np.arange(23.0)
    near[5] = np.nan
    with np.errstate(invalid="ignore"):
        found = certainties(scores, log_softmax(scores, axis=1), near)
    assert set(found) == {"max_probability", "energy", "prototype_distance"}
    for name, values in found.items():
        silent = [0, 1, 2, 5] if name == "prototype_distance" else [0, 1, 2]
        assert np.flatnonzero(np.isneginf(values)).tolist() == silent
        assert np.isfinite(np.delete(values, silent)).all()
    energies = found["energy"]
    assert tells(energies)
    assert not tells(energies[:3])
    assert not tells(np.append(np.zeros(4), energies[:3]))
    # Against the ranks of numbers below all others.
    known, unknown = energies[:12], energies[[0, 2, *range(12, 23)]]
    ranks = np.nan_to_num(np.concatenate([known, unknown]), neginf=-1e3)
    assert auroc(known, unknown) == pytest.approx(roc_auc_score([1] * 12 + [0] * 13, ranks), rel=1e-12)


@pytest.mark.parametrize(("silent", "kept"), [(5, True), (6, False)])
def test_a_threshold_that_keeps_enough_of_the_known_needs_so_many_that_say_something(silent: int, kept: bool) -> None:
    known, unknown = np.arange(100.0), np.arange(-50.0, 50)
    known[:silent] = unknown[:7] = -np.inf
    side = {"max_probability": known}, {"max_probability": unknown}
    told = tell_apart(side, side)
    found = told["certainties"]["max_probability"]
    if kept:
        assert (told["certainty"], told["thresholds"]) == ("max_probability", {"max_probability": 5.0})
        assert (found["known_kept"], found["fpr_at_95_tpr"], found["threshold"]) == (0.95, 0.45, 5.0)
    else:  # any number would keep 94 of them
        assert (told["certainty"], told["thresholds"]) == (None, {})
        assert (found["known_kept"], found["unknown_kept"], found["fpr_at_95_tpr"]) == (1, 1, 1)
        assert found["threshold"] is None
    assert found["auroc"] == auroc(known, unknown)


def test_queries_that_a_method_says_nothing_of_are_the_least_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_images()
    algorithm = build(compose("algo=protonet", "backbone.channels=8"), source)
    whole = source.sampler("val", TaskShape(5, 2, 3), 0, torch.device("cpu"))
    given = algorithm, whole, 4, TaskShape(3, 2, 3), 2, None, hardware()
    before = known_and_unknown(*given)
    predict = algorithm.predict

    def diverging(tasks: Episodes) -> torch.Tensor:
        found = predict(tasks)
        found[:, 0] = torch.nan  # a known query of each task
        found[:, -1, 1] = torch.inf  # and an unknown one
        return found

    monkeypatch.setattr(algorithm, "predict", diverging)
    for side, place, old in zip(known_and_unknown(*given), (0, -1), before, strict=True):
        assert set(side) == set(old) == {"max_probability", "energy", "prototype_distance"}
        for name, values in side.items():
            tasks, plain = values.reshape(4, -1), old[name].reshape(4, -1).copy()
            plain[:, place] = -np.inf
            np.testing.assert_array_equal(tasks, plain)


def test_unknown_queries_come_last_and_their_support_images_are_left_out() -> None:
    drawn = episodes(toy_images(), TaskShape(5, 2, 3), 2)
    found, kinds = with_unknown(drawn, 2)
    assert kinds.tolist() == [[KNOWN] * 9 + [UNKNOWN] * 6] * 2
    assert found.ways == 3
    torch.testing.assert_close(found.support_x, drawn.support_x[:, :6])
    torch.testing.assert_close(found.query_x, drawn.query_x)
    assert found.query_y[:, :9].tolist() == drawn.query_y[:, :9].tolist()
    assert int(found.query_y.max()) == 2


def test_certainties_tell_classes_that_are_easily_told() -> None:
    source = toy_images()
    algorithm = build(compose("algo=protonet", "backbone.channels=8"), source)
    sides = [
        known_and_unknown(
            algorithm, source.sampler(split, TaskShape(5, 5, 5), 0, torch.device("cpu")), 6, TaskShape(3, 5, 5), 2, None, hardware()
        )
        for split in ("val", "test")
    ]  # fmt: skip
    known, unknown = sides[1]
    assert {len(values) for values in known.values()} == {6 * 3 * 5}
    assert {len(values) for values in unknown.values()} == {6 * 2 * 5}
    found = tell_apart(*sides)
    assert found["certainties"]["prototype_distance"]["auroc"] > 0.8
    assert set(found["thresholds"]) == {"max_probability", "energy", "prototype_distance"}
    measured = {name: one["auroc"] for name, one in tell_apart(sides[0], sides[0])["certainties"].items()}
    assert measured[found["certainty"]] == max(measured.values())
    for one in found["certainties"].values():
        assert 0 <= one["fpr_at_95_tpr"] <= 1


def test_energy_of_log_probabilities_is_no_certainty() -> None:
    source = toy_images()
    algorithm = build(compose("algo=rfs_ensemble", "backbone.channels=8"), source)
    whole = source.sampler("val", TaskShape(5, 2, 3), 0, torch.device("cpu"))
    side = known_and_unknown(algorithm, whole, 4, TaskShape(3, 2, 3), 2, None, hardware())
    told = tell_apart(side, side)
    assert (
        set(side[0]) == set(told["certainties"]) == set(told["thresholds"]) == {"max_probability", "prototype_distance"}
    )
    assert told["certainty"] in side[0]


def test_a_run_tells_calibration_and_unknown_classes_and_predict_uses_the_threshold(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    words = [*SMALL, f"data.root={images}", f"outputs={tmp_path}"]
    plain = metarun(*words, "name=plain")
    assert plain.status == 0, plain.err
    outcome = metarun(*words, "test.unknown_ways=2", "name=made")
    assert outcome.status == 0, outcome.err
    (before,), (made,) = tmp_path.glob("plain/*/result.json"), tmp_path.glob("made/*/result.json")
    first, found = result(before.parent), result(made.parent)
    assert first["test/acc"] == found["test/acc"]
    assert "test/unknown" not in first
    told = found["test/calibration"]
    assert told["fitted_on"] == ("6 validation episodes" if told["temperature"] else None)
    assert set(told["with"]) == set(told["without"]) == {"nll", "brier", "ece"}
    with np.load(made.parent / contents.SCORES) as stored:
        assert found["test/acc_p05"] == np.quantile(stored["values"][-1], 0.05) <= found["test/acc"]
    assert found["test/worst_class_acc"] <= found["test/acc"]
    assert set(found["test/unknown"]["certainties"]) == {"max_probability", "energy", "prototype_distance"}
    asked = metarun(
        "recipe=predict", f"checkpoint={made.parent}", f"support={images / 'test'}", f"images={images / 'val'}",
        "unknown=auto", f"outputs={tmp_path}",
    )  # fmt: skip
    assert asked.status == 0, asked.err
    assert "unknown=auto" not in asked.out  # it is on
    (predicted,) = tmp_path.glob("predictions/*/result.json")
    assert result(predicted.parent)["predict/temperature"] == told["temperature"]
    learner = metarun_api.load(made.parent, device="cpu")
    thresholds = found["test/unknown"]["thresholds"]
    for name in thresholds:
        classifier = learner.fit(images / "test", unknown=name)
        scored = classifier.scored(images / "val")
        own = {
            "max_probability": classifier.predict_proba(images / "val").max(1),
            "energy": logsumexp(scored.scores, axis=1),
            "prototype_distance": scored.scores.max(1),  # ProtoNet's scores are minus the squared distances
        }
        assert (scored.nearness is None) == (name != "prototype_distance")
        if scored.nearness is not None:
            np.testing.assert_allclose(scored.nearness, own[name], rtol=1e-4, atol=1e-5)
        assert classifier.is_unknown(images / "val").tolist() == (own[name] < thresholds[name]).tolist()
    best = found["test/unknown"]["certainty"]
    held = [learner.fit(images / "test", unknown=each).is_unknown(images / "val").tolist() for each in ("auto", best)]
    assert held[0] == held[1]


def test_a_run_that_names_the_data_that_it_tests_on_keeps_its_thresholds(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    named = ["test.data=[one:folder,other:folder]", f"test.data.one.root={images}", f"test.data.other.root={images}"]
    done(*SMALL, f"data.root={images}", f"outputs={tmp_path}", *named, "test.unknown_ways=2", "name=made")
    (made,) = tmp_path.glob("made/*/result.json")
    told = result(made.parent)["test/one/unknown"]
    held = metarun_api.load(made.parent, device="cpu").held.calibration
    assert held.thresholds == told["thresholds"]
    assert held.certainty == told["certainty"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["test.unknown_ways=3"],
            "test.unknown_ways=3: with 2 ways they are above the 4 classes of the val split; take at most 2",
        ),
        (
            ["test.unknown_ways=1", "task.ways=4"],
            "test.unknown_ways=1: with 4 ways they are above the 4 classes of the val split; take fewer ways",
        ),
        (["test.unknown_ways=-1"], "test.unknown_ways=-1"),
        (
            ["test.unknown_ways=1", "task.unlabelled=2"],
            "test.unknown_ways=1: is of classes that a task shows nothing of, but",
        ),
    ],
)
def test_unknown_ways_that_cannot_be_are_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    outcome = metarun(*SMALL, *words, f"data.root={make_images(tmp_path / 'images')}", f"outputs={tmp_path / 'runs'}")
    assert outcome.status == 2
    assert told in outcome.said[0]
    assert not (tmp_path / "runs").exists()
