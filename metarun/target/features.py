"""Feature extraction: the backbone stays frozen, its features are computed once, and a simple classifier learns from them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.config.types import Len, NonNegativeFloat, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Backbone, Batch
from metarun.ops.linear_head import Scaling, trained_head
from metarun.ops.numerics import full_precision
from metarun.ops.prototypes import class_means, negative_squared_distances
from metarun.target.base import Frozen, TargetMethod, features, loaded, with_statistics

ENSEMBLE = [0.002, 0.01, 0.05]  # the penalty of LogisticRegression, and those that are 5 times stronger and weaker


class LogisticRegression(TargetMethod):
    """Multinomial logistic regression on standardised features, to the optimum (scikit-learn's L-BFGS).

    Features are shifted and scaled by the training images' mean and deviation.

    Args:
        inverse_penalty: The inverse penalty, scikit-learn's C.
    """

    augments = False

    def __init__(self, learner: Algorithm, source: object = None, *, inverse_penalty: PositiveFloat = 0.01) -> None:
        super().__init__(learner)
        self.inverse_penalty = inverse_penalty

    def fit(self, train: Batch, classes: int) -> LogisticScores:
        backbone, scaling, ((coefficients, intercepts, known_classes),) = self.fitted(train, [self.inverse_penalty])
        return LogisticScores(backbone, scaling, classes, coefficients, intercepts, known_classes)

    def fitted(
        self, train: Batch, inverse_penalties: Sequence[float]
    ) -> tuple[Backbone, Scaling, list[tuple[Tensor, Tensor, Tensor]]]:
        """Fits a model for each penalty to the same features.

        Args:
            train: The training images.
            inverse_penalties: The inverse penalties, scikit-learn's C.

        Returns:
            The backbone of the features, their scaling, and of each model its coefficients, its intercepts and the classes that it saw.
        """
        from sklearn.linear_model import LogisticRegression as Model

        backbone = with_statistics(self.learner.backbone, train.x)
        known = features(backbone, train.x).double()
        scaling = Scaling(known)
        x, y = scaling(known).cpu().numpy(), train.y.cpu().numpy()
        found = []
        for penalty in inverse_penalties:
            with warnings.catch_warnings():
                # One image of each class is no regression.
                warnings.filterwarnings("ignore", "The number of unique classes")
                model = Model(C=penalty, max_iter=5000).fit(x, y)
            coefficients, intercepts, known_classes = (
                torch.as_tensor(array, device=known.device) for array in (model.coef_, model.intercept_, model.classes_)
            )
            found.append((coefficients, intercepts, known_classes))
        return backbone, scaling, found

    def restore(self, state: Mapping[str, Tensor], classes: int) -> LogisticScores:
        model = (state[name] for name in ("coefficients", "intercepts", "known_classes"))
        backbone = copy.deepcopy(self.learner.backbone)
        return loaded(LogisticScores(backbone, Scaling(state["scaling.mean"][None]), classes, *model), state)


class LogisticEnsemble(LogisticRegression):
    """Logistic regressions of several penalties, whose probabilities are averaged: none is chosen, so no validation set is needed.

    The penalties lie a factor of 5 apart around the one that serves most targets: the hyper-parameter ensemble of FewTrans (2026,
    https://arxiv.org/abs/2603.00478), whose official code (Frankluox/FewTrans) has the members vote by their first choices.

    Args:
        inverse_penalties: The inverse penalties, scikit-learn's C, of the members.
    """

    def __init__(
        self,
        learner: Algorithm,
        source: object = None,
        *,
        inverse_penalties: Annotated[list[PositiveFloat], Len(1)] = ENSEMBLE,
    ) -> None:
        super().__init__(learner, source)
        self.inverse_penalties = inverse_penalties

    def fit(self, train: Batch, classes: int) -> EnsembleScores:
        backbone, scaling, members = self.fitted(train, self.inverse_penalties)
        coefficients, intercepts, known_classes = (torch.stack(parts) for parts in zip(*members, strict=True))
        return EnsembleScores(backbone, scaling, classes, coefficients, intercepts, known_classes[0])

    def restore(self, state: Mapping[str, Tensor], classes: int) -> EnsembleScores:
        model = (state[name] for name in ("coefficients", "intercepts", "known_classes"))
        backbone = copy.deepcopy(self.learner.backbone)
        return loaded(EnsembleScores(backbone, Scaling(state["scaling.mean"][None]), classes, *model), state)


class LinearProbe(TargetMethod):
    """A linear head trained with Adam on standardised frozen features, full batches.

    Args:
        steps: The steps of training, full batches.
        learning_rate: The learning rate of Adam.
        weight_decay: The weight decay, decoupled from the gradient (AdamW).
    """

    augments = False

    def __init__(
        self,
        learner: Algorithm,
        source: object = None,
        *,
        steps: PositiveInt = 200,
        learning_rate: NonNegativeFloat = 0.01,
        weight_decay: NonNegativeFloat = 0.1,
    ) -> None:
        super().__init__(learner)
        self.steps, self.learning_rate, self.weight_decay = steps, learning_rate, weight_decay

    def fit(self, train: Batch, classes: int) -> LinearScores:
        backbone = with_statistics(self.learner.backbone, train.x)
        known = features(backbone, train.x)
        scaling = Scaling(known)
        known = scaling(known)
        head = trained_head(
            known, train.y, classes, steps=self.steps, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
        return LinearScores(backbone, scaling, *head)

    def restore(self, state: Mapping[str, Tensor], classes: int) -> LinearScores:
        backbone = copy.deepcopy(self.learner.backbone)
        return loaded(
            LinearScores(backbone, Scaling(state["scaling.mean"][None]), state["weight"], state["bias"]), state
        )


class NearestCentroid(TargetMethod):
    """The nearest class mean of the features, by squared Euclidean distance, or by cosine after centring and scaling.

    `normalize` shifts features by the training images' mean and scales each to length 1 first, as SimpleShot's CL2N does
    (Wang et al. 2019, https://arxiv.org/abs/1911.04623), there with the mean of the source's images.

    Args:
        normalize: Whether features are centred and scaled to length 1, so that cosines count instead of
            distances.
    """

    augments = False

    def __init__(self, learner: Algorithm, source: object = None, *, normalize: bool = True) -> None:
        super().__init__(learner)
        self.normalize = normalize

    def fit(self, train: Batch, classes: int) -> CentroidScores:
        backbone = with_statistics(self.learner.backbone, train.x)
        known, mean = features(backbone, train.x), None
        if self.normalize:
            mean = known.mean(0)
            known = F.normalize(known - mean, dim=1)
        with full_precision(known):
            return CentroidScores(backbone, class_means(known, train.y, classes), mean)

    def restore(self, state: Mapping[str, Tensor], classes: int) -> CentroidScores:
        backbone = copy.deepcopy(self.learner.backbone)
        return loaded(CentroidScores(backbone, state["centroids"], state.get("mean")), state)


def log_probabilities(
    x: Tensor, coefficients: Tensor, intercepts: Tensor, known_classes: Tensor, classes: int
) -> Tensor:
    """Computes log probabilities of features by a fitted logistic regression; minus infinity of a class that it never saw.

    Args:
        x: The features, as those that it was fitted to were scaled, float64 `[B, D]`.
        coefficients: `[known classes, D]`; of two classes `[1, D]`.
        intercepts: `[known classes]`; of two classes `[1]`.
        known_classes: The numbers of the classes that it saw, ascending, int64.
        classes: The number of all classes.

    Returns:
        Log probabilities, float64 `[B, classes]`.
    """
    logits = F.linear(x, coefficients.double(), intercepts.double())
    if logits.shape[1] == 1:  # of two classes the model has the logit of the second alone
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    found = logits.log_softmax(1)
    unseen = torch.full_like(found[:, :1], -torch.inf)
    places = torch.full((classes,), found.shape[1], device=x.device)
    places[known_classes] = torch.arange(found.shape[1], device=x.device)
    return torch.cat([found, unseen], 1)[:, places]


class LogisticScores(Frozen):
    """Log probabilities by a fitted logistic regression of scikit-learn; minus infinity for a class that it never saw."""

    coefficients: Tensor
    intercepts: Tensor
    known_classes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        scaling: Scaling,
        classes: int,
        coefficients: Tensor,
        intercepts: Tensor,
        known_classes: Tensor,
    ) -> None:
        super().__init__(backbone)
        self.scaling, self.classes = scaling, classes
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("intercepts", intercepts)
        self.register_buffer("known_classes", known_classes)

    def of_features(self, x: Tensor) -> Tensor:
        return self.by(x, self.coefficients, self.intercepts)

    def by(self, x: Tensor, coefficients: Tensor, intercepts: Tensor) -> Tensor:
        """Computes log probabilities of features `[B, D]` by one model."""
        return log_probabilities(self.scaling(x.double()), coefficients, intercepts, self.known_classes, self.classes)


class EnsembleScores(LogisticScores):
    """The logarithm of the mean probability by several fitted logistic regressions, coefficients `[E, classes, D]`."""

    def of_features(self, x: Tensor) -> Tensor:
        members = [self.by(x, *model) for model in zip(self.coefficients, self.intercepts, strict=True)]
        return torch.stack(members).logsumexp(0) - math.log(len(members))


class LinearScores(Frozen):
    """A linear function of scaled features."""

    weight: Tensor
    bias: Tensor

    def __init__(self, backbone: Backbone, scaling: Scaling, weight: Tensor, bias: Tensor) -> None:
        super().__init__(backbone)
        self.scaling = scaling
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def of_features(self, x: Tensor) -> Tensor:
        return F.linear(self.scaling(x), self.weight, self.bias)


class CentroidScores(Frozen):
    """Minus the squared distance to each centroid, of features that are shifted by `mean` and made unit vectors if it is given."""

    centroids: Tensor
    mean: Tensor | None

    def __init__(self, backbone: Backbone, centroids: Tensor, mean: Tensor | None) -> None:
        super().__init__(backbone)
        self.register_buffer("centroids", centroids)
        self.register_buffer("mean", mean)

    def of_features(self, x: Tensor) -> Tensor:
        # In double precision, in which the large terms may cancel.
        return negative_squared_distances(self._shifted(x).double(), self.centroids.double()).float()

    def embedding(self, images: Tensor) -> Tensor:
        return self._shifted(features(self.backbone, images))

    def _shifted(self, x: Tensor) -> Tensor:
        return x if self.mean is None else F.normalize(x - self.mean, dim=1)
