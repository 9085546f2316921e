"""The stage that tests a learner on a target without training on it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from metarun import files
from metarun.data.image_batches import make_ready
from metarun.engine.evaluate import classified, with_training_statistics
from metarun.errors import UserError
from metarun.inference.kept import keep_trained
from metarun.ops import metrics
from metarun.ops.measures import ACCURACY, AUROC, CONFUSION, UNDEFINED
from metarun.runs import contents, result
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.compatibility import without_classes
from metarun.stages.training_data import training_images, warn_brought, warn_trained_on
from metarun.target import predictions
from metarun.target.base import refuse_other_places
from metarun.target.predictions import Predicted
from metarun.target.target import accuracy_of_others

log = logging.getLogger("metarun")


class TargetTest(Stage):
    """Tests what the learner says of the target's test images, as it is."""

    needs_weights = True
    needs_target = True
    asks_for_classes = True
    measures = result.TARGET

    def prepare(self, run: Run) -> None:
        assert run.target is not None
        algorithm = run.algorithm
        if not algorithm.has_classes:
            raise UserError(f"algo: {without_classes(algorithm)}, which {self} asks for; use algo=baseline, say")
        if algorithm.spec.outputs != len(run.target.names) and algorithm.uses_target != "labels":
            raise UserError(
                f"target: has {len(run.target.names)} classes, but the source {algorithm.spec.outputs}; without training on "
                "the target's labels both must have the same; use recipe=transfer, which trains on them"
            )
        if algorithm.uses_target != "labels" and run.data.members:
            refuse_other_places(
                training_images(run.data, run.config.train.validate_on, run.training_split).names, run.target.names
            )
        self.trained_on = {**warn_trained_on(run, run.target.test), **warn_brought(run)}

    def execute(self, run: Run) -> None:
        assert run.target is not None
        images = run.target.test
        make_ready(run.hardware.device, images)
        plain = replace(run.hardware, autocast_dtype=None)  # else the scores would depend on what shares their batch
        ready = with_training_statistics(run.algorithm, run.hardware, run.learner.sampler)
        scores = classified(ready, images, plain)
        found = metrics.classification(scores.numpy(), images.labels)
        if UNDEFINED in found:
            log.warning(
                "target: the predictions of %d of %d test images are no numbers, which count as wrong; a lower train.optimizer.lr "
                "may keep the training from diverging", found[UNDEFINED], len(images),
            )  # fmt: skip
        halves = metrics.over_images(np.array(found[CONFUSION]), found.get(AUROC))
        found |= {result.half_of(name): half for name, half in halves.items()}
        run.result |= {
            **{result.key(result.TARGET, name): value for name, value in found.items()},
            result.TARGET_OVER: "test images",
            result.TARGET_INTERVAL: f"95%, over the {len(images)} test {run.target.kind}, Wilson",
            result.TARGET_TEST_IMAGES: len(images),
            result.TARGET_CLASSES: images.names,
        }
        if run.hardware.world.main:
            predicted = torch.where(metrics.undefined(scores), -1, scores.argmax(1)).numpy()
            right = (predicted == images.labels).astype(float)
            known = run.target.train if run.algorithm.uses_target != "no" else run.target.train.take(np.arange(0))
            copied = run.target.copies(known, images)
            run.result |= run.target.warn_copies([int(copied.sum())], len(images))
            files.save_arrays(run.folder / run.target_scores, values=right[None], right=right)
            one = Predicted(0, len(known), images, predicted, scores.softmax(1).numpy())
            predictions.write(run.folder / contents.PREDICTIONS, [one])
            run.wrote(contents.PREDICTIONS)
            run.result[result.TARGET_PREDICTIONS] = {"file": contents.PREDICTIONS}
            if keep_trained(run, ready, run.folder / contents.CLASSIFIER):
                run.result[result.TARGET_CLASSIFIER] = {
                    "file": contents.CLASSIFIER,
                    ACCURACY: found[ACCURACY],
                    **accuracy_of_others(right, copied),
                }

    def protocol(self, run: Run) -> dict[str, Any]:
        # `classified` takes no statistics of the images that it classifies.
        return {
            result.TRANSDUCTIVE: False,
            **self.trained_on,
        }
