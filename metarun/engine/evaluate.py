"""The one evaluator: any algorithm, on a fixed range of episodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarun.core import Algorithm, Batch, Episodes
from metarun.core.backbone import IMAGES_AT_ONCE
from metarun.data.image_batches import Labelled
from metarun.data.source import EpisodeSampler
from metarun.engine.hardware import Hardware
from metarun.engine.views import Views
from metarun.errors import UserError
from metarun.ops import batch_norm, metrics
from metarun.ops.modes import evaluating


@dataclass
class Scores:
    """The scores of episodes after each number of inner steps.

    Args:
        steps: The numbers of inner steps.
        values: Accuracies in [0, 1], or mean squared errors, float64 `[len(steps), episodes]`.
        power: The mean squared target of regression tasks; 0 in classification.
        loss: The mean loss on the queries after the last of `steps`.
        measures: The method's own measures by name, float64 `[episodes]` or `[episodes, points]`; empty where they were not
            wanted.
        undefined: The tasks of classification with a prediction that is no number after the last of `steps`, as where
            inner steps diverge. It counts as wrong, and as a guess in all that goes by probabilities.
    """

    steps: list[int]
    values: Tensor
    power: float
    loss: float
    measures: dict[str, Tensor]
    undefined: int = 0

    @property
    def final(self) -> Tensor:
        """The scores after the last of `steps`, `[episodes]`."""
        return self.values[-1]


@torch.no_grad()
def evaluate(
    algorithm: Algorithm,
    sampler: EpisodeSampler,
    episodes: int,
    hardware: Hardware,
    steps: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
    measure: bool = False,
    observe: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    curves: bool = True,
    views: Views | None = None,
) -> Scores:
    """Tests a method on the episodes 0 to `episodes`, in evaluation mode; the ranks share them.

    Args:
        algorithm: The method.
        sampler: The episodes of a range of numbers.
        episodes: How many there are, at least 1.
        hardware: Where they are computed.
        steps: The numbers of inner steps after which predictions are scored; None is what the method takes at test time.
        progress: A function of the episodes that are done.
        measure: Whether the method's own `measures` are computed too.
        observe: A function of the numbers of the episodes of each chunk, int64 `[T]`, the predictions for its queries after
            the last step, which may be no numbers, and their labels.
        curves: Whether measures of several points are kept: tasks of several shapes may have other points.
        views: The copies of a task that predictions are averaged over; None for the task alone.

    Returns:
        The scores, the same in every rank.
    """
    steps = [algorithm.test_steps] if steps is None else list(steps)
    tally = _Tally(algorithm, len(steps), episodes, curves)
    first, end = hardware.world.share(episodes)
    with evaluating(algorithm):
        for start in range(first, end, hardware.test_chunk):
            stop = min(start + hardware.test_chunk, end)
            for rows, tasks in prepared_tasks(algorithm, sampler, start, stop, hardware):
                with hardware.autocast():
                    predictions = (
                        algorithm.predict_after(tasks, steps)
                        if views is None
                        else views.predict(algorithm, tasks, rows, steps)
                    )
                    measured = algorithm.measures(tasks) if measure else {}
                if observe is not None:
                    observe(rows, predictions[-1], tasks.query_y)
                tally.score(rows, predictions, tasks.query_y)
                tally.note(rows, measured)
            progress(stop * hardware.world.size)
        if measure and first == end:  # a rank without episodes must know, too, which tensors the others add up
            ((_, first_task),) = sampler(0, 1).chunks()
            none = torch.arange(0)
            tally.note(none, {name: value[none] for name, value in algorithm.measures(first_task).items()})
    hardware.world.all_reduce([tally.values, tally.power, tally.loss, tally.undefined, *tally.measures.values()])
    return Scores(
        steps, tally.values, tally.power.item(), tally.loss.item(), tally.measures, int(tally.undefined.item())
    )


class _Tally:
    """The episodes that a rank knows, each in its place, with zeros for those of other ranks; their sum over the ranks makes `Scores`."""

    def __init__(self, algorithm: Algorithm, steps: int, episodes: int, curves: bool) -> None:
        self.algorithm, self.episodes, self.curves = algorithm, episodes, curves
        self.values = torch.zeros(steps, episodes, dtype=torch.float64)
        self.power, self.loss, self.undefined = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.measures: dict[str, Tensor] = {}

    def score(self, rows: Tensor, predictions: Tensor, truth: Tensor) -> None:
        """Adds the episodes `rows`, by their predictions after each number of inner steps."""
        last, share = predictions[-1], len(rows) / self.episodes
        if self.algorithm.spec.kind == "regression":
            self.values[:, rows] = metrics.squared_error(predictions, truth)
            self.power += truth.cpu().double().square().mean() * share
        else:
            self.values[:, rows] = metrics.accuracy(predictions, truth)
            self.undefined += metrics.undefined(last).any(-1).sum().cpu()
            last = metrics.or_guess(last)
        self.loss += self.algorithm.task_loss(last, truth).cpu() * share

    def note(self, rows: Tensor, measured: dict[str, Tensor]) -> None:
        """Adds the method's own measures of the episodes `rows`; of several points where these are wanted."""
        for name, value in measured.items():
            if value.ndim == 1 or self.curves:
                whole = self.measures.setdefault(
                    name, torch.zeros(self.episodes, *value.shape[1:], dtype=torch.float64)
                )
                whole[rows] = value.cpu().double()


def prepared_tasks(
    algorithm: Algorithm, sampler: EpisodeSampler, start: int, stop: int, hardware: Hardware
) -> Iterator[tuple[Tensor, Episodes]]:
    """Yields some episodes as the method is to predict them, in chunks of one shape.

    Args:
        algorithm: The method.
        sampler: The episodes.
        start: The number of the first.
        stop: The number after that of the last.
        hardware: Where they are computed.

    Yields:
        The numbers of the episodes of a chunk, int64 `[T]`, and these episodes.
    """
    for places, drawn in sampler(start, stop).chunks():
        numbers = start + torch.tensor(places)
        with hardware.autocast():
            found = algorithm.prepared(drawn)
        for rows, tasks in found.chunks():
            yield numbers[list(rows)], tasks


@torch.no_grad()
def with_training_statistics(
    algorithm: Algorithm, hardware: Hardware, trained_on: Callable[[int, int], Batch] | None
) -> Algorithm:
    """Returns the algorithm, or, if its norm takes statistics of a set, a copy that keeps those of the first training images.

    Args:
        algorithm: A method with classes of its own.
        hardware: Where it is computed.
        trained_on: The training images from `start` to `stop`, as training draws them.

    Raises:
        UserError: Such a norm, without training images to take the statistics from.
    """
    kind = algorithm.backbone.norm
    if not batch_norm.needs_reference(kind):
        return algorithm
    if trained_on is None:
        raise UserError(
            f"backbone.norm={kind}: its statistics would be those of the images that are classified, and no training images "
            "are at hand; use backbone.norm=running, or group"
        )
    algorithm = copy.deepcopy(algorithm).eval()
    reference = trained_on(0, batch_norm.REFERENCE_IMAGES).x
    with hardware.autocast():
        batch_norm.keep_statistics(algorithm, lambda: algorithm.classify(reference))
    return algorithm


@torch.no_grad()
def classified(
    algorithm: Algorithm, images: Labelled, hardware: Hardware, trained_on: Callable[[int, int], Batch] | None = None
) -> Tensor:
    """Computes the logits of labelled images for the classes that the algorithm was trained with, `[n, classes]` float64 on the CPU.

    They depend on no other image of `images`: where the norm's statistics are of a set, they are those of the first training
    images.

    Args:
        algorithm: A method with classes of its own.
        images: What is classified, shared out among the ranks.
        hardware: Where it is computed.
        trained_on: The training images from `start` to `stop`, as training draws them.

    Raises:
        UserError: The norm's statistics are of a set, and there are no training images to take them from.
    """
    algorithm = with_training_statistics(algorithm, hardware, trained_on)
    world, parts = hardware.world, []
    first, end = world.share(len(images))
    with evaluating(algorithm):
        for start in range(first, end, IMAGES_AT_ONCE):
            batch = images.batch(np.arange(start, min(start + IMAGES_AT_ONCE, end)), hardware.device)
            with hardware.autocast():
                parts.append(algorithm.classify(batch.x).cpu().double())
    known = torch.cat(parts) if parts else torch.zeros(0, algorithm.spec.outputs, dtype=torch.float64)
    if world.size == 1:
        return known
    whole = torch.zeros(len(images), known.shape[1], dtype=torch.float64)
    whole[first:end] = known
    world.all_reduce([whole])
    return whole
