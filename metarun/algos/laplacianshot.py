"""LaplacianShot: Laplacian Regularized Few-Shot Learning (Ziko, Dolz, Granger, Ben Ayed 2020).

https://arxiv.org/abs/2006.15486

Trained as a plain classifier of the source's classes. On a test task queries q get classes that are near to their prototypes m_c, and
that near queries share:

    a_qc = |f(q) - m_c|^2,    W_qp = 1 where p is among the nearest queries of q, else 0
    Y_q^0 = softmax(-a_q),    Y_q^(i+1) = softmax(-a_q + lambda sum_p W_qp Y_p^i)

Differences from the official code (imtiazziko/LaplacianShot):
- `rectify` makes prototypes as BD-CSPN does, as its `--proto-rect` (on in its scripts); there with weights that are a softmax over
  classes, under a plain mean, and support images of the class that they are nearest to. As there, f(q) above then is the query
  shifted to the support set's mean, unlike in BD-CSPN. The rectification supposes balanced queries, the rest does not.
- There lambda is chosen on the validation classes, 0.7 at one shot and 0.3 or less at five for mini-ImageNet; here it is a setting.
- All `updates` are taken; there they end when the energy changes by less than a millionth.
- The code counts a query as one of its own `knn` nearest, and takes it out; so `neighbors` here is its knn - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.algos.bdcspn import rectified
from metarun.algos.transformed import MeanMomentum, Transform, TransformedFeatures
from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt, PositiveInt
from metarun.core import Backbone, Spec
from metarun.ops.prototypes import class_means, negative_squared_distances

EPSILON = 10.0  # of the rectification


class LaplacianShot(TransformedFeatures):
    """A classifier of the source's images; on a test task nearest prototypes, which near queries share. Test ways may be any.

    Args:
        smoothness: The weight lambda of what near queries say; 0 is the nearest prototype.
        neighbors: The nearest queries of a query that count.
        updates: The steps of the bound optimisation.
        rectify: Whether the queries are first shifted to the support set's mean and rectify the prototypes, as in BD-CSPN.
        transform: What is done to features: nothing (un), unit length (l2n), or centring and unit length (cl2n).
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        smoothness: NonNegativeFloat = 0.7,
        neighbors: PositiveInt = 2,
        updates: NonNegativeInt = 20,
        rectify: bool = True,
        transform: Transform = "cl2n",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(
            backbone, spec, transform=transform, mean_momentum=mean_momentum, label_smoothing=label_smoothing
        )
        self.smoothness, self.neighbors, self.updates, self.rectify = smoothness, neighbors, updates, rectify
        self.assumes_balanced_queries = rectify
        self.couples_queries = rectify or (smoothness > 0 and updates > 0)

    @torch.no_grad()
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        prototypes = class_means(support, targets, targets.shape[-1])
        if self.rectify:
            prototypes, queries = rectified(support, targets, queries, EPSILON)
        unary = logits = negative_squared_distances(queries, prototypes)
        affinity = nearest_neighbors(queries, self.neighbors)
        for _ in range(self.updates):
            logits = unary + self.smoothness * affinity @ logits.softmax(-1)
        return logits


def nearest_neighbors(points: Tensor, count: int) -> Tensor:
    """For points `[T, Q, D]` a matrix `[T, Q, Q]` with 1 where the column is among the row's `count` nearest other points."""
    nearness = negative_squared_distances(points, points)
    nearness.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    count = min(count, points.shape[-2] - 1)
    return torch.zeros_like(nearness).scatter_(-1, nearness.topk(count, dim=-1).indices, 1.0)
