"""The images themselves: what a method reaches without features."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from metarun.config.types import NormKind
from metarun.core import ActivationHook, Backbone


class Pixels(Backbone):
    """`[B, ...]` to `[B, features]`, flattened and otherwise unchanged; nothing to train, and no block that takes an `activation_hook`.

    ProtoNet on one shot of them is the nearest neighbour by Euclidean distance, MatchingNet by cosine. `norm`, which methods
    choose, normalises layers, and there are none.

    Args:
        norm: Nothing: there are no layers to normalise, whatever a method sets here.
    """

    identity = True

    def __init__(self, input_shape: tuple[int, ...], *, norm: NormKind = "none") -> None:
        super().__init__()
        self.features, self.widths, self.norm = math.prod(input_shape), [], "none"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return []

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        return x.flatten(1)
