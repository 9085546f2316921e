"""Feature extraction: the backbone stays frozen, its features are computed once, and a simple classifier learns from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Batch
from metarun.target.base import TargetMethod, features


class LogisticRegression(TargetMethod):
    """Multinomial logistic regression on standardised features, to the optimum (scikit-learn's L-BFGS).

    Features are shifted and scaled by the training images' mean and deviation.

    Args:
        inverse_penalty: The inverse penalty, scikit-learn's C.
    """

    def __init__(self, learner: Algorithm, source: object = None, *, inverse_penalty: PositiveFloat = 0.01) -> None:
        super().__init__(learner)
        self.inverse_penalty = inverse_penalty

    def predict(self, train: Batch, test_x: Tensor, classes: int) -> Tensor:
        from sklearn.linear_model import LogisticRegression as Classifier

        known, asked = (features(self.learner.backbone, x).double() for x in (train.x, test_x))
        known, asked = standardised(known, asked)
        model = Classifier(C=self.inverse_penalty, max_iter=5000).fit(known.cpu().numpy(), train.y.cpu().numpy())
        scores = torch.full((len(test_x), classes), -torch.inf, dtype=torch.float64)
        scores[:, torch.as_tensor(model.classes_)] = torch.as_tensor(model.predict_log_proba(asked.cpu().numpy()))
        return scores


class LinearProbe(TargetMethod):
    """A linear head trained with Adam on standardised frozen features, full batches.

    Args:
        steps: The steps of training, full batches.
        learning_rate: The learning rate of Adam.
        weight_decay: The weight decay, decoupled from the gradient (AdamW).
    """

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

    def predict(self, train: Batch, test_x: Tensor, classes: int) -> Tensor:
        known, asked = standardised(*(features(self.learner.backbone, x) for x in (train.x, test_x)))
        weight = torch.zeros(classes, known.shape[1], device=known.device, requires_grad=True)
        bias = torch.zeros(classes, device=known.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=self.learning_rate, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(known, weight, bias), train.y).backward()
            optimizer.step()
        return F.linear(asked, weight, bias).detach()


class NearestCentroid(TargetMethod):
    """The nearest class mean of the features, by squared Euclidean distance, or by cosine after centring and scaling.

    `normalize` shifts features by the training images' mean and scales each to length 1 first, as SimpleShot's CL2N does
    (Wang et al. 2019, https://arxiv.org/abs/1911.04623), there with the mean of the source's images.

    Args:
        normalize: Whether features are centred and scaled to length 1, so that cosines count instead of
            distances.
    """

    def __init__(self, learner: Algorithm, source: object = None, *, normalize: bool = True) -> None:
        super().__init__(learner)
        self.normalize = normalize

    def predict(self, train: Batch, test_x: Tensor, classes: int) -> Tensor:
        known, asked = (features(self.learner.backbone, x) for x in (train.x, test_x))
        if self.normalize:
            mean = known.mean(0)
            known, asked = F.normalize(known - mean, dim=1), F.normalize(asked - mean, dim=1)
        members = F.one_hot(train.y, classes).to(known.dtype)
        return -torch.cdist(asked, members.T @ known / members.sum(0)[:, None]).square()


def standardised(known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Both shifted and scaled by the mean and deviation of each of the features in `known`; constant ones become 0."""
    mean, deviation = known.mean(0), known.std(0, unbiased=False)
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0)
    return (known - mean) * scale, (asked - mean) * scale
