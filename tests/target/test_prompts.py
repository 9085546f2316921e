"""Visual prompts and low-rank changes of frozen backbones: what they compute, what learns and what stays."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import choices, compose
from torch import Tensor, nn

from metarun.algos.mtl import MTL
from metarun.algos.protonet import ProtoNet
from metarun.backbones.conv4 import Conv4
from metarun.backbones.pixels import Pixels
from metarun.backbones.pretrained import Pretrained
from metarun.backbones.scaled import ScaledBackbone
from metarun.backbones.vit import ViT
from metarun.config import check, construct
from metarun.config.folder import CONF
from metarun.core import Backbone, Batch, Spec
from metarun.errors import UserError
from metarun.target import prompts as module
from metarun.target.base import TargetMethod
from metarun.target.prompts import LoRA, Prompts, Tuning, add_low_rank, add_prompts, frozen, matrices

SHAPE = (1, 16, 16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def vit(readout: str = "class", depth: int = 3) -> ViT:
    backbone = ViT(input_shape=SHAPE, patch_size=4, width=16, depth=depth, heads=2, readout=readout)
    for value in backbone.parameters():
        nn.init.normal_(value, std=0.2)
    return backbone


def conv4() -> Conv4:
    return Conv4(input_shape=SHAPE, channels=8, norm="running")


def library(name: str) -> Pretrained:
    return Pretrained(input_shape=SHAPE, name=name, image_size=32)


def learner(backbone: Backbone) -> ProtoNet:
    return ProtoNet(backbone, Spec(SHAPE, "classification", 5))


def target(n: int = 24, classes: int = 3) -> Batch:
    """Noisy images of a stripe whose place is the class."""
    y = torch.arange(n) % classes
    x = 0.3 * torch.randn(n, *SHAPE)
    for number, label in enumerate(y.tolist()):
        x[number, :, 4 * label : 4 * label + 4] += 1
    return Batch(x, y, torch.ones_like(y))


def method(kind: str, backbone: Backbone, **settings: Any) -> TargetMethod:
    """As the YAML has it, with these settings changed."""
    changed = [f"transfer.{name}={value}" for name, value in settings.items()]
    config = compose("recipe=transfer", "target=digits", f"transfer={kind}", *changed)
    check(config)
    built: TargetMethod = construct(config.transfer, "transfer", learner=learner(backbone), source=None)
    return built


# What is common to both


@pytest.fixture(scope="module")
def trained() -> ViT:
    """A transformer that tells in which of four columns a stripe stands; the target's are rows."""
    torch.manual_seed(0)
    backbone = ViT(input_shape=SHAPE, patch_size=4, width=16, depth=3, heads=2)
    head = nn.Linear(backbone.features, 4)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(60):
        source = target(32, 4)
        loss = nn.functional.cross_entropy(head(backbone(source.x.mT)), source.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return backbone


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("prompts", "vit", {}),
        ("prompts", "vit", {"deep": False}),
        ("lora", "vit", {"optimizer.lr": 0.01}),
        ("lora", "conv4", {"optimizer.lr": 0.01}),
    ],
)
def test_it_learns_and_leaves_the_learner_as_it_was(
    kind: str, name: str, settings: dict[str, Any], trained: ViT
) -> None:
    backbone = (trained if name == "vit" else conv4()).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    tuned = method(kind, backbone, steps=60, **settings)
    train, test = target(), target(60)
    scores = tuned.predict(train, test.x, 3)
    assert scores.shape == (60, 3)
    assert (scores.argmax(1) == test.y).float().mean() > 0.8
    assert not scores.requires_grad
    assert backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(value.requires_grad and value.grad is None for value in backbone.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in backbone.modules())


@pytest.mark.parametrize(("kind", "backbone"), [("prompts", vit()), ("lora", vit()), ("lora", conv4())])
def test_backbones_that_were_scaled_and_shifted_before(kind: str, backbone: Backbone) -> None:
    """They go on as a plain backbone of the same weights would."""
    scaled = MTL(backbone, Spec(SHAPE, "classification", 5)).backbone
    assert isinstance(scaled, ScaledBackbone)
    assert scaled.name == type(backbone).__name__  # by which a result says what its weights saw
    for value in scaled.phi.values():
        nn.init.normal_(value)
    plain = copy.deepcopy(backbone)
    plain.load_state_dict({**plain.state_dict(), **scaled.weights()})
    images, found = target(), []
    for one in (plain, scaled):
        torch.manual_seed(1)
        # Without a rate what is added stays as it begins: low-rank changes at zero.
        found.append(method(kind, one, steps=2, **{"optimizer.lr": 0.0 if kind == "lora" else 0.01}))
        torch.manual_seed(1)
        found[-1] = found[-1].predict(images, images.x, 3)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["prompts", "lora"])
def test_only_the_few_parameters_and_the_head_learn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Backbone] = []
    groups: list[list[Tensor]] = []

    def copied(backbone: Backbone) -> Backbone:
        copies.append(frozen(backbone))
        return copies[-1]

    def optimizer(values: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups.append(list(values))
        return torch.optim.SGD(values, lr=0.1)

    monkeypatch.setattr(module, "frozen", copied)
    backbone = vit()
    tuned = method(kind, backbone, steps=5)
    tuned.training.optimizer = optimizer
    tuned.predict(target(), target().x, 3)
    own = dict(backbone.named_parameters())
    assert not copies[0].training
    for name, value in copies[0].named_parameters():
        name = name.replace("parametrizations.", "").replace(".original", "")
        if name in own:
            assert torch.equal(value, own[name]), name
            assert value.grad is None
            assert not value.requires_grad
    *few, weight, bias = groups[0]
    assert (weight.shape, bias.shape) == ((3, 16), (3,))
    sizes = [3 * 10 * 16] if kind == "prompts" else [size for m in matrices(backbone, None) for size in low_rank(m[0])]
    assert [value.numel() for value in few] == sizes
    assert all(value.grad is not None and value.grad.any() for value in groups[0])
    buffers = dict(copies[0].named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in backbone.named_buffers())


def low_rank(layer: Any) -> tuple[int, int]:
    return 4 * layer.in_features, 4 * layer.out_features


@pytest.mark.parametrize("kind", ["prompts", "lora"])
def test_draws_are_of_the_global_generator(kind: str) -> None:
    tuned, train, x = method(kind, vit(), steps=3), target(), target().x
    scores = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        scores.append(tuned.predict(train, x, 3))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_training_images_alone_are_augmented() -> None:
    tuned = method("prompts", vit(), steps=3)
    seen: list[int] = []
    tuned.augment = lambda x: seen.append(len(x)) or x
    tuned.predict(target(40), target(70).x, 3)
    assert sum(seen) == 32 + 8 + 32


def test_running_averages_stay() -> None:
    backbone = conv4()
    backbone(5 + torch.rand(8, *SHAPE))
    copy = frozen(backbone)
    add_low_rank(copy, 2, 4.0, None)
    copy(torch.rand(8, *SHAPE))
    assert torch.equal(copy.blocks[0].norm.running_mean, backbone.blocks[0].norm.running_mean)


def test_the_rate_rises_and_falls() -> None:
    training = Tuning(torch.optim.SGD, 20, 8, 0.2)
    rates = [training.rate(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[12] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    assert Tuning(torch.optim.SGD, 20, 8, 0.0).rate(0) == 1


# Prompts


def by_hand(backbone: ViT, x: Tensor, prompts: Tensor) -> Tensor:
    """The paper's equations: prompts behind the class token; deep ones take the place of those before."""
    tokens = backbone.embed(backbone.patches(x)) + backbone.places
    tokens = torch.cat([backbone.class_token.expand(len(x), -1, -1), tokens], 1)
    p = prompts.shape[1]
    for number, block in enumerate(backbone.blocks):
        if number == 0:
            tokens = torch.cat([tokens[:, :1], prompts[0].expand(len(x), -1, -1), tokens[:, 1:]], 1)
        elif number < len(prompts):
            tokens = torch.cat([tokens[:, :1], prompts[number].expand(len(x), -1, -1), tokens[:, 1 + p :]], 1)
        tokens = block(tokens)
    tokens = backbone.last_norm(tokens)
    return tokens[:, 0] if backbone.readout == "class" else tokens[:, 1 + p :].mean(1)


@pytest.mark.parametrize("readout", ["class", "mean"])
@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_the_paper_s(readout: str, deep: bool) -> None:
    plain, x = vit(readout).double(), torch.randn(3, *SHAPE, dtype=torch.float64)
    backbone = frozen(plain)
    prompts = add_prompts(backbone, 5, deep=deep)
    assert prompts.shape == (3 if deep else 1, 5, 16)
    prompts.data = torch.randn_like(prompts, dtype=torch.float64)
    torch.testing.assert_close(backbone(x), by_hand(plain, x, prompts))
    assert (backbone(x) - plain(x)).abs().max() > 0.01


@pytest.mark.parametrize("deep", [True, False])
def test_each_block_has_the_prompts_beside_its_tokens_and_deep_ones_are_new(deep: bool) -> None:
    backbone = frozen(vit(depth=4))
    prompts = add_prompts(backbone, 3, deep=deep)
    seen: list[Tensor] = []
    for block in backbone.blocks:
        block.norm1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    backbone(torch.rand(2, *SHAPE))
    assert [tokens.shape for tokens in seen] == [(2, 1 + 16 + 3, 16)] * 4
    fresh = [torch.equal(seen[n][:, -3:], prompts[n % len(prompts)].expand(2, -1, -1)) for n in range(4)]
    assert fresh == ([True] * 4 if deep else [True, False, False, False])


def test_prompts_start_as_the_official_code_s() -> None:
    big = ViT(input_shape=(3, 28, 28), patch_size=7, width=64, depth=2)
    prompts = add_prompts(frozen(big), 200, deep=True)
    limit = math.sqrt(6 / (3 * 7 * 7 + 64))
    assert 0.99 * limit < prompts.abs().max() <= limit
    assert prompts.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("name", ["timm:test_vit", "torchvision:vit_b_32"])
def test_prompts_in_a_library_s_transformer(name: str) -> None:
    """Prompts that are copies of nothing leave the number of tokens that the library reads out as it was."""
    plain = library(name)
    backbone, x = frozen(plain), torch.rand(2, *SHAPE)
    prompts = add_prompts(backbone, 4, deep=True)
    blocks = plain.token_blocks
    assert blocks is not None
    assert prompts.shape == (len(blocks), 4, plain.features)
    features = backbone(x)
    assert features.shape == (2, plain.features)
    assert not torch.allclose(features, plain.eval()(x), atol=1e-3)
    (features * torch.randn_like(features)).sum().backward()
    assert prompts.grad is not None
    assert prompts.grad.flatten(1).any(1).all()
    with torch.no_grad():  # torch's fast attention takes another way without gradients
        torch.testing.assert_close(backbone(x), features, rtol=1e-3, atol=1e-4)


# LoRA


class Attention(Backbone):
    """Torch's own attention, whose projections are one matrix that belongs to no linear layer."""

    features, norm = 16, "none"

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: object = None) -> Tensor:
        return self.attention(x[:, 0], x[:, 0], x[:, 0], need_weights=False)[0].mean(1)


@pytest.mark.parametrize(
    "make",
    [vit, conv4, Attention, lambda: library("timm:test_vit"), lambda: library("torchvision:shufflenet_v2_x0_5")],
)
def test_a_low_rank_change_is_that_of_the_weights(make: Any) -> None:
    """Nothing at first; then what the weights W + alpha/r B A, put there by hand, compute."""
    plain = make().eval()
    backbone, x = frozen(plain), torch.rand(2, *SHAPE)
    changes = add_low_rank(backbone, 2, 6.0, None)
    torch.testing.assert_close(backbone(x), plain(x))
    assert not any(b.any() for b in changes[1::2])
    for value in changes:
        value.data.normal_(std=0.1)
    changed = dict(plain.named_parameters())
    for (layer, name), a, b in zip(matrices(plain, None), changes[::2], changes[1::2], strict=True):
        weight = getattr(layer, name)
        difference = 6.0 / 2 * torch.einsum("or,ri->oi", b, a)
        path = next(path for path, value in changed.items() if value is weight)
        with torch.no_grad():
            changed[path].add_(difference.reshape(weight.shape))
    torch.testing.assert_close(backbone(x), plain(x), rtol=1e-3, atol=1e-4)
    backbone(x).square().sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in changes)


def test_low_rank_changes_start_as_the_official_code_s() -> None:
    a, b = add_low_rank(frozen(ViT(input_shape=SHAPE, patch_size=4, width=64, depth=1)), 200, 8.0, ["hidden"])
    assert (a.shape, b.shape) == ((200, 64), (256, 200))
    reference = torch.empty(200, 64)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert a.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.01)
    assert not b.any()


def test_targets_choose_matrices() -> None:
    backbone = vit()
    assert len(matrices(backbone, None)) == 1 + 3 * 4
    assert [layer for layer, _ in matrices(backbone, ["qkv"])] == [block.qkv for block in backbone.blocks]
    assert len(matrices(backbone, ["qkv", "blocks.0.out"])) == 4
    tuned = method("lora", backbone, targets="[qkv]", steps=1)
    assert tuned.predict(target(), target(4).x, 3).shape == (4, 3)


@pytest.mark.parametrize(("steps", "warm_up"), [(10, 0.95), (1, 0.6), (1, 0.0)])
def test_a_warm_up_may_be_all_of_few_steps(steps: int, warm_up: float) -> None:
    rates = Tuning(torch.optim.SGD, steps, 4, warm_up)
    assert all(0 < rates.rate(step) <= 1 for step in range(steps))
    assert 0 <= rates.rate(steps) <= 1  # which the schedule asks for after the last step


# Configs and mistakes


def test_the_yamls_say_what_they_are() -> None:
    assert {"prompts", "lora"} <= set(choices("transfer"))
    for name in ("prompts", "lora"):
        first = (Path(CONF) / "transfer" / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith("# ")
        assert first.endswith(f"transfer={name}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: method("prompts", conv4()),
            r"^transfer=prompts: needs a plain vision transformer, and Conv4 is none; use backbone=vit, or backbone=pretrained",
        ),
        (lambda: method("prompts", library("timm:test_resnet")), "Pretrained is none"),
        (
            lambda: method("prompts", vit(), prompts=0),
            "transfer.prompts=0: must be at least 1",
        ),
        (lambda: method("prompts", vit(), steps=0), "transfer.steps=0: must be at least 1"),
        (lambda: method("lora", vit(), warm_up=1.0), "transfer.warm_up=1: must be at least 0 and below 1"),
        (lambda: method("lora", vit(), rank=0), "transfer.rank=0: must be at least 1"),
        (
            lambda: matrices(Pixels((4,)), None),
            r"^transfer: Pixels has no weight matrices to change; take a backbone that has, or transfer=linear_probe$",
        ),
        (
            lambda: method("lora", vit(), targets="[query]"),
            r"transfer.targets=\['query'\]: are in no .* begin embed.weight, blocks.0",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_settings_are_typed() -> None:
    assert isinstance(method("prompts", vit()), Prompts)
    assert isinstance(method("lora", vit(), alpha=2), LoRA)
