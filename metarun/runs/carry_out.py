"""A run from its config to its folder."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import Timeout
from omegaconf import DictConfig, OmegaConf

from metarun import files
from metarun.config import check
from metarun.config.overrides import make_literal
from metarun.data.download import without_downloads
from metarun.data.source import DataSource
from metarun.engine import checkpoint, distributed, precision
from metarun.engine.distributed import PeerLost, World
from metarun.engine.hardware import check_device
from metarun.engine.interruption import Interrupted
from metarun.errors import Incomplete, Pruned, UserError
from metarun.report.next_steps import next_steps
from metarun.report.run import show, show_stored
from metarun.runs import contents, result
from metarun.runs.building import build_data, build_stages, build_tests, prepare
from metarun.runs.continuation import complete, refuse_other_weights
from metarun.runs.fingerprints import Descriptions, descriptions, keep, refuse_other_data, tested_on_others, weights
from metarun.runs.folder import check_writable, choose_folder, create, refuse_other_config
from metarun.runs.logger import logging_to, start_logging
from metarun.runs.recording import finish, recorded
from metarun.runs.run import Run
from metarun.runs.trial import watcher
from metarun.stages.base import Stage
from metarun.text import printable, shell_path

log = logging.getLogger("metarun")

LOCK_SECONDS = 33.0  # to wait for another process in the same folder: a job that is to end may save for half a minute


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Carries out the recipe of a config, or goes on with it, or shows its stored result.

    Args:
        config: The config, as Hydra composed it.
        overrides: The words that made it.
        choices: Hydra's choices of groups.
        command: Starts a further process of the same run.

    Returns:
        What `result.json` holds, and under `folder` where it lies; nothing in a process of another rank than 0.

    Raises:
        UserError: The run cannot be carried out; where its input is wrong, nothing is written.
        Incomplete: A part of the input was bad and left out.
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
        if (folder / contents.CONFIG).is_file():
            refuse_other_config(folder, config)
        built = build_stages(config)
        continues = config.checkpoint and any(stage.continues_config for stage in built)
        outdated = (folder / contents.RESULT).is_file()
        if outdated:
            if continues:
                refuse_other_weights(folder, checkpoint.weights_file("checkpoint", config.checkpoint))
            stored = result.stored(folder)
            if result.intact(folder, stored) and all(stage.is_current(folder, config, stored) for stage in built):
                show_stored(folder, unchecked_data(config, folder))
                return conclude(built, folder)
        check_writable(folder)  # before the data are read, which may take minutes
        # All that can be wrong with the input is found before anything is written, and before other ranks look at it.
        shared = prepare_for_processes(config, folder, world)
        described = descriptions(*data_of(shared)) | brought(config, built)
        # What a killed sitting left of a part, an order of classes say, is of the weights that were there then.
        begun = described | (tested_weights(config) if continues else {})
        refuse_other_data(folder, begun)
        if continues:
            origin = checkpoint.folder_of("checkpoint", config.checkpoint)
            shared.result |= tested_on_others(origin, described, overrides)
        shared.watch = watcher(folder)
        create(folder)
        try:
            with at_work(folder):
                if (folder / contents.RESULT).is_file() and not outdated:  # by now
                    show_stored(folder)
                    return conclude(built, folder)
                if (folder / contents.CONFIG).is_file():
                    refuse_other_config(folder, config)
                refuse_other_data(folder, begun)
                keep(folder, begun)
                text = OmegaConf.to_yaml(OmegaConf.create(recorded(config)))
                files.save_bytes(folder / contents.CONFIG, text.encode())
                # Before the files that it tells of are replaced, so that a kill leaves no number beside another's file.
                (folder / contents.RESULT).unlink(missing_ok=True)
                log.info("run folder: %s", shell_path(folder))
                with distributed.process_group(shared.world, command) as world:
                    world.broadcast(folder)
                    carry_out(shared, world)
                finish(shared, overrides, choices, command, time.perf_counter() - started)
        finally:
            shared.logger.close()
    show(folder, shared.result)
    return conclude(shared.stages, folder)


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder, and logs to it.

    Raises:
        UserError: Another process is at work in it, and goes on for longer than one that is to end takes to save.
    """
    holder = f"{shell_path(folder)}: another process is running this, or is just saving and ending"
    try:
        with files.locked(folder / ".lock", holder, LOCK_SECONDS), logging_to(folder / contents.LOG):
            yield
    except Timeout:
        raise UserError(
            f"{shell_path(folder)}: another process is running this; wait for it, or give this one another name="
        ) from None


def prepare_for_processes(config: DictConfig, folder: Path, world: World) -> Run:
    """Prepares the run for as many processes as are worthwhile where the config leaves their number open."""
    run = prepare(config, folder, world)
    if config.hardware.processes is None and not world.launched and (count := run.worthwhile_processes()) > 1:
        return prepare(config, folder, distributed.place(count), run)
    return run


def conclude(built: Sequence[Stage], folder: Path) -> dict[str, Any]:
    """Shows what each stage found, of the result of a finished run; returns the result, and under `folder` where it lies.

    Raises:
        Incomplete: A part of the input was bad.
    """
    found = {**result.stored(folder), "folder": str(folder)}
    left_out = [said for stage in built if (said := stage.conclude(folder, found))]
    for step in [*next_steps(folder, found), *(step for stage in built for step in stage.next_steps(found))]:
        print(f"next     {printable(step)}")
    if left_out:
        raise Incomplete("; ".join(left_out), found)
    return found


def follow(config: DictConfig, world: World) -> None:
    """Carries out the stages in a rank that is not 0; returns at once if rank 0 leaves before them, which it says itself."""
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


def data_of(run: Run) -> tuple[DataSource, DataSource | None, Mapping[str, DataSource]]:
    """Builds the source, the target's data set, and the data sets of `test.data`."""
    return run.data, run.target.source if run.target else None, run.tests if run.config.test.data else {}


def unchecked_data(config: DictConfig, folder: Path, known: dict[str, Descriptions | str] | None = None) -> str:
    """Compares the data that are there with those of a finished run, and downloads nothing for it.

    Args:
        config: The run's config.
        folder: The run's folder.
        known: What was found for other runs, by what their configs say of data; this one's is added.

    Returns:
        Why they could not be compared; an empty string where they are the same.

    Raises:
        UserError: They are other data.
    """
    known = {} if known is None else known
    nodes = {name: config[name] for name in ("data", "encoder", "unsupervised", "recipe", "target", "backbone")}
    key = OmegaConf.to_yaml(OmegaConf.create({**nodes, "tests": config.test.data}), resolve=False)
    if key not in known:
        known[key] = _data_now(config)
    if isinstance(now := known[key], str):
        return now
    refuse_other_data(folder, now)
    return ""


def _data_now(config: DictConfig) -> Descriptions | str:
    """What the data, and the weights, that are there say of themselves, or why they cannot be looked at."""
    try:
        with without_downloads():
            built = build_stages(config)
            data, target = build_data(config, built)
            tests = build_tests(config, built, data) if config.test.data else {}
            return descriptions(data, target.source if target else None, tests) | brought(config, built)
    except (UserError, OSError) as error:
        return str(error)


def brought(config: DictConfig, built: Sequence[Stage]) -> Descriptions:
    """Describes the weights that a run begins with; none where those of a checkpoint take their place."""
    return {} if any(stage.needs_checkpoint for stage in built) else weights(config)


def tested_weights(config: DictConfig) -> Descriptions:
    """Describes the weights of the checkpoint that a run goes on with."""
    return {"checkpoint": {"fingerprint": checkpoint.digest(checkpoint.weights_file("checkpoint", config.checkpoint))}}


def carry_out(run: Run, world: World) -> None:
    """Carries out the stages, one after the other, in this rank."""
    world = world.to(run.hardware.device)
    run.world = world
    for learner in run.learners.values():
        learner.hardware = replace(learner.hardware, world=world)
    log.info("hardware: %s", run.hardware)
    if world.main and (told := precision.cost(run.hardware.device, run.hardware.autocast_dtype)):
        log.warning("%s", told)
    if world.main and (told := run.trained_on_tests):
        log.warning("data: %s", told)
    for stage in run.stages:
        stage.execute(run)
