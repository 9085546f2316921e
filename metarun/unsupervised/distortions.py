"""Random changes of an image that leave what it shows: a batch at a time, drawn by a generator that is handed in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Distortions:
    """What may happen to an image; every number at 0 (and `area` at 1) leaves it alone.

    Args:
        shift: The largest shift along each axis, as a part of the side.
        degrees: The largest turn to either side.
        area: The smallest and the largest share of the image that a random crop takes; above 1 the image shrinks.
        stretch: The largest ratio of the crop's sides, at least 1.
        flip: Whether half of the images are mirrored left to right.
        flip_vertical: Whether half of the images are mirrored top to bottom.
        zeroed: The share of the pixels that is set to 0.
        rescaled: Whether the other pixels are divided by 1 - zeroed, as dropout does.
        erased: The share of the images of which a rectangle of 2 to 33% is set to 0.
        brightness: The largest factor of all pixels, as a part of 1 to either side.
        contrast: The largest factor of the distance from an image's mean, as a part of 1 to either side.
        grey: The share of colour images that lose their colours.
    """

    shift: float = 0.0
    degrees: float = 0.0
    area: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    flip: bool = False
    flip_vertical: bool = False
    zeroed: float = 0.0
    rescaled: bool = False
    erased: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    grey: float = 0.0

    def describe(self) -> dict[str, Any]:
        """What may happen, as JSON values, without what may not."""
        nothing = Distortions()
        found = {name: value for name, value in asdict(self).items() if value != getattr(nothing, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def __call__(self, x: Tensor, random: np.random.Generator) -> Tensor:
        """Changes images.

        Args:
            x: The images, float `[B, C, H, W]`; black, or the mean of normalised images, is 0.
            random: What is drawn from. Each image takes the same numbers whatever its device.

        Returns:
            The images changed, `[B, C, H, W]`. What comes in from beyond the border is 0.
        """
        x = self._moved(x, random)
        if self.brightness or self.contrast or self.grey:
            x = self._coloured(x, random)
        if self.zeroed:
            kept = self._tensor(random.random((len(x), 1, *x.shape[2:])) >= self.zeroed, x)
            x = x * kept / (1 - self.zeroed if self.rescaled else 1)
        return self._with_holes(x, random) if self.erased else x

    @staticmethod
    def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(like)

    def _moved(self, x: Tensor, random: np.random.Generator) -> Tensor:
        n = len(x)
        low, high = self.area
        side = np.sqrt(random.uniform(low, high, n))
        ratio = np.sqrt(np.exp(random.uniform(-1, 1, n) * math.log(self.stretch)))
        scale = np.stack([side * ratio, side / ratio], 1)  # of the window that is looked at, in x and y
        room = np.maximum(1 - scale, 0)  # a crop lies somewhere in the image
        centre = random.uniform(-1, 1, (n, 2)) * room + 2 * self.shift * random.uniform(-1, 1, (n, 2))
        angle = np.deg2rad(self.degrees) * random.uniform(-1, 1, n)
        mirrored = np.where(random.random((n, 2)) < 0.5, -1.0, 1.0)
        mirrored = np.where([self.flip, self.flip_vertical], mirrored, 1.0)
        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)
        theta = np.concatenate([turn * (scale * mirrored)[:, None], centre[..., None]], 2)
        if np.array_equal(theta, np.tile([[[1.0, 0, 0], [0, 1, 0]]], (n, 1, 1))):
            return x
        grid = F.affine_grid(self._tensor(theta, x), list(x.shape), align_corners=False)
        inside = (grid.abs() <= 1 + 1e-6).all(-1)[:, None]  # else the outermost pixels would fade
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False) * inside

    def _coloured(self, x: Tensor, random: np.random.Generator) -> Tensor:
        draws = random.uniform(-1, 1, (2, len(x), 1, 1, 1))
        x = x * (1 + self.brightness * self._tensor(draws[0], x))
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (1 + self.contrast * self._tensor(draws[1], x))
        grey = torch.from_numpy(random.random((len(x), 1, 1, 1)) < self.grey).to(x.device)
        return torch.where(grey, x.mean(1, keepdim=True).expand_as(x), x)

    def _with_holes(self, x: Tensor, random: np.random.Generator) -> Tensor:
        n, (height, width) = len(x), x.shape[2:]
        draws = random.random((5, n))
        share, ratio = 0.02 + 0.31 * draws[0], 0.3 * (1 / 0.09) ** draws[1]  # 0.3 to 3.3
        tall = np.minimum(np.sqrt(share * ratio), 1) * height
        wide = np.minimum(np.sqrt(share / ratio), 1) * width
        top, left = draws[2] * (height - tall), draws[3] * (width - wide)
        rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
        shaped = (each[:, None, None] for each in (top, left, tall, wide))
        top, left, tall, wide = shaped
        hole = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
        hole &= (draws[4] < self.erased)[:, None, None]
        return x * self._tensor(~hole[:, None], x)
