"""How an image becomes what a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.data.decoding import Range
from metarun.data.image_batches import to_shape
from metarun.data.image_source import ImageSource, standardiser
from metarun.data.source import DataSource
from metarun.encoders import encoded_members
from metarun.inference.encoding import EncoderStep
from metarun.inference.texts import TextPreprocessing
from metarun.runs import result


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
        input_shape: The shape (C, H, W) that images are then brought to; (D,) with an encoder.
        encoding: What turns the pixels into vectors; None for a network that reads images.
    """

    image_size: int
    channels: int
    values: Range | None
    inverted: bool
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    input_shape: tuple[int, ...]
    encoding: EncoderStep | None = None

    @classmethod
    def of(
        cls, data: DataSource, input_shape: tuple[int, ...], reference: np.ndarray | None = None
    ) -> Preprocessing | TextPreprocessing | None:
        """The steps that a data set takes.

        Args:
            data: The data set.
            input_shape: The shape (C, H, W) that its images are brought to.
            reference: The rows of its table whose mean and deviation pixels are normalised by, where they are; None for its
                training images.

        Returns:
            The preprocessing; None for data that are neither texts nor square images.
        """
        data = data.underlying
        if texts := TextPreprocessing.of(data, reference):
            return texts
        if encoded := encoded_members(data):
            sets = [member.source for member in encoded.values()]
            if not all(isinstance(images, ImageSource) and len(set(images.input_shape[1:])) == 1 for images in sets):
                return None
            # Of several sets these are what `Domains` brings images without an encoder to.
            channels, size = (max(images.input_shape[axis] for images in sets) for axis in (0, 1))
            read = sets[0] if len(sets) == 1 else data
            step = EncoderStep.of(data, reference)
            return cls(size, channels, read.mapped, read.inverted, (0.0,), (1.0,), data.input_shape, step)
        seen = [isinstance(member, ImageSource) for member in data.members.values()]
        if not seen or not all(seen) or len(set(data.input_shape[1:])) != 1 or len(input_shape) != 3:
            return None
        channels, size = data.input_shape[:2]
        mean, deviation = (tuple(map(float, values)) for values in data.statistics_of(reference))
        return cls(size, channels, data.mapped, data.inverted, mean, deviation, tuple(input_shape))

    @classmethod
    def stored(
        cls, values: dict[str, Any], origin: Path, encoder_tensors: dict[str, Tensor] | None = None
    ) -> Preprocessing | TextPreprocessing:
        """The preprocessing that `describe` described.

        Args:
            values: What `describe` returned.
            origin: The file that holds it, for messages.
            encoder_tensors: The weights of its encoder, where a file holds them.
        """
        if "item" in values:
            return TextPreprocessing.stored(values, origin, encoder_tensors)
        values = dict(values)
        told = values.pop("encoder", None)
        step = EncoderStep.stored(told, origin, encoder_tensors) if told else None
        lists = ("mean", "deviation", "input_shape")
        mapped = values["values"]
        result.check_reading(values, dimensions=1 if step else 3)
        return cls(
            **{
                **values,
                **{name: tuple(values[name]) for name in lists},
                "values": None if mapped is None else (mapped[0], mapped[1]),
                "encoding": step,
            }
        )

    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json` and for a classifier file."""
        plain = {name: value for name, value in vars(self).items() if name != "encoding"}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
        return {**found, "encoder": self.encoding.describe()} if self.encoding else found

    def inputs(self, pixels: np.ndarray, device: torch.device) -> Tensor:
        """Computes the network's input `[B, *input_shape]`, float32, of pixels uint8 `[B, channels, image_size, image_size]`."""
        if self.encoding is not None:
            return self.encoding.vectors(255 - pixels if self.inverted else pixels, device)
        return self.of_pixels(torch.from_numpy(pixels).to(device))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """`inputs` of pixels that are a tensor, where they lie."""
        if self.encoding is not None:
            return self.encoding.of_pixels(255.0 - pixels if self.inverted else pixels.float())
        standardise = standardiser(np.array(self.mean), np.array(self.deviation), pixels.device)
        values = pixels.float()
        return to_shape(standardise(255 - values if self.inverted else values), self.input_shape)
