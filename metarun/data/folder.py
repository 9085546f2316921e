"""Images in one folder per class, or with a table of labels: anybody's own data set."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from metarun.config.types import Example, FilePath, Len, PositiveFloat, PositiveInt, Seed
from metarun.data.class_folders import ClassFiles, by_folders, by_labels, named
from metarun.data.decoding import (
    SIXTEEN_BITS,
    THREADS,
    Decoded,
    Range,
    all_grey,
    check_range,
    decode,
    little_left,
    too_small_a_part,
)
from metarun.data.decoding import value_range as values_of
from metarun.data.image_batches import Labelled
from metarun.data.image_source import ImageSource
from metarun.data.label_files import Columns
from metarun.data.source import Split
from metarun.data.splits import SPLITS, check_ratios, divide_or_keep
from metarun.data.table import ClassImages, cached, listing
from metarun.errors import UserError
from metarun.files import typed_path
from metarun.system import platform
from metarun.text import counted, printable, shell_path

log = logging.getLogger("metarun")

MASK = re.compile(r"(.+)[ _-](?:mask|segmentation|seg|gt)(?:[ _-]?\d+)?", re.IGNORECASE)


class Folder(ImageSource):
    """Images in one folder per class, or with a table of labels, `[channels, image_size, image_size]`.

    `root` holds the class folders, or sub-folders `train`, `test` and perhaps `val` that hold them. With `labels` it holds
    the images at any depth, and this table (CSV or TSV, in `root`) says with a column `file` and a column `label` which is of
    which class, and with a column `split`, or another one that names a part in each row, in which part. `file_column` and
    `label_column` name other columns; a column of 0 and 1 for each class is a label too. `labels` may also be a list of tables called
    train, val and test. The classes are divided among the splits by, in this order:
    - these parts. Where each holds the same classes (a rare one may lack in val or test) they divide the images instead, as for a
      target, and what follows divides the classes;
    - `train_classes`, `val_classes` and `test_classes` (a class in none of them is left out);
    - `ratios` (three positive numbers that sum to 1; default 0.64, 0.16, 0.2), drawn by `split_seed`, which is not the
      run's seed; each split has at least one class. Of fewer than three classes every split has all: a target, no source.
    Where sub-folders or lists name no validation classes, a share of the training classes is drawn for them: that of
    `ratios`.

    An image is any file that Pillow opens (of an animation the first frame; of a TIFF file the first page, and a line tells
    of further ones). It is turned as its EXIF data say, its short side resized to `image_size` (Lanczos) and its long side
    cropped to the centre. Transparent parts become white; `channels` is 1, 3, or null for 1 if all images are grey and 3
    otherwise. Hidden files are ignored.
    `value_range` says which values become black and white: `[low, high]`, with what lies between in proportion and what
    lies beyond cut off; `auto` for the smallest and the largest value of the training images; null for 8 bits as they
    are and 0 to 65535 of 16 and 32 bits, with a warning where the images make little of that. Floating-point images
    need a range. `result.json` tells under `values` what was mapped and what was used.
    `skip_bad` leaves out files that are no whole images, and counts them as `skipped` in `result.json`; without it they
    are errors. `normalize` and `rotations` are those of `ImageSource`.

    The table is cached under the root, the names, sizes and times of all files, their labels and the settings: a change
    of a file makes a new table. Raises `UserError` for a folder, file, table, list, range or ratio that does not fit the
    above.

    Args:
        root: The folder of class folders, or of train, val (optional) and test folders that hold them.
        labels: A table of file and label in the root, or a list of them called train, val and test; null: class folders.
        file_column: The column of the tables that names the image; null looks for file, image, image_id, path and the like.
        label_column: The column that names the class; null looks for label, class and the like, or a column of 0 and 1 a class.
        image_size: The side of an image in pixels.
        channels: The channels of an image; null is 1 if all images are grey, 3 otherwise.
        value_range: The values [low, high] that become black and white; auto: those of the training images; null: of the depth.
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
        labels: str | list[str] | None = None,
        file_column: str | None = None,
        label_column: str | None = None,
        image_size: PositiveInt = 84,
        channels: Literal[1, 3] | None = None,
        value_range: Annotated[list[float] | str | None, Example("[0, 255]")] = None,
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
        values = check_range(value_range)
        folder = typed_path(root).absolute()
        classes = classes_of(root, labels, file_column, label_column)
        of_class: dict[str, list[ClassFiles]] = {}
        for entry in classes:
            of_class.setdefault(entry.name, []).append(entry)
        names = list(of_class)
        _tell_of_capitals(names)
        _tell_of_masks(classes)
        ordinary = len(names) < len(classes)  # the same classes in each part, other images
        lists = (train_classes, val_classes, test_classes)
        kind = "class" if labels else "class folder"
        parts: dict[Split, list[int]] = {}
        if not ordinary and classes[0].part:
            parts = {split: [i for i, entry in enumerate(classes) if entry.part == split] for split in SPLITS}
        where = {"key": "data.root", "where": str(folder), "by": "its train and test folders"}
        splits = divide_or_keep(names, parts, lists, shares, split_seed, kind=kind, **where)
        self.range_of_classes = values == "auto" and not ordinary
        if self.range_of_classes and set(splits["train"]) & set(splits["test"]):
            self._refuse_auto()
        training = {names[number] for number in splits["train"]}
        seen = [entry for entry in classes if entry.name in training and (entry.part == "train" or not ordinary)]
        key = {
            "root": str(folder), "listing": listing(named(classes)), "image_size": image_size, "channels": channels,
            "skip_bad": skip_bad, "value_range": listing(named(seen)) if values == "auto" else values,
        }  # fmt: skip
        reading = _Reading(of_class, seen, ordinary, image_size, channels, values, skip_bad)
        super().__init__(cached("folder", key, reading.build), splits, rotations=rotations, normalize=normalize)
        own = {
            "labels": labels, "file_column": file_column, "label_column": label_column, "image_size": image_size,
            "channels": channels, "value_range": value_range, "skip_bad": skip_bad,
        }  # fmt: skip
        usual = inspect.signature(Folder).parameters
        typed = [
            shlex.quote(f"target.data.{key}={_typed(value)}")
            for key, value in own.items()
            if value != usual[key].default
        ]
        self.as_target = " ".join([f"target=folder target.data.root={shell_path(root)}", *typed])
        below = len(os.path.join(folder, ""))  # of all of them; `relpath` takes both paths apart for each
        files = [str(path)[below:] for entries in of_class.values() for entry in entries for path in entry.paths]
        # Where bad files were left out, it is not known which: places in the classes are told instead.
        self.files = files if len(files) == len(self.table.images) else None
        if values is not None:
            low, high = self.table.metadata["values"]["mapped"]
            self.mapped = (low, high)
        if several := self.table.metadata.get("files_of_several_pages"):
            log.warning(
                "data folder: of %s of several pages (TIFF) only the first page is read",
                counted(several, "file", "files"),
            )
        used = self.table.metadata.get("values", {}).get("used")
        if used and self.mapped is not None:
            if little_left(used, self.mapped):
                log.warning(
                    "data folder: images have values from %g to %g, of which data.value_range=[%g,%g] (of a target: "
                    "target.data.value_range) leaves few levels of grey, or black or white alone",
                    *used, *self.mapped,
                )  # fmt: skip
        elif used and too_small_a_part(used):
            log.warning(
                "data folder: images of 16 bits or more have values from %g to %g, of which 0 to 65535 become the 256 levels "
                "of grey; data.value_range=auto or data.value_range=[%g,%g] (of a target: target.data.value_range) makes more of "
                "them",
                *used, *used,
            )  # fmt: skip

    def identities(self, rows: np.ndarray) -> list[str]:
        """The file of each row of the table, below the root."""
        return super().identities(rows) if self.files is None else [self.files[row] for row in rows]

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        if self.range_of_classes and split is None:
            self._refuse_auto()
        return super().labelled(part, split)

    def _refuse_auto(self) -> None:
        """Raises `UserError` where the range would be that of images which are tested on."""
        raise UserError(
            "data.value_range=auto: is the range of the training images, but which images these are is not fixed here; "
            "give data.value_range=[low,high], or divide the images into train and test folders"
        )


def classes_of(
    root: str,
    labels: str | Sequence[str] | None,
    file_column: str | None,
    label_column: str | None,
    *,
    tell: bool = True,
) -> list[ClassFiles]:
    """Which files `Folder` reads, by class; none of them is opened.

    Args:
        root: As of `Folder`.
        labels: As of `Folder`.
        file_column: As of `Folder`.
        label_column: As of `Folder`.
        tell: Whether a line says which folders are not read.

    Raises:
        UserError: The folder or a table does not fit.
    """
    folder = typed_path(root).absolute()
    for name, column in {"file_column": file_column, "label_column": label_column}.items():
        if column and not labels:
            raise UserError(f"data.{name}={column}: is of a table of labels, and data.labels names none")
    if not labels:
        return by_folders(folder, tell=tell)
    return by_labels(folder, [labels] if isinstance(labels, str) else list(labels), Columns(file_column, label_column))


def _tell_of_capitals(names: Sequence[str]) -> None:
    """Warns of classes whose names differ in capitals alone, as one class has them that was written in two ways; letters may."""
    first: dict[str, str] = {}
    pairs = [
        (known, name) for name in names if len(name) > 1 and (known := first.setdefault(name.casefold(), name)) != name
    ]
    if pairs:
        more = f", and {len(pairs) - 1} more such" if len(pairs) > 1 else ""
        log.warning(
            "data folder: %s and %s, whose names differ in capitals alone%s, are two classes; if they are one, call them alike",
            *map(printable, pairs[0]), more,
        )  # fmt: skip


def _tell_of_masks(classes: Sequence[ClassFiles]) -> None:
    """Warns of files that are called as the mask of an image beside them, `1_mask.png` beside `1.png`: they are images of the class too."""
    masks: list[Path] = []
    for entry in classes:
        called = [(path, found[1]) for path in entry.paths if (found := MASK.fullmatch(path.stem))]
        stems = {(path.parent, path.stem) for path in entry.paths} if called else set()
        masks += [path for path, image in called if (path.parent, image) in stems]
    if masks:
        log.warning(
            "data folder: %s called as masks of images beside them, %s say, and read as images of their class; move them elsewhere if "
            "they are masks",
            "1 file is" if len(masks) == 1 else f"{len(masks)} files are", printable(f"{masks[0].parent.name}/{masks[0].name}"),
        )  # fmt: skip


def _typed(value: object) -> str:
    """A value of a setting as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


@dataclass(frozen=True)
class _Reading:
    """How the files of class folders become a table.

    Attributes:
        classes: What was found, by the names of the classes in the order of the table: of each an entry, or one for each part of it.
        seen: The entries whose images may be measured before any test.
        ordinary: Whether the parts hold the same classes, so that the table notes how many images each has of a class.
        image_size: The side of an image in pixels.
        channels: The channels of an image; None is 1 if all images are grey, 3 otherwise.
        values: The values that become black and white, `auto` for those of `seen`, None for those of the depth.
        skip_bad: Whether files that are no whole images are left out.
    """

    classes: Mapping[str, Sequence[ClassFiles]]
    seen: Sequence[ClassFiles]
    ordinary: bool
    image_size: int
    channels: int | None
    values: Range | str | None
    skip_bad: bool

    def build(self, metadata: dict[str, Any]) -> Iterator[ClassImages]:
        """The images class by class; notes in `metadata` what was left out, in which part images are, and what was mapped."""
        paths = [path for entries in self.classes.values() for entry in entries for path in entry.paths]
        depth = self.channels or (1 if all_grey(paths) else 3)
        counts = {str(split): [0] * len(self.classes) for split in SPLITS}
        used: list[Range] = []
        kept = several = 0
        with ThreadPoolExecutor(min(THREADS, len(platform.cores()))) as pool:
            mapped = _range_of(self.seen, pool) if isinstance(self.values, str) else self.values

            def one(path: Path) -> Decoded | None:
                return decode(path, self.image_size, depth, values=mapped, skip_bad=self.skip_bad)

            for number, (name, entries) in enumerate(self.classes.items()):
                images: list[np.ndarray] = []
                for entry in entries:
                    decoded = [found for found in pool.map(one, entry.paths) if found is not None]
                    if not decoded:
                        raise UserError(f"data.root: all files of {entry.where} are bad images")
                    counts[entry.part or "train"][number] = len(decoded)
                    images += [found.pixels for found in decoded]
                    used += [found.used for found in decoded if found.used]
                    several += sum(found.further_pages for found in decoded)
                kept += len(images)
                yield ClassImages(name, "" if self.ordinary else entry.part, np.stack(images))
        if self.skip_bad:
            metadata["skipped"] = len(paths) - kept
        if several:
            metadata["files_of_several_pages"] = several
        if self.ordinary:
            metadata["parts"] = counts
        if mapped is not None or used:
            metadata["values"] = self._described(mapped, used)

    def _described(self, mapped: Range | None, used: Sequence[Range]) -> dict[str, Any]:
        """What `result.json` says of the values that became black and white."""
        if mapped is not None and self.values == "auto":
            return {"mapped": list(mapped), "by": "the smallest and the largest value of the training images"}
        ends = [min(low for low, _ in used), max(high for _, high in used)]
        if mapped is not None:
            return {"mapped": list(mapped), "used": ends, "by": "data.value_range"}
        return {"mapped": list(SIXTEEN_BITS), "used": ends, "by": "the depth of 16 bits", "images": len(used)}


def _range_of(classes: Sequence[ClassFiles], pool: ThreadPoolExecutor) -> Range:
    """The smallest and the largest value of all images of these classes."""
    found = [ends for ends in pool.map(values_of, [path for entry in classes for path in entry.paths]) if ends]
    low, high = min((low for low, _ in found), default=0.0), max((high for _, high in found), default=0.0)
    if low >= high:
        raise UserError(f"data.value_range=auto: the training images have no range, all their values are {low:g}")
    return low, high
