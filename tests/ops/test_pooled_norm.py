"""The norm and the max-pool as one operation give what the two give one after the other, and so do their derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.conv4 import Conv4
from metarun.ops import pooled_norm
from metarun.ops.batch_norm import Norm
from metarun.ops.pooled_norm import pooled_batch_norm, worthwhile
from metarun.ops.tasks import over_tasks

EPSILON = 1e-3


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images with their channels side by side in memory, and scales of both signs with shifts."""
    torch.manual_seed(0)
    count, channels, height, width = shape
    x = (1 + torch.randn(count, height, width, channels).to(dtype)).movedim(-1, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.linspace(-1.5, 1, channels, dtype=wide)
    return [value.requires_grad_() for value in (x, weight, torch.randn(channels, dtype=wide))]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pooled_batch_norm(x, weight, bias, EPSILON)[0]


def one_after_the_other(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.batch_norm(x, None, None, weight, bias, training=True, eps=EPSILON), 2)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_norm, "BLOCK", 2 * 4 * 7 * 6 * 8)  # two images of the test below


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(5, 4, 7, 6), (3, 4, 2, 3), (1, 4, 4, 4)])
def test_values_and_derivatives(shape: tuple[int, ...]) -> None:
    values = inputs(shape)
    torch.testing.assert_close(ours(*values), one_after_the_other(*values), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, values)
    assert torch.autograd.gradgradcheck(ours, values)


@pytest.mark.usefixtures("small_blocks")
def test_second_derivatives_are_those_of_the_two() -> None:
    found = []
    for function in (ours, one_after_the_other):
        values = inputs((5, 4, 7, 6))
        y = function(*values)
        first = torch.autograd.grad(y.square().sum(), values, create_graph=True)
        found.append(torch.autograd.grad(sum(value.pow(3).sum() for value in first), values))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision_against_double(dtype: torch.dtype) -> None:
    values = inputs((16, 64, 14, 14), dtype)
    exact = [value.detach().double().requires_grad_() for value in values]
    y, expected = ours(*values), one_after_the_other(*exact)
    assert y.dtype == dtype
    towards = torch.randn_like(y)
    gradients = torch.autograd.grad(y, values, towards)
    right = torch.autograd.grad(expected, exact, towards.double())
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for one, other in zip([y, *gradients], [expected, *right], strict=True):
        assert (one.double() - other).norm() < tolerance * other.norm()


def test_a_scale_of_zero_has_a_gradient() -> None:
    x, weight, bias = inputs((4, 3, 4, 4))
    zero = torch.zeros_like(weight, requires_grad=True)
    y = ours(x, zero, bias)
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y))
    ours(x, zero, bias).sum().backward()
    normed = F.batch_norm(x, None, None, training=True, eps=EPSILON)
    torch.testing.assert_close(zero.grad, F.max_pool2d(normed, 2).sum((0, 2, 3)))


def large(kind: str, *, training: bool = True) -> tuple[Norm, Tensor]:
    """A norm with scales of both signs, and images enough for one operation."""
    norm = Norm(16, kind).train(training)
    x, weight, bias = inputs((48, 16, 10, 10), torch.float32)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    assert worthwhile(x)
    return norm, x.detach()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the norms normalise and pool at once from here on."""
    calls: list[object] = []
    kernel = pooled_norm.pooled_batch_norm

    def spy(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(x.shape)
        return kernel(x, *others)

    monkeypatch.setattr("metarun.ops.batch_norm.pooled_batch_norm", spy)
    return calls


@pytest.mark.parametrize(
    ("kind", "training", "n_support", "at_once"),
    [
        ("batch", True, None, True),
        ("batch", False, 3, True),
        ("support", True, None, True),
        ("support", True, 48, True),
        ("support", True, 20, False),
        ("running", True, None, True),
        ("running", False, None, False),
        ("group", True, None, False),
    ],
)
def test_norms_pool_at_once_where_they_take_the_batchs_own_statistics(
    kind: str, training: bool, n_support: int | None, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spied(monkeypatch)
    norm, x = large(kind, training=training)
    plain, _ = large(kind, training=training)
    torch.testing.assert_close(norm.pooled(x, n_support), F.max_pool2d(plain(x, n_support), 2), rtol=1e-5, atol=1e-5)
    assert bool(calls) == at_once
    for one, other in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_running_averages_are_torchs() -> None:
    norm, x = large("running")
    torchs = nn.BatchNorm2d(16)
    for step in range(3):
        norm.pooled(x + step)
        torchs(x + step)
    torch.testing.assert_close(norm.running_mean, torchs.running_mean)
    torch.testing.assert_close(norm.running_var, torchs.running_var)


def test_under_vmap_and_with_activations_changed_the_two_go_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Conv4((1, 28, 28), channels=8)
    x = torch.randn(2, 20, 1, 28, 28).to(memory_format=torch.channels_last_3d)
    expected = over_tasks(network, x, vectorize=False)

    def refuse(*values: object) -> None:
        raise AssertionError("not for use here")

    monkeypatch.setattr("metarun.ops.batch_norm.pooled_batch_norm", refuse)
    torch.testing.assert_close(over_tasks(network, x, vectorize=True), expected, rtol=1e-4, atol=1e-4)
    unchanged = network(x[0], activation_hook=lambda number, values: values)
    torch.testing.assert_close(unchanged, expected[0], rtol=1e-4, atol=1e-4)


def test_the_network_of_large_batches_is_that_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    network = Conv4((1, 28, 28), channels=16).to(memory_format=torch.channels_last)
    x = torch.randn(40, 1, 28, 28)
    found = []
    for least, at_once in ((2**16, 2), (2**62, 0)):  # of the four blocks, the later ones have few values
        monkeypatch.setattr(pooled_norm, "LEAST", least)
        calls.clear()
        network.zero_grad()
        y = network(x)
        assert len(calls) == at_once
        y.square().sum().backward()
        found.append([y.detach(), *(value.grad for value in network.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-3
