"""Certainties: numbers that are larger for images of known classes than for others."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def certainties(scores: np.ndarray, log_probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """The certainties that follow from a classifier's scores, each `[n]`, by name.

    `max_probability` is the largest probability (Hendrycks and Gimpel 2017, https://arxiv.org/abs/1610.02136). `energy` is
    minus the free energy, log sum exp of the scores (Liu et al. 2020, https://arxiv.org/abs/2010.03759), which for a method
    of distances grows with the nearness of the classes.

    Args:
        scores: `[n, classes]`.
        log_probabilities: `[n, classes]`, calibrated.
    """
    return {"max_probability": np.exp(log_probabilities.max(1)), "energy": logsumexp(scores, axis=1)}
