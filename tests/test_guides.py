"""The guides to a method and a wrapper of one's own: what they show runs, from a folder that holds nothing else."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shell import Outcome, metarun_in

from metarun.engine import checkpoint

ROOT = Path(__file__).parents[1]
GUIDES = ["metarun/algos/README.md", "metarun/wrappers/README.md"]
TINY = ["train.steps=2", "train.tasks_per_step=4", "train.validate_every=2", "train.validate_episodes=2", "task.queries=2",
        "test.episodes=2", "test.baseline_episodes=0", "backbone.channels=4"]  # fmt: skip


def metarun(*words: str, inside: Path) -> Outcome:
    return metarun_in(inside, *words)


def run_of(outputs: Path) -> Path:
    (found,) = outputs.glob("*/*/result.json")
    return found.parent


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_shows_runs(guide: str, tmp_path: Path) -> None:
    text = (ROOT / guide).read_text()
    files = re.findall(r"`([\w./]+)`[^`]*:\n\n```(?:python|yaml)\n(.*?)^```", text, re.M | re.S)
    assert [path.rpartition(".")[2] for path, _ in files] == ["py", "yaml"]
    for path, content in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    (command,) = re.findall(r"^metarun (--config-dir .*)$", shell, re.M)
    words = [*shlex.split(command), *TINY]
    about, _, shown = files[1][1].partition("; metarun ")
    assert shown.splitlines()[0].split()[:2] == words[:2]
    assert about
    losses = {}
    for processes in (1, 2):
        done = metarun(
            *words, f"hardware.processes={processes}", "train.log_every=1", f"outputs={processes}", inside=tmp_path
        )
        assert done.status == 0, done.err
        lines = (run_of(tmp_path / str(processes)) / "metrics.jsonl").read_text().splitlines()
        losses[processes] = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    assert len(losses[1]) == 2
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    kind, setting = ("wrapper", "bound") if "wrappers" in guide else ("algo", "noise")
    refused = metarun(*words, f"{kind}.{setting}=-1", "outputs=none", inside=tmp_path)
    assert refused.status == 2
    assert re.match(rf"metarun: {kind}\.{setting}=-1", refused.err), refused.err
    assert not (tmp_path / "none").exists()
    if kind == "wrapper":  # its own weights are kept apart from the method's
        run = run_of(tmp_path / "1")
        assert list(checkpoint.load(run / "last.pt")["wrapper"]) == ["bound"]
        assert "bound" not in checkpoint.load(run / "best.pt")["model"]
        again = metarun(*words[:2], "recipe=test", f"checkpoint={run}", "outputs=again", inside=tmp_path)
        assert again.status == 0, again.err


def written(guide: str, folder: Path) -> tuple[list[str], list[list[str]]]:
    """Writes the files of a guide's example into `folder`; their names, and the commands that follow the example."""
    text = (ROOT / guide).read_text()
    files = re.findall(r"`([\w./]+)`[^`]*:\n\n```(?:python|yaml)\n(.*?)^```", text, re.M | re.S)
    for path, content in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", text[text.index("\n## Add a") :], re.M | re.S))
    return [path for path, _ in files], [shlex.split(line) for line in re.findall(r"^metarun (.*)$", shell, re.M)]


def finished(outputs: Path) -> list[Path]:
    return sorted(path.parent for path in outputs.glob("*/*/result.json"))


def test_a_backbone_of_ones_own(tmp_path: Path) -> None:
    paths, commands = written("metarun/backbones/README.md", tmp_path)
    assert paths == ["dilated.py", "my_conf/backbone/dilated.yaml"]
    assert len(commands) == 2
    for number, words in enumerate(commands):
        done = metarun(*words, *TINY, f"outputs={number}", inside=tmp_path)
        assert done.status == 0, done.err
    assert [len(finished(tmp_path / str(number))) for number in range(2)] == [1, 2]
    refused = metarun(*commands[0], "backbone.channels=0", "outputs=none", inside=tmp_path)
    assert (refused.status, refused.err) == (2, "metarun: backbone.channels=0: must be at least 1\n")
    vectors = metarun(*commands[0][:-1], "algo=maml", "data=sinusoid", "outputs=none", inside=tmp_path)
    assert vectors.status == 2
    assert vectors.err.startswith("metarun: backbone: dilated needs images (C, H, W)")
    assert not (tmp_path / "none").exists()


PHOTOS = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 16), np.uint8)  # of a dark class and of a bright one
PHOTOS[0] //= 2


def photos(folder: Path) -> None:
    """A folder of images for the commands of guides, `my_images`."""
    for name, images in zip(("dark", "bright"), PHOTOS, strict=True):
        (folder / "my_images" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / "my_images" / name / f"{number}.png")


def test_a_way_with_the_target_of_ones_own(tmp_path: Path) -> None:
    paths, (learn, predict) = written("metarun/target/README.md", tmp_path)
    assert paths == ["neighbours.py", "my_conf/transfer/neighbours.yaml"]
    photos(tmp_path)
    done = metarun(*learn, *TINY, "target.repeats=2", inside=tmp_path)
    assert done.status == 0, done.err
    (run,) = finished(tmp_path / "outputs")
    words = [word.replace("outputs/RUN", str(run)) for word in predict]
    known = metarun(*words, "outputs=predicted", inside=tmp_path)
    assert known.status == 0, known.err
    with open(next((tmp_path / "predicted").rglob("predictions.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert 1 < len({row["probability of dark"] for row in rows}) <= 6  # from none to all of the five that vote
    refused = metarun(*learn, *TINY, "transfer.count=0", "outputs=none", inside=tmp_path)
    assert (refused.status, refused.err) == (2, "metarun: transfer.count=0: must be at least 1\n")
    assert not (tmp_path / "none").exists()


def test_an_encoder_of_ones_own(tmp_path: Path) -> None:
    paths, (test, predict) = written("metarun/encoders/README.md", tmp_path)
    assert paths == ["brightness.py", "my_conf/encoder/brightness.yaml"]
    photos(tmp_path)
    few = ["test.episodes=20", "test.baseline_episodes=0"]
    done = metarun(*test, *few, inside=tmp_path)
    assert done.status == 0, done.err
    (run,) = finished(tmp_path / "outputs")
    told = json.loads((run / "result.json").read_text())
    assert told["data"]["encoder"]["parts"] == told["data"]["input_shape"][0] == 16
    assert told["protocol"]["encoder"]["saw_these_classes"] == "no"
    words = [word.replace("outputs/RUN", str(run)) for word in predict]
    known = metarun(*words, "outputs=predicted", inside=tmp_path)
    assert known.status == 0, known.err
    with open(next((tmp_path / "predicted").rglob("predictions.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    refused = metarun(*test, "encoder.parts=0", "outputs=none", inside=tmp_path)
    assert (refused.status, refused.err) == (2, "metarun: encoder.parts=0: must be at least 1\n")
    assert not (tmp_path / "none").exists()


def test_a_launcher_of_ones_own(tmp_path: Path) -> None:
    paths, (words,) = written("metarun/sweeps/README.md", tmp_path)
    assert paths == ["polite.py", "my_conf/hydra/launcher/polite.yaml"]
    done = metarun(*words, *TINY, inside=tmp_path)
    assert done.status == 0, done.err
    runs = finished(tmp_path / "outputs")
    assert len(runs) == 2
    assert (runs[0].parent / "report" / "index.html").is_file()
    assert len(list(runs[0].parent.glob(".jobs/*.log"))) == 2
    again = metarun(*words, *TINY, inside=tmp_path)
    assert "2 jobs: 2 finished before, 0 to run" in again.err
    failing = metarun(*words, *TINY, "algo=protonet", "data=sinusoid", "outputs=failed", inside=tmp_path)
    assert failing.status == 1
    assert "ended with exit status 2\n    its output: " in failing.err
    for word, reason in {
        "hydra.launcher.niceness=40": "must be from 0 to 19",
        "hydra.launcher.nicenes=4": "did you mean hydra.launcher.niceness?",
        "hydra.launcher._target_=collections.Counter": "is no launcher",
    }.items():
        refused = metarun(*words, word, "outputs=none", inside=tmp_path)
        assert refused.status == 2, refused.err
        assert refused.err.count("\n") == 1
        assert reason in refused.err
    assert not (tmp_path / "none").exists()
