"""Networks of torchvision and timm, and EfficientNet-Lite, as backbones, with the weights that they come with, or a file's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.libraries import Wanted, build, check_installed
from metarun.backbones.shapes import image_shape
from metarun.config.types import NameOrPath, NormKind, PositiveInt
from metarun.core import ActivationHook, Backbone
from metarun.errors import UserError, first_line
from metarun.ops.tasks import vectorized

CONTAINERS = {"features", "encoder", "blocks", "layers", "stages"}  # whose children are the parts of a network


class Pretrained(Backbone):
    """A network of a library without its classifier; images of any size with 1 or 3 channels to features `[B, features]`.

    `name` is `torchvision:NAME` (its image classifiers that end in a linear layer), `timm:NAME`, or one of metarun's own,
    `metarun:efficientnet_lite0`; a library is imported where it is asked for and nowhere else. `weights`: null draws them;
    `pretrained` has the library fetch its default ones, a name those (a member of torchvision's enum, a tag of timm:
    `IMAGENET1K_V2`, `augreg_in21k`); an address with `checksum` (SHA-256) is downloaded once to `METARUN_DATA/weights`;
    anything else is a file, held against `checksum` if that is given. Files are a `state_dict` (`.pth`) or `.safetensors` with
    the library's own names for this network; the classifier's tensors are left out, everything else must fit. Where a file
    holds the network within other things (`state_dict`, `model.`, `module.`, `teacher.`) it is found, or `weights_prefix`
    says where.

    Images are resized to squares of `image_size` pixels (null: what the library's weights expect), bilinearly, smoothed where they
    shrink; one channel is repeated. Then the network's own normalisation is applied (ImageNet's mean and deviation, or
    0.5), which is for pixels in [0, 1]: so `standardized` must say whether the data set has normalised them already
    (`data.normalize`, which the YAML looks at), in which case they stay as they are.

    `norm` is `running` for networks with batch normalisation (batch statistics while training, stored averages afterwards)
    and `none` for others, as the setting may say, but it changes nothing. Methods that change the blocks' activations
    are refused. `parts` are the stages: parameters outside of all parts are class tokens and positions. Raises `UserError`
    for all of this that cannot be had.

    Args:
        name: The network: torchvision:resnet50, timm:vit_small_patch16_224, ...
        weights: Its weights: null draws them, pretrained or a name has the library fetch them, else an address
            or a file.
        checksum: The SHA-256 of the file of weights; an address needs it.
        weights_prefix: What stands before the network's own names in the file, such as teacher.backbone; null finds it.
        images_of: The name of the library's weights whose images are expected, where weights are a file's or drawn; null is
            the default ones.
        image_size: The side in pixels that images are resized to; null is what the library's weights expect.
        standardized: Whether pixels come with mean 0 and deviation 1; otherwise the network's own normalisation
            is applied.
        norm: Nothing: a network with batch normalisation is `running`, any other has none.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        name: str,
        weights: NameOrPath | None = None,
        checksum: str | None = None,
        weights_prefix: str | None = None,
        images_of: str | None = None,
        image_size: PositiveInt | None = None,
        standardized: bool = False,
        norm: NormKind = "running",
    ) -> None:
        super().__init__()
        channels = image_shape("pretrained", input_shape)[0]
        if channels not in (1, 3):
            raise UserError(f"backbone: {name} takes images of 1 or 3 channels, but the data have {channels}")
        built = build(Wanted("backbone", name, weights, checksum, image_size, weights_prefix, images_of))
        mean, deviation = built.recipe.mean, built.recipe.deviation
        self.name, self.standardized, self.network = name, standardized, built.network
        self.images_of = built.images_of  # what its blueprint names, in which its weights are not named
        self.image_size = image_size or built.recipe.image_size
        batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.network.modules())
        self.norm = "running" if batch_norm else "none"
        self.pretrained, self.saw = weights is not None, built.saw
        if norm != "running" and norm != self.norm:
            raise UserError(
                f"backbone.norm={norm}: {name} has the normalisation that it was made with; use backbone.norm={self.norm}"
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1), persistent=False)
        self.features = self._try(input_shape)

    @classmethod
    def check_installed(cls, settings: Mapping[str, Any]) -> None:
        check_installed(str(settings.get("name")), "backbone")

    mean: Tensor
    deviation: Tensor

    def _try(self, input_shape: tuple[int, ...]) -> int:
        """The number of features, by a blank image."""
        self.eval()
        try:
            with torch.no_grad():
                output = self(torch.zeros(1, *input_shape))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"backbone.image_size={self.image_size}: {self.name} does not take such images ({first_line(error)})"
            ) from error
        finally:
            self.train()
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UserError(f"backbone.name={self.name}: does not turn an image into one vector of features")
        return output.shape[1]

    @property
    def widths(self) -> list[int]:  # type: ignore[override]
        raise UserError(
            f"backbone.name={self.name}: the method changes activations within blocks, which a library's network does not "
            "let it; use backbone=conv4, resnet12 or vit"
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return _parts(self.network)

    @property
    def token_blocks(self) -> Sequence[nn.Module] | None:
        """The blocks of a plain vision transformer, tokens `[B, tokens, width]` to the same; None of other networks."""
        if type(self.network).__name__ != "VisionTransformer":
            return None
        path = "encoder.layers" if self.name.startswith("torchvision:") else "blocks"
        return list(self.network.get_submodule(path).children())

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        """Features `[B, features]` of images `[B, C, H, W]`.

        Args:
            x: The images.
            n_support: Changes nothing, since no norm here looks at the support rows.
            activation_hook: Must be None, since a library's network does not let a method change its activations.

        Raises:
            UserError: There is a hook, or running averages would be kept with tasks vectorised.
        """
        if activation_hook is not None:
            _ = self.widths  # raises
        if self.norm == "running" and vectorized():
            raise UserError(
                f"backbone.name={self.name}: cannot keep running averages with tasks vectorised; set hardware.vectorize=false"
            )
        x = x.expand(-1, 3, -1, -1)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        if not self.standardized:
            x = (x - self.mean) / self.deviation
        features: Tensor = self.network(self.to_memory_order(x))
        return features


def _parts(network: nn.Module) -> list[nn.Module]:
    """The modules with parameters that the images go through one after the other, containers opened."""
    modules: list[nn.Module] = []
    for name, child in network.named_children():
        if name in CONTAINERS:
            modules += _parts(child)
        elif any(True for _ in child.parameters()):
            modules.append(child)
    return modules
