"""DeepBDC: Joint Distribution Matters, Deep Brownian Distance Covariance for Few-Shot Classification (Xie, Long, Lv, Wang, Li 2022).

https://arxiv.org/abs/2204.04567

An image's feature map, d channels at M places, becomes the matrix of the distances between channels, centred:

    A_kl = sqrt(t |x_k - x_l|^2 + 1e-5),    B = A - (row means) - (column means) + (mean)

Its upper triangle is the image's representation. A class's is the mean over its support images, and a query's logits are minus the
squared distances to the classes', with one shot the inner products (Meta DeepBDC). t is learned, from 1 / (2 M) at first.

Differences from the official code (Fei-Long121/DeepBDC):
- It takes the channels down to `reduce_dim` by a 1x1 convolution, unless the network has as many (256 of ResNet-18's 512; 640 with
  ResNet-12, which is what it has); the batch norm after it is of the backbone's kind here.
- The backbone's last block pools; there ResNet-12's does not: `unpooled=1`, or 2 for 21x21 places of conv4.
- The classifier of the source's classes that it starts from is recipe=pretrain_meta here, on plain features.
- A backbone without maps (mlp) has one place, and channels are compared by what they are there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.spatial import feature_maps, map_size
from metarun.config.types import NonNegativeInt, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.batch_norm import Norm, both_sets
from metarun.ops.numerics import full_precision, precise
from metarun.ops.prototypes import class_means, negative_squared_distances

OFFSET = 1e-5  # under the square root


class DeepBDC(Algorithm):
    """Classifies a query by how its channels depend on each other, compared with each class's mean. Train and test ways may differ.

    Args:
        unpooled: The blocks at the end of the backbone that do not pool; 0 with backbone.downsample=stride.
        reduce_dim: The channels that a 1x1 convolution leaves; null, or as many as there are, leaves them as they are.
    """

    recordable = True

    def __init__(
        self, backbone: Backbone, spec: Spec, *, unpooled: NonNegativeInt = 1, reduce_dim: PositiveInt | None = None
    ) -> None:
        super().__init__(backbone, spec)
        channels, height, width = map_size(backbone, spec.input_shape, unpooled=unpooled)
        self.unpooled = unpooled
        self.log_scale = nn.Parameter(torch.tensor(-math.log(2 * height * width)))
        self.reduction: nn.Conv2d | None = None
        if reduce_dim is not None and reduce_dim != channels:
            self.reduction = nn.Conv2d(channels, reduce_dim, 1, bias=False)
            nn.init.kaiming_normal_(self.reduction.weight, mode="fan_out")
            self.norm = Norm(reduce_dim, backbone.norm)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            means = class_means(support, episodes.support_y, episodes.ways)
            if max(episodes.support_sizes) == 1:
                return queries @ means.mT
            return negative_squared_distances(queries, means)

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The representations of every task's support set, `[T, N*K, d (d + 1) / 2]`, and queries."""

        def task(support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
            maps = both_sets(self.maps, support_x, query_x)
            with full_precision(query_x):
                support, queries = (distance_matrices(precise(each).flatten(2), self.log_scale.exp()) for each in maps)
                return support, queries

        support, queries = self.over_tasks(task, episodes.support_x, episodes.query_x)
        return support, queries

    def maps(self, images: Tensor, n_support: int | None = None) -> Tensor:
        """The feature maps, `[B, d, H, W]`."""
        found = feature_maps(self.backbone, images, n_support, unpooled=self.unpooled)
        return found if self.reduction is None else F.relu(self.norm(self.reduction(found), n_support))


def distance_matrices(x: Tensor, scale: Tensor | float) -> Tensor:
    """The upper triangles, `[..., d (d + 1) / 2]`, of the centred matrices of distances between channels `[..., d, M]`."""
    inner = x @ x.mT
    squares = inner.diagonal(dim1=-2, dim2=-1)
    between = (squares[..., :, None] + squares[..., None, :] - 2 * inner).clamp(min=0)
    distances = (scale * between + OFFSET).sqrt()
    means = distances.mean(-1)
    centred = distances - means[..., :, None] - means[..., None, :] + means.mean(-1)[..., None, None]
    rows, columns = torch.triu_indices(x.shape[-2], x.shape[-2], device=x.device)
    return centred[..., rows, columns]
