"""Tables of files and labels (CSV, TSV), as competitions publish them beside a folder of images."""

from __future__ import annotations

import csv
import functools
import io
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from metarun import files
from metarun.errors import UserError, nearest
from metarun.files import typed_path
from metarun.text import composed, lines_of, listed, separator_named

FILE_COLUMNS = (
    "file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_name", "image_file", "image_path", "img",
    "img_name", "img_path", "image_id", "id",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "class", "target", "category", "labels", "class_name", "label_name", "class_id", "classid", "label_id", "category_id",
)  # fmt: skip
PART_COLUMNS = ("split", "part", "subset")
PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
BESIDE_PARTS = {"data", "dataset", "images", "image", "img", "imgs", "labels", "set", "split"}  # in names of parts
KINDS = {
    **PARTS, "eval": "test", "evaluation": "test",
    "labeled": "labelled", "labelled": "labelled", "unlabeled": "unlabelled", "unlabelled": "unlabelled",
}  # fmt: skip
NO_CLASSES = {
    *BESIDE_PARTS,
    "annotation",
    "annotations",
    "mask",
    "masks",
}  # folders that are called so say nothing of classes
# In names of folders that competitions publish: stage1_train, test_stg2, train-jpg, test-jpg-v2.
BESIDE_KINDS = {
    *BESIDE_PARTS, "all", "final", "full", "jpeg", "jpg", "phase", "png", "private", "public", "raw", "stage", "stg", "tif", "v",
}  # fmt: skip
KIND = re.compile(f"({'|'.join(KINDS)})({'|'.join(BESIDE_PARTS)})?")
TABLES = (".csv", ".tsv")
NO_IMAGES = {*TABLES, ".gz", ".html", ".json", ".md", ".pdf", ".py", ".tar", ".txt", ".xml", ".yaml", ".yml", ".zip"}
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # left by systems, as is whatever begins with a dot


def may_be_image(name: str) -> bool:
    """Whether a file may be meant as an image: no list, text or archive by its name, as they lie beside images."""
    return Path(name).suffix.lower() not in NO_IMAGES


class Columns(NamedTuple):
    """The columns of a table that a setting names; None is looked for by its usual names, or is the only one left."""

    file: str | None = None
    label: str | None = None


class LabelledFile(NamedTuple):
    """One row of a table of labels."""

    label: str
    part: str  # train, val, test, or empty where the table does not divide the images
    path: Path


def part_of(name: str) -> str:
    """Which part of a data set a folder, a table or a cell names: train, val, test, or an empty string.

    Words such as images beside it change nothing: `train_images`, `Test Set`, `labels-val`.
    """
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word and word not in BESIDE_PARTS]
    return PARTS.get(words[0], "") if len(words) == 1 else ""


def kinds_of(names: Sequence[str]) -> list[str]:
    """Which part of a data set the name of each folder may mean, more generously than `part_of`; an empty string for none.

    Numbers and words of the trade are left away: `test1`, `train2017`, `testset`, `stage1_train`; and words that all of several names
    have, as `images_test_rev1` beside `images_training_rev1`. Beside `PARTS` there are labelled and unlabelled.
    """
    words = [
        [word.lower() for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))] for name in names
    ]
    common = {word for word in set(words[0]).intersection(*words) if not KIND.fullmatch(word)} if len(words) > 1 else {}
    found = [[KIND.fullmatch(word) for word in own if word not in {*BESIDE_KINDS, *common}] for own in words]
    return [KINDS[own[0][1]] if len(own) == 1 and own[0] else "" for own in found]


def parts_alone(names: Sequence[str]) -> bool:
    """Whether folders are called as parts of a data set, and of two at least: a class alone may be called `train`."""
    kinds = kinds_of(names)
    return all(kinds) and len({*kinds}) > 1


def tables_in(folder: Path) -> list[str]:
    """The names of the tables that lie in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in TABLES and path.is_file())


def visible(name: str) -> bool:
    """Whether a file or a folder is of the data: neither hidden nor put there by a system."""
    return not name.startswith(".") and name.lower() not in LITTER


def twins(names: Sequence[str]) -> str:
    """What is wrong with class folders of which two have the same name, written in two ways of Unicode; empty where none have."""
    first: dict[str, str] = {}
    for name in names:
        if first.setdefault(composed(name), name) != name:
            return f"two class folders have names that look the same ({first[composed(name)]!a} and {name!a}); make them one folder"
    return ""


def labelled_files(
    root: Path, tables: list[str], columns: Columns | None = None, key: str = "data.labels"
) -> list[LabelledFile]:
    """Reads which image is of which class.

    Args:
        root: The folder with the images, at any depth.
        tables: Tables of file and label, in the root or anywhere. Several are the parts that their names say.
        columns: See `rows_of`.
        key: What errors are about.

    Returns:
        The rows in their order.

    Raises:
        UserError: A table cannot be read, names no such columns, or does not fit the images; the line says which row.
    """
    images = ImageIndex(root)
    found: list[LabelledFile] = []
    homes: dict[Path, str] = {}
    for table in tables:
        path = _find(root, table, key)
        part = part_of(path.stem) if len(tables) > 1 else ""
        if len(tables) > 1 and not part:
            raise UserError(f"{key}: of several tables each must be called train, val or test, and {path.name} is not")
        for number, (file, label, own) in rows_of(path, key, columns):
            where = f"{key}: {path}, line {number}"
            image = images.find(file, path, where)
            if image in homes:
                raise UserError(f"{where}: {file} has a label already, in {homes[image]}")
            homes[image] = f"line {number}" if len(tables) == 1 else f"line {number} of {path.name}"
            if own and not part_of(own):
                raise UserError(f"{where}: {own!r} is not train, val or test")
            found.append(LabelledFile(label, part_of(own) or part, image))
    if any(entry.part for entry in found) and (bare := next((entry for entry in found if not entry.part), None)):
        raise UserError(f"{key}: {bare.path.name} is in no part, but other files are; fill the column or leave it out")
    return found


class ImageIndex:
    """All files below a folder, by what a table may call them: a path or a name, with or without its extension."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"data.root: there is no folder {root}")
        self.root = root
        self.base = composed(os.path.abspath(root))
        self.folders: set[str] = set()
        # The images in each folder that a table names and that is not below the root.
        self._outside: dict[str, frozenset[str]] = {}
        self.paths: dict[str, list[PurePosixPath]] = {}
        self.names: dict[str, list[PurePosixPath]] = {}
        for folder, names in files.walk(root, visible):
            self.folders.add(composed(folder.relative_to(root).as_posix()))
            for name in names:
                path = PurePosixPath((folder / name).relative_to(root).as_posix())
                if may_be_image(name):
                    for key in {path, path.with_suffix("")}:  # a path keeps the bytes that open it
                        self.paths.setdefault(composed(str(key)), []).append(path)
                        self.names.setdefault(composed(key.name), []).append(path)

    def find(self, file: str, table: Path, where: str) -> Path:
        """The one image that a table calls `file`; raises `UserError` where there is none, or several.

        It is looked for beside the table, in the folder that is called like the table and in the root; then there also
        without the folders that the path begins with elsewhere; then by its name alone. Where the folder that the path names is
        there, it is looked for in no other: an image of the same name may be another one. For that reason an image that is
        where the path says, but outside the root, is refused.
        """
        written = file.replace("\\", "/")
        beside = table.parent.relative_to(self.root) if table.is_relative_to(self.root) else Path()
        homes = [os.path.join(self.base, home) for home in dict.fromkeys((beside, beside / table.stem, Path()))]
        named = [place for home in homes if (place := self._below(os.path.join(home, written)))]
        for name in named:
            if found := self.paths.get(name):
                return self._one(found, name, file, where)
        last = composed(PurePosixPath(written).name)
        if found := self._linked(written, table, file, where):
            return self._one(found, last, file, where)
        wanted = [part for part in PurePosixPath(posixpath.normpath(written)).parts if part not in ("/", "..")]
        named += [place for home in homes if (place := self._below(os.path.join(home, *wanted)))]
        elsewhere = len(wanted) < 2 or self.folders.isdisjoint({posixpath.dirname(name) for name in named} - {""})
        for start in range(len(wanted) if elsewhere else 1):
            for home in homes:
                name = self._below(os.path.join(home, *wanted[start:]))
                if found := self.paths.get(name):
                    return self._one(found, name, file, where)
        if elsewhere and (found := self.names.get(last)):
            return self._one(found, last, file, where)
        near = nearest(last, self.names) if len(self.names) < 10_000 else ""
        raise UserError(f"{where}: there is no image {file} in {self.root}{near}")

    def _below(self, path: str) -> str:
        """A path as it is from the root, empty where it is not below that."""
        whole = composed(os.path.normpath(path))
        return whole[len(self.base.rstrip(os.sep)) + 1 :].replace(os.sep, "/") if _is_below(whole, self.base) else ""

    def _linked(self, written: str, table: Path, file: str, where: str) -> list[PurePosixPath]:
        """What is outside the root where the path says: the same files, if a link below the root leads there; none if nothing is.

        Raises:
            UserError: No such link leads there.
        """
        places = [os.path.join(os.path.abspath(table.parent), written)]
        if "/" in written:
            places.append(os.path.join(os.path.dirname(self.base), written))
        for place in map(os.path.normpath, places):
            folder, name = os.path.split(place)
            if _is_below(place, self.base):
                continue
            if folder not in self._outside:
                self._outside[folder] = _images_in(folder)
            if name not in self._outside[folder]:
                continue
            home, real = self._real.get(os.path.realpath(folder)), os.path.realpath(place)
            if found := self.paths.get(composed(posixpath.normpath(posixpath.join(home, name)))) if home else None:
                return found
            if found := [
                path for path in self.names.get(composed(name), []) if os.path.realpath(self.root / path) == real
            ]:
                return found
            raise UserError(f"{where}: {file} lies outside {self.root}, below which all images of a table must be")
        return []

    @functools.cached_property
    def _real(self) -> dict[str, str]:
        """The folders below the root, and the root, by where they are without links."""
        return {
            os.path.realpath(folder): folder.relative_to(self.root).as_posix()
            for folder, _ in files.walk(self.root, visible)
        }

    def _one(self, found: list[PurePosixPath], name: str, file: str, where: str) -> Path:
        """The only one found, or the only one whose extension is that of `name`, too, or that is written in the same bytes."""
        for alike in (
            lambda path: composed(str(path)).endswith(name),
            lambda path: path.name == PurePosixPath(file.replace("\\", "/")).name,
        ):
            if len(found) > 1:
                found = [path for path in found if alike(path)] or found
        if len(found) > 1 and composed(str(found[0])) == composed(str(found[1])):
            raise UserError(
                f"{where}: {file} may be either of two files of {self.root} whose names look the same ({str(found[0])!a} and "
                f"{str(found[1])!a}); rename one"
            )
        if len(found) > 1:
            raise UserError(
                f"{where}: {file} may be {found[0]} or {found[1]} of {self.root}; write the path from there"
            )
        return self.root / found[0]


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _images_in(folder: str) -> frozenset[str]:
    """The names of the files in a folder that may be images, with and without their extensions; none where it cannot be looked into."""
    try:
        names = [name for name in os.listdir(folder) if visible(name) and may_be_image(name)]
    except OSError:
        return frozenset()
    return frozenset([*names, *(Path(name).stem for name in names)])


def _find(root: Path, table: str, key: str) -> Path:
    path = typed_path(table)
    places = [path] if path.is_absolute() else [root / path, Path.cwd() / path]
    for place in places:
        if place.is_file():
            return place
    if table == "none":
        raise UserError(f"{key}=none: to train without labels take unsupervised=umtra, cactus or prototransfer")
    there = tables_in(root) if root.is_dir() else []
    raise UserError(
        f"{key}: there is no file {places[0]}{nearest(path.name, there) or (there and '; there is ' + listed(there)) or ''}"
    )


def rows_of(path: Path, key: str, columns: Columns | None = None) -> list[tuple[int, tuple[str, str, str]]]:
    """Reads a table of labels.

    A table may also have a column of zeros and ones for each class, as competitions publish them; the column with the one is then
    the label.

    Args:
        path: The table.
        key: What errors are about.
        columns: The columns that settings named; None where the caller has no such settings.

    Returns:
        The number of each line, and its file, label and part; the part is empty where no column names it.

    Raises:
        UserError: The table cannot be read, its columns cannot be told apart, or a row does not fit them.
    """
    (_, names), *lines = _lines(path, key)
    if not lines:
        raise UserError(f"{key}: {path} has no rows")
    table = _Header(names, path, key, columns)
    part = next((table.lower.index(name) for name in PART_COLUMNS if name in table.lower), None)
    file, label = table.file_and_label(part)
    kinds = [number for number in range(len(names)) if number not in (file, part)] if label is None else []
    if label is None and not _marks_classes(lines, kinds):
        raise table.unclear("label", LABEL_COLUMNS)
    rows: list[tuple[int, tuple[str, str, str]]] = []
    for line, row in lines:
        where = f"{key}: {path}, line {line}"
        found = [names[number] for number in kinds if float(row[number])] if label is None else [row[label]]
        if len(found) > 1:
            raise UserError(f"{where}: is of several classes ({', '.join(found[:3])}); an image must be of one")
        if not row[file] or not any(found):
            raise UserError(f"{where}: has no {'label' if row[file] else 'file'}")
        rows.append((line, (row[file], composed(found[0]), "" if part is None else row[part])))
    return rows


def _lines(path: Path, key: str) -> list[tuple[int, list[str]]]:
    """The number and the cells of each line that is not empty, all of equal length; the first is the header."""
    named, text = separator_named(text_of(path, key))
    first = next((line for line in lines_of(text) if line.strip()), "")
    delimiter = named or max("\t;,", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            if not any(row):
                continue
            if lines and len(row) != len(lines[0][1]):
                raise UserError(
                    f"{key}: {path}, line {reader.line_num}: has {len(row)} columns, the first line {len(lines[0][1])}"
                )
            lines.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{key}: {path}, line {reader.line_num}: cannot be read ({error})") from error
    if not lines:
        raise UserError(f"{key}: {path} has no rows")
    return lines


def _marks_classes(lines: list[tuple[int, list[str]]], kinds: list[int]) -> bool:
    """Whether columns say with zeros and ones of which class a row is."""
    return len(kinds) > 1 and all(_is_mark(row[number]) for _, row in lines for number in kinds)


def _is_mark(cell: str) -> bool:
    try:
        return float(cell) in (0.0, 1.0)
    except ValueError:
        return False


class _Header:
    """The first line of a table, and which of its columns are the file's and the label's."""

    def __init__(self, names: list[str], path: Path, key: str, columns: Columns | None) -> None:
        self.names = [composed(name) for name in names]
        self.lower = [name.lower() for name in self.names]
        self.path = path
        self.key = key
        self.columns = columns

    def file_and_label(self, part: int | None) -> tuple[int, int | None]:
        """The places of the two columns; that of the label is None where none is known to be it."""
        columns = self.columns or Columns()
        file = self._named("file", columns.file) if columns.file else self._usual(FILE_COLUMNS)
        label = self._named("label", columns.label) if columns.label else self._usual(LABEL_COLUMNS)
        left = [number for number in range(len(self.names)) if number not in (file, label, part)]
        if len(left) == 1 and label is None:
            label = left[0] if file is not None else None
        elif len(left) == 1 and file is None:
            file = left[0]
        if file is None:
            raise self.unclear("file", FILE_COLUMNS)
        return file, label

    def _named(self, what: str, wanted: str) -> int:
        """The column that a setting names."""
        setting = f"data.{what}_column={wanted}"
        wanted = composed(wanted)
        names = self.names if wanted in self.names else self.lower
        word = wanted if wanted in self.names else wanted.lower()
        if word not in names:
            raise UserError(
                f"{setting}: {self.path} has no such column{nearest(wanted, self.names)}; it has {listed(self.names)}"
            )
        return self._one(names, word)

    def _usual(self, words: tuple[str, ...]) -> int | None:
        return next((self._one(self.lower, word) for word in words if word in self.lower), None)

    def _one(self, names: list[str], word: str) -> int:
        if names.count(word) > 1:
            raise UserError(f"{self.key}: {self.path} has several columns {word}")
        return names.index(word)

    def unclear(self, what: str, usual: tuple[str, ...]) -> UserError:
        """The error of a table of which no column is known to be the file's or the label's."""
        named = "" if self.columns is None else f", or named with data.{what}_column"
        return UserError(
            f"{self.key}: {self.path} has the columns {listed(self.names)}; the one of the {what} must be called "
            f"{', '.join(usual[:-1])} or {usual[-1]}{named}"
        )


def text_of(path: Path, key: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark; `UserError` for any other file."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise UserError(f"{key}: {path} is no text in UTF-8 (it holds zero bytes, as UTF-16 does); save it as UTF-8")
    return text
