"""The data sets of torchvision and learn2learn, read and downloaded by these libraries' own classes.

Their files are trusted as the libraries trust them: learn2learn's mini-ImageNet, tiered-ImageNet, FC100 and aircraft, and
torchvision's CIFAR, are pickles, which run code when they are loaded. torchvision compares checksums first, learn2learn
does not.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np

from metarun.config.types import FilePath, Len, PositiveFloat, PositiveInt, Seed
from metarun.data.decoding import GREY, square
from metarun.data.image_source import ImageSource
from metarun.data.library_catalog import RELEASES, Files
from metarun.data.roots import cache_root, data_root
from metarun.data.source import Split
from metarun.data.splits import SPLITS, check_ratios, divide
from metarun.data.table import ClassImages, cached
from metarun.errors import UserError, nearest
from metarun.files import typed_path
from metarun.text import listed

LARGEST = 84  # pixels of a side where data.image_size is null


class Library(ImageSource):
    """A data set of learn2learn or torchvision, `[channels, image_size, image_size]`.

    learn2learn's data sets come divided into training, validation and test classes, but for FullOmniglot. torchvision
    divides the images of each class, which says nothing of new classes: all labelled images of a class are pooled, as
    CIFAR-FS and FC100 were made of CIFAR-100, and the classes are divided as `data=folder` divides them, by
    `train_classes`, `val_classes` and `test_classes` or by `ratios` and `split_seed`. Omniglot's are 1100, 100 and 423.

    `root` (default: `METARUN_DATA`/`library`) is the library's own root; what is not there is downloaded by the
    library's class if `download` is true. `options` are further arguments of that class (`{split: letters}` of EMNIST).
    `image_size`, `channels`, `rotations` and `normalize` are those of `data=folder`; `image_size` null takes the first
    image's, if that is a square of at most 84 pixels, and 84 otherwise. Images have the pixels that the library yields.

    The table is cached under the names, sizes and times of the files and the settings; the library is imported to
    make it and not to use it. A class's images are ordered by their content and named classes by their names, for the
    libraries take both as the file system lists them. Raises `UserError` for an unknown data set, a library that is
    not installed, files that are missing or cannot be read, and a number of classes other than the published one.

    Args:
        library: The library.
        dataset: The class of torchvision.datasets or learn2learn.vision.datasets: CIFAR100, MiniImagenet, ...
        root: The library's own root; null is <METARUN_DATA>/ and the name of the library.
        download: Whether the library downloads what is not there.
        options: Further arguments of the library's class: {split: letters} for EMNIST.
        image_size: The side of an image in pixels; null is the first image's, if that is a square of at most 84
            pixels, otherwise 84.
        channels: The channels of an image; null is 1 if all images are grey, 3 otherwise.
        split_seed: The seed of the division of the classes, where the library does not divide them.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2], of
            Omniglot 1100, 100 and 423 classes.
        train_classes: The names of the training classes; null draws them.
        val_classes: The names of the validation classes; null draws them.
        test_classes: The names of the test classes; null draws them.
        rotations: Whether each class turned by 90, 180 and 270 degrees counts as further classes.
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
    """

    def __init__(
        self,
        *,
        library: Literal["learn2learn", "torchvision"],
        dataset: str,
        root: FilePath | None = None,
        download: bool = False,
        options: dict[str, Any] | None = None,
        image_size: PositiveInt | None = None,
        channels: Literal[1, 3] | None = None,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        train_classes: list[str] | None = None,
        val_classes: list[str] | None = None,
        test_classes: list[str] | None = None,
        rotations: bool = False,
        normalize: bool = True,
    ) -> None:
        known = RELEASES[library]
        if dataset not in known:
            hint = nearest(dataset, known) or f"; there are {listed(known)}"
            raise UserError(f"data.dataset={dataset}: is no data set of {library} that metarun knows{hint}")
        release = known[dataset]
        lists = (train_classes, val_classes, test_classes)
        chosen = any(names is not None for names in lists)
        if release.divided and (chosen or ratios is not None):
            raise UserError(
                f"data.ratios, train_classes, val_classes, test_classes: {library} itself divides {dataset}"
            )
        shares = check_ratios(ratios, release.shares)
        folder = typed_path(root).absolute() if root else data_root() / library
        files = Files(library, dataset, release, folder, options or {})
        if not files.found():
            if not download:
                raise UserError(
                    f"data.dataset={dataset}: there is no {release.files} in {folder}; put {library}'s files there, "
                    "or have it download them with data.download=true"
                )
            files.download()
        key = {
            "root": str(folder), "listing": files.listing(), "options": files.options, "image_size": image_size,
            "channels": channels,
        }  # fmt: skip
        table = cached(f"{library}-{dataset}", key, lambda metadata: _build(files, image_size, channels, metadata))
        if release.divided:
            groups = np.array(table.groups)
            splits: dict[Split, Any] = {split: np.flatnonzero(groups == split) for split in SPLITS}
            self.split = f"{library}'s own"
        else:
            splits = divide(table.names, lists, shares, split_seed, key="data.dataset", where=dataset)
            self.split = "classes as listed" if chosen else f"classes drawn by split_seed {split_seed}"
        super().__init__(table, splits, rotations=rotations, normalize=normalize)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "split": self.split}


def _build(files: Files, size: int | None, channels: int | None, metadata: dict[str, Any]) -> Iterator[ClassImages]:
    """The classes of all parts, through a file on disk: libraries yield images in any order, and once is slow enough."""
    release = files.release
    rows: dict[tuple[str, str | int], list[int]] = {}
    digests: list[bytes] = []
    grey = True
    with tempfile.TemporaryFile(dir=cache_root()) as spool:
        for number, part in enumerate(release.parts):
            group = SPLITS[number] if release.divided else ""
            for image, name in files.images(part):
                width, height = image.size
                size = size or (width if width == height <= LARGEST else LARGEST)
                grey = grey and image.mode in GREY
                pixels = square(image, size, channels or 3).pixels
                rows.setdefault((group, name), []).append(len(digests))
                digests.append(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest())
                _write(spool, pixels)
        if not files.changes:
            _check(files, rows)
        spool.flush()
        shape = (len(digests), channels or 3, size, size)
        table = np.memmap(spool, np.uint8, "r", shape=shape)  # type: ignore[call-overload]
        depth = channels or (1 if grey else 3)
        for split, name in sorted(rows, key=lambda key: ([*SPLITS, ""].index(key[0]), key[1])):
            members = sorted(rows[split, name], key=digests.__getitem__)
            yield ClassImages(str(name), split, table[members, :depth])
    metadata["dataset"] = f"{files.library} {files.dataset}"


def _check(files: Files, rows: dict[tuple[str, str | int], list[int]]) -> None:
    groups: tuple[str, ...] = SPLITS if files.release.divided else ("",)
    for group, published in zip(groups, files.release.classes, strict=True):
        found = sum(key[0] == group for key in rows)
        if found != published:
            raise UserError(
                f"data.dataset={files.dataset}: {files.root} holds {found}{group and ' '}{group} classes, published are "
                f"{published}; {files.release.files} may be incomplete"
            )


def _write(spool: Any, pixels: np.ndarray) -> None:
    try:
        spool.write(np.ascontiguousarray(pixels).data)
    except OSError as error:
        raise UserError(
            f"data cache {cache_root()}: cannot be written ({error.strerror or error}); set METARUN_CACHE to another folder"
        ) from error
