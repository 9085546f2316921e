"""What every key and every choice means: the schema, the YAML files and the signatures that they name, read together.

`metarun help` and `conf/README.md` are made from it. It reads text alone; nothing is imported that a `_target_` names.
"""

from __future__ import annotations

import contextlib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen, Unit

from metarun.config.folder import CONF
from metarun.config.hints import fields_of
from metarun.config.ranges import check_value, count_mark, limits, options, parts, shown, type_name
from metarun.config.ranges import choices as literals
from metarun.config.schema import Config
from metarun.config.signature import ABSENT, UNKNOWN, Signature, read
from metarun.config.types import Doc, Example, PathLike
from metarun.config.validation import given_to, settings
from metarun.config.yaml_files import below, text_of, values_of
from metarun.errors import UserError

# The groups that are no key of the schema.
GROUPS = {
    "optimizer": "The optimiser of the outer loop.",
    "schedule": "The course of the outer learning rate.",
    "preset": "Settings for one method on one data set. The preset METHOD_DATA, if there is one, applies by itself; "
    "preset=paper takes the paper's own settings, preset=NAME another preset, and ~preset none.",
    "approach": "A recipe, a method and a way of transfer under one name, so that approaches can be compared.",
    "debug": "Settings with which a whole command runs in seconds, to see that it works.",
    "experiment": "A whole command under one name: everything that reproduces a row of results.",
    "hydra/launcher": "What runs the jobs of a sweep (-m).",
    "hydra/sweeper": "What chooses the jobs of a sweep (-m).",
}

# What an example of a section's keys needs beside it: a recipe that reads them.
OF_A_RECIPE = {
    "target": "recipe=transfer target=pneumoniamnist",
    "continual": "recipe=continual algo=oml data=omniglot",
    "pretrain": "recipe=pretrain_meta",
}


@dataclass(frozen=True)
class Entry:
    """A key and what is known of it.

    Args:
        key: The dotted key.
        meaning: A sentence.
        hint: Its type with its marks; text where a type is known to its module alone.
        default: Its value where nothing sets it; `ABSENT` where it must be given.
    """

    key: str
    meaning: str
    hint: Any
    default: Any

    @property
    def type(self) -> str:
        """The type in words: `int`, `float or null`."""
        return self.hint if isinstance(self.hint, str) else type_name(self.hint)

    @property
    def range(self) -> str:
        """The range or the choices in words; empty without any."""
        return "" if isinstance(self.hint, str) else "; ".join(limits(self.hint))

    @property
    def unit(self) -> str:
        """The unit; empty without one."""
        return next((mark.unit for mark in _marks(self.hint) if isinstance(mark, Unit)), "")

    @property
    def example(self) -> str:
        """A value that it may have, as the command line writes it."""
        if told := _told_example(self.hint).value:
            return told
        value = _example(self.hint, None if self.default is UNKNOWN else self.default)
        return (
            shown(value)
            if not isinstance(value, dict)
            else "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
        )

    @property
    def beside(self) -> str:
        """The words that an example needs beside the key, with a space behind them; empty where it needs none."""
        words = _told_example(self.hint).beside.format(section=self.key.rpartition(".")[0])
        words = words or OF_A_RECIPE.get(self.key.partition(".")[0], "")
        return f"{words} " if words else ""

    @property
    def default_text(self) -> str:
        """The default in a few words, of one that is no literal that the class has it."""
        if self.default is ABSENT:
            return "must be given"
        return "that of the class" if self.default is UNKNOWN else shown(self.default)

    @property
    def about(self) -> str:
        """Type, range, unit and default in a few words."""
        default = self.default_text if self.default is ABSENT else f"default {self.default_text}"
        kind = self.range if self.range.startswith("one of") else ", ".join(filter(None, [self.type, self.range]))
        nullable = " or null" if kind == self.range and type(None) in options(parts(self.hint)[0]) else ""
        return ", ".join(filter(None, [kind + nullable, f"in {self.unit}" if self.unit else "", default]))


@dataclass(frozen=True)
class Choice:
    """A YAML file of a group.

    Args:
        group: The folder of `conf`: `algo`, `hydra/launcher`.
        name: The file below it, without `.yaml`.
        path: Where it is.
    """

    group: str
    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """The text of the file."""
        return text_of(self.path)

    @cached_property
    def values(self) -> dict[str, Any]:
        """What it sets, below the key of its group where it has no other package."""
        values = values_of(self.path)
        values = {key: value for key, value in values.items() if key != "defaults"}
        header = re.search(r"^#\s*@package\s+(\S+)", self.text, re.M)
        package = header[1] if header else self.group.replace("/", ".")
        for part in reversed([] if package == "_global_" or not values else package.split(".")):
            values = {part: values}
        return values

    @cached_property
    def _comments(self) -> list[str]:
        lines = [line for line in self.text.splitlines() if not re.match(r"#\s*@package", line)]
        found = []
        for line in lines:
            if not line.startswith("#"):
                break
            found.append(line.lstrip("# ").rstrip())
        return found

    @property
    def meaning(self) -> str:
        """What it is, from the first comment, which may end in a command."""
        about, command, rest = self._comments[0].rpartition("metarun") if self._comments else ("", "", "")
        return (about if command else rest).rstrip(" ;:.")

    @property
    def command(self) -> str:
        """A command that runs it, from the first comment; one that chooses it, where that has none."""
        _, command, rest = self._comments[0].rpartition("metarun") if self._comments else ("", "", "")
        sweeps = "-m " if self.group.startswith("hydra/") else ""
        added = "" if (CONF / self.group).is_dir() else "+"  # a group of one's own, of which the config has no choice
        return command + rest if command else f"metarun {sweeps}{added}{self.group}={self.name}"

    @property
    def notes(self) -> str:
        """The other comments at its top."""
        return " ".join(self._comments[1:])

    @property
    def brings(self) -> list[str]:
        """The choices that come with it: of other groups, and those of its own that it builds on."""
        found = []
        for item in values_of(self.path).get("defaults", []):
            if isinstance(item, dict):
                for key, value in item.items():
                    group, _, place = key.removeprefix("override ").lstrip("/").partition("@")
                    found.append(f"{place + ': ' if place and place != group else ''}{group}={value}")
            elif item != "_self_":
                word = str(item)
                group, _, name = word[1:].partition("/") if word.startswith("/") else (self.group, "", word)
                found.append(f"{group}={name}")
        return found

    @cached_property
    def nodes(self) -> list[tuple[str, dict[str, Any], Signature | None]]:
        """The nodes that name a class: their dotted key, what the file sets, and the signature of the class."""
        return [(key, node, read(node["_target_"])) for key, node in _nodes(self.values)]

    def entries(self) -> Iterator[Entry]:
        """The settings of the classes that it names, with the values that they have in this choice."""
        for key, node, signature in self.nodes:
            known = {one.name: one for one in signature.settings} if signature else {}
            for name, one in known.items():
                value = node.get(name, one.default)
                if isinstance(value, dict) and "_target_" in value:
                    continue  # a node of its own
                assert signature is not None
                yield Entry(f"{key}.{name}", signature.meanings.get(name, ""), one.hint, value)
            for name, value in node.items():
                if name in known or name.startswith("_") or isinstance(value, dict):
                    continue
                own = f"{key}.{name}"
                if shared := shared_keys().get(own):
                    yield Entry(own, shared.meaning, shared.hint, ABSENT if value == "???" else value)
                else:  # of another library's class, whose settings the file itself explains
                    yield Entry(own, self._comment(name), type(value).__name__, value)

    def _comment(self, name: str) -> str:
        found = re.search(rf"^\s*{re.escape(name)}:[^#\n]*#\s*(.*)$", self.text, re.M)
        return f"{found[1][0].upper()}{found[1][1:]}." if found else ""

    @property
    def sets(self) -> dict[str, Any]:
        """The other keys that it sets, with their values."""
        own = [f"{key}." for key, _, _ in self.nodes]
        return {key: value for key, value in _leaves(self.values) if not key.startswith(tuple(own) or ("\n",))}


@dataclass(frozen=True)
class Reference:
    """All groups, choices and keys of one or more folders of configs.

    Args:
        folders: The folders; the first that has a choice counts, as it does for Hydra.
    """

    folders: Sequence[Path]

    @cached_property
    def groups(self) -> dict[str, dict[str, Choice]]:
        """The choices of each group by name."""
        found: dict[str, dict[str, Choice]] = {}
        for folder in self.folders:
            for path in below(folder):
                group, *rest = path.relative_to(folder).with_suffix("").parts
                if group == "hydra" and len(rest) > 1:
                    group, rest = f"hydra/{rest[0]}", rest[1:]
                if rest and group != "hydra":
                    choice = Choice(group, "/".join(rest), path)
                    found.setdefault(group, {}).setdefault(choice.name, choice)
        return dict(sorted(found.items(), key=lambda item: item[0].startswith("hydra/")))

    @cached_property
    def keys(self) -> dict[str, Entry]:
        """The keys of the schema, but for those of the nodes that name a class."""
        found = {}
        defaults = dict(_defaults(Config()))
        for key, hint in settings(Config):
            meaning = next((mark.documentation for mark in _marks(hint) if isinstance(mark, Doc)), "")
            given = given_to(hint)
            found[key] = Entry(key, meaning, "a class and its settings" if given else hint, defaults[key])
            found |= {own: entry for own, entry in shared_keys().items() if own.rpartition(".")[0] == key}
        return found

    def meaning(self, group: str) -> str:
        """What a group chooses, in a sentence."""
        if group in GROUPS:
            return GROUPS[group]
        if group in self.keys:
            return re.sub(r"; `\w+=` chooses [^.]+", "", self.keys[group].meaning)
        return section(group)

    def group_of(self, key: str) -> tuple[str, str] | None:
        """The group whose choices configure the node `key`, and the key of the node in them: of `target.data` data."""
        for group, choices in self.groups.items():
            places = {place for choice in choices.values() for place, _, _ in choice.nodes[:1]}
            for place in places:
                if key == place or key.endswith(f".{place}"):
                    return group, place
        return None

    def explained(self, key: str) -> list[tuple[Choice, Entry]]:
        """Each choice that gives the key a meaning, with that meaning: `algo.inner_lr` has one for each method."""
        found = []
        for node, hint in settings(Config):
            if not (key.startswith(f"{node}.") and given_to(hint)) or not (home := self.group_of(node)):
                continue
            group, place = home
            wanted = place + key[len(node) :]
            for choice in self.groups[group].values():
                for entry in choice.entries():
                    if entry.key == wanted:
                        found.append((choice, Entry(key, entry.meaning, entry.hint, entry.default)))
        if not found:
            for group in ("hydra/launcher", "hydra/sweeper"):
                for choice in self.groups.get(group, {}).values():
                    found += [(choice, entry) for entry in choice.entries() if entry.key == key]
        return found

    @cached_property
    def words(self) -> set[str]:
        """Everything that can be asked for."""
        known = {*self.groups, *self.keys, *sections()}
        for group, choices in self.groups.items():
            known |= {f"{group}={name}" for name in choices}
            known |= {entry.key for choice in choices.values() for entry in choice.entries()}
        return known


@cache
def shared_keys() -> dict[str, Entry]:
    """The keys of nodes that name a class which are not the class's own, such as `encoder.dtype`."""
    found = {}
    for node, hint in settings(Config):
        given = given_to(hint)
        chosen = _told_example(hint)  # what chooses the class has to stand beside each of its keys
        for name, own in given.beside.items() if given and not given.many else ():
            meaning = next((mark.documentation for mark in _marks(own) if isinstance(mark, Doc)), "")
            key, marked = f"{node}.{name}", Annotated[own, chosen]
            found[key] = Entry(key, meaning, marked, given.defaults.get(name) if given else None)
    return found


def sections() -> list[str]:
    """The keys of the schema that hold others: `train`, `train.task`."""
    keys = [key for key, _ in settings(Config)]
    return sorted(
        {key.rpartition(".")[0] for key in keys if "." in key} | {key.partition(".")[0] for key in keys if "." in key}
    )


def section(key: str) -> str:
    """What the schema says of a key that holds others; empty where it is no such key."""
    schema: Any = Config
    for name in key.split("."):
        hints = fields_of(schema)
        if not is_dataclass(schema) or not is_dataclass(hints.get(name)):
            return ""
        schema = hints[name]
    return re.sub(r"\s+", " ", schema.__doc__ or "").strip()


def _defaults(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _defaults(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", ABSENT if value == "???" else value


def _marks(hint: Any) -> Iterable[Any]:
    if isinstance(hint, str):
        return []
    base, found = parts(hint)
    inner = [mark for part in options(base) if part is not base for mark in _marks(part)]
    return [*found, *inner]


def _nodes(values: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(values, dict):
        if isinstance(values.get("_target_"), str):
            yield key, values
        for name, value in values.items():
            yield from _nodes(value, f"{key}.{name}".lstrip("."))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _told_example(hint: Any) -> Example:
    """The mark that says what an example has to be like; an empty one where the usual example will do."""
    return next((mark for mark in _marks(hint) if isinstance(mark, Example)), Example())


def _example(hint: Any, default: Any = None) -> Any:
    """A value that the hint allows, another than the default where there is one."""
    if isinstance(hint, str):
        return "NAME" if default in (ABSENT, None) else default
    base, found = parts(hint)
    if allowed := literals(hint):
        return next((value for value in allowed if value != default), allowed[0])
    members = [part for part in options(base) if part is not type(None)]
    if members != [base]:
        return _example(Annotated[members[0], *found] if found else members[0], default)
    if any(isinstance(mark, PathLike) for mark in found):
        return "/path/to/it"
    if count := count_mark(found):
        return [max(count.least, 1), 10]
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin in (dict, Mapping):
        return {_example(arguments[0]): 1}
    if isinstance(default, list) and default:
        return default
    if origin is not None and arguments:
        least = max([1, *(mark.min_length for mark in found if isinstance(mark, MinLen))])
        return [_example(arguments[0])] * least
    if base is bool:
        return not default
    if base in (str, Any):
        return default if isinstance(default, str) else "NAME"
    for value in (*(_near(base, default)), 1, 0.5, 10, 2):
        with contextlib.suppress(UserError):
            return check_value("", value, hint)
    return default


def _near(base: type, default: Any) -> list[Any]:
    """Numbers in the neighbourhood of a default."""
    if isinstance(default, bool) or not isinstance(default, int | float):
        return []
    return [2 * default or 1, default] if base is int else [default / 2 or 0.1, default]
