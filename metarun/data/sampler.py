"""Episode i as a pure function of (seed, split, i): exact resume, and the same tasks for every method and any number of workers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from metarun.core import TaskShape
from metarun.errors import UserError
from metarun.text import counted

# Gives the rows and the quarter turns of the episodes from `start` to `stop`.
Draw = Callable[[int, int], tuple[np.ndarray, np.ndarray]]

BLOCK_ITEMS = 2**15  # episodes are drawn at once up to so many items


def uniforms(seed: int, split: str, start: int, stop: int, width: int) -> np.ndarray:
    """Draws uniform numbers in [0, 1) for each of some episodes.

    Those of an episode depend on (seed, split, its number, width) alone: the Philox counter generator is set to its own block.

    Args:
        seed: The run's seed.
        split: The split, or another word for what is drawn.
        start: The number of the first episode.
        stop: The number after that of the last.
        width: How many numbers an episode has.

    Returns:
        float64 `[stop - start, width]`.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{split}".encode(), digest_size=16).digest(), "little")
    blocks = -(-width // 4)  # a Philox counter yields four 64-bit words
    raw = np.random.Philox(key=key, counter=start * blocks).random_raw((stop - start, blocks * 4))
    return (raw[:, :width] >> np.uint64(11)) * 2.0**-53


def distinct(draws: np.ndarray, order: np.ndarray, sizes: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Draws k distinct integers below `sizes[r]` for each row r, in random order, int64 `[R, k]`.

    `draws` and `order` are uniforms `[R, k]`; `sizes` is int64 `[R]` with values of at least k. Floyd's algorithm
    (Bentley and Floyd 1987) chooses the set with k draws whatever the size; sorting by `order` shuffles it. With `counts`,
    int64 `[R]`, row r has that many integers, at most k and `sizes[r]`, and what follows them in the row means nothing.
    """
    rows, k = draws.shape
    columns = np.ascontiguousarray(draws.T)
    chosen = np.empty((k, rows), dtype=np.int64)  # a draw of all rows side by side: few operations on many numbers
    wanted = k if counts is None else counts
    for column, uniform in enumerate(columns):
        last = sizes - wanted + column
        candidate = (uniform * (last + 1)).astype(np.int64)
        taken = (chosen[:column] == candidate).any(axis=0)
        chosen[column] = np.where(taken, last, candidate)
    if counts is not None:
        order = np.where(np.arange(k) < counts[:, None], order, 1.0)
    return np.take_along_axis(chosen.T, order.argsort(axis=1), axis=1)


def members_of(
    classes: np.ndarray, groups: np.ndarray | None, rotations: int, needed: int
) -> tuple[list[np.ndarray], int]:
    """Finds the groups of classes that a task can be drawn from.

    Args:
        classes: The classes of the split.
        groups: The number of each one's group; None where all are one group.
        rotations: The classes that each makes.
        needed: The fewest classes of a task.

    Returns:
        For each group with enough classes their places in `classes`, and the number of classes of the largest group.
    """
    numbers = np.zeros(len(classes), np.int64) if groups is None else groups
    members = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    largest = max((len(member) for member in members), default=0) * rotations
    return [member for member in members if len(member) * rotations >= needed], largest


@dataclass(frozen=True)
class ClassSampler:
    """Draws the classes, rotations and image rows of episodes.

    `offsets` are the table's, int64 [classes + 1]; `classes` are the class indices of the split; `groups` (one number
    per entry of `classes`) makes all ways of an episode come from one group (an alphabet); `rotations` is 1, or 4 where
    each class turned by 90, 180 and 270 degrees counts as a class of its own.
    """

    offsets: np.ndarray
    classes: np.ndarray
    task: TaskShape
    seed: int
    split: str
    rotations: int = 1
    groups: np.ndarray | None = None
    _members: list[np.ndarray] = field(init=False, repr=False)
    _size: tuple[int, int] = field(init=False, repr=False)  # the classes of a task, and the images of each

    def __post_init__(self) -> None:
        task = self.task
        ways, shots, queries = task.numbers  # those of other tasks are drawn by `VariedSampler`
        sizes = np.diff(self.offsets)[self.classes]
        needed = shots + queries
        if len(sizes) and sizes.min() < needed:
            raise UserError(
                f"task: shots + queries = {shots} + {queries} = {needed} is above the {counted(sizes.min(), 'image')} "
                f"of the smallest class of the {self.split} split; lower {self._key('shots')} or {self._key('queries')}"
            )
        members, largest = members_of(self.classes, self.groups, self.rotations, ways)
        if not members:
            within = "" if self.groups is None else " within one group"
            raise UserError(
                f"task: ways = {ways} is above the {largest} classes of the {self.split} split{within}; lower {self._key('ways')}"
            )
        object.__setattr__(self, "_members", members)
        object.__setattr__(self, "_size", (ways, needed))

    def _key(self, name: str) -> str:
        return f"{'train' if self.split == 'train' else 'test'}.task.{name}"

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws table rows int64 `[T, N, K + Q]` and quarter turns int64 `[T, N]` of the episodes from `start` to `stop`."""
        ways, images = self._size
        episodes = stop - start
        draws = uniforms(self.seed, self.split, start, stop, 1 + 2 * ways + 2 * ways * images)
        group = (draws[:, 0] * len(self._members)).astype(np.int64)
        sizes = np.array([len(member) for member in self._members])
        padded = np.zeros((len(self._members), sizes.max()), np.int64)
        for row, member in enumerate(self._members):
            padded[row, : len(member)] = member
        picked = distinct(draws[:, 1 : 1 + ways], draws[:, 1 + ways : 1 + 2 * ways], sizes[group] * self.rotations)
        turns = picked % self.rotations
        classes = self.classes[padded[group[:, None], picked // self.rotations]]
        rest = draws[:, 1 + 2 * ways :].reshape(episodes, 2, ways * images)
        rows = distinct(
            rest[:, 0].reshape(-1, images), rest[:, 1].reshape(-1, images), np.diff(self.offsets)[classes].reshape(-1)
        ).reshape(episodes, ways, images)
        return rows + self.offsets[classes][..., None], turns

    def in_blocks(self) -> Draw:
        """Calls `draw` for some hundreds of episodes, which take it as long as a few, and keeps the others for the next call."""
        ways, images = self._size
        block = max(1, BLOCK_ITEMS // (ways * images))

        @functools.lru_cache(1)
        def kept(number: int) -> tuple[np.ndarray, np.ndarray]:
            return self.draw(number * block, (number + 1) * block)

        def draw(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            first, last = start // block, (stop - 1) // block
            if first != last:  # several blocks, or no episode
                return self.draw(start, stop)
            rows, turns = kept(first)
            return rows[start - first * block : stop - first * block], turns[
                start - first * block : stop - first * block
            ]

        return draw
