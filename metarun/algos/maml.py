"""MAML: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks (Finn, Abbeel, Levine 2017).

https://arxiv.org/abs/1703.03400

    theta'_i = theta - alpha * grad_theta L_support_i(theta)    (section 2.2, repeated `inner_steps` times)
    theta   <- theta - beta * grad_theta sum_i L_query_i(theta'_i)    (equation 1; beta belongs to the optimiser)

`first_order=True` is FOMAML (section 5.2): the gradient at theta'_i is applied to theta, and no second-order graph is
built.

Differences from the paper and its official code (cbfinn/maml):
- The official inner loss is a sum over ways of per-way means, so its learning rate of 0.4 (Omniglot, 5-way) is 2.0 on
  the mean cross-entropy used here. The defaults 0.5 and, outside, 0.003 (there 0.001) are those known to work with the
  mean (learn2learn's examples).
- The outer loss is the mean over the tasks, as in the code, not their sum; Adam does not feel the difference.
- Test tasks take as many steps as training tasks; the paper's 5-way Omniglot runs train with 1 and test with 3
  (appendix A.1): `test_inner_steps=3`. Its code clips mini-ImageNet's outer gradients at 10: `train.clip_value=10`.
- Its Omniglot tasks have as many queries as shots, at test time too, where batch norm sees them together; test tasks here have
  15 a class unless told (`test.task.queries`).
- Inner steps move the scales and shifts of the norms too. The code's norms have a shift alone, which inner steps leave
  as it is; its author saw no difference (issue 43).
- The head starts near zero (truncated normal, 0.01), as the code's fully connected networks do; that of its Omniglot
  convolutions starts standard normal, that of mini-ImageNet Xavier-uniform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.inner_loop import InnerLoop, Params, call, parameters
from metarun.ops.numerics import linear_head
from metarun.ops.support import of_support


class MAML(Algorithm):
    """Learns an initialisation from which `inner_steps` of gradient descent solve a task.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate, alpha, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether second derivatives are dropped.
        recompute: Whether inner steps are computed again on the way back, which trades time for memory.
    """

    regression = True
    fixed_ways = True
    recordable = True
    inner: InnerLoop

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
        super().__init__(backbone, spec)
        self.head = linear_head(backbone.features, spec.outputs)
        self.inner = InnerLoop(inner_steps, inner_lr, test_inner_steps, first_order, recompute)
        self.inner.check(backbone.norm)

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        return self.head(self.backbone(x, n_support))

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's parameters after each of the numbers of inner steps in `steps`."""
        return self.inner.adapt(
            lambda params: self.task_loss(call(self, params, support_x), support_y), parameters(self), steps
        )

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Tensor, Tensor]:
            (adapted,) = self.adapt(support_x, support_y, [self.inner.steps])
            prediction = call(self, adapted, query_x, support_x)
            return self.task_loss(prediction, query_y), prediction.detach()

        losses, predictions = self.over_tasks(task, *episodes.tensors)
        return losses.mean(), self.scores(predictions, episodes.query_y)

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            learners = of_support(lambda: self.adapt(support_x, support_y, steps))
            return torch.stack([call(self, params, query_x, support_x) for params in learners])

        return self.over_tasks(task, *episodes.tensors[:3]).transpose(0, 1)
