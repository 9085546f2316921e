"""Means with their 95% intervals: over episodes, or over repeated subsets of a target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit  # Student's t: quicker to import than scipy.stats
from torch import Tensor

from metarun.ops.measures import (
    ACCURACY,
    AUROC,
    BALANCED_ACCURACY,
    CI95,
    CONFUSION,
    ERROR,
    MACRO_F1,
    MEDIAN_ERROR,
    OF_CLASSES,
    UNDEFINED,
)

DIVERGED = 100.0  # an error above so many times the mean squared target counts as diverged


Z = 1.96  # 95% of a normal distribution lies within so many deviations of the mean
ALIKE = 1e-12  # a deviation below this share of the mean is what rounding leaves of none


def interval(values: Tensor, *, shares: bool = False) -> tuple[float, float | None]:
    """Computes the mean of n values and half the width of its 95% interval, t s / sqrt(n) with s the sample deviation.

    t is the quantile of Student's t with n - 1 degrees of freedom: 1.96 of a thousand values, 2.78 of five.

    Args:
        values: `[n]`.
        shares: Whether they lie in [0, 1]. Where such values are all alike, the width is that of Wilson's interval for n trials
            of yes or no: no values in [0, 1] with this mean vary more than these do.

    Returns:
        The mean and the half width; None for one value, and for others that are all alike: too few to tell how they vary.
    """
    mean, n, spread = values.double().mean().item(), len(values), _spread(values)
    if spread:
        return mean, float(stdtrit(n - 1, 0.975)) * spread / math.sqrt(n)
    return mean, reach(mean, wilson(mean, n)) if shares and n > 1 else None


def _spread(values: Tensor) -> float:
    """The sample deviation of `[n]` values; 0 of those that are all alike but for rounding, and of one."""
    spread = values.double().std(unbiased=True).item() if len(values) > 1 else 0.0
    return 0.0 if spread <= ALIKE * abs(values.double().mean().item()) else spread


def interval_told(values: Tensor, over: str, *, shares: bool = False) -> str:
    """Says in words by which formula `interval` computes the interval of the same values, and `over` what it is."""
    if _spread(values):
        return f"95%, over {over}, Student's t"
    return f"95%, over {over}, which agree, Wilson" if shares and len(values) > 1 else "too few for an interval"


def wilson(share: float, n: float) -> tuple[float, float]:
    """Computes Wilson's 95% interval of a probability, where `share` of n trials were a success; its width is never 0.

    Wilson 1927, https://doi.org/10.2307/2276774.
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(max(share * (1 - share), 0.0) / n + Z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def reach(mean: float, bounds: tuple[float, float]) -> float:
    """Computes the larger of the distances of two bounds from the mean: mean +- it covers the interval."""
    return max(mean - bounds[0], bounds[1] - mean)


def over_images(confusion: np.ndarray, auroc: float | None = None) -> dict[str, float | None]:
    """Computes half the 95% intervals of `classification`'s numbers over one set of test images.

    That of the accuracy is Wilson's; that of the balanced accuracy joins Wilson's intervals of the classes (Zou, Huang, Zhang
    2009, https://doi.org/10.1002/sim.3565); that of macro F1 is `macro_f1`'s; that of the AUROC is Hanley and McNeil's
    (1982, https://doi.org/10.1148/radiology.143.1.7063747) with Newcombe's mean of the two classes' sizes (2006,
    https://doi.org/10.1002/sim.2324), None where nothing is out of order.

    Args:
        confusion: `[classes, classes]` counts; means over repeats need not be whole.
        auroc: Of two classes.
    """
    sizes, right = confusion.sum(1), confusion.diagonal()
    total = float(sizes.sum())
    share = float(right.sum()) / total
    half_widths: dict[str, float | None] = {ACCURACY: reach(share, wilson(share, total))}
    recalls = (right[sizes > 0] / sizes[sizes > 0]).tolist()
    bounds = [wilson(recall, n) for recall, n in zip(recalls, sizes[sizes > 0].tolist(), strict=True)]
    below = math.hypot(*(recall - low for recall, (low, _) in zip(recalls, bounds, strict=True)))
    above = math.hypot(*(high - recall for recall, (_, high) in zip(recalls, bounds, strict=True)))
    half_widths[BALANCED_ACCURACY] = max(below, above) / len(recalls)
    half_widths[MACRO_F1] = macro_f1(confusion)[1]
    if auroc is not None:
        negative, positive = sizes.tolist()
        one, other = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
        # The mean of both sizes: with one of them the width would hang on which of two unequal classes is the second.
        others = (positive + negative) / 2 - 1
        spread = (auroc * (1 - auroc) + others * (one + other - 2 * auroc**2)) / (positive * negative)
        half_widths[AUROC] = Z * math.sqrt(spread) if spread > ALIKE else None
    return half_widths


def macro_f1(confusion: np.ndarray) -> tuple[float, float | None]:
    """Computes the mean over the classes of F1, 2 n_cc / (images of c + predictions of c); and half its 95% interval over the images.

    Classes without images and predictions are left out. The interval is the delta method's for multinomial counts (Takahashi et al.
    2022, https://doi.org/10.1007/s10489-021-02635-5, section 3); None where all or none is right.

    Args:
        confusion: `[classes, classes]` counts; means over repeats need not be whole.
    """
    right, both = confusion.diagonal(), confusion.sum(1) + confusion.sum(0)
    there = both > 0
    scores = np.divide(2 * right, both, out=np.zeros(len(right)), where=there)
    # The derivatives by the counts: of class i as of class j the sum grows, and where i is j the right ones do.
    loss = np.divide(scores, both, out=np.zeros(len(right)), where=there)
    gain = np.divide(2.0, both, out=np.zeros(len(right)), where=there)
    gradient = (np.diag(gain) - loss[:, None] - loss[None]) / there.sum()
    spread = float((confusion * gradient**2).sum() - (confusion * gradient).sum() ** 2 / confusion.sum())
    return float(scores[there].mean()), Z * math.sqrt(spread) if spread > ALIKE else None


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Computes the share of right answers of each task, `[..., T]` on the CPU, from logits `[..., T, M, N]` and labels `[T, M]`.

    Logits that are no numbers are no answer, and so not right.
    """
    return right(logits, target).mean(-1)


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Whether queries are rightly answered, bool `[..., T, M]`; the arguments are those of `accuracy`."""
    return (logits.argmax(-1) == target) & ~undefined(logits)


def right(logits: Tensor, target: Tensor) -> Tensor:
    """Marks rightly answered queries with 1, the others with 0, float64 `[..., T, M]` on the CPU; the arguments are those of `accuracy`."""
    return hits(logits, target).cpu().double()  # Apple's GPU has no double precision


def undefined(logits: Tensor) -> Tensor:
    """Marks the queries, `[...]`, whose logits `[..., N]` say nothing: one is no number or without bound, or no class is possible."""
    return ~((logits < torch.inf).all(-1) & (logits > -torch.inf).any(-1))


def or_guess(logits: Tensor) -> Tensor:
    """Replaces the logits of the queries of which they say nothing (`undefined`) by 0 for all classes: a guess."""
    return torch.where(undefined(logits).unsqueeze(-1), 0.0, logits)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes the mean squared error of each task, `[..., T]` on the CPU, from predictions `[..., T, M, D]` and targets `[T, M, D]`."""
    return (prediction.cpu().double() - target.cpu().double()).square().mean((-1, -2))


def ndcg(prediction: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Computes the normalised discounted cumulative gain of the k items that are ranked first, gain 2^relevance - 1.

    Args:
        prediction: What items are ranked by, `[..., n]`; of equal ones the first goes first.
        relevance: What they are worth, `[..., n]`, at least 0.
        k: How many count; of fewer items all.

    Returns:
        From 0 to 1, `[...]`; 1 where nothing is worth anything. Predictions of which one is no finite number rank nothing, and
        count as the worst ranking.

    Source:
        Jarvelin and Kekalainen (2002); Lee et al. (2019), MeLU, section 4.2.
    """
    gains = torch.exp2(relevance.double()) - 1
    k = min(k, gains.shape[-1])
    discounts = 1 / torch.log2(torch.arange(k, dtype=gains.dtype, device=gains.device) + 2)
    ranked = gains.gather(-1, prediction.argsort(dim=-1, descending=True, stable=True))[..., :k] @ discounts
    worst = gains.sort(dim=-1).values[..., :k] @ discounts
    ranked = torch.where(prediction.isfinite().all(-1), ranked, worst)
    best = gains.sort(dim=-1, descending=True).values[..., :k] @ discounts
    return torch.where(best > 0, ranked / best.clamp_min(1e-12), torch.ones_like(best))


def finite_interval(values: Tensor) -> tuple[float, float | None]:
    """Computes `interval` of the finite ones of `[n]` values; NaN and None where there are none."""
    finite = torch.isfinite(values)
    return interval(values[finite]) if finite.any() else (math.nan, None)


def median(errors: Tensor) -> float:
    """Computes the median of `[T]` errors, the mean of the middle two for an even T; a NaN counts as infinite."""
    return float(np.median(errors.nan_to_num(nan=math.inf, posinf=math.inf).numpy()))


def regression_summary(errors: Tensor, power: float) -> dict[str, Any]:
    """Computes the mean with its interval, the median, and counts the tasks that diverged: not finite, or above 100 times `power`.

    `errors` is `[T]`, `power` the mean squared target. The mean covers every finite task, diverged ones too.
    """
    finite = torch.isfinite(errors)
    mean, ci95 = interval(errors[finite]) if finite.any() else (math.inf, None)
    return {
        ERROR: mean,
        f"{ERROR}{CI95}": ci95,
        MEDIAN_ERROR: median(errors),
        "diverged": int((~finite | (errors > DIVERGED * power)).sum()),
        "not_finite": int((~finite).sum()),
    }


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Scores one set of test images: accuracy, balanced accuracy, macro F1, AUROC where there are two classes, confusion.

    `scores` is `[n, classes]`, `labels` int64 `[n]`. `confusion[i][j]` counts images of class i that were taken for j.
    Balanced accuracy is the mean over the classes that have images; macro F1 is the mean of the F1 scores of the classes that have
    images or are predicted. AUROC ranks by the second class's score less the first's.

    An image whose scores say nothing (`undefined`) is wrong, and ranked worst: `confusion` has it as taken for the class after its own.
    How many there are, `undefined` says, where there are any.
    """
    classes = scores.shape[1]
    silent = undefined(torch.from_numpy(scores)).numpy()
    predicted = np.where(silent, (labels + 1) % classes, scores.argmax(1))
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    sizes = confusion.sum(1)
    scored: dict[str, Any] = {
        ACCURACY: float((predicted == labels).mean()),
        BALANCED_ACCURACY: float((confusion.diagonal()[sizes > 0] / sizes[sizes > 0]).mean()),
        MACRO_F1: macro_f1(confusion)[0],
    }
    if classes == 2 and sizes.all():
        worst = np.where(labels == 0, np.inf, -np.inf)
        margin = np.where(silent, worst, np.nan_to_num(np.where(silent, 0.0, scores[:, 1]) - scores[:, 0]))
        negative, positive = np.sort(margin[labels == 0]), margin[labels == 1]
        below = [np.searchsorted(negative, positive, side) for side in ("left", "right")]  # a tie counts half
        scored[AUROC] = float(np.mean(below) / sizes[0])
    return {**scored, CONFUSION: confusion.tolist(), **({UNDEFINED: int(silent.sum())} if silent.any() else {})}


def over_repeats(repeats: list[dict[str, Any]], *, same_images: bool = False, overlap: float = 0.0) -> dict[str, Any]:
    """Averages `classification`'s numbers over repeats, with half their 95% intervals; the confusions are added up.

    Args:
        repeats: Of each repeat `classification`'s numbers, `train_images` and `test_images`.
        same_images: Whether all repeats have the same images, to train on and to test.
        overlap: How far they test the same images, see `metarun.ops.measures.overlap_of`.

    Returns:
        For each number its mean and, as `NAME_ci95`, half the interval: by Student's t over the repeats, or, where all have the
        same images or there is one alone, over its test images (`over_images`), as `over` says of all of them. Repeats with other
        images whose accuracies all agree say nothing of how they vary: there too all intervals are over the test images of one,
        and `agree` is true. An interval is None where there is too little for it: of numbers that are all alike over repeats, say.
    """
    result: dict[str, Any] = {name: repeats[0][name] for name in ("train_images", "test_images")}
    n = len(repeats)
    fixed = same_images or n == 1
    names = [name for name in OF_CLASSES if all(name in repeat for repeat in repeats)]
    confusion = np.sum([repeat[CONFUSION] for repeat in repeats], axis=0)
    means = {name: float(np.mean([repeat[name] for repeat in repeats])) for name in names}
    deviations = {name: float(np.std([repeat[name] for repeat in repeats], ddof=1)) if n > 1 else 0.0 for name in names}
    varied = {name: deviations[name] > ALIKE * abs(means[name]) for name in names}
    halves = over_images(confusion / n, means.get(AUROC))
    if not fixed and varied[ACCURACY]:
        # One basis for all numbers: by chance the repeats may (all but) agree in another one alone.
        t = float(stdtrit(n - 1, 0.975))
        halves = {name: t * deviations[name] * math.sqrt(1 / n + overlap) if varied[name] else None for name in names}
    result |= {"over": "test images" if fixed else "repeats", "agree": not fixed and not varied[ACCURACY]}
    for name in names:
        result |= {name: means[name], f"{name}{CI95}": halves[name]}
    result[CONFUSION] = confusion.tolist()
    result["repeats"] = n
    return result
