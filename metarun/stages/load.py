"""The stage that takes the weights of a finished run."""

from __future__ import annotations

from typing import Any

from metarun import files
from metarun.engine import checkpoint
from metarun.runs import result, seen
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.learning import build_learner, training_protocol


class Load(Stage):
    """Builds the method of the run that `checkpoint=` names, and takes its weights."""

    gives_weights = True
    needs_checkpoint = True

    def prepare(self, run: Run) -> None:
        origin = run.config.checkpoint
        weights = checkpoint.weights_file("checkpoint", origin)
        state = checkpoint.load(weights)
        known = state.get(seen.KEY)
        if known is None:
            known = self._assumed(run)
        if any(stage.meta_tests for stage in run.later(self)):
            seen.refuse_test_classes(known, run.data, f"checkpoint={origin}")
        learner = build_learner(run, "load", "algo", "train", "wrapper")
        checkpoint.load_weights(learner.algorithm, state["model"], weights)
        learner.seen = seen.merged(learner.seen, known)
        learner.selected_by = "the checkpoint that was given"
        run.add(learner.name, learner)
        self.learner = learner
        with checkpoint.fitting(weights):
            self.step = state["step"] if "step" in state else state["state"]["step"]
        self.digest = checkpoint.digest(weights)
        beside = weights.parent / result.FILE
        stored = files.read_json(beside, result.DAMAGED) if beside.is_file() else {}
        self.text = stored.get(result.PROTOCOL, {}).get(result.SEEN, {})

    def _assumed(self, run: Run) -> dict[str, Any]:
        """What weights of an older version, whose file does not say it, were trained on."""
        on_images = run.config.train.validate_on == "images"  # in these versions of all classes
        return seen.classes(run.data, None if on_images else "train")

    def depends_on(self, run: Run) -> dict[str, Any]:
        return {"checkpoint": self.digest}

    def execute(self, run: Run) -> None:
        run.result |= {
            result.key(result.CHECKPOINT, "step"): self.step,
            result.key(result.CHECKPOINT, "sha256"): self.digest,
        }

    def protocol(self, run: Run) -> dict[str, Any]:
        return {result.SEEN: self.text, **training_protocol(self.learner)}
