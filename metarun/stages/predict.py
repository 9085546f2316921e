"""The stage that classifies the user's own images, or texts, by what an earlier run learned."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun import files
from metarun.config.overrides import key_of
from metarun.engine import checkpoint
from metarun.engine import hardware as hardware_module
from metarun.engine.learner import Trainable as Trained
from metarun.errors import UserError
from metarun.inference import items, store
from metarun.inference.classifier import Classifier, threshold
from metarun.inference.learner import Learner
from metarun.inference.page import page
from metarun.inference.predictions import Predictions, show
from metarun.inference.store import Stored
from metarun.ops import batch_norm
from metarun.runs import contents, result
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.text import printable, shown_path

PREDICT = "predict"  # begins the keys of this stage's numbers in `result.json`
NAMED = 5  # so many unreadable files are named on the terminal


class Predict(Stage):
    """Classifies images, or texts, by the classifier of a run, or by what its learner learns from the examples of `support=`.

    It leaves `predictions.csv` and `index.html` in the run's folder.
    """

    needs_checkpoint = True
    continues_config = False
    needs_data = False
    one_process = True
    reads = ("items", "images", "support", "unknown")

    def prepare(self, run: Run) -> None:
        config = run.config
        origin, key = given(config)
        held = store.load(Path(config.checkpoint))
        how = held.preprocessing
        unknown = config.unknown or "off"
        if held.classes is None and not config.support:
            raise UserError(
                f"checkpoint={shown_path(config.checkpoint)}: learned from episodes and has no classes of its own; add "
                "support=FOLDER, with a folder of a few examples for each class"
            )
        hardware = hardware_module.choose(config.hardware, held.blueprint.learner(), run.world)
        learner = Learner(held, hardware.device)
        threshold(unknown, learner)
        known = items.support(config.support, how)
        if config.support:
            learner.method.check(len(set(known.labels)))
        self.images = items.found(origin, how, key, known.labels or held.classes or ())
        self.digest = inputs_digest(held, known, self.images)  # before any is read: one may change meanwhile
        check_readable(self.images, how, key)
        if config.support:
            self.classifier = Classifier(learner, unknown=unknown, seed=config.seed).fit(*known)
        else:
            self.classifier = Classifier(learner, unknown=unknown).restored()
        self.origin = held.origin
        run.add(PREDICT, Trained(PREDICT, learner.algorithm, config.train, config.seed, hardware))

    def execute(self, run: Run) -> None:
        classifier, images = self.classifier, self.images
        with run.logger.progress("classifying", len(images.paths)) as advance:
            scored = classifier.scored(images, advance)
        found = Predictions(classifier, images, scored)
        if not found.readable.any():
            raise none_readable(images, given(run.config)[1])  # all of them were damaged, or removed, only now
        files.save_bytes(run.folder / contents.PREDICTIONS, found.table().encode(errors="backslashreplace"))
        files.save_bytes(run.folder / contents.PAGE, page(found, run.folder).encode(errors="backslashreplace"))
        run.wrote(contents.PREDICTIONS, contents.PAGE)
        numbers = {
            **found.describe(),
            "certainty": classifier.learner.held.calibration.certainty,
            "inputs": self.digest,
            "unreadable": {str(path): reason for path, reason in images.unreadable.items()},
        }
        run.result |= {
            result.CHECKPOINT_DIGEST: checkpoint.digest(self.origin),
            **{result.key(PREDICT, name): value for name, value in numbers.items()},
        }

    def protocol(self, run: Run) -> dict[str, Any]:
        """What holds of the predictions, which a norm that looks at other queries has no part in."""
        return {
            result.TRANSDUCTIVE: self.classifier.network_.transductive,
            "labelled_images": batch_norm.labelled_rule(run.algorithm.backbone.norm),
        }

    def is_current(self, folder: Path, config: DictConfig, stored: dict[str, Any]) -> bool:
        origin, key = given(config)
        if origin == "-":  # which can be read once
            return False
        if not all((folder / name).is_file() for name in (contents.PREDICTIONS, contents.PAGE)):
            return False
        held = store.load(Path(config.checkpoint))
        known = items.support(config.support, held.preprocessing)
        images = items.found(origin, held.preprocessing, key, known.labels or held.classes or ())
        return inputs_digest(held, known, images) == stored.get(result.key(PREDICT, "inputs"))

    def conclude(self, folder: Path, stored: dict[str, Any]) -> str:
        own = f"{PREDICT}/"
        found = {key.removeprefix(own): value for key, value in stored.items() if key.startswith(own)}
        show(found, folder)
        return left_out(found["unreadable"], "the others are classified", found["images"])

    def next_steps(self, stored: dict[str, Any]) -> list[str]:
        """The export of the classifier, where it can be, and telling unknown classes, where the run chose a threshold for them."""
        words = {key_of(word): word for word in stored[result.OVERRIDES]}
        steps = []
        if stored[result.key(PREDICT, "kind")] == "images" and not stored[result.key(PREDICT, result.TRANSDUCTIVE)]:
            kept = [words[key] for key in ("checkpoint", "support") if key in words]
            steps.append(f"{result.begun(stored)} {shlex.join(['recipe=export', *kept])}")
        off = words.get("unknown", "unknown=off") in ("unknown=off", "unknown=null")
        again = not {"images=-", "items=-"} & set(words.values())  # what came by standard input is gone
        if stored.get(result.key(PREDICT, "certainty")) and off and again:
            steps.append(f"{stored[result.COMMAND]} unknown=auto")
        return steps


def check_readable(images: items.Listed, how: Any, key: str) -> None:
    """Checks that something of what is to be classified can be read, by reading it up to there.

    Args:
        images: The images, or texts.
        how: How they are read.
        key: What names them.

    Raises:
        UserError: Nothing can.
    """
    if next(images.batches(how, 1), None) is None:
        raise none_readable(images, key)
    images.unreadable.clear()  # `batches` finds these anew


def none_readable(images: items.Listed, key: str) -> UserError:
    """The error that says so of images of which none can be read, with the reason of the first."""
    path, reason = next((str(path), reason) for path, reason in images.unreadable.items())
    return UserError(f"{key}: none of the {len(images.paths)} can be read; {shown_path(path)}: {reason}")


def left_out(unreadable: dict[str, str], rest: str, read: int) -> str:
    """Names files that could not be read.

    Args:
        unreadable: The reason of each.
        rest: What became of the others.
        read: How many these are.

    Returns:
        What `conclude` is to say of them; empty where there are none.
    """
    for path, reason in list(unreadable.items())[:NAMED]:
        print(f"not read  {printable(path)}: {printable(reason)}")
    if not unreadable:
        return ""
    total = read + len(unreadable)
    return f"images: {len(unreadable)} of {total} cannot be read, each with its reason in result.json; {rest}"


def given(config: DictConfig) -> tuple[str, str]:
    """Finds what is to be classified, and the key that names it: `items`, or `images`, which is the same.

    Raises:
        UserError: Neither names anything, or both do.
    """
    if config["items"] and config.images:
        raise UserError("images: items names what is to be classified already; give one of them")
    if not config["items"] and not config.images:
        raise UserError(
            "items: must be given (images=, which is the same): a file, a folder, a pattern, or - for a list of paths, or texts, on "
            "standard input"
        )
    return (config["items"], "items") if config["items"] else (config.images, "images")


def inputs_digest(held: Stored, known: items.Examples, found: items.Listed | None) -> str:
    """Digests everything that a result depends on.

    That is the weights; the names, sizes and times of all files, and all texts; and the labels that are known of them.

    Args:
        held: What the run uses.
        known: The examples.
        found: What is classified, or compared on; None if nothing is.
    """
    digest = hashlib.sha256(checkpoint.digest(held.origin).encode())
    for inputs, labels in ((known.items, known.labels), (found.paths, found.labels) if found else ([], [])):
        for line in _states(inputs, labels):
            digest.update(line.encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _states(inputs: Iterable[Path | str], labels: Iterable[str | None]) -> Iterator[str]:
    for path, label in zip(inputs, labels, strict=True):
        if isinstance(path, str):
            yield f"{label}\0{path}\n"
            continue
        try:
            status = path.stat()
            yield f"{label}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            yield f"{label}\0{path}\0missing\n"
