"""Means with their 95% intervals: over episodes, or over repeated subsets of a target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit  # Student's t: quicker to import than scipy.stats
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


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What one set of test images says: accuracy, balanced accuracy, AUROC where there are two classes, confusion.

    `scores` is `[n, classes]`, `labels` int64 `[n]`. `confusion[i][j]` counts images of class i that were taken for j.
    Balanced accuracy is the mean over the classes that have images. AUROC ranks by the second class's score less the first's.
    """
    classes = scores.shape[1]
    predicted = scores.argmax(1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    sizes = confusion.sum(1)
    found: dict[str, Any] = {
        "acc": float((predicted == labels).mean()),
        "balanced_acc": float((confusion.diagonal()[sizes > 0] / sizes[sizes > 0]).mean()),
    }
    if classes == 2 and sizes.all():
        margin = np.nan_to_num(scores[:, 1] - scores[:, 0])
        negative, positive = np.sort(margin[labels == 0]), margin[labels == 1]
        below = [np.searchsorted(negative, positive, side) for side in ("left", "right")]  # a tie counts half
        found["auroc"] = float(np.mean(below) / sizes[0])
    return {**found, "confusion": confusion.tolist()}


def over_repeats(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of `classification`'s numbers over repeats, with 95% intervals by Student's t; the confusions are added up."""
    result: dict[str, Any] = {name: repeats[0][name] for name in ("train_images", "test_images")}
    n = len(repeats)
    for name in ("acc", "balanced_acc", "auroc"):
        if any(name not in repeat for repeat in repeats):
            continue
        values = np.array([repeat[name] for repeat in repeats])
        width = stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        result |= {name: float(values.mean()), f"{name}_ci95": float(width)}
    result["confusion"] = np.sum([repeat["confusion"] for repeat in repeats], axis=0).tolist()
    result["repeats"] = n
    return result
