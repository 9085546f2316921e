"""Means with their 95% intervals, over episodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIVERGED = 100.0  # times the mean squared target: an error above it counts as diverged


def interval(values: Tensor) -> tuple[float, float]:
    """The mean of n values and half the width of its 95% interval, 1.96 s / sqrt(n) with s the sample deviation."""
    values = values.double()
    spread = values.std(unbiased=True).item() if len(values) > 1 else math.nan
    return values.mean().item(), 1.96 * spread / math.sqrt(len(values))


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """The share of right answers of each task, `[..., T]`, of logits `[..., T, M, N]` and labels `[T, M]`."""
    return (logits.argmax(-1) == target).double().mean(-1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each task, `[..., T]`, of predictions `[..., T, M, D]` and targets `[T, M, D]`."""
    return (prediction.double() - target.double()).square().mean((-1, -2))


def median(errors: Tensor) -> float:
    """The median of `[T]` errors, the mean of the middle two for an even T; a NaN counts as infinite."""
    return float(np.median(errors.nan_to_num(nan=math.inf, posinf=math.inf).numpy()))


def regression_summary(errors: Tensor, power: float) -> dict[str, Any]:
    """Mean with interval, median, and the tasks that diverged: not finite, or above 100 times `power`.

    `errors` is `[T]`, `power` the mean squared target. The mean covers every finite task, diverged ones too.
    """
    finite = torch.isfinite(errors)
    mean, ci95 = interval(errors[finite]) if finite.any() else (math.inf, math.nan)
    return {
        "mse": mean,
        "mse_ci95": ci95,
        "mse_median": median(errors),
        "diverged": int((~finite | (errors > DIVERGED * power)).sum()),
        "not_finite": int((~finite).sum()),
    }
