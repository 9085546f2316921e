"""Texts that a user names or holds in memory, and how a text becomes what a network was trained on."""

from __future__ import annotations

import codecs
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun import files
from metarun.data.file_names import visible
from metarun.data.source import PURPOSE, DataSource, Split
from metarun.data.text import as_pieces
from metarun.data.text_files import PLAIN, READ, LabelledText, labelled_texts
from metarun.data.text_rows import HALF, decoded, has_half
from metarun.encoders import before_encoding
from metarun.errors import UserError, nearest
from metarun.files import given_path, typed_path
from metarun.inference.encoding import EncoderStep
from metarun.inference.image_files import folder_label, other_folders
from metarun.text import lines_of, listed, printable, shown_path

ITEM = "text"

log = logging.getLogger("metarun")


@dataclass(frozen=True)
class TextPreprocessing:
    """The steps from a text to the input of a network.

    Attributes:
        input_shape: The shape of that input: `(D,)` with an encoder, the number of word pieces without one.
        encoding: What turns texts into vectors; None for a network that reads word pieces.
    """

    input_shape: tuple[int, ...]
    encoding: EncoderStep | None = None

    @classmethod
    def of(cls, data: DataSource, reference: np.ndarray | None = None) -> TextPreprocessing | None:
        """The steps that a data set takes, see `Preprocessing.of`; None for data that are no texts."""
        if before_encoding(data).item != ITEM:
            return None
        return cls(data.input_shape, None if data.item == ITEM else EncoderStep.of(data, reference))

    @classmethod
    def stored(
        cls, values: dict[str, Any], origin: Path, encoder_tensors: dict[str, Tensor] | None = None
    ) -> TextPreprocessing:
        """The preprocessing that `describe` described, see `Preprocessing.stored`."""
        told = values.get("encoder")
        step = EncoderStep.stored(told, origin, encoder_tensors) if told else None
        return cls(tuple(values["input_shape"]), step)

    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json` and for a classifier file."""
        found: dict[str, Any] = {"item": ITEM, "input_shape": list(self.input_shape)}
        return {**found, "encoder": self.encoding.describe()} if self.encoding else found

    def inputs(self, texts: np.ndarray, device: torch.device) -> Tensor:
        """Computes the network's input `[B, *input_shape]` of texts, an array of strings `[B]`."""
        if self.encoding is not None:
            return self.encoding.vectors(texts.tolist(), device)
        return torch.from_numpy(as_pieces(texts.tolist())).long().to(device)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Raises `UserError`: a text has no pixels, and no exported file reads texts."""
        raise UserError(
            "it reads texts, of which an exported network would need the tokens; use recipe=predict or metarun.load"
        )


@dataclass
class TextItems:
    """Texts to classify, as `ImageFiles` are images.

    Attributes:
        paths: The texts.
        labels: The class of each, where a column or a folder tells; None for others.
        ignored: How many rows have no text.
        unreadable: Nothing, for a text that is there can be read.
        others: The labels, or folders, that may be meant for a class and are none, and how many texts each has.
    """

    paths: list[str]
    labels: list[str | None]
    ignored: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def batches(self, how: Any, size: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yields the places of at most `size` texts, and the texts, batch after batch."""
        for start in range(0, len(self.paths), size):
            part = self.paths[start : start + size]
            texts = np.empty(len(part), dtype=object)
            texts[:] = part
            yield list(range(start, start + len(part))), texts


def as_texts(texts: Any) -> TextItems:
    """Reads the texts of a file, or of a sequence of strings.

    Raises:
        UserError: There is none, or an item is no text.
    """
    if isinstance(texts, TextItems):
        return texts
    # `Path.exists` raises an error where a text is too long for the name of a file.
    if isinstance(texts, os.PathLike) or (isinstance(texts, str) and os.path.exists(typed_path(texts))):
        return find_texts(texts)
    if isinstance(texts, str):
        raise UserError("texts: this is one text; give a list of them, [text]")
    if not isinstance(texts, Sequence | np.ndarray):
        raise UserError(f"texts: {type(texts).__name__} is neither a list of texts nor a file; give a list of str")
    found = list(texts)
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"texts: item {place} is {type(text).__name__}, not str; this learner reads texts")
        if not text.strip():
            raise UserError(f"texts: item {place} is empty")
        if has_half(text):
            raise UserError(f"texts: item {place} holds {HALF}")
    if not found:
        raise UserError("texts: there is none")
    return TextItems([str(text) for text in found], [None] * len(found))


def find_texts(origin: str | os.PathLike[str], key: str = "items", classes: Iterable[str] = ()) -> TextItems:
    """Finds the texts that a user names.

    Args:
        origin: A .txt file with a text in each line; a table or JSON lines, whose column of labels, if there is one, tells the
            classes; a folder of .txt files, a text each; or `-` for a text a line on standard input.
        key: What errors are about.
        classes: The names of classes. Another label counts as none.

    Raises:
        UserError: There is no such file or folder, or no text in it.
    """
    name, known = os.fspath(origin), set(classes)
    if name == "-":
        return _lines(_standard_input(f"{key}=-"), f"{key}=-")
    path = given_path(origin, key)
    if not os.path.exists(path):  # unlike `Path.exists` also of a text that is longer than any name of a file
        there = [shown_path(other) for other in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise UserError(
            f"{key}={shown_path(path)}: there is no such file or folder{nearest(shown_path(path), there)}; a text itself goes in by "
            f"{key}=-"
        )
    if path.is_file() and path.suffix.lower() not in READ:
        return _lines(_decoded(path, key), f"{key}={shown_path(path)}")
    if path.is_dir() and (files := sorted(_plain(path))):
        _beside(path, files, key)
        texts = [(_decoded(file, key).strip(), file) for file in files]
        kept = [(text, file) for text, file in texts if text]
        if not kept:
            raise UserError(f"{key}={shown_path(path)}: holds no text, all {len(texts)} files are empty")
        labels = [folder_label(file, path, known) for _, file in kept]
        others = other_folders([file for _, file in kept], labels, known, path)
        return TextItems([text for text, _ in kept], labels, len(texts) - len(kept), others=others)
    with _named(key):
        found = labelled_texts(path, key=key, labels=False)
    rows = found.rows
    own = [row.label if row.label in known else None for row in rows]
    others = dict(Counter(row.label for row in rows if row.label and row.label not in known).most_common())
    return TextItems([row.text for row in rows], own, len(found.empty), others=others if known else {})


def text_examples(origin: str | os.PathLike[str], key: str = "support", part: Split = "train") -> list[LabelledText]:
    """Finds the labelled examples of some classes: a table, JSON lines, or a folder of .txt files for each class.

    Args:
        origin: The table, the file or the folder.
        key: What errors are about.
        part: What files give that are divided into train and test.

    Raises:
        UserError: There is no such file, it is divided and none of its texts is of that part, or there is one class alone.
    """
    path = given_path(origin, key).absolute()
    with _named(key):
        rows = labelled_texts(path, key=key).rows
    parts = {row.part for row in rows}
    wanted = {part, ""}  # those of no part are of files that are not divided
    if parts.isdisjoint(wanted):
        told = " and ".join(sorted(parts))
        raise UserError(f"{key}={shown_path(path)}: no text is for {PURPOSE[part]}, but for {told}")
    chosen = [row for row in rows if row.part in wanted]
    names = sorted({row.label for row in chosen})
    if len(names) < 2:
        raise UserError(f"{key}={shown_path(path)}: has one class alone ({names[0]}); there is nothing to tell apart")
    return sorted(chosen, key=lambda row: row.label)


class _named:
    """Errors of a data set's settings, which `key` has not: its root is `key` itself, and columns have their usual names."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            told = re.sub(rf"\b{self.key}\.root(?=[:=])", self.key, str(error))
            told = re.sub(rf"; name it with {self.key}\.\w+_column=\S+", "; rename the other one", told)
            told = re.sub(rf", or be named by {self.key}\.\w+_column", "", told)
            told = re.sub(rf"; name its encoding, {self.key}\.encoding=.*", "; write it in UTF-8", told)
            raise UserError(told) from error


def _decoded(path: Path, key: str) -> str:
    """The text of a file; `UserError` where it is none in UTF-8, or in UTF-16 with its mark, since no setting names another encoding."""
    with _named(key):
        return decoded(path, key, None)


def _standard_input(where: str) -> str:
    """The text of standard input; `UserError` where it is none in the encoding that the input has."""
    given: Any = getattr(sys.stdin, "buffer", sys.stdin)
    raw: str | bytes = given.read() if given else ""
    if isinstance(raw, str):
        return raw
    encoding = codecs.lookup(sys.stdin.encoding).name
    try:
        return raw.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeError as error:
        line = raw.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise UserError(
            f"{where}: line {line} is no text in {encoding.upper()}; write it in {encoding.upper()}"
        ) from error


def _lines(text: str, where: str) -> TextItems:
    lines = [line.strip() for line in lines_of(text)]
    kept = [line for line in lines if line]
    if not kept:
        raise UserError(f"{printable(where)}: holds no text")
    return TextItems(kept, [None] * len(kept), len(lines) - len(kept))


def _beside(folder: Path, texts: Sequence[Path], key: str) -> None:
    """Tells of tables beside folders of texts; raises `UserError` where texts themselves lie beside one, and it may be meant."""
    tables = sorted(path for path in folder.iterdir() if visible(path.name) and path.suffix.lower() in READ)
    if not tables:
        return
    table = tables[0]
    if direct := next((path for path in texts if path.parent == folder), None):
        raise UserError(
            f"{key}={shown_path(folder)}: holds both {printable(table.name)} and {printable(direct.name)}, and nothing says which to "
            f"read; give the file itself, {key}={shown_path(table)}, or move it elsewhere"
        )
    log.warning(
        "%s: of %s only the .txt files are read, not %s; %s=%s reads that file",
        key, shown_path(folder), listed(path.name for path in tables), key, shown_path(table),
    )  # fmt: skip


def _plain(folder: Path) -> Iterator[Path]:
    for home, names in files.walk(folder, visible):
        yield from (home / name for name in names if Path(name).suffix.lower() in PLAIN)
