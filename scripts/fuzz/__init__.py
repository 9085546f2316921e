"""Bad inputs by the hundred: none may end in a traceback, in a message of more than three lines, or in anything half made.

    python -m scripts.fuzz words files --seconds 3600 --seed 0     both, in turns
    python -m scripts.fuzz words    values that the schema does not allow, or only just, in commands of all kinds
    python -m scripts.fuzz files    damaged files of users, of runs and of tables, and what is no file at all

Needs hypothesis (`pip install 'metarun[dev]'`), which makes an input that fails as small as it can. A finding is printed
as the command that shows it; it belongs into `tests/scripts/test_fuzz.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import importlib
import io
import json
import logging
import os
import random
import shlex
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

import torch
import yaml  # type: ignore[import-untyped]
from hydra.core.global_hydra import GlobalHydra

import metarun.runs.carry_out  # noqa: F401  (takes seconds, in which no signal may come)
from metarun import cli
from metarun.config import Config
from metarun.config.validation import settings
from metarun.engine.platform import stop_signals

from .scenes import SCENES, Scene

LINES = 3  # of a message
SHORT = ("metarun: ", "data ", "run folder: ", "hardware: ", "step ", "going on ", "target: ", "stage ", "encoder: ", "backbone: ",
         "text", "report", "testing", "shared", "transfer")  # fmt: skip
NONE = "no finished run lies there"  # what a report says where it has nothing to report on
LIMIT = 10.0  # seconds of the processor that a command may take
PATIENCE = 6  # times as many by the clock: the machine may have other work
TURN = 240.0  # seconds from words to files and back
MEMORY = 16 * 2**30  # bytes that this process may take: a file without end must not take the machine

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


def words_strategy(bases: Sequence[Sequence[str]] = (BASE,)) -> Any:
    """Command lines: one of `bases`, perhaps with a word changed or left out, and one to three more words, anywhere."""
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
    words = st.one_of(words, words, words, words.map(lambda found: ["-m", *found, "--dry-run"]))

    def changed(base: Sequence[str], added: list[str], how: int, at: int, text: str) -> list[str]:
        kept = list(base)
        at %= len(kept)
        if how == 0:
            del kept[at]
        elif how == 1 and "=" in kept[at]:
            kept[at] = f"{kept[at].partition('=')[0]}={text}"
        elif how == 2:
            kept[at] = kept[at][:-1]
        return [*kept, *added]

    plain = st.builds(changed, st.sampled_from(bases), words, st.integers(0, 8), st.integers(0, 30), value)
    own = st.builds(changed, st.sampled_from(bases), st.just([]), st.integers(0, 2), st.integers(0, 30), value)
    helped = st.lists(st.one_of(st.sampled_from(schema_keys()), value), min_size=0, max_size=2).map(
        lambda of: ["help", *of]
    )
    return st.one_of(plain, plain, plain, own, helped)


def fuzz_words(
    seconds: float, seed: int, bases: Sequence[Sequence[str]] = (BASE,), examples: int = 50
) -> tuple[int, int]:
    """Tries command lines for some seconds, `examples` between two looks at the clock, and prints each finding.

    Args:
        seconds: How long.
        seed: Of the first; the next ones have the numbers after it.
        bases: The commands that are varied.
        examples: As many are tried between two looks at the clock.

    Returns:
        How many were tried, and how many findings there are.
    """
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
                check(words, outputs)
            except Finding as finding:
                known = str(finding).strip().splitlines()[-1][:80]
                if known not in found:
                    found.add(known)
                    print(f"\n=== {shown(words)}\n{finding}", flush=True)

        while time.monotonic() - began < seconds:
            given: Any = hypothesis.given  # whose result has no type, nor that of seed
            trial = given(words_strategy(bases))(once)
            options = hypothesis.settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            seeded: Any = hypothesis.seed
            seeded(number)(options(trial))()
            number += 1
    print(f"{tried} command lines, {len(found)} findings", flush=True)
    return tried, len(found)


def shown(words: Sequence[str]) -> str:
    """A command line that can be pasted."""
    return shlex.join(["metarun", *words])


def set_up(scene: Scene, here: Path) -> list[list[str]]:
    """Makes the inputs of a scene in a folder, and carries all its commands out; returns them.

    Raises:
        RuntimeError: One has not succeeded.
    """
    here.mkdir(parents=True)
    scene.inputs(here)
    commands = list[list[str]]()
    for words in (*scene.first, *scene.commands):
        typed = scene.typed(words, here)
        leaves = (
            [] if any("outputs=" in word for word in typed) or typed[0] == "help" else [f"outputs={here / 'tried'}"]
        )
        status, _, err = command([*typed, *leaves], 300.0)
        if status:
            raise RuntimeError(f"{shown(typed)} ended with {status}\n{err}")
        shutil.rmtree(here / "tried", ignore_errors=True)
        commands.append(typed)
    return commands[len(scene.first) :]


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


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "../x",
    "\0",
    [],
    {},
    [None],
    {"a": 1},
    [[]],
    "é" * 300,
]


def replaced(value: Any, draw: random.Random, odd: Sequence[Any] = ODD) -> Any:
    """A copy of nested lists and mappings with one node replaced by something odd, or gone."""
    value = copy.deepcopy(value)
    holders = list[tuple[Any, Any]]()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        holders += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    if not holders or draw.random() < 0.02:
        return draw.choice(odd)
    holder, key = draw.choice(holders)
    if isinstance(holder, dict) and draw.random() < 0.25:
        del holder[key]
    else:
        holder[key] = draw.choice(odd)
    return value


def _tensors(content: bytes, draw: random.Random) -> bytes:
    tensors = [
        torch.full((2,), float("nan")),
        torch.zeros(0),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1).to_sparse(),
    ]
    whole = io.BytesIO()
    torch.save(replaced(torch.load(io.BytesIO(content), weights_only=True), draw, [*ODD, *tensors]), whole)
    return whole.getvalue()


def _json(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(replaced(json.loads(content), draw)).encode()


def _json_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[:at], _json(lines[at], draw), *lines[at + 1 :], b""])


def _yaml(content: bytes, draw: random.Random) -> bytes:
    text = content.decode()
    heading = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return (heading + str(yaml.safe_dump(replaced(yaml.safe_load(text), draw), allow_unicode=True))).encode()


def _cells(content: bytes, draw: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = draw.choice(rows)
    cells = ["", "a,b", 'a"b', "\n", "é" * 50, "-1", "../../etc/passwd", "/dev/zero", "nan", "=1+1"]
    how = draw.randrange(4)
    if how == 0 and row:
        del row[draw.randrange(len(row))]
    elif how == 1:
        row.insert(draw.randrange(len(row) + 1), draw.choice(cells))
    else:
        row[draw.randrange(len(row))] = draw.choice(cells)
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json, ".jsonl": _json_lines, ".yaml": _yaml, ".pt": _tensors, ".pth": _tensors, ".csv": _cells,
}  # fmt: skip


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def _copied(path: Path, name: str) -> None:
    shutil.copy(path, path.with_name(name))


def _anothers(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.choice(sorted(path.parent.parent.rglob("*.*"))).read_bytes())


# What may happen to a file as a whole.
SWAPS: dict[str, Callable[[Path, random.Random], object]] = {
    "missing": lambda path, draw: path.unlink(),
    "a folder": lambda path, draw: _folder(path),
    "a pipe": lambda path, draw: _pipe(path),
    "a link to nothing": lambda path, draw: _linked(path, "nowhere"),
    "a link to itself": lambda path, draw: _linked(path, path.name),
    "a device": lambda path, draw: _linked(path, "/dev/zero"),
    "twice": lambda path, draw: _copied(
        path, draw.choice(["a b", "é", "a=1,b", "#x", "-x", "'q'", "$HOME", "a\tb", "%s", "{x}", "[1]", "A" * 200]) + path.suffix
    ),
    "another's": lambda path, draw: _anothers(path, draw),
}  # fmt: skip


def damaged(here: Path, draw: random.Random) -> str:
    """Damages one file below a folder, of a kind that is chosen first; returns which file, and how."""
    by_kind = dict[tuple[str, str], list[Path]]()
    for path in sorted(path for path in here.rglob("*") if path.is_file() and path.suffix != ".lock"):
        part = path.relative_to(here).parts[0]
        if "report" in path.relative_to(here).parts:  # which each report writes anew
            continue
        by_kind.setdefault((part, path.suffix if path.suffix in (".png", ".txt") else path.name), []).append(path)
    path = draw.choice(by_kind[draw.choice(sorted(by_kind))])
    ways: list[str] = [*MUTATIONS, *SWAPS]
    if path.suffix in STRUCTURED:
        ways += ["a node"] * len(ways)
    name = draw.choice(ways)
    try:
        if name in SWAPS:
            SWAPS[name](path, draw)
        else:
            mutate = STRUCTURED[path.suffix] if name == "a node" else MUTATIONS[name]
            path.write_bytes(mutate(path.read_bytes(), draw))
    except OSError as error:
        name = f"{name}, which failed ({error})"
    return f"{path.relative_to(here)}: {name}"


class Scenes:
    """Scenes that are set up in a folder, and a copy of each, so that what was damaged can be had whole again.

    Args:
        top: The folder.
        names: Those of the scenes; none are all that have files.

    Attributes:
        commands: The commands of each scene.
    """

    def __init__(self, top: Path, names: Sequence[str] = ()) -> None:
        self.top = top
        self.commands = dict[str, list[list[str]]]()
        for name in names or [name for name in SCENES if name != "regression"]:
            self._tables(name)
            self.commands[name] = set_up(SCENES[name], self.here(name))
            shutil.copytree(self.here(name), self._kept(name), symlinks=True)

    def here(self, name: str) -> Path:
        """The folder of a scene."""
        return self.top / "here" / name.replace(" ", "_")

    def _kept(self, name: str) -> Path:
        return self.top / "kept" / name.replace(" ", "_")

    def _tables(self, name: str) -> None:
        os.environ["METARUN_CACHE"] = str(self.here(name) / "tables")

    def whole(self, name: str) -> Path:
        """A scene as it was set up, its tables those that the next commands find; returns its folder."""
        self._tables(name)
        shutil.rmtree(self.here(name))
        shutil.copytree(self._kept(name), self.here(name), symlinks=True)
        return self.here(name)

    def all_whole(self) -> list[list[str]]:
        """All scenes as they were set up; returns their commands."""
        for name in self.commands:
            self.whole(name)
        os.environ["METARUN_CACHE"] = str(self.top / "tables")
        return [words for commands in self.commands.values() for words in commands if "outputs=" not in " ".join(words)]


def fuzz_files(seconds: float, seed: int, scenes: Scenes) -> tuple[int, int]:
    """Damages one file of a scene at a time (an input, a file of a run, of a table), and carries commands of the scene out.

    Args:
        seconds: How long.
        seed: What is drawn depends on it alone.
        scenes: The scenes.

    Returns:
        How many commands were tried, and how many findings there are.
    """
    draw, began, tried, found = random.Random(seed), time.monotonic(), 0, set[str]()
    with contextlib.chdir(scenes.top):
        while time.monotonic() - began < seconds:
            name = draw.choice(sorted(scenes.commands))
            here = scenes.whole(name)
            if draw.random() < 0.3:  # the runs are to go on
                for path in here.glob("runs/*/*/result.json"):
                    path.unlink()
            told = damaged(here, draw)
            commands = scenes.commands[name]
            for words in draw.sample(commands, min(2, len(commands))):
                tried += 1
                try:
                    try_damaged(words, here)
                except Finding as finding:
                    known = f"{told.partition(':')[0].rpartition('/')[2]} {str(finding).strip().splitlines()[-1][:80]}"
                    if known not in found:
                        found.add(known)
                        print(f"\n=== {name}: {told}; {shown(words)}\n{finding}", flush=True)
    print(f"{tried} commands on damaged files, {len(found)} findings", flush=True)
    return tried, len(found)


def try_damaged(words: Sequence[str], here: Path) -> None:
    """Carries a command out, of which a file is damaged.

    Args:
        words: The command.
        here: The folder of its scene.

    Raises:
        Finding: It does what it must not.
    """
    outputs = here / "outputs"
    shutil.rmtree(outputs, ignore_errors=True)
    status, err = check(words, None if any("outputs=" in word for word in words) else outputs)
    if status >= 128:
        raise Finding(f"it does not end\n{err[-500:]}")
    if words[0] in ("recipe=report", "recipe=runs") and status != 0 and NONE not in err:
        raise Finding(f"one bad run ended the others\n{err[-500:]}")
    if left := [path.name for path in (here / "tables").glob("*.unfinished") if "vectors" not in path.name]:
        raise Finding(f"a table is half made: {left}\n{err[-500:]}")
    if left := [str(path) for path in outputs.rglob("*.writing")]:
        raise Finding(f"a file is half written: {left}\n{err[-500:]}")


def main() -> None:
    """The command line of this script; its exit status is 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("words", "files"), nargs="+")
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with contextlib.suppress(ImportError):
        resource: Any = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # timm asks for weights by name, and waits for an answer
    began, tried, found, turn = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        scenes = Scenes(Path(folder))
        print(f"the scenes are set up after {time.monotonic() - began:.0f} s", flush=True)
        while (left := given.seconds - (time.monotonic() - began)) > 0:
            seed, seconds = given.seed + 1000 * turn, min(left, TURN)
            if given.what[turn % len(given.what)] == "words":
                counts = fuzz_words(seconds, seed, [BASE, *scenes.all_whole()])
            else:
                counts = fuzz_files(seconds, seed, scenes)
            tried, found, turn = tried + counts[0], found + counts[1], turn + 1
            print(f"after {time.monotonic() - began:.0f} s: {tried} inputs, {found} findings", flush=True)
    sys.exit(1 if found else 0)
