"""Online learning: one example after the other, one gradient step each, differentiable with respect to everything."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.ops.numerics import one_hot


def online_head(
    weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, queries: Tensor, learning_rate: float | Tensor
) -> Tensor:
    """Computes the logits of a linear head that has taken one step of gradient descent on each example, in their order.

    W_k = W_(k-1) - lr (p_k - y_k) z_k^T and b_k = b_(k-1) - lr (p_k - y_k), with p_k the softmax of W_(k-1) z_k + b_(k-1). The
    head is never built: all weights are W_0 and a sum of errors times features, so logits need products of features alone.
    The derivative with respect to all arguments is that of the steps themselves, of second order.

    Args:
        weight: W_0, `[C, D]`.
        bias: b_0, `[C]`.
        features: The examples z_k in their order, `[L, D]`.
        labels: Their classes, int64 `[L]` in `[0, C)`.
        queries: What is classified after the last step, `[Q, D]`.
        learning_rate: The learning rate, for the cross-entropy of a single example.

    Returns:
        The logits of the queries, `[Q, C]`.
    """
    products = features @ features.mT + 1  # the 1 is the bias, whose feature is constant
    before = F.linear(features, weight, bias)
    targets = one_hot(labels, len(weight), before.dtype)
    errors: list[Tensor] = []
    for k in range(len(features)):
        logits = before[k]
        if errors:
            logits = logits - learning_rate * (products[k, :k] @ torch.stack(errors))
        errors.append(logits.softmax(-1) - targets[k])
    found = F.linear(queries, weight, bias)
    if errors:
        found = found - learning_rate * ((queries @ features.mT + 1) @ torch.stack(errors))
    return found


def kaiming(draws: Tensor) -> Tensor:
    """Scales standard normal numbers `[..., D]` to rows of a head, of variance 2 / D (He et al. 2015, equation 10)."""
    return draws * math.sqrt(2 / draws.shape[-1])


def with_new_rows(weight: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Puts new rows for some classes into a head.

    Args:
        weight: The head, `[C, D]`.
        labels: The classes, int64 `[L]`; a class may stand several times.
        rows: New rows, `[L, D]`; a class takes that of its first place.

    Returns:
        The head with the new rows, `[C, D]`; it is differentiable with respect to the others.
    """
    first = (labels[:, None] == labels).to(rows.dtype).argmax(1)
    return torch.index_put(weight, (labels,), rows[first])
