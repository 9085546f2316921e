"""The methods of learn2learn 0.2.0 (Arnold et al. 2020): an oracle for ours, and the baseline of the benchmark.

https://arxiv.org/abs/2008.12284

Its own wrappers do what is theirs: `algorithms.MAML` and `algorithms.MetaSGD` copy a module for each task (`clone`) and
take the inner steps (`adapt`), `nn.PrototypicalClassifier` holds the prototypes. Backbone, head, loss and settings are
those of our methods, so that on the same episodes both compute the same numbers. Neither its copies nor its classifier
run under `vmap`: tasks are taken one by one, as in its examples.

Differences from its examples (examples/vision): support and query set go through the network one after the other where
the norm is `batch` or `running`, for ANIL too; the outer loss is the mean over the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarun import optional
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.batch_norm import both_sets
from metarun.ops.inner_loop import InnerLoop
from metarun.ops.numerics import linear_head, precise


def features(body: nn.Module, x: Tensor, support_x: Tensor | None = None) -> Tensor:
    """`body(x)`, normalised with the statistics of `support_x` where the norm is `support`."""
    if support_x is None or getattr(body, "norm", None) != "support":
        return body(x)
    return both_sets(body, support_x, x)[1]


class Network(nn.Module):
    """What learn2learn copies and adapts."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        return self.head(features(self.body, x, support_x))


class MAML(Algorithm):
    """`learn2learn.algorithms.MAML`, with the settings of `metarun.algos.maml.MAML`.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether second derivatives are dropped.
    """

    regression = True
    fixed_ways = True
    vectorizable = False
    inner: InnerLoop

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 1,
        inner_lr: NonNegativeFloat = 0.5,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = False,
    ) -> None:
        super().__init__(backbone, spec)
        self.head = linear_head(backbone.features, spec.outputs)
        self.inner = InnerLoop(inner_steps, inner_lr, test_inner_steps, first_order)
        self.rates = nn.ParameterList()  # learned inner rates, if the wrapper has any
        self.rates = getattr(self.wrapper(), "lrs", self.rates)

    def wrapper(self) -> Any:
        """learn2learn's wrapper, made anew for every batch so that each weight has one name here."""
        return optional.learn2learn().algorithms.MAML(Network(self.backbone, self.head), lr=self.inner.lr)

    def inputs(self, support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        """What the adapted module is called with for one task's support and query set."""
        return support_x, query_x

    def over_wrapped(self, steps: Sequence[int], episodes: Episodes) -> Tensor:
        """Predictions `[T, len(steps), N*Q, N]` after each of the numbers of inner steps in `steps`."""
        first_order = self.inner.first_order or not torch.is_grad_enabled()
        wrapper = self.wrapper()

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            support, query = self.inputs(support_x, query_x)
            with torch.enable_grad():
                learner = wrapper.clone()
            predictions = {}
            for step in range(max(steps) + 1):
                if step:
                    with torch.enable_grad():
                        learner.adapt(self.task_loss(learner(support), support_y), first_order=first_order)
                if step in steps:
                    predictions[step] = learner(query, support)
            return torch.stack([predictions[step] for step in steps])

        return self.over_tasks(task, *episodes.tensors[:3])

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        predictions = self.over_wrapped([self.inner.steps], episodes)[:, 0]
        return self.loss_and_scores(predictions, episodes.query_y)

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        return self.over_wrapped(steps, episodes).transpose(0, 1)


class MetaSGD(MAML):
    """`learn2learn.algorithms.MetaSGD`: a learned rate for every weight, all `inner_lr` at first."""

    def wrapper(self) -> Any:
        network, rates = Network(self.backbone, self.head), self.rates if len(self.rates) else None
        return optional.learn2learn().algorithms.MetaSGD(network, lr=self.inner.lr, lrs=rates)


class ANIL(MAML):
    """`learn2learn.algorithms.MAML` on the head alone; each set goes through the backbone once a task."""

    def wrapper(self) -> Any:
        return optional.learn2learn().algorithms.MAML(Network(nn.Identity(), self.head), lr=self.inner.lr)

    def inputs(self, support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        return features(self.backbone, support_x), features(self.backbone, query_x, support_x)


class ProtoNet(Algorithm):
    """`learn2learn.nn.PrototypicalClassifier` on the backbone's features; train and test ways may differ."""

    vectorizable = False

    def __init__(self, backbone: Backbone, spec: Spec) -> None:
        super().__init__(backbone, spec)
        optional.learn2learn()  # refused here if it is missing

    def predict(self, episodes: Episodes) -> Tensor:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            support, query = (precise(x) for x in self.backbone.embed_sets(support_x, query_x))
            return optional.learn2learn().nn.PrototypicalClassifier(support, support_y)(query)

        return self.over_tasks(task, *episodes.tensors[:3])

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)
