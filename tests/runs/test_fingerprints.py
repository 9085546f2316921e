"""Data that changed between two sittings: noticed whether the run is shown, goes on, or is tested."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shell import make_images, metarun, one_line, result, run_folder

from metarun import stages
from metarun.data.digits import Digits
from metarun.data.download import download, without_downloads
from metarun.data.folder import Folder
from metarun.data.text import Text
from metarun.errors import UserError
from metarun.runs import contents, fingerprints
from metarun.runs.fingerprints import NOT_NOTED, differences, refuse_other_data

SMALL = ["data=folder", "data.image_size=16", "algo=protonet", "backbone.channels=4", "task.ways=2", "task.shots=1", "task.queries=2",
         "train.steps=4", "train.validate_every=2", "train.validate_episodes=4", "test.episodes=6", "test.baseline_episodes=0"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def command(images: Path, outputs: Path, *words: str) -> list[str]:
    return [*SMALL, f"data.root={images}", f"outputs={outputs}", *words]


def replaced(root: Path) -> None:
    """Other pixels under the same names."""
    generator = np.random.default_rng(1)
    for path in sorted(root.rglob("*.png")):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def removed(root: Path) -> None:
    """One image of a training class less."""
    next(iter(sorted((root / "train").rglob("*.png")))).unlink()


def renamed_class(root: Path) -> None:
    """A test class becomes one of training."""
    folder = sorted((root / "test").iterdir())[0]
    folder.rename(root / "train" / folder.name)


def other_name(root: Path) -> None:
    """A training class has another name, at the same place in the order of the alphabet."""
    folder = sorted((root / "train").iterdir())[0]
    folder.rename(folder.with_name(f"{folder.name}_"))


CHANGES = [
    (replaced, "but other ones"),
    (removed, r"images.train \d+ -> \d+"),
    (renamed_class, r"classes.test \d+ -> \d+"),
    (other_name, "the same items, but other names of classes"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_a_finished_run_is_not_shown_for_other_data(images: Path, tmp_path: Path, change: Any, says: str) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0
    before = result(run_folder(tmp_path / "runs"))
    assert "nothing was computed" in metarun(*words).out
    change(images)
    outcome = metarun(*words)
    assert outcome.status == 2
    assert len(outcome.said) == 1, outcome.err
    folder = run_folder(tmp_path / "runs")
    assert re.search(says, outcome.said[0]), outcome.said[0]
    assert outcome.said[0].startswith(f"metarun: {folder} was made with other data (data: ")
    assert outcome.said[0].endswith("start over beside it with resume=false")
    assert result(folder) == before
    again = metarun(*words, "resume=false")
    assert again.status == 0
    beside = folder.with_name(f"{folder.name}__2")
    told = ("fingerprint", "class_names")
    assert [result(beside)["data"][name] for name in told] != [before["data"][name] for name in told]
    assert "nothing was computed" in metarun(*words).out  # the newest of them, of the data that are there


def test_touched_files_are_the_same_data(images: Path, tmp_path: Path) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0
    for path in images.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    outcome = metarun(*words)
    assert "nothing was computed" in outcome.out
    assert "not checked" not in outcome.out


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_an_interrupted_run_does_not_go_on_with_other_data(
    images: Path, tmp_path: Path, change: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(images, tmp_path / "runs")
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise UserError("interrupted here")

        patch.setattr(stages.MetaTest, "execute", fail)
        assert metarun(*words).said == ["metarun: interrupted here"]
    folder = run_folder(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(images)
    outcome = metarun(*words)
    assert outcome.status == 2
    (line,) = outcome.said
    assert "was made with other data (data: " in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    images_back = make_images(tmp_path / "fresh")
    shutil.rmtree(images)
    images_back.rename(images)
    assert metarun(*words).status == 0  # the same pixels again: the run goes on


def test_a_result_without_its_data_is_shown_with_a_note(images: Path, tmp_path: Path) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0
    images.rename(tmp_path / "elsewhere")
    outcome = metarun(*words)
    assert outcome.status == 0
    assert f"The data were not checked: data.root: there is no folder {images}" in outcome.out
    assert "nothing was computed" in outcome.out


def test_showing_a_result_downloads_nothing(tmp_path: Path) -> None:
    with without_downloads(), pytest.raises(UserError, match=r"^data root .*/none: there is no file\.zip$"):
        download("https://nowhere.invalid/file.zip", tmp_path / "none" / "file.zip", checksum="0" * 32)
    assert not (tmp_path / "none").exists()


def test_showing_a_result_decodes_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was opened, or the pixels were gone through")

    monkeypatch.setattr(Image, "open", never)
    monkeypatch.setattr(np, "bincount", never)
    monkeypatch.setattr(torch.Tensor, "to", never)
    assert "nothing was computed" in metarun(*words).out


def test_a_run_that_did_not_keep_its_data_is_compared_by_its_result(images: Path, tmp_path: Path) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0
    (run_folder(tmp_path / "runs") / contents.DATA).unlink()
    assert "nothing was computed" in metarun(*words).out
    replaced(images)
    assert "was made with other data" in metarun(*words).said[0]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"data": 3}'])
def test_a_damaged_description_is_one_line(images: Path, tmp_path: Path, content: str) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0
    (run_folder(tmp_path / "runs") / contents.DATA).write_text(content)
    outcome = metarun(*words)
    one_line(outcome, "data.json: is damaged (", "; start over beside it with resume=false")


def test_a_description_that_may_not_be_read_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(images, tmp_path / "runs")
    assert metarun(*words).status == 0
    read = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == contents.DATA:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    one_line(metarun(*words), "data.json: cannot be read (Permission denied)")


def test_a_test_is_of_the_data_that_it_was_trained_on_or_says_so(images: Path, tmp_path: Path) -> None:
    assert metarun(*command(images, tmp_path / "runs")).status == 0
    folder = run_folder(tmp_path / "runs")
    other = make_images(tmp_path / "other")
    replaced(other)
    tests = ["recipe=test", f"checkpoint={folder}", f"outputs={tmp_path / 'tests'}", "test.episodes=4"]
    assert metarun(*tests).status == 0
    assert "checkpoint/data" not in result(run_folder(tmp_path / "tests"))
    elsewhere = ["recipe=test", f"checkpoint={folder}", f"outputs={tmp_path / 'elsewhere'}",
                 "data=folder", f"data.root={other}", "data.image_size=16"]  # fmt: skip
    assert metarun(*elsewhere).status == 0
    found = result(run_folder(tmp_path / "elsewhere"))
    own = result(folder)["data"]
    assert found["checkpoint/data"]["data"]["fingerprint"] == own["fingerprint"] != found["data"]["fingerprint"]
    replaced(images)
    outcome = metarun(*tests, "test.episodes=5")
    assert outcome.status == 2
    assert "its data has changed since it was trained" in outcome.said[0]
    assert "data.root=" in outcome.said[0]
    assert metarun(*tests).said[0].count("was made with other data") == 1  # the stored test, too


def test_a_changed_target_is_noticed(tmp_path: Path) -> None:
    source, target = make_images(tmp_path / "source"), tmp_path / "target"
    for part in ("train", "test"):
        for name in ("a", "b"):
            for number in range(4):
                path = target / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (20 * number, 100 * (name == "b"), 0)).save(path)
    words = [*command(source, tmp_path / "runs"), "recipe=transfer", "target=folder", f"target.data.root={target}",
             "target.data.image_size=16", "transfer=nearest_centroid", "target.repeats=2"]  # fmt: skip
    first = metarun(*words)
    assert first.status == 0, first.err
    assert "nothing was computed" in metarun(*words).out
    (target / "train" / "a" / "0.png").unlink()
    outcome = metarun(*words)
    assert outcome.status == 2
    assert "was made with other data (target: images.train " in outcome.said[0]
    shown = json.loads((run_folder_of(tmp_path / "runs") / contents.DATA).read_text())
    assert set(shown) == {"data", "target"}


def moved_boundary(images: Path) -> None:
    """The same images in the same order, of which fewer are for training."""
    for folder in sorted((images / "train").iterdir()):
        for path in sorted(folder.iterdir())[2:]:
            path.rename(images / "test" / folder.name / path.name)


def divided(images: Path) -> Path:
    """Two classes of six images, four of them for training."""
    for number in range(6):
        for name in ("a", "b"):
            path = images / ("train" if number < 4 else "test") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * number, 100 * (name == "b"), 0)).save(path)
    return images


def test_a_moved_boundary_between_training_and_test_images_is_noticed(tmp_path: Path) -> None:
    images = divided(tmp_path / "images")
    words = ["recipe=target_only", "target=folder", f"target.data.root={images}", "target.data.image_size=16",
             "transfer=nearest_centroid", "backbone.channels=4", "target.repeats=1", f"outputs={tmp_path / 'runs'}"]  # fmt: skip
    assert metarun(*words).status == 0
    moved_boundary(images)
    (line,) = metarun(*words).said
    assert "target: parts.train 8 -> 4, parts.test 4 -> 8); bring these back" in line


def test_a_moved_boundary_within_texts_or_within_several_sets_is_noticed(tmp_path: Path) -> None:
    def texts(count: int) -> dict[str, Any]:
        rows = [f"{label} text {i},{label},{'train' if i < count else 'test'}" for label in "ab" for i in range(10)]
        (tmp_path / "a.csv").write_text("\n".join(["text,label,split", *rows]))
        return Text(root=str(tmp_path / "a.csv")).describe()

    assert differences({"data": texts(6)}, {"data": texts(3)}) == {"data": "parts.train 12 -> 6, parts.test 8 -> 14"}

    def sets(counts: tuple[int, int]) -> dict[str, Any]:
        source = Digits()
        source.table = dataclasses.replace(
            source.table, metadata={"parts": {"train": [counts[0]] * 10, "val": [0] * 10, "test": [counts[1]] * 10}}
        )
        described = source.describe()
        return {"fingerprint": described["fingerprint"], "sets": {"digits": described}}

    changed = "sets.digits.parts.train 900 -> 800, sets.digits.parts.test 800 -> 900"
    assert differences({"data": sets((90, 80))}, {"data": sets((80, 90))}) == {"data": changed}


def test_a_run_of_a_version_that_noted_no_parts_is_one_line(tmp_path: Path) -> None:
    now = {"data": Folder(root=str(divided(tmp_path / "images")), image_size=16).describe()}
    earlier = {key: value for key, value in now["data"].items() if key != "parts"} | {
        "fingerprint": "of the items alone"
    }
    (tmp_path / contents.DATA).write_text(json.dumps({"data": earlier}))
    with pytest.raises(
        UserError, match=f": whether its data are those .* cannot be told, for {NOT_NOTED}; start over "
    ):
        refuse_other_data(tmp_path, now)
    with pytest.raises(UserError, match=f": whether its data has changed .* cannot be told, for {NOT_NOTED}; name "):
        fingerprints.tested_on_others(tmp_path, now, [])
    assert fingerprints.tested_on_others(tmp_path, now, ["data.root=images"])
    (tmp_path / contents.DATA).write_text(json.dumps({"data": earlier | {"classes": {"train": 1}}}))
    with pytest.raises(UserError, match=r"was made with other data \(data: classes.train 1 -> 2\)"):
        refuse_other_data(tmp_path, now)


def run_folder_of(outputs: Path) -> Path:
    return next(path.parent for path in outputs.glob("*/*/result.json"))


# Weights that a run begins with


def other_weights(run: Path) -> None:
    """The same network, with other numbers, in the file of a finished run."""
    state = torch.load(run / "best.pt", weights_only=True)
    state["model"] = {name: value + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
                      for name, value in state["model"].items()}  # fmt: skip
    torch.save(state, run / "best.pt")


@pytest.fixture
def begun(images: Path, tmp_path: Path) -> Path:
    """A run whose backbone others begin with."""
    assert metarun(*command(images, tmp_path / "before", "backbone.norm=group")).status == 0
    return run_folder(tmp_path / "before")


def test_repeats_of_other_weights_are_not_taken_over(images: Path, tmp_path: Path, begun: Path) -> None:
    words = ["recipe=target_only", "target=folder", f"target.data.root={images}", "target.data.image_size=16", "backbone.channels=4",
             "backbone.norm=group", "transfer=nearest_centroid", "target.repeats=2", f"backbone.from={begun}",
             f"outputs={tmp_path / 'runs'}"]  # fmt: skip
    assert metarun(*words).status == 0
    folder = run_folder(tmp_path / "runs")
    before = (begun / "best.pt").read_bytes()
    other_weights(begun)
    expected = f"metarun: {folder} was made with other weights (backbone.from: the file has changed); bring these back, or start over"
    assert metarun(*words).said[-1].startswith(expected)  # not shown
    (folder / "result.json").unlink()
    (folder / "target" / "all-1.json").unlink()
    assert metarun(*words).said[-1].startswith(expected)  # does not go on
    (begun / "best.pt").write_bytes(before)
    assert metarun(*words).status == 0
    begun.rename(begun.with_name("elsewhere"))
    assert "nothing was computed" in metarun(*words).out


def test_a_stored_run_is_tested_without_the_weights_that_it_began_with(
    images: Path, tmp_path: Path, begun: Path
) -> None:
    words = command(
        images, tmp_path / "runs", f"backbone.from={begun}", "backbone.norm=group", "test.baseline_episodes=6"
    )
    assert metarun(*words).status == 0
    made = run_folder(tmp_path / "runs")
    numbers = {key: value for key, value in result(made).items() if key.startswith(("test/", "before_training/"))}
    assert "before_training/acc" in numbers

    def tested(name: str) -> tuple[dict[str, Any], list[str]]:
        outcome = metarun("recipe=test", f"checkpoint={made}", f"outputs={tmp_path / name}")
        assert outcome.status == 0, outcome.err
        return result(run_folder(tmp_path / name)), outcome.said

    found, _ = tested("same")
    assert {key: found[key] for key in numbers} == numbers
    other_weights(begun)
    for name, reason in {"other": "has other weights now", "none": "there is no such run folder"}.items():
        if name == "none":
            shutil.rmtree(begun)
        found, said = tested(name)
        assert found["test/acc"] == numbers["test/acc"]
        assert "before_training/acc" not in found
        (line,) = [line for line in said if "before its training" in line]
        assert reason in line


def test_tasks_that_other_weights_make_up_are_other_data() -> None:
    data = {"fingerprint": "a", "classes": {"train": 1}, "unsupervised": {"classes": "clusters", "sha256": "1"}}
    made_up = {**data, "unsupervised": {"classes": "clusters", "sha256": "2"}}
    assert differences({"data": data}, {"data": made_up}) == {"unsupervised.embedding": "the file has changed"}
    encoded = {"fingerprint": "a", "before_encoding": "items", "classes": {"train": 1}}
    (told,) = differences({"data": encoded}, {"data": {**encoded, "fingerprint": "b"}}).values()
    assert told == "the same items, but vectors of an encoder with other weights or settings"
