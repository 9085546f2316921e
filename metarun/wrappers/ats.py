"""ATS: Meta-learning with an Adaptive Task Scheduler (Yao et al. 2021).

https://arxiv.org/abs/2110.14057

    eta_i = g(loss of task i, similarity of its support and query gradients; phi)    (section 4.1)
    choose B of the candidate tasks by softmax(eta), and train on these              (equation 3)
    phi <- phi - gamma * grad_phi log P(chosen) * (b - R)                            (equation 6, REINFORCE)

R is the performance on validation tasks after one step on the chosen tasks, b its mean so far. A small network phi thus learns
which tasks to train on: in the paper, to leave out those with wrong labels. `train.tasks_per_step` is the size of the pool.

Differences from the paper and its official code (huaxiuyao/ATS):
- One draw serves both the scheduler's and the learner's step; the official code updates phi first and draws again. The
  temperature of its second draw, 0.99^step (from where the learner learns) but at least `temperature`, holds for the
  one draw here; its first draw has 1.
- The two gradients are those of the method's own loss, on the queries and on the support set in their place, so that any
  method will do; the official code takes the losses of the network that was not adapted. Norms and cosines are of
  matrices and kernels, there of biases too. With `norm=running` the averages see the sets of every candidate.
- The method's loss is asked of one task at a time, so MTL has no hard tasks here.
- phi is trained by the run's optimiser, and from the first step; the official code has Adam 1e-3, starts from a learner that
  was trained before, and lets the scheduler alone learn in its first 2,000 steps.
- With several processes the choice is among the tasks of all, and each of them measures R.
- Validation tasks are drawn apart from those that select the weights, but from the same classes. R is measured as the
  method is tested: in evaluation mode, after `test_inner_steps`; there after the inner steps of training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.config.types import NonNegativeInt, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Episodes
from metarun.data.source import EpisodeSampler
from metarun.errors import UserError
from metarun.ops.draws import add_up, at_task, gather, of_the_step, part, settle_averages
from metarun.ops.inner_loop import Params
from metarun.ops.metrics import hits
from metarun.ops.modes import evaluating
from metarun.ops.numerics import full_precision, precise
from metarun.wrappers.base import Wrapper

APART = 10**6  # the first validation task of the scheduler; those before select the weights


class Scheduler(nn.Module):
    """A score for each of P candidate tasks, with the sizes of the official code (Miniimagenet/scheduler.py)."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.progress = nn.Embedding(100, 5)
        self.norms, self.cosines, self.losses = (
            nn.LSTM(size, 10, bidirectional=True) for size in (tensors, tensors, 1)
        )
        self.others = nn.Sequential(nn.Linear(65, 20), nn.Tanh(), nn.Linear(20, 10))
        self.score = nn.Sequential(nn.Linear(75, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, losses: Tensor, norms: Tensor, cosines: Tensor, percent: int) -> Tensor:
        """Scores `[P]` of losses `[P]` and of norms and cosines of gradients `[P, tensors]`; `percent` of training done."""
        pairs = ((self.norms, norms), (self.cosines, cosines), (self.losses, losses[:, None]))
        found = [module(values[None])[0][0] for module, values in pairs]
        progress = self.progress(torch.full((len(losses),), percent, device=losses.device))
        x = torch.cat([progress, *found], dim=1)
        others = (x.sum(1, keepdim=True) - x) / max(1, len(x) - 1)  # as in the official code
        scores: Tensor = self.score(torch.cat([x, self.others(others)], dim=1))
        return scores[:, 0]


class ATS(Wrapper):
    """Trains a method on `chosen` of the tasks of a step.

    Args:
        steps: The length of training, since the scheduler is told how far it is.
        chosen: The tasks of a step that are trained on.
        step_size: The size of the step that is tried out.
        temperature: The lowest temperature of the draw.
        validation_tasks: The validation tasks that the reward is measured on.
    """

    average: Tensor
    couples_tasks = True  # the scheduler compares all tasks of a step

    def __init__(
        self,
        method: Algorithm,
        validation: EpisodeSampler,
        *,
        steps: NonNegativeInt,
        chosen: PositiveInt = 2,
        step_size: PositiveFloat = 0.01,
        temperature: PositiveFloat = 0.1,
        validation_tasks: PositiveInt = 2,
    ) -> None:
        super().__init__(method)
        if not method.needs_queries:
            raise UserError(
                f"wrapper=ats: compares what support and queries teach, and {type(method).__name__} learns from no queries"
            )
        self.whole_batch = True  # the choice is among all tasks of the step
        self.validation = validation
        self.steps, self.chosen, self.step_size = steps, chosen, step_size
        self.temperature, self.validation_tasks = temperature, validation_tasks
        matrices = sum(value.ndim > 1 for value in self._learned().values())
        if not matrices:
            raise UserError(
                f"wrapper=ats: goes by the gradients of weights, and {type(method).__name__} on this backbone has none; "
                "leave the wrapper out"
            )
        self.scheduler = Scheduler(matrices)
        self.register_buffer("average", torch.zeros(()))

    def check(self, tasks: int) -> None:
        if tasks <= self.chosen:
            raise UserError(
                f"train.tasks_per_step={tasks}: are the tasks that wrapper=ats chooses {self.chosen} from; it must be more"
            )

    def _learned(self) -> Params:
        return {name: value for name, value in self.method.named_parameters() if value.requires_grad}

    def gradients(self, task: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor], Params]:
        """The method's loss on one task, what it logs, and its gradients."""
        params = self._learned()
        loss, shown = self.method.loss(task, step)
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
        return loss.detach(), shown, dict(zip(params, found, strict=True))

    def probabilities(self, losses: Tensor, query: list[Params], support: list[Params], step: int) -> Tensor:
        """Those with which the tasks of the step are drawn.

        Args:
            losses: The query losses of this process's tasks, `[n]`.
            query: The gradients of these.
            support: The gradients of the support losses.
            step: The number of the training step.

        Returns:
            The probabilities of all tasks of the step, `[P]`.
        """
        pairs = [
            [(q[name].flatten(), s[name].flatten()) for name in q if q[name].ndim > 1]
            for q, s in zip(query, support, strict=True)
        ]
        norms = torch.stack([torch.stack([q.norm() for q, _ in task]) for task in pairs])
        cosines = torch.stack([torch.stack([torch.cosine_similarity(q, s, dim=0) for q, s in task]) for task in pairs])
        percent = min(99, 100 * step // max(1, self.steps))
        with full_precision(losses):
            known = (gather(precise(value)) for value in (losses, norms, cosines))
            scores: Tensor = self.scheduler(*known, percent)
        chances = (scores / max(self.temperature, 0.99**step)).softmax(0)
        return chances.clamp_min(torch.finfo(chances.dtype).eps)  # none so small that it has no logarithm

    @torch.no_grad()
    def reward(self, step_along: Params, step: int) -> Tensor:
        """The accuracy (regression: minus the squared error) on validation tasks, one step against the gradient away."""
        params = self._learned()
        before = {name: value.detach().clone() for name, value in params.items()}
        for name, value in params.items():
            value -= self.step_size * step_along[name]
        start = APART + step * self.validation_tasks
        found = []
        with evaluating(self.method):
            for _, tasks in self.validation(start, start + self.validation_tasks).chunks():
                prediction = self.method.predict(tasks)
                if self.method.spec.kind == "regression":
                    score = -(precise(prediction) - tasks.query_y).square().mean()
                else:
                    score = hits(prediction, tasks.query_y).float().mean()
                found.append(score * (tasks.n_tasks / self.validation_tasks))
        for name, value in params.items():
            value.copy_(before[name])
        return torch.stack(found).sum()

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, _, total = part()
        self.check(total or episodes.n_tasks)
        found, support = [], []
        for number, task in enumerate(episodes.split(1)):
            with at_task(number):
                found.append(self.gradients(task, step))
                swapped = task.with_queries(task.support_x, task.support_y)
                support.append(self.gradients(swapped, step)[2])
        losses = torch.stack([loss for loss, _, _ in found])
        query = [gradients for _, _, gradients in found]
        probabilities = self.probabilities(losses, query, support, step)
        if not probabilities.isfinite().all():  # nothing can be drawn; the loop says what to do about such a loss
            return probabilities.sum(), {}
        with of_the_step():
            chosen = torch.multinomial(probabilities.detach().cpu(), self.chosen).tolist()
        own = [i - first for i in chosen if 0 <= i - first < len(query)]
        mean = {
            name: sum((query[i][name] for i in own), torch.zeros_like(value)) / self.chosen
            for name, value in query[0].items()
        }
        add_up(list(mean.values()))
        settle_averages()  # the reward is measured in evaluation mode
        reward = self.reward(mean, step)
        advantage = reward - self.average
        self.average += (reward - self.average) / (step + 1)
        # What is trained on is known by its gradient; this has that gradient, and the scheduler's.
        along = sum((value * mean[name]).sum() for name, value in self._learned().items())
        surrogate = along - advantage * probabilities[chosen].log().sum()
        shown = {name: gather(torch.stack([one[1][name] for one in found]))[chosen].mean() for name in found[0][1]}
        shown |= {"reward": reward, "largest_probability": probabilities.detach().max()}
        return gather(losses)[chosen].mean() + surrogate - surrogate.detach(), shown
