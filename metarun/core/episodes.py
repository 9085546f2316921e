"""The shapes that flow through metarun.

T tasks (the meta-batch), N ways, K shots, Q queries per way; C, H, W an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.config.hints import fields_of
from metarun.config.ranges import check_range
from metarun.config.task_schema import SIZES, TestTaskChange, TrainTaskChange
from metarun.errors import UserError

Count = int | tuple[int, int]  # a number, or the least and the largest of a range that each task draws from
RANGES = {**fields_of(TestTaskChange), **fields_of(TrainTaskChange)}  # in training alone a task may have no queries


@dataclass(frozen=True)
class Episodes:
    """A meta-batch of T tasks of equal size; the sets are class-major (all of way 0, all of way 1, ...).

    Args:
        support_x: The support sets, float `[T, N*K, C, H, W]`; in regression `[T, K, D]`.
        support_y: Their labels, int64 `[T, N*K]` in `[0, N)`; in regression values, float `[T, K, outputs]`.
        query_x: The queries, `[T, N*Q, C, H, W]`; in regression `[T, Q, D]`.
        query_y: Their labels `[T, N*Q]`, or in training probabilities `[T, N*Q, N]`; in regression `[T, Q, outputs]`.
        ways: N, the classes of a task; 1 in regression.
        shots: The support items of each way, the same in all tasks; None: equally many.
        queries: The queries of each way, the same in all tasks; None: equally many, unless they are `divided`.
        unlabelled_x: Items without labels, in no order, of the task's classes and perhaps of others, `[T, U, C, H, W]`; None
            where the tasks have none.
        spare: How many of the queries of each way, its last ones, `TaskShape.spare` added; None where it asks for none.
        divided: Whether each task divides its queries among the ways in its own way, so that no sizes hold for all tasks.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    ways: int
    shots: tuple[int, ...] | None = None
    queries: tuple[int, ...] | None = None
    unlabelled_x: Tensor | None = None
    spare: tuple[int, ...] | None = None
    divided: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four labelled sets, each with the task axis first, as `Algorithm.over_tasks` takes them."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, each with the task axis first."""
        found = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Iterable[Tensor]) -> Episodes:
        """Returns these tasks with other tensors, given in the order of `named_tensors`."""
        changed: dict[str, Any] = dict(zip(self.named_tensors, tensors, strict=True))
        return replace(self, **changed)

    def with_items(self, change: Callable[[Tensor], Tensor]) -> Episodes:
        """Applies `change` to all items of the tasks: the support sets, the queries and the unlabelled items."""
        sets = {name: getattr(self, name) for name in ("support_x", "query_x", "unlabelled_x")}
        changed: dict[str, Any] = {name: change(x) for name, x in sets.items() if x is not None}
        return replace(self, **changed)

    def with_queries(self, x: Tensor, y: Tensor) -> Episodes:
        """Returns these tasks with other queries, in any order."""
        return replace(self, query_x=x, query_y=y, queries=None, divided=False)

    def with_support(self, x: Tensor, y: Tensor) -> Episodes:
        """Returns these tasks with other support sets, class-major and with the same number of items of a class in each task."""
        sizes = tuple(y[0].bincount(minlength=self.ways).tolist())
        return replace(self, support_x=x, support_y=y, shots=None if len(set(sizes)) == 1 else sizes)

    @property
    def n_tasks(self) -> int:
        """T, the number of tasks, which a training step counts."""
        return self.support_x.shape[0]

    def split(self, size: int) -> Iterator[Episodes]:
        """Splits the meta-batch.

        Args:
            size: The most tasks of a chunk, at least 1.

        Yields:
            The tasks in their order, as views.
        """
        names = self.named_tensors
        for parts in zip(*(tensor.split(size) for tensor in names.values()), strict=True):
            yield self.with_tensors(parts)

    def chunks(self, size: int | None = None) -> Iterator[tuple[range, Episodes]]:
        """Splits the meta-batch, as `MixedEpisodes.chunks` does.

        Args:
            size: The most tasks of a chunk, at least 1; None has no limit.

        Yields:
            The places of the tasks of a chunk in the meta-batch, and these tasks.
        """
        if size is None or size >= self.n_tasks:
            yield range(self.n_tasks), self
            return
        for number, chunk in enumerate(self.split(size)):
            yield range(number * size, number * size + chunk.n_tasks), chunk

    @property
    def support_sizes(self) -> list[int]:
        """The number of support items of each way; they are class-major."""
        return list(self.shots or [self.support_y.shape[1] // self.ways] * self.ways)

    @property
    def query_sizes(self) -> list[int]:
        """The number of queries of each way; they are class-major.

        Raises:
            ValueError: They are `divided`, and these are several tasks.
        """
        if self.divided:
            if self.n_tasks > 1:
                raise ValueError("tasks that each divide their queries in their own way have no sizes in common")
            return list(self.query_y[0].bincount(minlength=self.ways).tolist())
        return list(self.queries or [self.query_y.shape[1] // self.ways] * self.ways)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes that two tasks must share to stand in one meta-batch."""
        unlabelled = None if self.unlabelled_x is None else self.unlabelled_x.shape[1]
        queries = self.query_y.shape[1] if self.divided else tuple(self.query_sizes)
        return self.ways, tuple(self.support_sizes), queries, unlabelled, self.spare

    def classes_in_turn(self) -> Tensor:
        """Finds the places of the support items `[N*K]`: the first of each way, then the second of each that has one, and so on."""
        sizes = self.support_sizes
        firsts = [sum(sizes[:way]) for way in range(self.ways)]
        order = [first + n for n in range(max(sizes)) for first, size in zip(firsts, sizes, strict=True) if n < size]
        return torch.tensor(order, device=self.support_y.device)


@dataclass(frozen=True)
class MixedEpisodes:
    """A meta-batch of T tasks of several shapes: those of one shape stand together. Methods see one group at a time.

    Args:
        groups: The tasks of each shape.
        places: Where the tasks of each group stand in the meta-batch, each place from 0 to T - 1 once.
    """

    groups: tuple[Episodes, ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def n_tasks(self) -> int:
        """T, the number of tasks."""
        return sum(map(len, self.places))

    def with_items(self, change: Callable[[Tensor], Tensor]) -> MixedEpisodes:
        """Applies `change` to all items of the tasks, as `Episodes.with_items` does."""
        return replace(self, groups=tuple(group.with_items(change) for group in self.groups))

    def split(self, size: int) -> Iterator[Episodes]:
        """Yields the tasks of `chunks`; with the size 1 they come in their order."""
        return (tasks for _, tasks in self.chunks(size))

    def chunks(self, size: int | None = None) -> Iterator[tuple[Sequence[int], Episodes]]:
        """Splits the meta-batch into tasks that have one shape.

        Args:
            size: The most tasks of a chunk, at least 1; None has no limit.

        Yields:
            The places of the tasks of a chunk in the meta-batch, and these tasks. With the size 1 the tasks come in their
            order, otherwise group by group.
        """
        found: list[tuple[Sequence[int], Episodes]] = []
        for places, group in zip(self.places, self.groups, strict=True):
            found += [([places[row] for row in rows], tasks) for rows, tasks in group.chunks(size)]
        yield from sorted(found, key=lambda one: one[0][0]) if size == 1 else found


def together(tasks: Sequence[Episodes]) -> Episodes | MixedEpisodes:
    """Joins several meta-batches into one, in which those of one shape become one group.

    Args:
        tasks: Meta-batches in the order of their tasks, at least one.

    Returns:
        All their tasks in this order.
    """
    groups: dict[tuple[Any, ...], list[Episodes]] = {}
    places: dict[tuple[Any, ...], list[int]] = {}
    first = 0
    for one in tasks:
        groups.setdefault(one.shape, []).append(one)
        places.setdefault(one.shape, []).extend(range(first, first + one.n_tasks))
        first += one.n_tasks
    whole = tuple(
        same[0].with_tensors(torch.cat([getattr(one, name) for one in same]) for name in same[0].named_tensors)
        for same in groups.values()
    )
    return whole[0] if len(whole) == 1 else MixedEpisodes(whole, tuple(map(tuple, places.values())))


@dataclass(frozen=True)
class Batch:
    """B labelled images in no order; each domain has its own labels.

    Args:
        x: The images, float `[B, C, H, W]`.
        y: Their labels, int64 `[B]`; -1 where a label is not known.
        domain: Where they are from, int64 `[B]`; 0 is the source, 1 the target.
    """

    x: Tensor
    y: Tensor
    domain: Tensor

    @property
    def n_tasks(self) -> int:
        """B: a training step counts images here, and tasks in `Episodes`."""
        return len(self.x)

    def with_items(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Applies `change` to the images of the batch."""
        return replace(self, x=change(self.x))

    def split(self, size: int) -> Iterator[Batch]:
        """Splits the batch.

        Args:
            size: The most images of a chunk, at least 1.

        Yields:
            The images in their order, as views.
        """
        for x, y, domain in zip(*(tensor.split(size) for tensor in (self.x, self.y, self.domain)), strict=True):
            yield Batch(x, y, domain)

    def chunks(self, size: int | None = None) -> Iterator[tuple[range, Batch]]:
        """Splits the batch, with the places of the images: see `Episodes.chunks`."""
        size = size or max(self.n_tasks, 1)
        for number, chunk in enumerate(self.split(size)):
            yield range(number * size, number * size + chunk.n_tasks), chunk


@dataclass(frozen=True)
class TaskShape:
    """The size of a task, or the ranges that each task draws its own from.

    Args:
        ways: N, its classes; 1 in regression.
        shots: K, the support examples of each class.
        queries: Q, the queries of each class.
        balanced: Whether all classes of a task have equally many examples; otherwise each class draws its own numbers.
        protocol: How the numbers are drawn: each uniformly from its range, or as Meta-Dataset does.
        unlabelled: U, the items without labels of each class, and of each distractor.
        distractors: The classes outside of the task that unlabelled items are of too.
        labelled_share: The share of each class's items that may have labels; unlabelled ones are then of the others.
        query_dirichlet: The concentration of the Dirichlet distribution that divides N * Q queries among the classes; None
            gives each class Q.
        min_items: The fewest items of a class that tasks are drawn from; smaller classes are left out.
        spare: The further queries of each class of tasks that are not `plain`: drawn after all else, of what its class has left,
            so that they change no other number.

    Raises:
        UserError: A number is out of the range that the schema has for it.
    """

    ways: Count
    shots: Count
    queries: Count
    balanced: bool = True
    protocol: Literal["uniform", "meta_dataset"] = "uniform"
    unlabelled: int = 0
    distractors: int = 0
    labelled_share: float = 1.0
    query_dirichlet: float | None = None
    min_items: int = 0
    spare: int = 0

    def __post_init__(self) -> None:
        for name, hint in RANGES.items():
            check_range(f"task.{name}", getattr(self, name), hint)

    @property
    def varies(self) -> bool:
        """Whether tasks differ in their shapes."""
        return any(isinstance(count, tuple) for count in (self.ways, self.shots, self.queries))

    @property
    def equal_classes(self) -> bool:
        """Whether the classes of a task have equally many support examples, and equally many queries."""
        if self.protocol == "meta_dataset":
            return not isinstance(self.shots, tuple)
        return self.balanced or not any(isinstance(count, tuple) for count in (self.shots, self.queries))

    @property
    def needed_ways(self) -> int:
        """The classes that a split must have: the most of the range, but the fewest where no task takes more than there are.

        Meta-Dataset's ways are at most the classes of the split (Triantafillou et al. 2020, section 3.2).
        """
        return least(self.ways) if self.protocol == "meta_dataset" else largest(self.ways)

    @property
    def plain(self) -> bool:
        """Whether all tasks have one shape, and nothing but labelled items."""
        return self.beyond_plain is None

    @property
    def beyond_plain(self) -> tuple[str, str, str] | None:
        """The first key of tasks that are not `plain`, its value as it is typed, and which value would be; None of those that are."""
        for name in SIZES:
            if isinstance(count := getattr(self, name), tuple):
                return name, count_text(count), "one number"
        if self.unlabelled:
            return "unlabelled", str(self.unlabelled), "0"
        return None if self.labelled_share == 1 else ("labelled_share", f"{self.labelled_share:g}", "1")

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The ways, the shots and the queries of tasks that are `plain`.

        Raises:
            UserError: Tasks are not, and the source that asks knows no others.
        """
        if found := self.beyond_plain:
            name, value, right = found
            raise UserError(
                f"task.{name}={value}: here all tasks are of one shape and of labelled items alone; set it to {right}"
            )
        return least(self.ways), least(self.shots), least(self.queries)

    def describe(self) -> dict[str, Any]:
        """Gives JSON values for `result.json`: the sizes, ranges as lists of two, and the settings that differ from their defaults."""
        found: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in SIZES or value != item.default:
                found[item.name] = list(value) if isinstance(value, tuple) else value
        return found


def largest(count: Count) -> int:
    """Returns the number itself, or the largest of its range."""
    return count[1] if isinstance(count, tuple) else count


def least(count: Count) -> int:
    """Returns the number itself, or the least of its range."""
    return count[0] if isinstance(count, tuple) else count


def count_text(count: Count) -> str:
    """Writes a number, or a range, as it is typed."""
    return f"[{count[0]},{count[1]}]" if isinstance(count, tuple) else str(count)


@dataclass(frozen=True)
class Spec:
    """What a method must know of its data before it is built.

    Args:
        input_shape: The shape of an item: `(C, H, W)`, or `(D,)`.
        kind: Whether labels or values are predicted.
        outputs: The ways of a training task (the most that one has), the classes of labelled training images, or the
            dimensions of a regression target.
        target_outputs: The classes of the target, for a method that trains on the target's images too.
        shots: The shots of a training task (the most that a class has).
    """

    input_shape: tuple[int, ...]
    kind: Literal["classification", "regression"]
    outputs: int
    target_outputs: int | None = None
    shots: int = 1
