"""OML: Meta-Learning Representations for Continual Learning (Javed, White 2019).

https://arxiv.org/abs/1905.12588

    a trajectory: images of a few classes, class after class
    W_k = W_(k-1) - alpha grad_W L(W_(k-1); x_k, y_k)     one step for each image, of the head alone  (algorithm 2)
    (theta, W) <- (theta, W) - beta grad L_meta(theta, W_K), on images of the trajectory's classes and of all classes

The representation theta is learned through the whole sequence of steps, so that learning one class after the other forgets little.
At test time theta is fixed, the head is new, and each image of the support set is seen once, in order.

As in the official code (khurramjaved96/mrcl), the head is one linear layer over all training classes, the rows of a trajectory's
classes are drawn anew before it (He et al. 2015), or its classes would be known already, and the outer loss is that after the
last step. Its command trains on 3 classes of 5 images, an inner rate of 0.03, Adam at 0.0001, and as many images again of the same
classes and of all classes. Differences:
- The rows that are drawn anew are the trajectory's alone: the head's own rows of these classes stay, and learn where their classes are
  to be remembered. There they replace the head's own, and the outer step trains them.
- Trajectories are of any training classes; the code takes them from one half of these.
- The paper's prediction network has two layers; its code has one since 2020, and so is it here.
- The head's steps are computed from products of features (`metarun/ops/online.py`), which gives the same numbers.
- The paper's network has six convolutions of 256 channels without norm; here it is the backbone that `backbone=` names. Without a norm
  conv4's features start so small that the head's steps do nothing for a long time: the YAML's is `group`, of each image by itself.
- The meta-test of few-shot tasks, on which weights are selected, has a head of as many rows as the task has ways. Long
  sequences are `recipe=continual`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops import batch_norm
from metarun.ops.draws import randn
from metarun.ops.numerics import full_precision, linear_head, precise
from metarun.ops.online import kaiming, online_head, with_new_rows


class OML(Algorithm):
    """Learns features on which a linear head can learn from one image after the other. Test ways may be any.

    Args:
        inner_lr: The learning rate of the head's steps, for the cross-entropy of one image.
        test_inner_lr: The same at test time; null is as in training.
        remembered: The images of all training classes that the outer loss is measured on, beside those of the trajectory.
        reset: Whether the rows of a trajectory's classes are drawn anew before it.
    """

    trains_on = "sequences"
    soft_labels = False

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_lr: NonNegativeFloat = 0.03,
        test_inner_lr: NonNegativeFloat | None = None,
        remembered: NonNegativeInt = 15,
        reset: bool = True,
    ) -> None:
        super().__init__(backbone, spec)
        self.inner_lr, self.test_inner_lr = inner_lr, inner_lr if test_inner_lr is None else test_inner_lr
        self.remembered, self.reset = remembered, reset
        self.head = linear_head(backbone.features, spec.outputs)

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        def task(support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
            return batch_norm.both_sets(self.features_of, support_x, query_x)

        support, queries = self.over_tasks(task, episodes.support_x, episodes.query_x)
        return precise(support), precise(queries)

    def new_rows(self, episodes: Episodes) -> Tensor:
        """Rows of the head for the classes of each trajectory, `[T, L, D]`; zeros where none is drawn anew."""
        shape, weight = (*episodes.support_y.shape, self.backbone.features), self.head.weight
        if not self.reset:
            return weight.new_zeros(shape)
        return kaiming(randn(*shape, device=weight.device, dtype=weight.dtype))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, queries = self.embed(episodes)

        def task(features: Tensor, labels: Tensor, asked: Tensor, rows: Tensor) -> Tensor:
            weight = with_new_rows(self.head.weight, labels, rows) if self.reset else self.head.weight
            return online_head(weight, self.head.bias, features, labels, asked, self.inner_lr)

        with full_precision(queries):
            logits = self.over_tasks(task, support, episodes.support_y, queries, self.new_rows(episodes))
        return self.loss_and_scores(logits, episodes.query_y)

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        # The same new head for every task, and every time.
        draws = torch.randn(episodes.ways, support.shape[-1], generator=torch.Generator().manual_seed(0))
        weight = kaiming(draws).to(support)
        bias = torch.zeros_like(weight[:, 0])

        def task(features: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
            return online_head(weight, bias, features, labels, asked, self.test_inner_lr)

        with full_precision(queries):
            found: Tensor = self.over_tasks(task, support, episodes.support_y, queries)
        return found
