"""HSML: what its encoder, its tree and its gates compute, and where it becomes MAML; the functions that it is shown on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CPU, build, compose, double, episodes, toy_images
from torch import Tensor, nn

from metarun.algos.hsml import HSML, recur
from metarun.algos.maml import MAML
from metarun.config import task_of
from metarun.core import Episodes, Spec, TaskShape
from metarun.data.regression import FAMILIES, Mixed
from metarun.errors import UserError

IMAGES = toy_images()
FUNCTIONS = TaskShape(1, 10, 10)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def learner(*words: str) -> tuple[HSML, Episodes]:
    config = compose("algo=hsml", "data=mixed", "backbone=mlp", "backbone.init_std=null", *words)
    source = Mixed()
    found = build(config, source).double()
    assert isinstance(found, HSML)
    return found, double(episodes(source, task_of(config, "train"), 3))


def test_its_recurrence_is_that_of_torch() -> None:
    cell = nn.GRUCell(3, 5).double()
    x, h = torch.randn(4, 3).double(), torch.randn(4, 5).double()
    torch.testing.assert_close(recur(cell, x, h), cell(x, h))


def test_assignment_is_soft_and_by_distance() -> None:
    algorithm, _ = learner("algo.spread=2")
    g = torch.randn(40).double()
    shares = algorithm.assignment(g)
    weights = torch.stack([torch.exp(-(g - centre).pow(2).sum() / 4) for centre in algorithm.centres])
    torch.testing.assert_close(shares, weights / weights.sum())
    with torch.no_grad():
        algorithm.centres[2] = g
        algorithm.centres[[0, 1, 3]] = g + 10
    torch.testing.assert_close(algorithm.assignment(g), torch.tensor([0.0, 0, 1, 0]).double())


def test_the_tree_is_the_equations() -> None:
    algorithm, _ = learner()
    g = torch.randn(40).double()
    shares = algorithm.assignment(g)
    leaves = [shares[k] * torch.tanh(leaf.weight @ g + leaf.bias) for k, leaf in enumerate(algorithm.leaves)]
    total = torch.zeros(40).double()
    for i, node in enumerate(algorithm.nodes):
        inside = torch.zeros(40).double()
        for leaf in leaves:
            route = (algorithm.route.weight @ leaf + algorithm.route.bias).softmax(0)
            inside += route[i] * torch.tanh(node.weight @ leaf + node.bias)
        total += torch.tanh(algorithm.root.weight @ inside + algorithm.root.bias)
    torch.testing.assert_close(algorithm.climb(g), total)


def test_with_open_gates_it_is_maml() -> None:
    hsml, batch = learner("algo.embedding_weight=0", "algo.inner_steps=2")
    with torch.no_grad():
        for gate in hsml.gates.values():
            gate.weight.zero_()
            gate.bias.fill_(50.0)
    maml = MAML(hsml.backbone, Spec((1,), "regression", 1), inner_steps=2, inner_lr=hsml.inner.lr).double()
    maml.head.load_state_dict(hsml.head.state_dict())
    losses = [algorithm.loss(batch, 0)[0] for algorithm in (hsml, maml)]
    torch.testing.assert_close(losses[0], losses[1])
    found = torch.autograd.grad(losses[0], list(hsml.backbone.parameters()), retain_graph=True)
    expected = torch.autograd.grad(losses[1], list(maml.backbone.parameters()))
    torch.testing.assert_close(found, expected)


def test_each_task_begins_elsewhere_and_gates_are_shares() -> None:
    algorithm, batch = learner()
    starts = [algorithm.begin(batch.support_x[t], batch.support_y[t])[0] for t in range(3)]
    own = dict(algorithm.named_parameters())
    assert set(starts[0]) == {name for name in own if name.startswith(("backbone.", "head."))}
    for name, value in starts[0].items():
        nonzero = own[name] != 0
        gate = (value / own[name])[nonzero]
        assert ((gate > 0) & (gate < 1)).all()
        if nonzero.any():
            assert not torch.equal(value, starts[1][name])


def test_the_embedding_learns_to_give_back_the_task() -> None:
    algorithm, batch = learner()
    optimizer = torch.optim.Adam(algorithm.parameters(), 0.01)
    errors = []
    for _ in range(60):
        error = torch.stack([algorithm.represent(batch.support_x[t], batch.support_y[t])[1] for t in range(3)]).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]


def test_the_embedding_reads_the_labels_of_images() -> None:
    config = compose("algo=hsml", "backbone=mlp", "backbone.hidden=[16]", "backbone.init_std=null", "task.queries=2")
    algorithm = build(config, IMAGES)
    batch = episodes(IMAGES, TaskShape(5, 1, 2), 1)
    y = batch.support_y[0]
    one, other = (algorithm.represent(batch.support_x[0], labels)[0] for labels in (y, y.flip(0)))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("word", ["algo.leaves=0", "algo.nodes=0", "algo.spread=0", "algo.embedding=0"])
def test_sizes_must_be_positive(word: str) -> None:
    with pytest.raises(UserError, match=r"must be (above 0|at least 1)$"):
        learner(word)


# The mixed functions


def powers(x: Tensor, highest: int) -> np.ndarray:
    return np.stack([x.double().numpy() ** power for power in range(highest, -1, -1)], axis=-1)


@pytest.mark.parametrize("family", ["line", "quadratic", "cubic"])
def test_polynomials_have_their_coefficients_in_range(family: str) -> None:
    ranges = np.array(FAMILIES[family])
    batch = Mixed(families=[family]).sampler("train", FUNCTIONS, 0, CPU)(0, 400)
    found = []
    for x, y in zip(batch.query_x[..., 0], batch.query_y[..., 0], strict=True):
        curves = powers(x, len(ranges) - 1)
        coefficients = np.linalg.lstsq(curves, y.double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(curves @ coefficients, y, atol=1e-4)
        found.append(coefficients)
    low, high = np.min(found, axis=0), np.max(found, axis=0)
    width = ranges[:, 1] - ranges[:, 0]
    assert (low > ranges[:, 0] - 0.01 * width).all()
    assert (high < ranges[:, 1] + 0.01 * width).all()
    assert (high - low > 0.9 * width).all()


def test_sinusoids_stay_in_their_band() -> None:
    batch = Mixed(families=["sinusoid"]).sampler("train", FUNCTIONS, 0, CPU)(0, 400)
    assert batch.query_y.min() > -5
    assert batch.query_y.max() < 5 + 2 * np.pi
    assert batch.query_y.mean().item() == pytest.approx(np.pi, abs=0.3)


def test_each_family_has_its_share_and_tasks_are_pure() -> None:
    draw = Mixed().sampler("train", FUNCTIONS, 0, CPU)
    batch = draw(0, 1200)
    fits = []
    for highest in (1, 2, 3):  # a line is a quadratic function, too
        errors = []
        for x, y in zip(batch.query_x[..., 0], batch.query_y[..., 0], strict=True):
            curves = powers(x, highest)
            errors.append(np.abs(curves @ np.linalg.lstsq(curves, y.double().numpy(), rcond=None)[0] - y.numpy()).max())
        fits.append(np.mean(np.array(errors) < 1e-4))
    assert fits == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
    assert torch.equal(draw(500, 510).query_y, batch.query_y[500:510])


def test_unknown_families_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.families=cubik: is not one of .*did you mean cubic"):
        Mixed(families=["cubik"])
    with pytest.raises(UserError, match="must have at least 1 value"):
        Mixed(families=[])
