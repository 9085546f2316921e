"""The pickles that data sets are distributed as, read without running anything that a pickle may ask for.

A pickle is a program. This one may build lists, dicts, strings, numbers and numpy arrays of plain numbers; numpy's own
constructors are replaced by the few lines below, so that no state that a file makes up reaches numpy unchecked.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from metarun.errors import UserError, first_line

PLAIN = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU]\d+")  # codes of types whose arrays hold no objects

SHARED = 16  # values for each byte, at most: a list can stand in a pickle at several places, and in a few bytes for billions of values


class _Type:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: str, *_: Any) -> None:
        if not PLAIN.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of type {code}, which holds no plain numbers or text")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":  # the version, the byte order, and what only compound types have
            self.value = self.value.newbyteorder(">")


class _Array:
    """Stands for `numpy.ndarray`."""

    value: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        data = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
        self.value = np.frombuffer(data, kind.value).reshape(shape, order="F" if fortran else "C")


def _empty(*_: Any) -> _Array:
    return _Array()


def _whole(raw: Any, kind: _Type, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", raw))
    return array


def _scalar(kind: _Type, raw: Any) -> Any:
    return _whole(raw, kind, (1,), "C").value[0].item()


def _bytes(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {codec}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


GLOBALS = {
    ("__builtin__", "bytes"): _no_bytes,  # how old protocols write empty ones
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _whole for core in ("core", "_core")},
}


# Not that of C, whose memo is an array: a few bytes that name its two billionth place would have it take 32 GiB.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only arrays, lists, dicts, text and numbers are read"
            )
        return GLOBALS[module, name]


def load(path: Path, name: str) -> Any:
    """What a pickle holds, written by Python 2 or 3; its arrays are read-only.

    Raises `UserError`, naming the data set `name`, for a file that is no pickle, is broken, or holds anything but arrays of
    numbers and text, lists, tuples, dicts, text and numbers; and `OSError` for one that cannot be opened.
    """
    with open(path, "rb") as file:
        return read(file, str(path), name)


def read(file: BinaryIO, where: str, name: str) -> Any:
    """What an open file holds, as `load` has it.

    Args:
        file: The file.
        where: What errors call it.
        name: The data set, for errors.

    Raises:
        UserError: It is no pickle, is broken, or holds anything but what `load` takes.
    """
    try:
        found = _Reader(file, encoding="latin1").load()
        return _plain(found, iter(range(SHARED * file.seek(0, os.SEEK_END))))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes happen to say
        raise UserError(f"data {name}: {where} is not a whole pickle of arrays ({_told(error)})") from error


def _told(error: Exception) -> str:
    """What is wrong with a pickle: Python's reader has a bare number for a byte that it does not know, and nothing to say of the end."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is no code of a pickle"
    return "it ends too early" if isinstance(error, EOFError) else first_line(error)


def _plain(value: Any, left: Iterator[int]) -> Any:
    """The value with arrays in the place of what stands for them; `left` has an item for each value that may still come.

    Raises:
        pickle.UnpicklingError: More come.
    """
    if next(left, None) is None:
        raise pickle.UnpicklingError("it has the same lists in one another again and again")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item, left) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, left) for key, item in value.items()}
    return value
