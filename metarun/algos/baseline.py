"""Baseline and Baseline++: A Closer Look at Few-shot Classification (Chen, Liu, Kira, Wang, Huang 2019).

https://arxiv.org/abs/1904.04232

Training is ordinary: cross-entropy of a linear head on the backbone f, over all classes of the source. On a test task f is frozen, and
a new head is trained on the features of the support set (section 3.2).

    Baseline:    p(y = k | x) = softmax_k(w_k . f(x) + b_k)
    Baseline++:  p(y = k | x) = softmax_k(scale * w_k . f(x) / (|w_k| |f(x)|))        (`cosine`)

The new head's training is the official code's (wyharveychen/CloserLookFewShot, methods/baselinefinetune.py): SGD at 0.01 with momentum
0.9, dampening 0.9 and weight decay 0.001, 100 epochs of batches of 4.

Differences from it:
- The heads of all tasks are trained at once. Their start and the order of the batches come from a generator of their own, the same for
  every task and every time: a task's predictions do not depend on what it is tested with. There they are drawn anew.
- Baseline++'s scale is 2 up to 200 classes and 10 above, as there; `scale` fixes it for the source's head. There as here, and not in the
  paper, each class's cosine has a learned factor (weight normalisation); `class_scales=false` is the paper.
- A test task's biases start at 0, as they do there for training only. The weights best on validation are kept, not the last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Backbone, Batch, Episodes, Spec
from metarun.core.backbone import IMAGES_AT_ONCE
from metarun.ops import batch_norm
from metarun.ops.measures import ACCURACY
from metarun.ops.numerics import full_precision, precise
from metarun.ops.optimizers import uncompiled
from metarun.ops.support import of_support


class Head(nn.Module):
    """Features `[..., B, D]` to logits `[..., B, classes]`. Its parameters are one set, or one for each of the leading axes.

    Linear, or, given a `scale`, that times the cosine of the features and the class's weights, times a learned number of the
    class with `class_scales`. Weights start uniform below 1/sqrt(D), biases at 0, a class's number at its weights' length.
    """

    def __init__(self, features: int, classes: int, scale: float | None, class_scales: bool) -> None:
        super().__init__()
        self.scale = scale or 1.0
        bound = 1 / math.sqrt(features)
        self.weight = nn.Parameter(torch.empty(classes, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(classes)) if scale is None else None
        self.length = nn.Parameter(self.weight.detach().norm(dim=1)) if scale and class_scales else None

    def forward(self, features: Tensor) -> Tensor:
        if self.bias is not None:
            return features @ self.weight.mT + self.bias[..., None, :]
        logits = self.scale * (F.normalize(features, dim=-1) @ F.normalize(self.weight, dim=-1).mT)
        return logits if self.length is None else logits * self.length[..., None, :]


class Baseline(Algorithm):
    """A classifier of the source's images; on a test task, a new head on frozen features. Test ways may be any.

    Args:
        cosine: Whether the classifiers go by cosines (Baseline++).
        scale: The factor of the cosines; null goes by the number of classes.
        class_scales: Whether each class of a cosine classifier learns a scale of its own.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
        head_epochs: The passes over the support set that train a test task's head.
        head_batch: The support images of a step of a test task's head.
        head_lr: The learning rate of a test task's head (SGD).
        head_momentum: The momentum of a test task's head.
        head_dampening: The dampening of that momentum.
        head_weight_decay: The weight decay of a test task's head.
    """

    trains_on = "batches"
    shared_batch = False
    whole_batch = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        cosine: bool = False,
        scale: PositiveFloat | None = None,
        class_scales: bool = True,
        label_smoothing: DropRate = 0.0,
        head_epochs: NonNegativeInt = 100,
        head_batch: PositiveInt = 4,
        head_lr: NonNegativeFloat = 0.01,
        head_momentum: NonNegativeFloat = 0.9,
        head_dampening: NonNegativeFloat = 0.9,
        head_weight_decay: NonNegativeFloat = 0.001,
    ) -> None:
        super().__init__(backbone, spec)
        self.cosine, self.class_scales = cosine, class_scales
        self.label_smoothing, self.head_epochs, self.head_batch = label_smoothing, head_epochs, head_batch
        self.descent: dict[str, Any] = {"lr": head_lr, "momentum": head_momentum, "dampening": head_dampening}
        self.descent["weight_decay"] = head_weight_decay
        self.head = self.new_head(spec.outputs, scale)

    def new_head(self, classes: int, scale: float | None = None) -> Head:
        """An untrained head; its cosines' scale goes by the number of classes unless it is given."""
        scale = (scale or (2.0 if classes <= 200 else 10.0)) if self.cosine else None
        return Head(self.backbone.features, classes, scale, self.class_scales)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.features_of(x))

    def classification_loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy over the source's labelled images (0 without any), and their accuracy to log."""
        logits = precise(logits)
        known = (batch.y >= 0) & (batch.domain == 0)
        labels, count = torch.where(known, batch.y, -1), known.sum().clamp(min=1)
        total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=self.label_smoothing)
        return total / count, {ACCURACY: (logits.detach().argmax(1) == labels).sum() / count}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.classification_loss(self.classify(batch.x), batch)

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Features of several tasks' sets at once, unless the norm's statistics are a set's."""
        if self.backbone.norm in ("batch", "support") or self.backbone.identity:
            return super().embed(episodes)
        images = episodes.support_x.shape[1] + episodes.query_x.shape[1]
        # A single task may be traced, with sizes that are left open.
        chunks = episodes.split(max(1, IMAGES_AT_ONCE // images)) if episodes.n_tasks > 1 else iter([episodes])
        found = []
        for tasks in chunks:
            sets = [tasks.support_x, tasks.query_x]
            support, queries = batch_norm.both_sets(self.features_of, *(x.flatten(0, 1) for x in sets))
            found.append((support.unflatten(0, sets[0].shape[:2]), queries.unflatten(0, sets[1].shape[:2])))
        support, queries = (torch.cat(parts) for parts in zip(*found, strict=True))
        return support, queries

    def fit_head(self, features: Tensor, labels: Tensor, classes: int) -> Head:
        """Heads trained on the features `[T, S, D]` and labels `[T, S]` of T tasks, with parameters `[T, ...]`."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            head = self.new_head(classes).to(features)
            for value in head.parameters():
                value.data = value.data.repeat(len(features), *(1 for _ in value.shape))
            optimizer = uncompiled(torch.optim.SGD)(head.parameters(), **self.descent)
            for _ in range(self.head_epochs):
                for chosen in torch.randperm(features.shape[1]).to(features.device).split(self.head_batch):
                    optimizer.zero_grad()
                    logits, y = head(features[:, chosen]).flatten(0, 1), labels[:, chosen].flatten()
                    # The sum over tasks of their means: a task's head gets the gradient of its own.
                    (F.cross_entropy(logits, y, reduction="sum") / len(chosen)).backward()
                    optimizer.step()
        return head

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        support, query = self.embed(episodes)
        with full_precision(support):
            head = of_support(lambda: self.fit_head(support.detach(), episodes.support_y, episodes.ways))
            return head(query)
