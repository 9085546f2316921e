"""Type hints with their marks, each evaluated once in a process: Python compiles the text of a hint anew every time."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


@functools.cache
def fields_of(schema: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(schema, include_extras=True)


@functools.cache
def hints_of(cls: Any) -> Mapping[str, Any]:
    """The types of a constructor's parameters, and of those of the base classes that it may hand `**settings` on to.

    Args:
        cls: A class, or a function that builds an object.
    """
    if not isinstance(cls, type):
        return evaluated(inspect.unwrap(cls))
    found: dict[str, Any] = {}
    for one in cls.__mro__:
        if "__init__" in vars(one):
            constructor = inspect.unwrap(vars(one)["__init__"])
            found = {**evaluated(constructor), **found}
            if not getattr(getattr(constructor, "__code__", None), "co_flags", 0) & inspect.CO_VARKEYWORDS:
                break
    return found


def evaluated(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters; `Any` for one whose text cannot be evaluated.

    A module may import the names of its hints for type checkers alone. Those of `typing` and `collections.abc`, which are most of
    them, are known here all the same.

    Args:
        function: The function.
    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # whatever the text of a hint raises
        known = {**vars(typing), **vars(collections.abc), **getattr(function, "__globals__", {})}
    found: dict[str, Any] = {}
    for name, hint in inspect.get_annotations(function).items():
        alone = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found |= typing.get_type_hints(alone, known, include_extras=True)
        except Exception:
            found[name] = Any
    return found
