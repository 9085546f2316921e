"""Intervals over seeds and over episodes, paired tests, and Holm's correction of their p-values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t: quicker to import than scipy.stats


class Paired(NamedTuple):
    """The mean of paired differences, half its 95% interval (None where they are all alike), and the p-value of a mean of 0."""

    mean: float
    half: float | None
    p: float
    pairs: int


def over_seeds(values: Sequence[float], overlap: float = 0.0) -> float | None:
    """Half the 95% interval of the mean of n seeds, or of n repeats with such an `overlap`, Student's t with n - 1 degrees of freedom.

    None where there is too little for one: for one seed, and for seeds that all agree.
    """
    n = len(values)
    if n < 2 or alike(values):
        return None
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) * math.sqrt(1 / n + overlap))


def alike(values: Sequence[float] | np.ndarray) -> bool:
    """Whether two or more values differ by no more than rounding: how they vary is then unknown, and not nothing."""
    return float(np.std(values, ddof=1)) <= 1e-12 * abs(float(np.mean(values)))


def tied(one: np.ndarray | float, other: np.ndarray | float) -> np.ndarray:
    """Whether numbers are equal but for rounding: the sum over episodes of as many right answers hangs on where these are."""
    found: np.ndarray = np.isclose(one, other, rtol=1e-12, atol=0)
    return found


def over_episodes(
    halves: Sequence[float | None], draws: Sequence[Hashable] | None = None, shares: Sequence[float] | None = None
) -> float | None:
    """Half the 95% interval of a mean of means over episodes, of half the interval of each: the root of the sum of their squares / n.

    It counts the luck of the drawn test episodes alone, and takes the weights as given.

    Args:
        halves: Half the interval of each.
        draws: What the episodes of each were drawn by, the seed of the test say, as the luck of the same draws does not even out; None
            where these are others for each.
        shares: What each counts in the mean, 1 in all; None where they count alike.

    Returns:
        Half of the interval; None where one of them has none.
    """
    together: dict[Hashable, float] = {}
    for place, half in enumerate(halves):
        if half is None or not math.isfinite(half):
            return None
        draw = place if draws is None else draws[place]
        share = 1 / len(halves) if shares is None else shares[place]
        together[draw] = together.get(draw, 0.0) + share * half
    return math.hypot(*together.values()) if together else None


def over_same_draws(halves: Sequence[float | None]) -> float | None:
    """The mean of half intervals over seeds that were tested on the same draws, whose luck a further seed does not lessen.

    The images of a target are drawn by `target.subset_seed`, whatever the seed is. None where a seed has no interval.
    """
    known = [half for half in halves if half is not None and math.isfinite(half)]
    return math.fsum(known) / len(halves) if known and len(known) == len(halves) else None


def paired(differences: np.ndarray, overlap: float = 0.0) -> Paired | None:
    """The paired t test of `[n]` finite differences; None if n < 2.

    Differences that are all alike have no interval, for how they vary is unknown; their p is that of the sign test, 2^(1 - n), or
    1 if they are all 0. Of repeats of a target `overlap` says how far they test the same images (`metarun.ops.measures.overlap_of`).
    """
    n = len(differences)
    if n < 2:
        return None
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) * math.sqrt(1 / n + overlap)
    if alike(differences):
        return Paired(mean, None, 2.0 ** (1 - n) if mean else 1.0, n)
    return Paired(mean, float(stdtrit(n - 1, 0.975)) * error, float(2 * stdtr(n - 1, -abs(mean) / error)), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm's step-down method (Holm 1979), in the order given, at most 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
