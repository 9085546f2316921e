"""Regression tasks that are drawn, not stored: `sinusoid` and `linear`."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import numpy as np
import torch

from metarun.core import Episodes, TaskShape
from metarun.data.sampler import uniforms
from metarun.data.source import DataSource, EpisodeSampler, Split
from metarun.errors import UserError


class RegressionSource(DataSource):
    """One-dimensional functions with two random parameters, sampled at uniform inputs."""

    kind = "regression"
    input_shape = (1,)
    outputs = 1
    first: tuple[float, float]
    second: tuple[float, float]
    inputs: tuple[float, float]

    @abstractmethod
    def function(self, first: np.ndarray, second: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Targets for inputs `[T, n]` of functions with parameters `[T, 1]`."""

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        if task.ways != 1:
            raise UserError(f"task: ways = {task.ways}, but a regression task has one way; set task.ways=1")
        if task.shots < 1 or task.queries < 0:
            raise UserError(f"task: shots={task.shots} queries={task.queries} must be positive")

        def episodes(start: int, stop: int) -> Episodes:
            draws = uniforms(seed, split, start, stop, 2 + task.shots + task.queries)
            first, second, x = (
                low + (high - low) * part
                for part, (low, high) in zip(
                    (draws[:, :1], draws[:, 1:2], draws[:, 2:]), (self.first, self.second, self.inputs), strict=True
                )
            )
            pair = np.stack([x, self.function(first, second, x)])[..., None].astype(np.float32)
            (support_x, support_y), (query_x, query_y) = (
                part.unbind() for part in torch.from_numpy(pair).to(device).split([task.shots, task.queries], dim=2)
            )
            return Episodes(support_x, support_y, query_x, query_y, ways=1)

        return episodes

    def describe(self) -> dict[str, Any]:
        ranges = [type(self).__name__, self.first, self.second, self.inputs]
        return {"fingerprint": hashlib.sha256(repr(ranges).encode()).hexdigest(), "input_shape": [1]}


class Sinusoid(RegressionSource):
    """y = A sin(x - b), A in [0.1, 5], b in [0, pi], x in [-5, 5] (Finn et al. 2017, section 5.1)."""

    first = (0.1, 5.0)
    second = (0.0, float(np.pi))
    inputs = (-5.0, 5.0)

    def function(self, first: np.ndarray, second: np.ndarray, x: np.ndarray) -> np.ndarray:
        return first * np.sin(x - second)


class Linear(RegressionSource):
    """y = a x + b, a and b in [-3, 3], x in [-5, 5] (the line family of Yao et al. 2019, HSML, section 5.1)."""

    first = (-3.0, 3.0)
    second = (-3.0, 3.0)
    inputs = (-5.0, 5.0)

    def function(self, first: np.ndarray, second: np.ndarray, x: np.ndarray) -> np.ndarray:
        return first * x + second
