"""The gradient of a loss as one flat list of tensor operations, recorded once and played back in every step.

Small networks spend their steps in bookkeeping: `vmap`, autograd's graph, its second derivatives, all made anew in every
step for the same operations on the same shapes. What is played back are those very operations, so the numbers are the same.
On a CUDA device they become one CUDA graph (`metarun/captured.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from metarun.core import Algorithm, Episodes
from metarun.engine.cuda_graph import Capture, CudaGraph
from metarun.ops.inner_loop import Params

if TYPE_CHECKING:
    from metarun.wrappers.base import Wrapper

log = logging.getLogger("metarun")


Autocast = Callable[[], AbstractContextManager[Any]]


class _Loss(nn.Module):
    """An algorithm's loss as a module's `forward`, the form that `functional_call` takes."""

    def __init__(self, algorithm: Algorithm | Wrapper) -> None:
        super().__init__()
        self.algorithm = algorithm

    def forward(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.algorithm.loss(episodes, step)


@dataclass(frozen=True)
class _Recording:
    """`play(*params, *tensors)`: the loss, the gradients of the params in `learned`, and the values of `shown`."""

    play: Callable[..., tuple[Tensor, ...]]
    learned: list[str]
    shown: list[str]


class TracedStep:
    """The gradients of an algorithm that is `recordable`: one recording for every shape of a chunk of tasks.

    The first chunk of a shape is computed both ways; where they differ by more than float order it says so, and such chunks
    are never played back. With `capture`, recordings are captured by it: by `captured.cuda_graph`, on a CUDA device.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture
        self.recordings: dict[Any, _Recording | None] = {}

    def __call__(
        self, algorithm: Algorithm | Wrapper, episodes: Episodes, step: int, weight: float, autocast: Autocast
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """As `Hardware.backward`, under `autocast()`; None where there is no recording that could be trusted."""
        params: Params = {name: value for name, value in algorithm.named_parameters() if value.requires_grad}
        inputs = (*params.values(), *episodes.named_tensors.values())
        key = (*((value.shape, value.dtype) for value in inputs), episodes.shape, weight, algorithm.training)
        if key not in self.recordings:
            self.recordings[key] = _record(algorithm, episodes, step, weight, params, autocast, self.capture)
        recording = self.recordings[key]
        if recording is None:
            return None
        with torch.no_grad():
            loss, *values = recording.play(*inputs)
            for name, value in zip(recording.learned, values, strict=False):
                old = params[name].grad
                params[name].grad = value if old is None else old + value
        return loss, dict(zip(recording.shown, values[len(recording.learned) :], strict=True))


def _record(
    algorithm: Algorithm | Wrapper,
    episodes: Episodes,
    step: int,
    weight: float,
    params: Params,
    autocast: Autocast,
    capture: Capture | None,
) -> _Recording | None:
    learned: list[str] = []
    logged: list[str] = []

    def compute(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(params, inputs, strict=False))
        tasks = episodes.with_tensors(inputs[len(params) :])
        named = {f"algorithm.{name}": value for name, value in values.items()}
        with autocast():  # the casts are operations, and so recorded
            loss, scalars = torch.func.functional_call(_Loss(algorithm), named, (tasks, step))
        derivatives = torch.autograd.grad(loss * weight, list(values.values()), allow_unused=True)
        gradients = {name: value for name, value in zip(values, derivatives, strict=True) if value is not None}
        learned[:], logged[:] = gradients, scalars
        return loss.detach(), *gradients.values(), *(value.detach() for value in scalars.values())

    inputs = [*(value.detach().requires_grad_() for value in params.values()), *episodes.named_tensors.values()]
    plain = compute(*inputs)
    try:
        play: Callable[..., tuple[Tensor, ...]] = _without_idle(make_fx(compute)(*inputs))
        if capture:
            play = CudaGraph(play, inputs, capture)
        with torch.no_grad():
            torch.testing.assert_close(play(*inputs), plain)
    except (AssertionError, RuntimeError) as error:
        reason = (
            "it does not give the same gradient" if isinstance(error, AssertionError) else str(error).splitlines()[0]
        )
        log.warning("hardware.record: going on without a recording, since %s", reason)
        return None
    return _Recording(play, learned, logged)


def _without_idle(recording: fx.GraphModule) -> fx.GraphModule:
    """`recording` without what does not change its tensor: times 1, to the shape it has, out of a graph that is not there."""
    aten = torch.ops.aten
    reshaping = (aten.view.default, aten._unsafe_view.default, aten.expand.default)
    for node in recording.graph.nodes:
        if node.target is aten.detach.default:
            idle = True
        elif node.target is aten.mul.Scalar:
            idle = node.args[1] == 1
        elif node.target in reshaping:
            before, after = (found.meta["val"] for found in (node.args[0], node))
            idle = before.shape == after.shape
        else:
            idle = False
        if idle:
            node.replace_all_uses_with(node.args[0])
    recording.graph.eliminate_dead_code()
    recording.recompile()
    return recording
