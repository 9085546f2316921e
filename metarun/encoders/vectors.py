"""The table of an encoder's vectors, made as far as rows of it are asked for, in chunks that a kill leaves whole, and then only mapped.

A table is a folder with `vectors.f16` (or `.f32`, raw numbers `[M, copies, D]`) and `table.json`, which lists the parts of it that are
whole: from which row to which, and the digest of their bytes. Rows of no part are a hole in the file. Whoever asks for rows that are in
no part has them made, under a lock: in a run that only tests these are those of the test items, and a training adds others later. Rows
are encoded with those that share their batch, and batches are counted from the first row, so that a vector depends neither on what was
asked for before nor on interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarun import files
from metarun.data.image_source import DEVICE_TABLE_BYTES
from metarun.data.roots import cache_root
from metarun.data.table import build_once, check_key, checksum, described, mapped, sample_digest
from metarun.data.table_source import TableSource
from metarun.encoders.base import PLURAL, Encoder, Encoding
from metarun.errors import UserError
from metarun.progress import progress_bar
from metarun.system import platform
from metarun.text import shape_text

FORMAT_VERSION = 2
SAVE_SECONDS = 5.0  # between two marks of progress; what lies between them is encoded again after a kill
BATCH = {"cpu": 16, "cuda": 256}  # what goes through fastest: a CPU's caches are small
AHEAD = 2  # batches that are prepared while one is encoded
TIMED = 8  # batches by which the time of others is estimated
BLOCK = 2**22  # bytes that are read at once where a digest is taken
CHANGED = "the bytes of {} have changed since it was made"

log = logging.getLogger("metarun")


class VectorTable:
    """The vectors of all items of a source, `[M, copies, D]`, of which those are made that are asked for.

    Args:
        source: The data set.
        encoder: What encodes its items.
        encoding: How.

    Attributes:
        device: Where the encoder computes.
    """

    def __init__(self, source: TableSource, encoder: Encoder, encoding: Encoding) -> None:
        self.source, self.encoder, self.encoding = source, encoder, encoding
        self.device = torch.device("cpu")
        rows = int(source.table.offsets[-1])
        self.shape = (rows, source.turns * encoding.views, encoder.features)
        self._raw: np.ndarray | None = None
        self._whole = np.zeros(rows, dtype=bool)  # the rows that were found whole
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def with_rows(self, rows: np.ndarray) -> np.ndarray:
        """The table, memory-mapped, in which these rows are whole; those that are not there yet are encoded.

        Of several processes that want rows of the same table one encodes and the others wait.

        Args:
            rows: int64, of any shape.

        Raises:
            UserError: The cache cannot be written, or the table in it was damaged.
        """
        if self._raw is None or not self._whole[rows].all():
            told = "encoder: another process encodes items of the same data set"
            build_once(self.folder, told, lambda: self._build(rows), lambda: self._there(rows))
            if not self._there(rows):
                raise UserError(f"data cache {self.folder}: another process removed it; run this again")
        assert self._raw is not None
        return self._raw.view(self.encoding.dtype).reshape(self.shape)

    def is_whole(self, rows: np.ndarray) -> bool:
        """Whether these rows are known to be there."""
        return bool(self._whole[rows].all())

    def seconds(self, rows: np.ndarray) -> float:
        """Estimates how long it takes to make those of some rows that are not there, by a few batches; nothing is kept.

        Args:
            rows: int64, of any shape.

        Raises:
            UserError: The table in the cache was damaged, or these items cannot be encoded.
        """
        self._there(rows)
        missing = rows[~self._whole[rows]]
        if not missing.size:
            return 0.0
        ends = batches(missing, [], self.shape[0], self._batch)[: TIMED + 1]
        self.encoder.to(self.device)
        times = [time.monotonic()]
        for _ in self._chunks(ends):
            times.append(time.monotonic())
        first = 1 if len(ends) > 1 else 0  # the first batch warms up
        timed = sum(stop - start for start, stop in ends[first:])
        return float(missing.size * (times[-1] - times[first]) / timed)

    def on(self, device: torch.device, rows: np.ndarray) -> torch.Tensor:
        """The table on a device, or mapped where it is large, in which these rows are whole.

        Args:
            device: The device.
            rows: int64, of any shape.
        """
        found = self.with_rows(rows)
        if device not in self._on_device:
            table = torch.from_numpy(found)
            if found.nbytes <= DEVICE_TABLE_BYTES:
                table = table.clone() if device.type == "cpu" else table.to(device)
            self._on_device[device] = table
        return self._on_device[device]

    @cached_property
    def key(self) -> dict[str, Any]:
        """JSON values that the vectors depend on."""
        return {
            "format": FORMAT_VERSION,
            "items": self.source.table.fingerprint,
            "turns": self.source.turns,
            "views": self.encoding.views,
            "dtype": self.encoding.dtype,
            "encoder": [type(self.encoder).__name__, self.encoder.identity()],
        }

    @property
    def folder(self) -> Path:
        """Where the table lies."""
        return cache_root() / f"vectors-{files.digest(self.key)}"

    @property
    def _file(self) -> Path:
        return self.folder / f"vectors.{'f16' if self.encoding.dtype == 'float16' else 'f32'}"

    @property
    def _width(self) -> int:
        """The bytes of a row."""
        return self.shape[1] * self.shape[2] * np.dtype(self.encoding.dtype).itemsize

    @property
    def _batch(self) -> int:
        """How many items are encoded together."""
        return self.encoding.batch_size or BATCH.get(self.device.type, BATCH["cpu"])

    @property
    def _description(self) -> Path:
        """What lists the parts; where it is not there, no part is whole yet."""
        return self.folder / "table.json"

    def _there(self, rows: np.ndarray) -> bool:
        """Maps what is there, and finds which of these rows are whole; returns whether all are.

        Raises:
            UserError: It was damaged.
        """
        if not self._description.exists():
            return False
        with self._damage_told():
            parts, touched = self._parts()
            self._raw = mapped(self._file)
            listed = np.zeros_like(self._whole)
            for part in parts:
                first, last = part["rows"]
                listed[first:last] = True
                if not self.is_whole(rows[(rows >= first) & (rows < last)]):
                    self._check(part, all_of_it=touched)
                    self._whole[first:last] = True
            self._whole &= listed  # not those of a table that was removed meanwhile, which are holes in the new one
        self._on_device.clear()
        return self.is_whole(rows)

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        """Raises `UserError` for what is raised where a table is not as it was made."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"data cache {self.folder}: the vectors cannot be read ({error}); delete this folder to have them made again"
            ) from error

    def _parts(self) -> tuple[list[dict[str, Any]], bool]:
        """What is said of the parts, and whether the file was written since. What an earlier version says is of the whole table."""
        description = described(self.folder)
        if description.pop("checksum") != checksum(description):
            raise ValueError("what table.json says has changed since it was made")
        check_key(description["key"], self.key)
        status = self._file.stat()
        if status.st_size != self.shape[0] * self._width:
            raise ValueError(CHANGED.format(self._file.name))
        whole = {"rows": [0, self.shape[0]], **{name: description.get(name) for name in ("fingerprint", "sample")}}
        return description.get("parts", [whole]), status.st_mtime_ns != description["modified"]

    def _check(self, part: dict[str, Any], *, all_of_it: bool) -> None:
        """Raises `ValueError` where the bytes of a part are not those that it was made with."""
        first, last = part["rows"]
        start, size = first * self._width, (last - first) * self._width
        if not all_of_it and part["sample"] is not None:
            same = _sample(self._file, start, size) == part["sample"]
        else:
            digest = hashlib.sha256()
            with open(self._file, "rb") as file:
                file.seek(start)
                while size and (block := file.read(min(size, BLOCK))):
                    digest.update(block)
                    size -= len(block)
            same = digest.hexdigest() == part["fingerprint"]
        if not same:
            raise ValueError(CHANGED.format(self._file.name))

    def _build(self, rows: np.ndarray) -> None:
        """Makes the rows that are not whole yet, and those that share their batches; the folder is removed where no row of it is whole."""
        # What an earlier version left of a table that it did not finish.
        shutil.rmtree(self.folder.with_name(f"{self.folder.name}.unfinished"), ignore_errors=True)
        if not self.folder.is_dir():
            self.folder.mkdir()
            platform.sync_folder(self.folder.parent)
        try:
            self._encode(rows)
        except BaseException:
            if not self._description.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _encode(self, rows: np.ndarray) -> None:
        parts = self._known_parts()
        ends = batches(rows, [part["rows"] for part in parts], self.shape[0], self._batch)
        known, wanted = (sum(stop - start for start, stop in some) for some in ([p["rows"] for p in parts], ends))
        kinds = PLURAL[self.source.item]
        log.info(
            "encoder: making the vectors of %d %s%s",
            wanted,
            kinds,
            f", beside those of {known} that are there" if known else f" in {self.folder}",
        )
        self.encoder.to(self.device)
        began = saved = time.monotonic()
        made, digest = 0, hashlib.sha256()
        with (
            open(self._file, "r+b" if self._file.exists() else "w+b") as file,
            progress_bar("encoding", wanted) as advance,
        ):
            file.truncate(self.shape[0] * self._width)
            for (start, stop), vectors in zip(ends, self._chunks(ends), strict=True):
                if not made or parts[-1]["rows"][1] != start:
                    digest = hashlib.sha256()
                    parts.append({"rows": [start, start], "sample": None})
                    file.seek(start * self._width)
                raw = np.ascontiguousarray(vectors).data
                digest.update(raw)
                file.write(raw)
                parts[-1] |= {"rows": [parts[-1]["rows"][0], stop], "fingerprint": digest.hexdigest()}
                made += stop - start
                advance(made)
                if time.monotonic() - saved > SAVE_SECONDS or made == wanted:
                    file.flush()
                    files.sync(file)
                    self._save(parts, sampled=made == wanted)
                    saved = time.monotonic()
        platform.sync_folder(self.folder)
        seconds = time.monotonic() - began
        log.info("encoder: encoded %d %s in %.1f s, %.0f/s", made, kinds, seconds, made / seconds)

    def _known_parts(self) -> list[dict[str, Any]]:
        """The parts that are whole before others are added to them, all compared where the file was written since: it will be anew."""
        if not self._description.exists():
            return []
        with self._damage_told():
            parts, touched = self._parts()
            for part in parts:
                if touched or part["sample"] is None:
                    self._check(part, all_of_it=True)
        return parts

    def _save(self, parts: list[dict[str, Any]], *, sampled: bool) -> None:
        """Writes `table.json`.

        Args:
            parts: What it says of the parts.
            sampled: Whether parts get a digest of a sample of them, which is for those that grow no more.
        """
        for part in parts if sampled else []:
            if part["sample"] is None:
                first, last = part["rows"]
                part["sample"] = _sample(self._file, first * self._width, (last - first) * self._width)
        modified = self._file.stat().st_mtime_ns
        description = {"key": self.key, "shape": self.shape, "parts": parts, "modified": modified}
        description["checksum"] = checksum(json.loads(json.dumps(description)))
        files.save_json(self._description, description)

    def _prepared(self, start: int, stop: int) -> list[Any]:
        """The items of rows from a first to a last, prepared: for each quarter turn, and for each view of it."""
        found = []
        for turns in range(self.source.turns):
            items = self.source.items(start, stop, turns)
            for view in range(self.encoding.views):
                found.append(self.encoder.prepare(self.encoder.changed(items, view) if view else items))
        return found

    def _chunks(self, ends: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The vectors `[n, copies, D]` of one batch after another, each from a row to another one.

        Items are read and prepared by another thread while the batch before is encoded.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(self._prepared, *end) for end in ends[:AHEAD])
            for number in range(len(ends)):
                prepared = ahead.popleft().result()
                if number + AHEAD < len(ends):
                    ahead.append(pool.submit(self._prepared, *ends[number + AHEAD]))
                start, stop = ends[number]
                yield np.stack([_kept(self.encoder, self.encoding, one, stop - start) for one in prepared], 1)


def batches(rows: np.ndarray, parts: list[list[int]], count: int, size: int) -> list[tuple[int, int]]:
    """The batches that have some of the rows, without what is there already: the first row of each and the row after its last.

    Args:
        rows: The rows, int64 of any shape.
        parts: What is there already, from rows to rows.
        count: The rows of the table.
        size: The rows of a batch; the first one begins at row 0.
    """
    wanted = np.zeros(-(-count // size), dtype=bool)
    wanted[rows // size] = True
    missing = np.repeat(wanted, size)[:count]
    for first, last in parts:
        missing[first:last] = False
    found = []
    for block in np.flatnonzero(wanted):
        inside = np.flatnonzero(missing[block * size : (block + 1) * size]) + block * size
        stretches = np.split(inside, np.flatnonzero(np.diff(inside) != 1) + 1) if inside.size else []
        found += [(int(one[0]), int(one[-1]) + 1) for one in stretches]
    return found


def _sample(path: Path, start: int, size: int) -> str:
    """Digests a sample of some bytes of a file, see `sample_digest`."""
    return sample_digest(np.memmap(path, np.uint8, "r", offset=start, shape=(size,)))


@torch.inference_mode()
def _kept(encoder: Encoder, encoding: Encoding, prepared: Any, count: int) -> np.ndarray:
    """Vectors of `count` prepared items as they are kept, `[count, D]`."""
    found = encoder.encode(prepared)
    if not isinstance(found, torch.Tensor) or found.shape != (count, encoder.features):
        gives = (
            f"a tensor of {shape_text(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        )
        raise UserError(
            f"encoder: {type(encoder).__name__}.encode gives {gives}, not a tensor of {count}x{encoder.features}, a vector for each "
            "item"
        )
    x = found.float()
    if not x.isfinite().all():
        raise UserError(f"encoder: {type(encoder).__name__} gives vectors that are not finite")
    kept: np.ndarray = x.to(getattr(torch, encoding.dtype)).cpu().numpy()
    if not np.isfinite(kept).all():
        raise UserError("encoder.dtype=float16: a vector has values beyond 65504; use encoder.dtype=float32")
    return kept
