"""The console command: let Hydra compose what the words say, hand over to the recipe, and end with its exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from metarun import __version__
from metarun.config.folder import CONF
from metarun.config.overrides import quoted
from metarun.errors import Diverged, Incomplete, JobsFailed, MadeOtherwise, Pruned, UserError
from metarun.runs.result import SCORE
from metarun.shell.arguments import folder_of_configs, for_hydra, overrides_of, parsed
from metarun.shell.messages import MENDABLE, one_line, raised_by_hydra
from metarun.shell.recipe import carried_out, swept
from metarun.sweeps.jobs import PRUNED, Outcome, options_of
from metarun.system.launched import rank_and_size
from metarun.system.platform import heeded_signals, name_user, number_of, signal_name, stop_signals
from metarun.text import below_here, has_control, outlasting, printable

CONFIG_DIR = ("--config-dir", "-cd")
PLUGINS = str(Path(__file__).parent / "plugins")  # where Hydra finds the launchers and sweepers in conf/hydra
if PLUGINS not in sys.path:
    sys.path.append(PLUGINS)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _run(config: DictConfig) -> float:
    job = HydraConfig.get()
    words = cast(list[str], OmegaConf.to_container(job.overrides.task))  # as Hydra was given them, `${...}` too
    try:
        params = swept(job.sweeper) if job.mode == RunMode.RUN else {}
        found = carried_out(config, words, job.runtime.choices, params, options_of(job))
        return float(found.get(SCORE, math.nan))  # for a sweeper of Hydra's, to which 0.0 would be a score
    except BrokenPipeError as error:
        raise Unread from error  # past Hydra, too
    except MENDABLE as error:
        if job.mode == RunMode.MULTIRUN:  # by a launcher of Hydra's own, in this process
            raise (Diverged if isinstance(error, Diverged) else UserError)(one_line(error)) from error
        raise Refused(one_line(error)) from error  # past Hydra, which would print lines of its own


class Refused(BaseException):
    """An error that the user can mend, in one line, on its way through Hydra."""


class Unread(BaseException):
    """Standard output was closed, as by `metarun ... | head`: nobody reads on, and nobody needs a word about it."""


class Stopped(KeyboardInterrupt):
    """A signal that came while nothing was trained."""

    def __init__(self, number: int) -> None:
        super().__init__(signal_name(number))
        self.number = number


def _stop(number: int, frame: Any) -> None:
    # A second one, which `timeout` and some clusters send, must not cut short what the first one ends.
    for each in stop_signals():
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def main() -> None:
    """The `metarun` command. Exit status: 0, 1 where jobs of a sweep failed, 2 for what the user can mend, 128 + n for signal n."""
    try:
        outcome = attempt(sys.argv[1:])
        if outcome.message and not follows():
            print(f"metarun: {printable(outcome.message)}", file=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        _write_nowhere(sys.stdout, sys.stderr)
        sys.exit(128 + number_of("SIGPIPE", 13))
    except OSError as error:  # of what was written last, onto a full disk
        if _shows_tracebacks():
            raise
        print(f"metarun: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        _write_nowhere(sys.stdout)
        sys.exit(2)
    sys.exit(0 if outcome.status == 2 and follows() else outcome.status)


def _write_nowhere(*streams: Any) -> None:
    """Has what an output could not take written nowhere, which the interpreter would try again as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())


def _shows_tracebacks() -> bool:
    """Whether the environment asks for the tracebacks of errors that the user can mend."""
    return os.environ.get("METARUN_TRACEBACK", "").strip().lower() not in ("", "0", "false", "no", "off")


def follows() -> bool:
    """Whether this is a launcher's process of another rank than 0, which meets the same and tells it."""
    try:
        return rank_and_size()[0] > 0
    except UserError:  # which is told
        return False


def attempt(words: list[str]) -> Outcome:
    """Carries out `metarun words...`; how it ended. What the user cannot mend is raised."""
    heeded, ctrl_c = heeded_signals(), signal.getsignal(signal.SIGINT)
    afterwards = signal.SIG_DFL  # one that comes while the interpreter ends is no story to tell
    try:
        if ctrl_c is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in heeded:
            signal.signal(number, _stop)
        outcome = _outcome_of(words)
        return replace(outcome, message=below_here(outcome.message)) if outcome.message else outcome
    except KeyboardInterrupt as interrupt:  # also one that comes while an error is being told
        afterwards = signal.SIG_IGN  # what the first one ended has its exit status
        by = f" by {interrupt}" if str(interrupt) else ""
        return Outcome(128 + getattr(interrupt, "number", signal.SIGINT), f"interrupted{by}; the same command goes on")
    finally:
        if ctrl_c is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number in heeded:
            signal.signal(number, afterwards)


def verb_first(words: list[str]) -> list[str]:
    """The words of a command line with `help` or `runs` before a `--config-dir` that stands before it."""
    option, equals, _ = words[0].partition("=") if words else ("", "", "")
    led = (1 if equals else 2) if option in CONFIG_DIR else 0
    return [words[led], *words[:led], *words[led + 1 :]] if words[led : led + 1] in (["help"], ["runs"]) else words


def listing(words: list[str]) -> list[str]:
    """`metarun runs words...`, in which folders may stand alone, as the words of its recipe."""
    folders, others, standing = list[str](), list[str](), overrides_of(words[1:])
    for word in words[1:]:
        if stands := standing[:1] == [word]:  # and is no option, nor the value of one
            standing.pop(0)
        named = (stands and "=" not in word) or ((stands or word.startswith("-")) and Path(word).is_dir())
        (folders if named else others).append(word)
    asked = (
        f"runs=[{','.join(map(quoted, folders))}]" if len(folders) > 1 else "".join(f"runs={one}" for one in folders)
    )
    return ["recipe=runs", *filter(None, [asked]), *others]


def show_part(arguments: argparse.Namespace) -> None:
    """Has Hydra show the part of a config that `--package` names; raises `UserError` where there is none."""
    with contextlib.redirect_stderr(io.StringIO()):  # Hydra's own words for that, and an exit status
        try:
            _run()
        except SystemExit as ended:
            raise UserError(
                f"--package {arguments.package}: is no part of the config, or null; metarun --cfg {arguments.cfg} shows all of it"
            ) from ended


def _explain(words: list[str]) -> Outcome:
    """`metarun help words...`, with the choices of `--config-dir FOLDER` if that is among them."""
    from metarun.config.help import answer
    from metarun.config.reference import Reference

    asked, folders = [], [CONF]
    given = iter(words)
    try:
        for word in given:
            option, equals, folder = word.partition("=")
            if option in CONFIG_DIR:
                folders.insert(0, folder_of_configs(folder if equals else next(given, "")))
            else:
                asked.append(word)
        print(answer(asked, Reference(folders)))
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:  # of a folder that may not be looked into, too
        return Outcome(2, one_line(error))
    return Outcome()


def _outcome_of(words: list[str]) -> Outcome:
    """Runs; what the user can mend is an outcome."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, so that one line can be told, whatever a shell has set
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return Outcome(2, "the folder that this was started in has been removed; change to another")
    if here not in sys.path:
        sys.path.append(here)  # a `_target_` in the user's own file; last, so that it stands in for no library
    name_user()
    sys.stdout, sys.stderr = outlasting(sys.stdout), outlasting(sys.stderr)
    words = verb_first(words)
    if words[:1] == ["help"]:
        return _explain(words[1:])
    try:
        arguments, options = parsed(listing(words) if words[:1] == ["runs"] else words)
        if arguments.version:
            print(f"metarun {__version__}")
            return Outcome()
        if arguments.help:
            from metarun.config.help import front_page
            from metarun.config.reference import Reference

            own = [Path(arguments.config_dir)] if arguments.config_dir else []
            print(front_page(Reference([*own, Path(arguments.config_path or CONF)])))
            return Outcome()
        if has_control(here):  # which neither the stored config nor the run's log could hold
            raise UserError(
                f"{printable(here)}: this folder's path has a control character, or bytes that are no UTF-8; work in another"
            )
        sys.argv[1:] = [*for_hydra(arguments), *options]
        from metarun.shell import one_composition  # here: `--help` needs nothing of what it imports

        one_composition.install()
        if arguments.package is None:
            _run()
        else:
            show_part(arguments)
    except BrokenPipeError:
        raise
    except Unread as unread:
        raise BrokenPipeError from unread
    except (JobsFailed, Incomplete) as failed:
        return Outcome(1, str(failed))
    except Pruned as pruned:
        return Outcome(PRUNED, str(pruned))
    except (Refused, *MENDABLE, ValueError, AssertionError, RuntimeError) as error:
        # Hydra meets some mistakes with a bare ValueError, or an assertion: a group that is given a number, -m with --cfg, a
        # sweeper that is none.
        foreign = not isinstance(error, (Refused, *MENDABLE)) and not raised_by_hydra(error)
        if _shows_tracebacks() or foreign:
            raise
        if isinstance(error, Refused):
            cause = error.__cause__
            return Outcome(2, str(error), isinstance(cause, Diverged), isinstance(cause, MadeOtherwise))
        return Outcome(2, one_line(error))
    return Outcome()
