"""MNIST, digits, MedMNIST and Caltech-101: their parts, splits and mistakes. And changes of training images."""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import labelled_files as files
import numpy as np
import pytest
import torch
from helpers import table
from hydra.utils import get_class
from omegaconf import OmegaConf
from shell import harm_archive

from metarun.config.folder import CONF
from metarun.core import TaskShape
from metarun.data import caltech101, mnist
from metarun.data.augment import Augment
from metarun.data.caltech101 import Caltech101
from metarun.data.digits import Digits
from metarun.data.folder import Folder
from metarun.data.image_ops import drawn
from metarun.data.image_source import ImageSource
from metarun.data.medmnist import RELEASES, MedMnist
from metarun.data.mnist import Mnist
from metarun.data.text import Text
from metarun.errors import UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BREASTS = (546, 78, 156)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path))
    return tmp_path


def values(source: ImageSource, part: str) -> set[int]:
    """The values of the images of a part, of images of one value each."""
    return set(source.table.images[source.labelled(part).rows].max((1, 2, 3)).tolist())  # type: ignore[arg-type]


def error(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# MNIST


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 images for training of values 0 to 199, and 30 for testing of values 0 to 29."""
    monkeypatch.setattr(mnist, "COUNTS", {"train": 200, "t10k": 30})
    files.mnist(tmp_path / "mnist", mnist.COUNTS, mnist.SIDE)
    return tmp_path / "mnist"


def test_mnist_keeps_its_test_images_and_holds_out_a_tenth_of_the_others(small_mnist: Path) -> None:
    source = Mnist(download=False, normalize=False)
    assert source.table.metadata["parts"] == {"train": [18] * 10, "val": [2] * 10, "test": [3] * 10}
    assert values(source, "test") == set(range(30))
    assert values(source, "train") | values(source, "val") == set(range(200))
    assert not values(source, "train") & values(source, "val")
    for part in ("train", "val", "test"):
        images = source.labelled(part)  # type: ignore[arg-type]
        found = source.table.images[images.rows].max((1, 2, 3))
        assert (found % 10 == images.labels).all()


def test_mnist_of_another_size_and_colours(small_mnist: Path) -> None:
    source = Mnist(image_size=32, channels=3, normalize=False)
    assert source.input_shape == (3, 32, 32)
    assert values(source, "test") == set(range(30))


def test_digits_of_mnist_are_divided_for_episodes(small_mnist: Path) -> None:
    source = Mnist(ratios=[0.4, 0.3, 0.3])
    assert [len(source.splits[split]) for split in ("train", "val", "test")] == [4, 3, 3]
    assert source.describe()["split"] == "classes drawn by split_seed 0"
    drawn_anew = Mnist(split_seed=1, ratios=[0.4, 0.3, 0.3])
    assert drawn_anew.describe()["split"] == "classes drawn by split_seed 1"
    assert list(drawn_anew.splits["test"]) != list(source.splits["test"])
    assert source.describe()["parts"] == {"train": 180, "val": 20, "test": 30}  # however many of each class


def test_the_fixed_draw_takes_a_share_of_each_class() -> None:
    labels = np.arange(1000) % 10
    chosen = drawn(labels, 0.3, "a")
    assert np.bincount(labels[chosen]).tolist() == [30] * 10
    assert (chosen == drawn(labels, 0.3, "a")).all()
    assert (chosen != drawn(labels, 0.3, "b")).any()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "not a whole gzip file"),
        ("train-images-idx3-ubyte.gz", files.idx(np.zeros((200, 28, 28), np.uint8))[:-20], "not a whole gzip file"),
        ("train-labels-idx1-ubyte.gz", files.idx(np.zeros((200, 28, 28), np.uint8)), "not an IDX file of 1-dim"),
        (
            "t10k-images-idx3-ubyte.gz",
            files.idx(np.zeros((29, 28, 28), np.uint8)),
            "shape [29, 28, 28], MNIST has [30, 28, 28]",
        ),
        ("t10k-labels-idx1-ubyte.gz", files.idx(np.full(30, 11, np.uint8)), "there is a label 11"),
        (  # whose end, which is cut off, is never come to
            "t10k-labels-idx1-ubyte.gz",
            files.idx(np.zeros(30, np.uint8)) + gzip.compress(bytes(10**7))[:-20],
            "holds more than 30 bytes for shape [30], MNIST has [30]",
        ),
    ],
    ids=["no-gzip", "cut-short", "images-as-labels", "another-count", "a-label-too-many", "more-than-the-memory"],
)
def test_broken_mnist_is_one_line(small_mnist: Path, file: str, content: bytes, says: str) -> None:
    (small_mnist / file).write_bytes(content)
    message = error(Mnist)
    assert says in message
    assert file in message


def test_missing_mnist_says_where_it_is_got(tmp_path: Path) -> None:
    message = error(lambda: Mnist(root=str(tmp_path / "nowhere"), download=False))
    assert "nowhere/train-images-idx3-ubyte.gz is missing; put it there from https://ossci-datasets" in message


def test_a_changed_file_makes_a_new_table(small_mnist: Path) -> None:
    before = Mnist().describe()["fingerprint"]
    files.write(small_mnist / "t10k-images-idx3-ubyte.gz", files.idx(np.full((30, 28, 28), 9, np.uint8)))
    assert Mnist().describe()["fingerprint"] != before


# Digits


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source = Digits(image_size=8, normalize=False)
    parts = source.table.metadata["parts"]
    assert np.sum(list(parts.values()), axis=0).tolist() == np.bincount(load_digits().target).tolist()
    assert [sum(parts[split]) for split in ("train", "val", "test")] == [1151, 287, 359]
    assert min(parts["test"]) >= 34
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    for digit in range(10):
        mine = source.table.images[source.table.offsets[digit] : source.table.offsets[digit + 1], 0]
        theirs = original[load_digits().target == digit]
        assert sorted(image.tobytes() for image in mine) == sorted(image.tobytes() for image in theirs)


def test_digits_are_enlarged_to_mnists_size() -> None:
    source = Digits()
    assert source.input_shape == (1, 28, 28)
    batch = source.labelled("train").whole(CPU)
    assert batch.x.std() == pytest.approx(1, abs=0.05)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "needs scikit-learn, whose digits these are, but sklearn is not installed: pip" in error(Digits)


# MedMNIST


def test_medmnist_keeps_its_parts(tmp_path: Path) -> None:
    files.medmnist(tmp_path / "medmnist" / "breastmnist.npz", BREASTS, 2)
    source = MedMnist(flag="breastmnist", download=False, normalize=False)
    assert source.table.metadata["parts"] == {"train": [273, 273], "val": [39, 39], "test": [78, 78]}
    assert source.table.names == ["malignant", "normal or benign"]
    assert [values(source, part) for part in ("train", "val", "test")] == [{0, 10}, {1, 11}, {2, 12}]
    assert "not the published file" in source.describe()["file"]


def test_two_classes_are_in_every_split(tmp_path: Path) -> None:
    files.medmnist(tmp_path / "medmnist" / "breastmnist.npz", BREASTS, 2)
    source = MedMnist(flag="breastmnist")
    assert [list(source.splits[split]) for split in ("train", "val", "test")] == [[0, 1]] * 3
    assert source.describe()["split"] == "all 2 classes in every split, too few to divide"
    episodes = source.sampler("test", TaskShape(2, 1, 3), 0, CPU)(0, 2)
    assert episodes.query_x.shape == (2, 6, 1, 28, 28)


def test_coloured_medmnist_of_another_resolution(tmp_path: Path) -> None:
    files.medmnist(tmp_path / "retinamnist_64.npz", (1080, 120, 400), 5, (64, 64, 3))
    source = MedMnist(flag="retinamnist", root=str(tmp_path), resolution=64, image_size=16)
    assert source.input_shape == (3, 16, 16)
    assert sorted(map(len, source.splits.values())) == [1, 1, 3]
    grey = MedMnist(flag="retinamnist", root=str(tmp_path), resolution=64, image_size=16, channels=1)
    assert grey.input_shape == (1, 16, 16)


def test_medmnists_published_table_is_whole() -> None:
    assert len(RELEASES) == 11
    sums = [checksum for release in RELEASES.values() for checksum in release.checksums]
    assert len(set(sums)) == 44
    assert {len(checksum) for checksum in sums} == {32}
    assert RELEASES["pneumoniamnist"].images == (4708, 524, 624)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("chestmnist", "several labels"),
        ("organmnist3d", "two-dimensional images alone"),
        ("pneumonia", "did you mean pneumoniamnist?"),
        ("cats", "there are pathmnist, "),
    ],
)
def test_flags_that_cannot_be(flag: str, says: str) -> None:
    message = error(lambda: MedMnist(flag=flag))
    assert message.startswith(f"data.flag={flag}: ")
    assert says in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_images": None}, "not a whole npz file of MedMNIST's"),
        ({"test_images": np.zeros((155, 28, 28), np.uint8)}, "test holds uint8 images [155, 28, 28]"),
        ({"test_images": np.zeros((156, 28, 28), np.float32)}, "test holds float32 images"),
        ({"train_labels": np.zeros((546, 14), np.uint8)}, "and labels [546, 14], published are uint8"),
        ({"val_labels": np.full((78, 1), 2, np.uint8)}, "val holds a label beyond 0 to 1"),
        ({"val_labels": np.full((78, 1), None, object)}, "not a whole npz file of MedMNIST's"),
    ],
)
def test_other_medmnist_is_one_line(tmp_path: Path, changes: dict[str, np.ndarray], says: str) -> None:
    path = files.medmnist(tmp_path / "medmnist" / "breastmnist.npz", BREASTS, 2, **changes)
    message = error(lambda: MedMnist(flag="breastmnist"))
    assert says in message
    assert str(path) in message


def test_broken_and_missing_medmnist_are_one_line(tmp_path: Path) -> None:
    path = files.medmnist(tmp_path / "medmnist" / "breastmnist.npz", BREASTS, 2)
    harm_archive(path, "more than the memory")
    message = error(lambda: MedMnist(flag="breastmnist"))
    assert "not a whole npz file of MedMNIST's (train_images.npy is to have 4,294,967,294 bytes, and" in message
    path.write_bytes(path.read_bytes()[:2000])
    assert "not a whole npz file" in error(lambda: MedMnist(flag="breastmnist"))
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)  # no archive of arrays, but one array
    assert "not a whole npz file" in error(lambda: MedMnist(flag="breastmnist"))
    path.unlink()
    message = error(lambda: MedMnist(flag="breastmnist", download=False))
    assert (
        "breastmnist.npz is missing; put it there from https://zenodo.org/records/10519652/files/breastmnist.npz"
        in message
    )
    assert "data.resolution=32: is not one of 28, 64, 128, 224" in error(
        lambda: MedMnist(flag="breastmnist", resolution=32)
    )


# Caltech-101


def write_caltech(form: str, root: Path) -> str:
    """The archive in one of its forms; returns the name that is told."""
    if form == "official":
        return files.caltech_official(root / "caltech-101.zip").name
    if form == "tar":
        return files.write(root / "101_ObjectCategories.tar.gz", files.caltech_tar()).name
    if form == "zip":
        return files.caltech_zip(root / "caltech101_84.zip").name
    top = root if form == "root" else root / "caltech-101" / "101_ObjectCategories"
    for name, raw in files.caltech_members():
        files.write(top / name, raw)
    return top.name


@pytest.mark.parametrize("form", ["official", "tar", "zip", "folder", "root"])
def test_caltech_in_every_form(tmp_path: Path, form: str) -> None:
    name = write_caltech(form, tmp_path / "caltech101")
    source = Caltech101(image_size=files.SIDE, download=False, normalize=False)
    assert source.describe()["files"] == name
    assert len(source.table.names) == 100
    assert not {"BACKGROUND_Google", "Faces_easy"} & set(source.table.names)
    assert source.table.images.max((1, 2, 3)).tolist() == list(range(200))  # by class and by file name
    assert source.describe()["classes"] == {"train": 64, "val": 16, "test": 20}


def test_grey_caltech_turned(tmp_path: Path) -> None:
    files.caltech_zip(tmp_path / "caltech101" / "caltech101_84.zip")
    source = Caltech101(image_size=5, channels=1, rotations=True)
    assert source.input_shape == (1, 5, 5)
    assert source.describe()["classes"]["train"] == 256


def test_broken_caltech_is_one_line(tmp_path: Path) -> None:
    root = tmp_path / "caltech101"
    assert "put caltech-101.zip there from https://data.caltech.edu" in error(lambda: Caltech101(download=False))
    path = files.caltech_zip(root / "caltech101_84.zip", classes=99)
    assert "caltech101_84.zip holds 99 classes besides BACKGROUND_Google and Faces_easy" in error(Caltech101)
    harm_archive(path, "more than the memory")
    assert "is not a whole archive (caltech101_84/accordion/image_0002.jpg is to have" in error(Caltech101)
    path.write_bytes(path.read_bytes()[:3000])
    assert "caltech101_84.zip is not a whole archive" in error(Caltech101)
    files.write(root / "101_ObjectCategories.tar.gz", files.caltech_tar())
    with mock.patch.object(caltech101, "LARGEST_PICTURE", 10):
        assert " bytes, and 10 are the most here); get it again" in error(Caltech101)
    for stop in (3000, -10):
        files.write(root / "101_ObjectCategories.tar.gz", files.caltech_tar()[:stop])
        assert "101_ObjectCategories.tar.gz is not a whole archive" in error(Caltech101)
    files.write(root / "101_ObjectCategories.tar.gz", b"no archive")
    assert "101_ObjectCategories.tar.gz is not a whole archive" in error(Caltech101)
    files.write(root / "101_ObjectCategories" / "accordion" / "image_0001.jpg", files.encoded(0, form="JPEG")[:200])
    assert "accordion/image_0001.jpg is not a whole image" in error(Caltech101)


# Settings


@pytest.mark.parametrize("make", [Mnist, Digits, lambda **given: MedMnist(flag="breastmnist", **given), Caltech101])
def test_settings_that_no_image_has(make: Callable[..., object]) -> None:
    assert error(lambda: make(channels=2)) == "data.channels=2: is not one of 1, 3"
    assert "data.image_size=0: must be at least 1" in error(lambda: make(image_size=0))


def test_ratios_are_checked() -> None:
    assert "data.ratios" in error(lambda: Digits(ratios=[0.5, 0.5]))


# Augmentation


def grid(count: int, side: int = 8) -> torch.Tensor:
    """Images `[count, 1, side, side]` all of whose pixels differ and none of which is 0."""
    return (1 + torch.arange(float(side * side))).view(1, 1, side, side).repeat(count, 1, 1, 1)


def test_no_change_is_asked_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    x = grid(2)
    assert Augment()(x) is x
    assert "pip install 'metarun[augment]'" in error(lambda: Augment(flip=True))


def test_flips_half_of_the_images() -> None:
    torch.manual_seed(0)
    x = grid(200)
    y = Augment(flip=True)(x)
    flipped = (y == x.flip(-1)).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) ^ flipped).all()
    assert 70 < flipped.sum() < 130


def test_crops_are_windows_of_the_padded_image() -> None:
    torch.manual_seed(0)
    x = grid(300)
    y = Augment(crop=2)(x)
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    windows = {
        tuple(padded[0, top : top + 8, left : left + 8].flatten().tolist()) for top in range(5) for left in range(5)
    }
    found = {tuple(image.flatten().tolist()) for image in y}
    assert found == windows  # 25 places, 300 draws


def test_jitter_is_one_factor_and_one_shift_for_each_image() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 4, 4)
    y = Augment(jitter=0.3)(x).flatten(1)
    x = x.flatten(1)
    factor = (y[:, 1] - y[:, 0]) / (x[:, 1] - x[:, 0])
    shift = y[:, 0] - factor * x[:, 0]
    torch.testing.assert_close(y, factor[:, None] * x + shift[:, None], atol=1e-3, rtol=0)
    for centre, drawn_ in ((1, factor), (0, shift)):
        assert (drawn_ - centre).abs().max() < 0.301
        assert (drawn_ - centre).max() > 0.2
        assert (drawn_ - centre).min() < -0.2


def test_a_seed_repeats_the_changes_and_the_images_stay() -> None:
    augment = Augment(crop=1, flip=True, jitter=0.2)
    x = torch.randn(16, 3, 6, 6)
    before = x.clone()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(x, before)
    assert augment(torch.randn(2, 1, 9, 9, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.parametrize("settings", [{"crop": -1}, {"jitter": 1.0}, {"jitter": -0.1}])
def test_augmentation_beyond_its_ranges(settings: dict[str, float]) -> None:
    assert error(lambda: Augment(**settings)).startswith(f"augment.{next(iter(settings))}=")  # type: ignore[arg-type]


def test_a_crop_that_pads_by_more_than_the_image() -> None:
    assert "augment.crop=9: is more than the side of images of 8x8" in error(lambda: Augment(crop=9)(grid(1)))


def test_a_constant_channel_has_the_least_deviation_and_not_none() -> None:
    for level in (104, 37, 250):
        images = np.full((8, 3, 4, 4), level, np.uint8)
        images[:, 0] = np.arange(8)[:, None, None]
        source = ImageSource(
            table(images, [4, 4]), {"train": range(2), "val": range(2), "test": range(2)}, normalize=True
        )
        mean, deviation = source.measured(np.arange(8))
        assert mean[1] == pytest.approx(level / 255)
        assert deviation[1:].tolist() == [1e-3, 1e-3]


def test_a_data_set_that_is_a_target_too_is_named_as_one() -> None:
    """Where its classes are too few for tasks, a line says how these themselves are told apart."""
    for file in sorted((CONF / "target").glob("*.yaml")):
        (data,) = re.findall(r"- /data@data: (\w+)", file.read_text())
        cls: Any = get_class(OmegaConf.load(CONF / "data" / f"{data}.yaml")["_target_"])
        if cls not in (Folder, Text, MedMnist):  # which tell their settings too
            assert cls.as_target == f"target={file.stem}"
    with pytest.raises(UserError, match=r"these 10 classes themselves apart: recipe=target_only target=digits$"):
        Digits().sampler("val", TaskShape(3, 1, 1), 0, CPU)
