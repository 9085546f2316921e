"""How far the probabilities of a method can be trusted on episodes, and how it fares with queries of unknown classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from metarun.core import Algorithm, Episodes
from metarun.data.source import EpisodeSampler
from metarun.engine.evaluate import evaluate
from metarun.engine.hardware import Hardware
from metarun.ops import draws
from metarun.ops.calibration import Reliability, fit_temperature, tempered
from metarun.ops.certainty import NAMES, auroc, certainties, threshold
from metarun.ops.prototypes import nearness


class Observed:
    """What `evaluate` hands to its observer, counted: calibration with and without a temperature, and the worst class.

    Attributes:
        worst: Of each episode the accuracy of the class that fared worst, `[episodes]` float64.
    """

    def __init__(self, episodes: int, ways: int, temperature: float | None) -> None:
        self.ways, self.temperature = ways, temperature
        self.before, self.after = Reliability(), Reliability()
        self.worst = torch.zeros(episodes, dtype=torch.float64)

    def __call__(self, start: int, logits: Tensor, labels: Tensor) -> None:
        """Counts the episodes from `start`: logits `[T, N*Q, N]`, labels `[T, N*Q]`."""
        right = (logits.argmax(-1) == labels).double()
        classes = torch.nn.functional.one_hot(labels, self.ways).double()
        shares = (right[..., None] * classes).sum(1) / classes.sum(1)
        self.worst[start : start + len(logits)] = shares.min(-1).values.cpu()
        logs = log_softmax(logits.double().cpu().numpy().reshape(-1, self.ways), axis=1)
        truth = labels.cpu().numpy().reshape(-1)
        self.before.add(logs, truth)
        self.after.add(tempered(logs, self.temperature or 1.0), truth)

    def gather(self, hardware: Hardware) -> None:
        """Adds up what the ranks counted."""
        arrays = [self.before.sums, self.before.totals, self.after.sums, self.after.totals]
        tensors = [torch.from_numpy(array) for array in arrays]  # of the same memory
        hardware.world.all_reduce([*tensors, self.worst])

    def describe(self, episodes: int) -> dict[str, Any]:
        """Numbers for `result.json`; `episodes` validation episodes served the temperature."""
        told = f"{episodes} validation episodes" if self.temperature else None
        return {
            "temperature": self.temperature,
            "fitted_on": told,
            "without": self.before.describe(),
            "with": self.after.describe(),
            "bins": self.after.bins(),
        }


def validation_temperature(
    algorithm: Algorithm, sampler: EpisodeSampler, episodes: int, hardware: Hardware
) -> float | None:
    """The temperature that suits a method best on the episodes 0 to `episodes`, None for none; the global generator is left as it was."""
    logits: Tensor | None = None
    truth: Tensor | None = None

    def collect(start: int, found: Tensor, labels: Tensor) -> None:
        nonlocal logits, truth
        if logits is None or truth is None:
            logits = torch.zeros(episodes, *found.shape[1:], dtype=torch.float64)
            truth = torch.zeros(episodes, *labels.shape[1:], dtype=torch.int64)
        logits[start : start + len(found)] = found.double().cpu()
        truth[start : start + len(labels)] = labels.cpu()

    with draws.untouched(hardware.device):
        evaluate(algorithm, sampler, episodes, hardware, observe=collect)
        if logits is None or truth is None:  # this rank has no episode
            blank = sampler(0, 1)
            truth = torch.zeros(episodes, *blank.query_y.shape[1:], dtype=torch.int64)
            logits = torch.zeros(episodes, *blank.query_y.shape[1:], blank.ways, dtype=torch.float64)
    as_float = truth.double()
    hardware.world.all_reduce([logits, as_float])
    return fit_temperature(logits.flatten(0, 1).numpy(), as_float.flatten().long().numpy())


Certainties = dict[str, np.ndarray]


@torch.no_grad()
def known_and_unknown(
    algorithm: Algorithm,
    sampler: EpisodeSampler,
    episodes: int,
    ways: int,
    temperature: float | None,
    hardware: Hardware,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Certainties, Certainties]:
    """The certainty of every query: of the classes of the support set, and of classes that are not in it.

    Args:
        algorithm: The method.
        sampler: Episodes of more than `ways` classes; the others' support images are left out.
        episodes: How many.
        ways: The classes of the support set.
        temperature: Divides the logits where the probability is the certainty.
        hardware: Where it is computed, shared out among the ranks.
        progress: Is told how many episodes are done.

    Returns:
        For each certainty, by name, those of known and of unknown queries.
    """
    training = algorithm.training
    algorithm.eval()
    first, end = hardware.world.share(episodes)
    whole: Tensor | None = None
    known = 0
    for start in range(first, max(end, first + 1), hardware.test_chunk):
        stop = max(min(start + hardware.test_chunk, end), start + 1)
        drawn = sampler(start, stop)
        batch = with_unknown(drawn, ways)
        known = batch.query_y.shape[1] * ways // drawn.ways
        if whole is None:
            whole = torch.zeros(len(NAMES), episodes, batch.query_y.shape[1], dtype=torch.float64)
        if start >= end:  # this rank has no episode, but knows their shape now
            break
        with hardware.autocast():
            logits = algorithm.predict(batch)
            support, queries = algorithm.embed(batch)
        near = nearness(support.flatten(2), batch.support_y, queries.flatten(2), ways).cpu().numpy().ravel()
        scores = logits.double().cpu().numpy().reshape(-1, ways)
        found = certainties(scores, tempered(log_softmax(scores, axis=1), temperature or 1.0), near)
        for row, name in enumerate(NAMES):
            whole[row, start:stop] = torch.from_numpy(found[name]).view(stop - start, -1)
        progress(stop * hardware.world.size)
    assert whole is not None
    hardware.world.all_reduce([whole])
    algorithm.train(training)
    values = whole.numpy()
    sides = (values[:, :, :known], values[:, :, known:])
    own, other = ({name: side[row].ravel() for row, name in enumerate(NAMES)} for side in sides)
    return own, other


def with_unknown(drawn: Episodes, ways: int) -> Episodes:
    """Episodes of the first `ways` classes, whose queries are of all classes: those of known ones come first."""
    size = drawn.support_y.shape[1] // drawn.ways * ways
    blank = drawn.query_y.where(drawn.query_y < ways, 0)
    return replace(
        drawn, support_x=drawn.support_x[:, :size], support_y=drawn.support_y[:, :size], query_y=blank, ways=ways
    )


def tell_apart(validation: tuple[Certainties, Certainties], test: tuple[Certainties, Certainties]) -> dict[str, Any]:
    """How well each certainty tells known classes from unknown ones, for `result.json`.

    The thresholds, and which certainty a classifier goes by, are chosen on the validation episodes alone.

    Args:
        validation: What `known_and_unknown` found on validation episodes.
        test: What it found on test episodes.
    """
    found: dict[str, Any] = {}
    for name in test[0]:
        known, unknown = test[0][name], test[1][name]
        own = threshold(known)
        chosen = threshold(validation[0][name])
        found[name] = {
            "auroc": auroc(known, unknown),
            "fpr_at_95_tpr": float(np.mean(unknown >= own)),
            "threshold": chosen,
            "known_kept": float(np.mean(known >= chosen)),
            "unknown_kept": float(np.mean(unknown >= chosen)),
        }
    best = max(NAMES, key=lambda name: auroc(validation[0][name], validation[1][name]))
    return {
        "certainties": found,
        "certainty": best,
        "thresholds": {name: found[name]["threshold"] for name in NAMES},
        "threshold_keeps": 0.95,
    }
