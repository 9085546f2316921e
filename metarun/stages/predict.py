"""The stage that classifies the user's own images by what an earlier run learned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun import files
from metarun.engine import checkpoint
from metarun.engine import hardware as hardware_module
from metarun.engine.train import Learner as Trained
from metarun.errors import UserError
from metarun.inference import store
from metarun.inference.classifier import Classifier, threshold
from metarun.inference.image_files import examples, find_images
from metarun.inference.learner import Learner
from metarun.inference.page import page
from metarun.inference.predictions import Predictions, show
from metarun.runs import result
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.text import printable, shown_path

PREDICT = "predict"  # the kind of its numbers in `result.json`
NAMED = 5  # unreadable files that the terminal names


class Predict(Stage):
    """Classifies images by the classifier of a run, or by what its learner learns from the examples of `support=`.

    It leaves `predictions.csv` and `index.html` in the run's folder.
    """

    needs_checkpoint = True
    continues_config = False
    needs_data = False

    def prepare(self, run: Run) -> None:
        config = run.config
        if not config.images:
            raise UserError(
                "images: must be given: a file, a folder, a pattern, or - for a list of paths on standard input"
            )
        if run.world.size > 1:
            raise UserError(f"hardware.processes={run.world.size}: images are classified by one process; leave it at 1")
        held = store.load(Path(config.checkpoint))
        unknown = config.unknown or "off"
        if held.classes is None and not config.support:
            raise UserError(
                f"checkpoint={shown_path(config.checkpoint)}: learned from episodes and has no classes of its own; add "
                "support=FOLDER, with a folder of a few examples for each class"
            )
        hardware = hardware_module.choose(config.hardware, held.blueprint.learner(), run.world)
        learner = Learner(held, hardware.device)
        threshold(unknown, learner)
        if config.support:
            found = examples(config.support)
            learner.method.check(len(found))
            paths = [path for entry in found for path in entry.paths]
            labels = [entry.name for entry in found for _ in entry.paths]
            self.images = find_images(config.images, classes=[entry.name for entry in found])
            self.classifier = Classifier(learner, unknown=unknown, seed=config.seed).fit(paths, labels)
        else:
            self.classifier = Classifier(learner, unknown=unknown).restored()
            self.images = find_images(config.images, classes=self.classifier.classes_.tolist())
        self.origin = held.origin
        run.add(PREDICT, Trained(PREDICT, learner.algorithm, config.train, config.seed, hardware))

    def execute(self, run: Run) -> None:
        classifier, images = self.classifier, self.images
        digest = inputs_digest(self.origin, run.config, images.paths)
        with run.logger.progress("classifying", len(images.paths)) as advance:
            scored = classifier.scored(images, advance)
        found = Predictions(classifier, images, scored)
        if not found.readable.any():
            path, reason = next(iter(images.unreadable.items()))
            raise UserError(f"images: none of the {len(images.paths)} can be read; {shown_path(path)}: {reason}")
        files.save_bytes(run.folder / "predictions.csv", found.table().encode(errors="surrogateescape"))
        files.save_bytes(run.folder / "index.html", page(found, run.folder).encode(errors="surrogateescape"))
        numbers = {
            **found.describe(),
            "inputs": digest,
            "unreadable": {str(path): reason for path, reason in images.unreadable.items()},
        }
        run.result |= {
            result.key(result.CHECKPOINT, "sha256"): checkpoint.digest(self.origin),
            **{result.key(PREDICT, name): value for name, value in numbers.items()},
        }

    def is_current(self, config: DictConfig, stored: dict[str, Any]) -> bool:
        if config.images == "-":  # which can be read once
            return False
        origin = store.load(Path(config.checkpoint)).origin
        return inputs_digest(origin, config, find_images(config.images).paths) == stored.get(
            result.key(PREDICT, "inputs")
        )

    def conclude(self, folder: Path, stored: dict[str, Any]) -> str:
        own = f"{PREDICT}/"
        found = {key.removeprefix(own): value for key, value in stored.items() if key.startswith(own)}
        show(found, folder)
        unreadable = found["unreadable"]
        for path, reason in list(unreadable.items())[:NAMED]:
            print(f"not read  {printable(path)}: {printable(reason)}")
        if not unreadable:
            return ""
        total = found["images"] + len(unreadable)
        return (
            f"images: {len(unreadable)} of {total} cannot be read, each with its reason in result.json; the others are "
            "classified"
        )


def inputs_digest(origin: Path, config: DictConfig, images: Sequence[Path]) -> str:
    """A digest of everything that the predictions depend on: the weights, and the names, sizes and times of all files."""
    paths = [path for entry in examples(config.support) for path in entry.paths] if config.support else []
    digest = hashlib.sha256(checkpoint.digest(origin).encode())
    for line in _states([*paths, *images]):
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _states(paths: Iterable[Path]) -> Iterable[str]:
    for path in paths:
        try:
            status = path.stat()
            yield f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            yield f"{path}\0missing\n"
