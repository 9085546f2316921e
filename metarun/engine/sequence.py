"""Learners of classes that arrive one after the other, on features that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import Diverged
from metarun.ops import metrics
from metarun.ops.linear_head import Scaling, trained_head
from metarun.ops.online import kaiming
from metarun.ops.optimizers import uncompiled
from metarun.ops.prototypes import class_means, negative_squared_distances


@dataclass(frozen=True)
class ClassSequence:
    """The features of C classes in the order in which they arrive.

    Args:
        learned: K items of each class, `[C, K, D]`, in the order in which they are seen.
        asked: Other items of each class, `[C, Q, D]`.
    """

    learned: Tensor
    asked: Tensor

    def correct(self, logits: Tensor, classes: int) -> float:
        """Computes the share of right answers.

        Args:
            logits: Of items of the first `classes` classes, class after class, `[classes * n, ...]`.
            classes: How many there are.
        """
        labels = torch.arange(classes, device=logits.device).repeat_interleave(len(logits) // classes)
        return metrics.right(logits, labels).mean().item()


def online(
    sequence: ClassSequence, points: Sequence[int], learning_rate: float, optimizer: str, seed: int
) -> tuple[list[float], list[float], list[float]]:
    """Learns a linear head by one step on each item, class after class; nothing is seen twice.

    Args:
        sequence: The classes.
        points: The numbers of classes after which it is tested on all classes so far, increasing.
        learning_rate: That of the steps.
        optimizer: `adam` or `sgd`.
        seed: Of the head's start, whose rows are normal with variance 2 / D.

    Returns:
        At each point the accuracy on other items of the classes so far, and on the items that were learned, where an answer may be
        any class of the sequence, also one that has yet to come; and that on other items where it is one of the classes so far.

    Raises:
        Diverged: The head is not finite any more.
    """
    count, images, features = sequence.learned.shape
    start = torch.randn(count, features, generator=torch.Generator().manual_seed(seed))
    weight = kaiming(start).to(sequence.learned).requires_grad_()
    bias = torch.zeros_like(weight[:, 0]).requires_grad_()
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    descent = uncompiled(kind)([weight, bias], lr=learning_rate)
    unseen: list[float] = []
    seen: list[float] = []
    so_far: list[float] = []
    labels = torch.arange(count, device=weight.device)
    for number in range(max(points)):
        for place in range(images):
            z = sequence.learned[number, place]
            with torch.no_grad():  # the gradient of the cross-entropy, without a graph
                error = (weight @ z + bias).softmax(0)
                error[labels[number]] -= 1
                weight.grad, bias.grad = torch.outer(error, z), error
            descent.step()
        if number + 1 in points:
            with torch.no_grad():
                for items, found in ((sequence.asked, unseen), (sequence.learned, seen)):
                    logits = F.linear(items[: number + 1].flatten(0, 1), weight, bias)
                    if not logits.isfinite().all():
                        raise Diverged(f"continual.rates: the head is not finite at {learning_rate:g}; try lower ones")
                    found.append(sequence.correct(logits, number + 1))
                    if found is unseen:
                        so_far.append(sequence.correct(logits[:, : number + 1], number + 1))
    return unseen, seen, so_far


def prototypes(sequence: ClassSequence, points: Sequence[int]) -> list[float]:
    """Measures the accuracy of the nearest class mean at each point: what arrives later does not change the mean of a class.

    An answer is one of the classes so far.
    """
    found = []
    for count in points:
        known = sequence.learned[:count]
        labels = torch.arange(count, device=known.device).repeat_interleave(known.shape[1])
        means = class_means(known.flatten(0, 1)[None], labels[None], count)
        logits = negative_squared_distances(sequence.asked[:count].flatten(0, 1)[None], means)[0]
        found.append(sequence.correct(logits, count))
    return found


def linear_probe(sequence: ClassSequence, points: Sequence[int]) -> list[float]:
    """Measures the accuracy at each point of a linear head that may look at all items so far at once, again and again.

    It is trained anew at each point, as `transfer=linear_probe` does, on standardised features. It is no learner of sequences but
    what such could reach on these features. An answer is one of the classes so far.
    """
    found = []
    for count in points:
        known, asked = sequence.learned[:count].flatten(0, 1), sequence.asked[:count].flatten(0, 1)
        scaling = Scaling(known)
        labels = torch.arange(count, device=known.device).repeat_interleave(sequence.learned.shape[1])
        weight, bias = trained_head(scaling(known), labels, count)
        found.append(sequence.correct(F.linear(scaling(asked), weight, bias), count))
    return found
