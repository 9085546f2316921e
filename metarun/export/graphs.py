"""The functions that are exported: from pixels to probabilities, with a fixed support set or with one that is given along."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.core import Algorithm, Episodes
from metarun.target.base import TargetClassifier

Prepare = Callable[[Tensor], Tensor]  # uint8 [B, channels, size, size] -> what the network takes


def in_order(images: Tensor) -> Tensor:
    """Images in the order of their axes in memory: a graph's views are of such, and with channels last they would be refused."""
    return images.clone(memory_format=torch.contiguous_format)


def of_classifier(
    classifier: TargetClassifier, prepare: Prepare, temperature: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """A function of images uint8 `[B, C, H, W]` to the probability of each class, float32 `[B, classes]`.

    Args:
        classifier: What was fitted, in evaluation mode.
        prepare: From pixels to the classifier's inputs.
        temperature: Divides the logarithms of its probabilities.
    """

    def probabilities(images: Tensor) -> Tensor:
        logs = classifier.log_probabilities(classifier(prepare(in_order(images))))
        return (logs / temperature).softmax(1).float()

    return probabilities


def of_learner(
    learner: Algorithm, prepare: Prepare, ways: int, temperature: float = 1.0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of support images, their labels and query images to probabilities, float32 `[B, ways]`.

    The images are uint8 `[.., C, H, W]` and the labels int64 in `[0, ways)`, class by class and as many of each class.

    Args:
        learner: The method, in evaluation mode, whose norm looks at no query.
        prepare: From pixels to the learner's inputs.
        ways: The number of classes.
        temperature: Divides the scores.
    """

    def probabilities(support_images: Tensor, support_labels: Tensor, images: Tensor) -> Tensor:
        blank = torch.zeros(1, images.shape[0], dtype=torch.int64)
        support, queries = (prepare(in_order(each)) for each in (support_images, images))
        sets = support[None], support_labels[None], queries[None], blank
        scores = learner.predict(Episodes(*sets, ways))[0]
        return F.softmax(scores.double() / temperature, dim=1).float()

    return probabilities
