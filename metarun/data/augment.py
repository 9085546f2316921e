"""Random changes of training images, a batch at a time and on its device, by kornia."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from metarun.config.checked import Checked
from metarun.config.types import DropRate, NonNegativeInt
from metarun.errors import UserError


class Augment(Checked):
    """Changes each image of a batch `[B, C, H, W]` (float) at random; for training alone, the caller sees to that.

    `crop` pads by so many pixels on every side (with zeros, the mean where images are normalised) and crops to the former
    size at a random place; `flip` mirrors half of the images left to right; `jitter` in [0, 1) multiplies all pixels of an
    image by a number in [1 - jitter, 1 + jitter] (contrast about zero) and then adds one in [-jitter, jitter] (brightness,
    in the units of the images: standard deviations where they are normalised). Nothing is cut to a range.

    Draws come from torch's global generator of the CPU, so a seed repeats them on any device. Raises `UserError` for
    settings beyond these ranges, for a crop that pads by more than the image, and where kornia is missing.

    Args:
        crop: The pixels that every side is padded by before a random crop of the former size.
        flip: Whether half of the images are mirrored left to right.
        jitter: The most that contrast and brightness change by.
    """

    configured_by = "augment"

    def __init__(self, *, crop: NonNegativeInt = 0, flip: bool = False, jitter: DropRate = 0.0) -> None:
        self.crop = crop
        self._crops: dict[tuple[int, int], Any] = {}
        self._others: list[Any] = []
        if not (crop or flip or jitter):
            return
        self._kornia = _kornia()
        if flip:
            self._others.append(self._kornia.RandomHorizontalFlip(p=0.5))
        if jitter:
            ends = (1 - jitter, 1 + jitter)
            self._others += [
                self._kornia.RandomContrast(ends, clip_output=False),
                self._kornia.RandomBrightness(ends, clip_output=False),
            ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The batch changed, of the same shape, type and device; `x` itself is left as it is."""
        if self.crop:
            x = self._cropping(x.shape[-2], x.shape[-1])(x)
        for change in self._others:
            x = change(x)
        return x

    def _cropping(self, height: int, width: int) -> Any:
        if (height, width) not in self._crops:
            if self.crop > min(height, width):
                raise UserError(f"augment.crop={self.crop}: is more than the side of images of {height}x{width} pixels")
            self._crops[height, width] = self._kornia.RandomCrop((height, width), padding=self.crop)
        return self._crops[height, width]


def _kornia() -> ModuleType:
    try:
        return import_module("kornia.augmentation")
    except ImportError as error:
        raise UserError(
            f"augment: needs kornia, which cannot be imported ({error}): pip install 'metarun[augment]'"
        ) from error
