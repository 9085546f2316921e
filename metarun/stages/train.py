"""The stage that trains a method on the source."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import metarun
from metarun import files
from metarun.config import check_chosen, flat
from metarun.data.image_batches import Labelled, make_ready
from metarun.data.source import EpisodeSampler
from metarun.encoders import before_encoding
from metarun.engine import checkpoint
from metarun.engine.distributed import World
from metarun.engine.evaluate import classified, evaluate
from metarun.engine.learner import Trainable
from metarun.engine.train import Validate, fit
from metarun.errors import UserError, nearest
from metarun.ops import batch_norm, metrics
from metarun.runs import contents, result, seen
from metarun.runs.fingerprints import descriptions, weights
from metarun.runs.folder import FREE, create, identity
from metarun.runs.logger import RunLogger
from metarun.runs.provenance import git_commit
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.compatibility import check_shares, check_test_task
from metarun.stages.learning import build_learner, told_of, training_protocol
from metarun.stages.training_data import held_out_images
from metarun.text import shown_path

log = logging.getLogger("metarun")

RULES = 3  # the version of the rules by which weights are trained and selected: a stage kept under others is not reused


class Train(Stage):
    """Trains a method on the source, and takes the weights that were best on validation.

    The weights lie in the run's own folder, or apart, in a folder named by everything that they depend on: where a later
    stage trains on, or where runs often differ in a later stage alone. Such a stage is trained once for all runs that need
    the same.
    """

    gives_weights = True
    learner: Trainable

    def __init__(
        self,
        *,
        name: str = "train",
        algo: str = "algo",
        train: str = "train",
        wrapper: str | None = "wrapper",
        start_from: str | None = None,
    ) -> None:
        """Names the parts of the config that the stage uses.

        Args:
            name: The stage's name: of its folder, and of its numbers in `result.json` if a later stage trains on.
            algo: The key of the method in the config, such as `pretrain.algo`.
            train: The key of the settings of its training, such as `pretrain.train`.
            wrapper: The key of what goes around the method while it is trained; null for nothing.
            start_from: The name of an earlier stage, whose learner hands on what it learned; null to start anew.
        """
        self.name, self.algo, self.train, self.wrapper, self.start_from = name, algo, train, wrapper, start_from

    def __str__(self) -> str:
        return self.name

    def trains_by(self) -> tuple[str, ...]:
        return "optimizer", "schedule", self.algo, self.train

    def check(self, config: DictConfig, world: World) -> None:
        super().check(config, world)
        for parameter in ("algo", "train", "wrapper"):
            check_key(config, self, parameter)
        settings = OmegaConf.select(config, self.train)
        for part in ("optimizer", "schedule"):
            check_chosen(settings.get(part), f"{self.train}.{part}")
        if not {"steps", "tasks_per_step"} <= settings.keys():
            return  # `prepare` says so
        # Without time, or on vectors that leave nothing to train, there is no step to share: `prepare` knows.
        if settings.get("max_seconds") != 0 and not config.encoder:
            check_shares(settings, world, self.train)

    def prepare(self, run: Run) -> None:
        if not run.config.recipe.source:
            raise UserError(
                f"recipe.source=false: its stage {self} trains on a source; set it true, or leave the stage out"
            )
        if self.start_from is not None and self.start_from not in run.learners:
            raise UserError(
                f"recipe.stages: {self}.start_from={self.start_from}: no stage before it has this name"
                f"{nearest(self.start_from, run.learners)}"
            )
        self.learner = build_learner(run, self.name, self.algo, self.train, self.wrapper, trains=True)
        if self.learner.settings.steps:
            tasks = self.learner.settings.tasks_per_step
            earlier = None if self.start_from is None else run.learners[self.start_from].algorithm
            self.learner.algorithm.check(tasks, earlier=earlier)
        self.held_out = held_out_images(run, self.learner)
        self.validation: EpisodeSampler | None = None
        later = run.later(self)
        self.last = not any(stage.gives_weights for stage in later)
        self.apart = not self.last or any(stage.shares_training for stage in later)
        self.chooses = bool(self.learner.settings.steps) or not later
        if self.held_out is None:
            check_test_task(self.learner, run.test_task)
            self.validation = self._validation_tasks(run)
        if self.start_from is not None:
            before = run.learners[self.start_from]
            self.learner.seen = seen.merged(self.learner.seen, before.seen)
            self.learner.origins = list({one.where: one for one in (*before.origins, *self.learner.origins)}.values())
        self.learner.selected_by = self._selected_by()
        run.add(self.name, self.learner)

    def _validation_tasks(self, run: Run) -> EpisodeSampler | None:
        """The validation tasks; None where there are too few classes for them, and nothing is chosen by them.

        Raises:
            UserError: There are too few, and weights are chosen by them.
        """
        try:
            return run.episodes("val", run.test_task, self.learner.hardware.device)
        except UserError:
            if self.chooses:
                raise
            return None

    def _selected_by(self) -> str:
        if not self.learner.settings.steps:
            return result.NOT_TRAINED
        of_target = self.learner.algorithm.uses_target == "labels"
        held_out = "target, whose labels it trains on" if of_target else "source"
        return "best validation score" + (
            f" on held-out {self.held_out.item}s of the {held_out}" if self.held_out else ""
        )

    def execute(self, run: Run) -> None:
        if self.start_from is not None:
            self._inherit(run.learners[self.start_from])
        if self.apart:
            numbers = self._train_apart(run)
        else:
            self.make_ready(run)
            shown = self.validation if run.data.item == "image" else None
            if shown is not None and not (run.folder / contents.LAST).exists():
                run.logger.tasks(next(shown(0, 1).split(1)))
            target = run.target.source if run.target else None
            told = {role: each.get("fingerprint") for role, each in descriptions(run.data, target).items()}
            self.learner.made_by = files.digest({"config": identity(run.config), "data": told})
            numbers = self._train_in(run, run.folder, run.logger)
            run.result[result.MADE_BY] = self.learner.made_by
        if self.learner.settings.steps and numbers[result.TRAIN_STEPS] <= self.learner.settings.validate_every:
            self.learner.selected_by = result.VALIDATED_ONCE  # of one candidate none is the best
        if not self.last:
            own = f"{result.TRAIN}/"
            numbers = {result.key(self.name, key.removeprefix(own)): value for key, value in numbers.items()}
        run.result |= numbers

    def _inherit(self, before: Trainable) -> None:
        """Takes over what an earlier stage learned; without a step the weights are those that it chose, unless it but taught them."""
        backbone = self.learner.algorithm.backbone
        own = {name: value.clone() for name, value in backbone.state_dict().items()}
        self.learner.algorithm.inherit(before.algorithm)
        taken = any(not torch.equal(value, own[name]) for name, value in backbone.state_dict().items())
        if taken and not self.learner.settings.steps and before.selected_by != result.NOT_TRAINED:
            self.learner.selected_by = f"{self.start_from}: {before.selected_by}"

    def make_ready(self, run: Run) -> None:
        """Computes what the items that the training reads are made of, before its clock starts.

        Args:
            run: The run.
        """
        learner, device = self.learner, self.learner.hardware.device
        if learner.settings.steps:
            on_images = learner.task is None and learner.settings.validate_on == "images"
            run.data.make_ready(device, run.training_split if on_images else "train")
            if learner.algorithm.uses_target != "no" and run.target:
                make_ready(device, run.target.train)
        if self.chooses and self.held_out is None:
            run.data.make_ready(device, "val")
        elif self.chooses and self.held_out is not None:
            make_ready(device, self.held_out)

    def _train_in(self, run: Run, folder: Path, logger: RunLogger) -> dict[str, Any]:
        """Trains in `folder`, takes the best weights, and returns numbers for `result.json`."""
        validate = self._validation() if self.chooses else None
        # A search goes by the score of the last training, and takes one score of each step.
        numbers = fit(self.learner, validate, folder, logger, run.watch if self.last else None)
        return {**numbers, **self._take_best(folder)}

    def _validation(self) -> Validate:
        """Returns what scores the weights, by accuracy or by minus the median error of regression tasks, and says what to log."""
        learner, held_out = self.learner, self.held_out
        algorithm, hardware, episodes = learner.algorithm, learner.hardware, self.validation

        def on_images(images: Labelled) -> tuple[float, dict[str, float]]:
            scores = classified(algorithm, images, hardware, learner.sampler)
            right = metrics.right(scores, torch.from_numpy(images.labels))
            mean = right.mean().item()
            name = result.VALIDATION_ACCURACY
            return mean, {name: mean, result.half_of(name): metrics.reach(mean, metrics.wilson(mean, len(right)))}

        def on_episodes() -> tuple[float, dict[str, float]]:
            assert episodes is not None
            scores = evaluate(algorithm, episodes, learner.settings.validate_episodes, hardware)
            regression = algorithm.spec.kind == "regression"
            measure = result.VALIDATION_ERROR if regression else result.VALIDATION_ACCURACY
            mean, half = metrics.interval(scores.final, shares=not regression)
            shown = {"val/loss": scores.loss, measure: mean}
            if half is not None:  # of few episodes there is none
                shown[result.half_of(measure)] = half
            if not regression:
                return mean, shown
            median = metrics.median(scores.final)
            return -median, {**shown, result.VALIDATION_MEDIAN: median}

        return on_episodes if held_out is None else lambda: on_images(held_out)

    def _take_best(self, folder: Path) -> dict[str, Any]:
        """Takes the weights that the training chose; returns their step, and their score if they have one."""
        learner, world = self.learner, self.learner.hardware.world
        path = checkpoint.chosen(folder)
        best = world.broadcast(checkpoint.load(path, made_by=learner.made_by) if world.main else {})
        checkpoint.load_weights(learner.algorithm, best["model"], path)
        with checkpoint.fitting(path):
            step, score = (
                best["state"][name] if "state" in best else best[own]
                for name, own in (("best_step", "step"), ("best_score", "score"))
            )
            scored = {result.SCORE: score} if score is not None and math.isfinite(score) else {}
            return {result.SELECTED_STEP: step, **scored}

    def _train_apart(self, run: Run) -> dict[str, Any]:
        """Trains in the stage's own folder, or takes the weights from there.

        Of several runs at once one trains and the others wait.
        """
        content = self.depends_on(run)
        self.learner.made_by = files.digest(content)
        folder = Path(run.config.outputs) / "stages" / f"{self.name}-{self.learner.made_by}"
        world = self.learner.hardware.world
        if world.main:
            create(folder)
        waiting = f"stage {self.name}: another run trains it in {folder}"
        with files.locked(folder / ".lock", waiting) if world.main else contextlib.nullcontext():
            if world.main and not (folder / contents.DEPENDS_ON).is_file():
                files.save_json(folder / contents.DEPENDS_ON, content)
            done = world.broadcast((folder / contents.STAGE).is_file() if world.main else False)
            if done:
                log.info("stage %s: trained before, in %s", self.name, folder)
                self._take_best(folder)
                kept = world.broadcast(
                    files.read_json(
                        folder / contents.STAGE, f"delete {shown_path(folder)} to have the stage trained again"
                    )
                    if world.main
                    else {}
                )
            else:
                log.info("stage %s: training in %s", self.name, folder)
                self.make_ready(run)
                logger = RunLogger(folder if world.main else None)
                try:
                    numbers = self._train_in(run, folder, logger)
                finally:
                    logger.close()
                commit = git_commit() if world.main else None
                kept = {result.GIT_COMMIT: commit, result.MADE_BY: self.learner.made_by, **numbers}
                if world.main:
                    files.save_json(folder / contents.STAGE, kept)
        commit = kept.pop(result.GIT_COMMIT, None)  # stages of older versions have none
        kept.pop(result.MADE_BY, None)  # which is in the folder's name
        way = checkpoint.way_to(folder, run.folder)
        record = {"folder": str(folder), "from_run": way, "reused": done, result.GIT_COMMIT: commit}
        run.result.setdefault(result.STAGES, {})[self.name] = record
        return dict(kept)

    def depends_on(self, run: Run) -> dict[str, Any]:
        """Lists everything that the weights depend on: the stage's own part of the config, the images, and the stage before."""
        config, learner = run.config, self.learner
        parts = {
            "algo": self.algo,
            "train": self.train,
            "wrapper": self.wrapper,
            "backbone": "backbone",
            "augment": "augment",
        }
        whole = {part: OmegaConf.select(config, key) for part, key in parts.items() if key}
        values = flat({part: OmegaConf.to_container(node, resolve=True) for part, node in whole.items() if node})
        settings: dict[str, Any] = {
            key: value for key, value in values.items() if key not in FREE and not key.startswith("train.task.")
        }
        if learner.task is not None:
            settings["train.task"] = learner.task.describe()
        if self.held_out is None:
            settings["test.task"] = run.test_task.describe()
        if learner.algorithm.uses_target != "no" and run.target:
            settings["target"] = run.target.source.describe()["fingerprint"]
            # Those that the stage reads: settings of the target that are not of its data leave some out.
            read = (run.target.train, run.target.validation)
            settings["target.images"] = files.digest([images.rows.tolist() for images in read])
            settings |= {f"target.{key}": value for key, value in read_as(config.target.data).items()}
        settings |= {key: told["fingerprint"] for key, told in weights(config).items()}
        before = None if self.start_from is None else run.learners[self.start_from]
        earlier = next((stage for stage in run.stages if before and stage.learner is before), None)
        return {
            "stage": self.name,
            "metarun": metarun.__version__,
            "rules": RULES,
            "after": files.digest(earlier.depends_on(run)) if earlier else "",
            "seed": config.seed,
            "autocast": config.hardware.autocast,
            "tf32": config.hardware.tf32,
            "data": {
                **run.data.describe(),
                "input_shape": list(run.data.input_shape),
                "settings": read_as(config.data),
            },
            "classes": run.training_split or "all",
            "settings": dict(sorted(settings.items())),
        }

    def protocol(self, run: Run) -> dict[str, Any]:
        learner, settings = self.learner, self.learner.settings
        split, images = run.training_split, settings.validate_on == "images"
        whose = "all classes" if split is None and images else "the training classes"
        labels = {"images": "without", "labels": "with"}.get(learner.algorithm.uses_target)
        target = (
            f" and the target's training {run.target.kind if run.target else 'images'} {labels} their labels"
            if labels
            else ""
        )
        held = "the target" if labels == "with" else "the same classes"
        items = f"{before_encoding(run.data).item}s"
        if not settings.steps:
            text = "none: nothing was trained"
        elif learner.task is not None:
            text = f"{run.data.tasks_of('train')}; for validation {run.data.tasks_of('val')}"
        elif images:
            text = f"the training {items} of {whose}{target}; for validation held-out {items} of {held}"
        else:
            text = f"all {items} of {whose}{target}; for validation episodes of the validation classes"
        found: dict[str, Any] = {result.SEEN: {**told_of(learner.origins), self.name: text}}
        if self.held_out is not None:
            found["labelled_images"] = batch_norm.labelled_rule(run.algorithm.backbone.norm)
        trained = training_protocol(learner)
        if not self.last:
            return found | {result.key(self.name, key): value for key, value in trained.items()}
        found |= trained
        if self.held_out is None:
            found["test"] = run.test_task.describe()
        return found


def read_as(data: DictConfig) -> dict[str, Any]:
    """The settings of a data set, which say how its files become images; where they lie changes nothing."""
    values = flat(OmegaConf.to_container(data, resolve=True))
    return {key: value for key, value in sorted(values.items()) if "root" not in key.split(".")}


def check_key(config: DictConfig, stage: Stage, parameter: str) -> None:
    """Checks that a setting of a stage which is a key of the config leads to a part of the config.

    Raises:
        UserError: It does not.
    """
    key = getattr(stage, parameter)
    if key is None and parameter == "wrapper":
        return
    if not OmegaConf.is_dict(OmegaConf.select(config, str(key))):
        names = [name for name in map(str, config) if OmegaConf.is_dict(config[name])]
        known = [*names, *(f"{top}.{name}" for top in names for name in map(str, config[top]))]
        raise UserError(f"recipe.stages: {stage}.{parameter}={key}: is no part of the config{nearest(str(key), known)}")
    if parameter == "algo" and not OmegaConf.select(config, key):
        raise UserError(
            f"{key}: must be given, since the stage {stage} trains it; add /algo@{key.rpartition('.')[0]}: baseline"
        )
