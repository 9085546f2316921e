"""Tasks and inner steps: closed forms, both forms of the task axis, and what is not computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.backbones.conv4 import Conv4
from metarun.core import Episodes, Spec
from metarun.errors import UserError
from metarun.ops import draws
from metarun.ops.inner_loop import adapt, call, gradient, parameters, rate
from metarun.ops.numerics import linear_head
from metarun.ops.tasks import over_tasks, vectorized

BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
SIZE, TASKS, RATE = 4, 3, 0.07


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Quadratics:
    """T tasks with inner loss x'Ax/2 - b'x and outer loss x'Cx/2 - d'x, of parameters that are split into two tensors."""

    def __init__(self) -> None:
        a, c = normal(TASKS, SIZE, SIZE), normal(TASKS, SIZE, SIZE)
        self.a, self.c = a @ a.mT + torch.eye(SIZE), c @ c.mT
        self.b, self.d = normal(TASKS, SIZE), normal(TASKS, SIZE)
        self.theta = normal(SIZE)

    def params(self) -> dict[str, Tensor]:
        return {"low": self.theta[:1].clone().requires_grad_(), "high": self.theta[1:].clone().requires_grad_()}

    def meta_loss(
        self, params: dict[str, Tensor], *, steps: int, first_order: bool, vectorize: bool, learning_rate=RATE
    ) -> tuple[Tensor, Tensor]:
        """The mean outer loss after `steps` inner steps, and the adapted parameters [T, size]."""

        def task(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            def loss(params: dict[str, Tensor]) -> Tensor:
                x = torch.cat([params["low"], params["high"]])
                return x @ a @ x / 2 - b @ x

            (fast,) = adapt(loss, params, steps=[steps], learning_rate=learning_rate, first_order=first_order)
            x = torch.cat([fast["low"], fast["high"]])
            return x @ c @ x / 2 - d @ x, x

        losses, adapted = over_tasks(task, self.a, self.b, self.c, self.d, vectorize=vectorize)
        return losses.mean(), adapted

    def expected(self, steps: int, first_order: bool) -> tuple[Tensor, Tensor]:
        """Adapted parameters [T, size] and the meta-gradient, with the Jacobian (I - rate A)^steps written out."""
        adapted, gradients = [], []
        for a, b, c, d in zip(self.a, self.b, self.c, self.d, strict=True):
            x, jacobian = self.theta, torch.eye(SIZE, dtype=torch.float64)
            for _ in range(steps):
                x = x - RATE * (a @ x - b)
                jacobian = (torch.eye(SIZE) - RATE * a) @ jacobian
            adapted.append(x)
            gradients.append(c @ x - d if first_order else jacobian.T @ (c @ x - d))
        return torch.stack(adapted), torch.stack(gradients).mean(0)


@BOTH
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_meta_gradient_of_quadratics_is_the_closed_form(steps: int, first_order: bool, vectorize: bool) -> None:
    problem = Quadratics()
    params = problem.params()
    loss, adapted = problem.meta_loss(params, steps=steps, first_order=first_order, vectorize=vectorize)
    expected_adapted, expected_gradient = problem.expected(steps, first_order)
    torch.testing.assert_close(adapted, expected_adapted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, list(params.values()))
    torch.testing.assert_close(torch.cat(gradients), expected_gradient, rtol=1e-12, atol=1e-12)


def test_first_and_second_order_differ() -> None:
    """Otherwise the test above would say nothing."""
    problem = Quadratics()
    assert (problem.expected(5, True)[1] - problem.expected(5, False)[1]).abs().max() > 0.1


@BOTH
def test_no_grad_keeps_no_graph_and_the_same_values(vectorize: bool) -> None:
    problem = Quadratics()
    for first_order in (False, True):
        with torch.no_grad():
            loss, adapted = problem.meta_loss(problem.params(), steps=3, first_order=first_order, vectorize=vectorize)
        assert not loss.requires_grad
        assert not adapted.requires_grad
        torch.testing.assert_close(adapted, problem.expected(3, False)[0], rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("kind", ["tensor", "a tensor a parameter"])
def test_learned_rates(kind: str, vectorize: bool) -> None:
    """After one step the derivative by a rate is minus the outer gradient times the inner gradient."""
    problem = Quadratics()
    low = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    if kind == "tensor":
        rates, learning_rate = [low], low
    else:
        high = torch.full((SIZE - 1,), RATE, dtype=torch.float64, requires_grad=True)
        rates, learning_rate = [low, high], {"low": low, "high": high}
    loss, adapted = problem.meta_loss(
        problem.params(), steps=1, first_order=False, vectorize=vectorize, learning_rate=learning_rate
    )
    torch.testing.assert_close(adapted, problem.expected(1, False)[0], rtol=1e-12, atol=1e-12)
    inner = (problem.a @ problem.theta) - problem.b  # [T, size]
    outer = (problem.c @ adapted.detach()[:, :, None])[:, :, 0] - problem.d
    product = -(inner * outer).mean(0)
    expected = [product.sum()] if kind == "tensor" else [product[0], product[1:]]
    for found, wanted in zip(torch.autograd.grad(loss, rates), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def dropped_in_a_step(x: Tensor, rate: float) -> Tensor:
    """By the task's own generator, which has drawn before."""
    return draws.dropout(draws.dropout(x, rate), rate)


@pytest.mark.parametrize("dropout", [F.dropout, dropped_in_a_step])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "support"])
def test_recomputed_steps_have_the_same_derivative(
    norm: str, learned: bool, dropout: Callable[[Tensor, float], Tensor]
) -> None:
    """Through five steps of a convolutional network with dropout, from three of them, by weights and by rates."""
    backbone = Conv4(input_shape=(1, 16, 16), channels=3, norm=norm).double()
    learner = MAML(backbone, Spec((1, 16, 16), "classification", 3), inner_steps=5).double()
    params = parameters(learner)
    rates = {name: torch.full_like(value, 0.1).requires_grad_() for name, value in params.items()}
    shared = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    x, y, weights = normal(6, 1, 16, 16), torch.arange(3).repeat(2), [0.3, -0.5, 0.7]

    def run(recompute: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        share = draws.StepShare(seed=0, step=0, first=0, count=1, total=1)
        with nullcontext() if dropout is F.dropout else share.entered(), share.task(0):
            found = adapt(
                lambda params: F.cross_entropy(call(learner, params, dropout(x, 0.3)), y),
                params,
                steps=[0, 2, 5],
                learning_rate=rates if learned else shared,
                recompute=recompute,
            )
            torch.rand(7)  # what is drawn between must not matter
            draws.rand(7, device=x.device)
            outer = sum(w * call(learner, fast, x).square().sum() for w, fast in zip(weights, found, strict=True))
            wanted = [*params.values(), *(rates.values() if learned else [shared])]
            return outer.detach(), *torch.autograd.grad(outer, wanted)

    for expected, found in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["loop", "recomputed", "vmap"])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_parameter_that_the_loss_does_not_depend_on_stays(first_order: bool, form: str) -> None:
    used, idle, x = normal(2).requires_grad_(), normal(3).requires_grad_(), normal(TASKS, 2)

    def task(x: Tensor) -> tuple[Tensor, Tensor]:
        (fast,) = adapt(
            lambda params: (params["used"] @ x) ** 2,
            {"idle": idle, "used": used},
            steps=[2],
            learning_rate=RATE,
            first_order=first_order,
            recompute=form == "recomputed",
        )
        return fast["idle"], fast["used"]

    stayed, moved = over_tasks(task, x, vectorize=form == "vmap")
    assert torch.equal(stayed, idle.expand(TASKS, 3))
    by_idle, by_used = torch.autograd.grad(stayed.sum() + moved.sum(), [idle, used])
    assert torch.equal(by_idle, torch.full_like(idle, TASKS))
    jacobian = torch.eye(2) - 2 * RATE * x[:, :, None] * x[:, None]  # of one step, symmetric
    expected = torch.ones(TASKS, 2) if first_order else (jacobian @ jacobian).sum(1)
    torch.testing.assert_close(by_used, expected.double().sum(0), rtol=1e-12, atol=1e-12)


def test_recomputed_steps_keep_no_graph() -> None:
    """What is held for the way back hardly grows with the steps, where the plain graph holds ten times as much."""
    learner = MAML(Conv4(input_shape=(1, 16, 16), channels=8), Spec((1, 16, 16), "classification", 5))
    x, y = torch.rand(5, 1, 16, 16), torch.arange(5)

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def held(steps: int, recompute: bool) -> int:
        kept: WeakSet[Kept] = WeakSet()

        def keep(tensor: Tensor) -> Kept:
            kept.add(box := Kept(tensor))
            return box

        learner.inner.steps, learner.inner.recompute = steps, recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
            loss, _ = learner.loss(Episodes(x[None], y[None], x[None], y[None], 5), 0)
        assert loss.requires_grad  # and so holds its graph
        return sum(box.tensor.numel() for box in kept)

    assert held(10, False) > 5 * held(1, False)
    assert held(10, True) < 1.2 * held(1, True)


def test_recomputing_under_vmap_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^algo.recompute=true: needs the tasks in a loop; add hardware.vectorize=false"
    ):
        over_tasks(
            lambda x: adapt(
                lambda params: (params["w"] * x).sum(),
                {"w": torch.ones(2, requires_grad=True)},
                steps=[1],
                learning_rate=0.1,
                recompute=True,
            )[0]["w"],
            normal(3, 2),
            vectorize=True,
        )


def test_rate_of_a_parameter() -> None:
    assert rate(0.1, "weight") == 0.1
    assert rate({"weight": torch.tensor(0.2), "bias": torch.tensor(0.3)}, "bias") == torch.tensor(0.3)


@BOTH
@pytest.mark.parametrize("first_order", [False, True])
def test_several_numbers_of_steps_equal_separate_runs(first_order: bool, vectorize: bool) -> None:
    problem = Quadratics()
    params = problem.params()

    def run(steps: list[int]) -> Tensor:
        def task(a: Tensor, b: Tensor) -> Tensor:
            def loss(params: dict[str, Tensor]) -> Tensor:
                x = torch.cat([params["low"], params["high"]])
                return x @ a @ x / 2 - b @ x

            found = adapt(loss, params, steps=steps, learning_rate=RATE, first_order=first_order)
            return torch.stack([torch.cat([fast["low"], fast["high"]]) for fast in found])

        return over_tasks(task, problem.a, problem.b, vectorize=vectorize)

    together = run([0, 2, 3])
    apart = torch.cat([run([steps]) for steps in (0, 2, 3)], dim=1)
    assert torch.equal(together, apart)
    assert torch.equal(together[0, 0], problem.theta)
    assert torch.equal(run([3, 0, 3])[:, [1, 0]], together[:, [0, 2]])  # any order, and twice the same
    weights = normal(*together.shape)
    for first, second in zip(
        torch.autograd.grad((together * weights).sum(), list(params.values())),
        torch.autograd.grad((apart * weights).sum(), list(params.values())),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@BOTH
def test_first_order_gradients_carry_no_graph(vectorize: bool) -> None:
    """Neither to the parameters, nor to what else the loss reads; second-order gradients reach both."""
    weight, other = normal(3).requires_grad_(), normal(3).requires_grad_()
    x = normal(2, 3)

    def inner(create_graph: bool) -> Tensor:
        def task(x: Tensor) -> Tensor:
            return gradient(
                lambda params: (params["weight"] * other * x).sum() ** 2, {"weight": weight}, create_graph=create_graph
            )["weight"]

        return over_tasks(task, x, vectorize=vectorize)

    product = (weight * other * x).sum(1, keepdim=True)
    first, second = inner(False), inner(True)
    for found in (first, second):
        torch.testing.assert_close(found.detach(), (2 * product * other * x).detach(), rtol=1e-12, atol=1e-12)
    assert not first.requires_grad
    assert first.grad_fn is None
    by_weight, by_other = torch.autograd.grad(second.sum(), [weight, other])
    assert by_weight.abs().min() > 0
    assert by_other.abs().min() > 0


def test_first_order_never_asks_for_a_second_order_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real: Callable[..., tuple[Tensor, ...]] = torch.autograd.grad

    def recorded(*args, create_graph: bool = False, **more) -> tuple[Tensor, ...]:
        asked.append(create_graph)
        return real(*args, create_graph=create_graph, **more)

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    problem = Quadratics()
    for first_order in (True, False):
        asked.clear()
        problem.meta_loss(problem.params(), steps=2, first_order=first_order, vectorize=False)
        assert asked == [not first_order] * (2 * TASKS)


@BOTH
def test_frozen_parameters_stay_out_of_the_inner_loop(vectorize: bool) -> None:
    module = nn.Linear(2, 2).double()
    module.bias.requires_grad_(False)
    assert list(parameters(module)) == ["weight"]

    def task(x: Tensor) -> tuple[Tensor, Tensor]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, params, (x,)).square().sum()

        (fast,) = adapt(loss, parameters(module), steps=[1], learning_rate=0.1)
        return fast["weight"], loss(fast)

    weights, losses = over_tasks(task, normal(3, 5, 2), vectorize=vectorize)
    assert (weights[0] - weights[1]).abs().max() > 0
    losses.sum().backward()
    assert module.bias.grad is None
    assert module.weight.grad is not None


# The task axis


@BOTH
def test_results_are_stacked_in_every_structure(vectorize: bool) -> None:
    x, y = normal(3, 4), normal(3, 2)

    def function(x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        assert (x.shape, y.shape) == ((4,), (2,))
        return {"both": (x.sum() * y, {"x": x + 1})}

    first, second = over_tasks(function, x, y, vectorize=vectorize)["both"]
    torch.testing.assert_close(first, x.sum(1, keepdim=True) * y)
    torch.testing.assert_close(second["x"], x + 1)


def test_vectorized_tells_inside_from_outside() -> None:
    def inside(x: Tensor) -> Tensor:
        return x + vectorized()

    assert over_tasks(inside, torch.zeros(2)).tolist() == [0, 0]
    assert over_tasks(inside, torch.zeros(2), vectorize=True).tolist() == [1, 1]
    assert not vectorized()
    with pytest.raises(ZeroDivisionError):
        over_tasks(lambda x: x / (1 // 0), torch.zeros(2), vectorize=True)
    assert not vectorized()


@BOTH
def test_random_numbers_differ_between_tasks(vectorize: bool) -> None:
    drawn = over_tasks(lambda x: torch.rand_like(x), torch.zeros(3, 5), vectorize=vectorize)
    assert drawn.unique().numel() == 15


def test_loop_refuses_tensors_of_unequal_numbers_of_tasks() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        over_tasks(lambda x, y: x + y, torch.zeros(2), torch.zeros(3))


# Calls


class Recorder(nn.Module):
    """Returns twice its input, and keeps what it was called with."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.norm = norm
        self.weight = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[int, int | None]] = []

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        self.calls.append((len(x), n_support))
        return self.weight * x


@pytest.mark.parametrize(("norm", "seen"), [("support", (8, 3)), ("batch", (5, None)), ("group", (5, None))])
def test_only_the_support_norm_sees_both_sets(norm: str, seen: tuple[int, int | None]) -> None:
    module = Recorder(norm)
    support, queries = torch.randn(3, 2), torch.randn(5, 2)
    out = call(module, {"weight": torch.tensor(2.0)}, queries, support)
    assert torch.equal(out, 2 * queries)
    assert module.calls == [seen]
    assert torch.equal(call(module, {"weight": torch.tensor(3.0)}, queries), 3 * queries)
    assert module.calls[1] == (5, None)


def test_head_starts_near_zero() -> None:
    head = linear_head(400, 50, std=0.02)
    assert 0.039 < head.weight.abs().max() <= 0.04  # cut at two standard deviations
    assert head.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.02)
    assert not head.bias.any()
