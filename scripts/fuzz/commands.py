"""Commands of metarun in this process: what they end with, and whether they did what none may do."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import yaml  # type: ignore[import-untyped]
from hydra.core.global_hydra import GlobalHydra

import metarun.runs.carry_out  # noqa: F401  (takes seconds, in which no signal may come)
from metarun import cli
from metarun.system.platform import stop_signals

LINES = 3  # of a message
SHORT = ("metarun: ", "data ", "run folder: ", "hardware: ", "step ", "going on ", "target: ", "stage ", "encoder: ", "backbone: ",
         "text", "report", "testing", "shared", "transfer")  # fmt: skip
LIMIT = 10.0  # seconds of the processor that a command may take
PATIENCE = 6  # times as many by the clock: the machine may have other work

# A command of a tenth of a second; what is varied comes behind it.
BASE = ["algo=maml", "data=sinusoid", "backbone=mlp", "train.steps=2", "test.episodes=4", "test.baseline_episodes=0",
        "hardware=cpu", "hardware.threads=1", "train.validate_episodes=2"]  # fmt: skip


class Finding(Exception):
    """An input after which metarun did what it must not."""


@contextlib.contextmanager
def texts_parsed_once() -> Iterator[None]:
    """Has a YAML text that was parsed before not be parsed again: most of a short command's time goes into the same two hundred files.

    Each command is given values of its own, and a text that cannot be parsed raises what it raises every time.
    """
    load, known = yaml.load, dict[tuple[Any, str], Any]()

    def remembered(stream: Any, Loader: Any) -> Any:
        text = stream if isinstance(stream, str | bytes) else stream.read()
        if (key := (text, Loader.__name__)) not in known:
            known[key] = load(text, Loader)
        return copy.deepcopy(known[key])

    with mock.patch.object(yaml, "load", remembered):
        yield


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops what takes more seconds of the processor, or many times as many by the clock, as a user would: the run saves and ends."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE * seconds)}
    before = {}
    for number, (timer, limit) in timers.items():
        before[number] = signal.signal(number, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(timer, limit, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def command(words: Sequence[str], seconds: float = LIMIT) -> tuple[int, str, str]:
    """`metarun words...` in this process.

    Args:
        words: What is typed behind `metarun`.
        seconds: After which it is interrupted.

    Returns:
        Its exit status, output and errors.

    Raises:
        Finding: It ended in a traceback.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    logger = logging.getLogger("metarun")
    logged = logger.handlers[:], logger.level, logger.propagate
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    for number in handlers:  # one that comes late is nobody's; to ignore it would have the command ignore it too
        signal.signal(number, lambda number, frame: None)
    GlobalHydra.instance().clear()
    try:
        with (
            mock.patch.object(sys, "argv", ["metarun", *words]),
            mock.patch.object(sys, "path", sys.path[:]),
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            time_limit(seconds),
        ):
            cli.main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        raise Finding(f"traceback\n{traceback.format_exc(limit=-3)}") from None
    finally:
        logger.handlers, logger.level, logger.propagate = logged
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def message_of(err: str) -> list[str]:
    """The lines of an error, without those that tell how far it is."""
    return [line for line in err.splitlines() if line.strip() and not line.startswith(SHORT[1:])]


def check(words: Sequence[str], outputs: Path | None, seconds: float = LIMIT) -> tuple[int, str]:
    """Carries a command out and checks what it says and leaves.

    Args:
        words: What is typed; `outputs=` is added.
        outputs: A folder that is not there yet; None leaves the words as they are, and what is left is not looked at.
        seconds: How long it may take.

    Returns:
        Its exit status, and its errors.

    Raises:
        Finding: There is a traceback, a long message, or a refused command has left something.
    """
    helps = words[:1] == ["help"] or outputs is None
    status, out, err = command([*words, *([] if helps else [f"outputs={outputs}"])], seconds)
    if "Traceback (most recent" in out + err and "Exception ignored in" not in err:  # of what a signal stopped
        raise Finding(f"a traceback was printed\n{(out + err)[-2000:]}")
    if status not in (0, 1, 2, 3) and status < 128:
        raise Finding(f"exit status {status}\n{err[-500:]}")
    if status == 2:
        message = message_of(err)
        if len(message) > LINES or not any(line.startswith(SHORT[0]) for line in message):
            raise Finding(f"{len(message)} lines of message\n{err[-1500:]}")
        if max(map(len, message)) > 4000:
            raise Finding(f"a line of {max(map(len, message))} characters\n{err[:300]}")
        # A run that began leaves its folder, with which the same command goes on.
        if outputs and outputs.exists() and "run folder: " not in err:
            left = sorted(str(path.relative_to(outputs)) for path in outputs.rglob("*"))
            raise Finding(f"something is left: {left[:5]}\n{err[-500:]}")
    return status, err


def shown(words: Sequence[str]) -> str:
    """A command line that can be pasted."""
    return shlex.join(["metarun", *words])


class Findings:
    """What was tried, and what was found; of findings that end alike one is printed.

    Args:
        inputs: What they are called where they are counted.

    Attributes:
        tried: How many inputs.
    """

    def __init__(self, inputs: str) -> None:
        self.inputs, self.tried, self._known = inputs, 0, set[str]()

    @contextlib.contextmanager
    def trial(self, told: str, kind: str = "") -> Iterator[None]:
        """Counts an input, and prints what is found of it.

        Args:
            told: The input, in a line.
            kind: Findings of other kinds are others, though they end alike.
        """
        self.tried += 1
        try:
            yield
        except Finding as finding:
            known = f"{kind} {str(finding).strip().splitlines()[-1][:80]}"
            if known not in self._known:
                self._known.add(known)
                print(f"\n=== {told}\n{finding}", flush=True)

    def counts(self) -> tuple[int, int]:
        """Says how many were tried and found, and returns both."""
        print(f"{self.tried} {self.inputs}, {len(self._known)} findings", flush=True)
        return self.tried, len(self._known)
