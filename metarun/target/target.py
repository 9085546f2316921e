"""The target of a transfer: its labelled subsets, drawn the same for every method, and what is measured on them."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from metarun import files
from metarun.data.image_batches import Labelled, generator
from metarun.data.source import DataSource
from metarun.errors import UserError
from metarun.ops import metrics

if TYPE_CHECKING:
    from metarun.engine.hardware import Hardware
    from metarun.runs.logger import RunLogger
    from metarun.target.base import TargetMethod

log = logging.getLogger("metarun")


class Target:
    """A data set's training images, of which small subsets are drawn, and its test images.

    `settings` are the config's `target`. Raises `UserError` for a data set that cannot be a target, and for subsets that
    cannot be drawn.
    """

    def __init__(self, source: DataSource, settings: Any) -> None:
        self.source = source
        self.settings = settings
        self.train, self.test = (_named(source.labelled(part), part) for part in ("train", "test"))
        self.validation = source.labelled("val")  # for methods that train on the target's labels
        self.names = self.train.names
        if len(self.names) < 2:
            raise UserError(f"target: has one class alone ({self.names[0]}); there is nothing to tell apart")
        sizes = settings.train_images
        self.sizes: list[int | None] = [sizes] if sizes is None or isinstance(sizes, int) else sorted(sizes)
        for size in self.sizes:  # all that can be wrong with them is found before anything is trained
            self.train.subset(size, "target.train_images", settings.subset_seed, 0)
        self.test.subset(settings.test_images, "target.test_images", settings.subset_seed, 0)

    def fit_to(self, source: DataSource) -> None:
        """Brings all images to the shape of the source's, for a backbone that was trained on these."""
        shape, own = source.input_shape, self.source.input_shape
        if shape == own:
            return
        log.info("target: images %s are brought to the source's %s", _times(own), _times(shape))

        def change(x: Tensor) -> Tensor:
            if x.shape[1] != shape[0]:
                x = x.expand(-1, shape[0], -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True)
            if x.shape[2:] != shape[1:]:
                x = F.interpolate(x, shape[1:], mode="bilinear", antialias=True)
            return x

        self.train, self.validation, self.test = (
            replace(part, change=change) for part in (self.train, self.validation, self.test)
        )

    def subset(self, size: int | None, repeat: int) -> tuple[Labelled, Labelled]:
        """The training and the test images of one repeat."""
        seed = self.settings.subset_seed
        return (
            self.train.subset(size, "target.train_images", seed, repeat),
            self.test.subset(self.settings.test_images, "target.test_images", seed, repeat),
        )

    def measure(
        self, method: TargetMethod, seed: int, hardware: Hardware, folder: Path, logger: RunLogger
    ) -> dict[str, Any]:
        """Scores of `method` on every size and repeat, shared out among the ranks: numbers for `result.json`.

        Each is kept in `folder` as soon as it is there, so that a killed run goes on with the next.
        """
        settings, world = self.settings, hardware.world
        jobs = [(size, repeat) for size in self.sizes for repeat in range(settings.repeats)]
        if world.main:
            folder.mkdir(exist_ok=True)
        world.barrier()
        began = time.perf_counter()
        with logger.progress("target", len(jobs)) as advance:
            for number, (size, repeat) in enumerate(jobs):
                if number % world.size != world.rank:
                    continue
                path = folder / f"{size or 'all'}-{repeat}.json"
                if not path.is_file():
                    train, test = self.subset(size, repeat)
                    hardware.seed(int(generator(seed, size, repeat).integers(2**62)))
                    known, asked = (images.whole(hardware.device, domain=1) for images in (train, test))
                    with hardware.autocast():
                        scores = method.predict(known, asked.x, len(self.names))
                    if not scores.isfinite().any(1).all():
                        raise UserError(
                            f"transfer: the scores are not finite with {len(train)} images, repeat {repeat}; try a lower "
                            "transfer.optimizer.lr"
                        )
                    found = metrics.classification(scores.double().cpu().numpy(), test.labels)
                    files.save_json(path, {"train_images": len(train), "test_images": len(test), **found})
                advance(number + 1)
        world.barrier()
        curve: list[dict[str, Any]] = []
        values: list[list[float]] = []  # for paired comparisons
        for size in self.sizes:
            repeats = [
                json.loads((folder / f"{size or 'all'}-{repeat}.json").read_text())
                for repeat in range(settings.repeats)
            ]
            curve.append(metrics.over_repeats(repeats))
            values.append([repeat["acc"] for repeat in repeats])
            logger.curve("target/acc_of_train_images", curve[-1]["acc"], curve[-1]["train_images"])
            log.info(
                "target: %d images, accuracy %.4f +- %.4f", *(curve[-1][k] for k in ("train_images", "acc", "acc_ci95"))
            )
        if world.main:
            files.save_arrays(folder.parent / "test_scores.npz", values=np.array(values))
        last = {f"target/{name}": value for name, value in curve[-1].items()}
        return {
            **last,
            "target/curve": curve,
            "target/classes": self.names,
            "target/chance": float(np.max(self.test.counts) / len(self.test)),
            "target/interval": f"95%, over {settings.repeats} repeats (training subset, test subset, and draws), Student's t",
            "target/seconds": time.perf_counter() - began,
        }

    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json`."""
        return {**self.source.describe(), "images": {"train": len(self.train), "test": len(self.test)}}


def _named(images: Labelled, part: str) -> Labelled:
    missing = [name for name, n in zip(images.names, images.counts, strict=True) if not n]
    if missing:
        raise UserError(f"target: class {missing[0]} has no {part} images")
    return images


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
