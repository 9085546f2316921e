"""The digits of scikit-learn: 1,797 handwritten digits of 8x8 pixels, part of the package itself.

They are the test images of Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits" (UCI).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from metarun.data.folder import check_images
from metarun.data.image_ops import by_class, drawn, for_episodes
from metarun.data.source import ImageSource
from metarun.data.splits import RATIOS
from metarun.data.table import ClassImages, cached
from metarun.errors import UserError

BRIGHTEST = 16  # of the original values


class Digits(ImageSource):
    """White ink on black, `[channels, image_size, image_size]`, ten classes `0` to `9`, resized from 8x8 (Lanczos).

    Ordinary training, validation and testing take 64, 16 and 20% of each digit, a fixed draw. For episodes the digits are
    divided by `ratios` and `split_seed`. `channels` null is 1. `normalize` is that of `ImageSource`. Raises `UserError`
    where scikit-learn is missing.
    """

    def __init__(
        self,
        *,
        image_size: int = 28,
        channels: int | None = None,
        split_seed: int = 0,
        ratios: list[float] | None = None,
        normalize: bool = True,
    ) -> None:
        check_images(image_size, channels)
        key = {"image_size": image_size, "channels": channels}

        def build(metadata: dict[str, Any]) -> Iterator[ClassImages]:
            try:
                bunch = import_module("sklearn.datasets").load_digits()
            except ModuleNotFoundError as error:
                raise UserError(
                    "data digits: scikit-learn, whose digits these are, is not installed: pip install scikit-learn"
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
