"""The picture of a test task with its predictions."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from shell import metarun

from metarun.core import Episodes
from metarun.report.finished import PNG, FinishedRun
from metarun.report.page import PICTURES, _pictures
from metarun.report.task import AFTER, BEFORE, CELL, RIGHT, ROWS, WRONG, task_picture
from metarun.runs.result import TARGET_ACCURACY


def colours(png: bytes | None) -> set[tuple[int, ...]]:
    assert png is not None
    return {tuple(pixel) for pixel in np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).tolist()}


def test_queries_that_are_told_rightly_and_wrongly_have_frames_of_two_colours() -> None:
    labels = torch.tensor([[0, 1]])
    task = Episodes(torch.rand(1, 2, 1, 8, 8), labels, torch.rand(1, 2, 1, 8, 8), labels, ways=2, shots=1, queries=1)
    right = torch.eye(2)[None]
    assert RIGHT in (found := colours(task_picture(task, right, right)))
    assert WRONG not in found
    assert RIGHT not in (found := colours(task_picture(task, right, right.flip(1))))
    assert WRONG in found


def test_an_answer_that_is_no_number_is_not_right() -> None:
    """The greatest of logits that are no numbers is said to be the first, which is the class of the only query here."""
    x, labels = torch.rand(1, 2, 1, 8, 8), torch.tensor([[0, 1]])
    task = Episodes(x, labels, x[:, :1], labels[:, :1], ways=2, shots=1, queries=(1, 0))
    lost = torch.full((1, 1, 2), torch.nan)
    found = colours(task_picture(task, lost, lost))
    assert (RIGHT in found, WRONG in found) == (False, True)


def test_of_many_classes_the_first_are_shown() -> None:
    ways = ROWS + 5
    x, labels = torch.rand(1, ways, 1, 8, 8), torch.arange(ways)[None]
    task = Episodes(x, labels, x, labels, ways=ways, shots=1, queries=1)
    logits = torch.eye(ways)[None]
    logits[0, 0], logits[0, 1] = logits[0, -1].clone(), torch.nan  # a class that is not shown, and none
    png = task_picture(task, logits, logits)
    assert png is not None
    assert Image.open(io.BytesIO(png)).height < (ROWS + 2) * CELL
    assert {RIGHT, WRONG} <= colours(png)
    few = Episodes(x, labels, x[:, -1:], labels[:, -1:], ways=ways, shots=1, divided=True)
    assert task_picture(few, logits[:, -1:], logits[:, -1:]) is not None


def test_a_function_is_shown_before_and_after_adaptation() -> None:
    x = torch.linspace(-1, 1, 9).reshape(1, 9, 1)
    task = Episodes(x[:, :3], x[:, :3], x, x.square(), ways=1, shots=3, queries=9)
    assert {BEFORE, AFTER} <= colours(task_picture(task, -x, x))
    assert AFTER in colours(task_picture(task, torch.full_like(x, torch.nan), x))  # a method that diverged
    assert AFTER in colours(task_picture(task, 3e38 * x, x))  # whose range is no number in single precision
    # A method that leaves its graph.
    assert AFTER in colours(task_picture(task, x, (x * torch.ones((), requires_grad=True))))
    wide = Episodes(*(each.repeat(1, 1, 2) for each in (x, x, x, x)), ways=1, shots=9, queries=9)
    assert task_picture(wide, wide.query_y, wide.query_y) is None


def test_a_run_leaves_the_picture_for_tensorboard_and_a_report_shows_it(tmp_path: Path) -> None:
    words = [
        "algo=maml",
        "data=sinusoid",
        "backbone=mlp",
        "train.steps=2",
        "train.validate_episodes=2",
        "test.episodes=2",
    ]
    assert metarun(*words, f"outputs={tmp_path}").status == 0
    [events] = tmp_path.rglob("events.*.results")
    assert b"test/task" in events.read_bytes()
    [picture] = tmp_path.rglob("test_task.png")
    assert {BEFORE, AFTER} <= colours(picture.read_bytes())
    report = ["recipe=report", f"runs={tmp_path}", f"outputs={tmp_path}/report"]
    assert metarun(*report).status == 0
    [page] = tmp_path.rglob("index.html")
    assert base64.b64encode(picture.read_bytes()).decode() in page.read_text()
    picture.write_bytes(b"<script>")  # what is no picture is not put on a page
    assert metarun(*report).status == 0
    assert "<img" not in page.read_text()


def test_where_a_target_is_tested_no_task_is_shown(tmp_path: Path) -> None:
    """Beside a meta-test: its tasks are of the source, and the row of the target."""
    (tmp_path / "test_task.png").write_bytes(PNG)
    told: dict[str, Any] = {"test/acc": 0.5}
    tests = [FinishedRun(tmp_path, found, {}, {}, frozenset(), 0.0) for found in (told, {**told, TARGET_ACCURACY: 0.5})]
    assert [run.task_picture() for run in tests] == [PNG, None]


def test_a_report_reads_no_more_pictures_than_it_shows() -> None:
    read: list[bytes] = []
    run = SimpleNamespace(task_picture=lambda: read.append(PNG) or PNG)
    row = SimpleNamespace(group=SimpleNamespace(runs=[run]), label="maml")
    sections: list[Any] = [SimpleNamespace(title="glyphs", rows=[row] * 3)] * 10
    assert len(_pictures(sections)) == len(read) == PICTURES


def test_of_several_data_sets_each_has_a_picture(tmp_path: Path) -> None:
    words = ["test.data=[a:glyphs,b:glyphs]", "backbone=mlp", "data.image_size=8", "train.steps=1", "train.validate_episodes=2",
             "test.episodes=2"]  # fmt: skip
    assert metarun(*words, f"outputs={tmp_path}").status == 0
    assert {path.name for path in tmp_path.rglob("*.png")} == {"test_task-a.png", "test_task-b.png"}
    report = metarun("recipe=report", f"runs={tmp_path}", f"outputs={tmp_path}/report")
    assert report.status == 0
    [page] = tmp_path.rglob("index.html")
    assert page.read_text().count("data:image/png") == 2
