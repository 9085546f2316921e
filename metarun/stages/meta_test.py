"""The stage that tests a learner on episodes of the test classes, of one data set or of several."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun import files
from metarun.config.task_schema import SIZES
from metarun.core import TaskShape
from metarun.data.domains import named
from metarun.data.source import DataSource, EpisodeSampler, Split
from metarun.data.test_sets import rule
from metarun.engine.evaluate import Scores, evaluate, prepared_tasks
from metarun.engine.probabilities import Observed, known_and_unknown, tell_apart, validation_temperature
from metarun.engine.views import Views
from metarun.errors import UserError
from metarun.ops import draws, metrics
from metarun.ops.measures import ACCURACY, MEDIAN_ERROR, UNDEFINED
from metarun.ops.modes import evaluating
from metarun.report.reliability import reliability_diagram
from metarun.report.task import task_picture
from metarun.runs import contents, result
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.compatibility import check_test_task
from metarun.stages.scores import Measured, over_sets, own_measures, summary
from metarun.stages.training_data import warn_namesakes
from metarun.target.base import Own
from metarun.text import counted, shape_text

log = logging.getLogger("metarun")


@dataclass
class Test:
    """The test on one data set.

    Attributes:
        name: That of the data set; empty for the only one.
        task: The shape of its tasks.
        described: The tasks as `protocol` of `result.json` has them.
        episodes: Its episodes.
        with_unknown: Episodes with more classes than a support set has, where `test.unknown_ways` asks for them.
    """

    name: str
    task: TaskShape
    described: dict[str, Any]
    episodes: EpisodeSampler
    with_unknown: dict[Split, EpisodeSampler] = field(default_factory=dict)

    def key(self, kind: str, measure: str) -> str:
        """Returns the key of a number in `result.json`."""
        return result.key(result.of_set(kind, self.name), measure)


class MetaTest(Stage):
    """Tests the weights at hand, once, on episodes of the test classes; chance and the method before training stand beside it.

    With `test.data`, or where several data sets are trained on, each data set has a test of its own, and the main numbers are
    means over the data sets.
    """

    needs_weights = True
    measures = result.TEST
    meta_tests = True
    reads = ("train.validate_episodes",)  # those that the temperature is fitted on

    def prepare(self, run: Run) -> None:
        if not run.tests:
            raise UserError(
                f"recipe.stages: {self} is carried out within a stage that does not say so; set meta_tests = True in its class"
            )
        device, task = run.hardware.device, run.test_task
        self.classifies = run.algorithm.spec.kind == "classification"
        self.tests = [self._test(run, name) for name in run.tests]
        self.namesakes = {test.name: warn_namesakes(run, run.tests[test.name], test.name) for test in self.tests}
        self.validation = None
        if self.classifies:
            try:
                self.validation = run.episodes("val", task, device)
            except UserError as error:  # too few classes for such tasks, say
                log.warning("test: probabilities get no temperature, for want of validation tasks (%s)", error)
        self.views = self._views(run)

    @property
    def of_many(self) -> bool:
        """Whether several data sets, which have names, are tested on."""
        return [test.name for test in self.tests] != [""]

    def _test(self, run: Run, name: str) -> Test:
        """The test on one data set.

        Raises:
            UserError: The data set cannot serve such tasks, or the method cannot be tested on them; it names the set.
        """
        task = own_task(run, name)

        def prepared() -> Test:
            if name and (classes := len(run.tests[name].members[""].splits["test"])) < task.needed_ways:
                listed = f"test.data.{name}.ways={classes} tests on tasks of {classes}, and " if classes > 1 else ""
                raise UserError(
                    f"has {counted(classes, 'class', 'classes')} to test on, which is below test.task.ways={task.needed_ways}; "
                    f"{listed}test.data=[...] leaves it out"
                )
            check_test_task(run.learner, task)
            episodes = run.episodes("test", task, run.hardware.device, name)
            found = Test(name, task, run.tests[name].describe_tasks("test", task), episodes)
            warn_cut_short(found)
            found.with_unknown = self._with_unknown(run, found)
            return found

        where = f"{'test.data' if run.config.test.data else 'data'}: {name}"
        test: Test = named(where, prepared) if name else prepared()
        return test

    def execute(self, run: Run) -> None:
        algorithm, hardware, number = run.algorithm, run.hardware, run.learner.settings.validate_episodes
        for test in self.tests:
            run.tests[test.name].make_ready(hardware.device, "test")
        if self.validation is not None:
            run.data.make_ready(hardware.device, "val")
        last = algorithm.test_steps
        steps = [step for step in range(last + 1) if step in (0, 1, 5, 10, last) or last <= 10]
        temperature = self.temperature_alone = None
        if self.classifies and self.validation is not None:
            wanted = (algorithm, self.validation, number, run.test_task, hardware)
            temperature = self.temperature_alone = validation_temperature(*wanted, self.views)
            if self.views is not None and any(test.with_unknown for test in self.tests):
                self.temperature_alone = validation_temperature(*wanted)
        self.finals: dict[str, list[Tensor]] = {}  # of each kind the accuracies on each data set
        for test in self.tests:
            self._carry_out(run, test, steps, temperature, number)
        if self.validation is not None:
            run.result |= self._of_single_images(run, number)
        finals = over_sets(self.finals[result.TEST])
        run.result["interval"] = metrics.interval_told(
            finals[torch.isfinite(finals)], "episodes", shares=self.classifies
        )
        if self.of_many:
            self._conclude(run, temperature)

    def _carry_out(self, run: Run, test: Test, steps: list[int], temperature: float | None, validated: int) -> None:
        algorithm, settings, hardware = run.algorithm, run.config.test, run.hardware
        observed = Observed(settings.episodes, temperature) if self.classifies else None
        measured = Measured(run.tests[test.name], settings.episodes)
        with run.logger.progress(f"testing {test.name}".rstrip(), settings.episodes) as advance:
            scores = evaluate(
                algorithm,
                test.episodes,
                settings.episodes,
                hardware,
                steps,
                advance,
                measure=True,
                observe=observed if observed is not None else measured,
                curves=not test.task.varies,
                views=self.views,
            )
        if observed is None:
            scores.measures |= measured.gather(hardware)
        kind = result.of_set(result.TEST, test.name)
        if scores.undefined:
            run.result[test.key(result.TEST, UNDEFINED)] = scores.undefined
            log.warning(
                "%s: %s of %s test tasks have predictions that are no numbers, which count as wrong; smaller inner steps, or another "
                "temperature, may keep the method from diverging", kind, scores.undefined, settings.episodes,
            )  # fmt: skip
        run.result |= summary(scores, kind) | own_measures(scores, kind)
        self.finals.setdefault(result.TEST, []).append(scores.final)
        if observed is not None:
            run.result |= self._probabilities(run, test, scores, observed, validated)
        self._record(run, test, scores)
        self._picture(run, test)
        if settings.baseline_episodes:
            run.result |= self._baseline(run, test, steps)
        if not scores.power:
            ways = test.task.ways
            chance = 1 / ways if isinstance(ways, int) else 0.0
            if isinstance(ways, tuple) and observed is not None:
                chance = observed.chance.mean().item()
            run.result[test.key(result.CHANCE, ACCURACY)] = chance

    @torch.no_grad()
    def _picture(self, run: Run, test: Test) -> None:
        """Shows the first test task and what was predicted of it, and where it is one function also before the inner steps."""
        if not run.hardware.world.main or self.views is not None:  # views predict otherwise
            return
        algorithm, hardware = run.algorithm, run.hardware
        with draws.untouched(hardware.device), evaluating(algorithm):
            _, task = next(prepared_tasks(algorithm, test.episodes, 0, 1, hardware))
            with hardware.autocast():
                before, after = algorithm.predict_after(task, [0, algorithm.test_steps])[[0, -1]]
        if png := task_picture(task, before, after):
            files.save_bytes(run.folder / contents.task_file(test.name), png)
            run.logger.picture(test.key(result.TEST, "task"), png)

    def _conclude(self, run: Run, temperature: float | None) -> None:
        """Records the means over the data sets, and what each data set is."""
        for kind in (result.TEST, *result.BASELINES, result.CHANCE):
            key = result.key(kind, ACCURACY)
            values: list[Any] = [run.result.get(test.key(kind, ACCURACY)) for test in self.tests]
            if None in values:
                continue
            run.result[key] = math.fsum(values) / len(values)
            if kind != result.CHANCE:
                run.result[result.half_of(key)] = metrics.interval(over_sets(self.finals[kind]), shares=True)[1]
                counts = [run.result[test.key(kind, result.EPISODES)] for test in self.tests]
                run.result[result.key(kind, result.EPISODES)] = sum(counts)
        run.result[result.key(result.TEST, result.SETS)] = {name: data.describe() for name, data in run.tests.items()}
        run.result[result.key(result.TEST, result.CALIBRATION)] = {"temperature": temperature}
        # They were chosen on the source's validation episodes, whatever data set was tested on.
        told = (run.result.get(test.key(result.TEST, result.UNKNOWN)) for test in self.tests)
        if first := next(filter(None, told), None):
            chosen = {name: first[name] for name in ("certainty", "thresholds")}
            run.result[result.key(result.TEST, result.UNKNOWN)] = chosen

    def _with_unknown(self, run: Run, test: Test) -> dict[Split, EpisodeSampler]:
        more = run.config.test.unknown_ways
        if not more:
            return {}
        if not self.classifies:
            raise UserError(
                f"test.unknown_ways={more}: is of classes, but the data are regression tasks; leave it at 0"
            )
        if test.task.unlabelled:  # they are of all classes that are drawn, and nothing says of which
            raise UserError(
                f"test.unknown_ways={more}: is of classes that a task shows nothing of, but test.task.unlabelled={test.task.unlabelled} "
                "would show items of them; set one of the two to 0"
            )
        task, seed, device = replace(test.task, query_dirichlet=None), run.config.seed, run.hardware.device
        sources: dict[Split, DataSource] = {"val": run.data, "test": run.tests[test.name]}
        return {split: source.with_unknown(split, task, more, seed, device) for split, source in sources.items()}

    def _views(self, run: Run) -> Views | None:
        """Makes the copies of test tasks that `test.views` asks for."""
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

    def _probabilities(
        self, run: Run, test: Test, scores: Scores, observed: Observed, validated: int
    ) -> dict[str, Any]:
        """Numbers beside the mean: the calibration, the worst class and the worst episodes, and unknown classes."""
        hardware, count = run.hardware, run.config.test.episodes
        observed.gather(hardware)
        worst = test.key(result.TEST, result.WORST_CLASS)
        found: dict[str, Any] = {
            test.key(result.TEST, result.FIFTH_PERCENTILE): float(np.quantile(scores.final.numpy(), 0.05)),
            test.key(result.TEST, result.CALIBRATION): observed.describe(validated),
        }
        found[worst], found[result.half_of(worst)] = metrics.interval(observed.worst, shares=True)
        run.logger.picture(test.key(result.TEST, "reliability"), reliability_diagram(observed.after.bins()))
        if test.with_unknown:
            # One task at a time, as `predict` does, whatever copies of it the test averages over.
            unknown, temperature = run.config.test.unknown_ways, self.temperature_alone
            with draws.untouched(hardware.device):
                sides = [
                    known_and_unknown(run.algorithm, sampler, number, test.task, unknown, temperature, hardware)
                    for sampler, number in ((test.with_unknown["val"], validated), (test.with_unknown["test"], count))
                ]
            found[test.key(result.TEST, result.UNKNOWN)] = tell_apart(*sides)
        return found

    def _of_single_images(self, run: Run, validated: int) -> dict[str, Any]:
        """What a classifier of single images goes by, where it does not predict as the test does; nothing where it does.

        With the norm `batch` episodes are normalised by their queries too, and single images by the support set alone; no single
        image is averaged over the copies of `test.views`; and beside its examples there are no unlabelled items to learn from. The
        scores are others, and so are the temperature and the thresholds that suit them.
        """
        inductive, hardware, task = Own(run.algorithm).inductive, run.hardware, run.test_task
        learns_more = task.unlabelled and (inductive.uses_unlabelled or inductive.prepare is not None)
        if (inductive is run.algorithm and self.views is None and not learns_more) or self.validation is None:
            return {}
        alone = copy.copy(inductive)  # with the same weights
        alone.prepare, alone.vectorize = None, hardware.vectorize
        labelled = replace(task, unlabelled=0, distractors=0)
        episodes = run.episodes("val", labelled, hardware.device) if learns_more else self.validation
        temperature = validation_temperature(alone, episodes, validated, labelled, hardware)
        found: dict[str, Any] = {"temperature": temperature}
        for test in self.tests[:1] if self.tests[0].with_unknown else []:
            with draws.untouched(hardware.device):
                own = known_and_unknown(
                    alone,
                    test.with_unknown["val"],
                    validated,
                    test.task,
                    run.config.test.unknown_ways,
                    temperature,
                    hardware,
                )
            told = tell_apart(own, own)
            found |= {name: told[name] for name in ("thresholds", "certainty")}
        return {result.key(result.TEST, result.OF_SINGLE_IMAGES): found}

    def _record(self, run: Run, test: Test, scores: Scores) -> None:
        """Leaves the score of every episode, for paired comparisons, and curves."""
        if run.hardware.world.main:
            # Of every test episode [steps, episodes] after each of `steps` [steps].
            values = scores.values.numpy()
            files.save_arrays(run.folder / contents.scores_file(test.name), steps=np.array(scores.steps), values=values)
        curves = run.result.get(test.key(result.TEST, result.CURVES), {})
        for name, curve in curves.items():
            for point, value in enumerate(curve["mean"]):
                run.logger.curve(test.key(result.TEST, name), value, point)
        name = MEDIAN_ERROR if scores.power else ACCURACY
        for step, values in zip(scores.steps, scores.values, strict=True):
            value = metrics.median(values) if scores.power else values.mean().item()
            run.logger.curve(test.key(result.TEST, f"{name}_{result.AFTER_INNER_STEPS}"), value, step)

    def _baseline(self, run: Run, test: Test, steps: list[int]) -> dict[str, Any]:
        """Measures the same method with the weights that it had before any training.

        There are none where it still has them, and where the weights that a loaded run began with are there no more.
        """
        assert run.learner.fresh is not None
        try:
            algorithm, hardware = run.learner.fresh(), run.hardware
        except UserError as error:
            log.warning("test: no numbers of the method before its training stand beside these (%s)", error)
            return {}
        algorithm.to(hardware.device)
        before = algorithm.state_dict()
        if all(torch.equal(value, before[name]) for name, value in run.algorithm.state_dict().items()):
            return {}
        algorithm.vectorize = hardware.vectorize
        kind = result.BEFORE_TRAINING if algorithm.backbone.pretrained else result.UNTRAINED
        count = run.config.test.baseline_episodes
        scores = evaluate(algorithm, test.episodes, count, hardware, steps, views=self.views)
        self.finals.setdefault(kind, []).append(scores.final)
        return summary(scores, result.of_set(kind, test.name))

    def protocol(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = {"test": run.test_task.describe() if self.of_many else self.tests[0].described}
        found |= self.namesakes.get("", {})
        if self.views is not None:
            found["test_views"] = self.views.count
        if run.test_task.unlabelled:
            found["uses_unlabelled"] = run.algorithm.uses_unlabelled or run.algorithm.prepare is not None
        if self.of_many:
            shape = shape_text(run.data.input_shape)
            found["test_mean"] = (
                f"test/acc is the mean over {len(self.tests)} data sets, each counting alike; its interval is over the episodes' "
                "numbers, each with its mean over the sets: their ways and shots are drawn alike in all of them"
            )
            found["test_images"] = (
                "encoded as those that are trained on"
                if run.config.encoder
                else f"at the size that the network takes, {shape}: read so from their files where the data set can, else resized "
                "bilinearly; grey is repeated as colours, colours become their mean; pixels are normalised by the training images of "
                "what is trained on"
            )
            found[result.SETS] = {
                test.name: {
                    "task": test.described,
                    **rule(run.tests[test.name].members[""], not run.config.encoder, run.data),
                    **self.namesakes[test.name],
                }
                for test in self.tests
            }
        return found


def own_task(run: Run, name: str) -> TaskShape:
    """Returns the shape of the test tasks of a data set."""
    node = run.config.test.data.get(name) or {}
    own = {part: node.get(part) for part in SIZES}
    return replace(run.test_task, **{part: value for part, value in own.items() if value is not None})


def warn_cut_short(test: Test) -> None:
    """Warns where classes of the test's tasks get fewer queries than Dirichlet's shares."""
    if (most := test.described.get("queries_at_most")) is not None:
        log.warning(
            "%stest.task.query_dirichlet=%g: the smallest class has %d images beside its shots; the %.1f%% of shares that are larger "
            "are cut to that, and the others get the rest: classes are less unequal than by Dirichlet's distribution",
            f"{test.name}: " if test.name else "",
            test.task.query_dirichlet,
            most,
            100 * test.described["classes_cut_short"],
        )
