"""The stage that tests a learner on episodes of the test classes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun import files
from metarun.data.source import DataSource, EpisodeSampler, Split
from metarun.engine.evaluate import Scores, evaluate
from metarun.engine.hardware import Hardware
from metarun.engine.probabilities import Observed, known_and_unknown, tell_apart, validation_temperature
from metarun.engine.views import Views
from metarun.errors import UserError
from metarun.ops import draws, metrics
from metarun.report.reliability import reliability_diagram
from metarun.runs import result
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.learning import check_test_task


class MetaTest(Stage):
    """Tests the weights at hand, once, on episodes of the test classes; chance and the method before training stand beside it."""

    needs_weights = True
    meta_tests = True

    def prepare(self, run: Run) -> None:
        check_test_task(run.learner, run.test_task)
        device, task = run.hardware.device, run.test_task
        self.episodes = run.episodes("test", task, device)
        self.classifies = run.algorithm.spec.kind == "classification"
        self.validation = None
        if self.classifies:
            with contextlib.suppress(UserError):  # too few classes for such tasks: then there is no temperature
                self.validation = run.episodes("val", task, device)
        self.with_unknown = self._with_unknown(run)
        self.views = self._views(run)

    def execute(self, run: Run) -> None:
        algorithm, settings, hardware = run.algorithm, run.config.test, run.hardware
        last = algorithm.test_steps
        steps = [step for step in range(last + 1) if step in (0, 1, 5, 10, last) or last <= 10]
        observed, number = None, run.learner.settings.validate_episodes
        measured = Measured(run.data, settings.episodes)
        if self.classifies:
            temperature = self.validation and validation_temperature(
                algorithm, self.validation, number, run.test_task, hardware, self.views
            )
            observed = Observed(settings.episodes, temperature)
        with run.logger.progress("testing", settings.episodes) as advance:
            scores = evaluate(
                algorithm,
                self.episodes,
                settings.episodes,
                hardware,
                steps,
                advance,
                measure=True,
                observe=observed if observed is not None else measured,
                curves=not run.test_task.varies,
                views=self.views,
            )
        if observed is None:
            scores.measures |= measured.gather(hardware)
        run.result |= summary(scores, result.TEST) | own_measures(scores)
        if observed is not None:
            run.result |= self._probabilities(run, scores, observed, number)
        self._record(run, scores)
        if settings.baseline_episodes and any(value.requires_grad for value in algorithm.parameters()):
            run.result |= self._baseline(run, steps)
        if not scores.power:
            ways = run.test_task.ways
            chance = 1 / ways if isinstance(ways, int) else 0.0
            if isinstance(ways, tuple) and observed is not None:
                chance = observed.chance.mean().item()
            run.result[result.key(result.CHANCE, result.ACCURACY)] = chance

    def _with_unknown(self, run: Run) -> dict[Split, EpisodeSampler]:
        """Episodes with more classes than a support set has, where `test.unknown_ways` asks for them."""
        more = run.config.test.unknown_ways
        if not more:
            return {}
        if not self.classifies:
            raise UserError(
                f"test.unknown_ways={more}: is of classes, but the data are regression tasks; leave it at 0"
            )
        task = replace(run.test_task, query_dirichlet=None)
        seed, device = run.config.seed, run.hardware.device
        return {split: run.data.with_unknown(split, task, more, seed, device) for split in ("val", "test")}

    def _views(self, run: Run) -> Views | None:
        """The copies of test tasks that `test.views` asks for."""
        count = run.config.test.views
        if count == 1:
            return None
        if not self.classifies:
            raise UserError(
                f"test.views={count}: averages probabilities, but the data are regression tasks; leave it at 1"
            )
        if run.data.item != "image":
            raise UserError(
                f"test.views={count}: changes images, but the items are {run.data.item}s; leave it at 1 (encoder.views has changed "
                "copies of what is encoded)"
            )
        if run.augment is None:
            raise UserError(f"test.views={count}: needs changes to average over; add augment=standard")
        return Views(run.augment, count, run.config.seed, run.hardware)

    def _probabilities(self, run: Run, scores: Scores, observed: Observed, validated: int) -> dict[str, Any]:
        """Numbers beside the mean: the calibration, the worst class and the worst episodes, and unknown classes."""
        hardware, count = run.hardware, run.config.test.episodes
        observed.gather(hardware)
        worst = result.key(result.TEST, result.WORST_CLASS)
        found: dict[str, Any] = {
            result.key(result.TEST, result.FIFTH_PERCENTILE): float(np.quantile(scores.final.numpy(), 0.05)),
            result.key(result.TEST, result.CALIBRATION): observed.describe(validated),
        }
        found[worst], found[f"{worst}{result.CI95}"] = metrics.interval(observed.worst, shares=True)
        run.logger.picture("test/reliability", reliability_diagram(observed.after.bins()))
        if self.with_unknown:
            unknown, temperature = run.config.test.unknown_ways, observed.temperature
            with draws.untouched(hardware.device):
                sides = [
                    known_and_unknown(run.algorithm, sampler, number, run.test_task, unknown, temperature, hardware)
                    for sampler, number in ((self.with_unknown["val"], validated), (self.with_unknown["test"], count))
                ]
            found[result.key(result.TEST, result.UNKNOWN)] = tell_apart(*sides)
        return found

    def _record(self, run: Run, scores: Scores) -> None:
        """Leaves the score of every episode, for paired comparisons, and curves."""
        if run.hardware.world.main:
            # Of every test episode [steps, episodes] after each of `steps` [steps].
            values = scores.values.numpy()
            files.save_arrays(run.folder / "test_scores.npz", steps=np.array(scores.steps), values=values)
        curves = run.result.get(result.key(result.TEST, result.CURVES), {})
        for name, curve in curves.items():
            for point, value in enumerate(curve["mean"]):
                run.logger.curve(result.key(result.TEST, name), value, point)
        name = "mse_median" if scores.power else result.ACCURACY
        for step, values in zip(scores.steps, scores.values, strict=True):
            value = metrics.median(values) if scores.power else values.mean().item()
            run.logger.curve(f"{result.TEST}/{name}_{result.AFTER_INNER_STEPS}", value, step)

    def _baseline(self, run: Run, steps: list[int]) -> dict[str, Any]:
        """The numbers of the same method with the weights that it had before any training of this run."""
        assert run.learner.fresh is not None
        algorithm, hardware = run.learner.fresh(), run.hardware
        algorithm.to(hardware.device)
        algorithm.vectorize = hardware.vectorize
        kind = result.BEFORE_TRAINING if algorithm.backbone.pretrained else result.UNTRAINED
        count = run.config.test.baseline_episodes
        return summary(evaluate(algorithm, self.episodes, count, hardware, steps, views=self.views), kind)

    def protocol(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = {"test": run.test_task.describe()}
        if self.views is not None:
            found["test_views"] = self.views.count
        if run.test_task.unlabelled:
            found["uses_unlabelled"] = run.algorithm.uses_unlabelled or run.algorithm.prepare is not None
        return found


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
        for name, found in self.data.measures(predictions, targets).items():
            self.values[name][rows] = found.double().cpu()

    def gather(self, hardware: Hardware) -> dict[str, Tensor]:
        """The values of all episodes by name, the same in every rank, float64 `[episodes]`."""
        hardware.world.all_reduce(list(self.values.values()))
        return self.values


def summary(scores: Scores, kind: str) -> dict[str, Any]:
    """The numbers of one test.

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
            steps[str(step)] = {"acc": mean, "acc_ci95": ci95}
    found = {result.key(kind, name): value for name, value in steps[str(scores.steps[-1])].items()}
    found[result.key(kind, result.EPISODES)] = scores.values.shape[1]
    if len(steps) > 1 or scores.power:
        found[result.key(kind, result.AFTER_INNER_STEPS)] = steps
    return found


def own_measures(scores: Scores) -> dict[str, Any]:
    """The method's own measures with their intervals: `test/NAME`, and curves under `test/curves`."""
    found: dict[str, Any] = {}
    for name, values in scores.measures.items():
        key = result.key(result.TEST, name)
        pairs = [metrics.interval(column) for column in values.reshape(len(values), -1).T]
        if values.ndim == 1:
            found[key], found[f"{key}{result.CI95}"] = pairs[0]
        else:
            means, widths = zip(*pairs, strict=True)
            curves = found.setdefault(result.key(result.TEST, result.CURVES), {})
            curves[name] = {"mean": list(means), "ci95": list(widths)}
    return found
