"""Small tensor functions that methods share: precision, one-hot labels, the start of a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Writes labels as probabilities.

    `F.one_hot` would look at the values, for which the CPU must wait for a GPU, and which a traced step cannot do.

    Args:
        labels: Classes in `[0, classes)`, integers `[...]`; or probabilities `[..., classes]`, which stay as they are.
        classes: The number of classes.
        dtype: The type of the result.

    Returns:
        Probabilities `[..., classes]`.
    """
    if labels.is_floating_point():
        return labels.to(dtype)
    return (labels[..., None] == torch.arange(classes, device=labels.device)).to(dtype)


def full_precision(x: Tensor) -> torch.autocast:
    """Opens a context in which autocast is off: for distances, inner products and linear systems.

    Args:
        x: A tensor on the device that is meant.
    """
    return torch.autocast(x.device.type, enabled=False)


def precise(x: Tensor) -> Tensor:
    """Brings `x` to single precision at least: losses, distances and sums of squares lose too much in half precision.

    Args:
        x: A floating tensor; float32 and float64 are returned as they are.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def squared_lengths(x: Tensor) -> Tensor:
    """Computes the squared Euclidean lengths `[..., 1]` of vectors `[..., D]`.

    Without a graph they are read once, and no squares written; the root on the way has no derivatives at 0.
    """
    if torch.is_grad_enabled():
        return x.square().sum(-1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return lengths.square()


def linear_head(features: int, outputs: int, std: float = 0.01) -> nn.Linear:
    """Builds a linear layer with truncated-normal weights and zero biases, as MAML's code has it for regression.

    Args:
        features: Its inputs.
        outputs: Its outputs.
        std: The standard deviation of the weights, which are cut off at twice as much.
    """
    head = nn.Linear(features, outputs)
    nn.init.trunc_normal_(head.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(head.bias)
    return head
