"""MetaOptNet: Meta-Learning with Differentiable Convex Optimization (Lee, Maji, Ravichandran, Soatto 2019).

https://arxiv.org/abs/1904.03758

For each task a linear classifier of the support set's features x_i, without a bias:

    svm:    min_W 1/2 |W|^2 + C sum_i (max_k (w_k.x_i + [k != y_i]) - w_(y_i).x_i)    (equation 4, Crammer and Singer's)
    ridge:  min_W |X W - Y|^2 + lambda |W|^2,  Y the one-hot labels
    logits = gamma X' W  of the queries X', gamma trained with the backbone                   (as in equation 12)

Both are solved in the dual, and differentiated at the solution, by the implicit function theorem for the SVM.

Differences from the official code (kjunelee/MetaOptNet), beside that its solver is qpth's, stopped after 15 iterations
(at test time 3), and ours (`metarun.ops.solvers`) goes on to double precision:
- As there, where it is to spare qpth singular kernels, `diagonal` is added to the SVM's kernel; 0 is the SVM of the paper.
- Its ridge head asks the solver for twice the coefficients of the ridge regression (e = -2 Y); gamma, which starts at 1
  there too, takes the 2 up.
- It puts the support sets of all tasks of a step through the backbone together, and then the queries; here the support
  set and queries of one task go together, which with `norm=batch` or `running` are normalised together in training.
- It trains on 15 shots on miniImageNet (10 on tieredImageNet, 5 on CIFAR-FS) whatever the shots of the test, on
  miniImageNet with label smoothing: its 0.1, spread over the wrong classes alone, is `label_smoothing=0.125` here,
  spread over all of 5 ways.
- It trains by SGD (0.1, Nesterov momentum 0.9), its rate falling in steps, with weight decay 5e-4; so `optimizer=sgd`
  and its keys, not the default.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metarun.config.types import DropRate, NonNegativeFloat, PositiveFloat
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision, one_hot
from metarun.ops.solvers import ridge, support_vectors
from metarun.ops.support import of_support


class MetaOptNet(Algorithm):
    """A support vector machine or ridge regression, solved anew for each task. Train and test ways may differ.

    Args:
        head: The learner of a task: a support vector machine or ridge regression.
        cost: The cost C of the support vector machine.
        diagonal: What is added to the diagonal of the support vector machine's quadratic program.
        regularization: The penalty lambda of ridge regression.
        scale: Where gamma, the factor of the scores, starts.
        label_smoothing: The share of the target distribution that goes to all classes alike, in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        head: Literal["svm", "ridge"] = "svm",
        cost: PositiveFloat = 0.1,
        diagonal: NonNegativeFloat = 1.0,
        regularization: PositiveFloat = 50.0,
        scale: PositiveFloat = 1.0,
        label_smoothing: DropRate = 0.0,
    ) -> None:
        super().__init__(backbone, spec)
        self.kind = head
        self.cost, self.diagonal, self.regularization = cost, diagonal, regularization
        self.label_smoothing = label_smoothing
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def logits(self, support: Tensor, targets: Tensor, query: Tensor) -> Tensor:
        """`[T, N*Q, N]` of the features of support sets and queries, and the one-hot labels `[T, N*K, N]`."""

        def coefficients() -> Tensor:
            if self.kind == "ridge":
                return ridge(support, targets, self.regularization)
            return support_vectors(support, targets, self.cost, self.diagonal)

        return self.scale * (query @ support.mT @ of_support(coefficients))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.predict(episodes)
        return self.task_loss(logits, episodes.query_y, self.label_smoothing), self.scores(logits, episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = self.embed(episodes)
        with full_precision(queries):
            return self.logits(support, one_hot(episodes.support_y, episodes.ways, support.dtype), queries)
