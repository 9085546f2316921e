"""What methods on the transformed features of a classifier share: how they are trained, and what is done to features.

The transformations are SimpleShot's (Wang et al. 2019, https://arxiv.org/abs/1911.04623, section 2.2). With m the mean feature of
the source's images:

    CL2N:  (f(x) - m) / |f(x) - m|        L2N:  f(x) / |f(x)|        UN:  f(x)

Differences from the paper's code: m is a running mean of the features in training, and stays 0 where nothing is trained, on the
vectors of a frozen encoder, say, which their data set may have centred.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.baseline import Baseline
from metarun.config.types import DropRate, Le, PositiveFloat
from metarun.core import Backbone, Batch, Episodes, Spec
from metarun.ops.numerics import full_precision, one_hot

Transform = Literal["un", "l2n", "cl2n"]
MeanMomentum = Annotated[PositiveFloat, Le(1)]


class TransformedFeatures(Baseline):
    """A classifier of the source's images, by whose transformed features test tasks are solved: a method defines `solve`.

    Args:
        transform: What is done to features: nothing (un), unit length (l2n), or centring and unit length (cl2n).
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    mean: Tensor
    batches: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        transform: Transform = "cl2n",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(backbone, spec, label_smoothing=label_smoothing)
        self.head.requires_grad_(not backbone.identity)  # which trains the backbone, and nothing that a test task uses
        self.transform = transform
        self.mean_momentum = mean_momentum
        self.register_buffer("mean", torch.zeros(backbone.features))
        self.register_buffer("batches", torch.tensor(0.0))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features_of(batch.x)
        with torch.no_grad():
            self.batches += 1
            self.mean.lerp_(features.mean(0).to(self.mean), (1 / self.batches).clamp(min=self.mean_momentum))
        return self.classification_loss(self.head(features), batch)

    def transformed(self, features: Tensor, transform: Transform) -> Tensor:
        """Features `[..., D]` after a transformation."""
        if transform == "cl2n":
            features = features - self.mean
        return features if transform == "un" else F.normalize(features, dim=-1)

    @abstractmethod
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Logits of the queries of T tasks, `[T, Q, N]`: all tasks at once, and each by itself.

        Args:
            support: The transformed features of the support sets, `[T, S, D]`, in single precision at least.
            targets: Their classes, one-hot, `[T, S, N]`, of the same type; any number of a class, in any order.
            queries: The transformed features of the queries, `[T, Q, D]`.
        """

    def predict(self, episodes: Episodes) -> Tensor:
        return self.predict_by(episodes, self.transform)

    def predict_by(self, episodes: Episodes, transform: Transform) -> Tensor:
        """`predict` with another transformation of the features."""
        support, queries = (self.transformed(each, transform) for each in self.embed(episodes))
        with full_precision(support):
            return self.solve(support, one_hot(episodes.support_y, episodes.ways, support.dtype), queries)
