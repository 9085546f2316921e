"""A frozen network with its batch normalisations in the weights of the convolutions before them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-4  # of the largest feature: what the order of sums may change; a wrong fold changes much more


@torch.no_grad()
def folded(network: nn.Module, image_size: int) -> nn.Module:
    """A network of fewer passes over memory with the same outputs up to float order.

    Which normalisation follows which convolution is found on the way of an image. Where another layer reads the convolution too,
    the outputs would be others: they are compared.

    Args:
        network: Images `[B, 3, S, S]` to features `[B, D]`, in evaluation mode; it stays as it is.
        image_size: S, the side of an image in pixels.

    Returns:
        A copy; the network itself where nothing can be folded.
    """
    device = next(network.parameters()).device
    image = torch.sin(torch.arange(3.0 * image_size**2, device=device)).view(1, 3, image_size, image_size)
    expected, pairs = _followed(network, image)
    if not pairs:
        return network
    found = copy.deepcopy(network)
    for convolution, norm in pairs.items():
        parts: list[Any] = [found.get_submodule(name) for name in (convolution, norm)]
        found.set_submodule(convolution, fuse_conv_bn_eval(*parts))
        found.set_submodule(norm, nn.Identity())
    found.requires_grad_(False)
    same = (found(image) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return found if same else network


def _followed(network: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, str]]:
    """The features of an image, and the names of the convolutions that a batch normalisation follows, with its name."""
    made: dict[int, tuple[str, Tensor]] = {}  # by the number of an output, which is held so that no other one gets it
    calls: dict[str, int] = {}
    pairs: dict[str, str] = {}
    handles = []

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, module in network.named_modules():
        if type(module) is nn.Conv2d:

            def convolved(part: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                count(name)
                made[id(output)] = name, output

            handles.append(module.register_forward_hook(convolved))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:

            def normalised(part: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                count(name)
                if id(inputs[0]) in made:
                    pairs[made[id(inputs[0])][0]] = name

            handles.append(module.register_forward_pre_hook(normalised))
    try:
        features: Tensor = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return features, {one: other for one, other in pairs.items() if calls[one] == calls[other] == 1}
