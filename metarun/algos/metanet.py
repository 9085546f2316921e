"""Meta Networks (Munkhdalai, Yu 2017).

https://arxiv.org/abs/1703.00837 (algorithm 1)

A base learner b and an embedding u have slow weights W and Q, which are trained, and fast ones, which two learned
functions make of loss gradients (the "meta information"), coordinate by coordinate:

    Q* = d(G, {grad_Q loss_emb(u(Q, x'_t), y'_t)}_t)    an LSTM over the support set; one Q* a task
    W*_i = m(Z, grad_W loss_task(b(W, x'_i), y'_i))     an MLP; one memory slot a support example
    r'_i = u(Q, Q*, x'_i)                               the key of slot i
    a = softmax_i(cos(r'_i, r)),  r = u(Q, Q*, x)       the read of a query
    W*(x) = sum_i a_i W*_i,  logits b(W, W*(x), x)

Layer augmentation: a layer is relu(W h) + relu(W* h), or W h + W* h where no nonlinearity follows. A gradient g enters
m and d as (max(log(|g| + eps) / 7, -1), clamp(e^7 g, -1, 1)).

As in the official code (bitbucket.org/tsendeemts/metanet, MetaNetFull.py and MetaNetPartial.py): both losses are
cross-entropies; the meta information is constant, so nothing is differentiated twice; m is an MLP 2-20-20-1 and d an
LSTM of 20 with a linear output, each shared by all coordinates of these layers; W and Q have no biases; the layer that
gives loss_emb its logits thus gets no gradient and stays as it was drawn; gradients are clipped to norm 10.
Differences:
- Fast weights are those of two fully connected layers, `hidden` wide, on the features of the backbone. Official: of all
  five convolutions too (Full, Omniglot), or of the last two (Partial, mini-ImageNet).
- b and u share the backbone; there each has its own. Support and queries go through it together.
- d reads one gradient a class, the mean over its examples, in the order of the labels. The official code reads the
  shuffled support set in five parts (Omniglot; mini-ImageNet: ten, or each example if fewer): at five ways and one shot
  the same gradients, in a random order. The paper samples T examples.
- Test tasks have the ways of training. The official mini-ImageNet run has other ways, by an output layer never trained.
- The loss is the mean over the queries, not their sum, and over several tasks a step, not of one; what is clipped to
  norm 10 is thus smaller. Full has no batch norm, Partial in its first three convolutions; here it is the backbone's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import one_hot, precise
from metarun.ops.support import of_support

SCALE = 7.0  # gradients below e^-7 enter by their value, larger ones by their logarithm


def preprocessed(gradient: Tensor) -> Tensor:
    """Logarithm and sign of each coordinate, `[..., 2]` (Andrychowicz et al. 2016, appendix A)."""
    size = (gradient.abs() + torch.finfo(gradient.dtype).eps).log() / SCALE
    return torch.stack([size.clamp(min=-1), (gradient * math.exp(SCALE)).clamp(-1, 1)], dim=-1)


def meta_information(features: Tensor, labels: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of each example's cross-entropy on `second @ relu(first @ features)`, as constants.

    Features `[T, S, F]` and labels `[T, S]` to `[T, S, hidden, F]` and `[T, S, N, hidden]`, in closed form.
    """
    features, first, second = precise(features.detach()), first.detach(), second.detach()
    inner = F.relu(features @ first.T)
    errors = (inner @ second.T).softmax(-1) - one_hot(labels, len(second), features.dtype)
    inner_errors = (errors @ second) * (inner > 0)
    return inner_errors[..., None] * features[:, :, None], errors[..., None] * inner[:, :, None]


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """The softmax over the keys `[T, S, E]` of their cosines with the queries `[T, Q, E]`: `[T, Q, S]`."""
    squares = queries.square().sum(-1)[:, :, None] * keys.square().sum(-1)[:, None]
    return (queries @ keys.mT / (squares + 1e-6).sqrt()).softmax(-1)


class MetaNet(Algorithm):
    """A classifier whose every query reads fast weights from a memory that the support set's gradients fill.

    Args:
        hidden: The width of the fully connected layers.
        meta_hidden: The width of the functions m and d, which make fast weights of gradients.
    """

    fixed_ways = True
    key_second: Tensor

    def __init__(
        self, backbone: Backbone, spec: Spec, *, hidden: PositiveInt = 64, meta_hidden: PositiveInt = 20
    ) -> None:
        super().__init__(backbone, spec)
        self.first = nn.Linear(backbone.features, hidden, bias=False)
        self.second = nn.Linear(hidden, spec.outputs, bias=False)
        self.key = nn.Linear(backbone.features, hidden, bias=False)
        # Not a parameter, since all that it is used for is constant.
        self.register_buffer("key_second", nn.Linear(hidden, spec.outputs, bias=False).weight.detach())
        self.m = nn.Sequential(
            nn.Linear(2, meta_hidden), nn.ReLU(),
            nn.Linear(meta_hidden, meta_hidden), nn.ReLU(),
            nn.Linear(meta_hidden, 1),
        )  # fmt: skip
        self.d = nn.LSTMCell(2, meta_hidden)
        self.d_output = nn.Linear(meta_hidden, 1)

    def keys(self, support: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        """r of `features` `[T, B, F]`, `[T, B, hidden]`, with the fast weights Q* that d makes of the support set."""
        gradients, _ = meta_information(support, labels, self.key.weight, self.key_second)
        members = one_hot(labels, len(self.key_second), gradients.dtype)
        classes = torch.einsum("tsn,tshf->nthf", members / members.sum(1, keepdim=True), gradients)
        steps = preprocessed(classes).flatten(1, 3)
        state = None
        for step in steps:
            state = self.d(step, state)
        assert state is not None
        fast = self.d_output(state[0]).view(classes.shape[1:])
        return precise(self.key(features)) + precise(features @ fast.mT)

    def memory(self, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The fast weights W*_i of both layers, `[T, S, hidden, F]` and `[T, S, N, hidden]`."""
        gradients = meta_information(support, labels, self.first.weight, self.second.weight)
        first, second = (self.m(preprocessed(gradient))[..., 0] for gradient in gradients)
        return first, second

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """`[T, Q, N]` from the features of the support set and of the queries."""
        keys = self.keys(support, labels, torch.cat([support, queries], dim=1))
        read = attention(keys[:, support.shape[1] :], keys[:, : support.shape[1]])
        first, second = of_support(lambda: self.memory(support, labels))

        def fast(weights: Tensor, x: Tensor) -> Tensor:
            """Each query through the weights that it reads: the same read of what every slot makes of it."""
            return torch.einsum("tqs,tsqo->tqo", read, torch.einsum("tqi,tsoi->tsqo", x, weights))

        inner = F.relu(self.first(queries)) + F.relu(fast(first, queries))
        return precise(self.second(inner)) + precise(fast(second, inner))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        return self.logits(support, episodes.support_y, queries)
