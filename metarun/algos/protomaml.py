"""Proto-MAML: Meta-Dataset, a Dataset of Datasets for Learning to Learn from Few Examples (Triantafillou et al. 2020).

https://arxiv.org/abs/1903.03096

    w_k = 2 c_k,  b_k = -||c_k||^2,  c_k the mean of f_theta(x) over the support images of class k

MAML whose head is made anew for each task. With these weights the linear layer is ProtoNet's -||f - c_k||^2, but for
the ||f||^2 that all classes share. From there inner steps move body and head, and the outer gradient reaches theta
through the prototypes too. No head is learned, so a task may have any number of ways. Without inner steps it is
ProtoNet.

As in the official code (google-research/meta-dataset), the prototypes are those of the body before the first step, and
to the inner loop the head is a parameter like others: its gradient of the body does not go through the prototypes. The
defaults are that code's `maml_init_with_proto_config.gin`: five steps of 0.01, first order. (What it found best for
Meta-Dataset, 0.005 with 6 steps and 0.02 with 1, 6 at test time, was for a pretrained ResNet.) Differences:
- There inner steps leave the scales and shifts of the norm alone (`adapt_batch_norm`); here they move them, as in MAML.
- There queries are normalised with the support set's statistics (its `transductive_batch_norm` is off), which is
  `norm=support` here; the default, `batch`, is MAML's.
- One task a step there, at an outer rate of 1e-4 and with weight decay; here as many as `train.tasks_per_step`, at
  0.001 and without.
- Its later code can scale the prototypes (`prototype_multiplier`); here they are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.inner_loop import InnerLoop, Params, call, parameters
from metarun.ops.numerics import full_precision, precise
from metarun.ops.prototypes import class_means
from metarun.ops.support import of_support


class ProtoMAML(Algorithm):
    """Learns a body from which prototypes and gradient descent solve a task. Train and test ways may differ.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether inner gradients are constants; the prototypes are not.
        recompute: Whether inner steps are computed again on the way back, which trades time for memory.
    """

    recordable = True
    inner: InnerLoop

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 5,
        inner_lr: NonNegativeFloat = 0.01,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__(backbone, spec)
        self.inner = InnerLoop(inner_steps, inner_lr, test_inner_steps, first_order, recompute)
        self.inner.check(backbone.norm)

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        return precise(self.backbone(x, n_support))

    def start(self, support_x: Tensor, support_y: Tensor, ways: int) -> Params:
        """One task's parameters before the first inner step: the body's, and `weight` and `bias` of the head."""
        body = parameters(self)
        features = call(self, body, support_x)
        with full_precision(features):
            prototypes = class_means(features, support_y, ways)
        # Views, so that an inner gradient of the body is not that of the prototypes as well.
        views = {name: value.view_as(value) for name, value in body.items()}
        return views | {"weight": 2 * prototypes, "bias": -prototypes.square().sum(1)}

    def logits_of(self, params: Params, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        """One task's logits `[B, N]` for the images `x`, by the body and head in `params`."""
        body = {name: value for name, value in params.items() if name.startswith("backbone.")}
        features = call(self, body, x, support_x)
        with full_precision(features):  # large products that nearly cancel
            return F.linear(features, params["weight"], params["bias"])

    def adapt(self, support_x: Tensor, support_y: Tensor, ways: int, steps: Sequence[int]) -> list[Params]:
        """One task's parameters after each of the numbers of inner steps in `steps`."""
        return self.inner.adapt(
            lambda params: self.task_loss(self.logits_of(params, support_x), support_y),
            self.start(support_x, support_y, ways),
            steps,
        )

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Tensor, Tensor]:
            (adapted,) = self.adapt(support_x, support_y, episodes.ways, [self.inner.steps])
            prediction = self.logits_of(adapted, query_x, support_x)
            return self.task_loss(prediction, query_y), prediction.detach()

        losses, predictions = self.over_tasks(task, *episodes.tensors)
        return losses.mean(), self.scores(predictions, episodes.query_y)

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            learners = of_support(lambda: self.adapt(support_x, support_y, episodes.ways, steps))
            return torch.stack([self.logits_of(params, query_x, support_x) for params in learners])

        return self.over_tasks(task, *episodes.tensors[:3]).transpose(0, 1)
