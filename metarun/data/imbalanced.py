"""Test tasks whose queries are of unequal classes: their number stays, their shares are drawn anew for each task.

Source:
    Veilleux, Boudiaf, Piantanida, Ben Ayed (2021), section 3; oveilleux/Realistic_Transductive_Few_Shot, `src/datasets/sampler.py`.

Differences from the official code: shares are rounded by the largest remainders; a class gets no more queries than the smallest class of
the split has left, and what is above that goes to the others in their proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.special import betainc, gammaincinv

from metarun.core import Episodes, TaskShape
from metarun.data.sampler import ClassSampler, uniforms
from metarun.data.source import Reader


def dirichlet(draws: np.ndarray, concentration: float) -> np.ndarray:
    """Shares `[T, N]` of Dirichlet's distribution with equal parameters, from uniform numbers `[T, N]` in [0, 1).

    Args:
        draws: The uniform numbers.
        concentration: The parameter; the smaller, the more unequal are the shares.
    """
    weights = gammaincinv(concentration, draws) + 1e-300  # of Gamma's distribution; not all of them zero
    found: np.ndarray = weights / weights.sum(1, keepdims=True)
    return found


def divided(shares: np.ndarray, total: int, most: int) -> np.ndarray:
    """Whole numbers `[T, N]` near `total` times the shares `[T, N]`, each at most `most`, that add up to `total` in each row.

    Args:
        shares: Positive numbers that add up to 1 in each row.
        total: What a row adds up to, at most N times `most`.
        most: The largest number of a class.
    """
    wanted = shares * total
    full = np.zeros(wanted.shape, bool)
    while (over := (wanted > most) & ~full).any():
        full |= over
        left = total - most * full.sum(1, keepdims=True)
        open_shares = np.where(full, 0, shares)
        scale = left / np.maximum(open_shares.sum(1, keepdims=True), 1e-300)
        wanted = np.where(full, most, open_shares * scale)
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    order = np.argsort(-(wanted - counts), axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    found: np.ndarray = counts + (rank < total - counts.sum(1, keepdims=True))
    return found


def most_queries(task: TaskShape, sizes: np.ndarray) -> int:
    """The most queries that a class of such a task has: all of the task, or what the smallest class has beside its shots.

    Args:
        task: The shape, of numbers alone.
        sizes: The items of each class of the split.
    """
    ways, shots, queries = task.numbers
    return min(ways * queries, int(sizes.min()) - shots)


def cut_short(task: TaskShape, most: int) -> float:
    """The probability that a class of a task gets fewer queries than its share, since a class has at most `most`.

    A share of Dirichlet's distribution of N equal parameters a has the distribution Beta(a, (N - 1) a).

    Args:
        task: The shape, with a `query_dirichlet`.
        most: The most queries of a class.
    """
    assert task.query_dirichlet is not None
    ways, _, queries = task.numbers
    a = task.query_dirichlet
    return float(betainc((ways - 1) * a, a, 1 - most / (ways * queries)))


class ImbalancedSampler:
    """Draws tasks of equal shots whose queries, `ways * queries` together, are divided among the classes by Dirichlet shares.

    Task i is a function of (seed, split, i), as with `ClassSampler`, which draws the classes and the items.

    Args:
        offsets: The table's, int64 `[classes + 1]`.
        classes: The classes of the split.
        task: The shape, with a `query_dirichlet`.
        seed: The run's seed.
        split: The name of the split.
        rotations: The classes that each class makes.
        groups: The number of each class's group; None where all are one group.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        classes: np.ndarray,
        task: TaskShape,
        seed: int,
        split: str,
        rotations: int,
        groups: np.ndarray | None,
    ) -> None:
        assert isinstance(task.ways, int)
        assert isinstance(task.shots, int)
        assert isinstance(task.queries, int)
        assert task.query_dirichlet is not None
        self.ways, self.shots, self.total = task.ways, task.shots, task.ways * task.queries
        self.most = most_queries(task, np.diff(offsets)[classes])
        self.seed, self.split, self.concentration = seed, split, task.query_dirichlet
        plain = replace(task, queries=self.most, query_dirichlet=None)
        self.draw = ClassSampler(offsets, classes, plain, seed, split, rotations, groups).in_blocks()

    def counts(self, start: int, stop: int) -> np.ndarray:
        """The queries of each class of the tasks from `start` to `stop`, int64 `[T, N]`."""
        draws = uniforms(self.seed, f"{self.split}/query_dirichlet", start, stop, self.ways)
        return divided(dirichlet(draws, self.concentration), self.total, self.most)

    def episodes(self, read: Reader, device: torch.device) -> Callable[[int, int], Episodes]:
        """A function that gives the tasks from `start` to `stop`, class by class.

        Args:
            read: A function of table rows `[..., n]` and quarter turns `[...]` that gives the items.
            device: Where the labels shall lie.
        """
        labels = torch.arange(self.ways, device=device).repeat_interleave(self.shots)

        def tasks(start: int, stop: int) -> Episodes:
            rows, turns = self.draw(start, stop)
            count = stop - start
            counts = self.counts(start, stop)
            asked = np.arange(self.most) < counts[..., None]  # [T, N, most]
            ways = np.broadcast_to(np.arange(self.ways)[:, None], asked.shape)[asked].reshape(count, self.total)
            where = rows[..., self.shots :][asked].reshape(count, self.total, 1)
            support_x = read(rows[..., : self.shots], turns).flatten(1, 2)
            query_x = read(where, np.take_along_axis(turns, ways, axis=1)).flatten(1, 2)
            query_y = torch.from_numpy(np.ascontiguousarray(ways)).to(device)
            return Episodes(support_x, labels.expand(count, -1), query_x, query_y, self.ways, divided=True)

        return tasks
