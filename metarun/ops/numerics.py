"""Small tensor functions that methods share: precision, one-hot labels, the start of a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels `[...]` as probabilities `[..., classes]`; what is in that form already stays as it is.

    (`F.one_hot` looks at the values, for which a GPU must be waited for, and which no recording can do.)
    """
    if labels.is_floating_point():
        return labels.to(dtype)
    return (labels[..., None] == torch.arange(classes, device=labels.device)).to(dtype)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast is off on the device of `x`: for distances, inner products and linear systems."""
    return torch.autocast(x.device.type, enabled=False)


def precise(x: Tensor) -> Tensor:
    """`x` in single precision at least: losses, distances and sums of squares lose too much in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def linear_head(features: int, outputs: int, std: float = 0.01) -> nn.Linear:
    """A linear layer with truncated-normal weights (two standard deviations) and zero bias, as the MAML code's for regression."""
    head = nn.Linear(features, outputs)
    nn.init.trunc_normal_(head.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(head.bias)
    return head
