"""The few-shot benchmarks with published classes for training, validation and testing, read from the files people have."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from metarun.config.types import FilePath, PositiveInt
from metarun.data.cifar100 import official
from metarun.data.decoding import THREADS
from metarun.data.download import refuse_file
from metarun.data.fewshot_files import (
    LIST_FOLDERS,
    Layout,
    Pictures,
    data_and_labels,
    divided_folders,
    encoded_and_labels,
    hdf5,
    listed,
    listed_folders,
    numbered_folders,
    opened,
    rows_by_name,
    tops,
)
from metarun.data.image_ops import picture, resized
from metarun.data.image_source import ImageSource
from metarun.data.roots import data_root
from metarun.data.source import Split
from metarun.data.splits import SPLITS
from metarun.data.table import ClassImages, cached, inside, listing
from metarun.errors import UserError, nearest
from metarun.files import typed_path
from metarun.system import platform


class Benchmark(NamedTuple):
    """A benchmark as published."""

    classes: tuple[int, int, int]  # for training, validation and testing
    side: int  # pixels, of the images or as papers resize them
    split: str  # whose classes they are
    files: str  # what to get, and where
    layouts: tuple[Layout, ...]


ZENODO = "https://zenodo.org/records/7978538"  # where learn2learn's authors keep them
TORONTO = "https://www.cs.toronto.edu/~kriz/cifar.html"  # where CIFAR-100 is published
OFFICIAL_CIFAR100 = (
    Layout((".", "cifar-100-python"), ("train", "test", "meta"), official),
    Layout((".",), ("cifar-100-python*gz",), official),
    Layout((".",), ("cifar-100-python*.tar",), official),  # as browsers unpack it
)
LISTS = (
    *(  # of classes, beside the images or in a folder of their own
        Layout((".", *LIST_FOLDERS, "data/miniImagenet"), (pattern,), listed, lists=True)
        for pattern in ("{}.csv", "{}.txt")
    ),
    Layout((".", "images", "data"), ("{}",), divided_folders, lists=True),
)
BY_NAME = (divided_folders, listed, listed_folders)  # of whose classes those of one name are one, in whatever split
OF_FOLDERS = (*BY_NAME, numbered_folders)
RELEASES = {
    "cifar_fs": Benchmark(
        (64, 16, 20),
        32,
        "Bertinetto and others 2019",
        f"cifar-100-python.tar.gz of {TORONTO}, or cifar100.zip of {ZENODO}, unpacked, or MetaOptNet's "
        "CIFAR_FS_train.pickle, CIFAR_FS_val.pickle and CIFAR_FS_test.pickle",
        (
            Layout((".", "cifar100", "cifarfs/cifar100"), ("data", "splits/bertinetto/{}.txt"), listed_folders),
            Layout((".", "CIFAR-FS"), ("CIFAR_FS_{}.pickle",), data_and_labels),
            Layout((".", "cifar100"), ("data.hdf5", "cifar-fs/{}_labels.json"), hdf5),
            *OFFICIAL_CIFAR100,
        ),
    ),
    "fc100": Benchmark(
        (60, 20, 20),
        32,
        "Oreshkin and others 2018",
        f"cifar-100-python.tar.gz of {TORONTO}, or FC100_train.pickle, FC100_val.pickle and FC100_test.pickle from fc100.zip of {ZENODO}",
        (
            Layout((".", "FC100"), ("FC100_{}.pickle",), data_and_labels),
            Layout((".", "cifar100"), ("data.hdf5", "fc100/{}_labels.json"), hdf5),
            *OFFICIAL_CIFAR100,
        ),
    ),
    "mini_imagenet": Benchmark(
        (64, 16, 20),
        84,
        "Ravi and Larochelle 2017",
        f"mini-imagenet-cache-train.pkl, mini-imagenet-cache-validation.pkl and mini-imagenet-cache-test.pkl of {ZENODO}",
        (
            Layout((".", "miniimagenet"), ("mini-imagenet-cache-{}.pkl",), rows_by_name),
            Layout((".", "miniimagenet"), ("{}_data.hdf5", "{}_labels.json"), hdf5),
            *LISTS,
        ),
    ),
    "tiered_imagenet": Benchmark(
        (351, 97, 160),
        84,
        "Ren and others 2018",
        f"train_images_png.pkl and train_labels.pkl, likewise val and test, of {ZENODO}",
        (
            Layout((".", "tiered-imagenet"), ("*{}_images_png.pkl", "*{}_labels.pkl"), encoded_and_labels),
            Layout((".", "tieredimagenet"), ("{}_data.hdf5", "{}_labels.json"), hdf5),
            *LISTS,
        ),
    ),
    "cub": Benchmark(
        (100, 50, 50),
        84,
        "Chen and others 2019: of the classes in order every other, the rest in turns",
        "CUB_200_2011.tgz of https://data.caltech.edu/records/65de6-vp158, unpacked",
        (
            *LISTS,
            Layout((".", "CUB_200_2011", "cubirds200/CUB_200_2011"), ("images",), numbered_folders),
            Layout((".", "cub"), ("{}_data.hdf5", "{}_labels.json"), hdf5),
        ),
    ),
}


class FewShot(ImageSource):
    """A benchmark with published classes for training, validation and testing, `[channels, image_size, image_size]`.

    `dataset` is one of `RELEASES`. Its files are looked for in `root` (default: `METARUN_DATA`/the data set's name), in the
    forms that its authors, MetaOptNet and learn2learn distribute and as torchmeta's HDF5 (which needs h5py); nothing is
    downloaded. Pickles are read without running what they ask for. `image_size` null is 84, of CIFAR-FS and FC100 32;
    images of other sizes are taken as `data=folder` takes them. `channels` is 3 or 1, null is 3. `rotations` and `normalize`
    are those of `ImageSource`. Ordinary training takes 80% of each class's images, see `ImageSource.labelled`.

    Raises `UserError` for an unknown data set, for files that are missing or broken, for other numbers of classes, and for a class
    that lists or folders put into two splits.

    Args:
        dataset: The benchmark: mini_imagenet, tiered_imagenet, cifar_fs, fc100 or cub.
        root: The folder with its files; null is <METARUN_DATA>/ and the name of the benchmark.
        image_size: The side of an image in pixels; null is 84, of CIFAR-FS and FC100 32.
        channels: The channels of an image; null is 3.
        rotations: Whether each class turned by 90, 180 and 270 degrees counts as further classes.
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
    """

    classes_in = ("imagenet",)

    def __init__(
        self,
        *,
        dataset: str,
        root: FilePath | None = None,
        image_size: PositiveInt | None = None,
        channels: Literal[1, 3] | None = None,
        rotations: bool = False,
        normalize: bool = True,
    ) -> None:
        if dataset not in RELEASES:
            hint = nearest(dataset, RELEASES) or f"; there are {', '.join(RELEASES)}"
            raise UserError(f"data.dataset={dataset}: is no few-shot benchmark that metarun knows{hint}")
        release = RELEASES[dataset]
        folder = typed_path(root).absolute() if root else data_root() / dataset
        layout, files = _find(dataset, folder)
        size, depth = image_size or release.side, channels or 3
        paths = [folder] if layout.lists else sorted({path for found in files.values() for path in found})
        key = {"files": listing(inside(*paths)), "image_size": size, "channels": depth}
        if layout.read in OF_FOLDERS:
            key["formats"] = "all"  # earlier tables of such folders have JPEG and PNG files alone

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            metadata["split"] = f"classes as published ({release.split})"
            if layout.lists:
                metadata["split"] = f"classes as in {', '.join(files[split][0].name for split in SPLITS)}"
            for split, published in zip(SPLITS, release.classes, strict=True):
                names = []
                for name, pictures in layout.read(files[split], split, dataset):
                    names.append(name)
                    yield ClassImages(name, split, _pixels(pictures, size, depth, f"data {dataset}: {name}"))
                if len(names) != published:
                    raise UserError(
                        f"data {dataset}: {files[split][0]} gives {len(names)} classes for {split}, published are {published}; "
                        f"get the files again: {release.files}"
                    )

        table = cached(dataset, key, build)
        if layout.read in BY_NAME:
            homes: dict[str, str] = {}
            for name, part in zip(table.names, table.groups, strict=True):
                if homes.setdefault(name, part) != part:
                    first, second = (files[split][-1].name for split in SPLITS if split in (homes[name], part))
                    raise UserError(
                        f"data {dataset}: class {name} is for both {homes[name]} and {part} ({first} and {second} in {folder}); a class "
                        "must be in one split alone, so take it out of the others"
                    )
        groups = np.array(table.groups)
        splits: dict[Split, Any] = {split: np.flatnonzero(groups == split) for split in SPLITS}
        super().__init__(table, splits, rotations=rotations, normalize=normalize)


def _find(dataset: str, folder: Path) -> tuple[Layout, dict[Split, list[Path]]]:
    refuse_file(folder)
    release, lacking = RELEASES[dataset], None
    for top in tops(folder):
        for layout in release.layouts:
            if files := layout.find(top):
                return layout, files
            lacking = lacking or layout.lacking(top)
    there = f"data {dataset}: its files are not all in {folder}"
    if lacking is not None:
        raise UserError(f"{there}; beside those that are there only {lacking} is missing")
    lists = (
        "lists train.csv, val.csv and test.csv (or .txt) beside the images, or class folders below train, val and test"
    )
    forms = [release.files, *([lists] if any(layout.lists for layout in release.layouts) else [])]
    hdf5s = (layout.patterns for layout in release.layouts if layout.read is hdf5)
    forms += [
        f"torchmeta's {' and '.join(patterns).format('train', 'train')}, likewise val and test" for patterns in hdf5s
    ]
    raise UserError(f"{there}; put there {'; or '.join(forms)}")


def _pixels(pictures: Pictures, size: int, channels: int, where: str) -> np.ndarray:
    """uint8 `[n, channels, size, size]`."""
    if isinstance(pictures, np.ndarray):
        try:
            return resized(pictures, size, channels)
        except ValueError as error:
            raise UserError(f"{where} holds {error}") from error

    def decode(numbered: tuple[int, Path | bytes]) -> np.ndarray:
        number, one = numbered
        return picture(opened(one), size, channels, f"{where}: {one if isinstance(one, Path) else f'image {number}'}")

    with ThreadPoolExecutor(min(THREADS, len(platform.cores()))) as pool:
        return np.stack(list(pool.map(decode, enumerate(pictures))))
