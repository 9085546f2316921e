"""BOIL: Towards Representation Change for Few-shot Learning (Oh, Yoo, Kim, Yun 2021).

https://arxiv.org/abs/2008.08882

    theta_body' = theta_body - alpha_body * grad_body L_support(theta_body, theta_head)
    theta_head' = theta_head - alpha_head * grad_head L_support(theta_body, theta_head),  alpha_head = 0

Body Only update in the Inner Loop: MAML whose inner steps leave the head as it is, in training and at test time, so
that the features have to move to the head's directions. (ANIL is the other half: alpha_body = 0.) The outer loop trains
both.

`measures` is the paper's test without the head (NIL-testing, after Raghu et al. 2020): how often the nearest class mean
of the features, by cosine, is right, before and after the inner steps (`test/nil_acc_before`, `test/nil_acc_after`).

As in the official code (jhoon-oh/BOIL, NIL-testing in its analysis.ipynb): one step of 0.5 on the mean cross-entropy,
and a head that starts as torch's linear layers do. (From MAML's, near zero, hardly a gradient reaches the body, and
nothing else moves.) Differences:
- Outer steps are our MAML's for Omniglot; the official code takes 4 tasks a step and Adam at 0.001, for other data.
- The official flags have 0.5 for the head too: BOIL is `--classifier-step-size=0` there.
- Convolutions start Xavier-uniform here, as torch's do there.
- The paper's other network, a ResNet-12 without its last skip connection, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Backbone, Episodes, Spec
from metarun.ops.inner_loop import Params, call, parameters
from metarun.ops.metrics import hits
from metarun.ops.numerics import precise
from metarun.ops.prototypes import class_sums


class BOIL(MAML):
    """MAML with an inner loop for the body alone; the settings are MAML's, and `inner_lr` is the body's rate.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate of the body, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether second derivatives are dropped.
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
        self.head.reset_parameters()

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's parameters after each of the numbers of inner steps in `steps`; the head's are the same in all."""
        # A rate of zero, not a head left out: a recomputed inner loss may depend on nothing trained but its argument.
        start = parameters(self)
        rates: dict[str, Any] = {name: 0.0 if name.startswith("head.") else self.inner.lr for name in start}
        return self.inner.adapt(
            lambda params: self.task_loss(call(self, params, support_x), support_y),
            start,
            steps,
            lr=rates,
        )

    @torch.no_grad()
    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """The accuracies without the head, before and after the inner steps, `[T]` each."""
        if self.spec.kind == "regression":
            return {}

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            return torch.stack([
                hits(self.cosines(params, support_x, support_y, query_x, episodes.ways), query_y).float().mean()
                for params in self.adapt(support_x, support_y, [0, self.test_steps])
            ])  # fmt: skip

        before, after = self.over_tasks(task, *episodes.tensors).unbind(1)
        return {"nil_acc_before": before, "nil_acc_after": after}

    def cosines(self, params: Params, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int) -> Tensor:
        """Cosines between the features of one task's queries and its class means.

        Args:
            params: The weights of the body, by name.
            support_x: The support set, `[N*K, ...]`.
            support_y: Its labels, int64 `[N*K]`.
            query_x: The queries, `[N*Q, ...]`.
            ways: N.

        Returns:
            `[N*Q, N]`.
        """
        size, weight = self.backbone.features, self.head.weight
        identity = {"head.weight": torch.eye(size).to(weight), "head.bias": torch.zeros(size).to(weight)}
        support = precise(call(self, params | identity, support_x))
        queries = precise(call(self, params | identity, query_x, support_x))
        return F.normalize(queries, dim=-1) @ F.normalize(class_sums(support, support_y, ways), dim=-1).T
