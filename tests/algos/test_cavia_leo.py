"""CAVIA and LEO: inner loops that leave the network alone, for a context that it reads or codes of its last layer."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, double, episodes, toy_images, with_
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from metarun.algos.cavia import CAVIA
from metarun.algos.leo import LEO, divergence, overlap
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.backbones.pixels import Pixels
from metarun.backbones.vit import ViT
from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.data.regression import Sinusoid
from metarun.errors import UserError

IMAGES = toy_images()
SHAPE = (1, 16, 16)
BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
FIRST_ORDER = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
NORM = pytest.mark.parametrize("norm", ["batch", "support", "group"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def moved(algorithm: Algorithm, vectorize: bool) -> Algorithm:
    """In double precision and training mode, the learned weights away from zeros and ones."""
    algorithm.double().train().vectorize = vectorize
    for parameter in algorithm.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return algorithm


def batch_of(tasks: int = 2, ways: int = 3, shots: int = 2) -> Episodes:
    return double(episodes(IMAGES, TaskShape(ways, shots, 2), tasks))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def gradients(algorithm: Algorithm, batch: Episodes) -> dict[str, Tensor]:
    """The loss's gradient by name, its random numbers seeded."""
    values = {name: value for name, value in algorithm.named_parameters() if value.requires_grad}
    torch.manual_seed(5)
    loss, _ = algorithm.loss(batch, 0)
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(values, found, strict=True))


def slopes_agree(algorithm: Algorithm, batch: Episodes) -> None:
    """The gradient is that of central differences, along itself and along a random direction."""
    found = gradients(algorithm, batch)
    length = math.sqrt(sum(value.square().sum().item() for value in found.values()))
    assert length > 1e-4
    for steepest in (True, False):
        direction = {name: value if steepest else torch.randn_like(value) for name, value in found.items()}
        reach = math.sqrt(sum(value.square().sum().item() for value in direction.values()))
        ends = []
        for sign in (1, -1):
            other = copy.deepcopy(algorithm)
            for name, value in other.named_parameters():
                if name in direction:
                    value.data += sign * 1e-6 / reach * direction[name]
            torch.manual_seed(5)
            ends.append(other.loss(batch, 0)[0].item())
        expected = sum((found[name] * direction[name]).sum().item() for name in found) / reach
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-6 * length)


# CAVIA


def tiny_cavia(norm: str = "batch", vectorize: bool = False, **settings: float | list[int]) -> CAVIA:
    backbone = Conv4(input_shape=SHAPE, channels=4, norm=norm)
    algorithm = CAVIA(backbone, Spec(SHAPE, "classification", 3), **{"context_size": 5, **settings})
    return moved(algorithm, vectorize)


def test_a_transformers_tokens_all_change_alike() -> None:
    backbone = ViT(input_shape=(1, 8, 12), patch_size=4, width=8, depth=2, heads=2)
    cavia = CAVIA(backbone, Spec((1, 8, 12), "classification", 3), context_size=4, blocks=[0])
    cavia.context.data.normal_()
    before = torch.randn(2, backbone.widths[0], 7)
    change = cavia.change(0, before) - before
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(change, change[:1, :, :1].expand_as(change))


@BOTH
@FIRST_ORDER
def test_the_context_alone_adapts(first_order: bool, vectorize: bool) -> None:
    """Predictions are those of torch's SGD on the context, with every weight as it was before."""
    algorithm, batch = tiny_cavia(vectorize=vectorize, first_order=first_order, inner_lr=0.5).eval(), batch_of()
    before = copy.deepcopy(algorithm.state_dict())
    after = algorithm.predict_after(batch, [0, 2, 4])
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        fast = copy.deepcopy(algorithm)
        descent = torch.optim.SGD([fast.context.requires_grad_()], lr=0.5)
        for step in range(5):
            if step in (0, 2, 4):
                close(after[[0, 2, 4].index(step), task], fast(query_x).detach())
            descent.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            descent.step()
        assert fast.context.abs().max() > 1e-3
    assert (after[2] - after[0]).abs().max() > 1e-3
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name])
    (start, end) = algorithm.adapt(batch.support_x[0], batch.support_y[0], [0, 1])
    assert start.keys() == end.keys() == {"context"}
    assert (start["context"] == 0).all()


@NORM
def test_a_step_goes_down_the_slope_of_the_context(norm: str) -> None:
    """The first step is minus the rate times the support loss's central differences, one context number at a time."""
    algorithm, batch = tiny_cavia(norm, inner_lr=0.7), batch_of()
    support_x, support_y = batch.support_x[0], batch.support_y[0]
    (after,) = algorithm.adapt(support_x, support_y, [1])
    for number in range(5):
        ends = []
        for sign in (1, -1):
            context = torch.zeros(5, dtype=torch.float64)
            context[number] = sign * 1e-6
            prediction = torch.func.functional_call(algorithm, {"context": context}, (support_x,))
            ends.append(F.cross_entropy(prediction, support_y).item())
        expected = -0.7 * (ends[0] - ends[1]) / 2e-6
        assert after["context"][number].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("inner_steps", [1, 2])
@NORM
@BOTH
def test_cavias_meta_gradient_is_that_of_finite_differences(vectorize: bool, norm: str, inner_steps: int) -> None:
    slopes_agree(tiny_cavia(norm, vectorize, inner_steps=inner_steps), batch_of())


@BOTH
def test_in_first_order_the_context_is_a_constant(vectorize: bool) -> None:
    algorithm, batch = tiny_cavia(vectorize=vectorize, first_order=True), batch_of()
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        (after,) = algorithm.adapt(support_x, support_y, [2])
        fixed = {"context": after["context"].detach()}
        losses.append(F.cross_entropy(torch.func.functional_call(algorithm, fixed, (query_x,)), query_y))
    found, film = gradients(algorithm, batch), algorithm.films["2"].weight
    close(found["films.2.weight"], *torch.autograd.grad(torch.stack(losses).mean(), film))
    second = tiny_cavia(vectorize=vectorize)
    second.load_state_dict(algorithm.state_dict())
    assert (gradients(second, batch)["films.2.weight"] - found["films.2.weight"]).abs().max() > 1e-4


@NORM
@pytest.mark.parametrize("block", range(4))
def test_without_inner_steps_it_is_the_plain_network(block: int, norm: str) -> None:
    algorithm, batch = tiny_cavia(norm, inner_steps=0, blocks=[block, 2]), batch_of()
    images = batch.query_x[0]
    close(algorithm(images), algorithm.head(algorithm.backbone(images)))
    close(algorithm.predict(with_(batch, support_x=batch.query_x))[0], algorithm(images))
    assert (gradients(algorithm, batch)["films.2.weight"] == 0).all()


def test_film_scales_and_shifts_the_channels_of_one_block() -> None:
    algorithm = tiny_cavia(blocks=[1])
    algorithm.context.data.normal_()
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    numbers = algorithm.films["1"].weight @ algorithm.context
    for channel in range(4):
        expected = (1 + numbers[channel]) * images[:, channel] + numbers[4 + channel]
        close(algorithm.change(1, images)[:, channel], expected)
    for other in (0, 2, 3):
        assert algorithm.change(other, images) is images


class Concatenated(Backbone):
    """The official code's network: the context stands beside every input of the first layer."""

    norm = "none"

    def __init__(self, plain: MLP, film: Tensor) -> None:
        super().__init__()
        first, *rest = (copy.deepcopy(layer) for layer in plain.layers)
        self.first = nn.Linear(first.in_features + film.shape[1], first.out_features).double()
        self.first.weight.data = torch.cat([first.weight.data, film.detach()], dim=1)
        self.first.bias.data = first.bias.data
        self.rest = nn.ModuleList(rest)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = F.relu(self.first(torch.cat([x, context.expand(len(x), -1)], dim=1)))
        for layer in self.rest:
            x = F.relu(layer(x))
        return x


@BOTH
def test_for_vectors_the_context_is_a_part_of_the_input(vectorize: bool) -> None:
    """The same losses, and the same second-order gradient, as with inputs that have the context beside them."""
    backbone = MLP(input_shape=(1,), hidden=[7, 6], init_std=None)
    algorithm = moved(CAVIA(backbone, Spec((1,), "regression", 1), context_size=3, inner_lr=0.5), vectorize)
    network, head = Concatenated(backbone, algorithm.films["0"].weight), copy.deepcopy(algorithm.head)
    batch = double(episodes(Sinusoid(), TaskShape(1, 5, 6), 3))
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        context = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            inner = F.mse_loss(head(network(support_x, context)), support_y)
            (slope,) = torch.autograd.grad(inner, context, create_graph=True)
            context = context - 0.5 * slope
        losses.append(F.mse_loss(head(network(query_x, context)), query_y))
    torch.stack(losses).mean().backward()
    close(algorithm.loss(batch, 0)[0].detach(), torch.stack(losses).mean().detach())
    found = gradients(algorithm, batch)
    both = torch.cat([found["backbone.layers.0.weight"], found["films.0.weight"]], dim=1)
    close(both, network.first.weight.grad)
    close(found["backbone.layers.1.weight"], network.rest[0].weight.grad)
    close(found["head.bias"], head.bias.grad)
    assert found["films.0.weight"].abs().max() > 1e-4


def test_cavia_learns_sinusoids() -> None:
    """Two hundred meta-steps: one inner step takes the error well below that of each task's best constant."""
    backbone = MLP(input_shape=(1,), init_std=None)
    algorithm = CAVIA(backbone, Spec((1,), "regression", 1), inner_steps=1, context_size=5)
    algorithm.vectorize = True
    optimizer, source = torch.optim.Adam(algorithm.parameters(), lr=0.005), Sinusoid()
    draw = source.sampler("train", TaskShape(1, 10, 10), 0, CPU)
    for step in range(200):
        optimizer.zero_grad()
        algorithm.loss(draw(25 * step, 25 * step + 25), step)[0].backward()
        optimizer.step()
    unseen = episodes(source, TaskShape(1, 10, 50), 100, "test")
    before, after = ((algorithm.predict_after(unseen, [0, 1]) - unseen.query_y).square().mean((1, 2, 3))).tolist()
    spread = (unseen.query_y - unseen.query_y.mean(1, keepdim=True)).square().mean().item()
    assert after < 0.75 * spread
    assert after < 0.9 * before


def test_the_context_goes_to_the_papers_block() -> None:
    assert [*tiny_cavia().films] == ["2"]
    images = CAVIA(MLP(input_shape=SHAPE, hidden=[8, 9]), Spec(SHAPE, "classification", 3))
    assert {name: film.out_features for name, film in images.films.items()} == {"0": 8}
    for blocks in ([4], []):
        with pytest.raises(
            UserError, match=r"^algo.blocks=.*: needs at least one, and the backbone has the blocks 0 to 3"
        ):
            tiny_cavia(blocks=blocks)
    with pytest.raises(UserError, match=r"^algo.blocks=\[-1, 1\]: each must be at least 0"):
        tiny_cavia(blocks=[-1, 1])
    with pytest.raises(UserError, match=r"^algo: CAVIA changes what the blocks .*; try backbone=mlp"):
        CAVIA(Pixels(input_shape=SHAPE), Spec(SHAPE, "classification", 3))
    with pytest.raises(UserError, match=r"^algo.context_size=0: must be at least 1"):
        tiny_cavia(context_size=0)


# LEO


def tiny_leo(vectorize: bool = False, **settings: float) -> LEO:
    backbone = Conv4(input_shape=SHAPE, channels=6, norm="group")
    algorithm = LEO(backbone, Spec(SHAPE, "classification", 3), **{"latent_size": 4, "dropout": 0.0, **settings})
    return moved(algorithm, vectorize)


def test_divergence_is_the_kl_to_the_standard_normal() -> None:
    mean, deviation = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    expected = kl_divergence(Normal(mean, deviation), Normal(torch.zeros(3, 4), torch.ones(3, 4))).mean()
    torch.testing.assert_close(divergence(mean, deviation), expected)
    assert divergence(torch.zeros(2), torch.ones(2)) == 0


def test_overlap_is_zero_for_orthogonal_directions_alone() -> None:
    orthonormal, _ = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64))
    close(overlap(orthonormal), torch.zeros((), dtype=torch.float64))
    close(overlap(orthonormal * torch.tensor([1.0, 2, 3, 4])), torch.zeros((), dtype=torch.float64))
    angle = torch.tensor(0.3, dtype=torch.float64)
    pair = torch.stack([torch.stack([torch.ones_like(angle), angle.cos()]), torch.stack([0 * angle, angle.sin()])])
    close(overlap(pair), angle.cos().square() / 2)  # two of four correlations, both cos(0.3)


def test_a_code_is_the_mean_over_pairs() -> None:
    """Over the class's images, each beside every support image, itself included; by plain loops."""
    algorithm, labels = tiny_leo(), torch.tensor([[2, 0, 1, 0, 2, 1]])
    support = torch.randn(1, 6, 6, dtype=torch.float64)
    mean, deviation = algorithm.encode(support, labels, 3)
    codes = [algorithm.encoder.weight @ x for x in support[0]]
    for way in range(3):
        pairs = [
            algorithm.relation(torch.cat([codes[one], other]))
            for one in range(6)
            if labels[0, one] == way
            for other in codes
        ]
        expected = torch.stack(pairs).mean(0)
        close(mean[0, way], expected[:4])
        close(deviation[0, way], F.softplus(expected[4:]) / math.log(2))


@BOTH
def test_the_order_of_images_and_classes_does_not_matter(vectorize: bool) -> None:
    algorithm, batch = tiny_leo(vectorize).eval(), batch_of()
    logits = algorithm.predict(batch)
    within = torch.tensor([1, 0, 2, 3, 5, 4])
    close(algorithm.predict(with_(batch, support_x=batch.support_x[:, within])), logits)
    renamed = torch.tensor([2, 0, 1])
    other = algorithm.predict(with_(batch, support_y=renamed[batch.support_y]))
    close(other[..., renamed], logits)
    assert (other - logits).abs().max() > 1e-3


def test_inner_steps_by_plain_autograd() -> None:
    """Each task by itself, with a cross-entropy summed over the classes; codes first, and then the classifier."""
    algorithm, batch = tiny_leo(inner_steps=2, finetune_steps=2, inner_lr=0.3, finetune_lr=0.1).eval(), batch_of()
    assert algorithm.test_steps == 4
    after = algorithm.predict_after(batch, [0, 1, 2, 3, 4])
    assert not after.requires_grad
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        support, query = (F.normalize(algorithm.backbone(x), dim=1).detach() for x in (support_x, query_x))
        codes = algorithm.encode(support[None], support_y[None], 3)[0][0].detach().requires_grad_()
        weights = (codes @ algorithm.decoder.weight[:6].T).detach()
        for step in range(5):
            close(after[step, task], query @ weights.T.detach())
            if step < 2:
                inner = 3 * F.cross_entropy(support @ algorithm.decoder.weight[:6] @ codes.T, support_y)
                (slope,) = torch.autograd.grad(inner, codes)
                codes = (codes - algorithm.inner_rate * slope).detach().requires_grad_()
                weights = (codes @ algorithm.decoder.weight[:6].T).detach()
            else:
                weights.requires_grad_()
                (slope,) = torch.autograd.grad(3 * F.cross_entropy(support @ weights.T, support_y), weights)
                weights = (weights - algorithm.finetune_rate * slope).detach()


def test_the_inner_loop_lowers_the_support_loss() -> None:
    algorithm, batch = tiny_leo(finetune_steps=2).eval(), batch_of()
    after = algorithm.predict_after(with_(batch, query_x=batch.support_x), range(8))
    losses = [F.cross_entropy(logits.flatten(0, 1), batch.support_y.flatten()).item() for logits in after]
    assert losses == sorted(losses, reverse=True)
    assert losses[5] < losses[0] - 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@BOTH
def test_leos_meta_gradient_is_that_of_finite_differences(vectorize: bool, dropout: float) -> None:
    weights = {"kl_weight": 0.3, "encoder_weight": 0.0, "l2_weight": 0.1, "orthogonality_weight": 0.2}
    algorithm = tiny_leo(vectorize, inner_steps=2, finetune_steps=1, dropout=dropout, **weights)
    slopes_agree(algorithm, batch_of())


@pytest.mark.parametrize("name", ["kl", "encoder", "l2", "orthogonality"])
def test_each_penalty_is_added_with_its_weight(name: str) -> None:
    losses, batch = [], batch_of()
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        none = {f"{other}_weight": 0.0 for other in ("kl", "encoder", "l2", "orthogonality")}
        algorithm = tiny_leo(**{**none, f"{name}_weight": weight})
        torch.manual_seed(1)
        losses.append(algorithm.loss(batch, 0)[0])
    parts = [F.normalize(algorithm.backbone(x.flatten(0, 1)), dim=1).unflatten(0, (2, -1)) for x in batch.tensors[::2]]
    mean, deviation = algorithm.encode(parts[0], batch.support_y, 3)
    coders = [algorithm.encoder, *algorithm.relation[::2], algorithm.decoder]
    expected = {
        "kl": 2 * divergence(mean, deviation),
        "l2": sum(layer.weight.square().sum() for layer in coders),
        "orthogonality": 2 * overlap(algorithm.decoder.weight),
    }
    if name in expected:
        close(losses[1] - losses[0], expected[name])
    assert losses[1] > losses[0]


def test_the_encoder_is_drawn_to_the_adapted_codes_and_not_they_to_it() -> None:
    algorithm, batch = tiny_leo(kl_weight=0.0, encoder_weight=1.0, inner_steps=2, finetune_steps=0), batch_of()
    support, _ = algorithm.unit_features(batch.support_x[0], batch.query_x[0])
    codes: list[Tensor] = []
    algorithm.decoder.register_forward_hook(lambda module, inputs, output: codes.append(inputs[0]))
    _, cost = algorithm.learn(support[None], batch.support_y[:1], 3, [2], False)
    start, end = codes[0], codes[-1]
    close(cost, (end - start).square().mean())
    slope, of_rate = torch.autograd.grad(cost, (start, algorithm.inner_rate), allow_unused=True)
    close(slope, -2 * (end - start) / start.numel())
    assert of_rate is None


def test_draws_are_of_the_training_alone() -> None:
    algorithm, batch = tiny_leo(), batch_of()
    assert torch.equal(algorithm.predict(batch), algorithm.predict(batch))
    losses = [algorithm.loss(batch, 0)[0].item() for _ in range(2)]
    assert losses[0] != losses[1]
    codes = torch.zeros(1000, 3, 4, dtype=torch.float64)
    assert (algorithm.decode(codes, False) == 0).all()
    spread = algorithm.decode(codes, True).std().item()
    assert spread == pytest.approx(math.sqrt(2 / (3 + 6)), rel=0.03)  # Glorot's, for three classes of six features


def test_codes_are_drawn_about_their_means() -> None:
    algorithm, labels = tiny_leo(inner_steps=0, finetune_steps=0), torch.tensor([0, 1, 2]).expand(4000, 3)
    support = F.normalize(torch.randn(3, 6, dtype=torch.float64), dim=1).expand(4000, 3, 6)
    drawn: list[Tensor] = []
    algorithm.decoder.register_forward_hook(lambda module, inputs, output: drawn.append(inputs[0].detach()))
    algorithm.learn(support, labels, 3, [0], True)
    mean, deviation = algorithm.encode(support[:1], labels[:1], 3)
    torch.testing.assert_close(drawn[0].std(0), deviation[0], rtol=0.06, atol=0)
    torch.testing.assert_close(drawn[0].mean(0), mean[0], rtol=0, atol=0.08)


@pytest.mark.parametrize("training", [False, True])
def test_every_look_at_a_feature_in_training_drops_anew(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's, that of each of the three inner steps, and the queries'."""
    algorithm, batch, real = tiny_leo(dropout=0.4, inner_steps=2, finetune_steps=1), batch_of(), F.dropout
    masks: list[Tensor] = []

    def recorded(x: Tensor, p: float, training: bool = True) -> Tensor:
        dropped = real(x, p, training)
        masks.append((dropped == 0) & (x != 0))
        return dropped

    monkeypatch.setattr(F, "dropout", recorded)
    algorithm.loss(batch, 0) if training else algorithm.predict(batch)
    dropping = [mask for mask in masks if mask.any()]
    assert len(dropping) == (5 if training else 0)
    for one, other in pairwise(dropping):
        assert not torch.equal(one, other)


def test_leo_refuses_what_is_out_of_range() -> None:
    with pytest.raises(UserError, match=r"^algo.dropout=1: must be at least 0 and below 1"):
        tiny_leo(dropout=1.0)
