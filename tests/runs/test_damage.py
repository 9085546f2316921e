"""Damaged files of a run: one line says which file, what is wrong and what to do, and no other run suffers."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rights import kept_out
from shell import SINUSOID, Outcome, events, harm_archive, metarun, one_line, result, run_folder

from metarun import files
from metarun.backbones.weights import read_tensors
from metarun.engine import checkpoint
from metarun.errors import UserError
from metarun.inference import store
from metarun.report.collect import collect
from metarun.runs.folder import stored_config
from metarun.runs.logger import RunLogger

Spoil = Callable[[Path], object]

EMPTY: Spoil = lambda path: path.write_bytes(b"")  # noqa: E731
ZEROS: Spoil = lambda path: path.write_bytes(bytes(path.stat().st_size))  # noqa: E731
CUT: Spoil = lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # noqa: E731
BYTES: Spoil = lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes())  # noqa: E731
LIST: Spoil = lambda path: path.write_bytes(b"[1, 2]")  # noqa: E731
DEEP: Spoil = lambda path: path.write_bytes(b"[" * 100_000)  # noqa: E731


def hole(path: Path) -> None:
    """Zeros in the place of the largest tensor of an archive, as a power loss leaves them: torch itself loads it."""
    with zipfile.ZipFile(path) as archive:
        member = max(
            (each for each in archive.infolist() if "/data/" in each.filename), key=lambda each: each.file_size
        )
    content = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
    start = member.header_offset + 30 + name + extra
    content[start : start + member.file_size] = bytes(member.file_size)
    path.write_bytes(content)
    torch.load(path, weights_only=True)


EACH = {"empty": EMPTY, "zeros": ZEROS, "cut": CUT, "bytes": BYTES, "list": LIST, "deep": DEEP}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of three seeds."""
    outputs = tmp_path_factory.mktemp("whole")
    done = metarun(*SINUSOID, "-m", "seed=0,1,2", "hydra/launcher=serial", f"outputs={outputs}")
    assert done.status == 0, done.err
    return outputs


@pytest.fixture
def outputs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def of_seed(outputs: Path, seed: int) -> Path:
    (folder,) = outputs.glob(f"*/*seed-{seed}*")
    return folder


def alone(outputs: Path, seed: int) -> Outcome:
    return metarun(*SINUSOID, f"seed={seed}", f"outputs={outputs}")


@pytest.mark.parametrize("spoil", EACH.values(), ids=EACH)
def test_a_damaged_result_is_not_a_finished_run(spoil: Spoil, outputs: Path) -> None:
    spoil(of_seed(outputs, 1) / "result.json")
    one_line(alone(outputs, 1), "seed-1", "result.json", "is damaged", "delete it")
    sweep = metarun(*SINUSOID, "-m", "seed=0,1,2", "hydra/launcher=serial", f"outputs={outputs}")
    assert sweep.status == 1
    assert "3 jobs: 2 finished before, 1 to run" in sweep.err
    assert "1 of 3 jobs failed" in sweep.err
    assert "is damaged" in sweep.err
    assert "Traceback" not in sweep.err
    report = metarun("recipe=report", f"runs={outputs}")
    assert report.status == 0
    assert report.err.count("result.json: cannot be used") == 1
    assert "left out" in (outputs / "report" / "index.html").read_text()
    (of_seed(outputs, 1) / "result.json").unlink()  # as it was told
    assert alone(outputs, 1).status == 0


def changed(outputs: Path, changes: list[dict[str, Any]]) -> list[Path]:
    """In place of the run with the seed 2 a run for each of the changes of its result, with a seed of its own."""
    run = of_seed(outputs, 2)
    whole, config = result(run), (run / "config.yaml").read_text()
    copies = [Path(shutil.copytree(run, run.with_name(f"changed-{number}"))) for number in range(len(changes))]
    shutil.rmtree(run)
    for seed, (copy, change) in enumerate(zip(copies, changes, strict=True), 2):
        (copy / "config.yaml").write_text(config.replace("\nseed: 2", f"\nseed: {seed}"))
        (copy / "result.json").write_text(json.dumps({**whole, **change}))
    return copies


def test_results_of_other_values_end_no_report(outputs: Path) -> None:
    copies = changed(
        outputs,
        [
            {"test/mse": "high"},
            {"test/mse_ci95": [1]},
            {"protocol": 5},
            {"data": "glyphs"},
            {"train/seconds": None, "train/steps": "6"},
        ],
    )
    report = metarun("recipe=report", f"runs={outputs}")
    assert report.status == 0, report.err
    for copy in copies:
        assert report.err.count(f"{copy / 'result.json'}: cannot be used") == 1
    assert report.err.count("\n") == len(copies)
    assert [run.seed for run in collect([outputs], outputs / "report").runs] == [0, 1]


def test_values_that_only_the_page_shows_end_no_report(outputs: Path) -> None:
    copies = changed(
        outputs,
        [
            {"versions": 5},
            {"hardware": "cpu"},
            {"choices": {"algo": {"a": 1}}},
            {"test/curves": 5},
            {"peak_memory": 3},
            {"versions": {"torch": {"a": 1}}},
            {"protocol": {"transductive": False}},
        ],
    )
    report = metarun("recipe=report", f"runs={outputs}")
    assert report.status == 0, report.err
    for copy in copies:
        assert report.err.count(f"{copy / 'result.json'}: cannot be used (") == 1
    assert "seed-1" in (outputs / "report" / "index.html").read_text()


def test_results_of_one_seed_that_cannot_be_shown_end_no_report(outputs: Path) -> None:
    copies = changed(outputs, [{"protocol": {"transductive": False}}, {"peak_memory": 3}])
    (copies[1] / "config.yaml").write_text((copies[0] / "config.yaml").read_text())
    report = metarun("recipe=report", f"runs={outputs}")
    assert report.status == 0, report.err
    for copy in copies:
        assert f"{copy / 'result.json'}: cannot be used (" in report.err


@pytest.mark.parametrize("spoil", EACH.values(), ids=EACH)
def test_a_damaged_config_is_named(spoil: Spoil, outputs: Path) -> None:
    spoil(of_seed(outputs, 0) / "config.yaml")
    one_line(alone(outputs, 0), "config.yaml", "is damaged", "resume=false")
    tested = metarun("recipe=test", f"checkpoint={of_seed(outputs, 0)}", f"outputs={outputs}")
    one_line(tested, "config.yaml", "is damaged")
    report = metarun("recipe=report", f"runs={outputs}")
    assert report.status == 0
    assert report.err.count("config.yaml: cannot be used") == 1


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@pytest.mark.parametrize("spoil", [EMPTY, ZEROS, CUT, LIST, hole], ids=["empty", "zeros", "cut", "list", "hole"])
def test_a_damaged_checkpoint_is_named(name: str, spoil: Spoil, outputs: Path) -> None:
    folder = of_seed(outputs, 0)
    (folder / "result.json").unlink()
    spoil(folder / name)
    one_line(alone(outputs, 0), name, "cannot be read", "resume=false")
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("names", [["last.pt", "best.pt"], ["best.pt"]])
def test_the_checkpoints_of_another_run_are_refused(names: list[str], outputs: Path) -> None:
    own, other = of_seed(outputs, 0), of_seed(outputs, 1)
    number = result(own)["test/mse"]
    (own / "result.json").unlink()
    kept = {name: (own / name).read_bytes() for name in names}
    for name in names:
        shutil.copy(other / name, own / name)
    one_line(alone(outputs, 0), names[0], "is of another training", "resume=false")
    assert not (own / "result.json").exists()
    for name, content in kept.items():
        (own / name).write_bytes(content)
    done = metarun(*SINUSOID, "seed=0", f"outputs={outputs}", "train.save_every=2")
    assert done.status == 0, done.err
    assert result(own)["test/mse"] == number


@pytest.mark.parametrize("name", ["metarun.log", "metrics.jsonl", "result.json", "clock.txt"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name: str, outputs: Path) -> None:
    folder = of_seed(outputs, 0)
    (folder / "result.json").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    one_line(alone(outputs, 0), f"{name}: is a pipe", "delete it")


def test_tensors_of_which_a_part_is_lost_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": {"a": torch.ones(1000), "b": torch.ones(3)}}, path)
    hole(path)
    with pytest.raises(UserError, match="it is truncated or damaged"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="it is truncated"):
        read_tensors(path, "backbone.weights")
    with pytest.raises(UserError, match="it is damaged"):
        store.load(path)


def test_weights_that_may_not_be_read_are_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": {"a": torch.ones(3)}}, path)
    path.chmod(0)
    for reads in (checkpoint.load, store.load, lambda path: read_tensors(path, "backbone.weights")):
        with kept_out(), pytest.raises(UserError, match=r"weights\.pt:? cannot be read \(Permission denied\)$"):
            reads(path)


def test_a_file_that_may_not_be_read_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"{}\n")
    (tmp_path / "x").chmod(0)
    for reads in (
        lambda path: files.read_json(path, "delete it"),
        lambda path: files.read_arrays(path, "delete it", []),
        lambda path: stored_config(path, "delete it"),
    ):
        with kept_out(), pytest.raises(UserError, match=r"x: cannot be read \(Permission denied\)$"):
            reads(tmp_path / "x")


def test_arrays_that_would_fill_the_memory_are_damaged(tmp_path: Path) -> None:
    files.save_arrays(tmp_path / "x.npz", x=np.zeros(2000))
    assert files.read_arrays(tmp_path / "x.npz", "delete it", ["x"])["x"].shape == (2000,)
    harm_archive(tmp_path / "x.npz", "more than the memory")
    with pytest.raises(
        UserError, match=r"x\.npz: is damaged \(it is truncated, or is not what metarun writes\); delete it$"
    ):
        files.read_arrays(tmp_path / "x.npz", "delete it", ["x"])


def test_a_config_is_read_once_so_that_what_is_looked_at_is_what_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\n")
    read = Path.read_text

    def replaced(self: Path, **how: Any) -> str:
        text = read(self, **how)
        path.write_text("seed: 4\n")
        return text

    with mock.patch.object(Path, "read_text", replaced):
        assert stored_config(path, "delete it") == {"seed": 3}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(1, 2).to_sparse(), "a tensor of torch.float32, torch.sparse_coo"),
        (torch.zeros(1, 2, dtype=torch.complex64), "a tensor of torch.complex64, torch.strided"),
        (torch.zeros(1, 2, device="meta"), "a tensor without values"),
    ],
)
def test_a_tensor_of_the_right_shape_that_no_network_can_take(value: torch.Tensor, told: str) -> None:
    network = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(
        UserError, match=rf"^checkpoint x: is of another architecture: weight is {told} in the file and \(1, 2\) in"
    ):
        checkpoint.load_weights(network, {"weight": value}, Path("x"))


def test_a_state_that_a_file_of_weights_makes_up_does_not_reach_numpy(tmp_path: Path) -> None:
    """An array of two texts whose type says that it holds objects, and that is given none: numpy ends the process."""

    def raw(text: bytes) -> bytes:
        return b"c_codecs\nencode\nX" + struct.pack("<I", len(text)) + text + b"X\x06\x00\x00\x00latin1\x86R"

    kind = b"cnumpy\ndtype\nX\x02\x00\x00\x00S8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNK\x08K\x01K\x3ftb"
    array = (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + raw(b"b")
        + b"\x87R(K\x01K\x02\x85"
        + kind
    )
    for name, values, taken in (("bad.pt", b"]", False), ("good.pt", raw(b"A" * 16), True)):
        torch.save({"w": torch.ones(2)}, tmp_path / "whole.pt")
        with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / name, "w") as made:
            for member in whole.namelist():
                content = whole.read(member)
                if member.endswith("data.pkl"):  # a second value behind the tensor
                    content = content[:-1] + b"X\x01\x00\x00\x00a" + array + b"\x89" + values + b"tbs."
                made.writestr(member, content)
        code = (
            "import pathlib, sys; from metarun.backbones.weights import read_tensors; "
            "print(list(read_tensors(pathlib.Path(sys.argv[1]), 'key')))"
        )
        words = [sys.executable, "-c", code, str(tmp_path / name)]
        ended = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
        assert (ended.returncode == 0, "['w']" in ended.stdout) == (taken, taken)
        assert taken or "cannot be read; it is truncated" in ended.stderr, ended.returncode


@pytest.mark.parametrize("crc", [True, False], ids=["with checksums", "without checksums"])
def test_an_archive_that_holds_more_than_its_bytes_is_not_unpacked(crc: bool, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save({"model": {"a": torch.zeros(2**20)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for member in archive.infolist():
            member.CRC = member.CRC if crc else 0
    assert path.stat().st_size < 10_000
    torch.load(path, weights_only=True)  # torch itself takes the four megabytes
    for read in (checkpoint.load, store.load, lambda path: read_tensors(path, "backbone.weights")):
        with pytest.raises(UserError, match=r"cannot be read[,;] it is (truncated|damaged)"):
            read(path)


@pytest.mark.parametrize("key", ["optimizer", "schedule", "state"])
@pytest.mark.parametrize("value", [None, 5, {"a": 1}])
def test_a_checkpoint_without_a_part_is_named(key: str, value: Any, outputs: Path) -> None:
    folder = of_seed(outputs, 0)
    (folder / "result.json").unlink()
    saved = torch.load(folder / "last.pt", weights_only=True)
    if value is None:
        del saved[key]
    else:
        saved[key] = value
    torch.save(saved, folder / "last.pt")
    done = alone(outputs, 0)
    if key == "schedule" and value == {"a": 1}:  # torch takes any entry of it
        assert done.status in (0, 2)
        assert "Traceback" not in done.err
    else:
        one_line(done, "last.pt", "resume=false")


def test_metrics_with_damaged_lines_cost_these_lines_alone(outputs: Path) -> None:
    folder = of_seed(outputs, 0)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    zeros = "\0" * 40
    path.write_text(f"{zeros}\n[1]\n{''.join(lines)}{zeros}{lines[-1]}{zeros}")
    (folder / "result.json").unlink()
    done = alone(outputs, 0)
    assert done.status == 0, done.err
    assert "2 damaged lines were left out" in done.err
    assert all(json.loads(line) for line in path.read_text().splitlines())
    path.write_bytes(b"\xff\xff\n5\n{}\n" + path.read_bytes())
    report = metarun("recipe=report", f"runs={outputs}")
    assert report.status == 0
    assert "metrics.jsonl: 3 damaged lines left out" in report.err


def test_what_follows_the_training_is_on_the_curves_once(outputs: Path) -> None:
    """A run that was killed while it tested tells all of that again."""
    folder = of_seed(outputs, 0)
    before = events(folder)
    tags = [tag for tag in before.Tags()["scalars"] if tag.startswith(("test/", "hparams/"))]
    assert tags
    (folder / "result.json").unlink()
    assert alone(outputs, 0).status == 0
    after = events(folder)
    for tag in before.Tags()["scalars"]:
        points = [(event.step, event.value) for event in after.Scalars(tag)]
        assert sorted(points) == sorted((event.step, event.value) for event in before.Scalars(tag)), tag
    assert len(list(folder.glob("events.*.results"))) == 1


def test_all_that_a_checkpoint_relies_on_is_synced_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, save = RunLogger.sync, checkpoint.save
    monkeypatch.setattr(RunLogger, "sync", lambda self: (order.append("sync"), sync(self))[1])
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (order.append(path.name), save(path, state))[1])
    synced: list[str] = []

    def note(file: Any) -> None:
        assert file.writable()  # else Windows refuses
        synced.append(Path(file.name).name.split(".out")[0])

    monkeypatch.setattr(files, "sync", note)
    assert metarun(*SINUSOID, f"outputs={tmp_path}").status == 0
    assert order.count("last.pt") >= 1
    assert all(order[number - 1] == "sync" for number, name in enumerate(order) if name == "last.pt")
    assert {"metrics.jsonl", "events"} <= set(synced)


def test_new_folders_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_weights_of_a_step_that_is_taken_again_are_kept_again(tmp_path: Path) -> None:
    """A crash between `best.pt` and `last.pt`: the run goes on from before, and may end before that step under a budget of time."""
    words = [*SINUSOID, "train.validate_every=2", f"outputs={tmp_path}"]
    assert metarun(*words, "train.max_seconds=1000").status == 0
    folder = run_folder(tmp_path)
    whole = result(folder)
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    last["state"] |= {"best_score": math.inf}  # nothing can be better any more
    best["step"] = 1000
    (folder / "result.json").unlink()
    last["state"] |= {"step": 4, "validated": 4}
    torch.save(last, folder / "last.pt")
    torch.save(best, folder / "best.pt")
    assert metarun(*words, "train.max_seconds=1000").status == 0
    assert result(folder)["train/selected_step"] == 6 == whole["train/steps"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * files.LEVELS + "1" + "]" * files.LEVELS, ""),
        ("[" * (files.LEVELS + 1) + "1" + "]" * (files.LEVELS + 1), "too deeply"),
        ('{"a":' * 980 + "1" + "}" * 980, "too deeply"),
        (str(-(10**308)), ""),
        (f'{{"a": {10**309}}}', "too large"),
    ],
)
def test_json_that_nothing_can_compute_with_is_no_json(text: str, why: str) -> None:
    if not why:
        assert files.parsed(text) is not None
        return
    with pytest.raises(ValueError, match=why):
        files.parsed(text)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"{", b"5", b"\xff", b"null"])
def test_read_json_says_what_is_wrong_and_what_to_do(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: is damaged \(.+\); do this"):
        files.read_json(path, "do this")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\); do this"):
        files.read_json(path, "do this")
