"""The backbone of an earlier run of metarun as an encoder of images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from metarun.backbones.weights import load_backbone
from metarun.config import construct
from metarun.config.values import without
from metarun.core import Backbone
from metarun.data.image_batches import to_shape
from metarun.data.image_source import standardiser
from metarun.data.table_source import TableSource
from metarun.encoders.base import Encoder
from metarun.encoders.images import changed_images, digest_of
from metarun.engine import checkpoint, origins
from metarun.errors import UserError, lacks
from metarun.files import typed_path
from metarun.ops import batch_norm
from metarun.runs import contents, result
from metarun.text import shape_text, shown_path
from metarun.trust import check_classes

# Settings of a backbone that say where its weights came from, of which the digest says which they are.
OF_WEIGHTS = ("from", "weights", "checksum", "weights_prefix")

log = logging.getLogger("metarun")


class Trained(Encoder):
    """A run's backbone with the weights that were best on validation, on images as that run saw them.

    Images get its size, its channels and its normalisation.

    Args:
        origin: The run's folder, or a checkpoint in it; `encoder.from` of a config.
        stored: What the run says of its backbone and its images, for a classifier's file, which needs no run folder.
    """

    item = "image"

    def __init__(self, origin: str | None = None, *, stored: dict[str, Any] | None = None) -> None:
        if origin is None and stored is None:
            raise UserError("encoder.from: must be given (encoder.from=outputs/RUN)")
        self._origin = origin
        self.stored = stored or _of_run(str(origin))
        self.input_shape = tuple(self.stored["input_shape"])
        # A run with a target of colours and a source of greys normalises colours, and turns them into greys then.
        self.read_shape = tuple(self.stored.get("read_shape", self.input_shape))
        node = OmegaConf.create(self.stored["backbone"])
        check_classes(OmegaConf.create({"backbone": node}), Path(origin or contents.CLASSIFIER), OmegaConf.create({}))
        self.backbone: Backbone = construct(node, "encoder", input_shape=self.input_shape)
        if batch_norm.needs_reference(self.backbone.norm):
            raise UserError(
                f"encoder.from={shown_path(origin or '')}: its backbone normalises by the images at hand (norm={self.backbone.norm}), so "
                "that an image has no vector of its own; train it with backbone.norm=running"
            )
        self.pretrained = self.backbone.pretrained
        if origin is not None:
            load_backbone(self.backbone, origin, "encoder.from")
            self.origin = origins.of_run("encoder.from", origin)
            self.seen = self.origin.seen
        self.backbone.eval().requires_grad_(False)
        self.features, self.device = self.backbone.features, torch.device("cpu")
        self.digest = digest_of(self.backbone)

    def __str__(self) -> str:
        of_run = f" of {shown_path(self._origin)}" if self._origin else ""
        images: dict[str, Any] = {"shape": shape_text(self.read_shape)}
        images |= {name: [round(value, 6) for value in self.stored[name]] for name in ("mean", "deviation")}
        told = ", ".join(f"{name} {value}" for name, value in images.items())
        return f"{type(self.backbone).__name__}{of_run}, {self.features} features; images: {told}"

    def check(self, source: TableSource) -> None:
        super().check(source)
        channels, own = source.input_shape[0], self.read_shape[0]
        if channels not in (1, own) and own != 1:
            raise UserError(f"encoder.from: its run had images of {own} channels, but the data have {channels}")

    def identity(self) -> dict[str, Any]:
        names = ("input_shape", "mean", "deviation")
        images = {name: list(self.stored[name]) for name in names}
        if self.read_shape != self.input_shape:
            images["read_shape"] = list(self.read_shape)
        # Settings may leave no trace in the weights: heads, what is read out, the size that images are brought to.
        settings = without(OmegaConf.create(self.stored["backbone"]), ("_target_", *OF_WEIGHTS))
        return {
            "name": self.stored["backbone"]["_target_"],
            "backbone": OmegaConf.to_container(settings),
            "weights": self.digest,
            "features": self.features,
            "images": images,
        }

    def to(self, device: torch.device) -> None:
        self.device = device
        self.backbone.to(device)

    def encode(self, items: Any) -> Tensor:
        return self.of_pixels(torch.as_tensor(items).to(self.device).float())

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """The vectors of floating-point pixels `[n, C, H, W]` from 0 to 255."""
        mean, deviation = (np.array(self.stored[name]) for name in ("mean", "deviation"))
        images = standardiser(mean, deviation, pixels.device)(to_shape(pixels, self.read_shape))
        found: Tensor = self.backbone(to_shape(images, self.input_shape))
        return found.float()

    def changed(self, items: Any, view: int) -> Tensor:
        return changed_images(items, view)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.backbone.state_dict().items()}

    def blueprint(self) -> dict[str, Any]:
        return {**self.settings, "origin": None, "stored": self.stored}

    def restore(self, learned: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.backbone.load_state_dict(dict(tensors))
        self.digest = digest_of(self.backbone)


def _of_run(origin: str) -> dict[str, Any]:
    """What a run says of its backbone and of the images that it saw.

    Raises:
        UserError: There is no finished run, or one that has no backbone for images.
    """
    key = f"encoder.from={shown_path(origin)}"
    checkpoint.weights_file("encoder.from", origin)  # which may lie in the folder of a stage that runs share
    folder = typed_path(origin)
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / contents.RESULT).is_file():
        if not (folder / contents.CONFIG).is_file():
            raise UserError(f"{key}: lies in no run's folder, which says how images are read; give the folder of a run")
        raise UserError(f"{key}: the run has not finished; the command that began it goes on")
    found = result.stored(folder)
    if found.get(result.LEARNER) is None:
        raise UserError(
            f"{key}: the run does not say how its images are read; it is of vectors, texts or an older version"
        )
    learner = result.learner(folder, found)
    told = learner["preprocessing"]
    if "item" in told:
        raise UserError(f"{key}: the run learned from {told['item']}s, and has no backbone for images")
    if told.get("encoder"):
        raise UserError(
            f"{key}: the run learned from the vectors of an encoder, and has no backbone for images; use its encoder"
        )
    try:
        result.check_reading(told, dimensions=3)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{shown_path(folder / contents.RESULT)}: is damaged ({lacks(error)}); {result.DAMAGED}"
        ) from error
    return {
        "backbone": learner["blueprint"]["backbone"],
        "input_shape": told["input_shape"],
        "mean": told["mean"],
        "deviation": told["deviation"],
        "read_shape": [told["channels"], told["image_size"], told["image_size"]],
    }
