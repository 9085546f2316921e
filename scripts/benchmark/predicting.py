"""Classifying image files: what reading them and telling what was found take beside the network itself."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from metarun.core import Spec
from metarun.engine.hardware import keep_freed_memory
from metarun.inference.blueprint import Blueprint
from metarun.inference.classifier import Classifier
from metarun.inference.image_files import ImageFiles
from metarun.inference.learner import Learner
from metarun.inference.preprocessing import Preprocessing
from metarun.inference.store import Calibration, Stored, tensors

from .device import growth
from .measure import alternate, summary

DIFFERENT = 200  # files; more of them are links to these
WARMING = 4  # batches before memory is measured: one at the network, and those that are read meanwhile
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """The network and the images.

    Attributes:
        images: The files; all of them are classified where memory is measured.
        size: The side of an image in pixels.
        batch: The images that go through a network together: few enough for a turn of some seconds.
        backbone: What builds the network that is timed.
        light: What builds the one that memory is measured with: what grows with the files does so whatever the network, and a light one
            is through them in seconds.
    """

    images: int = 10_000
    size: int = 84
    batch: int = 64
    backbone: dict[str, Any] = field(default_factory=lambda: {"_target_": "metarun.backbones.resnet12.ResNet12"})
    light: dict[str, Any] = field(default_factory=lambda: {"_target_": "metarun.backbones.conv4.Conv4", "channels": 4})


def classifier(work: Work, backbone: dict[str, Any]) -> Classifier:
    """A classifier of five classes on a network that nothing trained."""
    shape = (3, work.size, work.size)
    blueprint = Blueprint(
        {"_target_": "metarun.algos.protonet.ProtoNet"},
        backbone,
        {"_target_": "metarun.target.features.NearestCentroid"},
        Spec(shape, "classification", 5),
    )
    how = Preprocessing(work.size, 3, None, False, (0.5,), (0.25,), shape)
    torch.manual_seed(0)
    held = Stored(blueprint, how, tensors(blueprint.learner()), None, Calibration(), Path("none"))
    images = np.random.default_rng(0).integers(0, 256, (10, work.size, work.size, 3), dtype=np.uint8)
    return Classifier(Learner(held, CPU), batch_size=work.batch).fit(images, np.arange(10) % 5)


def files(work: Work, folder: Path) -> list[Path]:
    """So many JPEGs of coarse noise."""
    draw = np.random.default_rng(1)
    first = []
    for number in range(min(DIFFERENT, work.images)):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((work.size, work.size), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        first.append(folder / f"{number}.jpg")
    for number in range(len(first), work.images):
        os.link(first[number % len(first)], folder / f"{number}.jpg")
    return [folder / f"{number}.jpg" for number in range(work.images)]


def predicting(work: Work, rounds: int, seconds: float) -> dict[str, Any]:
    """Images a second of `Classifier` on files, and of its bare network on ready tensors, in one thread; and the memory of all files.

    Args:
        work: The networks and the images.
        rounds: Turns of each side.
        seconds: Of a turn; as many batches as fit in.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        paths = files(work, Path(folder))
        grown = memory(classifier(work, work.light), paths)  # first: what the other network leaves free would hide it
        found = throughput(classifier(work, work.backbone), paths, rounds, seconds)
    rates = {name: summary([work.batch * value for value in values]) for name, values in found.items()}
    shares = [one / other for one, other in zip(found["ours"], found["bare"], strict=True)]
    network, light = (Path(backbone["_target_"]).suffix[1:] for backbone in (work.backbone, work.light))
    return {
        "title": f"{network} on {work.size}x{work.size} JPEGs",
        "unit": "images/s",
        **rates,
        "share": summary(shares),
        "images": work.images,
        "growth": grown,
        "growth_with": light,
    }


def throughput(model: Classifier, paths: list[Path], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Batches a second of a classifier on files and of its bare network, round by round."""
    size = model.batch_size
    how = model.learner.held.preprocessing
    assert isinstance(how, Preprocessing)
    first = [paths[number % len(paths)] for number in range(size)]
    # As files are read: in the order of memory that they come in a network can be several times as fast.
    ((_, pixels),) = ImageFiles(first, [None] * size).batches(how, size)
    ready = how.inputs(pixels, CPU)

    def ours(batches: int) -> float:
        started = time.perf_counter()
        # Files that were named in a turn may be named again: a batch is as much work as any other.
        classify(model, [paths[number % len(paths)] for number in range(batches * size)])
        return time.perf_counter() - started

    def bare(batches: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(batches):
                model.network_(ready)
        return time.perf_counter() - started

    return alternate({"ours": ours, "bare": bare}, rounds, seconds)


def memory(model: Classifier, paths: list[Path]) -> int:
    """Bytes by which the peak grows while a classifier reads all files, beyond what a few batches of them have taken."""
    classify(model, paths[: WARMING * model.batch_size])
    return growth(lambda: classify(model, paths), CPU)


def classify(model: Classifier, paths: list[Path]) -> None:
    """Classifies files, as many batches as they make."""
    model.scored(ImageFiles(paths, [None] * len(paths)), lambda done: None)
