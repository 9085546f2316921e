"""Reptile: On First-Order Meta-Learning Algorithms (Nichol, Achiam, Schulman 2018).

https://arxiv.org/abs/1803.02999

    phi <- phi + epsilon * mean_i (U_i^k(phi) - phi)            (the batched version)

U_i^k is k steps of the inner optimiser on mini-batches of task i: Adam with beta1 = 0, as in the paper's experiments.
The outer optimiser is SGD whose learning rate is epsilon (1, falling linearly to 0), for which `loss` has the gradient
phi - mean_i U_i^k(phi). A training task has support images only.

As in the official code (openai/supervised-reptile), Adam's second moments are carried from task to task in training, and
a test task starts from those that training ended with (issue 28). The defaults are its 5-way Omniglot flags, but for
fewer steps. Differences:
- The tasks of a meta-batch start from the same moments and their results are averaged, where the official code runs the
  tasks one after the other through one Adam; all tasks of a meta-batch draw the same mini-batch positions.
- A mini-batch is at most the support set; there it goes on into the next pass and holds images twice.
- At test time `norm=batch` classifies all queries together (the paper's "transductive"). Its non-transductive rows
  normalise each query together with the support set; nearest is `norm=support`, the support set's statistics alone.
- Its Omniglot has 1,200 training characters and none for validation, test characters are not turned, and a test task has one query
  a class. Here `data.split=random` keeps 100 of the 1,200 to select weights on, `data.rotations` turns the characters of all splits,
  and queries are 15 a class unless told (`test.task.queries`).
- The head starts near zero (there Glorot-uniform); Adam's epsilon is added to the corrected root, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.draws import of_the_step
from metarun.ops.inner_loop import InnerLoop, Params, call, gradient_and_value, parameters
from metarun.ops.numerics import linear_head
from metarun.ops.support import of_support


class Reptile(Algorithm):
    """Moves the initialisation towards the weights that `inner_steps` of Adam reach on each task.

    Args:
        inner_steps: The steps of Adam on a task's support set.
        inner_lr: The learning rate of Adam.
        inner_batch: The support images of a step, at most the whole support set.
        inner_beta2: The decay of Adam's second moments.
        test_inner_steps: The steps at test time; null is as in training.
        test_inner_batch: The support images of a step at test time; null is as in training.
    """

    regression = True
    inner: InnerLoop
    fixed_ways = True
    taken: Tensor  # Adam steps so far

    whole_batch = couples_tasks = True  # one update of Adam's moments a step
    soft_labels = False  # a class is what its examples are drawn from
    needs_queries = False

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 5,
        inner_lr: NonNegativeFloat = 0.001,
        inner_batch: PositiveInt = 10,
        inner_beta2: DropRate = 0.999,
        test_inner_steps: NonNegativeInt | None = 50,
        test_inner_batch: PositiveInt | None = 5,
    ) -> None:
        super().__init__(backbone, spec)
        self.head = linear_head(backbone.features, spec.outputs)
        self.inner = InnerLoop(inner_steps, inner_lr, test_inner_steps)
        self.inner_batch, self.inner_beta2 = inner_batch, inner_beta2
        self.test_inner_batch = inner_batch if test_inner_batch is None else test_inner_batch
        self.moments = nn.Module()  # Adam's second moments, one buffer a parameter
        for name, value in parameters(self).items():
            self.moments.register_buffer(name.replace(".", "_"), torch.zeros_like(value))
        self.register_buffer("taken", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        return self.head(self.backbone(x, n_support))

    @staticmethod
    def positions(n_support: int, batch: int, steps: int, generator: torch.Generator | None = None) -> Tensor:
        """Mini-batches `[steps, batch]`: shuffled passes over the support set, one after the other."""
        batch = min(batch, n_support)
        passes = max(1, -(-steps * batch // n_support))
        shuffled = [torch.randperm(n_support, generator=generator) for _ in range(passes)]
        return torch.cat(shuffled)[: steps * batch].view(steps, batch)

    def descend(
        self, support_x: Tensor, support_y: Tensor, positions: Tensor, keep: Sequence[int]
    ) -> tuple[list[Params], Params, Tensor]:
        """One task's parameters after each of `keep` steps, Adam's second moments, and the last mini-batch's loss."""
        params = {name: value.detach() for name, value in parameters(self).items()}
        moments = {name: getattr(self.moments, name.replace(".", "_")) for name in params}
        loss = torch.zeros((), device=support_x.device)
        kept = {0: params}
        for step, rows in enumerate(positions, start=1):

            def batch_loss(candidate: Params, rows: Tensor = rows) -> Tensor:
                return self.task_loss(call(self, candidate, support_x[rows]), support_y[rows])

            gradients, loss = gradient_and_value(batch_loss, params, create_graph=False)
            # Of the type of the loss: the items may be whole numbers, as word pieces are.
            correction = (1 - self.inner_beta2 ** (self.taken + step)).to(loss.dtype)
            moments = {
                name: self.inner_beta2 * moment + (1 - self.inner_beta2) * gradients[name].square()
                for name, moment in moments.items()
            }
            params = {
                name: value - self.inner.lr * gradients[name] / ((moments[name] / correction).sqrt() + 1e-8)
                for name, value in params.items()
            }
            kept[step] = params
        return [kept[step] for step in keep], moments, loss

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        steps = self.inner.steps
        with of_the_step():
            positions = self.positions(episodes.support_x.shape[1], self.inner_batch, steps)
        positions = positions.to(episodes.support_x.device)

        def task(support_x: Tensor, support_y: Tensor) -> tuple[Params, Params, Tensor]:
            (adapted,), moments, loss = self.descend(support_x, support_y, positions, [steps])
            return adapted, moments, loss

        adapted, moments, losses = self.over_tasks(task, episodes.support_x, episodes.support_y)
        for name, moment in moments.items():
            getattr(self.moments, name.replace(".", "_")).copy_(moment.mean(0))
        self.taken += steps
        pull = torch.stack([
            (value * (value - adapted[name].mean(0)).detach()).sum() for name, value in parameters(self).items()
        ]).sum()  # fmt: skip
        # The value shown is the inner loss; the gradient is the pull towards the adapted weights.
        return pull - pull.detach() + losses.mean(), {}

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        # The same positions in every test task, whatever it is tested with.
        generator = torch.Generator().manual_seed(0)
        positions = self.positions(episodes.support_x.shape[1], self.test_inner_batch, max(steps), generator)
        positions = positions.to(episodes.support_x.device)

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            learners, _, _ = of_support(lambda: self.descend(support_x, support_y, positions, steps))
            return torch.stack([call(self, params, query_x, support_x) for params in learners])

        return self.over_tasks(task, *episodes.tensors[:3]).transpose(0, 1)
