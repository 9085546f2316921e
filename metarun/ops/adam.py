"""Adam on one tensor by gradients that are written out, in place."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)  # the decay of the two moments
EPSILON = 1e-8


class Adam:
    """Moves a tensor by its gradients, with the constants of the paper, as `torch.optim.Adam` does, and without what surrounds it there.

    Args:
        values: What is moved, of any shape, without a graph.
        learning_rate: The learning rate.

    Source:
        Kingma and Ba (2015), algorithm 1.
    """

    def __init__(self, values: Tensor, learning_rate: float) -> None:
        self.values, self.learning_rate, self.steps = values, learning_rate, 0
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, gradient: Tensor) -> None:
        """Takes one step; nothing of `gradient` is kept, and its memory is used."""
        self.steps += 1
        beta, decay = BETAS
        self.first.lerp_(gradient, 1 - beta)
        self.second.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
        root = torch.sqrt(self.second, out=gradient).div_((1 - decay**self.steps) ** 0.5).add_(EPSILON)
        self.values.addcdiv_(self.first, root, value=-self.learning_rate / (1 - beta**self.steps))
