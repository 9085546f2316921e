"""Processes that share the tasks of a step: the same numbers as one process, and no process left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from shell import SINUSOID, lines, metarun, result, run_folder, start

from metarun.distributed import World

# Five tasks cannot be halved: the shares differ in size.
SHARED = [*SINUSOID, "train.tasks_per_step=5", "train.log_every=1", "hardware.threads=1"]
LONG = [word for word in SHARED if not word.startswith("train.steps")] + ["train.save_every=5", "train.steps=1000000"]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: object, seconds: float = 60.0) -> None:
    """Returns as soon as `condition()` holds."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shares_cover_everything_once() -> None:
    for size in range(1, 8):
        ends = [World(rank, size).share(5) for rank in range(size)]
        assert [task for start, stop in ends for task in range(start, stop)] == list(range(5))


@pytest.mark.parametrize("algo", ["maml", "reptile"])  # gradients alone, and with buffers and whole meta-batches
def test_two_processes_give_the_numbers_of_one(algo: str, tmp_path: Path) -> None:
    words = [*SHARED, f"algo={algo}"] if algo == "maml" else [*SHARED, f"algo={algo}", "task.shots=5"]
    folders = []
    for processes in (1, 2):
        outputs = tmp_path / str(processes)
        process = start(*words[1:], f"hardware.processes={processes}", f"outputs={outputs}")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        folders.append(run_folder(outputs))
    one, two = (lines(folder) for folder in folders)
    assert len(one) == len(two) >= 6
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"train/tasks_per_second"}:
            assert right[name] == pytest.approx(left[name], rel=1e-5)
    one, two = (result(folder) for folder in folders)
    assert two["hardware"]["processes"] == 2
    assert two["test/mse"] == pytest.approx(one["test/mse"], rel=1e-5)
    assert two["test/episodes"] == one["test/episodes"]


def test_more_processes_than_tasks_is_refused(tmp_path: Path) -> None:
    outcome = metarun(*SHARED, "hardware.processes=6", f"outputs={tmp_path}")
    assert outcome.status == 2
    assert outcome.said == ["metarun: hardware.processes=6: share the tasks of a step, but train.tasks_per_step=5"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("victim", "number", "status"),
    [("further", signal.SIGKILL, 2), ("main", signal.SIGTERM, 128 + signal.SIGTERM), ("main", signal.SIGKILL, -9)],
)
def test_no_process_outlives_the_others(victim: str, number: int, status: int, tmp_path: Path) -> None:
    process = start(*LONG, "hardware.processes=2", f"outputs={tmp_path}")
    wait_for(lambda: list(tmp_path.glob("*/*/last.pt")))
    (child,) = children(process.pid)
    os.kill(child if victim == "further" else process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    wait_for(lambda: gone(child))
    if status == 2:
        assert err.splitlines()[-1].startswith("metarun: hardware.processes: one of the 2 processes ended early")
