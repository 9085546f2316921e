"""Tables of files and labels (CSV, TSV), as competitions publish them beside a folder of images."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from metarun.data.file_names import part_of, tables_in
from metarun.data.image_index import ImageIndex
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


class Columns(NamedTuple):
    """The columns of a table that a setting names; None is looked for by its usual names, or is the only one left."""

    file: str | None = None
    label: str | None = None


class LabelledFile(NamedTuple):
    """One row of a table of labels."""

    label: str
    part: str  # train, val, test, or empty where the table does not divide the images
    path: Path


def labelled_files(root: Path, tables: list[str], columns: Columns | None) -> list[LabelledFile]:
    """Reads which image is of which class.

    Args:
        root: The folder with the images, at any depth.
        tables: Tables of file and label, in the root or anywhere. Several are the parts that their names say.
        columns: See `rows_of`.

    Returns:
        The rows in their order.

    Raises:
        UserError: A table cannot be read, names no such columns, or does not fit the images; the line says which row.
    """
    key, images = "data.labels", ImageIndex(root)
    found: list[LabelledFile] = []
    homes: dict[Path, str] = {}
    for table in tables:
        path = _find(root, table, key)
        part = part_of(path.stem) if len(tables) > 1 else ""
        if len(tables) > 1 and not part:
            raise UserError(f"{key}: of several tables each must be called train, val or test, and {path.name} is not")
        for number, (file, label, own) in rows_of(path, key, columns, alone=len(tables) == 1):
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


def rows_of(
    path: Path, key: str, columns: Columns | None = None, *, alone: bool = False
) -> list[tuple[int, tuple[str, str, str]]]:
    """Reads a table of labels.

    A table may also have a column of zeros and ones for each class, as competitions publish them; the column with the one is then
    the label. A list of images and labels may lack the line of names, and may be separated by blanks.

    Args:
        path: The table.
        key: What errors are about.
        columns: The columns that settings named; None where the caller has no such settings.
        alone: Whether no other table is beside it, so that it may be divided by a column of any name. Of several each is a part.

    Returns:
        The number of each line, and its file, label and part; the part is empty where no column names it.

    Raises:
        UserError: The table cannot be read, its columns cannot be told apart, or a row does not fit them.
    """
    (first, names), *lines = _lines(path, key)
    if images := [name for name in names if Path(name).suffix.lower() in Image.registered_extensions()]:
        if len(images) > 1 or len(names) != 2:
            raise UserError(
                f"{key}: {path} begins with a row, of {images[0]}; its first line must name the columns, as in file,label"
            )
        lines = [(first, names), *lines]
        names = ["file", "label"] if names[0] == images[0] else ["label", "file"]
    if not lines:
        raise UserError(f"{key}: {path} has no rows")
    table = _Header(names, path, key, columns)
    named = {composed(name).lower() for name in columns or () if name}  # a part of the body may be the label
    part = next((table.lower.index(name) for name in PART_COLUMNS if name in table.lower and name not in named), None)
    if part is None and alone:
        others = {*FILE_COLUMNS, *LABEL_COLUMNS, *named}
        dividing = (
            number
            for number, name in enumerate(table.lower)
            if name not in others and divides(row[number] for _, row in lines)
        )
        part = next(dividing, None)
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
    if delimiter not in first and len(first.split()) == 2:  # of a list: 1.png cat
        delimiter = " "
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    lines: list[tuple[int, list[str]]] = []
    read = 0  # lines that rows lie on which are whole
    try:
        for cells in reader:
            read = reader.line_num
            row = [cell.strip() for cell in cells]
            if not any(row):
                continue
            if lines and len(row) != len(lines[0][1]):
                raise UserError(
                    f"{key}: {path}, line {reader.line_num}: has {len(row)} columns, the first line {len(lines[0][1])}"
                )
            lines.append((reader.line_num, row))
    except csv.Error as error:
        # A quote that is not closed takes further lines for its cell: up to another quote, the end, or the most that a cell may hold.
        open_quote = reader.line_num > read + 1 or "unexpected end" in str(error)
        reason = "a quote is opened and not closed" if open_quote else str(error)
        raise UserError(f"{key}: {path}, line {read + 1}: cannot be read ({reason})") from error
    if not lines:
        raise UserError(f"{key}: {path} has no rows")
    return lines


def divides(cells: Iterable[Any]) -> bool:
    """Whether a column names a part in each row, train and another one among them, so that it divides a table whatever it is called."""
    parts = {part_of(cell) if isinstance(cell, str) else "" for cell in cells}
    return "" not in parts and "train" in parts and len(parts) > 1


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
