"""Labelled texts: the source that all text data sets share, and anybody's own files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from metarun.config.types import FilePath, Len, PositiveFloat, Seed
from metarun.data.source import Reader, Split
from metarun.data.splits import SPLITS, Lists, check_ratios, divide_or_keep, same_in_all
from metarun.data.table_source import TableSource
from metarun.data.text_files import LabelledText, TextColumns, labelled_texts
from metarun.data.text_rows import decoded, shortened
from metarun.data.tokens import LENGTH, model_folder, tokenize
from metarun.errors import UserError
from metarun.files import typed_path
from metarun.text import counted, lines_of, printable, shell_path

RANK = {"": 0, "train": 0, "val": 1, "test": 2}  # of two equal texts the one for the later purpose is kept

log = logging.getLogger("metarun")


@dataclass(frozen=True)
class TextTable:
    """All texts of a data set; those of class c are the places `offsets[c]` to `offsets[c + 1]`."""

    texts: list[str]
    offsets: np.ndarray  # int64 [classes + 1]
    names: list[str]
    groups: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the texts and offsets."""
        digest = hashlib.sha256()
        for text in self.texts:
            raw = text.encode(errors="surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()

    @property
    def sizes(self) -> np.ndarray:
        """Texts per class, int64 `[classes]`."""
        return np.diff(self.offsets)


class TextSource(TableSource):
    """A table of texts with its classes divided among the splits.

    An encoder (`encoder=minilm`, `encoder=tfidf`) makes vectors of the texts; without one the items are the numbers of word pieces, int64
    `[256]` filled up with 0, which `backbone=minilm` reads.

    Args:
        rows: The texts. Their parts divide the texts of each class where `ordinary`.
        splits: The names of the classes of each split.
        ordinary: Whether the parts of the rows are ordinary training, validation and test texts of the same classes.
        within_group: Whether all ways of an episode come from one group (a language).
        key: What errors and warnings begin with.
        metadata: Further JSON values for `result.json`.
        unknown: Texts that are of no class, by split.
    """

    item = "text"
    as_target = "target=text target.data.root=FILE"
    input_shape = (LENGTH,)

    def __init__(
        self,
        rows: Sequence[LabelledText],
        splits: dict[Split, Sequence[str]],
        *,
        ordinary: bool = False,
        within_group: bool = False,
        key: str = "data",
        metadata: dict[str, Any] | None = None,
        unknown: dict[Split, list[str]] | None = None,
    ) -> None:
        kept, counts = apart(rows, splits, key)
        members: dict[tuple[str, str], list[LabelledText]] = {(row.group, row.label): [] for row in rows}
        for row in kept:
            members[row.group, row.label].append(row)
        for (_, label), own in members.items():
            if not own:
                raise UserError(f"{key}: all texts of class {printable(label)} are texts of a later split too")
            own.sort(key=lambda row: SPLITS.index(row.part) if row.part else 0)
        names = [label for _, label in members]
        described = {**(metadata or {}), **counts}
        if ordinary:
            described["parts"] = {
                part: [sum((row.part or "train") == part for row in own) for own in members.values()] for part in SPLITS
            }
        texts = [[row.text for row in own] for own in members.values()]
        apart_from_all = dict(unknown or {})
        texts += apart_from_all.values()
        if ordinary:  # of what is no class nothing is a part
            described["parts"] = {
                part: [*counts_of, *([0] * len(apart_from_all))] for part, counts_of in described["parts"].items()
            }
        if apart_from_all:
            described["of_no_class"] = {split: len(own) for split, own in apart_from_all.items()}
        table = TextTable(
            [text for own in texts for text in own],
            np.cumsum([0, *map(len, texts)]).astype(np.int64),
            [*names, *(f"of no class, {split}" for split in apart_from_all)],
            [*(group for group, _ in members), *([""] * len(apart_from_all))],
            described,
        )
        numbers = {name: number for number, name in enumerate(names)}
        super().__init__(
            table,
            {split: [numbers[name] for name in splits[split]] for split in SPLITS},
            within_group=within_group,
        )
        self.texts: TextTable = table
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self.unknown = {split: len(names) + place for place, split in enumerate(apart_from_all)}

    def items(self, start: int, stop: int, turns: int = 0) -> list[str]:
        return self.texts.texts[start:stop]

    @cached_property
    def pieces(self) -> torch.Tensor:
        """The numbers of the word pieces of all texts, int32 `[M, 256]`."""
        return torch.from_numpy(as_pieces(self.texts.texts))

    def make_ready(self, device: torch.device, split: Split | None = None) -> None:
        if device not in self._on_device:
            self._on_device[device] = self.pieces.to(device)

    def reader(self, device: torch.device, reference: np.ndarray | None = None) -> Reader:
        """A function of rows int64 `[..., n]` and turns, which mean nothing here: their word pieces, int64 `[..., n, 256]`."""

        def read(rows: np.ndarray, turns: np.ndarray) -> torch.Tensor:
            self.make_ready(device)  # not before: whether tasks fit is asked of texts that an encoder reads, too
            return self._on_device[device][torch.from_numpy(rows).to(device)].long()

        return read

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "items": self.item}

    def identities(self, rows: np.ndarray) -> list[str]:
        """The texts themselves."""
        return [self.texts.texts[row] for row in rows]


def as_pieces(texts: Sequence[str]) -> np.ndarray:
    """Cuts texts into word pieces, whose numbers, int32 `[n, 256]`, `backbone=minilm` reads."""
    found, cut = tokenize(texts, model_folder("pretrained", "data"), "data")
    if cut:
        log.warning(
            "data: %d of %d texts are longer than the %d word pieces that the model reads, and are cut there",
            len(cut), len(texts), LENGTH,
        )  # fmt: skip
    whole = np.zeros((len(texts), LENGTH), np.int32)
    whole[:, : found.shape[1]] = found
    return whole


def apart(
    rows: Sequence[LabelledText], splits: dict[Split, Sequence[str]], key: str
) -> tuple[list[LabelledText], dict[str, Any]]:
    """The rows without those whose text occurs again where it matters.

    Of equal texts in one class and part the first is kept. A text for training that is for validation or for the test too, by the
    split of its class or by its part, is left out of the training, and one for validation that is for the test out of the validation.

    Args:
        rows: All texts.
        splits: The names of the classes of each split; rows of other classes are kept as they are.
        key: What warnings begin with.

    Returns:
        The rows that are kept, and numbers for `result.json`.
    """
    homes: dict[str, set[Split]] = {}
    for split in SPLITS:
        for name in splits[split]:
            homes.setdefault(name, set()).add(split)
    single = {name: RANK[next(iter(found))] for name, found in homes.items() if len(found) == 1}
    ranks = [(single.get(row.label, 0), RANK[row.part]) for row in rows]
    latest: dict[str, tuple[int, int]] = {}  # of what is of a test class and what is of the test part, the former
    for row, rank in zip(rows, ranks, strict=True):
        latest[row.text] = max(latest.get(row.text, (0, 0)), rank)
    kept: list[LabelledText] = []
    seen: set[tuple[str, str, str]] = set()
    again, across = [], []
    for row, rank in zip(rows, ranks, strict=True):
        if rank < latest[row.text]:
            across.append(row)
        elif (identity := (row.text, row.group, row.label)) in seen:
            again.append(row)
        else:
            seen.add(identity)
            kept.append(row)
    for double, what in (
        (again, "that its class has already"),
        (across, "of training or validation that a later split has too"),
    ):
        if double:
            log.warning(
                "%s: left out %s %s; the first: %s, %r",
                key, counted(len(double), "text"), what, double[0].where, shortened(double[0].text),
            )  # fmt: skip
    counts = {"repeated": len(again), "repeated_in_a_later_split": len(across)}
    return kept, {name: count for name, count in counts.items() if count}


class Text(TextSource):
    """Labelled texts of any files: CSV or TSV with named columns, JSON lines, or a folder of .txt files for each class.

    `root` is such a file; or a folder with one, or with files or folders called train, test and perhaps val (valid, dev); or a folder of
    class folders. The classes are divided among the splits by, in this order:
    - these parts, or a column `split`. Where the parts have the same classes they divide the texts instead, as for a target, and
      what follows divides the classes;
    - `train_classes`, `val_classes` and `test_classes`, each a list or a file with a name in each line (a class in none of
      them is left out);
    - `ratios` (three positive numbers that sum to 1; default 0.64, 0.16, 0.2), drawn by `split_seed`, which is not the run's
      seed; each split has at least one class. Of fewer than three classes every split has all: a target, no source.
    With `group_column` (a language, a domain) a task's classes are of one group, and whole groups are divided instead of classes: the
    lists name groups.

    Rows without a text are left out, and so are texts that occur again: in their class, or where a later split has them. One line says
    how many, and `result.json` counts them. Raises `UserError` for files, columns, lists and ratios that do not fit.

    Args:
        root: The file, or the folder.
        text_column: The column, or key, of the texts; null looks for text, sentence, utterance and the like.
        label_column: The column of the labels; null looks for label, class, category, intent and the like.
        group_column: The column of what tasks do not mix, a language or a domain; null: there is none.
        encoding: The encoding of the files; null is UTF-8, or UTF-16 with its mark.
        split_seed: The seed of the division of the classes.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        train_classes: The names of the training classes, or a file of them; null draws them.
        val_classes: The names of the validation classes, or a file of them; null draws them.
        test_classes: The names of the test classes, or a file of them; null draws them.
    """

    def __init__(
        self,
        *,
        root: FilePath,
        text_column: str | None = None,
        label_column: str | None = None,
        group_column: str | None = None,
        encoding: str | None = None,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        train_classes: str | list[str] | None = None,
        val_classes: str | list[str] | None = None,
        test_classes: str | list[str] | None = None,
    ) -> None:
        shares = check_ratios(ratios)
        path = typed_path(root).absolute()
        found = labelled_texts(path, TextColumns(text_column, label_column, group_column), encoding)
        rows = found.rows
        lists: Lists = tuple(  # type: ignore[assignment]
            _names(given, f"data.{split}_classes", path, encoding)
            for split, given in zip(SPLITS, (train_classes, val_classes, test_classes), strict=True)
        )
        grouped = group_column is not None
        # The units that are divided: classes, or the groups that hold them.
        units = sorted({row.group if grouped else row.label for row in rows})
        labels = sorted({row.label for row in rows})
        if len(labels) < 2:
            raise UserError(
                f"data.root: {path} has one label alone ({printable(labels[0])}); there is nothing to tell apart"
            )
        parts = _units_by_part(rows, grouped)
        if parts and "train" not in parts:
            raise UserError(
                f"data.root: {path}: no text is for training, but for {' and '.join(sorted(parts))}; a split needs train"
            )
        ordinary = bool(parts) and same_in_all(parts, f"data.root: {path}", kind="text")
        kind = "group" if grouped else "class"
        where = {"key": "data.root", "where": str(path), "by": "its parts"}
        places = {unit: number for number, unit in enumerate(units)}
        kept: dict[Split, list[int]] = {}
        if parts and not ordinary:
            kept = {split: sorted(places[unit] for unit in parts.get(split, ())) for split in SPLITS}
        chosen = divide_or_keep(units, kept, lists, shares, split_seed, kind=kind, **where)
        divided: dict[Split, Sequence[str]] = {
            split: [units[number] for number in own] for split, own in chosen.items()
        }
        if grouped:
            rows = [row._replace(label=f"{row.group}/{row.label}") for row in rows]
            names = sorted({(row.group, row.label) for row in rows})
            _refuse_same_names(names)
            divided = {split: [name for group, name in names if group in own] for split, own in divided.items()}
        super().__init__(
            sorted(rows, key=lambda row: (row.group, row.label)),
            divided,
            ordinary=ordinary,
            within_group=grouped,
            metadata={
                "files": [file.name for file in found.files][:20],
                **({"empty": len(found.empty)} if found.empty else {}),
                **({"unread": len(found.unread)} if found.unread else {}),
            },
        )
        if {text_column, label_column, group_column, encoding} == {None}:  # with one of them there are more words to it
            self.as_target = f"target=text target.data.root={shell_path(root)}"


def _refuse_same_names(names: Iterable[tuple[str, str]]) -> None:
    """Checks that no classes of two groups have one name: class c of group a/b and class b/c of group a are both a/b/c."""
    homes: dict[str, str] = {}
    for group, name in names:
        if (other := homes.setdefault(name, group)) != group:
            raise UserError(
                f"data.group_column: a class of group {printable(other)} and one of group {printable(group)} are both "
                f"{printable(name)}; write one of these names otherwise"
            )


def _units_by_part(rows: Iterable[LabelledText], grouped: bool) -> dict[Split, set[str]]:
    found: dict[Split, set[str]] = {}
    for row in rows:
        if row.part:
            found.setdefault(row.part, set()).add(row.group if grouped else row.label)  # type: ignore[arg-type]
    return {split: found[split] for split in SPLITS if split in found}


def _names(given: str | list[str] | None, key: str, root: Path, encoding: str | None) -> list[str] | None:
    """The names of classes of a list, or of a file that has one in each line."""
    if given is None or isinstance(given, list):
        return given
    path = typed_path(given)
    home = root if root.is_dir() else root.parent
    places = [path] if path.is_absolute() else [Path.cwd() / path, home / path]
    # Unlike `Path.is_file` it takes a list of names in one text too, which may be longer than any name of a file.
    file = next((place for place in places if os.path.isfile(place)), None)
    if file is None:
        raise UserError(f"{key}={given}: is neither a list, [a,b], nor a file with a class in each line")
    return [line.strip() for line in lines_of(decoded(file, "data", encoding)) if line.strip()]
