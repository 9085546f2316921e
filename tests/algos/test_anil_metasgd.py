"""ANIL and Meta-SGD beside MAML: each is MAML with other inner rates, and so they are compared with one another."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from helpers import build, compose, double, episodes, hardware, toy_images
from torch import Tensor, nn

from metarun.algos.anil import ANIL
from metarun.algos.maml import MAML
from metarun.algos.metasgd import MetaSGD
from metarun.backbones.conv4 import Conv4
from metarun.core import Algorithm, Episodes, Spec, TaskShape
from metarun.engine import checkpoint
from metarun.engine.gradients import gradient_step
from metarun.engine.learner import build_optimizer
from metarun.ops.batch_norm import KINDS
from metarun.ops.metrics import accuracy

Method = TypeVar("Method", bound=MAML)

SEPARABLE = toy_images()
RATE = 0.25  # the same in single precision, in which rates are made
BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
FIRST_ORDER = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
STEPS = pytest.mark.parametrize("inner_steps", [1, 3])
FORMS = [(norm, vectorize) for norm in KINDS for vectorize in (False, True) if (norm, vectorize) != ("running", True)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(kind: type[Method], norm: str = "batch", vectorize: bool = False, **settings: float) -> Method:
    """In double precision, with weights that are the same for every method: away from zero biases and unit scales."""
    torch.manual_seed(1)
    backbone = Conv4(input_shape=(1, 16, 16), channels=4, norm=norm)
    spec = Spec((1, 16, 16), "classification", 3)
    algorithm = kind(backbone, spec, inner_lr=RATE, **settings).double()
    for name, parameter in algorithm.named_parameters():
        if not name.startswith("rates."):
            parameter.data += 0.1 * torch.randn_like(parameter)
    algorithm.vectorize = vectorize
    return algorithm.train()


def batch_of(tasks: int = 2) -> Episodes:
    return double(episodes(SEPARABLE, TaskShape(3, 2, 2), tasks))


def slope(loss: Tensor, algorithm: Algorithm) -> dict[str, Tensor]:
    """The gradient by name; zero for what the loss does not depend on, as a bias before a norm."""
    values = dict(algorithm.named_parameters())
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(values, found, strict=True))


def gradients(algorithm: Algorithm, batch: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradient by name."""
    loss, _ = algorithm.loss(batch, 0)
    return loss.detach(), slope(loss, algorithm)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def same_meta_gradient(algorithm: MAML, reference: MAML) -> None:
    """Equal losses, and equal gradients of the parameters that both have."""
    batch = batch_of()
    loss, found = gradients(algorithm, batch)
    other_loss, expected = gradients(reference, batch)
    close(loss, other_loss)
    shared = found.keys() & expected.keys()
    assert {name.split(".")[0] for name in shared} == {"backbone", "head"}
    for name in shared:
        close(found[name], expected[name])


def slopes_agree(algorithm: Algorithm, part: str) -> None:
    """The gradient of the parameters whose names begin with `part` is that of central differences, in three directions."""
    batch = batch_of()
    _, found = gradients(algorithm, batch)
    found = {name: value for name, value in found.items() if name.startswith(part)}
    length = math.sqrt(sum(value.square().sum().item() for value in found.values()))
    assert length > 1e-4
    for number in range(3):
        directions = {name: value if number == 0 else torch.randn_like(value) for name, value in found.items()}
        reach = math.sqrt(sum(value.square().sum().item() for value in directions.values()))
        directions = {name: value / reach for name, value in directions.items()}
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(algorithm)
            for name, value in moved.named_parameters():
                if name in directions:
                    value.data += sign * 1e-6 * directions[name]
            ends.append(moved.loss(batch, 0)[0].item())
        expected = sum((found[name] * directions[name]).sum().item() for name in found)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-6, abs=1e-6 * length)


def with_rates(metasgd: MetaSGD, body: float | None = None) -> MetaSGD:
    """Rates of the body `body`, those of the head as they were; without `body`, every rate is another, some below zero."""
    torch.manual_seed(2)
    for name, rate in metasgd.rates.items():
        if body is None:
            rate.data += 0.2 * torch.randn_like(rate)
        elif name.startswith("backbone"):
            rate.data.fill_(body)
    return metasgd


# ANIL


@BOTH
@FIRST_ORDER
def test_only_the_head_adapts(first_order: bool, vectorize: bool) -> None:
    """Predictions are those of torch's SGD on the head alone, with the body as it was before."""
    algorithm, batch = tiny(ANIL, vectorize=vectorize, first_order=first_order).eval(), batch_of()
    before = copy.deepcopy(algorithm.state_dict())
    after = algorithm.predict_after(batch, [0, 2, 5])
    assert not after.requires_grad
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        fast = copy.deepcopy(algorithm)
        descent = torch.optim.SGD(fast.head.parameters(), lr=RATE)
        for step in range(6):
            if step in (0, 2, 5):
                close(after[[0, 2, 5].index(step), task], fast(query_x).detach())
            descent.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            descent.step()
        assert (fast.head.weight - before["head.weight"]).abs().max() > 0.01
    assert (after[2] - after[0]).abs().max() > 0.01
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_head_alone_comes_back_adapted() -> None:
    algorithm, batch = tiny(ANIL), batch_of()
    support, query = algorithm.backbone.embed_sets(batch.support_x[0], batch.query_x[0], shared_batch=False)
    assert support.shape == query.shape == (6, algorithm.backbone.features)
    start, end = algorithm.adapt_head(support, batch.support_y[0], [0, 1])
    assert start.keys() == end.keys() == {"weight", "bias"}
    assert torch.equal(start["weight"], algorithm.head.weight)
    assert (end["weight"] - start["weight"]).abs().max() > 0.01


@BOTH
@FIRST_ORDER
@STEPS
def test_anils_meta_gradient_by_plain_autograd(inner_steps: int, first_order: bool, vectorize: bool) -> None:
    algorithm = tiny(ANIL, vectorize=vectorize, inner_steps=inner_steps, first_order=first_order)
    batch = batch_of()
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        weight, bias = algorithm.head.weight, algorithm.head.bias
        support, query = algorithm.backbone(support_x), algorithm.backbone(query_x)
        for _ in range(inner_steps):
            inner = F.cross_entropy(support @ weight.T + bias, support_y)
            of_weight, of_bias = torch.autograd.grad(inner, (weight, bias), create_graph=True)
            if first_order:
                of_weight, of_bias = of_weight.detach(), of_bias.detach()
            weight, bias = weight - RATE * of_weight, bias - RATE * of_bias
        losses.append(F.cross_entropy(query @ weight.T + bias, query_y))
    expected_loss = torch.stack(losses).mean()
    expected = slope(expected_loss, algorithm)
    loss, found = gradients(algorithm, batch)
    close(loss, expected_loss.detach())
    for name, value in expected.items():
        close(found[name], value)
    assert found["backbone.blocks.0.conv.weight"].abs().max() > 1e-3


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
@FIRST_ORDER
def test_anil_is_maml_whose_body_has_rate_zero(first_order: bool, norm: str, vectorize: bool) -> None:
    """Whatever a set is normalised with: in MAML the body would run anew in every inner step."""
    anil = tiny(ANIL, norm, vectorize, inner_steps=3, first_order=first_order)
    maml = with_rates(tiny(MetaSGD, norm, inner_steps=3, first_order=first_order), body=0.0)
    same_meta_gradient(anil, maml)
    close(anil.predict(batch_of()), maml.predict(batch_of()))


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
def test_anils_meta_gradient_is_that_of_finite_differences(norm: str, vectorize: bool) -> None:
    slopes_agree(tiny(ANIL, norm, vectorize, inner_steps=3), "")


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
def test_anil_trains_on_what_it_predicts(norm: str, vectorize: bool) -> None:
    algorithm, batch = tiny(ANIL, norm, vectorize, inner_steps=2), batch_of()
    predictions = algorithm.predict(batch)
    loss, logs = algorithm.loss(batch, 0)
    close(loss.detach(), F.cross_entropy(predictions.flatten(0, 1), batch.query_y.flatten()))
    assert logs["acc"].item() == pytest.approx(accuracy(predictions, batch.query_y).mean().item())


@pytest.mark.parametrize("norm", KINDS)
@FIRST_ORDER
def test_a_set_goes_through_the_body_once(first_order: bool, norm: str) -> None:
    """However many the inner steps: forwards, and backwards too, since they ask for the head's gradient alone."""
    algorithm, batch = tiny(ANIL, norm, inner_steps=5, first_order=first_order), batch_of(tasks=1)
    forwards, backwards = [], []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        forwards.append(len(output))
        output.register_hook(lambda gradient: backwards.append(len(gradient)))

    algorithm.backbone.register_forward_hook(count)
    loss, _ = algorithm.loss(batch, 0)
    assert backwards == []
    loss.backward()
    apart = norm in ("batch", "running")
    assert forwards == ([6, 6] if apart else [12])
    assert backwards == ([6] if apart and first_order else forwards)


# Meta-SGD


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
@FIRST_ORDER
@STEPS
def test_metasgd_of_equal_rates_is_maml(inner_steps: int, first_order: bool, norm: str, vectorize: bool) -> None:
    settings = {"inner_steps": inner_steps, "first_order": first_order}
    metasgd, maml = tiny(MetaSGD, norm, vectorize, **settings), tiny(MAML, norm, **settings)
    same_meta_gradient(metasgd, maml)
    after = [algorithm.eval().predict_after(batch_of(), [0, 1, 4]) for algorithm in (metasgd, maml)]
    assert not after[0].requires_grad
    close(*after)


def test_metasgd_of_other_rates_is_not_maml() -> None:
    """Otherwise the test above would say nothing of the rates."""
    found = [tiny(MetaSGD), with_rates(tiny(MetaSGD))]
    one, other = (algorithm.predict(batch_of()) for algorithm in found)
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
@STEPS
@pytest.mark.parametrize("part", ["rates.", ""])
def test_metasgds_meta_gradient_is_that_of_finite_differences(
    part: str, inner_steps: int, norm: str, vectorize: bool
) -> None:
    slopes_agree(with_rates(tiny(MetaSGD, norm, vectorize, inner_steps=inner_steps)), part)


@BOTH
def test_rates_learn_in_first_order_too(vectorize: bool) -> None:
    """After one inner step nothing is neglected in a rate's derivative; after three it is minus the sum over the inner
    gradients, taken as constants, times the gradient at the adapted weights."""
    slopes_agree(with_rates(tiny(MetaSGD, vectorize=vectorize, first_order=True)), "rates.")
    algorithm, batch = with_rates(tiny(MetaSGD, vectorize=vectorize, first_order=True, inner_steps=3)), batch_of(1)
    fast, inner = copy.deepcopy(algorithm), {}
    support_x, support_y, query_x, query_y = (tensor[0] for tensor in batch.tensors)
    weights = {name: value for name, value in fast.named_parameters() if not name.startswith("rates.")}
    for _ in range(3):
        step = slope(F.cross_entropy(fast(support_x), support_y), fast)
        for name, value in weights.items():
            inner[name] = inner.get(name, 0) + step[name]
            value.data -= fast.rates[name.replace(".", "_")].data * step[name]
    outer = slope(F.cross_entropy(fast(query_x), query_y), fast)
    _, found = gradients(algorithm, batch)
    for name in weights:
        close(found[name], outer[name])
        close(found["rates." + name.replace(".", "_")], -inner[name] * outer[name])


@STEPS
def test_recomputed_steps_give_the_same_gradient(inner_steps: int) -> None:
    found, passes = [], []
    for recompute in (False, True):
        algorithm = with_rates(tiny(MetaSGD, inner_steps=inner_steps, recompute=recompute))
        forwards: list[int] = []
        algorithm.backbone.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        found.append(gradients(algorithm, batch_of(1)))
        passes.append(len(forwards))
    assert passes == [inner_steps + 1, 2 * inner_steps + 1]
    close(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        close(found[1][1][name], value)


def test_metasgd_in_first_order_asks_for_no_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = torch.autograd.grad

    def recorded(*args, create_graph: bool = False, **more) -> tuple[Tensor, ...]:
        asked.append(create_graph)
        return real(*args, create_graph=create_graph, **more)

    algorithms = [tiny(MetaSGD, inner_steps=2, first_order=first_order) for first_order in (True, False)]
    monkeypatch.setattr(torch.autograd, "grad", recorded)
    for algorithm in algorithms:
        algorithm.loss(batch_of(1), 0)
    algorithms[1].predict(batch_of(1))
    assert asked == [False] * 2 + [True] * 2 + [False] * 2


def test_every_weight_has_a_rate_that_is_trained_and_saved(tmp_path: Path) -> None:
    config = compose("algo=metasgd", "backbone.channels=8", "task.ways=5", "task.queries=4", "backbone.norm=none")
    algorithm = build(config, SEPARABLE)
    weights = {name: value for name, value in algorithm.named_parameters() if not name.startswith("rates.")}
    rates = {name: getattr(algorithm.rates, name.replace(".", "_")) for name in weights}
    assert len(algorithm.rates) == len(weights) == 10
    for name, rate in rates.items():
        assert rate.shape == weights[name].shape
        assert (rate == 0.5).all()
    optimizer, _ = build_optimizer(algorithm, config.train)
    for step in range(2):  # in the first the body's inner gradients are tiny, for a head that starts near zero
        gradient_step(algorithm.train(), episodes(SEPARABLE, TaskShape(5, 1, 4), 2), step, 1.0, 0, hardware())
        optimizer.step()
    assert all((rate != 0.5).any() for rate in rates.values())
    checkpoint.save(tmp_path / "weights.pt", {"model": algorithm.state_dict()})
    again = build(config, SEPARABLE)
    checkpoint.load_weights(again, checkpoint.load(tmp_path / "weights.pt")["model"], tmp_path / "weights.pt")
    for name, rate in rates.items():
        assert torch.equal(getattr(again.rates, name.replace(".", "_")), rate)


def test_settings_are_mamls() -> None:
    for kind in (ANIL, MetaSGD):
        assert tiny(kind, inner_steps=3).test_steps == 3
        assert tiny(kind, inner_steps=3, test_inner_steps=10).test_steps == 10
