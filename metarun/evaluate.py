"""The one evaluator: any algorithm, on a fixed range of episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarun import metrics
from metarun.core import Algorithm
from metarun.data.source import EpisodeSampler
from metarun.hardware import Hardware


@dataclass
class Scores:
    """Per-episode scores after each number of inner steps: accuracies in [0, 1], or mean squared errors."""

    steps: list[int]
    values: Tensor  # [len(steps), episodes] float64
    power: float  # the mean squared target of regression tasks; 0 for classification

    @property
    def final(self) -> Tensor:
        """The scores after the last of `steps`, `[episodes]`."""
        return self.values[-1]


@torch.no_grad()
def evaluate(
    algorithm: Algorithm,
    sampler: EpisodeSampler,
    episodes: int,
    hardware: Hardware,
    steps: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Scores of the episodes 0 to `episodes`, in evaluation mode, after each of `steps` inner steps (default: the last)."""
    steps = [algorithm.test_steps] if steps is None else list(steps)
    regression = algorithm.spec.kind == "regression"
    training = algorithm.training
    algorithm.eval()
    values, powers = [], []
    for start in range(0, episodes, hardware.test_chunk):
        batch = sampler(start, min(start + hardware.test_chunk, episodes))
        with hardware.autocast():
            predictions = algorithm.predict_after(batch, steps)
        score = metrics.squared_error if regression else metrics.accuracy
        values.append(score(predictions, batch.query_y).cpu())
        powers.append(batch.query_y.double().square().mean().cpu() if regression else torch.zeros(()))
        progress(start + batch.n_tasks)
    algorithm.train(training)
    return Scores(steps, torch.cat(values, dim=1), torch.stack(powers).mean().item())
