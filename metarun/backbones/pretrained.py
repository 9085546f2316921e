"""Networks of torchvision and timm as backbones, with the weights that they come with, or those of a file."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun import optional
from metarun.backbones.conv4 import image_shape
from metarun.backbones.weights import load_tensors, read_tensors
from metarun.config.types import NameOrPath, NormKind, PositiveInt
from metarun.core import ActivationHook, Backbone
from metarun.data.download import download
from metarun.data.table import data_root
from metarun.engine import checkpoint
from metarun.errors import UserError, nearest
from metarun.ops.tasks import vectorized

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and standard deviation of the channels of ImageNet in [0, 1]
CLASSES = 1000  # of ImageNet, for which torchvision's heads are made
CONTAINERS = {"features", "encoder", "blocks", "layers", "stages"}  # whose children are the parts of a network
AUXILIARY = ("AuxLogits", "aux1", "aux2")  # heads in torchvision's Inception networks, for training alone

log = logging.getLogger("metarun")


class Pretrained(Backbone):
    """A network of a library without its classifier; images of any size with 1 or 3 channels to features `[B, features]`.

    `name` is `torchvision:NAME` (its image classifiers that end in a linear layer) or `timm:NAME`; the library is imported
    here and nowhere else. `weights`: null draws them; `pretrained` has the library fetch its default ones, a name those (a
    member of torchvision's enum, a tag of timm: `IMAGENET1K_V2`, `augreg_in21k`); an address with `checksum` (SHA-256)
    is downloaded once to `METARUN_DATA/weights`; anything else is a file, held against `checksum` if that is given. Files are
    a `state_dict` (`.pth`) or `.safetensors` with the library's own names for this network; the classifier's tensors
    are left out, everything else must fit.

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
        image_size: PositiveInt | None = None,
        standardized: bool = False,
        norm: NormKind = "running",
    ) -> None:
        super().__init__()
        channels = image_shape("pretrained", input_shape)[0]
        if channels not in (1, 3):
            raise UserError(f"backbone: {name} takes images of 1 or 3 channels, but the data have {channels}")
        library, _, model = name.partition(":")
        if library not in LIBRARIES or not model:
            raise UserError(
                f"backbone.name={name}: must be torchvision:NAME or timm:NAME, such as torchvision:resnet50 or "
                "timm:vit_small_patch16_224"
            )
        if checksum is not None and (len(checksum) != 64 or set(checksum.lower()) - set("0123456789abcdef")):
            raise UserError(f"backbone.checksum={checksum}: must be the 64 hexadecimal digits of a SHA-256")
        self.name, self.standardized = name, standardized
        self.network, size, (mean, deviation) = LIBRARIES[library](name, model, weights, checksum, image_size)
        self.image_size = image_size or size
        batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.network.modules())
        self.norm = "running" if batch_norm else "none"
        self.pretrained = weights is not None
        if norm != "running" and norm != self.norm:
            raise UserError(
                f"backbone.norm={norm}: {name} has the normalisation that it was made with; use backbone.norm={self.norm}"
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1), persistent=False)
        self.features = self._try(input_shape)

    @classmethod
    def check_installed(cls, settings: Mapping[str, Any]) -> None:
        name = str(settings.get("name"))
        if (library := name.partition(":")[0]) in LIBRARIES:
            _library(name, library)

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
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"backbone.image_size={self.image_size}: {self.name} does not take such images ({reason})"
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
        """Features `[B, features]`; `n_support` changes nothing, for no norm here looks at the support rows."""
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


def _library(name: str, library: str) -> ModuleType:
    """The module, or a `UserError` that names the extra."""
    try:
        models = optional.torchvision()  # timm imports it too, and finds it whole then
        return models if library == "torchvision" else importlib.import_module(library)
    except (UserError, ModuleNotFoundError) as error:
        missing = getattr(error, "name", None) or "torchvision"
        raise UserError(
            f"backbone.name={name}: {missing} is not installed: pip install 'metarun[{library}]'"
        ) from error


Built = tuple[
    nn.Module, int, tuple[tuple[float, ...], tuple[float, ...]]
]  # the network, its image size, mean and deviation


def _torchvision(name: str, model: str, weights: str | None, checksum: str | None, image_size: int | None) -> Built:
    _library(name, "torchvision")
    models = importlib.import_module("torchvision.models")
    if model not in (known := models.list_models(module=models)):
        raise UserError(f"backbone.name={name}: torchvision has no such image classifier{nearest(model, known)}")
    choices = models.get_model_weights(model)
    size = choices.DEFAULT.transforms.keywords["crop_size"]
    named = "DEFAULT" if weights == "pretrained" else weights
    own = choices[named] if named in choices.__members__ else None
    settings: dict[str, Any] = {}
    if model in ("inception_v3", "googlenet") and own is None:  # as they are where torchvision loads weights
        settings = {"transform_input": True, "init_weights": weights is None}
    if image_size is not None and model.startswith("vit_"):
        settings["image_size"] = image_size
    try:
        network = models.get_model(model, weights=own, progress=False, **settings)
    except Exception as error:
        raise _unfetched(name, str(own), error) from error
    for auxiliary in filter(partial(hasattr, network), AUXILIARY):
        setattr(network, auxiliary, None)
        network.aux_logits = False
    layers = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != CLASSES:
        raise UserError(f"backbone.name={name}: does not end in a linear classifier that could be taken off")
    head = layers[-1][0]
    network.set_submodule(head, nn.Identity())
    if own is not None:
        log.info("backbone.weights=%s: torchvision loaded its %s; left out %s", weights, own, head)
    elif weights is not None:
        _load_file(network, name, weights, checksum, [choice.name for choice in choices], (head, *AUXILIARY))
    return network, size, IMAGENET


def _timm(name: str, model: str, weights: str | None, checksum: str | None, image_size: int | None) -> Built:
    timm = _library(name, "timm")
    bare = model.split(".")[0]
    if bare not in (known := timm.list_models()):
        raise UserError(f"backbone.name={name}: timm has no such network{nearest(bare, known)}")
    tags = [name.partition(".")[2] for name in timm.list_models(f"{bare}.*", pretrained=True)]
    if weights == "pretrained" or weights in tags:
        chosen = model if weights == "pretrained" else f"{bare}.{weights}"
        try:
            network = timm.create_model(chosen, pretrained=True, num_classes=0)
        except Exception as error:
            raise _unfetched(name, f"timm's {chosen}", error) from error
        log.info("backbone.weights=%s: timm loaded its %s; left out the classifier", weights, chosen)
    else:
        try:
            network = timm.create_model(model, num_classes=0)
        except Exception as error:
            raise UserError(
                f"backbone.name={name}: {(str(error).splitlines() or [''])[0]}{nearest(model, tags)}"
            ) from error
        if weights is not None:
            head = network.pretrained_cfg.get("classifier") or "head"
            _load_file(network, name, weights, checksum, tags, (head,) if isinstance(head, str) else tuple(head))
    settings = network.pretrained_cfg
    if image_size is not None and hasattr(network, "set_input_size"):
        network.set_input_size((image_size, image_size))  # positions are interpolated
    return network, settings["input_size"][-1], (tuple(settings["mean"]), tuple(settings["std"]))


LIBRARIES = {"torchvision": _torchvision, "timm": _timm}


def _unfetched(name: str, origin: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"backbone.weights: the weights {origin} of {name} cannot be had ({reason}); with no network, give a file: backbone.weights=PATH"
    )


def _load_file(
    network: nn.Module, name: str, weights: str, checksum: str | None, known: list[str], spare: tuple[str, ...]
) -> None:
    """The weights of an address or a file into `network`; `known` are the library's own that `weights` is none of."""
    key = f"backbone.weights={weights}"
    if "://" in weights:
        if checksum is None:
            raise UserError(
                f"{key}: an address needs backbone.checksum=SHA256 of the file, so that it is the one meant"
            )
        file = PurePosixPath(urlparse(weights).path).name or "weights"
        path = download(weights, data_root() / "weights" / checksum[:16].lower() / file, checksum=checksum.lower())
    else:
        path = Path(weights).expanduser()
    if not path.is_file():
        hint = nearest(weights, known) or (f"; {name} has {', '.join(known)}" if known else "")
        raise UserError(f"{key}: there is no such file, nor weights of that name{hint}")
    if checksum is not None and (actual := checkpoint.digest(path)) != checksum.lower():
        raise UserError(
            f"{key}: {path} is another file than the one meant (SHA-256 {actual}, expected {checksum.lower()})"
        )
    load_tensors(network, read_tensors(path, key), key, spare)
