"""The exceptions that a user is meant to read, each as one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2, no traceback."""


class InputError(UserError, ValueError):
    """What was given from Python is no input; a `ValueError` too, as callers of scikit-learn's estimators expect."""


class Diverged(UserError):
    """Numbers are not finite any more, as they will be wherever the same words are carried out."""


class MadeOtherwise(UserError):
    """A run's folder was made with another config, other data or other weights, as it still will be when the command comes again."""


class JobRefused(UserError):
    """A job of a sweep that cannot be run as it is.

    Args:
        label: The overrides in which it differs from the others; empty for the only one.
        error: What is wrong with it.
    """

    def __init__(self, label: str, error: Exception) -> None:
        super().__init__(str(error))
        self.label, self.error = label, error

    def message(self, one_line: Callable[[BaseException], str]) -> str:
        """What is wrong, and with which job where the message does not name it."""
        line = one_line(self.error)
        return line if not self.label or self.label in line else f"{line} (in the job {self.label})"


class JobsFailed(UserError):
    """Some jobs of a sweep did not succeed."""


# Words of other programs, and what they are called here: keys, or names that a key or a group takes.
ELSEWHERE = {
    "algorithm": ("algo",),
    "batch": ("train.tasks_per_step", "tasks_per_step"),
    "batch_size": ("train.tasks_per_step", "tasks_per_step"),
    "ckpt": ("checkpoint",),
    "classes_per_task": ("task.ways", "ways"),
    "data_dir": ("data.root", "root"),
    "data_path": ("data.root", "root"),
    "data_root": ("data.root", "root"),
    "dataset": ("data",),
    "epochs": ("train.steps", "steps"),
    "few_shot": ("task.shots", "shots"),
    "gpu": ("cuda", "hardware.device", "device"),
    "iterations": ("train.steps", "steps"),
    "k_query": ("task.queries", "queries"),
    "k_shot": ("task.shots", "shots"),
    "kshot": ("task.shots", "shots"),
    "learner": ("algo",),
    "learning_rate": ("train.optimizer.lr", "lr"),
    "log_dir": ("outputs",),
    "lr": ("inner_lr", "train.optimizer.lr"),
    "max_epochs": ("train.steps", "steps"),
    "meta_batch_size": ("train.tasks_per_step", "tasks_per_step"),
    "method": ("algo",),
    "model": ("backbone", "algo"),
    "n_epochs": ("train.steps", "steps"),
    "n_query": ("task.queries", "queries"),
    "n_shot": ("task.shots", "shots"),
    "n_shots": ("task.shots", "shots"),
    "n_way": ("task.ways", "ways"),
    "n_ways": ("task.ways", "ways"),
    "net": ("backbone",),
    "network": ("backbone",),
    "num_epochs": ("train.steps", "steps"),
    "num_iterations": ("train.steps", "steps"),
    "num_shots": ("task.shots", "shots"),
    "num_ways": ("task.ways", "ways"),
    "num_workers": ("hardware.processes", "processes"),
    "nway": ("task.ways", "ways"),
    "optim": ("optimizer",),
    "output": ("outputs",),
    "output_dir": ("outputs",),
    "path": ("root",),
    "precision": ("hardware.autocast", "autocast"),
    "resume_from": ("checkpoint",),
    "save_dir": ("outputs",),
    "scheduler": ("schedule",),
    "sweep": ("hydra/sweeper",),
    "time": ("minutes", "max_seconds", "train.max_seconds"),
    "weights": ("weights", "checkpoint"),
    "workers": ("hardware.processes", "processes"),
}


def nearest(word: str, known: Iterable[str], above: str = "") -> str:
    """`; did you mean a, b?` for the known words closest to `word`, or an empty string.

    Closest are what other programs call so, then the same in capitals or further down (`train.steps` to `steps`, `task.ways` to
    `way`), then a misspelling.

    Args:
        word: The wrong word.
        known: The right ones.
        above: The key that they lie below, which is told with them, so that what is proposed can be typed.
    """
    known = sorted(set(known))
    small = {name.lower(): name for name in known}
    tail = word.lower().rsplit(".", 1)[-1].replace("-", "_")
    found = [name for name in ELSEWHERE.get(tail, ()) if name in known][:1]
    found = found or [name for name in (small.get(word.lower()),) if name]
    numbers = {tail, f"{tail}s", tail.removesuffix("s"), f"{tail.removesuffix('y')}ies"}  # one and several
    same = sorted((name for name in known if name.lower().rsplit(".", 1)[-1] in numbers), key=len)
    if "." in word:  # then what stands before the last dot says which one
        same.sort(key=lambda name: difflib.SequenceMatcher(None, word, name).ratio(), reverse=True)
    found = found or same[:3]
    found = found or [small[name] for name in difflib.get_close_matches(word.lower(), small, n=3, cutoff=0.6)]
    if "." not in word:  # a misspelling of the end of a key, with which somebody who types it alone means the whole
        ends = difflib.get_close_matches(tail, {name.rsplit(".", 1)[-1] for name in small} - {*small}, n=1, cutoff=0.75)
        found = found or sorted((small[name] for name in small if name.rsplit(".", 1)[-1] in ends), key=len)[:3]
    whole = [f"{above}.{name}" if above else name for name in found]
    return f"; did you mean {', '.join(whole)}?" if found else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def not_imported(library: str, error: ImportError) -> str:
    """What is wrong where a library cannot be imported: it, or what it imports, is not installed, or it is broken.

    Args:
        library: The module's name.
        error: What Python says.
    """
    if isinstance(error, ModuleNotFoundError):
        return f"{(error.name or library).partition('.')[0]} is not installed"
    return f"{library} cannot be imported ({first_line(error)})"


def lacks(error: Exception) -> str:
    """What is wrong with values that were not what metarun writes, by the error that they led to."""
    return f"it has no {error.args[0]}" if isinstance(error, KeyError) else first_line(error)


def reason(error: BaseException) -> str:
    """The first line of what caused `error`, or of `error` itself."""
    return first_line(error.__cause__ or error)


# How torch and numpy say that there is no room for an array, or that its size is no number of bytes at all.
_NO_MEMORY = (
    "t allocate memory",
    "not enough memory",
    "out of memory",
    "unable to allocate",
    "size calculation overflowed",
    "multiplication overflow",
)
_AMOUNT = re.compile(r"(?i)allocate (\d+(?:\.\d+)?) ?(bytes|[KMGTPE]i?B)")


def no_memory(error: BaseException) -> str | None:
    """What an error means, in words, where memory could not be allocated; None for an error of another kind."""
    text = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and any(words in text.lower() for words in _NO_MEMORY)
    ):
        return None
    amount = _AMOUNT.search(text)
    if amount is None:
        return "there is not enough memory"
    size = f"{float(amount[1]) / 2**30:,.1f} GiB" if amount[2] == "bytes" else f"{float(amount[1]):,.1f} {amount[2]}"
    return f"there is not enough memory (an array of {size})"


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
