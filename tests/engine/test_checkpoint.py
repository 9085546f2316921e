"""Files that must survive a kill, a full disk and a careless copy."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import SINUSOID, metarun, result, run_folder
from torch import nn

from metarun import files
from metarun.engine import checkpoint
from metarun.errors import UserError
from metarun.system import platform
from metarun.system.platform import process_space

STATE = {"model": {"weight": torch.arange(6.0)}, "step": 3}


def no_space(*arguments: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pt", STATE)
    checkpoint.save(tmp_path / "last.pt", {**STATE, "step": 4})
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["step"] == 4
    torch.testing.assert_close(loaded["model"]["weight"], torch.arange(6.0), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "write"])
def test_full_disk_leaves_the_previous_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        if call != "write":
            patch.setattr(call, no_space)
        with pytest.raises(
            UserError, match=r"last\.pt: cannot be written \(No space left on device\); the previous one"
        ):
            files.replace(path, lambda file: no_space() if call == "write" else file.write(b"half"))
    assert path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_first_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(No space left on device\)$"):
        checkpoint.save(tmp_path / "last.pt", STATE)
    assert not list(tmp_path.iterdir())


def test_kill_before_the_rename_leaves_the_previous_file(tmp_path: Path) -> None:
    """What stands aside of a killed process neither counts nor disturbs."""
    checkpoint.save(tmp_path / "last.pt", STATE)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    writers = ("", *(f"{process_space()}-{process}-0123abcd." for process in (int(dead.stdout), os.getpid())))
    for writer in writers:
        (tmp_path / f".last.pt.{writer}writing").write_bytes(b"half")
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    checkpoint.save(tmp_path / "last.pt", {**STATE, "step": 4})
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_what_a_living_writer_has_aside_stays(tmp_path: Path) -> None:
    of_others = [tmp_path / f".last.pt.{space}-1-0123abcd.writing" for space in (process_space(), "elsewhere")]
    other_file = tmp_path / f".last.pt.old.{process_space()}-{os.getpid()}-0123abcd.writing"
    for path in (*of_others, other_file):
        path.write_bytes(b"half")
    files.save_bytes(tmp_path / "last.pt", b"whole")
    assert {*tmp_path.iterdir()} == {*of_others, other_file, tmp_path / "last.pt"}
    os.utime(of_others[1], (0, 0))
    files.save_bytes(tmp_path / "last.pt", b"whole")
    assert not of_others[1].exists()


def test_what_has_stood_aside_for_a_day_goes_where_no_process_says_that_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, and where another process has the number of the one that was killed."""
    monkeypatch.setattr(platform, "WINDOWS", True)
    old, new = (tmp_path / f".last.pt.{process_space()}-1-{name}.writing" for name in ("01234567", "89abcdef"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    files.save_bytes(tmp_path / "last.pt", b"whole")
    assert {*tmp_path.iterdir()} == {new, tmp_path / "last.pt"}


def test_of_two_writers_at_once_each_writes_whole_and_the_last_is_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"

    def outer(file: Any) -> None:
        file.write(b"A" * 10)
        file.flush()
        files.save_bytes(path, b"B" * 5)  # another, from its beginning to its end
        assert path.read_bytes() == b"B" * 5

    files.replace(path, outer)
    assert path.read_bytes() == b"A" * 10
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["last.pt", "best.pt"])
def test_run_on_a_full_disk_goes_on_when_there_is_space(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SINUSOID, "train.save_every=1", "train.validate_every=2"]
    assert metarun(*words, f"outputs={tmp_path / 'whole'}").status == 0
    writes: list[str] = []
    replace = files.replace

    def fills_up(path: Path, write: Callable[[Any], object]) -> None:
        writes.append(path.name)
        # The third time: there is an earlier one of both.
        replace(path, no_space if path.name == failing and writes.count(failing) == 3 else write)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", fills_up)
        done = metarun(*words, f"outputs={tmp_path / 'full'}")
    assert done.status == 2
    assert done.said[-1].endswith(
        f"{failing}: cannot be written (No space left on device); the previous one is untouched"
    )
    assert metarun(*words, f"outputs={tmp_path / 'full'}").status == 0
    numbers = [result(run_folder(tmp_path / name))["test/mse"] for name in ("whole", "full")]
    assert numbers[0] == numbers[1]


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch sprung",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
        (pickle.dumps({"model": Trap()}), "cannot be read"),
        (None, "cannot be read"),
        ({"weights": {}}, "holds no model"),
        ([1, 2], "holds no model"),
    ],
    ids=["empty", "text", "trap", "truncated", "foreign", "list"],
)
def test_file_that_is_no_checkpoint(content: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    torch.save(STATE if content is None else content, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:-100])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint {path}: {reason}"):
        checkpoint.load(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("told", ["result.json", "stage.json"])
def test_weights_in_the_folder_of_another_training(told: str, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, {**STATE, "made_by": "one"})
    for made_by in ("one", None):  # an earlier version wrote none, neither there nor in the weights
        files.save_json(tmp_path / told, {"train/steps": 1, **({"made_by": made_by} if made_by else {})})
        assert checkpoint.load(path)["made_by"] == "one"
    files.save_json(tmp_path / told, {"made_by": "another"})
    with pytest.raises(
        UserError, match=f"^checkpoint {path}: is of another training, .*; bring the right file back, or "
    ):
        checkpoint.load(path)
    checkpoint.save(tmp_path / "last.pt", {**STATE, "made_by": "one"})
    what = (
        "take others: the run's best.pt, or training it again"
        if told == "result.json"
        else f"delete {tmp_path} to have"
    )
    with pytest.raises(UserError, match=f"last.pt: is of another training, .*, or {what}"):
        checkpoint.load(tmp_path / "last.pt")  # to delete it would not train a finished run again
    checkpoint.save(path, STATE)
    assert "made_by" not in checkpoint.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        checkpoint.load(tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (nn.Linear(3, 2), r"weight is \(2, 3\) in the file and \(1, 3\) in this model"),
        (nn.Linear(3, 1, bias=False), r"bias is absent in the file and \(1,\) in this model"),
        (nn.BatchNorm1d(3), r"weight is \(3,\) in the file and \(1, 3\) in this model"),
        (nn.Sequential(nn.Linear(3, 1)), r"weight is absent in the file"),
    ],
    ids=["wider", "no bias", "other layer", "nested"],
)
def test_weights_of_another_architecture(other: nn.Module, difference: str) -> None:
    module = nn.Linear(3, 1)
    before = module.weight.clone()
    with pytest.raises(UserError, match=f"^checkpoint best.pt: is of another architecture: {difference}"):
        checkpoint.load_weights(module, other.state_dict(), Path("best.pt"))
    torch.testing.assert_close(module.weight, before, rtol=0, atol=0)


def test_weights_with_one_too_many() -> None:
    weights = {**nn.Linear(3, 1).state_dict(), "scale": torch.ones(1)}
    with pytest.raises(UserError, match=r"scale is \(1,\) in the file and absent in this model"):
        checkpoint.load_weights(nn.Linear(3, 1), weights, Path("best.pt"))
