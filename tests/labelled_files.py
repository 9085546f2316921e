"""The smallest files in the formats of the labelled and few-shot data sets."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

SIDE = 6
SPLITS = ("train", "val", "test")


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def encoded(value: int, side: int = SIDE, form: str = "PNG") -> bytes:
    """An image file whose pixels are all `value`."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(file, form)
    return file.getvalue()


def blocks(*values: int, colours: bool = True) -> np.ndarray:
    """An image of each value, uint8 [n, SIDE, SIDE, 3]."""
    shape = (SIDE, SIDE, 3) if colours else (SIDE, SIDE)
    return np.stack([np.full(shape, value, np.uint8) for value in values])


def idx(values: np.ndarray) -> bytes:
    """A gzipped IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes(), 1, mtime=0)


def mnist(root: Path, counts: dict[str, int], side: int) -> None:
    """Digits in turns; the pixels of image i are i."""
    for part, count in counts.items():
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, side, side))
        write(root / f"{part}-images-idx3-ubyte.gz", idx(images))
        write(root / f"{part}-labels-idx1-ubyte.gz", idx((np.arange(count) % 10).astype(np.uint8)))


def medmnist(
    path: Path, counts: tuple[int, int, int], classes: int, shape: tuple[int, ...] = (28, 28), **others: Any
) -> Path:
    """Classes in turns; the pixels of an image are ten times its class, and of validation and testing one or two more."""
    arrays: dict[str, np.ndarray] = {}
    for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = np.broadcast_to((10 * labels + number).reshape(-1, *[1] * len(shape)), (count, *shape))
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: value for name, value in {**arrays, **others}.items() if value is not None})
    return path


def caltech_members(classes: int = 100) -> Iterator[tuple[str, bytes]]:
    """Two photographs of each class, of value 2c and 2c + 1, and what is no class."""
    names = ["accordion", *(f"thing{number:02}" for number in range(1, classes))]
    for number, name in enumerate(names):
        for image in range(2):
            yield f"{name}/image_{2 - image:04}.jpg", encoded(2 * number + 1 - image, form="JPEG")
    for name in ("BACKGROUND_Google", "Faces_easy"):
        yield f"{name}/image_0001.jpg", encoded(0, form="JPEG")
    yield "BACKGROUND_Google/tmp", b"0"


def caltech_zip(path: Path, top: str = "caltech101_84", classes: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in caltech_members(classes):
            archive.writestr(f"{top}/{name}", raw)
        archive.writestr(f"__MACOSX/{top}/accordion/._image_0001.jpg", b"litter")
    return path


def caltech_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, raw in caltech_members():
            member = tarfile.TarInfo(f"101_ObjectCategories/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return file.getvalue()


def caltech_official(path: Path) -> Path:
    """The archive as Caltech publishes it: a tar file of photographs, and another of outlines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("caltech-101/101_ObjectCategories.tar.gz", caltech_tar())
        archive.writestr("caltech-101/Annotations.tar", b"not read")
    return path


# Few-shot data sets: two images of each class; those of the class number n of a split are 2n and 2n + 1 (modulo 256).


def pair(number: int) -> tuple[int, int]:
    return 2 * number % 256, (2 * number + 1) % 256


def flat(classes: int) -> np.ndarray:
    return blocks(*(value for number in range(classes) for value in pair(number)))


def mini_imagenet(root: Path, classes: dict[str, int], validation: str = "val") -> None:
    for split, count in classes.items():
        members = {f"n{number:03}": [2 * number, 2 * number + 1] for number in reversed(range(count))}
        content = {"image_data": flat(count), "class_dict": members}
        name = validation if split == "val" else split
        write(root / f"mini-imagenet-cache-{name}.pkl", pickle.dumps(content))


def data_and_labels(root: Path, pattern: str, classes: dict[str, int]) -> None:
    for split, count in classes.items():
        labels = np.arange(count).repeat(2) + 7
        write(root / pattern.format(split), pickle.dumps({"data": flat(count), "labels": labels.tolist()}, protocol=2))


def tiered_imagenet(root: Path, classes: dict[str, int], prefix: str = "") -> None:
    for split, count in classes.items():
        images = [np.frombuffer(encoded(value), np.uint8)[:, None] for number in range(count) for value in pair(number)]
        labels = {
            "label_specific": np.arange(count).repeat(2),
            "label_specific_str": [f"n{n:03}" for n in range(count)],
        }
        write(root / f"{prefix}{split}_images_png.pkl", pickle.dumps(images))
        write(root / f"{prefix}{split}_labels.pkl", pickle.dumps(labels))


def cifar_fs(root: Path, classes: dict[str, int]) -> None:
    for split, count in classes.items():
        names = [f"{split}{number:03}" for number in range(count)]
        write(root / "splits" / "bertinetto" / f"{split}.txt", "\n".join(names) + "\n")
        for number, name in enumerate(names):
            for value in pair(number):
                write(root / "data" / name / f"{value:03}.png", encoded(value))


def cub(root: Path, classes: int = 200) -> None:
    for number in range(classes):
        for image, value in enumerate(pair(number)):
            write(root / "images" / f"{number + 1:03}.Bird" / f"Bird_{image}.jpg", encoded(value, form="JPEG"))
    write(root / "images" / "._001.Bird", b"litter")


def torchmeta(root: Path, classes: dict[str, int], files: bool) -> None:
    """HDF5 as torchmeta makes it of ImageNet and CUB: arrays of pixels, or of the bytes of image files."""
    root.mkdir(parents=True, exist_ok=True)
    for split, count in classes.items():
        names = [f"n{number:03}" for number in range(count)]
        write(root / f"{split}_labels.json", json.dumps(names))
        with h5py.File(root / f"{split}_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for number, name in enumerate(names):
                if files:
                    rows = group.create_dataset(name, (2,), dtype=h5py.special_dtype(vlen=np.uint8))
                    for row, value in enumerate(pair(number)):
                        rows[row] = np.frombuffer(encoded(value), np.uint8)
                else:
                    group.create_dataset(name, data=blocks(*pair(number)))


def torchmeta_cifar(root: Path, benchmark: str, classes: dict[str, int]) -> None:
    """The one HDF5 file that torchmeta makes of CIFAR-100, and a benchmark's lists of coarse and fine classes."""
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "data.hdf5", "w") as file:
        for split, count in classes.items():
            labels = [(f"{split}-coarse", f"n{number:03}") for number in range(count)]
            write(root / benchmark / f"{split}_labels.json", json.dumps(labels))
            for number, (coarse, fine) in enumerate(labels):
                file.create_dataset(f"{coarse}/{fine}", data=blocks(*pair(number)))
