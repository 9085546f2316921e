"""What the scores of a test become in `result.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.data.source import DataSource
from metarun.engine.evaluate import Scores
from metarun.engine.hardware import Hardware
from metarun.ops import metrics
from metarun.ops.measures import ACCURACY
from metarun.runs import result


class Measured:
    """Gathers what the data measure on predictions beside the error.

    Args:
        data: The data set.
        episodes: The number of test episodes.
    """

    def __init__(self, data: DataSource, episodes: int) -> None:
        self.data = data
        nothing = torch.zeros(1, 2, data.outputs or 1)
        self.values = {name: torch.zeros(episodes, dtype=torch.float64) for name in data.measures(nothing, nothing)}

    def __call__(self, rows: Tensor, predictions: Tensor, targets: Tensor) -> None:
        """Takes the predictions of the episodes of the numbers `rows`, and their targets."""
        for name, found in self.data.measures(predictions.cpu(), targets.cpu()).items():
            self.values[name][rows] = found.double()

    def gather(self, hardware: Hardware) -> dict[str, Tensor]:
        """Adds up what the ranks took: the values of all episodes by name, float64 `[episodes]`."""
        hardware.world.all_reduce(list(self.values.values()))
        return self.values


def summary(scores: Scores, kind: str) -> dict[str, Any]:
    """Sums up the numbers of one test.

    Args:
        scores: The score of every episode, after each of some numbers of inner steps.
        kind: What the numbers were measured with, such as `test`.

    Returns:
        Numbers for `result.json`: of the last inner step, and step by step where there are several.
    """
    steps: dict[str, Any] = {}
    for step, values in zip(scores.steps, scores.values, strict=True):
        if scores.power:
            steps[str(step)] = metrics.regression_summary(values, scores.power)
        else:
            mean, ci95 = metrics.interval(values, shares=True)
            steps[str(step)] = {ACCURACY: mean, result.half_of(ACCURACY): ci95}
    found = {result.key(kind, name): value for name, value in steps[str(scores.steps[-1])].items()}
    found[result.key(kind, result.EPISODES)] = scores.values.shape[1]
    if len(steps) > 1 or scores.power:
        found[result.key(kind, result.AFTER_INNER_STEPS)] = steps
    return found


def over_sets(scores: Sequence[Tensor]) -> Tensor:
    """The means over data sets of the score of episode i of each, `[episodes]`, by which the mean over the sets has its interval.

    Episode i of every data set is drawn from (seed, split, i): where shapes are ranges all have its ways and shots, and sets of the
    same classes have the same of them. So the luck of a draw is shared, and the interval is over the means of each i over the sets,
    which is right whatever they share.

    Args:
        scores: Of each data set the score of every episode, `[episodes]`, as many for all.
    """
    return torch.stack(list(scores)).mean(0)


def own_measures(scores: Scores, kind: str = result.TEST) -> dict[str, Any]:
    """The method's own measures, and the data's, with their intervals: `test/NAME`, and curves under `test/curves`.

    They are means over the tasks that have a finite value; how many have none, `test/NAME_not_finite` says.
    """
    found: dict[str, Any] = {}
    for name, values in scores.measures.items():
        key = result.key(kind, name)
        pairs = [metrics.finite_interval(column) for column in values.reshape(len(values), -1).T]
        if values.ndim == 1:
            found[key], found[result.half_of(key)] = pairs[0]
            if lost := int((~torch.isfinite(values)).sum()):
                found[result.lost_of(key)] = lost
        else:
            means, widths = zip(*pairs, strict=True)
            curves = found.setdefault(result.key(kind, result.CURVES), {})
            curves[name] = {"mean": list(means), "ci95": list(widths)}
    return found
