"""Tasks with wrong labels, for methods that are to find them out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from metarun.core import Episodes
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


def with_noise(sampler: EpisodeSampler, seed: int, tasks: float, labels: float) -> EpisodeSampler:
    """Puts wrong labels on the support examples of a share of the tasks.

    In a noisy task each support label turns into another class with probability `labels`, and each other class is as
    likely as the next (the symmetric noise of Yao et al. 2021, ATS, section 5.1). Every class keeps its number of
    examples, since the sets of a task are class-major and a class without support has no prototype. The labels of one
    task are therefore not independent of each other: their number of wrong ones is `labels` times the number of labels,
    rounded at random to a number that can be had. One label alone cannot be wrong, and between two classes every wrong
    label comes with another one.

    Args:
        sampler: The tasks without noise.
        seed: The run's seed; task i depends on (seed, i) alone.
        tasks: The share of the tasks that are noisy, in [0, 1].
        labels: The probability that a support label of a noisy task is wrong, in [0, 1].

    Returns:
        The sampler of the same tasks with the noise in them.

    Raises:
        UserError: A share is not in [0, 1], or the tasks have one class alone.
    """
    for name, share in (("tasks", tasks), ("labels", labels)):
        if not 0 <= share <= 1:
            raise UserError(f"train.noise.{name}={share}: is a share; it must be from 0 to 1")

    if sampler(0, 1).ways < 2:
        raise UserError("train.noise: a wrong label needs another class, and these tasks have one way alone")

    def episodes(start: int, stop: int) -> Episodes:
        found = sampler(start, stop)
        size = found.support_x.shape[1]
        order = np.tile(np.arange(size), (stop - start, 1))
        for row in np.flatnonzero(noisy_tasks(seed, start, stop, tasks)):
            order[row] = misplaced(generator("train/noise", seed, start + row), size, found.ways, labels)
        places = torch.from_numpy(order).to(found.support_x.device)
        rows = torch.arange(stop - start, device=places.device)[:, None]
        return replace(found, support_x=found.support_x[rows, places])

    return episodes


def misplaced(random: np.random.Generator, size: int, ways: int, share: float) -> np.ndarray:
    """Moves examples of a class-major set to places of other classes.

    Args:
        random: What the draws are made with.
        size: The number of examples, a multiple of `ways`.
        ways: The number of classes, at least 2.
        share: The probability that a place gets an example of another class, in [0, 1].

    Returns:
        For each place the example that it gets, int64 `[size]`, a permutation. Each of the other classes is as likely.
    """
    classes = np.arange(size) // (size // ways)
    rank = random.permutation(ways)[classes]
    # The places that change are spread over the classes as evenly as can be, so that no class has more than half of them.
    turn = np.concatenate([random.permutation(size // ways) for _ in range(ways)])
    wrong = np.lexsort((rank, turn))[: _rounded(share * size, size, ways, random.random())]
    # In the order of the classes, a shift by the largest number of places of one class leads out of every class.
    wrong = wrong[np.lexsort((turn[wrong], rank[wrong]))]
    given = np.roll(wrong, -np.bincount(classes[wrong], minlength=ways).max())
    # Exchanges that leave both places wrong then make any such assignment reachable, not the exchange of whole classes alone.
    count = len(wrong)
    for i, j in zip(np.tile(np.arange(count), 4), random.integers(max(count, 1), size=4 * count), strict=True):
        if classes[given[i]] != classes[wrong[j]] and classes[given[j]] != classes[wrong[i]]:
            given[i], given[j] = given[j], given[i]
    places = np.arange(size)
    places[wrong] = given
    return places


def _rounded(mean: float, size: int, ways: int, draw: float) -> int:
    """A possible number of wrong labels whose expectation over `draw` is `mean`: any but 1, and of two classes an even one."""
    possible = np.arange(0, size + 1, 2) if ways == 2 else np.delete(np.arange(size + 1), 1)
    above = int(np.searchsorted(possible, mean))
    low, high = possible[max(above - 1, 0)], possible[above]
    return int(high if draw * (high - low) < mean - low else low)
