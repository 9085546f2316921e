"""Images in one folder per class: anybody's own data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metarun.config.types import FilePath, Len, PositiveFloat, PositiveInt, Seed
from metarun.data.source import ImageSource, Split
from metarun.data.splits import SPLITS, check_ratios, divide, with_validation
from metarun.data.table import ClassImages, cached, listing
from metarun.errors import UserError, nearest

GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's modes without colour
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # and whatever begins with a dot
THREADS = 4

log = logging.getLogger("metarun")


class ClassFolder(NamedTuple):
    """One class and its files by name; `part` is the sub-folder (train, val, test) that it lies in, or empty."""

    name: str
    part: str
    path: Path
    files: list[str]


class Folder(ImageSource):
    """Images in one folder per class, `[channels, image_size, image_size]`.

    `root` holds the class folders, or sub-folders `train`, `test` and perhaps `val` that hold them. The classes are
    divided among the splits by, in this order:
    - these sub-folders. Where each holds the same classes they divide the images instead, as for a target, and what
      follows divides the classes;
    - `train_classes`, `val_classes` and `test_classes` (a class in none of them is left out);
    - `ratios` (three positive numbers that sum to 1; default 0.64, 0.16, 0.2), drawn by `split_seed`, which is not the
      run's seed; each split has at least one class. Of fewer than three classes every split has all: a target, no source.
    Where sub-folders or lists name no validation classes, a share of the training classes is drawn for them: that of
    `ratios`.

    An image is any file that Pillow opens (of an animation the first frame). It is turned as its EXIF data say, its
    short side resized to `image_size` (Lanczos) and its long side cropped to the centre. Transparent parts become white;
    16 bits become 8, the full range kept; `channels` is 1, 3, or null for 1 if all images are grey and 3 otherwise.
    Hidden files are ignored.
    `skip_bad` leaves out files that are no whole images, and counts them as `skipped` in `result.json`; without it they
    are errors. `normalize` and `rotations` are those of `ImageSource`.

    The table is cached under the root, the names, sizes and times of all files and the settings: a change of a file
    makes a new table. Raises `UserError` for a folder, file, list or ratio that does not fit the above.

    Args:
        root: The folder of class folders, or of train, val (optional) and test folders that hold them.
        image_size: The side of an image in pixels.
        channels: The channels of an image; null is 1 if all images are grey, 3 otherwise.
        split_seed: The seed of the division of the classes.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        train_classes: The names of the training classes, for example [cat, dog]; null draws them.
        val_classes: The names of the validation classes; null draws them.
        test_classes: The names of the test classes; null draws them.
        rotations: Whether each class turned by 90, 180 and 270 degrees counts as further classes.
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
        skip_bad: Whether files that are no whole images are left out and counted; otherwise they are errors.
    """

    def __init__(
        self,
        *,
        root: FilePath,
        image_size: PositiveInt = 84,
        channels: Literal[1, 3] | None = None,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        train_classes: list[str] | None = None,
        val_classes: list[str] | None = None,
        test_classes: list[str] | None = None,
        rotations: bool = False,
        normalize: bool = True,
        skip_bad: bool = False,
    ) -> None:
        shares = check_ratios(ratios)
        folder = Path(root).expanduser().absolute()
        classes = _list(folder)
        lists = (train_classes, val_classes, test_classes)
        origin = {"key": "data.root", "where": str(folder)}
        names = list(dict.fromkeys(entry.name for entry in classes))
        splits: dict[Split, Sequence[int]]
        ordinary = len(names) < len(classes)  # the same classes in each sub-folder, other images
        if ordinary or not classes[0].part:
            if len(names) < len(SPLITS) and not any(chosen is not None for chosen in lists):
                splits = {split: range(len(names)) for split in SPLITS}  # for a target, which needs no other classes
            else:
                splits = divide(names, lists, shares, split_seed, kind="class folder", **origin)
        elif any(names is not None for names in lists):
            raise UserError(
                f"data.train_classes, val_classes, test_classes: {folder} is divided by its train and test folders already"
            )
        else:
            parts: dict[Split, list[int]] = {
                split: [i for i, entry in enumerate(classes) if entry.part == split] for split in SPLITS
            }
            splits = with_validation(parts, shares, split_seed, **origin)
        key = {
            "root": str(folder), "listing": listing(_files(classes)), "image_size": image_size, "channels": channels, "skip_bad": skip_bad,
        }  # fmt: skip

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            depth = channels or (1 if _all_grey(classes) else 3)
            skipped = 0
            counts = {str(split): [0] * len(names) for split in SPLITS}
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
                for number, name in enumerate(names):
                    images: list[np.ndarray] = []
                    for entry in [entry for entry in classes if entry.name == name]:
                        paths = [entry.path / file for file in entry.files]
                        decoded = pool.map(lambda path: _decode(path, image_size, depth, skip_bad), paths)
                        whole = [image for image in decoded if image is not None]
                        if not whole:
                            raise UserError(f"data.root: all files of the class folder {entry.path} are bad images")
                        skipped += len(paths) - len(whole)
                        counts[entry.part or "train"][number] = len(whole)
                        images += whole
                    yield ClassImages(name, "" if ordinary else entry.part, np.stack(images))
            if skip_bad:
                metadata["skipped"] = skipped
            if ordinary:
                metadata["parts"] = counts

        super().__init__(cached("folder", key, build), splits, rotations=rotations, normalize=normalize)
        files = [
            os.path.relpath(entry.path / file, folder)
            for name in names
            for entry in classes
            if entry.name == name
            for file in entry.files
        ]
        # Where bad files were left out, it is not known which: places in the classes are told instead.
        self.files = files if len(files) == len(self.table.images) else None

    def identities(self, rows: np.ndarray) -> list[str]:
        """The file of each row of the table, below the root."""
        return super().identities(rows) if self.files is None else [self.files[row] for row in rows]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in LITTER),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        raise UserError(f"data.root: folder {folder} cannot be read ({error.strerror})") from error


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _list(root: Path) -> list[ClassFolder]:
    """All classes by sub-folder and name, with at least one file each."""
    if not root.is_dir():
        if root.exists():
            raise UserError(f"data.root: {root} is a file; it must be a folder with one folder per class")
        siblings = _folders(root.parent) if root.parent.is_dir() else []
        raise UserError(f"data.root: there is no folder {root}{nearest(root.name, siblings)}")
    names = _folders(root)
    parts = [name for name in SPLITS if name in names]
    inside = {part: _folders(root / part) for part in parts}
    if any(inside.values()):
        lacking = [part for part in SPLITS if (part != "val" or part in parts) and not inside.get(part)]
        if lacking:
            raise UserError(
                f"data.root: {root} is divided into {', '.join(parts)}, but there are no class folders in {lacking[0]}"
            )
        if others := [name for name in names if name not in SPLITS]:
            log.warning("data folder: of %s only %s are read, not %s", root, ", ".join(parts), ", ".join(others))
        classes = [_class(root / part / name, part) for part in parts for name in inside[part]]
        if all(inside[part] == inside["train"] for part in parts):
            return classes
        homes: dict[str, str] = {}
        for entry in classes:
            if homes.setdefault(entry.name, entry.part) != entry.part:
                raise UserError(
                    f"data.root: class {entry.name} is in both {homes[entry.name]} and {entry.part} of {root}; "
                    "splits of classes must not overlap"
                )
        return classes
    if not names:
        if _visible(root):
            raise UserError(
                f"data.root: {root} holds files but no class folders; put the images of each class into a folder of its own"
            )
        raise UserError(f"data.root: folder {root} is empty")
    return [_class(root / name, "") for name in names]


def _class(path: Path, part: str) -> ClassFolder:
    files = []
    for entry in _visible(path):
        if entry.is_dir():
            raise UserError(
                f"data.root: {entry.path} is a folder inside a class folder; class folders hold images alone"
            )
        files.append(entry.name)
    if not files:
        raise UserError(f"data.root: the class folder {path} is empty")
    return ClassFolder(path.name, part, path, files)


def _files(classes: Sequence[ClassFolder]) -> Iterator[tuple[str, Path]]:
    for entry in classes:
        for file in entry.files:
            yield f"{entry.part}/{entry.name}/{file}", entry.path / file


def _all_grey(classes: Sequence[ClassFolder]) -> bool:
    """Whether no image has colour, by the files' headers; files that cannot be opened are left to `_decode`."""
    for entry in classes:
        for file in entry.files:
            try:
                with Image.open(entry.path / file) as image:
                    if image.mode not in GREY:
                        return False
            except (OSError, Image.DecompressionBombError):
                continue
    return True


def _decode(path: Path, size: int, channels: int, skip_bad: bool) -> np.ndarray | None:
    """One image, uint8 `[channels, size, size]`; None for one that is skipped."""
    try:
        with Image.open(path) as file:
            return square(ImageOps.exif_transpose(file), size, channels)
    except Exception as error:  # the decoders raise whatever a broken file provokes
        if isinstance(error, OSError) and error.errno is not None and path.exists():
            raise  # of the disk, not of the image: never skipped
        if skip_bad:
            return None
        reason = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(
            f"data.root: {path} is not a whole image ({reason}); remove it, or leave such files out with data.skip_bad=true"
        ) from error


def square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Its middle as uint8 `[channels, size, size]`, resized (Lanczos); channels are 1 or 3, what is transparent is white."""
    image = _eight_bits(image).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Eight bits a channel, on white where transparent; grey stays grey."""
    if image.mode.startswith("I"):  # 16 bits; Pillow widens some of them to 32
        return Image.fromarray(((np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        grey = image.mode in GREY
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
        return image.convert("L" if grey else "RGB")
    return image
