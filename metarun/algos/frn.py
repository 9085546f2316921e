"""FRN: Few-Shot Classification with Feature Map Reconstruction Networks (Wertheimer, Tang, Hariharan 2021).

https://arxiv.org/abs/2012.01506

With Q the r places of a query's feature map, `[r, d]`, and S those of all support images of a class, `[k r, d]`, ridge regression
reconstructs Q from S:

    Q' = rho Q (S^T S + lambda I)^-1 S^T S,    lambda = (k r / d) exp(a) + 1e-6,    rho = exp(b)
    logit = -gamma / r |Q - Q'|^2

a and b start at 0, gamma at 1; they are learned with the backbone. Training adds 0.03 times the squared products between the places of
different classes' support images, |S_i S_j^T|^2, all of which are divided by the norm of the task's whole support set first.

Differences from the official code (Tsingularity/FRN):
- There is no pretraining on the source's classes as matrices; recipe=pretrain_meta pretrains by another classifier.
- The auxiliary loss is the mean over tasks, like the other. It is the code's, whose weight is 0.03; in the paper places are unit vectors,
  and the sum of their squared cosines is some hundred thousand times as large.
- There ResNet-12's features are divided by the square root of their number, Conv4's are not: `downscale`.
- There the system is made and solved in single precision, in which it is singular for large features, and Q - Q' is what two nearly
  equal matrices leave. Here both are of double precision, and with P = lambda (S^T S + lambda I)^-1, Q' - Q = Q ((rho - 1) I - rho P).
- The blocks of the backbone all pool, as there: places are what the last block leaves, 5x5 of 84x84 images. Features of a backbone
  without maps count as one place.
- It trains with 20 ways by SGD at 0.1; the YAML has the ways of the tasks and Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from metarun.backbones.spatial import map_size, maps_of_sets
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision, one_hot, precise
from metarun.ops.support import of_support

LEAST = 1e-6  # added to lambda
ROUNDING = 1e-15  # of the sum of a class's squares, the least lambda


class FRN(Algorithm):
    """Classifies a query by how well each class's support features reconstruct its own. Train and test ways may differ.

    Args:
        unpooled: The blocks at the end of the backbone that do not pool; 0 with backbone.downsample=stride.
        downscale: Whether features are divided by the square root of their number, as the official code does with ResNet-12.
        auxiliary_weight: The weight of the loss that draws the classes' support features apart, in training.
    """

    recordable = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        unpooled: NonNegativeInt = 0,
        downscale: bool = False,
        auxiliary_weight: NonNegativeFloat = 0.03,
    ) -> None:
        super().__init__(backbone, spec)
        channels, _, _ = map_size(backbone, spec.input_shape, unpooled=unpooled)
        self.unpooled, self.auxiliary_weight = unpooled, auxiliary_weight
        self.divisor = math.sqrt(channels) if downscale else 1.0
        self.log_penalty = nn.Parameter(torch.zeros(()))
        self.log_rescaling = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, overlaps = self.compared(episodes, overlap)
        loss = self.task_loss(logits, episodes.query_y) + self.auxiliary_weight * overlaps.mean()
        return loss, self.scores(logits, episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        # The overlaps are of all pairs of the support set's places, which grow too many where nothing is trained by them.
        return self.compared(episodes, lambda support, members: support.new_zeros(()))[0]

    def compared(self, episodes: Episodes, beside: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits `[T, Q, N]` of T tasks, and what `beside` makes of the support maps and classes of each, `[T]`."""

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
            maps = maps_of_sets(self.backbone, support_x, query_x, unpooled=self.unpooled)
            with full_precision(query_x):
                support, queries = (precise(each).flatten(2).mT / self.divisor for each in maps)  # [images, r, d]
                members = one_hot(support_y, episodes.ways, support.dtype)
                return self.logits(support, members, queries), beside(support, members)

        logits, overlaps = self.over_tasks(task, *episodes.tensors[:3])
        return logits, overlaps

    def logits(self, support: Tensor, members: Tensor, queries: Tensor) -> Tensor:
        """One task's logits `[Q, N]`, of maps `[S, r, d]` and `[Q, r, d]` and one-hot classes `[S, N]`."""
        places, features = support.shape[1:]

        def residuals() -> Tensor:
            # The others are zero, and add nothing to S^T S.
            of_class = (members.mT[:, :, None, None] * support).double()
            squares = of_class.flatten(1, 2).mT @ of_class.flatten(1, 2)  # [N, d, d]
            penalty = members.sum(0).double() * places / features * self.log_penalty.double().exp() + LEAST
            # A smaller one would be lost in the squares' rounding.
            penalty = torch.maximum(penalty, ROUNDING * squares.diagonal(dim1=-2, dim2=-1).sum(-1))[:, None, None]
            identity = torch.eye(features, dtype=squares.dtype, device=squares.device)
            # What is not finite shall come out, and end the training, instead of an error here.
            inverse = torch.linalg.inv_ex(squares + penalty * identity).inverse
            rescaling = self.log_rescaling.double()
            return (rescaling.expm1() * identity - rescaling.exp() * penalty * inverse).to(support.dtype)

        errors = (queries.flatten(0, 1) @ of_support(residuals)).square().sum(-1)  # [N, Q r]
        return -self.scale * errors.unflatten(1, (-1, places)).mean(-1).mT


def overlap(support: Tensor, members: Tensor) -> Tensor:
    """The squared products between the places of different classes' support maps `[S, r, d]`, each pair of classes once, summed.

    The maps are divided by the norm of all of them together.
    """
    places = (support / support.norm().clamp_min(torch.finfo(support.dtype).tiny)).flatten(0, 1)
    classes = members.repeat_interleave(support.shape[1], dim=0)
    return ((places @ places.mT).square() * (1 - classes @ classes.mT)).sum() / 2
