"""The stage that writes what a run learned as a file that other programs run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.export import Dim

import metarun
from metarun import files
from metarun.config import task_of
from metarun.config.overrides import canonical
from metarun.core import Batch, count_text
from metarun.engine import checkpoint
from metarun.engine import hardware as hardware_module
from metarun.engine.learner import Trainable as Trained
from metarun.errors import UserError
from metarun.export import exported, graphs, onnx_file
from metarun.export.exported import IMAGES, Exported, Input
from metarun.inference import items, store
from metarun.inference.classifier import Classifier
from metarun.inference.image_files import ImageFiles, find_images
from metarun.inference.learner import Learner
from metarun.inference.preprocessing import Preprocessing
from metarun.inference.texts import TextPreprocessing
from metarun.ops import calibration
from metarun.ops.measures import ACCURACY
from metarun.runs import contents, result
from metarun.runs.folder import whole_config
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.predict import inputs_digest, left_out
from metarun.target.base import Own, TargetClassifier
from metarun.text import bytes_text, shell_path, shown_path

EXPORT = "export"  # the kind of its numbers in `result.json`
# Support images of a class, of a graph that takes any number: it is traced with the first, and compared with all. Methods do otherwise
# with one than with several.
SHOTS = (2, 1, 3)
LEARNED = "examples that it learned from"


class Export(Stage):
    """Writes the classifier of a run as ONNX or as a program of torch.export.

    With the classes of a transfer run, or those of `support=`, the file takes images and gives probabilities. Without, it takes
    the support images and their labels along. It is made, and compared with what `recipe=predict` says, before anything is written.
    """

    needs_checkpoint = True
    continues_config = False
    needs_data = False
    one_process = True
    reads = ("images", "support", "format", "int8", "task.ways", "test.task.ways")

    def prepare(self, run: Run) -> None:
        config = run.config
        if config.format == "onnx":
            for name in ("onnx", "onnxscript", "onnxruntime"):
                onnx_file.library(name)
        elif config.int8:
            raise UserError(f"int8=true: is for ONNX files, but format={config.format}; use format=onnx")
        held = store.load(Path(config.checkpoint))
        if isinstance(held.preprocessing, TextPreprocessing):
            raise UserError(
                f"checkpoint={shown_path(config.checkpoint)}: reads texts, and an exported file could not cut them into words; use "
                "recipe=predict or metarun.load"
            )
        cpu = OmegaConf.merge(config.hardware, {"device": "cpu", "autocast": None})
        hardware = hardware_module.choose(cpu, held.blueprint.learner(), run.world)
        learner = Learner(held, "cpu")
        self.held, self.given = held, ImageSet(learner, [])
        prepare, self.temperature = held.preprocessing.of_pixels, held.calibration.temperature or 1.0
        if held.classes is None and not config.support:
            if config.images:
                raise UserError(
                    "images: compare the files of a classifier of fixed classes; add support=FOLDER, or leave them out"
                )
            function, predict, inputs, (asked, *others) = self._of_learner(learner, config)
            self.digest = inputs_digest(held, items.Examples([], []), None)
            self.name, self.classes = "learner", None
        else:
            known = items.support(config.support, held.preprocessing)
            listed = compared(config, known, held)
            self.digest = inputs_digest(held, known, listed)  # before any is read: one may change meanwhile
            classifier = fitted(learner, known, config)
            if classifier.network_.transductive:
                raise UserError(self._transductive(learner, config))
            self.name, self.classes = "classifier", classifier.names
            self.temperature = classifier.calibration_.temperature or 1.0
            self.given = given_images(classifier, known, listed, config)
            function = graphs.of_classifier(classifier.network_.eval(), prepare, self.temperature)
            images = Input("images", "batch", Dim("batch", min=1), pixels_of(learner))
            inputs, asked, others = [images], [filled(self.given.pixels, learner, config.seed)], []
            predict = partial(predicted, classifier.network_, learner, self.temperature)
        try:
            metadata = self._metadata(learner, config)
            self.made = exported.export(
                function, inputs, asked, config.format, metadata, self.temperature, others, predict
            )
        except UserError as error:
            raise UserError(f"format={config.format}: {described(learner)} cannot be exported: {error}") from error
        self.inputs = inputs
        self.small = self._in_eight_bits(asked) if config.int8 else None
        run.add(EXPORT, Trained(EXPORT, learner.algorithm, config.train, config.seed, hardware))

    @staticmethod
    def _transductive(learner: Learner, config: DictConfig) -> str:
        """Why a method that looks at all images together is not exported."""
        return (
            f"checkpoint={shown_path(config.checkpoint)}: its prediction for an image depends on the others, which a "
            f"file cannot keep; {described(learner)} is transductive, algo=simpleshot, say, is not"
        )

    def _of_learner(
        self, learner: Learner, config: DictConfig
    ) -> tuple[Any, exported.Run, list[Input], list[list[np.ndarray]]]:
        """Of a method whose support set is given along: the function, what is predicted, inputs, and values of each of `SHOTS`."""
        ways, method = ways_of(learner, config), Own(learner.algorithm)
        if method.inductive.transductive:
            raise UserError(self._transductive(learner, config))
        method.check(ways)
        function = graphs.of_learner(
            method.inductive.eval(), learner.held.preprocessing.of_pixels, ways, self.temperature
        )

        def predict(support: np.ndarray, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
            y = torch.from_numpy(labels)
            known = Batch(inputs_of(support, learner), y, torch.ones_like(y))
            return predicted(method.fit(known, ways), learner, self.temperature, images)

        shots, shape = Dim("shots", min=1), pixels_of(learner)
        inputs = [
            Input("support_images", f"{ways}*shots", ways * shots, shape),
            Input("support_labels", f"{ways}*shots", ways * shots, (), "int64"),
            Input("images", "batch", Dim("batch", min=1), shape),
        ]
        draw = np.random.default_rng(config.seed)
        *supports, images = (
            draw.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (*(ways * shots for shots in SHOTS), IMAGES)
        )
        self.ways = ways
        labels = [np.arange(ways).repeat(shots) for shots in SHOTS]
        return function, predict, inputs, [[support, y, images] for support, y in zip(supports, labels, strict=True)]

    def _metadata(self, learner: Learner, config: DictConfig) -> dict[str, Any]:
        """What the file says of itself."""
        shape = pixels_of(learner)
        # Not `sys.argv`, which a program has that calls `metarun.run`.
        words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        found = {
            "metarun": metarun.__version__,
            "method": type(learner.algorithm).__name__,
            "channels": shape[0],
            "image_size": shape[1],
            "temperature": self.temperature,
            "command": shlex.join(["metarun", *canonical(words, config)]),
        }
        return {**found, "classes": self.classes} if self.classes else {**found, "ways": self.ways}

    def _in_eight_bits(self, asked: list[np.ndarray]) -> Exported:
        content = onnx_file.quantized(self.made.content)
        run = onnx_file.Session(content)
        difference = float(np.abs(run(*asked) - self.made.run(*asked)).max())
        seconds = exported.seconds_an_image(run, asked)
        self.same = float((run(*asked).argmax(1) == self.made.run(*asked).argmax(1)).mean())
        return Exported(content, run, self.made.parameters, difference, seconds)

    def execute(self, run: Run) -> None:
        suffix = exported.SUFFIXES[run.config.format]
        written = {self.name + suffix: self.made}
        if self.small is not None:
            written[f"{self.name}.int8{suffix}"] = self.small
        found: dict[str, Any] = {"files": {}}
        for name, one in written.items():
            files.save_bytes(run.folder / name, one.content)
            found["files"][name] = {
                "bytes": len(one.content),
                "parameters": one.parameters,
                "ms_an_image": one.seconds * 1000,
                "largest_difference": one.difference,
                **self.given.accuracy(one),
                **({"same_class": self.same} if one is self.small else {}),
            }
        run.wrote(*written)
        if self.classes:
            found["classes"] = self.classes
        else:
            found["ways"] = self.ways
        found["compared_on"] = IMAGES
        found["given"], found["learned_from"] = len(self.given.pixels), self.given.learned
        found["unreadable"] = {str(path): reason for path, reason in self.given.unreadable.items()}
        found["takes"] = [one.describe() for one in self.inputs]
        found["inputs"] = self.digest
        run.result |= {
            result.CHECKPOINT_DIGEST: checkpoint.digest(self.held.origin),
            **{result.key(EXPORT, name): value for name, value in found.items()},
        }

    def is_current(self, folder: Path, config: DictConfig, stored: dict[str, Any]) -> bool:
        written = stored[result.key(EXPORT, "files")]
        if any(
            not (path := folder / name).is_file() or path.stat().st_size != one["bytes"]
            for name, one in written.items()
        ):
            return False
        if not {result.key(EXPORT, name) for name in ("classes", "ways")} & set(stored):
            return False  # an earlier version made it, perhaps for other ways than are asked for
        if config.images == "-":  # which can be read once
            return False
        held = store.load(Path(config.checkpoint))
        known = items.support(config.support, held.preprocessing)
        images = compared(config, known, held)
        return inputs_digest(held, known, images) == stored.get(result.key(EXPORT, "inputs"))

    def conclude(self, folder: Path, stored: dict[str, Any]) -> str:
        found = {name: stored[result.key(EXPORT, name)] for name in ("files", "takes", "compared_on")}
        for name, one in found["files"].items():
            line = (
                f"{shell_path(folder / name)}: {bytes_text(one['bytes'])}, {one['parameters']:,} parameters, "
                f"{float(format(one['ms_an_image'], '.2g')):g} ms an image in one thread of this machine"
            )
            if "same_class" in one:
                line += (
                    f"; the class of {one['same_class']:.0%} of {found['compared_on']} images as in float32, probabilities "
                    f"within {one['largest_difference']:.2g}"
                )
            else:
                line += f"; probabilities within {one['largest_difference']:.1g} of recipe=predict's on {found['compared_on']} images"
            if ACCURACY in one:
                line += f"; accuracy {one[ACCURACY]:.2%} of {one['labelled']} {one['of']}"
            print(line)
        if learned := stored.get(result.key(EXPORT, "learned_from")):
            print(f"{learned} of the images: {LEARNED}, or copies of these, left out of the accuracy")
        if (ways := stored.get(result.key(EXPORT, "ways"))) is not None:
            print(
                f"ways     {ways}, of which the support images are examples; test.task.ways=N makes a file for N classes"
            )
        for name in found["files"]:
            print(f"try it   {command(folder / name, found['takes'])}")
        unreadable, given = (stored.get(result.key(EXPORT, name)) for name in ("unreadable", "given"))
        return left_out(unreadable or {}, "files were compared on the others", given or 0)


class ImageSet:
    """Images that were given to compare files on, as pixels, with the labels that are known.

    Attributes:
        pixels: uint8 `[n, channels, size, size]`.
        labels: int64 `[n]`, -1 where not known, and where an accuracy is not to be told.
        of: What they are, for messages.
        learned: How many of them are examples that were learned from, beside those that are `of` them.
        unreadable: The reason of each file that could not be read.
    """

    def __init__(self, learner: Learner, labels: Iterable[int], pixels: np.ndarray | None = None, of: str = "") -> None:
        self.of = of
        self.learned = 0
        self.unreadable: dict[Path, str] = {}
        self.labels = np.array(list(labels), dtype=np.int64)
        self.pixels = np.zeros((0, *pixels_of(learner)), np.uint8) if pixels is None else pixels

    def accuracy(self, one: Exported) -> dict[str, Any]:
        """The accuracy of an exported file on those whose label is known; nothing where there is none."""
        known = self.labels >= 0
        if not known.any():
            return {}
        right = [
            one.run(part).argmax(1) == labels
            for part, labels in zip(
                np.array_split(self.pixels[known], -(-known.sum() // IMAGES)),
                np.array_split(self.labels[known], -(-known.sum() // IMAGES)),
                strict=True,
            )
        ]
        return {ACCURACY: float(np.concatenate(right).mean()), "labelled": int(known.sum()), "of": self.of}


def ways_of(learner: Learner, config: DictConfig) -> int:
    """The number of classes that a file tells apart whose support set is given along.

    It is `test.task.ways`; where that is not given, the outputs of a method that has no others, or the ways that the run's own tests
    have, which may be fewer than those of its training.

    Raises:
        UserError: These are a range, or one.
    """
    ways = config.test.task.ways
    if ways is None and learner.algorithm.fixed_ways:
        ways = learner.algorithm.spec.outputs
    if ways is None:
        origin = Path(config.checkpoint)
        path = (origin if origin.is_dir() else origin.parent) / contents.CONFIG
        ways = task_of(whole_config(path, "say test.task.ways=N"), "test").ways
    if not isinstance(ways, int) or ways < 2:
        shown = ways if isinstance(ways, int) else count_text(tuple(ways))
        raise UserError(
            f"test.task.ways={shown}: a file tells one number of classes apart, at least 2; give that number"
        )
    return ways


def fitted(learner: Learner, known: items.Examples, config: DictConfig) -> Classifier:
    """The classifier of the examples of `support=`, or the one that the run kept."""
    if not config.support:
        return Classifier(learner).restored()
    learner.method.check(len(set(known.labels)))
    return Classifier(learner, seed=config.seed).fit(*known)


def given_images(
    classifier: Classifier, known: items.Examples, images: ImageFiles | None, config: DictConfig
) -> ImageSet:
    """The images of `images=`, or without them the examples of `support=`.

    Args:
        classifier: Whose classes they are of.
        known: The examples.
        images: The images that `images=` names; None where it names none.
        config: The run's.

    Raises:
        UserError: None of them can be read.
    """
    learner = classifier.learner
    if images is None and not known.items:
        return ImageSet(learner, [])
    asked = images or ImageFiles(known.items, list(known.labels))
    how = learner.held.preprocessing
    assert isinstance(how, Preprocessing)
    parts = list(asked.batches(how, IMAGES))
    if not parts:
        raise UserError(f"images={shown_path(config.images or config.support)}: none of them can be read")
    rows = [row for part, _ in parts for row in part]
    places = {name: place for place, name in enumerate(classifier.names)}
    labels = [places.get(asked.labels[row] or "", -1) for row in rows]
    whole = np.concatenate([pixels for _, pixels in parts])
    if images is None:
        return ImageSet(learner, labels, whole, LEARNED)
    learned = classifier.learned_from(whole)
    given = ImageSet(learner, np.where(learned, -1, labels), whole, "labelled images")
    given.learned, given.unreadable = int(learned.sum()), images.unreadable
    return given


def compared(config: DictConfig, known: items.Examples, held: store.Stored) -> ImageFiles | None:
    """The files of `images=`, those in folders that are called like the classes with their labels."""
    return find_images(config.images, "images", known.labels or held.classes or ()) if config.images else None


def filled(pixels: np.ndarray, learner: Learner, seed: int) -> np.ndarray:
    """`IMAGES` images to compare on: at most half of them given ones, the others noise."""
    given = pixels[: IMAGES // 2]
    noise = np.random.default_rng(seed).integers(0, 256, (IMAGES - len(given), *pixels_of(learner)), dtype=np.uint8)
    return np.concatenate([given, noise])


def inputs_of(pixels: np.ndarray, learner: Learner) -> Tensor:
    """The network's input of pixels, by the way that `recipe=predict` takes, which need not be that of a graph."""
    how = learner.held.preprocessing
    assert isinstance(how, Preprocessing)
    return how.inputs(pixels, learner.device)


def predicted(network: TargetClassifier, learner: Learner, temperature: float, pixels: np.ndarray) -> np.ndarray:
    """What `recipe=predict` says of images: the probability of each class, `[B, classes]`.

    Args:
        network: What was fitted.
        learner: Whose preprocessing the images have.
        temperature: Divides the logarithms of the network's probabilities.
        pixels: The images, uint8 `[B, channels, size, size]`.
    """
    with torch.no_grad():
        scores = network(inputs_of(pixels, learner)).double()
    found: np.ndarray = np.exp(calibration.tempered(network.log_probabilities(scores).numpy(), temperature))
    return found


def pixels_of(learner: Learner) -> tuple[int, int, int]:
    """The shape of an image before preprocessing."""
    how = learner.held.preprocessing
    assert isinstance(how, Preprocessing)
    return how.channels, how.image_size, how.image_size


def described(learner: Learner) -> str:
    """What is exported, for messages."""
    return type(learner.algorithm).__name__


def command(path: Path, inputs: list[dict[str, Any]]) -> str:
    """A command that runs an exported file on black images.

    Args:
        path: The file.
        inputs: What it takes, as `Input.describe` describes it.
    """
    values = []
    for one in inputs:
        # Of classes as many as there must be, and otherwise one row.
        rows, *shape = one["shape"]
        count = int(rows.partition("*")[0]) if "*" in rows else 1
        kind = f"numpy.arange({count})" if not shape else f"numpy.zeros({(count, *shape)}, '{one['dtype']}')"
        values.append((one["name"], kind))
    if path.suffix == ".onnx":
        given = ", ".join(f"'{name}': {kind}" for name, kind in values)
        code = (
            "import numpy, onnxruntime, sys; s = onnxruntime.InferenceSession(sys.argv[1]); print(s.run(None, {%s})[0])"
        )
    else:
        given = ", ".join(f"torch.from_numpy({kind})" for _, kind in values)
        code = "import numpy, torch, sys; m = torch.export.load(sys.argv[1]).module(); print(m(%s))"
    return f'python -c "{code % given}" {shell_path(path)}'
