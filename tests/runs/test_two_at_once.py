"""Two processes at the same run, sweep or search; and signals that come twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from shell import SINUSOID, metarun, run_folder, start

from metarun import files
from metarun.runs import carry_out
from metarun.runs.trial import database
from metarun.sweeps.study import Study


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something happen a little after a run begins to wait for a lock that another holds."""

    def have(act: Callable[[], object]) -> None:
        acquire, timers = FileLock.acquire, [threading.Timer(0.1, act)]

        def acquired(self: FileLock, timeout: float | None = None, **options: Any) -> Any:
            if timeout and timers:  # the first try waits not at all
                timers.pop().start()
            return acquire(self, timeout=timeout, **options)

        monkeypatch.setattr(FileLock, "acquire", acquired)

    return have


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The folder of a run without a result, and a stored one beside it."""
    assert metarun(*SINUSOID, f"outputs={tmp_path / 'out'}").status == 0
    folder = run_folder(tmp_path / "out")
    shutil.move(folder / "result.json", tmp_path / "result.json")
    return folder


def test_a_rerun_waits_for_a_job_that_is_still_saving(interrupted: Path, meanwhile: Callable[..., None]) -> None:
    """As the jobs of a sweep do that was killed: they save and end within half a minute."""
    lock = FileLock(interrupted / ".lock", thread_local=False)
    lock.acquire()
    meanwhile(lock.release)
    done = metarun(*SINUSOID, f"outputs={interrupted.parents[1]}")
    assert done.status == 0, done.err
    assert "another process is running this, or is just saving and ending; waiting for it, 33 s at most" in done.err
    assert (interrupted / "result.json").is_file()


def test_what_another_process_finished_meanwhile_is_shown_and_not_tested_again(
    interrupted: Path, tmp_path: Path, meanwhile: Callable[..., None]
) -> None:
    lock = FileLock(interrupted / ".lock", thread_local=False)
    lock.acquire()

    def finish() -> None:
        shutil.copy(tmp_path / "result.json", interrupted / "result.json")
        lock.release()

    meanwhile(finish)
    done = metarun(*SINUSOID, f"outputs={interrupted.parents[1]}")
    assert done.status == 0, done.err
    assert "This run had finished before: nothing was computed" in done.out
    assert (interrupted / "result.json").read_bytes() == (tmp_path / "result.json").read_bytes()


def test_a_config_that_another_process_wrote_meanwhile_is_compared(
    interrupted: Path, meanwhile: Callable[..., None]
) -> None:
    kept = (interrupted / "config.yaml").read_text()
    (interrupted / "config.yaml").unlink()
    lock = FileLock(interrupted / ".lock", thread_local=False)
    lock.acquire()

    def other() -> None:
        (interrupted / "config.yaml").write_text(kept.replace("\nseed: 0", "\nseed: 1"))
        lock.release()

    meanwhile(other)
    done = metarun(*SINUSOID, f"outputs={interrupted.parents[1]}")
    assert done.status == 2
    assert "was made with another config (seed 1 -> 0)" in done.err


def test_data_that_another_process_noted_meanwhile_are_compared(
    interrupted: Path, meanwhile: Callable[..., None]
) -> None:
    noted = interrupted / "data.json"
    kept = json.loads(noted.read_text())
    noted.unlink()
    lock = FileLock(interrupted / ".lock", thread_local=False)
    lock.acquire()

    def other() -> None:
        noted.write_text(json.dumps({"data": {**kept["data"], "fingerprint": "of others"}}))
        lock.release()

    meanwhile(other)
    done = metarun(*SINUSOID, f"outputs={interrupted.parents[1]}")
    assert done.status == 2
    assert "was made with other data" in done.err


@pytest.mark.parametrize("launcher", ["local", "serial"])
def test_a_signal_that_comes_twice_leaves_no_job_behind(launcher: str, tmp_path: Path) -> None:
    """`timeout` sends it to the sweep, and then to the whole group of processes."""
    words = [
        "-m",
        f"hydra/launcher={launcher}",
        "seed=0,1",
        "algo=maml",
        *(word for word in SINUSOID[1:] if "steps" not in word),
    ]
    process = start(
        *words,
        "train.steps=1000000",
        "train.log_every=1",
        "hardware.threads=1",
        f"outputs={tmp_path}",
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=200)  # returns when nobody holds its output any more
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    for folder in tmp_path.glob("*/*/"):
        if (folder / "metrics.jsonl").is_file():
            assert (folder / "last.pt").is_file()
            with FileLock(folder / ".lock", timeout=0):  # free
                pass


SEARCH = ["-m", "hydra/sweeper=optuna", "hydra/launcher=serial", "hydra.sweeper.trials=2", "algo.inner_lr=interval(0.01,0.1)",
          *(word for word in SINUSOID), "algo.test_inner_steps=1"]  # fmt: skip


def test_a_second_search_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[..., None]
) -> None:
    """It then finds all trials done, and the best one tested."""
    at_work: list[Any] = []
    paths: list[Path] = []
    locked = files.locked

    def noted(path: Path, told: str, *given: Any, **options: Any) -> Any:
        if ".search-" in path.name:
            paths.append(path)
            if not at_work:
                lock = FileLock(path, thread_local=False)
                at_work.append(lock)
                other = threading.Thread(target=lock.acquire)  # filelock refuses a second lock of the same thread
                other.start()
                other.join()
                meanwhile(lock.release)
        return locked(path, told, *given, **options)

    monkeypatch.setattr(files, "locked", noted)
    done = metarun(*SEARCH, f"outputs={tmp_path}")
    assert done.status == 0, done.err
    assert "search: another process is at work on it" in done.err
    assert len(paths) == 1
    assert paths[0].name.startswith(".search-")


def test_a_trial_enters_the_study_whole_or_not_at_all(tmp_path: Path) -> None:
    """A crash before any write to the storage while a trial is drawn leaves no trial without all its values."""
    import optuna
    from optuna.distributions import FloatDistribution
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    space = {"a": FloatDistribution(0.0, 1.0), "b": FloatDistribution(0.0, 1.0)}

    def opened(name: str) -> Study:
        return Study(database(tmp_path / f"{name}.db"), ["x"], space, sampler="tpe", seed=0)

    whole = opened("whole")
    expected = whole.next(1)

    class Crash(Exception):
        pass

    left: int | None = None  # writes until the crash

    def write(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        nonlocal left
        if left is not None and statement.lstrip().startswith(("INSERT", "UPDATE")):
            if not left:
                left = None
                raise Crash
            left -= 1

    crashes = 0
    event.listen(Engine, "before_cursor_execute", write)
    try:
        while True:
            study, left = opened(f"crash{crashes}"), crashes
            try:
                study.next(1)
            except Crash:
                again = opened(f"crash{crashes}")  # as another process does
                assert again.study.get_trials() == []
                assert again.next(1) == expected  # as if nothing had happened
                crashes += 1
            else:
                break
    finally:
        event.remove(Engine, "before_cursor_execute", write)
    assert crashes >= 2  # the trial and its values are several writes
    (trial,) = study.study.get_trials()
    assert trial.params.keys() == space.keys()
    assert whole.study.get_trials()[0].state == optuna.trial.TrialState.RUNNING


def test_a_trial_without_all_its_values_is_never_run(tmp_path: Path) -> None:
    from optuna.distributions import FloatDistribution

    space = {"a": FloatDistribution(0.0, 1.0), "b": FloatDistribution(0.0, 1.0)}
    study = Study(database(tmp_path / "search.db"), ["x"], space, sampler="random", seed=0)
    study.study.ask()  # nothing drawn
    study.study.ask({"a": space["a"]})
    found = study.next(2)
    assert set(found) == {2, 3}
    assert all(len(words) == 2 for words in found.values())
    assert study.ended == 2  # they failed
    assert study.best() is None


def test_lock_seconds_cover_the_last_save_of_a_job() -> None:
    from metarun.sweeps.local import LAST_SAVE

    assert carry_out.LOCK_SECONDS > LAST_SAVE
