"""Several data sets at once: tasks of each in given shares, and a test on each."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch

from metarun.config import Node, keyed
from metarun.config.ranges import shown
from metarun.config.types import Example, Len, PositiveFloat, PositiveInt
from metarun.core import Episodes, MixedEpisodes, TaskShape, together
from metarun.data.image_batches import Labelled, to_shape
from metarun.data.image_source import ImageSource
from metarun.data.origin import Origin
from metarun.data.sampler import uniforms
from metarun.data.shared import key, ranks, same_names, shared_classes, told
from metarun.data.source import DataSource, EpisodeSampler, Item, Split
from metarun.data.table import Table
from metarun.data.table_source import TableSource
from metarun.errors import UserError
from metarun.text import counted, printable, shape_text

log = logging.getLogger("metarun")

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 times the golden section
MEASURED = 500  # mean and deviation are taken of so many training images of each data set


class Domains(DataSource):
    """Several sets of images, brought to one shape: task i is of one of them, and the sets have their shares of the tasks.

    All images have one size, the largest of the sets' own, and one number of channels: three where any set has colours, grey
    images being repeated. A data set that can reads its files at that size; images of any other are resized bilinearly.
    Pixels of all sets are normalised alike, by the mean and deviation of the training images of all, each set counting by its
    share. Validation tasks are of the sets in the same shares; a meta-test tests on the test classes of each set apart. A
    method on batches of labelled images tells the classes of all sets apart, and sees each image as often as any other.

    Which set task i is of depends on (seed, split, i) alone: the set into whose part of [0, 1), as long as its share, the point
    u + i (sqrt(5) - 1) / 2 modulo 1 falls, u being drawn from (seed, split). These points lie so evenly that any stretch of tasks
    has the shares, to within a task or two.

    Args:
        sets: The data sets by name, each with its settings; data=[omniglot,cifar_fs] names them.
        shares: The share of the tasks that each data set has, in their order, in any unit; null is equal shares.
        image_size: The side of an image in pixels; null is the largest of the sets' own.
        channels: The channels of an image; null is 3 if any set has colours, 1 otherwise.
        normalize: Whether channels are shifted and scaled by the mean and deviation of the training images of all sets.
    """

    kind = "classification"
    item: Item = "image"

    def __init__(
        self,
        *,
        sets: dict[str, Node],
        shares: Annotated[list[PositiveFloat], Len(1), Example("[2, 1]")] | None = None,
        image_size: PositiveInt | None = None,
        channels: Literal[1, 3] | None = None,
        normalize: bool = True,
    ) -> None:
        if not sets:
            raise UserError("data: names no data set; write data=[omniglot,cifar_fs], say")
        if shares is not None and len(shares) != len(sets):
            raise UserError(
                f"data.shares={shown(shares)}: has {counted(len(shares), 'number')} for the {len(sets)} data sets "
                f"{', '.join(sets)}"
            )
        given = np.ones(len(sets)) if shares is None else np.array(shares, dtype=np.float64)
        self.shares = dict(zip(sets, (given / given.sum()).tolist(), strict=True))
        size = image_size or _largest(sets)
        own = {name: built_images(node, name, size, channels) for name, node in sets.items()}
        _refuse_other_divisions(sets, own)
        depth = channels or max(source.input_shape[0] for source in own.values())
        self.input_shape = self.image_shape = (depth, size, size)
        self.normalize = normalize
        # How a further file is read, where all sets say the same of it.
        ranges = {source.mapped for source in own.values()}
        self.mapped = ranges.pop() if len(ranges) == 1 else None
        self.inverted = all(source.inverted for source in own.values())
        self.statistics = (np.zeros(1), np.ones(1))
        if normalize:
            self.statistics = _pooled(
                [_moments(own[name], self.input_shape) for name in own], list(self.shares.values())
            )
        self.own = own
        self.sets: dict[str, TableSource] = {
            name: source.fitted(self.input_shape, self.statistics) for name, source in own.items()
        }
        self.rule = (
            f"all images are {shape_text(self.input_shape)}: {'data.image_size' if image_size else 'the largest of the sets'}, "
            f"{'data.channels' if channels else 'colours' if depth == 3 else 'grey'}"
            + ("; normalised by the training images of all sets in their shares" if normalize else "")
        )
        told = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        log.info("data sets: %s of the tasks; %s", told, self.rule)

    @property
    def members(self) -> Mapping[str, TableSource]:
        return self.sets

    def share(self, name: str) -> float:
        return self.shares[name]

    def each(self, change: Callable[[TableSource], TableSource]) -> DataSource:
        found = copy.copy(self)
        found.sets = {name: change(source) for name, source in self.own.items()}
        first = next(iter(found.sets.values()))
        found.item, found.input_shape = first.item, first.input_shape
        if found.item == "vector":  # which no pixel's shape or normalisation says anything of
            found.rule = f"all items are vectors of {first.input_shape[0]}"
        return found

    def make_ready(self, device: torch.device, split: Split | None = None) -> None:
        for source in self.sets.values():
            source.make_ready(device, split)

    @property
    def origins(self) -> Sequence[Origin]:
        return list({origin.where: origin for source in self.sets.values() for origin in source.origins}.values())

    @property
    def tested(self) -> Mapping[str, DataSource]:
        return self.sets

    def statistics_of(self, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted from each channel and what it is divided by: of the training images, whatever `rows` are."""
        return self.statistics

    def domains(self, seed: int, split: Split, start: int, stop: int) -> np.ndarray:
        """The number of the set that each task from `start` to `stop` is of, int64 `[stop - start]`."""
        first = np.uint64(uniforms(seed, f"{split}/domains", 0, 1, 1)[0, 0] * 2.0**64)
        points = (first + np.arange(start, stop).astype(np.uint64) * GOLDEN) * 2.0**-64  # the sum is modulo 2**64
        inner = np.cumsum(list(self.shares.values()))[:-1]  # rounding must not leave a point beyond the last share
        return np.searchsorted(inner, points, side="right")

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:

        def own(name: str, source: TableSource) -> EpisodeSampler:
            with keyed(f"data.sets.{name}", ["ratios"]):
                return source.sampler(split, task, seed, device)

        samplers = [named(f"data: {name}", functools.partial(own, name, one)) for name, one in self.sets.items()]

        def episodes(start: int, stop: int) -> Episodes | MixedEpisodes:
            numbered = enumerate(self.domains(seed, split, start, stop), start)
            parts: list[Episodes] = []
            for domain, stretch in itertools.groupby(numbered, key=lambda item: int(item[1])):
                places = [place for place, _ in stretch]
                drawn = samplers[domain](places[0], places[-1] + 1)
                parts += drawn.split(1) if isinstance(drawn, MixedEpisodes) else [drawn]  # in their order
            return together(parts)

        return episodes

    def labelled(self, part: Split | None, split: Split | None = None) -> Labelled:
        """The labelled images of all sets, the classes of each numbered after those of the sets before it."""
        found = [source.labelled(part, split) for source in self.sets.values()]
        classes = np.cumsum([0, *(len(images.names) for images in found)])
        rows = np.cumsum([0, *(int(source.table.offsets[-1]) for source in self.sets.values())])

        def reader(
            device: torch.device, reference: np.ndarray | None = None
        ) -> Callable[[np.ndarray, np.ndarray], torch.Tensor]:
            readers = [source.reader(device) for source in self.sets.values()]

            def read(places: np.ndarray, turns: np.ndarray) -> torch.Tensor:
                domain = np.searchsorted(rows, places[..., 0], side="right") - 1
                x = torch.empty(*places.shape, *self.input_shape, device=device)
                for number in np.unique(domain):
                    where = domain == number
                    x[torch.from_numpy(where).to(device)] = readers[number](places[where] - rows[number], turns[where])
                return x

            return read

        def make_rows_ready(device: torch.device, places: np.ndarray) -> None:
            for images, first, last in zip(found, rows[:-1], rows[1:], strict=True):
                images.make_rows_ready(device, places[(places >= first) & (places < last)] - first)

        def identify(places: np.ndarray) -> list[str]:
            domain = np.searchsorted(rows, places, side="right") - 1
            names, images = list(self.sets), list(self.sets.values())
            return [
                f"{names[number]}/{images[number].identities(np.array([place - rows[number]]))[0]}"
                for number, place in zip(domain, places, strict=True)
            ]

        return Labelled(
            rows=np.concatenate([images.rows + first for images, first in zip(found, rows[:-1], strict=True)]),
            rotations=np.concatenate([images.rotations for images in found]),
            labels=np.concatenate([images.labels + first for images, first in zip(found, classes[:-1], strict=True)]),
            names=[f"{name}/{label}" for name, images in zip(self.sets, found, strict=True) for label in images.names],
            reader=reader,
            identify=identify,
            views=found[0].views,
            make_rows_ready=make_rows_ready,
        )

    def describe(self) -> dict[str, Any]:
        described = {name: source.describe() for name, source in self.sets.items()}

        def digest(key: str, shape: tuple[int, ...]) -> str:
            decisive = [[name, each[key], self.shares[name]] for name, each in described.items()]
            return hashlib.sha256(json.dumps([decisive, shape]).encode()).hexdigest()

        encoded = all("before_encoding" in each for each in described.values())
        totals = {
            key: {split: sum(each[key][split] for each in described.values()) for split in ("train", "val", "test")}
            for key in ("classes", "images")
        }
        return {
            "fingerprint": digest("fingerprint", self.input_shape),
            **({"before_encoding": digest("before_encoding", self.image_shape)} if encoded else {}),
            **totals,
            "input_shape": list(self.input_shape),
            "shares": self.shares,
            "rule": self.rule,
            "sets": described,
        }


def named(where: str, build: Callable[[], Any]) -> Any:
    """What `build` returns.

    Args:
        where: What its errors begin with.
        build: Builds it.

    Raises:
        UserError: That of `build`.
    """
    try:
        return build()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def built_table(node: Node, name: str, key: str, **changes: Any) -> TableSource:
    """A data set of labelled items.

    Raises:
        UserError: It cannot be built, or its tasks are of regression.
    """
    built = named(f"{key}: {name}", lambda: node.build(**changes))
    if not isinstance(built, TableSource):
        raise UserError(f"{key}: {printable(name)}: are regression tasks, which cannot stand beside sets of images")
    return built


def built_images(node: Node, name: str, size: int | None, channels: int | None, key: str = "data") -> ImageSource:
    """A set of images, read from its files at a size and with so many channels, where it can.

    Raises:
        UserError: It cannot be built, or holds no images.
    """
    wanted = {"image_size": size, "channels": channels}
    changes = {setting: value for setting, value in wanted.items() if value is not None and node.knows(setting)}
    built = built_table(node, name, key, **changes)
    if not isinstance(built, ImageSource):
        raise UserError(
            f"{key}: {printable(name)}: are no images; "
            + (
                "data=[...] takes sets of images alone"
                if key == "data"
                else "they cannot be tested on beside sets of images without an encoder"
            )
        )
    return built


def read_as(node: Node, name: str, built: TableSource, member: TableSource, where: str) -> TableSource:
    """A data set at the size and with the channels of another one, by whose pixels its classes are known; as it is where it cannot."""
    if not (isinstance(built.table, Table) and isinstance(member.table, Table)):
        return built
    depth, height, width = member.table.images.shape[1:]
    if height != width or built.table.images.shape[1:] == (depth, height, width):
        return built
    wanted = {"image_size": height, "channels": depth}
    changes = {setting: value for setting, value in wanted.items() if node.knows(setting)}
    return built_table(node, name, where, **changes) if changes else built


def _refuse_other_divisions(nodes: Mapping[str, Node], sets: Mapping[str, ImageSource]) -> None:
    """Checks that no set has a class for validation or testing that another trains on: FC100 and CIFAR-FS divide the same images.

    Sets of other classes too may share some of them. Classes are known by their images, and by their names alone where all of a set
    have the names of another's and the images cannot be compared.
    """
    for (name, one), (other, two) in itertools.permutations(sets.items(), 2):
        again = same_names(one, two)
        alike = read_as(nodes[other], other, two, one, "data") if again else two
        by_images, by_names = shared_classes(told(one), alike)
        whole = again and len(by_images | by_names) == len(ranks(two))
        if again and not whole:
            two.told_apart |= {key(one)}
        trained = shared_classes(told(one, one.splits["train"]), alike)
        held = {*map(int, two.splits["val"]), *map(int, two.splits["test"])}
        found = held & (trained.by_images | trained.by_names if whole else trained.by_images)
        shared = sorted(two.table.names[number] for number in found)
        if shared and not one.undivided:  # else there are too few to divide
            same = "are the same images" if whole else "share images"
            if whole and by_names:
                same = "have the same names of classes, and images that cannot be compared"
            raise UserError(
                f"data: {printable(name)} and {printable(other)} {same}, divided otherwise: {counted(len(shared), 'class', 'classes')} "
                f"({printable(shared[0])}, say) of {printable(name)}'s training would be tested on in "
                f"{printable(other)}; take one of them"
            )


def _largest(sets: Mapping[str, Node]) -> int:
    """The largest side of an image of some data sets; one whose settings do not say it is built for it."""
    sides = []
    for name, node in sets.items():
        known = node.node.get("image_size") if node.knows("image_size") else None
        sides.append(known if isinstance(known, int) else max(built_images(node, name, None, None).input_shape[1:]))
    return max(sides)


def _moments(source: ImageSource, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the mean square of each channel of training images that were brought to a shape, float64 `[C]`."""
    training = source.labelled("train" if source.table.metadata.get("parts") else None, "train").rows
    rows = np.unique(training)
    rows = rows[:: -(-len(rows) // MEASURED)]
    sums = np.zeros((2, shape[0]))
    for some in np.array_split(rows, -(-len(rows) // 50)):
        x = to_shape(torch.from_numpy(source.table.images[some]).float(), shape).double().numpy() / 255
        sums += [x.sum((0, 2, 3)), (x**2).sum((0, 2, 3))]
    mean, square = sums / (len(rows) * shape[1] * shape[2])
    return mean, square


def _pooled(moments: Sequence[tuple[np.ndarray, np.ndarray]], shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation of a mixture in these shares."""
    mean, square = (np.average([part[which] for part in moments], axis=0, weights=shares) for which in (0, 1))
    return mean, np.sqrt((square - mean**2).clip(0)).clip(1e-3)
