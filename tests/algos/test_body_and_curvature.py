"""BOIL, Proto-MAML and Meta-Curvature: MAML with another part that moves, another start, another direction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import double, episodes, toy_images
from learners import MeanOfWords, texts
from torch import Tensor

from metarun.algos.boil import BOIL
from metarun.algos.maml import MAML
from metarun.algos.metacurvature import MetaCurvature, curved, identities
from metarun.algos.protomaml import ProtoMAML
from metarun.algos.protonet import ProtoNet
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.data.regression import Sinusoid
from metarun.errors import UserError

SEPARABLE = toy_images()
RATE = 0.25
BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
FIRST_ORDER = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
STEPS = pytest.mark.parametrize("inner_steps", [1, 3])


def small_backbone(norm: str) -> Backbone:
    return Conv4(input_shape=(1, 16, 16), channels=4, norm=norm)


def tiny(kind: Any, norm: str = "batch", vectorize: bool = False, **settings: float) -> Any:
    """In double precision, with weights that are the same for every method: away from zero biases and unit scales."""
    torch.manual_seed(1)
    spec = Spec((1, 16, 16), "classification", 3)
    algorithm = kind(small_backbone(norm), spec, **settings).double()
    torch.manual_seed(2)
    for name, parameter in algorithm.named_parameters():
        if not name.startswith("curvature."):
            parameter.data = 0.3 * torch.randn_like(parameter) + (name.endswith("norm.weight"))
    algorithm.vectorize = vectorize
    return algorithm.train()


def batch_of(tasks: int = 2, ways: int = 3) -> Episodes:
    return double(episodes(SEPARABLE, TaskShape(ways, 2, 2), tasks))


def slope(loss: Tensor, algorithm: Algorithm) -> dict[str, Tensor]:
    """The gradient by name; zero for what the loss does not depend on, as a bias before a norm."""
    values = dict(algorithm.named_parameters())
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(values, found, strict=True))


def outcome(algorithm: Algorithm, batch: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradient by name."""
    loss, _ = algorithm.loss(batch, 0)
    return loss.detach(), slope(loss, algorithm)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def by_hand(algorithm: Any, x: Tensor, body: dict[str, Tensor]) -> Tensor:
    """The features of `x` with other weights in the backbone."""
    return torch.func.functional_call(algorithm.backbone, body, (x,))


# BOIL


@BOTH
@FIRST_ORDER
def test_only_the_body_adapts(first_order: bool, vectorize: bool) -> None:
    """Predictions are those of torch's SGD on the body alone, with the head as it was before."""
    algorithm, batch = tiny(BOIL, vectorize=vectorize, inner_lr=RATE, first_order=first_order).eval(), batch_of()
    after = algorithm.predict_after(batch, [0, 1, 3])
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        fast = copy.deepcopy(algorithm)
        descent = torch.optim.SGD(fast.backbone.parameters(), lr=RATE)
        for step in range(4):
            if step in (0, 1, 3):
                close(after[(0, 1, 3).index(step), task], fast(query_x).detach())
            descent.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            descent.step()
    assert (after[2] - after[0]).abs().max() > 0.01


@pytest.mark.parametrize("recompute", [False, True])
def test_the_head_is_unchanged_and_the_body_moves(recompute: bool) -> None:
    algorithm, batch = tiny(BOIL, inner_lr=RATE, recompute=recompute), batch_of()
    start, end = algorithm.adapt(batch.support_x[0], batch.support_y[0], [0, 3])
    assert start.keys() == end.keys() == dict(algorithm.named_parameters()).keys()
    for name, value in algorithm.named_parameters():
        assert torch.equal(start[name], value)
        if name.startswith("head."):
            assert torch.equal(end[name], value)
        elif not name.endswith("conv.bias"):  # which a norm takes away again
            assert (end[name] - value).abs().max() > 1e-3


@STEPS
@FIRST_ORDER
@pytest.mark.parametrize("form", ["loop", "vmap", "recompute"])
def test_boils_meta_gradient_by_plain_autograd(inner_steps: int, first_order: bool, form: str) -> None:
    """The head learns in the outer loop: as what classifies the queries, and as what the body moved for."""
    settings = {"inner_steps": inner_steps, "first_order": first_order, "recompute": form == "recompute"}
    algorithm, batch = tiny(BOIL, vectorize=form == "vmap", inner_lr=RATE, **settings), batch_of()
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        body = dict(algorithm.backbone.named_parameters())
        for _ in range(inner_steps):
            inner = F.cross_entropy(algorithm.head(by_hand(algorithm, support_x, body)), support_y)
            found = torch.autograd.grad(inner, list(body.values()), create_graph=True)
            found = [value.detach() for value in found] if first_order else found
            body = {name: value - RATE * step for (name, value), step in zip(body.items(), found, strict=True)}
        losses.append(F.cross_entropy(algorithm.head(by_hand(algorithm, query_x, body)), query_y))
    expected = torch.stack(losses).mean()
    loss, found = outcome(algorithm, batch)
    close(loss, expected.detach())
    for name, value in slope(expected, algorithm).items():
        close(found[name], value)
    assert found["head.weight"].abs().max() > 1e-3


def test_boils_head_starts_as_torchs_linear_layers_do() -> None:
    """Uniform up to one over the root of its inputs, hence a head that moves the body in the first step."""
    weight = BOIL(Conv4(input_shape=(1, 28, 28)), Spec((1, 28, 28), "classification", 20)).head.weight
    assert 0.9 / 8 < weight.abs().max() <= 1 / 8
    assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@BOTH
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_the_test_without_the_head(norm: str, vectorize: bool) -> None:
    """By loops: the class mean of the largest cosine, with the features before and after the inner steps."""
    algorithm, batch = tiny(BOIL, norm, vectorize, inner_lr=RATE, test_inner_steps=2).eval(), batch_of(4)
    found = algorithm.measures(batch)
    assert found.keys() == {"nil_acc_before", "nil_acc_after"}
    for name, steps in (("nil_acc_before", 0), ("nil_acc_after", 2)):
        for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*batch.tensors, strict=True)):
            (params,) = algorithm.adapt(support_x, support_y, [steps])
            fast = copy.deepcopy(algorithm)
            fast.load_state_dict(params)
            if norm == "batch":
                support, queries = fast.backbone(support_x), fast.backbone(query_x)
            else:
                support, queries = fast.backbone(torch.cat([support_x, query_x]), 6).split(6)
            means = torch.stack([support[support_y == way].mean(0) for way in range(3)])
            nearest = F.cosine_similarity(queries[:, None], means[None], dim=-1).argmax(1)
            assert found[name][task].item() == pytest.approx((nearest == query_y).double().mean().item())
    # The head plays no part in it: neither its weights nor (before any step) what it would make of the body.
    algorithm.head.weight.data *= -1
    assert torch.equal(algorithm.measures(batch)["nil_acc_before"], found["nil_acc_before"])


def test_the_test_without_the_head_counts_no_answer_as_wrong() -> None:
    """As the accuracy does."""
    algorithm, batch = tiny(BOIL, inner_lr=RATE).eval(), batch_of()
    batch.support_x[0] = torch.nan
    assert [found[0].item() for found in algorithm.measures(batch).values()] == [0, 0]


def test_the_test_without_the_head_reads_texts() -> None:
    """Whose items are whole numbers; a text is nearest to itself."""
    algorithm = BOIL(MeanOfWords(), MeanOfWords.spec, inner_lr=RATE).eval()
    assert all((found == 1).all() for found in algorithm.measures(texts()).values())


def test_boil_measures_nothing_of_regression() -> None:
    source = Sinusoid()
    algorithm = BOIL(MLP(input_shape=(1,)), Spec((1,), "regression", 1))
    assert algorithm.measures(episodes(source, TaskShape(1, 5, 5), 2)) == {}


# Proto-MAML


@BOTH
@pytest.mark.parametrize("norm", ["support", "running", "group", "none"])
@pytest.mark.parametrize("ways", [2, 5])
def test_without_inner_steps_protomaml_is_protonet(ways: int, norm: str, vectorize: bool) -> None:
    """The logits but for a number a query, so the same loss and the same gradient, through the prototypes."""
    vectorize = vectorize and norm != "running"
    proto, batch = tiny(ProtoNet, norm), batch_of(ways=ways)
    algorithm = tiny(ProtoMAML, norm, vectorize, inner_steps=0)
    if norm == "running":  # while training, the two take statistics of other sets
        proto.eval()
        algorithm.eval()
    difference = algorithm.predict(batch) - proto.predict(batch)
    close(difference, difference[..., :1].expand_as(difference))
    assert difference.abs().max() > 0.1
    (loss, found), (expected_loss, expected) = outcome(algorithm, batch), outcome(proto, batch)
    close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value)


@BOTH
def test_the_head_starts_from_the_prototypes(vectorize: bool) -> None:
    algorithm, batch = tiny(ProtoMAML, vectorize=vectorize), batch_of()
    start = algorithm.over_tasks(
        lambda *task: {k: v for k, v in algorithm.start(*task, 3).items() if "." not in k},
        *batch.tensors[:2],
    )
    assert start.keys() == {"weight", "bias"}
    for task, (x, y) in enumerate(zip(batch.support_x, batch.support_y, strict=True)):
        features = algorithm.backbone(x)
        for way in range(3):
            prototype = features[y == way].mean(0)
            close(start["weight"][task, way], 2 * prototype)
            close(start["bias"][task, way], -prototype @ prototype)


@STEPS
@FIRST_ORDER
@pytest.mark.parametrize("form", ["loop", "vmap", "recompute"])
def test_protomamls_meta_gradient_by_plain_autograd(inner_steps: int, first_order: bool, form: str) -> None:
    """Prototypes are differentiated in the outer loop alone: in the inner loop the head does not depend on the body."""
    settings = {"inner_steps": inner_steps, "first_order": first_order, "recompute": form == "recompute"}
    algorithm, batch = tiny(ProtoMAML, vectorize=form == "vmap", inner_lr=RATE, **settings), batch_of()
    losses = {True: [], False: []}
    for through in losses:
        for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
            params = {name: 1.0 * value for name, value in algorithm.backbone.named_parameters()}
            names, features = list(params), algorithm.backbone(support_x)
            means = torch.stack([features[support_y == way].mean(0) for way in range(3)])
            means = means if through else means.detach().requires_grad_()
            values = [*params.values(), 2 * means, -(means**2).sum(1)]

            def logits(x: Tensor, values: list[Tensor], names: list[str] = names) -> Tensor:
                *body, weight, bias = values
                return by_hand(algorithm, x, dict(zip(names, body, strict=True))) @ weight.T + bias

            for _ in range(inner_steps):
                inner = F.cross_entropy(logits(support_x, values), support_y)
                found = torch.autograd.grad(inner, values, create_graph=True)
                found = [value.detach() for value in found] if first_order else found
                values = [value - RATE * step for value, step in zip(values, found, strict=True)]
            losses[through].append(F.cross_entropy(logits(query_x, values), query_y))
    expected, blocked = (torch.stack(losses[through]).mean() for through in (True, False))
    loss, found = outcome(algorithm, batch)
    close(loss, expected.detach())
    for name, value in slope(expected, algorithm).items():
        close(found[name], value)
    name = "backbone.blocks.0.conv.weight"
    assert (slope(blocked, algorithm)[name] - found[name]).abs().max() > 1e-3


def test_protomaml_moves_body_and_head() -> None:
    algorithm, batch = tiny(ProtoMAML, inner_lr=RATE), batch_of()
    start, end = algorithm.adapt(batch.support_x[0], batch.support_y[0], 3, [0, 2])
    moved = {name for name, value in start.items() if (end[name] - value).abs().max() > 1e-4}
    assert moved >= {name for name in start if not name.endswith("conv.bias")}
    losses = [F.cross_entropy(algorithm.logits_of(p, batch.support_x[0]), batch.support_y[0]) for p in (start, end)]
    assert losses[1] < losses[0]


def test_protomaml_cannot_recompute_with_running_averages() -> None:
    with pytest.raises(UserError, match=r"^algo.recompute=true: .*backbone.norm=running$"):
        tiny(ProtoMAML, "running", recompute=True)


# Meta-Curvature


def bent(algorithm: MetaCurvature) -> MetaCurvature:
    """With curvatures that are not the identity."""
    torch.manual_seed(3)
    for value in algorithm.curvature.parameters():
        value.data += 0.3 * torch.randn_like(value) / len(value) ** 0.5
    return algorithm


@pytest.mark.parametrize(
    ("shape", "sizes"), [((4, 3, 2, 3), (4, 3, 6)), ((4, 3, 1, 1), (4, 3, 1)), ((4, 5), (4, 5)), ((6,), (6,))]
)
def test_the_transform_is_a_kronecker_product(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """On the flattened gradient, in the order of its axes."""
    weight = torch.randn(shape, dtype=torch.float64)
    factors = identities(weight)
    assert torch.equal(curved(weight, factors), weight)
    assert [tuple(factor.shape) for factor in factors] == [(size,) * min(len(shape), 2) for size in sizes]
    factors = [torch.randn_like(factor) for factor in factors]
    whole = factors[0].diag() if len(shape) == 1 else factors[0]
    for factor in factors[1:]:
        whole = torch.kron(whole, factor)
    close(curved(weight, factors).flatten(), whole @ weight.flatten())


def test_a_parameter_that_is_one_number_has_a_factor() -> None:
    (factor,) = identities(torch.tensor(3.0))
    assert factor.item() == 1
    assert curved(torch.tensor(3.0), [torch.tensor(2.0)]).item() == 6


@BOTH
@FIRST_ORDER
@STEPS
def test_with_identities_it_is_maml(inner_steps: int, first_order: bool, vectorize: bool) -> None:
    """Loss, gradient of the weights, and predictions; with other matrices none of them."""
    settings = {"inner_steps": inner_steps, "inner_lr": RATE, "first_order": first_order}
    algorithm, maml = tiny(MetaCurvature, vectorize=vectorize, **settings), tiny(MAML, **settings)
    batch = batch_of()
    (loss, found), (expected_loss, expected) = outcome(algorithm, batch), outcome(maml, batch)
    close(loss, expected_loss)
    for name, value in expected.items():
        close(found[name], value)
    assert {name.split(".")[0] for name in found.keys() - expected.keys()} == {"curvature"}
    steps = [0, 1, 3]
    close(algorithm.eval().predict_after(batch, steps), maml.predict_after(batch, steps))
    assert (bent(algorithm).predict(batch) - maml.predict(batch)).abs().max() > 0.01


@BOTH
@FIRST_ORDER
@STEPS
def test_metacurvatures_meta_gradient_by_plain_autograd(inner_steps: int, first_order: bool, vectorize: bool) -> None:
    """With the full matrix of every layer, of weights and of curvatures alike."""
    settings = {"inner_steps": inner_steps, "inner_lr": RATE, "first_order": first_order}
    algorithm, batch = bent(tiny(MetaCurvature, vectorize=vectorize, **settings)), batch_of()
    names = [name for name, _ in algorithm.named_parameters() if not name.startswith("curvature.")]
    whole = {}
    for name in names:
        first, *others = algorithm.curvature[name.replace(".", "_")].parameters()
        whole[name] = first if others else first.diag()
        for factor in others:
            whole[name] = torch.kron(whole[name], factor)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        params = {name: algorithm.get_parameter(name) for name in names}
        for _ in range(inner_steps):
            inner = F.cross_entropy(torch.func.functional_call(algorithm, params, (support_x,)), support_y)
            found = torch.autograd.grad(inner, list(params.values()), create_graph=True)
            found = [value.detach() for value in found] if first_order else found
            params = {
                name: params[name] - RATE * (whole[name] @ step.flatten()).view_as(step)
                for name, step in zip(names, found, strict=True)
            }
        losses.append(F.cross_entropy(torch.func.functional_call(algorithm, params, (query_x,)), query_y))
    expected = torch.stack(losses).mean()
    loss, found = outcome(algorithm, batch)
    close(loss, expected.detach())
    for name, value in slope(expected, algorithm).items():
        close(found[name], value)
    assert all(
        value.abs().max() > 1e-6 for name, value in found.items() if "conv_bias" not in name and "conv.bias" not in name
    )


def test_metacurvature_in_first_order_asks_for_no_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = torch.autograd.grad

    def recorded(*args, create_graph: bool = False, **more) -> tuple[Tensor, ...]:
        asked.append(create_graph)
        return real(*args, create_graph=create_graph, **more)

    algorithms = [tiny(MetaCurvature, inner_steps=2, first_order=first_order) for first_order in (True, False)]
    monkeypatch.setattr(torch.autograd, "grad", recorded)
    for algorithm in algorithms:
        algorithm.loss(batch_of(1), 0)
    algorithms[1].predict(batch_of(1))
    assert asked == [False] * 2 + [True] * 2 + [False] * 2


def test_every_weight_has_a_curvature_that_is_trained() -> None:
    algorithm, batch = tiny(MetaCurvature), batch_of()
    weights = [name for name, _ in algorithm.named_parameters() if not name.startswith("curvature.")]
    assert set(algorithm.curvature) == {name.replace(".", "_") for name in weights}
    start = copy.deepcopy(algorithm.curvature.state_dict())
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.01)
    algorithm.loss(batch, 0)[0].backward()
    optimizer.step()
    for name, value in algorithm.curvature.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-3 or "conv_bias" in name


def test_settings_are_mamls() -> None:
    for kind in (BOIL, ProtoMAML, MetaCurvature):
        assert tiny(kind, inner_steps=3).test_steps == 3
        assert tiny(kind, inner_steps=3, test_inner_steps=10).test_steps == 10
        assert kind.recordable
    assert (BOIL.fixed_ways, ProtoMAML.fixed_ways, MetaCurvature.fixed_ways) == (True, False, True)
