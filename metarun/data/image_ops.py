"""What labelled data sets share: their images made one shape, their own training, validation and test images kept apart."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from metarun.data.decoding import square, upright
from metarun.data.image_batches import generator
from metarun.data.source import Split
from metarun.data.splits import SPLITS, check_ratios, divide
from metarun.data.table import ClassImages, Table
from metarun.errors import UserError

Labelled = tuple[np.ndarray, np.ndarray]  # images uint8 [n, H, W] or [n, H, W, 3], and their labels [n]


def by_class(
    names: Sequence[str],
    parts: Mapping[Split, Labelled],
    metadata: dict[str, Any],
    *,
    size: int | None,
    channels: int | None,
) -> Iterator[ClassImages]:
    """Makes the classes of a table from labelled images in parts.

    Args:
        names: Of the classes; labels are places among them.
        parts: The images of each part with their labels.
        metadata: Of the table; `parts` is added, the numbers of images of each class in each part.
        size: The side of the images in the table, in pixels; None keeps theirs.
        channels: 1 or 3; None keeps theirs.

    Yields:
        Each class with its images, those to train on first, then those of validation, then those to test on.
    """
    metadata["parts"] = {
        split: np.bincount(labels, minlength=len(names)).tolist() for split, (_, labels) in parts.items()
    }
    for number, name in enumerate(names):
        images = np.concatenate([images[labels == number] for images, labels in (parts[split] for split in SPLITS)])
        yield ClassImages(name, "", resized(images, size, channels))


def resized(images: np.ndarray, size: int | None, channels: int | None) -> np.ndarray:
    """uint8 `[n, H, W]` or `[n, H, W, 3]` as uint8 `[n, channels, size, size]`; None keeps the side or the channels.

    Images of another side are resized as `data=folder` does it. Raises `ValueError` for arrays that are no such images.
    """
    depth = {3: 1, 4: 3}.get(images.ndim)
    if images.dtype != np.uint8 or depth is None or images.shape[3:] not in ((), (3,)):
        raise ValueError(
            f"{images.dtype} {list(images.shape)} instead of uint8 [images, side, side] or the same with 3 colours"
        )
    height, width = images.shape[1:3]
    size, channels = size or height, channels or depth
    if height == width == size and channels == depth:
        return images[:, None] if depth == 1 else images.transpose(0, 3, 1, 2)
    pictures = [square(Image.fromarray(image), size, channels).pixels for image in images]
    return np.stack(pictures) if pictures else np.empty((0, channels, size, size), np.uint8)


def picture(raw: bytes, size: int, channels: int, where: str) -> np.ndarray:
    """An image file's contents as uint8 `[channels, size, size]`; raises `UserError` naming `where` for no whole image."""
    try:
        with Image.open(io.BytesIO(raw)) as file:
            return square(upright(file), size, channels).pixels
    except Exception as error:  # the decoders raise whatever a broken file provokes
        raise UserError(f"{where} is not a whole image ({error})") from error


def drawn(labels: np.ndarray, share: float, name: str) -> np.ndarray:
    """Which images a share of each class is, bool `[n]`: a draw fixed by `name` and the class."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = generator("part", name, label).permutation(len(members))
        chosen[members[order[: round(share * len(members))]]] = True
    return chosen


def for_episodes(
    table: Table, ratios: list[float] | None, seed: int, name: str
) -> tuple[Table, dict[Split, Sequence[int]]]:
    """The table with `metadata["split"]`, and its classes divided by `ratios`, drawn by `seed`.

    Fewer than three classes cannot be divided and are in every split, as a target of transfer needs them; the source says so.
    """
    shares = check_ratios(ratios)
    if len(table.names) < len(SPLITS):
        splits: dict[Split, Sequence[int]] = {split: range(len(table.names)) for split in SPLITS}
        return table, splits
    splits = divide(table.names, (None, None, None), shares, seed, key=f"data {name}", where="it")
    return replace(table, metadata={**table.metadata, "split": f"classes drawn by split_seed {seed}"}), splits
