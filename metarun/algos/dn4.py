"""DN4: Revisiting Local Descriptor based Image-to-Class Measure for Few-shot Learning (Li et al. 2019).

https://arxiv.org/abs/1903.12290

    logit of class c for query q = sum_i sum_j cosine(x_i, x_i^j),  j = 1 ... k    (image-to-class measure)

x_i are the local descriptors of q, the columns of its feature map at each place; x_i^1 ... x_i^k are the nearest to
x_i by cosine of all descriptors of all support images of class c. A cross-entropy trains the backbone; there is
nothing else to train.

Differences from the official code (WenbinLee/DN4):
- The backbone ends its blocks as elsewhere here: conv4 with ReLU (there leaky, 0.2). As there the last two blocks do
  not pool (`unpooled`), which gives 21x21 descriptors for 84x84 images, of conv4 and of resnet12.
- The official code of 2019 (DN4_2019_Version) keeps its batch norms' averages fixed, and uses them, in all training
  after its first 10,000 episodes; that of 2023 does not. Here `norm=running` normalises training episodes by their own
  statistics to the end, support set and queries together, which there are apart.
- Features of a backbone without maps (mlp) are taken for one descriptor each.
- A descriptor of nothing but zeros has cosine 0 with all others (there: not a number), and a class of less than k
  descriptors counts all that it has (there: an error).
- Its Adam of 2019 starts at 0.005, of which each 100,000 episodes leave a twentieth, with betas 0.5 and 0.9; in 2023 it
  is SGD from 0.05, on a cosine. The YAML has Adam at 0.001 with torch's betas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.backbones.spatial import map_size, maps_of_sets
from metarun.config.types import NonNegativeInt, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision, precise


class DN4(Algorithm):
    """Classifies a query by how near its local descriptors are to those of each class. Train and test ways may differ.

    Args:
        neighbors: The nearest descriptors of a class that count, k.
        unpooled: The blocks at the end of the backbone that do not pool; 0 with backbone.downsample=stride.
    """

    recordable = True

    def __init__(
        self, backbone: Backbone, spec: Spec, *, neighbors: PositiveInt = 3, unpooled: NonNegativeInt = 2
    ) -> None:
        super().__init__(backbone, spec)
        map_size(backbone, spec.input_shape, unpooled=unpooled)  # or a UserError
        self.neighbors, self.unpooled = neighbors, unpooled

    def logits(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Sums of cosines to the nearest descriptors of each class, `[N*Q, N]`, of one task with so many images a class."""
        maps = maps_of_sets(self.backbone, support_x, query_x, unpooled=self.unpooled)
        with full_precision(query_x):
            # Descriptors [images, places, channels].
            support, queries = (F.normalize(precise(each).flatten(2).mT, dim=-1) for each in maps)
            support = support[support_y.argsort()]  # class by class
            if all(size == sizes[0] for size in sizes):
                return self.similarity(queries, support.reshape(len(sizes), -1, support.shape[-1]))
            classes = [images.flatten(0, 1)[None] for images in support.split(list(sizes))]
            return torch.cat([self.similarity(queries, each) for each in classes], dim=1)

    def similarity(self, queries: Tensor, classes: Tensor) -> Tensor:
        """Of queries `[Q, places, channels]` to classes of equally many descriptors `[N, descriptors, channels]`, `[Q, N]`."""
        cosines = torch.einsum("qpc,ndc->qpnd", queries, classes)
        nearest = cosines.topk(min(self.neighbors, classes.shape[1]), dim=-1, sorted=False).values
        return nearest.sum((1, 3))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        sizes = episodes.support_sizes
        return self.over_tasks(
            lambda support_x, support_y, query_x: self.logits(support_x, support_y, query_x, sizes),
            *episodes.tensors[:3],
        )
