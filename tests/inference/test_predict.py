"""Classifying a user's own images by what a run learned: from the shell, and from files that may be bad."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from helpers import compose, toy_images
from PIL import Image
from shell import done, killed_at_files, make_images, metarun, one_line, result

import metarun as metarun_package
from metarun.algos.protonet import ProtoNet
from metarun.config import construct
from metarun.core import TaskShape
from metarun.data.image_batches import Labelled
from metarun.data.table_source import item_digest
from metarun.errors import UserError
from metarun.inference import arrays, kept, store
from metarun.inference.image_files import ImageFiles, find_images
from metarun.inference.learner import Learner
from metarun.inference.preprocessing import Preprocessing
from metarun.inference.texts import find_texts
from metarun.ops.batch_norm import Norm
from metarun.ops.calibration import fit_temperature
from metarun.report.next_steps import next_steps
from metarun.runs import carry_out
from metarun.stages import Predict
from metarun.target import predictions
from metarun.target.base import Own

EPISODIC = [
    "data=folder",
    "data.image_size=16",
    "backbone.channels=4",
    "task.ways=3",
    "task.queries=2",
    "train.steps=2",
    "train.validate_every=2",
    "train.validate_episodes=4",
    "test.episodes=6",
    "test.baseline_episodes=0",
]
TARGET = ["target=folder", "target.data.image_size=16", "target.repeats=2", "backbone.channels=4"]


def kinds(root: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    """Folders of small pictures, each class in a grey of its own, with noise; of each class as many as `sizes` says."""
    draw = np.random.default_rng(seed)
    for number, (name, size) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for image in range(size):
            pixels = draw.integers(0, 120, (16, 16, 3)) + 50 * number
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{image}.png")
    return root


def folder_of(outputs: Path, recipe: str = "predictions") -> Path:
    (found,) = outputs.glob(f"{recipe}/*/result.json")
    return found.parent


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "predictions.csv").read_text())))


@pytest.fixture(scope="module")
def episodic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ProtoNet on folders."""
    root = tmp_path_factory.mktemp("episodic")
    done("algo=protonet", *EPISODIC, f"data.root={make_images(root / 'images')}", f"outputs={root}", "name=made")
    (found,) = root.glob("made/*/result.json")
    return found.parent


def test_weights_of_another_run_of_the_same_network_are_refused(tmp_path: Path, episodic: Path) -> None:
    images, made = episodic.parents[1] / "images", Path(shutil.copytree(episodic, tmp_path / "made" / "run"))
    done("algo=protonet", *EPISODIC, f"data.root={images}", f"outputs={tmp_path}", "name=other", "seed=1")
    (other,) = (path.parent for path in tmp_path.glob("other/*/result.json"))
    own = {name: (made / name).read_bytes() for name in ("best.pt", "last.pt")}
    for name, given in {"best.pt": made, "last.pt": made / "last.pt"}.items():
        shutil.copy(other / name, made / name)
        told = f"{name}: is of another training, with other settings or data; bring the right file back, or "
        for words in (
            ["recipe=test", f"checkpoint={given}"],
            ["recipe=predict", f"checkpoint={given}", f"support={images / 'test'}", f"images={images / 'test'}"],
            ["data=folder", f"data.root={images}", "task.queries=2", "encoder=run", f"encoder.from={given}"],
        ):
            one_line(metarun(*words, f"outputs={tmp_path}"), told)
        with pytest.raises(UserError, match=re.escape(told)):
            metarun_package.load(given)
        (made / name).write_bytes(own[name])
    assert metarun_package.load(made).held.origin == made / "best.pt"
    values = result(made)
    assert values.pop("made_by")  # which an earlier version did not write
    (made / "result.json").write_text(json.dumps(values))
    shutil.copy(other / "best.pt", made)
    metarun_package.load(made)


def test_a_test_of_weights_that_were_replaced_gives_no_learner(tmp_path: Path, episodic: Path) -> None:
    made = Path(shutil.copytree(episodic, tmp_path / "made" / "run"))
    done("recipe=test", f"checkpoint={made}", "test.episodes=2", f"outputs={tmp_path}", "name=tested")
    (tested,) = (path.parent for path in tmp_path.glob("tested/*/result.json"))
    assert metarun_package.load(tested).held.origin == made / "best.pt"
    shutil.copy(made / "last.pt", made / "best.pt")
    with pytest.raises(
        UserError,
        match=r"^checkpoint=.*: tested other weights than .*best\.pt has now; to take these, give .*/made/run$",
    ):
        metarun_package.load(tested)
    assert metarun_package.load(made).held.origin == made / "best.pt"


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a test part of its own, whose classes are hard to tell apart."""
    root = tmp_path_factory.mktemp("divided")
    for seed, (part, n) in enumerate({"train": 8, "test": 7}.items()):
        kinds(root / part, {"ash": n, "birch": n, "cedar": n}, seed)
    return root


@pytest.mark.parametrize("transfer", ["all", "linear_probe", "nearest_centroid", "far_apart"])
def test_predictions_of_the_test_images_have_the_accuracy_that_the_run_reported(
    tmp_path: Path, divided: Path, transfer: str
) -> None:
    quick = [] if transfer == "nearest_centroid" else ["transfer.steps=3"]
    words, far = TARGET, transfer == "far_apart"
    if far:  # scores of which single precision has no probabilities, and labels that are often wrong
        divided = Path(shutil.copytree(divided, tmp_path / "divided"))
        for path in sorted(divided.glob("*/ash/*[0-3].png")):
            other = path.parents[1] / "birch" / path.name
            content = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        network = ["backbone=mlp", "backbone.hidden=[32]", "backbone.norm=none", "backbone.init_std=9"]
        words, transfer, quick = [*TARGET[:-1], *network], "nearest_centroid", ["transfer.normalize=false"]
    made_out = done(
        "recipe=target_only",
        *words,
        f"target.data.root={divided}",
        f"transfer={transfer}",
        *quick,
        f"outputs={tmp_path}",
        "name=made",
    )
    (made,) = tmp_path.glob("made/*/result.json")
    reported = rows(made.parent)
    done("recipe=predict", f"checkpoint={made.parent}", f"images={divided / 'test'}", f"outputs={tmp_path}")
    found = folder_of(tmp_path)
    first = [row for row in reported if row["repeat"] == "0"]
    assert [row["prediction"] for row in first] == [row["class"] for row in rows(found)]
    assert result(found)["predict/acc"] == np.mean([int(row["right"]) for row in first])
    told = result(made.parent)
    assert told["target/classifier"]["acc"] == result(found)["predict/acc"]
    assert (
        f"classifier.pt is that of repeat 0 with 24 images: {told['target/classifier']['acc']:.2%} of its 21 test"
        in made_out.out
    )
    calibration = told["target/calibration"]
    scores = {name: result(found)[f"predict/{name}"] for name in ("nll", "brier", "ece")}
    assert not far or calibration["temperature"] > 1000
    # A class of 8 gives two, which is more than a fifth.
    assert calibration["fitted_on"] == ("6 of the 24 training images, held out" if calibration["temperature"] else None)
    assert calibration["with"] == pytest.approx(scores, rel=1e-3, abs=1e-6)
    for part in ("backbone", "data", "algo", "train", "target", "transfer"):  # of the run, and not of this command
        assert part not in result(found)["choices"]
        assert part not in yaml.safe_load((found / "config.yaml").read_text())
    assert told["target/worst_class_acc"] == min(told["target/class_acc"])
    held = store.load(made.parent)
    assert held.classes == ["ash", "birch", "cedar"]
    assert len(held.examples) == 24
    assert all(name.startswith("train/") for name in held.examples)


@pytest.mark.parametrize(("algo", "norm"), [("coral", "batch"), ("dann", "running")])
def test_an_adapted_method_keeps_its_classifier_too(tmp_path: Path, divided: Path, algo: str, norm: str) -> None:
    source = kinds(tmp_path / "source", {"ash": 6, "birch": 6, "cedar": 6}, seed=5)
    words = ["recipe=domain_adaptation", f"algo={algo}", "data=folder", f"data.root={source}", "data.image_size=16"]
    words += [
        *TARGET,
        f"target.data.root={divided}",
        f"backbone.norm={norm}",
        "train.steps=2",
        "train.tasks_per_step=8",
    ]
    done(*words, f"outputs={tmp_path}", "name=made")
    (made,) = tmp_path.glob("made/*/result.json")
    done("recipe=predict", f"checkpoint={made.parent}", f"images={divided / 'test'}", f"outputs={tmp_path}")
    told, found = result(made.parent), result(folder_of(tmp_path))
    assert told["target/classifier"] == {"file": "classifier.pt", "acc": found["predict/acc"]}
    assert told["target/acc"] == found["predict/acc"]
    names = [f"probability of {name}" for name in ("ash", "birch", "cedar")]
    for one, other in zip(rows(made.parent), rows(folder_of(tmp_path)), strict=True):
        assert one["prediction"] == other["class"]
        np.testing.assert_allclose(*([float(row[name]) for name in names] for row in (one, other)), rtol=2e-5)
    support = kinds(tmp_path / "support", {"elm": 2, "fir": 3})  # other classes are learned in the method's own way
    learner = Learner(store.load(made.parent), "cpu")
    assert learner.fit(support).predict(support).shape == (5,)


def test_a_classifier_speaks_in_single_precision_whatever_it_learned_in(tmp_path: Path, divided: Path) -> None:
    """Else its word would depend on how many images share a batch; ProtoNet's support set is learned without computing."""
    found = []
    for autocast in ("null", "bfloat16"):
        words = ["recipe=target_only", *TARGET, f"target.data.root={divided}", "transfer=own", "algo=protonet"]
        done(*words, f"hardware.autocast={autocast}", f"outputs={tmp_path / autocast}", "name=made")
        (made,) = (tmp_path / autocast).glob("made/*/result.json")
        assert store.load(made.parent).autocast == (None if autocast == "null" else autocast)
        classifier = Learner(store.load(made.parent), "cpu").classifier
        found.append((rows(made.parent), classifier.predict_proba(divided / "test")))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


def test_a_kept_classifier_has_learned_the_first_draw_of_the_largest_size(tmp_path: Path, divided: Path) -> None:
    done(
        "recipe=target_only",
        *TARGET,
        "target.train_images=[6,9]",
        f"target.data.root={divided}",
        f"outputs={tmp_path}",
        "transfer=nearest_centroid",
        "name=made",
    )
    (made,) = tmp_path.glob("made/*/result.json")
    assert len(store.load(made.parent).examples) == 9


def test_classes_of_a_few_examples_unequal_in_number(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 1, "birch": 4, "cedar": 2, "elm": 3})
    images = kinds(tmp_path / "images", {"ash": 3, "elm": 3}, seed=1)
    said = done(
        "recipe=predict", f"checkpoint={episodic}", f"support={support}", f"images={images}", f"outputs={tmp_path}"
    )
    found = folder_of(tmp_path)
    written = rows(found)
    names = ["ash", "birch", "cedar", "elm"]
    assert list(written[0]) == [
        "path",
        "truth",
        "right",
        "class",
        *(f"probability of {name}" for name in names),
        "margin",
        "unknown",
    ]
    for row in written:
        shares = sorted((float(row[f"probability of {name}"]) for name in names), reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert float(row["margin"]) == pytest.approx(shares[0] - shares[1], abs=1e-5)
        assert float(row[f"probability of {row['class']}"]) == shares[0]
    assert result(found)["predict/labelled"] == 6
    told = re.findall(r"^ +([\d.]+)% \w+, ([\d.]+)% ahead  .*\.png$", said.out, re.M)
    assert told == [
        (f"{100 * one['probability']:.1f}", f"{100 * one['margin']:.1f}")
        for one in result(found)["predict/least_certain"]
    ]
    assert "tensorboard" not in said.out  # it has no curve
    assert said.out.splitlines()[-1] == f"next     metarun recipe=export checkpoint={episodic} support={support}"
    page = (found / "index.html").read_text()
    assert page.count("nearest: ") == 6  # the example that decided most, of a metric method
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_runs_that_only_use_what_was_learned_can_be_swept(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"ash": 1, "elm": 1}, seed=1)
    words = [f"checkpoint={episodic}", f"support={support}", f"images={images}", f"outputs={tmp_path}"]
    said = done("-m", "recipe=predict", "unknown=0.2,0.5", *words)
    assert re.findall(r"^\[\d/2\] \d+ s  (\S+)  (\S+)", said.err, re.M) == [
        ("unknown=0.2", "done"),
        ("unknown=0.5", "done"),
    ]
    refused = metarun(
        "-m", "recipe=predict", "unknown=0.2,0.5", *words[:2], "images=-", f"outputs={tmp_path / 'refused'}"
    )
    assert refused.status == 2
    assert "metarun: images=-: the jobs of a sweep have no standard input; name a folder" in refused.err
    assert not (tmp_path / "refused").exists()


def test_examples_from_a_table(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(support.rglob("*.png"))]
    (tmp_path / "classes.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    images = kinds(tmp_path / "images", {"x": 2})
    for where in (support, tmp_path / "classes.csv"):
        done(
            "recipe=predict",
            f"checkpoint={episodic}",
            f"support={where}",
            f"images={images}",
            f"outputs={tmp_path / where.stem}_to",
        )
    first, second = (folder_of(tmp_path / name) / "predictions.csv" for name in ("support_to", "classes_to"))
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize("form", ["file", "pattern", "stdin", "deep"])
def test_images_may_be_named_in_many_ways(tmp_path: Path, episodic: Path, form: str) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"a": 2, "deep/er": 1})
    given = {"file": images / "a" / "0.png", "pattern": images / "**" / "*.png", "stdin": "-", "deep": images}[form]
    listed = "\n".join(str(path) for path in sorted(images.rglob("*.png"))) + "\n"
    with mock.patch("sys.stdin", io.StringIO(listed)):
        done("recipe=predict", f"checkpoint={episodic}", f"support={support}", f"images={given}", f"outputs={tmp_path}")
    assert len(rows(folder_of(tmp_path))) == (1 if form == "file" else 3)


def test_a_folder_called_like_a_class_labels_its_images_however_they_are_named(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"ash": 1}, seed=1)
    for number, given in enumerate((images, images / "ash", images / "*" / "*.png", images / "ash" / "0.png")):
        outputs = tmp_path / str(number)
        said = done(
            "recipe=predict", f"checkpoint={episodic}", f"support={support}", f"images={given}", f"outputs={outputs}"
        )
        assert [row["truth"] for row in rows(folder_of(outputs))] == ["ash"]
        assert said.out.splitlines()[1].strip() == "1 image"
        assert re.search(r"^accuracy \d+\.00% of 1 labelled image, ", said.out, re.M)
        page = (folder_of(outputs) / "index.html").read_text("utf-8")
        assert page.count("Predictions of 1 image<") == 2
        assert "% of 1 labelled image. " in page
        assert "<title>1 image</title>" in page


def test_the_nearest_folder_that_is_called_like_a_class_labels_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = kinds(tmp_path / "ash", {"elm/2019": 1, "elm/ash": 1, "oak": 1})
    listed = "\n".join(map(str, sorted(images.rglob("*.png"))))
    expected, classes = ["elm", "ash", "ash"], ["ash", "elm"]
    assert find_images(images, classes=classes).labels == expected
    assert find_images(images / "**" / "*.png", classes=classes).labels == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    assert find_images("-", classes=classes).labels == expected
    monkeypatch.chdir(images / "elm" / "2019")
    for name in ("0.png", "*.png", "../2019/0.png"):
        assert find_images(name, classes=classes).labels == ["elm"]
    assert find_images("../../oak/0.png", classes=classes).labels == ["ash"]


def test_a_list_of_files_on_standard_input_may_name_any(monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9.png\r\n\nb.png"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", given)
    assert list(map(os.fsencode, find_images("-").paths)) == [b"caf\xe9.png", b"b.png"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match=r"^images=-: names no file$"):
        find_images("-")


def test_tables_and_pages_are_utf8_whatever_a_file_is_called(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"ash": 1})
    (images / "ash" / "0.png").rename(images / "ash" / os.fsdecode(b'caf\xe9, a "b"\n.png'))
    done("recipe=predict", f"checkpoint={episodic}", f"support={support}", f"images={images}", f"outputs={tmp_path}")
    (row,) = rows(folder_of(tmp_path))
    assert row["path"] == f'{images}/ash/caf\\udce9, a "b"\n.png'
    assert "caf\\udce9" in (folder_of(tmp_path) / "index.html").read_text("utf-8")
    one = Labelled(
        np.arange(1),
        np.zeros(1, int),
        np.zeros(1, int),
        ["ash"],
        lambda rows: rows,
        identify=lambda rows: [os.fsdecode(b"\xe9")],
    )
    predictions.write(tmp_path / "run.csv", [predictions.Predicted(0, 4, one, np.zeros(1, int), np.ones((1, 1)))])
    assert "0,4,\\udce9,ash,ash,1,1" in (tmp_path / "run.csv").read_text("utf-8")
    lone = replace(one, identify=lambda rows: ["two\rlines"])  # of a text, in quotes or in JSON
    predictions.write(tmp_path / "run.csv", [predictions.Predicted(0, 4, lone, np.zeros(1, int), np.ones((1, 1)))])
    with open(tmp_path / "run.csv", encoding="utf-8", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["two\rlines"]


@pytest.mark.parametrize("kept", [True, False])
def test_the_accuracy_is_of_images_that_were_not_learned_from(
    tmp_path: Path, divided: Path, episodic: Path, kept: bool
) -> None:
    """Wherever they lie: a copy of an example is one."""
    if kept:
        done("recipe=target_only", *TARGET, f"target.data.root={divided}", "transfer=nearest_centroid",
             f"outputs={tmp_path}", "name=made")  # fmt: skip
        (made,) = tmp_path.glob("made/*/result.json")
        words = [f"checkpoint={made.parent}"]
    else:
        words = [f"checkpoint={episodic}", f"support={divided / 'train'}"]
    words += ["recipe=predict", f"outputs={tmp_path}"]
    images = Path(shutil.copytree(divided / "train", tmp_path / "images"))
    said = done(*words, f"images={images}", "name=learned")
    assert (
        "24 of 24 images are examples that it learned from, or copies of these; of no other is the class known"
        in said.out
    )
    assert "\naccuracy " not in said.out
    found = result(folder_of(tmp_path, "learned"))
    assert (found["predict/learned_from"], "predict/acc" in found) == (24, False)
    for path in (divided / "test").glob("*/*.png"):
        shutil.copy(path, images / path.parent.name / f"new{path.name}")
    said = done(*words, f"images={images}", "name=both")
    assert "24 of 45 images are examples that it learned from, or copies of these, left out of the accuracy" in said.out
    folder = folder_of(tmp_path, "both")
    others = [row for row in rows(folder) if row["learned_from"] == "0"]
    assert len(others) == 21
    assert result(folder)["predict/acc"] == np.mean([int(row["right"]) for row in others])
    assert f"accuracy {result(folder)['predict/acc']:.2%} of 21 other labelled images" in said.out
    page = (folder / "index.html").read_text()
    assert "of 21 other labelled images. 24 of 45 images are examples that it learned from" in page
    assert sum(map(sum, result(folder)["predict/confusion"])) == 21


def test_a_run_tells_of_test_images_that_are_copies_of_training_images(tmp_path: Path, divided: Path) -> None:
    """And of the accuracy on the others, which is what predictions have."""
    root = Path(shutil.copytree(divided, tmp_path / "images"))
    for name in ("ash", "cedar"):
        shutil.copy(root / "train" / name / "0.png", root / "test" / name / "copy.png")
    said = done("recipe=target_only", *TARGET, f"target.data.root={root}", "transfer=nearest_centroid",
                f"outputs={tmp_path}", "name=made")  # fmt: skip
    assert "target: 2 of its 23 test images are copies of training images, with the same pixels" in said.err
    (made,) = tmp_path.glob("made/*/result.json")
    told = result(made.parent)
    assert told["target/copied_test_images"] == [2, 2]
    said = done("recipe=predict", f"checkpoint={made.parent}", f"images={root / 'test'}", f"outputs={tmp_path}")
    assert "2 of 23 images are examples that it learned from, or copies of these, left out of the accuracy" in said.out
    others = [row for row in rows(made.parent) if row["repeat"] == "0" and not row["file"].endswith("copy.png")]
    right = np.mean([int(row["right"]) for row in others])
    assert told["target/classifier"]["acc_without_copies"] == result(folder_of(tmp_path))["predict/acc"] == right


def test_other_classes_than_those_of_a_run_have_not_its_temperature(tmp_path: Path, divided: Path) -> None:
    """It was fitted for the one classifier that the run kept, and another has other scores."""
    done("recipe=target_only", *TARGET, f"target.data.root={divided}", "transfer=nearest_centroid",
         f"outputs={tmp_path}", "name=made")  # fmt: skip
    (made,) = tmp_path.glob("made/*/result.json")
    kept, file = 6.6, tmp_path / "classifier.pt"
    held = store.load(made.parent)
    assert held.calibration.of_classes
    store.save(file, replace(held, calibration=replace(held.calibration, temperature=kept)))
    learner = Learner(store.load(file), "cpu")
    images = sorted((divided / "test").glob("*/*.png"))
    anew = learner.fit(images, [path.parent.name for path in images])
    scores = anew.scored(images).scores
    np.testing.assert_allclose(anew.predict_proba(images), torch.from_numpy(scores).softmax(1).numpy(), rtol=1e-6)
    for name, classifier, temperature in (("anew", anew, None), ("kept", learner.classifier, kept)):
        classifier.save(tmp_path / f"{name}.pt")
        again = Learner(store.load(tmp_path / f"{name}.pt"), "cpu")
        assert again.held.calibration.temperature == temperature
        assert again.fit(images, [path.parent.name for path in images]).calibration_.temperature is None
    words = ["recipe=predict", f"checkpoint={file}", f"images={divided / 'test'}", f"outputs={tmp_path}"]
    for support, temperature in ((["support=null"], kept), ([f"support={divided / 'train'}"], None)):
        done(*words, *support)
        newest = max(tmp_path.glob("predictions/*/result.json"), key=lambda path: path.stat().st_mtime_ns)
        assert result(newest.parent)["predict/temperature"] == temperature


def test_a_method_that_supposes_equal_classes_says_so(
    tmp_path: Path, divided: Path, episodic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PT-MAP does, with which one image alone is of the first class."""
    words = ["recipe=predict", f"checkpoint={episodic}", f"support={divided / 'train'}", f"images={divided / 'test'}"]
    monkeypatch.setattr(ProtoNet, "assumes_balanced_queries", True)
    assert "equally many" not in done(*words, f"outputs={tmp_path}", "name=inductive").out
    monkeypatch.setattr(ProtoNet, "couples_queries", True)
    said = done(*words, f"outputs={tmp_path}")
    assert "the method supposes equally many images of each class" in said.out
    assert "It supposes equally many images of each class" in (folder_of(tmp_path) / "index.html").read_text()


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"ash": 1, "Elm": 2, "oak": 1}, "3 images with a folder or a label that is none of the classes (Elm, oak); did you mean elm by"),
        ({"ash": 1, "oak": 1}, "1 image with a folder or a label that is none of the classes (oak)"),
        ({"Elm": 1}, "1 image with a folder or a label that is none of the classes (Elm); did you mean elm by"),
        ({"2024": 2, "holiday": 1}, ""),
        ({"ash": 1, "elm": 1}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_folders_that_are_called_almost_like_classes_are_told(
    sizes: dict[str, int], told: str, tmp_path: Path, episodic: Path
) -> None:
    support, images = kinds(tmp_path / "support", {"ash": 2, "elm": 2}), kinds(tmp_path / "images", sizes, seed=1)
    words = [f"checkpoint={episodic}", f"support={support}", f"images={images}", f"outputs={tmp_path / 'out'}"]
    for _ in range(2):  # the stored result, too
        lines = [line for line in done("recipe=predict", *words).out.splitlines() if line.startswith("without a class")]
        assert [line.removesuffix(" Elm?") for line in lines] == ([f"without a class: {told}"] if told else [])


def test_an_image_that_is_an_example_of_two_classes_is_told(tmp_path: Path, episodic: Path) -> None:
    support, images = kinds(tmp_path / "support", {"ash": 2, "elm": 2}), kinds(tmp_path / "images", {"a": 1}, seed=1)
    shutil.copy(support / "ash" / "1.png", support / "elm" / "copy.png")
    words = [f"checkpoint={episodic}", f"support={support}", f"images={images}"]
    said = done("recipe=predict", *words, f"outputs={tmp_path / 'out'}").err
    twice = f"support: {support}/elm/copy.png of elm is the same image as {support}/ash/1.png of ash, and one is of one class\n"
    assert twice in said
    (support / "elm" / "copy.png").unlink()
    assert "the same image" not in done("recipe=predict", *words, f"outputs={tmp_path / 'out'}").err


def test_a_report_on_predictions_says_what_they_are_and_where_the_run_is(tmp_path: Path, episodic: Path) -> None:
    support, images = kinds(tmp_path / "support", {"ash": 2, "elm": 2}), kinds(tmp_path / "images", {"a": 1}, seed=1)
    done(
        "recipe=predict",
        f"checkpoint={episodic}",
        f"support={support}",
        f"images={images}",
        f"outputs={tmp_path / 'out'}",
    )
    told = "only 1 run that only used what another has learned (predictions, exports)"
    one_line(
        metarun("recipe=report", f"runs={tmp_path / 'out'}"),
        f"{told}; runs={episodic.parent} has the run that they used",
    )
    assert not (tmp_path / "out" / "report").exists()


def test_unreadable_images_are_listed_and_do_not_stop_the_rest(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"a": 3})
    (images / "a" / "empty.png").touch()
    (images / "a" / "half.png").write_bytes((images / "a" / "0.png").read_bytes()[:200])
    (images / "a" / "notes.txt").write_text("none")
    command = [
        "recipe=predict",
        f"checkpoint={episodic}",
        f"support={support}",
        f"images={images}",
        f"outputs={tmp_path}",
    ]
    for _ in range(2):  # the stored result, too
        outcome = metarun(*command)
        assert outcome.status == 1
        assert outcome.err.splitlines()[-1].startswith("metarun: images: 2 of 5 cannot be read")
        assert "Error executing job" not in outcome.err
        assert outcome.out.count("not read") == 2
        assert "empty.png: the file is empty\n" in outcome.out
        assert len(rows(folder_of(tmp_path))) == 3
    assert result(folder_of(tmp_path))["predict/ignored"] == 1


def test_floating_point_arrays_are_from_black_to_white_whatever_the_range_of_files() -> None:
    how = Preprocessing(8, 1, (0.0, 4095.0), False, (0.0,), (1.0,), (1, 8, 8))
    grey = np.linspace(0, 1, 64).reshape(1, 8, 8)
    wanted = np.rint(grey * 255).astype(np.uint8)[:, None]
    for given in (grey, [grey[0]], torch.from_numpy(grey), [torch.from_numpy(grey[0]).half()]):
        (found,) = arrays.batches(given, how, 4)
        assert np.abs(found.astype(int) - wanted).max() <= 1
    (found,) = arrays.batches(wanted[:, 0], how, 4)  # as a file of eight bits
    assert found.max() == 16


def test_deep_images_that_become_almost_black_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    how = Preprocessing(8, 1, None, False, (0.0,), (1.0,), (1, 8, 8))
    for name, most in (("full", 65535), ("twelve", 4095)):
        image = np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    with caplog.at_level("WARNING", "metarun"):
        assert len(list(ImageFiles([tmp_path / "full.png"], [None]).batches(how, 4))) == 1
        assert not caplog.records
        list(ImageFiles([tmp_path / "twelve.png"], [None]).batches(replace(how, values=(0.0, 4095.0)), 4))
        assert not caplog.records
        list(ImageFiles([tmp_path / "twelve.png"], [None]).batches(how, 4))
    (record,) = caplog.records
    assert "1 of 16 bits or more have values from 0 to 4095" in record.getMessage()
    (gone := tmp_path / "gone.png").symlink_to("nowhere.png")
    files = ImageFiles([gone], [None])
    assert not list(files.batches(how, 4))
    assert files.unreadable == {gone: "there is no such file"}


def test_images_behind_a_link_are_found(tmp_path: Path) -> None:
    kinds(tmp_path / "elsewhere", {"ash": 2, "elm": 1})
    (folder := tmp_path / "images").mkdir()
    (folder / "oak").symlink_to(tmp_path / "elsewhere" / "ash")
    (folder / "up").symlink_to(tmp_path)
    found = find_images(folder, classes=["oak"])
    assert [path.parent.name for path in found.paths] == ["oak", "oak"]
    assert found.labels == ["oak", "oak"]


def classifying(count: int, episodic: Path, folder: Path) -> tuple[Path, list[str]]:
    """A folder with that many images, and the command that classifies them by two examples of each of two classes."""
    support, images = kinds(folder / "support", {"ash": 2, "elm": 2}), kinds(folder / "images", {"a": count})
    words = [f"checkpoint={episodic}", f"support={support}", f"images={images}", f"outputs={folder}"]
    return images, ["recipe=predict", *words]


def test_a_stored_result_is_of_these_very_images(tmp_path: Path, episodic: Path) -> None:
    images, command = classifying(3, episodic, tmp_path)
    done(*command)
    assert "finished before" in done(*command).out
    shutil.copy(images / "a" / "0.png", images / "a" / "more.png")
    assert "finished before" not in done(*command).out
    assert len(rows(folder_of(tmp_path))) == 4


def test_a_stored_result_is_of_these_very_labels_and_is_there(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"x": 2})
    paths = sorted(support.rglob("*.png"))
    table = tmp_path / "classes.csv"

    def label(*names: str) -> None:
        table.write_text("file,label\n" + "".join(f"{path},{name}\n" for path, name in zip(paths, names, strict=True)))

    command = [
        "recipe=predict",
        f"checkpoint={episodic}",
        f"support={table}",
        f"images={images}",
        f"outputs={tmp_path / 'to'}",
    ]
    label("ash", "ash", "elm", "elm")
    done(*command)
    first = (folder_of(tmp_path / "to") / "predictions.csv").read_text()
    label("ash", "elm", "elm", "elm")
    assert "finished before" not in done(*command).out
    assert (folder_of(tmp_path / "to") / "predictions.csv").read_text() != first
    for name in ("predictions.csv", "index.html"):
        path = folder_of(tmp_path / "to") / name
        whole = path.read_bytes()
        for spoil in (path.unlink, lambda path=path: path.write_bytes(bytes(300))):
            spoil()
            assert "finished before" not in done(*command).out
            assert path.read_bytes() == whole
    assert "finished before" in done(*command).out
    stored = folder_of(tmp_path / "to") / "result.json"
    of_before = json.loads(stored.read_text())
    del of_before["files"]  # as an earlier version leaves it
    stored.write_text(json.dumps(of_before))
    assert "finished before" in done(*command).out


def test_a_kill_after_the_table_of_other_images_leaves_no_result_beside_it(
    tmp_path: Path, episodic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, command = classifying(2, episodic, tmp_path)
    done(*command)
    table = folder_of(tmp_path) / "predictions.csv"
    whole = table.read_bytes()
    more = images / "a" / "more.png"
    shutil.copy(images / "a" / "0.png", more)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(carry_out, "finish", killed)
        assert metarun(*command).status == 130
    assert table.read_bytes() != whole
    more.unlink()
    assert "finished before" not in done(*command).out
    assert table.read_bytes() == whole


def test_a_kill_at_any_file_leaves_a_command_that_ends_the_same(tmp_path: Path, episodic: Path) -> None:
    support = kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    images = kinds(tmp_path / "images", {"ash": 2, "elm": 1}, seed=1)
    command = ["recipe=predict", f"checkpoint={episodic}", f"support={support}", f"images={images}", "name=made"]
    done(*command, f"outputs={tmp_path / 'whole'}")
    outcome, kills = killed_at_files(*command, f"outputs={tmp_path / 'killed'}", step=2)
    assert outcome.status == 0, outcome.err
    assert kills >= 2
    whole, killed = (folder_of(tmp_path / name, "made") for name in ("whole", "killed"))
    for name in ("predictions.csv", "index.html"):
        assert (killed / name).read_text().replace(str(killed), str(whole)) == (whole / name).read_text()
    first, second = (result(folder) for folder in (whole, killed))
    assert all(first[name] == second[name] for name in first if name.startswith(("predict/", "checkpoint/")))
    assert not list(killed.glob(".*.writing"))


def test_a_file_url_is_the_path_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "my photo.png"
    file.touch()
    for host in ("", "localhost"):
        assert find_images(f"file://{host}{tmp_path}/my%20photo.png").paths == [file]
    assert find_images(f"file://{tmp_path}/*.png").paths == [file]
    with pytest.raises(
        UserError, match=rf"^images={tmp_path}/my photos.png: there is no such file or folder; did you mean"
    ):
        find_images(f"file://{tmp_path}/my%20photos.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": None}, "items: must be given (images="),
        ({"checkpoint": None}, "recipe=predict: needs what was learned; add checkpoint="),
        ({"images": "missing"}, "there is no such file or folder"),
        ({"images": "none/*.png"}, "no file matches this pattern"),
        ({"images": "empty"}, "the folder holds no image"),
        ({"images": "broken"}, "images: none of the 2 can be read; {root}/broken/0.png: the file is empty"),
        ({"support": None}, "has no classes of its own; add support="),
        ({"support": "missing"}, "support: there is no folder"),
        ({"support": "one"}, "has one class alone (ash)"),
        (
            {"support": "labels.txt"},
            "/labels.txt: is a file; it must be a folder with one folder per class, or a table of file and label (.csv or .tsv)",
        ),
        ({"support": "hollow"}, "the class folder"),
        ({"support": "flat"}, "name the table that does with support={root}/flat/labels.csv"),
        ({"support": "bare"}, "or name a table of file and label with support"),
        ({"support": "half"}, "whose images have no labels; support={root}/half/train takes the others alone"),
        ({"unknown": "auto"}, "unknown=auto: the run chose no threshold"),
        ({"unknown": "energy"}, "unknown=energy: the run chose no threshold"),
        (
            {"unknown": "1.5"},
            "unknown=1.5: must be auto, off, max_probability, energy, prototype_distance, or a probability",
        ),
        ({"checkpoint": "foreign.pt"}, "is no classifier file of metarun"),
        ({"checkpoint": "damaged.pt"}, "cannot be read, it is damaged"),
        ({"checkpoint": "newer.pt"}, "was written by metarun 9.9 (format 99)"),
        ({"checkpoint": "best.pt"}, "is no classifier file of metarun; give the folder of its run"),
        (
            {"checkpoint": "predicted"},
            "had no data set, and learned nothing; give the folder of a run that trained or tested",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, episodic: Path, change: dict[str, str | None], told: str) -> None:
    kinds(tmp_path / "support", {"ash": 2, "elm": 2})
    kinds(tmp_path / "one", {"ash": 2})
    kinds(tmp_path / "hollow", {"ash": 2, "elm": 0})
    kinds(tmp_path / "images", {"a": 1})
    (tmp_path / "labels.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for number in range(2):
        (tmp_path / "broken" / f"{number}.png").touch()
    for name in ("flat", "bare"):
        kinds(tmp_path / name, {"train": 2, "test": 2})
    (tmp_path / "flat" / "labels.csv").write_text("file,label\ntrain/0.png,ash\ntrain/1.png,elm\n")
    kinds(tmp_path / "half" / "train", {"ash": 2, "elm": 2})
    kinds(tmp_path / "half", {"test": 2})
    torch.save({"format": 99}, tmp_path / "foreign.pt")
    torch.save({"kind": store.KIND, "format": 99, "metarun": "9.9"}, tmp_path / "newer.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK no file")
    shutil.copy(episodic / "best.pt", tmp_path / "best.pt")
    (tmp_path / "predicted").mkdir()
    shutil.copy(episodic / "config.yaml", tmp_path / "predicted")
    (tmp_path / "predicted" / "result.json").write_text('{"predict/images": 3}')
    given = {"checkpoint": str(episodic), "support": str(tmp_path / "support"), "images": str(tmp_path / "images")}
    for key, value in change.items():
        given[key] = value if key == "unknown" or value is None else str(tmp_path / value)  # type: ignore[assignment]
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    outcome = metarun("recipe=predict", *words, f"outputs={tmp_path / 'outputs'}")
    assert outcome.status == 2
    (line,) = outcome.said
    assert told.format(root=tmp_path) in line
    assert not (tmp_path / "outputs").exists()


def test_a_method_with_fixed_ways_names_one_that_has_none(tmp_path: Path) -> None:
    images = make_images(tmp_path / "source")
    done("algo=maml", *EPISODIC, f"data.root={images}", f"outputs={tmp_path}", "name=made")
    (made,) = tmp_path.glob("made/*/result.json")
    support, asked = kinds(tmp_path / "support", {"ash": 2, "elm": 2}), kinds(tmp_path / "images", {"a": 1})
    outcome = metarun(
        "recipe=predict", f"checkpoint={made.parent}", f"support={support}", f"images={asked}", f"outputs={tmp_path}"
    )
    assert outcome.status == 2
    assert "algo=protonet" in outcome.said[0]
    kinds(tmp_path / "three", {"ash": 2, "elm": 1, "fir": 2})
    done(
        "recipe=predict",
        f"checkpoint={made.parent}",
        f"support={tmp_path / 'three'}",
        f"images={asked}",
        f"outputs={tmp_path}",
    )
    protocol = result(folder_of(tmp_path))["protocol"]
    assert result(made.parent)["protocol"]["transductive"]  # its norm is batch, and its tests are of episodes
    assert not protocol["transductive"]
    assert protocol["labelled_images"].startswith("those of up to 256 training images")


def test_probabilities_of_single_images_have_a_temperature_of_their_own(tmp_path: Path) -> None:
    """With the norm batch a test normalises a query by the others too, and a prediction by the examples alone."""
    images = make_images(tmp_path / "source", per_class=10)
    words = [
        *EPISODIC[:7],
        "train.validate_every=2",
        "train.validate_episodes=30",
        "test.episodes=6",
        "test.baseline_episodes=0",
    ]
    words += ["algo=maml", "test.unknown_ways=1", "test.task.ways=3", f"data.root={images}"]
    done(*words, f"outputs={tmp_path}", "name=made")
    (made,) = tmp_path.glob("made/*/result.json")
    told = result(made.parent)
    held = store.load(made.parent)
    learner = Learner(held, "cpu")
    assert learner.algorithm.backbone.norm == "batch"
    source: Any = construct(compose("data=folder", "data.image_size=16", f"data.root={images}").data, "data")
    tasks = source.sampler("val", TaskShape(3, 1, 2), 0, torch.device("cpu"))(0, 30)
    temperatures = []
    for algorithm in (Own(learner.algorithm).inductive, learner.algorithm):
        with torch.no_grad():
            logits = algorithm.predict(tasks)
        temperatures.append(fit_temperature(logits.flatten(0, 1).numpy(), tasks.query_y.flatten().numpy()))
    assert held.calibration.temperature == pytest.approx(temperatures[0], rel=1e-3)
    assert told["test/calibration"]["temperature"] == pytest.approx(temperatures[1], rel=1e-3)
    assert held.calibration.thresholds == told["test/of_single_images"]["thresholds"]
    assert held.calibration.thresholds != told["test/unknown"]["thresholds"]


def test_the_temperature_of_single_images_is_not_that_of_averaged_copies(tmp_path: Path) -> None:
    images = make_images(tmp_path / "source", per_class=10)
    words = [
        *EPISODIC[:7],
        "train.validate_every=2",
        "train.validate_episodes=30",
        "test.episodes=6",
        "test.baseline_episodes=0",
    ]
    words += ["algo=protonet", "test.unknown_ways=1", "test.task.ways=3", "augment=standard", f"data.root={images}"]
    told = {}
    for views in (1, 3):
        done(*words, f"test.views={views}", f"outputs={tmp_path}", f"name=views{views}")
        (made,) = tmp_path.glob(f"views{views}/*/result.json")
        told[views] = result(made.parent)
    assert told[3]["test/calibration"]["temperature"] != told[1]["test/calibration"]["temperature"]
    assert told[3]["learner"]["calibration"] == told[1]["learner"]["calibration"]
    assert told[3]["test/unknown"] == told[1]["test/unknown"]


@pytest.mark.parametrize("words", [["algo=semi_protonet"], ["algo=protonet", "wrapper=self_training"]])
def test_the_temperature_of_single_images_is_not_that_of_tasks_with_unlabelled_items(
    tmp_path: Path, words: list[str]
) -> None:
    images = make_images(tmp_path / "source", per_class=10)
    words = [
        *words,
        *EPISODIC[:7],
        "train.validate_episodes=30",
        *EPISODIC[8:],
        "task.unlabelled=4",
        "backbone.norm=group",
    ]
    done(*words, f"data.root={images}", f"outputs={tmp_path}", "name=made")
    (made,) = tmp_path.glob("made/*/result.json")
    held = store.load(made.parent)
    algorithm = Learner(held, "cpu").algorithm
    source: Any = construct(compose("data=folder", "data.image_size=16", f"data.root={images}").data, "data")
    tasks = source.sampler("val", TaskShape(3, 1, 2), 0, torch.device("cpu"))(0, 30)
    with torch.no_grad():
        logits = algorithm.predict(tasks)
    expected = fit_temperature(logits.flatten(0, 1).numpy(), tasks.query_y.flatten().numpy())
    assert held.calibration.temperature == pytest.approx(expected, rel=1e-3)
    assert result(made.parent)["test/calibration"]["temperature"] != pytest.approx(expected, rel=1e-2)


def test_every_run_ends_with_commands_that_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    learner = {"weights": None, "preprocessing": {"size": 28}}
    tested = next_steps(folder, {"learner": learner, "test/acc": 0.5, "protocol": {"test": {"shots": 1}}})
    assert [shlex.split(step)[2] for step in tested] == [f"checkpoint={folder}"] * 2
    assert shlex.split(tested[0])[3:] == ["support=FOLDER", "images=FOLDER"]
    assert tested[1].endswith("test.task.shots=5")
    of_texts = next_steps(folder, {"learner": {**learner, "preprocessing": {"item": "text"}}, "test/acc": 0.5})
    assert [shlex.split(step)[3:] for step in of_texts] == [["support=FILE", "items=FILE"]]
    assert next_steps(folder, {"test/mse": 1.0}) == [f"metarun recipe=report runs={tmp_path}"]
    assert "recipe=test" in next_steps(folder, {"learner": learner})[0]
    assert next_steps(folder, {"predict/images": 3}) == []
    # A class of one's own is found by the options that the run had.
    typed = {"command": "metarun --config-dir '/my conf' algo=mine seed=1", "overrides": ["algo=mine", "seed=1"]}
    own = next_steps(folder, {"learner": learner, "test/acc": 0.5, "protocol": {"test": {"shots": 1}}, **typed})
    assert [shlex.split(step)[:3] for step in own] == [["metarun", "--config-dir", "/my conf"]] * 2


@pytest.mark.parametrize(
    ("words", "found", "ends"),
    [
        (
            ["support=my ones", "images=new"],
            {},
            [["recipe=export", "checkpoint=run", "support=my ones"], ["unknown=auto"]],
        ),
        (["images=new", "unknown=off"], {"certainty": None}, [["recipe=export", "checkpoint=run"]]),
        (["images=new", "unknown=energy"], {"transductive": True}, []),
        (["images=-", "support=s"], {}, [["recipe=export", "checkpoint=run", "support=s"]]),
        (["items=new.txt", "support=s"], {"kind": "texts"}, [["unknown=auto"]]),
    ],
)
def test_predictions_end_with_what_can_be_done_with_the_same_classifier(
    words: list[str], found: dict[str, Any], ends: list[list[str]]
) -> None:
    words = ["recipe=predict", "checkpoint=run", *words]
    told = {"kind": "images", "transductive": False, "certainty": "energy", **found}
    options = ["--config-dir", "/my conf"]
    stored = {"overrides": words, "command": shlex.join(["metarun", *options, *words])}
    steps = Predict().next_steps({**stored, **{f"predict/{key}": value for key, value in told.items()}})
    assert all(shlex.split(step)[:3] == ["metarun", *options] for step in steps)
    split = [shlex.split(step)[3:] for step in steps]
    assert split == [[*words, *end] if end == ["unknown=auto"] else end for end in ends]


@pytest.mark.parametrize(
    ("task", "images", "ends"),
    [
        ({"shots": 1, "queries": 15}, 20, "test.task.shots=5"),
        ({"shots": 1, "queries": 15}, 19, "images=FOLDER"),
        ({"shots": 1, "queries": 15, "unlabelled": 4}, 20, "images=FOLDER"),
        ({"shots": 1, "queries": 15, "labelled_share": 0.5}, 39, "images=FOLDER"),
        ({"shots": 1, "queries": 15, "labelled_share": 0.5}, 40, "test.task.shots=5"),
        ({"shots": 1, "queries": [2, 15]}, 6, "images=FOLDER"),
        ({"shots": 1, "queries": [2, 15]}, 7, "test.task.shots=5"),
        ({"shots": 15, "queries": 5}, 20, "test.task.shots=1"),
    ],
)
def test_the_next_test_is_one_that_the_smallest_class_can_serve(
    tmp_path: Path, task: dict[str, Any], images: int, ends: str
) -> None:
    learner = {"weights": None, "preprocessing": {"size": 28}}
    data = {"images": {"test": 900}, "classes": {"test": 9}, "images_of_smallest_class": {"test": images}}
    found = next_steps(
        tmp_path, {"learner": learner, "test/acc": 0.5, "protocol": {"test": {"ways": 5, **task}}, "data": data}
    )
    assert found[-1].endswith(ends)


@pytest.mark.parametrize(
    ("sets", "ends"),
    [
        ({"large": (20, 1, 15), "small": (17, 1, 15)}, "images=FOLDER"),
        ({"large": (20, 1, 15), "small": (17, 1, 5)}, "test.task.shots=5"),  # queries of its own
        ({"large": (20, 1, 15), "small": (17, 2, 15)}, "test.task.shots=5"),  # shots of its own, which stay
        ({"own": (90, 2, 15)}, "images=FOLDER"),
    ],
)
def test_the_next_test_is_one_that_each_data_set_can_serve(
    tmp_path: Path, sets: dict[str, tuple[int, int, int]], ends: str
) -> None:
    task = {"ways": 5, "shots": 1, "queries": 15}
    found = {"learner": {"weights": None, "preprocessing": {"size": 28}}, "test/acc": 0.5}
    own = {name: {"task": {**task, "shots": shots, "queries": queries}} for name, (_, shots, queries) in sets.items()}
    data = {name: {"images_of_smallest_class": {"test": images}} for name, (images, _, _) in sets.items()}
    trained_on = {"images_of_smallest_class": {"test": 600}}
    told = {"protocol": {"test": task, "sets": own}, "test/sets": data, "data": trained_on}
    assert next_steps(tmp_path, {**found, **told})[-1].endswith(ends)


def test_a_test_of_other_weights_is_used_wherever_both_were_moved(tmp_path: Path, episodic: Path) -> None:
    outputs = tmp_path / "outputs"
    trained = shutil.copytree(episodic, outputs / "made" / "run")
    done("recipe=test", f"checkpoint={trained}", "test.episodes=4", f"outputs={outputs}", "name=tested")
    (tested,) = outputs.glob("tested/*/result.json")
    assert store.load(tested.parent).origin == trained / "best.pt"
    elsewhere = outputs.rename(tmp_path / "elsewhere")
    folder = elsewhere / tested.parent.relative_to(outputs)
    assert store.load(folder).origin == elsewhere / "made" / "run" / "best.pt"
    shutil.rmtree(elsewhere / "made")
    images = kinds(tmp_path / "images", {"a": 1, "b": 1})
    outcome = metarun("recipe=predict", f"checkpoint={folder}", f"support={images}", f"images={images}")
    one_line(outcome, f"checkpoint={folder}: tests the weights of {trained}, which is there no more; give the folder")


def test_a_run_without_a_result_cannot_be_used(tmp_path: Path, episodic: Path) -> None:
    shutil.copytree(episodic, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    images = kinds(tmp_path / "images", {"a": 1, "b": 1})
    outcome = metarun("recipe=predict", f"checkpoint={tmp_path / 'run'}", f"support={images}", f"images={images}")
    assert outcome.status == 2
    assert "has not finished" in outcome.said[0]


def test_a_classifier_file_that_names_a_foreign_class_is_not_built(tmp_path: Path, episodic: Path) -> None:
    shutil.copytree(episodic, tmp_path / "run")
    stored = result(tmp_path / "run")
    stored["learner"]["blueprint"]["algo"]["_target_"] = "os.system"
    (tmp_path / "run" / "result.json").write_text(json.dumps(stored))
    images = kinds(tmp_path / "images", {"a": 1, "b": 1})
    outcome = metarun("recipe=predict", f"checkpoint={tmp_path / 'run'}", f"support={images}", f"images={images}")
    assert outcome.status == 2
    assert "names os.system, which is no class of metarun's" in outcome.said[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learner": 5}, "is damaged"),
        ({"learner/preprocessing": {}}, "is damaged (it has no "),
        ({"learner/preprocessing/input_shape": [3]}, "is damaged (images of 16 pixels as "),
        ({"learner/preprocessing/input_shape": ["a", 1, 1]}, "is damaged (images of "),
        ({"learner/preprocessing/mean": ["a"]}, "is damaged (a mean, "),
        ({"learner/preprocessing/deviation": [0.0, 0.0, 0.0]}, "is damaged (a mean "),
        ({"learner/preprocessing/channels": 7}, "is damaged (images of 7 channels)"),
        ({"learner/calibration": "a"}, "is damaged"),
        ({"learner/preprocessing/channels": True}, "is damaged (images of True channels)"),
        ({"learner/preprocessing/deviation": [-1.0]}, "is damaged (a mean "),
        ({"learner/preprocessing/image_size": 65_535}, "is damaged (images of 65535 pixels as "),
        ({"learner/preprocessing/inverted": "no"}, "is damaged (inverted no, which is neither true nor false)"),
        ({"learner/preprocessing/values": [9, 1]}, "is damaged (a range of [9, 1], which is not two numbers"),
        ({"learner/preprocessing/values": [1, 2, 3]}, "is damaged (a range of [1, 2, 3], which is not two numbers"),
        ({"learner/calibration/temperature": "a"}, "is damaged (its calibration has "),
        (
            {"learner/calibration/temperature": -1.0},
            "is damaged (its calibration has the temperature -1.0, which is not ",
        ),
        (
            {"learner/calibration/temperature": 0},
            "is damaged (its calibration has the temperature 0, which is not above 0)",
        ),
        (
            {"learner/calibration": {"thresholds": {"a": 1.0}, "certainty": "a"}},
            "is damaged (its calibration has a threshold of a,",
        ),
        ({"learner/autocast": "a"}, "is damaged (mixed precision of a, which is no type for it)"),
        ({"learner/autocast": 5}, "is damaged (mixed precision of 5, which is no type for it)"),
        ({"learner/blueprint/augment": 5}, "is damaged (its augment is no mapping of keys to values)"),
        (
            {"learner/preprocessing/input_shape": [1, 16, 16]},
            "is damaged (it reads items as [1, 16, 16], and its network takes [3, ",
        ),
        (
            {"learner/blueprint/transfer": {"_target_": "metarun.stages.Train"}},
            "is damaged (its transfer is metarun.stages.Train, ",
        ),
        (
            {"learner/blueprint/algo/_target_": "metarun.target.base.Own"},
            "is damaged (its algo is metarun.target.base.Own, which ",
        ),
        ({"learner/blueprint/transfer/learner": 1}, "is damaged (its transfer has learner, which is no setting)"),
        ({"learner/blueprint/backbone/_args_": [1]}, "is damaged (its backbone has _args_, which is no setting)"),
        ({"learner/blueprint/spec": None}, "is damaged"),
    ],
    ids=str,
)
def test_values_of_a_result_that_metarun_does_not_write(
    change: dict[str, object], told: str, episodic: Path, tmp_path: Path
) -> None:
    """They end in one line that names the file and what to do."""
    folder = tmp_path / "run"
    shutil.copytree(episodic, folder)
    found = json.loads((folder / "result.json").read_text())
    for key, value in change.items():
        *above, last = key.split("/")
        node = found
        for name in above:
            node = node[name]
        node[last] = value
    (folder / "result.json").write_text(json.dumps(found))
    with pytest.raises(UserError) as error:
        store.load(folder)
    assert "\n" not in str(error.value)
    assert f"result.json: {told}" in str(error.value)
    assert "delete it, and the run's own command" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04x", b"[" * 5000, b"{"])
def test_a_result_that_cannot_be_read(content: bytes, episodic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(episodic, folder)
    (folder / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json: is damaged"):
        store.load(folder)


def test_a_classifier_file_with_a_part_of_another_type(tmp_path: Path, divided: Path) -> None:
    words = ["recipe=target_only", *TARGET, f"target.data.root={divided}", "transfer=nearest_centroid"]
    done(*words, f"outputs={tmp_path}", "name=made")
    (path,) = tmp_path.glob("made/*/classifier.pt")
    content = torch.load(path, weights_only=True)
    parts: dict[str, list[object]] = {
        "weights": [{"a": 1.5}, 5],
        "state": [None],
        "classes": [5, [1, 2], [], ["ash"], ["ash", "birch", "ash"]],
        "examples": ["a"],
    }
    for key, values in parts.items():
        for value in values:
            torch.save({**content, key: value}, path)
            with pytest.raises(UserError, match=r"classifier\.pt: is damaged, it lacks a part of a classifier \("):
                store.load(path)


@pytest.mark.parametrize("transfer", ["nearest_centroid", "linear_probe", "all"])
def test_parts_of_a_classifier_file_that_do_not_fit_each_other(tmp_path: Path, divided: Path, transfer: str) -> None:
    quick = [] if transfer == "nearest_centroid" else ["transfer.steps=1"]
    done(
        "recipe=target_only",
        *TARGET,
        f"target.data.root={divided}",
        f"transfer={transfer}",
        *quick,
        f"outputs={tmp_path}",
        "name=made",
    )
    (path,) = tmp_path.glob("made/*/classifier.pt")
    content = torch.load(path, weights_only=True)
    wide = {name: value[..., :-1] if value.dim() else value for name, value in content["state"].items()}
    for change in ({"classes": ["ash", "birch"]}, {"classes": ["a", "b", "c", "d"]}, {"state": {}}, {"state": wide}):
        torch.save({**content, **change}, path)
        with pytest.raises(
            UserError, match=r"classifier\.pt: is damaged, its parts do not fit \(.*; train again"
        ) as error:
            metarun_package.load(path).classifier.predict(divided / "test")
        assert "\n" not in str(error.value)


def test_what_is_neither_a_file_nor_a_folder_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "lost.pt").symlink_to("nowhere.pt")
    told = {
        "pipe": "is a pipe, and neither a run folder nor a file",
        "loop": r"is a link to loop\.pt, which leads to no file",
        "lost": r"is a link to nowhere\.pt, which leads to no file",
    }
    for name, words in told.items():
        with pytest.raises(UserError, match=rf"^checkpoint={tmp_path}/{name}\.pt: {words}$"):
            metarun_package.load(tmp_path / f"{name}.pt")


def test_examples_of_other_classes_are_learned_with_the_changes_that_the_run_measured(
    tmp_path: Path, divided: Path
) -> None:
    words = [
        "recipe=target_only",
        *TARGET,
        f"target.data.root={divided}",
        "transfer=all",
        "transfer.steps=3",
        "augment.jitter=0.9",
    ]
    done(*words, "augment=standard", f"outputs={tmp_path}", "name=made")
    (folder,) = (path.parent for path in tmp_path.glob("made/*/classifier.pt"))
    learner = metarun_package.load(folder)
    assert learner.held.blueprint.augment is not None
    assert learner.held.blueprint.augment["jitter"] == 0.9
    found = learner.fit(divided / "train").predict_proba(divided / "test")
    assert np.array_equal(found, metarun_package.load(folder).fit(divided / "train").predict_proba(divided / "test"))
    assert result(folder)["learner"]["blueprint"]["augment"] == learner.held.blueprint.augment
    plain = replace(learner.held, blueprint=replace(learner.held.blueprint, augment=None))
    assert not np.allclose(found, Learner(plain).fit(divided / "train").predict_proba(divided / "test"))


def test_a_circle_of_links_does_not_multiply_the_images_of_a_pattern(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "images" / f"class{number}").mkdir(parents=True)
        for link in ("up", "around"):  # two of them double the ways at every level
            (tmp_path / "images" / f"class{number}" / link).symlink_to(tmp_path / "images", target_is_directory=True)
        for name in ("0.png", "1.png", ".hidden.png"):
            (tmp_path / "images" / f"class{number}" / name).touch()
    expected = sorted((tmp_path / "images").glob("class?/[01].png"))
    for pattern in ("images/**/*.png", "images/**", "**/*.png", "**/class?/*.png", "im*/**/class?/**/*.png"):
        assert find_images(tmp_path / pattern).paths == expected, pattern
    one = tmp_path / "images" / "class1"
    assert find_images(one / "**" / "[0]*.png").paths[:1] == [one / "0.png"]


def test_a_name_with_a_tilde_is_a_name_where_there_is_no_such_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("~nobodyx.png", "~$photo.png"):
        Path(name).touch()
    assert find_images("~nobodyx.png").paths == [Path("~nobodyx.png")]
    monkeypatch.setattr("sys.stdin", io.StringIO("~$photo.png\n~nobodyx.png\n"))
    assert len(find_images("-").paths) == 2
    assert len(find_images("~*.png").paths) == 2
    for refuse in (find_images, lambda name: store.load(Path(name)), find_texts):
        with pytest.raises(UserError, match="~nobodyx"):
            refuse("~nobodyx")
    for words in (["--config-dir", "~nobodyx", "--help"], ["help", "--config-dir=~nobodyx"]):
        one_line(metarun(*words), "--config-dir ~nobodyx: there is no such folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images("~/~$photo.png").paths == [tmp_path / "~$photo.png"]
    homes = [
        path for path in Path(metarun_package.__file__).parent.rglob("*.py") if ".expanduser()" in path.read_text()
    ]
    assert homes == []  # files.typed_path takes such a name literally


def test_a_file_does_not_tell_how_many_batches_a_norm_has_seen_where_a_resumed_run_counts_anew() -> None:
    """Its bytes would depend on whether the training was interrupted."""
    network = torch.nn.Sequential(Norm(3, "running"), torch.nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in store.tensors(network).items()}
    network.train()
    network(torch.ones(2, 3, 2, 2))
    after = store.tensors(network)
    assert "0.running_mean" in after
    assert not any(name.startswith("0.num_batches") for name in (*before, *after))
    assert after["1.num_batches_tracked"] == 1  # of a norm whose state_dict has it, and a checkpoint too
    # Of an earlier version.
    store.load_tensors(network, {**before, "0.num_batches_tracked": torch.tensor(7)}, Path("old.pt"))
    assert not network[0].running_mean.any()


def test_examples_none_of_which_can_be_read_are_refused_in_a_line(tmp_path: Path, episodic: Path) -> None:
    support, images = kinds(tmp_path / "support", {"ash": 2, "elm": 2}), kinds(tmp_path / "images", {"a": 1})
    for path in support.rglob("*.png"):
        path.write_bytes(b"")
    outcome = metarun(
        "recipe=predict",
        f"checkpoint={episodic}",
        f"support={support}",
        f"images={images}",
        f"outputs={tmp_path / 'out'}",
    )
    assert outcome.status == 2
    (line,) = outcome.said
    assert f"{support}/ash/0.png cannot be read (the file is empty), and an example must be" in line


def test_examples_whose_table_holds_negatives_are_known_again_by_their_files() -> None:
    source = toy_images()
    source.inverted = True
    images = source.labelled("train")
    run: Any = SimpleNamespace(target=SimpleNamespace(source=source))
    files = {item_digest(255 - source.items(row, row + 1)[0]) for row in images.rows.tolist()}
    assert set(kept.digests_of(run, images)) == files
