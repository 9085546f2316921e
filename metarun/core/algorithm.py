"""The contract that a method fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.core.backbone import Backbone
from metarun.core.episodes import Episodes, MixedEpisodes, Spec
from metarun.errors import UserError
from metarun.ops import batch_norm
from metarun.ops.inner_loop import InnerLoop
from metarun.ops.measures import ACCURACY
from metarun.ops.numerics import precise
from metarun.ops.tasks import over_tasks


class Algorithm(Checked, nn.Module, ABC):
    """A method: a batch of episodes (or of labelled images) in, a loss out; a batch of test episodes in, predictions out.

    It owns no optimiser, no device and no loop. Its keyword-only `__init__` arguments are its configuration:
    typed, with the paper's values as defaults. `backbone` and `spec` are handed in by the builder. In shapes T is the tasks,
    N the ways, K the shots and Q the queries of a class.

    Attributes:
        trains_on: What `loss` is given: `Episodes`, a `Batch` of images, or `Episodes` whose labels are those among all
            training classes (`metarun.data.sequences`).
        remembered: The images of all training classes among the queries of a training sequence.
        uses_target: What a method that trains on batches sees of a target.
        regression: Whether it can learn regression tasks.
        fixed_ways: Whether test tasks need the ways that it was trained with.
        shared_batch: Whether a task's support set and queries are one batch for the backbone's norm.
        equal_classes: Whether all classes of a task must have equally many items.
        whole_batch: Whether `loss` is computed for all tasks of a step at once.
        couples_tasks: Whether `loss` mixes the tasks of a step, which then must all have one shape.
        needs_queries: Whether training tasks need a query set.
        vectorizable: Whether its tasks can run by vmap.
        soft_labels: Whether the labels of training queries may be probabilities, `[T, N*Q, N]`.
        couples_queries: Whether the method itself, whatever the norm, predicts a query by other queries too.
        assumes_balanced_queries: Whether it supposes equally many queries of each class in a test task.
        uses_unlabelled: Whether it learns from the unlabelled items of a task.
        metric: Whether it classifies by distances, of `embed`, to support examples or their means.
        recordable: Whether `loss` does the same operations in every step, none of them random.
        inner: The settings of the inner loop; None for a method without one.
        prepare: What a wrapper makes of tasks before they are predicted (see `prepared`); None leaves them as they are.
        vectorize: Whether its tasks run by vmap instead of in a loop; set by the builder from `hardware.vectorize`.
        backbone: The network that it trains, handed in.
        spec: The shapes of its items and outputs, handed in.
    """

    configured_by = "algo"
    trains_on: Literal["episodes", "batches", "sequences"] = "episodes"
    remembered: int = 0
    uses_target: Literal["no", "images", "labels"] = "no"
    regression: bool = False
    fixed_ways: bool = False
    shared_batch: bool = True
    equal_classes: bool = False
    whole_batch: bool = False
    couples_tasks: bool = False
    needs_queries: bool = True
    vectorizable: bool = True
    soft_labels: bool = True
    couples_queries: bool = False
    assumes_balanced_queries: bool = False
    uses_unlabelled: bool = False
    metric: bool = False
    recordable: bool = False
    inner: InnerLoop | None = None
    prepare: Callable[[Algorithm, Episodes], Episodes | MixedEpisodes] | None = None
    vectorize: bool = False

    def __init__(self, backbone: Backbone, spec: Spec) -> None:
        super().__init__()
        if spec.kind == "regression" and not self.regression:
            raise UserError(
                f"algo: {type(self).__name__} only classifies, but the data are regression tasks; try algo=maml"
            )
        self.backbone = backbone
        self.spec = spec

    @property
    def transductive(self) -> bool:
        """Whether the prediction for a query depends on the other queries."""
        return self.couples_queries or batch_norm.transductive(self.backbone.norm)

    def check(self, tasks: int, *, earlier: Algorithm | None) -> None:
        """Checks that it can train as it is to train, before anything is trained.

        Args:
            tasks: The tasks (images, for methods on batches) of a step, over all processes.
            earlier: The method of the stage that it takes over from (`inherit`); None where it starts anew.

        Raises:
            UserError: It cannot.
        """

    @abstractmethod
    def loss(self, episodes: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of a training step.

        Args:
            episodes: The tasks of the step, `Episodes`; a `Batch` of images where `trains_on` is "batches".
            step: The number of the step, from 0.

        Returns:
            The mean loss over the tasks, a scalar with a graph; and detached scalars to log, by name (`acc`, say).
        """

    def features_of(self, x: Tensor, n_support: int | None = None) -> Tensor:
        """Computes features of items as the method's head gets them, `[B, D]`, in single precision at least.

        Args:
            x: The items, `[B, ...]`.
            n_support: How many of the leading rows are a support set, for the norm `support`.
        """
        return precise(self.backbone(x, n_support))

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Computes features of every task's support set, `[T, N*K, D]`, and queries, `[T, N*Q, D]`, in single precision at least.

        A task's sets go through the backbone apart from those of other tasks; whether they share the statistics of its norm
        is `shared_batch`'s to say. Where the features are the items themselves, nothing is computed for any of them.

        Args:
            episodes: The tasks, whose sets are `[T, N*K, ...]` and `[T, N*Q, ...]`.
        """
        if self.backbone.identity:
            return precise(episodes.support_x.flatten(2)), precise(episodes.query_x.flatten(2))

        def task(support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
            return self.backbone.embed_sets(support_x, query_x, shared_batch=self.shared_batch)

        support, queries = self.over_tasks(task, episodes.support_x, episodes.query_x)
        return precise(support), precise(queries)

    def embed_all(self, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
        """Does as `embed`, with the features of the unlabelled items, `[T, U, D]`, which go through the backbone with the queries.

        U is 0 where the tasks have none.

        Args:
            episodes: The tasks, whose unlabelled items are `[T, U, ...]`, or None.
        """
        if episodes.unlabelled_x is None:
            support, queries = self.embed(episodes)
            return support, queries, queries[:, :0]
        rest = torch.cat([episodes.query_x, episodes.unlabelled_x], 1)
        support, found = self.embed(replace(episodes, query_x=rest))
        size = found.shape[1] - episodes.unlabelled_x.shape[1]  # the queries: a wrapper may have mixed them with others
        return support, found[:, :size], found[:, size:]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.predict is Algorithm.predict and cls.predict_after is Algorithm.predict_after:
            raise TypeError(f"{cls.__name__} must define predict, or predict_after if it has inner steps")

    def predict(self, episodes: Episodes) -> Tensor:
        """Predicts the labels of the queries, without reading `query_y`.

        A method with inner steps defines `predict_after` alone; any other defines this.

        Args:
            episodes: The tasks.

        Returns:
            Logits `[T, N*Q, N]`; in regression values `[T, Q, outputs]`.
        """
        return self.predict_after(episodes, [self.test_steps])[0]

    def inherit(self, earlier: Algorithm) -> None:
        """Takes over what an earlier stage learned: the weights of its backbone.

        Args:
            earlier: The method of that stage, whose backbone is built as this one is.
        """
        self.backbone.load_state_dict(earlier.backbone.state_dict())

    def classify(self, x: Tensor) -> Tensor:
        """Classifies images among the classes of training: the target's, if the method saw their labels.

        Args:
            x: Images `[B, C, H, W]`.

        Returns:
            Logits `[B, classes]`.

        Raises:
            NotImplementedError: The method has no classes of its own (`has_classes`).
        """
        raise NotImplementedError(f"{type(self).__name__} has no classes of its own")

    @property
    def has_classes(self) -> bool:
        """Whether it has classes of its own, which `classify` tells apart: those of its training, where it trains on batches."""
        return self.trains_on == "batches" and type(self).classify is not Algorithm.classify

    @property
    def test_steps(self) -> int:
        """Inner steps that `predict` takes at test time; 0 for a method without an inner loop."""
        inner = self.inner
        return 0 if inner is None else inner.steps if inner.test_steps is None else inner.test_steps

    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        """Predicts after each of several numbers of inner steps.

        The base class serves methods without an inner loop, for which `steps` is `[0]`.

        Args:
            episodes: The tasks.
            steps: The numbers of inner steps, each at least 0.

        Returns:
            What `predict` returns, for each of `steps`: `[len(steps), T, N*Q, N]`.
        """
        return self.predict(episodes)[None]

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """Computes further measures that the method's paper reports.

        Only a meta-test calls it; the means over the episodes go to `result.json` under `test/`, with their intervals.

        Args:
            episodes: The tasks.

        Returns:
            Values `[T]` or curves `[T, points]`, by name.
        """
        return {}

    def prepared(self, episodes: Episodes) -> Episodes | MixedEpisodes:
        """Gives the tasks that are predicted: these, or what a wrapper makes of them (`Wrapper.preparation`).

        Args:
            episodes: The tasks.

        Returns:
            As many tasks with the same queries, in their order.
        """
        return episodes if self.prepare is None else self.prepare(self, episodes)

    def over_tasks(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Calls a function for every task, in a loop or by `vmap` (`metarun.ops.tasks.over_tasks`).

        Args:
            function: A function of one task's tensors; it returns a tensor, or a dict or tuple of tensors.
            tensors: Tensors with the task axis first.

        Returns:
            Its results, stacked along a new first axis.
        """
        return over_tasks(function, *tensors, vectorize=self.vectorize)

    def loss_and_scores(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes `task_loss` and `scores` of the same predictions, which `loss` of a method that is trained on its predictions returns.

        Args:
            prediction: Logits `[..., N]`, or values.
            target: Labels `[...]`, probabilities `[..., N]`, or values.
        """
        return self.task_loss(prediction, target), self.scores(prediction, target)

    def task_loss(self, prediction: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Computes the mean cross-entropy of a classification step, or the mean squared error of a regression step.

        Args:
            prediction: Logits `[..., N]`, or values.
            target: Labels `[...]`, probabilities `[..., N]`, or values.
            smoothing: The share of each label that is spread over all classes, from 0 to 1.

        Returns:
            A scalar in single precision at least.
        """
        if self.spec.kind == "regression":
            return F.mse_loss(precise(prediction), target)
        labels = target.flatten(0, -2) if target.is_floating_point() else target.flatten()  # probabilities, or classes
        return F.cross_entropy(precise(prediction).flatten(0, -2), labels, label_smoothing=smoothing)

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Computes the scores that are logged with the loss: the query accuracy of a classification step.

        Args:
            prediction: Logits `[..., N]`, or values.
            target: Labels `[...]`, probabilities `[..., N]`, or values.

        Returns:
            Detached scalars by name; none in regression.
        """
        if self.spec.kind == "regression":
            return {}
        target = target.argmax(-1) if target.is_floating_point() else target
        right = prediction.detach().argmax(-1) == target
        return {ACCURACY: right.to(precise(prediction).dtype).mean()}
