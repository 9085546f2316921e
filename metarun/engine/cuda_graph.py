"""A recording as one CUDA graph: its thousands of kernels start from one call, instead of waiting for Python one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Compute = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Compute], tuple[tuple[Tensor, ...], Callable[[], None]]]
WARM_UP = 3  # passes before the capture, in which libraries choose their kernels and take their workspace


def cuda_graph(compute: Compute) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """What `compute` gave while it was captured, and what computes it anew into the same memory."""
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
    """`play` on tensors of the shapes and types of `inputs`, captured once by `capture`.

    The memory that it works in is its own: what is given is copied in, and what is returned is a copy that the next call
    leaves alone.
    """

    def __init__(self, play: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], capture: Capture) -> None:
        self.inputs = [value.detach().clone() for value in inputs]
        with torch.no_grad():
            self.outputs, self.replay = capture(lambda: play(*self.inputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given.detach())
        self.replay()
        return tuple(value.clone() for value in self.outputs)
