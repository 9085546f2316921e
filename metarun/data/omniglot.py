"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people.

Lake, Salakhutdinov and Tenenbaum 2015, "Human-level concept learning through probabilistic program induction".
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageChops

from metarun import files
from metarun.config.types import FilePath, PositiveInt, Seed
from metarun.data.archives import BROKEN_ARCHIVE, content_of
from metarun.data.download import download, refuse_file
from metarun.data.file_names import visible
from metarun.data.image_source import ImageSource
from metarun.data.roots import data_root
from metarun.data.sampler import uniforms
from metarun.data.source import Split
from metarun.data.table import ClassImages, cached
from metarun.errors import UserError
from metarun.files import typed_path

ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
CHECKSUMS = {"background": "68d2efa1b9178cc56df9314c21c6e718", "evaluation": "6b91aef0f799c5bb55b94e3f2daec811"}
SIDE = 105  # pixels of an original drawing
DRAWINGS = 20  # of each character
LARGEST = 2**20  # bytes of a drawing; the published ones have less than a thousand
SPLITS = ("vinyals", "lake", "random")
RANDOM_TRAIN, RANDOM_VAL = 1100, 100  # characters; the other 423 are for testing
LAKE_VAL = 5  # alphabets

Member = TypeVar("Member", bound=PurePath)

_SPLIT_FILE = Path(__file__).with_name("omniglot_vinyals.txt")


class Character(NamedTuple):
    """One class, and where the published splits put it."""

    part: str  # of the release: background or evaluation
    alphabet: str
    number: int  # from 1
    vinyals: Split

    @property
    def name(self) -> str:
        return f"{self.alphabet}/character{self.number:02}"


class Omniglot(ImageSource):
    """Omniglot as white ink on black, `[1, image_size, image_size]`, pixels in [0, 1].

    `split` divides the characters:
    - `vinyals`: 1,028 / 172 / 423 characters (Vinyals et al. 2016; the lists that Snell et al. 2017 published);
    - `lake`: the background alphabets for training, the alphabetically last 5 of them for validation instead, and the
      evaluation alphabets for testing;
    - `random`: 1,100 / 100 / 423 characters drawn by `split_seed`, which is not the run's seed.

    `rotations` counts each character turned by 90, 180 and 270 degrees as further characters of the same split.
    `within_alphabet` draws all ways of an episode from one alphabet.

    `images_background` and `images_evaluation` are looked for under `root` (default: `METARUN_DATA`/omniglot), each as
    the `.zip` or as the unpacked folder, and downloaded there if `download` is true. Once their table is in the cache
    the archives are not touched again.

    Raises `UserError` for an unknown split, and for archives that are missing, broken, or short of a drawing.

    Args:
        root: The folder with images_background.zip and images_evaluation.zip; null is <METARUN_DATA>/omniglot.
        split: How the characters are divided.
        split_seed: The seed of split=random.
        rotations: Whether each character turned by 90, 180 and 270 degrees counts as further characters of its
            split.
        within_alphabet: Whether all ways of an episode come from one alphabet.
        image_size: The side of an image in pixels.
        download: Whether archives that are not there are downloaded.
    """

    classes_in = ()
    as_target = "target=omniglot"

    inverted = True

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        split: Literal["vinyals", "lake", "random"] = "vinyals",
        split_seed: Seed = 0,
        rotations: bool = True,
        within_alphabet: bool = False,
        image_size: PositiveInt = 28,
        download: bool = True,
    ) -> None:
        folder = typed_path(root).absolute() if root else data_root() / "omniglot"
        characters = _characters()
        # The release is frozen, so its table serves wherever the archives lie; a folder that is named stands for itself.
        key = {"image_size": image_size, **({"root": str(folder)} if root else {})}

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            for part, checksum in CHECKSUMS.items():
                expected = [character for character in characters if character.part == part]
                yield from _read(_find(folder, f"images_{part}", checksum, download), expected, image_size)

        super().__init__(
            cached("omniglot", key, build),
            _divide(characters, split, split_seed),
            rotations=rotations,
            within_group=within_alphabet,
        )


def _characters() -> list[Character]:
    """All characters in the order of the table: background before evaluation, then by name."""
    characters = []
    for line in _SPLIT_FILE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            part, alphabet, split, numbers = line.split()
            first, last = map(int, numbers.split("-"))
            characters += [Character(part, alphabet, number, split) for number in range(first, last + 1)]  # type: ignore[arg-type]
    return characters


def _divide(characters: list[Character], split: str, seed: int) -> dict[Split, Sequence[int]]:
    if split == "random":
        order = uniforms(seed, "omniglot", 0, len(characters), 1)[:, 0].argsort(kind="stable").tolist()
        stop = RANDOM_TRAIN + RANDOM_VAL
        return {"train": order[:RANDOM_TRAIN], "val": order[RANDOM_TRAIN:stop], "test": order[stop:]}
    splits: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
    held_out = sorted({character.alphabet for character in characters if character.part == "background"})[-LAKE_VAL:]
    for index, character in enumerate(characters):
        if split == "vinyals":
            splits[character.vinyals].append(index)
        elif character.part == "evaluation":
            splits["test"].append(index)
        else:
            splits["val" if character.alphabet in held_out else "train"].append(index)
    return dict(splits)


def _find(folder: Path, name: str, checksum: str, may_download: bool) -> Path:
    refuse_file(folder)
    archive = folder / f"{name}.zip"
    for path in (archive, folder / name):
        if path.exists():
            return path
    if not may_download:
        raise UserError(
            f"data omniglot: {archive} is missing; put it there from {ADDRESS}{name}.zip, or set data.download=true"
        )
    return download(f"{ADDRESS}{name}.zip", archive, checksum=checksum)


def _read(source: Path, characters: list[Character], size: int) -> Iterator[ClassImages]:
    """The characters of an archive or an unpacked folder, in the given order."""
    if source.is_dir():
        drawings = [
            folder / name for folder, names in files.walk(source, visible) for name in names if name.endswith(".png")
        ]
        yield from _decode(source, drawings, Path.read_bytes, characters, size)
        return
    try:
        with zipfile.ZipFile(source) as archive:
            members = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".png")]
            yield from _decode(
                source, members, lambda member: content_of(archive, str(member), LARGEST), characters, size
            )
    except BROKEN_ARCHIVE as error:
        raise UserError(
            f"data omniglot: {source} is not a whole zip archive ({error}); get it again from {ADDRESS}{source.name}"
        ) from error


def _decode(
    source: Path, members: list[Member], read: Callable[[Member], bytes], characters: list[Character], size: int
) -> Iterator[ClassImages]:
    drawings: dict[str, list[Member]] = {}
    for member in sorted(members):
        if visible(member.name):
            drawings.setdefault("/".join(member.parts[-3:-1]), []).append(member)
    _check(source, {name: len(found) for name, found in drawings.items()}, characters)
    for character in characters:
        images = np.empty((DRAWINGS, 1, size, size), np.uint8)
        for image, member in zip(images, drawings[character.name], strict=True):
            image[0] = _ink(source, member, read(member), size)
        yield ClassImages(character.name, character.alphabet, images)


def _check(source: Path, found: dict[str, int], characters: list[Character]) -> None:
    names = [character.name for character in characters]
    missing = [name for name in names if name not in found]
    other = [name for name in names if name in found and found[name] != DRAWINGS]
    if missing:
        raise UserError(
            f"data omniglot: {source}: {len(missing)} of {len(names)} characters are missing: {_some(missing)}"
        )
    if other:
        raise UserError(
            f"data omniglot: {source} has {found[other[0]]} drawings instead of {DRAWINGS} of {_some(other)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ink(source: Path, member: PurePath, raw: bytes, size: int) -> np.ndarray:
    """One drawing, uint8 `[size, size]`, the ink bright."""
    try:
        with Image.open(io.BytesIO(raw)) as file:
            if file.size != (SIDE, SIDE):  # before they are decoded, which could be more than the memory holds
                raise UserError(
                    f"data omniglot: {source}: {member} has {file.width}x{file.height} pixels, expected {SIDE}x{SIDE}"
                )
            image = file.convert("L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"data omniglot: {source}: {member} cannot be decoded ({error})") from error
    return np.asarray(ImageChops.invert(image).resize((size, size), Image.Resampling.LANCZOS))
