"""RelationNet: Learning to Compare: Relation Network for Few-Shot Learning (Sung et al. 2018).

https://arxiv.org/abs/1711.06025

    r_ik = g(C(sum of f(x) over the support images of class k, f(x_i)))    (equation 1; C joins the channels)
    L = mean over i, k of (r_ik - 1[y_i = k])^2                            (equation 2, there a sum; the code's mean)

f gives feature maps, and g is two blocks of 3x3 convolution, norm, ReLU and 2x2 max-pool, then two linear layers and
a sigmoid. Logits are g before its sigmoid.

Differences from the official code (floodsung/LearningToCompare_FSL):
- f is the backbone with the pools of its last two blocks left out (`unpooled`), as there. But the first two
  convolutions of the official f have no padding: its maps are 5x5 for 28x28 and 19x19 for 84x84, where conv4's are
  7x7 and 21x21.
- g pads maps below 10x10, as there for Omniglot but not for mini-ImageNet; a map of one place is not pooled any more.
  g has the channels of the backbone's last block (there 64).
- The official batch norms never use averages, so at test time its queries see each other: that is `norm=batch`, but for
  f, which there normalises support set and queries apart, and here together. Here `running` is the default. With
  `norm=support` the pairs of the support images with all classes give g its statistics.
- The first convolution of g is applied to classes and queries apart and then added for each pair: the same sums, once
  an image instead of once a pair.
- The official code clips the gradients of f and g to a norm of 0.5 each; `train.clip_norm` in the YAML does so to both
  at once. Its rates are halved every 100,000 episodes, and its f starts as its g (here as the backbone does).
- Features of a backbone without maps (mlp) are taken for maps of one place.
- As there a class is a sum, not a mean: testing with other shots than in training changes its scale.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.spatial import map_size, maps_of_sets
from metarun.config.types import NonNegativeInt, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.batch_norm import Norm, both_sets
from metarun.ops.numerics import one_hot, precise
from metarun.ops.prototypes import class_sums


class Relation(nn.Module):
    """Scores of pairs of maps `[N, C, H, W]` of classes and `[B, C, H, W]` of images, `[B, N]`, before the sigmoid."""

    def __init__(self, size: tuple[int, int, int], hidden: int, norm: str) -> None:
        super().__init__()
        channels, height, width = size
        self.padding = 1 if min(height, width) < 10 else 0
        self.first = nn.Conv2d(2 * channels, channels, 3, padding=self.padding)
        self.second = nn.Conv2d(channels, channels, 3, padding=self.padding)
        self.norms = nn.ModuleList(Norm(channels, norm) for _ in range(2))
        for _ in range(2):
            height, width = (side - 2 + 2 * self.padding for side in (height, width))
            if min(height, width) > 1:
                height, width = height // 2, width // 2
        self.hidden = nn.Linear(channels * height * width, hidden)
        self.score = nn.Linear(hidden, 1)
        for conv in (self.first, self.second):  # the official code's start
            nn.init.normal_(conv.weight, std=(2 / (9 * channels)) ** 0.5)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        for layer in (self.hidden, self.score):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.ones_(layer.bias)

    def forward(self, classes: Tensor, images: Tensor, reference: int) -> Tensor:
        """The first `reference` images give the statistics of `norm="support"`."""
        channels, ways = classes.shape[1], len(classes)
        of_classes = F.conv2d(classes, self.first.weight[:, :channels], self.first.bias, padding=self.padding)
        of_images = F.conv2d(images, self.first.weight[:, channels:], padding=self.padding)
        pairs = (of_images[:, None] + of_classes).flatten(0, 1)
        pairs = self.pooled(self.norms[0](pairs, reference * ways))
        pairs = self.pooled(self.norms[1](self.second(pairs), reference * ways))
        return self.score(F.relu(self.hidden(pairs.flatten(1)))).unflatten(0, (-1, ways))[..., 0]

    @staticmethod
    def pooled(x: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x)


class RelationNet(Algorithm):
    """Classifies a query by a learned comparison of its feature map with each class's. Train and test ways may differ.

    Args:
        hidden: The units of the first linear layer of the comparison g.
        unpooled: The blocks at the end of the backbone that do not pool; 0 with backbone.downsample=stride.
    """

    recordable = True

    def __init__(
        self, backbone: Backbone, spec: Spec, *, hidden: PositiveInt = 8, unpooled: NonNegativeInt = 2
    ) -> None:
        super().__init__(backbone, spec)
        self.unpooled = unpooled
        self.relation = Relation(map_size(backbone, spec.input_shape, unpooled=unpooled), hidden, backbone.norm)

    def logits(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int) -> Tensor:
        """Relation scores before the sigmoid, `[N*Q, N]`, of one task."""
        support, queries = maps_of_sets(self.backbone, support_x, query_x, unpooled=self.unpooled)
        classes = class_sums(support.flatten(1), support_y, ways).unflatten(1, support.shape[1:]).to(support.dtype)
        if self.backbone.norm == "support":
            return both_sets(lambda maps, n: self.relation(classes, maps, n), support, queries)[1]
        return self.relation(classes, queries, 0)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, target = precise(self.predict(episodes)), episodes.query_y
        return F.mse_loss(logits.sigmoid(), one_hot(target, episodes.ways, logits.dtype)), self.scores(
            logits, episodes.query_y
        )

    def predict(self, episodes: Episodes) -> Tensor:
        return self.over_tasks(
            lambda support_x, support_y, query_x: self.logits(support_x, support_y, query_x, episodes.ways),
            *episodes.tensors[:3],
        )
