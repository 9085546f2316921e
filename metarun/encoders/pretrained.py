"""Pretrained networks of torchvision and timm, and EfficientNet-Lite, as encoders of images."""

from __future__ import annotations

from dataclasses import replace

import torch

from metarun.backbones.libraries import Wanted, build
from metarun.config.types import NameOrPath, PositiveInt, Share
from metarun.encoders.images import ImageEncoder, described
from metarun.runs.result import NOTHING


class Pretrained(ImageEncoder):
    """A library's network without its classifier, with the weights and the preprocessing that belong together.

    Images are resized, cut and normalised as the weights' own configuration says (timm's `pretrained_cfg`, torchvision's
    `transforms`); one channel is repeated. `data.normalize` plays no part: a table's pixels are encoded.

    Args:
        name: The network: metarun:efficientnet_lite0, timm:vit_small_patch16_224, torchvision:resnet50, ...
        weights: Its weights: pretrained or a name has the library fetch them, else an address or a file; null draws them.
        checksum: The SHA-256 of the file of weights; an address needs it.
        weights_prefix: What stands before the network's own names in the file, such as teacher.backbone; null finds it.
        images_of: The name of the library's weights whose images are expected, where weights are a file's or drawn; null is
            the default ones.
        image_size: The side in pixels that images are brought to; null is what the weights expect.
        crop: The part of an image's side that is kept in the middle; null is what the weights expect.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: NameOrPath | None = "pretrained",
        checksum: str | None = None,
        weights_prefix: str | None = None,
        images_of: str | None = None,
        image_size: PositiveInt | None = None,
        crop: Share | None = None,
    ) -> None:
        self._name = name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of weights that are drawn: the same at every start, as the table is
            built = build(Wanted("encoder", name, weights, checksum, image_size, weights_prefix, images_of))
        self._images_of = built.images_of
        self.saw = NOTHING if weights is None else built.saw
        recipe = replace(built.recipe, image_size=image_size or built.recipe.image_size, crop=crop or built.recipe.crop)
        self.settle(built.network, recipe)

    @property
    def name(self) -> str:
        return self._name

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in described(self.recipe).items())
        return f"{self.name}, {self.features} features; images: {told}"

    def blueprint(self) -> dict[str, object]:
        return {
            **self.settings,
            "weights": None,
            "checksum": None,
            "weights_prefix": None,
            "images_of": self._images_of,
        }
