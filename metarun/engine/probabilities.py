"""How far the probabilities of a method can be trusted on episodes, and how it fares with queries of unknown classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from metarun.core import Algorithm, Episodes, TaskShape, largest
from metarun.data.source import EpisodeSampler
from metarun.engine.evaluate import evaluate
from metarun.engine.hardware import Hardware
from metarun.engine.views import Views
from metarun.ops import draws, metrics
from metarun.ops.calibration import Reliability, fit_temperature, tempered
from metarun.ops.certainty import ENERGY, NAMES, auroc, certainties, tells, threshold
from metarun.ops.measures import AUROC
from metarun.ops.modes import evaluating
from metarun.ops.prototypes import nearness

KNOWN, UNKNOWN = 1, 2  # of a query: whether the support set has its class


class Observed:
    """What `evaluate` hands to its observer, counted: calibration with and without a temperature, and the worst class.

    Attributes:
        worst: Of each episode the accuracy of the class that fared worst, of those with queries, `[episodes]` float64.
        chance: Of each episode the accuracy of a guess, `[episodes]` float64.
    """

    def __init__(self, episodes: int, temperature: float | None) -> None:
        self.temperature = temperature
        self.before, self.after = Reliability(), Reliability()
        self.worst, self.chance = (torch.zeros(episodes, dtype=torch.float64) for _ in range(2))

    def __call__(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts the episodes of the numbers `rows`: logits `[T, N*Q, N]`, labels `[T, N*Q]`."""
        logits, labels, ways = logits.cpu(), labels.cpu(), logits.shape[-1]
        right = metrics.right(logits, labels)
        classes = torch.nn.functional.one_hot(labels, ways).double()
        shares = (right[..., None] * classes).sum(1) / classes.sum(1)  # NaN of a class without queries
        self.worst[rows] = shares.nan_to_num(nan=torch.inf).min(-1).values
        self.chance[rows] = 1 / ways
        logs = log_softmax(metrics.or_guess(logits).double().numpy().reshape(-1, ways), axis=1)
        truth = labels.numpy().reshape(-1)
        self.before.add(logs, truth)
        self.after.add(tempered(logs, self.temperature or 1.0), truth)

    def gather(self, hardware: Hardware) -> None:
        """Adds up what the ranks counted."""
        arrays = [self.before.sums, self.before.totals, self.after.sums, self.after.totals]
        tensors = [torch.from_numpy(array) for array in arrays]  # of the same memory
        hardware.world.all_reduce([*tensors, self.worst, self.chance])

    def describe(self, episodes: int) -> dict[str, Any]:
        """Gives numbers for `result.json`; the temperature was fitted on `episodes` validation episodes."""
        told = f"{episodes} validation episodes" if self.temperature else None
        return {
            "temperature": self.temperature,
            "fitted_on": told,
            "without": self.before.describe(),
            "with": self.after.describe(),
            "bins": self.after.bins(),
        }


def validation_temperature(
    algorithm: Algorithm,
    sampler: EpisodeSampler,
    episodes: int,
    task: TaskShape,
    hardware: Hardware,
    views: Views | None = None,
) -> float | None:
    """Finds the temperature that suits a method best on the episodes 0 to `episodes`, None for none.

    The global generator is left as it was.

    Args:
        algorithm: The method.
        sampler: Validation episodes.
        episodes: How many.
        task: Their shape, or the ranges that it is drawn from.
        hardware: Where it is computed, shared out among the ranks.
        views: The copies of a task that predictions are averaged over; None for the task alone.
    """
    ways = largest(task.ways)
    # A row has a label, counted from 1, where it is a query. A class that an episode does not have is impossible.
    truth = torch.zeros(episodes, ways * largest(task.queries), dtype=torch.float64)
    logits = torch.zeros(*truth.shape, ways, dtype=torch.float64)

    def collect(rows: Tensor, found: Tensor, labels: Tensor) -> None:
        queries, own = found.shape[1:]
        truth[rows, :queries] = labels.cpu().double() + 1
        logits[rows, :queries] = torch.nn.functional.pad(
            metrics.or_guess(found).cpu().double(), (0, ways - own), value=-torch.inf
        )

    with draws.untouched(hardware.device):
        evaluate(algorithm, sampler, episodes, hardware, observe=collect, views=views)
    hardware.world.all_reduce([logits, truth])
    known = truth > 0
    return fit_temperature(logits[known].numpy(), truth[known].long().numpy() - 1)


Certainties = dict[str, np.ndarray]


@torch.no_grad()
def known_and_unknown(
    algorithm: Algorithm,
    sampler: EpisodeSampler,
    episodes: int,
    task: TaskShape,
    unknown: int,
    temperature: float | None,
    hardware: Hardware,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Certainties, Certainties]:
    """Computes the certainty of every query: of the classes of the support set, and of classes that are not in it.

    Args:
        algorithm: The method.
        sampler: Episodes of `unknown` classes more than `task` has; the last ones' support images are left out.
        episodes: How many.
        task: The shape of the episodes without the unknown classes, or the ranges that it is drawn from.
        unknown: The classes that are not in the support set.
        temperature: Divides the logits where the probability is the certainty.
        hardware: Where it is computed, shared out among the ranks.
        progress: Is told how many episodes are done.

    Returns:
        For each certainty that tells anything, by name, those of known and of unknown queries.
    """
    first, end = hardware.world.share(episodes)
    whole = torch.zeros(
        len(NAMES), episodes, (largest(task.ways) + unknown) * largest(task.queries), dtype=torch.float64
    )
    kinds = torch.zeros(whole.shape[1:], dtype=torch.float64)  # of each query 1 for a known class, 2 for another
    with evaluating(algorithm):
        for start in range(first, end, hardware.test_chunk):
            stop = min(start + hardware.test_chunk, end)
            for rows, batch, kind in tasks_with_unknown(algorithm, sampler, start, stop, unknown, hardware):
                with hardware.autocast():
                    logits = algorithm.predict(batch)
                    support, queries = algorithm.embed(batch)
                near = nearness(support.flatten(2), batch.support_y, queries.flatten(2), batch.ways)
                scores = logits.cpu().double().numpy().reshape(-1, batch.ways)
                with np.errstate(invalid="ignore"):  # of predictions that say nothing
                    logs = tempered(log_softmax(scores, axis=1), temperature or 1.0)
                found = certainties(scores, logs, near.numpy().ravel())
                size = kind.shape[1]
                kinds[rows, :size] = kind.cpu().double()
                for row, name in enumerate(NAMES):
                    whole[row, rows, :size] = torch.from_numpy(found[name]).view(len(rows), -1)
            progress(stop * hardware.world.size)
    hardware.world.all_reduce([whole, kinds])
    asked = kinds > 0
    own, other = (
        {
            name: whole[row][kinds == kind].numpy()
            for row, name in enumerate(NAMES)
            if name != ENERGY or tells(whole[row][asked].numpy())
        }
        for kind in (KNOWN, UNKNOWN)
    )
    return own, other


def tasks_with_unknown(
    algorithm: Algorithm, sampler: EpisodeSampler, start: int, stop: int, unknown: int, hardware: Hardware
) -> Iterator[tuple[Tensor, Episodes, Tensor]]:
    """Yields some episodes with queries of unknown classes, as the method is to predict them, in chunks of one shape.

    Args:
        algorithm: The method.
        sampler: Episodes that have the unknown classes too, the last of their ways.
        start: The number of the first.
        stop: The number after that of the last.
        unknown: How many classes are unknown.
        hardware: Where they are computed.

    Yields:
        The numbers of the episodes of a chunk, these episodes, and of each query `KNOWN` or `UNKNOWN`.
    """
    for places, drawn in sampler(start, stop).chunks():
        batch, kind = with_unknown(drawn, unknown)
        with hardware.autocast():
            found = algorithm.prepared(batch)
        for rows, tasks in found.chunks():
            yield start + torch.tensor(places)[list(rows)], tasks, kind[list(rows)]


def with_unknown(drawn: Episodes, unknown: int) -> tuple[Episodes, Tensor]:
    """Takes from episodes the support images of their last `unknown` classes, and leaves the queries of all classes.

    Args:
        drawn: The episodes.
        unknown: How many of their classes are to be unknown.

    Returns:
        The episodes, in which the labels of unknown queries are 0; and of each query `KNOWN` or `UNKNOWN`, `[T, N*Q]`.
    """
    ways = drawn.ways - unknown
    size = sum(drawn.support_sizes[:ways])
    shots = None if drawn.shots is None else drawn.shots[:ways]
    known = drawn.query_y < ways
    # The queries are of more classes than there are ways: their numbers are those of `drawn`.
    episodes = replace(
        drawn,
        support_x=drawn.support_x[:, :size],
        support_y=drawn.support_y[:, :size],
        query_y=drawn.query_y.where(known, 0),
        ways=ways,
        shots=shots,
    )
    return episodes, torch.where(known, KNOWN, UNKNOWN)


def tell_apart(validation: tuple[Certainties, Certainties], test: tuple[Certainties, Certainties]) -> dict[str, Any]:
    """Measures how well each certainty tells known classes from unknown ones, for `result.json`.

    The thresholds, and which certainty a classifier goes by, are chosen on the validation episodes alone. A certainty that says nothing
    of more of their known queries than a threshold may reject has none, and keeps all.

    Args:
        validation: What `known_and_unknown` found on validation episodes.
        test: What it found on test episodes.
    """
    found: dict[str, Any] = {}
    names = [name for name in NAMES if name in validation[0] and name in test[0]]
    for name in names:
        known, unknown = test[0][name], test[1][name]
        own = threshold(known)
        chosen = threshold(validation[0][name])
        found[name] = {
            AUROC: auroc(known, unknown),
            "fpr_at_95_tpr": float(np.mean(unknown >= own)),
            "threshold": chosen if np.isfinite(chosen) else None,
            "known_kept": float(np.mean(known >= chosen)),
            "unknown_kept": float(np.mean(unknown >= chosen)),
        }
    thresholds = {name: found[name]["threshold"] for name in names if found[name]["threshold"] is not None}
    return {
        "certainties": found,
        "certainty": max(thresholds, key=lambda name: auroc(validation[0][name], validation[1][name]), default=None),
        "thresholds": thresholds,
        "threshold_keeps": 0.95,
    }
