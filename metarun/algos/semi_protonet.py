"""Semi-supervised ProtoNets: Meta-Learning for Semi-Supervised Few-Shot Classification (Ren et al. 2018).

https://arxiv.org/abs/1803.00676

A task has unlabelled items x_j beside its support set (`task.unlabelled`), which refine ProtoNet's class means p_c:

    z_jc = softmax_c(-|f(x_j) - p_c|^2)
    p_c <- (sum_i f(x_i) y_ic + sum_j f(x_j) z_jc) / (sum_i y_ic + sum_j z_jc)              (equation 3, soft k-means)

Unlabelled items may be of other classes, the distractors (`task.distractors`). They get a cluster of their own, whose centre
starts at 0, with a learned radius r (those of the classes are 1),

    z_jc = softmax_c(-|f(x_j) - p_c|^2 / (2 r_c^2) - log r_c)                               (equations 4 to 6, `cluster`)

or count as little as they lie far from a class for its own distribution of distances,

    m_jc = sigmoid(-gamma_c (d_jc - beta_c)),  d_jc = |f(x_j) - p_c|^2 / mean_j |f(x_j) - p_c|^2
    (beta_c, gamma_c) = MLP(min_j d_jc, max_j d_jc, var_j d_jc, skew_j d_jc, kurt_j d_jc)   (equations 7 to 9, `mask`)
    p_c <- (sum_i f(x_i) y_ic + sum_j f(x_j) z_jc m_jc) / (sum_i y_ic + sum_j z_jc m_jc)

The queries go to the nearest refined prototype; without unlabelled items that is ProtoNet.

As in the official code (renmengye/few-shot-ssl-public): one step of k-means, the loss of the last step's prototypes, no
gradient through the statistics, nor through the shares of plain soft k-means (with a cluster or a mask there is one), exp
for the positive outputs of the MLP, whose weights start at 0.01; a squared radius is taken twice (the paper's equation 4 has
1 / r^2); the loss of `cluster` has the distractors' cluster among the classes of a query.
Differences:
- The mask counts once, as in the paper; the official code multiplies the shares by it twice.
- The official code predicts the distractors' cluster of a query too, which is then wrong; here predictions are of the classes.
- The MLP's beta_c is exp of its output plus, in further steps, a share of another output, as there; the paper has one.
- On Omniglot its rate of 0.001 is halved after 6,000, 8,000 and 12,000 of 20,000 steps and every 2,000 from there, and weights decay by
  5e-5; the YAML's rate stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.config.types import NonNegativeInt, PositiveFloat
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_means, negative_squared_distances
from metarun.ops.soft_k_means import soft_assignment, soft_k_means


def statistics(distances: Tensor) -> Tensor:
    """Minimum, maximum, variance, skewness and excess kurtosis of each class's distances `[T, M, N]`, `[T, N, 5]`.

    Where the distances of a class are all alike its variance counts as 1, as in the official code.
    """
    mean = distances.mean(1, keepdim=True)
    centred = distances - mean
    variance = centred.square().mean(1, keepdim=True)
    scale = torch.where(variance > 0, variance, 1)
    skewness = (centred**3 / scale**1.5).mean(1)
    kurtosis = (centred**4 / scale**2).mean(1) - 3
    return torch.stack([distances.amin(1), distances.amax(1), scale[:, 0], skewness, kurtosis], -1)


class SemiProtoNet(Algorithm):
    """ProtoNet whose class means a task's unlabelled items refine. Train and test ways may differ.

    Args:
        distractors: What is done against unlabelled items of other classes: nothing, a cluster for them, or a mask.
        refinements: The steps of soft k-means; 0 is ProtoNet.
        radius: Where the learned radius of the distractors' cluster starts.
    """

    metric = True
    recordable = True
    uses_unlabelled = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        distractors: Literal["none", "cluster", "mask"] = "none",
        refinements: NonNegativeInt = 1,
        radius: PositiveFloat = 100.0,
    ) -> None:
        super().__init__(backbone, spec)
        self.distractors, self.refinements = distractors, refinements
        if distractors == "cluster":
            self.log_radius = nn.Parameter(torch.tensor(float(radius)).log())
        if distractors == "mask":
            self.thresholds = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3))
            for layer in (self.thresholds[0], self.thresholds[2]):
                assert isinstance(layer, nn.Linear)
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                nn.init.zeros_(layer.bias)

    def scores_of(self, points: Tensor, prototypes: Tensor) -> Tensor:
        """Logits `[T, M, N]` of points; with a cluster for distractors, which comes last, `[T, M, N + 1]`."""
        distances = negative_squared_distances(points, prototypes)
        if self.distractors != "cluster":
            return distances
        log_radii = torch.cat([self.log_radius.new_zeros(prototypes.shape[-2] - 1), self.log_radius[None]])
        return distances / (2 * (2 * log_radii).exp()) - log_radii

    def masks(self, prototypes: Tensor, points: Tensor, thresholds: Tensor, step: int) -> Tensor:
        """How much each point counts for each class, `[T, M, N]` in (0, 1)."""
        distances = -negative_squared_distances(points, prototypes)
        mean = distances.mean(1, keepdim=True)
        start, further, scale = thresholds[:, None].unbind(-1)  # [T, 1, N] each
        beta = start.exp() + step / max(self.refinements - 1, 1) * further
        return ((beta - distances / torch.where(mean > 0, mean, 1)) * scale.exp()).sigmoid()

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, unlabelled: Tensor, ways: int) -> Tensor:
        """Logits of queries by prototypes that the unlabelled items refine.

        Args:
            support: Features of the support sets, `[T, N*K, D]`.
            labels: Their labels, int64 `[T, N*K]`.
            queries: Features of the queries, `[T, N*Q, D]`.
            unlabelled: Features of the unlabelled items, `[T, U, D]`.
            ways: N.

        Returns:
            `[T, N*Q, N]`; with a cluster of distractors, which comes last, `[T, N*Q, N + 1]`.
        """
        means = class_means(support, labels, ways)
        if self.distractors == "cluster":
            means = torch.cat([means, torch.zeros_like(means[:, :1])], 1)
        assign = self.assignment(unlabelled, means) if unlabelled.shape[1] else None
        refined = soft_k_means(support, labels, unlabelled, means, steps=self.refinements, assign=assign)
        return self.scores_of(queries, refined)

    def assignment(self, unlabelled: Tensor, means: Tensor) -> Callable[[Tensor, int], Tensor] | None:
        """What `soft_k_means` is to assign features `[T, U, D]` by, with the prototypes at the start `[T, N, D]`; None is the plain way."""
        if self.distractors == "none":
            return None
        if self.distractors == "cluster":
            return lambda prototypes, step: self.scores_of(unlabelled, prototypes).softmax(-1)
        distances = -negative_squared_distances(unlabelled, means).detach()
        mean = distances.mean(1, keepdim=True)
        thresholds = self.thresholds(statistics(distances / torch.where(mean > 0, mean, 1)))
        return lambda prototypes, step: (
            soft_assignment(unlabelled, prototypes) * self.masks(prototypes, unlabelled, thresholds, step)
        )

    def all_logits(self, episodes: Episodes) -> Tensor:
        """`logits` of tasks."""
        support, queries, unlabelled = self.embed_all(episodes)
        with full_precision(queries):
            return self.logits(support, episodes.support_y, queries, unlabelled, episodes.ways)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.all_logits(episodes)
        if episodes.unlabelled_x is None:
            logits = logits[..., : episodes.ways]  # no distractors, and no cluster of them
        target = episodes.query_y
        if target.is_floating_point():  # probabilities of the classes, and none of being of no class
            target = torch.nn.functional.pad(target, (0, logits.shape[-1] - episodes.ways))
        return self.task_loss(logits, target), self.scores(logits[..., : episodes.ways], episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        return self.all_logits(episodes)[..., : episodes.ways]
