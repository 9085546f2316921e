"""TrAdaBoost and density ratios: weight updates by hand, known ratios, and toys on which they beat the source alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONF
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from metarun.algos.protonet import ProtoNet
from metarun.core import ActivationHook, Backbone, Batch, Spec
from metarun.errors import UserError
from metarun.target.base import SourceImages
from metarun.target.instances import (
    DensityRatio,
    InstanceTransfer,
    TrAdaBoost,
    density_ratio,
    reweighted,
    source_factor,
    vote_weight,
)

KINDS = pytest.mark.parametrize("kind", [TrAdaBoost, DensityRatio])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Flat(Backbone):
    """The pixels themselves."""

    features = 2
    norm = "none"

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        return x.flatten(1)


def learner() -> ProtoNet:
    return ProtoNet(Flat(), Spec((2,), "classification", 2))


def covariate(target: bool, count: int) -> Batch:
    """One rule for both, y = [b > |a|], that no straight line fits; the source lies left of a = 0, the target right of it."""
    a = torch.randn(count) * 0.7 + (1.5 if target else -1.0)
    b = a.abs() + torch.randn(count)
    return Batch(torch.stack([a, b], dim=1), (b > a.abs()).long(), torch.full((count,), int(target)))


def turned(target: bool, count: int) -> Batch:
    """y = [b > 0]; for seven of ten images of the source y = [a > 0] instead."""
    x = torch.randn(count, 2)
    other = (torch.rand(count) < 0.7) & (not target)
    return Batch(x, (torch.where(other, x[:, 0], x[:, 1]) > 0).long(), torch.full((count,), int(target)))


def concept(target: bool, count: int, classes: int = 5) -> Batch:
    """Classes around a circle; on the source two thirds of the images have the label of the class beside theirs."""
    y = torch.arange(count) % classes
    angle = 2 * math.pi * y / classes
    x = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.3 * torch.randn(count, 2)
    wrong = (torch.arange(count) // classes) % 3 != 0
    y = y if target else torch.where(wrong, (y + 1) % classes, y)
    return Batch(x, y, torch.full((count,), int(target)))


def accuracy(
    method: Callable[[], InstanceTransfer], data: Callable[..., Batch], images: int, classes: int = 2, repeats: int = 5
) -> float:
    right = []
    for repeat in range(repeats):
        torch.manual_seed(repeat)
        train, test = data(True, images), data(True, 1000)
        scores = method().predict(train, test.x, classes)
        assert scores.shape == (1000, classes)
        right.append((scores.argmax(1) == test.y).double().mean().item())
    return float(np.mean(right))


class Given(SourceImages):
    """Source images as `make` makes them."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    @property
    def classes(self) -> int:
        return int(self.make(100).y.max()) + 1

    def draw(self, count: int) -> Batch:
        return self.make(count)


def source_only(data: Callable[..., Batch]) -> float:
    torch.manual_seed(0)
    source, test = data(False, 1000), data(True, 1000)
    return float(LogisticRegression().fit(source.x.numpy(), source.y.numpy()).score(test.x.numpy(), test.y.numpy()))


# TrAdaBoost


def test_weights_after_a_round_by_hand() -> None:
    """Four source and four target images; wrong of two and of one. error = 0.2 / 0.8, beta_t = 1/3, beta = 1/(1 + sqrt(2 ln 4 / 10))."""
    weights = np.array([0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    target = np.arange(8) >= 4
    wrong = np.array([1, 0, 1, 0, 0, 1, 0, 0], dtype=bool)
    after, vote = reweighted(weights, wrong, target, rounds=10)
    beta = 1 / (1 + math.sqrt(2 * math.log(4) / 10))
    np.testing.assert_allclose(after, [0.1 * beta, 0.1, 0.1 * beta, 0.1, 0.2, 0.6, 0.2, 0.2], rtol=1e-12)
    assert vote == pytest.approx(math.log(3))


def test_votes_are_finite_and_positive() -> None:
    votes = [vote_weight(error, 20) for error in (0.0, 0.03, 0.1, 0.3, 0.49, 1.0)]
    assert all(0 < vote < 5 for vote in votes)
    assert votes == sorted(votes, reverse=True)
    assert source_factor(1000, 20) == pytest.approx(1 / (1 + math.sqrt(math.log(1000) / 10)))
    assert source_factor(1, 20) == 1


def test_the_last_half_of_the_rounds_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds 3 to 5 of 5, each with its own vote; weights of one round are those of the one before, reweighted."""
    fitted: list[np.ndarray] = []

    class Model:
        def __init__(self, number: int) -> None:
            self.number = number

        def predict(self, x: np.ndarray) -> np.ndarray:
            answers = np.array([0, 1, 0, 1, 0, 1, 0, 1])
            answers[[4 + self.number % 3, self.number % 4]] ^= 1
            return answers

    def fake(x: np.ndarray, y: np.ndarray, weights: np.ndarray, inverse_penalty: float) -> Model:
        fitted.append(weights)
        return Model(len(fitted) - 1)

    monkeypatch.setattr("metarun.target.instances.regression", fake)
    four = Batch(torch.randn(4, 2), torch.arange(4) % 2, torch.zeros(4, dtype=torch.int64))
    method = TrAdaBoost(learner(), Given(lambda count: four), rounds=5, target_share=0.5)
    models, chosen = method.models(method.training_set(method.learner.backbone, four))
    weights, target, votes = np.full(8, 1 / 8), np.arange(8) >= 4, []
    for number, found in enumerate(fitted):
        np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-12)
        wrong = np.zeros(8, dtype=bool)
        wrong[[4 + number % 3, number % 4]] = True
        weights, vote = reweighted(found, wrong, target, 5)
        votes.append(vote)
    assert len(votes) == 5
    assert [model.number for model in models] == [2, 3, 4]
    assert chosen == pytest.approx(votes[2:])


def test_without_a_source_it_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^transfer: TrAdaBoost .* this recipe trains on none; use recipe=transfer, or "
    ):
        TrAdaBoost(learner())


def test_a_vote_is_of_probabilities() -> None:
    method, train, x = (
        TrAdaBoost(learner(), Given(lambda count: turned(False, count)), rounds=3),
        turned(True, 20),
        torch.randn(9, 2),
    )
    torch.manual_seed(1)
    known = method.training_set(method.learner.backbone, train)
    models, votes = method.models(known)
    expected = sum(
        vote / sum(votes) * model.predict_proba(known.standardised(x.double().numpy()))
        for vote, model in zip(votes, models, strict=True)
    )
    np.testing.assert_allclose(method.predict(train, x, 2).exp().numpy(), expected, rtol=1e-5)
    far = method.predict(train, 1e4 * x, 2)  # where one class has a probability below the smallest of numbers
    assert far.isfinite().all()
    assert far.min() < -200


@pytest.mark.parametrize(("data", "classes"), [(turned, 2), (concept, 5)])
def test_tradaboost_beats_the_source_alone_where_its_labels_mislead(data: Callable[..., Batch], classes: int) -> None:
    def after(rounds: int) -> float:
        method = partial(
            TrAdaBoost,
            learner(),
            Given(lambda count: data(False, count)),
            rounds=rounds,
            source_images=300,
            target_share=0.1,
            inverse_penalty=1,
        )
        return accuracy(method, data, 30, classes)

    assert source_only(data) < 0.65
    assert after(20) > max(0.7, after(1) + 0.2)


# The density ratio


def test_the_ratio_of_two_gaussians_is_recovered() -> None:
    """N(0, 1) and N(m, 1) have the ratio exp(m x - m^2 / 2), whatever the numbers of images."""
    generator = np.random.default_rng(0)
    shift = np.array([0.8, -0.4])
    source, target = generator.normal(size=(20000, 2)), generator.normal(size=(5000, 2)) + shift
    found = density_ratio(source, target, inverse_penalty=100.0)
    expected = source @ shift - shift @ shift / 2
    assert np.abs(np.log(found) - expected).mean() < 0.06
    assert found.mean() == pytest.approx(1, abs=0.03)  # E_S[p_T / p_S] = 1


def test_density_ratio_beats_equal_weights_and_the_source_alone_on_a_shifted_target() -> None:
    def method(highest: float) -> DensityRatio:
        return DensityRatio(
            learner(),
            Given(lambda count: covariate(False, count)),
            highest_ratio=highest,  # so low that all weights are equal, or high
            target_share=0.05,
            inverse_penalty=1,
        )

    weighted, equal = (accuracy(partial(method, highest), covariate, 30) for highest in (20.0, 1e-9))
    assert weighted > equal + 0.03
    assert weighted > source_only(covariate) + 0.1


def test_the_ratio_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = np.array([0.1, 5.0, 40.0, 1.0])
    monkeypatch.setattr("metarun.target.instances.density_ratio", lambda *_: ratios)
    given: list[np.ndarray] = []
    real = LogisticRegression.fit

    def fit(self: LogisticRegression, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> LogisticRegression:
        given.append(sample_weight)
        return real(self, x, y, sample_weight)

    monkeypatch.setattr(LogisticRegression, "fit", fit)
    four = Batch(torch.randn(4, 2), torch.arange(4) % 2, torch.zeros(4, dtype=torch.int64))
    DensityRatio(learner(), Given(lambda count: four), target_share=0.25, highest_ratio=10).predict(
        four, torch.randn(3, 2), 2
    )
    expected = np.concatenate([0.75 * np.array([0.1, 5, 10, 1]) / 16.1, np.full(4, 0.25 / 4)]) * 8
    np.testing.assert_allclose(given[0], expected, rtol=1e-12)


# Both


@KINDS
def test_repeats_agree_and_the_learner_stays(kind: type[InstanceTransfer]) -> None:
    own = learner().train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    method = kind(own, Given(lambda count: covariate(False, count)), source_images=200)
    train, test = covariate(True, 20), covariate(True, 50)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(method.predict(train, test.x, 2))
    assert torch.equal(*found)
    torch.testing.assert_close(method.predict(train, test.x[:1], 2).argmax(), found[0][0].argmax())
    assert own.training
    assert own.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


@KINDS
def test_other_classes_are_one_clear_line(kind: type[InstanceTransfer]) -> None:
    method = kind(learner(), Given(lambda count: concept(False, count)))
    with pytest.raises(UserError, match=r"^transfer: .* source has 5 and the target 2"):
        method.check(2)


@KINDS
@pytest.mark.parametrize(
    ("setting", "value"), [("source_images", 1), ("target_share", 0.0), ("target_share", 1.0), ("inverse_penalty", 0.0)]
)
def test_settings_out_of_range_are_named(kind: type[InstanceTransfer], setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^transfer\.{setting}="):
        kind(learner(), Given(lambda count: covariate(False, count)), **{setting: value})


def test_their_own_settings_are_named_and_a_source_is_needed() -> None:
    with pytest.raises(UserError, match=r"^transfer\.rounds=0"):
        TrAdaBoost(learner(), Given(lambda count: covariate(False, count)), rounds=0)
    with pytest.raises(UserError, match=r"^transfer\.highest_ratio=0"):
        DensityRatio(learner(), Given(lambda count: covariate(False, count)), highest_ratio=0)
    for kind in (TrAdaBoost, DensityRatio):
        with pytest.raises(UserError, match="source"):
            kind(learner(), None)


@pytest.mark.parametrize("name", ["tradaboost", "density_ratio"])
def test_configs_build_them(name: str) -> None:
    node = OmegaConf.load(Path(CONF) / "transfer" / f"{name}.yaml")
    method = instantiate(node, learner=learner(), source=Given(lambda count: turned(False, count)))
    assert method.predict(turned(True, 10), torch.randn(4, 2), 2).isfinite().all()
