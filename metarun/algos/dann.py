"""DANN: Unsupervised Domain Adaptation by Backpropagation (Ganin and Lempitsky 2015).

Also Domain-Adversarial Training of Neural Networks (Ganin et al. 2016).

https://arxiv.org/abs/1409.7495, https://arxiv.org/abs/1505.07818

    L = mean over source images of L_y(G_y(G_f(x)), y) + mean over all images of L_d(G_d(R(G_f(x))), domain)
    R(v) = v forwards,  dR/dv = -lambda I backwards              (the gradient reversal layer)
    lambda(p) = 2 / (1 + exp(-gamma p)) - 1,  gamma = 10         (p: the progress of training, from 0 to 1)

The domain classifier G_d learns to tell the domains apart at its full rate; the backbone G_f learns, lambda times as much, to
prevent it. G_d is the MNIST network's of the paper: one hidden layer of 100.

Differences from the paper and its official code (ddtm/caffe; its gradient scaler layer as a fork has it):
- Adam at a constant 0.001 (as in the port fungtion/DANN) for SGD at 0.01 / (1 + 10 p)^0.75 with momentum 0.9.
- The domain loss is the mean over all images of a batch, half of them the target's. The paper of 2016 (equation 10) and
  the port add the means of the domains, twice as much; the paper of 2015 (equation 1) sums over all images.
- Source and target images go through the backbone as one batch (as in thuml/Transfer-Learning-Library). So with `norm=running`
  both are normalised with the very statistics, of both domains mixed, whose averages serve at test time; with a call a domain each would
  be trained with statistics of its own, and tested with averages that neither ever met. The paper's networks for digits have no norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.domain_adaptation import DomainAdaptation
from metarun.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from metarun.core import Backbone, Batch, Spec
from metarun.ops.numerics import precise


class Reversal(torch.autograd.Function):
    """The identity; on the way back it multiplies the gradient by minus `strength`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def ramp(step: int, steps: int, sharpness: float) -> float:
    """lambda(p) of step `step` of `steps`: from 0 to 2 / (1 + exp(-sharpness)) - 1, and no further."""
    return 2 / (1 + math.exp(-sharpness * min(1.0, step / steps))) - 1


class DANN(DomainAdaptation):
    """A classifier of the source on features from which a second classifier cannot tell the domain.

    Args:
        domain_hidden: The hidden units of the domain classifier.
        reversal: The most that lambda, the factor of the reversed gradient, comes to.
        ramp_steps: The training steps over which lambda rises.
        sharpness: The paper's gamma, how steeply lambda rises.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        domain_hidden: PositiveInt = 100,
        reversal: NonNegativeFloat = 1.0,
        ramp_steps: PositiveInt = 1500,
        sharpness: PositiveFloat = 10.0,
    ) -> None:
        super().__init__(backbone, spec)
        self.reversal, self.ramp_steps, self.sharpness = reversal, ramp_steps, sharpness
        self.domain = nn.Sequential(nn.Linear(backbone.features, domain_hidden), nn.ReLU(), nn.Linear(domain_hidden, 1))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features, batch, _, _ = self.whole_step(batch)
        strength = self.reversal * ramp(step, self.ramp_steps, self.sharpness)
        loss, shown = self.classification_loss(self.head(features), batch)
        reverse: Callable[[Tensor, float], Tensor] = Reversal.apply
        logits = precise(self.domain(reverse(features, strength)))[:, 0]
        domain_loss = F.binary_cross_entropy_with_logits(logits, batch.domain.to(logits.dtype))
        right = (logits.detach() > 0) == (batch.domain == 1)
        shown |= {"domain_loss": domain_loss.detach(), "domain_acc": right.to(logits.dtype).mean()}
        return loss + domain_loss, shown
