"""The table of an encoder's vectors: made once, in chunks that a kill leaves whole, and then only mapped.

A table is a folder with `vectors.f16` (or `.f32`, raw numbers `[M, copies, D]`) and `table.json`. While it is made the folder is
called `….unfinished`, and `progress.json` in it says how many rows are whole and what digest they have: whoever goes on
cuts off what came after them, compares them with the digest, and goes on with the next row. Chunks are whole batches, so that
a table which was interrupted has the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarun import files
from metarun.data.table import build_once, cache_root, check_key, checksum, described, mapped, sample_digest
from metarun.data.table_source import TableSource
from metarun.encoders.base import PLURAL, Encoder, Encoding
from metarun.errors import UserError
from metarun.progress import progress_bar
from metarun.system import platform
from metarun.text import shape_text

FORMAT_VERSION = 1
SAVE_SECONDS = 5.0  # between two marks of progress; what lies between them is encoded again after a kill
PROGRESS = "progress.json"
BATCH = {"cpu": 16, "cuda": 256}  # what goes through fastest: a CPU's caches are small
AHEAD = 2  # batches that are prepared while one is encoded
BLOCK = 2**22  # bytes that are read at once where a digest is taken

log = logging.getLogger("metarun")


def table(source: TableSource, encoder: Encoder, encoding: Encoding, device: torch.device) -> np.ndarray:
    """The vectors of all items of a source, memory-mapped `[M, copies, D]`; encoded if they are not there yet.

    Of several processes that want the same table one encodes and the others wait.

    Args:
        source: The data set.
        encoder: What encodes its items.
        encoding: How.
        device: Where it computes.

    Raises:
        UserError: The cache cannot be written, or a table in it was damaged.
    """
    turns = source.turns
    key = {
        "format": FORMAT_VERSION,
        "items": source.table.fingerprint,
        "turns": turns,
        "views": encoding.views,
        "dtype": encoding.dtype,
        "encoder": [type(encoder).__name__, encoder.identity()],
    }
    folder = cache_root() / f"vectors-{files.digest(key)}"
    shape = (int(source.table.offsets[-1]), turns * encoding.views, encoder.features)
    told = "encoder: another process encodes the same items"

    def build() -> None:
        """Goes on with what an interrupted build left."""
        with _unfinished(folder) as unfinished:
            _build(unfinished, key, shape, source, encoder, encoding, device)

    build_once(folder, told, build)
    return _open(folder, key, shape, encoding.dtype)


def _file(folder: Path, dtype: str) -> Path:
    return folder / f"vectors.{'f16' if dtype == 'float16' else 'f32'}"


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """The folder that a table is made in: it gets the name `folder` in the end, and is removed where no row of it is whole."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if not unfinished.is_dir():
        unfinished.mkdir()
        platform.sync_folder(unfinished.parent)
    try:
        yield unfinished
    except BaseException:
        if not (unfinished / PROGRESS).exists():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    os.rename(unfinished, folder)
    platform.sync_folder(folder.parent)


def _build(
    unfinished: Path,
    key: dict[str, Any],
    shape: tuple[int, int, int],
    source: TableSource,
    encoder: Encoder,
    encoding: Encoding,
    device: torch.device,
) -> None:
    """Writes the vectors, in the folder of an unfinished table, up to the last, and what describes them."""
    rows, copies, features = shape
    path, width = _file(unfinished, encoding.dtype), copies * features * np.dtype(encoding.dtype).itemsize
    done, digest = _done(unfinished, key, path, width)
    kinds = PLURAL[source.item]
    log.info(
        "encoder: %s of %d %s%s",
        "going on with the vectors" if done else "making the vectors",
        rows,
        kinds,
        f", {done} of which are done" if done else f" in {unfinished.with_suffix('')}",
    )
    encoder.to(device)
    size = encoding.batch_size or BATCH.get(device.type, BATCH["cpu"])
    began = saved = time.monotonic()
    first = done
    with open(path, "r+b" if path.exists() else "w+b") as file, progress_bar("encoding", rows, done) as advance:
        file.truncate(done * width)
        file.seek(done * width)
        for done, made in _chunks(source, encoder, encoding, copies, first, rows, size):
            raw = np.ascontiguousarray(made).data
            digest.update(raw)
            file.write(raw)
            advance(done)
            if time.monotonic() - saved > SAVE_SECONDS or done == rows:
                file.flush()
                files.sync(file)
                told = {"rows": done, "digest": digest.hexdigest(), "key": files.digest(key)}
                files.save_json(unfinished / PROGRESS, told)
                saved = time.monotonic()
    description = {
        "key": key, "shape": shape, "fingerprint": digest.hexdigest(), "modified": path.stat().st_mtime_ns,
        "sample": sample_digest(np.memmap(path, np.uint8, "r")),
    }  # fmt: skip
    description["checksum"] = checksum(json.loads(json.dumps(description)))
    files.save_json(unfinished / "table.json", description)
    (unfinished / PROGRESS).unlink()
    platform.sync_folder(unfinished)
    seconds = time.monotonic() - began
    log.info("encoder: encoded %d %s in %.1f s, %.0f/s", rows - first, kinds, seconds, (rows - first) / seconds)


def _done(unfinished: Path, key: dict[str, Any], path: Path, width: int) -> tuple[int, Any]:
    """How many rows an interrupted build left whole, and the digest of their bytes; 0 where what it left is not what it wrote."""
    try:
        told = files.parsed((unfinished / PROGRESS).read_text(encoding="utf-8"))
        rows, digest, left = int(told["rows"]), hashlib.sha256(), int(told["rows"]) * width
        with open(path, "rb") as file:
            while left and (block := file.read(min(left, BLOCK))):
                digest.update(block)
                left -= len(block)
        own = files.digest(key)  # which one of an earlier version does not have
        if not left and digest.hexdigest() == told["digest"] and told.get("key", own) == own:
            return rows, digest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, hashlib.sha256()


def _prepared(
    source: TableSource, encoder: Encoder, encoding: Encoding, copies: int, rows: tuple[int, int]
) -> list[Any]:
    """The items of rows from a first to a last, prepared: for each quarter turn, and for each view of it."""
    found = []
    for turns in range(copies // encoding.views):
        items = source.items(*rows, turns)
        for view in range(encoding.views):
            found.append(encoder.prepare(encoder.changed(items, view) if view else items))
    return found


def _chunks(
    source: TableSource, encoder: Encoder, encoding: Encoding, copies: int, start: int, rows: int, size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The vectors `[n, copies, D]` of one batch of `size` rows after another, and the row after their last.

    Items are read and prepared by another thread while the batch before is encoded.
    """
    ends = [(first, min(first + size, rows)) for first in range(start, rows, size)]
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(_prepared, source, encoder, encoding, copies, end) for end in ends[:AHEAD])
        for number, (_, stop) in enumerate(ends):
            prepared = ahead.popleft().result()
            if number + AHEAD < len(ends):
                ahead.append(pool.submit(_prepared, source, encoder, encoding, copies, ends[number + AHEAD]))
            yield stop, np.stack([_kept(encoder, encoding, one) for one in prepared], 1)


@torch.inference_mode()
def _kept(encoder: Encoder, encoding: Encoding, prepared: Any) -> np.ndarray:
    """Vectors of prepared items as they are kept, `[n, D]`."""
    found = encoder.encode(prepared)
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or found.shape[1] != encoder.features:
        gives = (
            f"a tensor of {shape_text(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        )
        raise UserError(
            f"encoder: {type(encoder).__name__}.encode gives {gives}, not a tensor of n x {encoder.features}, a vector for each item"
        )
    x = found.float()
    if not x.isfinite().all():
        raise UserError(f"encoder: {type(encoder).__name__} gives vectors that are not finite")
    kept: np.ndarray = x.to(getattr(torch, encoding.dtype)).cpu().numpy()
    if not np.isfinite(kept).all():
        raise UserError("encoder.dtype=float16: a vector has values beyond 65504; use encoder.dtype=float32")
    return kept


def _open(folder: Path, key: dict[str, Any], shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    try:
        description = described(folder)
        if description.pop("checksum") != checksum(description):
            raise ValueError("what table.json says has changed since it was made")
        check_key(description["key"], key)
        path = _file(folder, dtype)
        raw = mapped(path)
        if sample_digest(raw) != description["sample"] or raw.size != np.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"the bytes of {path.name} have changed since it was made")
        if path.stat().st_mtime_ns != description["modified"]:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != description["fingerprint"]:
                    raise ValueError(f"the bytes of {path.name} have changed since it was made")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data cache {folder}: the vectors cannot be read ({error}); delete this folder to have them made again"
        ) from error
    return raw.view(dtype).reshape(shape)
