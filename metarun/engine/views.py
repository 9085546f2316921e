"""Test-time augmentation: the predictions for a task, averaged over changed copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarun.core import Algorithm, Episodes
from metarun.engine.hardware import Hardware
from metarun.ops import draws


@dataclass(frozen=True)
class Views:
    """Copies of a test task: the first is the task itself, in the others every image is changed at random.

    What is changed is a function of (seed, episode, copy) alone. A prediction depends on the same images as without copies.

    Args:
        change: Changes images `[B, C, H, W]`, with draws from the global generators.
        count: How many copies there are, at least 1.
        seed: The run's seed.
        hardware: Whose generators are seeded.
    """

    change: Callable[[Tensor], Tensor]
    count: int
    seed: int
    hardware: Hardware

    def predict(self, algorithm: Algorithm, tasks: Episodes, numbers: Tensor, steps: Sequence[int]) -> Tensor:
        """Averages the probabilities over the copies, and returns their logarithms, `[len(steps), T, N*Q, N]`.

        Args:
            algorithm: The method, which classifies.
            tasks: The tasks.
            numbers: The numbers of their episodes, int64 `[T]`.
            steps: The numbers of inner steps after which it predicts.
        """
        found = [algorithm.predict_after(tasks, steps).log_softmax(-1)]
        for copy in range(1, self.count):
            found.append(algorithm.predict_after(self.changed(tasks, numbers, copy), steps).log_softmax(-1))
        return torch.stack(found).logsumexp(0) - math.log(self.count)

    def changed(self, tasks: Episodes, numbers: Tensor, copy: int) -> Episodes:
        """Makes a changed copy of the tasks, by its number from 1."""
        copies = []
        with draws.untouched(self.hardware.device):
            for number, task in zip(numbers.tolist(), tasks.split(1), strict=True):
                self.hardware.seed(draws.mixed(self.seed, number, copy))
                copies.append(task.with_items(lambda x: self.change(x[0])[None]))
        return tasks.with_tensors(map(torch.cat, zip(*(one.named_tensors.values() for one in copies), strict=True)))
