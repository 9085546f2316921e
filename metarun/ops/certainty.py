"""Certainties: numbers that are larger for images of known classes than for others."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import logsumexp

from metarun.ops.metrics import undefined

ROUNDING = 1e-5  # energies that differ by no more are equal but for rounding
MAX_PROBABILITY, ENERGY, PROTOTYPE = NAMES = ("max_probability", "energy", "prototype_distance")


def certainties(
    scores: np.ndarray, log_probabilities: np.ndarray, nearness: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Computes the certainties of a classifier, each `[n]`, by name.

    `max_probability` is the largest probability (Hendrycks and Gimpel 2017, https://arxiv.org/abs/1610.02136). `energy` is
    minus the free energy, log sum exp of the scores (Liu et al. 2020, https://arxiv.org/abs/2010.03759), which for a method
    of distances grows with the nearness of the classes. `prototype_distance` is minus the squared distance to the nearest class
    mean of the examples, in the embedding.

    A prediction that says nothing (`metarun.ops.metrics.undefined`) has the least certainty of each kind, -inf, and a distance that
    is no number has it too: no threshold keeps them but one that keeps all.

    Args:
        scores: `[n, classes]`.
        log_probabilities: `[n, classes]`, calibrated.
        nearness: `metarun.ops.prototypes.nearness`, `[n]`; None for a classifier that has no examples.
    """
    found = {MAX_PROBABILITY: np.exp(log_probabilities.max(1)), ENERGY: logsumexp(scores, axis=1)}
    found |= {} if nearness is None else {PROTOTYPE: nearness}
    silent = undefined(torch.from_numpy(scores)).numpy()
    return {name: np.where(silent | np.isnan(values), -np.inf, values) for name, values in found.items()}


def tells(energies: np.ndarray) -> bool:
    """Whether energies `[n]` say anything: the scores of a method that gives log probabilities add up to 0, but for rounding.

    Those of predictions that say nothing, -inf, do not count.
    """
    finite = energies[np.isfinite(energies)]
    return finite.size > 0 and float(np.ptp(finite)) > ROUNDING


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Estimates the chance that an image of a known class is more certain than one of an unknown class; a tie counts half.

    Args:
        known: Certainties of images of known classes, `[n]`.
        unknown: Those of others, `[m]`.
    """
    ordered = np.sort(unknown)
    below = [np.searchsorted(ordered, known, side) for side in ("left", "right")]
    return float(np.mean(below) / len(unknown))


def threshold(known: np.ndarray, kept: float = 0.95) -> float:
    """Finds the largest value that at least the share `kept` of the certainties `[n]` of known classes reach.

    It is -inf, which keeps all, where more than the rest say nothing.
    """
    return float(np.sort(known)[int(np.floor((1 - kept) * len(known) + 1e-9))])
