"""CIFAR-100 as its authors publish it, and the classes that CIFAR-FS and FC100 make of it.

Krizhevsky 2009, "Learning multiple layers of features from tiny images": 60,000 images of 32 pixels, 600 of each class,
of which the archive has 500 in `train` and 100 in `test`. The few-shot benchmarks pool them.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from metarun.data import pickles
from metarun.data.archives import BROKEN_ARCHIVE
from metarun.data.fewshot_files import Classes
from metarun.data.source import Split
from metarun.errors import UserError

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MEMBERS = ("train", "test", "meta")
LARGEST = 2**29  # bytes of a member; the official ones have 155 MB at most
PER_CLASS = 600

# fmt: off
CLASSES: dict[str, dict[Split, str]] = {  # of each benchmark; names as in `meta`
    "cifar_fs": {  # Bertinetto and others 2019
        "train": (
            "apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud "
            "cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower "
            "lion lizard lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate "
            "porcupine possum rabbit raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar "
            "sunflower tank tiger train trout tulip turtle willow_tree wolf"
        ),
        "val": (
            "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea "
            "shark television tractor"
        ),
        "test": (
            "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper "
            "table telephone wardrobe whale woman worm"
        ),
    },
    "fc100": {  # Oreshkin and others 2018: no superclass is in two splits
        "train": (
            "apple aquarium_fish bed bicycle bottle bowl bridge bus can castle chair clock cloud couch crocodile "
            "cup dinosaur flatfish forest house keyboard lamp lawn_mower lizard maple_tree motorcycle mountain "
            "mushroom oak_tree orange orchid palm_tree pear pickup_truck pine_tree plain plate poppy ray road "
            "rocket rose sea shark skyscraper snake streetcar sunflower sweet_pepper table tank telephone "
            "television tractor train trout tulip turtle wardrobe willow_tree"
        ),
        "val": (
            "bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse rabbit shrew "
            "snail spider squirrel tiger wolf worm"
        ),
        "test": (
            "baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter porcupine "
            "possum raccoon seal skunk whale woman"
        ),
    },
}
# fmt: on


def official(paths: list[Path], split: Split, name: str) -> Classes:
    """Reads the classes of a split from the folder or the archive `cifar-100-python`.

    Args:
        paths: The files `train`, `test` and `meta`, or the archive that holds them.
        split: The split.
        name: The benchmark: `cifar_fs` or `fc100`.

    Yields:
        The name of each class and its images, uint8 `[600, 32, 32, 3]`, those of `train` before those of `test`.

    Raises:
        UserError: The files are not those of CIFAR-100, or are not whole.
    """
    where = paths[0] if len(paths) == 1 else paths[0].parent
    parts = _archived(where, name) if len(paths) == 1 else {path.name: pickles.load(path, name) for path in paths}
    kinds = [_text(kind) for kind in _entry(parts["meta"], "fine_label_names", where, name)]
    if sorted(kinds) != sorted(" ".join(CLASSES[name].values()).split()):
        raise UserError(f"data {name}: {where}: its classes are not the 100 of CIFAR-100; get it again: {ADDRESS}")
    images, labels = (
        np.concatenate([np.asarray(_entry(parts[part], key, where, name)) for part in ("train", "test")])
        for key in ("data", "fine_labels")
    )
    whole = labels.dtype.kind in "iu" and labels.ndim == 1 and labels.min() >= 0
    counts = np.bincount(labels, minlength=len(kinds)).tolist() if whole else []
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072) or counts != [PER_CLASS] * len(kinds):
        raise UserError(
            f"data {name}: {where}: holds {images.dtype} images {list(images.shape)} and {len(labels)} labels, published are "
            f"{PER_CLASS} images of 3,072 bytes of each class; get it again: {ADDRESS}"
        )
    for kind in CLASSES[name][split].split():
        yield kind, images[labels == kinds.index(kind)].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _archived(path: Path, name: str) -> dict[str, Any]:
    """What the three members of the archive hold, whatever folder they lie in; they are read and not unpacked."""
    found: dict[str, Any] = {}
    try:
        with _opened(path) as whole:
            with tarfile.open(fileobj=whole, mode="r|") as archive:
                for member in archive:
                    part = PurePosixPath(member.name)
                    if part.name in MEMBERS and part.name not in found and member.isfile():
                        if member.size > LARGEST:
                            raise UserError(
                                f"data {name}: {path}: {member.name} has {member.size} bytes, so it is not of CIFAR-100"
                            )
                        file = archive.extractfile(member)
                        content = file.read() if file else b""
                        found[part.name] = pickles.read(io.BytesIO(content), f"{path}: {member.name}", name)
            while whole.read(2**20):  # up to its checksum
                pass
    except BROKEN_ARCHIVE as error:
        raise UserError(f"data {name}: {path} is not a whole archive ({error}); get it again: {ADDRESS}") from error
    if missing := [part for part in MEMBERS if part not in found]:
        raise UserError(
            f"data {name}: {path}: there is no cifar-100-python/{missing[0]} in it; get it again: {ADDRESS}"
        )
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file, unpacked where it is compressed, which its content says and not its name."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked


def _entry(content: Any, key: str, where: Path, name: str) -> Any:
    entries = {_text(own): value for own, value in content.items()} if isinstance(content, dict) else {}
    if not isinstance(entries.get(key), list | np.ndarray) or not len(entries[key]):
        raise UserError(
            f"data {name}: {where}: there is no {key!r} in it, so it is not CIFAR-100; get it again: {ADDRESS}"
        )
    return entries[key]


def _text(value: Any) -> str:
    """Python 2 wrote text as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
