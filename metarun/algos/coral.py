"""Deep CORAL: Correlation Alignment for Deep Domain Adaptation (Sun and Saenko 2016).

https://arxiv.org/abs/1607.01719

    l_CORAL = |C_S - C_T|_F^2 / (4 d^2)                                  (equation 1)
    C = (D^T D - (1^T D)^T (1^T D) / n) / (n - 1)                        (equations 2 and 3)
    l = l_class + sum over layers of lambda l_CORAL                      (equation 6)

C_S and C_T are the covariances of a layer's d activations, over the source's and over the target's images of a batch. The paper
aligns the last layer, the logits, and sets lambda so that both losses are about equal at the end of training.

Differences from the paper and its official code (VisionLearningGroup/CORAL; its layer was read in baochens/Caffe-Deep_CORAL):
- None in the loss. Other layers can be aligned too: `layers=[features]` is what many re-implementations do.
- Source and target images go through the backbone as one batch: with `norm=running` the statistics of training are then those that
  are averaged for the test, of both domains mixed. The paper's AlexNet has no such norm.
- `weight` is lambda, and constant; it is for the user to balance the losses.
- The paper fine-tunes AlexNet by SGD at 0.001, its last layer ten times as fast; here all layers have one rate of Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from metarun.algos.domain_adaptation import DomainAdaptation
from metarun.config.types import Len, NonNegativeFloat
from metarun.core import Backbone, Batch, Spec
from metarun.ops.numerics import full_precision, precise


def covariance(x: Tensor) -> Tensor:
    """The unbiased covariance `[d, d]` of n >= 2 rows `[n, d]`."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def coral(source: Tensor, target: Tensor) -> Tensor:
    """The squared distance of the covariances of `[n, d]` and `[m, d]`, over 4 d^2."""
    with full_precision(source):
        difference = covariance(precise(source)) - covariance(precise(target))
        return difference.square().sum() / (4 * source.shape[1] ** 2)


class CORAL(DomainAdaptation):
    """A classifier of the source whose activations vary together on the target as they do on the source.

    Args:
        weight: The weight of the distance of the covariances; 0 trains on the source alone.
        layers: The layers whose covariances are compared.
    """

    least = 2  # one alone has no covariance

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        weight: NonNegativeFloat = 1.0,
        layers: Annotated[Sequence[Literal["features", "logits"]], Len(1)] = ("logits",),
    ) -> None:
        super().__init__(backbone, spec)
        self.weight, self.layers = weight, list(layers)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features, batch, source, target = self.whole_step(batch)
        found = {"features": features, "logits": self.head(features)}
        loss, shown = self.classification_loss(found["logits"], batch)
        distance = torch.stack([coral(found[layer][source], found[layer][target]) for layer in self.layers]).sum()
        return loss + self.weight * distance, {**shown, "class_loss": loss.detach(), "coral": distance.detach()}
