"""One cache format for every image data set: a memory-mapped uint8 table and class offsets.

A table is a folder with `images.u8` (raw bytes) and `table.json`. It is built once, under a file lock, into a folder
beside it, synced and then renamed: whoever finds the folder finds it whole. Each opening compares the bytes with what
was written: all of a small table, a sample of a large one, and all of that too where the file was touched since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from metarun import files
from metarun.data.roots import cache_root
from metarun.errors import UserError
from metarun.system import platform

FORMAT_VERSION = 3
SAMPLED_BYTES = 2**25  # a larger table is compared by a sample of as many bytes
SAMPLES = 512
SECONDS_OF_SILENCE = 10.0  # from one line about a table that is being built to the next
Build = Callable[[dict[str, Any]], Iterable["ClassImages"]]

log = logging.getLogger("metarun")


class ClassImages(NamedTuple):
    """All images of one class, as a data set's builder yields them."""

    name: str
    group: str  # alphabet, script or sub-folder; an empty string where there is none
    images: np.ndarray  # uint8 [n, C, H, W]


class ItemTable(Protocol):
    """What a source must know of its table, whatever its items are; those of class c are the rows `offsets[c]` to `offsets[c + 1]`.

    Attributes:
        offsets: int64 `[classes + 1]`.
        names: Of the classes.
        groups: Of each class its alphabet, script or sub-folder; an empty string where there is none.
        fingerprint: A digest of the items and offsets.
        metadata: JSON values for `result.json`; `parts` are the data set's own training, validation and test items.
        sizes: Items per class, int64 `[classes]`.
    """

    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def groups(self) -> list[str]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def sizes(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Table:
    """All images of a data set; those of class c are the rows `offsets[c]` to `offsets[c + 1]`."""

    images: np.ndarray  # uint8 [M, C, H, W], memory-mapped
    offsets: np.ndarray  # int64 [classes + 1]
    names: list[str]
    groups: list[str]
    fingerprint: str  # SHA-256 of the images and offsets
    metadata: dict[str, Any] = field(default_factory=dict)  # what the builder wants to be remembered

    @property
    def sizes(self) -> np.ndarray:
        """Images per class, int64 [classes]."""
        return np.diff(self.offsets)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads the rows from `start` to `stop` from the file: mapped pages would count as this process's memory."""
        path = getattr(self.images, "filename", None)
        if path is None:  # made in memory
            return self.images[start:stop]
        shape = self.images.shape[1:]
        size = math.prod(shape)
        found = np.fromfile(path, np.uint8, (stop - start) * size, offset=start * size)
        return found.reshape(-1, *shape)


def cached(name: str, key: dict[str, Any], build: Build) -> Table:
    """Opens the table of `name` made with the settings `key` (JSON values); builds it with `build(metadata)` if it is not there yet.

    `build` yields the classes in their final order, all images of one shape, and may put JSON values into `metadata`.
    Of several processes that want the same table one builds it and the others wait. A failed or killed build leaves
    nothing behind that could be taken for a table. Raises `UserError` where the source cannot be read (an `OSError` of
    `build`), where the cache cannot be written, and where a table was damaged afterwards.
    """
    root = cache_root()
    key = {"name": name, "format": FORMAT_VERSION, **key}
    folder = root / f"{name}-{files.digest(key)}"
    build_once(folder, f"data {name}: another process builds its table", lambda: _build(folder, key, build))
    return _open(folder, key)


def build_once(folder: Path, waiting: str, build: Callable[[], None], there: Callable[[], bool] | None = None) -> None:
    """Has a folder of the cache made, if it is not there, by one of all processes that want it.

    Args:
        folder: The folder.
        waiting: What is said while another process makes it.
        build: Makes it, whole or not at all.
        there: Whether what is wanted of it is there; None for a folder that is there as soon as it has its name.

    Raises:
        UserError: The cache cannot be written.
    """
    there = there or folder.is_dir
    if there():
        return
    try:
        files.make_folder(folder.parent)
        with files.locked(folder.with_name(f"{folder.name}.lock"), waiting):
            if not there():
                build()
    except OSError as error:
        raise UserError(
            f"data cache {folder.parent}: cannot be written ({files.unwritable(error)}); set METARUN_CACHE to another folder"
        ) from error


def listing(named: Iterable[tuple[str, Path]]) -> str:
    """Digests names, and the sizes and times of the files that they are of: whether a table is of these very files."""
    digest = hashlib.sha256()
    for name, path in named:
        status = os.stat(path) if path.exists() else os.lstat(path)  # a link may lead nowhere
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def inside(*paths: Path) -> list[tuple[str, Path]]:
    """Files, and all files in folders, named by where they are."""
    found = []
    for top in paths:
        deeper = sorted(folder / name for folder, names in files.walk(top) for name in names)
        found += [(str(path), path) for path in deeper or [top]]
    return found


def _build(folder: Path, key: dict[str, Any], build: Build) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed build; the lock is ours
    unfinished.mkdir()
    platform.sync_folder(unfinished.parent)
    log.info("data %s: building its table in %s", key["name"], folder)
    began = told = time.monotonic()
    try:
        metadata: dict[str, Any] = {}
        names: list[str] = []
        groups: list[str] = []
        counts = [0]
        shape: tuple[int, ...] | None = None
        digest = hashlib.sha256()
        with open(unfinished / "images.u8", "wb") as file:
            for name, group, images in _read(key["name"], build, metadata):
                shape = shape or images.shape[1:]
                if images.dtype != np.uint8 or images.shape[1:] != shape:
                    raise ValueError(f"class {name}: {images.dtype} {images.shape[1:]}, expected uint8 {shape}")
                names.append(name)
                groups.append(group)
                counts.append(len(images))
                raw = np.ascontiguousarray(images).data
                digest.update(raw)
                file.write(raw)
                if time.monotonic() - told >= SECONDS_OF_SILENCE:
                    told = time.monotonic()
                    log.info("data %s: %d images after %.0f s", key["name"], sum(counts), told - began)
            if not sum(counts):
                raise ValueError(f"data {key['name']}: the builder yielded no images")
            file.flush()
            files.sync(file)
        offsets = np.cumsum(counts).tolist()
        digest.update(json.dumps(offsets).encode())
        written = unfinished / "images.u8"
        description = {
            "key": key, "shape": shape, "offsets": offsets, "names": names, "groups": groups,
            "fingerprint": digest.hexdigest(), "metadata": metadata, "modified": written.stat().st_mtime_ns,
            "sample": sample_digest(np.memmap(written, np.uint8, "r")),
        }  # fmt: skip
        description["checksum"] = checksum(description)
        with open(unfinished / "table.json", "w", encoding="utf-8") as file:
            json.dump(description, file)
            file.flush()
            files.sync(file)
        platform.sync_folder(unfinished)
        os.rename(unfinished, folder)
        platform.sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    log.info(
        "data %s: built %d images of %d classes in %.1f s",
        key["name"],
        sum(counts),
        len(names),
        time.monotonic() - began,
    )


def _read(name: str, build: Build, metadata: dict[str, Any]) -> Iterator[ClassImages]:
    """What `build` yields. Its own `OSError`s concern the source: they must not pass for those of writing the cache."""
    try:
        yield from build(metadata)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"data {name}: {where}cannot be read ({error.strerror or error})") from error


def sample_digest(raw: np.ndarray) -> str:
    """Digests bytes `[n]`: all, or where they are many `SAMPLES` stretches from the first to the last.

    A mapped file is read, not touched through its map, whose pages would count as this process's memory.
    """
    path, begins = getattr(raw, "filename", None), getattr(raw, "offset", 0)
    length = SAMPLED_BYTES // SAMPLES
    whole = raw.size <= SAMPLED_BYTES
    starts = np.arange(0, raw.size, length) if whole else np.linspace(0, raw.size - length, SAMPLES).astype(np.int64)
    digest = hashlib.sha256(str(raw.size).encode())
    for start in map(int, starts):
        stop = min(start + length, raw.size)
        part = raw[start:stop] if path is None else np.fromfile(path, np.uint8, stop - start, offset=begins + start)
        digest.update(part.data)
    return digest.hexdigest()


def checksum(description: dict[str, Any]) -> str:
    """Digests what `table.json` says."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def check_key(stored: Any, key: dict[str, Any]) -> None:
    """Raises `ValueError` where the key that a folder holds is not the one that its name was made of."""
    if files.digest(stored) != files.digest(json.loads(json.dumps(key))):
        raise ValueError("it was made of other items or settings than those that its name stands for")


def described(folder: Path) -> Any:
    """What the `table.json` of a folder of the cache says. Raises `ValueError` where it is none."""
    return files.parsed(_whole(folder / "table.json").read_text(encoding="utf-8"))


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file of the cache, uint8 `[n]`, mapped. Raises `ValueError` where it is none."""
    # "c" (copy on write) rather than "r": torch refuses to wrap read-only arrays without a warning.
    return np.memmap(_whole(path), dtype=np.uint8, mode="c")


def _whole(path: Path) -> Path:
    if kind := files.special(path):
        raise ValueError(f"{path.name} is {kind}, and no file")
    return path


def _open(folder: Path, key: dict[str, Any]) -> Table:
    try:
        description = described(folder)
        if description.pop("checksum") != checksum(description):
            raise ValueError("what table.json says has changed since it was built")
        check_key(description["key"], key)
        offsets = np.array(description["offsets"], dtype=np.int64)
        shape = (int(offsets[-1]), *description["shape"])
        path = folder / "images.u8"
        raw = mapped(path)
        whole = raw.size == math.prod(shape) and sample_digest(raw) == description["sample"]
        if whole and raw.size > SAMPLED_BYTES and path.stat().st_mtime_ns != description["modified"]:
            digest = hashlib.sha256(raw.data)
            digest.update(json.dumps(description["offsets"]).encode())
            whole = digest.hexdigest() == description["fingerprint"]
        if not whole:
            raise ValueError("the bytes of images.u8 have changed since it was built")
        images = raw.reshape(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data cache {folder}: the table cannot be read ({error}); delete this folder to have it built again"
        ) from error
    return Table(
        images,
        offsets,
        description["names"],
        description["groups"],
        description["fingerprint"],
        description["metadata"],
    )
