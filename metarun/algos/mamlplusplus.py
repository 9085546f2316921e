"""MAML++: How to train your MAML (Antoniou, Edwards, Storkey 2019).

https://arxiv.org/abs/1810.09502

    theta_k = theta_k-1 - alpha_k * grad L_support(theta_k-1),  k = 1 ... K, one alpha_k for each layer    (LSLR)
    theta, alpha <- descend on sum_k v_k L_query(theta_k),  the v_k at first 1/K, then moving to v_K       (MSL)

MAML with parts that can be switched one by one; with all of them off it is MAML:
- `multi_step_loss` (MSL): queries are classified after every inner step. By the formula of the official code v_k falls from 1/K
  to at least 0.03/K over `multi_step_loss_steps`, v_K is the rest; afterwards the last step's loss alone counts.
- `learned_rates` (LSLR): a rate for each inner step and each tensor of weights, all `inner_lr` at first.
- `per_step_norm` (BNWB): each norm has a scale and a shift for each inner step. They are learned in the outer loop only.
- `first_order_steps` (DA): so many steps of first order, then second. The paper has 50 epochs of first order, the official
  settings have none: 0.
- A cosine for the outer rate (CA) is the schedule of conf/algo/mamlplusplus.yaml; schedule=constant switches it off.

Checked against the official code (AntreasAntoniou/HowToTrainYourMAMLPytorch). Its per-step running averages (BNRS) are
collected, but its batch norm is always called in training mode (issues 3 and 24): they never normalise anything. So
`norm=batch`, the set's own statistics, is what it does, and there is no switch for them here. As there, queries after
step k pass the norms of that step, and no loss is taken before the first step, where the paper's sum begins at 0.
Differences:
- Its epochs (500 steps) are steps here: v_k moves in every step. Its rate K + 1, which nothing uses, is left out.
- It takes the test steps that it trains with; here further ones take the rates and norms of the last.
- Its network has leaky ReLUs and a Xavier-uniform head, ours ReLUs and a head near zero; its cosine ends at 1e-5, ours
  at 0 (train.schedule.eta_min); it clips the outer gradients of mini-ImageNet at 10 (train.clip_value).
- `per_step_norm` knows the norms of `backbone.norm` alone: where a backbone has none, or others, it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.batch_norm import Norm
from metarun.ops.inner_loop import Params, adapt, call, parameters


class MAMLPlusPlus(MAML):
    """MAML with the weighted loss of every inner step, learned inner rates and norms for each step, first order to begin with.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: Where the learned rates start, or what the rate stays at.
        test_inner_steps: The gradient steps at test time; null is as in training.
        multi_step_loss: Whether the query losses after all inner steps are weighted and summed, at the start of
            training.
        multi_step_loss_steps: The training steps over which the weight moves to the last inner step; the
            official settings have 5,000 of 50,000.
        learned_rates: Whether each tensor learns a rate for each inner step.
        per_step_norm: Whether each inner step has a norm's scales and shifts of its own.
        first_order_steps: The training steps without second derivatives at the start.
    """

    recordable = False  # the loss depends on the step

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: PositiveInt = 5,
        inner_lr: NonNegativeFloat = 0.1,
        test_inner_steps: NonNegativeInt | None = None,
        multi_step_loss: bool = True,
        multi_step_loss_steps: PositiveInt = 5000,
        learned_rates: bool = True,
        per_step_norm: bool = True,
        first_order_steps: NonNegativeInt = 0,
    ) -> None:
        super().__init__(backbone, spec, inner_steps=inner_steps, inner_lr=inner_lr, test_inner_steps=test_inner_steps)
        self.multi_step_loss_steps = multi_step_loss_steps if multi_step_loss else 0
        self.first_order_steps = first_order_steps
        norms = [name for name, module in self.named_modules() if per_step_norm and isinstance(module, Norm)]
        start = parameters(self)
        self.of_norms = [name for name in start if name.rpartition(".")[0] in norms]
        self.adapted = [name for name in start if name not in self.of_norms]
        self.rates = nn.ParameterDict()
        if learned_rates:
            self.rates.update({_key(name): nn.Parameter(inner_lr * torch.ones(inner_steps)) for name in self.adapted})
        self.later_norms = nn.ParameterDict()  # of the second step and on; the backbone's own are those of the first
        if inner_steps > 1:
            self.later_norms.update(
                {_key(name): nn.Parameter(start[name].detach().repeat(inner_steps - 1, 1)) for name in self.of_norms}
            )

    @torch.no_grad()
    def inherit(self, earlier: Algorithm) -> None:
        super().inherit(earlier)
        for name in self.of_norms if self.later_norms else []:
            self.later_norms[_key(name)].copy_(self.get_parameter(name))  # alike in every step

    def rates_of(self, number: int) -> float | Params:
        """The rates of the inner step `number`, from 0; after the last it is the last that counts."""
        if not self.rates:
            return self.inner.lr
        return {name: self.rates[_key(name)][min(number, self.inner.steps - 1)] for name in self.adapted}

    def norms_of(self, number: int) -> Params:
        """The scales and shifts of the inner step `number`, from 0."""
        number = min(number, self.inner.steps - 1)
        own = parameters(self)
        return {name: self.later_norms[_key(name)][number - 1] if number else own[name] for name in self.of_norms}

    def adapt(
        self, support_x: Tensor, support_y: Tensor, steps: Sequence[int], first_order: bool = False
    ) -> list[Params]:
        """One task's parameters after each of the numbers of inner steps in `steps`, with the norms that belong to them."""
        own = parameters(self)
        weights, norms = {name: own[name] for name in self.adapted}, self.norms_of(0)
        kept = {0: weights | norms}
        for number in range(max(steps)):
            norms = self.norms_of(number)

            def support_loss(params: Params, norms: Params = norms) -> Tensor:
                return self.task_loss(call(self, params | norms, support_x), support_y)

            (weights,) = adapt(
                support_loss, weights, steps=[1], learning_rate=self.rates_of(number), first_order=first_order
            )
            if number + 1 in steps:
                kept[number + 1] = weights | norms
        return [kept[number] for number in steps]

    def step_weights(self, step: int) -> dict[int, float]:
        """What the query loss after each inner step counts in training step `step`: 1 in all."""
        if step >= self.multi_step_loss_steps:
            return {self.inner.steps: 1.0}
        earlier = max(1 - step / self.multi_step_loss_steps, 0.03) / self.inner.steps
        counts = dict.fromkeys(range(1, self.inner.steps), earlier)
        return counts | {self.inner.steps: 1 - earlier * (self.inner.steps - 1)}

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        counts = self.step_weights(step)

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Tensor, Tensor]:
            learners = self.adapt(support_x, support_y, list(counts), first_order=step < self.first_order_steps)
            predictions = [call(self, params, query_x, support_x) for params in learners]
            losses = [
                count * self.task_loss(prediction, query_y)
                for count, prediction in zip(counts.values(), predictions, strict=True)
            ]
            return torch.stack(losses).sum(), predictions[-1].detach()

        losses, predictions = self.over_tasks(task, *episodes.tensors)
        return losses.mean(), self.scores(predictions, episodes.query_y)


def _key(name: str) -> str:
    """A parameter's name as `nn.ParameterDict` takes it."""
    return name.replace(".", "_")
