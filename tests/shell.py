"""The command `metarun` as a user gives it: in this process (fast), or as a process of its own (to be killed)."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import warm
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarun.cli import main
from metarun.system.platform import stop_signals

ROOT = Path(__file__).parents[1]

# A regression run of a tenth of a second; the order of the words is that of the folder's name.
SINUSOID = [
    "algo=maml",
    "data=sinusoid",
    "backbone=mlp",
    "test.baseline_episodes=0",
    "test.episodes=8",
    "train.steps=6",
]


class Outcome(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """What was printed as an error, without the lines that tell how far it is."""
        return [
            line
            for line in self.err.splitlines()
            if not line.startswith(("data ", "run folder: ", "hardware: ", "step ", "going on ", "target: images"))
        ]


def metarun(*words: str, argv0: str = "metarun") -> Outcome:
    """`metarun words...` in this process, which afterwards is as it was."""
    logger, out, err, status = logging.getLogger("metarun"), io.StringIO(), io.StringIO(), 0
    logged = logger.handlers[:], logger.level, logger.propagate
    signals = {number: signal.getsignal(number) for number in stop_signals()}
    for number in signals:
        signal.signal(number, _unhandled)
    GlobalHydra.instance().clear()
    with (
        mock.patch.object(sys, "argv", [argv0, *words]),
        mock.patch.object(sys, "path", sys.path[:]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            logger.handlers, logger.level, logger.propagate = logged
            for number, handler in signals.items():
                signal.signal(number, handler)
    return Outcome(status, out.getvalue(), err.getvalue())


def done(*words: str) -> Outcome:
    """`metarun words...` in this process, which must succeed."""
    outcome = metarun(*words)
    assert outcome.status == 0, outcome.err
    return outcome


def one_line(outcome: Outcome, *texts: str) -> None:
    """Checks that a command was refused in one line, which has these texts."""
    assert outcome.status == 2, outcome.out
    told = [line for line in outcome.err.splitlines() if line.startswith("metarun: ")]
    assert len(told) == 1
    assert "Traceback" not in outcome.err
    for text in texts:
        assert text in told[0]


def killed_at_files(*words: str, step: int = 1) -> tuple[Outcome, int]:
    """`metarun words...`, killed before it puts its first file in place, given again and killed `step` files later, and so on.

    A kill leaves the file that was written aside.

    Returns:
        What the command that came to its end printed, and how often it was killed before.
    """
    place, remove = os.replace, Path.unlink

    class Killed(BaseException):
        pass

    for kills in itertools.count():
        left, lives = iter(range(step * kills)), [True]

        def replace(source: Any, target: Any, left: Iterator[int] = left, lives: list[bool] = lives) -> None:
            if next(left, None) is None:
                lives.clear()
                raise Killed
            place(source, target)

        def unlink(path: Path, missing_ok: bool = False, lives: list[bool] = lives) -> None:
            if lives:
                remove(path, missing_ok)

        with mock.patch("os.replace", replace), mock.patch("pathlib.Path.unlink", unlink):
            try:
                return metarun(*words), kills
            except Killed:
                continue
    raise AssertionError


def metarun_in(folder: Path, *words: str) -> Outcome:
    """`metarun words...` in this process and in a folder, whose own modules are forgotten afterwards."""
    known = set(sys.modules)
    with contextlib.chdir(folder):
        done = metarun(*words)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(f"{folder}{os.sep}"):
            del sys.modules[name]
    return done


def _unhandled(number: int, frame: object) -> None:
    raise AssertionError(f"{signal.Signals(number).name} would have killed the process")


def environment(**variables: str) -> dict[str, str]:
    """That of a process that finds metarun, one thread, warnings as errors."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **variables}


def start(
    *words: str,
    launcher: Sequence[str] = (),
    cwd: Path | None = None,
    start_new_session: bool = False,
    **variables: str,
) -> subprocess.Popen[str] | warm.Process:
    """`metarun words...` as a process of its own, or under a launcher, with environment variables.

    It is forked from one that has imported everything, unless it needs an interpreter that starts with these variables.
    """
    command, env = [*launcher, "metarun", *words], environment(**variables)
    if warm.CAN and warm.read_at_start(env) == warm.read_at_start(environment()):
        return warm.start(command, env, cwd, start_new_session)
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=env, cwd=cwd, start_new_session=start_new_session,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_folder(outputs: Path) -> Path:
    """The one run folder under `outputs`."""
    (config,) = outputs.glob("*/*/config.yaml")
    return config.parent


def result(folder: Path) -> dict[str, Any]:
    """The result of a run folder."""
    return json.loads((folder / "result.json").read_text())


def lines(folder: Path) -> list[dict[str, float]]:
    """The lines of a run folder's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run folder."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def make_images(root: Path, classes: int = 4, per_class: int = 6, side: int = 16) -> Path:
    """Folders `train`, `val` and `test` of class folders of small colour images, each class in a colour of its own."""
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(classes):
            folder = root / split / f"{split}{number}"
            folder.mkdir(parents=True)
            colour = generator.integers(0, 256, 3)
            for image in range(per_class):
                pixels = colour + generator.integers(-60, 60, (side, side, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{image}.png")
    return root


ARCHIVE_HARMS = ("changed", "lzma", "password", "unknown compression", "more than the memory")


def harm_archive(path: Path, harm: str) -> None:
    """Makes of a whole zip archive one whose members cannot be unpacked: bytes of the data change, or what its headers say of it."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        start = member.header_offset + 30 + len(member.filename)
        if harm in ("changed", "lzma"):  # of LZMA after 4 bytes that say how long its properties are
            raw[start + 4 : start + 14] = bytes(byte ^ 0xFF for byte in raw[start + 4 : start + 14])
    for mark, flags, method, size in ((b"PK\3\4", 6, 8, 22), (b"PK\1\2", 8, 10, 24)):
        place = -1
        while (place := raw.find(mark, place + 1)) >= 0:
            if harm == "password":
                raw[place + flags] |= 1
            elif harm == "unknown compression":
                raw[place + method] = 97
            elif harm == "more than the memory":
                raw[place + size : place + size + 4] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(raw)


def make_ratings(folder: Path, films: int = 50, rated: int = 30) -> Path:
    """MovieLens' three files, of forty users; a user likes some genres, and rates so many of the films."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    genres = random.integers(0, 2, (films, 19))
    taste = random.normal(0, 1, (40, 19))
    users = [
        f"{user + 1}|{20 + user}|{'MF'[user % 2]}|{('writer', 'artist', 'none')[user % 3]}|{10000 + user}"
        for user in range(40)
    ]
    described = [
        f"{film + 1}|Film {film} é ({1980 + film % 20})|{'' if film == 3 else f'01-Jan-{1980 + film % 20}'}||http://x|"
        + "|".join(map(str, genres[film]))
        for film in range(films)
    ]
    ratings = []
    for user in range(40):
        for film in random.permutation(films)[:rated]:
            rating = int(np.clip(round(3 + taste[user] @ genres[film] / 3), 1, 5))
            ratings.append(f"{user + 1}\t{film + 1}\t{rating}\t88125{film:04}")
    random.shuffle(ratings)
    for name, lines in (("u.user", users), ("u.item", described), ("u.data", ratings)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder
