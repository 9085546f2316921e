"""Tasks with wrong labels, for methods that are to find them out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from metarun.config.hints import fields_of
from metarun.config.ranges import check_range
from metarun.config.task_schema import Noise
from metarun.core import Episodes, MixedEpisodes, TaskShape, largest, together
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
    where a class has no more of them is one used twice. A task that draws its numbers draws them as without noise.

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
        check_range(f"train.noise.{name}", share, fields_of(Noise)[name])
    sampler, spare = _with_spare(sampler_of, task)
    if any(one.ways < 2 for one in sampler(0, 1).split(1)):
        raise UserError("train.noise: a wrong label needs another class, and these tasks have one way alone")

    def episodes(start: int, stop: int) -> Episodes | MixedEpisodes:
        found, noisy = sampler(start, stop), noisy_tasks(seed, start, stop, tasks)
        if isinstance(found, Episodes):
            return with_wrong_labels(found, start, noisy)
        # One by one: tasks with different spare queries may be of one shape without them.
        numbered = enumerate(found.split(1))
        return together([with_wrong_labels(one, start + place, noisy[place : place + 1]) for place, one in numbered])

    def with_wrong_labels(found: Episodes, first: int, noisy: np.ndarray) -> Episodes:
        """Puts other support images into the noisy ones of the tasks from the number `first` on, and takes off all spare queries."""
        shots, given = found.support_sizes, found.query_sizes
        more = found.spare or (spare,) * found.ways
        asked = [size - last for size, last in zip(given, more, strict=True)]
        # The images of a class: its support set, and its last queries, which are spare.
        support, queries = (
            np.split(np.arange(sum(sizes)) + begin, np.cumsum(sizes)[:-1])
            for sizes, begin in ((shots, 0), (given, sum(shots)))
        )
        parts = [[rest[:size], rest[size:]] for rest, size in zip(queries, asked, strict=True)]
        images = np.concatenate([part for own, (_, last) in zip(support, parts, strict=True) for part in (own, last)])
        chosen = np.tile(np.arange(sum(shots)), (len(noisy), 1))
        for row in np.flatnonzero(noisy).tolist():
            chosen[row] = images[mislabelled(generator("train/noise", seed, first + row), shots, more, labels)]
        device = found.support_x.device
        rows = torch.arange(len(noisy), device=device)[:, None]
        places = torch.from_numpy(np.concatenate([kept for kept, _ in parts]) - sum(shots)).to(device)
        return replace(
            found,
            support_x=torch.cat([found.support_x, found.query_x], 1)[rows, torch.from_numpy(chosen).to(device)],
            query_x=found.query_x[:, places],
            query_y=found.query_y[:, places],
            queries=None if len(set(asked)) == 1 else tuple(asked),
            spare=None,
        )

    return episodes


def _with_spare(sampler_of: Callable[[TaskShape], EpisodeSampler], task: TaskShape) -> tuple[EpisodeSampler, int]:
    """Tasks with further queries, as many as hardly any task needs more of, or as the classes have; and how many a class has.

    The number is that of tasks of one shape; others say it themselves, since each class may have another one.
    """
    shots, queries = largest(task.shots), task.queries
    wanted = min((largest(task.ways) - 1) * shots, math.ceil(shots + 4 * shots**0.5))
    if not task.plain:
        return sampler_of(replace(task, spare=wanted)), 0
    for spare in range(wanted, 0, -1):
        with contextlib.suppress(UserError):
            return sampler_of(replace(task, queries=largest(queries) + spare)), spare
    return sampler_of(task), 0


def mislabelled(random: np.random.Generator, shots: Sequence[int], spare: Sequence[int], share: float) -> np.ndarray:
    """Chooses the images of a support set with wrong labels.

    Args:
        random: What the draws are made with.
        shots: The images that each class would have without noise; they come first in their class. At least 2 classes.
        spare: The further images of each class.
        share: The probability that a label is wrong, in [0, 1].

    Returns:
        For each place of the class-major support set an image, int64 `[sum of shots]`, counted class by class with the
        further images of each.
    """
    ways = len(shots)
    own = np.repeat(np.arange(ways), shots)
    wrong = random.random(len(own)) < share
    truth = (own + np.where(wrong, random.integers(1, ways, len(own)), 0)) % ways
    chosen = np.concatenate([np.arange(size) for size in shots])
    sizes = [own + more for own, more in zip(shots, spare, strict=True)]
    kept = np.zeros((ways, max(sizes)), dtype=bool)
    kept[own[~wrong], chosen[~wrong]] = True
    for one in np.unique(truth[wrong]):
        asking = np.flatnonzero(wrong & (truth == one))
        size = sizes[one]
        free = np.flatnonzero(~kept[one, :size])
        chosen[asking] = np.resize(random.permutation(free if len(free) else size), len(asking))
    firsts = np.cumsum([0, *sizes])
    found: np.ndarray = firsts[truth] + chosen
    return found
