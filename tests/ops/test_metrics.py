"""Means, intervals, diverged tasks, and the evaluator that fills them."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from helpers import CPU, hardware, toy_images
from scipy import stats
from torch import Tensor

from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.data.regression import Sinusoid
from metarun.data.source import DataSource
from metarun.engine.evaluate import evaluate
from metarun.engine.probabilities import Observed
from metarun.ops.metrics import (
    accuracy,
    classification,
    interval,
    interval_told,
    median,
    regression_summary,
    squared_error,
    undefined,
)


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_interval(n: int) -> None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    mean, ci95 = interval(values)
    assert mean == pytest.approx(statistics.mean(values.tolist()))
    deviation = statistics.stdev(values.tolist())
    assert ci95 == pytest.approx(stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n), rel=1e-4)


@pytest.mark.parametrize("n", [2, 5, 100])
def test_interval_covers_the_truth_19_times_in_20(n: int) -> None:
    draws = np.random.default_rng(0).normal(3, 2, (4000, n))
    found = [interval(torch.from_numpy(values)) for values in draws]
    covered = np.mean([abs(mean - 3) <= ci95 for mean, ci95 in found])
    assert covered == pytest.approx(0.95, abs=0.01)


def test_the_formula_of_an_interval_is_told() -> None:
    varied, alike = torch.tensor([0.5, 1.0, 0.75]), torch.ones(20)
    assert interval_told(varied, "episodes", shares=True) == "95%, over episodes, Student's t"
    assert interval_told(alike, "episodes", shares=True) == "95%, over episodes, which agree, Wilson"
    assert interval(alike, shares=True)[1] == pytest.approx(0.1611, abs=1e-4)
    for one, shares in ((alike, False), (alike[:1], True), (alike[:0], True)):
        assert interval_told(one, "episodes", shares=shares) == "too few for an interval"


def test_interval_of_single_and_single_precision_values() -> None:
    mean, ci95 = interval(torch.tensor([0.25]))
    assert mean == 0.25
    assert ci95 is None
    mean, ci95 = interval(torch.full((1000,), 0.1))  # the sum is taken in double precision
    assert mean == pytest.approx(0.1, abs=1e-8)
    assert ci95 is None


def test_accuracy() -> None:
    logits = torch.tensor([[[3.0, 1, 2], [0, 9, 1], [1, 2, 3]], [[0, 0, 1], [5, 4, 3], [-1, -2, -3]]])
    target = torch.tensor([[0, 1, 0], [2, 1, 1]])
    found = accuracy(logits, target)
    assert found.dtype == torch.float64
    assert found.tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    after_steps = accuracy(torch.stack([logits, -logits, logits]), target)
    assert after_steps.shape == (3, 2)
    assert torch.equal(after_steps[0], found)
    assert torch.equal(after_steps[2], found)


def test_no_number_is_no_answer() -> None:
    none = [-math.inf] * 3
    logits = torch.tensor([[[math.nan, 1, 2], [math.inf, 0, 0], none, [-math.inf, -math.inf, 1]]])
    assert undefined(logits).tolist() == [[True, True, True, False]]
    assert accuracy(logits, torch.tensor([[0, 0, 0, 2]])).tolist() == [pytest.approx(1 / 4)]


def test_squared_error() -> None:
    prediction, target = torch.tensor([[[1.0], [2.0]], [[0.0], [0.5]]]), torch.tensor([[[1.0], [4.0]], [[1.0], [0.5]]])
    assert squared_error(prediction, target).tolist() == [2, 0.5]
    assert squared_error(torch.stack([prediction, target]), target).tolist() == [[2, 0.5], [0, 0]]
    tiny = torch.full((1, 4, 1), 1e-30)
    assert squared_error(tiny, 0 * tiny).item() == pytest.approx(1e-60)  # in double precision


def test_regression_summary_counts_what_diverged() -> None:
    errors = torch.tensor([1.0, 2, 3, 399, 401, math.inf, math.nan], dtype=torch.float64)
    found = regression_summary(errors, power=4.0)
    finite = [1.0, 2, 3, 399, 401]
    assert found["mse"] == pytest.approx(statistics.mean(finite))
    assert found["mse_ci95"] == pytest.approx(stats.t.ppf(0.975, 4) * statistics.stdev(finite) / math.sqrt(5))
    assert found["mse_median"] == 399  # the fourth of seven: one that is not finite is worse than all
    assert found["diverged"] == 3
    assert found["not_finite"] == 2


def test_regression_summary_of_ordinary_and_of_hopeless_errors() -> None:
    found = regression_summary(torch.tensor([0.5, 0.1, 0.3]), power=4.0)
    assert found["mse_median"] == pytest.approx(0.3)
    assert (found["diverged"], found["not_finite"]) == (0, 0)
    found = regression_summary(torch.tensor([math.nan] * 3), power=4.0)
    assert found["mse"] == found["mse_median"] == math.inf
    assert (found["diverged"], found["not_finite"]) == (3, 3)


# The evaluator


class Blind(Algorithm):
    """Predicts way `step` after `step` inner steps (or `step` as the value), and notes what it is given."""

    regression = True

    def __init__(self, source: DataSource, outputs: int) -> None:
        super().__init__(Backbone(), Spec(source.input_shape, source.kind, outputs))
        self.backbone.norm = "none"
        self.seen: list[tuple[int, bool, bool]] = []

    @property
    def test_steps(self) -> int:
        return 3

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def predict(self, episodes: Episodes) -> Tensor:
        raise NotImplementedError

    def predict_after(self, episodes: Episodes, steps: list[int]) -> Tensor:
        self.seen.append((episodes.n_tasks, self.training, torch.is_grad_enabled()))
        if self.spec.kind == "regression":
            return torch.stack([torch.full_like(episodes.query_y, float(step)) for step in steps])
        ways = torch.eye(episodes.ways)
        return torch.stack([ways[step].expand(*episodes.query_y.shape, -1) for step in steps])


@pytest.mark.parametrize("nothing", [[math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_an_image_whose_scores_say_nothing_is_wrong_whatever_its_class_is(nothing: list[float], label: int) -> None:
    scores = np.array([nothing, [0.0, 1.0], [1.0, 0.0]], np.float32)
    found = classification(scores, np.array([label, 1, 0]))
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["undefined"] == 1
    assert np.sum(found["confusion"]) == 3
    assert found["auroc"] == 0.5  # behind the one image of the other class
    assert "undefined" not in classification(scores[1:], np.array([1, 0]))


def test_evaluation_of_classification() -> None:
    source = toy_images()
    algorithm = Blind(source, 5).train()
    sampler = source.sampler("test", TaskShape(5, 1, 4), 0, CPU)
    done: list[int] = []
    scores = evaluate(algorithm, sampler, 40, hardware(), [0, 2], done.append)
    assert scores.values.tolist() == [[0.2] * 40] * 2
    assert scores.steps == [0, 2]
    assert scores.power == 0
    assert torch.equal(scores.final, scores.values[1])
    assert algorithm.seen == [(32, False, False), (8, False, False)]
    assert algorithm.training
    assert done == [32, 40]
    algorithm.eval()
    assert evaluate(algorithm, sampler, 3, hardware()).steps == [3]
    assert not algorithm.training


def test_evaluation_counts_tasks_without_an_answer() -> None:
    class Diverging(Blind):
        def predict_after(self, episodes: Episodes, steps: list[int]) -> Tensor:
            found = super().predict_after(episodes, steps)
            found[:, 0, :2] = math.nan  # two queries of the first task of a chunk
            return found

    source, observed = toy_images(), Observed(40, None)
    sampler = source.sampler("test", TaskShape(5, 1, 4), 0, CPU)
    scores = evaluate(Diverging(source, 5), sampler, 40, hardware(), [0], observe=observed)
    plain = evaluate(Blind(source, 5), sampler, 40, hardware(), [0])
    assert scores.undefined == 2
    assert plain.undefined == 0
    assert math.isfinite(scores.loss)
    lost = (plain.values - scores.values)[0]
    assert lost[1:32].count_nonzero() == 0
    assert math.isfinite(observed.describe(0)["without"]["ece"])  # where it counts as a guess


def test_the_worst_class_may_be_one_without_an_answer() -> None:
    """Also the first, which a guess by the largest of equal numbers would name."""
    observed = Observed(2, None)
    logits = torch.eye(2)[[0, 0, 1, 1]].repeat(2, 1, 1) * 10
    logits[0, :2] = math.nan
    observed(torch.arange(2), logits, torch.tensor([[0, 0, 1, 1]] * 2))
    assert observed.worst.tolist() == [0, 1]
    assert observed.chance.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_evaluation_of_regression_whatever_the_chunks(chunk: int) -> None:
    source = Sinusoid()
    sampler = source.sampler("test", TaskShape(1, 2, 5), 0, CPU)
    scores = evaluate(Blind(source, 1), sampler, 50, hardware(vectorize=True, task_chunk=chunk), [0, 1])
    target = sampler(0, 50).query_y.double()
    torch.testing.assert_close(scores.values[0], target.square().mean((1, 2)))
    torch.testing.assert_close(scores.values[1], (target - 1).square().mean((1, 2)))
    assert scores.power == pytest.approx(target.square().mean().item())


def test_median_of_an_even_count_is_the_mean_of_the_middle_two() -> None:
    assert median(torch.tensor([1.0, 2.0, 4.0, float("nan")])) == 3.0
    assert median(torch.tensor([1.0, math.inf, math.nan, math.inf])) == math.inf
