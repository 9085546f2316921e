"""ProtoTransfer: Self-Supervised Prototypical Transfer Learning for Few-Shot Classification (Medina, Devos, Grossglauser 2020).

https://arxiv.org/abs/2006.11325

    training (ProtoCLR):  ProtoNet's loss on tasks of single images and distorted copies (`unsupervised=prototransfer`)
    test (ProtoTune):     w_k = 2 c_k,  b_k = -||c_k||^2, then gradient steps of w and b on the support set (section 3.2)

Before the first step of ProtoTune the head is ProtoNet. The features are computed once: the backbone is not moved.

As in the official code (indy-lab/ProtoTransfer, `--ft_freeze_backbone`): Adam at 0.001, 15 epochs of batches of as many images as
the task has ways. Differences:
- Training is the loss of ProtoNet, on whatever tasks it is given. `unsupervised=prototransfer` makes the paper's.
- The order of the batches comes from a generator of its own, the same for every task and every time.
- The official code can move the backbone too, which it does for mini-ImageNet with many shots; here only the head moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision
from metarun.ops.optimizers import uncompiled
from metarun.ops.prototypes import class_means, negative_squared_distances
from metarun.ops.support import of_support


class ProtoTransfer(Algorithm):
    """Trains as ProtoNet does; at test time the prototypes are a linear head that gradient descent improves.

    Args:
        head_epochs: The passes over the support set that move a test task's head; 0 is ProtoNet.
        head_lr: The learning rate of the head (Adam).
    """

    metric = True
    recordable = True

    def __init__(
        self, backbone: Backbone, spec: Spec, *, head_epochs: NonNegativeInt = 15, head_lr: NonNegativeFloat = 0.001
    ) -> None:
        super().__init__(backbone, spec)
        self.head_epochs, self.head_lr = head_epochs, head_lr

    @property
    def test_steps(self) -> int:
        return self.head_epochs

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            prototypes = class_means(support, episodes.support_y, episodes.ways)
            logits = negative_squared_distances(queries, prototypes)
        return self.loss_and_scores(logits, episodes.query_y)

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            heads = of_support(lambda: self.tuned_heads(support.detach(), episodes.support_y, episodes.ways, steps))
            return torch.stack([queries @ weight.mT + bias[:, None] for weight, bias in heads])

    @torch.enable_grad()
    def tuned_heads(
        self, support: Tensor, labels: Tensor, ways: int, steps: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """The heads of T tasks, `[T, N, D]` and `[T, N]`, after each of the numbers of epochs in `steps`."""
        prototypes = class_means(support, labels, ways)
        weight = (2 * prototypes).requires_grad_()
        bias = (-prototypes.square().sum(-1)).requires_grad_()
        optimizer = uncompiled(torch.optim.Adam)([weight, bias], lr=self.head_lr)
        order = torch.Generator().manual_seed(0)
        kept = {}
        for epoch in range(max(steps) + 1):
            if epoch in steps:
                kept[epoch] = weight.detach().clone(), bias.detach().clone()
            if epoch == max(steps):
                break
            places = torch.randperm(support.shape[1], generator=order).to(support.device)
            for chosen in places.split(ways):
                optimizer.zero_grad()
                logits = support[:, chosen] @ weight.mT + bias[:, None]
                # The sum over tasks of their means: a task's head gets the gradient of its own.
                total = F.cross_entropy(logits.flatten(0, 1), labels[:, chosen].flatten(), reduction="sum")
                (total / len(chosen)).backward()
                optimizer.step()
        return [kept[step] for step in steps]
