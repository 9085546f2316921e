"""Tasks along the first axis: the only place that knows a Python loop from `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from metarun.ops import draws

_vectorized: ContextVar[bool] = ContextVar("vectorized", default=False)


def vectorized() -> bool:
    """Whether the caller runs under `over_tasks(..., vectorize=True)`, where tensors carry a hidden task axis."""
    return _vectorized.get()


@contextmanager
def _inside_vmap() -> Iterator[None]:
    token = _vectorized.set(True)
    try:
        yield
    finally:
        _vectorized.reset(token)


def _stack(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    if isinstance(first, Mapping):
        return {key: _stack([result[key] for result in results]) for key in first}
    return type(first)(_stack(list(items)) for items in zip(*results, strict=True))


def over_tasks(function: Callable[..., Any], *tensors: Tensor, vectorize: bool = False) -> Any:
    """Applies a function to each task.

    A Python loop, or one `vmap`: the same values up to float order. On a CPU the loop is faster for convolutions and
    `vmap` for small MLPs; on a GPU the loop is bound by kernel launches. In training the random numbers of `ops.draws` belong
    to their tasks in both forms; those of torch's global generator do in the loop alone.

    Args:
        function: Takes one task's tensors, and returns a tensor, or a dict or tuple of tensors.
        *tensors: With the tasks along the first axis.
        vectorize: Whether to take `vmap`.

    Returns:
        The results of `function`, stacked along a new first axis.
    """
    share = draws.current()
    if share is not None and (draws.inside_a_task() or len(tensors[0]) != share.count):
        share = None  # tasks that are not the step's own, as the hard tasks that MTL makes of them
    if vectorize:
        with _inside_vmap():
            if share is None:
                return torch.func.vmap(function, randomness="different")(*tensors)

            def numbered(number: Tensor, *task: Tensor) -> Any:
                with share.task(number):
                    return function(*task)

            numbers = torch.arange(share.count, device=tensors[0].device)
            return torch.func.vmap(numbered, randomness="different")(numbers, *tensors)
    if share is None:
        return _stack([function(*task) for task in zip(*tensors, strict=True)])
    share.passes += 1
    results = []
    for number, task in enumerate(zip(*tensors, strict=True)):
        share.seed_global(number, tensors[0].device)
        with share.task(number):
            results.append(function(*task))
    return _stack(results)
