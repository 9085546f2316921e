"""The YAML files of a folder of configs, which may be the user's own: what is wrong with one is told in a line that names it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource

from metarun.errors import UserError, first_line
from metarun.files import values_in
from metarun.text import printable, shown_path

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def has_alias(text: str) -> bool:
    """Whether a YAML text has an alias (*). What metarun stores has none, and a few lines of them stand for billions of values.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    return "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, LOADER))


def below(folder: Path) -> list[Path]:
    """The YAML files below a folder in order; what is no file, a pipe say, is none that Hydra would take."""
    return sorted(path for path in folder.rglob("*.yaml") if path.is_file())


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: It cannot be read, or is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise UserError(f"{shown_path(path)}: is no text in UTF-8; save it in that encoding") from error


def values_of(path: Path) -> dict[Any, Any]:
    """The mapping that a file holds; an empty one of an empty file.

    Raises:
        UserError: It cannot be read, or holds no mapping of keys to values.
    """
    text, shown = text_of(path), shown_path(path)
    try:
        found = yaml.safe_load(text)
        if _contains_itself(found):
            raise UserError(f"{shown}: has an alias (*) inside of what it stands for; write the values out")
        if _has_null_key(found):
            raise UserError(f"{shown}: has null for a key; write a name, in quotes if it is to be 'null'")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{shown}{line}: {error.problem}") from error
    except RecursionError as error:
        raise UserError(f"{shown}: has brackets inside of brackets deeper than can be read") from error
    except (ValueError, yaml.YAMLError) as error:
        digits = "integer string conversion" in str(error)
        why = "a number has more digits than any setting takes" if digits else printable(first_line(error))
        raise UserError(f"{shown}: {why}") from error
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{shown}: is no mapping of keys to values (key: value)")
    if isinstance(found, dict) and not isinstance(found.get("defaults", []), list):
        raise UserError(f"{shown}: its defaults are no list")
    return found or {}


def _contains_itself(value: Any, above: tuple[int, ...] = ()) -> bool:
    return id(value) in above or any(_contains_itself(item, (*above, id(value))) for item in values_in(value))


def _has_null_key(value: Any) -> bool:
    return (isinstance(value, dict) and None in value) or any(map(_has_null_key, values_in(value)))


def _without_loops(tree: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's function that follows the defaults of a file, for files that do not lead back to themselves alone."""

    @functools.wraps(tree)
    def follow(repo: Any, root: Any, *arguments: Any, **options: Any) -> Any:
        above = root.parent
        while above is not None and not above.node.is_virtual():
            if root.node.get_name() is not None and above.node.get_config_path() == root.node.get_config_path():
                raise UserError(
                    f"{root.node.get_config_path()}: its defaults lead back to itself; what builds on a file needs a name of its own"
                )
            above = above.parent
        return tree(repo, root, *arguments, **options)

    return follow


def install() -> None:
    """Makes Hydra name the file that it cannot read or whose defaults never end, and find the first line behind a mark of UTF-8."""
    load, header = ConfigRepository.load_config, ConfigSource._get_header_dict
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        try:
            found = load(self, config_path)
            if found is not None and None in list(found.config or ()):  # which Hydra meets later, and says nothing of
                raise KeyError(None)
            return found
        except (ValueError, KeyError, OSError, RecursionError, yaml.YAMLError) as error:
            source = self._find_object_source(config_path, ObjectType.CONFIG)
            if source is not None and (path := Path(source.path, source._normalize_file_name(config_path))).is_file():
                values_of(path)  # which says what is wrong
                if isinstance(error, ValueError):  # of the defaults or the first line, in Hydra's words
                    raise UserError(f"{shown_path(path)}: {first_line(error)}") from error
            raise

    ConfigRepository.load_config = load_config  # type: ignore[method-assign]
    defaults_list._create_defaults_tree_impl = _without_loops(defaults_list._create_defaults_tree_impl)
    unmarked = staticmethod(lambda text: header(text.removeprefix("\ufeff")))
    ConfigSource._get_header_dict = unmarked  # type: ignore[method-assign, assignment]
