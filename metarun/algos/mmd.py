"""MMD, the loss of DAN: Learning Transferable Features with Deep Adaptation Networks (Long, Cao, Wang, Jordan 2015).

https://arxiv.org/abs/1502.02791

    d_k^2(p, q) = |E_p phi(x_s) - E_q phi(x_t)|^2,  <phi(x), phi(y)> = k(x, y)          (equation 1)
    k = sum over u of beta_u k_u,  k_u(x, y) = exp(-|x - y|^2 / gamma_u)                (equation 2)
    L = L_class + lambda sum over layers of d_k^2(D_s, D_t)                             (equation 4)

The maximum mean discrepancy of the source's and the target's images of a batch, in the features and in the logits. The bandwidth
gamma is the mean of |x - y|^2 over all pairs of different images of the batch, taken as a constant; the `kernels` are of
gamma times `factor`^u, u = -2 ... 2 for five.

The estimate is the biased one (the V-statistic: means over all pairs, an image with itself among them): it is never negative, 0 for
equal samples, and its gradient is that of the unbiased one but for the weight of the pairs within a domain.

Differences from the paper and its official code (thuml/Xlearn, pytorch/src/loss.py and its Caffe layer):
- The paper's estimate is the unbiased one of linear time, which takes each image in two pairs only: all pairs cost
  little here, and vary less. (The later PyTorch code takes all pairs too, unbiased; the Caffe layer draws some.)
- beta_u = 1, as in the code. The paper finds the betas by a quadratic program.
- Layers fc6 to fc8 of AlexNet (fc7 and fc8 in the Caffe code, the features alone in PyTorch) are the features and the
  logits here; no layer is frozen, and none learns faster. lambda is 1, as in the code.
- The paper's bandwidth is the median; that of its code the mean, as here.
- Source and target images go through the backbone as one batch: with `norm=running` the statistics of training are then those that
  are averaged for the test, of both domains mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from metarun.algos.domain_adaptation import DomainAdaptation
from metarun.config.types import Len, NonNegativeFloat, PositiveFloat, PositiveInt
from metarun.core import Backbone, Batch, Spec
from metarun.ops.numerics import full_precision, precise


def squared_distances(x: Tensor) -> Tensor:
    """Between all pairs of the rows `[n, d]`: `[n, n]`, exactly 0 on the diagonal."""
    x = x - x.mean(0)  # for precision: the products below nearly cancel
    squares = x.square().sum(1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    return distances * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def mmd(source: Tensor, target: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """The biased estimate of the squared maximum mean discrepancy of `[n, d]` and `[m, d]`, summed over the kernels."""
    with full_precision(source):
        both = precise(torch.cat([source, target]))
        distances = squared_distances(both)
        bandwidth = distances.detach().sum() / (len(both) * (len(both) - 1))
        bandwidth = bandwidth.clamp(min=torch.finfo(both.dtype).tiny * 1e6)  # of equal images, which differ in nothing
        widths = [bandwidth * factor ** (number - kernels // 2) for number in range(kernels)]
        kernel = torch.stack([torch.exp(-distances / width) for width in widths]).sum(0)
        sides = torch.cat(
            [both.new_full((len(source),), 1 / len(source)), both.new_full((len(target),), -1 / len(target))]
        )
        return sides @ kernel @ sides


class MMD(DomainAdaptation):
    """A classifier of the source whose activations have the same distribution on the target, as kernels see it.

    Args:
        weight: The weight of the discrepancy; 0 trains on the source alone.
        layers: The layers whose distributions are compared together.
        kernels: The Gaussian kernels that are summed.
        factor: The factor from the width of one kernel to that of the next.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        weight: NonNegativeFloat = 1.0,
        layers: Annotated[Sequence[Literal["features", "logits"]], Len(1)] = ("features", "logits"),
        kernels: PositiveInt = 5,
        factor: PositiveFloat = 2.0,
    ) -> None:
        super().__init__(backbone, spec)
        self.weight, self.layers, self.kernels, self.factor = weight, list(layers), kernels, factor

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features, batch, source, target = self.whole_step(batch)
        found = {"features": features, "logits": self.head(features)}
        loss, shown = self.classification_loss(found["logits"], batch)
        distances = [
            mmd(found[layer][source], found[layer][target], self.kernels, self.factor) for layer in self.layers
        ]
        distance = torch.stack(distances).sum()
        return loss + self.weight * distance, {**shown, "class_loss": loss.detach(), "mmd": distance.detach()}
