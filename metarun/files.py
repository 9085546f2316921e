"""Files that must survive a kill at any instruction: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from metarun.engine.platform import sync_folder
from metarun.errors import UserError

log = logging.getLogger("metarun")


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes in the place of `path`, all or nothing; a full disk is a `UserError`, `path` as it was."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous one is untouched" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def save_bytes(path: Path, content: bytes) -> None:
    """A file with this content."""
    replace(path, lambda file: file.write(content))


def save_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file for people: indented, in the order given."""
    save_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def save_arrays(path: Path, **arrays: Any) -> None:
    """A compressed `.npz` file."""
    replace(path, lambda file: np.savez_compressed(file, **arrays))


@contextlib.contextmanager
def locked(path: Path, told: str) -> Iterator[None]:
    """Holds the lock file `path`; where another process does, says that it waits (`told`: what for) until this one ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s; waiting for it", told)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
