"""Labelled texts in files: tables (CSV, TSV), JSON lines, and a folder of text files for each class."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from metarun.data.file_names import part_of, parts_alone, twins, visible
from metarun.data.label_files import LABEL_COLUMNS, PART_COLUMNS, divides
from metarun.data.splits import SPLITS
from metarun.data.text_rows import ROW, Several, decoded, json_rows, list_within, listed_in, shortened, table_rows
from metarun.errors import UserError, nearest
from metarun.text import composed, counted, printable

# A text is in the first of these columns that there is, where it is the only one of its line.
TEXT_COLUMNS = (
    ("text", "sentence", "utterance", "texts", "sentences"),
    (
        "query",
        "content",
        "review",
        "tweet",
        "comment",
        "message",
        "body",
        "document",
        "question",
        "answer",
        "headline",
        "title",
    ),
)
INTENT_COLUMNS = (*LABEL_COLUMNS, "intent", "sentiment", "topic", "emotion", "y")
# What a text may be labelled by: each is a labelling of its own, so that of two nothing says which is meant.
KINDS = ("category", "intent", "sentiment", "topic", "emotion")
TABLES, LINES, PLAIN = (".csv", ".tsv", ".tab"), (".jsonl", ".ndjson", ".json"), (".txt", ".text")
READ = (*TABLES, *LINES)

log = logging.getLogger("metarun")


class TextColumns(NamedTuple):
    """Which columns hold what; None for those that are found by their usual names."""

    text: str | None = None
    label: str | None = None
    group: str | None = None  # is not looked for: without it there are no groups


USUAL = TextColumns()


class LabelledText(NamedTuple):
    """One text of a data set."""

    text: str
    label: str  # empty where there is none
    part: str  # train, val, test, or empty where nothing divides the texts
    group: str  # a language or a domain, or empty
    where: str  # the file, and the line in it


@dataclass
class Texts:
    """The texts of a user's files.

    Attributes:
        rows: The texts, in the files' order.
        files: The files that they came from.
        empty: Where the rows without a text were, which are left out.
        unread: What lies in class folders beside their text files, and is left out.
    """

    rows: list[LabelledText] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def labelled_texts(
    root: Path, columns: TextColumns = USUAL, encoding: str | None = None, key: str = "data", *, labels: bool = True
) -> Texts:
    """Reads texts and their labels.

    Args:
        root: A table (CSV, TSV), a file of JSON lines, or a folder: with files called train, val and test; with folders called so; with
            one file; or with a folder of text files for each class.
        columns: Which columns hold what.
        encoding: The encoding of the files; None for UTF-8, or UTF-16 with its mark.
        key: What errors begin with: `data`, or another node with the same settings.
        labels: Whether each text must have a label; otherwise a column of labels is read where there is one.

    Raises:
        UserError: There is no such file, it cannot be read, or it does not say what the texts and the labels are.
    """
    found = Texts()
    reader = _Reader(found, columns, encoding, key, labels)
    if root.is_file():
        reader.file(root, "")
    elif root.is_dir():
        reader.folder(root)
    else:
        there = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"{key}.root: there is no file or folder {root}{nearest(root.name, there)}")
    if not found.rows:
        raise UserError(f"{key}.root: {root} holds no texts")
    if found.empty:
        count = len(found.empty)
        log.warning(
            "%s: %s without a text %s left out, the first of %s",
            key, counted(count, "row"), "is" if count == 1 else "are", found.empty[0],
        )  # fmt: skip
    if found.unread:
        log.warning(
            "%s: left out %s in class folders that %s; the first: %s",
            key, counted(len(found.unread), "file or folder", "files or folders"),
            "is no .txt file" if len(found.unread) == 1 else "are no .txt files", printable(found.unread[0]),
        )  # fmt: skip
    bare = next((row for row in found.rows if not row.part), None)
    if bare and any(row.part for row in found.rows):
        raise UserError(f"{key}: {bare.where}: is in no part, but other texts are; fill the column or leave it out")
    if len({row.part for row in found.rows}) == 1:  # one part alone divides nothing
        found.rows = [row._replace(part="") for row in found.rows]
    return found


class _Reader:
    """Adds the texts of files to `found`."""

    def __init__(self, found: Texts, columns: TextColumns, encoding: str | None, key: str, labels: bool) -> None:
        self.found, self.columns, self.encoding, self.key, self.labels = found, columns, encoding, key, labels

    def folder(self, root: Path) -> None:
        """Reads the texts of a folder, whatever its layout."""
        names = _visible(root, self.key)
        files = [name for name in names if (root / name).is_file() and Path(name).suffix.lower() in READ]
        folders = [name for name in names if (root / name).is_dir()]
        named = _by_part([name for name in files if part_of(Path(name).stem)], root, self.key)
        if len(named) > 1:
            self._tell(root, named, [*(name for name in files if name not in named.values()), *folders])
            self._need(named, root)
            for part, name in named.items():
                self.file(root / name, part)
            return
        divided = _by_part([name for name in folders if part_of(name)], root, self.key)
        if len(divided) == 1:
            divided = {}
        if files and not self._left(root, files, list(divided.values()) or folders, parts=bool(divided)):
            if len(files) == 1:
                return self.file(root / files[0], "")
            raise UserError(
                f"{self.key}.root: {root} holds {_listed(files)}, and nothing says which to read; give the file itself, "
                f"{self.key}.root={root / files[0]}, or call several train, val and test"
            )
        if not divided:
            return self._classes(root, "")
        self._need(divided, root)
        self._tell(root, divided, [name for name in folders if name not in divided.values()])
        for part, name in divided.items():
            self._part(root / name, part)

    def _tell(self, root: Path, parts: Mapping[str, str], others: Sequence[str]) -> None:
        """Says which files, and which folders that hold texts, lie beside the parts and are not read."""
        holding = [
            name
            for name in others
            if (root / name).is_file() or self._is_class(root / name) or self._is_part(root / name)
        ]
        if holding:
            log.warning(
                "%s: of %s only %s are read, not %s", self.key, root, _listed(list(parts.values())), _listed(holding)
            )

    def _left(self, root: Path, files: Sequence[str], folders: Sequence[str], *, parts: bool) -> bool:
        """Whether files that may be a data set lie beside folders that are one: then they are told of and left.

        Args:
            root: Where both lie.
            files: The files.
            folders: The folders that may be classes, or parts.
            parts: Whether they are parts: a table, or a folder for each class, makes one; a class has text files.

        Raises:
            UserError: Some of the folders are such, and others are not.
        """
        holding = [name for name in folders if (self._is_part if parts else self._is_class)(root / name)]
        if len(holding) < (1 if parts else 2):  # of one class there is no data set
            return False
        if len(holding) < len(folders):
            others = [name for name in folders if name not in holding]
            raise UserError(
                f"{self.key}.root: {root} holds both {_listed(files)} and folders of texts, {_listed(holding)}, but no texts in "
                f"{_listed(others)}; give the file itself, {self.key}.root={root / files[0]}, or move it or these folders elsewhere"
            )
        log.warning(
            "%s: of %s only the folders %s are read, not %s; give the file itself, %s, to have it read",
            self.key, root, _listed(holding), _listed(files), root / files[0],
        )  # fmt: skip
        return True

    def _is_class(self, folder: Path) -> bool:
        return any(Path(name).suffix.lower() in PLAIN for name in _visible(folder, self.key))

    def _is_part(self, folder: Path) -> bool:
        return any(
            self._is_class(folder / name) if (folder / name).is_dir() else Path(name).suffix.lower() in READ
            for name in _visible(folder, self.key)
        )

    def _need(self, parts: Mapping[str, str], root: Path) -> None:
        for part in ("train", "test"):
            if part not in parts:
                raise UserError(
                    f"{self.key}.root: {root} holds {' and '.join(parts.values())}, but none that is called {part}"
                )

    def _part(self, root: Path, part: str) -> None:
        names = _visible(root, self.key)
        files = [name for name in names if Path(name).suffix.lower() in READ]
        folders = [name for name in names if (root / name).is_dir()]
        if not files or self._left(root, files, folders, parts=False):
            return self._classes(root, part)
        if len(files) > 1:
            raise UserError(f"{self.key}.root: {root} holds {_listed(files)}; it must hold one file, or class folders")
        self.file(root / files[0], part)

    def _classes(self, root: Path, part: str) -> None:
        """A folder of text files for each class."""
        folders = [name for name in _visible(root, self.key) if (root / name).is_dir()]
        if not folders:
            held = _visible(root, self.key)
            raise UserError(
                f"{self.key}.root: {root} holds "
                + (f"{_listed(held)}, " if held else "nothing, ")
                + "but neither a table (.csv, .tsv), nor JSON lines (.jsonl), nor a folder of .txt files for each class"
            )
        if parts_alone(folders) and not any(path.is_dir() for name in folders for path in (root / name).iterdir()):
            raise UserError(
                f"{self.key}.root: {root / folders[0]} holds texts but no class folders, so that nothing says which class they are of; "
                "put the texts of each class into a folder of its own, or give a table"
            )
        for what, column in self.columns._asdict().items():
            if column:
                raise UserError(
                    f"{self.key}.{what}_column={column}: {root} holds folders of texts, which have no columns; leave it out, or "
                    f"give a table, {self.key}.root=FILE"
                )
        if twin := twins(folders):
            raise UserError(f"{self.key}.root: {root}: {twin}")
        for name in folders:
            held = _visible(root / name, self.key)
            files = [file for file in held if Path(file).suffix.lower() in PLAIN]
            self.found.unread += [str(root / name / file) for file in held if file not in files]
            if not files:
                raise UserError(f"{self.key}.root: the class folder {root / name} holds no .txt file")
            for file in files:
                path = root / name / file
                self.found.files.append(path)
                self._add(decoded(path, self.key, self.encoding), name, part, "", str(path))

    def file(self, path: Path, part: str) -> None:
        """Reads the rows of a table or of JSON lines."""
        self.found.files.append(path)
        text = decoded(path, self.key, self.encoding)
        lines = path.suffix.lower() in LINES
        alone = () if self.labels else (*TEXT_COLUMNS[0], *TEXT_COLUMNS[1])  # a column that needs no other
        rows = list(json_rows(text, path, self.key) if lines else table_rows(text, path, self.key, alone))
        if not rows:
            raise UserError(f"{self.key}: {path} has no rows")
        every = list(dict.fromkeys(name for _, row in rows for name in row))
        single = {name for _, row in rows for name, cell in row.items() if not isinstance(cell, Several)}
        # A column without a name, the index that pandas writes, is neither of texts nor of labels.
        names = [name for name in every if name and name in single]
        if lines and not self._has_text(names) and (holder := list_within(text)):
            raise UserError(
                f"{self.key}: {path}: is one object, whose {printable(holder)} is a list of objects; give that list alone, "
                f"[{ROW}, ...], or such an object a line"
            )
        if not names:
            raise UserError(
                f"{self.key}: {path}: its objects hold no text or number of their own, but lists, objects or nothing; each must be "
                f"like {ROW}"
            )
        group_column = self._chosen("group", names, path) if self.columns.group else None
        known = any(name.lower() in INTENT_COLUMNS for name in names)
        lists = [name for name in every if name.lower() in INTENT_COLUMNS] if not known else []
        labelled = [name for name in every if name in (*names, *lists, self.columns.label)]
        given = self._chosen("label", labelled, path) if self.columns.label else None
        text_column = self._column("text", names, path, given, group_column)
        usual = [name for name in names if name.lower() in INTENT_COLUMNS and name != text_column]
        optional = usual[0] if len(usual) == 1 else None
        label_column = self._column("label", labelled, path, text_column, group_column) if self.labels else optional
        named = {composed(name).lower() for name in self.columns if name}  # a subset may be a domain
        parts = (name for name in names if name.lower() in PART_COLUMNS and name.lower() not in named)
        used = (text_column, label_column, group_column, *usual)
        dividing = (name for name in names if name not in used and divides(row.get(name) for _, row in rows))
        part_column = (next(parts, None) or next(dividing, None)) if not part else None
        for where, row in rows:
            for column in filter(None, (text_column, label_column, group_column)):
                if column not in row:
                    raise UserError(f"{self.key}: {where}: has no {printable(column)}; it has {_listed(list(row))}")
                if column != label_column and isinstance(row[column], Several):
                    raise UserError(
                        f"{self.key}: {where}: its {printable(column)} is a list, {shortened(row[column])!r}; it must be one text"
                    )
            own = row.get(part_column, "") if part_column else ""
            if own and not part_of(own):
                raise UserError(f"{self.key}: {where}: {printable(own)!r} is not train, val or test")
            label, group = (row[column] if column else "" for column in (label_column, group_column))
            self._add(row[text_column], label, part_of(own) or part, group, where)

    def _add(self, text: str, label: str, part: str, group: str, where: str) -> None:
        text = text.strip()
        if not text:
            self.found.empty.append(where)
            return
        if (several := listed_in(label)) is not None:
            if len(several) > 1:
                raise UserError(
                    f"{self.key}: {where}: is of several classes ({_listed(several, 3)}); a text must be of one"
                )
            label = "".join(several)
        lacking = "label" if self.labels and not label else self.columns.group if not group else None
        if lacking:
            raise UserError(f"{self.key}: {where}: has no {lacking}, the text is {shortened(text)!r}")
        self.found.rows.append(LabelledText(text, composed(label), part, composed(group), where))

    def _has_text(self, names: Sequence[str]) -> bool:
        """Whether one of the columns holds texts, and not what may be said of a whole file, as its title."""
        return self.columns.text in names or any(name.lower() in TEXT_COLUMNS[0] for name in names)

    def _chosen(self, what: str, names: Sequence[str], path: Path) -> str:
        """The column that a setting names."""
        wanted = composed(getattr(self.columns, what))
        if names.count(wanted) > 1:
            raise UserError(f"{self.key}.{what}_column={wanted}: {path} has several columns of this name")
        if wanted in names:
            return wanted
        alike = [name for name in names if name.lower() == wanted.lower()]
        if len(alike) == 1:
            return alike[0]
        raise UserError(
            f"{self.key}.{what}_column={wanted}: {path} has no such column{nearest(wanted, names)}; it has {_listed(names)}"
        )

    def _column(
        self, what: str, names: Sequence[str], path: Path, taken: str | None = None, group: str | None = None
    ) -> str:
        """The column of the texts or of the labels, which is neither the one that the other is in, if known, nor that of the groups."""
        if getattr(self.columns, what):
            return self._chosen(what, names, path)
        lower = Counter(name.lower() for name in names)
        free = [name for name in names if name not in (taken, group)]
        first = next((usual for usual in INTENT_COLUMNS if usual in map(str.lower, free)), "")
        for usual in TEXT_COLUMNS if what == "text" else (KINDS if first in KINDS else (first,),):
            fit = [name for name in free if name.lower() in usual]
            if len(fit) > 1 or any(lower[name.lower()] > 1 for name in fit):
                raise UserError(
                    f"{self.key}: {path} has the columns {_listed(names)}, of which {' and '.join(fit)} may be the {what}; "
                    f"name it with {self.key}.{what}_column={fit[0]}"
                )
            if fit:
                return fit[0]
        other = taken or next((name for name in names if name.lower() in INTENT_COLUMNS), None)
        if what == "text" and len(names) == 1 and not self.labels:
            return names[0]
        rest = [name for name in free if name != other]
        if len(names) == 2 and other and len(rest) == 1:
            return rest[0]
        known = ", ".join(TEXT_COLUMNS[0][:3] if what == "text" else INTENT_COLUMNS[:4])
        raise UserError(
            f"{self.key}: {path} has the columns {_listed(names)}; the one of the {what}s must be called {known} or the like, or be "
            f"named by {self.key}.{what}_column{nearest(what, names)}"
        )


def _visible(folder: Path, key: str) -> list[str]:
    try:
        return sorted(filter(visible, os.listdir(folder)))
    except OSError as error:
        raise UserError(f"{key}.root: folder {folder} cannot be read ({error.strerror})") from error


def _by_part(names: Sequence[str], root: Path, key: str) -> dict[str, str]:
    """The file or folder of each part."""
    found: dict[str, str] = {}
    for part in SPLITS:
        own = [name for name in names if part_of(Path(name).stem) == part]
        if len(own) > 1:
            raise UserError(f"{key}.root: {root} has both {own[0]} and {own[1]}; remove one, or give the file itself")
        found |= {part: own[0]} if own else {}
    return found


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
