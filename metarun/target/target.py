"""The target of a transfer: its labelled subsets, drawn the same for every method, and what is measured on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metarun import files
from metarun.core import Batch
from metarun.core.backbone import IMAGES_AT_ONCE
from metarun.data.image_batches import Labelled, generator, make_ready, to_shape
from metarun.data.image_source import ImageSource
from metarun.data.source import DataSource, Split
from metarun.data.splits import SPLITS
from metarun.data.table_source import TableSource
from metarun.encoders import before_encoding
from metarun.errors import Diverged, UserError
from metarun.ops import metrics
from metarun.ops.measures import ACCURACY, overlap_of
from metarun.runs import contents, result
from metarun.target import predictions
from metarun.target.predictions import Predicted
from metarun.text import printable, shape_text, shown_path

if TYPE_CHECKING:
    from metarun.engine.hardware import Hardware
    from metarun.runs.logger import RunLogger
    from metarun.target.base import TargetClassifier, TargetMethod

log = logging.getLogger("metarun")

Keep = Callable[["TargetClassifier", Labelled, Batch], None]  # a classifier, and the images that it learned from

DIVIDED_ANEW = "anew in each repeat: of each class 80% to train on and 20%, but 2 images at least, to test on"


class Target:
    """Labelled images to train on, of which small subsets are drawn, and others to test on.

    A data set with a test part of its own keeps it. Any other is divided anew in each repeat, for one fixed division would
    make all repeats test the same few images. Where pixels are normalised, their mean and deviation are those of training images.

    Args:
        source: The data set.
        settings: The config's `target`.

    Attributes:
        train: The data set's own training images, or one fixed draw of 80%.
        validation: Its own validation images, or 10%, for a method that trains on the target's labels.
        test: Its own test images, or the other 10%.
        images: All images, which are divided anew in each repeat; None where the data set has a test part of its own.
        names: The names of the classes.
        sizes: The numbers of training images that are measured, ascending; None is all.

    Raises:
        UserError: The data set cannot be a target, or the subsets cannot be drawn.
    """

    def __init__(self, source: DataSource, settings: Any) -> None:
        self.source = source
        self.settings = settings
        everything = source.labelled(None)
        kept = _large_enough(everything, settings.min_images)
        own = {part: source.labelled(part).of_classes(kept) for part in SPLITS}
        self.train, self.validation, self.test = (own[split] for split in SPLITS)
        parts: tuple[Split, ...] = ("train", "test")
        for part in parts:
            _refuse_missing(own[part], everything.counts[kept], part, divided=source.has_test_part)
        self._digests: dict[int, str | None] = {}
        self.images = None
        if not source.has_test_part:
            self.images = everything.of_classes(kept)
            self.validation, self.test = (part.normalized_by(self.train) for part in (self.validation, self.test))
            self.train = self.train.normalized_by(self.train)
        self.names = self.train.names
        sizes = settings.train_images
        self.sizes: list[int | None] = [sizes] if sizes is None or isinstance(sizes, int) else sorted(sizes)
        for size in self.sizes:  # all that can be wrong with them is found before anything is trained
            self.subset(size, 0)

    @property
    def kind(self) -> str:
        """What its items are called: `images` or `texts`."""
        return "texts" if before_encoding(self.source).item == "text" else "images"

    def fit_to(self, source: DataSource) -> None:
        """Brings all images to the shape of the source's, for a backbone that was trained on these, and normalises both or neither.

        Args:
            source: What the backbone is trained on.

        Raises:
            UserError: Its items are of another shape, and not both are images.
        """
        if source.item == "image" and isinstance(self.source, ImageSource):
            self.source.normalize_as(source.underlying.normalize, "target")
        shape, own = source.input_shape, self.source.input_shape
        if shape == own:
            return
        if len(shape) != 3 or len(own) != 3:
            theirs, ours = (
                f"images {shape_text(one)}" if len(one) == 3 else f"vectors of {one[0]}" for one in (shape, own)
            )
            raise UserError(
                f"target: its items are {ours}, but those of data are {theirs}; take data and a target of one kind"
            )
        log.info("target: images %s are brought to the source's %s", shape_text(own), shape_text(shape))

        change = partial(to_shape, shape=shape)
        self.train, self.validation, self.test = (
            replace(part, change=change) for part in (self.train, self.validation, self.test)
        )
        self.images = self.images and replace(self.images, change=change)

    def division(self, repeat: int) -> tuple[Labelled, Labelled]:
        """Divides all images of one repeat into those to train on and those to test on; none is in both.

        Args:
            repeat: The number of the repeat, from 0.
        """
        if self.images is None:
            return self.train, self.test
        return self.images.divide(self.settings.subset_seed, repeat)

    def subset(self, size: int | None, repeat: int) -> tuple[Labelled, Labelled]:
        """Draws the training and the test images of one repeat; a training set holds those of half its size and less (`Labelled.subset`).

        Args:
            size: The number of training images; None for all.
            repeat: The number of the repeat, from 0.

        Raises:
            UserError: There are not so many images.
        """
        seed = self.settings.subset_seed
        train, test = self.division(repeat)
        return (
            train.subset(size, "target.train_images", seed, repeat),
            test.subset(self.settings.test_images, "target.test_images", seed, repeat),
        )

    def copies(self, train: Labelled, test: Labelled) -> np.ndarray:
        """Marks the test images that are copies of training images, with the same pixels or the same text, bool `[n]`."""
        source = self.source
        if not isinstance(source, TableSource):
            return np.zeros(len(test), dtype=bool)
        for row in {*train.rows.tolist(), *test.rows.tolist()} - self._digests.keys():
            self._digests[row] = source.digest_of(row)
        known = {self._digests[row] for row in train.rows.tolist()} - {None}  # a blank image is no copy
        return np.array([self._digests[row] in known for row in test.rows.tolist()], dtype=bool)

    def warn_copies(self, counts: Sequence[int], tested: int) -> dict[str, list[int]]:
        """Warns of test images that are copies of training images; the fact for `result.json`.

        Args:
            counts: How many there are in each repeat.
            tested: The test images of each.
        """
        least, most = min(counts), max(counts)
        if most:
            told = f"{least} to {most}" if least < most else str(most)
            log.warning(
                "target: %s of its %d test %s %s of training %s, with the same %s, so that the accuracy says less of others",
                told, tested, self.kind, "is a copy" if told == "1" else "are copies", self.kind,
                "words" if self.kind == "texts" else "pixels",
            )  # fmt: skip
        return {result.TARGET_COPIES: list(counts)}

    def varied(self, size: int | None) -> list[str]:
        """Says what differs between the images of the repeats; nothing where all have the same.

        Args:
            size: The number of training images; None for all.
        """
        train, test = self.division(0)
        found = [] if self.images is None else [f"division into training and test {self.kind}"]
        if size is not None and size < len(train):
            found.append("training subset")
        if self.settings.test_images is not None and self.settings.test_images < len(test):
            found.append("test subset")
        return found

    def measure(
        self,
        method: TargetMethod,
        seed: int,
        hardware: Hardware,
        folder: Path,
        logger: RunLogger,
        keep: Keep | None = None,
        scores: str = contents.SCORES,
    ) -> dict[str, Any]:
        """Scores `method` on every size and repeat, which the ranks share.

        Each is kept in `folder` as soon as it is there, so that a killed run goes on with the next. Beside `folder` rank 0
        leaves `scores` for paired comparisons and `predictions.csv` of the largest training subsets.

        Args:
            method: What is measured.
            seed: The seed of the run; the draws of a repeat depend on it, the size and the repeat.
            hardware: Where it is computed.
            folder: The folder of the numbers of each repeat.
            logger: Where the learning curve goes.
            keep: Leaves `classifier.pt` beside `folder`, of the first repeat with the most training images, which is measured again
                where that file is not there.
            scores: The name of the file with the accuracies.

        Returns:
            Numbers for `result.json`.

        Raises:
            Diverged: Scores are not finite.
        """
        settings, world = self.settings, hardware.world
        jobs = [(size, repeat) for size in self.sizes for repeat in range(settings.repeats)]
        if world.main:
            folder.mkdir(exist_ok=True)
            (folder.parent / contents.OF_REPEATS).mkdir(exist_ok=True)
        world.barrier()
        make_ready(hardware.device, *(part for job in jobs for part in self.subset(*job)))
        with logger.progress("target", len(jobs)) as advance:
            for number, (size, repeat) in enumerate(jobs):
                if number % world.size == world.rank:
                    kept = keep if (size, repeat) == (self.sizes[-1], 0) else None
                    self._measure_one(method, seed, hardware, folder, size, repeat, kept)
                advance(number + 1)
        world.barrier()
        curve, values, seconds = self._curve(folder, logger)
        subsets = [self.subset(self.sizes[-1], repeat) for repeat in range(settings.repeats)]
        test = subsets[0][1]
        return {
            **{result.key(result.TARGET, name): value for name, value in curve[-1].items()},
            **(self._keep_predictions(folder.parent, curve[-1], values, scores) if world.main else {}),
            **(self.warn_copies([int(self.copies(*one).sum()) for one in subsets], len(test)) if world.main else {}),
            result.TARGET_CURVE: curve,
            result.TARGET_CLASSES: self.names,
            result.TARGET_CHANCE: float(np.max(test.counts) / len(test)),
            result.TARGET_DIVISION: "the data set's own" if self.images is None else DIVIDED_ANEW,
            result.TARGET_INTERVAL: self.interval(self.sizes[-1], curve[-1]),
            result.TARGET_SECONDS: seconds,
        }

    def _curve(self, folder: Path, logger: RunLogger) -> tuple[list[dict[str, Any]], list[list[float]], float]:
        """Makes the learning curve of the numbers kept in `folder`.

        Args:
            folder: The folder of the numbers of each repeat.
            logger: Where the curve goes.

        Returns:
            A point for each size, the accuracies `[sizes][repeats]`, and the seconds that all repeats took, in whatever sitting.
        """
        curve: list[dict[str, Any]] = []
        values: list[list[float]] = []
        seconds = 0.0
        for size in self.sizes:
            repeats = [
                files.read_json(folder / f"{_stem(size, repeat)}.json", files.MADE_AGAIN)
                for repeat in range(self.settings.repeats)
            ]
            overlap = self._overlap(repeats[0]["test_images"])
            point = metrics.over_repeats(repeats, same_images=not self.varied(size), overlap=overlap)
            # Whether the way with the target draws random numbers; of an earlier version's repeats it is not known.
            point["drawn"] = any(repeat.get("drawn", True) for repeat in repeats)
            curve.append(point)
            values.append([repeat[ACCURACY] for repeat in repeats])
            seconds += sum(repeat.get("seconds", 0.0) for repeat in repeats)  # an earlier version kept none
            logger.curve("target/acc_of_train_images", point[ACCURACY], point["train_images"])
            half = point[result.half_of(ACCURACY)]
            width = "too few for an interval" if half is None else f"+- {half:.4f}"
            log.info("target: %d %s, accuracy %.4f, %s", point["train_images"], self.kind, point[ACCURACY], width)
        return curve, values, seconds

    def _keep_predictions(
        self, folder: Path, point: dict[str, Any], values: list[list[float]], scores: str
    ) -> dict[str, Any]:
        """Writes `scores`, for paired comparisons, and `predictions.csv`.

        Args:
            folder: The run's folder.
            point: The last point of the learning curve, whose predictions these are.
            values: The accuracies `[sizes][repeats]`.
            scores: The name of the file of these.

        Returns:
            What `result.json` says of the predictions.
        """
        right = list[np.ndarray]()

        def noted() -> Iterator[Predicted]:
            for one in self._predictions(folder / contents.OF_REPEATS):
                right.append(one.classes == one.images.labels)
                yield one

        every = noted()  # one after the other: the probabilities of all of them may be larger than the memory
        written = predictions.write(folder / contents.PREDICTIONS, every)
        for _ in every:  # those beyond the most lines
            pass
        arrays = {"values": np.array(values)}
        if point["over"] == "test images":
            arrays["right"] = np.mean(right, axis=0)
        files.save_arrays(folder / scores, **arrays)
        told = {"file": contents.PREDICTIONS, "train_images": point["train_images"], "repeats": written}
        return {result.TARGET_PREDICTIONS: told}

    def _measure_one(
        self,
        method: TargetMethod,
        seed: int,
        hardware: Hardware,
        folder: Path,
        size: int | None,
        repeat: int,
        keep: Keep | None = None,
    ) -> None:
        stem = _stem(size, repeat)
        numbers, scored = folder / f"{stem}.json", folder.parent / contents.OF_REPEATS / f"{stem}.npz"
        kept = keep is None or (folder.parent / contents.CLASSIFIER).is_file()
        if kept and numbers.is_file() and _has_log_probabilities(scored):
            return
        train, test = self.subset(size, repeat)
        hardware.seed(int(generator(seed, size, repeat).integers(2**62)))
        before = hardware.random_state()
        began = time.perf_counter()
        known = train.with_views().whole(hardware.device, domain=1)
        with hardware.autocast():
            classifier = method.fit(known, len(self.names))
        # All together only where they depend on each other. In single precision: else they would depend on what shares their batch.
        parts = 1 if classifier.transductive else -(-len(test) // IMAGES_AT_ONCE)
        places = np.array_split(np.arange(len(test)), parts)
        scores = torch.cat([classifier(test.batch(which, hardware.device, domain=1).x) for which in places])
        if metrics.undefined(scores).any():
            raise Diverged(
                f"transfer: the scores are not finite with {len(train)} {self.kind}, repeat {repeat}; try a lower "
                "transfer.optimizer.lr"
            )
        drawn = not torch.equal(before, hardware.random_state())
        scores = scores.cpu()
        logs, values = classifier.log_probabilities(scores).numpy(), scores.double().numpy()
        files.save_arrays(scored, log_probabilities=logs, classes=values.argmax(1))
        found = metrics.classification(values, test.labels)
        if keep is not None:  # before the numbers, which mark what is done
            with hardware.autocast():
                keep(classifier, train, known)
        told = {"train_images": len(train), "test_images": len(test), "drawn": drawn}
        files.save_json(numbers, {**told, "seconds": time.perf_counter() - began, **found})

    def tested(self, folder: Path) -> tuple[Labelled, np.ndarray]:
        """Returns the test images of the first repeat with the most training images, and their log probabilities `[n, classes]`.

        Args:
            folder: Of a run that `measure` measured.
        """
        size = self.sizes[-1]
        path = folder / contents.OF_REPEATS / f"{_stem(size, 0)}.npz"
        stored = files.read_arrays(path, files.MADE_AGAIN, ["log_probabilities"])
        return self.subset(size, 0)[1], stored["log_probabilities"]

    def _predictions(self, folder: Path) -> Iterator[Predicted]:
        """Gathers the predictions of each repeat with the most training images."""
        size = self.sizes[-1]
        for repeat in range(self.settings.repeats):
            train, test = self.subset(size, repeat)
            path = folder / f"{_stem(size, repeat)}.npz"
            stored = files.read_arrays(path, files.MADE_AGAIN, ["classes", "log_probabilities"])
            classes, probabilities = stored["classes"], np.exp(stored["log_probabilities"])
            if classes.shape != (len(test),) or probabilities.shape[:1] != classes.shape:
                raise UserError(
                    f"{shown_path(path)}: is damaged (it is not of {len(test)} {self.kind}); {files.MADE_AGAIN}"
                )
            yield Predicted(repeat, len(train), test, classes, probabilities)

    def interval(self, size: int | None, point: dict[str, Any]) -> str:
        """Says over what the interval of a point of the learning curve is: what varied, and what did not."""
        repeats, tested = point["repeats"], point["test_images"]
        if point[result.half_of(ACCURACY)] is None:
            return "too few for an interval"
        draws = ["draws"] if point["drawn"] else []
        if point["over"] == "test images":
            same = f"{repeats} repeats (draws) have the same {self.kind}" if draws else f"{repeats} repeats are one"
            return f"95%, over the {tested} test {self.kind}, Wilson{f'; {same}' if repeats > 1 else ''}"
        varied = ", ".join([*self.varied(size), *draws])
        if point["agree"]:
            return f"95%, {repeats} repeats ({varied}) agree: over the {tested} test {self.kind} of one, Wilson"
        same = "" if "test" in varied else f" on the same {tested} test {self.kind}"
        shared = f", corrected for the {self.kind} that they share" if self._overlap(tested) else ""
        return f"95%, over {repeats} repeats ({varied}){same}, Student's t{shared}"

    def _overlap(self, tested: int) -> float:
        """How far repeats test the same images, see `overlap_of`."""
        return overlap_of(tested, len(self.test if self.images is None else self.images))

    def describe(self) -> dict[str, Any]:
        """Gives JSON values for `result.json`."""
        if self.images is None:
            return {**self.source.describe(), "images": {"train": len(self.train), "test": len(self.test)}}
        return {**self.source.describe(), "images": {"all": len(self.images)}}


def accuracy_of_others(right: np.ndarray, copied: np.ndarray) -> dict[str, float]:
    """Computes the accuracy without test images that are copies of training images, as `recipe=predict` does; empty if none or all are.

    Args:
        right: Which test images were predicted rightly, bool `[n]`.
        copied: Which are copies, bool `[n]`.
    """
    return {"acc_without_copies": float(right[~copied].mean())} if 0 < copied.sum() < len(copied) else {}


def _stem(size: int | None, repeat: int) -> str:
    return f"{size or 'all'}-{repeat}"


def _has_log_probabilities(scored: Path) -> bool:
    """Whether a repeat's predictions are there; an earlier version kept probabilities, from which these cannot be had."""
    return scored.is_file() and "log_probabilities" in files.read_arrays(scored, files.MADE_AGAIN, [])


def _large_enough(images: Labelled, least: int) -> np.ndarray:
    """Finds the classes with at least so many images, int64; a line says how many are left out."""
    kept = np.flatnonzero(images.counts >= least)
    if len(images.names) < 2:
        raise UserError(f"target: has one class alone ({images.names[0]}); there is nothing to tell apart")
    if len(kept) < 2:
        raise UserError(
            f"target.min_images={least}: leaves {len(kept)} of {len(images.names)} classes; there is nothing to tell apart"
        )
    if len(kept) < len(images.names):
        log.info("target: %d of %d classes, of at least %d %ss each", len(kept), len(images.names), least, images.item)
    return kept


def _refuse_missing(images: Labelled, counts: np.ndarray, part: Split, *, divided: bool) -> None:
    """Refuses a part of the images that has none of some class.

    Args:
        images: Those of the part.
        counts: The images of each class in all parts.
        part: Which it is.
        divided: Whether the data set itself says which images are of which part.

    Raises:
        UserError: A class has none.
    """
    missing = np.flatnonzero(images.counts == 0)
    if len(missing):
        enough = max(3, int(counts[missing].max()) + 1)
        needed = (
            f"all {counts[missing[0]]} are of other parts of the data set; move some"
            if divided
            else f"it has {counts[missing[0]]} in all, and a class needs 3, one to learn from and two to test on"
        )
        raise UserError(
            f"target: class {printable(images.names[missing[0]])} has no {part} {images.item}s; {needed}, or leave small classes out: "
            f"target.min_images={enough}"
        )
