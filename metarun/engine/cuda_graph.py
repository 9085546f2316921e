"""A traced step as one CUDA graph: its thousands of kernels start from one call, and need not wait for Python one by one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Compute = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Compute], tuple[tuple[Tensor, ...], Callable[[], None]]]
WARM_UP = 3  # passes before the capture, in which libraries choose their kernels and take their workspace

# The graphs that live, with the stream that they were captured on: memory is used again on the same stream alone.
_living: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, torch.cuda.Stream] = weakref.WeakKeyDictionary()


def cuda_graph(compute: Compute) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Captures a computation as a CUDA graph.

    All graphs share the memory of what lies between their inputs and their outputs, so that many take as much of it as the largest.
    A replay may thus write over the outputs of another graph.

    Args:
        compute: The computation, without arguments; it must read and write the same memory in every call.

    Returns:
        The outputs that it gave while it was captured, and a function that computes them anew into the same memory.
    """
    other = next(iter(_living.items()), None)
    pool, stream = (other[0].pool(), other[1]) if other else (None, torch.cuda.Stream())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = compute()
    _living[graph] = stream
    return outputs, graph.replay


class CudaGraph:
    """A function of tensors, captured once and replayed for every call.

    It works in memory of its own: a call copies its inputs there, and returns copies of the outputs.

    Args:
        play: The function.
        inputs: Tensors of the shapes and types that every call will have.
        capture: What captures a computation, `cuda_graph` for one.
    """

    def __init__(self, play: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], capture: Capture) -> None:
        self.play = play  # a replay reads its constants where they lay, and the graph does not hold them
        self.inputs = [value.detach().clone() for value in inputs]
        with torch.no_grad():
            self.outputs, self.replay = capture(lambda: play(*self.inputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs for these inputs by a replay.

        Args:
            inputs: Tensors of the shapes and types that were captured.

        Returns:
            Copies of the outputs, which the next call leaves alone.
        """
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given.detach())
        self.replay()
        return tuple(value.clone() for value in self.outputs)
