"""A linear head on features that stay as they are, trained on all of them at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.ops.numerics import full_precision
from metarun.ops.optimizers import uncompiled


class Scaling(nn.Module):
    """Shifts and scales features by the mean and deviation of each of them in `known` `[n, D]`; constant ones become 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        deviation = known.std(0, unbiased=False)
        self.register_buffer("mean", known.mean(0))
        self.register_buffer("scale", torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0))

    def forward(self, x: Tensor) -> Tensor:
        """Scales features `[n, D]`."""
        return (x - self.mean) * self.scale


def trained_head(
    known: Tensor,
    labels: Tensor,
    classes: int,
    *,
    steps: int = 200,
    learning_rate: float = 0.01,
    weight_decay: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Trains a linear probe: a head that starts at zero, by AdamW on the mean cross-entropy of full batches.

    Args:
        known: Features `[n, D]`, scaled.
        labels: Their classes, `[n]`.
        classes: How many classes there are.
        steps: The steps of training.
        learning_rate: The learning rate of Adam.
        weight_decay: The weight decay, decoupled from the gradient.

    Returns:
        The weight `[classes, D]` and the bias `[classes]`.
    """
    weight = torch.zeros(classes, known.shape[1], device=known.device, requires_grad=True)
    bias = torch.zeros(classes, device=known.device, requires_grad=True)
    optimizer = uncompiled(torch.optim.AdamW)([weight, bias], lr=learning_rate, weight_decay=weight_decay)
    with full_precision(known):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(known, weight, bias), labels).backward()
            optimizer.step()
    return weight.detach(), bias.detach()
