"""Images that a data set has twice: alike in every pixel, or nearly so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

READ_AT_ONCE = 512  # images that are read at once
SIDE = 9  # of the grey thumbnail that an image is compared by
MARGIN = 4  # grey levels of 255 that two neighbours must differ by for a bit of the hash: flat parts have none
BITS = 6  # of the 128 that hashes of near duplicates may differ in
LEVELS = 8.0  # of 255 that thumbnails of near duplicates may differ by in the mean
BANDS = 8  # of 16 bits: two hashes that differ in fewer bits than there are bands agree in one of them
CROWDED = 64  # images with one band in common that are all compared; of more each is compared with the next ones
# Pairs of a band that are compared at least: of some thousand images all, as many photos have a plain background.
PAIRS = 2**21
SHOWN = 24  # pairs that are kept as examples

ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.int64)
RULE = (
    f"alike in every pixel as they are read; nearly so: the differences of neighbours in a grey thumbnail of {SIDE}x{SIDE} give 128 "
    f"bits, of which at most {BITS} differ, and thumbnails differ by at most {LEVELS:g} of 255 levels in the mean"
)


@dataclass
class Duplicates:
    """What was found.

    Attributes:
        exact: The images that another has every pixel of.
        near: The images that another is nearly alike, without the exact ones.
        exact_across: Of `exact` those whose twin is on another side, for each way in which the images are divided.
        near_across: Of `near` likewise.
        other_class: The images of both whose twin is of another class.
        pairs: Some pairs `(row, row, exact)`, those on different sides first.
        crowded: Whether so many images are alike in a part of their hash that not all pairs were compared.
    """

    exact: int = 0
    near: int = 0
    exact_across: dict[str, int] = field(default_factory=dict)
    near_across: dict[str, int] = field(default_factory=dict)
    other_class: int = 0
    pairs: list[tuple[int, int, bool]] = field(default_factory=list)
    crowded: bool = False


class _Twins:
    """Gathers pairs of equal and of nearly equal images, and how they are divided.

    Args:
        sides: For each way in which the images are divided the side of each row, int64 `[M]`; those on none are -1.
        classes: The class of each row, int64 `[M]`.
    """

    def __init__(self, sides: Mapping[str, np.ndarray], classes: np.ndarray) -> None:
        self.sides, self.classes = sides, classes
        # Of equal images (True) and of nearly equal ones (False):
        self.rows = {True: set[int](), False: set[int]()}
        self.across = {exact: {way: set[int]() for way in sides} for exact in self.rows}
        self.other_class = set[int]()
        # Of pairs that lie on two sides (True), and of others:
        self.examples = {True: list[tuple[int, int, bool]](), False: list[tuple[int, int, bool]]()}

    def add(self, a: np.ndarray, b: np.ndarray, *, exact: bool) -> None:
        """Takes pairs, whose rows are `a` and `b`, int64 `[n]` each."""
        self.rows[exact].update(a.tolist(), b.tolist())
        apart = np.zeros(len(a), bool)
        for way, side in self.sides.items():
            mask = (side[a] != side[b]) & (side[a] >= 0) & (side[b] >= 0)
            self.across[exact][way].update(a[mask].tolist(), b[mask].tolist())
            apart |= mask
        differ = self.classes[a] != self.classes[b]
        self.other_class.update(a[differ].tolist(), b[differ].tolist())
        for over, examples in self.examples.items():
            for one, two in zip(a[apart == over][:SHOWN], b[apart == over][:SHOWN], strict=True):
                if len(examples) < SHOWN:
                    examples.append((int(one), int(two), exact))

    def add_equal(self, digests: np.ndarray) -> None:
        """Takes all images that have the digest `[M]` of another one."""
        order = np.argsort(digests, kind="stable")
        same = digests[order][1:] == digests[order][:-1]
        self.add(order[:-1][same], order[1:][same], exact=True)
        # Neighbours alone do not say that the first and the last of a run of equal images lie on two sides.
        runs = np.concatenate([[0], np.cumsum(~same)])
        for way, kinds in (*self.sides.items(), ("", self.classes)):
            known = kinds[order] >= 0
            first, last = np.full(runs[-1] + 1, np.iinfo(np.int64).max), np.full(runs[-1] + 1, -1)
            np.minimum.at(first, runs[known], kinds[order][known])
            np.maximum.at(last, runs[known], kinds[order][known])
            several = order[known & (first < last)[runs]].tolist()
            (self.across[True][way] if way else self.other_class).update(several)

    def summary(self, *, crowded: bool) -> Duplicates:
        """What was found; `crowded` says whether some images were not compared."""
        return Duplicates(
            exact=len(self.rows[True]),
            near=len(self.rows[False] - self.rows[True]),
            exact_across={way: len(rows) for way, rows in self.across[True].items()},
            near_across={way: len(rows - self.rows[True]) for way, rows in self.across[False].items()},
            other_class=len(self.other_class),
            pairs=list(dict.fromkeys([*self.examples[True], *self.examples[False]]))[:SHOWN],
            crowded=crowded,
        )


def find(
    read: Callable[[int, int], np.ndarray],
    sides: Mapping[str, np.ndarray],
    classes: np.ndarray,
    progress: Callable[[int], None] = lambda done: None,
) -> Duplicates:
    """Looks for images that are there twice. Memory is about 120 bytes an image, time grows in proportion to the images.

    Args:
        read: The images uint8 `[n, C, H, W]` of the rows from a start to a stop.
        sides: For each way in which the images are divided the side of each row, int64 `[M]`; those on none are -1.
        classes: The class of each row, int64 `[M]`.
        progress: Is told how many images were read.
    """
    total = len(classes)
    digests = np.empty(total, dtype="S16")
    hashes = np.empty((total, 2), dtype=np.uint64)
    small = np.empty((total, SIDE, SIDE), dtype=np.uint8)
    for start in range(0, total, READ_AT_ONCE):
        images = read(start, min(start + READ_AT_ONCE, total))
        stop = start + len(images)
        digests[start:stop] = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        small[start:stop] = thumbnails(images)
        hashes[start:stop] = perceptual(small[start:stop])
        progress(stop)
    found = _Twins(sides, classes)
    found.add_equal(digests)
    flat = small.reshape(total, -1).std(1) < MARGIN  # blank images are all alike, and say nothing
    crowded = False
    for a, b, left_out in candidates(hashes):
        crowded |= left_out
        keep = ~(flat[a] | flat[b]) & (digests[a] != digests[b])
        a, b = a[keep], b[keep]
        bits = ONES[(hashes[a] ^ hashes[b]).view(np.uint16)].sum(1)
        a, b = a[bits <= BITS], b[bits <= BITS]
        levels = np.abs(small[a].astype(np.int16) - small[b]).mean((1, 2))
        found.add(a[levels <= LEVELS], b[levels <= LEVELS], exact=False)
    return found.summary(crowded=crowded)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Grey means over a grid, uint8 `[n, SIDE, SIDE]`, of images uint8 `[n, C, H, W]`."""
    grey = images.astype(np.float32).mean(1)
    for axis in (1, 2):
        length = grey.shape[axis]
        edges = np.linspace(0, length, SIDE + 1)
        starts = np.minimum(np.floor(edges[:-1]).astype(int), length - 1)
        stops = np.maximum(np.ceil(edges[1:]).astype(int), starts + 1)
        parts = [grey.take(range(a, b), axis=axis).mean(axis) for a, b in zip(starts, stops, strict=True)]
        grey = np.stack(parts, axis)
    small: np.ndarray = np.rint(grey).astype(np.uint8)
    return small


def perceptual(small: np.ndarray) -> np.ndarray:
    """The hash of each thumbnail, uint64 `[n, 2]`: where the grey rises to the right, and where it rises downwards."""
    levels = small.astype(np.int16)
    right = (levels[:, :-1, 1:] - levels[:, :-1, :-1]) > MARGIN
    down = (levels[:, 1:, :-1] - levels[:, :-1, :-1]) > MARGIN
    bits = np.concatenate([right.reshape(len(small), -1), down.reshape(len(small), -1)], 1)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64)


def candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Pairs of rows whose hashes agree in a band of 16 bits, and whether some such pairs were left out.

    Args:
        hashes: uint64 `[n, 2]`.
    """
    bands = np.ascontiguousarray(hashes).view(np.uint16).reshape(len(hashes), BANDS)
    for band in range(BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        values = bands[order, band]
        stop = min(max(CROWDED, PAIRS // max(len(order), 1)), len(order))
        for gap in range(1, stop):
            same = values[gap:] == values[:-gap]
            if not same.any():
                break
            yield order[:-gap][same], order[gap:][same], gap == stop - 1 and stop < len(order)
