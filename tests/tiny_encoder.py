"""Encoders that tests name as `_target_`: means of an image's squares, and one that is fitted to training images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.encoders import Encoder


class Squares(Encoder):
    """The mean of each of `side` times `side` squares of an image, times `scale`."""

    item = "image"

    def __init__(self, *, side: int = 2, scale: float = 1.0) -> None:
        self.features, self.side, self.scale = side * side, side, scale
        self.encoded = 0  # items, and what ends it after so many
        self.last: int | None = None

    def identity(self) -> dict[str, Any]:
        return {"side": self.side, "scale": self.scale}

    def encode(self, items: Any) -> Tensor:
        if self.last is not None and self.encoded >= self.last:
            raise KeyboardInterrupt
        x = torch.as_tensor(items)
        self.encoded += len(x)
        return self.of_pixels(x.float())

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), self.side).flatten(1) * (self.scale / 255)

    def changed(self, items: Any, view: int) -> Tensor:
        return torch.as_tensor(items) // (view + 1)


class Fitted(Squares):
    """Counts what it is fitted to."""

    fitted = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def fit(self, items: Iterable[Any]) -> None:
        self.seen = [torch.as_tensor(chunk) for chunk in items]

    def identity(self) -> dict[str, Any]:
        return {"fitted to": sum(map(len, self.seen))}


class OfTexts(Squares):
    """Reads texts, of which these tests have none."""

    item = "text"
