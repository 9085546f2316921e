"""A job of a sweep is a command line: the same words start the same run alone, on this machine or on a cluster."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.config.folder import CONF
from metarun.engine.platform import number_of, signal_name
from metarun.errors import UserError
from metarun.runs import contents
from metarun.runs.result import stored
from metarun.text import printable

PRUNED = 3  # the exit status of a trial of a search that was not worth going on with
REQUEUED = 128 + number_of("SIGUSR1", 10)  # the exit status of a run that saved because its time on a cluster is over


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, and the first line of its error."""

    status: int = 0
    message: str = ""


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
        except UserError:  # which the run itself tells when it is started
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


def beside(folder: Path, kind: str) -> Path:
    """The file in which a sweep keeps something of the run in `folder`: `log` its output, `slurm` its name in Slurm, `outcome`, `trial`."""
    return folder.parent / ".jobs" / f"{folder.name}.{kind}"


def perform(arguments: Sequence[str]) -> Outcome:
    """Runs `metarun arguments...` in this process, which should do nothing else afterwards; prints what it would print."""
    from metarun import cli

    try:
        outcome = cli.attempt(list(arguments))
    except Exception as error:  # a fault of ours or of a user's method: the whole story, then its first line
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        outcome = Outcome(1, f"{type(error).__name__}: {lines[0]}")
    else:
        if outcome.message:
            print(f"metarun: {printable(outcome.message)}", file=sys.stderr, flush=True)
    return outcome


def check_stages(job: Job, config: Any) -> None:
    """Raises `UserError` where the stages of a job cannot do with its checkpoint and its target; `config` is the job's, checked."""
    from metarun import cli

    cli.check_stages(config, job.overrides, dict(job.choices))


def check_data(job: Job, config: Any, known: dict[str, Any]) -> None:
    """Raises `UserError` where the data that are there are not those of a finished job; `known` is what was found for others."""
    from metarun import cli

    cli.check_data(config, job.folder, known)


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
