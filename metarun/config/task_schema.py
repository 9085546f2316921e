"""The keys of a task: its size, how its numbers are drawn, and what differs in training and in tests. It imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from metarun.config.types import Count, Doc, Example, Ge, Interval, Share, Unit

SIZES = ("ways", "shots", "queries")  # of every task; a data set among several may have its own in tests


@dataclass
class Task:
    """The size of every task; `train.task` and `test.task` may differ from it."""

    ways: Annotated[
        Any,
        Count(1),
        Unit("classes"),
        Example("[2, 5]"),
        Doc("The classes of a task; 1 for regression. [5, 20] has each task draw its ways from 5 to 20."),
    ] = 5
    shots: Annotated[
        Any,
        Count(1),
        Unit("items a class"),
        Doc(
            "The support examples of each class. [1, 10] has each task draw them from 1 to 10, if its classes have so many; how "
            "Meta-Dataset draws them, task.protocol says."
        ),
    ] = 1
    queries: Annotated[
        Any,
        Count(1),
        Unit("items a class"),
        Doc(
            "The query examples of each class. [1, 15] has each task draw them from 1 to 15, if its classes have so many."
        ),
    ] = 15
    balanced: (
        Annotated[
            bool,
            Doc(
                "Whether the classes of a task share the shots and queries that it draws from ranges; false draws them for each "
                "class. Null is true. Meta-Dataset's sampler goes its own way."
            ),
        ]
        | None
    ) = None
    protocol: (
        Annotated[
            str,
            Literal["uniform", "meta_dataset"],
            Doc(
                "How a task's numbers are drawn: uniformly from their ranges, or as Meta-Dataset's sampler does, from ways "
                "[5, 50], shots [1, 100] and queries [1, 10] where these are not given: it draws the size of a support set, to which each "
                "class adds at most 100, and gives large classes more of it, perhaps above 100; all classes have as many queries, up "
                "to 10. Null is uniform."
            ),
        ]
        | None
    ) = None
    unlabelled: Annotated[
        int, Ge(0), Unit("items a class"), Doc("The items without labels that a task has of each class; 0 for none.")
    ] = 0
    distractors: Annotated[
        int,
        Ge(0),
        Unit("classes"),
        Example(beside="{section}.unlabelled=5"),
        Doc("The classes outside of the task that its unlabelled items are of too."),
    ] = 0
    labelled_share: (
        Annotated[
            float,
            Interval(gt=0, le=1),
            Doc(
                "The share of each class's items that may have labels; unlabelled items are then of the others alone. Null is 1."
            ),
        ]
        | None
    ) = None
    min_items: Annotated[
        int,
        Ge(0),
        Unit("items"),
        Doc("The fewest items of a class: tasks are drawn from no smaller one. 0 leaves none out."),
    ] = 0


LARGEST_SUPPORT = 500  # items of a support set: Meta-Dataset's


PROTOCOLS: dict[str, dict[str, Any]] = {
    "uniform": {"ways": Task.ways, "shots": Task.shots, "queries": Task.queries},
    # Triantafillou et al. (2020), section 3.2: where the numbers of a task are not given.
    "meta_dataset": {"ways": [5, 50], "shots": [1, 100], "queries": [1, 10]},
}


@dataclass
class TaskChange:
    """What differs from `task`; null is the same."""

    ways: Annotated[
        Any,
        Count(1, optional=True),
        Unit("classes"),
        Example("[2, 5]"),
        Doc("The classes of a task, or a range of them; null is those of `task`."),
    ] = None
    shots: Annotated[
        Any,
        Count(1, optional=True),
        Unit("items a class"),
        Doc("The support examples of each class, or a range; null as in `task`."),
    ] = None
    queries: Annotated[
        Any,
        Count(1, optional=True),
        Unit("items a class"),
        Doc("The query examples of each class, or a range; null as in `task`."),
    ] = None
    balanced: Annotated[bool, Doc("Whether the classes of a task share what it draws; null as in `task`.")] | None = (
        None
    )
    protocol: (
        Annotated[
            str,
            Literal["uniform", "meta_dataset"],
            Doc("How a task's numbers are drawn; null as in `task`. Another than there has its own ranges."),
        ]
        | None
    ) = None
    unlabelled: (
        Annotated[int, Ge(0), Unit("items a class"), Doc("The items without labels of each class; null as in `task`.")]
        | None
    ) = None
    distractors: (
        Annotated[
            int,
            Ge(0),
            Unit("classes"),
            Example(beside="{section}.unlabelled=5"),
            Doc("The other classes that unlabelled items are of too; null as in `task`."),
        ]
        | None
    ) = None
    labelled_share: (
        Annotated[
            float,
            Interval(gt=0, le=1),
            Doc("The share of each class's items that may have labels; null as in `task`."),
        ]
        | None
    ) = None
    min_items: Annotated[int, Ge(0), Unit("items"), Doc("The fewest items of a class; null as in `task`.")] | None = (
        None
    )


@dataclass
class TestTaskChange(TaskChange):
    """What differs from `task` while validating and testing; null is the same."""

    query_dirichlet: (
        Annotated[
            float,
            Interval(gt=0),
            Doc(
                "The concentration of the Dirichlet distribution that divides a task's queries, ways * queries, among its classes "
                "(2 in alpha-TIM's paper); null has equally many of each class."
            ),
        ]
        | None
    ) = None


@dataclass
class TrainTaskChange(TaskChange):
    """What differs from `task` while training; null is the same. Some methods train on support examples alone."""

    queries: Annotated[
        Any,
        Count(0, optional=True),
        Unit("items a class"),
        Doc("The query examples of each class, or a range; null as in `task`."),
    ] = None


@dataclass
class Noise:
    """Training tasks with wrong labels: the share of the tasks, and in these the probability of each label."""

    tasks: Annotated[Share, Doc("The share of the training tasks that have wrong labels.")] = 0.0
    labels: Annotated[Share, Doc("The probability that a support label of such a task is wrong.")] = 0.8
