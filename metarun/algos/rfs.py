"""RFS: Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need? (Tian, Wang, Krishnan, Tenenbaum, Isola 2020).

https://arxiv.org/abs/2003.11539

Trained as a plain classifier of the source's classes. On a test task f is frozen, and logistic regression is fitted to the
support set's features, made unit vectors (section 3.2):

    min_W,b  1/2 |W|^2 + C * sum_i cross-entropy(W x_i + b, y_i),    x = f(image) / |f(image)|, C = 1

Self-distillation (section 3.3): a second classifier, the same in kind, learns from the labels and from the first one:

    alpha * cross-entropy(y, p(x)) + beta * t^2 * KL(softmax(teacher(x) / t), softmax(student(x) / t)),  t = 4

With `distill=true` the teacher is what an earlier stage trained (`recipe=pretrain_meta`), and the student starts anew.

`costs` make an ensemble: the probabilities of regressions with each are averaged, so that none has to be chosen where there are no
validation images (FewTrans, 2026, https://arxiv.org/abs/2603.00478; its official code has the members vote).

Differences from the official code (WangYueFt/rfs): its regression is scikit-learn's, by L-BFGS to a tolerance of 1e-4;
here it is solved for all tasks at once, to convergence, by ridge regressions (`metarun.ops.solvers.logistic`). It puts five augmented
copies in the place of each support image, which we do not. Its alpha and beta are `-r 0.5 -a 0.5` of its scripts. It
trains by SGD at 0.05, weight decay 0.0005, 64 images a step, for 100 epochs; the built-in configuration is Baseline's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.baseline import Baseline
from metarun.config.types import Interval, Len, NonNegativeFloat, PositiveFloat
from metarun.core import Algorithm, Backbone, Batch, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.numerics import full_precision, one_hot, precise
from metarun.ops.solvers import logistic

UNTAUGHT = "algo.distill=true: needs a teacher; use recipe=pretrain_meta with pretrain.algo of this method"
Cost = Annotated[float, Interval(gt=0, le=1e5)]  # weaker penalties take too long to be solved


class RFS(Baseline):
    """A classifier of the source's images; on a test task, logistic regression on unit features. Test ways may be any.

    Args:
        cost: The inverse penalty C of the logistic regression.
        costs: The inverse penalties of several regressions, whose probabilities are averaged; null is cost alone.
        distill: Whether a teacher, the classifier of an earlier stage, is distilled.
        alpha: The weight of the cross-entropy, with distill.
        beta: The weight of the divergence from the teacher, with distill.
        distill_temperature: The temperature at which the teacher is imitated.
    """

    taught: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        cost: Cost = 1.0,
        costs: Annotated[list[Cost], Len(1)] | None = None,
        distill: bool = False,
        alpha: NonNegativeFloat = 0.5,
        beta: NonNegativeFloat = 0.5,
        distill_temperature: PositiveFloat = 4.0,
    ) -> None:
        super().__init__(backbone, spec)
        self.head.requires_grad_(distill or not backbone.identity)  # which trains the backbone alone
        self.costs = [cost] if costs is None else list(costs)
        self.alpha, self.beta, self.temperature = alpha, beta, distill_temperature
        self.teacher: nn.ModuleDict | None = None
        if distill:
            own = {"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(self.head)}
            self.teacher = nn.ModuleDict(own).requires_grad_(False)
            self.register_buffer("taught", torch.tensor(False))

    def teach(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of a trained classifier as the teacher's.

        Args:
            weights: The classifier's `state_dict`, of which `backbone` and `head` are read.

        Raises:
            UserError: This method has no teacher, or these are weights of something else.
        """
        if self.teacher is None:
            raise UserError("algo.distill=false: there is no teacher to teach; set algo.distill=true")
        self.teacher.load_state_dict(teaching(self.teacher, weights))
        self.taught.fill_(True)

    def inherit(self, earlier: Algorithm) -> None:
        """The earlier stage's classifier is the teacher if this is to distil; else its backbone is where this one starts."""
        if self.teacher is None:
            super().inherit(earlier)
        else:
            self.teach(earlier.state_dict())

    def train(self, mode: bool = True) -> RFS:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def check(self, tasks: int, *, earlier: Algorithm | None) -> None:
        if self.teacher is None:
            return
        if earlier is None:
            raise UserError(UNTAUGHT)
        teaching(self.teacher, earlier.state_dict())

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.classify(batch.x)
        loss, shown = self.classification_loss(logits, batch)
        if self.teacher is None:
            return loss, shown
        if not self.taught:
            raise UserError(UNTAUGHT)
        with torch.no_grad():
            told = precise(self.teacher["head"](precise(self.teacher["backbone"](batch.x)))) / self.temperature
        divergence = F.kl_div(
            F.log_softmax(precise(logits) / self.temperature, 1),
            F.log_softmax(told, 1),
            reduction="batchmean",
            log_target=True,
        )
        return self.alpha * loss + self.beta * self.temperature**2 * divergence, {
            **shown,
            "divergence": divergence.detach(),
        }

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        support, query = (F.normalize(x, dim=-1) for x in self.embed(episodes))
        with full_precision(support):
            targets = one_hot(episodes.support_y, episodes.ways, torch.float64)
            logits = [logistic(support, targets, query, cost) for cost in self.costs]
            if len(logits) == 1:
                return logits[0].to(support.dtype)
            mean = torch.stack([each.log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))
            return mean.to(support.dtype)


def teaching(teacher: nn.ModuleDict, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a trained method that are a teacher's, its `backbone` and `head`; raises `UserError` where they do not fit."""
    known = {name: value for name, value in weights.items() if name.startswith(("backbone.", "head."))}
    wanted = teacher.state_dict()
    if {name: value.shape for name, value in known.items()} != {name: value.shape for name, value in wanted.items()}:
        raise UserError(
            f"algo.distill=true: the teacher must be a linear classifier of {len(wanted['head.bias'])} classes, which the earlier stage "
            "trains none of; use algo@pretrain=rfs, on the same classes"
        )
    return known
