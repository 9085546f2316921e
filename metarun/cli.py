"""The console command: find `conf/`, let Hydra compose, hand over to `metarun.runs.carry_out.run`; errors become one line."""

from __future__ import annotations

import argparse
import copy
import functools
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import yaml  # type: ignore[import-untyped]
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from metarun import __version__
from metarun import config as schema
from metarun.config.folder import CONF
from metarun.config.overrides import canonical, fixed, hint_of, is_free, key_of, read, reading, settled, split
from metarun.config.shorthand import PAPER, check_paper, expanded, folded_choices
from metarun.engine.launched import rank_and_size
from metarun.engine.platform import heeded_signals, name_user, number_of, signal_name, stop_signals
from metarun.errors import Incomplete, JobRefused, JobsFailed, Pruned, UserError, first_line, nearest, reason
from metarun.renamed import renamed_choice, renamed_key
from metarun.runs.result import SCORE
from metarun.sweeps.jobs import PRUNED, Outcome, options_of
from metarun.text import has_control, outlasting, printable

PLUGINS = str(Path(__file__).parent / "plugins")  # where Hydra finds the launchers and sweepers in conf/hydra
if PLUGINS not in sys.path:
    sys.path.append(PLUGINS)

# Settings of Hydra's folders, which metarun's runs do not use.
HYDRAS_FOLDERS = (
    "hydra.run",
    "hydra.sweep.",
    "hydra.output_subdir",
    "hydra.job.chdir",
)
OF_A_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
OF_CHECKPOINTS = {"algo": ("method", "algo=maml"), "data": ("data", "data=omniglot")}  # a checkpoint brings both
NEEDED = ("algo", "backbone", "data", "optimizer", "recipe")  # groups of which a run has a choice, whatever it does
MENDABLE = (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _run(config: DictConfig) -> float:
    job = HydraConfig.get()
    words = cast(list[str], OmegaConf.to_container(job.overrides.task))  # as Hydra was given them, `${...}` too
    try:
        overrides = canonical(words, config)
        command = [sys.executable, "-m", "metarun", *options_of(job), *overrides]
        check_paper(words, job.runtime.choices)
        choices = folded_choices(job.runtime.choices, config)
        found = _carries_out(str(config.recipe.run))(config, overrides, choices, command)
        return float(found.get(SCORE, 0.0))
    except BrokenPipeError:
        raise
    except MENDABLE as error:
        if job.mode == RunMode.MULTIRUN:  # by a launcher of Hydra's own, in this process
            raise UserError(one_line(error)) from error
        raise Refused(one_line(error)) from error  # past Hydra, which would print lines of its own


def check_stages(config: DictConfig, words: Sequence[str], choices: dict[str, str]) -> None:
    """Checks what a run's recipe, checkpoint and target allow, without its data.

    Args:
        config: The run's, whose settings are checked; it stays as it is.
        words: The overrides, as Hydra was given them.
        choices: Of groups.

    Raises:
        UserError: The run cannot be carried out.
    """
    from metarun.runs.building import build_stages, target_data  # here: they have torch imported
    from metarun.runs.continuation import complete

    whole = complete(copy.deepcopy(config), canonical(words, config), choices)
    target_data(whole, build_stages(whole))


def _carries_out(path: str) -> Any:
    """The function that a recipe names to carry it out."""
    try:
        return get_method(path)
    except Exception as error:  # whatever importing a module provokes
        raise UserError(f"recipe.run={path}: is no function that can be imported ({reason(error)})") from error


class Refused(BaseException):
    """An error that the user can mend, in one line, on its way through Hydra."""


class Stopped(KeyboardInterrupt):
    """A signal that came while nothing was trained."""

    def __init__(self, number: int, frame: Any = None) -> None:
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
    except BrokenPipeError:  # `metarun ... | head`: nobody reads on, and nobody needs a word about it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + number_of("SIGPIPE", 13))
    sys.exit(0 if outcome.status == 2 and follows() else outcome.status)


def follows() -> bool:
    """Whether this is a launcher's process of another rank than 0, which meets the same and tells it."""
    try:
        return rank_and_size()[0] > 0
    except UserError:  # which is told
        return False


def attempt(words: list[str]) -> Outcome:
    """Carries out `metarun words...`; how it ended. What the user cannot mend is raised."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises, so that one line can be told
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return Outcome(2, "the folder that this was started in has been removed; change to another")
    if here not in sys.path:
        sys.path.append(here)  # a `_target_` in the user's own file; last, so that it stands in for no library
    name_user()
    sys.stdout, sys.stderr = outlasting(sys.stdout), outlasting(sys.stderr)
    if words[:1] == ["runs"]:
        words = ["recipe=runs", *(f"runs={word}" if Path(word).is_dir() else word for word in words[1:])]
    if words[:1] == ["help"]:
        return _explain(words[1:])
    heeded = heeded_signals()
    for number in heeded:
        signal.signal(number, _stop)
    afterwards = signal.SIG_DFL  # one that comes while the interpreter ends is no story to tell
    try:
        return _told(words)
    except KeyboardInterrupt as interrupt:  # also one that comes while an error is being told
        afterwards = signal.SIG_IGN  # what the first one ended has its exit status
        by = f" by {interrupt}" if str(interrupt) else ""
        return Outcome(128 + getattr(interrupt, "number", signal.SIGINT), f"interrupted{by}; the same command goes on")
    finally:
        for number in heeded:
            signal.signal(number, afterwards)


def _explain(words: list[str]) -> Outcome:
    """`metarun help words...`, with the choices of `--config-dir FOLDER` if that is among them."""
    from metarun.config.help import answer
    from metarun.config.reference import Reference

    asked, folders = [], [CONF]
    given = iter(words)
    for word in given:
        option, equals, folder = word.partition("=")
        if option in ("--config-dir", "-cd"):
            folders.insert(0, Path(folder if equals else next(given, ".")))
        else:
            asked.append(word)
    try:
        print(answer(asked, Reference(folders)))
    except UserError as error:
        return Outcome(2, str(error))
    return Outcome()


def _told(words: list[str]) -> Outcome:
    """Runs; what the user can mend is an outcome."""
    try:
        arguments, options = parsed(words)
        if arguments.version:
            print(f"metarun {__version__}")
            return Outcome()
        if arguments.help:
            from metarun.config.help import front_page
            from metarun.config.reference import Reference

            own = [Path(arguments.config_dir)] if arguments.config_dir else []
            print(front_page(Reference([*own, Path(arguments.config_path or CONF)])))
            return Outcome()
        if has_control(os.getcwd()):  # which neither the stored config nor the run's log could hold
            raise UserError(
                f"{printable(os.getcwd())}: this folder's path has a control character, or bytes that are no UTF-8; work in another"
            )
        sys.argv[1:] = [*for_hydra(arguments), *options]
        _run()
    except BrokenPipeError:
        raise
    except (JobsFailed, Incomplete) as failed:
        return Outcome(1, str(failed))
    except Pruned as pruned:
        return Outcome(PRUNED, str(pruned))
    except (Refused, *MENDABLE, ValueError, AssertionError) as error:
        # Hydra meets some mistakes with a bare ValueError, or an assertion: a group that is given a number, -m with --cfg.
        foreign = not isinstance(error, (Refused, *MENDABLE)) and not raised_by_hydra(error)
        if os.environ.get("METARUN_TRACEBACK") or foreign:
            raise
        return Outcome(2, one_line(error))
    return Outcome()


def expanded_folder(word: str, folder: str) -> str:
    """A word that is an option's value `folder`, or ends in it behind `=`, with `~` expanded; any other as it is."""
    option, equals, value = word.partition("=")
    if word == folder:
        return os.path.expanduser(word)
    return f"{option}={os.path.expanduser(value)}" if equals and value == folder and option.startswith("-") else word


def raised_by_hydra(error: BaseException) -> bool:
    """Whether an error comes out of Hydra's own code."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and Path(at.tb_frame.f_code.co_filename).is_relative_to(Path(hydra.__file__).parent)


def parsed(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The words of a command line in Hydra's options and ours, and those of them that are Hydra's options and their values.

    Overrides may stand before, between and behind options. Raises `UserError` for words that are none of these.
    """
    words = [word for word in words if word != "--"]  # no override looks like an option
    for word in words:
        if has_control(word):
            raise UserError(f"{printable(word)}: has a control character, or bytes that are no UTF-8")
    parser = get_args_parser()
    parser._option_string_actions.pop("--version")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--dry-run", action="store_true")

    def refuse(message: str) -> NoReturn:
        _, known, word = message.partition("unrecognized arguments: --")
        hint = meant(word.partition(" ")[0]) if known else ""
        raise UserError(f"{message}{hint or '; metarun --help shows what can be typed'}")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(words)
    if arguments.config_dir:
        typed, arguments.config_dir = arguments.config_dir, os.path.expanduser(arguments.config_dir)
        words = [expanded_folder(word, typed) for word in words]
        if not os.path.isdir(arguments.config_dir):
            beside = Path(arguments.config_dir).absolute().parent
            near = nearest(Path(typed).name, [path.name for path in beside.iterdir()] if beside.is_dir() else [])
            raise UserError(f"--config-dir {typed}: there is no such folder{near}")
    if arguments.dry_run and not arguments.multirun:
        raise UserError("--dry-run: lists the jobs of a sweep (-m); metarun --cfg job shows the config of one run")
    options, overrides = list[str](), list(arguments.overrides)
    for word in words:
        if overrides and word == overrides[0]:
            overrides.pop(0)
        elif not (len(word) > 3 and "--dry-run".startswith(word)):
            options.append(word)
    if arguments.cfg == "job" and not arguments.resolve:
        options.append("--resolve")  # what a run would have: numbers, and no references to other keys
    return arguments, options


def for_hydra(arguments: argparse.Namespace) -> list[str]:
    """The overrides in Hydra's grammar: text and paths in quotes where it would read them otherwise.

    The config is composed for that only if a word needs to know the class that its key is a setting of.
    """
    sweep = arguments.multirun
    if lacking := next((group for group in NEEDED if f"{group}=null" in arguments.overrides), None):
        raise UserError(
            f"{lacking}=null: a run has one; leave the word out for the usual one, or choose: metarun help {lacking}"
        )
    words = expanded(arguments.overrides, sweep)
    for word in words:
        if not key_of(word):
            raise UserError(
                f"{word or repr(word)}: cannot be read as key=value or group=choice; no space stands beside ="
            )
        if key_of(word) == "preset":
            refuse_unknown_preset(word, arguments)
        if key_of(word).startswith(HYDRAS_FOLDERS):
            raise UserError(
                f"{key_of(word)}: decides on no folder here; outputs= says where runs lie, and name= names one"
            )
    runs = not (sweep or arguments.cfg or arguments.info or arguments.hydra_help or arguments.help)
    if runs and (alone := next((word for word in words if key_of(word).startswith(OF_A_SWEEP)), None)):
        raise UserError(
            f"{alone}: is for the jobs of a sweep, and this is a single run, here; add -m (a sweep may be of one job)"
        )
    composed = functools.cache(lambda: _composed(arguments))

    def one(word: str) -> str:
        key = key_of(word)
        if key.startswith(("hydra.", "hydra/")):
            return word
        free = is_free(key)
        if not free or not settled(word, sweep) or word.endswith("="):
            how = reading(hint_of(key, lambda path: OmegaConf.select(composed(), path)))
            if how.path and not how.optional and word.endswith("="):
                raise UserError(
                    f"{word}: is empty, and must name a file or a folder; is a variable of the shell not set?"
                )
            word = read(word, how, sweep)
        return fixed(word) if sweep and free else word

    dry = ["hydra.sweeper.dry_run=true"] if arguments.dry_run else []
    return [*map(one, words), *dry]


def refuse_unknown_preset(word: str, arguments: argparse.Namespace) -> None:
    """Refuses a preset that is not there: Hydra passes one over, since the one that applies by itself may be missing.

    Raises:
        UserError: There is no such file.
    """
    folders = [Path(folder) for folder in (arguments.config_dir, arguments.config_path or CONF) if folder]
    known = {
        path.relative_to(folder / "preset").with_suffix("").as_posix()
        for folder in folders
        for path in (folder / "preset").rglob("*.yaml")
    }
    _, equals, value = word.partition("=")
    for name in split(value) if equals and not word.startswith("~") else ():
        if re.fullmatch(r"[\w/.-]+", name) and name not in known | {PAPER, "null"}:
            raise UserError(_unknown_choice(f"preset/{name}", sorted(known)))


def meant(word: str) -> str:
    """What was meant by words that Hydra cannot read, `; did you mean recipe=report?` say; an empty string where nobody knows.

    Args:
        word: The words as they were typed: `report`, `algo:maml`, `algo maml`, or what follows the hyphens of `--algo=maml`.
    """
    found = re.fullmatch(r"([\w./]+)[ :=]+([\w./~-]+)", word)
    of_group = found and found[1] != "recipe" and (CONF / found[1]).is_dir()
    if found and (of_group or (":" in word and "=" not in word)):
        return f"; did you mean {found[1]}={found[2]}?"
    if (CONF / word).is_dir() and word.isidentifier():
        return f"; a choice of this group is written {word}=NAME, and metarun help {word} lists them"
    chosen = sorted(CONF.glob(f"*/{word}.yaml")) if word.isidentifier() else []
    words = [f"{path.parent.name}={word}" for path in chosen]
    return f"; did you mean {' or '.join(words[:3])}?" if words else ""


def _composed(arguments: argparse.Namespace) -> DictConfig:
    """The config that the choices of groups make, of which a sweep has the first ones; raises Hydra's errors."""
    words = []
    for word in expanded(arguments.overrides):
        key, _, value = word.partition("=")
        if (settled(word, arguments.multirun) and "." not in key.partition("@")[0]) or key.endswith("._target_"):
            choices = re.fullmatch(r"choice\((.*)\)", value)
            first = split(choices[1] if choices else value)[0]
            words += expanded([f"{key}={first}"] if arguments.multirun and value and key.isidentifier() else [word])
    search_path = create_config_search_path(arguments.config_path or str(CONF))
    if arguments.config_dir:
        added = f"file://{os.path.abspath(arguments.config_dir)}"
        search_path.prepend("command-line", added, anchor=SearchPathQuery(provider="schema"))
    loader = ConfigLoaderImpl(search_path)
    return loader.load_configuration(arguments.config_name or "config", words, RunMode.RUN)


def one_line(error: BaseException) -> str:
    """What went wrong, and the nearest right name where a name is wrong."""
    if isinstance(error, JobRefused):
        return error.told(one_line)
    if isinstance(error, Refused | UserError):
        return str(error)
    text = str(error)
    found = re.match(r"In '([^']+)'", text)
    where = f"{found[1]}: " if found and found[1] != "config" else ""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return where + _unknown_choice(str(error.missing_cfg_file), list(error.options or []))
    if isinstance(error, OverrideParseException):
        word = str(error.override)
        why = (
            "metarun --help shows how a command is written" if word.isalnum() else "brackets and commas may need quotes"
        )
        hint = meant(word) or f"; {why}"
        return f"{error.override}: cannot be read as key=value or group=choice{hint}"
    if isinstance(error, ConfigCompositionException) and "${algo}_${data}" in text:
        return "algo and data need one choice each; several make a sweep: -m algo=a,b"
    inner = error.__cause__ or error.__context__
    for cause in (error, inner):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if isinstance(cause, ConfigKeyError | ConfigAttributeError):
                return where + _unknown_key(cause.full_key, cause.parent_node)
            return where + _wrong_value(cause.full_key, first_line(cause))
    if found := re.search(r"Could not override '([^']+)'", text):
        old = renamed_key(found[1].partition("@")[0])
        return (
            where + old
            if old
            else f"{where}{found[1]}: there is no such group{nearest(found[1].partition('@')[0], _groups())}"
        )
    if found := re.match(r"Sweep parameters '(.+)' requires --multirun", text):
        search = " hydra/sweeper=optuna" if "interval(" in found[1] else ""
        return f"{found[1]}: is for a {'search' if search else 'sweep'}; add -m{search}"
    if found := re.match(r"Ambiguous value for argument '(.+)'", text):
        return f"{found[1]}: several values make a sweep, which needs -m; a list is written [a,b]"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, AssertionError):  # of Hydra's own code, which looks at its own keys so
        return "a setting of hydra.* is of another type than Hydra takes; metarun --hydra-help"
    if "integer string conversion" in text:
        return "a number has more digits than any setting takes"
    if "Config group override" in text:
        no_name = re.compile(r".*=(null|true|false|[-+.\d].*|\{.*)", re.IGNORECASE)
        given = next((word for word in sys.argv[1:] if key_of(word) in _groups() and no_name.fullmatch(word)), "algo")
        return f"{given}: was given no name of a choice; ~{key_of(given)} leaves the group out"
    return where + first_line(inner if where and inner else error)


# Types as OmegaConf calls them, and as people do.
KINDS = {
    "Integer": "whole number",
    "Float": "number",
    "Boolean": "truth value (true, false)",
}


def _wrong_value(key: str, message: str) -> str:
    """What OmegaConf says of a key's value, in words."""
    if (found := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message)) and found[2] in KINDS:
        whole = re.fullmatch(r"(-?\d+)\.0", found[1])
        written = f"; write {whole[1]}" if whole and found[2] == "Integer" else ""
        return f"{key}={found[1]}: is no {KINDS[found[2]]}{written}"
    if found := re.match(r"Value '(.*)' is not a valid bool", message):
        return f"{key}={found[1]}: is no {KINDS['Boolean']}"
    if (message.startswith("Cannot assign") and "Dict" in message) or "is not a subclass of" in message:
        group = key.rpartition(".")[2]
        advice = f"{group}=NAME chooses one" if group in _groups() else f"metarun help {key} lists them"
        return f"{key}: has settings of its own, and is no single value; {advice}"
    return f"{key}: {message}"


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def _unknown_choice(name: str, choices: list[str]) -> str:
    """`algo/mmal` is no file of that group, nor `algo/peer/mmal` one of a folder in it."""
    group, _, choice = name.rpartition("/")
    if old := renamed_choice(group, choice):
        return old
    if not group.startswith("hydra/"):
        group, _, choice = name.partition("/")
        folders = (CONF / group).glob("*/*.yaml")
        choices = [*choices, *sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in folders)]
    there_are = f"; there are {', '.join(choices)}" if choices else ""
    near = _of_a_library(choice) if group == "data" else ""
    return f"{group}={choice}: there is no such choice{near or nearest(choice, choices) or there_are}"


def _of_a_library(name: str) -> str:
    """How a data set that a library has, under this name in other letters, is asked for; an empty string where none has it."""
    from metarun.data.library_catalog import RELEASES

    plain = re.sub(r"[\W_]", "", name).lower()
    found = [
        f"data={library} data.dataset={one}"
        for library, sets in RELEASES.items()
        for one in sets
        if one.lower() == plain
    ]
    return f"; {' or '.join(found)} is that of a library" if found else ""


def _of_other_choices(key: str) -> str:
    """Where other choices than the config's have a key, which they are; for a word alone the keys that end so."""
    from metarun.config.reference import Reference

    reference = Reference([CONF])
    if "." not in key:
        return nearest(key, reference.words)
    found = [f"{choice.group}={choice.name}" for choice, _ in reference.explained(key)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; it is a key of {', '.join(found[:3])}{more} (metarun help {key})" if found else ""


def _unknown_key(key: str, parent: Any) -> str:
    """A key that the config does not have, wherever it was written; `parent` is the node that lacks it."""
    if key in ("experiment", "preset"):  # the file's keys went below its group
        return f"{key}: there is no such key; the file must begin with the line '# @package _global_'"
    if old := renamed_key(key):
        return old
    if key.startswith("usual.schedule."):  # as it is seen from `train.schedule`, where no schedule was chosen
        typed = key.replace("usual", "train", 1)
        hint = _of_other_choices(typed) or "; choose a schedule that has it: schedule=cosine, say"
        return f"{typed}: there is no such key{hint}"
    above, _, tail = key.rpartition(".")
    beside = [name for name in map(str, parent) if name != "hydra" and not name.startswith("_")]
    known = [name for name in schema.flat(OmegaConf.to_container(parent._get_root())) if not name.startswith("hydra.")]
    nodes = {name.rpartition(".")[0] for name in known} - {""}
    near = (nearest(tail, beside, above) if above else "") or nearest(
        tail, {*(() if above else beside), *known, *nodes, *_groups()} - {key}
    )
    if not near:
        near = (f"; {above} has {', '.join(beside)}" if above and beside else "") + _of_other_choices(key)
    if above == "encoder" and "_target_" not in parent:
        near = "; no encoder is chosen: add encoder=efficientnet_lite0, say"
    if above in OF_CHECKPOINTS and any(word.startswith("checkpoint=") for word in sys.argv):
        what, example = OF_CHECKPOINTS[above]
        near = f"; to override a setting of the checkpoint's {what}, name the {what} too ({example}, say)"
    return f"{key}: there is no such key{near}"
