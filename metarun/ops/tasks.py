"""Tasks along the first axis: the only place that knows a Python loop from `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

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
    """`function(*(tensor[t] for tensor in tensors))` for every task t, its results stacked along a new first axis.

    A Python loop, or one `vmap`: the same values up to float order. On a CPU the loop is faster for convolutions and
    `vmap` for small MLPs; on a GPU the loop is bound by kernel launches. `function` returns a tensor, or a dict or
    tuple of tensors. Random numbers differ between tasks in both forms.
    """
    if vectorize:
        with _inside_vmap():
            return torch.func.vmap(function, randomness="different")(*tensors)
    return _stack([function(*task) for task in zip(*tensors, strict=True)])
