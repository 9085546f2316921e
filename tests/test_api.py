"""`import metarun`: the same runs as the command's, and classifiers by scikit-learn's conventions."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from shell import SINUSOID, environment, make_images
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor

import metarun
from metarun.core import Batch, Episodes
from metarun.engine.hardware import process_as_it_was
from metarun.export.graphs import of_classifier
from metarun.inference import store
from metarun.inference.classifier import Classifier, Scored
from metarun.inference.kept import held_out_temperature
from metarun.ops.calibration import fit_temperature
from metarun.target import base

WORDS = [
    "algo=protonet", "data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2",
    "train.steps=2", "train.validate_every=2", "train.validate_episodes=4", "test.episodes=4", "test.baseline_episodes=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("api")
    found = metarun.run(*WORDS, f"data.root={make_images(root / 'images')}", outputs=root / "runs")
    (folder,) = (root / "runs").glob("*/*/result.json")
    return found, folder.parent


@pytest.fixture(scope="module")
def learner(made: tuple[dict[str, Any], Path]) -> metarun.Learner:
    return metarun.load(made[1], device="cpu")


def greys(n: int = 4, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images `[classes * n, 16, 16, 3]` uint8 in greys of their own, and the names of their classes."""
    draw = np.random.default_rng(0)
    labels = np.repeat([f"kind{number}" for number in range(classes)], n)
    base = np.repeat(np.arange(classes) * 80, n)[:, None, None, None]
    return (base + draw.integers(0, 40, (classes * n, 16, 16, 3))).astype(np.uint8), labels


def test_a_run_returns_what_its_result_holds_and_knows_it_again(made: tuple[dict[str, Any], Path]) -> None:
    found, folder = made
    assert "test/acc" in found
    words = [*WORDS, f"data.root={folder.parents[2] / 'images'}"]
    assert metarun.run(*words, outputs=folder.parents[1]) == found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["algo=protonett"], "algo=protonett: there is no such choice; did you mean protonet"),
        (["train.stepss=3"], "train.stepss: there is no such key; did you mean"),
        (["-m", "seed=1,2"], "-m: metarun.run carries out one run"),
        ([["algo=maml", "seed=1"]], r"^metarun.run: list is no word; give words such as 'algo=maml' one by one, "),
        (["seed=1", {"algo": "maml"}], "^metarun.run: dict is no word"),
        (["recipe.run=nope.nope"], "^recipe.run=nope.nope: is no function that can be imported "),
        (["recipe.run=-1347"], "^recipe.run=-1347: is no function that can be imported "),
        (["preset=paper", "data=glyphs"], "^preset=paper: there is none for algo=protonet on data=glyphs, only for "),
        (["experiment=omniglot_table"], "^.*: the experiment sweeps over them "),
    ],
)
def test_a_run_refuses_what_the_command_refuses(words: list[Any], told: str) -> None:
    with pytest.raises(metarun.UserError, match=told):
        metarun.run(*words)


def forms(images: np.ndarray, root: Path) -> dict[str, Any]:
    """The same images in every form that is taken."""
    paths = []
    for number, image in enumerate(images):
        paths.append(root / f"{number:02}.png")
        Image.fromarray(image).save(paths[-1])
    tensor = torch.from_numpy(images).movedim(-1, 1)
    return {
        "paths": paths,
        "strings": [str(path) for path in paths],
        "folder": str(root),
        "pil": [Image.fromarray(image) for image in images],
        "list of arrays": list(images),
        "floats": images.astype(np.float32) / 255,
        "channels first": images.transpose(0, 3, 1, 2),
        "tensor": tensor,
        "tensor of floats": tensor.float() / 255,
        "column of paths": Column(np.array([str(path) for path in paths], dtype=object)),
        "array of another library": Column(images),
    }


class Column:
    """What numpy makes an array of, and which is no sequence, as a column of pandas or an array of JAX."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values


def test_every_form_of_the_same_images_gives_the_same(tmp_path: Path, learner: metarun.Learner) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels)
    expected = classifier.predict_proba(images)
    for name, form in forms(images, tmp_path).items():
        np.testing.assert_allclose(classifier.predict_proba(form), expected, atol=1e-6, err_msg=name)
        if name != "folder":
            np.testing.assert_allclose(
                learner.fit(form, labels).predict_proba(images), expected, atol=1e-6, err_msg=name
            )


def test_scikit_learns_conventions(learner: metarun.Learner) -> None:
    images, labels = greys()
    classifier = Classifier(learner, batch_size=5)
    with pytest.raises(NotFittedError):
        classifier.predict(images)
    assert classifier.fit(images, labels) is classifier
    assert classifier.classes_.tolist() == ["kind0", "kind1", "kind2"]
    shares = classifier.predict_proba(images)
    assert shares.shape == (12, 3)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert classifier.predict(images).tolist() == classifier.classes_[shares.argmax(1)].tolist()
    assert classifier.score(images, labels) == np.mean(classifier.predict(images) == labels)
    assert classifier.get_params()["batch_size"] == 5
    assert not hasattr(clone(classifier), "classes_")
    assert clone(classifier).set_params(batch_size=3).batch_size == 3
    assert len(cross_val_score(classifier, images, labels, cv=2)) == 2
    numbers = np.repeat([3, 7, 5], 4)
    assert classifier.fit(images, numbers).classes_.tolist() == [3, 5, 7]
    assert classifier.predict(images).dtype == numbers.dtype


class OnVectors(Classifier):
    """A classifier of vectors, as scikit-learn's checks give them, each shown as an image."""

    def fit(self, images: Any, labels: Any = None) -> Classifier:
        return super().fit(shown(images), labels)

    def scored(self, images: Any, progress: Any = None) -> Scored:
        return super().scored(shown(images), progress)


def shown(x: Any) -> Any:
    """Images `[n, 16, 16]` of vectors `[n, d]`; what is no such array as it is."""
    array = np.asarray(x)
    if hasattr(x, "toarray") or array.ndim != 2 or array.dtype.kind not in "biuf":
        return x
    if 0 in array.shape:
        return array[:0, :, None]
    with np.errstate(over="ignore", invalid="ignore"):
        shares = np.where(np.isfinite(array), 1 / (1 + np.exp(-array.astype(float))), np.nan)
    return np.stack([np.resize(row, (16, 16)) for row in shares])


def test_what_applies_to_images_of_scikit_learns_checks_passes(learner: metarun.Learner) -> None:
    """Those that fail ask for one of two things that images do not have, or for other words in a message."""
    of_vectors = "it counts the features of vectors, and images may be of any size"
    words = "it asks for words of scikit-learn's own in a message"
    expected = {
        "check_n_features_in_after_fitting": of_vectors,
        "check_n_features_in": of_vectors,
        "check_classifiers_train": of_vectors,
        "check_fit2d_predict1d": words,
        "check_requires_y_none": words,
        "check_dtype_object": words,
        "check_estimators_empty_data_messages": words,
        "check_fit_score_takes_y": "the arguments are called images and labels",
        "check_array_api_input": "it needs a setting of scipy",
        "check_classifier_data_not_an_array": "it needs pandas",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the checks provoke them
        found = check_estimator(OnVectors(learner), on_fail=None, on_skip=None)
    others = {one["check_name"]: one["exception"] for one in found if one["status"] != "passed"}
    assert {name: error for name, error in others.items() if name not in expected} == {}
    assert sum(one["status"] == "passed" for one in found) > 40


def test_batches_change_nothing(learner: metarun.Learner) -> None:
    images, labels = greys()
    first, second = (learner.fit(images, labels, batch_size=size).predict_proba(images) for size in (2, 100))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_a_saved_classifier_predicts_the_same_and_learns_anew(tmp_path: Path, learner: metarun.Learner) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels)
    classifier.save(tmp_path / "classifier.pt")
    again = metarun.load(tmp_path / "classifier.pt", device="cpu")
    np.testing.assert_allclose(again.classifier.predict_proba(images), classifier.predict_proba(images), atol=1e-6)
    half = [0, 1, 4, 5]
    expected = learner.fit(images[half], labels[half]).predict_proba(images)
    np.testing.assert_allclose(again.fit(images[half], labels[half]).predict_proba(images), expected, atol=1e-6)


def test_threads_share_a_classifier(learner: metarun.Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method may change the network for a while, as `functional_call` does, which no other prediction may see."""
    images, labels = greys()
    expected = learner.fit(images, labels).predict_proba(images)
    plain, scale = learner.algorithm.predict, [1.0]

    def changing(tasks: Episodes) -> Tensor:
        before, scale[0] = scale[0], scale[0] * 1.5
        time.sleep(0.005)
        found = plain(tasks) * scale[0] / 1.5
        scale[0] = before
        return found

    monkeypatch.setattr(learner.algorithm, "predict", changing)
    with ThreadPoolExecutor(4) as pool:
        for shared in (True, False):
            classifier = learner.fit(images, labels, batch_size=4)
            asked = [classifier if shared else learner.fit(images, labels) for _ in range(4)]
            for found in pool.map(lambda one: one.predict_proba(images), asked):
                np.testing.assert_allclose(found, expected, atol=1e-6)
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(copy.deepcopy(classifier)))
    np.testing.assert_allclose(again.predict_proba(images), expected, atol=1e-6)


@pytest.mark.parametrize("row", [[torch.nan] * 3, [0.0, torch.nan, 0.0]])
def test_scores_that_are_no_numbers_are_one_line(
    row: list[float], learner: metarun.Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels)
    monkeypatch.setattr(
        learner.algorithm, "predict", lambda tasks: torch.tensor(row).expand(1, tasks.query_y.shape[1], -1)
    )
    with pytest.raises(
        metarun.UserError, match=r"^images: what was learned of the examples gives scores that are not finite"
    ):
        classifier.predict(images)


class Far(base.TargetClassifier):
    """Scores that are given in place of images."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_scores_far_apart_have_the_probabilities_of_their_temperature_in_predict_and_export(
    learner: metarun.Learner,
) -> None:
    """Their softmax without a temperature is (1, 0, 0), for exp(-2000) is no number but 0."""
    scores, expected = torch.tensor([[0.0, -2000, -2400]]), np.exp([0, -2.5, -3]) / np.exp([0, -2.5, -3]).sum()
    warm = copy.copy(learner)
    warm.held = replace(learner.held, calibration=replace(learner.held.calibration, temperature=800.0))
    classifier = Classifier(warm)
    classifier.network_, classifier.calibration_ = Far(), warm.held.calibration
    np.testing.assert_allclose(np.exp(classifier.log_probabilities(scores.numpy())), expected[None], rtol=1e-6)
    exported = of_classifier(Far(), lambda x: x, 800.0)(scores)
    np.testing.assert_allclose(exported.numpy(), expected[None], rtol=1e-6)


def test_every_held_out_label_counts_for_the_temperature_however_improbable() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 3, generator=draw) * 3000
    labels = (scores + torch.randn(60, 3, generator=draw) * 3000).argmax(1)

    class Method:
        def fit(self, train: Batch, classes: int) -> Far:
            return Far()

    class Images:
        names = ("a", "b", "c")

        def divide_places(self, seed: int, repeat: int) -> tuple[np.ndarray, np.ndarray]:
            return np.arange(10), np.arange(10, 60)

    found = held_out_temperature(Method(), Images(), Batch(scores, labels, labels), 0)  # type: ignore[arg-type]
    assert found == pytest.approx(fit_temperature(scores[10:].numpy(), labels[10:].numpy()), rel=1e-4)


def test_what_is_unknown(learner: metarun.Learner) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels, unknown=0.999999)
    shares = classifier.predict_proba(images)
    assert classifier.is_unknown(images).tolist() == (shares.max(1) < 0.999999).tolist()
    assert not learner.fit(images, labels).is_unknown(images).any()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"unknown": 2}, r"^unknown=2: must be auto, off"),
        ({"batch_size": 0}, r"^batch_size=0: must be at least 1$"),
        ({"batch_size": -1}, r"^batch_size=-1: must be at least 1$"),
        ({"seed": -1}, r"^seed=-1: must be at least 0 and below 2\*\*63$"),
        ({"seed": None}, r"^seed=None: must be a whole number$"),
        ({"batch_size": "3"}, r"^batch_size='3': must be a whole number$"),
        ({"batch_size": 2.0}, r"^batch_size=2.0: must be a whole number$"),
        ({"batch_size": True}, r"^batch_size=True: must be a whole number$"),
        ({"unknown": np.array([0.5, 0.6])}, r"^unknown=\[0.5 0.6\]: must be auto, off"),
    ],
)
def test_settings_out_of_range_get_one_sentence(learner: metarun.Learner, settings: dict[str, Any], told: str) -> None:
    images, labels = greys()
    with pytest.raises(metarun.UserError, match=told):
        learner.fit(images, labels, **settings)
    with pytest.raises(metarun.UserError, match=told):
        learner.fit(images, labels).set_params(**settings).predict(images)


def test_integers_of_numpy_are_settings(learner: metarun.Learner) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels, batch_size=np.int64(5), seed=np.int32(1))
    assert classifier.score(images, labels) == 1


@pytest.mark.parametrize("word", ["learner", None, 5])
def test_what_is_no_learner_is_named(word: Any) -> None:
    with pytest.raises(metarun.UserError, match=r"^learner: .* is none; give what metarun.load returns$"):
        metarun.Classifier(word).fit(*greys())


def test_what_has_learned_nothing_says_so(learner: metarun.Learner, tmp_path: Path) -> None:
    blank, (images, _) = metarun.Classifier(learner), greys()
    calls: list[Callable[[], Any]] = [
        lambda: blank.save(tmp_path / "u.pt"),
        lambda: blank.names,
        lambda: blank.learned_from(images),
        lambda: blank.nearest_examples(images, images),
        lambda: blank.predict(images),
        lambda: blank.is_unknown(images),
    ]
    for call in calls:
        with pytest.raises(NotFittedError, match="has learned no classes yet; call fit"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_fit_that_fails_leaves_the_classifier_as_it_was(learner: metarun.Learner, tmp_path: Path) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels)
    (tmp_path / "cut.png").write_bytes(b"no image")
    Image.fromarray(images[0]).save(tmp_path / "whole.png")
    with pytest.raises(metarun.UserError, match=r"cut.png cannot be read \(no image that Pillow knows\), and"):
        classifier.fit([tmp_path / "cut.png", tmp_path / "whole.png"], ["a", "b"])
    assert classifier.score(images, labels) == 1


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (np.zeros(12), "must be finite numbers of at least 0, and not all of them 0"),
        ([1.0, np.nan] * 6, "must be finite numbers"),
        ([1, -1] * 6, "must be finite numbers"),
        (["a"] * 12, "is no list of numbers"),
        ([1, 2], r"has the shape \[2\], but there are 12 labels"),
    ],
)
def test_weights_that_no_mean_can_be_taken_by(learner: metarun.Learner, weights: Any, told: str) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels)
    assert classifier.score(images, labels, sample_weight=[1] * 12) == 1
    with pytest.raises(ValueError, match=f"^sample_weight: {told}"):
        classifier.score(images, labels, sample_weight=weights)


def test_floats_say_what_to_give_instead(learner: metarun.Learner, tmp_path: Path) -> None:
    classifier = learner.fit(*greys())
    picture = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    picture.save(tmp_path / "f.tiff")
    advice = r"a run that is trained with data.value_range \(or target.data.value_range\)"
    with pytest.raises(metarun.UserError) as of_file:
        classifier.predict(tmp_path / "f.tiff")
    assert re.search(
        rf"f.tiff cannot be read \(floating-point pixels, .* unknown; {advice} reads them\)$", str(of_file.value)
    )
    with pytest.raises(metarun.UserError) as of_picture:
        classifier.predict([picture])
    assert re.match(
        rf"images: item 0: floating-point pixels, .* values in 0 to 1, or use {advice}$", str(of_picture.value)
    )


@pytest.mark.parametrize(
    ("mapped", "high", "warns"),
    [
        (None, 100, "0 to 65535 become"),
        (None, 60000, ""),
        ((0.0, 100.0), 100, ""),
        ((0.0, 4095.0), 100, "0 to 4095, leaves few"),
    ],
)
def test_what_leaves_little_of_pictures_of_16_bits_is_said(
    learner: metarun.Learner, caplog: pytest.LogCaptureFixture, tmp_path: Path, mapped: Any, high: int, warns: str
) -> None:
    pixels = np.linspace(0, high, 256).reshape(16, 16).astype(np.uint16)
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels.T.copy())]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    preprocessing = replace(learner.held.preprocessing, values=mapped)
    ranged = copy.copy(learner)
    ranged.held = replace(learner.held, preprocessing=preprocessing)
    classifier = ranged.fit(*greys())
    for images in (pictures, [tmp_path / "0.png", tmp_path / "1.png"]):  # in memory as from files
        caplog.clear()
        classifier.predict(images)
        said = [message for message in caplog.messages if f"values from 0 to {high}" in message and warns in message]
        assert len(said) == bool(warns) == len([one for one in caplog.messages if "values from" in one])


GOOD = greys()[0]


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (GOOD[0, :, :, 0], "is that of one grey image, or of vectors"),
        (GOOD[0], "is that of one image; give several"),
        (GOOD[..., :2], "has neither 1 nor 3 channels"),
        (GOOD[None], "has 5 axes"),
        (GOOD.astype(np.int64), "int64 values"),
        (GOOD.astype(np.float64), "floating-point values from 0 to"),
        (GOOD / 255 - 0.5, "floating-point values from -0.5"),
        (np.full((2, 16, 16), np.nan), "a value is NaN or inf"),
        (GOOD[:0], "there is none"),
        ([], "there is none"),
        (Image.fromarray(GOOD[0]), "this is one image"),
        (7, "int is none of paths"),
        ("missing_folder", "there is no such file or folder"),
        ("", "^images: is empty, and names neither a file nor a folder"),
        ([np.zeros(5)], r"^images: item 0: has the shape \[5\]"),
        (np.array(5), r"^images: the shape \[\] is that of a single number"),
        (torch.tensor(5), r"^images: the shape \[\] is that of a single number"),
        ([GOOD[0], np.array(5)], "^images: item 1: "),
        ([GOOD[0], [[1, 2], [3]]], r"^images: item 1: is no array, "),
        ([GOOD[0], [None, "a"]], r"^images: item 1: has the shape \[2\]"),
        ([GOOD[0]] * 300 + [GOOD[0].astype(int)], "^images: item 300: int64 values"),
        (torch.zeros(2, 16, 16).to_sparse(), "^images: a sparse tensor, .* images.to_dense"),
        ([torch.zeros(16, 16).to_sparse()], "^images: item 0: "),
        (torch.zeros(2, 16, 16, device="meta"), "^images: is a tensor that numpy cannot take"),
        (torch.zeros(2, 16, 16, dtype=torch.complex64), "^images: complex64 values"),
        (GOOD[:, :0], r"the shape \[12, 0, 16, 3\] has a length of 0"),
        (GOOD[:, :, :0, 0], r"the shape \[12, 16, 0\] has a length of 0"),
        (torch.zeros(2, 3, 0, 0), r"the shape \[2, 3, 0, 0\] has a length of 0"),
        ([GOOD[0], GOOD[0, :0]], r"the shape \[1, 0, 16, 3\] has a length of 0"),
        ([Image.new("RGB", (0, 5))], "^images: item 0: is 0 by 5 pixels; leave it out"),
        ([GOOD[0], "a.png"], "has paths and images in memory; give images of one kind"),
        (["a.png", GOOD[0]], "has paths and images in memory; give images of one kind"),
        ([GOOD[0], None], "NoneType is none of paths, PIL images"),
        (b"a file's bytes", "^images: bytes is none of paths"),
        ([b"a file's bytes"], "^images: item 0: bytes is none of paths"),
    ],
)
def test_inputs_that_are_no_images_get_one_sentence(learner: metarun.Learner, images: Any, told: str) -> None:
    classifier = learner.fit(*greys())
    with pytest.raises(metarun.UserError, match=told) as caught:
        classifier.predict(images)
    assert "\n" not in str(caught.value)


def test_an_opened_image_that_is_not_whole_is_named_by_its_place(learner: metarun.Learner, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    classifier = learner.fit(*greys())
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(metarun.UserError) as caught:
        classifier.predict([GOOD[0], cut])
    assert re.match(r"images: item 1: is not a whole image \(.*\)$", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_tensors_of_every_floating_type_are_images(learner: metarun.Learner, dtype: torch.dtype) -> None:
    classifier = learner.fit(*greys())
    images = (torch.from_numpy(GOOD).movedim(-1, 1).float() / 255).to(dtype)
    expected = classifier.predict_proba(images.double())
    np.testing.assert_allclose(classifier.predict_proba(images), expected, atol=1e-5)
    np.testing.assert_allclose(classifier.predict_proba(list(images)), expected, atol=1e-5)
    labels = torch.tensor([0.0, 1.0, 2.0]).repeat_interleave(4).to(dtype)
    assert learner.fit(GOOD, labels).score(GOOD, labels.double()) == 1


def test_labels_that_do_not_fit_get_one_sentence(learner: metarun.Learner) -> None:
    images, labels = greys()
    with pytest.raises(metarun.UserError, match=r"labels: have the shape \[5\], but there are 12 images"):
        learner.fit(images, labels[:5])
    with pytest.raises(metarun.UserError, match=r"one class alone \(kind0\)"):
        learner.fit(images[:4], labels[:4])
    for learns in (learner.fit, learner.fit(images, labels).score):
        with pytest.raises(metarun.UserError, match="labels: must be given"):
            learns(images)
        with pytest.raises(metarun.UserError, match=r"labels: have the shape \[5\], but there are 12 images"):
            learns(images, labels[:5])


def test_class_folders_bring_their_labels_to_fit_and_score(tmp_path: Path, learner: metarun.Learner) -> None:
    images, labels = greys()
    forms(images, tmp_path)
    for path, label in zip(sorted(tmp_path.glob("*.png")), labels, strict=True):
        (tmp_path / label).mkdir(exist_ok=True)
        path.rename(tmp_path / label / path.name)
    classifier = learner.fit(tmp_path)
    wrong = np.roll(labels, 2)
    assert classifier.score(tmp_path) == classifier.score(images, labels)
    assert classifier.score(images, wrong, np.arange(12)) == np.average(
        classifier.predict(images) == wrong, weights=range(12)
    )


def test_the_score_of_a_divided_folder_is_that_of_its_test_images(tmp_path: Path, learner: metarun.Learner) -> None:
    images, labels = greys()
    for part, named in {"train": labels, "test": np.roll(labels, 4)}.items():  # all test images are of another class
        for number, (image, label) in enumerate(zip(images, named, strict=True)):
            (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / part / label / f"{number:02}.png")
    classifier = learner.fit(tmp_path)
    assert classifier.score(images, labels) == 1
    assert classifier.score(tmp_path) == 0
    table = [f"{path.relative_to(tmp_path)},{path.parent.name}," for path in sorted(tmp_path.glob("train/*/*.png"))]
    parts = [f"{line}{part}" for line, part in zip(table, ["train", "val"] * 6, strict=True)]
    (tmp_path / "divided.csv").write_text("\n".join(["file,label,split", *parts]))
    with pytest.raises(
        metarun.UserError, match=r"^images=.*divided.csv: no image is for the test, but for train and val$"
    ):
        classifier.score(tmp_path / "divided.csv")


def test_examples_in_memory_are_not_at_hand_for_the_nearest(learner: metarun.Learner) -> None:
    images, labels = greys()
    classifier = learner.fit(images, labels)
    assert classifier.nearest_examples(images, np.zeros(len(images), dtype=np.int64)) is None


class Drawing:
    """A way with the target that draws a network before it loads its weights."""

    def restore(self, state: Any, classes: int) -> Far:
        torch.rand(1)
        return Far()


def test_what_is_loaded_leaves_the_callers_random_numbers_alone(
    made: tuple[dict[str, Any], Path], learner: metarun.Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, plain = torch.get_rng_state(), store.load

    def drawing(path: Path) -> store.Stored:
        torch.rand(1)  # as an encoder is drawn that is the network of a run
        return plain(path)

    monkeypatch.setattr(store, "load", drawing)
    assert metarun.load(made[1], device="cpu").held.classes is None
    assert torch.equal(torch.get_rng_state(), state)
    kept = copy.copy(learner)
    kept.held, kept.method = replace(learner.held, classes=["a", "b"]), Drawing()  # type: ignore[assignment]
    assert kept.classifier.names == ["a", "b"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_leaves_the_process_of_its_caller_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its threads would be those of the next run, and its seed that of what the caller draws."""
    logger, products, convolutions = logging.getLogger("metarun"), torch.backends.cuda.matmul, torch.backends.cudnn
    monkeypatch.setattr(convolutions, "allow_tf32", True)  # torch's own default
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)

    def process() -> list[Any]:
        of_torch = [
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            products.allow_tf32,
            convolutions.allow_tf32,
        ]
        return [*of_torch, logger.handlers[:], logger.level, logger.propagate]

    before = process()
    metarun.run(*SINUSOID, f"hardware.threads={torch.get_num_threads() + 1}", outputs=tmp_path)
    assert process() == before


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS_OF_CALLERS: list[Callable[[], contextlib.AbstractContextManager[Any]]] = [
    _float64, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.device("meta"),
]  # fmt: skip


def _set_by_callers() -> list[Any]:
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
    return [torch.get_default_dtype(), torch.get_default_device(), *modes, np.geterr()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return metarun.run(*SINUSOID, outputs=tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "setting", SETTINGS_OF_CALLERS, ids=["float64", "no_grad", "inference_mode", "autocast", "meta"]
)
def test_what_the_caller_has_set_changes_no_number(
    setting: Callable[[], contextlib.AbstractContextManager[Any]],
    plain: dict[str, Any],
    made: tuple[dict[str, Any], Path],
    learner: metarun.Learner,
    tmp_path: Path,
) -> None:
    """A notebook that computes in float64, or without gradients, gets the numbers of the shell, and goes on as it was."""
    images, labels = greys()
    known = learner.fit(images, labels).predict_proba(images)
    with setting():
        before = _set_by_callers()
        found = metarun.run(*SINUSOID, outputs=tmp_path)
        own = metarun.load(made[1], device="cpu").fit(images, labels).predict_proba(images)
        assert _set_by_callers() == before
    assert found["test/mse"] == plain["test/mse"]
    assert np.array_equal(own, known)


def test_numbers_that_vanish_raise_nothing_where_the_caller_has_numpy_raise() -> None:
    with np.errstate(all="raise"):
        with process_as_it_was():
            assert np.exp(np.array(-1000.0)) == 0
        assert set(np.geterr().values()) == {"raise"}


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    text = (Path(metarun.__file__).parent / "inference" / "README.md").read_text()
    (example,) = [code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "metarun.load" in code]
    images, labels = greys()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "my_images" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "my_images" / label / f"{number}.png")
    quick = '"test.episodes=2", "test.baseline_episodes=0", "train.validate_episodes=2", "train.steps=1", "backbone.channels=4"'
    code = example.replace('"train.steps=20"', quick)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=tmp_path)
    assert (tmp_path / "classifier.pt").is_file()


def test_runs_of_several_threads_have_the_numbers_that_each_has_alone(tmp_path: Path) -> None:
    alone = [metarun.run(*SINUSOID, f"seed={seed}", outputs=tmp_path / "alone")["test/mse"] for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(metarun.run, *SINUSOID, f"seed={seed}", outputs=tmp_path / "at once") for seed in (0, 1)]
        assert [job.result()["test/mse"] for job in jobs] == alone


def test_an_app_of_hydra_runs_metarun_and_is_as_it_was(tmp_path: Path) -> None:
    with hydra.initialize(version_base="1.3", config_path=None):
        app = GlobalHydra.instance().hydra
        assert "test/mse" in metarun.run(*SINUSOID, outputs=tmp_path)
        with pytest.raises(metarun.UserError, match="algo=mmal: there is no such choice"):
            metarun.run("algo=mmal", outputs=tmp_path)
        assert GlobalHydra.instance().hydra is app


def test_what_hydra_meets_with_an_error_of_pythons_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(metarun.UserError) as caught:
        metarun.run("algo=3", outputs=tmp_path)
    assert "\n" not in str(caught.value)


def test_importing_metarun_imports_no_torch() -> None:
    code = "import sys, metarun; assert not {'torch', 'sklearn', 'numpy', 'hydra'} & set(sys.modules); metarun.load"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    assert {"run", "load", "Classifier", "Learner"} <= set(dir(metarun))
    assert (Path(metarun.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        metarun.lod  # noqa: B018


def test_a_file_of_weights_that_is_named_is_the_one_that_is_used(
    made: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, run = made
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.copy(copy / "best.pt", copy / "last.pt")
    for name in ("best.pt", "last.pt"):
        assert metarun.load(copy / name).held.origin == copy / name
    assert metarun.load(copy).held.origin == copy / "best.pt"


def test_numbers_as_labels_are_right_after_the_classifier_was_stored_too(
    learner: metarun.Learner, tmp_path: Path
) -> None:
    images, labels = greys()
    classifier = learner.fit(
        images, labels.astype(int) if labels.dtype.kind in "iu" else np.unique(labels, return_inverse=True)[1]
    )
    known = classifier.predict(images)
    classifier.save(tmp_path / "c.pt")
    stored = metarun.load(tmp_path / "c.pt").classifier
    assert stored.score(images, known) == stored.score(images, known.astype(float)) == 1
    assert classifier.score(images, known.astype(float)) == 1
    assert classifier.score(images, known.astype(str)) == 1
    with pytest.raises(metarun.UserError, match="sample_weight: has the shape"):
        classifier.score(images, known, sample_weight=[1.0])


@pytest.mark.parametrize("kind", [float, np.float32, bool, str])
def test_labels_of_any_kind_are_right_after_the_classifier_was_stored(
    learner: metarun.Learner, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = greys(classes=2)[0]
    labels = np.repeat([0, 1], 4).astype(kind)
    classifier = learner.fit(images, labels)
    assert classifier.score(images, labels) == 1
    assert classifier.names == (["False", "True"] if kind is bool else ["0", "1"])
    classifier.save(tmp_path / "c.pt")
    assert metarun.load(tmp_path / "c.pt").classifier.score(images, labels) == 1
    if kind is float:  # as earlier versions wrote them
        monkeypatch.setattr(Classifier, "names", ["0.0", "1.0"])
        classifier.save(tmp_path / "old.pt")
        old = metarun.load(tmp_path / "old.pt").classifier
        assert old.score(images, labels) == old.score(images, labels.astype(int)) == 1


def test_a_photo_that_says_it_is_turned_is_turned_in_memory_as_from_its_file(
    learner: metarun.Learner, tmp_path: Path
) -> None:
    images, labels = greys()
    photo = Image.fromarray(np.linspace(0, 255, 28 * 28).reshape(28, 28).astype(np.uint8))
    tags = photo.getexif()
    tags[0x0112] = 6  # a quarter turn
    photo.save(tmp_path / "turned.png", exif=tags)
    classifier = learner.fit(images, labels)
    of_file = classifier.predict_proba([tmp_path / "turned.png"])
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_allclose(classifier.predict_proba([opened]), of_file, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda learner, x, y: learner.fit(x, np.array(["a", *range(len(x) - 1)], dtype=object)), "partly text and partly not"),
        (lambda learner, x, y: learner.fit(x, [[1, 2], *([[3]] * (len(x) - 1))]), "lists of several lengths"),
        (lambda learner, x, y: learner.fit(x, torch.zeros(len(x), device="meta")), "^labels: numpy cannot"),
        (lambda learner, x, y: learner.fit(x, np.array([b"a", b"b"] * (len(x) // 2))), "^labels: "),
        (lambda learner, x, y: learner.fit(x, [None, 1] * (len(x) // 2)), "^labels: "),
        (lambda learner, x, y: learner.fit(x, np.arange(len(x)) * 1j), "^labels: "),
        (lambda learner, x, y: learner.fit(x, {"a": 1}), r"^labels: have the shape \[\]"),
        (lambda learner, x, y: learner.fit(x, y, unknown=None), "unknown=None: must be auto, off"),
        (lambda learner, x, y: metarun.Learner(learner.held, "foo"), "device=foo: there is no such device here"),
        (lambda learner, x, y: metarun.Learner(learner.held, None), "^device=None: names no device; give auto, cpu or cuda$"),
        (lambda learner, x, y: learner.fit(""), "^images: is empty, and names neither a file nor a folder"),
        (lambda learner, x, y: learner.fit(x, y).save(""), "^path: is empty"),
        (lambda learner, x, y: learner.fit(x, y).save(None), "^path: NoneType is no path$"),
        (lambda learner, x, y: metarun.load(None), "^checkpoint: NoneType is no path$"),
        (lambda learner, x, y: metarun.load(5), "^checkpoint: int is no path$"),
        (lambda learner, x, y: metarun.load(""), "^checkpoint: is empty"),
        (lambda learner, x, y: metarun.run("data=glyphs", outputs=5), "^outputs: int is no path$"),
    ],
)  # fmt: skip
def test_odd_calls_get_one_sentence(learner: metarun.Learner, call: Any, told: str) -> None:
    with pytest.raises(metarun.UserError, match=told):
        call(learner, *greys())


def test_the_words_of_the_program_are_none_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog.py", "-f", "kernel.json", "algo=5", "checkpoint=x"])
    with pytest.raises(metarun.UserError, match=r"^data=5: was given no name of a choice"):
        metarun.run("data=5")
    folder = metarun.run(*SINUSOID, "train.steps=1", outputs=os.fsencode(tmp_path / "o"))["folder"]
    assert str(folder).startswith(f"{tmp_path / 'o'}{os.sep}")


def test_one_example_of_each_of_many_classes_is_learned_without_a_word(learner: metarun.Learner) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    classifier = learner.fit(images, [f"kind{number:02}" for number in range(24)])
    assert len(classifier.classes_) == 24
