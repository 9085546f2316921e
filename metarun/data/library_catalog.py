"""What torchvision and learn2learn publish, and where its files are: as much as can be said without these libraries."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from metarun import files
from metarun import optional as peers
from metarun.data.download import refuse_where_none_may
from metarun.data.splits import RATIOS, Shares
from metarun.data.table import listing
from metarun.errors import UserError, first_line, nearest
from metarun.text import listed

# Arguments that no option may give.
OURS = {
    "root",
    "download",
    "transform",
    "target_transform",
    "transforms",
    "loader",
}
OMNIGLOT: Shares = (1100 / 1623, 100 / 1623, 423 / 1623)  # as learn2learn's benchmark counts them


class Release(NamedTuple):
    """A data set as published: what can be said of it without its library."""

    files: str  # a pattern of the names that it has in the root
    classes: tuple[int, ...]  # in all, or for training, validation and testing where the library divides them
    parts: tuple[dict[str, Any], ...]  # arguments of the library's class, for each part of the images
    shares: Shares = RATIOS
    options: dict[str, Any] = {}  # noqa: RUF012 - arguments of the library's class that a user may change

    @property
    def divided(self) -> bool:
        return len(self.classes) == 3


def _divided(files: str, *classes: int) -> Release:
    return Release(files, classes, tuple({"mode": mode} for mode in ("train", "validation", "test")))


def _pooled(files: str, classes: int, argument: str = "", values: tuple[Any, ...] = (), **others: Any) -> Release:
    return Release(files, (classes,), tuple({argument: value} for value in values) or ({},), **others)


BOTH = ("train", (True, False))
TWO = ("split", ("train", "test"))
THREE = ("split", ("train", "val", "test"))
RELEASES = {
    "learn2learn": {
        "CIFARFS": _divided("cifarfs", 64, 16, 20),
        "CUBirds200": _divided("cubirds200", 140, 30, 30),
        "DescribableTextures": _divided("describable_textures", 33, 7, 7),
        "FC100": _divided("FC100_*.pickle", 60, 20, 20),
        "FGVCAircraft": _divided("fgvc_aircraft", 70, 15, 15),
        "FGVCFungi": _divided("fgvc_fungi", 994, 200, 200),
        "FullOmniglot": _pooled("omniglot-py", 1623, shares=OMNIGLOT),
        "MiniImagenet": _divided("mini-imagenet-cache-*.pkl", 64, 16, 20),
        "Quickdraw": _divided("quickdraw", 241, 52, 52),
        "TieredImagenet": _divided("tiered-imagenet", 351, 97, 160),
        "VGGFlower102": _divided("vgg_flower102", 71, 15, 16),
    },
    "torchvision": {
        "CIFAR10": _pooled("cifar-10-batches-py", 10, *BOTH),
        "CIFAR100": _pooled("cifar-100-python", 100, *BOTH),
        "Caltech101": _pooled("caltech101", 101),
        "Caltech256": _pooled("caltech256", 257),
        "Country211": _pooled("country211", 211, "split", ("train", "valid", "test")),
        "DTD": _pooled("dtd", 47, *THREE),
        "EMNIST": _pooled("EMNIST", 47, *BOTH, options={"split": "balanced"}),
        "EuroSAT": _pooled("eurosat", 10),
        "FER2013": _pooled("fer2013", 7, *TWO),
        "FGVCAircraft": _pooled("fgvc-aircraft-2013b", 100, *THREE),
        "FashionMNIST": _pooled("FashionMNIST", 10, *BOTH),
        "Flowers102": _pooled("flowers-102", 102, *THREE),
        "Food101": _pooled("food-101", 101, *TWO),
        "GTSRB": _pooled("gtsrb", 43, *TWO),
        "Imagenette": _pooled("imagenette2*", 10, "split", ("train", "val")),
        "KMNIST": _pooled("KMNIST", 10, *BOTH),
        "MNIST": _pooled("MNIST", 10, *BOTH),
        "Omniglot": _pooled("omniglot-py", 1623, "background", (True, False), shares=OMNIGLOT),
        "OxfordIIITPet": _pooled("oxford-iiit-pet", 37, "split", ("trainval", "test")),
        "QMNIST": _pooled("QMNIST", 10, *BOTH),
        "SEMEION": _pooled("semeion.data", 10),
        "STL10": _pooled("stl10_binary", 10, *TWO),
        "SUN397": _pooled("SUN397", 397),
        "SVHN": _pooled("*_32x32.mat", 10, *TWO),
        "StanfordCars": _pooled("stanford_cars", 196, *TWO),
        "USPS": _pooled("usps*.bz2", 10, *BOTH),
    },
}


class Files(NamedTuple):
    """A data set's files below a root, and the library that reads them."""

    library: str
    dataset: str
    release: Release
    root: Path
    changes: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return {**self.release.options, **self.changes}

    def found(self) -> list[Path]:
        """What is there, whole or not."""
        return sorted(self.root.glob(self.release.files))

    def listing(self) -> str:
        """A digest of the names, sizes and times of all files, without what the libraries make of others of them."""
        paths: list[Path] = []
        for top in self.found():
            for folder, names in files.walk(top, lambda name: name != "processed"):
                paths += [folder / name for name in names]
            if top.is_file():
                paths.append(top)
        return listing((str(path.relative_to(self.root)), path) for path in paths)

    def download(self) -> None:
        """Has the library download the data set: into a folder of its own, and from there to the root when it is whole.

        Raises:
            UserError: Nothing may be downloaded now, the library cannot download it, or the root cannot be written.
        """
        refuse_where_none_may(f"data.dataset={self.dataset}: there is no {self.release.files} in {self.root}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with files.locked(self.root / f".{self.dataset}.lock", f"data {self.dataset}: another process prepares it"):
                if self.found():
                    return
                aside = self.root / f".{self.dataset}.download"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                try:
                    for part in self.release.parts:
                        self._replace(root=aside).open(part, download=True)
                    for path in self._replace(root=aside).found():
                        path.rename(self.root / path.name)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"data root {self.root}: cannot be written ({files.unwritable(error)}), but {self.dataset} is to be "
                "downloaded there; set METARUN_DATA to another folder"
            ) from error

    def open(self, part: dict[str, Any], download: bool = False) -> Any:
        """The library's own object for a part of the images.

        Args:
            part: The arguments that name the part.
            download: Whether the library downloads what is missing.

        Raises:
            UserError: The library has no such setting, or cannot read or download the part.
        """
        cls = self._class()
        known = inspect.signature(cls).parameters
        arguments = {**self.options, **part, "download": download}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            allowed = set(known) - OURS - set(part)
            for name in self.changes:
                if name not in allowed:
                    raise UserError(
                        f"data.options.{name}: {self.library}'s {self.dataset} has no such setting"
                        f"{nearest(name, allowed) or '; it has ' + (listed(sorted(allowed)) or 'none')}"
                    )
            if "download" not in known:
                del arguments["download"]
                if download:
                    raise UserError(
                        f"data.download: {self.library} cannot download {self.dataset}; put {self.release.files} "
                        f"into {self.root.parent}"
                    )
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where they tell what they do
                return cls(root=str(self.root), **arguments)
        except Exception as error:  # each class raises its own
            what, where = self.release.files, self.root
            did, advice = "read", f"if {what} in {where} is incomplete, remove it and set data.download=true"
            if download:
                did, advice = "download", f"if {what} can be had elsewhere, put it into {where.parent}"
            raise UserError(
                f"data.dataset={self.dataset}: {self.library} cannot {did} it ({first_line(error)}); {advice}"
            ) from error

    def images(self, part: dict[str, Any]) -> Iterator[tuple[Image.Image, str | int]]:
        """Image and class, by its name or else by its number, of all images of a part that have a label.

        Args:
            part: The arguments that name the part.

        Raises:
            UserError: The library cannot read an image.
        """
        data = self.open(part)
        names = _names(data)
        for index in range(len(data)):
            try:
                image, label = data[index]
                if label is not None:
                    yield _picture(image), names[int(label)] if names else int(label)
            except Exception as error:
                raise UserError(
                    f"data.dataset={self.dataset}: {self.library} cannot read image {index} of {part} in {self.root} "
                    f"({first_line(error)})"
                ) from error

    def _class(self) -> Any:
        module = peers.learn2learn().vision if self.library == "learn2learn" else peers.torchvision()
        try:
            return getattr(module.datasets, self.dataset)
        except AttributeError:
            raise UserError(
                f"data.dataset={self.dataset}: the {self.library} installed is too old to have it"
            ) from None


def _names(data: Any) -> list[str]:
    """The names of the library's class numbers, where it has any."""
    inner = getattr(data, "dataset", None)  # learn2learn's FullOmniglot is made of two of torchvision's
    parts = getattr(inner, "datasets", [data])
    for attribute in ("classes", "categories", "_characters", "class_idx"):
        if names := [name for part in parts for name in getattr(part, attribute, [])]:
            return [name if isinstance(name, str) else ", ".join(name) for name in names]
    return []


def _picture(image: Any) -> Image.Image:
    """What a library yields as an image: Pillow's, an array `[H, W]` or `[H, W, C]`, or a tensor `[C, H, W]`."""
    if isinstance(image, Image.Image):
        return image
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    whole = pixels.astype(np.uint8)
    if (whole != pixels).any():
        raise ValueError("pixels that are not whole numbers from 0 to 255")
    return Image.fromarray(whole)
