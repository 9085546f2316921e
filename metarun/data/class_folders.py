"""Which files are of which class: folders of classes, divided or not, and the layouts that say it otherwise."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from metarun.data.file_names import (
    IMAGES,
    NO_CLASSES,
    kinds_of,
    may_be_image,
    part_of,
    parts_alone,
    pieces,
    tables_in,
    tables_of_labels,
    twins,
    visible,
)
from metarun.data.label_files import Columns, labelled_files
from metarun.data.source import Split
from metarun.data.splits import SPLITS, same_in_all
from metarun.errors import UserError, nearest
from metarun.text import composed, shell_path

log = logging.getLogger("metarun")

ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}


class ClassFiles(NamedTuple):
    """The files of one class, or of one class in one part (train, val, test; otherwise empty)."""

    name: str
    part: str
    where: str  # what holds them, for errors
    paths: list[Path]


def named(classes: Sequence[ClassFiles]) -> Iterator[tuple[str, Path]]:
    """Every file, under a name that says its part and its class, and its folder where that is not called like the class."""
    for entry in classes:
        for path in entry.paths:
            folder = "" if composed(path.parent.name) == entry.name else f"{path.parent.name}/"
            yield f"{entry.part}/{entry.name}/{folder}{path.name}", path


def by_labels(root: Path, tables: list[str], columns: Columns | None = None) -> list[ClassFiles]:
    """Finds the classes that tables of labels make of the images below a folder, by part and name.

    Args:
        root: The folder with the images.
        tables: The tables, see `labelled_files`.
        columns: The columns that settings named; None where there are no such settings.

    Raises:
        UserError: A table cannot be read or does not fit the images, or a class would be in two parts and not in all.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    entries = labelled_files(root, tables, columns)
    parts = {entry.part for entry in entries}
    if len(parts) > 1 and "train" not in parts:
        raise UserError(
            f"data.labels: {', '.join(tables)}: no image is for training, but for {' and '.join(sorted(parts))}; a split needs train"
        )
    for label, part, path in entries:
        found.setdefault((part if len(parts) > 1 else "", label), []).append(path)  # one part alone divides nothing
    order = ["", *SPLITS]
    return _sound(
        [
            ClassFiles(label, part, f"class {label} of data.labels", sorted(paths, key=_by_parts))
            for (part, label), paths in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
        ],
        root,
    )


def by_folders(root: Path, *, tell: bool = True) -> list[ClassFiles]:
    """Finds the classes of a folder of class folders, or of `train`, `val` and `test` folders that hold them.

    Args:
        root: The folder. The parts may also be called training, valid, validation, dev and testing, in any case.
        tell: Whether a line says which folders are not read.

    Raises:
        UserError: There are no class folders, one is empty, or the layout needs a table of labels.
    """
    if not root.is_dir():
        if root.exists():
            raise UserError(
                f"data.root: {root} is a file; it must be a folder with one folder per class{_as_table(root)}"
            )
        siblings = _folders(root.parent) if root.parent.is_dir() else []
        raise UserError(f"data.root: there is no folder {root}{nearest(root.name, siblings)}")
    names = _folders(root)
    divided: dict[str, list[str]] = {part: [name for name in names if part_of(name) == part] for part in SPLITS}
    parts = {part: found for part, found in divided.items() if found}
    inside = {name: _folders(root / name) for found in parts.values() for name in found}
    if any(inside.values()):
        return _divided(root, parts, inside, [name for name in names if tell and not part_of(name)])
    refuse_unlabelled(root, names)
    if not names:
        if _visible(root):
            tables = tables_of_labels(root)
            advice = (
                f"; name the table that says their classes with data.labels={shlex.quote(tables[0])}" if tables else ""
            )
            own = "; put the images of each class into a folder of its own"
            raise UserError(f"data.root: {root} holds files but no class folders{advice or own}")
        raise UserError(f"data.root: folder {root} is empty")
    return _classes(root, names, "")


def _as_table(file: Path) -> str:
    """What to do where a file is given as the root that may be the table of the labels, or an archive; empty for any other."""
    if file.suffix.lower() in ARCHIVES:
        return f"; unpack {file.name} first"
    if file.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return ""
    return f"; of a table of labels: data.root={shell_path(file.parent)} data.labels={shlex.quote(file.name)}"


def refuse_unlabelled(root: Path, names: list[str]) -> None:
    """Refuses images that lie in `train` and `test` without class folders, as competitions publish them, or in `images` and `masks`.

    Args:
        root: The folder.
        names: Its folders.

    Raises:
        UserError: The folders are no classes.
    """
    tables = tables_in(root)
    parts = [name for name, kind in zip(names, kinds_of(names), strict=True) if kind]
    others = [name for name in names if name.lower() not in NO_CLASSES]
    called_so = parts_alone(parts if tables else others) or (len(names) == 1 and (parts or tables))
    if (called_so and not any(_folders(root / name) for name in parts)) or _no_classes(root, names):
        held = [name for name in parts or names if any(may_be_image(entry.name) for entry in _visible(root / name))]
        raise _unlabelled(root / (held or parts or names)[0], tables_of_labels(root))


def _no_classes(root: Path, names: list[str]) -> bool:
    """Whether all of several folders, with no folders in them, have names that say nothing of classes, or are pieces beside a table."""
    called_so = all(name.lower() in NO_CLASSES for name in names) or (pieces(names) and bool(tables_in(root)))
    return len(names) > 1 and called_so and not any(_folders(root / name) for name in names)


def _unlabelled(held: Path, tables: list[str]) -> UserError:
    """The error of images in a folder that says nothing of their classes, beside these tables."""
    advice = (
        f"name the table that does with data.labels={shlex.quote(tables[0])}"
        if tables
        else "put the images of each class into a folder of its own, or name a table of file and label with data.labels"
    )
    return UserError(
        f"data.root: {held} holds images but no class folders, so that nothing says which class they are of; {advice}"
    )


def _divided(
    root: Path, parts: dict[str, list[str]], inside: dict[str, list[str]], others: list[str]
) -> list[ClassFiles]:
    """The classes of the folders of `parts`, which hold the class folders `inside`; tells of `others`, which are not read."""
    if double := next((found for found in parts.values() if len(found) > 1), None):
        raise UserError(f"data.root: {root} has both {double[0]} and {double[1]}; remove one, or make them one folder")
    folders = {part: found[0] for part, found in parts.items()}
    lacking = [part for part in SPLITS if (part != "val" or part in folders) and not inside.get(folders.get(part, ""))]
    if lacking:
        part = lacking[0]
        raise UserError(
            f"data.root: {root} is divided into {', '.join(folders.values())}, but there are no class folders in "
            f"{folders.get(part, part)}{_without(part, root, folders, inside)}"
        )
    for found in folders.values():
        # An archive may have a folder of its own name in it: train/train.
        called_so = all(name.lower() in NO_CLASSES or part_of(name) for name in inside[found])
        if called_so and not any(_folders(root / found / name) for name in inside[found]):
            raise _unlabelled(root / found / inside[found][0], tables_of_labels(root))
    if others:
        log.warning("data folder: of %s only %s are read, not %s", root, ", ".join(folders.values()), ", ".join(others))
    return _sound(
        [entry for part in folders for entry in _classes(root / folders[part], inside[folders[part]], part)], root
    )


def _without(part: str, root: Path, folders: dict[str, str], inside: dict[str, list[str]]) -> str:
    """What leads on where no class folders are in `part`, for the end of a message; `inside` is what each of `folders` holds."""
    held = {one: shell_path(root / folder) for one, folder in folders.items() if inside[folder]}
    if part in folders and part != "train" and "train" in held and _visible(root / folders[part]):
        tables = {part_of(Path(table).stem): table for table in tables_in(root)}
        if {"train", part} <= set(tables):
            named = ",".join(tables[one] for one in SPLITS if one in tables)
            return f", whose images need a table: {shlex.quote(f'data.labels=[{named}]')} reads both; data.root={held['train']} one alone"
        return f", whose images have no labels; data.root={held['train']} takes the others alone"
    if part == "test" and set(held) == {"train", "val"}:
        return f"; call {folders['val']} test, or data.root={held['train']} takes the others alone"
    if part not in folders and len(held) == 1:
        return f"; data.root={next(iter(held.values()))} takes these alone"
    return ""


def _sound(classes: list[ClassFiles], root: Path) -> list[ClassFiles]:
    """The classes, which are the same in every part (a rare one may lack in some), or each in one part alone."""
    inside: dict[Split, list[str]] = {}
    for entry in classes:
        if entry.part:
            inside.setdefault(entry.part, []).append(entry.name)  # type: ignore[arg-type]
    if inside:
        same_in_all(inside, f"data.root: {root}", kind="image")
    return classes


def _classes(home: Path, names: list[str], part: str) -> list[ClassFiles]:
    """The class folders `names` of a folder."""
    if twin := twins(names):
        raise UserError(f"data.root: {home}: {twin}")
    return [_class(home / name, part, several=len(names) > 1) for name in names]


def _class(path: Path, part: str, *, several: bool) -> ClassFiles:
    """The images of a class folder, or of the folder `images` in one of several; lists, as benchmarks have them beside, are left."""
    entries = _visible(path)
    folders = [entry.name for entry in entries if _is_folder(entry)]
    images = [name for name in folders if name.lower() in IMAGES]
    bare = not any(may_be_image(entry.name) for entry in entries if entry.name not in folders)
    if (
        several and len(images) == 1 and bare and all(name.lower() in NO_CLASSES for name in folders)
    ):  # others are masks
        within = _class(path / images[0], part, several=False)
        return within._replace(name=composed(path.name))
    if inside := next(filter(_is_folder, entries), None):
        raise UserError(
            f"data.root: {inside.path} is a folder inside a class folder; class folders hold images alone{_deeper(path.parent)}"
        )
    paths = [path / entry.name for entry in entries if may_be_image(entry.name)]
    if not paths:
        held = f"holds no image, but {entries[0].name}" if entries else "is empty; delete it, or fill it"
        raise UserError(f"data.root: the class folder {path} {held}")
    return ClassFiles(composed(path.name), part, f"the class folder {path}", paths)


def _deeper(root: Path) -> str:
    """Names what below `root` could be the root, for the end of a message: where parts or the most class folders are, or a table is."""
    found: dict[Path, list[str]] = {}
    beside = ""
    for home, names, files in os.walk(root):
        folder = Path(home)
        names[:] = sorted(filter(visible, names))
        if folder != root and {"train", "test"} <= set(map(part_of, names)):
            return f"; {folder} is divided into {', '.join(filter(part_of, names))}"
        if (
            not names
            and any(may_be_image(name) for name in filter(visible, files))
            and (tables := tables_of_labels(folder))
        ):
            beside = beside or f"; {folder} has a table beside its images: data.labels={shlex.quote(tables[0])}"
        inside = [_visible(folder / name) for name in names]
        if len(names) > 1 and all(held and not any(map(_is_folder, held)) for held in inside):
            found[folder] = names
    # What each of several folders has, as those of `2024` and `2025`, are no classes.
    own = {
        folder: names
        for folder, names in found.items()
        if not any(other != folder and other.parent == folder.parent and found[other] == names for other in found)
    }
    if own:
        best = max(own, key=lambda folder: len(own[folder]))
        return f"; {best} has {len(own[best])} class folders"
    return beside or (
        "; a table of file and label says of which class each image is, at any depth: data.labels" if found else ""
    )


def _by_parts(path: Path) -> list[str]:
    return [composed(part) for part in path.parts]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in an order that is the same however its names are written; classes are divided in that order."""
    try:
        with os.scandir(folder) as entries:
            found = (entry for entry in entries if visible(entry.name))
            return sorted(found, key=lambda entry: (composed(entry.name), entry.name))
    except OSError as error:
        raise UserError(f"data.root: folder {folder} cannot be read ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link in a circle, which leads to nothing
        return False


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if _is_folder(entry)]
