"""Transductive fine-tuning: A Baseline for Few-Shot Image Classification (Dhillon, Chaudhari, Ravichandran, Soatto 2020).

https://arxiv.org/abs/1909.02729

Trained as a plain classifier of the source's classes. On a test task a linear classifier of unit features x / |x|, x = relu(f), starts
at the directions of the class means, w_c = mean x / |mean x|, b = 0 (support-based initialisation: the mean is of features of their own
lengths), and

    min over all parameters  mean cross-entropy of the support set + mean entropy of the queries' predictions

by Adam: in each epoch a step on the first term, then one on the second.

Differences from the paper and its code (amazon-science/few-shot-baseline):
- Unless `whole_network`, the backbone stays as it is and the classifier alone is tuned, for all tasks at once: as it must be on the
  vectors of a frozen encoder. That needs a larger rate: the YAML's is 0.001, theirs, for all parameters, 0.00005.
- The classifier is on the features; there on the source classes' logits.
- The backbone is in evaluation mode; there its batch norms take the statistics of what they are tuned on, and images are augmented.
- A norm's statistics are never tuned, and there is no dropout.
- There the source's classifier is trained with a label smoothing of 0.1 and mixup; here without (`label_smoothing`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.transformed import MeanMomentum, Transform, TransformedFeatures
from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt
from metarun.core import Backbone, Episodes, Spec
from metarun.ops.adam import descended
from metarun.ops.inner_loop import Params, call, parameters
from metarun.ops.numerics import full_precision, one_hot, precise
from metarun.ops.prototypes import class_sums

Loss = Callable[[Params], Tensor]


class TransductiveFineTuning(TransformedFeatures):
    """A classifier of the source's images; on a test task one that is tuned to be certain of the queries. Test ways may be any.

    Args:
        epochs: The epochs of a test task, of a step on the support set and one on the queries each.
        learning_rate: The learning rate of Adam.
        entropy_weight: The weight of the entropy of the queries' predictions; 0 is inductive fine-tuning.
        whole_network: Whether the backbone is tuned too, for each task its own.
        transform: What is done to features before the nonlinearity: nothing (un), unit length (l2n), or centring and unit length (cl2n).
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        epochs: NonNegativeInt = 25,
        learning_rate: NonNegativeFloat = 0.001,
        entropy_weight: NonNegativeFloat = 1.0,
        whole_network: bool = False,
        transform: Transform = "un",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(
            backbone, spec, transform=transform, mean_momentum=mean_momentum, label_smoothing=label_smoothing
        )
        self.epochs, self.learning_rate, self.entropy_weight = epochs, learning_rate, entropy_weight
        self.whole_network = whole_network
        self.couples_queries = epochs > 0 and entropy_weight > 0

    def predict(self, episodes: Episodes) -> Tensor:
        if not self.whole_network or not parameters(self.backbone):
            return super().predict(episodes)

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            return self.solve_by_network(support_x, one_hot(support_y, episodes.ways), query_x)

        return self.over_tasks(task, *episodes.tensors[:3])

    @torch.no_grad()
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        start = imprinted(support.relu(), targets)
        support, queries = unit(support), unit(queries)
        # Sums over tasks, in which each has the gradient of its own mean.
        tuned = self.tuned(
            lambda params: cross_entropy(linear(support, params), targets).sum() / support.shape[-2],
            lambda params: entropy(linear(queries, params)).sum() / queries.shape[-2],
            start,
        )
        return linear(queries, tuned)

    def tuned(self, on_support: Loss, on_queries: Loss, start: Params) -> Params:
        """Parameters after all epochs of descent on the two losses by turns."""
        losses = [on_support]
        if self.entropy_weight:
            losses.append(lambda params: self.entropy_weight * on_queries(params))
        return descended(losses, start, steps=self.epochs, learning_rate=self.learning_rate)

    @torch.no_grad()
    def solve_by_network(self, support_x: Tensor, targets: Tensor, query_x: Tensor) -> Tensor:
        """Logits of one task's queries, `[Q, N]`, by a backbone of its own."""
        network = RectifiedFeatures(self)
        start = {f"backbone.{name}": value.detach() for name, value in parameters(self.backbone).items()}

        def logits(params: Params, x: Tensor, of: Tensor | None = None) -> Tensor:
            body = {name: value for name, value in params.items() if name.startswith("backbone.")}
            features = call(network, body, x, of)
            with full_precision(features):
                return linear(unit(features), params)

        tuned = self.tuned(
            lambda params: cross_entropy(logits(params, support_x), targets).mean(),
            lambda params: entropy(logits(params, query_x, support_x)).mean(),
            start | imprinted(call(network, start, support_x), targets),
        )
        return logits(tuned, query_x, support_x)


class RectifiedFeatures(nn.Module):
    """The backbone of a method, and what comes between its features and their lengths."""

    def __init__(self, method: TransductiveFineTuning) -> None:
        super().__init__()
        self.backbone = method.backbone
        self.transformed = partial(method.transformed, transform=method.transform)

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        """Images `[B, ...]` to features `[B, D]` without what is negative."""
        return self.transformed(precise(self.backbone(x, n_support))).relu()


def unit(features: Tensor) -> Tensor:
    """Features `[..., D]` without what is negative, of unit length."""
    return F.normalize(features.relu(), dim=-1)


def imprinted(features: Tensor, targets: Tensor) -> Params:
    """Where the classifier of features `[..., S, D]` of one-hot classes `[..., S, N]` starts."""
    weight = F.normalize(class_sums(features, targets.to(features.dtype), targets.shape[-1]), dim=-1)
    return {"weight": weight, "bias": torch.zeros_like(weight[..., 0])}


def linear(features: Tensor, params: Params) -> Tensor:
    """Logits `[..., M, N]` of features `[..., M, D]`."""
    return features @ params["weight"].mT + params["bias"][..., None, :]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each row of logits with its one-hot class."""
    return -(targets * logits.log_softmax(-1)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """The entropy of each row's probabilities."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
