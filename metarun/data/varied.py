"""Tasks that differ in their shapes, and tasks with unlabelled items: task i is still a function of (seed, split, i) alone.

The numbers of items are drawn after the classes, from what the ranges allow and these classes have: a class with few items
makes the range shorter and is no error.

Source:
    Meta-Dataset's protocol: Triantafillou et al. (2020), section 3.2, steps 1 and 2; google-research/meta-dataset,
    `meta_dataset/data/sampling.py`. Unlabelled items, distractors and the share of labelled items: Ren et al. (2018),
    section 4; renmengye/few-shot-ssl-public, `fewshot/data/refinement_dataset.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from metarun.config.task_schema import LARGEST_SUPPORT
from metarun.core import Count, Episodes, MixedEpisodes, TaskShape, largest, least
from metarun.data.image_batches import generator
from metarun.data.sampler import distinct, members_of, uniforms
from metarun.errors import UserError
from metarun.text import counted

Array = np.ndarray
Reader = Callable[[Array, Array], torch.Tensor]

LOG_WEIGHTS = (np.log(0.5), np.log(2.0))  # between which the logarithm of a class's weight lies: Meta-Dataset's


def labelled_sizes(task: TaskShape, sizes: Array) -> Array:
    """Counts the items of each class that may have labels: the task's share of them, rounded down, at least 1."""
    if task.labelled_share == 1:
        return sizes
    found: Array = np.maximum(np.floor(task.labelled_share * sizes + 1e-9), 1).astype(np.int64)
    return found


def shortage(task: TaskShape, sizes: Array, item: str = "image") -> tuple[int, str, int] | None:
    """The smallest class that cannot serve a task, why, to stand before "of class NAME", and how many items would do.

    Args:
        task: The shape, or the ranges that it is drawn from.
        sizes: The items of each class, int64.
        item: What an item is called.

    Returns:
        The place of the class, the reason, and the number of items; None where all classes can serve.
    """
    shots, queries, unlabelled = least(task.shots), least(task.queries), task.unlabelled
    apart = task.labelled_share < 1
    needed, words = shots + queries, f"shots + queries = {shots} + {queries}"
    if task.protocol == "meta_dataset" and isinstance(task.shots, tuple) and isinstance(task.queries, tuple):
        needed, words = max(needed, 2 * queries, 2 * shots - 1), f"{words}, of at most half of a class for queries,"
    if unlabelled and not apart:
        needed, words = needed + unlabelled, words.replace("queries =", "queries + unlabelled =") + f" + {unlabelled}"

    def can(sizes: Array) -> Array:
        own = labelled_sizes(task, sizes)
        found: Array = (own >= needed) & ((sizes - own >= unlabelled) if apart else True)
        return found

    if can(sizes).all():
        return None
    at = int(np.argmin(np.where(can(sizes), sizes.max() + 1, sizes)))
    enough = needed
    while not can(np.array([enough]))[0]:
        enough += 1
    own = labelled_sizes(task, sizes)
    if own[at] >= needed:
        return (
            at,
            f"unlabelled = {unlabelled} is above the {counted((sizes - own)[at], item)} without labels",
            enough,
        )
    kind, share = (f"labelled {item}", f" (task.labelled_share={task.labelled_share:g})") if apart else (item, "")
    return at, f"{words} = {needed} is above the {counted(own[at], kind)}{share}", enough


def fewest_items(task: TaskShape) -> int:
    """Counts the items that a class needs to serve a task."""
    found = shortage(task, np.array([0]))
    return found[2] if found else 0


def pick(count: Count, draw: Array, top: Array) -> Array:
    """A number for each draw in [0, 1): the count itself, or one from its range, at most `top`, each as likely."""
    if not isinstance(count, tuple):
        return np.full(draw.shape, count)
    low, high = count[0], np.minimum(count[1], top)
    return low + np.floor(draw * (high - low + 1)).astype(np.int64)


def uniform_sizes(task: TaskShape, draws: Array, sizes: Array) -> tuple[Array, Array]:
    """Draws the shots and the queries of each class, `[N]` each, uniform in what the ranges and the classes allow.

    Args:
        task: The ranges. In balanced tasks all classes have the same numbers, which the smallest one can have.
        draws: Uniform numbers `[2, N]`, of which balanced tasks take the first column.
        sizes: The items of each class, `[N]`.
    """
    if task.balanced:
        draws, top = draws[:, :1], sizes.min(keepdims=True)
    else:
        top = sizes
    shots = pick(task.shots, draws[0], top - least(task.queries))
    queries = pick(task.queries, draws[1], top - shots)
    return np.broadcast_to(shots, sizes.shape), np.broadcast_to(queries, sizes.shape)


def meta_dataset_sizes(task: TaskShape, beta: float, alpha: Array, sizes: Array) -> tuple[Array, Array]:
    """Draws the shots and the queries of each class, `[N]` each, as Meta-Dataset does.

        q     = min(10, min_c floor(|Im(c)| / 2))                                   queries of every class
        |S|   = min(500, sum_c ceil(beta min(100, |Im(c)| - q))),  beta in (0, 1]    size of the support set
        R_c   = exp(alpha_c) |Im(c)| / sum_c' exp(alpha_c') |Im(c')|,  alpha_c in [log 0.5, log 2)
        K_c   = min(floor(R_c (|S| - N)) + 1, |Im(c)| - q)                           shots

    Args:
        task: The ranges, whose ends are the 10 of the queries and the 100 of the shots. A number in place of a range stays as
            it is, as in the official code; with as many shots in every class, queries are of what remains.
        beta: Uniform in [0, 1): the official code has floor(beta x + 1) for the ceiling.
        alpha: Uniform in [0, 1), `[N]`, brought to the range of the weights.
        sizes: The items of each class, `[N]`.
    """
    most = int((sizes // 2).min()) if isinstance(task.shots, tuple) else int(sizes.min()) - task.shots
    number = min(task.queries[1], most) if isinstance(task.queries, tuple) else task.queries
    queries = np.full(sizes.shape, number)
    if not isinstance(task.shots, tuple):
        return np.full(sizes.shape, task.shots), queries
    remaining = sizes - queries
    total = min(LARGEST_SUPPORT, np.floor(beta * np.minimum(task.shots[1], remaining) + 1).sum())
    low, high = LOG_WEIGHTS
    weights = sizes * np.exp(low + (high - low) * alpha)
    shots = np.floor(weights / weights.sum() * (total - len(sizes))).astype(np.int64) + 1
    return np.minimum(np.maximum(shots, task.shots[0]), remaining), queries


@dataclass(frozen=True)
class Drawn:
    """The items of one task.

    Args:
        ways: The classes of the task.
        shots: The support items of each class.
        queries: The queries of each class.
        spare: The further queries of each class, after its queries.
        unlabelled: The number of unlabelled items.
        rows: Of the table, int64 `[M]`: the support set and the queries, class-major, and the unlabelled items in no order.
        turns: Their quarter turns, int64 `[M]`.
        classes: The numbers of the task's classes in the table, `[N]`.
    """

    ways: int
    shots: tuple[int, ...]
    queries: tuple[int, ...]
    spare: tuple[int, ...]
    unlabelled: int
    rows: Array
    turns: Array
    classes: Array

    @property
    def shape(self) -> tuple[object, ...]:
        """What the tasks of one meta-batch share."""
        return self.ways, self.shots, self.queries, self.spare, self.unlabelled


@dataclass(frozen=True)
class VariedSampler:
    """Draws the shapes and the items of tasks; the attributes are those of `ClassSampler`."""

    offsets: Array
    classes: Array
    task: TaskShape
    seed: int
    split: str
    rotations: int = 1
    groups: Array | None = None
    members: list[Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        task = self.task
        found = shortage(task, np.diff(self.offsets)[self.classes])
        if found is not None:
            raise UserError(f"task: {found[1]} of class {self.classes[found[0]]} of the {self.split} split")
        least_classes, most = (count + task.distractors for count in (least(task.ways), task.needed_ways))
        members, size = members_of(self.classes, self.groups, self.rotations, least_classes)
        if size < most:
            words = f"ways + distractors = {task.needed_ways} + {task.distractors}" if task.distractors else "ways"
            within = "" if self.groups is None else " within one group"
            key = "train" if self.split == "train" else "test"
            raise UserError(
                f"task: {words} = {most} is above the {size} classes of the {self.split} split{within}; lower {key}.task.ways"
            )
        object.__setattr__(self, "members", members)

    @cached_property
    def _pools(self) -> tuple[Array, Array]:
        """An order of each class's rows, whose first ones may have labels, int64 `[rows of the table]`; and their numbers.

        A class's order depends on (seed, class) alone: the same items have labels in all tasks.
        """
        sizes = np.diff(self.offsets)
        order = np.arange(self.offsets[-1])
        if self.task.labelled_share < 1:
            for number in self.classes:
                start, stop = self.offsets[number : number + 2]
                order[start:stop] = start + generator("labelled", self.seed, number).permutation(stop - start)
        return order, labelled_sizes(self.task, sizes)

    @property
    def _extra(self) -> int:
        """The unlabelled items of a class that are drawn together with its labelled ones: none where they are kept apart."""
        return 0 if self.task.labelled_share < 1 else self.task.unlabelled

    def draw(self, start: int, stop: int) -> list[Drawn]:
        """Draws the tasks from `start` to `stop`."""
        task, extra = self.task, self._extra
        sizes, (order, labelled) = np.diff(self.offsets), self._pools
        width = largest(task.ways) + task.distractors
        biggest = int(sizes[self.classes].max())
        # Meta-Dataset's 100 is of what a class adds to the size of the support set, of which a large class may get more.
        capped = LARGEST_SUPPORT if task.protocol == "meta_dataset" else 0
        items = min(max(largest(task.shots), capped) + largest(task.queries) + extra + task.spare, biggest)
        others = task.unlabelled - extra
        blocks = [3, 2 * width, 3 * width, task.unlabelled * width, 2 * width * items, 2 * width * others]
        draws = uniforms(self.seed, f"{self.split}/varied", start, stop, sum(blocks))
        first, classes, shapes, places, own, further = np.split(draws, np.cumsum(blocks)[:-1], axis=1)
        ways, numbers, turns = self._draw_classes(first, classes, width)
        available = labelled[numbers] - extra
        shots, queries = self._draw_sizes(first, shapes.reshape(-1, 3, width), ways, available)
        spare = np.where(np.arange(width) < ways[:, None], np.clip(available - shots - queries, 0, task.spare), 0)
        used = np.arange(width) < (ways + task.distractors)[:, None]

        def rows_of(draws: Array, number: int, first_place: Array, sizes: Array, counts: Array) -> Array:
            """Distinct items `[T, W, number]`, of which the first `counts` are meant."""
            if not number:
                return np.zeros((*counts.shape, 0), np.int64)
            pair = draws.reshape(len(draws), 2, width, number).swapaxes(0, 1).reshape(2, -1, number)
            chosen = distinct(pair[0], pair[1], sizes.reshape(-1), counts.reshape(-1)).reshape(*counts.shape, number)
            # What lies beyond the counts is of no meaning, and may be of no class either.
            chosen = np.where(np.arange(number) < counts[..., None], chosen, 0)
            return order[np.minimum(first_place[..., None] + chosen, len(order) - 1)]

        wanted = np.where(used, shots + queries + extra + spare, 0)
        rows = rows_of(own, items, self.offsets[numbers], labelled[numbers], wanted)
        begin, free = (self.offsets[:-1] + labelled)[numbers], (sizes - labelled)[numbers]
        rest = rows_of(further, others, begin, free, np.where(used, others, 0))
        each = zip(ways, numbers, turns, shots, queries, spare, rows, rest, places, strict=True)
        return [self._put_together(*one) for one in each]

    def _draw_classes(self, first: Array, draws: Array, width: int) -> tuple[Array, Array, Array]:
        """The ways of each task `[T]`, the numbers of its classes and distractors `[T, W]`, and their quarter turns `[T, W]`."""
        group = (first[:, 0] * len(self.members)).astype(np.int64)
        room = np.array([len(member) for member in self.members])[group] * self.rotations
        ways = pick(self.task.ways, first[:, 1], room - self.task.distractors)
        counts = ways + self.task.distractors
        padded = np.zeros((len(self.members), max(map(len, self.members))), np.int64)
        for row, member in enumerate(self.members):
            padded[row, : len(member)] = member
        picked = distinct(draws[:, :width], draws[:, width:], room, counts)
        picked = np.where(np.arange(width) < counts[:, None], picked, 0)
        return ways, self.classes[padded[group[:, None], picked // self.rotations]], picked % self.rotations

    def _draw_sizes(self, first: Array, shapes: Array, ways: Array, available: Array) -> tuple[Array, Array]:
        """The shots and the queries of each class `[T, W]`, 0 of a distractor, of the items that are available `[T, W]`."""
        task = self.task
        shots, queries = (np.zeros(available.shape, np.int64) for _ in range(2))
        for t, n in enumerate(ways):
            if task.protocol == "meta_dataset":
                found = meta_dataset_sizes(task, first[t, 2], shapes[t, 2, :n], available[t, :n])
            else:
                found = uniform_sizes(task, shapes[t, :2, :n], available[t, :n])
            shots[t, :n], queries[t, :n] = found
        return shots, queries

    def _put_together(
        self,
        ways: int,
        numbers: Array,
        turns: Array,
        shots: Array,
        queries: Array,
        spare: Array,
        rows: Array,
        rest: Array,
        places: Array,
    ) -> Drawn:
        """Puts one task together.

        Args:
            ways: Its classes.
            numbers: The numbers of its classes, then of its distractors, `[W]`, of which those beyond have no meaning.
            turns: Their quarter turns `[W]`.
            shots: Their shots `[W]`.
            queries: Their queries `[W]`.
            spare: Their further queries `[W]`.
            rows: Their items `[W, items]`: the support set first, then the queries, unlabelled items, and further queries.
            rest: Their unlabelled items `[W, others]`, where these are kept apart.
            places: What the unlabelled items are shuffled by.
        """
        total, column = ways + self.task.distractors, np.arange(rows.shape[1])
        s, q, more = shots[:total, None], queries[:total, None], spare[:total, None]
        end = s + q + self._extra
        given = [rows[:total], np.broadcast_to(turns[:total, None], (total, len(column)))]
        support = column < s
        asked = ((s <= column) & (column < s + q)) | ((end <= column) & (column < end + more))
        if self.task.labelled_share < 1:
            unlabelled = [rest[:total].ravel(), np.repeat(turns[:total], rest.shape[1])]
        else:
            unlabelled = [part[(s + q <= column) & (column < end)] for part in given]
        mixed = places[: len(unlabelled[0])].argsort()
        own_rows, own_turns = (
            np.concatenate([whole[support], whole[asked], some[mixed]])
            for whole, some in zip(given, unlabelled, strict=True)
        )
        of_shots, of_queries, of_spare = (tuple(part[:ways].tolist()) for part in (shots, queries, spare))
        return Drawn(int(ways), of_shots, of_queries, of_spare, len(mixed), own_rows, own_turns, numbers[:ways])

    def episodes(self, read: Reader, device: torch.device) -> Callable[[int, int], Episodes | MixedEpisodes]:
        """A function of (start, stop) that yields these tasks.

        Args:
            read: Yields the images of table rows `[..., n]` and quarter turns `[...]`.
            device: Where the labels shall lie.
        """

        def found(start: int, stop: int) -> Episodes | MixedEpisodes:
            places: dict[tuple[object, ...], list[int]] = {}
            tasks = self.draw(start, stop)
            for place, one in enumerate(tasks):
                places.setdefault(one.shape, []).append(place)
            groups = tuple(of_one_shape([tasks[place] for place in same], read, device) for same in places.values())
            return groups[0] if len(groups) == 1 else MixedEpisodes(groups, tuple(map(tuple, places.values())))

        return found


def of_one_shape(tasks: list[Drawn], read: Reader, device: torch.device) -> Episodes:
    """Joins tasks of one shape into a meta-batch."""
    one = tasks[0]
    x = read(np.stack([task.rows for task in tasks])[..., None], np.stack([task.turns for task in tasks])).squeeze(2)
    asked = tuple(queries + more for queries, more in zip(one.queries, one.spare, strict=True))
    support_x, query_x, unlabelled_x = x.split([sum(one.shots), sum(asked), one.unlabelled], dim=1)
    classes = torch.arange(one.ways, device=device)
    support_y, query_y = (
        classes.repeat_interleave(torch.tensor(each, device=device)).expand(len(tasks), -1)
        for each in (one.shots, asked)
    )
    shots, queries = (None if len(set(each)) == 1 else each for each in (one.shots, asked))
    unlabelled, spare = unlabelled_x if one.unlabelled else None, one.spare if any(one.spare) else None
    return Episodes(support_x, support_y, query_x, query_y, one.ways, shots, queries, unlabelled, spare)
