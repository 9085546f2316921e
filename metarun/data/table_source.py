"""Tasks from a table of items, whose classes are divided among the splits."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch

from metarun.core import Episodes, MixedEpisodes, TaskShape, largest
from metarun.data.image_batches import Labelled, divide_images
from metarun.data.imbalanced import ImbalancedSampler, cut_short, most_queries
from metarun.data.sampler import ClassSampler, distinct, uniforms
from metarun.data.source import PURPOSE, DataSource, EpisodeSampler, Reader, Split
from metarun.data.table import ItemTable
from metarun.data.task_check import TaskCheck
from metarun.data.varied import VariedSampler
from metarun.errors import UserError

NOTED = 8  # a class is known again by so many items: two of half as many are nearly always among them
# A start that compares all images reads their table whole, in a second or two; of larger tables only some are compared.
COMPARED_BYTES = 2**28
TOGETHER = 256  # so many items are read at once where all of a class are compared
RARELY = 1e-3  # a class that is cut short with a smaller probability is not worth a message


def item_digest(item: Any) -> str | None:
    """Digests a text, or the values of an image; None of a blank image, since two blank ones need not be the same image."""
    if isinstance(item, str):
        return hashlib.blake2b(item.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    values = np.ascontiguousarray(item)
    if values.min() == values.max():
        return None
    return hashlib.blake2b(str(values.shape).encode() + values.tobytes(), digest_size=8).hexdigest()


class TableSource(DataSource):
    """A table of items with its classes divided among the splits; the source of labelled items of any kind.

    What a kind of item is, its subclass says: `item`, `items`, `reader` and `input_shape`, and in `as_target` the words by which such
    items of one's own are a target.

    Args:
        table: The items of all classes, class by class.
        splits: The numbers of the classes of each split.
        within_group: Whether all ways of an episode come from one group (an alphabet).
        rotations: Whether each class turned by 90, 180 and 270 degrees counts as a class of its own; of images alone.
    """

    kind = "classification"
    as_target: str = "target=folder target.data.root=FOLDER"
    unknown: Mapping[Split, int] = {}  # the number of what is no class, but items of none, for a split
    form: str = ""  # items of one form alone can be compared: the size and the channels of images
    # Data sets with the same names of classes that are known to have other items, each by its `metarun.data.shared.key`.
    told_apart: frozenset[str] = frozenset()

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
        self._every_digest: dict[int, frozenset[str]] = {}

    @property
    def members(self) -> Mapping[str, TableSource]:
        return {"": self}

    def each(self, change: Callable[[TableSource], TableSource]) -> DataSource:
        return change(self)

    def divided(self, splits: Mapping[Split, Sequence[int] | np.ndarray]) -> Self:
        """Returns the same items with another division of the classes."""
        found = copy.copy(self)
        found.splits = {split: np.asarray(classes, dtype=np.int64) for split, classes in splits.items()}
        return found

    @property
    def called(self) -> str:
        """What one of its items is called in sentences; of vectors that an encoder made, what it made them of."""
        return self.item

    @property
    def turns(self) -> int:
        """The quarter turns in which items stand in tasks, each of which makes a class of its own: 4, or 1 as they are."""
        return 4 if self.rotations else 1

    @property
    def undivided(self) -> list[int]:
        """The numbers of the classes that are both for training and for testing: all of them where there are too few to divide."""
        return sorted({*map(int, self.splits["train"])} & {*map(int, self.splits["test"])})

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
        """Reads the items of the rows from `start` to `stop`, and no others, as an encoder of their kind takes them.

        Args:
            start: The first row.
            stop: The row after the last.
            turns: The quarter turns that the items are turned by; 0 where they cannot be turned.

        Returns:
            Images uint8 `[n, C, H, W]`; a list of n texts; whatever the encoders of this `item` read.
        """

    @abstractmethod
    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        """Returns a function of table rows int64 `[..., n]` and quarter turns `[...]`: their items, float `[..., n, *input_shape]`.

        Args:
            device: Where the items shall lie.
            reference: The rows whose statistics items are normalised by, where they are; None for the training items.
        """

    def classes_of(self, split: Split, task: TaskShape) -> np.ndarray:
        """Finds the classes of a split that such tasks are drawn from, int64: those with `task.min_items` items."""
        classes = self.splits[split]
        return classes[self.table.sizes[classes] >= task.min_items]

    def describe_tasks(self, split: Split, task: TaskShape) -> dict[str, Any]:
        found = task.describe()
        if task.query_dirichlet is not None:
            most = most_queries(task, self.table.sizes[self.classes_of(split, task)])
            if (cut := cut_short(task, most)) >= RARELY:
                found |= {"queries_at_most": most, "classes_cut_short": cut}
        return found

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        classes = self.classes_of(split, task)
        TaskCheck(self, split, task).check()
        names = np.array(self.table.groups)[classes]
        groups = np.unique(names, return_inverse=True)[1] if self.within_group else None
        given = (self.table.offsets, classes, task, seed, split, self.turns, groups)
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
            here, ways = len(self.classes_of(split, task)) * self.turns, largest(task.ways)
            if ways <= here < ways + more:
                on = f"take at most {here - ways}" if ways < here else "take fewer ways"
                raise UserError(
                    f"test.unknown_ways={more}: with {ways} ways they are above the {here} classes of the {split} split; {on}"
                )
            return super().with_unknown(split, task, more, seed, device)
        known, read = self.sampler(split, task, seed, device), self.reader(device)
        queries = largest(task.queries)  # of a range the most that a task takes
        number, count = self.unknown[split], more * queries
        first, last = self.table.offsets[number : number + 2]
        if count > last - first:
            raise UserError(
                f"test.unknown_ways={more}: times test.task.queries={queries} is above the {last - first} items of no class "
                f"for {PURPOSE[split]}"
            )

        def episodes(start: int, stop: int) -> Episodes | MixedEpisodes:
            draws = uniforms(seed, f"{split}/unknown", start, stop, 2 * count)
            rows = first + distinct(draws[:, :count], draws[:, count:], np.full(stop - start, last - first))
            groups, places = [], []
            for numbers, own in known(start, stop).chunks():
                # As many as `more` of the task's own classes have, so that its shares of known and unknown ones are the usual ones.
                sizes = list(itertools.islice(itertools.cycle(own.query_sizes), more))
                asked = read(rows[list(numbers), : sum(sizes)], np.zeros(len(numbers), np.int64))
                groups.append(with_further(own, asked, sizes))
                places.append(tuple(numbers))
            return groups[0] if len(groups) == 1 else MixedEpisodes(tuple(groups), tuple(places))

        return episodes

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        """Returns one part of each class's images: the data set's own parts, or where it has none a fixed draw of 80, 10 and 10%."""
        every = np.setdiff1d(np.arange(len(self.table.names)), list(self.unknown.values()))
        classes = every if split is None else self.splits[split]
        own = self.table.metadata.get("parts")
        rows = [divide_images(self.table.offsets, number, own)[part or "all"] for number in classes]
        sizes = [len(members) for members in rows for _ in range(self.turns)]
        quarter = np.tile(np.arange(self.turns), len(classes))
        return Labelled(
            rows=np.concatenate([members for members in rows for _ in range(self.turns)]),
            rotations=np.repeat(quarter, sizes),
            labels=np.repeat(np.arange(len(sizes)), sizes),
            names=[self.table.names[number] for number in classes for _ in range(self.turns)],
            reader=self.reader,
            identify=self.identities,
            item=self.called,
        )

    def digest_of(self, row: int) -> str | None:
        """A digest of an item of the table, which the same item has in another one; None of a blank image.

        Args:
            row: The row of the item.
        """
        (item,) = self.items(row, row + 1)
        return item_digest(item)

    def digests(self, number: int) -> list[str]:
        """Digests of some items of a class, from its first to its last, by which it is known again in another table.

        Args:
            number: The number of the class.
        """
        first, stop = map(int, self.table.offsets[number : number + 2])
        rows = {*np.linspace(first, stop - 1, min(stop - first, NOTED)).round().astype(int).tolist()}
        return sorted({digest for row in rows if (digest := self.digest_of(row)) is not None})

    def every_digest(self, number: int) -> frozenset[str]:
        """Digests of all items of a class.

        Args:
            number: The number of the class.
        """
        if number not in self._every_digest:
            first, stop = map(int, self.table.offsets[number : number + 2])
            blocks = (self.items(row, min(row + TOGETHER, stop)) for row in range(first, stop, TOGETHER))
            found = (item_digest(item) for block in blocks for item in block)
            self._every_digest[number] = frozenset(digest for digest in found if digest is not None)
        return self._every_digest[number]

    def known_digests(self, number: int) -> frozenset[str]:
        """Digests of all items of a class, or of some of them, `digests`, where the table is too large to be read whole.

        Args:
            number: The number of the class.
        """
        images = getattr(self.table, "images", None)
        small = images is None or images.nbytes <= COMPARED_BYTES
        return self.every_digest(number) if small else frozenset(self.digests(number))

    @property
    def has_test_part(self) -> bool:
        return any(self.table.metadata.get("parts", {}).get("test", []))

    def identities(self, rows: np.ndarray) -> list[str]:
        """Names each row of the table by its class and its place in the class, from 0, as `CLASS/PLACE`."""
        numbers = np.searchsorted(self.table.offsets, rows, side="right") - 1
        return [
            f"{self.table.names[number]}/{row - self.table.offsets[number]}"
            for number, row in zip(numbers, rows, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the items and their division, which no name of a class is needed for."""
        parts = self.table.metadata.get("parts")
        listing = "\n".join(f"{split}:{','.join(map(str, classes))}" for split, classes in self.splits.items())
        if parts:  # the items of a class lie part by part, so that their bytes do not tell where one ends
            listing += "".join(f"\n{part} of classes:{','.join(map(str, counts))}" for part, counts in parts.items())
        return hashlib.sha256((self.table.fingerprint + listing).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        sizes, parts = self.table.sizes, self.table.metadata.get("parts")
        same = self.undivided
        return {
            "fingerprint": self.fingerprint,
            "class_names": hashlib.sha256(json.dumps([self.table.names, self.table.groups]).encode()).hexdigest(),
            "classes": {split: len(classes) * self.turns for split, classes in self.splits.items()},
            "images": {split: int(sizes[classes].sum()) for split, classes in self.splits.items()},
            "images_of_smallest_class": {
                split: int(sizes[classes].min()) for split, classes in self.splits.items() if len(classes)
            },
            **({"parts": {part: sum(counts) for part, counts in parts.items()}} if parts else {}),
            "input_shape": list(self.input_shape),
            **{name: value for name, value in self.table.metadata.items() if name != "parts"},
            **({"split": f"all {len(same)} classes in every split, too few to divide"} if same else {}),
        }


def with_further(own: Episodes, asked: torch.Tensor, further: Sequence[int]) -> Episodes:
    """Tasks with further classes, whose support items are blank copies of a query: they will be left out again.

    Args:
        own: The tasks.
        asked: The queries of all further classes, class-major, `[T, sum(further), ...]`.
        further: The queries of each further class.
    """
    shots, more = own.support_sizes[-1], len(further)
    blank = asked[:, :1].expand(-1, more * shots, *asked.shape[2:])
    labels = torch.arange(own.ways, own.ways + more, device=own.support_y.device)
    sizes = (*own.query_sizes, *further)
    own_queries = torch.tensor(further, device=labels.device)
    return replace(
        own,
        support_x=torch.cat([own.support_x, blank], 1),
        support_y=torch.cat([own.support_y, labels.repeat_interleave(shots).expand(len(asked), -1)], 1),
        query_x=torch.cat([own.query_x, asked], 1),
        query_y=torch.cat([own.query_y, labels.repeat_interleave(own_queries).expand(len(asked), -1)], 1),
        ways=own.ways + more,
        shots=None if own.shots is None else (*own.shots, *(shots,) * more),
        queries=None if len(set(sizes)) == 1 else sizes,
    )
