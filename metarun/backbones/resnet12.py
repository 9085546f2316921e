"""The twelve-layer residual network of the few-shot literature, with DropBlock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.shapes import image_shape
from metarun.config.types import DropRate, Len, NonNegativeInt, NormKind, PositiveInt
from metarun.core import ActivationHook, Backbone
from metarun.ops.batch_norm import Norm
from metarun.ops.draws import current, dropout, rand

SLOPE = 0.1  # of the leaky ReLU below zero
WIDTHS = [64, 160, 320, 640]


def drop_block(x: Tensor, rate: float, size: int) -> Tensor:
    """DropBlock (Ghiasi et al. 2018): zeroes squares of `size` x `size` positions, drawn for each channel of `[B, C, H, W]`.

    A square lies wholly inside the map (so `size` is cut to the map's), and one starts at each place where it fits with the
    probability at which about a share `rate` of all positions is dropped (a little less, since squares may overlap). What is
    left is scaled up by the share kept over the whole batch, as in MetaOptNet's code. The draws belong to their tasks
    (`metarun.ops.draws`).
    """
    batch, channels, height, width = x.shape
    size = min(size, height, width)
    places = (height - size + 1, width - size + 1)
    chance = rate / size**2 * (height * width) / (places[0] * places[1])
    starts = (rand(batch, channels, *places, device=x.device) < chance).float()
    kept = 1 - F.max_pool2d(F.pad(starts, (size - 1,) * 4), size, stride=1)
    scale = kept.numel() / kept.sum().clamp(min=1)
    return x * (kept * scale).to(x.dtype)


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with normalisation, a 1x1 convolution as shortcut, leaky ReLU, 2x2 max-pool, dropout.

    Each convolution but a block's last is followed by a leaky ReLU; the last one's follows the sum with the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, *, norm: str) -> None:
        super().__init__()
        bias = norm == "none"  # normalisation has a shift of its own

        def conv(inputs: int, size: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)

        self.convs = nn.ModuleList([conv(inputs, 3), conv(outputs, 3), conv(outputs, 3)])
        self.norms = nn.ModuleList(Norm(outputs, norm) for _ in range(3))
        self.shortcut = conv(inputs, 1)
        self.shortcut_norm = Norm(outputs, norm)

    def forward(self, x: Tensor, n_support: int | None, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        shortcut = self.shortcut_norm(self.shortcut(x), n_support)
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), n_support)
            if place < 2:
                x = F.leaky_relu(x, SLOPE)
        # Leaky ReLU is monotone: the order of the two does not matter, and this one is cheaper.
        x = x + shortcut
        return F.leaky_relu(F.max_pool2d(x if change is None else change(x), 2), SLOPE)


class ResNet12(Backbone):
    """Four residual blocks of `widths` channels; `[B, C, H, W]` (16x16 or more) to `[B, features]`.

    The network of TADAM (Oreshkin et al. 2018) with the widths of MetaOptNet (Lee et al. 2019), 12.4 million parameters; [64, 128,
    256, 512] is the narrower one. `readout="mean"` averages over positions, `features = widths[-1]`; "flatten" keeps them all,
    as MetaOptNet does: 640 x 5 x 5 = 16,000 for 84x84. Convolutions start Kaiming-normal (by fan-out).

    In training mode each block ends with dropping: ordinary dropout of `drop_rate` in the first two blocks, and DropBlock with squares
    of `block_size` in the last two. DropBlock's rate rises linearly from 0 to `drop_rate` over `drop_ramp` training steps (0: at
    once; outside of the training loop a pass in training mode is a step). MetaOptNet's 40,000 passes are two (support, query) in
    each of 20 epochs of 1,000 steps. The count is part of `state_dict`, and the random numbers belong to their tasks. In evaluation
    mode nothing is dropped, or counted.

    Raises `UserError` for vectors, images that are too small, and values out of range.

    Args:
        widths: The channels of the four blocks; [64, 128, 256, 512] is the narrower network.
        readout: What becomes of the last map: all its numbers, or the mean over positions.
        norm: The normalisation: batch (transductive at test), support, running, group or none.
        drop_rate: The share that is dropped at the end of each block while training; 0 drops nothing.
        block_size: The side of DropBlock's squares in the last two blocks.
        drop_ramp: The training steps over which DropBlock's rate rises to drop_rate; 0 is at once.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        widths: Annotated[list[PositiveInt], Len(4, 4)] = WIDTHS,
        readout: Literal["flatten", "mean"] = "mean",
        norm: NormKind = "batch",
        drop_rate: DropRate = 0.1,
        block_size: PositiveInt = 5,
        drop_ramp: NonNegativeInt = 20_000,
    ) -> None:
        super().__init__()
        self.readout = readout
        channels, height, width = image_shape("resnet12", input_shape, smallest=16)
        self.norm = norm
        self.drop_rate = drop_rate
        self.draws = drop_rate > 0
        self.block_size = block_size
        self.drop_ramp = drop_ramp
        self.passes = 0
        self._counted: int | None = None  # the step that was counted last
        inputs = [channels, *widths[:-1]]
        self.blocks = nn.ModuleList(ResidualBlock(a, b, norm=norm) for a, b in zip(inputs, widths, strict=True))
        self.widths = list(widths)
        self.features = widths[-1] * ((height // 16) * (width // 16) if self.readout == "flatten" else 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def couples_rows(self) -> bool:
        """As that of every backbone; DropBlock scales by the share kept of the whole batch, too."""
        return super().couples_rows or self.drop_rate > 0

    def get_extra_state(self) -> Tensor:
        """The number of passes, for `state_dict`. It is no buffer, since `torch.func.grad` forbids to change one in place."""
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Tensor) -> None:
        self.passes = int(state)

    def _count(self) -> None:
        """Counts a training step once, however many tasks, chunks and processes it has; without one, each pass."""
        share = current()
        step = share.step if share else None
        if step is None or step != self._counted:
            self.passes += 1
        self._counted = step

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        """Features `[B, features]`; `n_support` leading rows give the statistics of `norm="support"`."""
        dropping = self.training and self.drop_rate > 0
        if dropping:
            self._count()
        rate = self.drop_rate * (min(1.0, self.passes / self.drop_ramp) if self.drop_ramp else 1.0)
        x = self.to_memory_order(x)
        for place, block in enumerate(self.blocks):
            x = block(x, n_support, activation_hook and partial(activation_hook, place))
            if dropping:
                x = dropout(x, self.drop_rate) if place < 2 else drop_block(x, rate, self.block_size)
        return x.flatten(1) if self.readout == "flatten" else x.mean((2, 3))
