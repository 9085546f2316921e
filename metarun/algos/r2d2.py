"""R2-D2: Meta-learning with Differentiable Closed-form Solvers (Bertinetto, Henriques, Torr, Vedaldi 2019).

https://arxiv.org/abs/1805.08136

    W = X^T (X X^T + lambda I)^-1 Y     (equation 5: ridge regression, by Woodbury's identity one system of support size)
    logits = alpha X' W + beta          (equation 6)

X are the features of the support set, Y its one-hot labels, X' the features of the queries. The loss is the cross-entropy
of the queries; lambda, alpha and beta are trained with the backbone.

As in the official code (bertinetto/r2d2), X has a column of ones for the bias of the regression, X and Y are divided by the
root of the number of support images n (which makes n * lambda of lambda), support and queries go through the backbone
together, and alpha starts at 10 (Omniglot, CIFAR-FS; 0.0001 on miniImageNet). Differences:
- lambda is trained by its logarithm, which keeps it positive. The official code can train lambda, but none of its scripts
  does: `learn_regularization=False`.
- The system is always that of support size; the official code takes the one of feature size where that is smaller.
- In regression the targets are values: W predicts what they are above beta, and alpha is not there.
- beta is one number for all classes, in the paper, its code and here, so the softmax does not feel it.
- The official code trains on 16, 20 or 60 ways by the data set, of 1 to 9 shots, drawn for each episode, with the
  images of an episode fixed (240; 600 on Omniglot); here `train.task` says ways and shots, of all episodes alike. It
  halves its rate of 0.005 every 2,000 episodes; the YAML's stays. Its network, with the features of two depths side by
  side, leaky ReLUs and dropout, is not among the backbones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import PositiveFloat
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision, one_hot
from metarun.ops.solvers import ridge
from metarun.ops.support import of_support


class R2D2(Algorithm):
    """Ridge regression from features to one-hot labels or values, solved anew for each task. Train and test ways may differ.

    Args:
        regularization: Where the penalty lambda starts.
        learn_regularization: Whether the penalty is learned.
        scale: Where alpha, the factor of the scores, starts.
    """

    regression = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        regularization: PositiveFloat = 50.0,
        learn_regularization: bool = True,
        scale: PositiveFloat = 10.0,
    ) -> None:
        super().__init__(backbone, spec)
        self.log_regularization = nn.Parameter(torch.tensor(math.log(regularization)), learn_regularization)
        # The values of a regression need no calibration.
        self.scale = nn.Parameter(torch.tensor(float(scale))) if spec.kind == "classification" else None
        self.bias = nn.Parameter(torch.tensor(0.0))

    def logits(self, support: Tensor, targets: Tensor, query: Tensor) -> Tensor:
        """`[T, N*Q, N]` of the features of support sets and queries, and the one-hot labels `[T, N*K, N]`."""
        support, query = (F.pad(features, (0, 1), value=1.0) for features in (support, query))  # for a bias
        penalty = support.shape[1] * self.log_regularization.exp()
        coefficients = of_support(lambda: ridge(support, targets, penalty))
        found = query @ support.mT @ coefficients
        return (found if self.scale is None else self.scale * found) + self.bias

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            if self.spec.kind == "regression":
                return self.logits(support, episodes.support_y - self.bias, queries)
            return self.logits(support, one_hot(episodes.support_y, episodes.ways, support.dtype), queries)
