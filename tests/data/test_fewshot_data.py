"""CIFAR-FS, FC100, mini- and tiered-ImageNet and CUB in every form in which they are distributed."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import re
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import labelled_files as files
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from metarun.core import TaskShape
from metarun.data import cifar100 as cifar100_module
from metarun.data import fewshot, pickles
from metarun.data.fewshot import RELEASES, FewShot
from metarun.data.image_ops import picture
from metarun.errors import UserError

FEW = {"train": 4, "val": 2, "test": 3}
FORMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cifar_fs folders": ("cifar_fs", lambda root: files.cifar_fs(root, FEW)),
    "cifar_fs as learn2learn": ("cifar_fs", lambda root: files.cifar_fs(root / "cifarfs" / "cifar100", FEW)),
    "cifar_fs pickles": ("cifar_fs", lambda root: files.data_and_labels(root, "CIFAR_FS_{}.pickle", FEW)),
    "cifar_fs torchmeta": ("cifar_fs", lambda root: files.torchmeta_cifar(root / "cifar100", "cifar-fs", FEW)),
    "fc100 pickles": ("fc100", lambda root: files.data_and_labels(root, "FC100_{}.pickle", FEW)),
    "fc100 torchmeta": ("fc100", lambda root: files.torchmeta_cifar(root, "fc100", FEW)),
    "mini_imagenet": ("mini_imagenet", lambda root: files.mini_imagenet(root, FEW)),
    "mini_imagenet as learn2learn": ("mini_imagenet", lambda root: files.mini_imagenet(root, FEW, "validation")),
    "mini_imagenet torchmeta": ("mini_imagenet", lambda root: files.torchmeta(root / "miniimagenet", FEW, False)),
    "tiered_imagenet": ("tiered_imagenet", lambda root: files.tiered_imagenet(root / "tiered-imagenet", FEW)),
    "tiered_imagenet of Zenodo": (
        "tiered_imagenet",
        lambda root: files.tiered_imagenet(root, FEW, "tiered-imagenet-"),
    ),
    "tiered_imagenet torchmeta": ("tiered_imagenet", lambda root: files.torchmeta(root, FEW, True)),
    "cub torchmeta": ("cub", lambda root: files.torchmeta(root / "cub", FEW, True)),
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks of as many classes as `FEW` has."""
    for name, release in RELEASES.items():
        monkeypatch.setitem(fewshot.RELEASES, name, release._replace(classes=tuple(FEW.values())))  # type: ignore[arg-type]


def error(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(tmp_path: Path, form: str) -> None:
    dataset, write = FORMS[form]
    write(tmp_path / dataset)
    source = FewShot(dataset=dataset, image_size=files.SIDE, normalize=False)
    assert source.describe()["classes"] == FEW
    assert source.table.sizes.tolist() == [2] * 9
    expected = [value for split in FEW for number in range(FEW[split]) for value in files.pair(number)]
    assert source.table.images.max((1, 2, 3)).tolist() == expected
    assert (source.table.images == source.table.images[:, :1, :1, :1]).all()
    assert source.describe()["split"].startswith("classes as published (")
    episodes = source.sampler("val", TaskShape(2, 1, 1), 0, torch.device("cpu"))(0, 1)
    assert episodes.support_x.shape == (1, 2, 3, files.SIDE, files.SIDE)


@pytest.mark.usefixtures("few")
def test_size_channels_and_turns(tmp_path: Path) -> None:
    files.mini_imagenet(tmp_path / "mini", FEW)
    assert FewShot(dataset="mini_imagenet", root=str(tmp_path / "mini")).input_shape == (3, 84, 84)
    source = FewShot(dataset="mini_imagenet", root=str(tmp_path / "mini"), image_size=4, channels=1, rotations=True)
    assert source.input_shape == (1, 4, 4)
    assert source.describe()["classes"] == {split: 4 * count for split, count in FEW.items()}


def test_every_other_bird_is_for_training(tmp_path: Path) -> None:
    files.cub(tmp_path / "cub" / "CUB_200_2011")
    source = FewShot(dataset="cub", image_size=2)
    names = {split: [source.table.names[number] for number in numbers] for split, numbers in source.splits.items()}
    assert names == {
        "train": [f"{number:03}.Bird" for number in range(1, 201, 2)],
        "val": [f"{number:03}.Bird" for number in range(2, 201, 4)],
        "test": [f"{number:03}.Bird" for number in range(4, 201, 4)],
    }
    assert source.table.images[source.table.offsets[100]].max() == files.pair(1)[0]


@pytest.mark.parametrize("dataset", RELEASES)
def test_yaml_names_its_data_set(dataset: str) -> None:
    path = Path(__file__).parents[2] / "conf" / "data" / f"{dataset}.yaml"
    settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert settings == {"_target_": "metarun.data.fewshot.FewShot", "dataset": dataset}


# Mistakes


def test_unknown_and_missing_data_sets() -> None:
    assert "did you mean mini_imagenet, " in error(lambda: FewShot(dataset="miniimagenet"))
    for dataset in RELEASES:
        message = error(lambda dataset=dataset: FewShot(dataset=dataset))  # type: ignore[misc]
        assert f"/{dataset}; put there " in message
        assert "https://" in message


def test_another_number_of_classes(tmp_path: Path) -> None:
    files.mini_imagenet(tmp_path / "mini_imagenet", FEW)
    message = error(lambda: FewShot(dataset="mini_imagenet", image_size=2))
    assert "mini-imagenet-cache-train.pkl gives 4 classes for train, published are 64; get the files again: " in message
    files.cub(tmp_path / "cub", 199)
    assert "gives 49 classes for test, published are 50" in error(lambda: FewShot(dataset="cub", image_size=2))


@pytest.mark.usefixtures("few")
def test_a_missing_split_is_missing_data(tmp_path: Path) -> None:
    files.tiered_imagenet(tmp_path / "tiered_imagenet", FEW)
    (tmp_path / "tiered_imagenet" / "val_labels.pkl").unlink()
    missing = tmp_path / "tiered_imagenet" / "val_labels.pkl"
    says = error(lambda: FewShot(dataset="tiered_imagenet"))
    assert f"its files are not all in {missing.parent}; beside those that are there only " in says
    assert says.endswith("val_labels.pkl is missing")


@pytest.mark.parametrize("names", [("train.csv", "val.csv"), ("train.txt", "test.txt"), ("train/", "test/")])
def test_the_list_or_the_folder_that_is_missing_is_named(names: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "cub"
    for name in names:
        files.write(root / (f"{name}a/0.png" if name.endswith("/") else name), b"")
    (left,) = {"train", "val", "test"} - {name.strip("/").partition(".")[0] for name in names}
    says = error(lambda: FewShot(dataset="cub"))
    assert says.endswith(f"only {root / left}{Path(names[0]).suffix} is missing")


def test_files_in_no_form_are_told_all_forms() -> None:
    says = error(lambda: FewShot(dataset="cub"))
    for form in (
        "CUB_200_2011.tgz",
        "train.csv, val.csv and test.csv",
        "class folders",
        "train_data.hdf5 and train_labels.json",
    ):
        assert form in says


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"images": []}, "there is no 'image_data' in it"),
        ([1, 2], "there is no 'image_data' in it"),
        ({"image_data": files.blocks(1, 2), "class_dict": {"n0": [0, 2]}}, "there are 2 images, and n0 names number 2"),
        (
            {"image_data": files.blocks(1).astype(np.float32), "class_dict": {"n0": [0]}},
            "n0 holds float32 [1, 6, 6, 3] instead of",
        ),
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, content: object, says: str) -> None:
    files.mini_imagenet(tmp_path / "mini_imagenet", FEW)
    files.write(tmp_path / "mini_imagenet" / "mini-imagenet-cache-train.pkl", pickle.dumps(content))
    assert says in error(lambda: FewShot(dataset="mini_imagenet"))


@pytest.mark.usefixtures("few")
def test_other_broken_files(tmp_path: Path) -> None:
    files.data_and_labels(root := tmp_path / "fc100", "FC100_{}.pickle", FEW)
    files.write(root / "FC100_val.pickle", pickle.dumps({"data": files.blocks(1, 2), "labels": [1]}))
    assert "FC100_val.pickle: 2 images and 1 labels" in error(lambda: FewShot(dataset="fc100"))
    files.tiered_imagenet(root := tmp_path / "tiered_imagenet", FEW)
    files.write(root / "test_images_png.pkl", pickle.dumps([np.zeros((9, 1), np.uint8)] * 6))
    assert "n000: image 0 is not a whole image" in error(lambda: FewShot(dataset="tiered_imagenet"))
    files.cifar_fs(root := tmp_path / "cifar_fs", FEW)
    (root / "data" / "val001" / "002.png").write_bytes(b"no image")
    assert "val001/002.png is not a whole image" in error(lambda: FewShot(dataset="cifar_fs"))
    files.write(root / "splits" / "bertinetto" / "test.txt", "test000\nelsewhere\n")
    (root / "data" / "val001" / "002.png").unlink()
    assert "there are no images in" in error(lambda: FewShot(dataset="cifar_fs"))
    files.write(root / "splits" / "bertinetto" / "train.txt", b"\xff\xff")
    assert "train.txt is not a text file" in error(lambda: FewShot(dataset="cifar_fs"))


@pytest.mark.usefixtures("few")
def test_broken_hdf5_and_no_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cub"
    files.torchmeta(root, FEW, True)
    files.write(root / "val_labels.json", '["n000", "nobody"]')
    assert "val_data.hdf5 with val_labels.json are not whole files" in error(lambda: FewShot(dataset="cub"))
    files.write(root / "train_data.hdf5", b"no HDF5")
    assert "train_data.hdf5 with train_labels.json are not whole files" in error(lambda: FewShot(dataset="cub"))
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "needs h5py, but h5py is not installed: pip install 'metarun[hdf5]'" in error(lambda: FewShot(dataset="cub"))


# Pickles


class Trap:
    """Unpickled by Python's own reader it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.usefixtures("few")
def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    files.mini_imagenet(tmp_path / "mini_imagenet", FEW)
    trap = pickle.dumps({"image_data": Trap(tmp_path / "sprung"), "class_dict": {}})
    files.write(tmp_path / "mini_imagenet" / "mini-imagenet-cache-train.pkl", trap)
    message = error(lambda: FewShot(dataset="mini_imagenet"))
    assert "it asks for posix.mkdir" in message
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()


ARRAYS = {
    "rows": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "Fortran's order": np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
    "big-endian": np.arange(4, dtype=">i4"),
    "bool": np.array([True, False]),
    "text": np.array(["ab", "c"]),
    "bytes": np.array([b"ab", b"c"]),
    "none": np.empty((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    whole = {"arrays": ARRAYS, "others": [1, 2.5, None, True, "x", b"raw\xff", (1, 2), np.int64(7), np.float32(0.5)]}
    found = pickles.load(files.write(tmp_path / "a.pkl", pickle.dumps(whole, protocol)), "x")
    assert found["others"] == [1, 2.5, None, True, "x", b"raw\xff", [1, 2], 7, 0.5]
    for name, array in ARRAYS.items():
        assert found["arrays"][name].dtype == array.dtype
        np.testing.assert_array_equal(found["arrays"][name], array)


def test_an_array_that_python_2_wrote(tmp_path: Path) -> None:
    """numpy.array([1, 200], uint8), by cPickle's protocol 2, whose strings are bytes."""
    raw = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x02\x01\xc8tbs."
    )
    assert pickle.loads(raw, encoding="latin1")["data"].tolist() == [1, 200]
    assert pickles.load(files.write(tmp_path / "a.pkl", raw), "x")["data"].tolist() == [1, 200]


@pytest.mark.parametrize(
    "raw",
    [
        pickle.dumps(np.array([{}, []], dtype=object)),
        pickle.dumps(np.zeros(2, "datetime64[s]")),
        pickle.dumps(np.zeros(2, [("a", "u1")])),
        pickle.dumps(print),
        pickle.dumps(functools.reduce(lambda inner, _: [inner] * 10, range(6), list[Any]())),
        pickle.dumps(files.blocks(1, 2))[:-40],
        b"no pickle",
        b"",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cnumpy\nndarray\n(K\x01tR.",
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, raw: bytes) -> None:
    path = files.write(tmp_path / "a.pkl", raw)
    assert error(lambda: pickles.load(path, "x")).startswith(f"data x: {path} is not a whole pickle of arrays (")


@pytest.mark.parametrize(("raw", "told"), [(b"xx", "120 is no code of a pickle"), (b"", "it ends too early")])
def test_what_is_wrong_with_a_pickle_is_told_in_words(tmp_path: Path, raw: bytes, told: str) -> None:
    path = files.write(tmp_path / "a.pkl", raw)
    assert error(lambda: pickles.load(path, "x")) == f"data x: {path} is not a whole pickle of arrays ({told})"


def test_a_place_of_the_memo_that_is_far_away_takes_no_memory(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a.pkl", b"\x80\x02]r\x00\x00\x00\x01K\x07a.")  # [7], kept as the 16,777,216th
    tracemalloc.start()
    try:
        assert pickles.load(path, "x") == [7]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# CIFAR-100 as its authors publish it


def cifar100(
    root: Path, *, python2: bool = False, change: Callable[[dict[str, Any]], object] = lambda parts: None
) -> Path:
    """Three images of each class, two in train and one in test: the value of an image of class c is c, c + 100 or c + 150."""
    names = sorted(" ".join(cifar100_module.CLASSES["fc100"].values()).split())
    text = (lambda word: word.encode()) if python2 else (lambda word: word)
    parts: dict[str, Any] = {"meta": {text("fine_label_names"): [text(name) for name in names]}}
    for part, offsets in {"train": (0, 100), "test": (150,)}.items():
        labels = [number for _ in offsets for number in reversed(range(100))]
        values = [offset + number for offset in offsets for number in reversed(range(100))]
        data = np.repeat(np.array(values, np.uint8)[:, None], 3072, 1)
        data[:, :1024] = 255  # red first, then green and blue
        parts[part] = {text("data"): data, text("fine_labels"): labels, text("coarse_labels"): [0] * len(labels)}
    change(parts)
    for part, content in parts.items():
        files.write(root / part, pickle.dumps(content, protocol=2 if python2 else 4))
    return root


def packed(folder: Path, archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "cifar-100-python")
    return archive


@pytest.fixture
def three_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar100_module, "PER_CLASS", 3)


@pytest.mark.usefixtures("three_images")
@pytest.mark.parametrize("python2", [True, False])
@pytest.mark.parametrize("form", ["folder", "folder itself", "archive", "unpacked archive"])
@pytest.mark.parametrize(("dataset", "counts"), [("cifar_fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_official_cifar100(tmp_path: Path, dataset: str, counts: tuple[int, ...], form: str, python2: bool) -> None:
    folder = cifar100(tmp_path / "data" / "cifar-100-python", python2=python2)
    root = folder if form == "folder itself" else folder.parent
    if form == "archive":
        root = packed(folder, tmp_path / "archive" / "cifar-100-python.tar.gz").parent
    if form == "unpacked archive":
        archive = packed(folder, tmp_path / "archive" / "cifar-100-python.tar.gz")
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()
        root = archive.parent
    source = FewShot(dataset=dataset, root=str(root), normalize=False)
    assert tuple(source.describe()["classes"].values()) == counts
    assert source.table.images.shape == (300, 3, 32, 32)
    assert sorted(source.table.names) == sorted(" ".join(cifar100_module.CLASSES[dataset].values()).split())
    assert (source.table.images[:, 0] == 255).all()
    official = sorted(source.table.names)
    for number, name in enumerate(source.table.names):
        first = source.table.offsets[number]
        label = official.index(name)
        assert source.table.images[first : first + 3, 1, 0, 0].tolist() == [label, label + 100, label + 150]


def test_the_lists_are_the_published_ones() -> None:
    fs, fc = (cifar100_module.CLASSES[name] for name in ("cifar_fs", "fc100"))
    assert [len(names.split()) for names in (*fs.values(), *fc.values())] == [64, 16, 20, 60, 20, 20]
    for lists in (fs, fc):
        assert len(set(" ".join(lists.values()).split())) == 100
    assert {"baby", "bed", "whale", "worm"} <= set(fs["test"].split())
    # Of FC100 whole superclasses are for testing: aquatic mammals, insects, medium-sized mammals and people.
    assert {"dolphin", "bee", "fox", "baby", "boy", "girl", "man", "woman"} <= set(fc["test"].split())


@pytest.mark.usefixtures("three_images")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts: parts["train"].pop("data"), "there is no 'data' in it, so it is not CIFAR-100"),
        (lambda parts: parts["meta"].pop("fine_label_names"), "there is no 'fine_label_names' in it"),
        (
            lambda parts: parts["meta"].update(fine_label_names=["cat", "dog"]),
            "its classes are not the 100 of CIFAR-100",
        ),
        (
            lambda parts: parts["test"].update(fine_labels=[0] * 100),
            "published are 3 images of 3,072 bytes of each class",
        ),
        (lambda parts: parts["test"].update(data=np.zeros((99, 3072), np.uint8)), "holds uint8 images [299, 3072]"),
        (lambda parts: parts.update(test=[1, 2]), "there is no 'data' in it"),
    ],
)
def test_another_cifar_is_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    folder = cifar100(tmp_path / "data" / "cifar-100-python", change=change)
    message = error(lambda: FewShot(dataset="fc100", root=str(folder)))
    assert message.startswith(f"data fc100: {folder}")
    assert says in message


@pytest.mark.usefixtures("three_images")
def test_broken_archives_of_cifar(tmp_path: Path) -> None:
    folder = cifar100(tmp_path / "data" / "cifar-100-python")
    archive = packed(folder, tmp_path / "archive" / "cifar-100-python.tar.gz")
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-6], b"no archive"):
        archive.write_bytes(content)
        assert "not a whole archive" in error(lambda: FewShot(dataset="fc100", root=str(archive.parent)))
    (folder / "meta").unlink()
    packed(folder, archive)
    assert "there is no cifar-100-python/meta in it" in error(
        lambda: FewShot(dataset="fc100", root=str(archive.parent))
    )
    with tarfile.open(archive, "w:gz") as file:
        evil = tarfile.TarInfo("cifar-100-python/train")
        evil.type, evil.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(evil)
    assert "there is no cifar-100-python/train in it" in error(
        lambda: FewShot(dataset="fc100", root=str(archive.parent))
    )
    cifar100(folder)
    (folder / "train").write_bytes(pickle.dumps(Evil()))
    packed(folder, archive)
    assert "it asks for" in error(lambda: FewShot(dataset="fc100", root=str(archive.parent)))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


# Images beside lists of classes


def images_and_tables(root: Path, flat: bool, suffix: str = ".jpg") -> None:
    """`images/` with tables of file and label, as Ravi and Larochelle's; two images of each class are in no table."""
    for split, count in FEW.items():
        lines = ["filename,label"]
        for number in range(count):
            kind = f"{split}{number:02}"
            for image, value in enumerate((*files.pair(number), 250, 251)):
                name = f"{kind}{image:08}{suffix}"
                files.write(root / "images" / ("" if flat else kind) / name, files.encoded(value))
                lines += [f"{name},{kind}"] * (image < 2)
        files.write(root / f"{split}.csv", "\n".join(lines) + "\n")


def class_folders(root: Path, kind: str, place: str = "") -> None:
    """Folders of classes, the images of each in two places, and lists of the classes of each split."""
    for split, count in FEW.items():
        names = [f"n{split}{number}" for number in range(count)]
        for number, name in enumerate(names):
            for part, value in zip(("a", "b"), files.pair(number), strict=True):
                files.write(root / part / name / f"{value}.png", files.encoded(value))
        if kind == "csv":  # of files that are not there
            text = "filename,label\n" + "".join(
                f"{name}0000{image}.jpg,{name}\n" for name in names for image in range(3)
            )
        else:
            text = "\n".join(names) + "\n"
        files.write(root / place / f"{split}.{kind}", text)


@pytest.mark.parametrize("dataset", ["mini_imagenet", "cub"])
def test_class_folders_hold_images_of_any_format_and_not_what_systems_put_there(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"train": 4, "val": 2, "test": 2}
    monkeypatch.setitem(fewshot.RELEASES, dataset, RELEASES[dataset]._replace(classes=tuple(counts.values())))
    divided = dataset == "mini_imagenet"  # CUB's classes lie in one folder
    homes = [
        tmp_path / part if divided else tmp_path / "images" for part, count in counts.items() for _ in range(count)
    ]
    folders = [home / f"n{number}" for number, home in enumerate(homes)]
    for folder in folders:
        for number, form in enumerate(("WEBP", "BMP", "TIFF", "PNG")):
            files.write(folder / f"{number}.{form.lower()}", files.encoded(number, form=form))
        for other in ("list.txt", "Thumbs.db", "@eaDir/a.jpg"):
            files.write(folder / other, b"-")
    for litter in ("@eaDir", "__MACOSX"):
        files.write(homes[0] / litter / "a.jpg", files.encoded(1))
    source = FewShot(dataset=dataset, root=str(tmp_path), image_size=files.SIDE)
    assert source.table.sizes.tolist() == [4] * 8
    assert {*source.table.names} == {folder.name for folder in folders}


LISTED: dict[str, Callable[[Path], None]] = {
    "flat images and tables": lambda root: images_and_tables(root, True),
    "images in folders and tables": lambda root: images_and_tables(root, False),
    "class folders and tables": lambda root: class_folders(root, "csv"),
    "class folders and texts": lambda root: class_folders(root, "txt"),
    "class folders and texts in a folder": lambda root: class_folders(root, "txt", "splits"),
}


@pytest.mark.usefixtures("few")
def test_words_after_the_number_of_a_class_are_left(tmp_path: Path) -> None:
    number = 0
    for split, count in FEW.items():
        names = [f"n{number + one:08d}" for one in range(count)]
        number += count
        files.write(tmp_path / "mini" / f"{split}.txt", "".join(f"{name} house finch, a bird\n" for name in names))
        for name in names:
            files.write(tmp_path / "mini" / "all" / name / "0.png", files.encoded(number))
    source = FewShot(dataset="mini_imagenet", root=str(tmp_path / "mini"), image_size=files.SIDE)
    assert source.table.names[0] == "n00000000"
    assert source.describe()["classes"] == FEW


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dataset", ["mini_imagenet", "tiered_imagenet", "cub"])
@pytest.mark.parametrize("form", LISTED)
def test_images_beside_lists(tmp_path: Path, dataset: str, form: str) -> None:
    LISTED[form](tmp_path / "data")
    source = FewShot(dataset=dataset, root=str(tmp_path / "data"), image_size=files.SIDE, normalize=False)
    assert source.describe()["classes"] == FEW
    assert source.table.sizes.tolist() == [2] * 9
    expected = [value for split in FEW for number in range(FEW[split]) for value in files.pair(number)]
    assert source.table.images.max((1, 2, 3)).tolist() == expected
    assert re.fullmatch(r"classes as in train\.\w+, val\.\w+, test\.\w+", source.describe()["split"])
    before = source.describe()["fingerprint"]
    image = sorted(path for path in (tmp_path / "data").rglob("*") if path.suffix in (".png", ".jpg"))[0]
    image.write_bytes(files.encoded(99))
    changed = FewShot(dataset=dataset, root=str(tmp_path / "data"), image_size=files.SIDE, normalize=False)
    assert changed.describe()["fingerprint"] != before


@pytest.mark.usefixtures("few")
def test_outlines_in_folders_called_like_the_classes_are_no_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "cub", "txt")
    for folder in sorted((tmp_path / "cub" / "a").iterdir()):
        files.write(tmp_path / "cub" / "segmentations" / folder.name / "0.png", files.encoded(255))
    assert FewShot(dataset="cub", image_size=files.SIDE).table.sizes.tolist() == [2] * 9


def moved_behind_link(folder: Path, elsewhere: Path) -> None:
    """Moves a folder to another place and leaves a link to it."""
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("form", "behind"),
    [
        ("flat images and tables", "images"),
        ("images in folders and tables", "images/test00"),
        ("class folders and tables", "a"),
        ("class folders and texts", "b/ntest0"),
        ("class folders and texts in a folder", "a/ntrain0"),
    ],
)
def test_folders_behind_links_are_looked_through(tmp_path: Path, form: str, behind: str) -> None:
    """A link to a folder above, as some tools leave it, is no way without end."""
    root = tmp_path / "data"
    LISTED[form](root)
    moved_behind_link(root / behind, tmp_path / "elsewhere" / Path(behind).name)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (root / "again").symlink_to(root)

    def read() -> FewShot:
        return FewShot(dataset="mini_imagenet", root=str(root), image_size=files.SIDE, normalize=False)

    before = read()
    expected = [value for split in FEW for number in range(FEW[split]) for value in files.pair(number)]
    assert before.table.images.max((1, 2, 3)).tolist() == expected
    image = sorted(path for path in (tmp_path / "elsewhere").rglob("*") if path.suffix in (".png", ".jpg"))[0]
    image.write_bytes(files.encoded(99))
    assert read().describe()["fingerprint"] != before.describe()["fingerprint"]


@pytest.mark.usefixtures("few")
def test_a_file_of_a_split_behind_a_link_is_noticed_when_it_changes(tmp_path: Path) -> None:
    root = tmp_path / "cifar_fs"
    files.cifar_fs(root, FEW)
    moved_behind_link(root / "data" / "test000", tmp_path / "elsewhere" / "test000")
    before = FewShot(dataset="cifar_fs", image_size=files.SIDE).describe()["fingerprint"]
    sorted((tmp_path / "elsewhere" / "test000").iterdir())[0].write_bytes(files.encoded(99))
    assert FewShot(dataset="cifar_fs", image_size=files.SIDE).describe()["fingerprint"] != before


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("top", ["", "mini-imagenet-master", "one/two"])
@pytest.mark.parametrize("form", ["divided", "lists below", "texts"])
def test_relatives_of_the_usual_forms(tmp_path: Path, form: str, top: str) -> None:
    """Class folders in a folder for each split, lists in a folder of their own, and all that below odd folders on top."""
    root = tmp_path / "data" / top
    if form == "divided":
        for split, count in FEW.items():
            for number in range(count):
                for place, value in enumerate(files.pair(number)):
                    path = root / split / f"n{split}{number}" / f"{place}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(files.encoded(value))
    elif form == "lists below":
        class_folders(root, "csv", "data/miniImagenet")
    else:
        class_folders(root, "txt", "lists")
    source = FewShot(dataset="mini_imagenet", root=str(tmp_path / "data"), image_size=files.SIDE, normalize=False)
    assert source.describe()["classes"] == FEW
    assert source.table.sizes.tolist() == [2] * 9
    expected = [value for split in FEW for number in range(FEW[split]) for value in files.pair(number)]
    assert source.table.images.max((1, 2, 3)).tolist() == expected


@pytest.mark.usefixtures("three_images")
@pytest.mark.parametrize("top", ["CIFAR/cifar-100-python", "odd", "."])
def test_an_official_archive_may_have_any_folder_on_top(tmp_path: Path, top: str) -> None:
    folder = cifar100(tmp_path / "own" / "cifar-100-python")
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "cifar-100-python(1).tar.gz", "w:gz") as file:
        file.add(folder, top)
    source = FewShot(dataset="fc100", root=str(tmp_path / "data"))
    assert source.describe()["classes"] == {"train": 60, "val": 20, "test": 20}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("kind", "line"), [("test01", 8), ("test00", 8)])
def test_a_list_that_names_an_image_twice(tmp_path: Path, kind: str, line: int) -> None:
    """In its class, or in two: as a test image that is counted twice, or has two labels."""
    images_and_tables(tmp_path / "mini", True)
    path = tmp_path / "mini" / "test.csv"
    files.write(path, path.read_text() + f"test0100000001.jpg,{kind}\n")
    message = error(lambda: FewShot(dataset="mini_imagenet", root=str(tmp_path / "mini")))
    expected = f"{path}, line {line}: test0100000001.jpg has a label already, in line 5"
    assert message == f"data mini_imagenet: {expected}"


@pytest.mark.usefixtures("few")
def test_a_class_folder_of_hidden_files_alone(tmp_path: Path) -> None:
    """As a Mac leaves them beside images that are gone."""
    files.cifar_fs(tmp_path / "cifar_fs", FEW)
    folder = tmp_path / "cifar_fs" / "data" / "test000"
    for path in folder.iterdir():
        path.rename(folder / f"._{path.name}")
    message = error(lambda: FewShot(dataset="cifar_fs", image_size=files.SIDE))
    assert message == f"data cifar_fs: there are no images in {folder}; the data set may be incomplete"


@pytest.mark.usefixtures("few")
def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    images_and_tables(tmp_path / "mini", True)
    (tmp_path / "mini" / "images" / "val0100000001.jpg").unlink()
    message = error(lambda: FewShot(dataset="mini_imagenet", root=str(tmp_path / "mini")))
    assert message.startswith(
        f"data mini_imagenet: {tmp_path}/mini/val.csv: val01: there is no image val0100000001.jpg in "
    )
    for image in (tmp_path / "mini" / "images").iterdir():  # no image has the name that the tables say
        image.rename(image.with_suffix(".JPEG"))
    message = error(lambda: FewShot(dataset="mini_imagenet", root=str(tmp_path / "mini")))
    assert re.search(r"there is no image \w+\.jpg in .*; did you mean \w+\.JPEG", message)
    class_folders(tmp_path / "tiered", "txt")
    files.write(tmp_path / "tiered" / "test.txt", "ntest0\nntest1\nnone\n")
    message = error(lambda: FewShot(dataset="tiered_imagenet", root=str(tmp_path / "tiered")))
    assert "test.txt names class none, but below" in message
    files.write(tmp_path / "tiered" / "test.txt", "ntest0\nntest1\n")
    message = error(lambda: FewShot(dataset="tiered_imagenet", root=str(tmp_path / "tiered")))
    assert "gives 2 classes for test, published are 3" in message


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("dataset", "form", "changed", "says"),
    [
        ("mini_imagenet", "flat images and tables", "test.csv", "train.csv and test.csv"),
        ("cub", "class folders and texts", "val.txt", "train.txt and val.txt"),
        ("cifar_fs", "", "splits/bertinetto/test.txt", "train.txt and test.txt"),
    ],
)
def test_a_class_in_the_lists_of_two_splits(tmp_path: Path, dataset: str, form: str, changed: str, says: str) -> None:
    root = tmp_path / dataset
    if form:
        LISTED[form](root)
    else:
        files.cifar_fs(root, FEW)
    path = root / changed
    known = path.with_name(f"train{path.suffix}").read_text().splitlines()[-1]
    rows = path.read_text().splitlines()[: -2 if path.suffix == ".csv" else -1]  # less the last class
    files.write(path, "\n".join([*rows, known]) + "\n")
    message = error(lambda: FewShot(dataset=dataset, image_size=files.SIDE))
    kind = known.split(",")[-1]
    assert message.startswith(f"data {dataset}: class {kind} is for both train and {path.stem} ({says} in {root}); ")


@pytest.mark.usefixtures("few")
def test_a_class_in_the_folders_of_two_splits(tmp_path: Path) -> None:
    for split, count in FEW.items():
        for number in range(count):
            files.write(tmp_path / "mini_imagenet" / split / f"n{number}" / "0.png", files.encoded(number))
    message = error(lambda: FewShot(dataset="mini_imagenet", image_size=files.SIDE))
    assert "class n0 is for both train and val (train and val in " in message


def test_a_flaw_in_exif_data_spoils_no_image_of_a_benchmark() -> None:
    exif = bytes.fromhex(  # orientation 6, and a resolution as the text "72"
        "4578696600004d4d002a000000080002011200030000000100060000011a0002000000033732000000000000"
    )
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # the upper half
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    (pixels,) = picture(file.getvalue(), 8, 1, "image 1")
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()
