"""The contract of what puts a learner to use on a small labelled target; one of `conf/transfer` each."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.core import Algorithm, Backbone, Batch, Episodes
from metarun.data.image_batches import Labelled
from metarun.data.source import DataSource
from metarun.errors import UserError

CHUNK = 256  # images, at most, whose features are computed together


class SourceImages:
    """The labelled images of the source, for methods that go on using them; the same ones at every call."""

    def __init__(self, data: DataSource, seed: int, device: torch.device) -> None:
        self.data, self.seed, self.device = data, seed, device

    @cached_property
    def images(self) -> Labelled:
        return self.data.labelled("train")

    @property
    def classes(self) -> int:
        return len(self.images.names)

    def draw(self, count: int) -> Batch:
        """`count` of them, or all if there are not so many."""
        which = self.images.stream(self.seed, "reused")(0, min(count, len(self.images)))
        return self.images.batch(which, self.device)


class TargetMethod(Checked, ABC):
    """From a learner and the labelled training images of a target to scores of its test images.

    Its keyword-only settings are its configuration. `source` is None where the recipe trains on none. The learner itself is
    left as it is.
    """

    configured_by = "transfer"
    needs_source: bool = False
    uses_method: bool = False  # whether it predicts by the learner's own method, and does not take its backbone alone

    def __init__(self, learner: Algorithm, source: SourceImages | None = None) -> None:
        self.learner = learner
        self.source = source
        self.augment: Callable[[Tensor], Tensor] = lambda x: x  # of training images
        if self.needs_source and source is None:
            raise UserError(f"transfer: {type(self).__name__} goes on using the source, but this recipe trains on none")

    @abstractmethod
    def predict(self, train: Batch, test_x: Tensor, classes: int) -> Tensor:
        """Scores `[n_test, classes]` of the test images, the largest for the predicted class.

        `train.y` is in [0, classes). Random draws come from the global generator, which the caller seeds.
        """

    def check(self, classes: int) -> None:
        """Raises `UserError` if it cannot serve a target of so many classes: before anything is trained."""

    @property
    def transductive(self) -> bool:
        """Whether the prediction for a test image depends on the others."""
        return self.learner.transductive


class Own(TargetMethod):
    """The learner's own way: the training images are the support set of one large episode, the test images its queries."""

    uses_method = True

    def check(self, classes: int) -> None:
        learner = self.learner
        if learner.fixed_ways and learner.spec.outputs != classes:
            raise UserError(
                f"transfer=own: {type(learner).__name__}'s head has {learner.spec.outputs} outputs, and the target "
                f"{classes} classes; train with task.ways={classes}, or choose another transfer="
            )

    @torch.no_grad()
    def predict(self, train: Batch, test_x: Tensor, classes: int) -> Tensor:
        learner = self.learner
        learner.eval()
        blank = torch.zeros(1, len(test_x), dtype=torch.int64, device=test_x.device)
        order = train.y.argsort(stable=True)  # sets are class-major
        return learner.predict(Episodes(train.x[order][None], train.y[order][None], test_x[None], blank, classes))[0]


@torch.no_grad()
def features(backbone: Backbone, x: Tensor) -> Tensor:
    """The features `[B, features]` of the frozen backbone in evaluation mode, float32, chunk by chunk."""
    training = backbone.training
    backbone.eval()
    # Of nearly equal sizes: a last chunk of few images would have poor statistics where the backbone takes its batch's.
    found = torch.cat([backbone(chunk).float() for chunk in x.tensor_split(math.ceil(len(x) / CHUNK))])
    backbone.train(training)
    return found


def new_head(features: int, classes: int, device: torch.device) -> nn.Linear:
    """A linear head at zero, which prefers no class."""
    head = nn.Linear(features, classes).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def copied(module: nn.Module) -> nn.Module:
    """A copy to train, all of whose parameters take gradients."""
    return copy.deepcopy(module).requires_grad_(True)
