"""The exceptions that a user is meant to read, each as one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2, no traceback."""


class JobRefused(UserError):
    """A job of a sweep that cannot be run as it is.

    Args:
        label: The overrides in which it differs from the others; empty for the only one.
        error: What is wrong with it.
    """

    def __init__(self, label: str, error: Exception) -> None:
        super().__init__(str(error))
        self.label, self.error = label, error

    def told(self, one_line: Callable[[BaseException], str]) -> str:
        """What is wrong, and with which job where the message does not name it."""
        line = one_line(self.error)
        return line if not self.label or self.label in line else f"{line} (in the job {self.label})"


class JobsFailed(UserError):
    """Some jobs of a sweep did not succeed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for the known words closest to `word`, or an empty string."""
    known = sorted(set(known))
    found = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if not found:
        tail = word.rsplit(".", 1)[-1]
        found = [name for name in known if name.rsplit(".", 1)[-1] == tail][:3]
    return f"; did you mean {', '.join(found)}?" if found else ""


def reason(error: BaseException) -> str:
    """The first line of what caused `error`, or of `error` itself."""
    return str(error.__cause__ or error).splitlines()[0]


class Incomplete(BaseException):
    """All was done that could be, but a part of the input is bad: printed as one line, exit status 1.

    No error, so that Hydra, which would print lines of its own, lets it pass.
    """

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


class Pruned(BaseException):
    """A search ended this trial after a validation, since other settings promise more; its checkpoint was saved.

    No error, so nothing that catches errors may stop it on its way.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"pruned at step {step}")
        self.step = step
