"""Multi-task learning: one backbone, a head for the source and one for the target (Caruana 1997).

The losses are weighted by homoscedastic uncertainty: Multi-Task Learning Using Uncertainty to Weigh Losses (Kendall, Gal,
Cipolla 2018).

https://arxiv.org/abs/1705.07115

    L = sum over tasks i of exp(-s_i) L_i + s_i,  s_i = log sigma_i^2 learned, 0 at first       (`weighting=uncertainty`)
    L = L_source + target_weight L_target                                                       (`weighting=fixed`)

For given losses the least L has sigma_i^2 = L_i: each task weighs as much as it is small, and L is then the sum of
1 + log L_i.

Differences from the paper and its code (yaringal/multi-task-learning-example):
- The code's form, exp(-s) L + s, which it has for regression: twice the paper's (equation 7). The paper's for
  classification (equations 8 to 10) is exp(-s) L + s / 2: but for a constant half of this one with s - log 2 for s, so
  at the least L the same weights of the tasks against each other.
- The two tasks are two sets of images, each with its own labels; in the paper each image has the labels of all tasks. Both sets go
  through the backbone as one batch: with `norm=running` the statistics of training are then those that are averaged for the test.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.domain_adaptation import DomainAdaptation
from metarun.config.types import NonNegativeFloat
from metarun.core import Backbone, Batch, Spec
from metarun.errors import UserError
from metarun.ops.numerics import precise


def weigh(losses: Tensor, log_variances: Tensor) -> Tensor:
    """The sum of exp(-s) L + s over the tasks, of losses L and s = log sigma^2, both `[tasks]`."""
    return (torch.exp(-log_variances) * losses + log_variances).sum()


class MultiTask(DomainAdaptation):
    """A classifier of the source and one of the target, trained together on a shared backbone; it classifies the target.

    `target_weight` belongs to `weighting=fixed`. A test task's head is a new one, as in Baseline.

    Args:
        weighting: How the two losses are weighted: by learned uncertainties, or by target_weight.
        target_weight: The weight of the target's loss, with weighting=fixed.
    """

    uses_target = "labels"

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        weighting: Literal["uncertainty", "fixed"] = "uncertainty",
        target_weight: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__(backbone, spec)
        if spec.target_outputs is None:
            raise UserError(
                "algo: MultiTask needs a target's labelled images beside the source's; add recipe=domain_adaptation target=NAME"
            )
        self.target_weight = target_weight
        self.target_head = self.new_head(spec.target_outputs)
        self.log_variances = nn.Parameter(torch.zeros(2)) if weighting == "uncertainty" else None

    def classify(self, x: Tensor) -> Tensor:
        return self.target_head(self.features_of(x))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features, batch, _, target = self.whole_step(batch)
        source_loss, shown = self.classification_loss(self.head(features), batch)
        logits, labels = precise(self.target_head(features[target])), batch.y[target]
        target_loss = F.cross_entropy(logits, labels)
        shown |= {"target_acc": (logits.detach().argmax(1) == labels).to(logits.dtype).mean()}
        shown |= {"source_loss": source_loss.detach(), "target_loss": target_loss.detach()}
        if self.log_variances is None:
            return source_loss + self.target_weight * target_loss, shown
        for name, value in zip(("source", "target"), self.log_variances.detach().exp(), strict=True):
            shown[f"{name}_variance"] = value
        return weigh(torch.stack([source_loss, target_loss]), self.log_variances), shown
