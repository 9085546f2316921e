"""Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (Zhang et al. 2022), and Tip-Adapter-F.

https://arxiv.org/abs/2207.09519

Trained as a plain classifier of the source's classes. On a test task the support images are a cache of keys K, their unit features, and
values L, their one-hot classes. A query of unit features x has the logits

    alpha exp(-beta (1 - x K^T)) L + scale x W^T

Tip-Adapter-F (section 3.2) goes on with the keys as parameters, by AdamW on the support set's cross-entropy (`tune_steps`).

Differences from the paper and its code (gaopengcuhk/Tip-Adapter):
- There W are the text features of the classes' names, and scale is 100. Here no text is at hand: W are the support set's class means,
  of unit length, and the built-in scale is 0: the cache alone classifies.
- alpha and beta are searched there on validation images; here they are settings, the paper's 1 and 5.5.
- Keys there are means over ten random crops of an image. In Tip-Adapter-F each step here has the whole support set, there batches of 256
  crops, and the best epoch is chosen on the test images; here the last step counts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.algos.transformed import MeanMomentum, Transform, TransformedFeatures
from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt, PositiveFloat
from metarun.core import Backbone, Spec
from metarun.ops.optimizers import uncompiled
from metarun.ops.prototypes import class_sums
from metarun.ops.support import of_support

EPSILON = 1e-4  # of AdamW


class TipAdapter(TransformedFeatures):
    """A classifier of the source's images; on a test task a cache of its support images. Test ways may be any.

    Args:
        sharpness: The factor beta of a key's distance.
        cache_weight: The weight alpha of the cache's logits.
        prototype_scale: The factor of the cosines to class means, in the place of the text classifier; 0 leaves them out.
        tune_steps: The steps that tune the keys (Tip-Adapter-F); 0 trains nothing.
        tune_lr: The learning rate of these steps at first; it falls to zero along a cosine.
        transform: What is done to features before they become unit vectors: centring (cl2n), or nothing (un, l2n).
        mean_momentum: The momentum of the mean that features are centred by.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        sharpness: PositiveFloat = 5.5,
        cache_weight: PositiveFloat = 1.0,
        prototype_scale: NonNegativeFloat = 0.0,
        tune_steps: NonNegativeInt = 0,
        tune_lr: NonNegativeFloat = 0.001,
        transform: Transform = "l2n",
        mean_momentum: MeanMomentum = 0.01,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(
            backbone, spec, transform=transform, mean_momentum=mean_momentum, label_smoothing=label_smoothing
        )
        self.sharpness, self.cache_weight, self.prototype_scale = sharpness, cache_weight, prototype_scale
        self.tune_steps, self.tune_lr = tune_steps, tune_lr

    @torch.no_grad()
    def solve(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        support, queries = F.normalize(support, dim=-1), F.normalize(queries, dim=-1)
        prototypes = F.normalize(class_sums(support, targets, targets.shape[-1]), dim=-1)

        def logits(x: Tensor, keys: Tensor) -> Tensor:
            affinity = (self.sharpness * (x @ keys.mT - 1)).exp()
            return self.cache_weight * affinity @ targets + self.prototype_scale * x @ prototypes.mT

        def tuned() -> Tensor:
            keys = support.clone().requires_grad_()
            optimizer = uncompiled(torch.optim.AdamW)([keys], lr=self.tune_lr, eps=EPSILON)
            for step in range(self.tune_steps):
                optimizer.param_groups[0]["lr"] = self.tune_lr * (1 + math.cos(math.pi * step / self.tune_steps)) / 2
                with torch.enable_grad():
                    logs = logits(support, keys).log_softmax(-1)
                    loss = -(targets * logs).sum() / support.shape[-2]  # a sum over tasks: each has its own gradient
                (keys.grad,) = torch.autograd.grad(loss, [keys])
                optimizer.step()
            return keys

        return logits(queries, of_support(tuned))
