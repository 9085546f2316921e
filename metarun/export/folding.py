"""The graph of a function of images, in which everything that does not depend on them is computed once and kept.

What a method makes of a fixed support set (prototypes, the solution of a linear system, a head or a whole network after inner
steps) then costs an exported file nothing, and needs no operation there: gradients and iterations until convergence, which no
file format has, are done here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from metarun.errors import UserError
from metarun.ops import batch_norm

SYMBOLIC = (FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool)


class Folding(TorchFunctionMode):
    """Leaves to the tracer around it what depends on the inputs, and computes everything else at once, out of its sight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, SYMBOLIC) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return func(*args, **kwargs)


class Traceable(nn.Module):
    """A function as a module that owns no parameters, so that the tracer takes those of the function for constants."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["function"] = function  # no submodule, even if it is one

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the function makes of these inputs, with its constants folded."""
        with Folding(), torch.no_grad(), batch_norm.sets_apart():
            found: Tensor = self.__dict__["function"](*inputs)
            return found


def traced(function: Callable[..., Tensor], examples: Sequence[Tensor], rows: Sequence[Any]) -> ExportedProgram:
    """The graph of a function of tensors, for any number of rows of each.

    Args:
        function: What is traced; it may hold modules, whose parameters become constants of the graph.
        examples: Its inputs, each of two rows at least.
        rows: The number of rows of each, a `torch.export.Dim` or a multiple of one; inputs may share it.

    Raises:
        UserError: The function does with its inputs what no graph can hold.
    """
    shapes = tuple({0: dimension} for dimension in rows)
    try:
        with quiet():
            return torch.export.export(Traceable(function), tuple(examples), dynamic_shapes=(shapes,), strict=False)
    except UserError:
        raise
    except Exception as error:  # the tracer raises whatever an operation that it cannot follow provokes
        raise UserError(
            f"it cannot be traced ({type(error).__name__}: {first_line(error)}); with support=FOLDER, whose classes are then in the "
            "file, fewer operations are left"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of a tracer or converter says, in one line that is not too long."""
    return (str(error).strip().splitlines() or [""])[0][:200]


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the warnings and notes of tracers and converters, which are about their own insides."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
