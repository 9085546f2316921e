"""Tasks with wrong labels, for methods that are to find them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from metarun.core import Episodes, MixedEpisodes
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

    if any(one.ways < 2 for one in sampler(0, 1).split(1)):
        raise UserError("train.noise: a wrong label needs another class, and these tasks have one way alone")

    def episodes(start: int, stop: int) -> Episodes | MixedEpisodes:
        found = sampler(start, stop)
        noisy = noisy_tasks(seed, start, stop, tasks)
        if isinstance(found, Episodes):
            return with_wrong_labels(found, range(start, stop), noisy)
        groups = tuple(
            with_wrong_labels(group, [start + place for place in places], noisy[list(places)])
            for places, group in found.chunks()
        )
        return MixedEpisodes(groups, found.places)

    def with_wrong_labels(found: Episodes, numbers: Sequence[int], noisy: np.ndarray) -> Episodes:
        order = np.tile(np.arange(found.support_x.shape[1]), (len(numbers), 1))
        for row in np.flatnonzero(noisy).tolist():
            order[row] = misplaced(generator("train/noise", seed, numbers[row]), found.support_sizes, labels)
        places = torch.from_numpy(order).to(found.support_x.device)
        rows = torch.arange(len(numbers), device=places.device)[:, None]
        return replace(found, support_x=found.support_x[rows, places])

    return episodes


def misplaced(random: np.random.Generator, sizes: Sequence[int], share: float) -> np.ndarray:
    """Moves examples of a class-major set to places of other classes.

    Args:
        random: What the draws are made with.
        sizes: The number of examples of each class; at least 2 classes.
        share: The probability that a place gets an example of another class, in [0, 1]. Where one class has more examples
            than all others together, not all of them can have such places, and fewer places are wrong.

    Returns:
        For each place the example that it gets, int64 `[size]`, a permutation. Each of the other classes is as likely.
    """
    size, ways = sum(sizes), len(sizes)
    classes = np.repeat(np.arange(ways), sizes)
    rank = random.permutation(ways)[classes]
    # The places that change are spread over the classes as evenly as can be, so that no class has more than half of them.
    turn = np.concatenate([random.permutation(members) for members in sizes])
    wrong = np.lexsort((rank, turn))[: _rounded(share * size, size, ways, random.random())]
    most, others = np.bincount(classes[wrong], minlength=ways).argmax(), classes[wrong]
    if (excess := 2 * int((others == most).sum()) - len(wrong)) > 0:  # of classes of other sizes alone
        wrong = np.delete(wrong, np.flatnonzero(others == most)[-excess:])
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
