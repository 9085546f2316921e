"""What a run leaves behind and shows: its folder, its curves, its table, its progress."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from shell import SINUSOID, Outcome, environment, events, lines, make_images, metarun, result, run_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarun import config as schema
from metarun.core import Episodes
from metarun.runs import provenance
from metarun.runs.logger import LogFile, RunLogger, TerminalHandler, logging_to

WORDS = ["data=folder", "data.image_size=16", "algo=maml", "backbone.channels=4", "task.ways=3", "task.queries=3",
         "algo.test_inner_steps=2", "train.steps=6", "train.tasks_per_step=2", "train.log_every=2", "train.validate_every=3",
         "train.validate_episodes=4", "test.episodes=8", "test.baseline_episodes=4", "schedule=cosine"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def done(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A finished run: what it printed, and its folder."""
    outputs = tmp_path_factory.mktemp("outputs")
    outcome = metarun(*WORDS, f"data.root={images}", f"outputs={outputs}")
    assert outcome.status == 0, outcome.err
    return outcome, run_folder(outputs)


@pytest.fixture(scope="module")
def shown(done: tuple[Outcome, Path]) -> EventAccumulator:
    return events(done[1])


def test_folder_has_all_and_nothing_unfinished(done: tuple[Outcome, Path]) -> None:
    names = {re.sub(r"^events\.out\.tfevents.*", "events", path.name) for path in done[1].iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "data.json",
        "result.json",
        "metrics.jsonl",
        "metarun.log",
        "events",
        "best.pt",
        "test_scores.npz",
        "test_task.png",
        "last.pt",
    }


def test_config_is_resolved_and_makes_the_same_run(done: tuple[Outcome, Path]) -> None:
    text = (done[1] / "config.yaml").read_text()
    assert "${" not in text
    config = OmegaConf.merge(OmegaConf.structured(schema.Config), OmegaConf.load(done[1] / "config.yaml"))
    schema.check(config)
    assert config.train.schedule.T_max == config.train.steps == 6
    assert config.name == "folder-maml"
    assert (config.algo.inner_lr, config.algo.test_inner_steps) == (0.5, 2)


def test_result(done: tuple[Outcome, Path], images: Path) -> None:
    found = result(done[1])
    assert 0 <= found["test/acc"] <= 1
    assert 0 < found["test/acc_ci95"] < 1
    assert (found["test/episodes"], found["untrained/episodes"]) == (8, 4)
    assert found["chance/acc"] == pytest.approx(1 / 3)
    assert found["interval"].startswith("95%")
    steps = found["test/after_inner_steps"]
    assert list(steps) == ["0", "1", "2"]
    assert steps["2"] == {"acc": found["test/acc"], "acc_ci95": found["test/acc_ci95"]}
    assert found["protocol"] == {
        "norm": "batch",
        "transductive": True,
        "assumes_balanced_queries": False,
        "train": {"ways": 3, "shots": 1, "queries": 3},
        "test": {"ways": 3, "shots": 1, "queries": 3},
        "test_inner_steps": 2,
        "split": None,
        "selected_by": "best validation score",
        "seen": {
            "train": "episodes of the training classes; for validation episodes of the validation classes",
        },
    }
    best = torch.load(done[1] / "best.pt", weights_only=True)
    assert found["train/selected_step"] == best["step"]
    assert found["train/selected_step"] in (3, 6)
    assert found["val/score"] == best["score"]
    assert found["train/steps"] == 6
    assert 0 < found["train/seconds"] < found["seconds"]
    assert found["train/tasks_per_second"] == pytest.approx(12 / found["train/seconds"])
    assert re.fullmatch("[0-9a-f]{64}", found["data"]["fingerprint"])
    assert found["data"]["classes"] == {"train": 4, "val": 4, "test": 4}
    assert found["data"]["images"] == {"train": 24, "val": 24, "test": 24}
    assert set(found["versions"]) >= {"python", "metarun", "torch", "numpy", "hydra-core"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["parameters"] == sum(
        tensor.numel() for name, tensor in best["model"].items() if not name.endswith(("running_mean", "running_var"))
    )
    assert found["command"].split()[:2] == ["metarun", "data=folder"]
    assert found["hardware"]["device"] in ("cpu", "cuda")


def test_commit_is_that_of_the_checkout() -> None:
    """In a checkout the result names its commit; elsewhere it says that there is none."""
    root = Path(provenance.__file__).parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    tracked = subprocess.run(["git", "-C", root, "ls-files", "metarun"], capture_output=True, text=True, check=False)
    commit = provenance.git_commit()
    assert (commit or "").rstrip("+") == (head.stdout.strip() if tracked.stdout else "")


@pytest.mark.parametrize(
    ("changed", "mark"),
    [
        ("metarun/algos/a.py", "+"),
        ("metarun/algos/new.py", "+"),
        ("conf/a.yaml", "+"),
        ("conf/new.yaml", "+"),
        ("scripts/results/data/a.json", ""),
        ("scripts/results/data/new.json", ""),
    ],
)
def test_a_commit_with_changes_is_one_whose_code_or_configuration_changed(
    changed: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results that a table keeps in the checkout are no such change: the next row is of the same code."""
    file = "metarun/runs/provenance.py"
    for name in (file, "metarun/algos/a.py", "conf/a.yaml", "scripts/results/data/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")

    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q", ".")
    git("add", "-A")
    git("commit", "-qm", "c")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / file))
    monkeypatch.setattr(provenance, "CONF", tmp_path / "conf")
    assert provenance.git_commit() == git("rev-parse", "HEAD").strip()
    (tmp_path / changed).write_text("2")
    assert provenance.git_commit() == git("rev-parse", "HEAD").strip() + mark


def test_metrics_lines(done: tuple[Outcome, Path]) -> None:
    found = lines(done[1])
    assert [line["step"] for line in found] == [2, 3, 4, 6, 6]
    trained, validated = [line for line in found if "train/loss" in line], [line for line in found if "val/acc" in line]
    for line in trained:
        assert set(line) == {"step", "train/loss", "train/acc", "train/learning_rate", "train/tasks_per_second"}
    assert all(set(line) == {"step", "val/loss", "val/acc", "val/acc_ci95"} for line in validated)
    assert all(0 < line["val/loss"] < 10 for line in validated)
    assert (len(trained), len(validated)) == (3, 2)
    # The cosine from 0.003, at its start, its middle and its end.
    rates = [line["train/learning_rate"] for line in trained]
    assert rates == pytest.approx([0.0015 * (1 + math.cos(math.pi * step / 6)) for step in (2, 4, 6)])


def test_tensorboard_has_every_curve(done: tuple[Outcome, Path], shown: EventAccumulator) -> None:
    for line in lines(done[1]):
        for name, value in line.items():
            if name != "step":
                points = {event.step: event.value for event in shown.Scalars(name)}
                assert points[int(line["step"])] == pytest.approx(value, rel=1e-6)
    for name in ("train/loss", "train/acc", "train/learning_rate", "train/tasks_per_second"):
        assert [event.step for event in shown.Scalars(name)] == [2, 4, 6]
    for name in ("val/loss", "val/acc"):
        assert [event.step for event in shown.Scalars(name)] == [3, 6]


def test_tensorboard_has_accuracy_against_inner_steps(done: tuple[Outcome, Path], shown: EventAccumulator) -> None:
    points = {str(event.step): event.value for event in shown.Scalars("test/acc_after_inner_steps")}
    steps = result(done[1])["test/after_inner_steps"]
    assert points == pytest.approx({step: numbers["acc"] for step, numbers in steps.items()}, rel=1e-6)


def test_tensorboard_has_hparams(done: tuple[Outcome, Path], shown: EventAccumulator) -> None:
    assert {data.plugin_data.plugin_name for data in shown.summary_metadata.values()} >= {"hparams"}
    (point,) = shown.Scalars("hparams/test")
    assert point.value == pytest.approx(result(done[1])["test/acc"], rel=1e-6)


def test_tensorboard_has_a_picture_of_a_task(shown: EventAccumulator) -> None:
    """Three rows of one support and three query images of 16 pixels, four pixels apart, each row in one colour."""
    (event,) = shown.Images("task")
    with Image.open(io.BytesIO(event.encoded_image_string)) as file:
        picture = np.asarray(file)
    assert picture.shape == (48, 16 + 4 + 48, 3)
    rows = picture.reshape(3, 16, 68, 3)
    assert (rows[:, :, 16:20] >= 250).all()  # the gap
    means = np.stack([rows[:, :, left : left + 16].mean((1, 2)) for left in (0, 20, 36, 52)])  # [images, rows, 3]
    within = np.abs(means - means[:1]).max()
    between = min(np.abs(means[0, a] - means[0, b]).max() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert within < 15 < between


def test_a_run_that_is_killed_before_it_saves_has_one_picture(tmp_path: Path) -> None:
    images = torch.rand(1, 2, 1, 3, 3)
    labels = torch.arange(2)[None]
    for _ in ("killed", "given again"):
        logger = RunLogger(tmp_path)
        logger.tasks(Episodes(images, labels, images, labels, ways=2))
        logger.rewind(0)
        logger.close()
    assert len(events(tmp_path).Images("task")) == 1


def test_picture_is_class_major_with_support_before_query(tmp_path: Path) -> None:
    """Way n, image k of a made-up task has the grey value 10 n + k; queries begin at 5."""
    values = torch.tensor([[10.0 * way + image for image in range(7)] for way in range(2)])
    squares = values[..., None, None, None].expand(2, 7, 1, 3, 3)
    support, query = squares[:, :5].flatten(0, 1)[None], squares[:, 5:].flatten(0, 1)[None]
    support_y, query_y = (torch.arange(2).repeat_interleave(each)[None] for each in (5, 2))
    logger = RunLogger(tmp_path)
    logger.tasks(Episodes(support, support_y, query, query_y, ways=2))
    logger.close()
    (event,) = events(tmp_path).Images("task")
    with Image.open(io.BytesIO(event.encoded_image_string)) as file:
        picture = np.asarray(file.convert("L"))
    expected = [[255 * (10 * way + image) / 16 for image in range(5)] for way in range(2)]
    np.testing.assert_allclose(picture[::3, :15:3], expected, atol=1)
    np.testing.assert_allclose(
        picture[::3, 19::3], [[255 * (10 * way + 5 + k) / 16 for k in (0, 1)] for way in (0, 1)], atol=1
    )


def test_regression_run_records_errors_and_the_picture_of_a_function(tmp_path: Path) -> None:
    outcome = metarun(*SINUSOID, "train.log_every=3", f"outputs={tmp_path}")
    folder = run_folder(tmp_path)
    found, shown = result(folder), events(folder)
    assert shown.Tags()["images"] == ["test/task"]
    assert {"train/loss", "val/loss", "val/mse", "val/mse_median", "test/mse_median_after_inner_steps"} <= set(
        shown.Tags()["scalars"]
    )
    assert found["test/mse"] > 0
    assert found["test/mse"] == found["test/after_inner_steps"]["10"]["mse"]
    assert found["val/score"] == -[line["val/mse_median"] for line in lines(folder) if "val/mse" in line][-1]
    assert "chance/acc" not in found
    assert "│ test, 10 steps " in outcome.out
    assert f"{found['test/mse']:.3f}" in outcome.out


def test_table_and_folder_are_shown_at_the_end(done: tuple[Outcome, Path]) -> None:
    outcome, folder = done
    found = result(folder)
    table, rest = outcome.out.split("└")
    assert "3-way 1-shot, 3 queries a class; norm batch, transductive" in table
    for name in ("test", "untrained", "chance"):
        (row,) = [line for line in table.splitlines() if f"│ {name} " in line]
        assert f"{found[f'{name}/acc']:.2%}" in row
    assert f"± {found['test/acc_ci95']:.2%}" in table
    assert f"results  {folder}\n" in rest
    assert f"tensorboard --logdir {folder}\n" in rest
    assert f"the weights of step {found['train/selected_step']}" in rest


def test_plain_lines_without_a_terminal(done: tuple[Outcome, Path]) -> None:
    outcome, folder = done
    assert "\x1b" not in outcome.err + outcome.out
    assert "\r" not in outcome.err
    assert f"run folder: {folder}\n" in outcome.err
    assert re.search(r"^hardware: cpu, .*\b1 process of (1 thread|\d+ threads), tasks ", outcome.err, re.M)
    assert re.search(r"^step 2/6  loss [\d.]+  acc [\d.]+  lr [\d.]+  tasks/s [\d.]+(  .* left)?$", outcome.err, re.M)
    assert re.search(r"^step 6/6  val/loss [\d.]+  val/acc [\d.]+  val/acc_ci95 [\d.]+$", outcome.err, re.M)


def test_log_file_has_the_lines_with_their_times(done: tuple[Outcome, Path]) -> None:
    text = (done[1] / "metarun.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} step 6/6  val/loss ", text, re.M)


def test_progress_bar_with_the_time_left_on_a_terminal(tmp_path: Path) -> None:
    """On a pseudo-terminal of 80 columns."""
    ours, theirs = pty.openpty()
    words = [
        *SINUSOID[:3],
        "test.baseline_episodes=4",
        "train.steps=60",
        "train.validate_every=30",
        "test.episodes=300",
        f"outputs={tmp_path}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "metarun", *words],
        env=environment(TERM="xterm", COLUMNS="80"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    screen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        screen += part
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.decode())
    assert re.search(r"training .*\d+/60 \d:\d\d:\d\d left", text)
    assert re.search(r"testing .*\d+/300 (\d:\d\d:\d\d|-:--:--) left", text)
    assert "step 30/60  val/loss " in text  # lines stay above the bar
    assert re.search(r"│ untrained, 10 steps +│ .*│ +4 │\r?\n", text)  # one line, though the terminal is narrow
    assert "tensorboard --logdir" in text


def test_rewind_forgets_what_will_be_recorded_again(tmp_path: Path) -> None:
    """Also the half line that a killed process left, and the points that TensorBoard has already."""
    killed = RunLogger(tmp_path)
    killed.rewind(0)
    for step in (1, 2, 3, 4):
        killed.scalars(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')
    shown = [event.step for event in events(tmp_path).Scalars("train/loss")]
    assert shown == [1, 2, 3, 4]  # flushed: a kill loses none
    logger = RunLogger(tmp_path)
    logger.rewind(2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    logger.scalars(3, {"train/loss": 30.0})
    logger.close()
    killed.close()
    assert [line["train/loss"] for line in lines(tmp_path)] == [1, 2, 30]
    points = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_records_without_a_folder_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(None)
    logger.rewind(3)
    logger.scalars(4, {"train/loss": 1.0})
    logger.curve("test/acc", 1.0, 0)
    logger.hparams({"seed": 0}, 1.0)
    with logger.progress("training", 10) as advance:
        advance(3)
    logger.close()
    assert not list(tmp_path.iterdir())


class Full(io.StringIO):
    """A stream on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_that_cannot_be_written_ends_the_run_and_prints_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("metarun")
    with logging_to(tmp_path / "metarun.log"):
        (handler,) = (handler for handler in logger.handlers if isinstance(handler, LogFile))
        handler.stream.close()
        handler.stream = Full()  # type: ignore[assignment]
        with pytest.raises(OSError, match=r"No space left on device: .*metarun\.log"):
            logger.warning("a line")
    assert "Traceback" not in capsys.readouterr().err


def test_a_message_is_one_line_whatever_names_of_others_are_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("metarun"), "handlers", [TerminalHandler()])
    with logging_to(tmp_path / "metarun.log"):
        logging.getLogger("metarun").warning("left out %s", "other\x1b]0;owned\x07\nstep 5")
    shown = r"left out other\x1b]0;owned\x07\nstep 5"
    assert capsys.readouterr().err == f"{shown}\n"
    assert (tmp_path / "metarun.log").read_text().endswith(f" {shown}\n")
