"""MNIST: 70,000 handwritten digits.

LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition".
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from metarun.config.types import FilePath, Len, PositiveFloat, PositiveInt, Seed
from metarun.data.archives import BROKEN_ARCHIVE
from metarun.data.download import download as fetch
from metarun.data.download import refuse_file
from metarun.data.image_ops import by_class, drawn, for_episodes
from metarun.data.image_source import ImageSource
from metarun.data.roots import data_root
from metarun.data.table import ClassImages, cached, inside, listing
from metarun.errors import UserError
from metarun.files import typed_path

ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CHECKSUMS = {  # MD5, as torchvision compares them
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
COUNTS = {"train": 60_000, "t10k": 10_000}
SIDE = 28  # pixels
HELD_OUT = 0.1  # of the training images of each digit, for validation


class Mnist(ImageSource):
    """MNIST as white ink on black, `[channels, image_size, image_size]`, ten classes `0` to `9`.

    Ordinary training and testing take the official 60,000 and 10,000 images, a tenth of the training images of each digit
    being held out for validation by a fixed draw. For episodes the digits are divided by `ratios` and `split_seed`.

    The four IDX `.gz` files are looked for in `root` (default: `METARUN_DATA`/mnist) and downloaded there if `download` is
    true. `channels` null is 1. `normalize` is that of `ImageSource`. Raises `UserError` for files that are missing or
    broken, and for other numbers of images.

    Args:
        root: The folder with the four IDX .gz files; null is <METARUN_DATA>/mnist.
        download: Whether files that are not there are downloaded.
        image_size: The side of an image in pixels.
        channels: The channels of an image; null is 1.
        split_seed: The seed of the division of the digits for episodes.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
    """

    classes_in = ()
    as_target = "target=mnist"

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        download: bool = True,
        image_size: PositiveInt = SIDE,
        channels: Literal[1, 3] | None = None,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        normalize: bool = True,
    ) -> None:
        folder = typed_path(root).absolute() if root else data_root() / "mnist"
        paths = [_find(folder / name, checksum, download) for name, checksum in CHECKSUMS.items()]
        key = {"files": listing(inside(*paths)), "image_size": image_size, "channels": channels}

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            images, labels = (np.array(part) for part in _read(folder, "train"))
            held_out = drawn(labels, HELD_OUT, "mnist")
            parts = {
                "train": (images[~held_out], labels[~held_out]),
                "val": (images[held_out], labels[held_out]),
                "test": _read(folder, "t10k"),
            }
            return by_class([str(digit) for digit in range(10)], parts, metadata, size=image_size, channels=channels)  # type: ignore[arg-type]

        table, splits = for_episodes(cached("mnist", key, build), ratios, split_seed, "mnist")
        super().__init__(table, splits, normalize=normalize)


def _find(path: Path, checksum: str, may_download: bool) -> Path:
    if path.is_file():
        return path
    refuse_file(path.parent)
    if not may_download:
        raise UserError(
            f"data mnist: {path} is missing; put it there from {ADDRESS}{path.name}, or set data.download=true"
        )
    return fetch(ADDRESS + path.name, path, checksum=checksum)


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, 28, 28]` and labels `[n]` of a part."""
    count = COUNTS[part]
    images = idx(folder / f"{part}-images-idx3-ubyte.gz", (count, SIDE, SIDE))
    labels = idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,))
    if labels.max() > 9:
        raise UserError(
            f"data mnist: {folder}/{part}-labels-idx1-ubyte.gz: there is a label {labels.max()}, not 0 to 9"
        )
    return images, labels


def idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a gzipped IDX file, which must have this shape.

    IDX: two zero bytes, the kind of the values (8: unsigned bytes), the number of axes, the length of each as a big-endian
    32-bit integer, the values. Raises `UserError` for any other file.
    """
    start = 4 + 4 * len(shape)
    try:
        with gzip.open(path) as file:
            # A byte too many is refused below, and no further one is unpacked.
            raw = file.read(start + math.prod(shape) + 1)
    except BROKEN_ARCHIVE as error:
        raise UserError(
            f"data mnist: {path} is not a whole gzip file ({error}); get it again from {ADDRESS}{path.name}"
        ) from error
    if raw[:4] != bytes([0, 0, 8, len(shape)]) or len(raw) < start:
        raise UserError(
            f"data mnist: {path} is not an IDX file of {len(shape)}-dimensional bytes; get it again from {ADDRESS}{path.name}"
        )
    found = tuple(np.frombuffer(raw, ">u4", len(shape), 4).tolist())
    size, whole = len(raw) - start, math.prod(shape)
    if found != shape or size != whole:
        told = f"more than {whole}" if size > whole else f"{size}"
        raise UserError(
            f"data mnist: {path}: holds {told} bytes for shape {list(found)}, MNIST has {list(shape)}; "
            f"get it again from {ADDRESS}{path.name}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
