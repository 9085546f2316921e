"""The stage that puts a learner to use on a small labelled target."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from metarun import files
from metarun.config import construct
from metarun.core import Batch, Spec
from metarun.data.image_batches import Labelled
from metarun.engine import hardware as hardware_module
from metarun.engine.learner import Trainable
from metarun.errors import UserError
from metarun.inference import store
from metarun.inference.kept import keep_classifier
from metarun.ops.calibration import Reliability, tempered
from metarun.ops.measures import ACCURACY
from metarun.report.reliability import reliability_diagram
from metarun.report.target import learning_curve
from metarun.runs import contents, result
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.learning import build_backbone, build_learner, origins_of, seen_by, told_of, with_library
from metarun.stages.training_data import refuse_target_labels, warn_brought, warn_seen_unlabelled, warn_trained_on
from metarun.target.base import Bare, SourceImages, TargetClassifier, TargetMethod
from metarun.target.target import accuracy_of_others


class Transfer(Stage):
    """Puts the learner to use on subsets of the target's images by `transfer=`, and tests it on the target's test images.

    Without a learner of an earlier stage it starts from the backbone as it is: untrained, or with the weights that it brings.
    """

    needs_target = True
    uses_transfer = True
    measures = result.TARGET
    shares_training = True

    def prepare(self, run: Run) -> None:
        config, target = run.config, run.target
        assert target is not None
        if not config.transfer:
            raise UserError("transfer: must be given; add transfer=all, say")
        self.begins_with: dict[str, str] = {}
        if not run.learners:
            run.add("untrained", untrained(run))
            self.begins_with = told_of(run.learner.origins)
        refuse_target_labels(run)
        source = SourceImages(run.data, config.seed, run.hardware.device) if config.recipe.source else None
        self.method: TargetMethod = construct(config.transfer, "transfer", learner=run.algorithm, source=source)
        if config.unsupervised and source is not None and self.method.needs_source:
            raise UserError(
                f"unsupervised: withholds the labels of the data, but {type(self.method).__name__} (transfer) reads those of the source; "
                "use transfer=logistic_regression, say, or leave unsupervised out"
            )
        if (augment := run.augment_of(target.source)) is not None:
            # With a source its images may be changed, and a checkpoint's run may have had use for it.
            if not (self.method.augments or config.recipe.source or config.checkpoint):
                raise UserError(
                    f"augment: changes training images, but {type(self.method).__name__} (transfer) learns from them as they are; leave "
                    "augment out, or use transfer=all"
                )
            self.method.augment = augment
        self.method.check(len(target.names))
        self.method.check_names(target.names)
        tested = target.images or target.test  # divided anew, all are test images
        self.trained_on = {**warn_trained_on(run, tested, self.method.needs_source), **warn_brought(run)}
        self.unlabelled = warn_seen_unlabelled(run, tested)

    def execute(self, run: Run) -> None:
        assert run.target is not None
        run.algorithm.eval()
        if self.method.needs_source:
            run.data.make_ready(run.hardware.device)

        def keep(classifier: TargetClassifier, train: Labelled, known: Batch) -> None:
            keep_classifier(run, self.method, classifier, train, known, run.folder / contents.CLASSIFIER)

        where = run.folder / contents.TARGET
        run.result |= run.target.measure(
            self.method, run.config.seed, run.hardware, where, run.logger, keep, run.target_scores
        )
        if run.hardware.world.main:
            run.wrote(contents.PREDICTIONS)
            run.result |= self._probabilities(run)
        curve = run.result[result.TARGET_CURVE]
        if run.hardware.world.main and len(curve) > 1:
            chance = run.result[result.TARGET_CHANCE]
            picture = learning_curve({"": curve}, chance=chance, items=run.target.kind)
            files.save_bytes(run.folder / contents.LEARNING_CURVE, picture)
            run.logger.picture("target/learning_curve", picture)

    def _probabilities(self, run: Run) -> dict[str, Any]:
        """The accuracy of each class, and how far the probabilities of the kept classifier can be trusted."""
        assert run.target is not None
        confusion = np.array(run.result[result.TARGET_CONFUSION])
        shares = confusion.diagonal() / confusion.sum(1).clip(1)
        found: dict[str, Any] = {
            result.key(result.TARGET, "class_acc"): shares.tolist(),
            result.key(result.TARGET, result.WORST_CLASS): float(shares.min()),
        }
        if not (run.folder / contents.CLASSIFIER).is_file():
            return found
        held = store.load(run.folder)
        images, logs = run.target.tested(run.folder)
        copied = run.target.copies(*run.target.subset(run.target.sizes[-1], 0))
        temperature, before, after = held.calibration.temperature, Reliability(), Reliability()
        before.add(logs, images.labels)
        after.add(tempered(logs, temperature or 1.0), images.labels)
        run.logger.picture("target/reliability", reliability_diagram(after.bins()))
        right = logs.argmax(1) == images.labels
        found[result.TARGET_CLASSIFIER] = {
            "file": contents.CLASSIFIER,
            "repeat": 0,
            "train_images": len(held.examples),
            "examples": held.examples,
            ACCURACY: float(right.mean()),
            **accuracy_of_others(right, copied),
        }
        found[result.key(result.TARGET, result.CALIBRATION)] = {
            "temperature": temperature,
            "fitted_on": self._held_out(run) if temperature else None,
            "without": before.describe(),
            "with": after.describe(),
            "bins": after.bins(),
        }
        return found

    def _held_out(self, run: Run) -> str:
        """How many images the temperature of the kept classifier was fitted on."""
        assert run.target is not None
        train, _ = run.target.subset(run.target.sizes[-1], 0)
        _, rest = train.divide_places(run.config.seed, 0)
        return f"{len(rest)} of the {len(train)} training {run.target.kind}, held out"

    def protocol(self, run: Run) -> dict[str, Any]:
        fixed = "the last weights of a fixed number of steps"
        before = run.learner.selected_by
        chosen = f"{before}; on the target no selection, but {fixed}" if before else f"no selection: {fixed}"
        reads = {"transfer": "the training images of all classes of the source with their labels"}
        return {
            result.SEEN: {**self.begins_with, **(reads if self.method.needs_source else {})},
            result.TRANSDUCTIVE: self.method.transductive or bool(self.unlabelled),
            result.SELECTED_BY: chosen,
            **self.trained_on,
            **self.unlabelled,
        }


def uses_method(config: DictConfig) -> bool:
    """Whether the way with the target predicts by the learner's own method, and does not take its backbone alone."""
    return bool(config.transfer) and getattr(get_class(config.transfer._target_), "uses_method", False)


def untrained(run: Run) -> Trainable:
    """A learner with the weights that its backbone brings: of the config's method where that is asked for, or bare."""
    config = run.config
    if uses_method(config):
        return build_learner(run, "untrained", "algo", "train")
    brought = origins_of(run)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config, run.data)
    algorithm = Bare(backbone, Spec(run.data.input_shape, run.data.kind, 1))
    hardware = hardware_module.choose(config.hardware, algorithm, run.world)
    hardware.place(algorithm)
    learner = Trainable("untrained", algorithm, config.train, config.seed, hardware, seen=seen_by(brought))
    learner.origins = with_library(brought, backbone)
    return learner
