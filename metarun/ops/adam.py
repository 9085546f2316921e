"""Adam: on one tensor by gradients that are written out, in place; and on parameters by losses, where `vmap` takes each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarun.ops.inner_loop import Params, gradient

BETAS = (0.9, 0.999)  # the decay of the two moments
EPSILON = 1e-8


class Adam:
    """Moves a tensor by its gradients as `torch.optim.Adam` does, with the paper's constants and without groups, hooks and state.

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


def descended(
    losses: Sequence[Callable[[Params], Tensor]], params: Params, *, steps: int, learning_rate: float
) -> Params:
    """Descends several losses by turns, with the moments of all their gradients.

    Args:
        losses: Functions from parameters to a scalar; each is descended once in every step, in this order.
        params: The parameters at the start, by name. No graph leads back to them.
        steps: The number of steps, at least 0.
        learning_rate: The learning rate.

    Returns:
        The parameters at the end, by name.

    Source:
        Kingma and Ba (2015), algorithm 1, with its constants.
    """
    beta, decay = BETAS
    first = {name: torch.zeros_like(value) for name, value in params.items()}
    second = dict(first)
    count = 0
    for _ in range(steps):
        for loss in losses:
            slopes, count = gradient(loss, params, create_graph=False), count + 1
            first = {name: beta * first[name] + (1 - beta) * slope for name, slope in slopes.items()}
            second = {name: decay * second[name] + (1 - decay) * slope.square() for name, slope in slopes.items()}
            rate, scale = learning_rate / (1 - beta**count), 1 - decay**count
            params = {
                name: value - rate * first[name] / ((second[name] / scale).sqrt() + EPSILON)
                for name, value in params.items()
            }
    return params
