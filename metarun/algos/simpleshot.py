"""SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning (Wang, Chao, Weinberger, van der Maaten 2019).

https://arxiv.org/abs/1911.04623

Trained as a plain classifier of the source's classes. On a test task a query goes to the nearest mean of the support images'
features, which have been transformed (section 2.2): with m the mean feature of the source's images,

    CL2N:  (f(x) - m) / |f(x) - m|        L2N:  f(x) / |f(x)|        UN:  f(x)

A class's centroid is the mean of its transformed features and is not made a unit vector again; distances are Euclidean.

Differences from the official code (mileyan/simple_shot, src/train.py):
- There m is taken over all training images after training, in evaluation mode. Here it is the running mean of the features in training
  (`mean_momentum` for the newest batch; the mean of all batches so far, for as long as those are fewer than its inverse), so
  that validation has it too, and it knows the latest few hundred batches alone.
- There validation compares untransformed features, by their cosine in its configurations; here it does as testing does.
- It trains by SGD at 0.1, 256 images a step, for 90 epochs, and tests the last weights beside those best on validation;
  the built-in configuration is Baseline's.
- Beside the accuracy of `transform` the test reports that of all three (`acc_un`, `acc_l2n`, `acc_cl2n`), as the paper's tables do.
"""

from __future__ import annotations

from torch import Tensor

from metarun.algos.transformed import Transform, TransformedFeatures
from metarun.core import Episodes
from metarun.ops.metrics import hits
from metarun.ops.prototypes import class_means, negative_squared_distances

TRANSFORMS: list[Transform] = ["un", "l2n", "cl2n"]


class SimpleShot(TransformedFeatures):
    """A classifier of the source's images whose features, transformed, go to the nearest class mean. Test ways may be any.

    Args:
        transform: What is done to features: nothing, unit length, or centring and unit length.
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    metric = True

    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Negative squared distances `[T, Q, N]` of the queries to the centroids."""
        centroids = class_means(support, targets, targets.shape[-1])
        # In double precision, in which the large terms may cancel.
        return negative_squared_distances(queries.double(), centroids.double()).to(queries.dtype)

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """The accuracies `[T]` with each transformation."""
        found = {f"acc_{name}": self.predict_by(episodes, name) for name in TRANSFORMS}
        return {name: hits(logits, episodes.query_y).double().mean(1) for name, logits in found.items()}
