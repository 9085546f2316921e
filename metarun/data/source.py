"""Where tasks come from: the contract of a data set, and the one implementation that all image data sets share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from metarun.core import Episodes, TaskShape
from metarun.data.sampler import ClassSampler
from metarun.data.table import Table

Split = Literal["train", "val", "test"]
EpisodeSampler = Callable[[int, int], Episodes]  # the episodes from `start` to `stop`, on the device

DEVICE_TABLE_BYTES = 2**30  # larger tables stay memory-mapped, and only the episodes' images travel


class DataSource(ABC):
    """Tasks of three splits. Knows nothing of methods."""

    kind: Literal["classification", "regression"]
    input_shape: tuple[int, ...]  # (C, H, W), or (D,)
    outputs: int | None = None  # dimensions of a regression target; None for classification

    @abstractmethod
    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        """A function of (start, stop) that yields those episodes; raises `UserError` if the split cannot serve `task`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json`: at least `fingerprint`, and the classes and images of each split."""


class ImageSource(DataSource):
    """A table of images with its classes divided among the splits.

    `rotations` counts each class turned by 90, 180 and 270 degrees as further classes; `within_group` draws all ways of
    an episode from one group (alphabet). `normalize` shifts and scales each channel by the mean and standard deviation of
    the training split; otherwise pixels are in [0, 1].
    """

    kind = "classification"

    def __init__(
        self,
        table: Table,
        splits: dict[Split, Sequence[int]],
        *,
        rotations: bool = False,
        within_group: bool = False,
        normalize: bool = False,
    ) -> None:
        self.table = table
        self.splits = {split: np.asarray(classes, dtype=np.int64) for split, classes in splits.items()}
        self.rotations = rotations
        self.within_group = within_group
        self.input_shape = tuple(table.images.shape[1:])
        self.mean: np.ndarray = np.zeros(1)
        self.std: np.ndarray = np.ones(1)
        if normalize:
            self.mean, self.std = self._statistics()
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Channel means and standard deviations over up to 2,000 training images, evenly spread, float64 [C] in [0, 1]."""
        offsets = self.table.offsets
        rows = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in self.splits["train"]])
        rows = rows[:: -(-len(rows) // 2000)]
        # Counts of the 256 values are exact and, unlike the images as floats, small.
        counts = np.zeros((self.input_shape[0], 256), dtype=np.int64)
        for row in rows:
            counts += [np.bincount(channel.ravel(), minlength=256) for channel in self.table.images[row]]
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        return mean, np.sqrt(counts @ values**2 / counts.sum(1) - mean**2).clip(1e-3)

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        classes = self.splits[split]
        names = np.array(self.table.groups)[classes]
        draw = ClassSampler(
            offsets=self.table.offsets,
            classes=classes,
            task=task,
            seed=seed,
            split=split,
            rotations=4 if self.rotations else 1,
            groups=np.unique(names, return_inverse=True)[1] if self.within_group else None,
        ).draw
        images = self._images(device)
        mean = torch.tensor(self.mean, dtype=torch.float32, device=device).view(-1, 1, 1) * 255
        scale = 1 / (torch.tensor(self.std, dtype=torch.float32, device=device).view(-1, 1, 1) * 255)
        labels = torch.arange(task.ways, device=device)

        def episodes(start: int, stop: int) -> Episodes:
            rows, turns = draw(start, stop)
            x = images[torch.from_numpy(rows).to(images.device)].to(device)  # [T, N, K + Q, C, H, W] uint8
            if self.rotations:
                turned = torch.from_numpy(turns).to(device)
                for quarter in (1, 2, 3):
                    where = turned == quarter
                    x[where] = torch.rot90(x[where], quarter, (-2, -1))
            x = (x.float() - mean) * scale
            tasks = stop - start

            def flat(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                per_way = part.shape[2]
                return part.flatten(1, 2), labels.repeat_interleave(per_way).expand(tasks, -1)

            return Episodes(*flat(x[:, :, : task.shots]), *flat(x[:, :, task.shots :]), ways=task.ways)

        return episodes

    def _images(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            images = torch.from_numpy(self.table.images)
            if self.table.images.nbytes <= DEVICE_TABLE_BYTES:
                images = images.clone() if device.type == "cpu" else images.to(device)
            self._on_device[device] = images
        return self._on_device[device]

    def describe(self) -> dict[str, Any]:
        sizes = self.table.sizes
        listing = "\n".join(f"{split}:{','.join(map(str, classes))}" for split, classes in self.splits.items())
        return {
            "fingerprint": hashlib.sha256((self.table.fingerprint + listing).encode()).hexdigest(),
            "classes": {split: len(classes) * (4 if self.rotations else 1) for split, classes in self.splits.items()},
            "images": {split: int(sizes[classes].sum()) for split, classes in self.splits.items()},
            "input_shape": list(self.input_shape),
            **self.table.notes,
        }
