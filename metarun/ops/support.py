"""What a prediction computes of its support set alone, kept for further batches of queries of the same support set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from metarun.ops.tasks import vectorized

T = TypeVar("T")


class Memory:
    """The results of `of_support` in the order in which a prediction asks for them."""

    def __init__(self) -> None:
        self.results: list[Any] = []


class _Prediction:
    """One prediction's own way through a memory, which others may go through at the same time."""

    def __init__(self, known: list[Any]) -> None:
        self.results = list(known)
        self.asked = 0


_prediction: ContextVar[_Prediction | None] = ContextVar("prediction", default=None)


@contextmanager
def remembered(memory: Memory) -> Iterator[None]:
    """Opens a context for one prediction, in which `of_support` computes only what `memory` does not hold yet.

    All predictions with one memory must be of the same method with the same weights, and of the same support set: such a method
    asks for the same things in the same order each time, if no prediction depends on another query. They may run at the same time,
    in several threads: the memory gets the results of a prediction that has ended, all at once.
    """
    prediction = _Prediction(memory.results)
    token = _prediction.set(prediction)
    try:
        yield
    finally:
        _prediction.reset(token)
    if len(prediction.results) > len(memory.results):
        memory.results = prediction.results


def remembering() -> bool:
    """Whether the caller runs within `remembered`."""
    return _prediction.get() is not None


def of_support(compute: Callable[[], T]) -> T:
    """Returns what a function gives that depends on the support set and on the weights alone.

    Within `remembered` it is called in the first prediction, and the others get the same. Elsewhere it is called each time.

    Args:
        compute: The function. What it asks `of_support` for itself is a part of its result, and is not kept apart.
    """
    prediction = _prediction.get()
    if prediction is None or vectorized():  # a tensor under vmap means nothing outside of it
        return compute()
    place, prediction.asked = prediction.asked, prediction.asked + 1
    if place == len(prediction.results):
        token = _prediction.set(None)
        try:
            prediction.results.append(compute())
        finally:
            _prediction.reset(token)
    return cast(T, prediction.results[place])
