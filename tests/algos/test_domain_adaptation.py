"""DANN, Deep CORAL, MMD and multi-task learning: their losses in closed form, and that each beats the source alone on a toy."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import compose
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from shell import metarun
from torch import Tensor

from metarun.algos.baseline import Baseline
from metarun.algos.coral import CORAL, coral
from metarun.algos.dann import DANN, Reversal, ramp
from metarun.algos.mmd import MMD, mmd
from metarun.algos.multitask import MultiTask, weigh
from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Batch, Spec
from metarun.errors import UserError
from metarun.target.base import refuse_other_places

SPEC = Spec((2,), "classification", 2, target_outputs=2)
ADAPTED = {"dann": DANN, "coral": CORAL, "mmd": MMD}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def domain(target: bool, count: int = 64, known: bool = True) -> Batch:
    """Two classes of vectors (a, b). On the source a tells them apart best; on the target it is noise. b is the same."""
    y = torch.arange(count) % 2
    side = 2.0 * y - 1
    a = 5 * torch.randn(count) if target else 2 * side + 0.5 * torch.randn(count)
    x = torch.stack([a, side + 0.4 * torch.randn(count)], dim=1)
    return Batch(x, y if known else torch.full_like(y, -1), torch.full_like(y, int(target)))


def mixed(known: bool, count: int = 64) -> Batch:
    """As many images of the source as of the target, whose labels are `known` or not."""
    parts = [domain(False, count), domain(True, count, known)]
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "domain")))


def alternating(count: int) -> Batch:
    """Images of the source and of the target by turns, as a step gets them."""
    both, order = mixed(True), torch.arange(128).reshape(2, 64).T.flatten()[:count]
    return Batch(both.x[order], both.y[order], both.domain[order])


@pytest.mark.parametrize(("kind", "least"), [(DANN, 2), (MMD, 2), (MultiTask, 2), (CORAL, 4)])
def test_a_step_of_too_few_images_is_refused_before_anything_is_trained(kind: type[Algorithm], least: int) -> None:
    algorithm = kind(body(), SPEC)
    for count in range(1, 6):
        with pytest.raises(UserError) if count < least else nullcontext():
            algorithm.loss(alternating(count), 0)
        refused = pytest.raises(
            UserError, match=rf"^train.tasks_per_step={count}: {kind.__name__} .* at least {least} "
        )
        with refused if count < least else nullcontext():
            algorithm.check(count, earlier=None)


def body(width: int = 16) -> MLP:
    return MLP(input_shape=(2,), hidden=[width], init_std=None)


def trained(algorithm: Algorithm, steps: int) -> Algorithm:
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.01)
    for step in range(steps):
        loss, _ = algorithm.loss(mixed(algorithm.uses_target == "labels"), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return algorithm.eval()


def accuracy(algorithm: Algorithm, target: bool) -> float:
    test = domain(target, 1000)
    return (algorithm.classify(test.x).argmax(1) == test.y).double().mean().item()


def gradient(loss: Tensor, algorithm: Algorithm, part: str) -> list[Tensor]:
    parameters = list(algorithm.get_submodule(part).parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# What they share


@pytest.mark.parametrize(
    ("kind", "width", "steps", "settings"),
    [
        (DANN, 4, 400, {"ramp_steps": 100, "reversal": 3.0}),
        (CORAL, 16, 300, {"weight": 10.0, "layers": ["features", "logits"]}),
        (MMD, 16, 100, {}),
        (MultiTask, 16, 100, {}),
        (MultiTask, 16, 100, {"weighting": "fixed"}),
    ],
)
def test_each_beats_the_source_alone_on_another_distribution(
    kind: type[Baseline], width: int, steps: int, settings: dict[str, object]
) -> None:
    alone = trained(Baseline(body(width), SPEC), steps)
    torch.manual_seed(0)
    adapted = trained(kind(body(width), SPEC, **settings), steps)
    assert accuracy(alone, False) > 0.98
    assert accuracy(alone, True) < 0.65
    assert accuracy(adapted, True) > 0.75


@pytest.mark.parametrize("kind", ADAPTED.values())
def test_target_labels_are_not_read(kind: type[Baseline]) -> None:
    algorithm, blind = kind(body(), SPEC), mixed(known=False)
    told = Batch(blind.x, torch.where(blind.domain == 1, torch.arange(len(blind.y)) % 2, blind.y), blind.domain)
    for one, other in zip(
        *(gradient(algorithm.loss(batch, 50)[0], algorithm, "") for batch in (blind, told)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [*ADAPTED.values(), MultiTask])
def test_the_order_of_a_batch_does_not_matter_and_logs_are_detached(kind: type[Baseline]) -> None:
    algorithm, batch = kind(body(), SPEC).double(), mixed(known=kind is MultiTask)
    order = torch.randperm(len(batch.x))
    both = [
        Batch(batch.x.double(), batch.y, batch.domain),
        Batch(batch.x[order].double(), batch.y[order], batch.domain[order]),
    ]
    (loss, shown), (shuffled, _) = (algorithm.loss(one, 50) for one in both)
    torch.testing.assert_close(loss, shuffled)
    assert all(value.shape == () and not value.requires_grad and value.isfinite() for value in shown.values())


@pytest.mark.parametrize("kind", [*ADAPTED.values(), MultiTask])
def test_images_of_one_domain_alone_are_one_clear_line(kind: type[Baseline]) -> None:
    with pytest.raises(UserError, match=r"(?=.*recipe=domain_adaptation)(?!.*\n)"):
        kind(body(), SPEC).loss(domain(False), 0)


@pytest.mark.parametrize("name", ["dann", "coral", "mmd", "multitask"])
def test_configs_hold_what_training_takes(name: str) -> None:
    config = compose(f"algo={name}")
    assert config.backbone.norm == "running"
    assert config.train.tasks_per_step % 2 == 0
    algorithm = instantiate(config.algo, backbone=body(), spec=SPEC)
    assert algorithm.trains_on == "batches"
    assert algorithm.whole_batch
    assert algorithm.uses_target == ("labels" if name == "multitask" else "images")
    if name == "dann":
        assert OmegaConf.to_container(config.algo, resolve=True)["ramp_steps"] == config.train.steps


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DANN, {"domain_hidden": 0}),
        (DANN, {"reversal": -1.0}),
        (DANN, {"ramp_steps": 0}),
        (DANN, {"sharpness": 0.0}),
        (CORAL, {"weight": -1.0}),
        (CORAL, {"layers": ["logit"]}),
        (MMD, {"weight": -1.0}),
        (MMD, {"layers": []}),
        (MMD, {"kernels": 0}),
        (MMD, {"factor": 0.0}),
        (MultiTask, {"weighting": "unsure"}),
        (MultiTask, {"target_weight": -1.0}),
    ],
)
def test_settings_out_of_range_are_named(kind: type[Baseline], settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"algo\.{next(iter(settings))}="):
        kind(body(), SPEC, **settings)


# DANN


def test_reversal_is_the_identity_whose_gradient_is_the_negative_of_finite_differences() -> None:
    x, strength = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), 0.7

    def value(x: Tensor) -> Tensor:
        return (x.sin() * torch.arange(12.0, dtype=torch.float64).view(4, 3)).sum()

    assert torch.equal(Reversal.apply(x, strength), x)
    (found,) = torch.autograd.grad(value(Reversal.apply(x, strength)), x)
    step = 1e-6
    for place in range(12):
        change = torch.zeros(12, dtype=torch.float64)
        change[place] = step
        slope = (value(x + change.view(4, 3)) - value(x - change.view(4, 3))) / (2 * step)
        assert found.flatten()[place].item() == pytest.approx(-strength * slope.item(), abs=1e-8)


def test_the_ramp_of_lambda() -> None:
    assert ramp(0, 1000, 10.0) == 0
    assert ramp(100, 1000, 10.0) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert ramp(500, 1000, 10.0) == pytest.approx(math.tanh(2.5))  # 2 / (1 + e^-u) - 1 is tanh(u / 2)
    assert ramp(1000, 1000, 10.0) == ramp(5000, 1000, 10.0) == pytest.approx(math.tanh(5))
    assert all(ramp(step + 1, 1000, 10.0) > ramp(step, 1000, 10.0) for step in range(1000))


def test_dann_is_the_baseline_with_a_domain_loss_reversed_in_the_backbone_alone() -> None:
    dann = DANN(body(), SPEC, reversal=0.5, ramp_steps=10)
    batch = mixed(known=False)
    features = dann.features_of(batch.x)
    classes, _ = dann.classification_loss(dann.head(features), batch)
    domains = F.binary_cross_entropy_with_logits(dann.domain(features)[:, 0], batch.domain.float())
    for step, strength in ((0, 0.0), (4, 0.5 * ramp(4, 10, 10.0)), (99, 0.5 * math.tanh(5))):
        loss, shown = dann.loss(batch, step)
        torch.testing.assert_close(loss, classes + domains)
        torch.testing.assert_close(shown["domain_loss"], domains.detach())
        for part, weight in (("backbone", -strength), ("head", 1.0), ("domain", 1.0)):
            both = zip(gradient(classes, dann, part), gradient(domains, dann, part), strict=True)
            for one, (of_classes, of_domains) in zip(gradient(loss, dann, part), both, strict=True):
                torch.testing.assert_close(one, of_classes + weight * of_domains)
    assert max(value.abs().max() for value in gradient(domains, dann, "backbone")) > 1e-3


# Deep CORAL


def test_coral_is_the_distance_of_the_covariances() -> None:
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(20, 4)), 2 * generator.normal(size=(15, 4)) + 1
    expected = np.square(np.cov(source, rowvar=False) - np.cov(target, rowvar=False)).sum() / (4 * 4**2)
    assert coral(torch.tensor(source), torch.tensor(target)).item() == pytest.approx(expected, rel=1e-12)


def test_coral_sees_second_moments_alone() -> None:
    source = torch.randn(30, 5, dtype=torch.float64)
    moved = (source + 7)[torch.randperm(30)]
    assert coral(source, moved).item() == pytest.approx(0, abs=1e-20)
    assert coral(source, -source).item() == pytest.approx(0, abs=1e-20)
    assert coral(source, 2 * source).item() > 0.01


@pytest.mark.parametrize("layers", [["logits"], ["features"], ["features", "logits"]])
def test_corals_loss_is_the_baselines_and_the_weighted_distances(layers: list[str]) -> None:
    algorithm, batch = CORAL(body(), SPEC, weight=3.0, layers=layers), mixed(known=False)
    features = algorithm.features_of(batch.x)
    found = {"features": features, "logits": algorithm.head(features)}
    distance = sum(coral(found[layer][:64], found[layer][64:]) for layer in layers)
    classes = F.cross_entropy(found["logits"][:64], batch.y[:64])
    torch.testing.assert_close(algorithm.loss(batch, 0)[0], classes + 3 * distance)


def test_a_domain_of_one_image_has_no_covariance() -> None:
    batch = mixed(known=False, count=1)
    with pytest.raises(
        UserError, match=r"^algo: CORAL needs 2 images of .*, not 1 and 1; .*raise train\.tasks_per_step$"
    ):
        CORAL(body(), SPEC).loss(batch, 0)


# MMD


def slow_mmd(source: np.ndarray, target: np.ndarray, kernels: int, factor: float) -> float:
    """The biased estimate, pair by pair."""
    both = [*source, *target]
    pairs = [np.sum((a - b) ** 2) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    widths = [np.mean(pairs) * factor**u for u in range(-(kernels // 2), kernels - kernels // 2)]

    def mean(one: np.ndarray, other: np.ndarray) -> float:
        values = [np.exp(-np.sum((a - b) ** 2) / width) for a in one for b in other for width in widths]
        return float(np.sum(values)) / (len(one) * len(other))

    return mean(source, source) + mean(target, target) - 2 * mean(source, target)


@pytest.mark.parametrize(("kernels", "factor"), [(5, 2.0), (1, 2.0), (4, 3.0)])
def test_mmd_is_that_of_a_double_loop(kernels: int, factor: float) -> None:
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(9, 3)), generator.normal(size=(6, 3)) + 0.5
    found = mmd(torch.tensor(source), torch.tensor(target), kernels, factor).item()
    assert found == pytest.approx(slow_mmd(source, target, kernels, factor), rel=1e-10)


def test_mmd_of_equal_samples_is_zero_and_grows_with_the_shift() -> None:
    source = torch.randn(40, 3, dtype=torch.float64)
    assert mmd(source, source[torch.randperm(40)]).item() == pytest.approx(0, abs=1e-12)
    assert mmd(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-6)
    other = torch.randn(40, 3, dtype=torch.float64)
    found = [mmd(source, other + shift).item() for shift in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found)
    assert found[-1] > 10 * found[0] > 0


def test_mmd_is_as_exact_far_from_the_origin_and_its_gradient_is_that_of_finite_differences() -> None:
    source, target = torch.randn(12, 3), torch.randn(10, 3) + 1
    torch.testing.assert_close(mmd(source + 1000, target + 1000), mmd(source, target), rtol=0, atol=1e-3)
    source, target = source.double().requires_grad_(), target.double()
    (found,) = torch.autograd.grad(mmd(source, target), source)
    width = ((torch.cat([source, target])[:, None] - torch.cat([source, target])) ** 2).sum().item() / (22 * 21)

    def fixed(source: Tensor) -> float:  # the bandwidth is a constant
        def mean(a: Tensor, b: Tensor) -> Tensor:
            return sum(torch.exp(-(a[:, None] - b).square().sum(2) / (width * 2.0**u)) for u in range(-2, 3)).mean()

        return (mean(source, source) + mean(target, target) - 2 * mean(source, target)).item()

    change = torch.zeros_like(source)
    change[3, 1] = 1e-6
    slope = (fixed(source.detach() + change) - fixed(source.detach() - change)) / 2e-6
    assert found[3, 1].item() == pytest.approx(slope, rel=1e-5)


def test_mmds_loss_is_the_baselines_and_the_weighted_distances() -> None:
    algorithm, batch = MMD(body(), SPEC, weight=3.0), mixed(known=False)
    features = algorithm.features_of(batch.x)
    logits = algorithm.head(features)
    distance = mmd(features[:64], features[64:]) + mmd(logits[:64], logits[64:])
    classes = F.cross_entropy(logits[:64], batch.y[:64])
    torch.testing.assert_close(algorithm.loss(batch, 0)[0], classes + 3 * distance)


# Multi-task learning


def test_the_best_variance_of_a_task_is_its_loss() -> None:
    losses = torch.tensor([0.3, 2.0], dtype=torch.float64)
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=100, tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = weigh(losses, logs)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(logs.detach().exp(), losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(weigh(losses, logs).detach(), (1 + losses.log()).sum(), rtol=1e-9, atol=0)


def test_each_task_has_its_head_and_labels() -> None:
    spec = Spec((2,), "classification", 2, target_outputs=5)
    batch = mixed(known=True)
    y = torch.where(batch.domain == 1, torch.arange(128) % 5, batch.y)
    batch = Batch(batch.x, y, batch.domain)
    fixed = MultiTask(body(), spec, weighting="fixed", target_weight=0.3)
    unsure = MultiTask(body(), spec)
    unsure.load_state_dict({**fixed.state_dict(), "log_variances": torch.tensor([0.5, -1.0])})
    features = fixed.features_of(batch.x)
    source = F.cross_entropy(fixed.head(features[:64]), y[:64])
    target = F.cross_entropy(fixed.target_head(features[64:]), y[64:])
    torch.testing.assert_close(fixed.loss(batch, 0)[0], source + 0.3 * target)
    torch.testing.assert_close(unsure.loss(batch, 0)[0], math.exp(-0.5) * source + 0.5 + math.e * target - 1)
    assert fixed.classify(batch.x).shape == (128, 5)
    torch.testing.assert_close(fixed.classify(batch.x), fixed.target_head(features))
    assert "log_variances" not in dict(fixed.named_parameters())


def test_without_a_targets_labels_one_line_says_what_to_add() -> None:
    with pytest.raises(UserError, match=r"^algo: .*recipe=domain_adaptation"):
        MultiTask(body(), Spec((2,), "classification", 2))


def test_classes_that_stand_at_other_places_are_refused(tmp_path: Path) -> None:
    for root, names in {"images": "abc", "other": "bcz"}.items():
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            for shade in range(10):
                Image.new("L", (16, 16), 20 * shade).save(tmp_path / root / name / f"{shade}.png")
    words = ["data=folder", f"data.root={tmp_path / 'images'}", "target=folder", f"target.data.root={tmp_path / 'other'}",
             "data.image_size=16", "target.data.image_size=16", "backbone.channels=4", "train.steps=2",
             f"outputs={tmp_path / 'out'}"]  # fmt: skip
    for more in (["recipe=domain_adaptation", "algo=dann", "train.tasks_per_step=4"],
                 ["recipe=transfer", "algo=baseline", "train.validate_on=images", "transfer=density_ratio"]):  # fmt: skip
        done = metarun(*words, *more)
        assert done.status == 2, done.err
        assert "class b is number 1 of the target, but number 2 of the source" in done.said[-1]
    refuse_other_places(["0", "1"], ["zero", "one"])  # other names are nobody's mistake
