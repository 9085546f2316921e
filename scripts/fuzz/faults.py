"""Commands that are killed, that crash at an input or output call, or whose disk is full: the same command ends with the same numbers.

    python -m scripts.fuzz.faults kills --times 10     SIGKILL at random moments, up to three times before the command may end
    python -m scripts.fuzz.faults crashes --step 1     a sudden end before each (or each `step`th) call that changes a file or a database
    python -m scripts.fuzz.faults disk --points 10     disks of so many sizes, up to the one that is enough; needs root, for a small tmpfs

Each prints a line for a scene with its counts, and a command line for what went wrong; its exit status is 1 if anything did.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.utils.tensorboard  # which a forked process would import each time

import metarun.runs.carry_out  # noqa: F401
from metarun import cli

from .scenes import IMAGES, SCENES, TARGET, TASK, Scene

# What was measured of the machine, not computed, may differ between two equal runs, as may whether a stage was kept.
MEASURED = ("second", "memory", "git_commit", "stages", "cached", "record", "ms_an_image")
# Files of which no number is taken: they have times in them, or are made of the others.
UNREAD = (".log", ".html", ".png", ".svg", ".lock", ".pdf", ".tex", ".md", ".outcome", ".trial", ".db", ".db-journal")
LIMIT = 300.0  # seconds after which a command counts as hung
LINES = 3  # of a message

SWEPT = ["algo=maml", "data=sinusoid", "backbone=mlp", "train.steps=6", "train.save_every=2", "test.episodes=8",
         "test.baseline_episodes=0", "hardware=cpu", "hardware.threads=1"]  # fmt: skip
PREDICTED = SCENES["finished"]


def _scene(of: Scene, command: int) -> Scene:
    return Scene(of.inputs, [of.commands[command]], of.first)


CHECKED = {
    "regression": Scene(lambda here: None, [SWEPT]),
    "meta": Scene(SCENES["episodes"].inputs, [[*IMAGES, "algo=protonet", *TASK, "train.steps=6", "train.save_every=2"]]),
    "transfer": Scene(SCENES["transfer"].inputs, [["recipe=transfer", *IMAGES, *TARGET, "algo=baseline", "transfer=linear_probe",
                                                   "transfer.steps=3", *TASK, "train.steps=4", "train.save_every=2",
                                                   "train.tasks_per_step=4", "train.validate_on=images"]]),
    "predict": _scene(PREDICTED, 0),
    "export": Scene(PREDICTED.inputs, [[*PREDICTED.commands[2][:-1], "format=onnx"]], PREDICTED.first),
    "encoding": _scene(PREDICTED, 5),
    "text": _scene(SCENES["text"], 0),
    "continual": _scene(SCENES["continual"], 0),
    "grid": Scene(lambda here: None, [["-m", *SWEPT, "seed=0,1"]]),
    "optuna": Scene(lambda here: None, [["-m", "hydra/sweeper=optuna", "hydra.sweeper.trials=3", *SWEPT,
                                         "train.optimizer.lr=tag(log,interval(1e-4,1e-2))", "algo.inner_steps=1,2"]]),
}  # fmt: skip


class Ended(NamedTuple):
    """How a command ended: its exit status, negative for a signal, and what it printed."""

    status: int
    out: str
    err: str


class Command:
    """A command of a scene, whose outputs and tables lie in a folder that can be emptied.

    Args:
        scene: What the user has, and the command.
        folder: Where all of it lies.
    """

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.here, self.place = folder / "here", folder / "place"
        self.here.mkdir(parents=True)
        self.place.mkdir()
        scene.inputs(self.here)
        for words in scene.first:
            ended = self.run(scene.typed(words, self.here))
            if ended.status:
                raise RuntimeError(f"{words} ended with {ended.status}\n{ended.err}")
        self.words = [*scene.typed(scene.commands[0], self.here), f"outputs={self.place / 'outputs'}"]

    def clear(self) -> None:
        """Removes what the command has left."""
        for path in self.place.iterdir():
            shutil.rmtree(path)

    def start(self, before: Callable[[], object] = lambda: None, words: list[str] | None = None) -> int:
        """Starts the command in a forked process that leads a session.

        Args:
            before: What the process does first.
            words: Others than those of the scene.

        Returns:
            The number of the process.
        """
        process = os.fork()
        if process:
            return process
        status = 70  # of what raises where nothing should
        try:
            os.setsid()
            os.environ["METARUN_CACHE"] = str(self.place / "tables")
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.here.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["metarun", *(words or self.words)]
            before()
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, process: int) -> Ended:
        """Waits for a process of `start`; one that does not end is killed."""
        deadline = time.monotonic() + LIMIT
        while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                kill(process, everything=True)
            time.sleep(0.005)
        _, status = os.waitpid(process, 0)
        told = [(self.here.parent / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        return Ended(os.waitstatus_to_exitcode(status), *told)

    def run(self, words: list[str] | None = None, before: Callable[[], object] = lambda: None) -> Ended:
        """Carries the command out."""
        return self.wait(self.start(before, words))


def children(process: int) -> Iterator[int]:
    """The processes below one, the deepest first."""
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found = [int(text) for text in tasks.read_text(encoding="utf-8").split()]
        except OSError:  # it has ended
            continue
        for child in found:
            yield from children(child)
            yield child


def kill(process: int, everything: bool) -> None:
    """Kills a process, and if `everything` those below it too, all of which were started here."""
    below = list(children(process)) if everything else []
    for number in (process, *below):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue


def numbers(folder: Path) -> dict[str, Any]:
    """All numbers that lie below a folder, by file; of a file that is not read whether it is there."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name.startswith("events.") or path.suffix in UNREAD:
            continue
        found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    match path.suffix:
        case ".pt":
            state = torch.load(path, weights_only=True)
            return _plain(state)
        case ".json":
            return _plain(json.loads(path.read_text(encoding="utf-8")))
        case ".jsonl":
            return [_plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        case ".npz":
            return {
                name: _plain(torch.from_numpy(array)) for name, array in np.load(path).items() if array.dtype != object
            }
        case ".csv":
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
            return [_plain(row) for row in rows]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {str(key): other for key, other in value.items() if not any(word in str(key) for word in MEASURED)}
        return {key: _plain(other) for key, other in kept.items() if key not in ("modified", "checksum")}
    if isinstance(value, list | tuple):
        return [_plain(other) for other in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return repr(value) if isinstance(value, float) else value


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}: {'is lacking' if key in one else 'is left over'}"
    elif one != other:
        yield f"{where}: {str(one)[:100]} became {str(other)[:100]}"


class Bad(NamedTuple):
    """What went wrong, and after what."""

    after: str
    what: str


def same(command: Command, whole: dict[str, Any], after: str) -> Iterator[Bad]:
    """Gives the command again; what is wrong with how it ends and what it leaves."""
    ended = command.run()
    if ended.status == -signal.SIGKILL:
        yield Bad(after, f"the same command had not ended after {LIMIT:.0f} s\n{ended.err[-1500:]}")
    elif ended.status or "Traceback (most recent" in ended.out + ended.err:
        yield Bad(after, f"the same command ended with {ended.status}\n{ended.err[-1500:]}")
    elif len(told := [line for line in ended.err.splitlines() if line.startswith("metarun: ")]) > LINES:
        yield Bad(after, f"{len(told)} lines of message\n{ended.err[-1500:]}")
    elif left := half_made(command.place):
        yield Bad(after, f"half made: {', '.join(left[:4])}")
    elif wrong := list(differences(whole, numbers(command.place))):
        yield Bad(after, "other numbers: " + "; ".join(wrong[:4]))


def half_made(folder: Path) -> list[str]:
    """What a command that came to its end must not leave: files that were written aside, and the journal of a database."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.endswith((".writing", ".unfinished", "-journal"))
    )


def whole_of(command: Command) -> tuple[dict[str, Any], float]:
    """The numbers of a run that nothing disturbs, and its seconds; a second one has the same numbers.

    Raises:
        RuntimeError: It fails, or has not.
    """
    found, seconds = list[dict[str, Any]](), 0.0
    for _ in range(2):
        command.clear()
        began = time.monotonic()
        ended = command.run()
        seconds = time.monotonic() - began
        if ended.status:
            raise RuntimeError(f"{command.words} ended with {ended.status}\n{ended.err}")
        found.append(numbers(command.place))
    if wrong := list(differences(found[0], found[1])):
        raise RuntimeError(f"two equal runs differ: {wrong[:5]}")
    return found[1], seconds


def kills(command: Command, times: int, draw: random.Random) -> tuple[int, list[Bad]]:
    """Kills the command at random moments, itself alone or with all its processes, and then lets it end."""
    whole, seconds = whole_of(command)
    bad, count = list[Bad](), 0
    for time_ in range(times):
        command.clear()
        after = list[str]()
        for _ in range(draw.randint(1, 3)):
            process, delay, everything = command.start(), draw.uniform(0, seconds), draw.random() < 0.5
            time.sleep(delay)
            kill(process, everything)
            ended = command.wait(process)
            after.append(f"{delay:.2f} s{' (all)' if everything else ''}")
            if "Traceback (most recent" in ended.out + ended.err:  # of processes that the kill did not reach
                bad.append(Bad(after[-1], f"a traceback\n{ended.err[-1500:]}"))
            count += ended.status == -signal.SIGKILL
        bad += same(command, whole, f"kills {time_} after {', '.join(after)}")
    return count, bad


CHANGES = (
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.utime",
    "os.chmod",
)


def counting(place: Path, at: int, counted: Callable[[int], object]) -> Callable[[], None]:
    """What suddenly ends a process before its `at`th call that changes a file below `place`, or a database.

    Args:
        place: The folder.
        at: The number of the call, from 1; 0 ends it at none.
        counted: Is told the number of calls so far.

    Returns:
        A function that the process calls first.
    """

    def install() -> None:
        seen, owner = 0, os.getpid()

        def change() -> None:
            nonlocal seen
            if os.getpid() != owner:  # a process of a job
                return
            seen += 1
            if seen == at:
                os._exit(137)
            counted(seen)

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if event == "open":
                path, mode, flags = given
                if not (set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                    return
            elif event in CHANGES:
                path = given[0]
            else:
                return
            if isinstance(path, str | os.PathLike) and str(path).startswith(str(place)):
                change()

        sys.addaudithook(hook)
        sync = os.fsync

        def synced(file: Any) -> None:
            change()
            sync(file)

        mock.patch.object(os, "fsync", synced).start()
        try:
            sqlalchemy = importlib.import_module("sqlalchemy")
        except ImportError:
            return
        for event in ("before_cursor_execute", "commit"):
            sqlalchemy.event.listen(sqlalchemy.engine.Engine, event, lambda *given: change())

    return install


def crashes(command: Command, step: int, draw: random.Random) -> tuple[int, list[Bad]]:
    """Ends the command before each `step`th of its calls that change something, and then lets it end."""
    whole, _ = whole_of(command)
    count = command.here.parent / "calls"

    def calls() -> int:
        """Of a run that is not ended."""
        command.clear()
        with open(count, "w", encoding="utf-8") as file:

            def told(seen: int) -> None:
                file.seek(0)
                file.write(str(seen))
                file.flush()

            ended = command.run(before=counting(command.place, 0, told))
        if ended.status:
            raise RuntimeError(ended.err)
        return int(count.read_text(encoding="utf-8"))

    bad, points = list[Bad](), range(1 + draw.randrange(step), calls() + 1, step)
    ended_there = 0
    for point in points:
        command.clear()
        ended = command.run(before=counting(command.place, point, lambda seen: None))
        ended_there += ended.status == 137
        bad += same(command, whole, f"a crash at call {point}")
    return ended_there, bad


def disk(command: Command, points: int, draw: random.Random) -> tuple[int, list[Bad]]:
    """Gives the command disks of several sizes, then enough; a full one is told in a few lines, and loses nothing."""
    whole, _ = whole_of(command)
    used = int(
        subprocess.run(
            ["du", "-sk", command.place], capture_output=True, text=True, encoding="utf-8", check=True
        ).stdout.split()[0]
    )
    bad, count = list[Bad](), 0
    for point in range(points):
        command.clear()
        size = max(4, round(used * point / points) + draw.randrange(max(1, used // points)))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", command.place], check=True)
        try:
            ended = command.run()
            after = f"a disk of {size} KiB"
            count += ended.status != 0
            bad += [Bad(after, what) for what in refused_badly(ended)]
            subprocess.run(["mount", "-o", "remount,size=1g", command.place], check=True)
            bad += same(command, whole, after)
        finally:
            subprocess.run(["umount", "-l", command.place], check=True)
    return count, bad


def refused_badly(ended: Ended) -> Iterator[str]:
    """What is wrong with how a command ended whose disk was full."""
    told = [line for line in ended.err.splitlines() if line.startswith("metarun: ")]
    if "Traceback (most recent" in ended.out + ended.err:
        yield f"a traceback\n{ended.err[-1500:]}"
    elif ended.status not in (0, 1, 2):
        yield f"exit status {ended.status}\n{ended.err[-1500:]}"
    elif ended.status and not 1 <= len(told) <= LINES:
        yield f"{len(told)} lines of message\n{ended.err[-1500:]}"
    elif ended.status == 2 and "space" not in told[-1]:
        yield f"the reason is not told: {told[-1]}"


HARNESSES: dict[str, Callable[[Command, int, random.Random], tuple[int, list[Bad]]]] = {
    "kills": kills, "crashes": crashes, "disk": disk,
}  # fmt: skip


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(HARNESSES), nargs="+")
    parser.add_argument("--scene", choices=sorted(CHECKED), action="append", help="all of them without this")
    parser.add_argument("--times", type=int, default=10, help="of kills, for each scene")
    parser.add_argument("--step", type=int, default=1, help="from one crash to the next, in calls")
    parser.add_argument("--points", type=int, default=10, help="sizes of the disk, for each scene")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads must not fork
    wrong = 0
    for what in given.what:
        for name in given.scene or CHECKED:
            many, began = {"kills": given.times, "crashes": given.step, "disk": given.points}[what], time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    command = Command(CHECKED[name], Path(folder, "scene"))
                    count, bad = HARNESSES[what](command, many, random.Random(given.seed))
                except RuntimeError as error:  # of this scene, and no reason to leave the others out
                    count, bad = 0, [Bad("nothing", str(error))]
            wrong += len(bad)
            print(f"{what}, {name}: {count} of them, {len(bad)} bad, {time.monotonic() - began:.0f} s", flush=True)
            for one in bad:
                print(f"  {one.after}: {one.what}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
