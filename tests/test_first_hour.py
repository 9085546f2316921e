"""The first hour: own images, a quick trial of a whole command, the runs so far."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import table
from PIL import Image
from shell import SINUSOID, events, metarun, result, run_folder

from metarun.core import TaskShape
from metarun.data.image_source import ImageSource
from metarun.errors import UserError
from metarun.report.listing import found

CPU = torch.device("cpu")


def source(train: int, val: int, test: int, per_class: int = 20, rotations: bool = False) -> ImageSource:
    total = train + val + test
    images = np.zeros((total * per_class, 1, 4, 4), np.uint8)
    stops = np.cumsum([0, train, val, test])
    splits = {split: range(stops[i], stops[i + 1]) for i, split in enumerate(("train", "val", "test"))}
    return ImageSource(table(images, [per_class] * total), splits, rotations=rotations)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_too_few_classes_say_how_many_fell_where_and_what_to_do(split: str) -> None:
    with pytest.raises(UserError) as refused:
        source(4, 2, 3).sampler(split, TaskShape(5, 1, 1), 0, CPU)  # type: ignore[arg-type]
    told = str(refused.value)
    assert "of 9 classes 4 for training, 2 for validation, 3 for the test" in told
    assert "take task.ways=2" in told
    assert "recipe=target_only target=folder target.data.root=" in told
    assert "\n" not in told


def test_one_class_a_split_leads_to_no_task_of_one_way() -> None:
    with pytest.raises(UserError, match="take more classes") as refused:
        source(2, 1, 1).sampler("val", TaskShape(5, 1, 1), 0, CPU)
    assert "task.ways=1" not in str(refused.value)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_task_of_one_way_is_refused(split: str) -> None:
    with pytest.raises(UserError, match=r"task\.ways=1: a task of one class has one answer"):
        source(4, 4, 4).sampler(split, TaskShape(1, 1, 1), 0, CPU)  # type: ignore[arg-type]


def test_turned_classes_count() -> None:
    source(4, 2, 3, rotations=True).sampler("val", TaskShape(8, 1, 1), 0, CPU)
    with pytest.raises(UserError, match="of 36 classes 16 for training, 8 for validation, 12 for the test"):
        source(4, 2, 3, rotations=True).sampler("val", TaskShape(9, 1, 1), 0, CPU)


def test_the_smallest_class_is_named() -> None:
    images = np.zeros((46, 1, 4, 4), np.uint8)
    small = ImageSource(table(images, [20, 20, 6]), {"train": [0, 1, 2], "val": [0, 1], "test": [0, 1]})
    with pytest.raises(UserError, match="above the 6 images of the smallest class of the train split, class 2; lower"):
        small.sampler("train", TaskShape(2, 5, 5), 0, CPU)


def test_small_classes_of_which_there_are_few_end_in_one_line_that_says_both() -> None:
    source = ImageSource(
        table(np.zeros((72, 1, 4, 4), np.uint8), [6] * 12), {"train": list(range(8)), "val": [8, 9], "test": [10, 11]}
    )
    with pytest.raises(UserError, match=r"above the 6 images .* lower .* 5 ways have too few classes as well, 2 for validation and 2 for "
                       r"the test\. To tell these 12 classes themselves apart: recipe=target_only"):  # fmt: skip
        source.sampler("train", TaskShape(5, 1, 15), 0, CPU)
    with pytest.raises(
        UserError, match=r"above the 6 images of [^.]*; lower train\.task\.queries[^.]*train\.task\.queries=\[1,15\]$"
    ):
        source.sampler("train", TaskShape(2, 1, 15), 0, CPU)


def test_one_class_is_not_said_to_be_told_apart() -> None:
    one = ImageSource(table(np.zeros((6, 1, 4, 4), np.uint8), [6]), {"train": [0], "val": [0], "test": [0]})
    with pytest.raises(UserError, match=r"One class leaves nothing to tell apart"):
        one.sampler("train", TaskShape(2, 1, 1), 0, CPU)


def test_four_classes_of_own_images_end_in_one_line_that_leads_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        folder = tmp_path / "my images" / f"class{number}"
        folder.mkdir(parents=True)
        for image in range(20):
            Image.fromarray(np.full((8, 8, 3), 60 * number + image, np.uint8)).save(folder / f"{image}.png")
    words = ["data=folder", f"data.root={tmp_path}/my images", "data.image_size=16", f"outputs={tmp_path}/out"]
    done = metarun(*words)
    assert done.status == 2
    assert "of 4 classes" in done.said[-1]
    assert "recipe=target_only" in done.said[-1]
    one = metarun(*words, "task.ways=1", "task.queries=2")
    assert one.status == 2
    assert "one answer" in one.said[-1]
    assert not (tmp_path / "out").exists()
    told = metarun("recipe=target_only", "target=folder", f"target.data.root={tmp_path}/my images", "target.data.image_size=16",
                   "transfer=logistic_regression", "debug=fast", f"outputs={tmp_path}/out")  # fmt: skip
    assert told.status == 0, told.err
    assert told.out.startswith("logistic_regression on folder")


@pytest.mark.parametrize("words", [[], ["algo=maml", "task.ways=3"], ["-m", "algo=protonet,maml", "task.ways=2"]])
def test_debug_fast_carries_a_whole_command_out_in_a_few_steps(words: list[str], tmp_path: Path) -> None:
    done = metarun(*words, "debug=fast", "backbone.channels=4", f"outputs={tmp_path}")
    assert done.status == 0, done.err
    made = list(tmp_path.glob("*/*/result.json"))
    assert len(made) == (2 if "-m" in words else 1)
    for path in made:
        found = result(path.parent)
        assert found["train/steps"] == 4
        assert found["test/episodes"] == 8
        assert "debug-fast" in path.parent.name  # apart from the run in earnest


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one at work, and two that are damaged."""
    root = tmp_path_factory.mktemp("outputs")
    for seed in range(4):
        assert metarun(*SINUSOID, f"seed={seed}", f"outputs={root}").status == 0
    folders = sorted(root.glob("*/*"))
    (folders[1] / "result.json").unlink()
    (folders[2] / "result.json").write_bytes(bytes(40))
    (folders[3] / "result.json").unlink()
    (folders[3] / "config.yaml").write_bytes(bytes(40))
    return root


@pytest.mark.parametrize("words", [["runs"], ["recipe=runs"]])
@pytest.mark.parametrize("columns", ["80", "60", "200", "20"])
def test_the_runs_so_far_as_a_table(
    words: list[str], columns: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = metarun(*words, f"outputs={outputs}")
    assert done.status == 0, done.err
    assert metarun(*words, f"runs={outputs}").out == done.out
    flat = " ".join(done.out.split())
    assert "4 runs" in flat
    for text in ("finished", "step 6 of 6", "result damaged", "config damaged", time.strftime("%Y"), "±"):
        assert text in flat
    for folder in outputs.glob("*/*"):
        assert str(folder) in flat  # can be pasted


def test_the_runs_so_far_tell_all_that_was_overridden(tmp_path: Path) -> None:
    """The name of a folder is cut where much was overridden: of which two runs differ in what cannot be read there."""
    words = ("train.validate_episodes=3", "test.episodes=4", "train.optimizer.lr=0.002", "algo.inner_lr=0.02")
    assert metarun(*SINUSOID, *words, f"outputs={tmp_path}").status == 0
    assert words[2] not in run_folder(tmp_path).name
    (line,) = found([tmp_path])
    assert [word for word in line.overridden.split() if word in words] == list(words)
    assert "outputs=" not in line.overridden


def test_no_runs_are_told_in_one_line(tmp_path: Path) -> None:
    for words, expected in (
        (["runs", f"outputs={tmp_path}"], "no run lies in"),
        (["runs", "runs=/nowhere"], "no such folder"),
    ):
        done = metarun(*words)
        assert done.status == 2
        assert expected in done.err
        assert done.err.count("\n") == 1


def test_the_result_and_tensorboard_name_method_and_data(tmp_path: Path) -> None:
    done = metarun(*SINUSOID, f"outputs={tmp_path}")
    assert "maml on sinusoid" in done.out
    shown = events(run_folder(tmp_path))
    (content,) = [tag for tag in shown.Tags()["scalars"] if tag == "hparams/test"] or [None]
    assert content
    data = shown.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"metarun.algos" not in data
    assert b"maml" in data
