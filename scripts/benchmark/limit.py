"""What the machine allows: the convolutions that a method cannot do without, and nothing beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig
from torch import Tensor

# Convolutions of a layer for each set of images: forward, gradient by the input, gradient by the weights; the first layer
# first, whose input needs no gradient. Back through the inner gradients of a second-order step, each of its
# two gradient convolutions is differentiated by both arguments (two each), and the forward pass once more.
ONCE = ((1, 0, 1), (1, 1, 1))
SECOND_ORDER = ((2, 0, 2), (3, 3, 3))


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of stride 1."""

    images: int
    inputs: int
    outputs: int
    side: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of the forward pass; its gradients have as many each."""
        return 2 * 9 * self.images * self.inputs * self.outputs * self.side**2

    def calls(self, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
        """The forward pass and its two gradients, on random numbers with a pixel's channels side by side in memory."""

        def images(count: int, channels: int, side: int) -> Tensor:
            return torch.randn(count, side, side, channels).to(device, dtype).movedim(-1, 1)

        x, y = (images(self.images, channels, self.side) for channels in (self.inputs, self.outputs))
        w = images(self.outputs, self.inputs, 3)
        shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

        def gradient(by_input: bool) -> object:
            return torch.ops.aten.convolution_backward(y, x, w, None, *shape, [by_input, not by_input, False])

        return [
            lambda: torch.ops.aten.convolution(x, w, None, *shape),
            lambda: gradient(True),
            lambda: gradient(False),
        ]


def needed(config: DictConfig, algo: str) -> list[tuple[Layer, tuple[int, int, int]]]:
    """The layers of one task of conv4 with max-pools, each with how often its three convolutions are called."""
    support, query = config.task.ways * config.task.shots, config.task.ways * config.task.queries
    sets = {
        "maml": [(support, SECOND_ORDER)] * config.algo.get("inner_steps", 0) + [(query, ONCE)],
        "fomaml": [(support, ONCE)] * config.algo.get("inner_steps", 0) + [(query, ONCE)],
        "anil": [(support, ONCE), (query, ONCE)],
        "protonet": [(support + query, ONCE)],
    }[algo]
    channels, side = config.backbone.channels, config.data.image_size
    layers = [(1 if depth == 0 else channels, side >> depth) for depth in range(4)]
    return [
        (Layer(images, inputs, channels, side), times[min(depth, 1)])
        for images, times in sets
        for depth, (inputs, side) in enumerate(layers)
    ]


class Convolutions:
    """The convolutions of tasks of `config`, ready to be timed.

    On a GPU the images of `at_once` tasks go through together, as if the tasks shared their weights: those of one would
    leave most of it idle.
    """

    def __init__(
        self, config: DictConfig, algo: str, dtype: torch.dtype, device: torch.device, at_once: int = 1
    ) -> None:
        work = needed(config, algo)
        self.operations = sum(layer.operations * sum(times) for layer, times in work)
        self.at_once = at_once if device.type == "cuda" else 1
        calls = {layer: replace(layer, images=layer.images * self.at_once).calls(dtype, device) for layer, _ in work}
        self.calls = [
            call for layer, times in work for call, n in zip(calls[layer], times, strict=True) for _ in range(n)
        ]

    @torch.no_grad()
    def run(self, tasks: int) -> None:
        """Computes the convolutions of so many tasks."""
        for _ in range(tasks // self.at_once):
            for call in self.calls:
                call()
