"""How the terminal and the tables write numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metarun.config.task_schema import SIZES
from metarun.runs.result import ERROR, SCORE, TRANSDUCTIVE, half_of, tested

TOO_FEW = "too few"  # for an interval


def half(value: float | None, form: str) -> str:
    """Half an interval as it stands behind its mean, `± 1.20%` say; None is one that there was too little for.

    Args:
        value: Half the interval.
        form: A format of numbers, `.2%` say.
    """
    return f"({TOO_FEW} for an interval)" if value is None else f"± {value:{form}}"


def error_form(value: float) -> str:
    """The format of an error: three decimals, and three digits of a large one, as where tasks diverged."""
    return ".3f" if abs(value) < 1000 else ".3g"


def main_number(result: Mapping[str, Any], brief: bool = False) -> str:
    """The main test number of a run with half of its interval, else its validation score; empty where it has neither.

    Args:
        result: What `result.json` holds.
        brief: For a column of a table, without the word `test` or `target` and without a word where there is no interval.
    """
    key = tested(result)
    if key is None:
        return f"validation {result[SCORE]:.4g}" if SCORE in result else ""
    number, interval = result[key], result.get(half_of(key))
    error = key.endswith(ERROR)
    if brief:
        form = ".3g" if error else ".2%"
        return f"{number:{form}}" + ("" if interval is None else f" {half(interval, form)}")
    form, width = (".4g", ".2g") if error else (".2%", ".2%")
    return f"{key.partition('/')[0]} {number:{form}} {half(interval, width)}"


def count_text(count: int | Sequence[int]) -> str:
    """A number, or the range that each task draws it from: `5–20`."""
    return str(count) if isinstance(count, int) else "–".join(map(str, count))


def more_of_task(task: Mapping[str, Any]) -> str:
    """What is unusual of tasks beside their sizes, to follow these; empty where nothing is.

    Args:
        task: The tasks as `result.json` describes them.
    """
    found = []
    if task.get("protocol") == "meta_dataset":
        found.append("as in Meta-Dataset")
    elif not task.get("balanced", True):
        found.append("drawn for each class")
    if unlabelled := task.get("unlabelled"):
        others = f" and of {task['distractors']} distractors" if task.get("distractors") else ""
        found.append(f"{unlabelled} unlabelled a class{others}")
    if (share := task.get("labelled_share", 1)) < 1:
        found.append(f"{share:.3g} of the images with labels")
    if (concentration := task.get("query_dirichlet")) is not None:
        most = f" of at most {task['queries_at_most']}" if "queries_at_most" in task else ""
        found.append(f"divided by Dirichlet({concentration:g}) shares{most}")
    if least := task.get("min_items"):
        found.append(f"classes of at least {least}")
    return "".join(f", {text}" for text in found)


def mode_text(protocol: Mapping[str, Any], items: str = "queries") -> str:
    """Whether a prediction looked at what else was tested, and whether the method supposes as much of each class, in words.

    Args:
        protocol: That of `result.json`.
        items: What is tested.
    """
    mode = "transductive" if protocol[TRANSDUCTIVE] else "inductive"
    return f"{mode}, supposes balanced {items}" if protocol.get("assumes_balanced_queries") else mode


def task_text(task: Mapping[str, Any]) -> str:
    """Tasks in words: `5-way 1-shot, 15 queries a class`.

    Args:
        task: The tasks as `result.json` describes them.
    """
    ways, shots, queries = (count_text(task[name]) for name in SIZES)
    return f"{ways}-way {shots}-shot, {queries} queries a class{more_of_task(task)}"
