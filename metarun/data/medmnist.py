"""MedMNIST: standardised medical images of many kinds, divided by their publishers into training, validation and test.

Yang, Shi, Wei and others 2023, "MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image
classification". The table below is that of the package medmnist 3.0.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from metarun.config.types import FilePath, Len, PositiveFloat, PositiveInt, Seed
from metarun.data.archives import BROKEN_ARCHIVE, refuse_larger
from metarun.data.download import download as fetch
from metarun.data.download import refuse_file
from metarun.data.image_ops import Labelled, by_class, for_episodes
from metarun.data.image_source import ImageSource
from metarun.data.roots import data_root
from metarun.data.source import Split
from metarun.data.splits import SPLITS
from metarun.data.table import ClassImages, cached, inside, listing
from metarun.errors import UserError, nearest
from metarun.files import typed_path

ADDRESS = "https://zenodo.org/records/10519652/files/"
RESOLUTIONS = (28, 64, 128, 224)  # pixels of a side, a file each


class Published(NamedTuple):
    """One data set as published."""

    classes: int
    channels: int
    images: tuple[int, int, int]  # for training, validation and testing
    checksums: tuple[str, str, str, str]  # MD5 of the file of each resolution


# fmt: off
RELEASES = {
    "pathmnist": Published(9, 3, (89_996, 10_004, 7_180), (
        "a8b06965200029087d5bd730944a56c1", "55aa9c1e0525abe5a6b9d8343a507616",
        "ac42d08fb904d92c244187169d1fd1d9", "2c51a510bcdc9cf8ddb2af93af1eadec")),
    "dermamnist": Published(7, 3, (7_007, 1_003, 2_005), (
        "0744692d530f8e62ec473284d019b0c7", "b70a2f5635c6199aeaa28c31d7202e1f",
        "2defd784463fa5243564e855ed717de1", "8974907d8e169bef5f5b96bc506ae45d")),
    "octmnist": Published(4, 1, (97_477, 10_832, 1_000), (
        "c68d92d5b585d8d81f7112f81e2d0842", "e229e9440236b774d9f0dfef9d07bdaf",
        "0a97e76651ace45c5d943ee3f65b63ae", "abc493b6d529d5de7569faaef2773ba3")),
    "pneumoniamnist": Published(2, 1, (4_708, 524, 624), (
        "28209eda62fecd6e6a2d98b1501bb15f", "8f4eceb4ccffa70c672198ea285246c6",
        "05b46931834c231683c68f40c47b2971", "d6a3c71de1b945ea11211b03746c1fe1")),
    "retinamnist": Published(5, 3, (1_080, 120, 400), (
        "bd4c0672f1bba3e3a89f0e4e876791e4", "afda852cc34dcda56f86ad2b2457dbcc",
        "e48e916a24454daf90583d4e6efb1a18", "eae7e3b6f3fcbda4ae613ebdcbe35348")),
    "breastmnist": Published(2, 1, (546, 78, 156), (
        "750601b1f35ba3300ea97c75c52ff8f6", "742edef2a1fd1524b2efff4bd7ba9364",
        "363e4b3f8d712e9b5de15470a2aaadf1", "b56378a6eefa9fed602bb16d192d4c8b")),
    "bloodmnist": Published(8, 3, (11_959, 1_712, 3_421), (
        "7053d0359d879ad8a5505303e11de1dc", "2b94928a2ae4916078ca51e05b6b800b",
        "adace1e0ed228fccda1f39692059dd4c", "b718ff6835fcbdb22ba9eacccd7b2601")),
    "tissuemnist": Published(8, 1, (165_466, 23_640, 47_280), (
        "ebe78ee8b05294063de985d821c1c34b", "123ece2eba09d0aa5d698fda57103344",
        "61b955355d7425a89687b06cca3ce0c2", "b077128c4a949f0a4eb01517f9037b9c")),
    "organamnist": Published(11, 1, (34_561, 6_491, 17_778), (
        "68e3f8846a6bd62f0c9bf841c0d9eacc", "2dcccc29b88e6da5a01161ef20cda288",
        "eeae80d0a227a8d099027e1b3cfd3b60", "50747347e05c87dd3aaf92c49f9f3170")),
    "organcmnist": Published(11, 1, (12_975, 2_392, 8_216), (
        "b9ceb9546e10131b32923c5bbeaea2b1", "3ce34a8724ea6f548e6db4744d03b6a9",
        "773c1f009daa3fe5d9a2a201b2a7ed94", "050f5e875dc056f6768abf94ec9995d1")),
    "organsmnist": Published(11, 1, (13_932, 2_452, 8_827), (
        "9ab87b696fb54e2a387ebe992d6ed5f1", "53a6d115339d874c25e309a994ff46d3",
        "ded0c5fa01a95dc4978b956f613e9b8e", "b354719e553fbbb2513d5533f52a4cb1")),
}
# fmt: on
NAMES = {"pneumoniamnist": ["normal", "pneumonia"], "breastmnist": ["malignant", "normal or benign"]}  # others: numbers


class MedMnist(ImageSource):
    """A two-dimensional, single-label data set of MedMNIST by its `flag`, `[channels, image_size, image_size]`.

    Ordinary training, validation and testing take the official parts. For episodes the classes are divided by `ratios`
    and `split_seed`; two classes are in every split.

    `resolution` is that of the published file: `FLAG.npz` for 28, otherwise `FLAG_RESOLUTION.npz`. It is looked for in
    `root` (default: `METARUN_DATA`/medmnist) and downloaded there if `download` is true. A file that is there and has the
    published numbers of images is taken even if its checksum is another, which `result.json` then says. `image_size` null
    is the resolution, `channels` null the file's. `normalize` is that of `ImageSource`.

    Raises `UserError` for an unknown, a three-dimensional and a multi-label flag, and for a file that is missing, broken or
    of other numbers of images.

    Args:
        flag: The data set: bloodmnist, pathmnist, dermamnist, octmnist, pneumoniamnist, retinamnist,
            breastmnist, tissuemnist, organamnist, organcmnist or organsmnist.
        root: The folder with <flag>.npz; null is <METARUN_DATA>/medmnist.
        download: Whether a file that is not there is downloaded from https://zenodo.org/records/10519652.
        resolution: The side in pixels of the published images, in <flag>.npz, <flag>_64.npz and so on.
        image_size: The side of an image in pixels; null is the resolution.
        channels: The channels of an image; null is the file's.
        split_seed: The seed of the division of the classes for episodes; two classes are in every split.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
    """

    classes_in = ()

    def __init__(
        self,
        *,
        flag: str,
        root: FilePath | None = None,
        download: bool = True,
        resolution: Literal[28, 64, 128, 224] = 28,
        image_size: PositiveInt | None = None,
        channels: Literal[1, 3] | None = None,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        normalize: bool = True,
    ) -> None:
        release = _release(flag)
        self.as_target = f"target=medmnist target.data.flag={flag}"
        name = f"{flag}.npz" if resolution == RESOLUTIONS[0] else f"{flag}_{resolution}.npz"
        checksum = release.checksums[RESOLUTIONS.index(resolution)]
        path = (typed_path(root).absolute() if root else data_root() / "medmnist") / name
        if not path.is_file():
            refuse_file(path.parent)
            if not download:
                raise UserError(
                    f"data {flag}: {path} is missing; put it there from {ADDRESS}{name}, or set data.download=true"
                )
            fetch(f"{ADDRESS}{name}?download=1", path, checksum=checksum)
        key = {"files": listing(inside(path)), "image_size": image_size, "channels": channels}

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            parts = _read(path, flag, release, resolution)
            if _md5(path) != checksum:
                metadata["file"] = (
                    f"{name} is not the published file (other MD5), its numbers of images are the published ones"
                )
            names = NAMES.get(flag) or [str(number) for number in range(release.classes)]
            return by_class(names, parts, metadata, size=image_size, channels=channels)

        table, splits = for_episodes(cached(flag, key, build), ratios, split_seed, flag)
        super().__init__(table, splits, normalize=normalize)


def _release(flag: str) -> Published:
    if flag == "chestmnist":
        raise UserError(
            "data.flag=chestmnist: its images have several labels each, and metarun's classes exclude each other"
        )
    if flag.endswith("3d"):
        raise UserError(
            f"data.flag={flag}: metarun reads MedMNIST's two-dimensional images alone; there are {', '.join(RELEASES)}"
        )
    if flag not in RELEASES:
        raise UserError(
            f"data.flag={flag}: is no data set of MedMNIST{nearest(flag, RELEASES) or '; there are ' + ', '.join(RELEASES)}"
        )
    return RELEASES[flag]


def _read(path: Path, flag: str, release: Published, side: int) -> dict[Split, Labelled]:
    """Images and labels `[n]` of each part, of the published numbers and shape."""
    again = f"get it again from {ADDRESS}{path.name}"
    parts: dict[Split, Labelled] = {}
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:  # numpy leaves a broken one open
            pixels = sum(release.images) * side**2 * (3 if release.channels == 3 else 1)
            for member in file.zip.infolist():  # before any is unpacked; one of another type is told of below
                refuse_larger(member.filename, member.file_size, 8 * pixels)
            for split, count in zip(SPLITS, release.images, strict=True):
                images, labels = file[f"{split}_images"], file[f"{split}_labels"]
                shape = (count, side, side) + ((3,) if release.channels == 3 else ())
                if images.dtype != np.uint8 or images.shape != shape or labels.shape != (count, 1):
                    raise UserError(
                        f"data {flag}: {path}: {split} holds {images.dtype} images {list(images.shape)} and labels "
                        f"{list(labels.shape)}, published are uint8 {list(shape)} and {[count, 1]}; {again}"
                    )
                if labels.min() < 0 or labels.max() >= release.classes:
                    raise UserError(
                        f"data {flag}: {path}: {split} holds a label beyond 0 to {release.classes - 1}; {again}"
                    )
                parts[split] = images, labels[:, 0].astype(np.int64)
    except (TypeError, ValueError, KeyError, MemoryError, *BROKEN_ARCHIVE) as error:  # a header may ask for any memory
        raise UserError(f"data {flag}: {path} is not a whole npz file of MedMNIST's ({error}); {again}") from error
    return parts


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
