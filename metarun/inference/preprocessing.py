"""How an image becomes what a network was trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.data.decoding import Range
from metarun.data.image_batches import to_shape
from metarun.data.source import DataSource, ImageSource, standardiser


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image file to the input of a network, as the data set took them.

    Attributes:
        image_size: The side in pixels that files are brought to.
        channels: 1 or 3.
        values: The values of deep images that become black and white; None for those of the depth.
        inverted: Whether the network sees negatives.
        mean: What is subtracted from each channel, where black is 0 and white 1.
        deviation: What each channel is divided by.
        input_shape: The shape (C, H, W) that images are then brought to.
    """

    image_size: int
    channels: int
    values: Range | None
    inverted: bool
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    input_shape: tuple[int, ...]

    @classmethod
    def of(
        cls, data: DataSource, input_shape: tuple[int, ...], reference: np.ndarray | None = None
    ) -> Preprocessing | None:
        """The steps that a data set takes.

        Args:
            data: The data set.
            input_shape: The shape (C, H, W) that its images are brought to.
            reference: The rows of its table whose mean and deviation pixels are normalised by, where they are; None for its
                training images.

        Returns:
            The preprocessing; None for data that are no square images.
        """
        data = data.underlying
        if not isinstance(data, ImageSource) or len(set(data.input_shape[1:])) != 1 or len(input_shape) != 3:
            return None
        channels, size = data.input_shape[:2]
        mean, deviation = (tuple(map(float, values)) for values in data.statistics_of(reference))
        return cls(size, channels, data.mapped, data.inverted, mean, deviation, tuple(input_shape))

    @classmethod
    def stored(cls, values: dict[str, Any]) -> Preprocessing:
        """The preprocessing that `describe` described."""
        lists = ("mean", "deviation", "input_shape")
        mapped = values["values"]
        return cls(
            **{
                **values,
                **{name: tuple(values[name]) for name in lists},
                "values": None if mapped is None else (mapped[0], mapped[1]),
            }
        )

    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json` and for a classifier file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def inputs(self, pixels: np.ndarray, device: torch.device) -> Tensor:
        """The network's input `[B, *input_shape]`, float32, of pixels uint8 `[B, channels, image_size, image_size]`."""
        return self.of_pixels(torch.from_numpy(pixels).to(device))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """`inputs` of pixels that are a tensor, where they lie."""
        standardise = standardiser(np.array(self.mean), np.array(self.deviation), pixels.device)
        values = pixels.float()
        return to_shape(standardise(255 - values if self.inverted else values), self.input_shape)
