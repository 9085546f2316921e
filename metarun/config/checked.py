"""Constructors that check their own settings, so that Python code meets the same ranges as the command line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from metarun.config.hints import evaluated
from metarun.config.ranges import check_range


class Checked:
    """A class whose keyword-only settings are checked against the ranges and choices in its constructor's signature.

    Every subclass that has a constructor of its own gets the check; it raises `UserError`. Types are left to the caller.
    """

    configured_by: ClassVar[str] = ""  # the key of the config that builds it, for messages

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _checking(cls.__init__)  # type: ignore[method-assign]


def _checking(constructor: Callable[..., None]) -> Callable[..., None]:
    @functools.cache
    def hints() -> dict[str, Any]:
        settings = {
            one.name for one in inspect.signature(constructor).parameters.values() if one.kind is one.KEYWORD_ONLY
        }
        return {name: hint for name, hint in evaluated(constructor).items() if name in settings}

    @functools.wraps(constructor)
    def checked(self: Checked, *given: Any, **settings: Any) -> None:
        for name, value in settings.items():
            if name in hints():
                check_range(f"{self.configured_by}.{name}", value, hints()[name])
        constructor(self, *given, **settings)

    return checked
