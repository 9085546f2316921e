"""MTL: Meta-Transfer Learning for Few-Shot Learning (Sun, Liu, Chua, Schiele 2019).

https://arxiv.org/abs/1812.02391

A backbone that was trained as a plain classifier stays as it is (`recipe=pretrain_meta`); what learns from tasks is a scale for
each of its kernels, a shift for each of its biases, and the start of the head:

    SS(x; W, b) = (W * phi_1) x + (b + phi_2),  phi_1 = 1 [out, in, 1, 1] and phi_2 = 0 at first        (equation 6)
    theta' = theta - beta * grad_theta L_support(theta, phi), on the head alone, repeated               (equation 3)
    (phi, theta) <- (phi, theta) - gamma * grad L_query(theta', phi)                                    (equations 4 and 5)

Hard-task meta-batch (section 4.3): the classes that a step's tasks fail most on make tasks of their own.

Differences from the official code (yaoyao-liu/meta-transfer-learning, pytorch/):
- Hard tasks are not in its PyTorch code. The paper draws new images of each task's class of lowest accuracy. Episodes do not tell which
  classes they have, so here a hard task is made of the images at hand, of the ways with the largest query loss: the worst of each task
  first. Their features are those that they had in their own tasks, and two ways of a hard task may be of one class.
- There the normalisation's scale and shift are trained; here they are frozen and have shifts, which is the same. Scales learn at a tenth
  of the head's rate there (0.0001, 0.001); here phi is 1 + `scale_rate` * what the optimiser sees: for Adam the same again.
- As there, inner gradients are constants (`first_order`), and inner steps are 100 of 0.01 (by its run script).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.anil import ANIL
from metarun.backbones.scaled import ScaledBackbone
from metarun.config.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, Share
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.draws import gather, part
from metarun.ops.numerics import precise


class MTL(ANIL):
    """Learns to scale and shift a frozen backbone, and the start of the head, which alone has an inner loop as in ANIL.

    Args:
        inner_steps: The gradient steps of the head on a task's support set.
        inner_lr: The inner learning rate of the head.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether second derivatives are dropped.
        scale_rate: How fast the scales learn beside the head.
        hard_tasks: The hard tasks that each step has more, as a share of its tasks, rounded down.
    """

    regression = False
    recordable = False
    whole_batch = couples_tasks = True  # hard tasks are made of all tasks of a step
    equal_classes = True  # a way of a hard task may be of any task
    soft_labels = False

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 100,
        inner_lr: NonNegativeFloat = 0.01,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = True,
        scale_rate: PositiveFloat = 0.1,
        hard_tasks: Share = 0.25,
    ) -> None:
        super().__init__(
            ScaledBackbone(backbone, scale_rate),
            spec,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            test_inner_steps=test_inner_steps,
            first_order=first_order,
        )
        nn.init.kaiming_normal_(self.head.weight)
        self.hard_tasks = hard_tasks

    def inherit(self, earlier: Algorithm) -> None:
        """Takes over the weights of an earlier stage's backbone, of this method or of any other, as the frozen ones."""
        mine = self.backbone
        assert isinstance(mine, ScaledBackbone)
        same = isinstance(earlier.backbone, ScaledBackbone)
        (mine if same else mine.frozen).load_state_dict(earlier.backbone.state_dict())

    def solve(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """One task's logits `[N*Q, N]`, from its features."""
        (head,) = self.adapt_head(support, support_y, [self.inner.steps])
        return F.linear(query, **head)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, query = self.embed(episodes)
        logits = self.over_tasks(self.solve, support, episodes.support_y, query)
        losses = self.query_losses(logits, episodes.query_y)
        tasks_of_step = part()[2] or episodes.n_tasks
        hard = int(self.hard_tasks * tasks_of_step)
        shown = self.scores(logits, episodes.query_y)
        if not hard:
            return losses.mean(), shown
        ways = episodes.ways
        tasks, members = hardest(gather(losses.detach().unflatten(1, (ways, -1)).mean(-1)), hard)
        hard_support, hard_query = (gather(x).unflatten(1, (ways, -1))[tasks, members] for x in (support, query))
        labels = [torch.arange(ways, device=x.device)[:, None].expand(x.shape[:3]) for x in (hard_support, hard_query)]
        hard_sets = hard_support.flatten(1, 2), labels[0].flatten(1), hard_query.flatten(1, 2)
        hard_logits = self.over_tasks(self.solve, *hard_sets)
        hard_losses = self.query_losses(hard_logits, labels[1].flatten(1))
        # The ordinary tasks are this process's own, the hard ones those of the whole step.
        return (tasks_of_step * losses.mean() + hard * hard_losses.mean()) / (tasks_of_step + hard), shown

    @staticmethod
    def query_losses(logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropies `[T, N*Q]` of logits `[T, N*Q, N]`."""
        return F.cross_entropy(precise(logits).mT, labels, reduction="none")


def hardest(losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tasks and ways `[count, N]` that hard tasks are made of, from the mean losses `[T, N]` of the ways of T tasks.

    The worst way of each task comes first, the largest loss ahead, then the second worst of each, and so on.
    """
    worst, way = losses.sort(dim=1, descending=True)
    task = worst.argsort(dim=0, descending=True)
    chosen = task.T.flatten(), way.gather(0, task).T.flatten()
    tasks, ways = (x[: count * losses.shape[1]].unflatten(0, (count, -1)) for x in chosen)
    return tasks, ways
