"""The encoder of a run, as a part of the way from an image file to the input of what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from metarun import files
from metarun.config import construct
from metarun.data.source import DataSource
from metarun.encoders import Encoder
from metarun.encoders.encoded import encoded_members, mean_of, transformed
from metarun.errors import UserError, first_line
from metarun.runs import contents
from metarun.runs.folder import stored_config
from metarun.text import shown_path
from metarun.trust import check_classes


@dataclass(frozen=True)
class EncoderStep:
    """An encoder and what is done to its vectors.

    Attributes:
        encoder: The encoder.
        transform: `encoder.transform` of the run.
        mean: What is taken off the vectors, float32 `[D]`.
    """

    encoder: Encoder
    transform: str
    mean: Tensor

    @classmethod
    def of(cls, data: DataSource, reference: np.ndarray | None) -> EncoderStep:
        """That of a data set of encoded items, or of several that share an encoder.

        Args:
            data: The data set.
            reference: The rows that the mean is taken over; None for its training items.
        """
        first = next(iter(encoded_members(data).values()))
        return cls(first.encoder, first.encoding.transform, torch.from_numpy(mean_of(data, reference)))

    @classmethod
    def stored(cls, values: dict[str, Any], origin: Path, tensors: dict[str, Tensor] | None) -> EncoderStep:
        """The step that `describe` described.

        Args:
            values: What `describe` returned.
            origin: The file that holds it.
            tensors: The encoder's, from a classifier file; without them it is built from where its weights came from.

        Raises:
            UserError: It names a class that is not to be trusted, or the encoder cannot be had any more, or is another one now.
        """
        described = values["blueprint"] if tensors is not None else _with_origin(values, origin)
        node = OmegaConf.create(described)
        check_classes(OmegaConf.create({"encoder": node}), origin, OmegaConf.create({}))
        encoder: Encoder = construct(node, "encoder")
        encoder.settings = described if tensors is None else dict(values["settings"])
        if tensors is not None or values["learned"]:
            try:
                encoder.restore(values["learned"], tensors or {})
            except RuntimeError as error:  # torch's, where a name or a shape differs
                raise UserError(
                    f"{shown_path(origin)}: the weights of its encoder do not fit the network that is built here "
                    f"({first_line(error)}); use the versions of the libraries that made it"
                ) from error
        if encoder.identity() != values["identity"]:
            raise UserError(
                f"{shown_path(origin)}: its encoder has other weights now than the run had; bring those back, or use the classifier.pt "
                "of a run with a target, which holds them"
            )
        mean = values["mean"] or [0.0] * encoder.features
        return cls(encoder, values["transform"], torch.tensor(mean))

    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json` and for a classifier file."""
        encoder = self.encoder
        return {
            "settings": dict(encoder.settings),
            "blueprint": encoder.blueprint(),
            "learned": encoder.learned(),
            "identity": encoder.identity(),
            "transform": self.transform,
            "mean": self.mean.tolist() if self.transform == "cl2n" else None,
        }

    def vectors(self, items: Any, device: torch.device) -> Tensor:
        """Computes the network's input `[B, D]` of items, as `Encoder.prepare` takes them."""
        self.encoder.to(device)
        return self._finished(self.encoder(items).to(device))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """The same of images as tensors, in steps that can be traced.

        Raises:
            UserError: The encoder has no such steps.
        """
        encode = getattr(self.encoder, "of_pixels", None)
        if encode is None:
            raise UserError(f"its encoder {type(self.encoder).__name__} is no function of pixels")
        self.encoder.to(pixels.device)
        return self._finished(encode(pixels))

    def _finished(self, x: Tensor) -> Tensor:
        return transformed(x.float(), self.mean.to(x.device), self.transform)


def _with_origin(values: dict[str, Any], origin: Path) -> dict[str, Any]:
    """The settings of an encoder in a result, with the run whose backbone it is, if it is one and an earlier version did not name it."""
    settings = dict(values["settings"])
    if "origin" in values.get("blueprint", ()) and "origin" not in settings:
        settings["origin"] = _origin_in_config(origin.with_name(contents.CONFIG))
    return settings


def _origin_in_config(path: Path) -> str:
    """The run that an encoder is the backbone of, by the config of a run whose result, of an earlier version, does not name it."""
    known = OmegaConf.select(stored_config(path, files.MADE_AGAIN), "encoder.from") if path.is_file() else None
    if known is None:
        raise UserError(
            f"{shown_path(path.parent)}: does not say of which run its encoder is, since an earlier version of metarun made it; run its "
            "command again with resume=false"
        )
    return str(known)
