"""The feature maps of backbones that end in a vector, for methods that compare images place by place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.core import Backbone
from metarun.errors import UserError
from metarun.ops.batch_norm import both_sets
from metarun.ops.modes import evaluating


def feature_maps(backbone: Backbone, images: Tensor, n_support: int | None = None, *, unpooled: int = 0) -> Tensor:
    """What the last block gives, `[B, C, H, W]`, with the 2x2 max-pools of the last `unpooled` blocks left out.

    For backbones that flatten their map at the end. Vectors of one that has no maps (mlp) count as maps of one place.
    Raises `UserError` where the places are averaged, and where there are no such pools to leave out.
    """
    last = len(backbone.widths) - 1
    size = (0, 0)  # of the last block's map before its pool

    def activation_hook(number: int, activations: Tensor) -> Tensor:
        nonlocal size
        if activations.ndim == 4:
            if number > last - unpooled:
                # Four copies of each value, of which the pool takes the largest: the same map again.
                activations = F.interpolate(activations, scale_factor=2)
            size = (activations.shape[2], activations.shape[3])
        return activations

    features = backbone(images, n_support, activation_hook)
    if size == (0, 0):
        return features[:, :, None, None]
    if unpooled > last + 1:
        raise UserError(f"algo.unpooled={unpooled}: must be from 0 to the backbone's {last + 1} blocks")
    if getattr(backbone, "readout", "flatten") != "flatten":
        raise UserError("backbone.readout=mean: leaves no map to compare place by place; use backbone.readout=flatten")
    places = features.shape[1] // backbone.widths[-1]
    if places == math.prod(size):  # the last block did not pool
        if unpooled:
            raise UserError(
                f"algo.unpooled={unpooled}: backbone.downsample=stride has no pools to leave out; use algo.unpooled=0, "
                "or backbone.downsample=pool"
            )
        return features.unflatten(1, (-1, *size))
    return features.unflatten(1, (-1, size[0] // 2, size[1] // 2))


def maps_of_sets(backbone: Backbone, support_x: Tensor, query_x: Tensor, *, unpooled: int = 0) -> tuple[Tensor, Tensor]:
    """`feature_maps` of one task's two sets, `[N*K, C, H, W]` and `[N*Q, C, H, W]`, which are one batch for the norm."""
    return both_sets(
        lambda images, n_support: feature_maps(backbone, images, n_support, unpooled=unpooled), support_x, query_x
    )


def map_size(backbone: Backbone, input_shape: tuple[int, ...], *, unpooled: int) -> tuple[int, int, int]:
    """C, H and W of `feature_maps`, found by trying; raises its `UserError`s."""
    blank = next(backbone.parameters(), torch.zeros(())).new_zeros(2, *input_shape)
    if backbone.reads_texts:  # numbers of word pieces
        blank = blank.long()
    with evaluating(backbone), torch.no_grad():  # no running averages of this, no dropout
        channels, height, width = feature_maps(backbone, blank, unpooled=unpooled).shape[1:]
    return channels, height, width
