"""The four-block convolutional network of the few-shot literature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.shapes import image_shape
from metarun.config.types import NormKind, PositiveInt
from metarun.core import ActivationHook, Backbone
from metarun.ops.batch_norm import Norm


class ConvBlock(nn.Module):
    """3x3 convolution, normalisation, ReLU, and half the height and width, by a 2x2 max-pool or by the convolution's stride."""

    def __init__(self, inputs: int, outputs: int, *, pool: bool, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, stride=1 if pool else 2)
        self.norm = Norm(outputs, norm)
        self.pool = pool
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, n_support: int | None, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        x = self.conv(x)
        # The maximum of ReLUs is the ReLU of the maximum, on a quarter of the values.
        if self.pool and change is None:
            return F.relu(self.norm.pooled(x, n_support))
        x = self.norm(x, n_support)
        x = x if change is None else change(x)
        return F.relu(F.max_pool2d(x, 2) if self.pool else x)


class Conv4(Backbone):
    """Four blocks of `channels` 3x3 filters; `[B, C, H, W]` to `[B, features]`.

    `downsample="pool"` with `readout="flatten"` is the network of Matching and Prototypical Networks (Vinyals et al. 2016,
    Snell et al. 2017): max-pools that floor odd sizes, 64 features for 28x28, 1,600 for 84x84. `downsample="stride"` with
    `readout="mean"` is MAML's network for Omniglot (Finn et al. 2017): convolutions of stride 2 that round odd sizes up, and the mean
    over the positions that remain, `channels` features. MAML's mini-ImageNet network is "pool", "flatten" and 32 channels.
    Convolutions start Xavier-uniform with zero biases. Raises `UserError` for vectors, unknown choices, and images of less than 16
    pixels a side with "pool".

    Args:
        channels: The filters of each block.
        downsample: How a block halves the image: a max-pool, or the convolution's stride.
        readout: What becomes of the last map: all its numbers, or the mean over positions.
        norm: The normalisation: batch (transductive at test), support, running, group or none.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        channels: PositiveInt = 64,
        downsample: Literal["pool", "stride"] = "pool",
        readout: Literal["flatten", "mean"] = "flatten",
        norm: NormKind = "batch",
    ) -> None:
        super().__init__()
        pool = downsample == "pool"
        self.readout = readout
        inputs, height, width = image_shape(
            "conv4", input_shape, smallest=16 if pool else 1, instead="backbone.downsample=stride"
        )
        self.norm = norm
        self.blocks = nn.ModuleList(
            ConvBlock(inputs if i == 0 else channels, channels, pool=pool, norm=norm) for i in range(4)
        )
        sides = [side // 16 if pool else math.ceil(side / 16) for side in (height, width)]
        self.features = channels * (math.prod(sides) if self.readout == "flatten" else 1)
        self.widths = [channels] * 4

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        """Features `[B, features]`; `n_support` leading rows give the statistics of `norm="support"`."""
        x = self.to_memory_order(x)
        for number, block in enumerate(self.blocks):
            x = block(x, n_support, activation_hook and partial(activation_hook, number))
        return x.flatten(1) if self.readout == "flatten" else x.mean((2, 3))
