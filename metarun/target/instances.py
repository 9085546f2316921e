"""Instance transfer: the source's images as further training images of the target, each with a weight of its own.

Both methods train logistic regressions on the features of the frozen backbone. Source and target must have the same classes.

TrAdaBoost: Boosting for Transfer Learning (Dai, Yang, Xue, Yu 2007), algorithm 1, of n source and m target images:

    error_t = sum of w_i [h_t(x_i) != y_i] over the target / sum of w_i over the target
    beta_t = error_t / (1 - error_t),  beta = 1 / (1 + sqrt(2 ln n / N))
    source: w_i <- w_i beta^[h_t(x_i) != y_i];  target: w_i <- w_i beta_t^-[h_t(x_i) != y_i]
    h(x) = the vote of rounds ceil(N / 2) to N, each with the weight log(1 / beta_t)

For more than two classes beta_t and the vote are those of AdaBoost.M1 (Freund and Schapire 1997): the same formulas,
which ask for an error below a half whatever the classes. The factor of SAMME, (K - 1) (1 - error_t) / error_t, serves learners
that are only just better than chance; a logistic regression is stronger, and on ten Gaussian classes that factor did no better.

Density ratio: importance weighting (Shimodaira 2000), the ratio by a classifier of the domains (Bickel, Brueckner, Scheffer 2007):

    p_T(x) / p_S(x) = p(target | x) / p(source | x) * n / m

Differences from the papers:
- TrAdaBoost leaves the first weights to the user: here `target_share` of all weight is the target's. Its vote is of
  classes; here it is of their probabilities, so that scores rank images. An error counts as 1 / 2m at least, since 0 has no
  logarithm, and as 0.49 at most, where the paper asks for less than 0.5. (adapt-python/adapt, with
  which this was compared, takes probabilities for the errors too, and beta_t = error / (2 - error).)
- With the density ratio the target's few labelled images train the classifier too: `target_share` of all weight is theirs.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from metarun.config.types import Ge, Interval, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Backbone, Batch
from metarun.errors import UserError
from metarun.target.base import (
    Frozen,
    SourceImages,
    TargetMethod,
    features,
    loaded,
    refuse_other_places,
    with_statistics,
)
from metarun.target.features import log_probabilities

HIGHEST_ERROR = 0.49


def source_factor(images: int, rounds: int) -> float:
    """Computes beta, by which the weight of a source image is multiplied where a round was wrong of it."""
    return 1 / (1 + math.sqrt(2 * math.log(images) / rounds))


def vote_weight(error: float, images: int) -> float:
    """Computes log(1 / beta_t) of a round with this weighted error over `images` target images; it is positive."""
    error = min(max(error, 1 / (2 * images)), HIGHEST_ERROR)
    return math.log((1 - error) / error)


def reweighted(weights: np.ndarray, wrong: np.ndarray, target: np.ndarray, rounds: int) -> tuple[np.ndarray, float]:
    """Computes the weights `[n + m]` after a round that was `wrong` where it was, and the weight of the round's vote.

    `wrong` and `target` are bool `[n + m]`. The sum of the weights changes.
    """
    error = weights[target & wrong].sum() / weights[target].sum()
    vote = vote_weight(float(error), int(target.sum()))
    factor = np.where(target, math.exp(vote), source_factor(int((~target).sum()), rounds))
    return weights * np.where(wrong, factor, 1.0), vote


def density_ratio(source: np.ndarray, target: np.ndarray, inverse_penalty: float) -> np.ndarray:
    """Estimates p_T(x) / p_S(x), `[n]`, at each of the source's features `[n, D]`, given the target's `[m, D]`."""
    domains = np.repeat([0, 1], [len(source), len(target)])
    model = regression(np.concatenate([source, target]), domains, np.ones(len(domains)), inverse_penalty)
    log_odds = model.decision_function(source)
    return np.exp(np.clip(log_odds + math.log(len(source) / len(target)), -30, 30))


def regression(x: np.ndarray, y: np.ndarray, weights: np.ndarray, inverse_penalty: float) -> Any:
    """Fits a logistic regression of features `[n, D]` on labels `[n]`; only the weights' ratios count.

    Its loss is the sum over the images, their weights scaled to a mean of 1, plus |w|^2 / 2 over `inverse_penalty`.
    """
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=inverse_penalty, max_iter=2000).fit(
        x, y, sample_weight=weights * len(x) / weights.sum()
    )


@dataclass(frozen=True)
class TrainingSet:
    """Features of n source and m target images, with labels."""

    x: np.ndarray  # [n + m, D] float64
    y: np.ndarray  # [n + m] int64
    target: np.ndarray  # [n + m] bool

    def standardised(self, x: np.ndarray) -> np.ndarray:
        """Shifts and scales `x` `[k, D]` by the mean and deviation of each feature over all n + m images."""
        mean, deviation = self.scaling
        return (x - mean) / deviation

    @property
    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the deviation of each feature, `[D]` both, the latter at least 1e-6."""
        return self.x.mean(0), self.x.std(0).clip(1e-6)

    def shared(self, weights: np.ndarray, share: float) -> np.ndarray:
        """Scales weights `[n + m]` so that `share` of their sum 1 is the target's."""
        own, other = weights[self.target].sum(), weights[~self.target].sum()
        return weights * np.where(self.target, share / own, (1 - share) / other)


class InstanceTransfer(TargetMethod):
    """What both methods share: source images that are drawn once and weighted.

    Args:
        source_images: The source images that are drawn.
        target_share: The share of the total weight that the target's images have.
        inverse_penalty: The inverse penalty of the logistic regression, scikit-learn's C.
    """

    needs_source = True
    augments = False

    def __init__(
        self,
        learner: Algorithm,
        source: SourceImages | None = None,
        *,
        source_images: Annotated[int, Ge(2)] = 2000,
        target_share: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
        inverse_penalty: PositiveFloat = 0.01,
    ) -> None:
        super().__init__(learner, source)
        self.source_images, self.target_share, self.inverse_penalty = source_images, target_share, inverse_penalty

    def check(self, classes: int) -> None:
        assert self.source is not None  # `needs_source`
        if self.source.classes != classes:
            raise UserError(
                f"transfer: {type(self).__name__} needs source and target to have the same classes, but the source has "
                f"{self.source.classes} and the target {classes}; try transfer=logistic_regression"
            )

    def check_names(self, names: Sequence[str]) -> None:
        assert self.source is not None  # `needs_source`
        refuse_other_places(self.source.names, names)

    @cached_property
    def drawn(self) -> Batch:
        """The source's images, the same in all repeats."""
        assert self.source is not None  # `needs_source`
        return self.source.draw(self.source_images)

    @cached_property
    def source_features(self) -> np.ndarray:
        """Those of the source's images by the learner's own backbone, which stays: all repeats have the same."""
        return embedded(self.learner.backbone, self.drawn.x)

    def training_set(self, backbone: Backbone, train: Batch) -> TrainingSet:
        """Embeds the images to train on, the source's first, by `backbone`."""
        own = backbone is self.learner.backbone
        x = self.source_features if own else embedded(backbone, self.drawn.x)
        whole = np.concatenate([x, embedded(backbone, train.x)])
        labels = np.concatenate([self.drawn.y.cpu().numpy(), train.y.cpu().numpy()])
        return TrainingSet(whole, labels, np.arange(len(whole)) >= len(x))

    def fit(self, train: Batch, classes: int) -> Votes:
        backbone = with_statistics(self.learner.backbone, train.x)
        known = self.training_set(backbone, train)
        models, votes = self.models(known)
        found = (np.stack([getattr(model, name) for model in models]) for name in ("coef_", "intercept_"))
        arrays = (*known.scaling, *found, models[0].classes_, np.array(votes))
        return Votes(backbone, classes, *(torch.as_tensor(array, device=train.x.device) for array in arrays))

    def restore(self, state: Mapping[str, Tensor], classes: int) -> Votes:
        names = ("mean", "deviation", "coefficients", "intercepts", "known_classes", "votes")
        return loaded(Votes(copy.deepcopy(self.learner.backbone), classes, *(state[name] for name in names)), state)

    @abstractmethod
    def models(self, known: TrainingSet) -> tuple[list[Any], list[float]]:
        """Fits logistic regressions on `known.standardised(known.x)`, and weighs the probabilities of each."""


class TrAdaBoost(InstanceTransfer):
    """Boosting that raises the weight of target images that it is wrong about, and lowers that of such source images.

    Args:
        rounds: The rounds of boosting.
        source_images: The source images that are drawn.
        target_share: The share of the total weight that the target's images have at first.
        inverse_penalty: The inverse penalty of each round's logistic regression, scikit-learn's C.
    """

    def __init__(
        self,
        learner: Algorithm,
        source: SourceImages | None = None,
        *,
        rounds: PositiveInt = 20,
        source_images: Annotated[int, Ge(2)] = 2000,
        target_share: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
        inverse_penalty: PositiveFloat = 0.1,
    ) -> None:
        super().__init__(
            learner, source, source_images=source_images, target_share=target_share, inverse_penalty=inverse_penalty
        )
        self.rounds = rounds

    def models(self, known: TrainingSet) -> tuple[list[Any], list[float]]:
        x = known.standardised(known.x)
        weights = known.shared(np.ones(len(x)), self.target_share)
        models, votes = [], []
        for number in range(1, self.rounds + 1):
            model = regression(x, known.y, weights, self.inverse_penalty)
            weights, vote = reweighted(weights, model.predict(x) != known.y, known.target, self.rounds)
            weights /= weights.sum()
            if number >= math.ceil(self.rounds / 2):
                models.append(model)
                votes.append(vote)
        return models, votes


class DensityRatio(InstanceTransfer):
    """A logistic regression on source images weighted by the density ratio, at most `highest_ratio`, and on the target's.

    Args:
        highest_ratio: The most that the density ratio of a source image counts as.
        source_images: The source images that are drawn.
        target_share: The share of the total weight that the target's images have.
        inverse_penalty: The inverse penalty of the logistic regression, scikit-learn's C.
    """

    def __init__(
        self,
        learner: Algorithm,
        source: SourceImages | None = None,
        *,
        highest_ratio: PositiveFloat = 10.0,
        source_images: Annotated[int, Ge(2)] = 2000,
        target_share: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
        inverse_penalty: PositiveFloat = 0.01,
    ) -> None:
        super().__init__(
            learner, source, source_images=source_images, target_share=target_share, inverse_penalty=inverse_penalty
        )
        self.highest_ratio = highest_ratio

    def models(self, known: TrainingSet) -> tuple[list[Any], list[float]]:
        x = known.standardised(known.x)
        weights = np.ones(len(x))
        ratio = density_ratio(x[~known.target], x[known.target], self.inverse_penalty)
        weights[~known.target] = ratio.clip(max=self.highest_ratio)
        return [regression(x, known.y, known.shared(weights, self.target_share), self.inverse_penalty)], [1.0]


class Votes(Frozen):
    """The logarithm of the weighted mean of the class probabilities of logistic regressions on standardised features."""

    mean: Tensor
    deviation: Tensor
    coefficients: Tensor
    intercepts: Tensor
    known_classes: Tensor
    votes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        mean: Tensor,
        deviation: Tensor,
        coefficients: Tensor,
        intercepts: Tensor,
        known_classes: Tensor,
        votes: Tensor,
    ) -> None:
        super().__init__(backbone)
        self.classes = classes
        for name, value in {
            "mean": mean,
            "deviation": deviation,
            "coefficients": coefficients,
            "intercepts": intercepts,
            "known_classes": known_classes,
            "votes": votes,
        }.items():
            self.register_buffer(name, value)

    def of_features(self, x: Tensor) -> Tensor:
        asked = (x.double() - self.mean) / self.deviation
        weights = (self.votes / self.votes.sum()).log()
        shares = [
            weight + log_probabilities(asked, coefficients, intercepts, self.known_classes, self.classes)
            for coefficients, intercepts, weight in zip(self.coefficients, self.intercepts, weights, strict=True)
        ]
        return torch.stack(shares).logsumexp(0).float()


def embedded(backbone: Backbone, x: Tensor) -> np.ndarray:
    """Computes features `[n, D]` float64 of images."""
    return features(backbone, x).cpu().double().numpy()
