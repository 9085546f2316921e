"""The gradient of a loss as one flat list of tensor operations, recorded once and played back in every step.

Small networks spend their steps in bookkeeping: `vmap`, autograd's graph, its second derivatives, all made anew in every
step for the same operations on the same shapes. What is played back are those very operations, so the numbers are the same.
On a CUDA device they become one CUDA graph (`metarun/engine/cuda_graph.py`).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from metarun.core import Algorithm, Episodes
from metarun.engine.cuda_graph import Capture, CudaGraph
from metarun.ops.inner_loop import Params

if TYPE_CHECKING:
    from metarun.wrappers.base import Wrapper

log = logging.getLogger("metarun")

MOST_SHAPES = 16  # recordings that are kept; each holds operations and no activations, which CUDA graphs share
ROUNDS = 3  # both ways are timed as often, to see which one is faster

aten = torch.ops.aten
# Most of a step's operations are on a few numbers a channel, where the call costs more than the arithmetic.
DIRECT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.addcmul.default: torch.addcmul,
    aten.addmm.default: torch.addmm,
    aten.div.Tensor: torch.div,
    aten.exp.default: torch.exp,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.relu.default: torch.relu,
    aten.rsqrt.default: torch.rsqrt,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.var.correction: torch.var,
}
METHODS: dict[Any, str] = {aten.view.default: "view", aten.expand.default: "expand"}

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
    """What a step of one shape plays back.

    Attributes:
        play: Takes the parameters, the buffers and the tasks' tensors. Gives the loss, the gradients of the parameters in
            `learned`, the values of `shown`, and the buffers in `moved` as the step leaves them.
        learned: The parameters that the loss depends on.
        shown: What is logged besides the loss.
        moved: The buffers that a step changes, as the running averages of a norm.
    """

    play: Callable[..., tuple[Tensor, ...]]
    learned: list[str]
    shown: list[str]
    moved: list[str]


class TracedStep:
    """The gradients of an algorithm that is `recordable`: one recording for every shape of a chunk of tasks.

    When a shape is recorded, its chunk is computed both ways; where they differ by more than float order it says so, and such
    chunks are never played back.

    Args:
        capture: What captures a recording: `cuda_graph`, on a CUDA device. None plays the operations one by one.
        patience: The chunks of a shape that are computed plainly before it is recorded. Above 0, only a recording that gives
            the same gradient to the bit, and faster, is played back: nothing then depends on when it was made.
    """

    def __init__(self, capture: Capture | None = None, patience: int = 0) -> None:
        self.capture = capture
        self.patience = patience
        self.recordings: dict[Any, _Recording | None] = {}
        self._met: Counter[Any] = Counter()

    @property
    def in_use(self) -> bool:
        """Whether any chunk has been played back."""
        return any(recording is not None for recording in self.recordings.values())

    def __call__(
        self, algorithm: Algorithm | Wrapper, episodes: Episodes, step: int, weight: float, autocast: Autocast
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """As `Hardware.backward`, under `autocast()`; None where there is no recording that could be trusted."""
        params: Params = {name: value for name, value in algorithm.named_parameters() if value.requires_grad}
        buffers = dict(algorithm.named_buffers())
        inputs = (*params.values(), *buffers.values(), *episodes.named_tensors.values())
        shapes = ((value.shape, value.stride(), value.dtype) for value in inputs)
        key = (*shapes, episodes.shape, weight, algorithm.training)
        if key not in self.recordings:
            self._met[key] += 1
            if self._met[key] <= self.patience or len(self.recordings) == MOST_SHAPES:
                return None
            self.recordings[key] = self._record(algorithm, episodes, step, weight, params, buffers, autocast)
        recording = self.recordings[key]
        if recording is None:
            return None
        with torch.no_grad():
            loss, *values = recording.play(*inputs)
            gradients, shown, moved = _divided(values, len(recording.learned), len(recording.shown))
            for name, value in zip(recording.learned, gradients, strict=True):
                old = params[name].grad
                params[name].grad = value if old is None else old + value
            for name, value in zip(recording.moved, moved, strict=True):
                buffers[name].copy_(value)
        return loss, dict(zip(recording.shown, shown, strict=True))

    def _record(
        self,
        algorithm: Algorithm | Wrapper,
        episodes: Episodes,
        step: int,
        weight: float,
        params: Params,
        buffers: Params,
        autocast: Autocast,
    ) -> _Recording | None:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

        learned: list[str] = []
        logged: list[str] = []
        moved: list[str] = []

        def compute(*inputs: Tensor) -> tuple[Tensor, ...]:
            weights, state, tensors = _divided(list(inputs), len(params), len(buffers))
            values = dict(zip(params, weights, strict=True))
            kept = {name: value.clone() for name, value in zip(buffers, state, strict=True)}  # a norm moves it in place
            tasks = episodes.with_tensors(tensors)
            named = {f"algorithm.{name}": value for name, value in (values | kept).items()}
            with autocast():  # the casts are operations, and so recorded
                loss, scalars = torch.func.functional_call(_Loss(algorithm), named, (tasks, step))
            derivatives = torch.autograd.grad(loss * weight, weights, allow_unused=True)
            gradients = {name: value for name, value in zip(values, derivatives, strict=True) if value is not None}
            learned[:], logged[:], moved[:] = gradients, scalars, kept
            shown = [value.detach() for value in scalars.values()]
            return loss.detach(), *gradients.values(), *shown, *kept.values()

        weights = (value.detach().requires_grad_() for value in params.values())
        inputs = [*weights, *buffers.values(), *episodes.named_tensors.values()]
        plain = compute(*inputs)
        tolerance = 0.0 if self.patience else None  # None is that of the type
        try:
            # Without a fake mode at hand make_fx makes one for each value, which takes as long again.
            with tracing(TracingContext(FakeTensorMode())):
                recorded = make_fx(compute)(*inputs)
            play: Callable[..., tuple[Tensor, ...]] = _streamlined(recorded)
            if self.capture:
                play = CudaGraph(play, inputs, self.capture)
            with torch.no_grad():
                torch.testing.assert_close(play(*inputs), plain, rtol=tolerance, atol=tolerance, equal_nan=True)
        except (AssertionError, RuntimeError) as error:
            differs = isinstance(error, AssertionError)
            reason = "it does not give the same gradient" if differs else str(error).splitlines()[0]
            level = logging.DEBUG if self.patience else logging.WARNING
            log.log(level, "hardware.record: going on without a recording, since %s", reason)
            return None
        if self.patience and not _faster(lambda: torch.no_grad()(play)(*inputs), lambda: compute(*inputs)):
            return None
        return _Recording(play, learned, logged, moved)


def _faster(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether the first of two computations takes less time, by the best of a few alternating rounds."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        for compute, taken in zip((one, other), seconds, strict=True):
            started = time.perf_counter()
            compute()
            taken.append(time.perf_counter() - started)
    return min(seconds[0]) < min(seconds[1])


def _divided(values: list[Tensor], *lengths: int) -> list[list[Tensor]]:
    """`values` in parts of these lengths, and a last part of the rest."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return [values[start:end] for start, end in zip(ends, [*ends[1:], None], strict=True)]


def _streamlined(recording: fx.GraphModule) -> fx.GraphModule:
    """The recording with less work between its operations, in place; their values stay the same to the bit."""
    _drop_idle(recording)
    if not any(node.meta["val"].is_cuda for node in recording.graph.nodes if node.op == "placeholder"):
        _keep_constants(recording)
    _call_directly(recording)
    recording.graph.eliminate_dead_code()
    recording.recompile()
    return recording


def _drop_idle(recording: fx.GraphModule) -> None:
    """Drops what does not change its tensor: times 1, to the shape that it has, out of a graph that is not there."""
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


def _keep_constants(recording: fx.GraphModule) -> None:
    """Makes tensors of the numbers that operations on float32 and float64 take, which torch would else do in every call."""
    constants: dict[tuple[float, torch.dtype], str] = {}
    for node in recording.graph.nodes:
        if node.target not in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor) or node.kwargs:
            continue
        tensor, number = node.args
        if not isinstance(number, int | float) or tensor.meta["val"].dtype not in (torch.float32, torch.float64):
            continue
        dtype = tensor.meta["val"].dtype
        name = constants.setdefault((number, dtype), f"constant_{len(constants)}")
        setattr(recording, name, torch.tensor(number, dtype=dtype))
        with recording.graph.inserting_before(node):
            node.args = (tensor, recording.graph.create_node("get_attr", name))


def _call_directly(recording: fx.GraphModule) -> None:
    """Calls common operations by torch's own functions, which find the same kernels in half the time that `torch.ops` takes."""
    graph = recording.graph
    for node in graph.nodes:
        if node.target in DIRECT:
            node.target = DIRECT[node.target]
        elif node.target in METHODS:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_method(METHODS[node.target], node.args, node.kwargs))
            graph.erase_node(node)
