"""What encoding a data set costs beside the bare network, and what memory it takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from .measure import cores, summary
from .worker import environment

NAME, SIDE, BATCH = "metarun:efficientnet_lite0", 84, 16
IMAGES = 2000
MANY, SMALL_SIDE = 60_000, 32  # for the memory: the same way, on a network that sees small images
CLASS = 100  # images
WORD = "images"


def throughput(rounds: int, seconds: float) -> dict[str, Any]:
    """Images a second of an encoder from a table on disk to a table on disk, and of its network alone on ready batches.

    Both take turns in one process with a thread a core, the same batch size, memory order and mode; `seconds` is not used,
    since a turn of the encoder is the whole table.
    """
    import torch

    from metarun.encoders.images import standardised
    from metarun.encoders.vectors import VectorTable
    from metarun.engine.hardware import keep_freed_memory

    keep_freed_memory()  # as every run does
    torch.set_num_threads(cores())
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    # The other lines have the tables of the user again.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, METARUN_CACHE=folder):
        source, encoder, encoding = _parts(IMAGES, None)
        batch = standardised(encoder.prepare(source.items(0, BATCH)), encoder.recipe)
        with torch.inference_mode():
            encoder.network(batch)
        for _ in range(rounds):
            started = time.perf_counter()
            with torch.inference_mode():
                for first in range(0, IMAGES, BATCH):
                    encoder.network(batch[: IMAGES - first])
            found["bare"].append(IMAGES / (time.perf_counter() - started))
            started = time.perf_counter()
            VectorTable(source, encoder, encoding).with_rows(np.arange(IMAGES))
            found["ours"].append(IMAGES / (time.perf_counter() - started))
            for path in Path(folder).glob("vectors-*/*"):
                path.unlink()
            for path in Path(folder).glob("vectors-*/"):
                path.rmdir()
    ratios = [ours / bare for ours, bare in zip(found["ours"], found["bare"], strict=True)]
    return {
        "title": f"encoding {IMAGES:,} images {SIDE}×{SIDE}, batches of {BATCH}",
        "unit": f"{WORD}/s",
        "ours": summary(found["ours"]),
        "peer": summary(found["bare"]) | {"name": "the bare network"},
        "ratio": float(np.median(ratios)),
        "ratio_by_round": ratios,
    }


def memory(rounds: int, seconds: float) -> dict[str, Any]:
    """Peak memory of fresh processes that encode few and many images, and how many times as much the many take."""
    peaks: dict[str, list[float]] = {}
    for count in (IMAGES, MANY):
        words = [sys.executable, "-m", "scripts.benchmark.encoding", str(count)]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, encoding="utf-8", check=True)
        peaks[str(count)] = [float(done.stdout.split()[-1])]
    few, many = (values[0] for values in peaks.values())
    return {
        "title": f"peak memory of encoding {MANY:,} images {SIDE}×{SIDE}, against {IMAGES:,}",
        "unit": "bytes of a process",
        "ours": {count: summary(values) for count, values in peaks.items()},
        "ratio": many / few,
    }


def _parts(count: int, image_size: int | None) -> tuple[Any, Any, Any]:
    """A source of random images in a table on disk, an encoder with random weights, and how it encodes."""
    from metarun.data.image_source import ImageSource
    from metarun.data.table import ClassImages, cached
    from metarun.encoders import Encoding
    from metarun.encoders.pretrained import Pretrained

    def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
        draw = np.random.default_rng(0)
        for number in range(count // CLASS):
            yield ClassImages(str(number), "", draw.integers(0, 256, (CLASS, 3, SIDE, SIDE), dtype=np.uint8))

    table = cached("benchmark", {"count": count}, build)
    everything = range(len(table.names))
    source = ImageSource(table, {"train": everything, "val": everything, "test": everything})
    encoder = Pretrained(name=NAME, weights=None, image_size=image_size)
    return source, encoder, Encoding("float16", 1, BATCH, "un", None)


def main() -> None:
    """Encodes as many images as the first word says, and prints the peak memory of this process in bytes."""
    import torch

    from metarun.encoders.vectors import VectorTable
    from metarun.engine.hardware import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METARUN_CACHE"] = folder
        count = int(sys.argv[1])
        VectorTable(*_parts(count, SMALL_SIDE)).with_rows(np.arange(count))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
