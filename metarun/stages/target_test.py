"""The stage that tests a learner on a target without training on it."""

from __future__ import annotations

import torch

from metarun.engine.evaluate import classified
from metarun.errors import UserError
from metarun.ops import metrics
from metarun.runs import result
from metarun.runs.run import Run
from metarun.stages.base import Stage


class TargetTest(Stage):
    """Tests what the learner says of the target's test images, as it is."""

    needs_weights = True
    needs_target = True

    def prepare(self, run: Run) -> None:
        assert run.target is not None
        algorithm = run.algorithm
        if algorithm.trains_on != "batches":
            raise UserError(
                f"algo: {type(algorithm).__name__} trains on episodes and has no classes of its own, which {self} asks for; use "
                "algo=baseline, say"
            )
        if algorithm.spec.outputs != len(run.target.names) and algorithm.uses_target != "labels":
            raise UserError(
                f"target: has {len(run.target.names)} classes, but the source {algorithm.spec.outputs}; without training on "
                "the target's labels both must have the same"
            )

    def execute(self, run: Run) -> None:
        assert run.target is not None
        images = run.target.test
        scores = classified(run.algorithm, images, run.hardware).numpy()
        found = metrics.classification(scores, images.labels)
        right = torch.from_numpy(scores.argmax(1) == images.labels)
        found |= {
            "acc_ci95": metrics.interval(right)[1],
            "interval": "95%, over test images, normal approximation",
            "test_images": len(images),
            "classes": images.names,
        }
        run.result |= {result.key(result.TARGET, name): value for name, value in found.items()}
