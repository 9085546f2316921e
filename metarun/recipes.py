"""A run from its config to its folder."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from metarun import files
from metarun.config import Config, check, construct, flat, task_of, to_container
from metarun.config.overrides import key_of, make_literal
from metarun.core import TaskShape
from metarun.data.download import without_downloads
from metarun.data.noise import with_noise
from metarun.data.source import DataSource, EpisodeSampler, ImageSource, Split
from metarun.engine import checkpoint, distributed
from metarun.engine.distributed import PeerLost, World
from metarun.engine.train import Interrupted
from metarun.errors import Pruned, UserError
from metarun.learner import Learner, augmented, build_learner, check_tasks
from metarun.ops import batch_norm
from metarun.renamed import refuse_old_words
from metarun.report.run import show, show_stored, stored
from metarun.runs import provenance
from metarun.runs.fingerprints import descriptions, keep, refuse_other_data, tested_on_others
from metarun.runs.folder import choose_folder, create, default_name, refuse_other_config
from metarun.runs.logger import RunLogger, logging_to, start_logging
from metarun.stages import FINETUNE, META_TEST, PRETRAIN, TARGET_TEST, Run
from metarun.sweeps.search import watcher
from metarun.target.base import SourceImages, TargetMethod
from metarun.target.target import Target
from metarun.text import shell_path, shown_path
from metarun.trust import check_classes

log = logging.getLogger("metarun")

LOCK_SECONDS = 3.0  # to wait for another process that is just saving and ending, in the same folder


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> float:
    """Runs the config's recipe, or goes on with it, or shows its stored result; returns the validation score.

    `overrides` and `choices` are Hydra's; `command` starts a further process of the same run.
    """
    started = time.perf_counter()
    check(config)
    make_literal(config)
    world = distributed.place(config.hardware.processes)
    start_logging(quiet=not world.main)
    config = complete(config, overrides, choices)
    if not world.main:
        follow(config, world)
        return 0.0
    with distributed.process_group(world) if world.launched else contextlib.nullcontext(world) as world:
        folder = choose_folder(config, overrides)
        if (folder / "config.yaml").is_file():
            refuse_other_config(folder, config)
        if (folder / "result.json").is_file():
            if config.checkpoint:
                refuse_other_weights(folder, checkpoint.weights_file("checkpoint", config.checkpoint))
            return show_stored(folder, unchecked_data(config, folder))
        # All that can be wrong with the input is found before anything is written, and before other ranks look at it.
        shared = prepare(config, folder, world)
        described = descriptions(shared.data, shared.target.source if shared.target else None)
        refuse_other_data(folder, described)
        if config.checkpoint:
            origin = checkpoint.weights_file("checkpoint", config.checkpoint).parent
            shared.result |= tested_on_others(origin, described, overrides)
        shared.watch = watcher(folder)
        create(folder)
        try:
            with FileLock(folder / ".lock", timeout=LOCK_SECONDS), logging_to(folder / "metarun.log"):
                keep(folder, described)
                text = OmegaConf.to_yaml(OmegaConf.create(to_container(config)))
                files.save_bytes(folder / "config.yaml", text.encode())
                log.info("run folder: %s", shell_path(folder))
                with distributed.process_group(world, command) as world:
                    world.broadcast(folder)
                    carry_out(shared, world)
                finish(shared, overrides, choices, command, time.perf_counter() - started)
        except Timeout:
            raise UserError(
                f"{shell_path(folder)}: another process is running this; wait for it, or give this one another name="
            ) from None
        finally:
            shared.logger.close()
    show(folder, shared.result)
    return float(shared.result.get("val/score", 0.0))


def follow(config: DictConfig, world: World) -> None:
    """The part of a rank that is not 0: nothing if rank 0 leaves before the stages, which it says itself."""
    with contextlib.suppress(PeerLost, Interrupted, Pruned), distributed.process_group(world) as world:
        folder = world.broadcast(Path())
        try:
            carry_out(prepare(config, folder, world), world)
        except PeerLost:
            raise
        except Exception as error:
            told = isinstance(error, UserError)
            world.report_failure(
                str(error) if told else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            )
            if not told:
                raise


def complete(config: DictConfig, overrides: list[str], choices: dict[str, str]) -> DictConfig:
    """The config with its name, and on top of that of the checkpoint's run where a checkpoint is tested."""
    only_tests = list(config.recipe.stages) == [META_TEST]
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
    stages, samplers = config.recipe.stages, dict[str, EpisodeSampler]()
    data, target = build_data(config)
    if target is not None:
        target.fit_to(data)
    train_task, test_task = task_of(config, "train"), task_of(config, "test")
    learner = build_learner(config, data, train_task, world, target, lambda start, stop: samplers["val"](start, stop))
    pretraining = None
    if PRETRAIN in stages:
        pretraining = build_learner(config, data, train_task, world, prefix="pretrain.")
    trained = [one for one in (learner, pretraining) if one is not None]
    tasks: dict[Split, TaskShape] = {}
    if config.recipe.source and not config.checkpoint:
        if learner.sampler is None:
            tasks["train"] = train_task
        if any(one.held_out is None for one in trained):
            tasks["val"] = test_task
    if META_TEST in stages:
        tasks["test"] = test_task
    if tasks:
        check_tasks(learner.algorithm, train_task, test_task)
    samplers |= episodes(config, data, tasks, learner.hardware.device)
    augment = construct(config.augment, "augment") if config.augment else None
    if augment is not None:
        if "train" in samplers:
            samplers["train"] = augmented(samplers["train"], augment, config.seed, learner.hardware)
        for one in trained:
            if one.sampler is not None:
                one.sampler = augmented(one.sampler, augment, config.seed, one.hardware)
    return Run(
        config=config,
        data=data,
        learner=learner,
        folder=folder,
        train_task=train_task,
        test_task=test_task,
        samplers=samplers,
        pretraining=pretraining,
        target=target,
        method=build_method(config, data, learner, target, augment) if FINETUNE in stages and target else None,
        result=load_checkpoint(config.checkpoint, learner) if config.checkpoint else {},
        logger=RunLogger(folder if world.main else None),  # last: all is well
    )


def episodes(
    config: DictConfig, data: DataSource, tasks: dict[Split, TaskShape], device: torch.device
) -> dict[str, EpisodeSampler]:
    """The sampler of each split that there is a task of; noise is of training tasks alone."""
    if "train" in tasks and isinstance(data, ImageSource) and set(data.splits["train"]) & set(data.splits["test"]):
        log.warning("data: too few classes to divide; tasks for training and testing are of the same ones")
    samplers: dict[str, EpisodeSampler] = {
        split: data.sampler(split, task, config.seed, device) for split, task in tasks.items()
    }
    noise = config.train.noise
    if "train" in samplers and noise.tasks:
        samplers["train"] = with_noise(samplers["train"], config.seed, noise.tasks, noise.labels)
    return samplers


def load_checkpoint(path: str, learner: Learner) -> dict[str, Any]:
    """Takes a finished run's weights; what `result.json` says of them."""
    weights = checkpoint.weights_file("checkpoint", path)
    state = checkpoint.load(weights)
    checkpoint.load_weights(learner.algorithm, state["model"], weights)
    step = state["step"] if "step" in state else state["state"]["step"]
    return {"checkpoint/step": step, "checkpoint/sha256": checkpoint.digest(weights)}


def build_data(config: DictConfig) -> tuple[DataSource, Target | None]:
    """Builds the source and the target; a recipe without a source takes the target for it."""
    target = build_target(config)
    data = construct(config.data, "data") if target is None or config.recipe.source else target.source
    return data, target


def unchecked_data(config: DictConfig, folder: Path) -> str:
    """Compares the data that are there with those of a finished run, and downloads nothing for it.

    Returns:
        Why they could not be compared; an empty string where they are the same.

    Raises:
        UserError: They are other data.
    """
    try:
        with without_downloads():
            data, target = build_data(config)
    except (UserError, OSError) as error:
        return str(error)
    refuse_other_data(folder, descriptions(data, target.source if target else None))
    return ""


def build_target(config: DictConfig) -> Target | None:
    """The target, if the recipe has a use for one."""
    wanted = [stage for stage in config.recipe.stages if stage in (FINETUNE, TARGET_TEST)]
    if wanted and not config.target.data:
        raise UserError(
            f"recipe: its stage {wanted[0].rpartition('.')[2]} needs a target; add target=pneumoniamnist, say"
        )
    if config.target.data and not wanted:
        raise UserError("target: this recipe has no use for one; add recipe=transfer, say")
    return Target(construct(config.target.data, "target.data"), config.target) if wanted else None


def build_method(config: DictConfig, data: DataSource, learner: Learner, target: Target, augment: Any) -> TargetMethod:
    """What puts the learner to use on the target; raises `UserError` if it cannot."""
    if not config.transfer:
        raise UserError("transfer: must be given; add transfer=all, say")
    source = SourceImages(data, config.seed, learner.hardware.device) if config.recipe.source else None
    method: TargetMethod = construct(config.transfer, "transfer", learner=learner.algorithm, source=source)
    if augment is not None:
        method.augment = augment
    method.check(len(target.names))
    return method


def carry_out(run: Run, world: World) -> None:
    """The stages, one after the other, in this rank."""
    world = world.to(run.hardware.device)
    for learner in filter(None, (run.learner, run.pretraining)):
        learner.hardware = replace(learner.hardware, world=world)
    log.info("hardware: %s", run.hardware)
    for stage in run.config.recipe.stages:
        get_method(stage)(run)


def with_checkpoint(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config that the checkpoint's run had, with this command line's overrides on it.

    `task.*` here means the test tasks: what the method was trained with is a fact of the checkpoint. `algo=` may name
    the checkpoint's own method, whose keys (`algo.test_inner_steps`, say) can then be overridden.
    """
    weights = checkpoint.weights_file("checkpoint", config.checkpoint)
    folder = Path(config.checkpoint)
    stored_file = (folder if folder.is_dir() else weights.parent) / "config.yaml"
    if not stored_file.is_file():
        raise UserError(
            f"checkpoint={shown_path(config.checkpoint)}: no config.yaml lies beside it; give the run folder that metarun made"
        )
    older = OmegaConf.load(stored_file)
    assert isinstance(older, DictConfig)
    refuse_old_words(older, stored_file)
    own = OmegaConf.merge(OmegaConf.structured(Config), older)
    for key in ("target", "transfer"):  # a test of what was learned on the source has no use for them
        OmegaConf.update(own, key, config[key], merge=False)
    assert isinstance(own, DictConfig)
    check_classes(own, stored_file, config)
    for key in map(key_of, overrides):
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
    return own


def refuse_other_weights(folder: Path, weights: Path) -> None:
    """Raises `UserError` if the stored result is of other weights than `weights` has by now."""
    if stored(folder).get("checkpoint/sha256") != checkpoint.digest(weights):
        raise UserError(
            f"{folder}: tested other weights than {weights} has now; test these beside it with resume=false"
        )


def finish(run: Run, overrides: list[str], choices: dict[str, str], command: list[str], seconds: float) -> None:
    """Writes `result.json`, the mark of a finished run; `command` begins with the words that start Python on metarun."""
    algorithm, config = run.algorithm, run.config
    tested = next((run.result[name] for name in ("test/acc", "test/mse", "target/acc") if name in run.result), None)
    run.logger.hparams(flat(to_container(config)), tested, run.result.get("val/score"))
    data, kind = run.data.describe(), algorithm.backbone.norm
    run.result |= {
        "interval": "95%, over episodes, normal approximation",
        "protocol": {
            "norm": kind,
            "transductive": transductive(run),
            **({"labelled_images": batch_norm.labelled_rule(kind)} if run.target or run.learner.held_out else {}),
            "train": vars(run.train_task),
            "test": vars(run.test_task),
            **({"train_noise": to_container(config.train.noise)} if config.train.noise.tasks else {}),
            "test_inner_steps": algorithm.test_steps,
            "split": data.get("split", config.data.get("split")),
            "selected_by": selected_by(run),
        },
        "data": data,
        **({"target/data": run.target.describe()} if run.target else {}),
        "parameters": sum(value.numel() for value in algorithm.parameters()),
        "hardware": run.hardware.describe(),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": shlex.join(["metarun", *command[3:]]),
        "overrides": overrides,
        "choices": {group: choice for group, choice in choices.items() if not group.startswith("hydra/")},
        "seconds": seconds,
        "peak_memory": run.hardware.peak_memory(),
    }
    files.save_json(run.folder / "result.json", run.result)


def transductive(run: Run) -> bool:
    """Whether the tested predictions depend on other test images: `classified` never does so."""
    if run.method:
        return run.method.transductive
    return TARGET_TEST not in run.config.recipe.stages and run.algorithm.transductive


def selected_by(run: Run) -> str:
    """The rule that chose the weights that were tested."""
    if run.config.checkpoint:
        return "the checkpoint that was given"
    if not run.config.recipe.source:
        return "no selection: the last weights of a fixed number of steps"
    held_out = "target, whose labels it trains on" if run.algorithm.uses_target == "labels" else "source"
    on = f" on held-out images of the {held_out}" if run.learner.held_out else ""
    after = "; on the target no selection, but the last weights of a fixed number of steps" if run.method else ""
    return f"best validation score{on}{after}"
