"""`classifier.pt`: what learned some classes, with everything that using it takes, in a file that runs no code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

import metarun
from metarun import files
from metarun.backbones.weights import COUNTER
from metarun.engine import checkpoint
from metarun.errors import UserError, lacks
from metarun.files import typed_path
from metarun.inference.blueprint import Blueprint
from metarun.inference.preprocessing import Preprocessing
from metarun.inference.texts import TextPreprocessing
from metarun.ops import certainty
from metarun.ops.measures import ERROR
from metarun.runs import contents, result
from metarun.text import shown_path

FORMAT = 1  # of what follows; another number is of another version of metarun
KIND = "classifier of metarun"
# The errors that values lead to which metarun did not write.
MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OmegaConfBaseException,
)


@dataclass(frozen=True)
class Calibration:
    """What was fitted on data apart from those that were learned and those that are tested on.

    Attributes:
        temperature: Divides the logits; None where there was nothing to fit it on.
        thresholds: Of each certainty the value below which an image counts as of no known class.
        certainty: The certainty that told known classes from unknown ones best; None where none was tried.
        of_classes: Whether it was fitted for the one classifier that it is stored with, and says nothing of another that is learned from
            other examples; else it is of all that the method learns.
    """

    temperature: float | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    certainty: str | None = None
    of_classes: bool = False

    def __post_init__(self) -> None:
        numbers = [*([] if self.temperature is None else [self.temperature]), *self.thresholds.values()]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError(f"its calibration has {numbers} where finite numbers stand")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"its calibration has the temperature {self.temperature}, which is not above 0")
        if others := [name for name in self.thresholds if name not in certainty.NAMES]:
            raise ValueError(f"its calibration has a threshold of {others[0]}, which is no certainty")
        if self.certainty is not None and self.certainty not in self.thresholds:
            raise ValueError(f"its calibration has no threshold of {self.certainty}")


@dataclass
class Stored:
    """What a classifier file, or a run folder, holds.

    Attributes:
        blueprint: What the learner is built from.
        preprocessing: What files, or texts, go through.
        weights: The learner's.
        autocast: The type of mixed precision that learning from examples computes in; predictions are in single precision.
        calibration: How far its probabilities can be trusted.
        origin: Where it came from.
        classes: The names of the classes that were learned; None for a learner alone.
        state: What the classifier of these classes depends on.
        examples: The files that it learned from, below the root of their data set where one is known.
        digests: Those of their content; none in a file of an earlier version.
    """

    blueprint: Blueprint
    preprocessing: Preprocessing | TextPreprocessing
    weights: dict[str, Tensor]
    autocast: str | None
    calibration: Calibration
    origin: Path
    classes: list[str] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"mixed precision of {self.autocast}, which is no type for it")
        read, network = (tuple(part.input_shape) for part in (self.preprocessing, self.blueprint.spec))
        if read != network:
            raise ValueError(f"it reads items as {list(read)}, and its network takes {list(network)}")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Collects all parameters and buffers of a module on the CPU, those too that its `state_dict` leaves out.

    How many batches a norm has seen is left out where the `state_dict` does: a run that was interrupted counts anew, and nothing
    that is stored depends on it.
    """
    buffers = {name: value for name, value in module.named_buffers() if not name.endswith(COUNTER)}
    found = {**buffers, **module.state_dict()}
    return {name: value.detach().cpu() for name, value in found.items()}


def load_tensors(module: nn.Module, values: dict[str, Tensor], origin: Path) -> None:
    """Loads what `tensors` found into a module that is built alike."""
    own = module.state_dict()
    others = {name: buffer for name, buffer in module.named_buffers() if name not in own}
    for name, buffer in others.items():
        if name in values and buffer.shape == values[name].shape:
            buffer.copy_(values[name])
    checkpoint.load_weights(module, {name: value for name, value in values.items() if name not in others}, origin)


def save(path: Path, held: Stored) -> None:
    """Writes a classifier file, all or nothing."""
    content = {
        "kind": KIND,
        "format": FORMAT,
        "metarun": metarun.__version__,
        "blueprint": json.dumps(held.blueprint.describe()),
        "preprocessing": json.dumps(held.preprocessing.describe()),
        "calibration": json.dumps(vars(held.calibration)),
        "autocast": held.autocast,
        "classes": held.classes,
        "examples": held.examples,
        "digests": held.digests,
        "weights": held.weights,
        "state": held.state,
    }
    if held.preprocessing.encoding is not None:
        content["encoder"] = held.preprocessing.encoding.encoder.tensors()
    checkpoint.save(path, content)


def load(origin: Path, key: str = "checkpoint") -> Stored:
    """Reads what a classifier file or a run folder holds.

    Args:
        origin: A file of `save`, the folder of a finished run, or the `best.pt` or `last.pt` in one.
        key: What errors are about.

    Raises:
        UserError: There is no such file or folder, it is damaged or foreign, or it is of another version of metarun.
    """
    origin = typed_path(origin)
    shown = f"{key}={shown_path(origin)}"
    if origin.is_dir() and (origin / contents.CLASSIFIER).is_file():
        return _from_file(origin / contents.CLASSIFIER, f"{key}={shown_path(origin / contents.CLASSIFIER)}")
    if origin.is_dir() and (origin / contents.CONFIG).is_file():
        return _from_run(origin, shown)
    if (
        origin.is_file()
        and (origin.parent / contents.RESULT).is_file()
        and origin.name in (contents.BEST, contents.LAST)
    ):
        return _from_run(origin.parent, shown, origin)
    if origin.is_file():
        return _from_file(origin, shown)
    checkpoint.weights_file(key, str(origin))  # raises, and says what is there instead
    raise UserError(f"{shown}: is no run folder of metarun")


def _check_parts(content: dict[str, Any]) -> None:
    """Raises `TypeError` where a part of a classifier file is of another type than `save` writes."""
    for name in ("weights", "state"):
        if not isinstance(content[name], dict) or not all(
            isinstance(value, Tensor) for value in content[name].values()
        ):
            raise TypeError(f"{name} are no tensors with names")
    classes, examples, digests = content["classes"], content["examples"], content.get("digests", [])
    for name, found in (("classes", [] if classes is None else classes), ("examples", examples), ("digests", digests)):
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise TypeError(f"{name} are no list of texts")
    if classes is not None and len(set(classes)) < max(2, len(classes)):
        raise TypeError(f"classes are {classes}, and at least two different ones stand there")


def _from_file(path: Path, shown: str) -> Stored:
    files.check_opens(path, shown)
    try:
        files.check_archive(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{shown}: cannot be read, it is damaged or no classifier file of metarun") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        hint = "; give the folder of its run" if isinstance(content, dict) and "model" in content else ""
        raise UserError(f"{shown}: is no classifier file of metarun{hint}")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{shown}: was written by metarun {content.get('metarun')} (format {content.get('format')}), and this is metarun "
            f"{metarun.__version__} (format {FORMAT}); use that version, or train again"
        )
    try:
        values = {name: files.parsed(content[name]) for name in ("blueprint", "preprocessing", "calibration")}
        _check_parts(content)
        return Stored(
            Blueprint.stored(values["blueprint"], path),
            Preprocessing.stored(values["preprocessing"], path, content.get("encoder")),
            content["weights"],
            content["autocast"],
            Calibration(**values["calibration"]),
            path,
            content["classes"],
            content["state"],
            content["examples"],
            content.get("digests", []),
        )
    except MALFORMED as error:
        raise UserError(f"{shown}: is damaged, it lacks a part of a classifier ({lacks(error)})") from error


def _weights_of(found: dict[str, Any], values: dict[str, Any], folder: Path, shown: str) -> Path:
    """The file of the weights that a run has, or that it tested.

    Args:
        found: The run's result.
        values: What it says of its learner.
        folder: The run's.
        shown: What errors are about.

    Raises:
        UserError: There is none, or it holds others by now than those that were tested.
    """
    if not values["weights"]:
        return checkpoint.weights_file("checkpoint", str(folder))
    tested = checkpoint.moved(values["weights"], values.get("weights_from_run"), folder)
    if not tested.exists():
        raise UserError(
            f"{shown}: tests the weights of {shown_path(tested)}, which is there no more; give the folder that has them"
        )
    weights = checkpoint.weights_file("checkpoint", str(tested))
    if found.get(result.CHECKPOINT_DIGEST, digest := checkpoint.digest(weights)) != digest:
        raise UserError(
            f"{shown}: tested other weights than {shown_path(weights)} has now; to take these, give {shown_path(tested)}"
        )
    return weights


def _from_run(folder: Path, shown: str, chosen: Path | None = None) -> Stored:
    """What a run folder holds, with the weights that were best on validation or those of a file of it that was chosen."""
    if not (folder / contents.RESULT).is_file():
        raise UserError(f"{shown}: the run has not finished; the command that began it goes on")
    path = folder / contents.RESULT
    found = result.stored(folder)
    if result.LEARNER not in found:
        regression = ERROR in str(result.tested(found))
        own = found.get("versions", {}).get("metarun") == metarun.__version__
        reason = (
            "learned regression tasks, and classifies nothing"
            if regression
            else "had no data set, and learned nothing; give the folder of a run that trained or tested a method"
            if not {result.DATA, result.CONTENT} & set(found)
            else "learned from items that are neither texts nor square images, and no file can be read as one of them"
            if own
            else "does not say how its images are read: an earlier version of metarun made it; run its command again with "
            "resume=false"
        )
        raise UserError(f"{shown}: the run {reason}")
    try:
        values = result.learner(folder, found)
        if values["format"] != FORMAT:
            version = found.get("versions", {}).get("metarun")
            raise UserError(
                f"{shown}: was made by metarun {version}, and this is metarun {metarun.__version__}; use that version, or train again"
            )
        weights = chosen or _weights_of(found, values, folder, shown)
        return Stored(
            Blueprint.stored(values["blueprint"], path),
            Preprocessing.stored(values["preprocessing"], path),
            checkpoint.load(weights)["model"],
            values["autocast"],
            Calibration(**values["calibration"]),
            weights,
        )
    except MALFORMED as error:
        raise UserError(f"{shown_path(path)}: is damaged ({lacks(error)}); {result.DAMAGED}") from error
