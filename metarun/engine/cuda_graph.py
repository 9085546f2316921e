"""A traced step as one CUDA graph: its thousands of kernels start from one call, and need not wait for Python one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Compute = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Compute], tuple[tuple[Tensor, ...], Callable[[], None]]]
WARM_UP = 3  # passes before the capture, in which libraries choose their kernels and take their workspace


def cuda_graph(compute: Compute) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Captures a computation as a CUDA graph.

    Args:
        compute: The computation, without arguments; it must read and write the same memory in every call.

    Returns:
        The outputs that it gave while it was captured, and a function that computes them anew into the same memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = compute()
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
