"""BD-CSPN: Prototype Rectification for Few-Shot Learning (Liu, Song, Qin 2020).

https://arxiv.org/abs/1911.10713

Trained as a plain classifier of the source's classes. On a test task with support features s and query features q, in cosines:

    q' = q + mean(s) - mean(q)     (against the bias between the sets)
    each q' gets the label of the prototype p_n nearest to it, and with the support images of class n makes the set X_n
    w_x = exp(epsilon cos(x, p_n)) / sum_(x in X_n) exp(epsilon cos(x, p_n))
    p_n <- sum_(x in X_n) w_x x

A query q, which is not shifted, goes to the rectified prototype of the largest cosine.

Differences from the paper:
- There the Z queries of a class nearest to it join its set; here all that are nearest to it, as in later comparisons.
- Of later code (oveilleux/Realistic_Transductive_Few_Shot), which takes w as the softmax over classes and a plain mean: here, as in
  the paper, the weights of a class's set add up to 1, and support images keep their labels. It too compares the queries q with the
  prototypes and not the shifted q', there by Euclidean distance.
- The logits are epsilon times the cosines, which changes no prediction.
- The shift supposes that the queries' mean is that of balanced classes, as the support set's is.
- Features are centred by the source's mean first (`transform`), as in later comparisons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.transformed import MeanMomentum, Transform, TransformedFeatures
from metarun.config.types import DropRate, PositiveFloat
from metarun.core import Backbone, Spec
from metarun.ops.numerics import one_hot
from metarun.ops.prototypes import class_means


def rectified(support: Tensor, targets: Tensor, queries: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The prototypes of BD-CSPN, and the queries shifted to the support set's mean.

    Args:
        support: Features of labelled items, `[T, S, D]`.
        targets: Their classes, one-hot, `[T, S, N]`.
        queries: Features of the queries, `[T, Q, D]`.
        epsilon: The factor of the cosines in the weights of a prototype's items.

    Returns:
        The prototypes `[T, N, D]`, and the shifted queries `[T, Q, D]`.
    """
    ways = targets.shape[-1]
    prototypes = F.normalize(class_means(support, targets, ways), dim=-1)
    shifted = queries + (support.mean(-2, keepdim=True) - queries.mean(-2, keepdim=True))
    both = torch.cat([support, shifted], dim=-2)
    cosines = F.normalize(both, dim=-1) @ prototypes.mT
    nearest = one_hot(cosines[..., support.shape[-2] :, :].argmax(-1), ways, targets.dtype)
    members = torch.cat([targets, nearest], dim=-2)
    weights = (epsilon * cosines).masked_fill(members == 0, -torch.inf).softmax(-2)
    return weights.mT @ both, shifted


class BDCSPN(TransformedFeatures):
    """A classifier of the source's images; on a test task prototypes that the queries rectify, by cosines. Test ways may be any.

    Args:
        epsilon: The factor of the cosines in the weights of a prototype's images.
        transform: What is done to features: nothing (un), unit length (l2n), or centring and unit length (cl2n).
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
        epsilon: PositiveFloat = 10.0,
        transform: Transform = "cl2n",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(
            backbone, spec, transform=transform, mean_momentum=mean_momentum, label_smoothing=label_smoothing
        )
        self.epsilon = epsilon

    @torch.no_grad()
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        prototypes, _ = rectified(support, targets, queries, self.epsilon)
        return self.epsilon * F.normalize(queries, dim=-1) @ F.normalize(prototypes, dim=-1).mT
