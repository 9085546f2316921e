"""CAVIA: Fast Context Adaptation via Meta-Learning (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019).

https://arxiv.org/abs/1810.03642

    phi_i  = phi_0 - alpha * grad_phi L_support_i(phi_0, theta),  phi_0 = 0, repeated `inner_steps` times    (section 3)
    theta <- theta - beta * grad_theta mean_i L_query_i(phi_i, theta)    (beta belongs to the optimiser)

The context phi is an input of the network that all examples of a task share, and the only thing that adapts. Learned
matrices take it to the activations h of one or more blocks, before the nonlinearity: for images FiLM scales and shifts
channels, (1 + A phi) h + B phi; for vectors A phi is added, which (with `norm=none`) is what a layer computes whose
input has phi beside it. With phi = 0 the network is the plain one.

The official code (lmzintgraf/cavia) differs in this:
- FiLM's scale there is a + A phi, its shift b + B phi, with random a and b of about 0.06. Here the norm's own scale and
  shift serve for these. A and B are of about 0.1 there and start from N(0, 1) here: about as large beside the scale.
- It pools before FiLM, not after; the same where the scale is positive.
- Its weights start Kaiming-uniform, and the head not near zero. Its outer rate falls by a tenth every 5,000 steps. On
  sinusoids it clips each task's gradient to 10, and not, as for images and here, their mean.
- Its `--first_order` has no effect on classification.
- The context as an input of the head too (its fifth `--context_in`) is left out: that is a bias of each class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from metarun.core import Backbone, Spec
from metarun.errors import UserError
from metarun.ops.inner_loop import Params, call


class CAVIA(MAML):
    """MAML with an inner loop for `context_size` inputs of the blocks with the numbers `blocks`.

    Args:
        inner_steps: The gradient steps of the context on a task's support set.
        inner_lr: The inner learning rate of the context, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether second derivatives are dropped.
        context_size: The numbers of the context; the official code has 5 for sinusoids, with one inner step.
        blocks: The blocks that the context modulates; null is the paper's, the third for images, the first for
            vectors.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 2,
        inner_lr: NonNegativeFloat = 1.0,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = False,
        context_size: PositiveInt = 100,
        blocks: list[NonNegativeInt] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            spec,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            test_inner_steps=test_inner_steps,
            first_order=first_order,
        )
        last = len(backbone.widths) - 1
        if last < 0:
            raise UserError(
                "algo: CAVIA changes what the blocks of a backbone give, and this one has none; try backbone=mlp"
            )
        self.scales = any(isinstance(module, nn.Conv2d) for module in backbone.modules())
        if blocks is None:
            blocks = [min(2, last) if self.scales else 0]
        if not blocks or max(blocks) > last:
            raise UserError(
                f"algo.blocks={list(blocks)}: needs at least one, and the backbone has the blocks 0 to {last}"
            )
        self.context = nn.Parameter(torch.zeros(context_size), requires_grad=False)  # phi_0, which does not learn
        self.films = nn.ModuleDict()
        for number in blocks:
            width = backbone.widths[number]
            film = nn.Linear(context_size, 2 * width if self.scales else width, bias=False)
            self.films[str(number)] = film
            if self.scales:
                nn.init.normal_(film.weight)

    def change(self, number: int, activations: Tensor) -> Tensor:
        """The activations of block `number`, changed by the context if it is one of those that take it."""
        if str(number) not in self.films:
            return activations
        change = self.films[str(number)](self.context)
        if not self.scales:
            return activations + change.view(-1, *[1] * (activations.ndim - 2))
        scale, shift = change.view(2, -1, *[1] * (activations.ndim - 2))
        return activations * (1 + scale) + shift

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        return self.head(self.backbone(x, n_support, self.change))

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's `context` after each of the numbers of inner steps in `steps`."""
        return self.inner.adapt(
            lambda params: self.task_loss(call(self, params, support_x), support_y),
            {"context": torch.zeros_like(self.context, requires_grad=True)},
            steps,
        )
