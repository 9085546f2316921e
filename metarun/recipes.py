"""A run from its config to its folder, and the stages that recipes are lists of."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from metarun import checkpoint, distributed, files, metrics, provenance
from metarun import hardware as hardware_module
from metarun.config import Config, check, construct, flat, task_of, to_container
from metarun.core import Algorithm, Spec, TaskShape
from metarun.data.noise import with_noise
from metarun.data.source import DataSource, EpisodeSampler
from metarun.distributed import Lost, World
from metarun.errors import Pruned, UserError
from metarun.evaluate import Scores, evaluate
from metarun.folders import choose_folder, default_name, refuse_other_config
from metarun.hardware import Hardware
from metarun.records import Records, logging_to, start_logging
from metarun.report.run import show, show_stored, stored
from metarun.sweeps.search import watcher
from metarun.train import Interrupted, build_optimizer, fit

log = logging.getLogger("metarun")

LOCK_SECONDS = 3.0  # to wait for another process that is just saving and ending, in the same folder


@dataclass
class Run:
    """What the stages of a run share: its config, what was built from it, and the result so far."""

    config: DictConfig
    data: DataSource
    algorithm: Algorithm
    hardware: Hardware
    folder: Path
    records: Records
    train_task: TaskShape
    test_task: TaskShape
    samplers: dict[str, EpisodeSampler]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    result: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[int, float], bool] | None = None  # asked after each validation whether to give up


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> float:
    """Runs the config's recipe, or goes on with it, or shows its stored result; returns the validation score.

    `overrides` and `choices` are Hydra's; `command` starts a further process of the same run.
    """
    started = time.perf_counter()
    check(config)
    world = distributed.place(config.hardware.processes)
    start_logging(quiet=not world.main)
    config = complete(config, overrides, choices)
    if not world.main:
        follow(config, world)
        return 0.0
    with distributed.meeting(world) if world.launched else contextlib.nullcontext(world) as world:
        folder = choose_folder(config, overrides)
        if (folder / "config.yaml").is_file():
            refuse_other_config(folder, config)
        if (folder / "result.json").is_file():
            if config.checkpoint:
                refuse_other_weights(folder, checkpoint_file(config))
            return show_stored(folder)
        # All that can be wrong with the input is found before anything is written, and before other ranks look at it.
        shared = prepare(config, folder, world)
        shared.watch = watcher(folder)
        create(folder)
        try:
            with FileLock(folder / ".lock", timeout=LOCK_SECONDS), logging_to(folder / "metarun.log"):
                text = OmegaConf.to_yaml(OmegaConf.create(to_container(config)))
                files.save_bytes(folder / "config.yaml", text.encode())
                log.info("run folder: %s", folder)
                with distributed.meeting(world, command) as world:
                    world.tell(folder)
                    carry_out(shared, world)
                finish(shared, overrides, choices, time.perf_counter() - started)
        except Timeout:
            raise UserError(
                f"{folder}: another process is running this; wait for it, or give this one another name="
            ) from None
        finally:
            shared.records.close()
    show(folder, shared.result)
    return float(shared.result.get("val/score", 0.0))


def follow(config: DictConfig, world: World) -> None:
    """The part of a rank that is not 0: nothing if rank 0 leaves before the stages, which it says itself."""
    with contextlib.suppress(Lost, Interrupted, Pruned), distributed.meeting(world) as world:
        folder = world.tell(Path())
        try:
            carry_out(prepare(config, folder, world), world)
        except Lost:
            raise
        except Exception as error:
            told = isinstance(error, UserError)
            world.complain(str(error) if told else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            if not told:
                raise


def complete(config: DictConfig, overrides: list[str], choices: dict[str, str]) -> DictConfig:
    """The config with its name, and on top of that of the checkpoint's run where a checkpoint is tested."""
    only_tests = config.recipe.stages[0].endswith(".meta_test")
    if only_tests != bool(config.checkpoint):
        raise UserError(
            "recipe=test: needs the run to test; add checkpoint=outputs/RUN"
            if only_tests
            else f"checkpoint={config.checkpoint}: is for testing a finished run; add recipe=test"
        )
    if config.checkpoint:
        config = with_checkpoint(config, overrides)
        check(config)
    OmegaConf.update(config, "name", config.name or default_name(choices))
    return config


def prepare(config: DictConfig, folder: Path, world: World) -> Run:
    """Everything that the stages need in this rank, built from the config; raises `UserError` and writes nothing to `folder`."""
    data = construct(config.data, "data")
    train_task, test_task = task_of(config, "train"), task_of(config, "test")
    samplers: dict[str, EpisodeSampler] = {}
    algorithm = build_algorithm(config, data, train_task)
    if config.around:
        algorithm = construct(
            config.around, "around", method=algorithm, validation=lambda start, stop: samplers["val"](start, stop)
        )
    check_tasks(algorithm, train_task, test_task)
    hardware = hardware_module.choose(config.hardware, algorithm, world)
    hardware.place(algorithm)
    # With a checkpoint nothing is trained: only the test split must serve.
    tasks = {"train": train_task, "val": test_task} if not config.checkpoint else {}
    for split, task in {**tasks, "test": test_task}.items():
        samplers[split] = data.sampler(split, task, config.seed, hardware.device)
    if not config.checkpoint and config.train.noise.tasks:
        noise = config.train.noise
        samplers["train"] = with_noise(samplers["train"], config.seed, noise.tasks, noise.labels)
    optimizer, schedule = build_optimizer(algorithm, config.train)
    known: dict[str, Any] = {}
    if config.checkpoint:
        weights = checkpoint_file(config)
        state = checkpoint.load(weights)
        checkpoint.load_weights(algorithm, state["model"], weights)
        known = {"checkpoint/step": state["step"] if "step" in state else state["state"]["step"]}
        known["checkpoint/sha256"] = checkpoint.digest(weights)
    elif world.size > config.train.tasks_per_step:
        raise UserError(
            f"hardware.processes={world.size}: share the tasks of a step, but train.tasks_per_step={config.train.tasks_per_step}"
        )
    records = Records(folder if world.main else None)
    return Run(
        config, data, algorithm, hardware, folder, records, train_task, test_task, samplers, optimizer, schedule, known
    )


def carry_out(run: Run, world: World) -> None:
    """The stages, one after the other, in this rank."""
    run.hardware = replace(run.hardware, world=world.on(run.hardware.device))
    log.info("hardware: %s", run.hardware)
    for stage in run.config.recipe.stages:
        get_method(stage)(run)


def build_algorithm(config: DictConfig, data: DataSource, train_task: TaskShape) -> Algorithm:
    """The untrained method on its backbone, its weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    backbone = construct(config.backbone, "backbone", input_shape=data.input_shape)
    outputs = train_task.ways if data.outputs is None else data.outputs
    spec = Spec(data.input_shape, data.kind, outputs)
    algorithm: Algorithm = construct(config.algo, "algo", backbone=backbone, spec=spec)
    return algorithm


def check_tasks(algorithm: Algorithm, train_task: TaskShape, test_task: TaskShape) -> None:
    """Whether the method can be trained and tested on such tasks."""
    name = type(algorithm).__name__
    if algorithm.fixed_ways and test_task.ways != train_task.ways:
        raise UserError(
            f"test.task.ways={test_task.ways}: {name}'s head has the {train_task.ways} outputs that it is trained with; "
            f"use test.task.ways={train_task.ways}, or train with train.task.ways={test_task.ways}"
        )
    if algorithm.needs_queries and train_task.queries < 1:
        raise UserError(f"train.task.queries={train_task.queries}: {name} learns from the queries; it needs at least 1")


def with_checkpoint(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config that the checkpoint's run had, with this command line's overrides on it.

    `task.*` here means the test tasks: what the method was trained with is a fact of the checkpoint. `algo=` may name
    the checkpoint's own method, whose keys (`algo.test_inner_steps`, say) can then be overridden.
    """
    stored_file = checkpoint_file(config).parent / "config.yaml"
    if not stored_file.is_file():
        raise UserError(
            f"checkpoint={config.checkpoint}: no config.yaml lies beside it; give the run folder that metarun made"
        )
    own = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(stored_file))
    for key in [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]:
        if key == "algo" and len({node.algo._target_ for node in (config, own)}) == 1:
            continue
        if key in ("experiment", "preset", "algo"):
            raise UserError(f"{key}=: a checkpoint brings its own; override single keys instead")
        target = {"optimizer": "train.optimizer", "schedule": "train.schedule"}.get(key, key)
        goal = f"test.{target}" if target.startswith("task.") else target
        OmegaConf.update(own, goal, OmegaConf.select(config, target), merge=False, force_add=True)
    for key in ("recipe", "checkpoint", "outputs", "resume"):
        OmegaConf.update(own, key, config[key], merge=False)
    own.name = config.name or own.name
    assert isinstance(own, DictConfig)
    return own


def checkpoint_file(config: DictConfig) -> Path:
    """The weights that `checkpoint=` means: a file, or `best.pt` of a run folder."""
    path = Path(config.checkpoint)
    if path.is_dir():
        path = path / "best.pt"
        if (path.parent / "config.yaml").is_file() and not path.is_file():
            raise UserError(f"checkpoint={config.checkpoint}: has no best.pt yet, its first validation was not reached")
    if not path.is_file():
        raise UserError(f"checkpoint={config.checkpoint}: there is no such run folder or file")
    return path


def refuse_other_weights(folder: Path, weights: Path) -> None:
    """Raises `UserError` if the stored result is of other weights than `weights` has by now."""
    if stored(folder).get("checkpoint/sha256") != checkpoint.digest(weights):
        raise UserError(
            f"{folder}: tested other weights than {weights} has now; test these beside it with resume=false"
        )


def create(folder: Path) -> None:
    """The run folder; where it cannot be made, a `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"outputs={folder}: cannot be written ({error.strerror}); choose another outputs=") from error


# The stages.


def meta_train(run: Run) -> None:
    """Trains on episodes of the training split; `best.pt` has the weights that were best on validation."""
    settings, regression = run.config.train, run.algorithm.spec.kind == "regression"

    def validate() -> tuple[float, dict[str, float]]:
        scores = evaluate(run.algorithm, run.samplers["val"], settings.validate_episodes, run.hardware)
        mean, ci95 = metrics.interval(scores.final)
        if regression:
            median = metrics.median(scores.final)
            return -median, {"val/loss": scores.loss, "val/mse": mean, "val/mse_ci95": ci95, "val/mse_median": median}
        return mean, {"val/loss": scores.loss, "val/acc": mean, "val/acc_ci95": ci95}

    if not (run.folder / "last.pt").exists():
        run.records.tasks(run.samplers["val"](0, 1))
    numbers = fit(
        run.algorithm,
        run.samplers["train"],
        validate,
        run.optimizer,
        run.schedule,
        settings,
        run.config.seed,
        run.hardware,
        run.folder,
        run.records,
        run.watch,
    )
    world = run.hardware.world
    best = world.tell(checkpoint.load(run.folder / "best.pt") if world.main else {})
    checkpoint.load_weights(run.algorithm, best["model"], run.folder / "best.pt")
    run.result |= {**numbers, "train/selected_step": best["step"], "val/score": best["score"]}


def meta_test(run: Run) -> None:
    """Tests the weights at hand, once, on the test split, beside chance and the same method untrained."""
    algorithm, settings = run.algorithm, run.config.test
    last = algorithm.test_steps
    steps = [step for step in range(last + 1) if step in (0, 1, 5, 10, last) or last <= 10]
    with run.records.progress("testing", settings.episodes) as advance:
        scores = evaluate(algorithm, run.samplers["test"], settings.episodes, run.hardware, steps, advance, True)
    run.result |= summary(scores, "test") | own_measures(scores)
    if run.hardware.world.main:
        save_scores(run.folder / "test_scores.npz", scores)
    for name, curve in run.result.get("test/curves", {}).items():
        for point, value in enumerate(curve["mean"]):
            run.records.curve(f"test/{name}", value, point)
    curve = "mse_median" if scores.power else "acc"
    for step, values in zip(scores.steps, scores.values, strict=True):
        value = metrics.median(values) if scores.power else values.mean().item()
        run.records.curve(f"test/{curve}_after_inner_steps", value, step)
    if settings.baseline_episodes:
        untrained = build_algorithm(run.config, run.data, run.train_task).to(run.hardware.device)
        untrained.vectorize = run.hardware.vectorize
        baseline = evaluate(untrained, run.samplers["test"], settings.baseline_episodes, run.hardware, steps)
        run.result |= summary(baseline, "untrained")
    if not scores.power:
        run.result["chance/acc"] = 1 / run.test_task.ways


def save_scores(path: Path, scores: Scores) -> None:
    """The score of every test episode, for paired comparisons: `values` [steps, episodes] after each of `steps` [steps]."""
    steps, values = np.array(scores.steps), scores.values.numpy()
    files.replace(path, lambda file: np.savez_compressed(file, steps=steps, values=values))


def summary(scores: Scores, prefix: str) -> dict[str, Any]:
    """The numbers of `result.json` under `prefix`: of the last inner step, and step by step where there are several."""
    steps: dict[str, Any] = {}
    for step, values in zip(scores.steps, scores.values, strict=True):
        if scores.power:
            steps[str(step)] = metrics.regression_summary(values, scores.power)
        else:
            mean, ci95 = metrics.interval(values)
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


def finish(run: Run, overrides: list[str], choices: dict[str, str], seconds: float) -> None:
    """Writes `result.json`, the mark of a finished run."""
    algorithm, config = run.algorithm, run.config
    tested = run.result.get("test/acc", run.result.get("test/mse"))
    run.records.hparams(flat(to_container(config)), tested, run.result.get("val/score"))
    data = run.data.describe()
    run.result |= {
        "interval": "95%, over episodes, normal approximation",
        "protocol": {
            "norm": getattr(algorithm.backbone, "norm", None),
            "transductive": algorithm.transductive,
            "train": vars(run.train_task),
            "test": vars(run.test_task),
            **({"train_noise": to_container(config.train.noise)} if config.train.noise.tasks else {}),
            "test_inner_steps": algorithm.test_steps,
            "split": data.get("split", config.data.get("split")),
            "selected_by": "best validation score" if "train/steps" in run.result else "the checkpoint that was given",
        },
        "data": data,
        "parameters": sum(value.numel() for value in algorithm.parameters()),
        "hardware": run.hardware.describe(),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": " ".join(["metarun", *overrides]),
        "choices": {group: choice for group, choice in choices.items() if not group.startswith("hydra/")},
        "seconds": seconds,
        "peak_memory": run.hardware.peak_memory(),
    }
    files.save_json(run.folder / "result.json", run.result)
