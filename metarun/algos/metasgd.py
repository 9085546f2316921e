"""Meta-SGD: Learning to Learn Quickly for Few-Shot Learning (Li, Zhou, Chen, Li 2017).

https://arxiv.org/abs/1707.09835

    theta' = theta - alpha * grad_theta L_support(theta),  alpha of the shape of theta, the product by elements
    theta, alpha <- theta, alpha - beta * grad_(theta, alpha) L_query(theta')    (algorithm 1)

MAML with a learned rate for every single weight, of either sign: the direction of the inner step is learned too. With rates
that are all equal and stay so it is MAML. The outer optimiser trains rates and weights alike.

No official code is known to us (foolyc/Meta-SGD is another's, with one rate for all). Differences from the paper:
- Rates start at `inner_lr`, all alike, so training begins as MAML's, whose 0.5 and outer rate are the defaults. The
  paper draws them from [0.005, 0.1], which public re-implementations read as one value for all (63days/Meta-SGD, say)
  or one for each. Starts from 0.001 to 0.05 ended alike on sinusoids.
- The outer loss is the mean over the tasks, not their sum; Adam does not feel the difference.
- The paper takes one inner step. With more, all steps share the rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Backbone, Spec
from metarun.ops.inner_loop import Params, call, parameters


class MetaSGD(MAML):
    """Learns an initialisation and the rate of each of its weights; `inner_lr` is where all rates start.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: Where the learned rate of every weight starts.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether inner gradients are constants; the rates still learn.
        recompute: Whether inner steps are computed again on the way back, which trades time for memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 1,
        inner_lr: NonNegativeFloat = 0.5,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            spec,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            test_inner_steps=test_inner_steps,
            first_order=first_order,
            recompute=recompute,
        )
        self.rates = nn.ParameterDict(
            {name.replace(".", "_"): torch.full_like(value, inner_lr) for name, value in parameters(self).items()}
        )

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's weights after each of the numbers of inner steps in `steps`."""
        weights = {name: value for name, value in parameters(self).items() if not name.startswith("rates.")}
        return self.inner.adapt(
            lambda params: self.task_loss(call(self, params, support_x), support_y),
            weights,
            steps,
            lr={name: self.rates[name.replace(".", "_")] for name in weights},
        )
