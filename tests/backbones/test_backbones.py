"""Backbones: what their norms compute, that second derivatives are right in every form, and what DropBlock drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import compose
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.func import functional_call

from metarun.backbones.conv4 import Conv4
from metarun.backbones.minilm import MiniLM
from metarun.backbones.mlp import MLP
from metarun.backbones.resnet12 import ResNet12, drop_block
from metarun.backbones.spatial import map_size
from metarun.backbones.vit import ViT
from metarun.config.values import without
from metarun.core import Backbone
from metarun.errors import UserError
from metarun.ops.batch_norm import KINDS, Norm, group_count, transductive
from metarun.ops.inner_loop import Params, gradient, parameters
from metarun.ops.numerics import linear_head
from metarun.ops.second_order import batch_norm
from metarun.ops.tasks import over_tasks

CONF = Path(__file__).parents[2] / "conf" / "backbone"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_norm(channels: int, kind: str) -> Norm:
    norm = Norm(channels, kind).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Shapes, sizes and settings


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize(
    ("make", "features"),
    [
        (lambda norm: Conv4(input_shape=(3, 35, 20), channels=8, norm=norm), 8 * 2 * 1),
        (lambda norm: Conv4(input_shape=(3, 35, 20), channels=8, downsample="stride", norm=norm), 8 * 3 * 2),
        (lambda norm: Conv4(input_shape=(3, 35, 20), channels=8, readout="mean", norm=norm), 8),
        (lambda norm: MLP(input_shape=(3, 35, 20), hidden=[6, 12], norm=norm), 12),
        (lambda norm: ResNet12(input_shape=(3, 35, 20), widths=[4, 6, 8, 10], norm=norm), 10),
        (lambda norm: ResNet12(input_shape=(3, 35, 20), widths=[4, 6, 8, 10], readout="flatten", norm=norm), 10 * 2),
    ],
)
def test_features(make, features: int, norm: str) -> None:
    backbone = make(norm)
    assert backbone.features == features
    assert backbone.norm == norm
    for training in (True, False):
        backbone.train(training)
        out = backbone(torch.rand(5, 3, 35, 20), n_support=3)
        assert out.shape == (5, features)
        assert out.isfinite().all()


def test_sizes_of_the_published_networks() -> None:
    conv4 = Conv4(input_shape=(1, 28, 28))
    assert (conv4.features, n_parameters(conv4)) == (64, 111_936)  # with 64 * 5 + 5 for the head: 112,261
    assert Conv4(input_shape=(3, 84, 84)).features == 1600
    assert Conv4(input_shape=(3, 84, 84), channels=32).features == 800  # MAML's mini-ImageNet network
    assert Conv4(input_shape=(1, 28, 28), downsample="stride", readout="mean").features == 64
    resnet = ResNet12(input_shape=(3, 84, 84), readout="flatten")
    assert (resnet.features, n_parameters(resnet)) == (16_000, 12_424_320)
    assert ResNet12(input_shape=(3, 84, 84)).features == 640
    assert n_parameters(ResNet12(input_shape=(3, 84, 84), widths=[64, 128, 256, 512])) == 7_996_800
    assert n_parameters(MLP(input_shape=(1,))) == (40 + 40) + (40 * 40 + 40)


@pytest.mark.parametrize("name", ["conv4", "resnet12", "mlp"])
def test_yaml_names_its_class(name: str) -> None:
    path = CONF / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    assert f"backbone={name}" in path.read_text().splitlines()[0]
    config = without(compose(f"backbone={name}").backbone, ["from"])
    assert instantiate(config, input_shape=(1, 28, 28)).features in (64, 640, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Conv4(input_shape=(1,)),
            r"^backbone: conv4 needs images \(C, H, W\), but the data are vectors of 1; try backbone=mlp$",
        ),
        (lambda: ResNet12(input_shape=(7,)), "resnet12 needs images.* vectors of 7; try backbone=mlp"),
        (lambda: Conv4(input_shape=(1, 28, 15)), "conv4 .*16×16 pixels, .* 28×15; try backbone.downsample=stride"),
        (lambda: ResNet12(input_shape=(1, 8, 8)), "resnet12 .*16×16 pixels, .* 8×8; try backbone=mlp"),
        (lambda: Conv4(input_shape=(1, 28, 28), norm="bach"), r"backbone.norm=bach: .*did you mean batch\?"),
        (lambda: Conv4(input_shape=(1, 28, 28), downsample="strides"), r"did you mean stride\?"),
        (lambda: ResNet12(input_shape=(1, 28, 28), readout="avg"), "backbone.readout=avg: is not one of flatten, mean"),
        (lambda: Conv4(input_shape=(1, 28, 28), channels=0), "backbone.channels=0"),
        (lambda: ResNet12(input_shape=(1, 28, 28), widths=[1, 2, 3]), "backbone.widths"),
        (lambda: ResNet12(input_shape=(1, 28, 28), drop_rate=1), "backbone.drop_rate=1"),
        (lambda: ResNet12(input_shape=(1, 28, 28), block_size=0), "backbone.block_size=0"),
        (lambda: ResNet12(input_shape=(1, 28, 28), drop_ramp=-1), "backbone.drop_ramp=-1"),
        (lambda: MLP(input_shape=(1,), hidden=[]), "backbone.hidden"),
        (lambda: MLP(input_shape=(1,), init_std=0), "backbone.init_std=0"),
        (lambda: transductive("group norm"), r"did you mean group\?"),
        (lambda: Norm(4, "batch")(torch.rand(1, 4)), "backbone.norm=batch: 1 row"),
        (lambda: Norm(4, "support")(torch.rand(3, 4), n_support=1), "backbone.norm=support: 1 row"),
        (lambda: Norm(4, "running")(torch.rand(1, 4)), "backbone.norm=running: 1 row"),
        (
            lambda: over_tasks(Norm(4, "running"), torch.rand(2, 3, 4), vectorize=True),
            "set hardware.vectorize=false",
        ),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv4((1, 16, 16), channels=4),
        lambda: ResNet12((1, 16, 16), widths=[4, 4, 4, 4]),
        lambda: MLP((1, 16, 16), hidden=[6, 5, 4], norm="running"),
        lambda: ViT((1, 16, 16), patch_size=8, width=8, depth=2, heads=2),
        lambda: ViT((1, 16, 16), patch_size=8, width=8, depth=2, heads=2, readout="mean"),
        lambda: MiniLM((4,), weights=None),
    ],
)
def test_what_is_in_no_whole_block_comes_before_the_first(make: Callable[[], Backbone]) -> None:
    net = make().train()
    whole = [[value for module in block for value in module.parameters()] for block in net.whole_blocks]
    assert [block[0] for block in net.whole_blocks] == list(net.blocks)
    in_blocks = {id(value) for values in whole for value in values}
    assert len(in_blocks) == sum(map(len, whole))  # none is in two
    inputs: list[Tensor] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    net(torch.randint(1, 9, (3, 4)) if net.reads_texts else torch.rand(3, 1, 16, 16))
    before = [value for value in net.parameters() if id(value) not in in_blocks]
    if before:
        torch.autograd.grad(inputs[0].square().sum(), before, retain_graph=True)  # raises where one has no part in it
    for number, values in enumerate(whole[:-1]):
        torch.autograd.grad(inputs[number + 1].square().sum(), values, retain_graph=True)


def test_initialisation() -> None:
    conv = Conv4(input_shape=(3, 28, 28)).blocks[1].conv
    bound = (6 / (64 * 9 + 64 * 9)) ** 0.5
    assert 0.99 * bound < conv.weight.abs().max() <= bound
    assert not conv.bias.any()
    layer = MLP(input_shape=(1, 28, 28), hidden=[100]).layers[0]
    assert 0.0199 < layer.weight.abs().max() <= 0.02
    assert layer.weight.std().item() == pytest.approx(0.0088, rel=0.02)  # 0.88 of a normal cut at two deviations
    assert not layer.bias.any()
    assert MLP(input_shape=(1,), init_std=None).layers[0].weight.abs().max() > 0.02
    conv = ResNet12(input_shape=(3, 16, 16), widths=[8, 8, 64, 64]).blocks[3].convs[0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


# Networks against a plain transcription of their papers


def test_conv4_is_conv_norm_relu_pool() -> None:
    backbone = Conv4(input_shape=(2, 33, 28), channels=6).double()
    x = expected = torch.randn(4, 2, 33, 28, dtype=torch.float64)
    for block in backbone.blocks:
        expected = F.batch_norm(
            F.conv2d(expected, block.conv.weight, block.conv.bias, padding=1), None, None, training=True
        )
        expected = F.max_pool2d(F.relu(expected), 2)
    torch.testing.assert_close(backbone(x), expected.flatten(1))


def test_resnet12_is_three_convolutions_and_a_shortcut() -> None:
    backbone = ResNet12(input_shape=(2, 33, 28), widths=[4, 5, 6, 7], norm="none", readout="flatten").double().eval()
    x = expected = torch.randn(3, 2, 33, 28, dtype=torch.float64)
    for block in backbone.blocks:
        a, b, c = block.convs
        inner = F.leaky_relu(b(F.leaky_relu(a(expected), 0.1)), 0.1)
        expected = F.max_pool2d(F.leaky_relu(c(inner) + block.shortcut(expected), 0.1), 2)
    torch.testing.assert_close(backbone(x), expected.flatten(1))


# Norms


@pytest.mark.parametrize("shape", [(7, 12), (7, 12, 4, 3)])
def test_definitions(shape: tuple[int, ...]) -> None:
    x = 3 + 2 * torch.randn(shape, dtype=torch.float64)
    reference = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d

    batch = random_norm(12, "batch")
    expected = reference(12, track_running_stats=False).double()
    expected.load_state_dict(batch.state_dict())
    for training in (True, False):
        torch.testing.assert_close(batch.train(training)(x, 2), expected(x))

    support = random_norm(12, "support")
    expected.load_state_dict(support.state_dict())
    for n_support in (None, 7):
        torch.testing.assert_close(support(x, n_support), expected(x))
    axes = [0, *range(2, x.ndim)]
    mean, deviation = x[:5].mean(axes, keepdim=True), (x[:5].var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()
    wide = [1, 12] + [1] * (x.ndim - 2)
    torch.testing.assert_close(
        support(x, 5), (x - mean) / deviation * support.weight.view(wide) + support.bias.view(wide)
    )

    group = random_norm(12, "group")
    expected = nn.GroupNorm(3, 12).double()
    expected.load_state_dict(group.state_dict())
    torch.testing.assert_close(group(x, 2), expected(x))

    assert Norm(12, "none")(x, 2) is x
    assert not list(Norm(12, "none").parameters())


def test_groups_divide_the_channels_and_keep_four_each() -> None:
    assert [group_count(channels) for channels in (1, 7, 8, 12, 40, 64, 160, 640)] == [1, 1, 2, 3, 8, 8, 8, 8]


def test_running_is_torchs_batch_norm() -> None:
    norm = random_norm(3, "running")
    expected = nn.BatchNorm2d(3).double()
    expected.load_state_dict(norm.state_dict() | {"num_batches_tracked": torch.tensor(0)})
    for step in range(4):
        x = step + torch.randn(5, 3, 2, 2, dtype=torch.float64)
        torch.testing.assert_close(norm(x, 1), expected(x))
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(norm.eval()(x), expected.eval()(x))
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))  # inductive


def test_running_averages_move_under_functional_call() -> None:
    norm = Norm(3, "running")
    x = 5 + torch.randn(8, 3)
    replaced = {"weight": torch.full((3,), 2.0, requires_grad=True), "bias": torch.ones(3)}
    out = functional_call(norm, replaced, (x,))
    torch.testing.assert_close(out.mean(0), torch.ones(3))
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
    assert norm.running_mean.grad_fn is None
    functional_call(norm, replaced, (x,))  # twice before backward, as the support and the query set
    out.square().sum().backward()
    assert replaced["weight"].grad.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_batch_lets_queries_see_each_other(kind: str) -> None:
    backbone = Conv4(input_shape=(1, 16, 16), channels=8, norm=kind).double().eval()
    x = torch.randn(9, 1, 16, 16, dtype=torch.float64)
    changed = torch.cat([x[:6], 5 * torch.randn(3, 1, 16, 16, dtype=torch.float64)])
    together, other = backbone(x, 4), backbone(changed, 4)
    alone = backbone(x[:5], 4)[4]
    if transductive(kind):
        assert kind == "batch"
        assert (together[5] - other[5]).abs().max() > 0.01
        assert (together[4] - alone).abs().max() > 0.01
    else:
        torch.testing.assert_close(together[:6], other[:6])
        torch.testing.assert_close(together[4], alone)


@pytest.mark.parametrize("kind", ["batch", "support", "group"])
@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 2, 3)])
def test_vectorised_form_equals_fused_form(kind: str, shape: tuple[int, ...]) -> None:
    norm = random_norm(8, kind)
    x = 1 + torch.randn(3, *shape, dtype=torch.float64)
    for n_support in (2, None):
        loop, vmapped = (
            over_tasks(lambda x: norm(x, n_support), x, vectorize=vectorize)  # noqa: B023
            for vectorize in (False, True)
        )
        torch.testing.assert_close(loop, vmapped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["batch", "support", "running", "group"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n_support", [2, None])
def test_first_and_second_derivatives(kind: str, training: bool, n_support: int | None) -> None:
    norm = random_norm(4, kind).train(training)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(norm, {"weight": weight, "bias": bias}, (x, n_support))

    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 4, 2, 1), (4,), (4,))]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# The gradient of MAML through a backbone


def maml_loss(model: nn.Module, params: Params, x: Tensor, y: Tensor, *, vectorize: bool) -> Tensor:
    """The mean query loss after one inner step; the first half of each task's rows is the support set."""
    half = x.shape[1] // 2

    def task(x: Tensor, y: Tensor) -> Tensor:
        def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
            out = functional_call(model, params, (x,))
            return F.cross_entropy(out.float() if out.dtype == torch.bfloat16 else out, y)

        gradients = gradient(lambda params: loss(params, x[:half], y[:half]), params, create_graph=True)
        fast = {name: value - 0.1 * gradients[name] for name, value in params.items()}
        return loss(fast, x[half:], y[half:])

    return over_tasks(task, x, y, vectorize=vectorize).mean()


def classifier(backbone: Conv4 | ResNet12) -> nn.Module:
    return nn.Sequential(backbone, linear_head(backbone.features, 2, std=0.1))


def episodes(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two tasks of two ways, `[2, rows, 1, 16, 16]` and `[2, rows]`."""
    y = torch.arange(rows).remainder(2).expand(2, -1)
    return torch.randn(2, rows, 1, 16, 16, dtype=dtype) + y.view(2, rows, 1, 1, 1), y


LOOP_AND_VMAP = [
    (norm, vectorize) for norm in KINDS for vectorize in (False, True) if (norm, vectorize) != ("running", True)
]


@pytest.mark.parametrize(("norm", "vectorize"), LOOP_AND_VMAP)
@pytest.mark.parametrize("settings", [{"downsample": "pool"}, {"downsample": "stride", "readout": "mean"}])
def test_second_order_gradient_against_finite_differences(norm: str, vectorize: bool, settings: dict[str, str]) -> None:
    model = classifier(Conv4(input_shape=(1, 16, 16), channels=4, norm=norm, **settings)).double()
    params = parameters(model)
    x, y = episodes(8, torch.float64)
    loss = maml_loss(model, params, x, y, vectorize=vectorize)
    gradients = torch.autograd.grad(loss, list(params.values()))
    directions = [torch.randn_like(gradient) for gradient in gradients]
    slope = sum((gradient * direction).sum().item() for gradient, direction in zip(gradients, directions, strict=True))

    def moved(size: float) -> float:
        shifted = {
            name: (value + size * direction).detach().requires_grad_()
            for (name, value), direction in zip(params.items(), directions, strict=True)
        }
        return maml_loss(model, shifted, x, y, vectorize=vectorize).item()

    assert slope == pytest.approx((moved(1e-7) - moved(-1e-7)) / 2e-7, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("norm", "vectorize"), LOOP_AND_VMAP)
def test_second_order_gradient_under_bfloat16_autocast(norm: str, vectorize: bool) -> None:
    model = classifier(Conv4(input_shape=(1, 16, 16), channels=16, downsample="stride", readout="mean", norm=norm))
    params = parameters(model)
    x, y = episodes(20)
    gradients = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = maml_loss(model, params, x, y, vectorize=vectorize)
        parts = torch.autograd.grad(loss, list(params.values()))
        assert all(part.dtype == torch.float32 for part in parts)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    assert F.cosine_similarity(*gradients, dim=0).item() > 0.8


@pytest.mark.parametrize("kind", ["batch", "support", "group"])
def test_statistics_are_single_precision(kind: str) -> None:
    norm = Norm(8, kind)
    x = (100 + torch.randn(2, 6, 8, 5, 5)).bfloat16()
    for vectorize in (False, True):
        out = over_tasks(lambda x: norm(x, 4), x, vectorize=vectorize)
        exact = over_tasks(lambda x: norm(x, 4), x.float())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, rtol=0.01, atol=0.01)


# DropBlock


def test_drop_block_drops_whole_squares_and_keeps_the_expected_share() -> None:
    x = torch.ones(200, 64, 10, 10)
    out = drop_block(x, 0.05, 5)
    assert (out == 0).float().mean().item() == pytest.approx(0.05, rel=0.1)
    assert out.mean().item() == pytest.approx(1, rel=1e-3)
    assert out.unique().numel() == 2
    dropped = (out == 0).float()
    inside = F.max_pool2d(-F.max_pool2d(-dropped, 5, 1), 5, 1, padding=0)  # erode, then look for any whole square
    assert torch.equal(inside.amax((2, 3)), dropped.amax((2, 3)))
    whole = drop_block(torch.ones(200, 64, 3, 4), 0.3, 5)  # a square is cut to 3x3: two places
    assert (whole == 0).float().mean().item() == pytest.approx(0.3, rel=0.15)
    assert ((whole == 0)[:, :, 0] == (whole == 0)[:, :, 2]).all()
    assert torch.equal(drop_block(x[:2], 0.0, 5), x[:2])


def test_drop_block_draws_from_the_global_generator() -> None:
    x = torch.ones(4, 8, 10, 10)
    outs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        outs.append(drop_block(x, 0.2, 3))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_dropping_happens_in_training_only_and_ramps_up() -> None:
    def make(drop_rate: float) -> ResNet12:
        return ResNet12(input_shape=(1, 32, 32), widths=[4, 4, 8, 8], drop_rate=drop_rate, drop_ramp=4)

    backbone, without = make(0.5), make(0.0)
    without.load_state_dict(backbone.state_dict())
    x = torch.randn(6, 1, 32, 32)
    torch.testing.assert_close(backbone.eval()(x), without.train()(x))
    assert (backbone.passes, without.passes) == (0, 0)
    outs = [backbone.train()(x) for _ in range(5)]
    assert backbone.passes == 5
    assert not torch.allclose(outs[0], outs[1])

    again = make(0.5)
    again.load_state_dict(backbone.state_dict())
    assert again.passes == 5


def test_ramp_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def record(x: Tensor, rate: float, size: int) -> Tensor:
        rates.append(rate)
        return x

    monkeypatch.setattr("metarun.backbones.resnet12.drop_block", record)
    for ramp in (4, 0):
        backbone = ResNet12(input_shape=(1, 16, 16), widths=[4, 4, 4, 4], drop_rate=0.4, drop_ramp=ramp)
        for _ in range(5):
            backbone(torch.randn(4, 1, 16, 16))
    assert rates[::2] == rates[1::2]  # two blocks
    assert rates[::2] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4] + [0.4] * 5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_dropping_within_an_inner_loop(vectorize: bool) -> None:
    backbone = ResNet12(input_shape=(1, 16, 16), widths=[4, 4, 8, 8], drop_rate=0.3, drop_ramp=0)
    model = classifier(backbone)
    params = parameters(model)
    loss = maml_loss(model, params, *episodes(8), vectorize=vectorize)
    gradients = torch.autograd.grad(loss, list(params.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert backbone.passes == (2 if vectorize else 4)
    x = torch.ones(1, 4, 8, 10, 10).expand(2, -1, -1, -1, -1)
    first, second = over_tasks(lambda x: drop_block(x, 0.3, 3), x, vectorize=vectorize)
    assert not torch.equal(first, second)  # each task has squares of its own


# Memory order, and the norm's own second derivative


def test_one_channel_says_its_order_by_its_strides() -> None:
    """By which convolutions choose; the values are the same."""
    backbone = Conv4(input_shape=(1, 28, 28))
    images = torch.rand(3, 1, 28, 28)
    plain = backbone(images)
    backbone.channels_last = True
    assert backbone.to_memory_order(images).stride() == (784, 1, 28, 1)
    assert backbone.blocks[0].conv(backbone.to_memory_order(images)).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(backbone.to_memory_order(images), images)
    torch.testing.assert_close(backbone(images), plain, rtol=1e-4, atol=1e-5)
    coloured = torch.rand(3, 3, 28, 28)
    assert backbone.to_memory_order(coloured).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(backbone.to_memory_order(coloured), coloured)


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5, 6)])
def test_batch_norms_derivatives_against_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, (3,), (3,))]

    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, weight, bias, 1e-3)[0]

    torch.testing.assert_close(
        normed(*inputs), F.batch_norm(inputs[0], None, None, *inputs[1:], training=True, eps=1e-3)
    )
    assert torch.autograd.gradcheck(normed, inputs)
    assert torch.autograd.gradgradcheck(normed, inputs)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_batch_norms_second_derivative_is_torchs(order: torch.memory_format) -> None:
    """In single precision, in both memory orders."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, 9, 9).to(memory_format=order).requires_grad_()
    weight, bias = (torch.rand(8, requires_grad=True) for _ in range(2))
    direction = [torch.randn_like(value) for value in (x, weight, bias)]

    def second(function: Any) -> list[Tensor]:
        first = torch.autograd.grad(function(x, weight, bias).sin().sum(), [x, weight, bias], create_graph=True)
        return list(torch.autograd.grad(first, [x, weight, bias], direction))

    ours = second(lambda *values: batch_norm(*values, 1e-5)[0])
    torchs = second(lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5))
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_a_large_batch_is_exact_in_both_memory_orders() -> None:
    """Torch's own is off by 1e-5 and more where the channels are side by side."""
    torch.manual_seed(0)
    x = 2 * torch.randn(75, 16, 28, 28) + 1
    weight, bias = torch.rand(16), torch.rand(16)
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    for order in (torch.contiguous_format, torch.channels_last):
        y, mean, variance = batch_norm(x.contiguous(memory_format=order), weight, bias, 1e-5)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=3e-6)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=0, atol=1e-6)
        torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=3e-6, atol=0)


def test_the_map_of_word_pieces_is_one_place() -> None:
    backbone = MiniLM((256,), weights=None)
    assert map_size(backbone, (256,), unpooled=0) == (384, 1, 1)
