"""A device beside the CPU, for machines that have none: it computes what a CPU does, and mixes with no tensor of the CPU's.

So what a GPU would refuse is an error here too: a tensor that was left behind, or made on the CPU within a step. `device()`
adds it to this process, and within `present()` it can be computed on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "stand_in"  # torch gives every tensor and module a method of this name
aten = torch.ops.aten
# Between devices: what copies, and what takes its indices from the CPU.
COPYING = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# What changes a tensor's shape in place, and so has to change it on both of its sides.
RESHAPING = (aten.unsqueeze_.default, aten.squeeze_.dim, aten.squeeze_.dims, aten.t_.default, aten.transpose_.default)
kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")


class Backend:
    """What torch asks a device's module for."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)


@functools.cache
def device() -> torch.device:
    """The device, which from then on this process has. It must be there before the first gradient of all."""
    _setup_privateuseone_for_python_backend(NAME, Backend)
    # What torch's own C++ calls past Python, to move the list in `tensor[[0, 2]]`.
    kernels.impl(
        "empty_strided", lambda size, stride, dtype, **_: There(torch.empty_strided(size, stride, dtype=dtype))
    )
    kernels.impl("copy_", _filled)
    return torch.device(NAME, 0)


def _filled(tensor: There, source: Tensor, non_blocking: bool = False) -> There:
    tensor.held.copy_(source)
    return tensor


class There(Tensor):
    """A tensor on the device; `held` has its values. To torch it is one without values, so that its shape can change."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        with no_dispatch():
            shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=device())

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return device()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: There) -> None:
        self.held = value.held
        Tensor.data.__set__(self, value)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class Present(TorchDispatchMode):
    """What makes tensors on the device without being given one is seen here."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


@contextmanager
def present() -> Iterator[torch.device]:
    """The device, which can be computed on within."""
    found = device()
    with Present():
        yield found


def compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`operation` on the device if one of its tensors is there, or it is told to; raises `RuntimeError` for a mixture."""
    if operation is torch.ops.prim.device.default:
        return args[0].device
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    left = [value for value in tensors if not isinstance(value, There) and value.ndim]  # numbers go anywhere
    if operation in INDEXING:
        left = [value for value in left if value.dtype not in (torch.int64, torch.bool)]
    if there and left and operation not in COPYING:
        raise RuntimeError(
            f"{operation}: some tensors are on {device()}, others on cpu: {[value.shape for value in left]}"
        )
    if there and operation in RESHAPING:
        operation(there[0].held, *args[1:])
        with no_dispatch():
            operation(there[0], *args[1:])
        return there[0]
    on_device = bool(there)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == NAME
    if operation is aten.copy_.default:
        on_device = isinstance(args[0], There)
    known = {id(value.held): value for value in there}
    found = FUSED.get(operation, operation)(*tree_map(_here, args), **tree_map(_here, kwargs))
    if not on_device:
        return found

    def there_again(value: Any) -> Any:
        return (known[id(value)] if id(value) in known else There(value)) if isinstance(value, Tensor) else value

    return tree_map(there_again, found)


def _here(value: Any) -> Any:
    if isinstance(value, There):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


# Two operations that only GPUs have, and that torch asks every other device for.


def _lstm_cell(inputs: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = sum(biases, inputs + hidden).chunk(4, 1)
    gates = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = gates[1] * cell + gates[0] * gates[2]
    return gates[3] * cell.tanh(), cell, torch.cat(gates, 1)


def _lstm_cell_backward(
    of_hidden: Tensor | None, of_cell: Tensor | None, before: Tensor, after: Tensor, gates: Tensor, biases: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    i, f, g, o = gates.chunk(4, 1)
    h, c = (torch.zeros_like(after) if value is None else value for value in (of_hidden, of_cell))
    c = c + h * o * (1 - after.tanh() ** 2)
    slopes = c * g * i * (1 - i), c * before * f * (1 - f), c * i * (1 - g * g), h * after.tanh() * o * (1 - o)
    of_gates = torch.cat(slopes, 1)
    return of_gates, c * f, of_gates.sum(0) if biases else None


FUSED: dict[Any, Callable[..., Any]] = {
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
}
