"""The words of a command line: Hydra's options, ours, and overrides in Hydra's grammar."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from metarun.config.folder import CONF
from metarun.config.overrides import Reading, fixed, hint_of, is_free, is_read, key_of, read, reading, settled, split
from metarun.config.shorthand import GROUPS, PAPER, bracketed, expanded
from metarun.config.validation import FOLDERS_OF_HYDRA, NO_SEARCHPATH
from metarun.config.yaml_files import below
from metarun.errors import UserError, nearest
from metarun.files import typed_path
from metarun.shell.messages import meant, unknown_choice
from metarun.text import has_control, printable, shown_path

OF_A_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
# Groups of which a run has a choice, whatever it does.
NEEDED = ("algo", "backbone", "data", "optimizer", "recipe", "schedule")


def parsed(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The words of a command line in Hydra's options and ours, and those of them that are Hydra's options and their values.

    Overrides may stand before, between and behind options. Raises `UserError` for words that are none of these.
    """
    words = [word for word in words if word != "--"]  # no override looks like an option
    for word in words:
        if has_control(word):
            raise UserError(f"{printable(word)}: has a control character, or bytes that are no UTF-8")
    arguments = _parser().parse_intermixed_args(words)
    if arguments.config_dir:
        typed, arguments.config_dir = arguments.config_dir, os.path.expanduser(arguments.config_dir)
        words = [expanded_folder(word, typed) for word in words]
        folder = folder_of_configs(typed)
        if not arguments.config_path:
            refuse_hidden(folder)
    if arguments.package is not None and not arguments.cfg:
        raise UserError("--package: shows a part of the config; add --cfg job")
    if arguments.experimental_rerun is not None:
        raise UserError("--experimental-rerun: metarun keeps no such file; a run's own command goes on with it")
    if arguments.shell_completion:
        check_completion(arguments.overrides)
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


def _parser() -> argparse.ArgumentParser:
    """What reads Hydra's options and ours; raises `UserError` for what it cannot read."""
    parser = get_args_parser()
    parser._option_string_actions.pop("--version")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--dry-run", action="store_true")

    def refuse(message: str) -> NoReturn:
        _, known, word = message.partition("unrecognized arguments: --")
        key, equals, value = word.partition(" ")[0].partition("=")
        hint = meant(key.replace("-", "_") + (f" {value}" if equals else "")) if known else ""
        raise UserError(f"{message}{hint or '; metarun --help shows what can be typed'}")

    parser.error = refuse  # type: ignore[method-assign]
    return parser


def overrides_of(words: list[str]) -> list[str]:
    """The words of a command line that are no options and no values of options; raises `UserError` where one lacks its value."""
    return list(_parser().parse_known_intermixed_args(words)[0].overrides)


def refuse_hidden(folder: Path) -> None:
    """Refuses a folder of configs with a file that Hydra would pass over, since metarun has another one of that name.

    Raises:
        UserError: There is one.
    """
    for path in below(folder):
        name = path.relative_to(folder)
        if (CONF / name).is_file() and path.read_bytes() != (CONF / name).read_bytes():
            raise UserError(
                f"{shown_path(path)}: is not read, since metarun has {name.as_posix()} too; give it another name"
            )


def check_completion(words: list[str]) -> None:
    """Checks the words beside `-sc`; raises `UserError`."""
    action, _, shell = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if action not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise UserError("-sc: takes one word, install=bash or uninstall=bash, or of zsh or fish")
    if action == "query" and "COMP_LINE" not in os.environ:
        raise UserError(f"-sc query={shell}: is for the shell to ask; -sc install={shell} has it do so")


def for_hydra(arguments: argparse.Namespace) -> list[str]:
    """The overrides in Hydra's grammar: text and paths in quotes where it would read them otherwise.

    The config is composed for that only if a word needs to know the class that its key is a setting of.

    Raises:
        UserError: A word is no override, or one of another kind of command.
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
        if key_of(word) == "hydra.searchpath":
            raise UserError(NO_SEARCHPATH)
        if key_of(word) == "preset":
            refuse_unknown_preset(word, arguments)
        refuse_ending(word)
    runs = not (sweep or arguments.cfg or arguments.info or arguments.hydra_help or arguments.help)
    if runs and (alone := next((word for word in words if key_of(word).startswith(OF_A_SWEEP)), None)):
        raise UserError(
            f"{alone}: is for the jobs of a sweep, and this is a single run, here; add -m (a sweep may be of one job)"
        )
    composed = functools.cache(lambda: _composed(arguments))

    def one(word: str) -> str:
        key = key_of(word)
        if key.startswith(("hydra.", "hydra/")):
            return of_hydra(word, composed)
        free = is_free(key)
        if not free or not settled(word, sweep) or word.endswith("="):
            hint = hint_of(key, lambda path: OmegaConf.select(composed(), path))
            if hint is Any and not is_read(word) and is_absent(key, composed):
                hint = str  # so that Hydra says that there is no such key, and not that it cannot read the value
            how = reading(hint)
            if how.path and word.endswith(f"{key}="):
                raise UserError(
                    f"{word}: is empty, and must name a file or a folder{' or be null' * how.optional}; is a variable of the shell "
                    "not set?"
                )
            word = read(word, how, sweep)
        return fixed(word) if sweep and free else word

    dry = ["hydra.sweeper.dry_run=true"] if arguments.dry_run else []
    return [*map(one, words), *dry]


def of_hydra(word: str, composed: Callable[[], DictConfig]) -> str:
    """A word for a part of Hydra's own, with the text of a launcher's or a sweeper's setting in quotes where it needs them."""
    key = key_of(word)
    if settled(word, sweep=False) or word.startswith("~"):
        return word
    if key.removeprefix("hydra.") in FOLDERS_OF_HYDRA:
        return read(word, Reading(text=True))  # so that what is told is that it decides on no folder
    return read(word, reading(hint_of(key, lambda path: OmegaConf.select(composed(), path))))


def is_absent(key: str, composed: Callable[[], DictConfig]) -> bool:
    """Whether what `composed` yields has no such key, which is no group either."""
    if key in GROUPS or not re.fullmatch(r"\w+(\.\w+)*", key):
        return False
    above, _, last = key.rpartition(".")
    node = OmegaConf.select(composed(), above) if is_free(key) else None
    return not (isinstance(node, DictConfig) and last in node)


def refuse_ending(word: str) -> None:
    """Refuses a choice with the ending of its file: Hydra takes it, but presets and published values go by the name without it.

    Raises:
        UserError: The word is such a choice.
    """
    group, _, value = word.partition("=")
    if (CONF / group).is_dir() and (found := re.search(r"[\w/-]+(?=\.ya?ml\b)", value)):
        raise UserError(f"{word}: a choice is named without the ending of its file; write {group}={found[0]}")


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
    names = split(value[1:-1] if bracketed(value) else value)
    for name in names if equals and not word.startswith("~") else ():
        if re.fullmatch(r"[\w/.-]+", name) and name not in known | {PAPER, "null"}:
            raise UserError(unknown_choice(f"preset/{name}", [PAPER, *sorted(known)]))


def expanded_folder(word: str, folder: str) -> str:
    """A word that is an option's value `folder`, or ends in it behind `=`, with `~` expanded; any other as it is."""
    option, equals, value = word.partition("=")
    if word == folder:
        return os.path.expanduser(word)
    return f"{option}={os.path.expanduser(value)}" if equals and value == folder and option.startswith("-") else word


def _composed(arguments: argparse.Namespace) -> DictConfig:
    """The config that the choices of groups make, of which a sweep has the first ones; raises Hydra's errors."""
    search_path = create_config_search_path(arguments.config_path or str(CONF))
    if arguments.config_dir:
        added = f"file://{os.path.abspath(arguments.config_dir)}"
        search_path.prepend("command-line", added, anchor=SearchPathQuery(provider="schema"))
    loader = ConfigLoaderImpl(search_path)
    words: list[str] = []
    for word in expanded(arguments.overrides):
        key = word.partition("=")[0]
        if (settled(word, arguments.multirun) and "." not in key.partition("@")[0]) or key.endswith("._target_"):
            words += expanded(_first(word, loader) if arguments.multirun else [word])
    return loader.load_configuration(arguments.config_name or "config", words, RunMode.RUN)


def _first(word: str, loader: ConfigLoaderImpl) -> list[str]:
    """A word of a sweep with the first of its values; nothing where these are no list, or none."""
    (override,) = OverridesParser.create(config_loader=loader).parse_overrides([word])
    if not override.is_sweep_override():
        return [word]
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [f"{override.get_key_element()}={value}" for value in itertools.islice(values, 1)]


def folder_of_configs(typed: str) -> Path:
    """The folder that `--config-dir` names; raises `UserError` where there is none."""
    folder = typed_path(typed)
    if not typed or not folder.is_dir():
        beside = folder.absolute().parent
        near = nearest(folder.name, [path.name for path in beside.iterdir()] if typed and beside.is_dir() else [])
        raise UserError(f"--config-dir {typed}: there is no such folder{near}")
    return folder
