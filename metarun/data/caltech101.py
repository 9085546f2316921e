"""Caltech-101: photographs of objects, 31 to 800 of each kind.

Fei-Fei, Fergus and Perona 2004, "Learning generative visual models from few training examples".
"""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Annotated, Any, Literal

import numpy as np

from metarun.config.types import FilePath, Len, PositiveFloat, PositiveInt, Seed
from metarun.data.archives import BROKEN_ARCHIVE, LARGEST_PICTURE, content_of, refuse_larger
from metarun.data.download import download as fetch
from metarun.data.download import refuse_file
from metarun.data.file_names import visible
from metarun.data.image_ops import for_episodes, picture
from metarun.data.image_source import ImageSource
from metarun.data.roots import data_root
from metarun.data.table import ClassImages, cached, inside, listing
from metarun.errors import UserError
from metarun.files import typed_path

ADDRESS = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
CHECKSUM = "3138e1922a9193bfa496528edbbc45d0"  # MD5
INNER = "101_ObjectCategories"  # the official archive holds another of this name
PLACES = (  # where the images may lie, below the root
    INNER, f"caltech-101/{INNER}", "caltech101_84", f"{INNER}.tar.gz", f"caltech-101/{INNER}.tar.gz", "caltech-101.zip",
    "caltech101_84.zip",
)  # fmt: skip
# No kind of object, and the photographs of Faces once more, cut to the face.
LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")
CLASSES = 100  # without these two


class Caltech101(ImageSource):
    """100 kinds of objects, `[channels, image_size, image_size]`: the middle of each photograph, as `data=folder` takes it.

    `BACKGROUND_Google` is left out, for it is no kind of object, and so is `Faces_easy`, whose photographs are those of
    `Faces`: in episodes they could be in training and in testing. Ordinary training takes 80% of each class's images, see
    `ImageSource.labelled`. For episodes the classes are divided by `ratios` and `split_seed`.

    In `root` (default: `METARUN_DATA`/caltech101) are looked for: the folder or archive `101_ObjectCategories(.tar.gz)`,
    the official `caltech-101.zip` that holds it, and `caltech101_84` as a folder or `.zip` of class folders; the first is
    taken. If there is none, the official archive (131 MB) is downloaded if `download` is true. `channels` null is 3.
    `rotations` and `normalize` are those of `ImageSource`. Raises `UserError` for files that are missing or broken, and for
    another number of classes.

    Args:
        root: The folder with caltech-101.zip, 101_ObjectCategories or caltech101_84.zip; null is
            <METARUN_DATA>/caltech101.
        download: Whether the official archive (131 MB) is downloaded where there is none.
        image_size: The side of an image in pixels.
        channels: The channels of an image; null is 3.
        split_seed: The seed of the division of the classes for episodes.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        rotations: Whether each class turned by 90, 180 and 270 degrees counts as further classes.
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
    """

    classes_in = ("imagenet",)
    as_target = "target=caltech101"

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        download: bool = True,
        image_size: PositiveInt = 84,
        channels: Literal[1, 3] | None = 3,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        rotations: bool = False,
        normalize: bool = True,
    ) -> None:
        folder = typed_path(root).absolute() if root else data_root() / "caltech101"
        source = _find(folder, download)
        key = {"files": listing(inside(source)), "image_size": image_size, "channels": channels}

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            classes: dict[str, dict[str, np.ndarray]] = {}
            for kind, file, raw in pictures(source):
                if kind not in LEFT_OUT:
                    where = f"data caltech101: {source}: {kind}/{file}"
                    classes.setdefault(kind, {})[file] = picture(raw, image_size, channels or 3, where)
            if len(classes) != CLASSES:
                raise UserError(
                    f"data caltech101: {source} holds {len(classes)} classes besides {' and '.join(LEFT_OUT)}, published are "
                    f"{CLASSES}; get it again from {ADDRESS}"
                )
            metadata["files"] = source.name
            for kind, images in sorted(classes.items()):
                yield ClassImages(kind, "", np.stack([images[file] for file in sorted(images)]))

        table, splits = for_episodes(cached("caltech101", key, build), ratios, split_seed, "caltech101")
        super().__init__(table, splits, rotations=rotations, normalize=normalize)


def _find(folder: Path, may_download: bool) -> Path:
    refuse_file(folder)
    if (folder / "accordion").is_dir():  # the root is the folder of class folders itself
        return folder
    for place in PLACES:
        if (folder / place).exists():
            return folder / place
    if not may_download:
        raise UserError(
            f"data caltech101: there is no {INNER}, caltech-101.zip or caltech101_84.zip in {folder}; put caltech-101.zip "
            f"there from {ADDRESS}, or set data.download=true"
        )
    return fetch(ADDRESS, folder / "caltech-101.zip", checksum=CHECKSUM)


def pictures(source: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class folder, name and contents of every JPEG file in a folder, a `.zip` or `.tar.gz`, or the `.tar.gz` in a `.zip`.

    Raises `UserError` for an archive that is not whole.
    """
    if source.is_dir():
        for path in sorted(source.glob("*/*")):
            if _wanted(path):
                yield path.parent.name, path.name, path.read_bytes()
        return
    try:
        if source.suffix == ".gz":
            with open(source, "rb") as file:
                yield from _unpacked(file)
            return
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            for name in (name for name in names if PurePosixPath(name).name == f"{INNER}.tar.gz"):
                with archive.open(name) as file:
                    yield from _unpacked(file)
            for name, member in ((name, PurePosixPath(name)) for name in names):
                if _wanted(member):
                    yield member.parent.name, member.name, content_of(archive, name, LARGEST_PICTURE)
    except BROKEN_ARCHIVE as error:
        raise UserError(
            f"data caltech101: {source} is not a whole archive ({error}); get it again from {ADDRESS}"
        ) from error


def _unpacked(file: IO[bytes]) -> Iterator[tuple[str, str, bytes]]:
    with gzip.GzipFile(fileobj=file) as whole:  # tarfile's own takes a cut file for a whole one
        with tarfile.open(fileobj=whole, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and _wanted(path) and (inside := archive.extractfile(member)):
                    refuse_larger(member.name, member.size, LARGEST_PICTURE)
                    yield path.parent.name, path.name, inside.read()
        while whole.read(2**20):  # up to its checksum
            pass


def _wanted(path: PurePath) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg") and all(map(visible, path.parts[-2:]))
