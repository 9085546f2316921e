"""The forms in which few-shot data sets are distributed: one reader for each, without the libraries that made them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from metarun import files
from metarun.data import pickles
from metarun.data.file_names import may_be_image, visible
from metarun.data.image_index import ImageIndex
from metarun.data.label_files import rows_of, text_of
from metarun.data.source import Split
from metarun.errors import UserError, not_imported
from metarun.text import composed, lines_of

Pictures = np.ndarray | Sequence[Path] | Sequence[bytes]  # uint8 [n, H, W, 3], or image files, or their contents
Classes = Iterator[tuple[str, Pictures]]
# Reads the classes of a split: of its files, the split, and the data set's name for errors.
Reader = Callable[[list[Path], Split, str], Classes]

# What files call a split.
PARTS: dict[Split, str] = {
    "train": "train",
    "val": "val*",
    "test": "test",
}


LIST_FOLDERS = ("splits", "split", "lists", "csv")  # beside the images, where lists may lie
OUTLINES = {"annotations", "masks", "segmentations"}  # beside the images, with folders called like the classes, too
WORDS = re.compile(r"(?<=^n\d{8})[\s,;:].*")  # of a class of ImageNet, which lists have after its number
TOPS = 3  # folders that hold nothing but one other, as archives are packed, that are looked through


def tops(root: Path) -> Iterator[Path]:
    """A folder, and as long as it holds one folder and no more, that one: `mini-imagenet-master/`, say."""
    for _ in range(TOPS + 1):
        yield root
        inside = _folders(root) if root.is_dir() else []
        if len(inside) != 1:
            return
        root = inside[0]


class Layout(NamedTuple):
    """One form of a data set."""

    folders: tuple[str, ...]  # below the root, where the files may lie; "." is the root
    patterns: tuple[str, ...]  # of the names of a split's files; {} is the split
    read: Reader
    lists: bool = False  # whether these files only list what lies beside them

    def find(self, root: Path) -> dict[Split, list[Path]] | None:
        """The files of every split, or None where one of them is missing."""
        for folder in self.folders:
            found = {
                split: [sorted((root / folder).glob(pattern.format(part)))[:1] for pattern in self.patterns]
                for split, part in PARTS.items()
            }
            if all(all(paths) for paths in found.values()):
                return {split: [path for paths in lists for path in paths] for split, lists in found.items()}
        return None

    def lacking(self, root: Path) -> Path | None:
        """The one file or folder of a split that is missing, where all others are there; None where more are, or none is a split's."""
        for folder in self.folders:
            found = {
                root / folder / pattern.format(part): any((root / folder).glob(pattern.format(part)))
                for pattern in self.patterns
                for part in PARTS.values()
            }
            missing = [path for path, there in found.items() if not there]
            if len(missing) == 1 and len(found) > len(self.patterns):
                return missing[0].with_name(missing[0].name.replace("*", ""))
        return None


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data {name}: {path} is not a text file ({error})") from error


def _members(content: Any, path: Path, name: str, *keys: str) -> list[Any]:
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"data {name}: {path}: there is no {missing[0]!r} in it, so it is another file than expected")
    return [content[key] for key in keys]


def _same_length(path: Path, name: str, images: Sequence[Any], labels: Sequence[Any]) -> None:
    if len(images) != len(labels):
        raise UserError(
            f"data {name}: {path}: {len(images)} images and {len(labels)} labels; the file may be incomplete"
        )


def rows_by_name(paths: list[Path], split: Split, name: str) -> Classes:
    """A pickle of `image_data` and `class_dict`, which names the rows of each class (Ren's mini-ImageNet).

    Raises:
        UserError: The pickle is damaged, or another one.
    """
    path = paths[0]
    images, members = _members(pickles.load(path, name), path, name, "image_data", "class_dict")
    for kind, rows in sorted(members.items()):
        if max(rows) >= len(images):
            raise UserError(f"data {name}: {path}: there are {len(images)} images, and {kind} names number {max(rows)}")
        yield kind, images[np.asarray(rows)]


def data_and_labels(paths: list[Path], split: Split, name: str) -> Classes:
    """A pickle of `data` and `labels` (MetaOptNet's CIFAR-FS and FC100); a class's name is its number."""
    path = paths[0]
    images, labels = _members(pickles.load(path, name), path, name, "data", "labels")
    _same_length(path, name, images, labels)
    numbers = np.asarray(labels)
    for number in np.unique(numbers):
        yield str(number), images[numbers == number]


def encoded_and_labels(paths: list[Path], split: Split, name: str) -> Classes:
    """A pickled list of PNG files and another of their labels (Ren's tiered-ImageNet)."""
    images = pickles.load(paths[0], name)
    content = pickles.load(paths[1], name)
    (labels,) = _members(content, paths[1], name, "label_specific")
    _same_length(paths[0], name, images, labels)
    names = content.get("label_specific_str")
    numbers = np.asarray(labels)
    for number in np.unique(numbers):
        yield (
            str(names[number] if names else number),
            [images[row].tobytes() for row in np.flatnonzero(numbers == number)],
        )


def listed_folders(paths: list[Path], split: Split, name: str) -> Classes:
    """A folder of class folders, and a text file with the names of the split's classes (CIFAR-FS by its authors)."""
    folder, names = paths
    for kind in sorted(_text(names, name).split()):
        yield kind, _images(folder / kind, name)


def listed(paths: list[Path], split: Split, name: str) -> Classes:
    """Reads the classes that a list names from the images beside it.

    Args:
        paths: A table of file and label, as Ravi and Larochelle's, or a text with the name of a class in each line.
        split: The split.
        name: The data set's name, for errors.

    Yields:
        The name of each class and its image files: those that the table names. Where there are no such files, or the
        list is a text, all images of the folders that are called like the class, wherever they lie but in folders of `OUTLINES`.

    Raises:
        UserError: The list cannot be read, names an image twice, or an image or the folder of a class is missing.
    """
    path, key = paths[0], f"data {name}"
    members: dict[str, list[str]] = {}
    lines: dict[tuple[str, str], list[int]] = {}
    if path.suffix == ".csv":
        for number, (file, kind, _) in rows_of(path, key):
            members.setdefault(kind, []).append(file)
            lines.setdefault((file, kind), []).append(number)
    else:
        names = (composed(line.strip()) for line in lines_of(text_of(path, key)) if line.strip())
        members = {WORDS.sub("", each): [] for each in names}
    root = path.parent
    above = {**dict.fromkeys(LIST_FOLDERS, 1), "miniImagenet": 2}  # folders from the images' own down to the lists
    if root.name in above and not _holds(root, members):
        root = root.parents[above[root.name] - 1]
    index = ImageIndex(root)
    if any(composed(PurePosixPath(file).name) in index.names for found in members.values() for file in found[:1]):
        homes_of: dict[Path, int] = {}
        for kind, found in sorted(members.items()):
            images = [index.find(file, path, f"{key}: {path}: {kind}") for file in found]
            for file, image in zip(found, images, strict=True):
                number = lines[file, kind].pop(0)
                if image in homes_of:
                    first, last = sorted((homes_of[image], number))
                    raise UserError(f"{key}: {path}, line {last}: {file} has a label already, in line {first}")
                homes_of[image] = number
            yield kind, images
        return
    homes: dict[str, list[Path]] = {}
    for folder, _ in files.walk(root, lambda name: visible(name) and name.lower() not in OUTLINES):
        homes.setdefault(composed(folder.name), []).append(folder)
    for kind in sorted(members):
        if kind not in homes:
            if members[kind] and homes.keys().isdisjoint(members):  # a table of images, and not of class folders
                index.find(members[kind][0], path, f"{key}: {path}: {kind}")
            raise UserError(f"{key}: {path} names class {kind}, but below {root} there is no folder of it")
        yield kind, [image for folder in sorted(homes[kind]) for image in _images(folder, name)]


def _holds(root: Path, members: dict[str, list[str]]) -> bool:
    """Whether some image or class folder of a list lies below a folder."""
    kinds = set(members)
    wanted = {composed(PurePosixPath(file).stem) for found in members.values() for file in found[:1]}
    return any(
        composed(folder.name) in kinds or any(composed(PurePosixPath(name).stem) in wanted for name in names)
        for folder, names in files.walk(root, visible)
    )


def divided_folders(paths: list[Path], split: Split, name: str) -> Classes:
    """A folder of class folders for each split."""
    for folder in _folders(paths[0]):
        yield folder.name, _images(folder, name)


def numbered_folders(paths: list[Path], split: Split, name: str) -> Classes:
    """A folder of class folders: in their order every other is for training, the rest in turns for validation and testing."""
    folders = _folders(paths[0])
    start, step = {"train": (0, 2), "val": (1, 4), "test": (3, 4)}[split]
    for folder in folders[start::step]:
        yield folder.name, _images(folder, name)


def _folders(root: Path) -> list[Path]:
    """The class folders of a folder, in order."""
    return sorted(path for path in root.iterdir() if path.is_dir() and visible(path.name))


def _images(folder: Path, name: str) -> list[Path]:
    """The images of a class folder, in order, of any format; lists and texts beside them are left."""
    seen = folder.iterdir() if folder.is_dir() else ()
    found = sorted(path for path in seen if visible(path.name) and may_be_image(path.name) and not path.is_dir())
    if not found:
        raise UserError(f"data {name}: there are no images in {folder}; the data set may be incomplete")
    return found


def hdf5(paths: list[Path], split: Split, name: str) -> Classes:
    """torchmeta's HDF5 file and the JSON list of the split's classes; images as pixels, or as the contents of files.

    Raises:
        UserError: h5py is missing, or the files are damaged.
        OSError: The disk cannot be read.
    """
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise UserError(
            f"data {name}: {paths[0]} needs h5py, but {not_imported('h5py', error)}: pip install 'metarun[hdf5]'"
        ) from error
    try:
        labels = files.parsed(_text(paths[1], name))
        with h5py.File(paths[0], "r") as file:
            for label in sorted(labels):  # of CIFAR-100 the coarse class and the fine one
                place, kind = (f"datasets/{label}", label) if isinstance(label, str) else ("/".join(label), label[-1])
                rows = file[place][:]
                yield kind, rows if rows.ndim == 4 else [row.tobytes() for row in rows]
    except (OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"data {name}: {paths[0]} with {paths[1].name} are not whole files of torchmeta's ({error})"
        ) from error


def opened(picture: Path | bytes) -> bytes:
    """The contents of an image file."""
    return picture if isinstance(picture, bytes) else picture.read_bytes()
