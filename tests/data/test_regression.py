"""Regression tasks: the functions, their parameters' ranges, and purity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CPU
from scipy.stats import kstest

from metarun.core import TaskShape
from metarun.data.regression import Linear, RegressionSource, Sinusoid
from metarun.errors import UserError

BOTH = pytest.mark.parametrize("cls", [Sinusoid, Linear])
TASKS = 2000


def points(source: RegressionSource, shots: int = 10, queries: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of all points of each task, float64 [T, shots + queries]."""
    batch = source.sampler("train", TaskShape(1, shots, queries), 0, CPU)(0, TASKS)
    x = torch.cat([batch.support_x, batch.query_x], dim=1)[..., 0].double().numpy()
    y = torch.cat([batch.support_y, batch.query_y], dim=1)[..., 0].double().numpy()
    return x, y


def fitted(x: np.ndarray, y: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The coefficients [T, 2] of the two given curves in each task's points, which they must fit exactly."""
    curves = np.stack([first, second], axis=-1)
    found = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(curves, y, strict=True)])
    np.testing.assert_allclose((curves @ found[..., None])[..., 0], y, atol=5e-6)
    return found


def uniform(values: np.ndarray, low: float, high: float) -> None:
    assert values.min() >= low - 1e-5
    assert values.max() <= high + 1e-5
    assert kstest(values.ravel(), "uniform", args=(low, high - low)).pvalue > 0.001


def test_sinusoids() -> None:
    x, y = points(Sinusoid())
    uniform(x, -5, 5)
    sine, cosine = fitted(x, y, np.sin(x), np.cos(x)).T  # A sin(x - b) = A cos b sin x - A sin b cos x
    amplitude, phase = np.hypot(sine, cosine), np.arctan2(-cosine, sine)
    uniform(amplitude, 0.1, 5)
    uniform(phase, 0, np.pi)
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 0.1


def test_lines() -> None:
    x, y = points(Linear())
    uniform(x, -5, 5)
    slope, shift = fitted(x, y, x, np.ones_like(x)).T
    uniform(slope, -3, 3)
    uniform(shift, -3, 3)
    assert abs(np.corrcoef(slope, shift)[0, 1]) < 0.1


@BOTH
def test_an_episode_is_a_function_of_seed_split_and_number(cls: type[RegressionSource]) -> None:
    task = TaskShape(1, 3, 4)
    whole = cls().sampler("test", task, 5, CPU)(0, 10)
    part = cls().sampler("test", task, 5, CPU)(3, 5)
    for some, everything in zip(part.tensors, whole.tensors, strict=True):
        assert torch.equal(some, everything[3:5])
    for split, seed in (("val", 5), ("test", 6)):
        assert not torch.equal(cls().sampler(split, task, seed, CPU)(0, 10).support_x, whole.support_x)
    assert whole.support_x[0, 0] != whole.support_x[1, 0]


@BOTH
def test_shapes(cls: type[RegressionSource]) -> None:
    source = cls()
    batch = source.sampler("train", TaskShape(1, 3, 4), 0, CPU)(0, 2)
    assert [tuple(tensor.shape) for tensor in batch.tensors] == [(2, 3, 1), (2, 3, 1), (2, 4, 1), (2, 4, 1)]
    assert {tensor.dtype for tensor in batch.tensors} == {torch.float32}
    assert batch.ways == 1
    assert (source.kind, source.input_shape, source.outputs) == ("regression", (1,), 1)
    assert not set(batch.support_x.flatten().tolist()) & set(batch.query_x.flatten().tolist())
    support_only = source.sampler("train", TaskShape(1, 3, 0), 0, CPU)(0, 2)
    assert support_only.query_x.shape == (2, 0, 1)


def test_families_have_fingerprints_of_their_own() -> None:
    assert Sinusoid().describe()["fingerprint"] != Linear().describe()["fingerprint"]
    assert Sinusoid().describe() == Sinusoid().describe()
    assert Linear().describe()["input_shape"] == [1]


@BOTH
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskShape(5, 1, 1), "ways = 5, but a regression task has one way; set task.ways=1"),
    ],
)
def test_mistakes_are_named(cls: type[RegressionSource], task: TaskShape, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls().sampler("train", task, 0, CPU)


@pytest.mark.parametrize(
    ("sizes", "message"), [((1, 0, 1), "task.shots=0: must"), ((1, 1, -1), "task.queries=-1: must")]
)
def test_a_task_of_no_size_is_none(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskShape(*sizes)
