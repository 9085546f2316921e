"""A small vision transformer (Dosovitskiy et al. 2021) for images of the few-shot literature's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.shapes import image_shape
from metarun.config.types import NormKind, PositiveInt
from metarun.core import ActivationHook, Backbone
from metarun.errors import UserError
from metarun.ops.numerics import precise
from metarun.ops.tasks import vectorized

EPSILON = 1e-6  # added to the variance
MLP_RATIO = 4  # hidden units of a block for each of its channels


class LayerNorm(nn.LayerNorm):
    """Torch's, but for `vmap`, under which its second derivatives are off by 1e-4: plain operations there."""

    def forward(self, x: Tensor) -> Tensor:
        if not vectorized():
            return super().forward(x)
        centred = precise(x)
        centred = centred - centred.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * scale * self.weight + self.bias


class Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and beside a shortcut; tokens `[B, T, D]` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(width, eps=EPSILON)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width, eps=EPSILON)
        self.hidden = nn.Linear(width, MLP_RATIO * width)
        self.back = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        # Plain operations: torch's fused attention has no second derivative on a CPU.
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-2, 1).unbind(-2)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)  # [B, heads, T, T]
        x = x + self.out((weights @ value).movedim(1, -2).flatten(-2))
        inner = self.hidden(self.norm2(x))
        return x + self.back(F.gelu(inner if change is None else change(inner.mT).mT))


class ViT(Backbone):
    """A pre-norm vision transformer of `depth` blocks, `[B, C, H, W]` to `[B, width]`.

    An image is cut into squares of `patch_size` pixels, each a token of `width` channels, to which the place's sines and
    cosines are added; `readout="class"` returns what becomes of an extra token, "mean" the mean over the patches' tokens,
    both after a last layer norm. Positions are not learned, as in the plain ViT of Beyer et al. 2022
    (arXiv 2205.01580), so that weights serve images of any size. Weights start truncated-normal (0.02), biases at zero.

    There is no norm with statistics across images: `norm` may be any kind that lets no query see another, since many
    methods set one, and changes nothing. `activation_hook` is given the hidden units of each block, `[B, 4 width, tokens]`, before
    their nonlinearity. Raises `UserError` for vectors, sides that patches do not divide, and sizes that do not fit.

    Args:
        patch_size: The side of a patch in pixels, which must divide the image's.
        width: The channels of a token, divisible by heads and by 4.
        depth: The blocks.
        heads: The heads of each block's attention.
        readout: What is read: the class token, or the mean over the patches.
        norm: Nothing: it has layer norms alone; batch and group are refused.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        patch_size: PositiveInt = 7,
        width: PositiveInt = 128,
        depth: PositiveInt = 6,
        heads: PositiveInt = 4,
        readout: Literal["class", "mean"] = "class",
        norm: NormKind = "none",
    ) -> None:
        super().__init__()
        channels, *sides = image_shape("vit", input_shape)
        if any(side % patch_size for side in sides):
            whole = [str(size) for size in range(2, min(sides)) if not any(side % size for side in sides)]
            hint = f"; try {', '.join(whole)}" if whole else ""
            raise UserError(f"backbone.patch_size={patch_size}: does not divide images of {sides[0]}×{sides[1]}{hint}")
        if width % heads or width % 4:
            raise UserError(
                f"backbone.width={width}: must be divisible by backbone.heads={heads}, and by 4 for the positions"
            )
        if norm in ("batch", "group"):
            raise UserError(f"backbone.norm={norm}: a vision transformer has layer norms alone; use backbone.norm=none")
        self.readout = readout
        self.norm = "none"
        self.patch_size = patch_size
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer(
            "places", positions(sides[0] // patch_size, sides[1] // patch_size, width), persistent=False
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last_norm = LayerNorm(width, eps=EPSILON)
        self.features = width
        self.widths = [MLP_RATIO * width] * depth
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_token, std=0.02)

    places: Tensor

    @property
    def token_blocks(self) -> Sequence[nn.Module]:
        """The blocks, tokens `[B, tokens, width]` to the same, where tokens may be added and taken off again."""
        return list(self.blocks)

    @property
    def whole_blocks(self) -> Sequence[Sequence[nn.Module]]:
        *others, last = self.blocks
        return [*([block] for block in others), [last, self.last_norm]]

    def patches(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` cut into rows of patches, `[B, H W / P^2, C P^2]`."""
        size = self.patch_size
        cut = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [B, C, H/P, P, W/P, P]
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        """Features `[B, features]`; `n_support` changes nothing, for no norm here looks at the support rows."""
        tokens = self.embed(self.patches(x)) + self.places
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, activation_hook and partial(activation_hook, number))
        tokens = self.last_norm(tokens)
        return tokens[:, 0] if self.readout == "class" else tokens[:, 1:].mean(1)


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row and the column of each place, `[rows * columns, width]`, a quarter of the channels each.

    Wavelengths grow from 2 pi to 2 pi 10,000 as a geometric series.
    """
    rates = 10_000.0 ** -(torch.arange(width // 4) / max(1, width // 4 - 1))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    return torch.cat([turn for angle in angles for turn in (angle.sin(), angle.cos())], dim=1)
