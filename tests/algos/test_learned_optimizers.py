"""Learned optimisers against plain loops of their equations: the LSTM meta-learner, and L2L."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from helpers import build, compose, toy_images
from torch import Tensor, nn

from metarun.algos.l2l import L2L, LearnedOptimizer
from metarun.algos.lstmlearner import CoordinateLSTM, LSTMMetaLearner, preprocess
from metarun.algos.maml import MAML
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Episodes, Spec
from metarun.errors import UserError

Method = TypeVar("Method", bound=Algorithm)

BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
SHAPE = (1, 4, 4)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(kind: type[Method], vectorize: bool = False, norm: str = "none", **settings: object) -> Method:
    """On a small network in double precision; the learned optimiser's weights are far from zero."""
    torch.manual_seed(1)
    backbone = MLP(input_shape=SHAPE, hidden=[3], norm=norm, init_std=None)
    algorithm = kind(backbone, Spec(SHAPE, "classification", 3), **settings).double()
    torch.manual_seed(2)
    for name, parameter in algorithm.named_parameters():
        if name.split(".")[0] in ("head", "lstm", "gates", "optimizer"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    algorithm.vectorize = vectorize
    return algorithm.train()


def batch_of(tasks: int = 2, ways: int = 3) -> Episodes:
    """Tasks of two shots and two queries, of noise."""
    generator = torch.Generator().manual_seed(3)
    sets = [torch.rand(tasks, 2 * ways, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = torch.arange(ways).repeat_interleave(2).expand(tasks, -1)
    return Episodes(sets[0], labels, sets[1], labels, ways)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def same_gradients(one: Tensor, other: Tensor, algorithm: Algorithm) -> None:
    """Two losses, and their derivatives for everything that the method trains."""
    close(one, other)
    trained = [value for value in algorithm.parameters() if value.requires_grad]
    for found, expected in zip(torch.autograd.grad(one, trained), torch.autograd.grad(other, trained), strict=True):
        assert expected.abs().max() > 0
        close(found, expected)


def in_parts(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = [value.numel() for value in like.values()]
    return {name: part.reshape(like[name].shape) for name, part in zip(like, flat.split(sizes), strict=True)}


def loss_at(algorithm: Algorithm, flat: Tensor, like: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(algorithm, in_parts(flat, like), (x,)), y)


def slope_at(algorithm: Algorithm, flat: Tensor, like: dict[str, Tensor], x: Tensor, y: Tensor, **more: bool) -> Tensor:
    """The gradient at `flat`, through which nothing is differentiated (but with `create_graph`)."""
    at = flat if more else flat.detach().requires_grad_()
    return torch.autograd.grad(loss_at(algorithm, at, like, x, y), at, **more)[0]


def as_features(values: Tensor) -> Tensor:
    """The two numbers of each value, `[n, 2]`, as the paper has them."""
    found = []
    for value in values.tolist():
        if abs(value) >= math.exp(-10):
            found.append([math.log(abs(value)) / 10, math.copysign(1, value)])
        else:
            found.append([-1, math.exp(10) * value])
    return torch.tensor(found, dtype=values.dtype)


def torch_cell(cell: CoordinateLSTM, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The step of torch's own LSTM cell on rows `[n, inputs]`, with the weights of `cell`; differentiable in them."""
    size, inputs = cell.hidden, x.shape[1]
    # Input, forget, candidate, output.
    order = torch.cat([torch.arange(size * k, size * (k + 1)) for k in (0, 1, 3, 2)])
    weight, bias = cell.gates.weight[order], cell.gates.bias[order]
    weights = {
        "weight_ih": weight[:, :inputs], "weight_hh": weight[:, inputs:], "bias_ih": bias, "bias_hh": torch.zeros_like(bias)
    }  # fmt: skip
    return torch.func.functional_call(nn.LSTMCell(inputs, size, dtype=x.dtype), weights, (x, state))


# What both share.


def test_preprocessing_is_the_papers() -> None:
    """Above and below e^-p, at it, and where float32 has no log."""
    border = math.exp(-10)
    values = torch.tensor([3.0, -0.5, 1.001 * border, -0.999 * border, 1e-30, -1e-300, 0.0], dtype=torch.float64)
    close(preprocess(values), as_features(values).T)
    assert preprocess(torch.tensor([0.0, 1e-40, 1e30])).isfinite().all()
    close(preprocess(values.new_tensor([border, -border])), values.new_tensor([[-1, -1], [1, -1]]))


def test_cell_is_torchs_lstm_cell() -> None:
    cell, x = CoordinateLSTM(4, 5).double(), torch.randn(3, 4, 7, dtype=torch.float64)
    mine, theirs = None, None
    for step in x:
        mine, theirs = cell(step, mine), torch_cell(cell, step.T, theirs)
        for one, other in zip(mine, theirs, strict=True):
            close(one.T, other)


# The LSTM meta-learner.


def meta_learner_by_hand(algorithm: LSTMMetaLearner, batch: Episodes, steps: int) -> Tensor:
    """The queries' loss after `steps` steps of the paper's equations, a loop over tasks and steps."""
    like = {name: value for name, value in algorithm.named_parameters() if name.startswith(("backbone", "head"))}
    (forget_row, input_row), (forget_bias, input_bias) = algorithm.gates.weight, algorithm.gates.bias
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        theta = torch.cat([value.reshape(-1) for value in like.values()])
        forget = rate = torch.zeros_like(theta)
        state = None
        for _ in range(steps):
            gradient = slope_at(algorithm, theta, like, support_x, support_y)
            loss = loss_at(algorithm, theta, like, support_x, support_y).detach()
            features = torch.cat([as_features(gradient), as_features(loss[None]).expand(len(theta), 2)], dim=1)
            state = torch_cell(algorithm.lstm, features, state)
            forget = torch.sigmoid(torch.cat([state[0], theta[:, None], forget[:, None]], 1) @ forget_row + forget_bias)
            rate = torch.sigmoid(torch.cat([state[0], theta[:, None], rate[:, None]], 1) @ input_row + input_bias)
            theta = forget * theta - rate * gradient
        losses.append(loss_at(algorithm, theta, like, query_x, query_y))
    return torch.stack(losses).mean()


@BOTH
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_learner_is_its_equations(steps: int, vectorize: bool) -> None:
    """The loss, and its gradient for the initial cell state, the LSTM and the gates."""
    algorithm = tiny(LSTMMetaLearner, vectorize, inner_steps=steps, hidden=4, forget_bias=1.0, input_bias=0.0)
    same_gradients(algorithm.loss(batch_of(), 0)[0], meta_learner_by_hand(algorithm, batch_of(), steps), algorithm)


@BOTH
def test_meta_learner_of_constant_gates_is_gradient_descent(vectorize: bool) -> None:
    """A forget gate of 1 and an input gate of alpha are first-order MAML at rate alpha, in its meta-gradient too."""
    alpha = 0.4
    settings = {"inner_steps": 3, "test_inner_steps": 5}
    bias = {"forget_bias": 1000.0, "input_bias": math.log(alpha / (1 - alpha))}
    algorithm = tiny(LSTMMetaLearner, vectorize, norm="batch", **settings, **bias)
    maml = tiny(MAML, vectorize, norm="batch", **settings, inner_lr=alpha, first_order=True)
    algorithm.gates.weight.data.zero_()
    algorithm.gates.bias.data = torch.tensor(list(bias.values()), dtype=torch.float64)
    maml.load_state_dict({name: value for name, value in algorithm.state_dict().items() if name in maml.state_dict()})
    batch = batch_of()
    losses = [method.loss(batch, 0)[0] for method in (algorithm, maml)]
    close(*losses)
    for loss in losses:
        loss.backward()
    mine = dict(algorithm.named_parameters())
    for name, value in maml.named_parameters():
        close(mine[name].grad, value.grad)
    steps = [0, 1, 5]
    after = algorithm.eval().predict_after(batch, steps)
    close(after, maml.eval().predict_after(batch, steps))
    assert (after[2] - after[0]).abs().max() > 0.1


def test_meta_learner_starts_near_gradient_descent() -> None:
    """As the paper wants it: forget gates near 1, a small rate, and hardly anything yet that depends on a coordinate."""
    algorithm = build(compose("algo=lstmlearner", "backbone.channels=4"), toy_images())
    assert isinstance(algorithm, LSTMMetaLearner)
    assert algorithm.gates.bias.sigmoid().tolist() == pytest.approx([0.989, 0.011], abs=5e-4)
    assert max(value.abs().max() for value in (algorithm.gates.weight, *algorithm.lstm.parameters())) <= 0.01
    assert not algorithm.transductive


# L2L.


def l2l_by_hand(algorithm: L2L, batch: Episodes, first: int, last: int, on: str = "support", **more: bool) -> Tensor:
    """The sum of the losses after the updates first + 1 to last, in the graph of these alone: a loop."""
    start, like = algorithm.draw(batch)
    m, totals = algorithm.optimizer, []
    for task, theta in enumerate(start):
        x, y = batch.support_x[task], batch.support_y[task]
        outer = (x, y) if on == "support" else (batch.query_x[task], batch.query_y[task])
        states, total = [None, None], torch.zeros(())
        for step in range(last):
            if step == first:
                theta = theta.detach().requires_grad_()
                states = [state and tuple(part.detach() for part in state) for state in states]
            gradient = slope_at(algorithm, theta, like, x, y, **more)
            states[0] = torch_cell(m.layers[0], preprocess(gradient).T if more else as_features(gradient), states[0])
            states[1] = torch_cell(m.layers[1], states[0][0], states[1])
            theta = theta + m.scale * (states[1][0] @ m.output.weight[0] + m.output.bias)
            if step >= first:
                total = total + loss_at(algorithm, theta, like, *outer)
        totals.append(total)
    return torch.stack(totals).mean()


@BOTH
@pytest.mark.parametrize("objective", ["support", "query"])
def test_l2l_is_the_sum_of_losses_along_the_trajectory(objective: str, vectorize: bool) -> None:
    """With its meta-gradient, of a graph that no gradient of the optimisee is part of."""
    algorithm = tiny(L2L, vectorize, inner_steps=4, hidden=5, objective=objective)
    same_gradients(algorithm.loss(batch_of(), 0)[0], l2l_by_hand(algorithm, batch_of(), 0, 4, objective), algorithm)


def test_l2l_drops_second_derivatives() -> None:
    """A loop that keeps them has the same loss and another gradient."""
    algorithm = tiny(L2L, inner_steps=4, hidden=5, output_scale=2.0)
    losses = [algorithm.loss(batch_of(), 0)[0], l2l_by_hand(algorithm, batch_of(), 0, 4, create_graph=True)]
    close(*losses)
    one, other = (torch.autograd.grad(loss, algorithm.optimizer.layers[0].gates.weight)[0] for loss in losses)
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@BOTH
def test_l2l_backpropagates_through_one_segment_a_step(vectorize: bool) -> None:
    """Training step k has segment k, modulo their number; the last of seven updates is a segment of its own."""
    algorithm = tiny(L2L, vectorize, inner_steps=7, unroll=3, hidden=5)
    for step, (first, last) in enumerate([(0, 3), (3, 6), (6, 7), (0, 3)]):
        loss = algorithm.loss(batch_of(), step)[0]
        same_gradients(loss, l2l_by_hand(algorithm, batch_of(), first, last), algorithm)


def test_all_coordinates_share_the_optimiser() -> None:
    """Coordinates in another order have the same updates in that order, step after step."""
    optimizer, gradients = LearnedOptimizer(5, 1.0).double(), torch.randn(3, 11, dtype=torch.float64)
    order = torch.randperm(11)
    straight, shuffled = (None, None), (None, None)
    updates = []
    for gradient in gradients:
        update, straight = optimizer(gradient, straight)
        other, shuffled = optimizer(gradient[order], shuffled)
        close(other, update[order])
        updates.append(update)
    assert updates[0].std() > 1e-4  # it is not that all are alike
    again, _ = optimizer(gradients[0], straight)
    assert (again - updates[0]).abs().max() > 1e-4  # nor that only the gradient counts
    double = LearnedOptimizer(5, 2.0).double()
    double.load_state_dict(optimizer.state_dict())
    close(double(gradients[0], (None, None))[0], 2 * updates[0])


def test_forget_gates_begin_with_a_bias_of_one() -> None:
    optimizer = LearnedOptimizer(50, 0.1)
    for layer in optimizer.layers:
        write, forget, show, candidate = layer.gates.bias.detach().view(4, 50).mean(1).tolist()
        assert forget == pytest.approx(1, abs=0.15)
        assert max(map(abs, (write, show, candidate))) < 0.15


def test_a_tasks_random_weights_are_its_own() -> None:
    """The same in any batch and at any time, others in another task; spread as the backbone's own, its constants kept."""
    algorithm = build(compose("algo=l2l", "backbone.channels=16"), toy_images())
    assert isinstance(algorithm, L2L)
    images = torch.rand(40, 5, 1, 16, 16)
    batch = Episodes(images, torch.arange(5).expand(40, 5), images, torch.arange(5).expand(40, 5), 5)
    drawn, like = algorithm.draw(batch)
    torch.manual_seed(9)
    for number, part in enumerate(batch.split(3)):
        assert torch.equal(algorithm.draw(part)[0], drawn[3 * number : 3 * number + 3])
    own = dict(algorithm.named_parameters())
    tasks = [in_parts(flat, like) for flat in drawn]
    for name in like:
        values = torch.stack([task[name] for task in tasks])
        if own[name].std() > 0 and own[name].numel() > 1:
            assert values.std() == pytest.approx(own[name].std().item(), rel=0.1)
            assert values.flatten(1).unique(dim=0).shape[0] == 40
        else:
            assert torch.equal(values, own[name].expand_as(values))
        assert not own[name].requires_grad
    assert {name.split(".")[0] for name, value in own.items() if value.requires_grad} == {"optimizer"}


def test_any_number_of_ways() -> None:
    algorithm = tiny(L2L, inner_steps=2).eval()
    for ways in (2, 3, 6):
        assert algorithm.predict(batch_of(ways=ways)).shape == (2, 2 * ways, ways)
        assert algorithm.measures(batch_of(ways=ways))["loss_learned"].shape == (2, 3)


@BOTH
def test_curves_are_those_of_torchs_optimisers_on_the_same_optimisee(vectorize: bool) -> None:
    rates = {"sgd": 0.5, "adam": 0.1, "rmsprop": 0.05}
    algorithm, batch = (
        tiny(L2L, vectorize, norm="batch", inner_steps=3, test_inner_steps=6, rates=rates).eval(),
        batch_of(),
    )
    curves = algorithm.measures(batch)
    assert curves.keys() == {"loss_learned", "loss_sgd", "loss_adam", "loss_rmsprop"}
    start, like = algorithm.draw(batch)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    for name, rate in rates.items():
        for task, flat in enumerate(start):
            network = copy.deepcopy(algorithm).requires_grad_()
            network.load_state_dict({**network.state_dict(), **in_parts(flat, like)})
            descent = kinds[name]([*network.backbone.parameters(), *network.head.parameters()], lr=rate)
            losses = []
            for _ in range(7):
                descent.zero_grad()
                loss = F.cross_entropy(network(batch.support_x[task]), batch.support_y[task])
                loss.backward()
                descent.step()
                losses.append(loss.detach())
            close(curves[f"loss_{name}"][task], torch.stack(losses))
    assert all(torch.equal(curve[:, 0], curves["loss_learned"][:, 0]) for curve in curves.values())
    assert all(not curve.requires_grad and curve.shape == (2, 7) for curve in curves.values())
    as_queries = Episodes(batch.support_x, batch.support_y, batch.support_x, batch.support_y, 3)
    for step, logits in enumerate(algorithm.predict_after(as_queries, range(7))):
        for task in range(2):
            close(curves["loss_learned"][task, step], F.cross_entropy(logits[task], batch.support_y[task]))


def test_no_rates_no_comparison() -> None:
    assert tiny(L2L, inner_steps=2).measures(batch_of()).keys() == {"loss_learned"}


def test_the_papers_network_has_sigmoids() -> None:
    words = ["backbone=mlp", "backbone.hidden=[20]", "algo.activation=sigmoid"]
    algorithm, images = build(compose("algo=l2l", *words), toy_images()), torch.rand(5, 1, 16, 16)
    assert isinstance(algorithm, L2L)
    (layer,) = algorithm.backbone.layers
    expected = algorithm.head(torch.sigmoid(layer(images.flatten(1))))
    torch.testing.assert_close(algorithm(images), expected)


@pytest.mark.parametrize("kind", [L2L, LSTMMetaLearner])
def test_settings_out_of_range_are_named(kind: type[Algorithm]) -> None:
    for key in ("inner_steps", "hidden"):
        with pytest.raises(UserError, match=rf"^algo.{key}=0: must be at least 1$"):
            tiny(kind, **{key: 0})


def test_averages_over_other_networks_are_refused() -> None:
    backbone = Conv4(input_shape=(1, 16, 16), channels=2, norm="running")
    with pytest.raises(UserError, match=r"^backbone.norm=running: averages over other random networks"):
        L2L(backbone, Spec((1, 16, 16), "classification", 3))


def test_optimisers_that_are_not_known_are_named() -> None:
    with pytest.raises(UserError, match=r"^algo.rates.adm: is not one of sgd, adam, rmsprop; did you mean adam\?$"):
        tiny(L2L, rates={"adm": 0.1})
