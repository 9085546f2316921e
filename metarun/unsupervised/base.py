"""The contract of unsupervised tasks: a data set whose training labels are withheld, and what takes their place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from metarun.core import TaskShape
from metarun.data.image_batches import Labelled
from metarun.data.origin import NO_LABELS, Origin
from metarun.data.source import PURPOSE, DataSource, EpisodeSampler, Reader, Split
from metarun.data.table_source import TableSource
from metarun.data.task_check import refuse_one_way
from metarun.errors import UserError

Validation = Literal["pseudo", "labels"]


class PseudoTasks(TableSource):
    """A data set whose training labels nobody reads: training tasks have classes that a way of learning made up.

    Test tasks are those of the data set, with its labels. Validation tasks are made up as the training tasks are, of the
    validation images, so that nothing before the test reads a label; `validation="labels"` takes the data set's own.

    Built from the config's `unsupervised`, with `source`, the data set, handed in. A way of making tasks defines
    `pseudo_sampler`.

    Args:
        source: The data set.
        validation: What the weights are selected on.
    """

    configured_by = "unsupervised"

    def __init__(self, source: DataSource, validation: Validation = "pseudo") -> None:
        if source.kind == "regression":
            raise UserError("unsupervised: makes tasks of items, but these are regression tasks; try data=omniglot")
        if not isinstance(source, TableSource):
            raise UserError(
                "unsupervised: makes tasks of the items of one data set, and data=[...] has several; name one"
            )
        self.source, self.validation = source, validation
        self.item, self.input_shape, self.unknown = source.item, source.input_shape, source.unknown
        self.as_target, self.form, self.told_apart = source.as_target, source.form, source.told_apart
        super().__init__(source.table, source.splits, within_group=source.within_group, rotations=source.rotations)

    @property
    def called(self) -> str:
        return self.source.called

    @property
    def underlying(self) -> DataSource:
        return self.source.underlying

    @property
    def origins(self) -> Sequence[Origin]:
        return self.source.origins

    def digest_of(self, row: int) -> str | None:
        return self.source.digest_of(row)

    def every_digest(self, number: int) -> frozenset[str]:
        return self.source.every_digest(number)

    @property
    def has_test_part(self) -> bool:
        return self.source.has_test_part

    def items(self, start: int, stop: int, turns: int = 0) -> Any:
        return self.source.items(start, stop, turns)

    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        return self.source.reader(device, reference)

    def statistics_of(self, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return self.source.statistics_of(rows)

    def make_ready(self, device: torch.device, split: Split | None = None) -> None:
        self.source.make_ready(device, split)

    def pool(self, split: Split) -> np.ndarray:
        """The table rows of all images of a split in the order of the table, int64 `[n]`: which class each is of, is not told."""
        offsets = self.table.offsets
        return np.sort(np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in self.splits[split]]))

    @abstractmethod
    def pseudo_sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        """Tasks of the images of a split, their classes made up; task i is a function of (seed, split, i) alone.

        Args:
            split: The split of the images; test tasks are never made up.
            task: The shape of the tasks, which is one.
            seed: The seed of the draws.
            device: Where the items shall lie.

        Returns:
            A function of (start, stop) that yields the tasks with these numbers.

        Raises:
            UserError: The split has too few images for such tasks.
        """

    @abstractmethod
    def how(self) -> dict[str, Any]:
        """JSON values about how tasks are made up, for `result.json`."""

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        if split == "test" or (split == "val" and self.validation == "labels"):
            return self.source.sampler(split, task, seed, device)
        key, other = "train.task", ""
        if split == "val":
            key, other = "test.task", ", or take the data set's own for validation: unsupervised.validation=labels"
        if found := task.beyond_plain:
            name, value, right = found
            raise UserError(
                f"{key}.{name}={value}: unsupervised makes {PURPOSE[split]} tasks of one shape, of pseudo-labelled items alone; set it "
                f"to {right}{other}"
            )
        if task.query_dirichlet is not None:
            raise UserError(
                f"{key}.query_dirichlet={task.query_dirichlet:g}: unsupervised makes {PURPOSE[split]} tasks of classes with equally many "
                f"queries; leave it null{other}"
            )
        # Labels tell which classes are small. In validation the number is that of the test tasks, and all images serve.
        if task.min_items and split == "train":
            raise UserError(
                f"{key}.min_items={task.min_items}: unsupervised reads no label of a training image, and leaves out no class; "
                f"test.task.min_items={task.min_items} is of test tasks alone"
            )
        refuse_one_way(split, task)
        return self.pseudo_sampler(split, task, seed, device)

    def with_unknown(self, split: Split, task: TaskShape, more: int, seed: int, device: torch.device) -> EpisodeSampler:
        if split == "val" and self.validation == "pseudo" and split not in self.unknown:
            # The table's own would count the classes of the split, of which made-up ones are none.
            return DataSource.with_unknown(self, split, task, more, seed, device)
        return super().with_unknown(split, task, more, seed, device)

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        if split == "test" or (split == "val" and self.validation == "labels"):
            return self.source.labelled(part, split)
        if split == "val":
            raise UserError(
                "unsupervised: withholds the labels of the validation images too; unsupervised.validation=labels selects by them"
            )
        raise UserError(
            "unsupervised: withholds the labels of the data, but the method trains on labelled images; choose one that trains on "
            "tasks, such as algo=protonet or algo=maml"
        )

    def describe(self) -> dict[str, Any]:
        """That of the data set, and how tasks are made up of it."""
        return {**self.source.describe(), "unsupervised": {**self.how(), "validation": self.validation}}

    def tasks_of(self, split: Split) -> str:
        if split == "val" and self.validation == "labels":
            return super().tasks_of(split)
        return f"tasks made up of the {PURPOSE[split]} images without their labels"

    @property
    def labels_read(self) -> str:
        if self.validation == "labels":
            return "none of the training images; those of the validation classes select the weights"
        return NO_LABELS
