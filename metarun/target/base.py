"""The contract of what puts a learner to use on a small labelled target; one of `conf/transfer` each."""

from __future__ import annotations

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.core import Algorithm, Backbone, Batch, Episodes
from metarun.core.backbone import IMAGES_AT_ONCE
from metarun.data.image_batches import Labelled
from metarun.data.source import DataSource
from metarun.errors import UserError
from metarun.ops import batch_norm
from metarun.ops.modes import evaluating
from metarun.ops.prototypes import nearness
from metarun.ops.support import Memory, remembered
from metarun.text import printable


class Bare(Algorithm):
    """A backbone without a method, for a way with the target that asks for the backbone alone."""

    def loss(self, episodes: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError("a bare backbone is not trained on a source")

    def predict(self, episodes: Episodes) -> Tensor:
        raise NotImplementedError("a bare backbone predicts nothing")


class SourceImages:
    """The labelled images of the source, for methods that go on using them; the same ones at every call."""

    def __init__(self, data: DataSource | None, seed: int, device: torch.device) -> None:
        self.data, self.seed, self.device = data, seed, device

    @cached_property
    def images(self) -> Labelled:
        """The images.

        Raises:
            UserError: The data are not at hand: a classifier was stored without them.
        """
        if self.data is None:
            raise UserError(
                "transfer: this way goes on using the images of the source, which are not kept with what it learned; fit it "
                "in a run, recipe=transfer"
            )
        images = self.data.labelled("train")
        return images.normalized_by(images)

    @property
    def classes(self) -> int:
        return len(self.images.names)

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        return self.images.names

    def draw(self, count: int) -> Batch:
        """Draws `count` of them, or takes all if there are not so many."""
        which = self.images.stream(self.seed, "reused")(0, min(count, len(self.images)))
        return self.images.batch(which, self.device)


def refuse_other_places(source: Sequence[str], target: Sequence[str]) -> None:
    """Checks that classes of one name have one number: a source's outputs are taken for the target's classes by their number.

    Names that the other side does not have are allowed: the classes of MNIST and of digits may be called differently.

    Args:
        source: The names of the source's classes, in the order of its outputs.
        target: Those of the target's classes.

    Raises:
        UserError: A name stands at another place.
    """
    for place, name in enumerate(source):
        if name in target and target.index(name) != place:
            raise UserError(
                f"target: class {printable(name)} is number {target.index(name) + 1} of the target, but number {place + 1} of the source, "
                "whose outputs are taken for the target's classes by their number; give both the same classes, by the same names"
            )


class TargetClassifier(nn.Module, ABC):
    """What a target method learned: a function of images to scores, whose `state_dict` is all that it depends on."""

    transductive: bool = False  # whether the scores of an image depend on the others that it is scored with

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Computes scores `[B, classes]` of images `[B, C, H, W]`, the largest for the predicted class.

        `log_probabilities` turns them into probabilities.
        """

    def log_probabilities(self, scores: Tensor) -> Tensor:
        """Turns scores of this classifier into the logarithm of each class's probability, `[B, classes]` float64: their log softmax.

        Probabilities themselves would be 0 where scores lie far apart, whatever a temperature makes of them.
        """
        return scores.double().log_softmax(1)

    def nearness(self, images: Tensor) -> Tensor | None:
        """Computes minus the squared distance of images `[B, C, H, W]` to the nearest class mean of the examples, `[B]` float64.

        None for a classifier that keeps no examples.
        """
        return None

    def embedding(self, images: Tensor) -> Tensor | None:
        """Computes where images `[B, C, H, W]` lie in the space, `[B, D]`, in which they are compared with examples by distance.

        None for a classifier that compares them with none.
        """
        return None


def unchanged(x: Tensor) -> Tensor:
    """Returns `x` itself: no augmentation. It is no lambda, so that a classifier can be pickled."""
    return x


class TargetMethod(Checked, ABC):
    """From a learner and the labelled training images of a target to a classifier of further images.

    Its keyword-only settings are its configuration. `source` is None where the recipe trains on none. The learner itself is
    left as it is. Whatever the backbone's norm, the statistics of a classifier are those of training images
    (`metarun.ops.batch_norm.keep_statistics`): unless it is `transductive`, a prediction depends on no other test image.
    """

    configured_by = "transfer"
    needs_source: bool = False
    uses_method: bool = False  # whether it predicts by the learner's own method, and does not take its backbone alone
    augments: bool = True  # whether it learns from images that `augment` changed, and not from them as they are

    def __init__(self, learner: Algorithm, source: SourceImages | None = None) -> None:
        self.learner = learner
        self.source = source
        self.augment: Callable[[Tensor], Tensor] = unchanged  # of training images
        if self.needs_source and source is None:
            raise UserError(
                f"transfer: {type(self).__name__} goes on using the source, but this recipe trains on none; use recipe=transfer, or "
                "another way, such as transfer=all"
            )

    @abstractmethod
    def fit(self, train: Batch, classes: int) -> TargetClassifier:
        """Learns from the target's training images.

        Random draws come from the global generator, which the caller seeds.

        Args:
            train: The images, with `y` in [0, `classes`); each class has one image at least.
            classes: Of the target.

        Returns:
            A classifier, which leaves the learner's weights as they are but may hold them.
        """

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], classes: int) -> TargetClassifier:
        """Rebuilds the classifier whose `state_dict` is `state`, as `fit` returned it for so many classes."""

    def predict(self, train: Batch, test_x: Tensor, classes: int) -> Tensor:
        """Scores `[n_test, classes]` of `test_x` by a classifier that is fitted to `train`."""
        scores: Tensor = self.fit(train, classes)(test_x)
        return scores

    def check(self, classes: int) -> None:
        """Raises `UserError` if it cannot serve a target of so many classes: before anything is trained."""

    def check_names(self, names: Sequence[str]) -> None:
        """Raises `UserError` if it cannot serve a target whose classes have these names."""

    @property
    def transductive(self) -> bool:
        """Whether the prediction for a test image depends on the others."""
        return False


class Own(TargetMethod):
    """The learner's own way: the training images are the support set of one large episode, the test images its queries.

    Where the learner's norm is `batch`, its statistics are those of the training images, as with the norm `support`: those
    of the queries would make a prediction depend on the other test images.
    """

    @cached_property
    def inductive(self) -> Algorithm:
        """The learner with a norm that looks at no query."""
        if not batch_norm.transductive(self.learner.backbone.norm):
            return self.learner
        learner = copy.deepcopy(self.learner)
        batch_norm.change_kind(learner, {"batch": "support"})
        return learner

    uses_method = True
    augments = False

    def check(self, classes: int) -> None:
        learner = self.learner
        if learner.fixed_ways and learner.spec.outputs != classes:
            raise UserError(
                f"transfer=own: {type(learner).__name__}'s head has {learner.spec.outputs} outputs, and the target "
                f"{classes} classes; train with task.ways={classes}, take a method for any number of classes (algo=protonet, "
                "say), or choose another transfer="
            )

    def fit(self, train: Batch, classes: int) -> OwnClassifier:
        order = train.y.argsort(stable=True)  # sets are class-major
        return OwnClassifier(self.inductive, train.x[order], train.y[order], classes)

    def restore(self, state: Mapping[str, Tensor], classes: int) -> TargetClassifier:
        if "support_x" not in state:  # of the classes that it was trained with
            return loaded(TrainedClassifier(copy.deepcopy(self.learner)), state)
        learner = copy.deepcopy(self.inductive)
        return loaded(OwnClassifier(learner, state["support_x"], state["support_y"], classes), state)

    @property
    def transductive(self) -> bool:
        return self.inductive.transductive


class TrainedClassifier(TargetClassifier):
    """What the learner says of the classes that it was trained with itself."""

    def __init__(self, learner: Algorithm) -> None:
        super().__init__()
        self.learner = learner

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        self.learner.eval()
        # A traced batch has no length that could be divided.
        chunks = images.split(IMAGES_AT_ONCE) if isinstance(images.shape[0], int) else [images]
        return torch.cat([self.learner.classify(chunk).float() for chunk in chunks])


class OwnClassifier(TargetClassifier):
    """The learner's predictions for images as queries of an episode whose support set is class-major."""

    support_x: Tensor
    support_y: Tensor

    def __init__(self, learner: Algorithm, support_x: Tensor, support_y: Tensor, classes: int) -> None:
        super().__init__()
        self.learner, self.classes = learner, classes
        self.transductive = learner.transductive
        self.register_buffer("support_x", support_x)
        self.register_buffer("support_y", support_y)
        self._memories: dict[Any, Memory] = {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        self.learner.eval()
        with self._remembered("predict", images):
            return self.learner.predict(self._episode(images))[0]

    def _remembered(self, what: str, images: Tensor) -> AbstractContextManager[None]:
        """A context in which what depends on the support set alone is computed for the first images that are asked of, and kept.

        Args:
            what: What is asked: all predictions of one kind compute the same things.
            images: Those that are asked of.
        """
        if self.transductive or not isinstance(images.shape[0], int):  # a traced batch leaves no tensors to keep
            return contextlib.nullcontext()
        key = (what, self.support_x.device, self.support_x.dtype)
        return remembered(self._memories.setdefault(key, Memory()))

    def _episode(self, images: Tensor) -> Episodes:
        blank = torch.zeros(1, images.shape[0], dtype=torch.int64, device=images.device)
        shots = tuple(self.support_y.bincount(minlength=self.classes).tolist())
        return Episodes(self.support_x[None], self.support_y[None], images[None], blank, self.classes, shots)

    @torch.no_grad()
    def nearness(self, images: Tensor) -> Tensor:
        self.learner.eval()
        with self._remembered("embed", images):
            support, queries = self.learner.embed(self._episode(images))
        return nearness(support.flatten(2), self.support_y[None], queries.flatten(2), self.classes)[0]

    @torch.no_grad()
    def embedding(self, images: Tensor) -> Tensor | None:
        if not self.learner.metric:
            return None
        self.learner.eval()
        with self._remembered("embed", images):
            return self.learner.embed(self._episode(images))[1][0]


class Frozen(TargetClassifier):
    """A classifier of the features of a backbone that nothing trained further."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.of_features(features(self.backbone, images))

    @abstractmethod
    def of_features(self, x: Tensor) -> Tensor:
        """Scores `[B, classes]` of features `[B, D]` in float32."""


class Tuned(TargetClassifier):
    """A linear head on a backbone that was trained on the target, or that something was added to."""

    def __init__(self, backbone: Backbone, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(features(self.backbone, images)).float()
        return scores


ClassifierT = TypeVar("ClassifierT", bound=TargetClassifier)


def loaded(classifier: ClassifierT, state: Mapping[str, Tensor]) -> ClassifierT:
    """Loads the weights `state` into `classifier`, in evaluation mode; norms that kept statistics when they were fitted do so again."""
    if any(name.endswith("running_mean") for name in state):
        batch_norm.change_kind(classifier, dict.fromkeys(batch_norm.OF_A_SET, "running"))
    classifier.load_state_dict(dict(state))
    classifier.eval()
    return classifier


def keep_statistics(backbone: Backbone, x: Tensor) -> None:
    """Fixes the statistics of norms that are of a set as those of (at most 256 of) the training images `x`, in place.

    The images are taken evenly from `x`, which is class-major: each class has its share.
    """
    if batch_norm.needs_reference(backbone.norm):
        places = torch.linspace(0, len(x) - 1, min(len(x), batch_norm.REFERENCE_IMAGES), device=x.device)
        backbone.eval()
        batch_norm.keep_statistics(backbone, lambda: backbone(x[places.round().long()]))


def with_statistics(backbone: Backbone, x: Tensor) -> Backbone:
    """Returns `backbone` itself where an image's features depend on no other image, else a copy that keeps the statistics of `x`."""
    if batch_norm.needs_reference(backbone.norm):
        backbone = copy.deepcopy(backbone)
        keep_statistics(backbone, x)
    return backbone


@torch.no_grad()
def features(backbone: Backbone, x: Tensor) -> Tensor:
    """Computes the features `[B, features]` of the frozen backbone in evaluation mode, float32, chunk by chunk."""
    # A traced batch has no length that could be divided.
    known = isinstance(x.shape[0], int)
    chunks = x.tensor_split(math.ceil(x.shape[0] / IMAGES_AT_ONCE)) if known else [x]
    with evaluating(backbone):
        return torch.cat([backbone(chunk).float() for chunk in chunks])


def new_head(features: int, classes: int, device: torch.device) -> nn.Linear:
    """Builds a linear head at zero, which prefers no class."""
    head = nn.Linear(features, classes).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def restored(backbone: Backbone, state: Mapping[str, Tensor], classes: int) -> Tuned:
    """Rebuilds a backbone and a linear head with the weights that they had.

    Args:
        backbone: A network of the same shape; its weights are replaced.
        state: The `state_dict` of what was learned.
        classes: The outputs of the head.
    """
    return loaded(Tuned(backbone, new_head(backbone.features, classes, state["head.bias"].device)), state)


def copied(module: nn.Module) -> nn.Module:
    """Makes a copy to train, all of whose parameters take gradients."""
    return copy.deepcopy(module).requires_grad_(True)
