"""What predictions of one support set share, also where they run at the same time, or fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from metarun.ops.support import Memory, of_support, remembered

computed: list[str] = []


def compute(what: str) -> str:
    computed.append(what)
    return what


def predicted(memory: Memory) -> list[str]:
    """What a prediction gets that asks twice."""
    with remembered(memory):
        return [of_support(lambda: compute("features")), of_support(lambda: compute("head"))]


def test_predictions_at_the_same_time_have_places_of_their_own() -> None:
    memory, between = Memory(), Barrier(2, timeout=20)

    def one(_: int) -> list[str]:
        with remembered(memory):
            between.wait()
            first = of_support(lambda: compute("features"))
            between.wait()
            return [first, of_support(lambda: compute("head"))]

    for _ in range(2):  # the second time all is known
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(one, range(2))) == [["features", "head"]] * 2
    computed.clear()
    assert predicted(memory) == ["features", "head"]
    assert computed == []


def test_a_prediction_that_fails_leaves_a_memory_as_it_was() -> None:
    memory = Memory()

    def fail() -> None:
        with remembered(memory):
            of_support(lambda: compute("of another kind"))
            of_support(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        fail()
    assert memory.results == []
    assert predicted(memory) == ["features", "head"]
