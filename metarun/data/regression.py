"""Regression tasks that are drawn, not stored: `sinusoid`, `linear` and `mixed`."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Annotated, Any, Literal

import numpy as np
import torch

from metarun.config.types import Len
from metarun.core import Episodes, MixedEpisodes, TaskShape, largest, together
from metarun.data.sampler import uniforms
from metarun.data.source import DataSource, EpisodeSampler, Split, refuse_classes
from metarun.data.varied import pick

Range = tuple[float, float]


class RegressionSource(DataSource):
    """One-dimensional functions with random parameters, each uniform in its range, sampled at uniform inputs."""

    kind = "regression"
    input_shape = (1,)
    outputs = 1
    parameters: tuple[Range, ...]
    inputs: Range = (-5.0, 5.0)

    @abstractmethod
    def function(self, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Targets `[T, n]` for inputs `[T, n]` of functions with parameters `[P, T, 1]`."""

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        refuse_classes(task, "a regression task")
        count, most = len(self.parameters), (largest(task.shots), largest(task.queries))
        low, high = np.array(self.parameters).T[..., None, None]

        def episodes(start: int, stop: int) -> Episodes | MixedEpisodes:
            draws = uniforms(seed, split, start, stop, count + sum(most))
            parameters = low + (high - low) * draws[:, :count].T[..., None]
            x = self.inputs[0] + (self.inputs[1] - self.inputs[0]) * draws[:, count:]
            pair = np.stack([x, self.function(parameters, x)])[..., None].astype(np.float32)
            (support_x, support_y), (query_x, query_y) = (
                part.unbind() for part in torch.from_numpy(pair).to(device).split(most, dim=2)
            )
            whole = Episodes(support_x, support_y, query_x, query_y, ways=1)
            if not task.varies:
                return whole
            sizes = uniforms(seed, f"{split}/varied", start, stop, 2).T
            shots, queries = (
                pick(count, draw, np.array(largest(count)))
                for count, draw in zip((task.shots, task.queries), sizes, strict=True)
            )
            return together([
                Episodes(one.support_x[:, :s], one.support_y[:, :s], one.query_x[:, :q], one.query_y[:, :q], ways=1)
                for one, s, q in zip(whole.split(1), shots, queries, strict=True)
            ])  # fmt: skip

        return episodes

    def describe(self) -> dict[str, Any]:
        ranges = [type(self).__name__, *self.parameters, self.inputs]
        return {"fingerprint": hashlib.sha256(repr(ranges).encode()).hexdigest(), "input_shape": [1]}


class Sinusoid(RegressionSource):
    """y = A sin(x - b), A in [0.1, 5], b in [0, pi], x in [-5, 5] (Finn et al. 2017, section 5.1)."""

    parameters = ((0.1, 5.0), (0.0, float(np.pi)))

    def function(self, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        amplitude, phase = parameters
        return amplitude * np.sin(x - phase)


class Linear(RegressionSource):
    """y = a x + b, a and b in [-3, 3], x in [-5, 5] (the line family of Yao et al. 2019, HSML, section 5.1)."""

    parameters = ((-3.0, 3.0), (-3.0, 3.0))

    def function(self, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        slope, shift = parameters
        return slope * x + shift


# Ranges of the parameters of each family, as the code of Yao et al. 2019 draws them (huaxiuyao/HSML, data_generator.py).
FAMILIES: dict[str, tuple[Range, ...]] = {
    "sinusoid": ((0.1, 5.0), (0.8, 1.2), (0.0, 2 * float(np.pi))),  # A sin(w x) + b
    "line": ((-3.0, 3.0), (-3.0, 3.0)),  # a x + b
    "quadratic": ((-0.2, 0.2), (-2.0, 2.0), (-3.0, 3.0)),  # a x^2 + b x + c
    "cubic": ((-0.1, 0.1), (-0.2, 0.2), (-2.0, 2.0), (-3.0, 3.0)),  # a x^3 + b x^2 + c x + d
}


class Mixed(RegressionSource):
    """Sinusoids, lines, quadratic and cubic functions, each task from a family drawn at random (Yao et al. 2019, HSML, section 5.1).

    `families` are those to draw from. Raises `UserError` for an unknown family, or none.

    Args:
        families: The families of functions to draw tasks from; null is all of them.
    """

    def __init__(
        self, *, families: Annotated[list[Literal["sinusoid", "line", "quadratic", "cubic"]], Len(1)] | None = None
    ) -> None:
        self.families = list(FAMILIES) if families is None else list(families)
        # The family, and four numbers that each family scales to its own ranges.
        self.parameters = ((0.0, float(len(self.families))), *(((0.0, 1.0),) * 4))

    def function(self, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        family, *numbers = parameters
        y = np.empty_like(x)
        for number, name in enumerate(self.families):
            rows = (family.astype(int) == number)[:, 0]
            own = [low + (high - low) * u[rows] for u, (low, high) in zip(numbers, FAMILIES[name], strict=False)]
            if name == "sinusoid":
                amplitude, frequency, shift = own
                y[rows] = amplitude * np.sin(frequency * x[rows]) + shift
            else:
                y[rows] = sum(value * x[rows] ** power for power, value in enumerate(reversed(own)))
        return y

    def describe(self) -> dict[str, Any]:
        ranges = [type(self).__name__, *((name, FAMILIES[name]) for name in self.families), self.inputs]
        return {"fingerprint": hashlib.sha256(repr(ranges).encode()).hexdigest(), "input_shape": [1]}
