"""What a run leaves behind while it runs: `metrics.jsonl`, TensorBoard events, `metarun.log`, and lines or a bar on the terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metarun import files
from metarun.core import Episodes
from metarun.progress import progress_bar

log = logging.getLogger("metarun")

LINE_SECONDS = 5.0  # between two plain progress lines


class Terminal(logging.Handler):
    """Plain lines on whatever `sys.stderr` is at the time (a progress bar replaces it while it is shown)."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """The messages of the logger `metarun` also go to the file `path`, with their times."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def start_logging(quiet: bool = False) -> None:
    """Sends the logger `metarun` to the terminal, once a process; `quiet` leaves only warnings."""
    if not any(isinstance(handler, Terminal) for handler in log.handlers):
        log.addHandler(Terminal())
        log.setLevel(logging.WARNING if quiet else logging.INFO)
        log.propagate = False


class RunLogger:
    """The curves of one run folder; without a folder (a process that does not write) nothing is recorded."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: Any = None
        self._line_at = 0.0
        self._total = 0

    def rewind(self, step: int, validated: int | None = None) -> None:
        """Forgets what was recorded after `step`, since it will be recorded again; of validations, after step `validated`."""
        if self.folder is None:
            return
        metrics, kept, forgotten = self.folder / "metrics.jsonl", [], False
        if metrics.exists():
            for line in metrics.read_text().splitlines(keepends=True):
                values = json.loads(line) if line.endswith("\n") else {"step": step + 1}
                again = (
                    validated is not None and values["step"] > validated and any(k.startswith("val/") for k in values)
                )
                forgotten |= again and values["step"] == step
                if values["step"] <= step and not again:
                    kept.append(line)
            files.save_bytes(metrics, "".join(kept).encode())
        self.close()
        # TensorBoard forgets whole steps: what stays of this one is told to it once more.
        self._open(purge_step=step if forgotten else step + 1)
        for values in map(json.loads, kept if forgotten else []):
            if values.pop("step") == step:
                for name, value in values.items():
                    self.curve(name, value, step)

    def _open(self, purge_step: int | None = None) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        return self._writer

    def close(self) -> None:
        """Ends the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def scalars(self, step: int, values: dict[str, float], always: bool = False) -> None:
        """One line of `metrics.jsonl`, and one point a curve. A plain terminal shows it if `always`, or if it is time."""
        if self.folder is None:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.curve(name, value, step)
        self._open().flush()  # what a checkpoint has behind it must be on the curves, even after a kill
        if always or time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            shown = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items())
            log.info("step %d/%d  %s", step, self._total, shown)

    def curve(self, name: str, value: float, step: int) -> None:
        """One point of a TensorBoard curve."""
        if self.folder is not None:
            self._open().add_scalar(name, value, step)

    def picture(self, name: str, png: bytes) -> None:
        """A picture, `png` being a file's content."""
        if self.folder is not None:
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self._open().add_image(name, pixels, 0, dataformats="HWC")

    def hparams(self, config: dict[str, Any], test: float | None, validation: float | None = None) -> None:
        """The run's settings and results, for TensorBoard's table of runs: `hparams/test`, `hparams/validation`.

        Only what the run itself had is written. A description of all runs' settings, as `SummaryWriter.add_hparams` adds
        it, would be taken from one run for all, and hide the settings and results that this one does not have.
        """
        if self.folder is None:
            return
        from torch.utils.tensorboard.summary import hparams

        settings = {
            key: value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
            for key, value in config.items()
        }
        writer = self._open()
        for summary in hparams(settings, {})[1:]:  # not the first, the description of all
            writer.file_writer.add_summary(summary)
        for name, value in {"hparams/test": test, "hparams/validation": validation}.items():
            if value is not None:
                writer.add_scalar(name, value, 0)

    def tasks(self, episodes: Episodes) -> None:
        """A picture of the first task: a row a class, its support images, a gap, its query images."""
        if self.folder is None or episodes.support_x.ndim != 5:
            return
        support, query = (self._rows(x[0], episodes.ways) for x in (episodes.support_x, episodes.query_x))
        values = torch.cat([support.flatten(), query.flatten()])
        low, high = values.min(), values.max()
        gap = high.expand(*support.shape[:2], 4)  # white
        picture = torch.cat([support, gap, query], dim=2)
        self._open().add_image("task", (picture - low) / (high - low).clamp_min(1e-6), 0)

    @staticmethod
    def _rows(images: Tensor, ways: int, shown: int = 10) -> Tensor:
        """`[N*K, C, H, W]`, class-major, as one picture `[C, N*H, min(K, shown)*W]`."""
        per_way = images.cpu().float().unflatten(0, (ways, -1))[:, :shown]
        n, k, c, h, w = per_way.shape
        return per_way.permute(2, 0, 3, 1, 4).reshape(c, n * h, k * w)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar with the time left on a terminal; yields a function of the number done so far."""
        self._total = total
        if self.folder is None:
            yield lambda done: None
            return
        with progress_bar(what, total, done) as advance:
            yield advance
