"""Soft k-means ProtoNet: Meta-Learning for Semi-Supervised Few-Shot Classification (Ren et al. 2018), its transductive use.

https://arxiv.org/abs/1803.00676

    z_jc = softmax_c(-|f(x_j) - p_c|^2)                                                  for items x_j without a label
    p_c <- (sum_i f(x_i) y_ic + sum_j f(x_j) z_jc) / (sum_i y_ic + sum_j z_jc)

The p_c start as ProtoNet's class means, and the queries go to the nearest refined one. As in the official code, the z_jc are constants
to the gradient.

Differences from the paper and its code (renmengye/few-shot-ssl-public):
- There an episode has unlabelled items of its own beside the queries; here the queries are what has no label, which makes the
  method transductive.
- Training refines prototypes as testing does, by the training queries; there by the unlabelled items of training episodes.
- There is neither a cluster for items of other classes nor a mask.
"""

from __future__ import annotations

from torch import Tensor

from metarun.config.types import NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_means, negative_squared_distances
from metarun.ops.soft_k_means import soft_k_means


class SoftKMeans(Algorithm):
    """ProtoNet whose class means the queries refine. Train and test ways may differ.

    Args:
        refinements: The steps of soft k-means; 0 is ProtoNet.
    """

    recordable = True

    def __init__(self, backbone: Backbone, spec: Spec, *, refinements: NonNegativeInt = 1) -> None:
        super().__init__(backbone, spec)
        self.refinements = refinements
        self.couples_queries = refinements > 0

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            labels = episodes.support_y
            start = class_means(support, labels, episodes.ways)
            prototypes = soft_k_means(support, labels, queries, start, steps=self.refinements)
            return negative_squared_distances(queries, prototypes)
