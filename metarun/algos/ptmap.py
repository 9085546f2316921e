"""PT-MAP: Leveraging the Feature Distribution in Transfer-based Few-Shot Learning (Hu, Gripon, Pateux 2020).

https://arxiv.org/abs/2006.03806

Trained as a plain classifier of the source's classes. On a test task features are brought nearer to a normal distribution (PT), and
class centres are found by optimal transport (MAP):

    PT:   f <- (f + 1e-6)^beta, unit length; centred by the mean of its own set (support, or queries); unit length
    MAP:  M = Sinkhorn(exp(-lambda |f_q - c_j|^2)), each query's row adds up to 1, each class's column to Q / N
          mu_j = weighted mean of the support images of class j (weights 1) and of all queries (weights M_qj)
          c_j <- c_j + alpha (mu_j - c_j)

Differences from the official code (yhu01/PT-MAP):
- The columns say that every class has as many queries: this is built into the method, whatever the queries are.
- A negative feature, which its networks do not have, keeps its sign under the power.
- Each task's Sinkhorn ends by itself, when its rows add up to 1 within 1e-6 or after 1000 rounds, and is in double precision;
  there all tasks end together, when no row's sum changes by more.
- It reduces features by a QR decomposition first, which changes no distance and is left out.
- Its features are of S2M2_R (rotations and manifold mixup); here of a plain classifier.
- `transform=un` leaves the features to PT; the other transformations come before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.transformed import MeanMomentum, Transform, TransformedFeatures
from metarun.config.types import DropRate, NonNegativeInt, PositiveFloat, Share
from metarun.core import Backbone, Spec
from metarun.ops.prototypes import class_means, negative_squared_distances
from metarun.ops.transport import sinkhorn

OFFSET = 1e-6  # added to features before the power


class PTMAP(TransformedFeatures):
    """A classifier of the source's images; on a test task centres by transport of equally many queries a class. Test ways may be any.

    Args:
        power: The exponent beta of the features.
        regularization: The factor lambda of the squared distances in the transport.
        updates: The steps of the class centres.
        rate: The share alpha of the way to the new centres that a step goes.
        transform: What is done to features before the power: nothing (un), unit length (l2n), or centring and unit length (cl2n).
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    couples_queries = True
    assumes_balanced_queries = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        power: PositiveFloat = 0.5,
        regularization: PositiveFloat = 10.0,
        updates: NonNegativeInt = 20,
        rate: Share = 0.2,
        transform: Transform = "un",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(
            backbone, spec, transform=transform, mean_momentum=mean_momentum, label_smoothing=label_smoothing
        )
        self.power, self.regularization, self.updates, self.rate = power, regularization, updates, rate

    @torch.no_grad()
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        support, queries = self.powered(support), self.powered(queries)
        both, fixed = torch.cat([support, queries], dim=-2), targets.to(support.dtype)
        centres = class_means(support, targets, targets.shape[-1])
        for _ in range(self.updates):
            shares = torch.cat([fixed, self.transported(queries, centres).exp()], dim=-2)
            centres = centres.lerp(class_means(both, shares, targets.shape[-1]), self.rate)
        return self.transported(queries, centres)

    def powered(self, features: Tensor) -> Tensor:
        """Features `[T, M, D]` of a set after the power transformation, centred by their own mean, of unit length."""
        features = torch.where(features < 0, -1, 1) * (features.abs() + OFFSET) ** self.power
        features = F.normalize(features, dim=-1)
        return F.normalize(features - features.mean(-2, keepdim=True), dim=-1)

    def transported(self, queries: Tensor, centres: Tensor) -> Tensor:
        """The logarithms of the queries' shares in the classes, `[T, Q, N]`."""
        scores = self.regularization * negative_squared_distances(queries, centres)
        return sinkhorn(scores.double()).to(queries.dtype)
