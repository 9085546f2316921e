"""What encoders of images share: bringing images of a table to what a network expects, and its vectors."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.libraries import TrainingImages
from metarun.config.hints import hints_of
from metarun.data.table_source import TableSource
from metarun.encoders.base import Encoder
from metarun.encoders.folding import folded
from metarun.errors import UserError, first_line

# The part of an image's area that a changed copy shows (torchvision's RandomResizedCrop has 0.08).
CROPPED = (
    0.35,
    1.0,
)
STRETCHED = 4 / 3  # how much wider than high a crop may be, or the inverse


class ImageEncoder(Encoder):
    """A frozen network on images uint8 `[n, C, H, W]` with 1 or 3 channels, in evaluation mode.

    Attributes:
        network: Images `[n, 3, S, S]` to vectors `[n, features]`.
        recipe: How images become its input.
        digest: The SHA-256 of the network's weights.
    """

    item = "image"
    network: nn.Module
    recipe: TrainingImages
    _folded: nn.Module | None = None  # what `network` encodes with, made when the first items are encoded

    def settle(self, network: nn.Module, recipe: TrainingImages) -> None:
        """Takes the network and the images that it expects; for a constructor.

        Raises:
            UserError: The network does not turn such images into vectors.
        """
        self.network = network.eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.recipe, self.device = recipe, torch.device("cpu")
        size = recipe.image_size
        try:
            with torch.no_grad():
                output = self.network(torch.zeros(1, 3, size, size))
        except Exception as error:
            raise UserError(
                f"encoder.image_size={size}: {self.name} does not take such images ({first_line(error)})"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UserError(f"encoder.name={self.name}: does not turn an image into one vector of features")
        self.features = output.shape[1]
        self.digest = digest_of(network)

    @property
    @abstractmethod
    def name(self) -> str:
        """The network, for messages."""

    def check(self, source: TableSource) -> None:
        super().check(source)
        channels = source.input_shape[0]
        if channels not in (1, 3):
            raise UserError(f"encoder: {self.name} takes images of 1 or 3 channels, but the data have {channels}")

    def advice(self, source: TableSource) -> str:
        read, expected = source.input_shape[-1], self.recipe.image_size
        if read >= expected or "image_size" not in hints_of(type(source)):
            return ""
        return (
            f"images are read at {read} pixels and enlarged to {expected}; data.image_size={expected} "
            f"(of a target: target.data.image_size) keeps more of files that are larger"
        )

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.digest, "features": self.features, "images": described(self.recipe)}

    def to(self, device: torch.device) -> None:
        if device != self.device:
            self.device, self._folded = device, None
            self.network.to(device)

    def prepare(self, items: Any) -> Tensor:
        """Images uint8 `[n, 3, S, S]`, resized and cut as the network's weights expect."""
        return resized(torch.as_tensor(items), self.recipe)

    def encode(self, items: Tensor) -> Tensor:
        if self._folded is None:
            self._folded = folded(self.network, self.recipe.image_size)
        found: Tensor = self._folded(standardised(items.to(self.device), self.recipe))
        return found.float()

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """`prepare` and `encode` in one, of floating-point pixels `[n, C, H, W]` from 0 to 255, in steps that a graph can hold."""
        found: Tensor = self.network(standardised(resized_by_products(pixels, self.recipe), self.recipe))
        return found.float()

    def changed(self, items: Any, view: int) -> Tensor:
        return changed_images(items, view)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.network.state_dict().items()}

    def restore(self, learned: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(tensors))
        self._folded = None
        self.digest = digest_of(self.network)


def changed_images(items: Any, view: int) -> Tensor:
    """Makes changed copies of images: random crops, resized, every other one mirrored.

    Args:
        items: The images, uint8 `[n, C, H, W]`.
        view: The number of the copy, of which and of each image's pixels its change is a function.
    """
    images = torch.as_tensor(items)
    draws = torch.from_numpy(np.stack([_draws(image.numpy(), view) for image in images]))
    area = CROPPED[0] + draws[:, 0] * (CROPPED[1] - CROPPED[0])
    stretch = torch.exp((2 * draws[:, 1] - 1) * math.log(STRETCHED) / 2)
    wide, high = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    grid = torch.zeros(len(images), 2, 3)
    grid[:, 0, 0] = torch.where(draws[:, 2] < 0.5, wide, -wide)
    grid[:, 1, 1] = high
    grid[:, 0, 2], grid[:, 1, 2] = (2 * draws[:, 3] - 1) * (1 - wide), (2 * draws[:, 4] - 1) * (1 - high)
    places = F.affine_grid(grid, list(images.shape), align_corners=False)
    found = F.grid_sample(images.float(), places, padding_mode="border", align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)


def described(recipe: TrainingImages) -> dict[str, Any]:
    """A recipe as JSON values."""
    return {
        "size": recipe.image_size,
        "interpolation": recipe.interpolation,
        "crop": round(recipe.crop, 4),
        "mean": [round(value, 6) for value in recipe.mean],
        "deviation": [round(value, 6) for value in recipe.deviation],
    }


def shape_before_crop(high: int, wide: int, recipe: TrainingImages) -> list[int]:
    """The height and the width that an image is resized to, the shorter one by the recipe, before its middle is cut out."""
    scale = math.floor(recipe.image_size / recipe.crop) / min(high, wide)
    return [max(recipe.image_size, round(side * scale)) for side in (high, wide)]


def cut(images: Tensor, size: int) -> Tensor:
    """The middle of images `[n, C, H, W]`, `[n, 3, size, size]`, as torchvision rounds it; one channel is repeated."""
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size].expand(-1, 3, -1, -1)


def resized(images: Tensor, recipe: TrainingImages) -> Tensor:
    """Images uint8 `[n, C, H, W]` as `[n, 3, S, S]`: the shorter side resized, the middle cut out.

    Both as Pillow and torchvision do it: smoothed where an image shrinks, values rounded to whole ones.

    Args:
        images: On any device.
        recipe: The size, the interpolation and the crop.
    """
    shape = shape_before_crop(images.shape[2], images.shape[3], recipe)
    if shape != list(images.shape[2:]):
        # Of bytes in this memory order a processor with vector instructions resizes many at once; other devices take no bytes.
        on_cpu = images.device.type == "cpu"
        values = images.contiguous(memory_format=torch.channels_last) if on_cpu else images.float()
        values = F.interpolate(values, shape, mode=recipe.interpolation, antialias=True)
        images = values if on_cpu else values.round().clamp(0, 255)
    return cut(images, recipe.image_size)


def resized_by_products(images: Tensor, recipe: TrainingImages) -> Tensor:
    """`resized` of floating-point images, by two matrix products, which every format of exported graphs has.

    As of bytes, rows are resized first, and values are whole ones after each product.
    """
    shape = shape_before_crop(images.shape[2], images.shape[3], recipe)
    if shape != list(images.shape[2:]):
        down, across = (
            fixed_point_weights(old, new, recipe.interpolation).to(images.device)
            for old, new in zip(images.shape[2:], shape, strict=True)
        )
        images = (images @ across.mT + 0.5).floor().clamp(0, 255)
        images = (down @ images + 0.5).floor().clamp(0, 255)
    return cut(images, recipe.image_size)


def fixed_point_weights(old: int, new: int, interpolation: str) -> Tensor:
    """The weights `[new, old]` by which a side of an image of bytes is resized, rounded as those are: to 16 bits with the sign."""
    one = torch.eye(old, dtype=torch.float64)[None, None]
    weights = F.interpolate(one, (new, old), mode=interpolation, antialias=True)[0, 0]
    digits = next(n for n in range(22) if n == 21 or int(0.5 + weights.max().item() * 2 ** (n + 1)) >= 2**15)
    found: Tensor = (weights.abs() * 2**digits + 0.5).floor() * weights.sign() / 2**digits
    return found.float()


def standardised(images: Tensor, recipe: TrainingImages) -> Tensor:
    """Images of values from 0 to 255 as the network's input, float32, the channels of a pixel side by side in memory."""
    mean, deviation = (
        torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (recipe.mean, recipe.deviation)
    )
    x = images.float().contiguous(memory_format=torch.channels_last)
    return torch.addcmul(-mean / deviation, x, 1 / (255 * deviation))


def digest_of(network: nn.Module) -> str:
    """The SHA-256 of a network's weights, their names and shapes, in hexadecimal digits."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _draws(image: np.ndarray, view: int) -> np.ndarray:
    """Five uniform numbers for a copy of an image, float32: a function of its pixels and of `view`."""
    key = hashlib.blake2b(image.tobytes() + str(view).encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.random(5, dtype=np.float32)
