"""ProtoNet: Prototypical Networks for Few-shot Learning (Snell, Swersky, Zemel 2017).

https://arxiv.org/abs/1703.05175

    c_k = mean of f(x) over the support images of class k                        (equation 1)
    p(y = k | x) = softmax_k(-d(f(x), c_k)),  d the squared Euclidean distance   (equation 2)

Differences from the official code (jakesnell/prototypical-networks): none in the method; its Adam's 0.001 is halved
every 2,000 episodes, the YAML's stays. There as here the support and query images of an episode go through the backbone
together, so with `norm=batch` or `running` a training episode shares its batch statistics; at test time `running` (the
official code's, and the default) uses the stored averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.core import Algorithm, Episodes
from metarun.ops.numerics import one_hot, precise


class ProtoNet(Algorithm):
    """Classifies a query by the nearest class mean of an embedding. Train and test ways may differ."""

    recordable = True

    def logits(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int) -> Tensor:
        """Negative squared distances to the prototypes, `[N*Q, N]`, of one task."""
        n_support = len(support_x)
        embedded = precise(self.backbone(torch.cat([support_x, query_x]), n_support))
        with torch.autocast(embedded.device.type, enabled=False):  # large terms that nearly cancel
            members = one_hot(support_y, ways, embedded.dtype)
            prototypes = members.T @ embedded[:n_support] / members.sum(0)[:, None]
            queries = embedded[n_support:]
            return 2 * queries @ prototypes.T - prototypes.square().sum(1) - queries.square().sum(1, keepdim=True)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.predict(episodes)
        return self.task_loss(logits, episodes.query_y), self.scores(logits, episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        return self.over_tasks(
            lambda support_x, support_y, query_x: self.logits(support_x, support_y, query_x, episodes.ways),
            *episodes.tensors[:3],
        )
