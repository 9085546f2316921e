"""A data set whose items are the vectors of another one's."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from metarun.core import TaskShape
from metarun.data.image_batches import Labelled
from metarun.data.image_source import gathered
from metarun.data.origin import Origin
from metarun.data.shared import shared_classes
from metarun.data.source import DataSource, EpisodeSampler, Reader, Split
from metarun.data.table_source import TableSource
from metarun.encoders.base import Encoder, Encoding
from metarun.encoders.vectors import VectorTable
from metarun.errors import UserError
from metarun.runs.result import NOTHING

MEASURED = 10_000  # training vectors, at most, that the mean is taken over


class EncodedSource(TableSource):
    """The classes, splits and tasks of a source, its items replaced by an encoder's vectors.

    Episode i has the items that it has without the encoder. The vectors of a split are computed by `make_ready`, and those of a class
    that was not made ready when its first item is asked for. What is measured on vectors (their mean) is measured on training items
    alone.

    Args:
        source: The data set.
        encoder: What encodes its items.
        encoding: How.

    Raises:
        UserError: The encoder cannot encode such items.
    """

    item = "vector"

    def __init__(self, source: TableSource, encoder: Encoder, encoding: Encoding) -> None:
        encoder.check(source)
        if encoding.views > 1 and type(encoder).changed is Encoder.changed:
            encoder.changed(None, 1)  # which refuses it, before anything is made
        super().__init__(source.table, source.splits, within_group=source.within_group, rotations=source.rotations)
        self.source, self.encoder, self.encoding = source, encoder, encoding
        # Each row has its quarter turns, and each of these its views.
        self.vectors = VectorTable(source, encoder, encoding)
        self.as_target, self.unknown = source.as_target, source.unknown
        self.form, self.told_apart = source.form, source.told_apart
        self.input_shape = (encoder.features,)
        self._centre: DataSource | None = None  # the source whose mean is taken off instead of the own
        self._drawn: int | None = None  # the seed of the views that training episodes draw
        self._means: dict[tuple[bool, bytes], np.ndarray] = {}

    @property
    def called(self) -> str:
        return self.source.called

    def make_ready(self, device: torch.device, split: Split | None = None) -> None:
        self.make_rows_ready(
            device, self._rows_of(range(len(self.table.names)) if split is None else self.splits[split])
        )
        if split is not None:
            self.mean()

    def make_rows_ready(self, device: torch.device, rows: np.ndarray) -> None:
        """Computes the vectors of rows of the table, int64 `[n]`, on a device."""
        self.vectors.device = device
        if rows.size:
            self.vectors.with_rows(rows)

    def encoding_seconds(self, device: torch.device, splits: Iterable[Split]) -> float:
        """Estimates how long it takes to compute the vectors of some splits that are not there yet, on a device."""
        self.vectors.device = device
        classes = {int(number) for split in splits for number in self.splits[split]}
        return self.vectors.seconds(self._rows_of(sorted(classes)))

    def _rows_of(self, classes: Iterable[int]) -> np.ndarray:
        """The rows of all items of some classes, int64 `[n]`."""
        ends = self.table.offsets
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(ends[c], ends[c + 1]) for c in classes)])

    def items(self, start: int, stop: int, turns: int = 0) -> np.ndarray:
        if start == stop:
            return np.zeros((0, self.encoder.features), self.encoding.dtype)
        found: np.ndarray = self.vectors.with_rows(np.arange(start, stop))[start:stop, turns * self.encoding.views]
        return found

    def mean(self, reference: np.ndarray | None = None) -> np.ndarray:
        """What is taken off all vectors, float32 `[D]`: the mean of the training items' vectors, or 0 where none is taken off.

        Args:
            reference: The rows that the mean is taken over; None for the training items of the training classes.
        """
        if self.encoding.transform != "cl2n":
            return np.zeros(self.encoder.features, np.float32)
        if self._centre is not None:
            return mean_of(self._centre)
        # Every batch asks again, and to find the training items of many classes takes longer than a step.
        known = self.splits["train"] if reference is None else _measured(reference)
        key = reference is None, known.tobytes()
        if key not in self._means:
            rows = _measured(self.training_rows) if reference is None else known
            self._means[key] = self.vectors.with_rows(rows)[rows, 0].mean(0, dtype=np.float64).astype(np.float32)
        return self._means[key]

    def centred_as(self, other: DataSource) -> EncodedSource:
        """The same vectors, less the mean of the training items of another source: of a data set that is tested on.

        Args:
            other: One data set of encoded items, or several, see `mean_of`.
        """
        found = copy.copy(self)
        found._centre = other
        return found

    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        """A function of table rows int64 `[..., n]` and quarter turns `[...]`: their vectors, float32 `[..., n, D]`.

        Of a changed copy the turns are 4 times its number more.

        Args:
            device: Where the vectors shall lie.
            reference: The rows that the mean is taken over, see `mean`.
        """
        views, drawn = self.encoding.views, self._drawn

        @functools.cache  # when the first items are read: vectors are not made before
        def mean() -> torch.Tensor:
            return torch.from_numpy(self.mean(reference)).to(device)

        def read(rows: np.ndarray, turns: np.ndarray) -> torch.Tensor:
            if not rows.size:
                return torch.zeros(*rows.shape, self.encoder.features, device=device)
            if not self.vectors.is_whole(rows):
                classes = np.searchsorted(self.table.offsets, rows, side="right") - 1
                self.vectors.with_rows(self._rows_of(np.unique(classes)))
            table = self.vectors.on(device, rows)
            copies = np.zeros_like(rows) + (turns % 4 * views + turns // 4)[..., None]
            if drawn is not None:
                copies += drawn_views(drawn, rows, views)
            found = gathered(table.flatten(0, 1), rows * table.shape[1] + copies)
            return transformed(found.to(device).float(), mean(), self.encoding.transform)

        return read

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        if split != "train" or self.encoding.views == 1:
            return super().sampler(split, task, seed, device)
        drawing = copy.copy(self)
        drawing._drawn = seed
        return super(EncodedSource, drawing).sampler(split, task, seed, device)

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        found = self.source.labelled(part, split)
        return replace(found, reader=self.reader, views=self.encoding.views, make_rows_ready=self.make_rows_ready)

    def saw(self, split: Split | None) -> dict[str, Any]:
        """What `result.json` says of the encoder's pretraining, under `protocol`, see `saw_of`.

        Args:
            split: The split whose classes are tested on; None for all classes.
        """
        saw = self.encoding.saw
        told = classes_seen(saw, self.source)
        if saw is None and not self.encoder.pretrained and self.encoder.seen:
            tested = range(len(self.table.names)) if split is None else self.splits[split]
            saw = "the training images of an earlier run"
            shared = shared_classes(self.encoder.seen, self.source, tested)
            told = "yes" if any(shared) else "no"
            if shared.by_names and not shared.by_images:
                saw += " (compared by the names of classes alone)"
        return {
            "name": str(self.encoder.identity().get("name", type(self.encoder).__name__)),
            "saw": saw,
            "saw_these_classes": told,
            **({"fitted_to": "training items alone"} if self.encoder.fitted else {}),
        }

    @property
    def origins(self) -> Sequence[Origin]:
        if self.encoder.origin is not None:
            return (self.encoder.origin,)
        if self.encoder.seen:
            return (Origin("encoder", self.encoder.seen, labels_read="it was trained with labels"),)
        return () if self.encoder.fitted or self.encoding.saw == NOTHING else (Origin("encoder"),)

    def digest_of(self, row: int) -> str | None:
        return self.source.digest_of(row)

    def every_digest(self, number: int) -> frozenset[str]:
        return self.source.every_digest(number)

    @property
    def has_test_part(self) -> bool:
        return self.source.has_test_part

    def identities(self, rows: np.ndarray) -> list[str]:
        return self.source.identities(rows)

    @property
    def fingerprint(self) -> str:
        return _digest(self.source.fingerprint, self._told())

    def describe(self) -> dict[str, Any]:
        found, told = self.source.describe(), self._told()
        return {
            **found,
            "fingerprint": _digest(found["fingerprint"], told),
            # By which a report compares them with runs on the items themselves.
            "before_encoding": found["fingerprint"],
            "input_shape": list(self.input_shape),
            "items": self.source.item,
            "encoder": told,
        }

    def _told(self) -> dict[str, Any]:
        """All that the vectors depend on besides the items."""
        return {
            "class": type(self.encoder).__name__,
            **self.encoder.identity(),
            **{name: value for name, value in vars(self.encoding).items() if name != "batch_size"},
        }


def _digest(fingerprint: str, told: dict[str, Any]) -> str:
    """The SHA-256 of what vectors depend on: the fingerprint of the items, and what is told of the encoder."""
    return hashlib.sha256(json.dumps([fingerprint, told], sort_keys=True).encode()).hexdigest()


def _measured(rows: np.ndarray) -> np.ndarray:
    """Those of some rows that a mean is taken over, evenly spread."""
    return rows[:: -(-len(rows) // MEASURED)]


def before_encoding(data: DataSource) -> DataSource:
    """The data set whose items an encoder turned into those of `data`; `data` itself where none did."""
    return data.source if isinstance(data, EncodedSource) else data


class StandIn(EncodedSource):
    """An encoded source whose vectors are drawn, of length 1: what is timed on it has no item encoded."""

    def make_rows_ready(self, device: torch.device, rows: np.ndarray) -> None:
        pass

    def mean(self, reference: np.ndarray | None = None) -> np.ndarray:
        return np.zeros(self.encoder.features, np.float32)

    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        def read(rows: np.ndarray, turns: np.ndarray) -> torch.Tensor:
            return F.normalize(torch.randn(*rows.shape, self.encoder.features, device=device), dim=-1)

        return read


def stand_in(data: DataSource) -> DataSource:
    """A data set of encoded items with drawn vectors in their place, see `StandIn`; any other data set as it is."""
    if not encoded_members(data):
        return data
    return data.each(
        lambda member: (
            StandIn(member.source, member.encoder, member.encoding) if isinstance(member, EncodedSource) else member
        )
    )


def encoded_members(data: DataSource) -> dict[str, EncodedSource]:
    """The sets of vectors that a data set's tasks are drawn from, by name; none where its items are not encoded."""
    members = data.underlying.members
    return {name: member for name, member in members.items() if isinstance(member, EncodedSource)}


def saw_of(tested: Iterable[DataSource], split: Split | None) -> dict[str, Any] | None:
    """What `result.json` says of an encoder's pretraining, under `protocol`; None where no items are encoded.

    Args:
        tested: What is tested on. The encoder saw these classes if it saw those of one of them.
        split: The split whose classes are tested on; None for all classes.
    """
    told = [member.saw(split) for data in tested for member in encoded_members(data).values()]
    if not told:
        return None
    return {**told[0], "saw_these_classes": of_any(each["saw_these_classes"] for each in told)}


def classes_seen(saw: str | None, source: DataSource) -> str:
    """Whether what weights were pretrained on has classes of a data set: `yes`, `no` or `not known`.

    Args:
        saw: What they were pretrained on, by name; None where it is not known.
        source: The data set.
    """
    if saw == NOTHING:
        return "no"
    known = source.classes_in
    return "not known" if known is None or saw is None else "yes" if saw in known else "no"


def of_any(answers: Iterable[str]) -> str:
    """The answer for several data sets, of the answers for each: `yes` if it is so for one of them."""
    found = {*answers}
    return next((one for one in ("yes", "not known") if one in found), "no")


def mean_of(data: DataSource, reference: np.ndarray | None = None) -> np.ndarray:
    """What is taken off the vectors of items that are of none of a data set's own, float32 `[D]`.

    Args:
        data: One data set of encoded items, whose mean it is; or several, the means of which count by their shares of the tasks.
        reference: The rows that the mean is taken over; None for the training items.
    """
    members = encoded_members(data)
    means = [member.mean(reference) for member in members.values()]
    if len(means) == 1:
        return means[0]
    shares = [data.underlying.share(name) for name in members]
    pooled: np.ndarray = np.average(means, axis=0, weights=shares).astype(np.float32)
    return pooled


def transformed(x: torch.Tensor, mean: torch.Tensor, transform: str) -> torch.Tensor:
    """Vectors `[..., D]` as `encoder.transform` says.

    Args:
        x: The vectors.
        mean: What is taken off them, `[D]`.
        transform: `un`, `l2n` or `cl2n`.
    """
    return x if transform == "un" else F.normalize(x - mean, dim=-1)


def drawn_views(seed: int, rows: np.ndarray, views: int) -> np.ndarray:
    """A view of each item of each task, int64 as `rows` `[T, ..., n]`: a function of the seed and of the task's own rows."""
    found = []
    for task in rows:
        key = hashlib.blake2b(str(seed).encode() + task.tobytes(), digest_size=16).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        found.append(draw.integers(0, views, task.shape))
    return np.stack(found)


def training_items(source: TableSource, *, as_target: bool = False, chunk: int = 1024) -> Iterator[Any]:
    """The training items of a source in chunks, for an encoder that is fitted.

    Args:
        source: The data set.
        as_target: Whether it is a target: then its training items are those of its training part, of all classes.
        chunk: The most items of a chunk.

    Raises:
        UserError: Nothing says which items are for training: its training and test classes are the same, or a target is divided anew in
            each repeat.
    """
    tested, own = {*source.splits["test"]} & {*source.splits["train"]}, source.table.metadata.get("parts")
    if (tested or as_target) and not own:
        raise UserError(
            "encoder: is fitted to training items, but these data do not say which items are for training; divide them into train "
            "and test folders or files, or train on a source (recipe=transfer data=...)"
        )
    rows = np.unique(source.labelled("train").rows) if as_target else source.training_rows
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        for start in range(0, len(run), chunk):
            yield source.items(int(run[start]), int(run[min(start + chunk, len(run)) - 1]) + 1)
