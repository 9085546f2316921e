"""MAML++ beside the MAML that it is with its parts switched off; iMAML beside closed forms and finite differences."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from helpers import build, compose, double, episodes, hardware, toy_images, with_
from torch import Tensor, nn

from metarun.algos.imaml import IMAML, conjugate_gradients
from metarun.algos.maml import MAML
from metarun.algos.mamlplusplus import MAMLPlusPlus
from metarun.backbones.conv4 import Conv4
from metarun.core import ActivationHook, Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.engine.gradients import gradient_step
from metarun.engine.learner import build_optimizer
from metarun.errors import UserError
from metarun.ops.batch_norm import KINDS, Norm
from metarun.ops.metrics import accuracy

Method = TypeVar("Method", bound=MAML)

SEPARABLE = toy_images()
RATE = 0.25  # the same in single precision, in which rates are made
OFF = {"multi_step_loss": False, "learned_rates": False, "per_step_norm": False}
BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
FORMS = [(norm, vectorize) for norm in KINDS for vectorize in (False, True) if (norm, vectorize) != ("running", True)]


def tiny(kind: type[Method], norm: str = "batch", vectorize: bool = False, **settings: float) -> Method:
    """In double precision, with the same weights for every method, away from zero biases and unit scales."""
    torch.manual_seed(1)
    backbone = Conv4(input_shape=(1, 16, 16), channels=4, norm=norm)
    algorithm = kind(backbone, Spec((1, 16, 16), "classification", 3), **{"inner_lr": RATE, **settings}).double()
    for name, parameter in algorithm.named_parameters():
        if not name.startswith("rates."):
            parameter.data += 0.1 * torch.randn_like(parameter)
    algorithm.vectorize = vectorize
    return algorithm.train()


def batch_of(tasks: int = 2) -> Episodes:
    return double(episodes(SEPARABLE, TaskShape(3, 2, 2), tasks))


def gradients(algorithm: Algorithm, batch: Episodes, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradient by name; zero for what the loss does not depend on."""
    loss, _ = algorithm.loss(batch, step)
    values = dict(algorithm.named_parameters())
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(values, found, strict=True))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def same_meta_gradient(algorithm: Algorithm, reference: Algorithm, step: int = 0) -> None:
    """Equal losses, and equal gradients of all that `reference` has."""
    loss, found = gradients(algorithm, batch_of(), step)
    expected_loss, expected = gradients(reference, batch_of(), step)
    close(loss, expected_loss)
    for name, value in expected.items():
        close(found[name], value)


def slopes_agree(algorithm: Algorithm, batch: Episodes, part: str = "", directions: int = 3) -> None:
    """The gradient of the parameters whose names begin with `part` is that of central differences, the steepest and others."""
    found = {name: value for name, value in gradients(algorithm, batch)[1].items() if name.startswith(part)}
    length = math.sqrt(sum(value.square().sum().item() for value in found.values()))
    assert length > 1e-4
    for number in range(directions):
        along = {name: value if number == 0 else torch.randn_like(value) for name, value in found.items()}
        reach = math.sqrt(sum(value.square().sum().item() for value in along.values()))
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(algorithm)
            for name, value in moved.named_parameters():
                if name in along:
                    value.data += sign * 1e-6 / reach * along[name]
            ends.append(moved.loss(batch, 0)[0].item())
        expected = sum((found[name] * along[name]).sum().item() for name in found) / reach
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-6, abs=1e-6 * length)


# MAML++


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_with_all_switches_off_it_is_maml(inner_steps: int, norm: str, vectorize: bool) -> None:
    plus = tiny(MAMLPlusPlus, norm, vectorize, inner_steps=inner_steps, **OFF)
    maml = tiny(MAML, norm, inner_steps=inner_steps)
    assert dict(plus.named_parameters()).keys() == dict(maml.named_parameters()).keys()
    same_meta_gradient(plus, maml)
    after = [algorithm.eval().predict_after(batch_of(), [0, 1, 5]) for algorithm in (plus, maml)]
    assert not after[0].requires_grad
    close(*after)


@pytest.mark.parametrize("switch", OFF)
def test_with_one_switch_on_it_is_not_maml(switch: str) -> None:
    """Otherwise the test above would say nothing of the switch."""
    plus, maml = tiny(MAMLPlusPlus, inner_steps=3, **OFF | {switch: True}), tiny(MAML, inner_steps=3)
    if switch == "learned_rates":
        with torch.no_grad():
            plus.rates["head_weight"][1] *= 2
    assert abs(plus.loss(batch_of(), 0)[0] - maml.loss(batch_of(), 0)[0]).item() > 1e-4


@BOTH
def test_first_order_before_its_step_and_second_order_from_it_on(vectorize: bool) -> None:
    plus = tiny(MAMLPlusPlus, vectorize=vectorize, inner_steps=3, first_order_steps=10, **OFF)
    first, second = (tiny(MAML, inner_steps=3, first_order=first_order) for first_order in (True, False))
    same_meta_gradient(plus, first, step=0)
    same_meta_gradient(plus, first, step=9)
    same_meta_gradient(plus, second, step=10)
    name = "backbone.blocks.0.conv.weight"
    one, other = (gradients(algorithm, batch_of())[1][name] for algorithm in (first, second))
    assert (one - other).abs().max() > 1e-3


def test_the_weights_of_the_steps_move_to_the_last() -> None:
    """The official code's numbers for 5 inner steps and 10 epochs, at the start of the epochs 0, 3 and 9, and after them."""
    plus = tiny(MAMLPlusPlus, inner_steps=5, multi_step_loss_steps=5000)
    weights = plus.step_weights
    assert list(weights(0).values()) == pytest.approx([0.2] * 5)
    assert list(weights(1500).values()) == pytest.approx([0.14] * 4 + [0.44])
    assert list(weights(4500).values()) == pytest.approx([0.02] * 4 + [0.92])
    assert list(weights(4999).values()) == pytest.approx([0.006] * 4 + [0.976])
    assert weights(5000) == weights(10**6) == {5: 1.0}
    last = [weights(step)[5] for step in range(0, 6000, 100)]
    assert last == sorted(last)
    for step in range(0, 6000, 100):
        assert sum(weights(step).values()) == pytest.approx(1)
        assert len(set(list(weights(step).values())[:-1])) <= 1
    assert tiny(MAMLPlusPlus, inner_steps=1).step_weights(0) == {1: 1.0}
    assert tiny(MAMLPlusPlus, inner_steps=5, multi_step_loss=False).step_weights(0) == {5: 1.0}


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
def test_its_loss_is_the_weighted_one_of_what_it_predicts(norm: str, vectorize: bool) -> None:
    plus = tiny(MAMLPlusPlus, norm, vectorize, inner_steps=3, multi_step_loss_steps=100)
    batch = batch_of()
    predictions = plus.predict_after(batch, [1, 2, 3])
    losses = [F.cross_entropy(prediction.flatten(0, 1), batch.query_y.flatten()) for prediction in predictions]
    for step, weights in {0: [1 / 3] * 3, 40: [0.2, 0.2, 0.6], 100: [0.0, 0.0, 1.0]}.items():
        loss, logs = plus.loss(batch, step)
        close(loss.detach(), sum(weight * value for weight, value in zip(weights, losses, strict=True)))
        assert logs["acc"].item() == pytest.approx(accuracy(predictions[-1], batch.query_y).mean().item())


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
@pytest.mark.parametrize("part", ["", "rates.", "later_norms."])
def test_its_meta_gradient_is_that_of_finite_differences(part: str, norm: str, vectorize: bool) -> None:
    plus = tiny(MAMLPlusPlus, norm, vectorize, inner_steps=3)
    for rate in plus.rates.values():
        rate.data += 0.1 * torch.randn_like(rate)
    if list(plus.later_norms) or part != "later_norms.":
        slopes_agree(plus, batch_of(), part)
    else:
        assert norm == "none"


def test_rates_are_learned_for_each_tensor_and_step() -> None:
    plus = tiny(MAMLPlusPlus, inner_steps=3, inner_lr=0.125)
    weights = {name for name, _ in plus.named_parameters() if name.split(".")[0] in ("backbone", "head")}
    adapted = {name.replace(".", "_") for name in weights if ".norm." not in name}
    assert set(plus.rates) == adapted
    assert len(adapted) == 10
    for rate in plus.rates.values():
        assert torch.equal(rate, torch.full((3,), 0.125, dtype=torch.float64))
    _, found = gradients(plus, batch_of())
    slopes = torch.stack([found[f"rates.{name}"] for name in plus.rates if "conv_bias" not in name])
    assert slopes.abs().min() > 1e-6  # a bias before a norm does nothing
    assert len(slopes.flatten().unique()) == 6 * 3


def test_rates_learn_in_first_order_too() -> None:
    """Of the last inner step nothing is neglected: its derivative is exact."""
    settings = {"inner_steps": 3, "multi_step_loss": False, "per_step_norm": False}
    first = gradients(tiny(MAMLPlusPlus, first_order_steps=1, **settings), batch_of())[1]
    second = gradients(tiny(MAMLPlusPlus, **settings), batch_of())[1]
    close(first["rates.head_weight"][2], second["rates.head_weight"][2])
    assert (first["rates.head_weight"][:2].abs() > 1e-6).all()


def set_norms(algorithm: MAMLPlusPlus, start: MAMLPlusPlus, step: int) -> None:
    """The scales and shifts that `start` has for the inner step `step`, the first being 0."""
    for name, module in algorithm.named_modules():
        if isinstance(module, Norm) and step > 0:
            for part in ("weight", "bias"):
                getattr(module, part).data = start.later_norms[f"{name}.{part}".replace(".", "_")][step - 1].detach()


@BOTH
def test_each_step_has_rates_and_norms_of_its_own(vectorize: bool) -> None:
    """By a loop of nothing but torch: step k descends with the k-th norms and rates, and queries after it pass its norms."""
    plus, batch = tiny(MAMLPlusPlus, vectorize=vectorize, inner_steps=3), batch_of()
    for rate in plus.rates.values():
        rate.data += 0.1 * torch.randn_like(rate)
    before = copy.deepcopy(plus.state_dict())
    after = plus.eval().predict_after(batch, [0, 1, 2, 3, 5])
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        fast = copy.deepcopy(plus)
        close(after[0, task], fast(query_x).detach())
        for step in range(5):
            set_norms(fast, plus, min(step, 2))
            fast.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            for name, value in fast.named_parameters():
                if (key := name.replace(".", "_")) in plus.rates:
                    value.data -= plus.rates[key][min(step, 2)].detach() * value.grad
            if step != 3:
                close(after[min(step + 1, 4), task], fast(query_x).detach())
    for name, value in plus.state_dict().items():
        assert torch.equal(value, before[name])


def test_norms_of_all_steps_learn() -> None:
    plus = tiny(MAMLPlusPlus, inner_steps=3, multi_step_loss=False)
    _, found = gradients(plus, batch_of())
    for number in range(4):
        for part in ("weight", "bias"):
            assert found[f"backbone.blocks.{number}.norm.{part}"].abs().max() > 1e-6
            later = found[f"later_norms.backbone_blocks_{number}_norm_{part}"]
            assert later.shape == (2, 4)
            assert (later.abs().amax(1) > 1e-6).all()


def test_its_config_trains_every_part_and_has_a_cosine() -> None:
    config = compose("algo=mamlplusplus", "backbone.channels=8", "backbone.norm=batch", "train.task.queries=4")
    plus = build(config, SEPARABLE)
    optimizer, schedule = build_optimizer(plus, config.train)
    assert type(schedule).__name__ == "CosineAnnealingLR"
    assert (
        type(build_optimizer(plus, compose("algo=mamlplusplus", "schedule=constant").train)[1]).__name__ == "Constant"
    )
    before = {name: value.clone() for name, value in plus.named_parameters()}
    for step in range(2):
        gradient_step(plus.train(), episodes(SEPARABLE, TaskShape(5, 1, 4), 2), step, 1.0, 0, hardware())
        optimizer.step()
    still = {name for name, value in plus.named_parameters() if torch.equal(value, before[name])}
    assert all("conv_bias" in name for name in still)  # a bias before a norm does nothing
    assert sum(name.startswith("later_norms.") for name in before) == 8


@pytest.mark.parametrize("setting", ["inner_steps", "multi_step_loss_steps"])
def test_its_settings_are_checked(setting: str) -> None:
    with pytest.raises(UserError, match=rf"^algo.{setting}=0: must be at least 1$"):
        tiny(MAMLPlusPlus, **{setting: 0})


def test_norms_of_all_steps_begin_as_those_of_a_pretrained_backbone() -> None:
    pretrained, method = tiny(MAML), tiny(MAMLPlusPlus, inner_steps=3)
    for name, value in pretrained.backbone.named_parameters():
        value.data += ".norm." in name
    method.inherit(pretrained)
    for number in range(3):
        norms = method.norms_of(number)
        assert norms
        for name, value in norms.items():
            assert torch.equal(value, pretrained.get_parameter(name))


# iMAML


class Identity(Backbone):
    """The inputs as features: with the linear head the squared error is a quadratic function of the weights."""

    norm = "none"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features, self.widths = width, []

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        return x


def linear_learner(**settings: float) -> IMAML:
    torch.manual_seed(1)
    algorithm = IMAML(Identity(3), Spec((3,), "regression", 1), **{"damping": 0.0, **settings}).double()
    algorithm.head.bias.data += 0.3
    return algorithm


def linear_tasks(tasks: int = 3) -> Episodes:
    torch.manual_seed(2)
    x, slopes = torch.randn(tasks, 15, 3, dtype=torch.float64), torch.randn(tasks, 3, 1, dtype=torch.float64)
    y = x @ slopes + 0.5 + 0.2 * torch.randn(tasks, 15, 1, dtype=torch.float64)
    return Episodes(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:], ways=1)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


@BOTH
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_its_meta_gradient_on_a_quadratic_is_the_closed_form(strength: float, vectorize: bool) -> None:
    """Equation 6 with the exact A, and autograd through the exact solution of equation 4, which must agree."""
    algorithm, batch = linear_learner(proximal_weight=strength, inner_steps=250, inner_lr=0.2), linear_tasks()
    algorithm.vectorize = vectorize
    loss, found = gradients(algorithm, batch)
    theta = torch.cat([algorithm.head.weight.flatten(), algorithm.head.bias]).detach().requires_grad_()
    unit = torch.eye(4, dtype=torch.float64)
    losses, implicit = [], []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        design = with_ones(support_x)
        curvature = 2 / len(design) * design.T @ design
        pull = 2 / len(design) * design.T @ support_y.flatten()
        phi = torch.linalg.solve(curvature + strength * unit, pull + strength * theta)
        losses.append((with_ones(query_x) @ phi - query_y.flatten()).square().mean())
        (slope,) = torch.autograd.grad(losses[-1], phi, retain_graph=True)
        implicit.append(torch.linalg.solve(unit + curvature / strength, slope))
    (through_solution,) = torch.autograd.grad(torch.stack(losses).mean(), theta)
    close(loss, torch.stack(losses).mean().detach())
    meta_gradient = torch.cat([found["head.weight"].flatten(), found["head.bias"]])
    close(meta_gradient, torch.stack(implicit).mean(0))
    close(meta_gradient, through_solution)


def test_damping_is_added_to_lambda_in_the_solution_alone() -> None:
    batch = linear_tasks(1)
    damped = linear_learner(proximal_weight=0.5, damping=1.5, inner_steps=250, inner_lr=0.2)
    loss, found = gradients(damped, batch)
    close(loss, gradients(linear_learner(proximal_weight=0.5, inner_steps=250, inner_lr=0.2), batch)[0])
    _, first_order = gradients(
        linear_learner(proximal_weight=0.5, inner_steps=250, inner_lr=0.2, solver_steps=0), batch
    )
    design = with_ones(batch.support_x[0])
    slope = torch.cat([first_order["head.weight"].flatten(), first_order["head.bias"]])
    expected = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + design.T @ design / 6, slope)
    close(torch.cat([found["head.weight"].flatten(), found["head.bias"]]), expected)


class Smooth(Backbone):
    """One layer without kinks, so that where the inner steps get to is a smooth function of where they start."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm, self.features, self.widths = norm, 5, [5]
        self.layer, self.normalise = nn.Linear(3, 5), Norm(5, norm)

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        return torch.tanh(self.normalise(self.layer(x), n_support))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_its_meta_gradient_of_a_network_is_that_of_finite_differences(norm: str) -> None:
    """Where the inner steps get to the minimum, the implicit gradient is the derivative of where they get to."""
    torch.manual_seed(1)
    settings = {"proximal_weight": 2.0, "inner_steps": 200, "solver_steps": 30, "damping": 0.0}
    algorithm = IMAML(Smooth(norm), Spec((3,), "regression", 1), **settings).double().train()
    tasks = linear_tasks(1)
    batch = with_(tasks, support_y=0.2 * tasks.support_y, query_y=0.2 * tasks.query_y)
    slopes_agree(algorithm, batch, directions=2)
    _, implicit = gradients(algorithm, batch)
    algorithm.solver_steps = 0
    _, first_order = gradients(algorithm, batch)
    name = "backbone.layer.weight"
    assert (implicit[name] - first_order[name]).abs().max() > 0.1 * first_order[name].abs().max()


@BOTH
def test_at_a_large_lambda_it_is_the_plain_gradient_at_theta(vectorize: bool) -> None:
    batch, distances = batch_of(), []
    start = tiny(MAML, inner_steps=0)
    expected_loss, expected = gradients(start, batch)
    for strength in (1e4, 1e6, 1e8):
        algorithm = tiny(IMAML, vectorize=vectorize, proximal_weight=strength, inner_lr=1 / strength)
        loss, found = gradients(algorithm, batch)
        gaps = [(found[name] - value).abs().max() for name, value in expected.items()]
        distances.append(max(*gaps, abs(loss - expected_loss)).item())
    assert distances[0] > 50 * distances[1] > 2500 * distances[2]
    assert distances[2] < 1e-4


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
def test_its_loss_is_that_of_what_it_predicts(norm: str, vectorize: bool) -> None:
    algorithm, batch = tiny(IMAML, norm, vectorize, inner_steps=3), batch_of()
    predictions = algorithm.predict(batch)
    loss, logs = algorithm.loss(batch, 0)
    close(loss.detach(), F.cross_entropy(predictions.flatten(0, 1), batch.query_y.flatten()))
    assert logs["acc"].item() == pytest.approx(accuracy(predictions, batch.query_y).mean().item())


def test_inner_steps_descend_on_the_proximal_loss() -> None:
    algorithm, batch = tiny(IMAML, proximal_weight=1.5), batch_of(1)
    support_x, support_y, query_x, _ = (tensor[0] for tensor in batch.tensors)
    after = algorithm.predict_after(batch, [0, 1, 4])[:, 0]
    fast, start = copy.deepcopy(algorithm), dict(algorithm.named_parameters())
    descent = torch.optim.SGD(fast.parameters(), lr=RATE)
    for step in range(5):
        if step in (0, 1, 4):
            close(after[[0, 1, 4].index(step)], fast(query_x).detach())
        descent.zero_grad()
        F.cross_entropy(fast(support_x), support_y).backward()
        for name, value in fast.named_parameters():
            value.grad += 1.5 * (value - start[name]).detach()
        descent.step()


class Kept:
    """A tensor that autograd keeps; `now` of them are there, `most` have been at a time."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.now += 1
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= 1


def test_memory_does_not_grow_with_the_inner_steps() -> None:
    most: dict[type[MAML], list[int]] = {}
    for kind in (IMAML, MAML):
        for inner_steps in (2, 12):
            algorithm, Kept.now, Kept.most = tiny(kind, "group", inner_steps=inner_steps), 0, 0
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                algorithm.loss(batch_of(1), 0)
            most.setdefault(kind, []).append(Kept.most)
    assert most[IMAML][1] == most[IMAML][0] > 0
    assert most[MAML][1] > 3 * most[MAML][0]


def test_conjugate_gradients_solve_a_known_system() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, target = root @ root.T + 0.5 * torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, target)
    errors = []
    for steps in (0, 1, 2, 4, 6, 30):
        x = conjugate_gradients(lambda v: matrix @ v, target, steps)
        errors.append(((x - solution) @ matrix @ (x - solution)).item())
    assert errors[0] > errors[1] > errors[2] > errors[3] > 1e-8
    assert max(errors[4:]) < 1e-18
    close(conjugate_gradients(lambda v: matrix @ v, target, 0), target)


def test_conjugate_gradients_stop_at_a_curvature_that_is_not_positive() -> None:
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    close(conjugate_gradients(lambda v: -v, target, 5), target)
    zero = conjugate_gradients(lambda v: 0 * v, target, 5)
    close(zero, target)
    identity = conjugate_gradients(lambda v: v, target, 5)  # solved before the first step
    close(identity, target)
    assert not conjugate_gradients(lambda v: 2 * v, torch.zeros(3), 5).any()
    mixed = torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64)
    assert conjugate_gradients(lambda v: mixed * v, target, 9).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"proximal_weight": 0.0}, r"^algo.proximal_weight=0: must be above 0"),
        ({"proximal_weight": 10.0}, r"^algo.inner_lr=0.25: .* it must be below 0.2$"),
        ({"damping": -1.0}, r"^algo.damping=-1: must be at least 0"),
    ],
)
def test_imamls_settings_are_checked(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny(IMAML, **settings)
