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
        self.asked = 0


_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembered(memory: Memory) -> Iterator[None]:
    """A context for one prediction, in which `of_support` computes only what `memory` does not hold yet.

    All predictions with one memory must be of the same method with the same weights, and of the same support set: such a method
    asks for the same things in the same order each time, if no prediction depends on another query.
    """
    memory.asked = 0
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def remembering() -> bool:
    """Whether the caller runs within `remembered`."""
    return _memory.get() is not None


def of_support(compute: Callable[[], T]) -> T:
    """What a function gives, which depends on the support set and on the weights alone.

    Within `remembered` it is called in the first prediction, and the others get the same. Elsewhere it is called each time.

    Args:
        compute: The function. What it asks `of_support` for itself is a part of its result, and is not kept apart.
    """
    memory = _memory.get()
    if memory is None or vectorized():  # a tensor under vmap means nothing outside of it
        return compute()
    place, memory.asked = memory.asked, memory.asked + 1
    if place == len(memory.results):
        token = _memory.set(None)
        try:
            memory.results.append(compute())
        finally:
            _memory.reset(token)
    return cast(T, memory.results[place])
