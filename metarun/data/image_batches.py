"""Labelled images as ordinary classification has them: parts of each class, shuffled batches, stratified subsets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from metarun.core import Batch
from metarun.errors import UserError
from metarun.text import counted

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}  # of each class's images, where the data set has no parts of its own

BatchSampler = Callable[[int, int], Batch]  # the images from `start` to `stop` of an endless shuffled stream
Reader = Callable[[torch.device, np.ndarray | None], Callable[[np.ndarray, np.ndarray], torch.Tensor]]
Change = Callable[[torch.Tensor], torch.Tensor]


def to_shape(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Brings images `[B, C, H, W]` to the shape `(C, H, W)`.

    One channel is repeated, several become their mean; sides are resized bilinearly, smoothed where they shrink.
    """
    if x.shape[1] != shape[0]:
        x = x.expand(-1, shape[0], -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True)
    if x.shape[2:] != shape[1:]:
        x = F.interpolate(x, shape[1:], mode="bilinear", antialias=True)
    return x


def divide_images(offsets: np.ndarray, number: int, own: dict[str, list[int]] | None) -> dict[str, np.ndarray]:
    """The table rows of class `number`: `train`, `val`, `test` and `all`, each int64.

    `own` holds the number of images of each class in each part, in this order in the table; without it the parts are a
    fixed draw of `SHARES`, of which every part gets one image at least where there are three.
    """
    rows = np.arange(offsets[number], offsets[number + 1])
    if own:
        counts = [own[part][number] for part in SHARES]
        drawn = rows
    else:
        drawn = rows[generator("parts", number).permutation(len(rows))]
        counts = part_sizes(len(rows))
    stops = np.cumsum(counts)
    parts = {part: np.sort(drawn[stop - n : stop]) for part, n, stop in zip(SHARES, counts, stops, strict=True)}
    return {**parts, "all": rows}


def part_sizes(images: int) -> list[int]:
    """The images of a class in each part of `SHARES`; every part gets one at least where there are three.

    So of few images more than a tenth go to validation and to the test: of 3 to 13 images one each.
    """
    sizes: list[int] = allot(images, np.array(list(SHARES.values())), least=min(1, images // len(SHARES))).tolist()
    return sizes


def allot(total: int, shares: np.ndarray, least: int = 0) -> np.ndarray:
    """`total` things by their shares (largest remainders), then each brought up to `least` at the cost of the largest."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    while counts.min() < least:
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return counts


def generator(*key: object) -> np.random.Generator:
    """Seeds a generator by `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class Labelled:
    """n images of a table, with their labels in [0, len(names))."""

    rows: np.ndarray  # int64 [n]
    rotations: np.ndarray  # int64 [n], quarter turns
    labels: np.ndarray  # int64 [n]
    names: list[str]  # of the classes
    reader: Reader
    change: Change = lambda x: x  # what is done to all images: another size, say
    # Of rows to files, or to places in a class.
    identify: Callable[[np.ndarray], list[str]] = lambda rows: [str(row) for row in rows]
    reference: np.ndarray | None = None  # rows that give the pixel statistics; None: training images of the source
    item: str = "image"  # what one is called in sentences, see `TableSource.called`
    views: int = 1  # the vectors of each item, of itself and of changed copies, where an encoder made such
    # Computes what lies between the table and the items of some rows, if anything.
    make_rows_ready: Callable[[torch.device, np.ndarray], None] = lambda device, rows: None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> np.ndarray:
        """Images of each class, int64 [classes]."""
        return np.bincount(self.labels, minlength=len(self.names))

    @property
    def members(self) -> list[np.ndarray]:
        """The positions of the images of each class, ascending, int64 each; a look at all labels for each class would be many."""
        return np.split(self.labels.argsort(kind="stable"), self.counts.cumsum()[:-1])

    @property
    def identities(self) -> list[str]:
        """The file of each image, `[n]`, or where no files are known its class and place in it."""
        return self.identify(self.rows)

    def take(self, which: np.ndarray) -> Labelled:
        """Selects the images `which` (positions, int64)."""
        return replace(self, rows=self.rows[which], rotations=self.rotations[which], labels=self.labels[which])

    def of_classes(self, kept: np.ndarray) -> Labelled:
        """Selects the images of the classes `kept` (int64, ascending), which are numbered anew."""
        found = self.take(np.flatnonzero(np.isin(self.labels, kept)))
        return replace(
            found, labels=np.searchsorted(kept, found.labels), names=[self.names[number] for number in kept.tolist()]
        )

    def of_at_least(self, items: int) -> Labelled:
        """Selects the images of the classes that have at least so many, which are numbered anew."""
        enough = self.counts >= items
        return self if enough.all() else self.of_classes(np.flatnonzero(enough))

    def with_views(self) -> Labelled:
        """These items and, after them, their changed copies, to train on; the items alone where there are no copies."""
        if self.views == 1:
            return self
        turned = np.concatenate([self.rotations + 4 * view for view in range(self.views)])  # as the reader takes views
        rows, labels = (np.tile(values, self.views) for values in (self.rows, self.labels))
        return replace(self, rows=rows, rotations=turned, labels=labels, views=1)

    def normalized_by(self, known: Labelled) -> Labelled:
        """These images, their pixels normalised by the mean and deviation of the images `known` where they are normalised."""
        return replace(self, reference=np.unique(known.rows))

    def divide(self, seed: int, repeat: int) -> tuple[Labelled, Labelled]:
        """Divides training and test images by a stratified draw of `SHARES`, where the share of validation goes to the test images.

        It depends on (seed, repeat) and the images alone. All rotations of an image go to the same side. Pixels of both are
        normalised by the training images.
        """
        train, test = (self.take(places) for places in self.divide_places(seed, repeat))
        return train.normalized_by(train), test.normalized_by(train)

    def divide_places(self, seed: int, repeat: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the training and of the test images that `divide` draws, int64 each."""
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for members in self.members:
            order = generator("division", seed, repeat, self.rows[members].min()).permutation(len(members))
            n = part_sizes(len(members))[0]
            for side, chosen in zip(sides, (order[:n], order[n:]), strict=True):
                side.append(members[np.sort(chosen)])
        train, test = (np.concatenate(side) for side in sides)
        return train, test

    def batch(self, which: np.ndarray, device: torch.device, domain: int = 0) -> Batch:
        """Reads the images `which` (positions, int64 [B]) with their labels."""
        read = self.reader(device, self.reference)
        x = self.change(read(self.rows[which, None], self.rotations[which])[:, 0])
        y = torch.from_numpy(self.labels[which]).to(device)
        return Batch(x, y, torch.full_like(y, domain))

    def whole(self, device: torch.device, domain: int = 0) -> Batch:
        """Reads all images."""
        return self.batch(np.arange(len(self)), device, domain)

    def stream(self, seed: int, name: str) -> Callable[[int, int], np.ndarray]:
        """Positions from `start` to `stop` of an endless stream of shuffled epochs; place i is a function of (seed, name, i)."""
        epochs: dict[int, np.ndarray] = {}

        def epoch(number: int) -> np.ndarray:
            if number not in epochs:
                epochs.clear() if len(epochs) > 1 else None
                epochs[number] = generator(seed, name, "epoch", number).permutation(len(self))
            return epochs[number]

        def positions(start: int, stop: int) -> np.ndarray:
            first, last = start // len(self), (stop - 1) // len(self)
            whole = np.concatenate([epoch(number) for number in range(first, last + 1)])
            return whole[start - first * len(self) : stop - first * len(self)]

        return positions

    def subset(self, count: int | None, key: str, seed: int, repeat: int) -> Labelled:
        """Draws some of the images, of each class its share but at least one; a subset holds those of half its size and less.

        It depends on (seed, repeat) and the images alone: every method meets the same, whatever other sizes it is given. Of two sizes
        closer to each other the larger may lack an image or two of a class, since shares are rounded for each size alone, by the
        largest remainders (the Alabama paradox).

        Args:
            count: The number of images; None for all.
            key: What errors are about.
            seed: The seed of the subsets.
            repeat: The number of the subset.

        Raises:
            UserError: There are fewer images, or more classes, or a class has no image.
        """
        missing = [name for name, n in zip(self.names, self.counts, strict=True) if not n]
        if missing:
            raise UserError(f"{key}: there is no {self.item} of class {missing[0]} to draw from")
        if count is None or count == len(self):
            return self
        if count > len(self):
            raise UserError(f"{key}={count}: there are only {counted(len(self), self.item)} to draw from")
        if count < len(self.names):
            one = f"{'an' if self.item == 'image' else 'a'} {self.item}"
            raise UserError(f"{key}={count}: is below the {len(self.names)} classes, and each needs {one}")
        chosen = []
        for label, (members, n) in enumerate(zip(self.members, allot(count, self.counts, least=1), strict=True)):
            order = generator("subset", seed, repeat, label).permutation(len(members))
            chosen.append(members[order[:n]])
        return self.take(np.concatenate(chosen))


def make_ready(device: torch.device, *parts: Labelled) -> None:
    """Computes what lies between the table of a data set and the images of some parts of it that are going to be read, if anything.

    Args:
        device: Where it is computed.
        parts: These images.
    """
    parts[0].make_rows_ready(device, np.unique(np.concatenate([images.rows for images in parts])))


def batches(
    source: Labelled,
    seed: int,
    device: torch.device,
    target: Labelled | None = None,
    *,
    target_labels: bool = False,
) -> BatchSampler:
    """Samples shuffled batches of the source; with a target every other image is one of the target's.

    Args:
        source: The images of the source.
        seed: The run's seed.
        device: Where the images shall lie.
        target: The images of the target; None for the source alone.
        target_labels: Whether the target's images have their labels; -1 otherwise.

    Returns:
        A function of the first place and the one after the last in the shuffled stream to these images.
    """
    from_source = source.stream(seed, "source")
    if target is None:
        return lambda start, stop: source.batch(from_source(start, stop), device)
    from_target = target.stream(seed, "target")

    def mixed(start: int, stop: int) -> Batch:
        parts = []
        for domain, (images, stream) in enumerate(((source, from_source), (target, from_target))):
            # Of places start to stop the even ones are the source's, the odd ones the target's.
            first, end = (start + 1 - domain) // 2, (stop + 1 - domain) // 2
            if end > first:
                parts.append(images.batch(stream(first, end), device, domain))
        y = [part.y if target_labels or not part.domain[0] else torch.full_like(part.y, -1) for part in parts]
        return Batch(torch.cat([part.x for part in parts]), torch.cat(y), torch.cat([part.domain for part in parts]))

    return mixed
