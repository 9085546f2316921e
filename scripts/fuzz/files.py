"""Damaged files of users, of runs and of tables, and what is no file at all."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from .commands import Finding, Findings, check, command, shown
from .damage import damaged
from .scenes import SCENES, Scene

# What a report and a list say where the one run that was there is none any more.
NONE = ("no finished test lies there", "no run lies in")


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


class Scenes:
    """Scenes in a folder, each set up when it is first asked for, and a copy of it, so that what was damaged can be had whole again.

    Args:
        top: The folder.
        names: Those of the scenes; none are all that have files.

    Attributes:
        names: The same, in order.
        commands: The commands of each scene that is set up.
    """

    def __init__(self, top: Path, names: Sequence[str] = ()) -> None:
        self.top = top
        self.names = sorted(names or [name for name in SCENES if name != "regression"])
        self.commands = dict[str, list[list[str]]]()

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
        if name not in self.commands:
            self.commands[name] = set_up(SCENES[name], self.here(name))
            shutil.copytree(self.here(name), self._kept(name), symlinks=True)
            return self.here(name)
        shutil.rmtree(self.here(name))
        shutil.copytree(self._kept(name), self.here(name), symlinks=True)
        return self.here(name)

    def all_whole(self) -> list[list[str]]:
        """All scenes as they were set up; returns their commands."""
        for name in self.names:
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
    draw, began, found = random.Random(seed), time.monotonic(), Findings("commands on damaged files")
    with contextlib.chdir(scenes.top):
        while time.monotonic() - began < seconds:
            name = draw.choice(scenes.names)
            here = scenes.whole(name)
            if draw.random() < 0.3:  # the runs are to go on
                for path in here.glob("runs/*/*/result.json"):
                    path.unlink()
            told = damaged(here, draw)
            commands = scenes.commands[name]
            for words in draw.sample(commands, min(2, len(commands))):
                file = told.partition(":")[0].rpartition("/")[2]
                with found.trial(f"{name}: {told}; {shown(words)}", kind=file):
                    try_damaged(words, here)
    return found.counts()


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
    if words[0] in ("recipe=report", "recipe=runs") and status != 0 and not any(words in err for words in NONE):
        raise Finding(f"one bad run ended the others\n{err[-500:]}")
    if left := [path.name for path in (here / "tables").glob("*.unfinished")]:
        raise Finding(f"a table is half made: {left}\n{err[-500:]}")
    if left := [str(path) for path in outputs.rglob("*.writing")]:
        raise Finding(f"a file is half written: {left}\n{err[-500:]}")
