"""Tasks from a table of images, which all image data sets share."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch

from metarun.data.image_batches import to_shape
from metarun.data.source import Reader, Split
from metarun.data.table import Table
from metarun.data.table_source import TableSource
from metarun.text import shape_text

log = logging.getLogger("metarun")

DEVICE_TABLE_BYTES = 2**30  # larger tables stay memory-mapped, and only the episodes' images travel


def standardiser(
    mean: np.ndarray, deviation: np.ndarray, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that shifts and scales the channels of images uint8 `[..., C, H, W]`, and gives float32.

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
    """Reads `table[rows]` in a fraction of its time: whole rows are copied.

    Args:
        table: `[M, ...]`, contiguous.
        rows: int64, of any shape.

    Returns:
        `[*rows.shape, ...]`, on the device of the table.
    """
    where = torch.from_numpy(np.ascontiguousarray(rows)).to(table.device)
    return table.index_select(0, where.flatten()).view(*rows.shape, *table.shape[1:])


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
        self.form = shape_text(self.input_shape)
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

    def normalize_as(self, trained: bool, where: str) -> None:
        """Normalises the pixels if those that a network was trained on are: one that was trained on one kind is no use for the other.

        It is called before any image is read.

        Args:
            trained: Whether the pixels were normalised that the network was trained on.
            where: What a line about it begins with, `target` say.
        """
        if self.normalize != trained:
            self.normalize = trained
            log.info(
                "%s: its pixels are %s, as those are that the network is trained on",
                where,
                "normalised" if trained else "left in 0 to 1",
            )

    def fitted(self, shape: tuple[int, ...], statistics: tuple[np.ndarray, np.ndarray]) -> Self:
        """Returns the same images for a network that takes another shape, or knows other statistics.

        Args:
            shape: The shape (C, H, W) that images are brought to as `image_batches.to_shape` does it.
            statistics: What is subtracted from each channel of that shape and what it is divided by, as `statistics`.
        """
        found = copy.copy(self)
        found.__dict__.pop("statistics", None)
        found.input_shape, found.given = tuple(shape), statistics
        return found

    def measured(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Measures mean and deviation of each channel over up to 2,000 rows of the table, evenly spread, float64 `[C]` in [0, 1]."""
        rows = rows[:: -(-len(rows) // 2000)]
        # Counts of the 256 values are exact and, unlike the images as floats, small.
        counts = np.zeros((self.table.images.shape[1], 256), dtype=np.int64)
        for row in rows:
            counts += [np.bincount(channel.ravel(), minlength=256) for channel in self.table.images[row]]
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        # A constant channel's variance may round to a little below 0.
        return mean, np.sqrt((counts @ values**2 / counts.sum(1) - mean**2).clip(0)).clip(1e-3)

    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        """Returns a function of table rows int64 `[..., n]` and quarter turns `[...]`: their images, float `[..., n, C, H, W]`.

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
