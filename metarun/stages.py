"""The stages that recipes are lists of: each a function of a `Run`, called in every rank."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

import metarun
from metarun import files
from metarun.config import flat, to_container
from metarun.core import Algorithm, TaskShape
from metarun.data.source import DataSource, EpisodeSampler
from metarun.engine import checkpoint
from metarun.engine.evaluate import Scores, classified, evaluate
from metarun.engine.hardware import Hardware
from metarun.engine.train import fit
from metarun.errors import UserError
from metarun.learner import Learner, build_algorithm
from metarun.ops import metrics
from metarun.report.target import learning_curve
from metarun.runs.folder import FREE, create
from metarun.runs.logger import RunLogger
from metarun.runs.provenance import git_commit
from metarun.target import predictions
from metarun.target.base import TargetMethod
from metarun.target.predictions import Predicted
from metarun.target.target import Target

log = logging.getLogger("metarun")

# As recipes name them.
PRETRAIN, TRAIN, FINETUNE, TARGET_TEST, META_TEST = (
    f"metarun.stages.{stage}" for stage in ("pretrain", "train", "finetune", "target_test", "meta_test")
)


@dataclass
class Run:
    """What the stages of a run share: its config, what was built from it, and the result so far."""

    config: DictConfig
    data: DataSource
    learner: Learner
    folder: Path
    logger: RunLogger
    train_task: TaskShape
    test_task: TaskShape
    samplers: dict[str, EpisodeSampler]  # of episodes, by split
    pretraining: Learner | None = None
    target: Target | None = None
    method: TargetMethod | None = None  # of the stage `finetune`
    result: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[int, float], bool] | None = None  # asked after each validation whether to give up
    after: str = ""  # the key of the stage whose weights the next one starts from

    @property
    def algorithm(self) -> Algorithm:
        return self.learner.algorithm

    @property
    def hardware(self) -> Hardware:
        return self.learner.hardware


def pretrain(run: Run) -> None:
    """Trains the method of `pretrain.algo` on the source, and hands on what it learned to the run's own."""
    assert run.pretraining is not None
    numbers = train_apart(run, run.pretraining)
    run.result |= {f"pretrain/{name.removeprefix('train/')}": value for name, value in numbers.items()}
    run.algorithm.inherit(run.pretraining.algorithm)


def train(run: Run) -> None:
    """Trains the run's method; `best.pt` has the weights that were best on validation.

    In the run's own folder, or apart if later stages use the weights on a target: runs that differ in these share it.
    """
    stages = run.config.recipe.stages
    if FINETUNE in stages:
        run.result |= train_apart(run, run.learner)
        return
    if run.samplers and not (run.folder / "last.pt").exists():
        run.logger.tasks(run.samplers["val"](0, 1))
    run.result |= fit_learner(run, run.learner, run.folder, run.logger, run.watch)


def fit_learner(
    run: Run, learner: Learner, folder: Path, logger: RunLogger, watch: Callable[[int, float], bool] | None = None
) -> dict[str, Any]:
    """Trains `learner` in `folder`, takes the weights that were best on validation, and returns numbers for `result.json`."""
    algorithm, settings = learner.algorithm, learner.settings
    regression = algorithm.spec.kind == "regression"

    def validate() -> tuple[float, dict[str, float]]:
        if learner.held_out:
            logits = classified(algorithm, learner.held_out, learner.hardware, learner.sampler)
            right = (logits.argmax(1) == torch.from_numpy(learner.held_out.labels)).double()
            mean = right.mean().item()
            return mean, {"val/acc": mean, "val/acc_ci95": metrics.reach(mean, metrics.wilson(mean, len(right)))}
        scores = evaluate(algorithm, run.samplers["val"], settings.validate_episodes, learner.hardware)
        measure = "mse" if regression else "acc"
        mean, half = metrics.interval(scores.final, shares=not regression)
        shown = {"val/loss": scores.loss, f"val/{measure}": mean}
        if half is not None:  # of few episodes there is none
            shown[f"val/{measure}_ci95"] = half
        if not regression:
            return mean, shown
        median = metrics.median(scores.final)
        return -median, {**shown, "val/mse_median": median}

    numbers = fit(
        algorithm,
        learner.sampler or run.samplers["train"],
        validate,
        learner.optimizer,
        learner.schedule,
        settings,
        run.config.seed,
        learner.hardware,
        folder,
        logger,
        watch,
        learner.wrapper,
    )
    return {**numbers, **take_best(run, learner, folder)}


def take_best(run: Run, learner: Learner, folder: Path) -> dict[str, Any]:
    """The weights of `best.pt` into the learner; their step and score."""
    world = learner.hardware.world
    best = world.broadcast(checkpoint.load(folder / "best.pt") if world.main else {})
    checkpoint.load_weights(learner.algorithm, best["model"], folder / "best.pt")
    return {"train/selected_step": best["step"], "val/score": best["score"]}


def train_apart(run: Run, learner: Learner) -> dict[str, Any]:
    """Trains `learner` in a folder named by all that its weights depend on, or takes them from there.

    So a stage is trained once for all runs that need the same. Of several at once one trains and the others wait.
    """
    content = content_of(run, learner)
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    run.after = key
    folder = Path(run.config.outputs) / "stages" / f"{learner.name}-{key}"
    world = run.hardware.world
    if world.main:
        create(folder)
    waiting = f"stage {learner.name}: another run trains it in {folder}"
    with files.locked(folder / ".lock", waiting) if world.main else contextlib.nullcontext():
        if world.main and not (folder / "content.json").is_file():
            files.save_json(folder / "content.json", content)
        done = world.broadcast((folder / "stage.json").is_file() if world.main else False)
        if done:
            log.info("stage %s: trained before, in %s", learner.name, folder)
            take_best(run, learner, folder)
            kept = world.broadcast(json.loads((folder / "stage.json").read_text()) if world.main else {})
        else:
            log.info("stage %s: training in %s", learner.name, folder)
            commit = git_commit() if world.main else None
            logger = RunLogger(folder if world.main else None)
            try:
                numbers = fit_learner(run, learner, folder, logger, run.watch)
            finally:
                logger.close()
            kept = {"git_commit": commit, **numbers}
            if world.main:
                files.save_json(folder / "stage.json", kept)
    commit = kept.pop("git_commit", None)  # stages of older versions have none
    run.result.setdefault("stages", {})[learner.name] = {"folder": str(folder), "reused": done, "git_commit": commit}
    return kept


def content_of(run: Run, learner: Learner) -> dict[str, Any]:
    """All that the weights of a stage depend on, as JSON values."""
    config = run.config
    prefix = "pretrain." if learner is run.pretraining else ""
    whole = flat(to_container(config))
    own = ("algo.", "train.") if not prefix else ("pretrain.",)
    wanted = (*own, "task.", "test.task.", "backbone.", "wrapper.", "augment.")
    kept = {key: value for key, value in whole.items() if key.startswith(wanted) and key not in FREE}
    if learner.algorithm.uses_target != "no" and run.target:
        kept["target"] = run.target.source.describe()["fingerprint"]
    if origin := config.backbone.get("from"):
        kept["backbone.from"] = checkpoint.digest(checkpoint.weights_file("backbone.from", origin))
    if (weights := config.backbone.get("weights")) and (file := Path(weights).expanduser()).is_file():
        kept["backbone.weights"] = checkpoint.digest(file)
    return {
        "stage": learner.name,
        "metarun": metarun.__version__,
        "after": run.after,
        "seed": config.seed,
        "autocast": config.hardware.autocast,
        "data": {**run.data.describe(), "input_shape": list(run.data.input_shape)},
        "settings": dict(sorted(kept.items())),
    }


def finetune(run: Run) -> None:
    """Puts the learner to use on subsets of the target's images, and tests it on the target's test images."""
    config = run.config
    assert run.target is not None
    assert run.method is not None
    run.learner.algorithm.eval()
    run.result |= run.target.measure(run.method, config.seed, run.hardware, run.folder / "target", run.logger)
    if run.hardware.world.main and len(run.result["target/curve"]) > 1:
        picture = learning_curve({"": run.result["target/curve"]}, chance=run.result["target/chance"])
        files.save_bytes(run.folder / "learning_curve.png", picture)
        run.logger.picture("target/learning_curve", picture)


def target_test(run: Run) -> None:
    """Tests what the learner says of the target's test images, as it is."""
    assert run.target is not None
    images = run.target.test
    if run.algorithm.spec.outputs != len(run.target.names) and run.algorithm.uses_target != "labels":
        raise UserError(
            f"target: has {len(run.target.names)} classes, but the source {run.algorithm.spec.outputs}; without training on "
            "the target's labels both must have the same"
        )
    scores = classified(run.algorithm, images, run.hardware, run.learner.sampler)
    found = metrics.classification(scores.numpy(), images.labels)
    run.result |= {f"target/{name}": value for name, value in found.items()}
    halves = metrics.over_images(np.array(found["confusion"]), found.get("auroc"))
    run.result |= {f"target/{name}_ci95": half for name, half in halves.items()}
    run.result["target/over"] = "test images"
    run.result["target/interval"] = f"95%, over the {len(images)} test images, Wilson"
    run.result["target/test_images"] = len(images)
    run.result["target/classes"] = images.names
    if run.hardware.world.main:
        predicted = scores.argmax(1).numpy()
        right = (predicted == images.labels).astype(float)
        files.save_arrays(run.folder / "test_scores.npz", values=right[None], right=right)
        one = Predicted(0, len(run.target.train), images, predicted, scores.softmax(1).numpy())
        predictions.write(run.folder / "predictions.csv", [one])
        run.result["target/predictions"] = {"file": "predictions.csv"}


def meta_test(run: Run) -> None:
    """Tests the weights at hand, once, on the test split, beside chance and the same method untrained."""
    algorithm, settings = run.algorithm, run.config.test
    last = algorithm.test_steps
    steps = [step for step in range(last + 1) if step in (0, 1, 5, 10, last) or last <= 10]
    with run.logger.progress("testing", settings.episodes) as advance:
        scores = evaluate(algorithm, run.samplers["test"], settings.episodes, run.hardware, steps, advance, True)
    run.result |= summary(scores, "test") | own_measures(scores)
    if run.hardware.world.main:
        # Of every test episode [steps, episodes] after each of `steps` [steps], for paired comparisons.
        values = scores.values.numpy()
        files.save_arrays(run.folder / "test_scores.npz", steps=np.array(scores.steps), values=values)
    for name, curve in run.result.get("test/curves", {}).items():
        for point, value in enumerate(curve["mean"]):
            run.logger.curve(f"test/{name}", value, point)
    curve = "mse_median" if scores.power else "acc"
    for step, values in zip(scores.steps, scores.values, strict=True):
        value = metrics.median(values) if scores.power else values.mean().item()
        run.logger.curve(f"test/{curve}_after_inner_steps", value, step)
    if settings.baseline_episodes:
        untrained = build_algorithm(run.config, run.data, run.train_task, run.target)
        untrained.to(run.hardware.device)
        untrained.vectorize = run.hardware.vectorize
        baseline = evaluate(untrained, run.samplers["test"], settings.baseline_episodes, run.hardware, steps)
        run.result |= summary(baseline, "untrained")
    if not scores.power:
        run.result["chance/acc"] = 1 / run.test_task.ways


def summary(scores: Scores, prefix: str) -> dict[str, Any]:
    """The numbers of `result.json` under `prefix`: of the last inner step, and step by step where there are several."""
    steps: dict[str, Any] = {}
    for step, values in zip(scores.steps, scores.values, strict=True):
        if scores.power:
            steps[str(step)] = metrics.regression_summary(values, scores.power)
        else:
            mean, ci95 = metrics.interval(values, shares=True)
            steps[str(step)] = {"acc": mean, "acc_ci95": ci95}
    result = {f"{prefix}/{name}": value for name, value in steps[str(scores.steps[-1])].items()}
    result[f"{prefix}/episodes"] = scores.values.shape[1]
    if len(steps) > 1 or scores.power:
        result[f"{prefix}/after_inner_steps"] = steps
    return result


def own_measures(scores: Scores) -> dict[str, Any]:
    """The method's own measures with their intervals: `test/NAME`, and curves under `test/curves`."""
    result: dict[str, Any] = {}
    for name, values in scores.measures.items():
        pairs = [metrics.interval(column) for column in values.reshape(len(values), -1).T]
        if values.ndim == 1:
            result[f"test/{name}"], result[f"test/{name}_ci95"] = pairs[0]
        else:
            means, widths = zip(*pairs, strict=True)
            result.setdefault("test/curves", {})[name] = {"mean": list(means), "ci95": list(widths)}
    return result
