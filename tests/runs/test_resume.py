"""The same command again: what is finished is shown, what was interrupted goes on, and is bit for bit the same."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from shell import SINUSOID, events, lines, make_images, metarun, result, run_folder, start

from metarun.core import Algorithm
from metarun.engine import train_state
from metarun.runs import carry_out, logger
from metarun.runs.folder import UNNAMED, choose_folder, folder_name

# What was measured of the machine, not computed, may differ between two equal runs.
MEASURED = ("seconds", "train/seconds", "train/items_per_second", "train/tasks_per_second", "peak_memory", "git_commit")


def comparable(folder: Path) -> dict[str, Any]:
    """Everything in a finished folder that has to be the same in an equal run."""
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    last["state"].pop("seconds")
    numbers = {name: value for name, value in result(folder).items() if name not in (*MEASURED, "command", "overrides")}
    written = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines(folder)]
    shown = events(folder)
    curves = {
        name: [(event.step, event.value) for event in shown.Scalars(name)]
        for name in sorted(shown.Tags()["scalars"])  # files of one second come in any order
        if name not in MEASURED
    }
    return {"last": last, "best": best, "result": numbers, "lines": written, "curves": curves}


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal to the last bit, tensors too."""
    if isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


# Weights, running averages, the optimiser's moments, a schedule, random rotations of classes: everything that a run carries on.
PROTONET = ["data=folder", "data.image_size=16", "data.rotations=true", "algo=protonet", "backbone.channels=4", "schedule=cosine",
            "task.ways=4", "task.queries=2", "train.tasks_per_step=2", "train.steps=60", "train.log_every=3",
            "train.validate_every=7", "train.validate_episodes=4", "train.save_every=2", "test.episodes=400",
            "test.baseline_episodes=2"]  # fmt: skip


def kill(process: Any) -> None:
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    process.stdout.close()
    process.stderr.close()


def until(condition: Callable[[], bool], process: Any) -> None:
    """Waits for what `process` does; it must not end before."""
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def count(file: Path) -> int:
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_killed_at_any_time_is_bit_for_bit_the_run_never_interrupted(tmp_path: Path) -> None:
    """Eight kills: before the first checkpoint, six while training, a few milliseconds after some line, one while testing."""
    words = [*PROTONET, f"data.root={make_images(tmp_path / 'images')}"]
    assert metarun(*words, f"outputs={tmp_path / 'whole'}").status == 0
    whole = run_folder(tmp_path / "whole")
    total = count(whole / "metrics.jsonl")
    folder = tmp_path / "killed" / whole.relative_to(tmp_path / "whole")
    metrics, random_delay = folder / "metrics.jsonl", random.Random(0)

    def wait_for_line(number: int) -> None:
        process = start(*words, f"outputs={tmp_path / 'killed'}")
        until(lambda: count(metrics) >= number, process)
        time.sleep(random_delay.uniform(0, 0.02))
        assert count(metrics) <= total
        kill(process)

    process = start(*words, f"outputs={tmp_path / 'killed'}")
    until((folder / "config.yaml").exists, process)
    kill(process)
    assert not (folder / "best.pt").exists()
    steps = []
    for target in range(1, 7):
        # A resumed run first takes back the lines after its checkpoint, then passes them again.
        wait_for_line(max(count(metrics) + 1, target * total // 8))
        if (folder / "last.pt").exists():
            steps.append(torch.load(folder / "last.pt", weights_only=True)["state"]["step"])
    assert steps == sorted(steps)
    assert len(set(steps)) >= 5  # each kill met another step
    assert 0 < steps[0] < steps[-1] < 60
    wait_for_line(total)
    assert not (folder / "result.json").exists()
    done = metarun(*words, f"outputs={tmp_path / 'killed'}")
    assert done.status == 0, done.err
    assert "going on at step 60" in done.err
    assert_same(comparable(whole), comparable(folder))
    assert not list(folder.glob(".*.writing"))


def test_finished_run_is_shown_and_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SINUSOID, f"outputs={tmp_path}"]
    first = metarun(*words)
    folder = run_folder(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(carry_out, "prepare", pytest.fail)
    again = metarun(*words)
    assert again.status == 0
    lines = again.out.splitlines()
    assert [line for line in lines if "finished before" not in line] == first.out.splitlines()
    assert "finished before" in again.out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert metarun(*reversed(SINUSOID), f"outputs={tmp_path}").out == again.out  # whatever the order of the words


class Sent:
    """Sends this process a signal when the run's records reach a step, as somebody else would."""

    def __init__(self, number: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        scalars = logger.RunLogger.scalars

        def wrapped(self: logger.RunLogger, at: int, *arguments: Any, **options: Any) -> None:
            scalars(self, at, *arguments, **options)
            if at == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(logger.RunLogger, "scalars", wrapped)


REPTILE = ["algo=reptile", "data=sinusoid", "backbone=mlp", "train.steps=20", "train.tasks_per_step=3", "train.log_every=4",
           "train.validate_every=6", "train.validate_episodes=4", "test.episodes=8", "test.baseline_episodes=0"]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint is due before step 6; the signal arrives during step 8, and step 9 is the last."""
    assert metarun(*REPTILE, f"outputs={tmp_path / 'whole'}").status == 0
    words = [*REPTILE, f"outputs={tmp_path / 'stopped'}"]
    with monkeypatch.context() as patch:
        Sent(number, 8, patch)
        done = metarun(*words)
    assert done.status == 128 + number
    assert done.said[-1] == f"metarun: interrupted by {number.name} at step 9; the same command goes on"
    assert "Traceback" not in done.err
    folder = run_folder(tmp_path / "stopped")
    assert torch.load(folder / "last.pt", weights_only=True)["state"]["step"] == 9
    assert not (folder / "result.json").exists()
    time.sleep(1 - time.time() % 1)  # TensorBoard orders the files of two sittings by the second
    again = metarun(*words)
    assert again.status == 0
    assert "going on at step 9" in again.err
    assert_same(comparable(run_folder(tmp_path / "whole")), comparable(folder))


def test_signal_during_the_last_validation_ends_before_testing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Sent(signal.SIGTERM, 6, patch)
        done = metarun(*SINUSOID, f"outputs={tmp_path}")
    assert done.status == 143
    assert done.said == ["metarun: interrupted by SIGTERM at step 6; the same command goes on"]
    assert metarun(*SINUSOID, f"outputs={tmp_path}").status == 0


def test_signal_to_a_process_of_its_own(tmp_path: Path) -> None:
    process = start(*SINUSOID[:-1], "train.steps=100000", "train.validate_every=20", f"outputs={tmp_path}")
    until(lambda: count(next(tmp_path.glob("*/*/metrics.jsonl"), tmp_path / "none")) >= 2, process)
    process.terminate()
    out, err = process.communicate()
    assert (process.returncode, out) == (143, "")
    assert re.fullmatch(
        r"metarun: interrupted by SIGTERM at step \d+; the same command goes on", err.splitlines()[-1]
    ), err


@pytest.mark.parametrize(
    ("number", "by"), [(signal.SIGINT, ""), (signal.SIGTERM, " by SIGTERM"), (signal.SIGUSR1, " by SIGUSR1")]
)
def test_signal_while_testing_is_one_line(
    number: signal.Signals, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("went on")

    words = [*SINUSOID, f"outputs={tmp_path}"]
    # Ignored where a shell runs this in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("metarun.stages.MetaTest.execute", interrupted)
            done = metarun(*words)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.status == 128 + number
    assert done.said[-1] == f"metarun: interrupted{by}; the same command goes on"
    assert "Traceback" not in done.err
    assert metarun(*words).status == 0


def test_checkpoint_on_an_interval_of_steps_and_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[str, set[int]] = {}
    save = carry_out.checkpoint.save

    def noting(path: Path, state: dict[str, Any]) -> None:
        if path.name == "last.pt":
            saved.setdefault(path.parent.parent.name, set()).add(state["state"]["step"])
        save(path, state)

    monkeypatch.setattr(carry_out.checkpoint, "save", noting)
    interval = {"steps": ["train.save_every=4"], "time": ["train.save_seconds=0"], "neither": []}
    for name, words in interval.items():
        assert metarun(*SINUSOID, f"name={name}", *words, f"outputs={tmp_path}").status == 0
    assert saved == {"steps": {4, 6}, "time": {1, 2, 3, 4, 5, 6}, "neither": {6}}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "default"),
        (["seed=1", "algo=maml", "data=omniglot"], "seed-1"),  # `<data>-<algo>` is the folder above
        (["seed=1", "algo=maml", "name=mine"], "algo-maml__seed-1"),
        (["experiment=omniglot_maml", "data=glyphs"], "data-glyphs"),
        (["seed=1", "train.optimizer.lr=0.01"], "seed-1__train.optimizer.lr-0.01"),
        (
            ["recipe=test", "checkpoint=/x/outputs/a/b", "data=glyphs"],
            "checkpoint-a_b__data-glyphs__recipe-test__ebaef2ea",
        ),
        (["outputs=/tmp", "resume=false", "+data.root=/a b", "~preset"], "data.root-a_b__preset__a523cdf2"),
        (["data.dataset=CIFAR100"], "data.dataset-CIFAR100__9087767d"),
    ],
)
def test_folder_is_named_by_what_was_overridden(words: list[str], name: str, tmp_path: Path) -> None:
    config = OmegaConf.create({"outputs": str(tmp_path), "name": "upper", "resume": True})
    assert choose_folder(config, words) == tmp_path / "upper" / name
    assert choose_folder(config, words[::-1]) == tmp_path / "upper" / name


def test_a_digest_of_digits_is_no_number_of_a_repeat(tmp_path: Path) -> None:
    """`k=v w1` and `k=v_w1` are written alike but for the digest of the one, which may have no letter."""
    config = OmegaConf.create({"outputs": str(tmp_path), "name": "upper", "resume": True})
    numbers = itertools.count()
    other = next(name for n in numbers if (name := folder_name([f"train.k=v w{n}"], False))[-8:].isdecimal())
    (tmp_path / "upper" / other).mkdir(parents=True)
    words = [f"train.k=v_w{next(numbers) - 1}"]
    assert other.startswith(f"{folder_name(words, False)}__")
    assert choose_folder(config, words) == tmp_path / "upper" / folder_name(words, False)


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    config = OmegaConf.create({"outputs": str(tmp_path), "name": "upper", "resume": True})
    folders = {choose_folder(config, [f"data.root=/{'long' * 60}", f"train.steps={steps}"]) for steps in range(3)}
    assert len(folders) == 3
    assert all(len(folder.name) <= 120 for folder in folders)


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_config_is_refused_with_the_difference(finished: bool, tmp_path: Path) -> None:
    words = [*SINUSOID, f"outputs={tmp_path}"]
    metarun(*words)
    folder = run_folder(tmp_path)
    if not finished:
        (folder / "result.json").unlink()
    edit(folder, "inner_lr: 0.001", "inner_lr: 0.25")
    edit(folder, "\nseed: 0", "\nextra: 1\nseed: 0")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = metarun(*words)
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert "algo.inner_lr 0.25 -> 0.001; extra 1 -> absent" in done.err
    assert all(word in done.err for word in (str(folder), "name=", "resume=false"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "word", ["hardware.threads=1", "hardware.vectorize=false", "train.save_every=3", "hardware.task_chunk=2"]
)
def test_what_changes_no_number_may_differ_between_sittings(word: str, tmp_path: Path) -> None:
    """Threads and saving name no folder. By the others a folder is named; a user who renames it may go on."""
    metarun(*SINUSOID, f"outputs={tmp_path}")
    folder = run_folder(tmp_path)
    (folder / "result.json").unlink()
    if word.split("=")[0] not in UNNAMED:
        kept = [word, *(part for part in SINUSOID if part.split("=")[0] not in ("algo", "data"))]
        name = "__".join(sorted(part.replace("=", "-") for part in kept))
        folder.rename(folder.with_name(name))
    done = metarun(*SINUSOID, word, f"outputs={tmp_path}")
    assert done.status == 0, done.err
    assert "going on at step 6" in done.err


def test_run_of_an_older_version_goes_on_while_what_is_new_is_off(tmp_path: Path) -> None:
    words = [*SINUSOID, f"outputs={tmp_path}", "name=old"]
    assert metarun(*words, "train.steps=2").status == 0
    folder = run_folder(tmp_path)
    stored = OmegaConf.load(folder / "config.yaml")
    del stored.hardware["tf32"]  # a key that it did not know
    stored.hardware.gone = None  # one that nobody knows any more
    OmegaConf.save(stored, folder / "config.yaml")
    assert "finished before" in metarun(*words, "train.steps=2").out
    stored.hardware.gone = "on"
    del stored.train["log_every"]  # one that is on by default
    OmegaConf.save(stored, folder / "config.yaml")
    said = metarun(*words, "train.steps=2").said
    assert re.search(r"another config \(hardware\.gone on -> absent; train\.log_every absent -> \d+\)", said[-1])


def test_resume_false_starts_beside(tmp_path: Path) -> None:
    words = [*SINUSOID, f"outputs={tmp_path}"]
    assert metarun(*words).status == 0
    folder = run_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for number in (2, 3):
        done = metarun(*words, "resume=false")
        assert done.status == 0
        assert f"run folder: {folder}__{number}\n" in done.err
        assert "going on" not in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_same(comparable(folder), comparable(folder.with_name(f"{folder.name}__3")))
    assert f"results  {folder}__3\n" in metarun(*words).out  # the newest is the one that is gone on with


def test_second_process_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry_out, "LOCK_SECONDS", 0.2)
    words = [*SINUSOID, f"outputs={tmp_path}"]
    metarun(*words)
    folder = run_folder(tmp_path)
    (folder / "result.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with FileLock(folder / ".lock"):
        done = metarun(*words)
    assert (done.status, done.out, len(done.said)) == (2, "", 2)  # that it waits, and that this was in vain
    assert done.said[1].startswith(f"metarun: {folder}: another process is running this")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert metarun(*words).status == 0


def test_checkpoint_that_was_truncated_stops_the_run(tmp_path: Path) -> None:
    words = [*SINUSOID, f"outputs={tmp_path}"]
    metarun(*words)
    folder = run_folder(tmp_path)
    (folder / "result.json").unlink()
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:1000])
    done = metarun(*words)
    assert done.status == 2
    assert done.said[-1].startswith(f"metarun: checkpoint {folder / 'last.pt'}: cannot be read, it is truncated")
    assert "Traceback" not in done.err
    assert metarun(*words, "resume=false").status == 0


def test_loss_that_is_not_finite_stops_with_the_step(tmp_path: Path) -> None:
    done = metarun(*SINUSOID, "train.optimizer.lr=1e30", "train.save_every=1", f"outputs={tmp_path}")
    folder = run_folder(tmp_path)
    assert done.status == 2
    assert re.match(
        rf"metarun: training: the loss is not finite at step 1; {re.escape(str(folder / 'last.pt'))} keeps",
        done.said[-1],
    )
    assert "train.optimizer.lr" in done.said[-1]
    assert not (folder / "result.json").exists()


def test_budget_of_seconds_counts_all_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.1 s by a clock of the test, a budget of 0.55 s, and a stop in between: six steps in all."""
    loss, now = Algorithm.task_loss, 0.0

    def slow(*arguments: Any) -> torch.Tensor:
        nonlocal now
        now += 0.05  # once for the support, once for the queries
        return loss(*arguments)

    monkeypatch.setattr(Algorithm, "task_loss", slow)
    monkeypatch.setattr(train_state, "time", SimpleNamespace(perf_counter=lambda: now))
    words = ["algo=maml", "data=sinusoid", "backbone=mlp", "train.steps=50", "train.max_seconds=0.55", "train.log_every=1",
             "algo.test_inner_steps=0", "hardware.record=false",
             "train.validate_every=50", "test.episodes=2", "test.baseline_episodes=0"]  # fmt: skip
    with monkeypatch.context() as patch:
        Sent(signal.SIGTERM, 2, patch)
        assert metarun(*words, f"outputs={tmp_path}").status == 143
    assert metarun(*words, f"outputs={tmp_path}").status == 0
    found = result(run_folder(tmp_path))
    assert found["train/steps"] == 6
    assert found["train/seconds"] == pytest.approx(0.6)
