"""Overrides: how a word of the command line is read, and how it is written again.

Hydra reads the value of `key=value` by a grammar of its own, in which `~`, `=`, accents and brackets mean something or are
errors, and `1e3` is a number. That suits numbers, lists and sweeps. A key whose type is text or a path takes its value as
it was typed instead: the type, which stands in the schema or in the signature of the class that `_target_` names, decides.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from metarun.config import signature as signatures
from metarun.config.folder import CONF
from metarun.config.hints import fields_of, hints_of
from metarun.config.ranges import parts
from metarun.config.schema import Config
from metarun.config.shorthand import folded
from metarun.config.types import Given, PathLike
from metarun.config.values import flat
from metarun.errors import UserError

PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+-]*")  # what Hydra reads as the text that it is
OF_HYDRA = {"hydra.launcher", "hydra.sweeper"}  # the parts of Hydra's own config whose keys a class has, too
WHOLE = {"approach", "experiment", "debug"}  # the groups of whole commands
UNESCAPED = re.compile(r"[\w./+%@~-]*", re.ASCII)  # what Hydra writes without a backslash, and can read without quotes
NO_TEXT = re.compile(r"null|true|false|nan|inf", re.IGNORECASE)  # but for these
# Functions of Hydra's grammar.
FUNCTION = re.compile(r"(range|interval|tag|glob|sort|shuffle|int|float|str|bool)\(.*\)", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """How the values of a key are read.

    Attributes:
        text: The value is text, taken literally.
        path: The text is a path: `~` is expanded, and it is made absolute.
        name: The text may also be a name or an address, which stays as it is; a path is then what looks like one or is there.
        optional: `null` is no text but the absence of a value.
        many: The value is, or may be, a list of such values.
    """

    text: bool = False
    path: bool = False
    name: bool = False
    optional: bool = False
    many: bool = False


def reading(hint: Any) -> Reading:
    """How values of a type hint are read.

    Args:
        hint: Of a parameter or of a field of the schema. A field that omegaconf knows no type for is `Annotated[Any, T]`,
            and is read as the type `T`.

    Returns:
        The reading: of `str` as text, of `pathlib.Path` and `FilePath` as a path, of `NameOrPath` as a name or a path,
        of lists of these as lists, and of all else, also where text is one of several types, by Hydra's grammar.
    """
    leaves, many = set[Any](), False

    def visit(part: Any) -> None:
        nonlocal many
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if origin is Annotated:
            base, marks = parts(part)
            path = next((one for one in marks if isinstance(one, PathLike)), None)
            for part_of in [Path, str] if path and path.or_name else [Path] if path else [base]:
                visit(part_of)
        elif origin in (typing.Union, types.UnionType):
            for argument in arguments:
                visit(argument)
        elif isinstance(origin, type) and issubclass(origin, Sequence) and origin is not tuple:
            many = True
            for argument in arguments:
                visit(argument)
        else:
            leaves.add(part)

    visit(hint)
    optional = bool(leaves & {None, type(None)})
    leaves -= {None, type(None)}
    path = Path in leaves
    if leaves and leaves <= {str, Path}:
        return Reading(text=True, path=path, name=path and str in leaves, optional=optional, many=many)
    return Reading(many=many)


def hint_of(key: str, node: Callable[[str], Any], schema: type = Config) -> Any:
    """The type hint of a key.

    Args:
        key: Dotted.
        node: Yields the node of a composed config at a dotted key. It is called for keys directly below a free node of the
            schema, or below `OF_HYDRA`, alone, where the node's `_target_` names the class whose signature holds.
        schema: The dataclass of the whole config.

    Returns:
        The hint with its marks; `Any` where the key or the class is not known.
    """
    above, _, last = key.rpartition(".")
    hint = _above(key, schema)
    if is_dataclass(hint):
        return fields_of(typing.cast(type, hint)).get(last, Any)
    base, marks = parts(hint)
    if typing.get_origin(base) is not dict and above not in OF_HYDRA:
        return Any
    for mark in marks:
        if isinstance(mark, Given) and last in mark.beside and (mark.many or not is_free(above, schema)):
            return mark.beside[last]
    found = node(above)
    target = found.get("_target_") if isinstance(found, DictConfig) else None
    return _hint_in_signature(target, last) if isinstance(target, str) else Any


def _hint_in_signature(target: str, name: str) -> Any:
    """The hint of a parameter of the class `target`, which is imported only where its source alone does not tell."""
    signature = signatures.read(target)
    if signature is not None:
        hint = next((one.hint for one in signature.parameters if one.name == name), Any)
        if not isinstance(hint, str):
            return hint
    try:
        return hints_of(get_class(target)).get(name, Any)
    except Exception:  # of a class that cannot be imported `check` tells why
        return Any


def is_free(key: str, schema: type = Config) -> bool:
    """Whether a key lies below a free node of the schema, a mapping whose keys its `_target_` decides on."""
    return typing.get_origin(parts(_above(key, schema))[0]) is dict


def _above(key: str, schema: type) -> Any:
    """The hint of the node that a key lies in; of a node inside a free one that of the free one."""
    hint: Any = schema
    for name in key.split(".")[:-1]:
        if is_dataclass(hint):
            hint = fields_of(typing.cast(type, hint)).get(name, Any)
        elif typing.get_origin(parts(hint)[0]) is not dict:
            hint = Any
    return hint


def key_of(word: str) -> str:
    """The key or group that a word overrides, without `+`, `~` and `@package`."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def wholes_of_training(words: Iterable[str]) -> set[str]:
    """The groups of whole commands of which words choose one of metarun's own, all for training; a file of one's own may set anything."""
    chosen = {key_of(word): word.partition("=")[2] for word in words}
    return {group for group in WHOLE & chosen.keys() if (CONF / group / f"{chosen[group]}.yaml").is_file()}


def refuse_unused(words: Iterable[str], unused: Collection[str], why: str, used: Collection[str] = ()) -> None:
    """Refuses words for parts of the config that a recipe does not use, which would be taken without a word and change nothing.

    Args:
        words: Overrides.
        unused: The parts and groups.
        why: What the recipe does instead, for the message.
        used: Parts, groups and keys of these that it uses all the same.

    Raises:
        UserError: A word is for one of them.
    """
    found = [
        word
        for word in words
        if key_of(word).partition(".")[0] in unused
        and not {key_of(word), key_of(word).partition(".")[0]} & set(used)
        and "=" in word
        and not word.endswith("=null")
    ]
    if found:
        raise UserError(f"{', '.join(found)}: this recipe has no use for {'them' if found[1:] else 'it'}; {why}")


def read(word: str, how: Reading, sweep: bool = False) -> str:
    """A word as Hydra has to be given it.

    Reading what was read before changes nothing.

    Args:
        word: `key=value` as typed, or as Hydra was given it.
        how: The reading of its key.
        sweep: Whether commas separate the values of a sweep. A path that is there stays whole even then, and so does a value
            in quotes. Elsewhere a comma belongs to the text, or separates the items of a list where the key takes one.

    Returns:
        The word with text and paths in quotes where Hydra would read them otherwise, and paths absolute.
    """
    key, equals, value = word.partition("=")
    if not equals or word.startswith("~") or not (how.text or how.many) or not value:
        return word
    if sweep:
        if FUNCTION.fullmatch(value):
            return word
        if (choice := re.fullmatch(r"choice\((.*)\)", value, re.DOTALL)) and not _exists(value, how):
            return f"{key}=choice({','.join(_item(item, how) for item in split(choice[1]))})"
        items = [value] if _exists(value, how) else split(value)
        return f"{key}={','.join(_item(item, how) for item in items)}"
    if how.many and len(split(value)) > 1 and not _exists(value, how):
        return f"{key}=[{','.join(_atom(item, how) for item in split(value))}]"
    return f"{key}={_item(value, how)}"


def written(word: str, how: Reading) -> str:
    """The inverse of `read`: a word that Hydra was given, as a person types it, without quotes that it can do without."""
    key, equals, value = word.partition("=")
    if equals and how.text and (text := unquoted(value)) is not None and read(f"{key}={text}", how) == word:
        return f"{key}={text}"
    return word


def _exists(value: str, how: Reading) -> bool:
    return how.path and os.path.lexists(os.path.expanduser(value))


def _item(value: str, how: Reading) -> str:
    """A value of a key, which may be a list."""
    if how.many and value.startswith("[") and value.endswith("]") and not _exists(value, how):
        return f"[{','.join(_atom(item, how) for item in split(value[1:-1]))}]" if value != "[]" else value
    return _atom(value, how)


def _atom(value: str, how: Reading) -> str:
    """One text or path."""
    if not how.text or "${" in value or value == "???" or (how.optional and value == "null"):
        return value
    text = unquoted(value)
    text = located(value if text is None else text, how)
    return text if PLAIN.fullmatch(text) and not NO_TEXT.fullmatch(text) else quoted(text)


def located(text: str, how: Reading) -> str:
    """A path with `~` expanded and made absolute; text that is none, or an address, as it is.

    Raises:
        UserError: An address stands where only a path can.
    """
    if not how.path or not text:
        return text
    if "://" in text and not os.path.lexists(text):
        if how.name:
            return text
        raise UserError(f"{text}: is an address, where a file or a folder of this machine is meant")
    path = os.path.expanduser(text)
    if how.name and path == text and os.sep not in text and not os.path.exists(path):
        return text
    return os.path.abspath(path)


def unquoted(value: str) -> str | None:
    """The text of a value that is in quotes as a whole, as Hydra's grammar has it; None for any other value."""
    if value[:1] not in "'\"" or len(value) < 2 or value[-1] != value[0]:
        return None
    try:
        parsed = OverridesParser.create().parse_rule(f"k={value}", "override")._value
    except HydraException:
        return None
    return parsed.text if isinstance(parsed, QuotedString) else None


def quoted(text: str) -> str:
    """Text in quotes of Hydra's grammar, from which it reads this very text."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def canonical(words: Iterable[str], config: DictConfig) -> list[str]:
    """The words that Hydra made a config of, as a person would type them: with absolute paths, so that they mean the same anywhere."""

    def one(word: str) -> str:
        how = reading(hint_of(key_of(word), lambda path: OmegaConf.select(config, path)))
        return written(read(word, how), how)

    return [one(word) for word in folded(words)]


def make_literal(config: DictConfig, keys: Iterable[str] | None = None) -> None:
    """Changes the values of keys that are text or paths, from whatever file they come, into what `read` makes of typed ones.

    Numbers and truth values become text again, `~` is expanded, and paths become absolute.

    Args:
        config: Composed, changed in place.
        keys: Those to change; None: all. Only for keys below free nodes their classes are imported.
    """

    def one(value: Any, how: Reading) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return str(value).lower() if isinstance(value, bool) else value
        return located(str(value), how)

    for key in list(flat(OmegaConf.to_container(config)) if keys is None else keys):
        how = reading(hint_of(key, lambda path: OmegaConf.select(config, path)))
        if not how.text or OmegaConf.is_missing(config, key):
            continue
        value = OmegaConf.select(config, key)
        changed = [one(item, how) for item in value] if isinstance(value, ListConfig) else one(value, how)
        if changed != value:
            OmegaConf.update(config, key, changed, merge=False)


def split(value: str) -> list[str]:
    """The parts between the commas of a value that stand in no quotes and no brackets, without spaces around them."""
    parts, depth, quote, start, fresh = list[str](), 0, "", 0, True  # fresh: nothing of an item was met yet
    for place, character in enumerate(value):
        if quote:
            backslashes = place - len(value[:place].rstrip("\\"))
            quote = "" if character == quote and backslashes % 2 == 0 else quote
        elif fresh and character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            parts.append(value[start:place].strip())
            start = place + 1
        fresh = character in "[{(, " and (fresh or character != " ")
    return [*parts, value[start:].strip()]


def is_read(word: str) -> bool:
    """Whether Hydra's grammar has a meaning for a word."""
    try:
        OverridesParser.create().parse_rule(word, "override")
    except HydraException:
        return False
    return True


def settled(word: str, sweep: bool) -> bool:
    """Whether Hydra reads a word as its text, so that the type of its key makes no difference to what it is given."""
    value = word.partition("=")[2]
    try:
        parsed = OverridesParser.create().parse_rule(word, "override")
    except HydraException:
        return False
    if "," in value and os.path.lexists(os.path.expanduser(value)):
        return False
    if not isinstance(parsed._value, ChoiceSweep):
        return parsed.is_sweep_override() or _text(parsed._value) == value.replace(", ", ",")
    if not sweep:
        return False
    return not parsed._value.simple_form or ",".join(map(_text, parsed._value.list)) == value.replace(", ", ",")


def _text(value: Any) -> str:
    """What Hydra's grammar made of a value, as text."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, QuotedString):
        return value.with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(key)}:{_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def varies(override: Override) -> bool:
    """Whether an override has several values, or an interval: a fixed word of a sweep may be given as a sweep over one value."""
    value = override._value
    return override.is_sweep_override() and not (isinstance(value, ChoiceSweep) and len(value.list) == 1)


def fixed(word: str) -> str:
    """A word of a sweep as one over a single value, which Hydra applies to the jobs but not to the config that they start from.

    That one has the defaults of the groups that are swept, which need not have the key.
    """
    key, _, value = word.partition("=")
    try:
        sweeps = OverridesParser.create().parse_rule(word, "override").is_sweep_override()
    except HydraException:  # which Hydra reports
        return word
    return word if sweeps or not value or word.startswith("~") else f"{key}=choice({value})"
