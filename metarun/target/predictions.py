"""`predictions.csv` of a run: what was predicted of each test image of the target, and with what probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metarun import files
from metarun.data.image_batches import Labelled
from metarun.text import csv_line

LIMIT = 200_000  # rows, at most, beyond those of the first repeat


class Predicted(NamedTuple):
    """What a classifier said of test images."""

    repeat: int
    train_images: int
    images: Labelled  # n
    classes: np.ndarray  # int64 [n], the predicted ones; -1 where the scores say nothing
    probabilities: np.ndarray  # [n, classes]


def write(path: Path, every: Iterable[Predicted]) -> int:
    """Writes a line for each image of each of the `every`, in this order, all or nothing.

    Columns are the repeat, the number of training images, the file (or the class and the place in it, where no files are known; of
    texts the text itself, in a column of that name), the truth, the prediction (empty where the scores say nothing), whether it is
    right, and the probability of each class.

    Returns:
        How many repeats were written: all, or as many as have `LIMIT` lines together, but one at least.
    """
    lines, rows, repeats = list[str](), 0, 0
    for one in every:
        names = one.images.names
        if repeats == 0:
            what = "text" if one.images.item == "text" else "file"
            heading = ["repeat", "train_images", what, "truth", "prediction", "right"]
            lines.append(csv_line([*heading, *(f"probability of {name}" for name in names)]))
        elif rows + len(one.images) > LIMIT:
            break
        for file, truth, found, shares in zip(
            one.images.identities, one.images.labels, one.classes, one.probabilities, strict=True
        ):
            shown = [f"{share:.6g}" for share in shares]
            taken_for = names[found] if found >= 0 else ""
            told = [one.repeat, one.train_images, file, names[truth], taken_for, int(truth == found)]
            lines.append(csv_line([*told, *shown]))
        rows, repeats = rows + len(one.images), repeats + 1
    files.save_bytes(path, "".join(lines).encode(errors="backslashreplace"))
    return repeats
