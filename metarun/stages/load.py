"""The stage that takes the weights of a finished run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from metarun.config.values import without
from metarun.core import Algorithm
from metarun.data.source import DataSource
from metarun.encoders import encoded_members
from metarun.engine import checkpoint, origins
from metarun.engine.learner import Trainable
from metarun.errors import UserError
from metarun.runs import contents, result, seen
from metarun.runs.fingerprints import differences, kept, weights
from metarun.runs.folder import stored_config
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.learning import build_learner, training_protocol

REPLACED = "its weights were replaced while they were read; test them when their training has ended"


class Load(Stage):
    """Builds the method of the run that `checkpoint=` names, and takes its weights."""

    gives_weights = True
    needs_checkpoint = True
    learner: Trainable

    def prepare(self, run: Run) -> None:
        origin = run.config.checkpoint
        file = checkpoint.weights_file("checkpoint", origin)
        self.digest = checkpoint.digest(file)
        state = checkpoint.load(file)
        if checkpoint.digest(file) != self.digest:
            raise UserError(f"checkpoint={origin}: {REPLACED}")
        known = state.get(seen.KEY)
        if known is None:
            known = self._assumed(run)
        if any(stage.meta_tests for stage in run.later(self)):
            seen.refuse_test_classes(known, run.data, f"checkpoint={origin}")
        stored = origins.stored_beside(origin)
        if state["model"]:
            refuse_other_encoder(stored, run.data, f"checkpoint={origin}")
        network = without_weights(run.config.backbone, stored)
        learner = build_learner(run, "load", "algo", "train", "wrapper", network=network)
        assert learner.fresh is not None
        learner.fresh = functools.partial(before_training, run.config, learner.fresh)
        checkpoint.load_weights(learner.algorithm, state["model"], file)
        learner.seen = seen.merged(learner.seen, known)
        # The weights of the file took the place of those that `backbone` brings.
        learner.origins = [*run.data.origins, origins.described(f"checkpoint={origin}", known, stored)]
        learner.selected_by = "the checkpoint that was given"
        run.add(learner.name, learner)
        self.learner = learner
        with checkpoint.fitting(file):
            self.step = state["step"] if "step" in state else state["state"]["step"]
        self.text = stored.get(result.PROTOCOL, {}).get(result.SEEN, {})

    def _assumed(self, run: Run) -> dict[str, Any]:
        """Assumes what weights of an older version, whose file does not say it, were trained on."""
        on_images = run.config.train.validate_on == "images"  # in these versions of all classes
        return seen.classes(run.data, None if on_images else "train")

    def depends_on(self, run: Run) -> dict[str, Any]:
        return {"checkpoint": self.digest}

    def execute(self, run: Run) -> None:
        if run.world.broadcast(self.digest) != self.digest:  # each process has read the file by itself
            raise UserError(f"checkpoint={run.config.checkpoint}: {REPLACED}")
        run.result |= {
            result.CHECKPOINT_STEP: self.step,
            result.CHECKPOINT_DIGEST: self.digest,
        }

    def protocol(self, run: Run) -> dict[str, Any]:
        return {result.SEEN: self.text, **training_protocol(self.learner)}


def without_weights(backbone: DictConfig, stored: dict[str, Any]) -> DictConfig:
    """Takes the weights that a run began with out of the settings of its backbone, since its own replace them: no file of these is read.

    Weights that are named by a library's name decide what images the network expects, which the result of an older version does not
    say: they stay then, and are read.

    Args:
        backbone: The backbone of its config.
        stored: Its result, which tells what images a library's network expects; without it such weights are read after all.
    """
    told = ((stored.get(result.LEARNER) or {}).get("blueprint") or {}).get("backbone", {})
    found = without(backbone, ["from"])
    expected = {"image_size", "images_of"} & found.keys()
    unknown = [name for name in expected - told.keys() if found[name] is None]
    if found.get("weights") in (None, "pretrained"):
        unknown = []
    if "weights" in told and told["_target_"] == found._target_ and not unknown:
        for name in {"weights", "checksum"} & found.keys():
            found[name] = None
        for name in expected:
            found[name] = told.get(name) if found[name] is None else found[name]
    return found


def before_training(config: DictConfig, fresh: Callable[[int | None], Algorithm]) -> Algorithm:
    """Builds the method of a loaded run as it was before any training, by the seed of that run, whatever the test's is.

    Args:
        config: The config.
        fresh: Builds it by a seed, with the weights that `config.backbone` names.

    Raises:
        UserError: Other weights are there by now than those that the run began with, or none.
    """
    folder = checkpoint.folder_of("checkpoint", config.checkpoint)
    began = kept(folder)
    if other := next((key for key, changed in differences(began, weights(config)).items()), None):
        raise UserError(f"{other}: the file has other weights now than those that the run began with")
    own = folder / contents.CONFIG
    return fresh(int(stored_config(own, "test another run").get("seed") or 0) if own.is_file() else None)


def refuse_other_encoder(stored: dict[str, Any], data: DataSource, origin: str) -> None:
    """Refuses data whose vectors mean something else than those that the weights were trained on.

    Args:
        stored: The result of the run that trained them; empty where there is none.
        data: What they are to be used on.
        origin: The key and value that an error begins with.

    Raises:
        UserError: The encoder has other weights, or was fitted to other items.
    """
    told = (stored.get(result.LEARNER) or {}).get("preprocessing", {}).get("encoder")
    encoder = next((member.encoder for member in encoded_members(data).values()), None)  # of all of them
    if not told or encoder is None:
        return
    if json.loads(json.dumps(encoder.identity())) != told["identity"]:
        reason = "is fitted to each data set anew" if encoder.fitted else "has other weights or settings now"
        raise UserError(
            f"{origin}: was trained on the vectors of an encoder, {type(encoder).__name__}, which {reason}, so that its vectors mean "
            "something else; take the data, and the encoder, that the run had"
        )
