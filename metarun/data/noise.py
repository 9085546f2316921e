"""Tasks with wrong labels, for methods that are to find them out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from metarun.core import Episodes, TaskShape
from metarun.data.image_batches import generator
from metarun.data.sampler import uniforms
from metarun.data.source import EpisodeSampler
from metarun.errors import UserError


def noisy_tasks(seed: int, start: int, stop: int, share: float) -> np.ndarray:
    """Draws which training tasks have wrong labels.

    Args:
        seed: The run's seed.
        start: The first task.
        stop: The task after the last one.
        share: The probability that a task is noisy, in [0, 1].

    Returns:
        bool `[stop - start]`; entry i depends on (seed, start + i) alone.
    """
    return uniforms(seed, "train/noisy", start, stop, 1)[:, 0] < share


def with_noise(
    sampler_of: Callable[[TaskShape], EpisodeSampler], task: TaskShape, seed: int, tasks: float, labels: float
) -> EpisodeSampler:
    """Puts wrong labels on the support examples of a share of the tasks.

    In a noisy task each support label is wrong with probability `labels`, independently of all others; a wrong one stands on
    an image of another class, each as likely as the next (the symmetric noise of Yao et al. 2021, ATS, section 5.1). As in
    the authors' code labels are fixed and images are chosen for them, so that each class keeps its number of examples: a
    class without support would have no prototype. An image with a wrong label is one that the task does not use otherwise; only
    where a class has no more of them is one used twice.

    Args:
        sampler_of: Tasks of a shape without noise. Those with noise in them are drawn with further images.
        task: The shape.
        seed: The run's seed; task i depends on (seed, i) alone.
        tasks: The share of the tasks that are noisy, in [0, 1].
        labels: The probability that a support label of a noisy task is wrong, in [0, 1].

    Returns:
        The sampler of tasks with noise.

    Raises:
        UserError: A share is not in [0, 1], the tasks have one class alone, or there are no such tasks.
    """
    for name, share in (("tasks", tasks), ("labels", labels)):
        if not 0 <= share <= 1:
            raise UserError(f"train.noise.{name}={share}: is a share; it must be from 0 to 1")

    sampler, spare = _with_spare(sampler_of, task)
    if sampler(0, 1).ways < 2:
        raise UserError("train.noise: a wrong label needs another class, and these tasks have one way alone")
    ways, shots, queries = task.ways, task.shots, task.queries

    def episodes(start: int, stop: int) -> Episodes:
        found = sampler(start, stop)
        support, others = (x.unflatten(1, (ways, -1)) for x in (found.support_x, found.query_x))
        asked, y = others[:, :, :queries], found.query_y.unflatten(1, (ways, -1))[:, :, :queries]
        images = torch.cat([support, others[:, :, queries:]], 2)
        chosen = np.tile(np.arange(shots), (stop - start, ways)) + np.repeat(np.arange(ways), shots) * (shots + spare)
        for row in np.flatnonzero(noisy_tasks(seed, start, stop, tasks)):
            chosen[row] = mislabelled(generator("train/noise", seed, start + row), ways, shots, spare, labels)
        rows = torch.arange(stop - start, device=images.device)[:, None]
        x = images.flatten(1, 2)[rows, torch.from_numpy(chosen).to(images.device)]
        return replace(found, support_x=x, query_x=asked.flatten(1, 2), query_y=y.flatten(1, 2))

    return episodes


def _with_spare(sampler_of: Callable[[TaskShape], EpisodeSampler], task: TaskShape) -> tuple[EpisodeSampler, int]:
    """Tasks with further queries, and how many: as many as hardly any task needs more of, or as the classes have."""
    wanted = min((task.ways - 1) * task.shots, math.ceil(task.shots + 4 * task.shots**0.5))
    for spare in range(wanted, 0, -1):
        with contextlib.suppress(UserError):
            return sampler_of(replace(task, queries=task.queries + spare)), spare
    return sampler_of(task), 0


def mislabelled(random: np.random.Generator, ways: int, shots: int, spare: int, share: float) -> np.ndarray:
    """Chooses the images of a support set with wrong labels.

    Args:
        random: What the draws are made with.
        ways: The number of classes, at least 2.
        shots: The images of a class that it would have without noise; they come first in their class.
        spare: The further images of a class.
        share: The probability that a label is wrong, in [0, 1].

    Returns:
        For each place of the class-major support set an image, int64 `[ways * shots]` in [0, ways * (shots + spare)).
    """
    own = np.repeat(np.arange(ways), shots)
    wrong = random.random(len(own)) < share
    truth = (own + np.where(wrong, random.integers(1, ways, len(own)), 0)) % ways
    chosen = np.tile(np.arange(shots), ways)
    kept = np.zeros((ways, shots + spare), dtype=bool)
    kept[own[~wrong], chosen[~wrong]] = True
    for one in np.unique(truth[wrong]):
        asking = np.flatnonzero(wrong & (truth == one))
        free = np.flatnonzero(~kept[one])
        chosen[asking] = np.resize(random.permutation(free if len(free) else shots + spare), len(asking))
    found: np.ndarray = truth * (shots + spare) + chosen
    return found
