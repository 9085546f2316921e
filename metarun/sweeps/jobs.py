"""A job of a sweep is a command line: the same words start the same run alone, on this machine or on a cluster."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun.config.folder import CONF
from metarun.config.overrides import canonical
from metarun.config.schema import RecipeSettings
from metarun.errors import UserError
from metarun.runs import contents
from metarun.runs.result import intact, stored
from metarun.runs.trial import beside
from metarun.system.platform import number_of, signal_name
from metarun.text import printable

MENDABLE = 2  # the exit status of what the user can mend: wrong words, a training that diverged, a full disk
PRUNED = 3  # the exit status of a trial of a search that was not worth going on with
REQUEUED = 128 + number_of("SIGUSR1", 10)  # the exit status of a run that saved because its time on a cluster is over


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, and the first line of its error."""

    status: int = 0
    message: str = ""
    own_error: bool = False  # whether its words lead to it wherever they are carried out, as to a diverged training
    refused: bool = False  # whether its folder was made with another config, other data or other weights


@dataclass(frozen=True)
class Job:
    """One command of a sweep."""

    arguments: tuple[str, ...]  # what is typed behind `metarun`
    overrides: tuple[str, ...]  # of that the run's own
    folder: Path  # that they lead to
    label: str  # the overrides in which the jobs of the sweep differ
    choices: tuple[tuple[str, str], ...] = ()  # of groups, by which a recipe and a run are named

    @property
    def finished(self) -> bool:
        """Whether its run has a result, which can be read."""
        try:
            return (self.folder / contents.RESULT).is_file() and bool(self.result)
        except (UserError, OSError):  # which the run itself tells when it is started
            return False

    @property
    def result(self) -> dict[str, Any]:
        """Its `result.json`."""
        return stored(self.folder)

    @property
    def log(self) -> Path:
        """Where its output goes if not to the terminal; not in the run folder, which only the run itself may make."""
        return beside(self.folder, "log")


OF_THE_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.", "hydra.mode")


def options_of(hydra: Any) -> list[str]:
    """The words besides the overrides with which Hydra composes a run's config again, wherever they are typed.

    Args:
        hydra: Hydra's own config of a run or a sweep.

    Returns:
        `--config-dir` and its like with absolute paths, and the overrides of Hydra's own keys that are not the sweep's.
    """
    sources = {source.provider: source.path for source in hydra.runtime.config_sources}
    named = {
        "--config-path": sources["main"] if sources.get("main") not in (None, str(CONF)) else None,
        "--config-dir": sources.get("command-line"),
        "--config-name": hydra.job.config_name if hydra.job.config_name != "config" else None,
    }
    options = [word for option, value in named.items() if value for word in (option, value)]
    return [*options, *(word for word in hydra.overrides.hydra if not word.lstrip("+~").startswith(OF_THE_SWEEP))]


def perform(arguments: Sequence[str], *, tell_of_signals: bool = True) -> Outcome:
    """Runs `metarun arguments...` in this process, which should do nothing else afterwards; prints what it would print.

    Args:
        arguments: What is typed behind `metarun`.
        tell_of_signals: Whether it is printed that a signal ended it, which a sweep at the same terminal says itself.

    Returns:
        How it ended.
    """
    from metarun import cli

    try:
        outcome = cli.attempt(list(arguments))
    except Exception as error:  # a fault of ours or of a user's method: the whole story, then its first line
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        outcome = Outcome(1, f"{type(error).__name__}: {lines[0]}")
    else:
        if outcome.message and (tell_of_signals or outcome.status <= 128):
            print(f"metarun: {printable(outcome.message)}", file=sys.stderr, flush=True)
    return outcome


def check_stages(job: Job, config: DictConfig, here: bool = False) -> None:
    """Checks what the recipe, the checkpoint and the target of a job allow, without reading its data.

    Args:
        job: The job.
        config: Its config, whose settings are checked; it stays as it is.
        here: Whether it runs on this machine, on which its libraries, data and weights must be then.

    Raises:
        UserError: The job cannot be carried out.
    """
    from metarun.runs.building import build_stages, check_installed, target_data  # here: they have torch imported

    if named := [key for key in ("items", "images") if config[key] == "-"]:
        raise UserError(
            f"{named[0]}=-: the jobs of a sweep have no standard input; name a folder or a pattern, or run them one by one"
        )
    if not config.recipe.stages and config.recipe.run != RecipeSettings.run:
        several = "; without -m, runs=[a,b] takes several folders" if config.runs else ""
        raise UserError(f"recipe={dict(job.choices).get('recipe')}: makes no run, and is for no sweep{several}")
    whole = completed(job, config)
    built = build_stages(whole)
    target_data(whole, built)
    if here:
        check_installed(whole, built)


def completed(job: Job, config: DictConfig) -> DictConfig:
    """The config of a job on top of that of its checkpoint's run, if it has one; `config` stays as it is.

    Raises:
        UserError: Its recipe, its words and its checkpoint do not go together, or the checkpoint is missing.
    """
    from metarun.runs.continuation import complete  # here: it has torch imported

    return complete(copy.deepcopy(config), canonical(list(job.overrides), config), dict(job.choices))


def is_current(job: Job, config: DictConfig) -> bool:
    """Whether the result of a finished job that uses a checkpoint is still that of its inputs.

    Args:
        job: The job.
        config: Its whole config, on top of that of the checkpoint's run.

    Raises:
        UserError: The result is of other weights than the checkpoint has now.
    """
    from metarun.engine import checkpoint  # here: they have torch imported
    from metarun.runs.building import build_stages
    from metarun.runs.continuation import refuse_other_weights

    stages = build_stages(config)
    if any(stage.continues_config for stage in stages):
        refuse_other_weights(job.folder, checkpoint.weights_file("checkpoint", config.checkpoint))
    found = job.result
    return intact(job.folder, found) and all(stage.is_current(job.folder, config, found) for stage in stages)


def validates(config: DictConfig) -> bool:
    """Whether a stage of the recipe trains, and so chooses its weights on validation."""
    from metarun.runs.building import build_stages  # here: it has torch imported

    return any(stage.gives_weights and not stage.needs_checkpoint for stage in build_stages(config))


def tests(config: DictConfig) -> bool:
    """Whether a stage of the recipe uses what the others have learned, and so tests it."""
    from metarun.runs.building import build_stages  # here: it has torch imported

    return any(not stage.gives_weights for stage in build_stages(config))


def check_data(job: Job, config: DictConfig, known: dict[str, Any]) -> None:
    """Compares the data that are there with those of a finished job.

    Args:
        job: The job.
        config: Its config.
        known: What was found for other jobs, see `unchecked_data`.

    Raises:
        UserError: They are other data.
    """
    from metarun.runs.carry_out import unchecked_data  # here: it has torch imported

    unchecked_data(config, job.folder, known)


def how_it_ended(exitcode: int | None) -> Outcome:
    """Of a process that ended without saying how: its exit code, negative for a signal."""
    if exitcode is not None and exitcode < 0:
        name = signal_name(-exitcode)
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return Outcome(128 - exitcode, f"killed by {name}{hint}")
    return Outcome(exitcode or 1, f"ended with exit status {exitcode}")


@contextmanager
def exporting(**variables: str) -> Iterator[None]:
    """For processes that are started meanwhile: these variables, and a PYTHONPATH with which they find what this one finds.

    In its order: Python would put the working folder first.
    """
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1", **variables}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
