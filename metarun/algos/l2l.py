"""L2L: Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016).

https://arxiv.org/abs/1606.04474

    theta_t+1 = theta_t + g_t,   (g_t, h_t+1) = m(grad_t, h_t, phi),   grad_t = grad_theta f(theta_t)
    L(phi) = E_f sum_t w_t f(theta_t),   all w_t = 1                                                (equation 3)

m preprocesses each gradient as appendix A says (`lstmlearner.preprocess`) and is a two-layer LSTM with a linear output, times
0.1, on every coordinate of theta by itself: one phi for all of them, a state for each. A task is an optimisee: the backbone with
a head of the task's ways, at random weights, and f its loss on the support set. The derivatives of grad_t are dropped.

Differences from the paper and its official code (google-deepmind/learning-to-learn):
- Backpropagation through `unroll` steps: training step k has segment k of the trajectory, modulo their number. There one
  optimisee goes through all segments, one training step each; here each step has its own tasks, and makes the updates before
  the segment anew. The official code adds f where a segment begins, which does not depend on phi.
- The official code has p = 5 and outputs times 0.01; here are the paper's. Forget gates begin with a bias of 1, as in it.
  100 steps of 128 new images each are the paper's MNIST; here are 10, each on the whole support set, which suffice.
- Weights begin IID Gaussian, as in the paper, with the mean and deviation of each tensor of the backbone as built (the
  official code: 0 and 0.01 for all, biases too). A task's draw is seeded by its support images: the same in any run.
- `objective=query` sums the losses of the queries, which few-shot learning is after, not those of the support set. The
  paper's MNIST network is backbone=mlp backbone.hidden=[20] algo.activation=sigmoid.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algos.lstmlearner import CoordinateLSTM, State, preprocess, support_gradient, unflatten
from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from metarun.core import Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.inner_loop import Params, call
from metarun.ops.numerics import precise
from metarun.ops.optimizers import uncompiled
from metarun.ops.support import of_support

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}


class LearnedOptimizer(nn.Module):
    """m: gradients `[n]` and the state so far to updates `[n]` and the next state."""

    def __init__(self, hidden: int, scale: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CoordinateLSTM(inputs, hidden, forget_bias=1.0) for inputs in (2, hidden)])
        self.output, self.scale = nn.Linear(hidden, 1), scale

    def forward(self, gradient: Tensor, before: Sequence[State | None]) -> tuple[Tensor, list[State]]:
        x, states = preprocess(gradient), []
        for layer, state in zip(self.layers, before, strict=True):
            states.append(layer(x, state))
            x = states[-1][0]
        return self.scale * (precise(self.output.weight @ x)[0] + self.output.bias), states


class L2L(MAML):
    """Learns an optimiser with two layers of `hidden` units; `rates` are those of the ones that `measures` compares it with.

    Args:
        inner_steps: The steps of the learned optimiser on a training task.
        test_inner_steps: The steps at test time; null is as in training.
        unroll: The inner steps through which a gradient flows.
        hidden: The units of each layer of the LSTM.
        output_scale: What the LSTM's output is multiplied by.
        objective: The set whose loss the optimiser is trained to lower.
        activation: The activation of the network that is optimised.
        rates: The learning rates of the optimisers that it is compared with; null compares with none.
    """

    fixed_ways = False
    recordable = False

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: PositiveInt = 10,
        test_inner_steps: NonNegativeInt | None = None,
        unroll: PositiveInt = 20,
        hidden: PositiveInt = 20,
        output_scale: PositiveFloat = 0.1,
        objective: Literal["support", "query"] = "support",
        activation: Literal["relu", "sigmoid"] = "relu",
        rates: dict[Literal["sgd", "adam", "rmsprop"], NonNegativeFloat] | None = None,
    ) -> None:
        super().__init__(backbone, spec, inner_steps=inner_steps, test_inner_steps=test_inner_steps)
        if backbone.norm == "running":
            raise UserError("backbone.norm=running: averages over other random networks; use batch, support or none")
        self.requires_grad_(False)
        self.optimizer = LearnedOptimizer(hidden, output_scale)
        self.unroll, self.objective, self.rates = unroll, objective, rates or {}
        self.soft_labels = objective == "query"  # those of queries that nothing is learned from would change nothing
        self.activation_hook = (lambda number, x: x.sigmoid()) if activation == "sigmoid" else None  # ReLUs change none

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        return self.head(self.backbone(x, n_support, self.activation_hook))

    def draw(self, episodes: Episodes) -> tuple[Tensor, Params]:
        """Random weights for each task `[T, n]`, and tensors of the shapes that they have with these tasks' ways."""
        seeds = [zlib.crc32(images.cpu().numpy().tobytes()) for images in episodes.support_x]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        like, drawn = {}, []
        for name, value in self.named_parameters():
            if not name.startswith("optimizer."):
                wide = name.startswith("head.") and self.spec.kind == "classification"
                like[name] = value.new_empty(episodes.ways, *value.shape[1:]) if wide else value
                noise = torch.stack([torch.randn(like[name].numel(), generator=each) for each in generators])
                drawn.append(value.mean() + value.std(correction=0) * noise.to(value))
        return torch.cat(drawn, dim=1), like

    def trajectory(self, theta: Tensor, like: Params, x: Tensor, y: Tensor, steps: int, free: int = 0) -> list[Tensor]:
        """The weights at the start, and after each update of the learned optimiser.

        Args:
            theta: The weights at the start, in one vector.
            like: The parameters that they are of, by name.
            x: The support images.
            y: Their labels.
            steps: The updates.
            free: How many of the first ones leave no graph.

        Returns:
            `steps` + 1 vectors.
        """
        visited, state = [theta], [None, None]
        for step in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= free):
                update, state = self.optimizer(support_gradient(self, like, visited[-1], x, y)[0], state)
                visited.append(visited[-1] + update)
        return visited

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        start, like = self.draw(episodes)
        first = step % -(-self.inner.steps // self.unroll) * self.unroll
        last = min(first + self.unroll, self.inner.steps)

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, theta: Tensor) -> Any:
            visited = self.trajectory(theta, like, support_x, support_y, last, free=first)[first + 1 :]
            x, y = (query_x, query_y) if self.objective == "query" else (support_x, support_y)
            losses = [self.task_loss(call(self, unflatten(at, like), x, support_x), y) for at in visited]
            return torch.stack(losses).sum(), call(self, unflatten(visited[-1].detach(), like), query_x, support_x)

        losses, predictions = self.over_tasks(task, *episodes.tensors, start)
        return losses.mean(), self.scores(predictions, episodes.query_y)

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        start, like = self.draw(episodes)

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, theta: Tensor) -> Tensor:
            visited = of_support(lambda: self.trajectory(theta, like, support_x, support_y, max(steps)))
            return torch.stack([call(self, unflatten(visited[step], like), query_x, support_x) for step in steps])

        return self.over_tasks(task, *episodes.tensors[:3], start).transpose(0, 1)

    @torch.no_grad()
    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """f along the trajectory, of m and of torch's optimisers from the same weights."""
        start, like = self.draw(episodes)
        x, y = episodes.support_x, episodes.support_y

        def learned(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            visited = self.trajectory(theta, like, x, y, self.test_steps)
            return torch.stack([support_gradient(self, like, at, x, y)[1] for at in visited])

        curves = {"loss_learned": self.over_tasks(learned, start, x, y)}
        for name, rate in self.rates.items():
            theta, losses = start.clone(), []
            optimizer = uncompiled(OPTIMIZERS[name])([theta], lr=rate)  # coordinate by coordinate: all tasks at once
            for _ in range(self.test_steps + 1):
                theta.grad, loss = self.over_tasks(lambda *task: support_gradient(self, like, *task), theta, x, y)
                losses.append(loss)
                optimizer.step()
            curves[f"loss_{name}"] = torch.stack(losses, dim=1)
        return curves
