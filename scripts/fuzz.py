"""Bad inputs by the hundred: none may end in a traceback, in a message of more than three lines, or in anything half made.

    python -m scripts.fuzz words --seconds 600 --seed 0     values that the schema does not allow, or only just
    python -m scripts.fuzz files --seconds 600 --seed 0     damaged files of a run, of images and of tables

Needs hypothesis (`pip install 'metarun[dev]'`), which makes an input that fails as small as it can. A finding is printed
as the command that shows it; it belongs into `tests/scripts/test_fuzz.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

import metarun.runs.carry_out  # noqa: F401  (takes seconds, in which no signal may come)
from metarun import cli
from metarun.config import Config
from metarun.config.validation import settings
from metarun.engine.platform import stop_signals

LINES = 3  # of a message
SHORT = ("metarun: ", "data ", "run folder: ", "hardware: ", "step ", "going on ", "target: ", "stage ")

# A command of a tenth of a second; what is varied comes behind it.
BASE = ["algo=maml", "data=sinusoid", "backbone=mlp", "train.steps=2", "test.episodes=4", "test.baseline_episodes=0",
        "hardware=cpu", "hardware.threads=1", "train.validate_episodes=2"]  # fmt: skip

VALUES = [
    "0", "1", "-1", "2", "1.5", "-0.0", "1e-300", "1e400", "nan", "-nan", "inf", "-inf", str(2**31), str(2**63 - 1), str(2**63),
    str(-(2**63) - 1), str(2**64), "1" + "0" * 400, "true", "null", "~", "''", "a", "[]", "[1,2]", "[1,a]", "{}", "{a: 1}", "[[1]]",
    "[null]", "é", "日本", "%s", "$x", "${seed}", "${nowhere}", "\\\\", "a b", "=", "a=b", "a,b", "interval(0,1)", "range(1,3)",
    "choice(1,2)",
    "glob(*)", "1_000", "0x10", "0b1", "1e3", "+5", "(", ")", "[", "]", "{", "}", "'", '"', "#", "/", "../..", "~/x", "cpu", "gpu",
    "torch.load", "builtins.exec", "metarun.algos.maml.MAML", "$", "${oc.env:HOME}", "a" * 3000,
]  # fmt: skip
KEYS = ["algo", "data", "backbone", "optimizer", "schedule", "hardware", "wrapper", "augment", "target", "transfer", "recipe", "approach",
        "preset", "experiment", "debug", "hydra/launcher", "hydra/sweeper", "hydra.launcher.at_once", "hydra.sweeper.trials",
        "hydra.job.name", "hydra.mode", "hydra.verbose", "algo.inner_lr", "algo.inner_steps", "algo.test_inner_steps", "backbone.width",
        "backbone.layers", "backbone.norm", "data.noise", "train.optimizer.lr", "train.optimizer.fused", "train.schedule._target_",
        "algo._target_", "nowhere", "algo.nowhere", "nowhere.a.b"]  # fmt: skip
OPTIONS = ["--cfg", "job", "--dry-run", "-sc", "--info", "--config-dir", "nowhere", "--config-name", "-h",
           "--hydra-help",
           "--version", "--resolve", "--package", "-x", "--", ""]  # fmt: skip


def schema_keys() -> list[str]:
    """Every key of the schema, and some of groups and of Hydra."""
    return [*(key for key, _ in settings(Config) if not key.startswith(("outputs", "runs", "checkpoint"))), *KEYS]


class Finding(Exception):
    """An input after which metarun did what it must not."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops what takes longer, as a user would: a signal comes, and the run saves and ends. That is no finding."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def command(words: Sequence[str], seconds: float = 60.0) -> tuple[int, str, str]:
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
    for number in handlers:  # one that comes late is nobody's
        signal.signal(number, signal.SIG_IGN)
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


def check(words: Sequence[str], outputs: Path) -> None:
    """Carries a command out and checks what it says and leaves.

    Raises:
        Finding: There is a traceback, a long message, or a refused command has left something.
    """
    status, _, err = command([*words, f"outputs={outputs}"])
    told = [line for line in err.splitlines() if line.strip()]
    if "Traceback (most recent" in err and "Exception ignored in" not in err:  # of what a signal stopped
        raise Finding(f"a traceback was printed\n{err[-2000:]}")
    if status not in (0, 1, 2, 3) and status < 128:
        raise Finding(f"exit status {status}\n{err[-500:]}")
    if status == 2:
        message = [line for line in told if not line.startswith(SHORT[1:])]
        if len(message) > LINES or not any(line.startswith(SHORT[0]) for line in message):
            raise Finding(f"{len(message)} lines of message\n{err[-1500:]}")
        if max(map(len, message)) > 4000:
            raise Finding(f"a line of {max(map(len, message))} characters\n{err[:300]}")
        # A run that began leaves its folder, with which the same command goes on.
        if outputs.exists() and not any(line.startswith("run folder: ") for line in told):
            raise Finding(f"something is left: {sorted(path.name for path in outputs.rglob('*'))[:5]}\n{err[-500:]}")


def words_strategy() -> Any:
    """Command lines: the base, and one to three words of keys with values, or options, in any order."""
    st: Any = importlib.import_module("hypothesis.strategies")

    value = st.one_of(
        st.sampled_from(VALUES),
        st.integers().map(str),
        st.floats().map(str),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    )
    sign = st.sampled_from(["", "", "", "", "+", "~", "++"])
    word = st.builds(lambda mark, key, text: f"{mark}{key}={text}", sign, st.sampled_from(schema_keys()), value)
    words = st.lists(st.one_of(word, word, word, word, st.sampled_from(OPTIONS)), min_size=1, max_size=3)
    return st.one_of(words, words, words, words.map(lambda found: ["-m", *found, "--dry-run"]))


def fuzz_words(seconds: float, seed: int, examples: int = 50) -> int:
    """Tries command lines for some seconds, `examples` between two looks at the clock; prints each finding, and returns how many."""
    hypothesis: Any = importlib.import_module("hypothesis")  # which not everybody has
    began, tried, found = time.monotonic(), 0, set[str]()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        number = seed

        def once(words: list[str]) -> None:
            nonlocal tried
            tried += 1
            outputs = Path(folder, "outputs")
            shutil.rmtree(outputs, ignore_errors=True)
            try:
                check([*BASE, *words], outputs)
            except Finding as finding:
                known = str(finding).strip().splitlines()[-1][:80]
                if known not in found:
                    found.add(known)
                    print(f"\n=== metarun {' '.join(BASE)} {words}\n{finding}", flush=True)

        while time.monotonic() - began < seconds:
            given: Any = hypothesis.given  # whose result has no type, nor that of seed
            trial = given(words_strategy())(once)
            options = hypothesis.settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            seeded: Any = hypothesis.seed
            seeded(number)(options(trial))()
            number += 1
    print(f"\n{tried} command lines, {len(found)} findings")
    return len(found)


def _zeros(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, draw: b"",
    "cut": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "zeros": _zeros,
    "flipped": _flipped,
    "doubled": lambda content, draw: content + content,
    "text": lambda content, draw: draw.choice(
        [b"[]", b"{}", b"null", b"5", b"\xff\xfe", b"a: &a [*a]\n", b"a: b: c", b"[" * 5000, b"\n" * 50]
    ),
    "of a zip": lambda content, draw: b"PK\x03\x04" + content,
    "a pickle": lambda content, draw: b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x02hi\x85R.",
    "a number": lambda content, draw: content.replace(
        b"0", draw.choice([b"-1", b"1e999", b"NaN", b"null", b'"a"', str(2**70).encode()])
    ),
}


def fuzz_files(seconds: float, seed: int) -> int:
    """Damages the files of finished and of interrupted runs, one at a time, and carries four commands out on them."""
    draw, began, tried, found = random.Random(seed), time.monotonic(), 0, set[str]()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        whole = Path(folder, "whole")
        for number in (0, 1):
            command([*BASE, f"seed={number}", f"name=run{number}", f"outputs={whole}"])
        kept = sorted(path for path in whole.rglob("*") if path.is_file() and path.name != ".lock")
        while time.monotonic() - began < seconds:
            outputs = Path(folder, "outputs")
            shutil.rmtree(outputs, ignore_errors=True)
            shutil.copytree(whole, outputs)
            victim = draw.choice(kept)
            path = outputs / victim.relative_to(whole)
            name = draw.choice(sorted(MUTATIONS))
            path.write_bytes(MUTATIONS[name](path.read_bytes(), draw))
            run = path.parent
            if draw.random() < 0.5 and path.name != "result.json":
                (run / "result.json").unlink(missing_ok=True)  # so that it goes on
            commands = [
                [*BASE, f"seed={run.parent.name[-1]}", f"name={run.parent.name}", f"outputs={outputs}"],
                ["recipe=test", f"checkpoint={run}", "test.episodes=4", f"outputs={outputs}"],
                ["recipe=report", f"runs={outputs}"],
                ["runs", f"outputs={outputs}"],
            ]
            for words in commands:
                tried += 1
                try:
                    status, _, err = command(words)
                    if "Traceback (most recent" in err:
                        raise Finding(f"a traceback was printed\n{err[-2000:]}")
                    message = [line for line in err.splitlines() if line.strip() and not line.startswith(SHORT[1:])]
                    if status == 2 and len(message) > LINES:
                        raise Finding(f"{len(message)} lines of message\n{err[-1500:]}")
                    if words[0] in ("recipe=report", "runs") and status != 0:
                        raise Finding(f"one bad run ended the others\n{err[-500:]}")
                except Finding as finding:
                    known = f"{path.name} {str(finding).strip().splitlines()[-1][:80]}"
                    if known not in found:
                        found.add(known)
                        print(f"\n=== {path.name}: {name}; metarun {words[:2]}\n{finding}", flush=True)
    print(f"\n{tried} commands on damaged files, {len(found)} findings")
    return len(found)


def main() -> None:
    """The command line of this script; its exit status is 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["words", "files"])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = {"words": fuzz_words, "files": fuzz_files}[given.what](given.seconds, given.seed)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
