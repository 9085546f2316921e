"""ANIL: Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML (Raghu et al. 2020).

https://arxiv.org/abs/1909.09157

    theta_m = (theta_1, ..., theta_l,m-1 - alpha * grad_theta_l L_support(theta_m-1))    (section 4)

"Almost no inner loop": MAML whose inner steps move the last layer alone, in training and at test time. The body learns in
the outer loop only, through the queries' features and, in second order, through the support's features, with which the
head was adapted. Inner steps never run the body: each set goes through it once a task.

No official code is known to us. Differences from the paper:
- The outer loss is the mean over the tasks, not their sum; Adam does not feel the difference.
- Inner steps and both rates are MAML's here, where the loss is a mean. (Those of the paper are in an appendix that we
  have not seen.) learn2learn's example, 5 steps of 0.1, did no better on the built-in glyphs.
- That example (examples/vision/anil_fc100.py) sends support and query images through the body as one batch, so they share
  the statistics of its norm. Here `norm=batch` takes each set by itself, as MAML does, so that the two methods differ in the
  inner loop alone.
- The paper's NIL test, the queries' cosines to the support's features with no head, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Backbone, Episodes, Spec
from metarun.ops.inner_loop import Params, parameters
from metarun.ops.support import of_support


class ANIL(MAML):
    """MAML with an inner loop for the linear head alone; the settings are MAML's.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate of the head, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether inner gradients are constants; the body then learns nothing through the support's
            features.
    """

    shared_batch = False  # each set has statistics of its own, as in MAML

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 1,
        inner_lr: NonNegativeFloat = 0.5,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            spec,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            test_inner_steps=test_inner_steps,
            first_order=first_order,
        )

    def adapt_head(self, features: Tensor, y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's `weight` and `bias` of the head after each of the numbers of inner steps in `steps`."""
        return self.inner.adapt(
            lambda head: self.task_loss(F.linear(features, **head), y),
            parameters(self.head),
            steps,
        )

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Tensor, Tensor]:
            support, query = self.backbone.embed_sets(support_x, query_x, shared_batch=self.shared_batch)
            (head,) = self.adapt_head(support, support_y, [self.inner.steps])
            prediction = F.linear(query, **head)
            return self.task_loss(prediction, query_y), prediction.detach()

        losses, predictions = self.over_tasks(task, *episodes.tensors)
        return losses.mean(), self.scores(predictions, episodes.query_y)

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            support, query = self.backbone.embed_sets(support_x, query_x, shared_batch=self.shared_batch)
            heads = of_support(lambda: self.adapt_head(support, support_y, steps))
            return torch.stack([F.linear(query, **head) for head in heads])

        return self.over_tasks(task, *episodes.tensors[:3]).transpose(0, 1)
