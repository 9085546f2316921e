"""Networks of torchvision and timm, and metarun's own pretrained ones, without their classifiers, and what images they expect."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from torch import nn

from metarun import optional
from metarun.backbones import efficientnet_lite
from metarun.backbones.weights import load_tensors, network_tensors, read_tensors, with_positions
from metarun.data.download import download
from metarun.data.roots import data_root
from metarun.engine import checkpoint
from metarun.errors import UserError, first_line, nearest, not_imported
from metarun.files import typed_path
from metarun.text import listed

# The mean and the standard deviation of the channels of ImageNet in [0, 1].
IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)
CLASSES = 1000  # of ImageNet, for which torchvision's heads are made
AUXILIARY = ("AuxLogits", "aux1", "aux2")  # heads in torchvision's Inception networks, for training alone
OWN = "metarun"  # the library of the networks that lie here

log = logging.getLogger("metarun")


@dataclass(frozen=True)
class Wanted:
    """A network with weights, as a config names it.

    Attributes:
        key: The node of the config, `backbone` or `encoder`, for messages.
        name: `LIBRARY:NAME`.
        weights: None draws them; `pretrained` or a name are the library's; else an address or a file.
        checksum: The SHA-256 of the file; an address needs one.
        image_size: The side of images in pixels; None is what the weights expect.
        prefix: What stands before the network's own names in a file; None finds it.
        images_of: The library's weights, by name, whose images are expected where a file's are loaded, or none; None is the
            default ones.
    """

    key: str
    name: str
    weights: str | None = None
    checksum: str | None = None
    image_size: int | None = None
    prefix: str | None = None
    images_of: str | None = None

    @property
    def model(self) -> str:
        """The name within the library."""
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class TrainingImages:
    """The images that weights were trained on.

    Attributes:
        image_size: The side in pixels.
        mean: What was subtracted from each channel, in [0, 1].
        deviation: What each was divided by.
        interpolation: `bilinear` or `bicubic`.
        crop: The part of the side that is kept in the middle, after resizing; 1 for all.
    """

    image_size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    interpolation: str
    crop: float


# Tags of timm's weights that were trained on ImageNet's images, with or without their labels; of others (laion2b, lvd142m, openai) it
# is not known which classes are among their images.
OF_IMAGENET = re.compile(r"in\d+k|imagenet|^(fb_)?dino$|^(fc)?mae$")


@dataclass(frozen=True)
class Built:
    """A network `[B, 3, S, S]` to features, and what is known of its weights.

    Attributes:
        network: The network.
        recipe: The images that it expects.
        origin: Where its weights come from.
        saw: What they were trained on, if known.
        images_of: The name of the library's weights that say what images are expected; None for the default ones.
    """

    network: nn.Module
    recipe: TrainingImages
    origin: str | None
    saw: str | None
    images_of: str | None = None


def build(wanted: Wanted) -> Built:
    """The network with its weights; what was loaded is said in a line.

    Raises:
        UserError: There is no such network, the library is not installed, or the weights cannot be had or do not fit.
    """
    library, _, model = wanted.name.partition(":")
    if library not in LIBRARIES or not model:
        hint = nearest(wanted.name, [f"{OWN}:{name}" for name in efficientnet_lite.VARIANTS])
        raise UserError(
            f"{wanted.key}.name={wanted.name}: must be torchvision:NAME, timm:NAME or {OWN}:NAME, such as torchvision:resnet50, "
            f"timm:vit_small_patch16_224 or {OWN}:efficientnet_lite0{hint}"
        )
    checksum = wanted.checksum
    if checksum is not None and (len(checksum) != 64 or set(checksum.lower()) - set("0123456789abcdef")):
        raise UserError(f"{wanted.key}.checksum={checksum}: must be the 64 hexadecimal digits of a SHA-256")
    return LIBRARIES[library](wanted)


def check_installed(name: str, key: str) -> None:
    """Checks that the library of `LIBRARY:NAME` is installed.

    Raises:
        UserError: It is not; it names the extra.
    """
    library = name.partition(":")[0]
    if library in LIBRARIES and library != OWN:
        _library(name, library, key)


def _own(wanted: Wanted) -> Built:
    known = efficientnet_lite.VARIANTS
    if wanted.model not in known:
        hint = nearest(wanted.model, known) or f"; there are {listed(known)}"
        raise UserError(f"{wanted.key}.name={wanted.name}: metarun has no such network{hint}")
    variant, network = known[wanted.model], efficientnet_lite.EfficientNetLite(wanted.model)
    path = None
    if wanted.weights == "pretrained":
        path = efficientnet_lite.weights_file(wanted.model, f"{wanted.key}.name={wanted.name}")
    elif wanted.weights is not None:
        path = _found_file(wanted, ["pretrained"])
    _check_images_of(wanted, [])
    if path is not None:
        key = f"{wanted.key}.weights={wanted.weights}"
        tensors = {efficientnet_lite.own_name(name): value for name, value in read_tensors(path, key).items()}
        load_tensors(network, network_tensors(network, tensors, key, wanted.prefix), key, ("classifier",))
    recipe = TrainingImages(variant.image_size, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic", variant.crop)
    return Built(network, recipe, str(path) if path else None, "imagenet" if wanted.weights == "pretrained" else None)


def _library(name: str, library: str, key: str) -> ModuleType:
    """The module, or a `UserError` that names the extra."""
    try:
        models = optional.torchvision(library)  # timm imports it too, and finds it whole then
        return models if library == "torchvision" else importlib.import_module(library)
    except UserError as error:
        raise UserError(f"{key}.name={name}: {error}") from error
    except ImportError as error:
        told = not_imported(library, error)
        raise UserError(f"{key}.name={name}: {told}: pip install 'metarun[{library}]'") from error


def _torchvision(wanted: Wanted) -> Built:
    name, model, weights, image_size = wanted.name, wanted.model, wanted.weights, wanted.image_size
    _library(name, "torchvision", wanted.key)
    models = importlib.import_module("torchvision.models")
    if model not in (known := models.list_models(module=models)):
        raise UserError(f"{wanted.key}.name={name}: torchvision has no such image classifier{nearest(model, known)}")
    choices = models.get_model_weights(model)
    named = "DEFAULT" if weights == "pretrained" else weights
    own = choices[named] if named in choices.__members__ else None
    _check_images_of(wanted, [choice.name for choice in choices], published=own is not None)
    expects = own or choices[wanted.images_of or "DEFAULT"]
    size = expects.transforms.keywords["crop_size"]
    settings: dict[str, Any] = {}
    if model in ("inception_v3", "googlenet") and own is None:  # as they are where torchvision loads weights
        settings = {"transform_input": True, "init_weights": weights is None}
    if model.startswith("vit_"):
        settings["image_size"] = image_size or size
    try:
        network = models.get_model(model, weights=own, progress=False, **settings)
    except (ValueError, AssertionError) as error:  # of its constructor; what cannot be fetched raises others
        raise _other_size(wanted, error) from error
    except Exception as error:
        raise _unfetched(wanted, str(own), error) from error
    for auxiliary in filter(partial(hasattr, network), AUXILIARY):
        setattr(network, auxiliary, None)
        network.aux_logits = False
    layers = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != CLASSES:
        raise UserError(f"{wanted.key}.name={name}: does not end in a linear classifier that could be taken off")
    head = layers[-1][0]
    network.set_submodule(head, nn.Identity())
    if own is not None:
        log.info("%s.weights=%s: torchvision loaded its %s; left out %s", wanted.key, weights, own, head)
    elif weights is not None:
        _load_file(network, wanted, [choice.name for choice in choices], (head, *AUXILIARY))
    chosen = expects.transforms.keywords
    kind = getattr(chosen.get("interpolation"), "value", "bilinear")
    crop = size / chosen.get("resize_size", 256)
    mean, deviation = (tuple(chosen.get(part, usual)) for part, usual in zip(("mean", "std"), IMAGENET, strict=True))
    origin = str(own or weights) if weights else None
    recipe = TrainingImages(size, mean, deviation, kind, crop)
    return Built(network, recipe, origin, "imagenet" if own else None, expects.name)


def _timm(wanted: Wanted) -> Built:
    name, model, weights = wanted.name, wanted.model, wanted.weights
    timm = _library(name, "timm", wanted.key)
    bare = model.split(".")[0]
    if bare not in (known := timm.list_models()):
        raise UserError(f"{wanted.key}.name={name}: timm has no such network{nearest(bare, known)}")
    tags = [name.partition(".")[2] for name in timm.list_models(f"{bare}.*", pretrained=True)]
    published = weights == "pretrained" or weights in tags
    _check_images_of(wanted, tags, published=published)
    chosen = f"{bare}.{weights}" if published and weights != "pretrained" else model
    if published:
        try:
            network = timm.create_model(chosen, pretrained=True, num_classes=0)
        except Exception as error:
            raise _unfetched(wanted, chosen, error) from error
        log.info("%s.weights=%s: timm loaded its %s; left out the classifier", wanted.key, weights, chosen)
    else:
        try:
            network = timm.create_model(f"{bare}.{wanted.images_of}" if wanted.images_of else model, num_classes=0)
        except Exception as error:
            raise UserError(f"{wanted.key}.name={name}: {first_line(error)}{nearest(model, tags)}") from error
    settings = network.pretrained_cfg
    resize = partial(_set_size, network, wanted)
    if weights is not None and not published:
        head = settings.get("classifier") or "head"
        _load_file(network, wanted, tags, (head,) if isinstance(head, str) else tuple(head), resize)
    else:
        resize()
    recipe = TrainingImages(
        settings["input_size"][-1],
        tuple(settings["mean"]),
        tuple(settings["std"]),
        settings["interpolation"],
        settings["crop_pct"],
    )
    tag = settings.get("tag") or ""
    saw = "imagenet" if published and OF_IMAGENET.search(tag) else None
    origin = settings.get("hf_hub_id") if published else weights
    return Built(network, recipe, origin, saw, tag if tag in tags else None)


def _set_size(network: nn.Module, wanted: Wanted) -> None:
    """Has a network of timm take images of the size that is wanted, if it is made for one size: positions are interpolated."""
    change: Any = getattr(network, "set_input_size", None)
    if wanted.image_size is not None and change is not None:
        try:
            change((wanted.image_size, wanted.image_size))
        except Exception as error:
            raise _other_size(wanted, error) from error


def _check_images_of(wanted: Wanted, known: list[str], *, published: bool = False) -> None:
    if wanted.images_of is None:
        return
    key = f"{wanted.key}.images_of={wanted.images_of}"
    if published:
        raise UserError(
            f"{key}: {wanted.key}.weights={wanted.weights} say themselves what images they expect; leave it out"
        )
    if wanted.images_of not in known:
        hint = nearest(wanted.images_of, known) or (f"; {wanted.name} has {listed(known)}" if known else "")
        raise UserError(f"{key}: the library has no weights of that name{hint}")


LIBRARIES = {"torchvision": _torchvision, "timm": _timm, OWN: _own}


def _unfetched(wanted: Wanted, origin: str, error: Exception) -> UserError:
    reason = first_line(error).rstrip(".")
    return UserError(
        f"{wanted.key}.weights: the weights {origin} of {wanted.name} cannot be had ({reason}); without a network give a file, "
        f"{wanted.key}.weights=PATH"
    )


def _other_size(wanted: Wanted, error: Exception) -> UserError:
    key = (
        f"{wanted.key}.name={wanted.name}"
        if wanted.image_size is None
        else f"{wanted.key}.image_size={wanted.image_size}"
    )
    return UserError(f"{key}: {wanted.name} does not take such images ({first_line(error).rstrip('.')})")


def _found_file(wanted: Wanted, known: list[str]) -> Path:
    """The file of weights that an address or a path leads to; `known` are the library's own that it is none of."""
    weights, checksum = str(wanted.weights), wanted.checksum
    key = f"{wanted.key}.weights={weights}"
    if "://" in weights:
        if checksum is None:
            raise UserError(
                f"{key}: an address needs {wanted.key}.checksum=SHA256 of the file, so that it is the one meant"
            )
        file = PurePosixPath(urlparse(weights).path).name or "weights"
        path = download(weights, data_root() / "weights" / checksum[:16].lower() / file, checksum=checksum.lower())
    else:
        path = typed_path(weights)
    if not path.is_file():
        hint = nearest(weights, known) or (f"; {wanted.name} has {listed(known)}" if known else "")
        raise UserError(f"{key}: there is no such file, nor weights of that name{hint}")
    if checksum is not None and (actual := checkpoint.digest(path)) != checksum.lower():
        raise UserError(
            f"{key}: {path} is another file than the one meant (SHA-256 {actual}, expected {checksum.lower()})"
        )
    return path


def _load_file(
    network: nn.Module,
    wanted: Wanted,
    known: list[str],
    spare: tuple[str, ...],
    resize: Callable[[], None] = lambda: None,
) -> None:
    """The weights of an address or a file into `network`.

    Args:
        network: The network, for images of the library's size.
        wanted: Where its weights are.
        known: The library's own weights that they are none of.
        spare: The names of tensors of the file that may be left out.
        resize: Has the network take images of the size that is wanted. It comes first for a file of another size than the
            library's, so that positions are resampled once at most: from the file's size to the one that is wanted.
    """
    key = f"{wanted.key}.weights={wanted.weights}"
    found = network_tensors(network, read_tensors(_found_file(wanted, known), key), key, wanted.prefix)
    own = network.state_dict()
    first = any(name in own and own[name].shape != value.shape for name, value in found.items())
    if first:
        resize()
    load_tensors(network, with_positions(network, found, key), key, spare)
    if not first:
        resize()
