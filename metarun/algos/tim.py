"""TIM: Transductive Information Maximization for Few-Shot Learning (Boudiaf et al. 2020), and alpha-TIM (Veilleux et al. 2021).

https://arxiv.org/abs/2008.11297, https://arxiv.org/abs/2106.09554

Trained as a plain classifier of the source's classes. On a test task class weights w_c start at the class means of unit features z, and
Adam moves them (TIM-GD):

    p_ic = softmax_c(-tau/2 |z_i - w_c|^2)
    min_w  lambda CE(support) - weight_m H(mean of p over the queries) + weight_c mean of H(p_q)

H is Shannon's entropy. In alpha-TIM it is Tsallis' (1 - sum_c p_c^alpha) / (alpha - 1), which is Shannon's as alpha goes to 1, and which
does not draw the queries' classes to equal shares as strongly.

Differences from the official code (mboudiaf/TIM; oveilleux/Realistic_Transductive_Few_Shot):
- The gradient is written out, and equals that of the losses above; logarithms of shares are sums of logarithms here, and finite.
  There the conditional's get 1e-12 added.
- It takes 150 steps unless told, 1000 in its scripts, where `steps=1000` gives the same. Its lambda, weight_m, weight_c are 0.1, 1, 0.1 for
  TIM; for alpha-TIM all are 1. Its alpha goes by the shots, as here unless told: 2 for one, 7 from five on, and the 5 of its settings
  from two on. Of classes of unequal sizes the mean counts here: 2 below two.
- As in that code, alpha-TIM's cross-entropy is Shannon's; the paper has one with alpha, too.
- The variant by alternating directions (TIM-ADM) is not here.
- TIM's scripts train the source's classifier with `label_smoothing=0.1`; here it is 0 unless told.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarun.algos.transformed import MeanMomentum, Transform, TransformedFeatures
from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt, PositiveFloat
from metarun.core import Backbone, Spec
from metarun.ops.adam import Adam
from metarun.ops.numerics import squared_lengths
from metarun.ops.prototypes import class_means, negative_squared_distances

LARGEST = 80.0  # exponent in single precision; the share that has it is nothing


class TIM(TransformedFeatures):
    """A classifier of the source's images; on a test task class weights that queries tell apart with certainty. Test ways may be any.

    Args:
        steps: The steps of Adam on a test task's class weights.
        learning_rate: The learning rate of these steps.
        temperature: The factor tau of the squared distances.
        support_weight: The weight lambda of the cross-entropy on the support set.
        marginal_weight: The weight of the entropy of the queries' mean prediction.
        conditional_weight: The weight of the mean entropy of the queries' predictions.
        alpha: The order of the entropies; 1 is Shannon's (TIM), others are Tsallis' (alpha-TIM); null goes by the task's shots: 2 for
            one, 5 below five, 7 from five on.
        transform: What is done to features: nothing (un), unit length (l2n), or centring and unit length (cl2n).
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        steps: NonNegativeInt = 150,
        learning_rate: NonNegativeFloat = 0.0001,
        temperature: PositiveFloat = 15.0,
        support_weight: NonNegativeFloat = 0.1,
        marginal_weight: NonNegativeFloat = 1.0,
        conditional_weight: NonNegativeFloat = 0.1,
        alpha: PositiveFloat | None = 1.0,
        transform: Transform = "l2n",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(
            backbone, spec, transform=transform, mean_momentum=mean_momentum, label_smoothing=label_smoothing
        )
        self.steps, self.learning_rate, self.temperature, self.alpha = steps, learning_rate, temperature, alpha
        self.support_weight = support_weight
        self.marginal_weight, self.conditional_weight = marginal_weight, conditional_weight
        transductive = steps > 0 and max(marginal_weight, conditional_weight) > 0
        self.couples_queries = transductive
        self.assumes_balanced_queries = transductive and marginal_weight > 0 and alpha == 1

    @torch.no_grad()
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        weights = class_means(support, targets, targets.shape[-1])
        both = torch.cat([support, queries], dim=-2)
        adam = Adam(weights, self.learning_rate)
        for _ in range(self.steps):
            logits = (weights @ both.mT).sub_(squared_lengths(weights), alpha=0.5).mul_(self.temperature)
            slopes = self.slopes(logits.log_softmax(-2), targets.mT).mul_(self.temperature)
            adam.step((slopes @ both).addcmul_(slopes.sum(-1, keepdim=True), weights, value=-1))
        return self.temperature / 2 * negative_squared_distances(queries, weights)

    def slopes(self, logs: Tensor, targets: Tensor) -> Tensor:
        """The derivative of a task's loss by the logits, `[T, N, S+Q]`; classes come first, for few numbers side by side take long.

        Args:
            logs: The log probabilities of the support images, then of the queries, `[T, N, S+Q]`.
            targets: The classes of the support images, one-hot, `[T, N, S]`.
        """
        slopes, labelled = logs.exp(), targets.shape[-1]
        alpha = by_shots(labelled / targets.shape[-2]) if self.alpha is None else self.alpha
        of_support, of_queries, logs = slopes[..., :labelled], slopes[..., labelled:], logs[..., labelled:]
        of_support.sub_(targets).mul_(self.support_weight / labelled)
        marginal = steepness(logs.logsumexp(-1, keepdim=True) - math.log(logs.shape[-1]), alpha)
        by_shares = self.marginal_weight * marginal - self.conditional_weight * steepness(logs, alpha)
        by_shares.sub_((of_queries * by_shares).sum(-2, keepdim=True))
        of_queries.mul_(by_shares).div_(logs.shape[-1])
        return slopes


def by_shots(shots: float) -> float:
    """The order of alpha-TIM's entropies for tasks of so many shots a class: that of its official code, for one, five and more."""
    return 2.0 if shots < 2 else 5.0 if shots < 5 else 7.0


def steepness(logs: Tensor, alpha: float) -> Tensor:
    """Minus the derivative of the entropy of order `alpha` by each share, given their logarithms, up to a constant for all shares."""
    if alpha == 1:
        return logs
    powers = (alpha - 1) * logs
    return alpha / (alpha - 1) * torch.expm1(powers.clamp(max=LARGEST))
