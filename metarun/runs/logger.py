"""What a run leaves behind while it runs: `metrics.jsonl`, TensorBoard events, `metarun.log`, and lines or a bar on the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metarun import files
from metarun.core import Episodes
from metarun.errors import UserError
from metarun.progress import progress_bar
from metarun.runs import contents
from metarun.system import platform
from metarun.text import counted, duration, printable

log = logging.getLogger("metarun")

LINE_SECONDS = 5.0  # between two plain progress lines
FIRST_STEPS = 10  # after so many of a sitting it is told how long the rest takes
LONG_SECONDS = 60.0  # ... if that is at least this long
LIMITS = (30, 60, 120, 300, 600)  # seconds that it is told to take instead
# A line on the terminal shall fit into 80 columns.
SHORT = {"learning_rate": "lr", "tasks_per_second": "tasks/s", "items_per_second": "items/s"}
RESULTS = ".results"  # ends the name of the TensorBoard file of what follows the training


class Pace:
    """How fast something goes on, and so how long the rest of it takes.

    Args:
        total: The number that is to be done.
        done: The number that was done before.
        seconds: The seconds after which it ends early; None has no such limit.
    """

    def __init__(self, total: int, done: int, seconds: float | None = None) -> None:
        self.total, self.seconds, self._began = total, seconds, time.monotonic()
        self._from, self._from_at = done, self._began

    @property
    def passed(self) -> float:
        """The seconds so far."""
        return time.monotonic() - self._began

    def at(self, now: int) -> None:
        """Learns that `now` are done. What the first takes is left out where others follow: it warms up."""
        if self._from_at == self._began and now > self._from:
            self._from, self._from_at = now, time.monotonic()

    def left(self, now: int) -> float | None:
        """The seconds that the rest takes about, where `now` are done; None where nothing is known yet."""
        if now <= self._from:
            return None
        left = (self.total - now) * (time.monotonic() - self._from_at) / (now - self._from)
        return left if self.seconds is None else max(0.0, min(left, self.seconds - self.passed))


def _short(key: str, value: Any) -> Any:
    """What a table shows of a setting: of a class of metarun's the name of its module, which is that of the choice."""
    parts = str(value).split(".")
    return parts[-2] if key.endswith("._target_") and parts[0] == "metarun" and len(parts) > 2 else value


def _summary_writer(folder: str, **options: Any) -> Any:
    """TensorBoard's writer, whose thread prints no traceback of an error that it also raises where it is next used."""
    from torch.utils.tensorboard import SummaryWriter

    before = threading.excepthook
    if before is not _thread_ended:
        _hooks[:] = [before]
        threading.excepthook = _thread_ended
    return SummaryWriter(folder, **options)


_hooks: list[Callable[[Any], Any]] = []


def _thread_ended(ended: Any) -> None:
    if not (type(ended.thread).__name__ == "_AsyncWriterThread" and isinstance(ended.exc_value, OSError)):
        _hooks[0](ended)


class Plain(logging.Formatter):
    """A message as one line, whatever names of others are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without characters that a terminal would obey."""
        return printable(super().formatMessage(record))


class TerminalHandler(logging.Handler):
    """Plain lines on whatever `sys.stderr` is at the time (a progress bar replaces it while it is shown)."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(Plain())

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        print(self.format(record), file=sys.stderr, flush=True)


class LogFile(logging.FileHandler):
    """Lines in a file; one that cannot be written ends the run, as any file of a run does that cannot be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Raises what `emit` has caught; logging would print a traceback and go on."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from None
        super().handleError(record)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Sends the messages of the logger `metarun` to the file `path`, too, with their times.

    Raises:
        OSError: The file cannot be written.
    """
    handler = LogFile(path)
    handler.setFormatter(Plain("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # of a line that was told to be unwritten already
            handler.close()


def start_logging(quiet: bool = False) -> None:
    """Sends the logger `metarun` to the terminal, once a process; `quiet` leaves only warnings."""
    if not any(isinstance(handler, TerminalHandler) for handler in log.handlers):
        log.addHandler(TerminalHandler())
        log.setLevel(logging.WARNING if quiet else logging.INFO)
        log.propagate = False


@contextmanager
def logging_as_it_was() -> Iterator[None]:
    """Puts back afterwards where the messages of the logger `metarun` go, and which there are."""
    before = log.handlers[:], log.level, log.propagate
    try:
        yield
    finally:
        log.handlers[:], level, log.propagate = before
        log.setLevel(level)  # which also forgets what was found of the earlier level


class RunLogger:
    """The curves of one run folder; without a folder (a process that does not write) nothing is recorded."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: Any = None  # of the training's curves
        self._results: Any = None  # of all else
        self._line_at = 0.0
        self._pace: Pace | None = None

    def rewind(self, step: int, validated: int | None = None) -> None:
        """Forgets what was recorded after `step`, since it will be recorded again; of validations, after step `validated`."""
        if self.folder is None:
            return
        metrics, kept, forgotten, damaged = self.folder / contents.METRICS, list[dict[str, Any]](), False, 0
        if metrics.exists():
            found, damaged = files.read_json_lines(metrics)
            for values in found:
                again = (
                    validated is not None and values["step"] > validated and any(k.startswith("val/") for k in values)
                )
                forgotten |= again and values["step"] == step
                if values["step"] <= step and not again:
                    kept.append(values)
            files.save_bytes(metrics, "".join(files.json_text(values) + "\n" for values in kept).encode())
        if damaged:
            log.warning(
                "%s: %s left out, after a power failure perhaps; the weights do not depend on them",
                metrics, counted(damaged, "damaged line was", "damaged lines were"),
            )  # fmt: skip
        self.close()
        # TensorBoard forgets whole steps: what stays of this one is told to it once more.
        writer = self._open(purge_step=step if forgotten else step + 1)
        for values in kept if forgotten else []:
            if values.pop("step") == step:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

    def _open(self, purge_step: int | None = None) -> Any:
        """The TensorBoard file of the training."""
        if self._writer is None:
            with self._writing():
                self._writer = _summary_writer(str(self.folder), purge_step=purge_step)
        return self._writer

    def _open_results(self) -> Any:
        """The TensorBoard file of what follows the training; that of an earlier sitting, which was killed, goes.

        All of it is told again after a kill, and TensorBoard would show it twice.
        """
        if self._results is None:
            assert self.folder is not None
            self.close()  # TensorBoard reads one file after the other
            for old in self.folder.glob(f"events.*{RESULTS}"):
                old.unlink()
            with self._writing():
                self._results = _summary_writer(str(self.folder), filename_suffix=RESULTS)
        return self._results

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written, to a full disk say, is a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror or error}); the same command goes on once there is room"
            ) from error

    def sync(self) -> None:
        """Has all that was recorded reach the disk: a checkpoint that relies on it is saved afterwards."""
        if self.folder is None:
            return
        with self._writing():
            for writer in (self._writer, self._results):
                if writer is not None:
                    writer.flush()
            for path in (self.folder / contents.METRICS, *self.folder.glob("events.*")):
                if path.is_file():
                    with open(path, "r+b") as file:  # Windows syncs no file that is open for reading alone
                        files.sync(file)
            platform.sync_folder(self.folder)

    def close(self) -> None:
        """Ends the TensorBoard files."""
        for writer in (self._writer, self._results):
            if writer is not None:
                with contextlib.suppress(OSError):  # a full disk, which was told when it was met
                    writer.close()
        self._writer = self._results = None

    def scalars(self, step: int, values: dict[str, float], always: bool = False) -> None:
        """Writes one line of `metrics.jsonl`, and one point a curve. A plain terminal shows it if `always`, or if it is time."""
        if self.folder is None:
            return
        with self._writing():
            with open(self.folder / contents.METRICS, "a", encoding="utf-8") as file:
                file.write(files.json_text({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._open().add_scalar(name, value, step)
            self._open().flush()  # what a checkpoint has behind it must be on the curves, even after a kill
        if always or time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            names = [name.removeprefix("train/") for name in values]
            shown = "  ".join(
                f"{SHORT.get(name, name)} {value:.4g}" for name, value in zip(names, values.values(), strict=True)
            )
            left = self._pace.left(step) if self._pace else None
            told = f"  {duration(left)} left" if left is not None and left >= 1 else ""
            log.info("step %d/%d  %s%s", step, self._pace.total if self._pace else 0, shown, told)

    def curve(self, name: str, value: float, step: int) -> None:
        """Adds one point to a TensorBoard curve of what follows the training."""
        if self.folder is not None:
            with self._writing():
                self._open_results().add_scalar(name, value, step)

    def picture(self, name: str, png: bytes) -> None:
        """Adds a picture, `png` being a file's content."""
        if self.folder is not None:
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            with self._writing():
                self._open_results().add_image(name, pixels, 0, dataformats="HWC")

    def hparams(self, config: dict[str, Any], test: float | None, validation: float | None = None) -> None:
        """Writes the run's settings and results, for TensorBoard's table of runs: `hparams/test`, `hparams/validation`.

        Only what the run itself had is written. A description of all runs' settings, as `SummaryWriter.add_hparams` adds
        it, would be taken from one run for all, and hide the settings and results that this one does not have.
        """
        if self.folder is None:
            return
        from torch.utils.tensorboard.summary import hparams

        settings = {
            key.removesuffix("._target_"): value
            if isinstance(value, int | float) and not isinstance(value, bool)
            else str(value)
            for key, value in ((key, _short(key, value)) for key, value in config.items())
        }
        with self._writing():
            writer = self._open_results()
            for summary in hparams(settings, {})[1:]:  # not the first, the description of all
                writer.file_writer.add_summary(summary)
            for name, value in {"hparams/test": test, "hparams/validation": validation}.items():
                if value is not None:
                    writer.add_scalar(name, value, 0)

    def tasks(self, episodes: Episodes) -> None:
        """A picture of the first task, before anything else is recorded: a row a class, its support images, a gap, its query images."""
        if self.folder is None or episodes.support_x.ndim != 5:
            return
        sets = (episodes.support_x, episodes.support_sizes), (episodes.query_x, episodes.query_sizes)
        support, query = (self._rows(x[0], sizes) for x, sizes in sets)
        values = torch.cat([support.flatten(), query.flatten()])
        low, high = values.min(), values.max()
        gap = high.expand(*support.shape[:2], 4)  # white
        picture = torch.cat([support, gap, query], dim=2)
        writer = self._open(purge_step=0)  # that of a sitting which was killed before it saved, too
        writer.add_image("task", (picture - low) / (high - low).clamp_min(1e-6), 0)

    @staticmethod
    def _rows(images: Tensor, sizes: Sequence[int], shown: int = 10) -> Tensor:
        """`[N*K, C, H, W]`, class-major, as one picture `[C, N*H, min(K, shown)*W]`; K is the largest of the classes' sizes."""
        images = images.cpu().float()
        most = min(max(sizes), shown)
        blank = images.max().expand(most, *images.shape[1:]) if len(images) else images
        rows = [torch.cat([each[:most], blank[: max(most - len(each), 0)]]) for each in images.split(list(sizes))]
        per_way = torch.stack(rows)
        n, k, c, h, w = per_way.shape
        return per_way.permute(2, 0, 3, 1, 4).reshape(c, n * h, k * w)

    @contextmanager
    def progress(
        self, what: str, total: int, done: int = 0, seconds: float | None = None, settings: str = ""
    ) -> Iterator[Callable[[int], None]]:
        """Shows how far something is, see `progress_bar`; a training has lines of its own.

        Args:
            what: The word before the bar.
            total: The number that is to be done.
            done: The number that was done before.
            seconds: The seconds after which it ends early; None has no such limit.
            settings: The key of a training's settings: how to have it take less time is told where it takes long.

        Yields:
            A function of the number done so far.
        """
        self._pace = pace = Pace(total, done, seconds)
        if self.folder is None:
            yield lambda done: None
            return

        def told(now: int) -> None:
            pace.at(now)
            if now == done + FIRST_STEPS and settings and (left := pace.left(now)) and left >= LONG_SECONDS:
                most = max(limit for limit in LIMITS if limit <= left / 2)
                log.info("%s: %d of %d in %s, so about %s more; to take less, add %s.max_seconds=%d (%s of training; "
                         "validation and test stay as they are)",
                         what, now, total, duration(pace.passed), duration(left), settings, most, duration(most))  # fmt: skip

        with progress_bar(what, total, done, lines=not settings) as show:

            def advance(now: int) -> None:
                told(now)
                show(now)

            yield advance
