"""FEAT: Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions (Ye, Hu, Zhan, Sha 2020).

https://arxiv.org/abs/1812.03664

    p = mean of f(x) over the support images of each class, as in ProtoNet
    {p'_1 ... p'_N} = T({p_1 ... p_N}),  T(P) = layer_norm(P + W softmax(Q K' / sqrt(d)) V)    (section 3)
    P(y = n | x) = softmax_n(-|f(x) - p'_n|^2 / temperature)
    L = cross-entropy of the queries
        + contrast_weight * cross-entropy of all images x of softmax_n(-|f(x) - m_n|^2 / contrast_temperature)

Q, K, V are linear in P, and m_n is the mean of T(f(x) of all support and query images of class n).

As in the official code (Sha-Lab/FEAT): one head, no bias in Q, K, V, dropout 0.1 on the attention and 0.5 on its
output, Euclidean distances, and the settings of its 1-shot run with ConvNet on mini-ImageNet. (Its 5-shot run:
temperature 32, contrast_temperature 64, contrast_weight 0.1.) Differences:
- The official runs start from a backbone that was pretrained on all training classes, with rate 1e-4 for it and ten
  times as much for T, halved every 2,000 tasks. Here all is trained from scratch with one rate, so published numbers
  are not to be expected.
- Its ConvNet ends in a max-pool over all places, so 64 features of 84x84 images; conv4 gives 1,600, and with them
  larger distances to divide by the temperatures. (Of 28x28 images both give 64.)
- Found on Omniglot, 60 ways, 300 steps from scratch, validation: 93.1% with these settings, 93.9% with temperature 16
  and contrast_weight 0.1; without dropout the same.
- Where classes have other numbers of items, the contrastive term adapts them class by class; there they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.config.types import DropRate, NonNegativeFloat, PositiveFloat
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.draws import dropout
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_means, negative_squared_distances


class SetToSet(nn.Module):
    """Self-attention of one head over the members of each set `[..., members, D]`, to the same shape."""

    def __init__(self, features: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(features, features, bias=False) for _ in range(3))
        self.output = nn.Linear(features, features)
        self.norm = nn.LayerNorm(features)
        self.dropout, self.attention_dropout = dropout, attention_dropout
        for linear in (self.queries, self.keys, self.values, self.output):
            nn.init.xavier_normal_(linear.weight)

    def forward(self, members: Tensor) -> Tensor:
        scores = self.queries(members) @ self.keys(members).mT / members.shape[-1] ** 0.5
        weights = dropout(scores.softmax(-1), self.attention_dropout, self.training)
        mixed = self.output(weights @ self.values(members))
        return self.norm(members + dropout(mixed, self.dropout, self.training))


class FEAT(Algorithm):
    """Classifies a query by the nearest class mean, after attention among these means. Train and test ways may differ.

    Args:
        temperature: What distances are divided by; ProtoNet's is 1.
        contrast_temperature: What distances are divided by in the contrastive term.
        contrast_weight: The weight of the contrastive term; 0 leaves it out.
        dropout: The share of the attention's output that is dropped.
        attention_dropout: The share of the attention's weights that is dropped.
    """

    soft_labels = False  # the contrastive term sorts the queries by class

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        temperature: PositiveFloat = 64.0,
        contrast_temperature: PositiveFloat = 16.0,
        contrast_weight: NonNegativeFloat = 1.0,
        dropout: DropRate = 0.5,
        attention_dropout: DropRate = 0.1,
    ) -> None:
        super().__init__(backbone, spec)
        self.temperature, self.contrast_temperature = temperature, contrast_temperature
        self.contrast_weight = contrast_weight
        self.adapt = SetToSet(backbone.features, dropout, attention_dropout)

    def logits(self, support: Tensor, support_y: Tensor, queries: Tensor, ways: int) -> Tensor:
        """Logits of the queries, `[T, N*Q, N]`, from the features of both sets."""
        prototypes = self.adapt(class_means(support, support_y, ways))
        return negative_squared_distances(queries, prototypes) / self.temperature

    def contrast(self, embedded: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
        """Cross-entropy of all images, by the distances to the means of their adapted classes of so many images."""
        by_class = embedded.take_along_dim(y.argsort(1)[..., None], 1)
        if all(size == sizes[0] for size in sizes):
            centres = self.adapt(by_class.unflatten(1, (len(sizes), -1))).mean(2)
        else:
            centres = torch.stack([self.adapt(members).mean(1) for members in by_class.split(list(sizes), 1)], 1)
        return self.task_loss(negative_squared_distances(embedded, centres) / self.contrast_temperature, y)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            logits = self.logits(support, episodes.support_y, queries, episodes.ways)
            loss = self.task_loss(logits, episodes.query_y)
            if self.contrast_weight:
                y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
                embedded = torch.cat([support, queries], dim=1)
                sizes = [k + q for k, q in zip(episodes.support_sizes, episodes.query_sizes, strict=True)]
                loss = loss + self.contrast_weight * self.contrast(embedded, y, sizes)
        return loss, self.scores(logits, episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            return self.logits(support, episodes.support_y, queries, episodes.ways)
