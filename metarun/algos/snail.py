"""SNAIL: A Simple Neural Attentive Meta-Learner (Mishra, Rohaninejad, Chen, Abbeel 2018).

https://arxiv.org/abs/1707.03141

A task is a sequence: the labelled support images in random order, then a query without a label. An element is the
features of an image and its one-hot label. Blocks add channels to it, from itself and those before it (section 3.1):

    dense block of dilation R:        tanh(f(x)_t) sigmoid(g(x)_t),  f and g affine in x_t and x_t-R (kernel size 2)
    TC block for sequences of T:      ceil(log2 T) dense blocks, whose dilations double
    attention block of key size K:    sum_s<=t softmax_s(q_t . k_s / sqrt(K)) v_s,  q, k and v affine in x

Attention(64, 32), TC(128), Attention(256, 128), TC(128), Attention(512, 256), then a linear layer to the logits of the
query, whose cross-entropy is the loss (section 5.1; the sizes as in eambutu/snail-pytorch and Michedev/snail).

What a causal network makes of the support does not depend on what follows. So the support goes through once a task,
and all queries beside one another, each as if it came right after the support and alone.

No official code of the classifier is known to us; compared with those two, sagelywizard/snail, and the blocks in
google-research/tensor2robot. Differences:
- Dilations are 1, 2, 4, ..., as in sagelywizard/snail and Michedev/snail: with kernels of two they cover exactly the
  sequence. The paper's pseudocode, and the other two, begin with 2, which leaves out every other element.
- The softmax of the attention is over what is read, as in the paper; both classifiers take it over the readers.
- The backbone's features go in as they are (the two classifiers map them to 64 for Omniglot, 384 for mini-ImageNet).
- All queries of a training task share one order of the support; there a sequence has one query.
- The shots are those of the config; the paper draws 1 to 5 for every task. Other shots work at test time: TC blocks then
  reach less far than the sequence, or further; attention always sees all.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import Len, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.batch_norm import both_sets
from metarun.ops.draws import rand
from metarun.ops.numerics import precise

KEYS = [64, 256, 512]  # of the attention blocks
VALUES = [32, 128, 256]


class DenseBlock(nn.Module):
    """Adds `filters` channels to `[..., S + Q, channels]`: S support elements in order, and Q ends of the sequence."""

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.now = nn.Linear(channels, 2 * filters)
        self.before = nn.Linear(channels, 2 * filters, bias=False)
        self.dilation = dilation

    def forward(self, x: Tensor, n_support: int) -> Tensor:
        earlier = F.pad(self.before(x[..., :n_support, :]), (0, 0, self.dilation, 0))  # nothing before the first
        at = torch.arange(x.shape[-2], device=x.device).clamp(max=n_support)  # every query follows the support
        change, gate = (self.now(x) + earlier[..., at, :]).chunk(2, -1)
        return torch.cat([x, change.tanh() * gate.sigmoid()], -1)


class AttentionBlock(nn.Module):
    """Adds `values` channels to `[..., S + Q, channels]`: what an element reads of itself and of the support before."""

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(channels, keys), nn.Linear(channels, keys)
        self.value = nn.Linear(channels, values)

    def weights(self, x: Tensor, n_support: int) -> Tensor:
        """What each element reads of which, `[..., S + Q, S + Q]`; the rows sum to one."""
        logits = precise(self.query(x) @ self.key(x).mT) / math.sqrt(self.key.out_features)
        place = torch.arange(x.shape[-2], device=x.device)
        seen = (place <= place[:, None]) & (place < n_support) | (place == place[:, None])
        return logits.masked_fill(~seen, -math.inf).softmax(-1)

    def forward(self, x: Tensor, n_support: int) -> Tensor:
        return torch.cat([x, self.weights(x, n_support).to(x.dtype) @ self.value(x)], -1)


class SNAIL(Algorithm):
    """`keys` and `values` are sizes of the attention blocks, `filters` of the TC blocks between them.

    Args:
        filters: The filters of the temporal convolutions between the attention blocks.
        keys: The sizes of the attention blocks' keys.
        values: The sizes of the attention blocks' values, as many as keys.
    """

    fixed_ways = True
    whole_batch = True  # the sequences of all tasks are one batch

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        filters: PositiveInt = 128,
        keys: Annotated[list[PositiveInt], Len(1)] = KEYS,
        values: Annotated[list[PositiveInt], Len(1)] = VALUES,
    ) -> None:
        super().__init__(backbone, spec)
        if len(keys) != len(values):
            raise UserError(f"algo.values={list(values)}: must be {len(keys)} sizes, one for each of algo.keys")
        dilations = [2**i for i in range(math.ceil(math.log2(spec.outputs * spec.shots + 1)))]
        channels = backbone.features + spec.outputs
        self.blocks = nn.ModuleList()
        for number, (key, value) in enumerate(zip(keys, values, strict=True)):
            for dilation in dilations if number else []:
                self.blocks.append(DenseBlock(channels, filters, dilation))
                channels += filters
            self.blocks.append(AttentionBlock(channels, key, value))
            channels += value
        self.head = nn.Linear(channels, spec.outputs)

    def read(self, features: Tensor, labels: Tensor) -> Tensor:
        """Logits `[T, Q, N]`, of features of support and queries `[T, S + Q, features]` and the support's labels."""
        n_support = labels.shape[-1]
        known = F.pad(F.one_hot(labels, self.spec.outputs), (0, 0, 0, features.shape[-2] - n_support))
        x = torch.cat([features, known.to(features.dtype)], -1)
        for block in self.blocks:
            x = block(x, n_support)
        return self.head(x[..., n_support:, :])

    def logits(self, episodes: Episodes, order: Tensor) -> Tensor:
        """`read`, with the tasks' support in the order `[T or 1, S]`."""
        sets = episodes.support_x, episodes.query_x
        support, queries = self.over_tasks(lambda s, q: both_sets(self.backbone, s, q), *sets)
        support = support.take_along_dim(order[..., None], 1)
        return self.read(torch.cat([support, queries], 1), episodes.support_y.take_along_dim(order, 1))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        order = rand(*episodes.support_y.shape, device=episodes.support_y.device).argsort(1)
        logits = self.logits(episodes, order)
        return self.loss_and_scores(logits, episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        return self.logits(episodes, episodes.classes_in_turn()[None])
