"""Optimisers that leave torch's compiler alone.

torch marks its optimisers as not to be compiled, and imports its compiler for that when the first one is made: more than a second,
as long as torch itself takes. Nothing here is compiled, so nothing has to be marked.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=Optimizer)
MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@functools.cache
def uncompiled(kind: type[Kind]) -> type[Kind]:
    """An optimiser that does the same to the last bit, and does not import torch's compiler.

    Args:
        kind: An optimiser. What a class outside `torch.optim` says itself stays as it is.

    Returns:
        A class below it, of the same name.
    """
    inherited = {name: getattr(kind, name) for name in (*MARKED, "step")}
    methods = {
        name: inspect.unwrap(it) for name, it in inherited.items() if f"{it.__module__}.".startswith("torch.optim.")
    }
    if take := methods.pop("step", None):

        @functools.wraps(take)
        def step(self: Kind, *args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
                return take(self, *args, **kwargs)

        del step.__wrapped__  # the step without it would be another
        methods["step"] = step
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, **methods})
