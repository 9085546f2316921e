"""Meta-Baseline: Exploring Simple Meta-Learning for Few-Shot Learning (Chen, Liu, Xu, Darrell, Wang 2021).

https://arxiv.org/abs/2003.04390

    w_c = mean of f(x) over the support images of class c               (equation 1)
    p(y = c | x) = softmax_c(tau * <f(x), w_c> / (|f(x)| |w_c|))        (equation 3; tau is learned)

The second of two stages: f is first trained as a plain classifier of the source (Classifier-Baseline, which is `algo=baseline`
tested by this method's rule), and this goes on from there in episodes (`recipe=pretrain_meta`).

Differences from the official code (yinboc/few-shot-meta-baseline): there all tasks of a step go through the backbone
together and share the statistics of their batch; here each task has its own. It trains the second stage by SGD at 0.001 with weight
decay 0.0005, 4 tasks a step; the built-in configuration has Adam, which serves from scratch as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.protonet import ProtoNet
from metarun.config.types import PositiveFloat
from metarun.core import Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_sums


class MetaBaseline(ProtoNet):
    """Classifies a query by its cosine to each class mean of an embedding. Train and test ways may differ.

    Args:
        temperature: Where the factor of the cosines, tau, starts.
        learn_temperature: Whether the factor is learned.
    """

    def __init__(
        self, backbone: Backbone, spec: Spec, *, temperature: PositiveFloat = 10.0, learn_temperature: bool = True
    ) -> None:
        super().__init__(backbone, spec)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)), learn_temperature)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            centres = F.normalize(class_sums(support, episodes.support_y, episodes.ways), dim=-1)
            return self.temperature * F.normalize(queries, dim=-1) @ centres.mT
