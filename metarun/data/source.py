"""Where tasks come from: the contract of a data set, and the one implementation that all image data sets share."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch

from metarun.config.checked import Checked
from metarun.core import Episodes, MixedEpisodes, TaskShape, largest, least
from metarun.data.image_batches import Labelled, divide_images, to_shape
from metarun.data.imbalanced import ImbalancedSampler
from metarun.data.sampler import ClassSampler, distinct, uniforms
from metarun.data.table import ItemTable, Table
from metarun.data.varied import VariedSampler, shortage
from metarun.errors import UserError
from metarun.text import printable

Split = Literal["train", "val", "test"]
Item = Literal["image", "text", "vector"]  # the kinds of items; an encoder turns one of the first two into the third
# The episodes from `start` to `stop`, on the device. Only tasks of `TaskShape.varies` are ever of several shapes.
EpisodeSampler = Callable[[int, int], Episodes | MixedEpisodes]
Reader = Callable[[np.ndarray, np.ndarray], torch.Tensor]

PURPOSE: dict[Split, str] = {"train": "training", "val": "validation", "test": "the test"}
log = logging.getLogger("metarun")

DEVICE_TABLE_BYTES = 2**30  # larger tables stay memory-mapped, and only the episodes' images travel


def standardiser(
    mean: np.ndarray, deviation: np.ndarray, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that shifts and scales the channels of images uint8 `[..., C, H, W]`; it returns float32.

    Args:
        mean: What is subtracted from each channel, `[C]` or `[1]`, where black is 0 and white 1.
        deviation: What each channel is divided by, `[C]` or `[1]`.
        device: Where the images lie.
    """
    shift, scale = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, deviation)
    )
    shift, scale = shift * 255, 1 / (scale * 255)
    return lambda x: (x.float() - shift) * scale


def gathered(table: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """`table[rows]`, in a fraction of its time: whole rows are copied.

    Args:
        table: `[M, ...]`, contiguous.
        rows: int64, of any shape.

    Returns:
        `[*rows.shape, ...]`, on the device of the table.
    """
    where = torch.from_numpy(np.ascontiguousarray(rows)).to(table.device)
    return table.index_select(0, where.flatten()).view(*rows.shape, *table.shape[1:])


class DataSource(Checked, ABC):
    """Tasks of three splits. Knows nothing of methods."""

    configured_by = "data"
    kind: Literal["classification", "regression"]
    item: Item = "vector"
    classes_in: tuple[str, ...] | None = (
        None  # the collections for pretraining that have (some of) its classes; None: not known
    )
    input_shape: tuple[int, ...]  # (C, H, W), or (D,)
    outputs: int | None = None  # dimensions of a regression target; None for classification
    inverted: bool = False  # whether an image is the negative of its file
    mapped: tuple[float, float] | None = None  # the values of its files that became 0 and 255; None: those of the depth

    @abstractmethod
    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        """A function of (start, stop) that yields those episodes; raises `UserError` if the split cannot serve `task`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json`: at least `fingerprint`, and the classes and images of each split."""

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        """Images with the labels of ordinary classification: of one part of each class, or all; of a split's classes, or all.

        Raises `UserError` for data that have none.
        """
        raise UserError("data: these are regression tasks, and have no labelled images; try data=omniglot")

    def with_unknown(self, split: Split, task: TaskShape, more: int, seed: int, device: torch.device) -> EpisodeSampler:
        """Episodes with `more` further classes, whose queries are of no class of the task: their support items will be left out.

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

    def each(self, change: Callable[[TableSource], TableSource]) -> DataSource:
        """This data set with another in the place of each of its members: one that encodes its items, say."""
        raise UserError("data: these are regression tasks, which have no items")

    @property
    def tested(self) -> Mapping[str, DataSource]:
        """What a meta-test tests on, by name: this data set, or several in a test each."""
        return {"": self}

    def measures(self, prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is measured on such data beside accuracy or squared error, `[T]` by name; a meta-test reports the means.

        Args:
            prediction: What was predicted for the queries of T tasks, as `Algorithm.predict` returns it.
            target: Their labels or values, as `Episodes.query_y`.
        """
        return {}

    def tasks_of(self, split: Split) -> str:
        """What the tasks of a split are made of, in words for `protocol` of `result.json`."""
        return f"episodes of the {PURPOSE[split]} classes"

    @property
    def labels_read(self) -> str:
        """Which labels are read before the test, in words; an empty string where nothing is withheld."""
        return ""

    @property
    def underlying(self) -> DataSource:
        """The data set whose items these are, where only its tasks are other ones; else itself."""
        return self

    def make_ready(self, device: torch.device) -> None:
        """Computes what lies between a table and its items, if anything, before the first item is asked for.

        Args:
            device: Where it is computed.
        """


class NoData(DataSource):
    """In place of data for a run that uses none."""

    kind = "classification"
    input_shape: tuple[int, ...] = ()

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        raise UserError("data: this recipe uses none")

    def describe(self) -> dict[str, Any]:
        return {}


class TableSource(DataSource):
    """A table of items with its classes divided among the splits; the source of labelled items of any kind.

    What a kind of item is, its subclass says: `item`, `items`, `reader` and `input_shape`.

    Args:
        table: The items of all classes, class by class.
        splits: The numbers of the classes of each split.
        within_group: Whether all ways of an episode come from one group (an alphabet).
        rotations: Whether each class turned by 90, 180 and 270 degrees counts as a class of its own; of images alone.
    """

    kind = "classification"
    unknown: Mapping[Split, int] = {}  # the number of what is no class, but items of none, for a split

    def __init__(
        self,
        table: ItemTable,
        splits: Mapping[Split, Sequence[int] | np.ndarray],
        *,
        within_group: bool = False,
        rotations: bool = False,
    ) -> None:
        self.table = table
        self.splits = {split: np.asarray(classes, dtype=np.int64) for split, classes in splits.items()}
        self.rotations = rotations
        self.within_group = within_group

    @property
    def members(self) -> Mapping[str, TableSource]:
        return {"": self}

    def each(self, change: Callable[[TableSource], TableSource]) -> DataSource:
        return change(self)

    def divided(self, splits: Mapping[Split, Sequence[int] | np.ndarray]) -> Self:
        """The same items with another division of the classes."""
        found = copy.copy(self)
        found.splits = {split: np.asarray(classes, dtype=np.int64) for split, classes in splits.items()}
        return found

    @property
    def training_rows(self) -> np.ndarray:
        """The rows of the table that a training on this source may see, int64: of what is measured on items before any test.

        Those of the training classes, without items that the data set itself names for testing.
        """
        own = self.table.metadata.get("parts")
        part = "train" if own else "all"
        return np.concatenate([divide_images(self.table.offsets, c, own)[part] for c in self.splits["train"]])

    @abstractmethod
    def items(self, start: int, stop: int, turns: int = 0) -> Any:
        """The items of the rows from `start` to `stop`, as an encoder of their kind takes them; no more than these are read.

        Args:
            start: The first row.
            stop: The row after the last.
            turns: The quarter turns that the items are turned by; 0 where they cannot be turned.

        Returns:
            Images uint8 `[n, C, H, W]`; a list of n texts; whatever the encoders of this `item` read.
        """

    @abstractmethod
    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        """A function of table rows int64 `[..., n]` and quarter turns `[...]`: their items, float `[..., n, *input_shape]`.

        Args:
            device: Where the items shall lie.
            reference: The rows whose statistics items are normalised by, where they are; None for the training items.
        """

    def _check_task(self, split: Split, task: TaskShape) -> None:
        """Checks that a split has enough classes, and images in each; raises `UserError` that says how many fell where."""
        key = "train.task" if split == "train" else "test.task"
        if task.query_dirichlet is not None and not task.plain:
            raise UserError(
                f"{key}.query_dirichlet={task.query_dirichlet:g}: divides the queries of tasks of one shape, without unlabelled items"
            )
        ways = largest(task.ways)
        if least(task.ways) == 1:
            raise UserError(f"{key}.ways=1: a task of one class has one answer, which is always right; take at least 2")
        turned = 4 if self.rotations else 1
        classes = self.classes_of(split, task)
        counts = {one: len(self.classes_of(one, task)) * turned for one in self.splits}
        if counts[split] < ways:
            total = len(np.unique(np.concatenate([self.classes_of(one, task) for one in self.splits]))) * turned
            told = ", ".join(f"{count} for {PURPOSE[one]}" for one, count in counts.items())
            fits = min(counts.values())
            fitting = f"[{least(task.ways)},{fits}]" if least(task.ways) < min(ways, fits) else fits
            take = f"take task.ways={fitting}, or more classes" if fits > 1 else "take more classes"
            raise UserError(
                f"task: ways = {ways} is above the {counts[split]} classes of the {split} split: of {total} classes {told}, "
                f"since tests are of classes that are new; {take} or other data.ratios. To tell these {total} classes themselves "
                "apart: recipe=target_only target=folder target.data.root=FOLDER"
            )
        if counts[split] < ways + task.distractors:
            raise UserError(
                f"{key}.distractors={task.distractors}: with {ways} ways they are above the {counts[split]} classes of the "
                f"{split} split; take at most {counts[split] - ways}"
            )
        sizes = self.table.sizes[classes]
        found = shortage(task, sizes)
        if found is None:
            return
        smallest = printable(self.table.names[classes[found[0]]])
        given = {"shots": least(task.shots) - 1, "queries": least(task.queries) - 1, "unlabelled": task.unlabelled}
        lower = " or ".join(f"{key}.{name}" for name, count in given.items() if count > 0)
        # Ranges let a small class serve with what it has.
        drawn = [
            f"{key}.{name}=[1,{count}]"
            for name, count in (("shots", task.shots), ("queries", task.queries))
            if task.plain and isinstance(count, int) and count > 1
        ]
        draw = f", or let each task draw what its classes have: {' '.join(drawn)}" if drawn and sizes.min() > 1 else ""
        raise UserError(
            f"task: {found[1]} of the smallest class of the {split} split, {smallest}; "
            f"{f'lower {lower}{draw}, or ' if lower else ''}leave small classes out: task.min_items={found[2]}"
        )

    def classes_of(self, split: Split, task: TaskShape) -> np.ndarray:
        """The classes of a split that such tasks are drawn from, int64: those with `task.min_items` items."""
        classes = self.splits[split]
        return classes[self.table.sizes[classes] >= task.min_items]

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        classes = self.classes_of(split, task)
        self._check_task(split, task)
        names = np.array(self.table.groups)[classes]
        groups = np.unique(names, return_inverse=True)[1] if self.within_group else None
        given = (self.table.offsets, classes, task, seed, split, 4 if self.rotations else 1, groups)
        read = self.reader(device)
        if not task.plain:
            return VariedSampler(*given).episodes(read, device)
        if task.query_dirichlet is not None:
            return ImbalancedSampler(*given).episodes(read, device)
        draw = ClassSampler(*given).in_blocks()
        ways, shots = largest(task.ways), largest(task.shots)
        labels = torch.arange(ways, device=device)

        def episodes(start: int, stop: int) -> Episodes:
            rows, turns = draw(start, stop)  # [T, N, K + Q], [T, N]
            tasks = stop - start

            def flat(part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
                return read(part, turns).flatten(1, 2), labels.repeat_interleave(part.shape[2]).expand(tasks, -1)

            return Episodes(*flat(rows[:, :, :shots]), *flat(rows[:, :, shots:]), ways=ways)

        return episodes

    def with_unknown(self, split: Split, task: TaskShape, more: int, seed: int, device: torch.device) -> EpisodeSampler:
        if split not in self.unknown:
            return super().with_unknown(split, task, more, seed, device)
        known, read = self.sampler(split, task, seed, device), self.reader(device)
        ways, shots, queries = task.numbers
        number, count = self.unknown[split], more * queries
        first, last = self.table.offsets[number : number + 2]
        if count > last - first:
            raise UserError(
                f"test.unknown_ways={more}: times test.task.queries={queries} is above the {last - first} items of no class "
                f"for {PURPOSE[split]}"
            )

        def episodes(start: int, stop: int) -> Episodes:
            tasks = stop - start
            draws = uniforms(seed, f"{split}/unknown", start, stop, 2 * count)
            rows = first + distinct(draws[:, :count], draws[:, count:], np.full(tasks, last - first))
            asked = read(rows, np.zeros(tasks, np.int64))  # [T, more * Q, ...]
            labels = torch.arange(ways, ways + more, device=device)
            own = known(start, stop)
            assert isinstance(own, Episodes)  # of one shape
            blank = asked[:, :1].expand(-1, more * shots, *asked.shape[2:])  # is left out again
            return Episodes(
                torch.cat([own.support_x, blank], 1),
                torch.cat([own.support_y, labels.repeat_interleave(shots).expand(tasks, -1)], 1),
                torch.cat([own.query_x, asked], 1),
                torch.cat([own.query_y, labels.repeat_interleave(queries).expand(tasks, -1)], 1),
                ways=ways + more,
            )

        return episodes

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        """One part of each class's images: the data set's own parts, or where it has none a fixed draw of 80, 10 and 10%."""
        every = np.setdiff1d(np.arange(len(self.table.names)), list(self.unknown.values()))
        classes = every if split is None else self.splits[split]
        turns = 4 if self.rotations else 1
        own = self.table.metadata.get("parts")
        rows = [divide_images(self.table.offsets, number, own)[part or "all"] for number in classes]
        sizes = [len(members) for members in rows for _ in range(turns)]
        quarter = np.tile(np.arange(turns), len(classes))
        return Labelled(
            rows=np.concatenate([members for members in rows for _ in range(turns)]),
            rotations=np.repeat(quarter, sizes),
            labels=np.repeat(np.arange(len(sizes)), sizes),
            names=[self.table.names[number] for number in classes for _ in range(turns)],
            reader=self.reader,
            identify=self.identities,
        )

    @property
    def has_test_part(self) -> bool:
        return sum(self.table.metadata.get("parts", {}).get("test", [])) > 0

    def identities(self, rows: np.ndarray) -> list[str]:
        """For each row of the table its class and its place in the class, from 0, as `CLASS/PLACE`."""
        numbers = np.searchsorted(self.table.offsets, rows, side="right") - 1
        return [
            f"{self.table.names[number]}/{row - self.table.offsets[number]}"
            for number, row in zip(numbers, rows, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        sizes = self.table.sizes
        listing = "\n".join(f"{split}:{','.join(map(str, classes))}" for split, classes in self.splits.items())
        return {
            "fingerprint": hashlib.sha256((self.table.fingerprint + listing).encode()).hexdigest(),
            "classes": {split: len(classes) * (4 if self.rotations else 1) for split, classes in self.splits.items()},
            "images": {split: int(sizes[classes].sum()) for split, classes in self.splits.items()},
            "input_shape": list(self.input_shape),
            **{name: value for name, value in self.table.metadata.items() if name != "parts"},
        }


class ImageSource(TableSource):
    """A table of images with its classes divided among the splits.

    `rotations` counts each class turned by 90, 180 and 270 degrees as further classes; `within_group` draws all ways of
    an episode from one group (alphabet). `normalize` shifts and scales each channel by the mean and standard deviation of
    the training split; otherwise pixels are in [0, 1].
    """

    item = "image"
    table: Table
    given: tuple[np.ndarray, np.ndarray] | None = None  # the statistics that are another data set's

    def __init__(
        self,
        table: Table,
        splits: dict[Split, Sequence[int]],
        *,
        rotations: bool = False,
        within_group: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(table, splits, within_group=within_group, rotations=rotations)
        self.input_shape = tuple(table.images.shape[1:])
        self.normalize = normalize
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._statistics: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def items(self, start: int, stop: int, turns: int = 0) -> np.ndarray:
        images = self.table.read(start, stop)
        return np.ascontiguousarray(np.rot90(images, turns, (-2, -1))) if turns else images

    @functools.cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted from each channel and what it is divided by: 0 and 1 without `normalize`.

        Channel means and standard deviations over up to 2,000 training images, evenly spread, float64 [C] in [0, 1].
        """
        if self.given is not None:
            return self.given
        if not self.normalize:
            return np.zeros(1), np.ones(1)
        return self.statistics_of(self.training_rows)

    def statistics_of(self, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """`statistics` over other images.

        Args:
            rows: Of the table, of which up to 2,000 are looked at; None for the training images of the training classes.
        """
        if rows is None or not self.normalize or self.given is not None:
            return self.statistics
        rows = rows[:: -(-len(rows) // 2000)]
        key = rows.tobytes()  # every batch of these images asks again
        if key not in self._statistics:
            self._statistics[key] = self.measured(rows)
        return self._statistics[key]

    def normalize_as(self, other: ImageSource) -> None:
        """Normalises the pixels if those of the source `other` are: a network that was trained on one kind is no use for the other.

        It is called before any image is read.
        """
        if self.normalize != other.normalize:
            self.normalize = other.normalize
            log.info(
                "target: its pixels are %s, as those of the source are",
                "normalised" if self.normalize else "left in 0 to 1",
            )

    def fitted(self, shape: tuple[int, ...], statistics: tuple[np.ndarray, np.ndarray]) -> Self:
        """The same images for a network that takes another shape, or knows other statistics.

        Args:
            shape: The shape (C, H, W) that images are brought to as `image_batches.to_shape` does it.
            statistics: What is subtracted from each channel of that shape and what it is divided by, as `statistics`.
        """
        found = copy.copy(self)
        found.__dict__.pop("statistics", None)
        found.input_shape, found.given = tuple(shape), statistics
        return found

    def measured(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the deviation of each channel over up to 2,000 rows of the table, evenly spread, float64 `[C]` in [0, 1]."""
        rows = rows[:: -(-len(rows) // 2000)]
        # Counts of the 256 values are exact and, unlike the images as floats, small.
        counts = np.zeros((self.table.images.shape[1], 256), dtype=np.int64)
        for row in rows:
            counts += [np.bincount(channel.ravel(), minlength=256) for channel in self.table.images[row]]
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        return mean, np.sqrt(counts @ values**2 / counts.sum(1) - mean**2).clip(1e-3)

    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        """A function of table rows int64 `[..., n]` and quarter turns `[...]`: their images, float `[..., n, C, H, W]`.

        Args:
            device: Where the images shall lie.
            reference: The rows whose mean and deviation pixels are normalised by, where they are; None as in `statistics_of`.
        """
        images = self._images(device)
        standardise = standardiser(*self.statistics_of(reference), device)
        shape = self.input_shape
        fits = tuple(images.shape[1:]) == shape

        def read(rows: np.ndarray, turns: np.ndarray) -> torch.Tensor:
            x = gathered(images, rows).to(device)  # uint8
            if self.rotations:
                turned = torch.from_numpy(turns).to(device)
                for quarter in (1, 2, 3):
                    where = turned == quarter
                    x[where] = torch.rot90(x[where], quarter, (-2, -1))
            return standardise(x if fits else to_shape(x.float().flatten(0, -4), shape).unflatten(0, x.shape[:-3]))

        return read

    def _images(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            images = torch.from_numpy(self.table.images)
            if self.table.images.nbytes <= DEVICE_TABLE_BYTES:
                images = images.clone() if device.type == "cpu" else images.to(device)
            self._on_device[device] = images
        return self._on_device[device]
