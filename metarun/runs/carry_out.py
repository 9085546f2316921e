"""A run from its config to its folder."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun import files, stages
from metarun.config import Config, check, construct, flat, nodes_of, to_container
from metarun.config.lists import TASK
from metarun.config.overrides import key_of, make_literal
from metarun.config.types import Given
from metarun.config.validation import check_target
from metarun.core import Backbone
from metarun.data.domains import fit_to_network, named
from metarun.data.download import without_downloads
from metarun.data.source import DataSource, NoData
from metarun.encoders import EncodedSource
from metarun.encoders.building import encoded, encoded_as
from metarun.engine import checkpoint, distributed
from metarun.engine.distributed import PeerLost, World
from metarun.engine.hardware import check_device
from metarun.engine.train import Interrupted
from metarun.errors import Incomplete, Pruned, UserError, nearest, reason
from metarun.inference.kept import kept_learner
from metarun.ops import batch_norm
from metarun.renamed import refuse_old_words
from metarun.report.next_steps import next_steps
from metarun.report.run import show, show_stored, stored
from metarun.runs import provenance, result
from metarun.runs.fingerprints import descriptions, keep, refuse_other_data, tested_on_others
from metarun.runs.folder import choose_folder, create, default_name, refuse_other_config, stored_config
from metarun.runs.logger import RunLogger, logging_to, start_logging
from metarun.runs.run import Run
from metarun.stages.base import Stage, check_order
from metarun.stages.transfer import uses_method
from metarun.sweeps.search import watcher
from metarun.target.target import Target
from metarun.text import shell_path, shown_path
from metarun.trust import check_classes

log = logging.getLogger("metarun")

READ_BY_ALL = ("name", "seed", "resume", "checkpoint", "outputs")  # of the keys that stand in no group
LOCK_SECONDS = 33.0  # to wait for another process in the same folder: a job that is to end may save for half a minute


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Runs the config's recipe, or goes on with it, or shows its stored result; returns what `result.json` holds.

    `overrides` and `choices` are Hydra's; `command` starts a further process of the same run.
    """
    started = time.perf_counter()
    check(config)
    make_literal(config)
    check_device(config.hardware.device)
    world = distributed.place(config.hardware.processes)
    start_logging(quiet=not world.main)
    config = complete(config, overrides, choices)
    if not world.main:
        follow(config, world)
        return {}
    with distributed.process_group(world) if world.launched else contextlib.nullcontext(world) as world:
        folder = choose_folder(config, overrides)
        if (folder / "config.yaml").is_file():
            refuse_other_config(folder, config)
        built = build_stages(config)
        continues = config.checkpoint and any(stage.continues_config for stage in built)
        outdated = False
        if (folder / result.FILE).is_file():
            if continues:
                refuse_other_weights(folder, checkpoint.weights_file("checkpoint", config.checkpoint))
            outdated = not all(stage.is_current(config, stored(folder)) for stage in built)
            if not outdated:
                show_stored(folder, unchecked_data(config, folder))
                return conclude(built, folder)
        # All that can be wrong with the input is found before anything is written, and before other ranks look at it.
        shared = prepare(config, folder, world)
        if config.hardware.processes is None and not world.launched and (count := shared.worthwhile_processes()) > 1:
            world = distributed.place(count)
            shared = prepare(config, folder, world)
        described = descriptions(*data_of(shared))
        refuse_other_data(folder, described)
        if continues:
            origin = checkpoint.weights_file("checkpoint", config.checkpoint).parent
            shared.result |= tested_on_others(origin, described, overrides)
        shared.watch = watcher(folder)
        create(folder)
        try:
            told = f"{shell_path(folder)}: another process is running this, or is just saving and ending"
            with files.locked(folder / ".lock", told, LOCK_SECONDS), logging_to(folder / "metarun.log"):
                if (folder / result.FILE).is_file() and not outdated:  # by now
                    show_stored(folder)
                    return conclude(built, folder)
                if (folder / "config.yaml").is_file():
                    refuse_other_config(folder, config)
                keep(folder, described)
                text = OmegaConf.to_yaml(OmegaConf.create(recorded(config)))
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
    return conclude(shared.stages, folder)


def conclude(built: Sequence[Stage], folder: Path) -> dict[str, Any]:
    """Shows what each stage found, of the result of a finished run; returns the result, and under `folder` where it lies.

    Raises:
        Incomplete: A part of the input was bad.
    """
    found = {**stored(folder), "folder": str(folder)}
    left_out = [said for stage in built if (said := stage.conclude(folder, found))]
    for step in next_steps(folder, found):
        print(f"next     {step}")
    if left_out:
        raise Incomplete("; ".join(left_out), found)
    return found


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
    """The config with its name, and on top of that of the checkpoint's run where a stage loads a checkpoint."""
    built = build_stages(config)
    loads = any(stage.needs_checkpoint for stage in built)
    if loads != bool(config.checkpoint):
        raise UserError(
            f"recipe={choices.get('recipe', 'test')}: needs the run to test; add checkpoint=outputs/RUN"
            if loads and any(stage.continues_config for stage in built)
            else f"recipe={choices.get('recipe')}: needs what was learned; add checkpoint=outputs/RUN, or a classifier.pt"
            if loads
            else f"checkpoint={config.checkpoint}: is for testing a finished run; add recipe=test"
        )
    refuse_unread(overrides, built)
    check_order(built)
    if config.checkpoint and any(stage.continues_config for stage in built):
        config = with_checkpoint(config, overrides)
        check(config)
    OmegaConf.update(config, "name", config.name or default_name(choices, config.recipe.source))
    return config


def refuse_unread(overrides: Sequence[str], built: Sequence[Stage]) -> None:
    """Refuses keys of the command line that none of the stages reads, so that `support=` without `recipe=predict` trains nothing.

    Raises:
        UserError: One of them is not read.
    """
    single = {field.name for field in fields(Config) if field.default is not MISSING}
    read = {*READ_BY_ALL, *(key for stage in built for key in stage.reads)}
    for word in overrides:
        key = key_of(word)
        if key in single - read and not word.endswith("=null"):
            readers = [name.lower() for name in stages.__all__ if key in getattr(stages, name).reads]
            advice = (
                f"it is for recipe={' and recipe='.join(readers)}" if readers else f"metarun help {key} says what has"
            )
            raise UserError(f"{word}: this recipe has no use for it; {advice}")


def build_stages(config: DictConfig) -> list[Stage]:
    """The stages of the recipe, not yet prepared.

    Each entry of `recipe.stages` is a node with a `_target_`, or the dotted path of a class without settings.

    Raises:
        UserError: An entry is no stage, or has a setting that the stage does not know.
    """
    built: list[Stage] = []
    for place, entry in enumerate(config.recipe.stages):
        node = OmegaConf.create({"_target_": entry}) if isinstance(entry, str) else entry
        target = node.get("_target_") if isinstance(node, DictConfig) else None
        if not target:
            raise UserError(f"recipe.stages[{place}]: has no _target_ (the class of the stage)")
        known = [f"metarun.stages.{name}" for name in stages.__all__ if name != "Stage"]
        hint = nearest(target, known) or f"; there are {', '.join(known)}"
        try:
            cls = get_class(target)
        except Exception as error:
            raise UserError(f"recipe.stages: {target} cannot be imported ({reason(error)}){hint}") from error
        if not issubclass(cls, Stage):
            raise UserError(f"recipe.stages: {target} is no stage (no subclass of metarun.stages.Stage){hint}")
        check_target(node, f"recipe.stages[{place}]", Given())
        built.append(construct(node, f"recipe.stages[{place}]"))
    return built


def prepare(config: DictConfig, folder: Path, world: World) -> Run:
    """The run with its stages prepared in this rank; raises `UserError` and writes nothing to `folder`."""
    built = build_stages(config)
    check_installed(config)
    data, target = build_data(config, built)
    if target is not None:
        target.fit_to(data)
    run = Run(config, built, world, folder, data, target, build_tests(config, built, data))
    for stage in built:
        stage.prepare(run)
    if not run.learners:
        raise UserError("recipe.stages: no stage trains, loads or builds a learner; add metarun.stages.Train, say")
    run.logger = RunLogger(folder if world.main else None)  # last: all is well
    return run


def check_installed(config: DictConfig) -> None:
    """Checks that the libraries are here which the backbone and the augmentation need: before a table of images is built.

    Raises:
        UserError: One is not; it names the extra.
    """
    backbone = get_class(config.backbone._target_)
    if issubclass(backbone, Backbone):
        backbone.check_installed(config.backbone)
    if config.augment:
        construct(config.augment, "augment")


def build_data(config: DictConfig, built: list[Stage]) -> tuple[DataSource, Target | None]:
    """Builds the source and the target; a recipe without a source takes the target for it."""
    if not any(stage.needs_data for stage in built):
        return NoData(), None
    node = target_data(config, built)
    named = [(config.data, "data")] if node is None or config.recipe.source else []
    if node is not None:
        named.append((node, "target.data"))
    if config.encoder and config.augment:
        raise UserError(
            "augment: changes images in training, but the encoder has made vectors of them by then; encoder.views=5 encodes changed "
            "copies too"
        )
    alone = not any(key == "data" for _, key in named)
    sources = encoded([construct(one, key) for one, key in named], config.encoder, as_target=alone)
    if config.unsupervised and config.recipe.source:
        sources[0] = construct(config.unsupervised, "unsupervised", source=sources[0])
    return sources[0], Target(sources[-1], config.target) if node is not None else None


def build_tests(config: DictConfig, built: list[Stage], data: DataSource) -> Mapping[str, DataSource]:
    """Builds what a meta-test tests on: the data sets of `test.data`, or what the source's own test classes are of.

    Raises:
        UserError: The recipe tests on none, or the network cannot be tested on one.
    """
    if not any(stage.meta_tests for stage in built):
        if config.test.data and not config.checkpoint:
            raise UserError(
                "test.data: this recipe has no meta-test; use recipe=meta, or recipe=test checkpoint=outputs/RUN"
            )
        return {}
    if not config.test.data:
        return data.tested
    found = fit_to_network(nodes_of(config.test.data, "test.data", TASK), data, encoded=bool(config.encoder))
    return {name: named(f"test.data: {name}", partial(encoded_as, items, data)) for name, items in found.items()}


def data_of(run: Run) -> tuple[DataSource, DataSource | None, Mapping[str, DataSource]]:
    """The source, the target's data set, and the data sets of `test.data`."""
    return run.data, run.target.source if run.target else None, run.tests if run.config.test.data else {}


def unchecked_data(config: DictConfig, folder: Path) -> str:
    """Compares the data that are there with those of a finished run, and downloads nothing for it.

    Returns:
        Why they could not be compared; an empty string where they are the same.

    Raises:
        UserError: They are other data.
    """
    try:
        with without_downloads():
            built = build_stages(config)
            data, target = build_data(config, built)
            tests = build_tests(config, built, data) if config.test.data else {}
    except (UserError, OSError) as error:
        return str(error)
    refuse_other_data(folder, descriptions(data, target.source if target else None, tests))
    return ""


def target_data(config: DictConfig, built: list[Stage]) -> DictConfig | None:
    """The node of the target's data set, if the recipe has a use for a target."""
    wanted = [stage for stage in built if stage.needs_target]
    if wanted and not config.target.data:
        raise UserError(f"recipe: its stage {wanted[0]} needs a target; add target=pneumoniamnist, say")
    if config.target.data and not wanted:
        raise UserError("target: this recipe has no use for one; add recipe=transfer, say")
    if config.transfer and not any(stage.uses_transfer for stage in built):
        raise UserError(
            "transfer: this recipe learns no target, and would not use it; add recipe=transfer target=pneumoniamnist, say, or leave "
            "transfer out"
        )
    return config.target.data if wanted else None


def carry_out(run: Run, world: World) -> None:
    """The stages, one after the other, in this rank."""
    world = world.to(run.hardware.device)
    run.world = world
    for learner in run.learners.values():
        learner.hardware = replace(learner.hardware, world=world)
    log.info("hardware: %s", run.hardware)
    for source in (run.data, *([run.target.source] if run.target else []), *run.tests.values()):
        source.make_ready(run.hardware.device)
    for stage in run.stages:
        stage.execute(run)


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
    older = stored_config(stored_file, "test another run, or its weights in another folder")
    refuse_old_words(older, stored_file)
    own = OmegaConf.merge(OmegaConf.structured(Config), older)
    for key in ("recipe", "target", "transfer"):  # what is done with the weights is this command line's
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
    for key in ("checkpoint", "outputs", "resume"):
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
    main = result.tested(run.result)
    run.logger.hparams(flat(recorded(config)), run.result.get(main or ""), run.result.get(result.SCORE))
    data = run.data.describe()
    if (main or "").startswith(f"{result.TEST}/"):
        run.result.setdefault("interval", "95%, over episodes, normal approximation")
    run.result |= {
        result.PROTOCOL: protocol(run, data),
        **({result.DATA: data} if config.recipe.source else {}),
        **({result.LEARNER: kept} if (kept := kept_learner(run)) else {}),
        **({result.CONTENT: run.target.describe()} if run.target else {}),
        "parameters": sum(value.numel() for value in algorithm.parameters()),
        "hardware": run.hardware.describe(),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        result.COMMAND: shlex.join(["metarun", *command[3:]]),
        "overrides": overrides,
        result.CHOICES: {
            group: choice
            for group, choice in choices.items()
            if not group.startswith("hydra/") and group.partition("@")[0] not in unused(config)
        },
        "seconds": seconds,
        "peak_memory": run.hardware.peak_memory(),
    }
    files.save_json(run.folder / result.FILE, run.result)


def protocol(run: Run, data: dict[str, Any]) -> dict[str, Any]:
    """How the numbers came about: what holds of the last learner, and what each stage says of itself."""
    algorithm = run.algorithm
    found: dict[str, Any] = {
        "norm": algorithm.backbone.norm,
        "transductive": algorithm.transductive,
        **({"assumes_balanced_queries": algorithm.assumes_balanced_queries} if algorithm.transductive else {}),
    }
    on_images = any(getattr(stage, "held_out", None) is not None for stage in run.stages)
    if run.target or on_images:
        found["labelled_images"] = batch_norm.labelled_rule(algorithm.backbone.norm)
    source = run.target.source if run.target else run.data.underlying
    if isinstance(source, EncodedSource):
        found["encoder"] = source.saw()
    if run.config.recipe.source:
        found |= {
            "test_inner_steps": algorithm.test_steps,
            "split": data.get("split", run.config.data.get("split")),
        }
    if run.data.labels_read:
        found["labels_read"] = run.data.labels_read
    found[result.SELECTED_BY] = run.learner.selected_by
    seen: dict[str, str] = {}
    for stage in run.stages:
        said = stage.protocol(run)
        seen |= said.get(result.SEEN, {})
        found |= said
    return {**found, result.SEEN: seen}


def unused(config: DictConfig) -> tuple[str, ...]:
    """The parts and groups of the config that the recipe does not use.

    Without a source these are those that only a source needs, and where all stages use what an earlier run learned, its data
    and its network too, which are not those of this command line.
    """
    if config.recipe.source:
        return ()
    source = ("data", "unsupervised", "pretrain", "wrapper", "test", "continual")
    method = ("algo", "task", "train", "optimizer", "schedule", "preset")
    built = build_stages(config)
    if not any(stage.continues_config or stage.needs_data for stage in built):
        return (*source, *method, "backbone", "encoder", "augment", "target", "transfer")
    gives = any(stage.gives_weights for stage in built)
    return source if gives or uses_method(config) else (*source, *method)


def recorded(config: DictConfig) -> dict[str, Any]:
    """The plain values of the config, without what the recipe does not use."""
    left_out = unused(config)
    return {key: value for key, value in to_container(config).items() if key not in left_out}
