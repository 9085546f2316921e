"""Self-training: Pseudo-Label (Lee 2013), around any method, on the unlabelled items of a task.

http://deeplearning.net/wp-content/uploads/2013/03/pseudo_label_final.pdf

    1. The method learns the support set and predicts the unlabelled items (`task.unlabelled`).
    2. Items whose largest probability is at least `threshold`, of each class the `per_class` most probable ones, join the
       support set with the predicted class as their label.
    3. The method learns the larger support set and predicts the queries. (Or steps 1 and 2 come again: `rounds`.)

That is what validation and tests do, with a method that was trained as always, also in `recipe=test`; with `in_training` the
training tasks are made so too, with `norm=running` by the averages that the steps before have left.

Differences from the paper:
- There one classifier is trained on all labelled and unlabelled images, with a weight of the pseudo-labels' loss that rises;
  here each task is learned anew, and a pseudo-label counts as much as a label.
- There labels are those of the current weights in every step; here there are `rounds` of them.
- `threshold` and `per_class` are not in it; the second is the hard selection of Li et al. 2019
  (https://arxiv.org/abs/1906.00562), whose soft weights and further inner steps are not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from metarun.config.types import PositiveInt, Share
from metarun.core import Algorithm, Episodes, MixedEpisodes, TaskShape, together
from metarun.data.source import EpisodeSampler
from metarun.errors import UserError
from metarun.ops.draws import at_task
from metarun.ops.modes import evaluating
from metarun.ops.running_averages import AveragesBefore
from metarun.wrappers.base import Wrapper


class SelfTraining(Wrapper):
    """Adds a task's unlabelled items to its support set, with the labels that the method predicts.

    Args:
        rounds: How often labels are predicted, each time with those before in the support set.
        threshold: The least probability of a pseudo-label.
        per_class: The most pseudo-labels of a class, its most probable ones; null takes all.
        in_training: Whether training tasks are made so too.
    """

    def __init__(
        self,
        method: Algorithm,
        validation: EpisodeSampler,
        *,
        rounds: PositiveInt = 1,
        threshold: Share = 0.0,
        per_class: PositiveInt | None = None,
        in_training: bool = False,
    ) -> None:
        super().__init__(method)
        name = type(method).__name__
        if method.spec.kind == "regression":
            raise UserError(
                "wrapper=self_training: predicts labels, but the data are regression tasks; leave the wrapper out"
            )
        if method.equal_classes:
            raise UserError(
                f"wrapper=self_training: makes classes of different sizes, and {name} needs equal ones; take another method"
            )
        if in_training and method.couples_tasks:
            raise UserError(
                f"wrapper.in_training=true: makes tasks of different sizes, and {name} learns from all tasks of a step at once; "
                "leave it at false"
            )
        self.rounds, self.threshold, self.per_class, self.in_training = rounds, threshold, per_class, in_training
        self.trains = in_training
        self.averages = AveragesBefore(method)
        self.recordable = method.recordable and not in_training

    def preparation(self) -> Callable[[Algorithm, Episodes], Episodes | MixedEpisodes]:
        return functools.partial(self_trained, rounds=self.rounds, threshold=self.threshold, per_class=self.per_class)

    def check_tasks(self, task: TaskShape, test_task: TaskShape) -> None:
        if self.in_training and not task.unlabelled:
            raise UserError(
                "wrapper.in_training=true: learns from the unlabelled items of training tasks, and they have none; add "
                "train.task.unlabelled=5, or leave it at false"
            )
        if not self.in_training and not test_task.unlabelled:
            raise UserError(
                "wrapper=self_training: learns from the unlabelled items of validation and test tasks, and they have none; add "
                "task.unlabelled=5, or leave the wrapper out"
            )

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.in_training or episodes.unlabelled_x is None:
            return self.method.loss(episodes, step)
        with self.averages.in_place():
            tasks = self.preparation()(self.method, episodes)
        losses, shown = [], []
        for number, task in enumerate(tasks.split(1)):
            with at_task(number):
                loss, scalars = self.method.loss(task, step)
            losses.append(loss)
            shown.append(scalars)
        return torch.stack(losses).mean(), {
            name: torch.stack([scalars[name] for scalars in shown]).mean() for name in shown[0]
        }


@torch.no_grad()
def self_trained(
    method: Algorithm, episodes: Episodes, *, rounds: int, threshold: float, per_class: int | None
) -> Episodes | MixedEpisodes:
    """Tasks whose support sets have the unlabelled items too, with predicted labels.

    Args:
        method: What predicts them, in evaluation mode.
        episodes: The tasks.
        rounds: How often they are predicted.
        threshold: The least probability of a pseudo-label.
        per_class: The most pseudo-labels of a class; None takes all.

    Returns:
        As many tasks in their order, class-major; the tasks themselves where they have no unlabelled items.
    """
    items = episodes.unlabelled_x
    if items is None:
        return episodes
    own = list(episodes.split(1))
    current: Episodes | MixedEpisodes = episodes
    with evaluating(method):
        for _ in range(rounds):
            found = list(own)
            for places, tasks in current.chunks():
                blank = tasks.support_y.new_zeros(len(places), items.shape[1])
                asked = tasks.with_queries(items[list(places)], blank)
                for place, probabilities in zip(places, method.predict(asked).double().softmax(-1), strict=True):
                    found[place] = with_labels(own[place], probabilities, threshold, per_class)
            current = together(found)
    return current


def with_labels(task: Episodes, probabilities: Tensor, threshold: float, per_class: int | None) -> Episodes:
    """One task whose support set has its unlabelled items of certain enough labels too.

    Args:
        task: The task.
        probabilities: Of the classes of each unlabelled item, `[U, N]`.
        threshold: The least probability.
        per_class: The most items of a class; None takes all.
    """
    assert task.unlabelled_x is not None
    certainty, labels = probabilities.max(-1)
    order = certainty.argsort(descending=True, stable=True)  # of each class the most probable first
    members = labels[order, None] == torch.arange(task.ways, device=labels.device)
    rank = (members.cumsum(0) * members).sum(-1)
    kept = (certainty[order] >= threshold) & (rank <= (per_class or len(labels)))
    order = order[kept]
    x = torch.cat([task.support_x[0], task.unlabelled_x[0, order]])
    y = torch.cat([task.support_y[0], labels[order]])
    by_class = y.argsort(stable=True)
    return task.with_support(x[by_class][None], y[by_class][None])
