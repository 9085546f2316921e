"""Meta Networks and conditional neural processes: two learners that predict without a gradient step of their own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, compose, double, episodes, toy_images, with_
from torch import Tensor

from metarun.algos.cnp import CNP, log_density
from metarun.algos.metanet import MetaNet, attention, meta_information, preprocessed
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Episodes, Spec, TaskShape
from metarun.data.regression import Sinusoid
from metarun.engine.hardware import Hardware
from metarun.engine.traced_step import TracedStep
from metarun.errors import UserError

SEPARABLE = toy_images()
IMAGES = Spec((1, 16, 16), "classification", 3)
CURVES = Spec((1,), "regression", 1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def conv4(norm: str = "none") -> Conv4:
    return Conv4(input_shape=(1, 16, 16), channels=4, norm=norm)


def metanet(norm: str = "none") -> MetaNet:
    return MetaNet(conv4(norm), IMAGES, hidden=6, meta_hidden=5).double()


def images(shots: int = 2, tasks: int = 2) -> Episodes:
    """The support set in any order."""
    batch = double(episodes(SEPARABLE, TaskShape(3, shots, 2), tasks))
    order = torch.randperm(3 * shots)
    return with_(batch, support_x=batch.support_x[:, order], support_y=batch.support_y[:, order])


def gradients(loss: Tensor, algorithm: Algorithm) -> dict[str, Tensor]:
    names, values = zip(*algorithm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


# Meta Networks


def by_hand(algorithm: MetaNet, batch: Episodes, task: int) -> Tensor:
    """Algorithm 1 for one task, example after example and weight after weight, its gradients from autograd."""
    support, labels, queries = (algorithm.backbone(batch.support_x[task]), batch.support_y[task], batch.query_x[task])
    queries = algorithm.backbone(queries)

    def grads(rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        weights = [first.detach().clone().requires_grad_(), second.detach().clone().requires_grad_()]
        loss = F.cross_entropy(F.relu(support[rows].detach() @ weights[0].T) @ weights[1].T, labels[rows])
        return torch.autograd.grad(loss, weights)

    def coordinates(gradient: Tensor) -> Tensor:
        value = gradient.reshape(-1, 1)
        log = torch.log(value.abs() + torch.finfo(torch.float64).eps) / 7
        return torch.cat([torch.maximum(log, torch.tensor(-1.0)), torch.clamp(value * math.e**7, -1, 1)], dim=1)

    state = (
        torch.zeros(algorithm.key.weight.numel(), 5).double(),
        torch.zeros(algorithm.key.weight.numel(), 5).double(),
    )
    for way in range(3):
        gradient, _ = grads((labels == way).nonzero()[:, 0], algorithm.key.weight, algorithm.key_second)
        state = algorithm.d(coordinates(gradient), state)
    fast_key = algorithm.d_output(state[0]).view_as(algorithm.key.weight)
    slots, keys = [], []
    for example in range(len(labels)):
        pair = grads(torch.tensor([example]), algorithm.first.weight, algorithm.second.weight)
        slots.append([algorithm.m(coordinates(gradient)).view_as(gradient) for gradient in pair])
        keys.append((algorithm.key.weight + fast_key) @ support[example])
    logits = []
    for x in queries:
        key = (algorithm.key.weight + fast_key) @ x
        cosines = [key @ other / torch.sqrt(key @ key * (other @ other) + 1e-6) for other in keys]
        read = torch.stack(cosines).exp() / torch.stack(cosines).exp().sum()
        first, second = (sum(a * slot[i] for a, slot in zip(read, slots, strict=True)) for i in (0, 1))
        inner = F.relu(algorithm.first.weight @ x) + F.relu(first @ x)
        logits.append(algorithm.second.weight @ inner + second @ inner)
    return torch.stack(logits)


@pytest.mark.parametrize("shots", [1, 2])
def test_metanet_is_algorithm_1(shots: int) -> None:
    """Predictions, and the gradient of every slow weight with the meta information held constant."""
    algorithm, batch = metanet(), images(shots)
    expected = torch.stack([by_hand(algorithm, batch, task) for task in range(2)])
    close(algorithm.predict(batch), expected)
    loss, logs = algorithm.loss(batch, 0)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), batch.query_y.flatten())
    close(loss, expected_loss)
    assert logs["acc"].item() == pytest.approx((expected.argmax(-1) == batch.query_y).double().mean().item())
    found, wanted = gradients(loss, algorithm), gradients(expected_loss, algorithm)
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        close(found[name], value)


def test_meta_information_is_the_gradient_of_each_examples_loss() -> None:
    features, labels = torch.rand(2, 4, 7).double().requires_grad_(), torch.randint(3, (2, 4))
    first, second = (torch.randn(shape).double().requires_grad_() for shape in ((6, 7), (3, 6)))
    found = meta_information(features, labels, first, second)
    for task in range(2):
        for example in range(4):
            logits = F.relu(features[task, example] @ first.T) @ second.T
            expected = torch.autograd.grad(F.cross_entropy(logits, labels[task, example]), [first, second])
            for one, other in zip(found, expected, strict=True):
                assert not one.requires_grad
                close(one[task, example], other)


def test_gradients_enter_by_size_and_sign() -> None:
    small = math.exp(-7)
    found = preprocessed(torch.tensor([1.0, -1.0, 0.1, -small / 2, 0.0]))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 0.0, math.log(0.1) / 7, -1.0, -1.0]))
    torch.testing.assert_close(found[:, 1], torch.tensor([1.0, -1.0, 1.0, -0.5, 0.0]))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_zero_fast_weights_leave_the_slow_network(norm: str) -> None:
    algorithm, batch = metanet(norm), images()
    for value in (algorithm.m[-1].weight, algorithm.m[-1].bias):
        value.data.zero_()
    for task in range(2):
        features = algorithm.backbone(torch.cat([batch.support_x[task], batch.query_x[task]]))[6:]
        close(algorithm.predict(batch)[task], algorithm.second(F.relu(algorithm.first(features))))


def test_fast_weights_like_the_slow_ones_count_four_times() -> None:
    """relu(W h) + relu(W* h), and then W h + W* h: with W* = W, four times the slow network."""
    algorithm, batch = metanet(), images()
    size = batch.support_x.shape[1]
    slots = [weight[None, None].expand(2, size, -1, -1) for weight in (algorithm.first.weight, algorithm.second.weight)]
    algorithm.memory = lambda *_: tuple(slots)
    slow = algorithm.second(F.relu(algorithm.first(algorithm.backbone(batch.query_x.flatten(0, 1)))))
    close(algorithm.predict(batch).flatten(0, 1), 4 * slow)


def test_attention_is_a_softmax_of_cosines() -> None:
    queries, keys = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double()
    found = attention(queries, keys)
    close(found.sum(-1), torch.ones(2, 3).double())
    cosines = F.cosine_similarity(queries[:, :, None], keys[:, None], dim=-1)
    torch.testing.assert_close(found, cosines.softmax(-1), rtol=1e-5, atol=1e-6)
    assert attention(torch.zeros(1, 1, 5), torch.randn(1, 4, 5)).tolist() == [[[0.25] * 4]]


def test_labels_make_the_fast_weights() -> None:
    algorithm, batch = metanet(), images()
    features = algorithm.backbone(batch.support_x.flatten(0, 1)).unflatten(0, (2, 6))
    others = (batch.support_y + 1) % 3
    for one, other in zip(
        (*algorithm.memory(features, batch.support_y), algorithm.keys(features, batch.support_y, features)),
        (*algorithm.memory(features, others), algorithm.keys(features, others, features)),
        strict=True,
    ):
        assert (one - other).abs().max() > 1e-4
    relabelled = algorithm.predict(with_(batch, support_y=others))
    assert (relabelled - algorithm.predict(batch)).abs().max() > 1e-4


def test_slow_weights_and_the_rows_of_a_class_stay_as_they_are() -> None:
    algorithm, batch = metanet().eval(), images(shots=2)
    before = copy.deepcopy(algorithm.state_dict())
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    turned = with_(batch, support_x=batch.support_x[:, order], support_y=batch.support_y[:, order])
    with torch.no_grad():
        close(algorithm.predict(turned), algorithm.predict(batch))
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name])
    assert "key_second" in before
    assert "key_second" not in dict(algorithm.named_parameters())


# Conditional neural processes


def cnp(spec: Spec = CURVES, **settings: Any) -> CNP:
    backbone = MLP(input_shape=(1,), hidden=[8], init_std=None) if spec is CURVES else conv4()
    return CNP(backbone, spec, width=16, **settings).double()


def curves(shots: int = 5) -> Episodes:
    return double(episodes(Sinusoid(), TaskShape(1, shots, 7), 3))


CASES = pytest.mark.parametrize("spec", [CURVES, IMAGES], ids=["regression", "classification"])


def case(spec: Spec) -> Episodes:
    return curves() if spec is CURVES else images()


@CASES
def test_cnp_does_not_mind_the_order_of_the_support_set(spec: Spec) -> None:
    algorithm, batch = cnp(spec), case(spec)
    order = torch.randperm(batch.support_x.shape[1])
    turned = with_(batch, support_x=batch.support_x[:, order], support_y=batch.support_y[:, order])
    close(algorithm.predict(turned), algorithm.predict(batch))


@CASES
def test_cnp_takes_a_mean(spec: Spec) -> None:
    """The support set twice over is the support set; one pair more is not."""
    algorithm, batch = cnp(spec), case(spec)

    def with_rows(rows: list[int]) -> Tensor:
        return algorithm.predict(with_(batch, support_x=batch.support_x[:, rows], support_y=batch.support_y[:, rows]))

    everything = list(range(batch.support_x.shape[1]))
    close(with_rows(everything * 2), algorithm.predict(batch))
    assert (with_rows([*everything, 0]) - algorithm.predict(batch)).abs().max() > 1e-6


def test_cnp_of_curves_by_hand() -> None:
    """Equations 1 to 4; the targets are the support points and the queries."""
    algorithm, batch = cnp(min_sigma=0.2), curves()
    losses, means, likelihoods = [], [], []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        pairs = zip(algorithm.backbone(support_x), support_y, strict=True)
        r = sum(algorithm.encoder(torch.cat(pair)) for pair in pairs) / 5
        for number, (x, y) in enumerate(zip([*support_x, *query_x], [*support_y, *query_y], strict=True)):
            mean, raw = algorithm.decoder(torch.cat([algorithm.backbone(x[None])[0], r]))
            normal = torch.distributions.Normal(mean, 0.2 + 0.8 * F.softplus(raw))
            losses.append(-normal.log_prob(y[0]))
            if number >= 5:
                means.append(mean)
                likelihoods.append(normal.log_prob(y[0]))
    loss, logs = algorithm.loss(batch, 0)
    close(loss, torch.stack(losses).mean())
    assert logs == {}
    close(algorithm.predict(batch), torch.stack(means).view(3, 7, 1))
    close(algorithm.measures(batch)["log_likelihood"], torch.stack(likelihoods).view(3, 7).mean(1))


@pytest.mark.parametrize("product", [False, True])
def test_cnp_of_classes_concatenates_their_means(product: bool) -> None:
    algorithm, batch = cnp(IMAGES, product=product), images()
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        encoded = algorithm.encoder(algorithm.backbone(support_x))
        r = torch.cat([encoded[support_y == way].mean(0) for way in range(3)])
        for number, x in enumerate(algorithm.backbone(query_x)):
            hidden = algorithm.decoder[0](torch.cat([x, r]))
            if product:
                hidden = hidden + (algorithm.factors[0].weight @ x) * (algorithm.factors[1].weight @ r)
            close(algorithm.predict(batch)[task, number], algorithm.decoder[1:](hidden))
    loss, _ = algorithm.loss(batch, 0)
    close(loss, F.cross_entropy(algorithm.predict(batch).flatten(0, 1), batch.query_y.flatten()))
    assert algorithm.measures(batch) == {}


@pytest.mark.parametrize("soft", [False, True])
def test_orders_are_the_same_task_with_its_labels_moved_on(soft: bool) -> None:
    one, three, batch = cnp(IMAGES), cnp(IMAGES, orders=3), images()
    three.load_state_dict(one.state_dict())
    losses = []
    for order in range(3):
        support_y, query_y = ((y - order) % 3 for y in (batch.support_y, batch.query_y))
        losses.append(one.loss(with_(batch, support_y=support_y, query_y=query_y), 0)[0])
    assert losses[0] != losses[1]
    labels = F.one_hot(batch.query_y, 3).double() if soft else batch.query_y
    loss, logs = three.loss(with_(batch, query_y=labels), 0)
    close(loss, torch.stack(losses).mean())
    assert logs == one.loss(batch, 0)[1]
    close(three.predict(batch), one.predict(batch))


def test_log_density_is_torchs() -> None:
    y, mean, sigma = torch.randn(20).double(), torch.randn(20).double(), torch.rand(20).double() + 0.01
    close(log_density(y, mean, sigma), torch.distributions.Normal(mean, sigma).log_prob(y))


def test_cnp_learns_sinusoids() -> None:
    """Within some hundred steps, far below the error of predicting each curve's mean."""
    config = compose(
        "algo=cnp",
        "data=sinusoid",
        "backbone=mlp",
        "backbone.norm=none",
        "backbone.init_std=null",
        "backbone.hidden=[128]",
    )
    source = Sinusoid()
    algorithm = build(config, source)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.005)
    draw = source.sampler("train", TaskShape(1, 10, 10), 0, CPU)
    for step in range(700):
        optimizer.zero_grad()
        algorithm.loss(draw(25 * step, 25 * step + 25), step)[0].backward()
        optimizer.step()
    unseen = episodes(source, TaskShape(1, 10, 50), 100, "test")
    with torch.no_grad():
        error = (algorithm.predict(unseen) - unseen.query_y).square().mean().item()
    spread = (unseen.query_y - unseen.query_y.mean(1, keepdim=True)).square().mean().item()
    assert error < 0.4 * spread


# Both


@pytest.mark.parametrize("name", ["metanet", "cnp"])
def test_the_recording_is_the_loss(name: str) -> None:
    """Played back on other tasks and other weights."""
    kind = "classification" if name == "metanet" else "regression"
    source = SEPARABLE if kind == "classification" else Sinusoid()
    task = TaskShape(5 if kind == "classification" else 1, 1, 3)
    config = compose(f"algo={name}", "backbone=mlp", "backbone.norm=none", f"task.ways={task.ways}")
    algorithm = build(config, source).train()
    recorded, plain = Hardware(device=CPU, traced=TracedStep()), Hardware(device=CPU)
    for start in (0, 2):
        results = []
        for hardware in (recorded, plain):
            algorithm.zero_grad(set_to_none=True)
            loss, _ = hardware.backward(algorithm, episodes(source, task, 2, start=start), 0, 1.0)
            results.append([loss.detach(), *(value.grad for value in algorithm.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
        for value in algorithm.parameters():
            value.data += 0.01 * torch.randn_like(value)
    assert any(recorded.traced.recordings.values())


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [(MetaNet, "hidden", 0), (MetaNet, "meta_hidden", -1), (CNP, "width", 0), (CNP, "encoder_layers", 0),
     (CNP, "decoder_layers", 0), (CNP, "min_sigma", 1.0), (CNP, "min_sigma", -0.1), (CNP, "orders", 0),
     (CNP, "orders", 4)],
)  # fmt: skip
def test_settings_out_of_range_are_named(kind: type[Algorithm], key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^algo\.{key}={value:g}: must be "):
        kind(conv4(), IMAGES, **{key: value})
