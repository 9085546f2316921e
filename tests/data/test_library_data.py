"""Data sets of torchvision and learn2learn: our tables hold what their own classes yield, from files in their formats."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import pickle
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from library_files import WRITERS, cifarfs, draw, emnist, mini_imagenet, mnist
from PIL import Image
from shell import metarun, result, run_folder

from metarun import optional as peers
from metarun.core import TaskShape
from metarun.data.library import Library
from metarun.data.library_catalog import RELEASES
from metarun.errors import UserError

MODES = {"train": "train", "validation": "val", "test": "test"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries are imported, and torchvision takes our files for the published ones."""
    peers.learn2learn()
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *arguments, **options: True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("the library was imported")

    monkeypatch.setattr(peers, "torchvision", never)
    monkeypatch.setattr(peers, "learn2learn", never)


def open_torchvision(dataset: str, root: Path, **settings: Any) -> Library:
    return Library(library="torchvision", dataset=dataset, root=str(root), **settings)


def open_learn2learn(dataset: str, root: Path, **settings: Any) -> Library:
    return Library(library="learn2learn", dataset=dataset, root=str(root), **settings)


def theirs(library: str, dataset: str) -> Any:
    """The library's own class."""
    module = peers.learn2learn().vision if library == "learn2learn" else peers.torchvision()
    return getattr(module.datasets, dataset)


def pixels(image: Any) -> bytes:
    """The colours of an image of theirs, `[3, H, W]`."""
    if isinstance(image, torch.Tensor):
        return image.numpy().astype(np.uint8).tobytes()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()


def classes(source: Library, split: str) -> Counter[tuple[bytes, ...]]:
    """The images of each class of a split, as often as there are such classes."""
    table = source.table
    found = Counter()
    for index in source.splits[split]:
        images = table.images[table.offsets[index] : table.offsets[index + 1]]
        found[tuple(sorted(np.broadcast_to(image, (3, *image.shape[1:])).tobytes() for image in images))] += 1
    return found


def test_every_release_is_written() -> None:
    assert set(WRITERS) == {(library, dataset) for library, releases in RELEASES.items() for dataset in releases}


@pytest.mark.parametrize(("library", "dataset"), WRITERS, ids=lambda name: name)
def test_table_is_what_the_library_yields(library: str, dataset: str, root: Path) -> None:
    make, count = WRITERS[library, dataset]
    make(root)
    source = Library(library=library, dataset=dataset, root=str(root), image_size=96 if dataset == "STL10" else None)
    expected: dict[str, dict[Any, list[bytes]]] = defaultdict(lambda: defaultdict(list))
    release = RELEASES[library][dataset]
    for part in release.parts:
        own = theirs(library, dataset)(root=str(root), **release.options, **part)
        for number in range(len(own)):
            image, label = own[number]
            if part == {"background": False}:  # counts its characters from 0 again
                label += 964
            expected[MODES.get(part.get("mode", ""), "all")][int(label)].append(pixels(image))
    found = {split: classes(source, split) for split in source.splits}
    if not release.divided:
        assert all(found.values())
        found = {"all": found["train"] + found["val"] + found["test"]}
    for split, members in expected.items():
        assert found[split] == Counter(tuple(sorted(images)) for images in members.values())
    assert sum(source.describe()["images"].values()) == count
    assert list(source.describe()["classes"].values()) == list(release.classes) or len(release.classes) == 1
    assert sum(source.describe()["classes"].values()) == sum(release.classes)
    owners = [index for indices in source.splits.values() for index in indices]
    assert len(set(owners)) == len(owners)


# Images


def test_grey_and_colour(root: Path) -> None:
    mnist("MNIST")(root)
    assert open_torchvision("MNIST", root).input_shape == (1, 8, 8)
    assert open_torchvision("MNIST", root, channels=3).input_shape == (3, 8, 8)
    WRITERS["learn2learn", "CUBirds200"][0](root)  # some of each
    birds = open_learn2learn("CUBirds200", root)
    assert birds.input_shape == (3, 8, 8)
    grey = open_learn2learn("CUBirds200", root, channels=1)
    red, green, blue = birds.table.images.astype(float).mean((2, 3)).T
    brightness = np.sort(0.299 * red + 0.587 * green + 0.114 * blue)
    np.testing.assert_allclose(np.sort(grey.table.images.mean((1, 2, 3))), brightness, atol=1)


@pytest.mark.parametrize(("shape", "size"), [((20, 20), 20), ((84, 84), 84), ((85, 85), 84), ((30, 20), 84)])
def test_size_is_that_of_small_squares(root: Path, shape: tuple[int, int], size: int) -> None:
    for number in range(10):
        path = draw(root / "eurosat" / "2750" / f"Land{number}" / "1.png")
        Image.new("RGB", shape, (number, 0, 0)).save(path)
    source = open_torchvision("EuroSAT", root)
    assert source.input_shape == (3, size, size)
    assert source.table.images[:, 0].reshape(10, -1).mean(1).tolist() == list(range(10))


def test_given_size_keeps_the_middle(root: Path) -> None:
    for number in range(10):
        path = draw(root / "eurosat" / "2750" / f"Land{number}" / "1.png")
        image = Image.new("RGB", (90, 30), (0, 0, 0))
        image.paste((250, 0, 0), (30, 0, 60, 30))
        image.save(path)
    source = open_torchvision("EuroSAT", root, image_size=6)
    assert source.input_shape == (3, 6, 6)
    assert source.table.images[:, 0].min() > 230


def test_images_without_a_label_are_left_out(root: Path) -> None:
    folder = root / "fer2013"
    folder.mkdir()
    row = " ".join(["7"] * 48 * 48)
    (folder / "train.csv").write_text("emotion,pixels\n" + "".join(f"{label},{row}\n" for label in range(7)))
    (folder / "test.csv").write_text(f"pixels\n{row}\n")
    assert open_torchvision("FER2013", root).table.sizes.tolist() == [1] * 7


def test_order_on_disk_says_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["learn2learn", "FullOmniglot"][0](root)
    WRITERS["learn2learn", "CUBirds200"][0](root)

    def described(dataset: str, seed: int = 0) -> dict[str, Any]:
        return open_learn2learn(dataset, root, split_seed=seed).describe()

    usual = [described("FullOmniglot"), described("CUBirds200")]
    listdir = os.listdir
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    assert [described("FullOmniglot"), described("CUBirds200")] == usual
    assert described("FullOmniglot", seed=1)["fingerprint"] != usual[0]["fingerprint"]


def test_episodes_are_of_the_split(root: Path) -> None:
    mini_imagenet(root)
    source = open_learn2learn("MiniImagenet", root, normalize=False)
    images = source.sampler("val", TaskShape(16, 1, 1), 0, torch.device("cpu"))(0, 1)
    drawn = (torch.cat([images.support_x, images.query_x], 1)[0] * 255).round().byte().numpy()
    own = theirs("learn2learn", "MiniImagenet")(root=str(root), mode="validation")
    assert sorted(map(bytes, drawn)) == sorted(pixels(own[number][0]) for number in range(32))


# Splits


def test_omniglot_is_divided_as_by_learn2learn(root: Path) -> None:
    WRITERS["torchvision", "Omniglot"][0](root)
    for library, dataset in (("learn2learn", "FullOmniglot"), ("torchvision", "Omniglot")):
        source = Library(library=library, dataset=dataset, root=str(root), split_seed=3)
        assert source.describe()["classes"] == {"train": 1100, "val": 100, "test": 423}
        assert source.describe()["split"] == "classes drawn by split_seed 3"
        assert {"background3/c300", "evaluation1/c100"} < set(source.table.names)


def test_classes_by_ratios_and_by_lists(root: Path) -> None:
    mnist("MNIST")(root)
    source = open_torchvision("MNIST", root, ratios=[0.3, 0.3, 0.4])
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 3, "val": 3, "test": 4}
    lists = {"train_classes": ["7 - seven", "1 - one"], "val_classes": ["0 - zero"], "test_classes": ["2 - two"]}
    source = open_torchvision("MNIST", root, **lists)
    found = {f"{split}_classes": [source.table.names[i] for i in indices] for split, indices in source.splits.items()}
    assert found == lists
    assert source.describe()["split"] == "classes as listed"
    with pytest.raises(UserError, match=r"^data.test_classes: MNIST has no class 2 - tow; did you mean 2 - two\?$"):
        open_torchvision("MNIST", root, train_classes=["1 - one"], test_classes=["2 - tow"])


def test_own_splits_stay(root: Path) -> None:
    mini_imagenet(root)
    source = open_learn2learn("MiniImagenet", root)
    names = [[source.table.names[index] for index in indices] for indices in source.splits.values()]
    assert [{name.rstrip("0123456789") for name in found} for found in names] == [
        {"ntrain"},
        {"nvalidation"},
        {"ntest"},
    ]
    assert source.describe()["split"] == "learn2learn's own"
    for setting in ({"ratios": [0.5, 0.3, 0.2]}, {"train_classes": ["ntrain0"]}):
        with pytest.raises(
            UserError, match=r"^data.ratios, train_classes, .*: learn2learn itself divides MiniImagenet$"
        ):
            open_learn2learn("MiniImagenet", root, **setting)


# The cache


@pytest.mark.parametrize("dataset", ["CIFARFS", "MiniImagenet"])  # of the first learn2learn makes files of others
def test_second_time_the_library_stays_away(root: Path, dataset: str, request: pytest.FixtureRequest) -> None:
    WRITERS["learn2learn", dataset][0](root)
    before = open_learn2learn(dataset, root).describe()
    request.getfixturevalue("no_library")
    assert open_learn2learn(dataset, root).describe() == before


def test_other_files_or_settings_make_another_table(root: Path, request: pytest.FixtureRequest) -> None:
    mnist("MNIST")(root)
    mnist("KMNIST")(root)
    first = open_torchvision("MNIST", root)
    mnist("MNIST")(root)
    second = open_torchvision("MNIST", root)
    assert second.table.fingerprint != first.table.fingerprint
    request.getfixturevalue("no_library")
    draw(root / "KMNIST" / "raw" / "more.png")  # of another data set
    assert open_torchvision("MNIST", root).table.fingerprint == second.table.fingerprint
    for settings in ({"image_size": 9}, {"channels": 3}, {"options": {"x": 1}}, {"root": "other"}):
        if "root" in settings:
            shutil.copytree(root / "MNIST", root / "other" / "MNIST")
            settings = {"root": str(root / "other")}
        with pytest.raises(AssertionError, match="the library was imported"):
            Library(**{"library": "torchvision", "dataset": "MNIST", "root": str(root), **settings})


def test_full_disk_is_named(root: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def write(self, pixels: memoryview) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mnist("MNIST")(root)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", lambda dir: contextlib.nullcontext(FullDisk()))
        with pytest.raises(
            UserError, match=r"^data cache .*: cannot be written \(No space left on device\); set METARUN"
        ):
            open_torchvision("MNIST", root)
    assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"]
    assert open_torchvision("MNIST", root).input_shape == (1, 8, 8)


# Options


def test_options_reach_the_library(root: Path) -> None:
    emnist(root)
    WRITERS["torchvision", "FGVCAircraft"][0](root)
    letters = open_torchvision("EMNIST", root, options={"split": "letters"})
    assert letters.table.names == [chr(97 + number) for number in range(26)]
    families = open_torchvision("FGVCAircraft", root, options={"annotation_level": "family"})
    assert len(families.table.names) == 70


def test_options_crop_birds(root: Path) -> None:
    WRITERS["learn2learn", "CUBirds200"][0](root)
    images = root / "cubirds200" / "CUB_200_2011" / "images"
    paths = [path.relative_to(images) for path in sorted(images.rglob("*.jpg"))]
    numbered = list(enumerate(paths, 1))
    (images.parent / "images.txt").write_text("".join(f"{number} {path}\n" for number, path in numbered))
    (images.parent / "bounding_boxes.txt").write_text("".join(f"{number} 1.0 2.0 4.0 4.0\n" for number, _ in numbered))
    options = {"bounding_box_crop": True}
    cropped = open_learn2learn("CUBirds200", root, options=options)
    assert cropped.input_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("library", "dataset", "option", "complaint"),
    [
        ("torchvision", "FGVCAircraft", "annotation_levle", r"no such setting; did you mean annotation_level\?$"),
        ("torchvision", "MNIST", "train", "torchvision's MNIST has no such setting; it has none$"),
        ("torchvision", "MNIST", "root", "no such setting; it has none$"),
        ("learn2learn", "CUBirds200", "mode", "it has bounding_box_crop, include_imagenet_duplicates$"),
        ("torchvision", "EMNIST", "spilt", "data.dataset=EMNIST: torchvision cannot read it .*spilt"),
    ],
)
def test_wrong_options(root: Path, library: str, dataset: str, option: str, complaint: str) -> None:
    WRITERS[library, dataset][0](root)
    with pytest.raises(UserError, match=complaint):
        Library(library=library, dataset=dataset, root=str(root), options={option: 1})


# Downloads


def fake_download(monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]) -> None:
    """torchvision's MNIST downloads what `make` makes below its root, and talks."""

    def download(data: Any) -> None:
        print("Downloading")
        if not data._check_exists():
            make(Path(data.root))

    monkeypatch.setattr(theirs("torchvision", "MNIST"), "download", download)


def test_download_is_the_library_s(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def make(folder: Path) -> None:
        mnist("MNIST")(folder)
        draw(folder / "leftover.png")

    fake_download(monkeypatch, make)
    monkeypatch.setenv("METARUN_DATA", str(root))
    settings: dict[str, Any] = {"library": "torchvision", "dataset": "MNIST"}
    with pytest.raises(UserError, match=rf"there is no MNIST in {root}/torchvision; .* with data.download=true$"):
        Library(**settings)
    mnist("MNIST")(root / "torchvision" / ".MNIST.download")  # of a download that was killed
    file = "MNIST/raw/train-images-idx3-ubyte"
    before = (root / "torchvision" / ".MNIST.download" / file).read_bytes()
    source = Library(**settings, download=True)
    assert (root / "torchvision" / file).read_bytes() != before
    assert source.table.images.shape == (30, 1, 8, 8)
    assert sorted(os.listdir(root / "torchvision")) == [".MNIST.lock", "MNIST"]
    assert capsys.readouterr().out == ""
    fake_download(monkeypatch, lambda folder: pytest.fail("downloaded again"))
    assert Library(**settings, download=True, image_size=9).table.images.shape == (30, 1, 9, 9)


def test_failed_download_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> None:
        draw(folder / "MNIST" / "raw" / "half.png")
        raise RuntimeError("Error downloading it:\nTried one, tried two")

    fake_download(monkeypatch, fails)
    complaint = (
        rf"^data.dataset=MNIST: torchvision cannot download it \(Error downloading it:\); .* put it into {root}$"
    )
    with pytest.raises(UserError, match=complaint):
        open_torchvision("MNIST", root, download=True)
    assert os.listdir(root) == [".MNIST.lock"]


def test_what_cannot_be_downloaded(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^data.download: torchvision cannot download FER2013; put fer2013 into {root}$"
    ):
        open_torchvision("FER2013", root, download=True)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^data root .*file/root: cannot be written \(Not a directory\), but MNIST"):
        open_torchvision("MNIST", tmp_path / "file" / "root", download=True)


# Mistakes


def test_classes_that_are_missing_are_counted(root: Path) -> None:
    cifarfs(root)
    open_learn2learn("CIFARFS", root)
    shutil.rmtree(root / "cifarfs" / "processed" / "val" / "val_3")  # as after a kill while it was made
    os.utime(root / "cifarfs" / "cifar100" / "splits" / "bertinetto" / "val.txt", ns=(1, 1))
    complaint = r"CIFARFS: .*/root holds 15 val classes, published are 16; cifarfs may be incomplete$"
    with pytest.raises(UserError, match=complaint):
        open_learn2learn("CIFARFS", root)
    (root / "MNIST" / "raw").mkdir(parents=True)
    complaint = (
        r"^data.dataset=MNIST: torchvision cannot read it \(Dataset not found\..*\); if MNIST in .* is incomplete"
    )
    with pytest.raises(UserError, match=complaint):
        open_torchvision("MNIST", root)


def test_broken_files(root: Path) -> None:
    mini_imagenet(root)
    (root / "mini-imagenet-cache-test.pkl").write_bytes(b"<html>404</html>")
    with pytest.raises(
        UserError, match=r"^data.dataset=MiniImagenet: learn2learn cannot read it \(.*\); if mini-imagenet"
    ):
        open_learn2learn("MiniImagenet", root)
    WRITERS["torchvision", "EuroSAT"][0](root)
    (root / "eurosat" / "2750" / "Land1" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"EuroSAT: torchvision cannot read image 3 of \{\} in .*Land1/2.jpg"):
        open_torchvision("EuroSAT", root)


def test_pixels_that_are_no_bytes(root: Path) -> None:
    mini_imagenet(root)
    path = root / "mini-imagenet-cache-train.pkl"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, "image_data": content["image_data"] / 255}))
    with pytest.raises(UserError, match="not whole numbers from 0 to 255"):
        open_learn2learn("MiniImagenet", root)


def test_missing_libraries(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist("MNIST")(root)
    mini_imagenet(root)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(UserError, match=r"pip install 'metarun\[torchvision\]'"):
            open_torchvision("MNIST", root)
        patch.setitem(sys.modules, "learn2learn", None)
        patch.setattr(peers, "learn2learn", inspect.unwrap(peers.learn2learn))  # without what it remembers
        with pytest.raises(UserError, match=r"scripts/install_learn2learn\.sh"):
            open_learn2learn("MiniImagenet", root)
        patch.delitem(sys.modules, "torchvision")
        patch.setattr(peers, "torchvision", lambda: type("Old", (), {"datasets": object()}))
        with pytest.raises(UserError, match=r"MNIST: the torchvision installed is too old to have it$"):
            open_torchvision("MNIST", root)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"channels": 2}, "data.channels=2: is not one of 1, 3"),
        ({"image_size": 0}, "data.image_size=0: must be at least 1"),
        ({"ratios": [0.5, 0.5]}, r"data.ratios=\[0.5, 0.5\]: must have 3 values"),
    ],
)
def test_wrong_settings(root: Path, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        open_torchvision("MNIST", root, **settings)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "data.dataset: must be given (data.dataset=...)"),
        (
            ["data.dataset=MNITS"],
            "data.dataset=MNITS: is no data set of torchvision that metarun knows; did you mean MNIST",
        ),
        (
            ["data.dataset=VOC"],
            "data.dataset=VOC: is no data set of torchvision that metarun knows; there are CIFAR10, ",
        ),
        (
            ["data.dataset=MNIST", "data.library=torchvison"],
            "data.library=torchvison: is not one of learn2learn, torchvision",
        ),
        (["data.dataset=MNIST", "data.root=/no/such"], "data.dataset=MNIST: there is no MNIST in /no/such; put "),
    ],
)
def test_command_refuses_in_one_line(words: list[str], complaint: str) -> None:
    outcome = metarun("data=torchvision", *words)
    assert outcome.status == 2
    (line,) = outcome.said
    assert line.startswith(f"metarun: {complaint}")


def test_command(root: Path, tmp_path: Path) -> None:
    mini_imagenet(root)
    emnist(root)
    small = ["data.image_size=16", "backbone.channels=4", "train.steps=2", "train.validate_episodes=2", "task.ways=3",
             "train.task.ways=3", "task.shots=1", "task.queries=1", "train.task.queries=1", "test.episodes=4",
             "test.baseline_episodes=0"]  # fmt: skip
    words = ["data=learn2learn", "data.dataset=MiniImagenet", f"data.root={root}", f"outputs={tmp_path / 'a'}"]
    assert metarun(*words, *small).status == 0
    found = result(run_folder(tmp_path / "a"))["data"]
    assert (found["dataset"], found["split"]) == ("learn2learn MiniImagenet", "learn2learn's own")
    assert found["classes"] == {"train": 64, "val": 16, "test": 20}
    words = ["data=torchvision", "data.dataset=EMNIST", f"data.root={root}", "data.options={split: letters}"]
    assert metarun(*words, *small, "data.rotations=true", f"outputs={tmp_path / 'b'}").status == 0
    assert result(run_folder(tmp_path / "b"))["data"]["classes"] == {"train": 68, "val": 16, "test": 20}
