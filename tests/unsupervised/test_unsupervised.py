"""Training without labels: what a task is made of, that no label is read, and what a run says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, compose, table
from shell import make_images, metarun, result, run_folder

from metarun.config.schema import ENCODING_DEFAULTS
from metarun.core import Episodes, TaskShape
from metarun.data.image_source import ImageSource
from metarun.data.test_sets import fit_to_network
from metarun.data.text import TextSource
from metarun.data.text_files import LabelledText
from metarun.encoders.base import Encoder, Encoding
from metarun.encoders.encoded import EncodedSource
from metarun.errors import UserError
from metarun.ops.prototypes import class_means, negative_squared_distances
from metarun.report.published import find
from metarun.unsupervised.base import PseudoTasks
from metarun.unsupervised.cactus import Cactus, principal_components
from metarun.unsupervised.distortions import Distortions
from metarun.unsupervised.instances import Instances

TASK = TaskShape(5, 2, 3)
SMALL = ["train.steps=2", "train.validate_every=2", "train.validate_episodes=2", "test.episodes=2", "test.baseline_episodes=0",
         "backbone.channels=4", "train.task.ways=5", "train.task.queries=1", "task.queries=2"]  # fmt: skip


def images(classes: int, per_class: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    patterns = np.kron(generator.integers(0, 2, (classes, 4, 4)), np.ones((3, 3))) * 180
    noise = generator.normal(0, 8, (classes, per_class, 12, 12))
    return (40 + patterns[:, None] + noise).clip(0, 255).astype(np.uint8).reshape(-1, 1, 12, 12)


def test_items_of_no_class_stay_the_unknown_ones() -> None:
    data = source()
    data.unknown = {"test": 11}  # the class of this number is none, but items of none
    data.splits["test"] = data.splits["test"][data.splits["test"] != 11]
    found = Instances(data, shift=0.2).with_unknown("test", TaskShape(2, 1, 3), 2, 0, CPU)(0, 3)
    plain = data.with_unknown("test", TaskShape(2, 1, 3), 2, 0, CPU)(0, 3)
    assert isinstance(found, Episodes)
    assert isinstance(plain, Episodes)
    assert torch.equal(found.query_x, plain.query_x)


@pytest.mark.parametrize("validation", ["pseudo", "labels"])
def test_made_up_tasks_have_more_classes_than_their_split(validation: Any) -> None:
    """Unknown ones among them; the validation split has eight classes of its own."""
    data, task = umtra(source(), validation=validation), TaskShape(7, 1, 1)
    if validation == "labels":
        with pytest.raises(
            UserError, match=r"^test.unknown_ways=2: with 7 ways they are above the 8 classes of the val split"
        ):
            data.with_unknown("val", task, 2, 0, CPU)
    else:
        (found,) = data.with_unknown("val", task, 2, 0, CPU)(0, 1).split(1)
        assert found.ways == 9


def source(sizes: list[int] | None = None, *, rotations: bool = False) -> ImageSource:
    """Twelve classes of twelve images for training, eight classes each for validation and test."""
    sizes = sizes or [12] * 12
    own = table(images(28, 12), [*sizes, *([12] * 16)])
    count = len(sizes)
    splits: Any = {"train": range(count), "val": range(count, count + 8), "test": range(count + 8, count + 16)}
    return ImageSource(own, splits, rotations=rotations)


def umtra(data: ImageSource, **settings: Any) -> Instances:
    return Instances(data, shift=0.2, zeroed=0.3, **settings)


def cactus(data: ImageSource, **settings: Any) -> Cactus:
    return Cactus(data, **{"clusters": 12, "partitions": 2, "components": 8, **settings})


WAYS = pytest.mark.parametrize("make", [umtra, cactus])


def same(one: Episodes, other: Episodes) -> None:
    for left, right in zip(one.tensors, other.tensors, strict=True):
        assert torch.equal(left, right)


def tasks(data: ImageSource, split: Any = "train", start: int = 0, stop: int = 4) -> Episodes:
    return data.sampler(split, TASK, 0, CPU)(start, stop)


@WAYS
@pytest.mark.parametrize("rotations", [False, True])
def test_a_task_is_a_function_of_its_number(make: Any, rotations: bool) -> None:
    data = make(source(rotations=rotations))
    whole = tasks(data)
    assert whole.support_x.shape == (4, 10, 1, 12, 12)
    assert whole.query_x.shape == (4, 15, 1, 12, 12)
    assert whole.support_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 4
    for number, part in enumerate(whole.split(1)):
        same(part, tasks(make(source(rotations=rotations)), start=number, stop=number + 1))
    assert not torch.equal(whole.support_x, data.sampler("train", TASK, 1, CPU)(0, 4).support_x)
    assert not torch.equal(whole.support_x, tasks(data, "val").support_x)


@WAYS
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_label_of_a_training_image_is_read(make: Any, split: str) -> None:
    """Images under other labels, whose names and groups cannot even be looked at, give the same tasks."""

    class Unreadable(list[str]):
        def __getitem__(self, key: Any) -> NoReturn:
            raise AssertionError("a label was read")

        __iter__ = __getitem__  # type: ignore[assignment]

    other = source([3, 1, 20, 40, 2, 60, 18])
    for name in ("names", "groups"):
        object.__setattr__(other.table, name, Unreadable())
    same(tasks(make(source()), split), tasks(make(other), split))


@WAYS
def test_test_tasks_are_the_data_sets_own(make: Any) -> None:
    same(tasks(make(source()), "test"), tasks(source(), "test"))
    same(tasks(make(source(), validation="labels"), "val"), tasks(source(), "val"))
    with pytest.raises(UserError, match=r"unsupervised: withholds the labels .* algo=protonet"):
        make(source()).labelled(None, "train")


def test_other_test_sets_are_normalised_as_the_images_that_tasks_are_made_of() -> None:
    own, other = (
        ImageSource(table(images(28, 12), [12] * 28), source().splits, normalize=normalize)
        for normalize in (True, False)
    )
    other.table.names[:] = [f"other {name}" for name in other.table.names]
    node: Any = SimpleNamespace(build=lambda **_: other, knows=lambda _: False, node={})
    (tested,) = fit_to_network({"other": node}, umtra(own)).values()
    mean, deviation = own.statistics_of(None)
    assert tested.reader(CPU)(np.array([3]), np.array(0))[0].numpy() == pytest.approx(
        (other.table.images[3] / 255 - mean[0]) / deviation[0], abs=1e-5
    )


def test_umtras_support_is_the_image_and_its_queries_are_not() -> None:
    data = umtra(source())
    found = tasks(data)
    known = {image.tobytes() for image in data.table.images[data.pool("train")]}
    first = (found.support_x[:, ::2] * 255).round().to(torch.uint8).flatten(0, 1).numpy()
    assert all(image.tobytes() in known for image in first)
    assert len({image.tobytes() for image in first[:5]}) == 5
    queries = found.query_x.flatten(0, 1)
    assert len({query.numpy().tobytes() for query in queries}) == len(queries)
    assert not any((255 * query).round().to(torch.uint8).numpy().tobytes() in known for query in queries)
    distorted = tasks(umtra(source(), distort_support=True))
    assert not torch.equal(distorted.support_x[:, ::2], found.support_x[:, ::2])


def test_clusters_are_the_classes_where_these_are_far_apart() -> None:
    data = cactus(source(), partitions=3)
    for partition in data.partitions_of("train"):
        assert all(len(set(partition[start : start + 12])) == 1 for start in range(0, 144, 12))
    found = tasks(data)
    x = torch.cat([found.support_x[0], found.query_x[0]]).flatten(1)
    y = torch.cat([found.support_y[0], found.query_y[0]])
    near = torch.cdist(x, x) < 2.5  # of 12 by 12 pixels
    assert torch.equal(near, y[:, None] == y)


def test_scaled_partitions_differ_and_are_kept() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 1, 12, 12)).astype(np.uint8)
    splits: Any = {"train": range(10), "val": range(10), "test": range(10)}
    data = Cactus(ImageSource(table(noise, [20] * 10), splits), clusters=8, partitions=3)
    partitions = data.partitions_of("train")
    assert partitions.shape == (3, 200)
    assert {len(set(one)) for one in partitions} == {8}
    assert not np.array_equal(partitions[0], partitions[1])
    again = Cactus(ImageSource(table(noise, [20] * 10), splits), clusters=8, partitions=3)
    again.embed = lambda rows: pytest.fail("was clustered again")  # type: ignore[method-assign]
    assert np.array_equal(again.partitions_of("train"), partitions)


def niltail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)


def of_arrays(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez_compressed(path, **arrays)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "it is truncated"),
        (lambda path: path.write_bytes(bytes(500)), "it is truncated"),
        (niltail, "it is truncated"),
        (flipped, "it is truncated"),
        (of_arrays(labels=np.array([[None]])), "it is truncated"),
        (of_arrays(other=np.zeros(3)), "it has no labels"),
        (of_arrays(labels=np.zeros((2, 3), int)), r"int64 \[2, 3\], not whole numbers \[2, 144\]"),
        (of_arrays(labels=np.zeros(144, int)), "not whole numbers"),
        (of_arrays(labels=np.zeros((2, 144))), "float64"),
        (of_arrays(labels=np.full((2, 144), -1)), "not those of 12 clusters"),
        (of_arrays(labels=np.full((2, 144), 12)), "not those of 12 clusters"),
        (of_arrays(labels=np.zeros((2, 144), int), key="another"), "clusters of other images or settings"),
    ],
)
def test_a_damaged_file_of_clusters_is_named_and_made_again(
    spoil: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path))
    monkeypatch.setattr(Cactus, "_cluster", lambda self, split: np.arange(2 * 144).reshape(2, 144) % 12)
    made = cactus(source()).partitions_of("train")
    (path,) = tmp_path.glob("clusters-*.npz")
    whole = path.read_bytes()
    spoil(path)
    with pytest.raises(UserError, match=rf"npz: is damaged \(.*{said}.*\); delete it to have it made again$"):
        cactus(source()).partitions_of("train")
    path.unlink()
    assert np.array_equal(cactus(source()).partitions_of("train"), made)
    assert path.read_bytes() == whole


def test_clusters_without_a_key_are_those_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path))
    made = cactus(source()).partitions_of("train")
    (path,) = tmp_path.glob("clusters-*.npz")
    np.savez_compressed(path, labels=made)
    assert np.array_equal(cactus(source()).partitions_of("train"), made)
    cactus(source(), cluster_seed=1).partitions_of("train")
    (other,) = {*tmp_path.glob("clusters-*.npz")} - {path}
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="is damaged"):
        cactus(source()).partitions_of("train")


def test_principal_components() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=(300, 6)) @ random.normal(size=(6, 6)) + 5
    found = principal_components(z, 4)
    _, _, axes = np.linalg.svd(z - z.mean(0))
    expected = (z - z.mean(0)) @ axes[:4].T
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(principal_components(z, 4, whiten=True).std(0), 1, rtol=1e-4)
    assert principal_components(z, 64).shape == (300, 6)


class TestDistortions:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def of(self, **settings: Any) -> torch.Tensor:
        return Distortions(**settings)(self.x, np.random.default_rng(0))

    def test_none(self) -> None:
        assert torch.equal(self.of(), self.x)

    def test_flips(self) -> None:
        for found, original in zip(self.of(flip=True, flip_vertical=True), self.x, strict=True):
            turned = [original.flip(axes) for axes in ((), (1,), (2,), (1, 2))]
            assert sum(torch.allclose(found, one, atol=1e-5) for one in turned) == 1

    def test_a_shift_moves_what_is_there_and_brings_in_zeros(self) -> None:
        spot = torch.zeros(200, 1, 9, 9)
        spot[:, :, 4, 4] = 1
        found = Distortions(shift=0.25)(spot, np.random.default_rng(0))[:, 0]
        places = torch.stack([found.sum(axis) @ torch.arange(9.0) for axis in (1, 2)], 1) / found.sum((1, 2))[:, None]
        assert (places - 4).abs().max() <= 9 * 0.25 + 1e-4
        assert (places - 4).abs().max() > 2
        assert (places[:, 0] - places[:, 1]).abs().max() > 1

    def test_a_crop_enlarges_and_a_window_beyond_the_image_shrinks(self) -> None:
        white = torch.ones(20, 1, 8, 8)
        assert torch.allclose(Distortions(area=(0.3, 0.9))(white, np.random.default_rng(0)), white, atol=1e-5)
        small = Distortions(area=(4.0, 4.0))(white, np.random.default_rng(0))
        assert small.sum((1, 2, 3)).tolist() == pytest.approx([16.0] * 20, abs=1e-3)

    def test_zeroed_pixels_of_all_channels(self) -> None:
        found = self.of(zeroed=0.5, rescaled=True)
        gone = (found == 0).all(1)
        assert torch.equal(gone, (found == 0).any(1))
        assert 0.4 < gone.float().mean() < 0.6
        assert torch.allclose(found[~gone[:, None].expand_as(found)], 2 * self.x[~gone[:, None].expand_as(found)])

    def test_erased_is_one_rectangle(self) -> None:
        gone = (Distortions(erased=1.0)(torch.ones(50, 1, 20, 20), np.random.default_rng(0)) == 0)[:, 0]
        for one in gone:
            rows, columns = one.any(1), one.any(0)
            assert torch.equal(one, rows[:, None] & columns)
        assert 0 < gone.float().mean() < 0.35

    def test_colours(self) -> None:
        assert self.of(grey=1.0).std(1).abs().max() < 1e-6
        kept = self.of(contrast=0.5).mean((1, 2, 3))
        assert torch.allclose(kept, self.x.mean((1, 2, 3)), atol=1e-5)
        ratio = (self.of(brightness=0.5) / self.x).flatten(1)
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4)
        assert 0.5 <= ratio.min() < 0.9 < 1.1 < ratio.max() <= 1.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Instances(source()), "unsupervised: nothing distorts the images"),
        (lambda: Instances(source(), shift=1.5), "unsupervised.shift=1.5: must be from 0 to 1"),
        (lambda: Instances(source(), area=[2.0, 1.0]), "unsupervised.area"),
        (lambda: cactus(source(), clusters=72).sampler("train", TASK, 0, CPU), r"unsupervised: of the 72 clusters .* 5"),
        (lambda: cactus(source(), clusters=4).sampler("val", TASK, 0, CPU),
         r"of the 3 clusters of the val images .* a task needs 5; set unsupervised.clusters to 8, or test.task.ways lower, or .*=labels$"),
        (lambda: umtra(source()).sampler("train", TaskShape(200, 1, 1), 0, CPU), r"train.task.ways=200: .* 144 images"),
        (lambda: umtra(source()).sampler("val", TaskShape(1, 1, 1), 0, CPU), "has one answer"),
        (lambda: umtra(source()).sampler("val", TaskShape(5, (1, 2), 1), 0, CPU), r"one shape.*: unsupervised.validation=labels$"),
        (lambda: umtra(source()).sampler("train", TaskShape(5, (1, 2), 1), 0, CPU), r"^train.task.shots=.1,2.: .* set it to one number$"),
        (lambda: umtra(source()).sampler("val", TaskShape(5, 1, 1, query_dirichlet=2.0), 0, CPU),
         r"^test.task.query_dirichlet=2: .* equally many queries; leave it null, or .*: unsupervised.validation=labels$"),
        (lambda: umtra(source()).sampler("train", TaskShape(5, 1, 1, min_items=3), 0, CPU),
         r"^train.task.min_items=3: .* test.task.min_items=3 is of test tasks alone$"),
        (lambda: Cactus(source(), components=None), "unsupervised.components=null"),
        (lambda: Cactus(source(), embedding="nowhere").sampler("train", TASK, 0, CPU), "unsupervised.embedding=nowhere"),
        (lambda: cactus(source([1])).sampler("train", TaskShape(2, 1, 1), 0, CPU),
         r"^unsupervised: there is 1 training image, and a task of train.task.ways=2 needs 4"),
        (lambda: cactus(source([12])).sampler("train", TaskShape(5, 1, 2), 0, CPU),
         r"^unsupervised: there are 12 training images, and a task of train.task.ways=5 needs 15"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(build: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_dirichlet_shares_and_small_classes_are_of_labelled_tasks() -> None:
    own = source()
    task = TaskShape(5, 1, 1, query_dirichlet=2.0, min_items=3)
    made = umtra(own, validation="labels")
    for split in ("val", "test"):
        one, other = (data.sampler(split, task, 0, CPU)(0, 4) for data in (made, own))  # type: ignore[arg-type]
        assert isinstance(one, Episodes)
        assert isinstance(other, Episodes)
        same(one, other)
    assert umtra(own).sampler("val", replace(task, query_dirichlet=None), 0, CPU)(0, 4).n_tasks == 4


def test_a_head_that_starts_at_prototypes() -> None:
    words = [
        "backbone.channels=4",
        "backbone.norm=group",
        "backbone.downsample=stride",
        "task.queries=3",
        "task.shots=2",
    ]
    config = compose("algo=prototransfer", *words)
    algorithm = build(config, source()).double().eval()
    found = source().sampler("test", TASK, 0, CPU)(0, 3)
    double = Episodes(*(t.double() if t.is_floating_point() else t for t in found.tensors), ways=5)
    support, queries = algorithm.embed(double)
    prototypes = class_means(support, double.support_y, 5)
    start, one, last = algorithm.predict_after(double, [0, 1, 15])
    distances = negative_squared_distances(queries, prototypes)
    torch.testing.assert_close(start.log_softmax(-1), distances.log_softmax(-1))
    assert torch.equal(algorithm.predict(double), last)
    task = 1  # alone, by torch's own layer
    head = torch.nn.Linear(support.shape[-1], 5).double()
    head.weight.data, head.bias.data = 2 * prototypes[task].detach(), -prototypes[task].detach().square().sum(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.001)
    order = torch.Generator().manual_seed(0)
    for epoch in range(15):
        for chosen in torch.randperm(10, generator=order).split(5):
            optimizer.zero_grad()
            F.cross_entropy(head(support[task, chosen].detach()), double.support_y[task, chosen]).backward()
            optimizer.step()
        if epoch == 0:
            torch.testing.assert_close(one[task], head(queries[task]).detach())
    torch.testing.assert_close(last[task], head(queries[task]).detach())


def test_a_run_says_which_labels_were_read(tmp_path: Path) -> None:
    words = ["unsupervised=umtra", f"outputs={tmp_path}", *SMALL]
    assert metarun(*words).status == 0
    first = run_folder(tmp_path)
    told = result(first)["protocol"]
    assert told["labels_read"] == "none of the training images; none selects the weights"
    assert told["seen"]["train"].startswith("tasks made up of the training images without their labels")
    assert result(first)["data"]["unsupervised"]["distortions"] == {"shift": 0.2, "zeroed": 0.5}
    other = tmp_path / "other"
    embedded = [
        "unsupervised=cactus",
        "unsupervised.partitions=1",
        "unsupervised.clusters=40",
        f"unsupervised.embedding={first}",
    ]
    assert metarun(*embedded, "unsupervised.validation=labels", f"outputs={other}", *SMALL).status == 0
    told = result(run_folder(other))
    assert told["protocol"]["labels_read"].endswith("those of the validation classes select the weights")
    assert told["data"]["unsupervised"]["its labels"] == "none of the training images; none selects the weights"


def test_a_run_says_which_labels_made_what_it_began_with(tmp_path: Path) -> None:
    """An embedding or first weights of a supervised run are no training without labels, nor are those of a run after it."""
    none = "none of the training images; none selects the weights"
    assert metarun(f"outputs={tmp_path / 'labels'}", *SMALL).status == 0
    labels = run_folder(tmp_path / "labels")
    made = result(labels)
    # As if a library's weights had been trained on.
    made["protocol"]["backbone"] = {
        "name": "net",
        "saw": "imagenet",
        "saw_these_classes": "no",
    }
    (labels / "result.json").write_text(json.dumps(made))
    few = ["unsupervised=cactus", "unsupervised.partitions=1", "unsupervised.clusters=40"]
    started = ["unsupervised=umtra", f"backbone.from={labels}"]
    for name, words, saying in (
        ("embedded", [*few, f"unsupervised.embedding={labels}"], "unsupervised.embedding: it was trained with labels"),
        ("started", started, "backbone.from: it was trained with labels"),
    ):
        assert metarun(*words, f"outputs={tmp_path / name}", *SMALL).status == 0
        folder = run_folder(tmp_path / name)
        told = result(folder)["protocol"]["labels_read"]
        assert told == f"{none}; {saying}"
        # What embeds the images is no part of the network.
        assert result(folder)["protocol"].get("backbone", {}).get("name") == ("net" if name == "started" else None)
    on = ["unsupervised=umtra", f"backbone.from={folder}"]
    assert metarun(*on, f"outputs={tmp_path / 'on'}", *SMALL).status == 0
    assert result(run_folder(tmp_path / "on"))["protocol"]["labels_read"] == told
    # Weights that were trained with labels do not become those of a way without them.
    said = {}
    for origin in (labels, folder):
        said[origin] = metarun(
            "recipe=test", f"checkpoint={origin}", "unsupervised=umtra", f"outputs={tmp_path / 'given'}"
        )
        assert (tmp_path / "given").exists() == (origin == folder)
    assert "unsupervised=umtra: a checkpoint brings how its training tasks were made" in said[labels].err
    assert result(run_folder(tmp_path / "given"))["protocol"]["labels_read"] == told
    # Test tasks are not made up: without the run that embeds, only validation tasks for the temperature are lacking.
    embedded = run_folder(tmp_path / "embedded")
    labels.rename(tmp_path / "elsewhere")
    outcome = metarun("recipe=test", f"checkpoint={embedded}", "test.episodes=3", f"outputs={tmp_path / 'test'}")
    assert outcome.status == 0, outcome.err
    assert (
        f"for want of validation tasks (unsupervised.embedding={labels}: there is no such run"
        in outcome.out + outcome.err
    )
    tested = result(run_folder(tmp_path / "test"))
    assert tested["test/calibration"]["temperature"] is None
    assert tested["protocol"]["labels_read"] == f"{none}; unsupervised.embedding: it was trained with labels"


def test_images_of_ones_own_without_labels(tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", classes=5)
    for part in ("train", "val"):
        (root / part / f"{part}_all").mkdir()
        for place, path in enumerate(sorted(root.glob(f"{part}/{part}[0-9]*/*.png"))):
            path.rename(root / part / f"{part}_all" / f"{place}.png")
        for empty in root.glob(f"{part}/{part}[0-9]*"):
            empty.rmdir()
    words = ["data=folder", f"data.root={root}", "data.image_size=16", "unsupervised=prototransfer_photos"]
    done = metarun(*words, "algo=prototransfer", f"outputs={tmp_path / 'out'}", *SMALL)
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["data.labels=none"],
            "data.labels: these data have no such setting; to train without labels take unsupervised=umtra",
        ),
        (["data=sinusoid", "unsupervised=umtra", "algo=maml", "backbone=mlp"], "unsupervised: makes tasks of items"),
        (["data=[glyphs,digits]", "unsupervised=umtra", "algo=maml", "task.ways=2"], "of the items of one data set"),
        (["unsupervised=umtra", "algo=baseline"], "unsupervised: withholds the labels"),
        (
            ["unsupervised=umtra", "task.labelled_share=0.5"],
            "train.task.labelled_share=0.5: unsupervised makes training tasks of one shape, of pseudo-labelled items alone; set it to 1",
        ),
        (
            ["unsupervised=umtra", "train.task.unlabelled=2"],
            "train.task.unlabelled=2: unsupervised makes training tasks",
        ),
        (["unsupervised=umtra", "test.task.shots=[1,3]"], "test.task.shots=[1,3]: unsupervised makes validation tasks"),
        (
            ["unsupervised=umtra", "recipe=meta_transfer", "target=digits", "transfer=tradaboost"],
            "unsupervised: withholds the labels of the data, but TrAdaBoost (transfer) reads those of the source",
        ),
        (["unsupervised=umtr"], "unsupervised=umtr: there is no such choice; did you mean umtra"),
        (["unsupervised=umtra", "unsupervised.shif=1"], "unsupervised.shif"),
    ],
)
def test_refusals_at_the_shell(words: list[str], said: str, tmp_path: Path) -> None:
    done = metarun(*words, f"outputs={tmp_path / 'out'}")
    assert done.status == 2
    *_, line = done.said  # before it others may tell how a target is read
    assert said in line
    assert not (tmp_path / "out").exists()


def test_published_numbers_with_labels_are_not_those_without() -> None:
    tasks_ = {"ways": 5, "shots": 1, "queries": 15}
    choices: dict[str, Any] = {"algo": "maml", "data": "omniglot", "backbone": "conv4", "unsupervised": "umtra"}
    assert str(find(choices, tasks_)).startswith("83.80 %")
    assert find({**choices, "unsupervised": "prototransfer"}, tasks_) is None
    assert str(find({**choices, "unsupervised": None}, tasks_)).startswith("98.7")


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "metarun" / "unsupervised" / "README.md").read_text()
    for name, content in re.findall(r"`([\w./]+)`[^`]*:\n\n```(?:python|yaml)\n(.*?)^```", text, re.M | re.S):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = metarun("--config-dir", "my_conf", "unsupervised=halves", "outputs=out", *SMALL)
    assert done.status == 0, done.err
    assert issubclass(__import__("halves").Halves, PseudoTasks)


def test_a_librarys_network_embeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place one that is made here: a linear map with fixed weights."""
    from metarun.backbones.pixels import Pixels

    made: dict[str, Any] = {}

    def network(shape: tuple[int, ...], **settings: Any) -> Pixels:
        made.update(settings)
        return Pixels(shape)

    monkeypatch.setattr("metarun.unsupervised.cactus.Pretrained", network)
    data = cactus(source(), network="timm:some", weights="file.pth")
    assert made == {"name": "timm:some", "weights": "file.pth", "checksum": None, "standardized": False}
    assert data.how()["embedding"] == "timm:some"
    assert len(set(map(tuple, data.partitions_of("train").T))) == 12
    with pytest.raises(UserError, match="both embedding= and network="):
        cactus(source(), network="timm:some", embedding=str(tmp_path))


def test_the_number_of_clusters_is_told_as_it_is() -> None:
    data = cactus(source([12, 8]), clusters=500)
    assert data.how()["clusters"] == data.partitions_of("train").max() + 1 == 20


def test_word_pieces_are_no_points_to_cluster() -> None:
    rows = [LabelledText(f"{name} {number}", name, "", "", "") for name in "abc" for number in range(2)]
    with pytest.raises(UserError, match=r"the items are texts.*; add encoder=minilm or encoder=tfidf$"):
        Cactus(TextSource(rows, {"train": ["a"], "val": ["b"], "test": ["c"]}))


def test_vectors_of_an_encoder_are_clustered_and_not_distorted() -> None:
    class Flat(Encoder):
        item, features = "image", 144

        def identity(self) -> dict[str, Any]:
            return {}

        def encode(self, items: Any) -> torch.Tensor:
            return torch.from_numpy(np.array(items)).float().flatten(1)

    data = EncodedSource(source(), Flat(), Encoding(**ENCODING_DEFAULTS))
    clustered = cactus(data)
    assert len(set(map(tuple, clustered.partitions_of("train").T))) == 12
    assert tasks(clustered).support_x.shape == (4, 10, *data.input_shape)
    same(tasks(clustered, "test"), tasks(data, "test"))
    with pytest.raises(UserError, match="distorts images, but the items are vectors"):
        umtra(data)
