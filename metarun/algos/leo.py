"""LEO: Meta-Learning with Latent Embedding Optimization (Rusu et al. 2019).

https://arxiv.org/abs/1807.05960 (section 2.3)

    z_n ~ N(mu_n, sigma_n^2),  both of the mean over shots k and all support x_m of g_r(g_e(x_nk), g_e(x_m))
    w_n ~ N(m_n, s_n^2),  both of g_d(z_n);  the logit of class n is w_n . x
    z <- z - alpha grad_z L_support, `inner_steps` times;  w <- w - eta grad_w L_support, `finetune_steps` times
    outer loss: L_query + kl_weight KL(N(mu, sigma^2) || N(0, 1)) + encoder_weight |stopgrad(z') - z|^2
                + l2_weight/2 |g_e, g_r, g_d|^2 + orthogonality_weight |C - I|^2

z' are the codes after their steps; C correlates the directions into which the decoder g_d takes the latent dimensions.
Rates are learned: alpha one a latent dimension, eta one a feature. At test time codes and weights are the means.

Settings are of the official config.py (google-deepmind/leo), but for Adam's rate, 0.0001 there; tuned ones are in its
README (miniImageNet 1-shot: dropout 0.31, kl_weight 0.76, encoder_weight 6e-6, l2_weight 4e-10, orthogonality_weight
0.19). As there, x has length 1, inner losses sum over classes, penalties are means, evaluations draw anew. Differences:
- x are of the backbone, trained with all the rest; the paper's of a fixed WRN-28-10. Its regression is left out.
- With f(u) = softplus(u) / log 2 of the networks' outputs u, sigma = f(u) and s = c f(u), c = sqrt(2 / (N + features)).
  There they are max(exp(u) - 1 + b, 1e-10), b = 0 for sigma and c for s, with which the inner loop blew up here.
- The KL is in closed form, there estimated from the draw. A class has one code, as in the paper; there one for each
  shot, whose predictions are averaged. There each gradient is clipped, by value and then by norm, and a step with a NaN
  only decays the weights; here all are clipped together, by norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import DropRate, NonNegativeFloat, NonNegativeInt, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.draws import dropout, randn
from metarun.ops.inner_loop import adapt
from metarun.ops.numerics import precise
from metarun.ops.prototypes import class_means
from metarun.ops.support import of_support


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation^2) || N(0, 1)), the mean over the elements."""
    return (mean.square() / 2 + deviation.square() / 2 - deviation.log() - 0.5).mean()


def overlap(weight: Tensor) -> Tensor:
    """The mean squared difference of the correlations of the columns of `weight` from the identity."""
    columns = F.normalize(weight, dim=0)
    return (columns.T @ columns - torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)).square().mean()


def noise(like: Tensor) -> Tensor:
    """Standard normal random numbers `[T, ...]` of the tasks."""
    return randn(*like.shape, device=like.device, dtype=like.dtype)


class LEO(Algorithm):
    """Descends in the space of codes, one a class, that decode to a linear classifier. Train and test ways may differ.

    Args:
        latent_size: The numbers of a class's code.
        inner_steps: The gradient steps in the space of codes.
        inner_lr: Where the learned rate of the steps in the space of codes starts.
        finetune_steps: The gradient steps of the decoded classifier.
        finetune_lr: Where the learned rate of the steps of the decoded classifier starts.
        dropout: The share of the features that is dropped, in training.
        kl_weight: The weight of the codes' divergence from a standard normal.
        encoder_weight: The weight of the distance between the codes before and after adaptation.
        l2_weight: The weight of the squares of the weights.
        orthogonality_weight: The weight of the correlation of the decoder's rows.
    """

    whole_batch = True  # the inner steps of all tasks are one computation

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        latent_size: PositiveInt = 64,
        inner_steps: NonNegativeInt = 5,
        inner_lr: NonNegativeFloat = 1.0,
        finetune_steps: NonNegativeInt = 5,
        finetune_lr: NonNegativeFloat = 0.001,
        dropout: DropRate = 0.5,
        kl_weight: NonNegativeFloat = 1e-3,
        encoder_weight: NonNegativeFloat = 1e-9,
        l2_weight: NonNegativeFloat = 1e-8,
        orthogonality_weight: NonNegativeFloat = 1e-3,
    ) -> None:
        super().__init__(backbone, spec)
        linear, pair, features = partial(nn.Linear, bias=False), 2 * latent_size, backbone.features
        self.encoder, self.decoder = linear(features, latent_size), linear(latent_size, 2 * features)
        self.relation = nn.Sequential(linear(pair, pair), nn.ReLU(), linear(pair, pair), nn.ReLU(), linear(pair, pair))
        for weight in self.coders():
            nn.init.xavier_uniform_(weight)
        self.inner_rate = nn.Parameter(torch.full((latent_size,), inner_lr))
        self.finetune_rate = nn.Parameter(torch.full((features,), finetune_lr))
        self.inner_steps, self.finetune_steps, self.dropout = inner_steps, finetune_steps, dropout
        self.kl_weight, self.encoder_weight = kl_weight, encoder_weight
        self.l2_weight, self.orthogonality_weight = l2_weight, orthogonality_weight

    def coders(self) -> list[Tensor]:
        """The weights of encoder, relation network and decoder."""
        return [weight for part in (self.encoder, self.relation, self.decoder) for weight in part.parameters()]

    def unit_features(self, support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        """One task's features, of length 1: the support set's `[N*K, features]`, and the queries'."""
        support, queries = (precise(x) for x in self.backbone.embed_sets(support_x, query_x))
        return F.normalize(support, dim=-1), F.normalize(queries, dim=-1)

    def encode(self, support: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """Means and deviations of the codes, each `[T, N, latent_size]`, of features `[T, N*K, features]`."""
        encoded = self.encoder(support)
        pairs = torch.cat(torch.broadcast_tensors(encoded[:, :, None], encoded[:, None]), -1)
        related = precise(self.relation(pairs)).mean(2)
        mean, spread = class_means(related, labels, ways).chunk(2, -1)
        return mean, F.softplus(spread) / math.log(2)

    def decode(self, codes: Tensor, draw: bool) -> Tensor:
        """The classifiers `[T, N, features]` of codes: the means, or with `draw` random ones about them."""
        mean, spread = precise(self.decoder(codes)).chunk(2, -1)
        scale = math.sqrt(2 / sum(mean.shape[-2:])) / math.log(2)  # Glorot's where the output is 0
        return mean + scale * F.softplus(spread) * noise(mean) if draw else mean

    def learn(self, x: Tensor, y: Tensor, ways: int, steps: Sequence[int], draw: bool) -> tuple[list[Tensor], Tensor]:
        """Learns the classifiers of tasks from their support sets.

        Args:
            x: Features of the support sets, `[T, N*K, features]`.
            y: Their labels, int64 `[T, N*K]`.
            ways: N.
            steps: The numbers of inner steps, of the code first and then of the classifier itself.
            draw: Whether codes and classifiers are drawn, and features dropped, as in training; otherwise they are means.

        Returns:
            The classifiers `[T, N, features]` after each of `steps`, and the penalty that the codes add to the loss, a scalar.
        """
        drop = partial(dropout, rate=self.dropout, training=draw)

        def inner(weights: Tensor) -> Tensor:  # summed over tasks: each has the gradient of its own loss
            return self.task_loss(drop(x) @ weights.mT, y) * ways * len(y)

        mean, deviation = self.encode(drop(x), y, ways)
        start = {"z": mean + deviation * noise(mean) if draw else mean}
        turn = min(max(steps), self.inner_steps)
        first, rest = range(turn + 1), range(max(steps) - turn + 1)
        codes = adapt(lambda p: inner(self.decode(p["z"], draw)), start, steps=first, learning_rate=self.inner_rate)
        tuned = {"w": self.decode(codes[-1]["z"], draw)}
        found = adapt(lambda p: inner(p["w"]), tuned, steps=rest, learning_rate=self.finetune_rate)
        learned = [self.decode(codes[step]["z"], draw) if step < turn else found[step - turn]["w"] for step in steps]
        drift = (codes[-1]["z"].detach() - start["z"]).square().mean()
        return learned, self.kl_weight * divergence(mean, deviation) + self.encoder_weight * drift

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, query = self.over_tasks(self.unit_features, episodes.support_x, episodes.query_x)
        (weights,), cost = self.learn(support, episodes.support_y, episodes.ways, [self.test_steps], True)
        logits = dropout(query, self.dropout) @ weights.mT
        cost = cost + self.l2_weight / 2 * torch.stack([weight.square().sum() for weight in self.coders()]).sum()
        cost = cost + self.orthogonality_weight * overlap(self.decoder.weight)
        return self.task_loss(logits, episodes.query_y) + cost, self.scores(logits, episodes.query_y)

    @property
    def test_steps(self) -> int:
        return self.inner_steps + self.finetune_steps

    @torch.no_grad()
    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        support, query = self.over_tasks(self.unit_features, episodes.support_x, episodes.query_x)
        learned, _ = of_support(lambda: self.learn(support, episodes.support_y, episodes.ways, steps, False))
        return torch.stack([query @ weights.mT for weights in learned])
