"""Where tasks come from: the contract of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from metarun.config.checked import Checked
from metarun.config.ranges import shown
from metarun.config.task_schema import SIZES
from metarun.core import Episodes, MixedEpisodes, TaskShape, count_text, largest
from metarun.data.image_batches import Labelled
from metarun.data.origin import Origin
from metarun.errors import UserError

if TYPE_CHECKING:
    from metarun.data.table_source import TableSource

Split = Literal["train", "val", "test"]
Item = Literal["image", "text", "vector"]  # the kinds of items; an encoder turns one of the first two into the third
# The episodes from `start` to `stop`, on the device. Only tasks of `TaskShape.varies` are ever of several shapes.
EpisodeSampler = Callable[[int, int], Episodes | MixedEpisodes]
Reader = Callable[[np.ndarray, np.ndarray], torch.Tensor]
PURPOSE: dict[Split, str] = {"train": "training", "val": "validation", "test": "the test"}


class DataSource(Checked, ABC):
    """Tasks of three splits. Knows nothing of methods.

    Attributes:
        kind: Whether tasks have classes or values to predict.
        item: The kind of its items.
        input_shape: The shape of an item, (C, H, W) of an image or (D,) of a vector.
        outputs: The dimensions of a regression target; None for classification.
        classes_in: The collections for pretraining that have (some of) its classes; None where that is not known.
        normalize: Whether the pixels of its images are shifted and scaled by their mean and deviation.
        inverted: Whether an image is the negative of its file.
        mapped: The values of its files that became 0 and 255; None for those of the depth.
    """

    configured_by = "data"
    kind: Literal["classification", "regression"]
    item: Item = "vector"
    input_shape: tuple[int, ...]
    outputs: int | None = None
    classes_in: tuple[str, ...] | None = None
    normalize: bool = False
    inverted: bool = False
    mapped: tuple[float, float] | None = None

    @abstractmethod
    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        """Builds the sampler of a split's tasks, each a function of (seed, split, its number) alone.

        Args:
            split: The classes that they are drawn from.
            task: Their shape, or the ranges of it.
            seed: The seed of the draws.
            device: Where the items shall lie.

        Returns:
            A function of (start, stop) that yields the tasks with these numbers, T = stop - start: `Episodes`, or
            `MixedEpisodes` where `task.varies`.

        Raises:
            UserError: The split cannot serve such tasks.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Gives JSON values for `result.json`: at least `fingerprint`, and the classes and images of each split."""

    def describe_tasks(self, split: Split, task: TaskShape) -> dict[str, Any]:
        """Gives JSON values of a split's tasks for `result.json`: their shape, and what the split makes of it.

        Args:
            split: The split, which can serve such tasks.
            task: Their shape.
        """
        return task.describe()

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        """Returns images with the labels of ordinary classification.

        Args:
            part: The part of each class; None for all of its images.
            split: The split of whose classes they are; None for all classes.

        Raises:
            UserError: The data have no labelled images.
        """
        raise UserError("data: these are regression tasks, and have no labelled images; try data=omniglot")

    def with_unknown(self, split: Split, task: TaskShape, more: int, seed: int, device: torch.device) -> EpisodeSampler:
        """Samples episodes with `more` further classes, whose queries are of no class of the task: their support items will be left out.

        Args:
            split: The split.
            task: The task without them.
            more: The further classes, or as many classes' worth of items that are of no class at all, where the data set has such.
            seed: The seed of the draws.
            device: Where the items shall lie.

        Raises:
            UserError: The split has not so many classes or items.
        """
        ways = task.ways + more if isinstance(task.ways, int) else (task.ways[0] + more, task.ways[1] + more)
        try:
            return self.sampler(split, replace(task, ways=ways), seed, device)
        except UserError as error:
            needed = largest(ways)
            raise UserError(f"test.unknown_ways={more}: with them a test needs {needed} classes; {error}") from error

    @property
    def has_test_part(self) -> bool:
        """Whether the data set itself says which labelled images are for testing."""
        return False

    def statistics_of(self, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted from each channel of an image and what it is divided by; 0 and 1 where nothing is.

        Args:
            rows: The rows of its table whose mean and deviation count; None for the training images of the training classes.
        """
        return np.zeros(1), np.ones(1)

    @property
    def members(self) -> Mapping[str, TableSource]:
        """The sets of items that its tasks are drawn from, by name: one without a name, or several; none of regression tasks."""
        return {}

    def share(self, name: str) -> float:
        """Computes the share of the tasks that are of a member, by its name."""
        return 1 / len(self.members)

    def each(self, change: Callable[[TableSource], TableSource]) -> DataSource:
        """Puts another data set in the place of each member, one that encodes its items, say.

        Args:
            change: Gives what takes a member's place.

        Raises:
            UserError: It has no members.
        """
        raise UserError("data: these are regression tasks, which have no items")

    @property
    def tested(self) -> Mapping[str, DataSource]:
        """What a meta-test tests on, by name: this data set, or several in a test each."""
        return {"": self}

    def measures(self, prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Measures what such data have beside accuracy or squared error, `[T]` by name; a meta-test reports the means.

        Args:
            prediction: What was predicted for the queries of T tasks, as `Algorithm.predict` returns it.
            target: Their labels or values, as `Episodes.query_y`.
        """
        return {}

    def tasks_of(self, split: Split) -> str:
        """Says what the tasks of a split are made of, in words for `protocol` of `result.json`.

        Args:
            split: The split.
        """
        return f"episodes of the {PURPOSE[split]} classes"

    @property
    def labels_read(self) -> str:
        """Which labels are read before the test, in words; an empty string where nothing is withheld."""
        return ""

    @property
    def origins(self) -> Sequence[Origin]:
        """Where the weights come from that its items, or the classes of its tasks, are made by; empty where none are."""
        return ()

    @property
    def underlying(self) -> DataSource:
        """The data set whose items these are, where only its tasks are other ones; else itself."""
        return self

    def make_ready(self, device: torch.device, split: Split | None = None) -> None:
        """Computes what lies between a table and the items of a split, if anything, before the first of them is asked for.

        Args:
            device: Where it is computed.
            split: The split; None for all classes.
        """


class NoData(DataSource):
    """In place of data for a run that uses none."""

    kind = "classification"
    input_shape: tuple[int, ...] = ()

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        raise UserError("data: this recipe uses none")

    def describe(self) -> dict[str, Any]:
        return {}


def refuse_classes(task: TaskShape, kind: str) -> None:
    """Checks that tasks of one way ask for nothing that is of classes.

    Args:
        task: The shape.
        kind: What such a task is called.

    Raises:
        UserError: They have another number of ways, or ask for something else of classes.
    """
    if task.ways != 1:
        raise UserError(f"task: ways = {count_text(task.ways)}, but {kind} has one way; set task.ways=1")
    # Further items of classes are for wrong labels, which say themselves that they need classes.
    for name, value in replace(task, spare=0).describe().items():
        if name not in SIZES:
            raise UserError(f"task.{name}={shown(value)}: is of classes, but {kind} has none; leave it out")
