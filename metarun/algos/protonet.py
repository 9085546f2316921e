"""ProtoNet: Prototypical Networks for Few-shot Learning (Snell, Swersky, Zemel 2017).

https://arxiv.org/abs/1703.05175

    c_k = mean of f(x) over the support images of class k                        (equation 1)
    p(y = k | x) = softmax_k(-d(f(x), c_k)),  d the squared Euclidean distance   (equation 2)

Differences from the official code (jakesnell/prototypical-networks): none in the method; its Adam's 0.001 is halved
every 2,000 episodes, the YAML's stays. After its training it trains anew on the training and validation classes together
(run_trainval.py), and tests that network; here the weights that were best on validation are tested. There as here the
support and query images of an episode go through the backbone together, so with `norm=batch` or `running` a training
episode shares its batch statistics; at test time `running` (the official code's, and the default) uses the stored
averages.
"""

from __future__ import annotations

from torch import Tensor

from metarun.core import Algorithm, Episodes
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_means, negative_squared_distances


class ProtoNet(Algorithm):
    """Classifies a query by the nearest class mean of an embedding. Train and test ways may differ."""

    metric = True
    recordable = True

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            prototypes = class_means(support, episodes.support_y, episodes.ways)
            return negative_squared_distances(queries, prototypes)
