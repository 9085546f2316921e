"""SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning (Wang, Chao, Weinberger, van der Maaten 2019).

https://arxiv.org/abs/1911.04623

Trained as a plain classifier of the source's classes. On a test task a query goes to the nearest mean of the support images'
features, which have been transformed (section 2.2): with m the mean feature of the source's images,

    CL2N:  (f(x) - m) / |f(x) - m|        L2N:  f(x) / |f(x)|        UN:  f(x)

A class's centroid is the mean of its transformed features and is not made a unit vector again; distances are Euclidean.

Differences from the official code (mileyan/simple_shot, src/train.py):
- There m is taken over all training images after training, in evaluation mode. Here it is the running mean of the features in training
  (`mean_momentum` for the newest batch; the mean of all batches so far, for as long as those are fewer than its inverse), so
  that validation has it too, and the few latest hundred batches are what it knows.
- There validation compares untransformed features, by their cosine in its configurations; here it does as testing does.
- It trains by SGD at 0.1, 256 images a step, for 90 epochs, and tests the last weights beside those best on validation;
  the built-in configuration is Baseline's.
- Beside the accuracy of `transform` the test reports that of all three (`acc_un`, `acc_l2n`, `acc_cl2n`), as the paper's tables do.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.baseline import Baseline
from metarun.config.types import DropRate, Le, PositiveFloat
from metarun.core import Backbone, Batch, Episodes, Spec
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_means, negative_squared_distances

TRANSFORMS = ["un", "l2n", "cl2n"]


class SimpleShot(Baseline):
    """A classifier of the source's images whose features, transformed, go to the nearest class mean. Test ways may be any.

    Args:
        transform: What is done to features: nothing, unit length, or centring and unit length.
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    metric = True
    mean: Tensor
    batches: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        transform: Literal["un", "l2n", "cl2n"] = "cl2n",
        mean_momentum: Annotated[PositiveFloat, Le(1)] = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(backbone, spec, label_smoothing=label_smoothing)
        self.transform = transform
        self.mean_momentum = mean_momentum
        self.register_buffer("mean", torch.zeros(backbone.features))
        self.register_buffer("batches", torch.tensor(0.0))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(batch.x)
        with torch.no_grad():
            self.batches += 1
            self.mean.lerp_(features.mean(0).to(self.mean), (1 / self.batches).clamp(min=self.mean_momentum))
        return self.classification_loss(self.head(features), batch)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int, transform: str) -> Tensor:
        """Negative squared distances `[T, Q, ways]` of the queries' features `[T, Q, D]` to the centroids."""
        if transform == "cl2n":
            support, query = support - self.mean, query - self.mean
        if transform != "un":
            support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
        centroids = class_means(support, labels, ways)
        # In double precision, in which the large terms may cancel.
        return negative_squared_distances(query.double(), centroids.double()).to(query.dtype)

    def predict(self, episodes: Episodes) -> Tensor:
        support, query = self.embed(episodes)
        with full_precision(support):
            return self.logits(support, episodes.support_y, query, episodes.ways, self.transform)

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """The accuracies `[T]` with each transformation."""
        support, query = self.embed(episodes)
        with full_precision(support):
            found = {
                f"acc_{name}": self.logits(support, episodes.support_y, query, episodes.ways, name)
                for name in TRANSFORMS
            }
        return {name: (logits.argmax(-1) == episodes.query_y).double().mean(1) for name, logits in found.items()}
