"""The fully connected network of MAML's regression experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import Len, NormKind, PositiveFloat, PositiveInt
from metarun.core import ActivationHook, Backbone
from metarun.ops.batch_norm import Norm

SINUSOID_HIDDEN = [40, 40]


class MLP(Backbone):
    """Linear layers of `hidden` widths, each followed by normalisation and ReLU; `[B, D]` or `[B, C, H, W]` to `[B, features]`.

    Images are flattened. The defaults are the network of MAML's sinusoid regression (Finn et al. 2017, section 5.1): two layers
    of 40. `init_std` is the standard deviation of truncated-normal weights (cut at two standard deviations) with zero biases, as in its
    official code; null leaves torch's initialisation. Raises `UserError` for no or non-positive widths.

    Args:
        hidden: The widths of the layers.
        norm: The normalisation: batch (transductive at test), support, running, group or none.
        init_std: The standard deviation of truncated-normal weights, with zero biases; null is torch's
            initialisation.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        hidden: Annotated[list[PositiveInt], Len(1)] = SINUSOID_HIDDEN,
        norm: NormKind = "none",
        init_std: PositiveFloat | None = 0.01,
    ) -> None:
        super().__init__()
        self.norm = norm
        widths = [math.prod(input_shape), *hidden]
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(Norm(width, norm) for width in hidden)
        self.features = widths[-1]
        self.widths = list(hidden)
        if init_std is not None:
            for layer in layers:
                nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
                nn.init.zeros_(layer.bias)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    @property
    def whole_blocks(self) -> Sequence[Sequence[nn.Module]]:
        return list(zip(self.layers, self.norms, strict=True))

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        """Features `[B, features]`; `n_support` leading rows give the statistics of `norm="support"`."""
        x = x.flatten(1)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(x), n_support)
            x = F.relu(x if activation_hook is None else activation_hook(number, x))
        return x
