"""CIFAR-FS, FC100, mini- and tiered-ImageNet and CUB in every form in which they are distributed."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import labelled_files as files
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from metarun.core import TaskShape
from metarun.data import fewshot, pickles
from metarun.data.fewshot import RELEASES, FewShot
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
    path = Path(__file__).parents[1] / "conf" / "data" / f"{dataset}.yaml"
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
    assert "its files are not all in " in error(lambda: FewShot(dataset="tiered_imagenet"))


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
    assert "train.txt: not a text file" in error(lambda: FewShot(dataset="cifar_fs"))


@pytest.mark.usefixtures("few")
def test_broken_hdf5_and_no_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cub"
    files.torchmeta(root, FEW, True)
    files.write(root / "val_labels.json", '["n000", "nobody"]')
    assert "val_data.hdf5 with val_labels.json: not whole files" in error(lambda: FewShot(dataset="cub"))
    files.write(root / "train_data.hdf5", b"no HDF5")
    assert "train_data.hdf5 with train_labels.json: not whole files" in error(lambda: FewShot(dataset="cub"))
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "needs h5py, which is not installed: pip install 'metarun[hdf5]'" in error(lambda: FewShot(dataset="cub"))


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
        pickle.dumps(files.blocks(1, 2))[:-40],
        b"no pickle",
        b"",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cnumpy\nndarray\n(K\x01tR.",
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, raw: bytes) -> None:
    path = files.write(tmp_path / "a.pkl", raw)
    assert error(lambda: pickles.load(path, "x")).startswith(f"data x: {path}: not a whole pickle of arrays (")
