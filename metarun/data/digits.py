"""The digits of scikit-learn: 1,797 handwritten digits of 8x8 pixels, part of the package itself.

They are the test images of Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits" (UCI).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, Literal

import numpy as np

from metarun.config.types import Len, PositiveFloat, PositiveInt, Seed
from metarun.data.image_ops import by_class, drawn, for_episodes
from metarun.data.image_source import ImageSource
from metarun.data.splits import RATIOS
from metarun.data.table import ClassImages, cached
from metarun.errors import UserError, not_imported

BRIGHTEST = 16  # of the original values


class Digits(ImageSource):
    """White ink on black, `[channels, image_size, image_size]`, ten classes `0` to `9`, resized from 8x8 (Lanczos).

    Ordinary training, validation and testing take 64, 16 and 20% of each digit, a fixed draw. For episodes the digits are
    divided by `ratios` and `split_seed`. `channels` null is 1. `normalize` is that of `ImageSource`. Raises `UserError`
    where scikit-learn is missing.

    Args:
        image_size: The side of an image in pixels.
        channels: The channels of an image; null is 1.
        split_seed: The seed of the division of the digits for episodes.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        normalize: Whether channels are shifted and scaled by the training split's mean and deviation.
    """

    classes_in = ()
    as_target = "target=digits"

    def __init__(
        self,
        *,
        image_size: PositiveInt = 28,
        channels: Literal[1, 3] | None = None,
        split_seed: Seed = 0,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        normalize: bool = True,
    ) -> None:
        key = {"image_size": image_size, "channels": channels}

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            try:
                bunch = import_module("sklearn.datasets").load_digits()
            except ImportError as error:
                raise UserError(
                    f"data digits: needs scikit-learn, whose digits these are, but {not_imported('sklearn', error)}: pip install "
                    "scikit-learn"
                ) from error
            images = np.rint(bunch.images * (255 / BRIGHTEST)).astype(np.uint8)
            labels = bunch.target
            test = drawn(labels, RATIOS[2], "digits test")
            val = np.zeros_like(test)
            val[~test] = drawn(labels[~test], RATIOS[1] / (RATIOS[0] + RATIOS[1]), "digits val")
            masks = {"train": ~test & ~val, "val": val, "test": test}
            parts = {split: (images[mask], labels[mask]) for split, mask in masks.items()}
            return by_class([str(digit) for digit in range(10)], parts, metadata, size=image_size, channels=channels)  # type: ignore[arg-type]

        table, splits = for_episodes(cached("digits", key, build), ratios, split_seed, "digits")
        super().__init__(table, splits, normalize=normalize)
