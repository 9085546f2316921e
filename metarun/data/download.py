"""Fetching a published file once: locked, checked, and whole or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from metarun import files
from metarun.errors import UserError

TIMEOUT = 30.0  # seconds without a byte
BLOCK = 2**18

log = logging.getLogger("metarun")
_may_download: ContextVar[bool] = ContextVar("may_download", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Within this context data are opened where they are there, and are missing otherwise."""
    token = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(token)


def refuse_where_none_may(missing: str) -> None:
    """Announces a download.

    Args:
        missing: What there is not, as a line of an error.

    Raises:
        UserError: The context is `without_downloads`.
    """
    if not _may_download.get():
        raise UserError(missing)


def refuse_file(root: Path) -> None:
    """Raises `UserError` where what should be the folder of a data set is a file, the archive itself say."""
    if root.is_file():
        raise UserError(f"data root {root}: is a file; give the folder that it lies in, {root.parent}")


def download(address: str, path: Path, *, checksum: str) -> Path:
    """Fetch `address` to `path` unless a file is there already; returns `path`.

    `checksum` is the hexadecimal digest of the whole file: 32 digits are MD5, 64 are SHA-256. A file that was there
    before is not checked, for it may be packed anew by hand. Raises `UserError` where the folder is none or cannot be written, the
    address cannot be reached, and the file that came is not the published one.
    """
    if path.is_file():
        return path
    refuse_file(path.parent)
    refuse_where_none_may(f"data root {path.parent}: there is no {path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(Path(f"{path}.lock"), f"data {path.name}: another process downloads it"):
            if not path.is_file():
                _fetch(address, path, checksum)
    except OSError as error:
        raise UserError(
            f"data root {path.parent}: cannot be written ({files.unwritable(error)}), but {path.name} is to be downloaded there; "
            "set METARUN_DATA to another folder"
        ) from error
    return path


def _fetch(address: str, path: Path, checksum: str) -> None:
    by_hand = f"put the file by hand at {path}"
    part = path.with_name(path.name + ".part")
    digest = hashlib.new({32: "md5", 64: "sha256"}[len(checksum)], usedforsecurity=False)
    size = 0
    try:
        with open(part, "wb") as file:
            try:
                response = urllib.request.urlopen(address, timeout=TIMEOUT)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise UserError(f"download of {address} failed ({reason}); with no network, {by_hand}") from error
            with response:
                length = int(response.headers.get("Content-Length") or 0)
                with _progress(path.name, length) as progress:
                    while block := _receive(response, address, by_hand):
                        digest.update(block)
                        file.write(block)
                        size += len(block)
                        if progress is not None:
                            progress.update(0, advance=len(block))
            if size < length:
                raise UserError(
                    f"download of {address} broke off after {size} of {length} bytes; run again, or {by_hand}"
                )
            if digest.hexdigest() != checksum:
                raise UserError(
                    f"download of {address} brought another file than the published one "
                    f"({digest.name.upper()} {digest.hexdigest()}, expected {checksum}); run again, or {by_hand}"
                )
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _receive(response: Any, address: str, by_hand: str) -> bytes:
    """The next block. Its errors are of the network; they must not pass for those of writing the file."""
    try:
        return bytes(response.read(BLOCK))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"download of {address} broke off ({error}); run again, or {by_hand}") from error


def _progress(name: str, length: int) -> AbstractContextManager[Any]:
    """A bar on a terminal; one line in the log elsewhere."""
    if not sys.stderr.isatty():
        log.info("downloading %s (%.1f MB)", name, length / 1e6)
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task(name, total=length or None)  # the first task of a Progress has the number 0
    return progress
