"""What a run keeps so that its learner can be used on further images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarun.core import Algorithm, Batch
from metarun.data.image_batches import Labelled
from metarun.data.table_source import TableSource, item_digest
from metarun.encoders import before_encoding
from metarun.engine import checkpoint
from metarun.inference import store
from metarun.inference.blueprint import OWN, Blueprint
from metarun.inference.preprocessing import Preprocessing
from metarun.inference.store import Calibration, Stored
from metarun.ops import metrics
from metarun.ops.calibration import fit_temperature
from metarun.ops.numerics import full_precision
from metarun.runs import result
from metarun.target.base import TargetClassifier, TargetMethod, TrainedClassifier

if TYPE_CHECKING:
    from metarun.runs.run import Run


def kept_learner(run: Run) -> dict[str, Any] | None:
    """JSON values for `result.json` that `metarun.load` builds the run's learner from; None for one that classifies no images."""
    source, reference = (run.target.source, run.target.train.reference) if run.target else (run.data, None)
    preprocessing = Preprocessing.of(source, run.data.input_shape, reference)
    if preprocessing is None or not run.learners:
        return None
    told = run.result.get(result.key(result.TEST, result.CALIBRATION), {})
    unknown = run.result.get(result.key(result.TEST, result.UNKNOWN), {})
    if (alone := run.result.get(result.key(result.TEST, result.OF_SINGLE_IMAGES))) is not None:
        told = unknown = alone
    blueprint = Blueprint.of(run.config, run.learner.built_from, run.algorithm)
    # They were fitted on what the method itself says of episodes, and mean nothing to another way with examples.
    told, unknown = (told, unknown) if blueprint.uses_method else ({}, {})
    calibration = Calibration(told.get("temperature"), unknown.get("thresholds", {}), unknown.get("certainty"))
    continued = run.config.checkpoint if any(stage.needs_checkpoint for stage in run.stages) else None
    return {
        "format": store.FORMAT,
        "blueprint": blueprint.describe(),
        "preprocessing": preprocessing.describe(),
        "autocast": autocast(run),
        "calibration": vars(calibration),
        "weights": continued,
        "weights_from_run": checkpoint.way_to(continued, run.folder) if continued else None,
    }


def autocast(run: Run) -> str | None:
    """Names the type of mixed precision of a run."""
    dtype = run.hardware.autocast_dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def keep_classifier(
    run: Run, method: TargetMethod, classifier: TargetClassifier, train: Labelled, known: Batch, path: Path
) -> None:
    """Leaves `classifier.pt`: a classifier of the target, with a temperature that was fitted on images held out for it.

    Args:
        run: The run.
        method: What learned it.
        classifier: What it learned.
        train: The images that it learned from.
        known: The same as a batch.
        path: The file.
    """
    assert run.target is not None
    preprocessing = Preprocessing.of(run.target.source, run.data.input_shape, train.reference)
    if preprocessing is None:
        return
    held = Stored(
        Blueprint.of(run.config, run.learner.built_from, run.algorithm),
        preprocessing,
        store.tensors(run.algorithm),
        autocast(run),
        Calibration(held_out_temperature(method, train, known, run.config.seed), of_classes=True),
        path,
        list(train.names),
        {name: value.detach().cpu() for name, value in classifier.state_dict().items()},
        train.identities,
        digests_of(run, train),
    )
    store.save(path, held)


def keep_trained(run: Run, algorithm: Algorithm, path: Path) -> bool:
    """Leaves `classifier.pt` of a method that was trained with the target's classes.

    Args:
        run: The run.
        algorithm: Its method, ready to classify single images.
        path: The file.

    Returns:
        Whether the images are such as a file can be read for.
    """
    assert run.target is not None
    preprocessing = Preprocessing.of(run.target.source, run.data.input_shape, run.target.train.reference)
    if preprocessing is None:
        return False
    blueprint = replace(Blueprint.of(run.config, run.learner.built_from, run.algorithm), transfer=OWN)
    held = Stored(
        blueprint,
        preprocessing,
        store.tensors(run.algorithm),
        autocast(run),
        Calibration(),
        path,
        list(run.target.names),
        {name: value.detach().cpu() for name, value in TrainedClassifier(algorithm).state_dict().items()},
        digests=[] if algorithm.uses_target == "no" else digests_of(run, run.target.train),
    )
    store.save(path, held)
    return True


def digests_of(run: Run, images: Labelled) -> list[str]:
    """Digests of images of the target, by which they are known again wherever they lie."""
    assert run.target is not None
    items = before_encoding(run.target.source)
    assert isinstance(items, TableSource)

    def digest_of(row: int) -> str | None:
        # As its file shows it, by which a classifier knows it again, where the table holds negatives.
        return item_digest(255 - items.items(row, row + 1)[0]) if items.inverted else items.digest_of(row)

    return sorted({digest for row in images.rows.tolist() if (digest := digest_of(row))})


def held_out_temperature(method: TargetMethod, train: Labelled, known: Batch, seed: int) -> float | None:
    """The temperature of a classifier of most of the training images, fitted on the others: a fifth of each class, but two at least.

    Args:
        method: What learns the classifier.
        train: The training images.
        known: The same as a batch.
        seed: Of the division.

    Returns:
        The temperature; None where the classes have too few images to hold any out.
    """
    part, rest = train.divide_places(seed, 0)
    if not len(rest):
        return None
    learned, asked = (
        Batch(*(tensor[torch.from_numpy(which).to(tensor.device)] for tensor in (known.x, known.y, known.domain)))
        for which in (part, rest)
    )
    fitted = method.fit(learned, len(train.names))
    with full_precision(asked.x):  # as it will be used
        scores: Tensor = fitted(asked.x)
    if metrics.undefined(scores).any():
        return None
    return fit_temperature(fitted.log_probabilities(scores.cpu()).numpy(), asked.y.cpu().numpy())
