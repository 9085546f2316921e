"""The image files that a user names, read in batches of bounded memory."""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metarun import files
from metarun.data.class_folders import ClassFiles, by_folders, by_labels
from metarun.data.decoding import THREADS, Range, UnknownRange, UnreadableImage, little_left, read, too_small_a_part
from metarun.data.file_names import TABLES, may_be_image, visible
from metarun.data.source import PURPOSE, Split
from metarun.errors import UserError, nearest
from metarun.files import given_path, typed_path
from metarun.system import platform
from metarun.text import composed, counted, printable, shown_path

if TYPE_CHECKING:
    from metarun.inference.preprocessing import Preprocessing

log = logging.getLogger("metarun")

AHEAD = 2  # batches that are read while the network is at another
TRAINED_WITH_RANGE = "that is trained with data.value_range (or target.data.value_range)"


@dataclass
class ImageFiles:
    """Image files, and what nobody could read of them.

    Attributes:
        paths: The files, in order.
        labels: The class of each, where a folder or a table tells; None for others.
        ignored: How many files of the folders are no images by their names.
        unreadable: The reason of each file that `batches` could not read.
        others: The folders of files without a class whose names may be meant for one, and how many files each has.
    """

    paths: list[Path]
    labels: list[str | None]
    ignored: int = 0
    unreadable: dict[Path, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def batches(self, how: Preprocessing, size: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yields the places of at most `size` files that can be read, and their pixels uint8 `[B, C, S, S]`, batch after batch.

        The files of the next batches are read meanwhile, by threads; no more than these are held.
        """
        used: list[Range] = []  # the values of images that are mapped

        def one(place: int) -> np.ndarray | str:
            try:
                found = read(self.paths[place], how.image_size, how.channels, how.values)
                if found.used:
                    used.append(found.used)
                return found.pixels
            except UnknownRange as error:
                return f"{error}; a run {TRAINED_WITH_RANGE} reads them"
            except UnreadableImage as error:
                return str(error)
            except OSError as error:
                return error.strerror or str(error)

        places = iter(range(len(self.paths)))
        waiting: deque[tuple[list[int], list[Future[np.ndarray | str]]]] = deque()
        with ThreadPoolExecutor(min(THREADS, len(platform.cores()))) as pool:
            while True:
                while len(waiting) < AHEAD and (chosen := list(islice(places, size))):
                    waiting.append((chosen, [pool.submit(one, place) for place in chosen]))
                if not waiting:
                    break
                chosen, promised = waiting.popleft()
                found = [promise.result() for promise in promised]
                self.unreadable |= {
                    self.paths[place]: pixels
                    for place, pixels in zip(chosen, found, strict=True)
                    if isinstance(pixels, str)
                }
                kept = [
                    (place, pixels)
                    for place, pixels in zip(chosen, found, strict=True)
                    if isinstance(pixels, np.ndarray)
                ]
                if kept:
                    yield [place for place, _ in kept], np.stack([pixels for _, pixels in kept])
        warn_of_values(used, how.values)


def warn_of_values(used: Sequence[Range], mapped: Range | None) -> None:
    """Warns where little is left of the values of images.

    Args:
        used: The smallest and the largest value of each image that is mapped, see `metarun.data.decoding.measured`.
        mapped: The values that the run turns into black and white; None for those of the depth.
    """
    if not used:
        return
    ends = (min(low for low, _ in used), max(high for _, high in used))
    if mapped is not None and little_left(ends, mapped):
        log.warning(
            "images: have values from %g to %g, of which the range that the run was trained with, %g to %g, leaves few levels of grey, or "
            "black or white alone",
            *ends, *mapped,
        )  # fmt: skip
    elif mapped is None and too_small_a_part(ends):
        log.warning(
            "images: %d of 16 bits or more have values from %g to %g, of which 0 to 65535 become the 256 levels of grey; "
            "a run %s makes more of them",
            len(used), *ends, TRAINED_WITH_RANGE,
        )  # fmt: skip


def find_images(origin: str | os.PathLike[str], key: str = "images", classes: Iterable[str] = ()) -> ImageFiles:
    """Finds the image files that a user names.

    Args:
        origin: A file; a folder, with all below it; a pattern with `*`, `?` or `**`; or `-` for a list on standard input,
            a path a line.
        key: What errors are about.
        classes: The names of classes. A file in a folder that has such a name is of that class.

    Raises:
        UserError: There is no such file or folder, or no file in it.
    """
    text = os.fspath(origin)
    if text == "-":
        # As names of files: they need not be text in the encoding of the input.
        given = getattr(sys.stdin, "buffer", sys.stdin) or []
        read_as = sys.getfilesystemencoding()
        every = (line if isinstance(line, str) else line.decode(read_as, "surrogateescape") for line in given)
        lines = [line.rstrip("\r\n") for line in every]
        return of_paths([typed_path(line) for line in lines if line.strip()], f"{key}=-", classes)
    path = given_path(origin, key)
    if path.is_file():
        return of_paths([path], f"{key}={shown_path(path)}", classes)
    if path.is_dir():
        found, ignored = _below(path)
        if not found:
            more = f"; {counted(ignored, 'other file')} in it" if ignored else ""
            raise UserError(f"{key}={shown_path(path)}: the folder holds no image{more}")
        names = set(classes)
        labels = [folder_label(file, path, names) for file in found]
        return ImageFiles(found, labels, ignored, others=other_folders(found, labels, names, path))
    if any(character in text for character in "*?["):
        if matched := _matching(str(path)):
            return of_paths(matched, f"{key}={text}", classes)
        raise UserError(f"{key}={printable(text)}: no file matches this pattern")
    siblings = [shown_path(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{key}={shown_path(path)}: there is no such file or folder{nearest(shown_path(path), siblings)}")


def of_paths(paths: Sequence[Path], origin: str, classes: Iterable[str] = ()) -> ImageFiles:
    """Files that were named one by one.

    Args:
        paths: The files; a folder that one lies in may have the name of its class.
        origin: Where they are from, for errors.
        classes: The names of the classes.

    Raises:
        UserError: There is no file.
    """
    if not paths:
        raise UserError(f"{origin}: names no file")
    names = set(classes)
    labels = [_nearest(Path(os.path.abspath(path)).parts[:-1], names) for path in paths]
    return ImageFiles(list(paths), labels, others=other_folders(paths, labels, names))


def examples(origin: str | os.PathLike[str], key: str = "support", part: Split = "train") -> list[ClassFiles]:
    """Finds the labelled examples of some classes: a folder of class folders, or a table of file and label.

    Args:
        origin: The folder or the table.
        key: What errors are about.
        part: What a folder or a table gives that is divided into train and test.

    Raises:
        UserError: There is no such folder or table, it is divided and has no such part, a class has no image, or there is one class
            alone.
    """
    path = given_path(origin, key).absolute()
    table = path.suffix.lower() in TABLES and path.is_file()
    if path.is_file() and not table:
        raise UserError(
            f"{key}={shown_path(path)}: is a file; it must be a folder with one folder per class, or a table of file and label "
            f"({' or '.join(TABLES)})"
        )
    try:
        classes = by_labels(path.parent, [path.name]) if table else by_folders(path)
    except UserError as error:  # of a data set, by whose keys it names what is wrong and what is right
        raise UserError(_by_key(str(error), key, path)) from error
    wanted = {part, ""}  # those of no part are of data that are not divided
    chosen = [entry for entry in classes if entry.part in wanted]
    if not chosen:
        told = " and ".join(sorted({entry.part for entry in classes}))
        raise UserError(f"{key}={shown_path(path)}: no image is for {PURPOSE[part]}, but for {told}")
    if len(chosen) < 2:
        raise UserError(
            f"{key}={shown_path(path)}: has one class alone ({chosen[0].name}); there is nothing to tell apart"
        )
    return chosen


def _by_key(message: str, key: str, folder: Path) -> str:
    """An error of a folder of a data set, whose settings `data.root` and `data.labels` are one key here, as its value is one path."""
    # A table has its name in the folder.
    told = re.sub(r"\bdata\.labels=", lambda _: f"{key}={folder}{os.sep}", message)
    return re.sub(r"\bdata\.(labels|root)(?=[:=]|$)", key, told)


def _below(folder: Path) -> tuple[list[Path], int]:
    """The images below a folder by their names, and how many files are none."""
    found, ignored = [], 0
    for home, names in files.walk(folder, visible):
        images = [home / name for name in names if may_be_image(name)]
        found += images
        ignored += len(names) - len(images)
    return found, ignored


def _matching(pattern: str) -> list[Path]:
    """The files that a pattern matches, in order; those that links lead to in several ways are taken once."""
    found: dict[tuple[str, str], Path] = {}
    for path in _matches(pattern):
        if path.is_file():
            found.setdefault((os.path.realpath(path.parent), path.name), path)
    return sorted(found.values())


def _matches(pattern: str) -> Iterator[Path]:
    """What a pattern matches, as `glob` has it, but with each folder of a `**` once: in a circle of links there is no end of them."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    place = parts.index("**")
    for start in glob.glob(str(Path(*parts[:place]))):
        for folder, _ in files.walk(Path(start), visible):
            yield from _matches(os.path.join(glob.escape(str(folder)), *(parts[place + 1 :] or ("*",))))


def folder_label(path: Path, root: Path, classes: set[str]) -> str | None:
    """The class that a folder from `root` on down to the file names; the nearest to the file counts."""
    return _nearest((os.path.basename(os.path.abspath(root)), *path.relative_to(root).parts[:-1]), classes)


def other_folders(
    paths: Iterable[Path], labels: Sequence[str | None], classes: set[str], root: Path | None = None
) -> dict[str, int]:
    """Finds folders whose names may be meant for classes, and are none.

    Args:
        paths: Files.
        labels: The class of each; None where no folder is called like one.
        classes: The names of the classes.
        root: The folder that was named, whose own name is for no class.

    Returns:
        How many files of no class each has, by its name. None has any where no file is of a class and no name is almost that of
        one: the folders then divide the files by something else.
    """
    unlabelled = [path.parent for path, label in zip(paths, labels, strict=True) if label is None]
    names = Counter(composed(folder.name) for folder in unlabelled if folder.name and folder != root)
    meant = any(label is not None for label in labels) or any(nearest(name, classes) for name in names)
    return dict(names.most_common()) if meant else {}


def _nearest(folders: Sequence[str], classes: set[str]) -> str | None:
    """The last of the folders that is called like a class."""
    return next((part for part in map(composed, reversed(folders)) if part in classes), None)
