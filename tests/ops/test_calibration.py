"""Scores of probabilities, held against their formulas, and the temperature against a scan and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from metarun.ops.calibration import BINS, Reliability, fit_temperature, tempered


def drawn(n: int = 400, classes: int = 4, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that follow their softmax."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(n, classes)) * scale
    labels = (softmax(logits, 1).cumsum(1) > draw.random((n, 1))).argmax(1)
    return logits, labels


def counted(logits: np.ndarray, labels: np.ndarray) -> Reliability:
    found = Reliability()
    found.add(log_softmax(logits, 1), labels)
    return found


def test_scores_are_those_of_the_formulas() -> None:
    logits, labels = drawn()
    found, shares = counted(logits, labels), softmax(logits, 1)
    truth = np.eye(4)[labels]
    assert found.nll == pytest.approx(-np.log((shares * truth).sum(1)).mean(), rel=1e-12)
    assert found.brier == pytest.approx(((shares - truth) ** 2).sum(1).mean(), rel=1e-12)
    top, right, ece = shares.max(1), shares.argmax(1) == labels, 0.0
    for low in np.arange(BINS) / BINS:
        inside = (top > low) & (top <= low + 1 / BINS)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    assert found.ece == pytest.approx(ece, rel=1e-9)
    assert sum(one["count"] for one in found.bins()) == len(labels)


def test_counting_in_parts_changes_nothing() -> None:
    logits, labels = drawn()
    whole, parts = counted(logits, labels), Reliability()
    for rows in np.array_split(np.arange(len(labels)), 7):
        parts.add(log_softmax(logits[rows], 1), labels[rows])
    assert parts.describe() == pytest.approx(whole.describe(), rel=1e-12)


def test_certain_and_right_costs_nothing_and_certain_and_wrong_the_most() -> None:
    sure = np.log(np.array([[1 - 1e-15, 1e-15]] * 3))
    right, wrong = Reliability(), Reliability()
    right.add(sure, np.zeros(3, dtype=int))
    wrong.add(sure, np.ones(3, dtype=int))
    assert right.describe() == pytest.approx({"nll": 0, "brier": 0, "ece": 0}, abs=1e-12)
    assert wrong.brier == pytest.approx(2)
    assert wrong.ece == pytest.approx(1)


def test_a_class_held_impossible_costs_much_but_not_infinity() -> None:
    found = Reliability()
    found.add(np.array([[0.0, -np.inf]]), np.array([1]))
    assert found.nll == 100
    assert np.isfinite(list(found.describe().values())).all()


@pytest.mark.parametrize("by", [1e-4, 0.25, 1.0, 5.0, 1e4])
def test_the_temperature_undoes_a_factor_of_the_logits(by: float) -> None:
    logits, labels = drawn()
    first = fit_temperature(logits, labels)
    assert first is not None
    assert fit_temperature(logits * by, labels) == pytest.approx(first * by, rel=1e-4)
    assert first == pytest.approx(1, abs=0.15)  # the labels follow the softmax


def test_the_temperature_is_the_best_of_a_scan_and_at_it_the_slope_is_zero() -> None:
    logits, labels = drawn(scale=5)
    best = fit_temperature(logits, labels)
    assert best is not None

    def nll(t: float) -> float:
        return counted(logits / t, labels).nll

    assert nll(best) <= min(nll(t) for t in np.geomspace(0.1, 10, 200)) + 1e-10
    assert (nll(best * 1.001) - nll(best / 1.001)) / 0.002 == pytest.approx(0, abs=1e-4)


def test_the_temperature_of_log_probabilities_is_that_of_logits() -> None:
    logits, labels = drawn()
    assert fit_temperature(log_softmax(logits, 1), labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-5)
    np.testing.assert_allclose(tempered(log_softmax(logits, 1), 3.0), log_softmax(logits / 3, 1), atol=1e-12)


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2, 0]], ids=["all right", "all wrong"])
def test_labels_that_ask_for_ever_more_or_less_certainty_give_no_temperature(labels: list[int]) -> None:
    assert fit_temperature(np.eye(3), np.array(labels)) is None


def test_labels_that_were_held_impossible_give_no_temperature() -> None:
    assert fit_temperature(np.array([[0.0, -np.inf]]), np.array([1])) is None
