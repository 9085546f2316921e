"""Random changes of training images, the same in every process and after every kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from metarun.core import Batch, Episodes, together
from metarun.engine.hardware import Hardware
from metarun.engine.learner import Sampler


def augmented(
    sampler: Sampler,
    augment: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    hardware: Hardware,
    tasks_per_step: int = 1,
) -> Sampler:
    """Wraps `sampler` so that `augment` changes its images, as a function of (seed, step, task).

    `augment` draws from the global generators for all images that it is given. So every process changes the images of the
    whole step, with generators that are seeded by the step, and keeps those of its own tasks.

    Args:
        sampler: Gives the tasks, or the images, from a start to a stop.
        augment: Changes images `[B, C, H, W]`.
        seed: The run's seed.
        hardware: Whose generators are seeded.
        tasks_per_step: The number of tasks (images, for methods on batches) of a step, over all processes.
    """

    def changed(start: int, stop: int) -> Any:
        first = start - start % tasks_per_step
        parts = [part for at in range(first, stop, tasks_per_step) for part in step(at).split(1)]
        parts = parts[start - first : stop - first]
        if isinstance(parts[0], Episodes):
            return together(parts)
        return Batch(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(Batch)))

    def step(first: int) -> Any:
        batch = sampler(first, first + tasks_per_step)
        hardware.seed((seed * 2_000_003 + first) % 2**63)
        return batch.with_items(change)

    def change(x: torch.Tensor) -> torch.Tensor:
        return augment(x.flatten(0, -4)).view_as(x)

    return changed
