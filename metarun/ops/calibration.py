"""How far probabilities can be trusted: proper scores, calibration error, and a temperature that mends them.

    NLL   = -mean log p_y
    Brier = mean sum_k (p_k - [k = y])^2
    ECE   = sum_b n_b / n * |accuracy_b - confidence_b|   over bins of equal width of the largest probability

Brier (1950) for the score, with both classes counted in a problem of two, so that it lies in [0, 2]. ECE and the temperature:
Guo, Pleiss, Sun, Weinberger 2017 (https://arxiv.org/abs/1706.04599), equations 3 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax, logsumexp

BINS = 15
TEMPERATURES = (1e-3, 1e3)  # the best one is looked for between these, in units of the mean range of a row of logits
FLOOR = -100.0  # bounds a log probability in a mean: a class that was held impossible costs much, but not infinity


def log_likelihood(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Looks up the log probability of each label, `[n]`, `FLOOR` at least."""
    found: np.ndarray = np.maximum(log_probabilities[np.arange(len(labels)), labels], FLOOR)
    return found


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Computes the squared distance of each row of probabilities from certainty of the label, `[n]` in [0, 2]."""
    own = probabilities[np.arange(len(labels)), labels]
    found: np.ndarray = np.square(probabilities).sum(1) - 2 * own + 1
    return found


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Finds the T for which softmax(logits / T) gives the labels the largest likelihood, whatever the unit of the logits.

    The likelihood is concave in 1 / T. Where it has no maximum, for all predictions are right, or none is better than chance, the
    labels say nothing of a temperature.

    Args:
        logits: `[n, classes]`, or log probabilities; minus infinity for a class that is held impossible.
        labels: int64 `[n]`.

    Returns:
        T, or None where the likelihood is as large at an end of `TEMPERATURES`.

    Source:
        Guo et al. (2017), section 4.2.
    """
    logits = np.asarray(logits, dtype=np.float64)
    own = logits[np.arange(len(labels)), labels]
    known = np.isfinite(own)  # of a label that is held impossible no temperature makes a difference
    if not known.any():
        return None
    rows, own = logits[known], own[known]

    def loss(log_t: float) -> float:
        b = np.exp(-log_t)
        return float(np.mean(logsumexp(rows * b, axis=1) - own * b))

    finite = np.where(np.isfinite(rows), rows, own[:, None])
    scale = float(np.mean(finite.max(1) - finite.min(1)))
    if scale == 0:
        return None
    low, high = np.log(TEMPERATURES) + np.log(scale)
    from scipy.optimize import minimize_scalar  # takes half a second to import

    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    inside = loss(found.x) < min(loss(low), loss(high))
    return float(np.exp(found.x)) if inside else None


def tempered(log_probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Brings log probabilities `[n, classes]` to a temperature: log softmax(log p / T), which is that of the logits divided by T."""
    if temperature == 1:
        return log_probabilities
    found: np.ndarray = log_softmax(np.asarray(log_probabilities, dtype=np.float64) / temperature, axis=1)
    return found


@dataclass
class Reliability:
    """Sums over predictions, from which every score of calibration follows; parts can be added up.

    Attributes:
        sums: float64 `[3, BINS]`: of each bin of the largest probability the predictions, the right ones, and the sum of these
            probabilities.
        totals: float64 `[3]`: the predictions, the sum of their log likelihoods and that of their Brier scores.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros((3, BINS)))
    totals: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(self, log_probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Counts predictions: log probabilities `[n, classes]`, labels int64 `[n]`."""
        shares = np.exp(log_probabilities)
        top = shares.max(1)
        right = log_probabilities.argmax(1) == labels
        places = np.clip(np.ceil(top * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/BINS], (1/BINS, 2/BINS], ...
        for row, weights in enumerate((None, right, top)):
            self.sums[row] += np.bincount(places, weights, minlength=BINS)
        own = log_likelihood(log_probabilities, labels).sum()
        self.totals += (len(labels), own, brier(shares, labels).sum())

    @property
    def nll(self) -> float:
        """The mean negative log likelihood, in nats."""
        return float(-self.totals[1] / self.totals[0])

    @property
    def brier(self) -> float:
        """The mean Brier score."""
        return float(self.totals[2] / self.totals[0])

    @property
    def ece(self) -> float:
        """The expected calibration error."""
        counts, right, confidence = self.sums
        return float(np.abs(right - confidence).sum() / counts.sum())

    def bins(self) -> list[dict[str, float]]:
        """Lists the number, mean confidence and accuracy of the predictions of each bin that has some."""
        return [
            {"count": int(n), "confidence": float(confidence / n), "accuracy": float(right / n)}
            for n, right, confidence in self.sums.T
            if n
        ]

    def describe(self) -> dict[str, float]:
        """Gives the three scores by name."""
        return {"nll": self.nll, "brier": self.brier, "ece": self.ece}
