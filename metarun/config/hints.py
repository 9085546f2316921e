"""Type hints with their marks, each evaluated once in a process: Python compiles the text of a hint anew every time."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any


@functools.cache
def fields_of(schema: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(schema, include_extras=True)


@functools.cache
def hints_of(cls: Any) -> Mapping[str, Any]:
    """The types of a constructor's parameters.

    Args:
        cls: A class, or a function that builds an object.
    """
    constructor = cls.__init__ if isinstance(cls, type) else cls  # type: ignore[misc]
    return typing.get_type_hints(inspect.unwrap(constructor), include_extras=True)
