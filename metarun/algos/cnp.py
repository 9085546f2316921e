"""Conditional Neural Processes (Garnelo, Rosenbaum, Maddison, Ramalho, Saxton, Shanahan, Teh, Rezende, Eslami 2018).

https://arxiv.org/abs/1807.01613

    r_i = h(x_i, y_i) for every support pair        (equation 1)
    r = (r_1 + ... + r_n) / n                       (equation 2, with the mean as the commutative operation)
    phi = g(x*, r) for every target                 (equation 3)
    loss = -mean log Q(y* | phi)                    (equation 4)

Regression: Q is a Gaussian of mean mu and deviation sigma = min_sigma + (1 - min_sigma) softplus(s), phi = (mu, s); the
targets are the support points and the queries. `predict` gives mu. Classification: r_i is of the image alone, the mean
is of each class by itself, r the concatenation over the classes, and phi holds a logit a class: the ways are fixed.

Checked against google-deepmind/neural-processes (conditional_neural_process.ipynb, regression): ReLUs and a linear last
layer, width 128, three layers in g, 0.1 as least sigma, mean log likelihood over all points given. Differences:
- The backbone embeds x for h and g alike; `encoder_layers` and `decoder_layers` count the layers after it. The notebook
  has no such part and four layers in h. On sinusoids backbone.hidden=[128] backbone.init_std=null learn faster.
- The notebook draws the number of support points anew in each step (3 to 9), the paper from 0 up. The sampler draws
  tasks of one size, so this CNP is at its best with as many support points as it was trained with.
- There is no official code of the classification, and we know of no word on the layers that follow its convolutions.
- Two additions are ours, off by default; without them Omniglot learns many times more slowly. `product`: the first
  layer of g adds C x * D r, by elements, to A x + B r, from which alone it is hard to learn to compare. `orders`: as
  the order of the classes in r is chance, a training task is learned in several cyclic orders at the cost of g alone.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import DropRate, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.numerics import precise
from metarun.ops.prototypes import class_means


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def log_density(y: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """The logarithm of a Gaussian's density, by elements."""
    return -0.5 * ((y - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)


class CNP(Algorithm):
    """Predicts from one summary of the support set, the mean of its encoded pairs.

    Args:
        width: The width of a pair's code r_i and of all hidden layers.
        encoder_layers: The layers of the encoder h.
        decoder_layers: The layers of the decoder g.
        min_sigma: The least sigma of a regression.
        product: Whether a product of x and r is added to the first layer of g.
        orders: The orders of a training task's classes that are trained on, at most its ways.
    """

    regression = True
    fixed_ways = True
    recordable = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        width: PositiveInt = 128,
        encoder_layers: PositiveInt = 3,
        decoder_layers: PositiveInt = 3,
        min_sigma: DropRate = 0.1,
        product: bool = False,
        orders: PositiveInt = 1,
    ) -> None:
        super().__init__(backbone, spec)
        self.gaussian = spec.kind == "regression"
        if orders > (1 if self.gaussian else spec.outputs):
            raise UserError(f"algo.orders={orders}: must be from 1 to the ways of a training task; 1 is the paper's")
        self.width, self.min_sigma, self.orders = width, min_sigma, orders
        pair, summary = (spec.outputs, width) if self.gaussian else (0, width * spec.outputs)
        self.encoder = mlp([backbone.features + pair, *[width] * encoder_layers])
        outputs = spec.outputs * (2 if self.gaussian else 1)
        self.decoder = mlp([backbone.features + summary, *[width] * (decoder_layers - 1), outputs])
        first = width if decoder_layers > 1 else outputs
        sizes = (backbone.features, summary) if product else ()
        self.factors = nn.ModuleList(nn.Linear(size, first, bias=False) for size in sizes)

    def summary(self, features: Tensor, y: Tensor) -> Tensor:
        """r of the support sets, `[T, width]`; of classes `[T, N * width]`."""
        if self.gaussian:
            return precise(self.encoder(torch.cat([features, y.to(features.dtype)], dim=-1))).mean(1)
        encoded = precise(self.encoder(features))
        return class_means(encoded, y, self.spec.outputs).flatten(1)

    def decode(self, features: Tensor, summary: Tensor) -> Tensor:
        """phi of `features` `[T, M, F]` and `summary` `[..., T, R]`, which the first layer takes one by one."""
        first = self.decoder[0]
        assert isinstance(first, nn.Linear)
        of_features, of_summary = first.weight.split([features.shape[-1], summary.shape[-1]], dim=1)
        hidden = F.linear(features, of_features, first.bias) + F.linear(summary, of_summary)[..., None, :]
        if self.factors:
            hidden = hidden + self.factors[0](features) * self.factors[1](summary)[..., None, :]
        return precise(self.decoder[1:](hidden))

    def log_likelihood(self, phi: Tensor, y: Tensor) -> Tensor:
        """Of each point `[T, M]`, its dimensions independent."""
        mean, raw = phi.chunk(2, dim=-1)
        return log_density(y, mean, self.min_sigma + (1 - self.min_sigma) * F.softplus(raw)).sum(-1)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, queries = self.embed(episodes)
        if self.gaussian:
            phi = self.decode(torch.cat([support, queries], dim=1), self.summary(support, episodes.support_y))
            return -self.log_likelihood(phi, torch.cat([episodes.support_y, episodes.query_y], dim=1)).mean(), {}
        summary = self.summary(support, episodes.support_y)
        summaries = torch.stack([summary.roll(-order * self.width, dims=1) for order in range(self.orders)])
        turned = self.decode(queries, summaries)
        logits = torch.stack([each.roll(order, dims=-1) for order, each in enumerate(turned)])
        target = episodes.query_y.expand(self.orders, *episodes.query_y.shape)
        return self.task_loss(logits, target), self.scores(logits[0], episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        phi = self.decode(queries, self.summary(support, episodes.support_y))
        return phi.chunk(2, dim=-1)[0] if self.gaussian else phi

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """The mean log likelihood of the queries of a regression task."""
        if not self.gaussian:
            return {}
        support, queries = self.embed(episodes)
        phi = self.decode(queries, self.summary(support, episodes.support_y))
        return {"log_likelihood": self.log_likelihood(phi, episodes.query_y).mean(1)}
