"""Classifiers of the source put to few-shot use, and what is trained on top of them, against plain computations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import double, episodes, toy_images
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from metarun.algos.baseline import Baseline
from metarun.algos.metabaseline import MetaBaseline
from metarun.algos.mtl import MTL, hardest
from metarun.algos.rfs import RFS
from metarun.algos.simpleshot import SimpleShot
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Backbone, Batch, Episodes, Spec, TaskShape
from metarun.errors import UserError
from metarun.ops.solvers import logistic

IMAGES = toy_images()
SHAPE = IMAGES.input_shape
CLASSES = 7


def built(kind: type[Algorithm], norm: str = "running", outputs: int = CLASSES, **settings: object) -> Algorithm:
    """A method in float64 on a small backbone, whose running averages are no longer at their start."""
    torch.manual_seed(0)
    algorithm = kind(
        Conv4(input_shape=SHAPE, channels=4, norm=norm), Spec(SHAPE, "classification", outputs), **settings
    )
    algorithm.double().train().backbone(torch.rand(32, *SHAPE, dtype=torch.float64))
    return algorithm.eval()


def tasks(shots: int = 2, count: int = 3, ways: int = 3) -> Episodes:
    return double(episodes(IMAGES, TaskShape(ways, shots, 4), count))


def unbalanced() -> Episodes:
    """Tasks of three ways with 1, 2 and 3 support images, of which a task's ways are in an order of its own."""
    batch = tasks()
    labels = torch.tensor([[0, 1, 1, 2, 2, 2], [2, 2, 1, 2, 1, 0], [1, 0, 2, 1, 1, 0]])
    return Episodes(batch.support_x, labels, batch.query_x, batch.query_y, 3)


def images(count: int = 12, target: int = 0) -> Batch:
    torch.manual_seed(1)
    y = torch.randint(CLASSES, (count,))
    domain = (torch.arange(count) < target).long()
    return Batch(torch.rand(count, *SHAPE, dtype=torch.float64), y, domain)


def test_test_tasks_go_through_the_network_some_at_a_time() -> None:
    """A batch of all tasks would be bounded by nothing."""
    algorithm, batch = built(SimpleShot), tasks(count=30)  # of 18 images each
    sizes: list[int] = []
    algorithm.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    support, queries = algorithm.embed(batch)
    assert sizes == [252, 252, 36]
    alone = [algorithm.embed(task) for task in batch.split(1)]
    close(support, torch.cat([one for one, _ in alone]))
    close(queries, torch.cat([one for _, one in alone]))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


# Baseline and Baseline++


def test_the_loss_is_that_of_the_sources_known_labels() -> None:
    algorithm, batch = built(Baseline), images(target=4)
    batch.y[7] = -1
    logits = algorithm.classify(batch.x)
    close(logits, algorithm.head(algorithm.backbone(batch.x)))
    loss, logs = algorithm.loss(batch, 0)
    known = [4, 5, 6, 8, 9, 10, 11]
    close(loss, F.cross_entropy(logits[known], batch.y[known]))
    assert logs["acc"].item() == pytest.approx((logits[known].argmax(1) == batch.y[known]).float().mean().item())
    batch.y.fill_(-1)
    assert algorithm.loss(batch, 0)[0].item() == 0


def test_smoothed_labels() -> None:
    algorithm, batch = built(Baseline, label_smoothing=0.1), images()
    batch.y[0] = -1
    chances = algorithm.classify(batch.x).log_softmax(1)[1:]
    wanted = 0.9 * F.one_hot(batch.y[1:], CLASSES).double() + 0.1 / CLASSES
    close(algorithm.loss(batch, 0)[0], -(wanted * chances).sum(1).mean())


@pytest.mark.parametrize("settings", [{}, {"cosine": True}, {"cosine": True, "class_scales": False, "scale": 5.0}])
def test_heads_trained_at_once_are_those_of_a_loop(settings: dict[str, object]) -> None:
    """Of torch's own SGD with the official settings, one task at a time, with its own layers and batches in the same order."""
    algorithm, batch = built(Baseline, head_epochs=15, **settings), unbalanced()
    found = algorithm.predict(batch)
    assert not found.requires_grad
    for task in range(3):
        support, query = (algorithm.backbone(x[task]).detach() for x in (batch.support_x, batch.query_x))
        torch.manual_seed(0)
        start = torch.empty(3, 4).uniform_(-0.5, 0.5)
        weight = nn.Parameter(start.double())
        extra = nn.Parameter(start.norm(dim=1).double() if settings else torch.zeros(3, dtype=torch.float64))
        length = extra if settings.get("class_scales", True) else 1

        def logits(x: Tensor, weight: Tensor = weight, extra: Tensor = extra, length: Tensor = length) -> Tensor:
            if not settings:
                return F.linear(x, weight, extra)
            return 2 * length * F.cosine_similarity(x[:, None], weight[None], dim=2)

        parameters = [weight] if isinstance(length, int) else [weight, extra]
        descent = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
        for _ in range(15):
            order = torch.randperm(6)
            for chosen in (order[:4], order[4:]):
                descent.zero_grad()
                F.cross_entropy(logits(support[chosen]), batch.support_y[task, chosen]).backward()
                descent.step()
        close(found[task], logits(query).detach())


def test_a_new_head_leaves_the_generator_and_the_classifier_alone() -> None:
    algorithm, batch = built(Baseline), tasks()
    before, state = copy.deepcopy(algorithm.state_dict()), torch.get_rng_state()
    algorithm.predict(batch)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name])


def test_rows_of_a_cosine_head_count_by_their_direction() -> None:
    algorithm, batch = built(Baseline, cosine=True, class_scales=False), images()
    logits = algorithm.classify(batch.x)
    assert algorithm.head.bias is None
    assert algorithm.head.length is None
    features, weight = algorithm.backbone(batch.x), algorithm.head.weight
    close(logits, 2 * (features / features.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T)
    algorithm.head.weight.data *= torch.rand(CLASSES, 1, dtype=torch.float64) + 0.5
    close(algorithm.classify(batch.x), logits)
    assert logits.abs().max() <= 2


def test_a_cosine_heads_scale_goes_by_the_number_of_classes() -> None:
    assert [built(Baseline, outputs=n, cosine=True).head.scale for n in (200, 201)] == [2, 10]
    algorithm = built(Baseline, outputs=201, cosine=True, scale=3.0)
    assert algorithm.head.scale == 3
    assert algorithm.new_head(5).scale == 2  # of a test task's
    learned = built(Baseline, cosine=True).head
    # So that a class's logit starts at 2 w x / |x|.
    torch.testing.assert_close(learned.length, learned.weight.norm(dim=1))


@pytest.mark.parametrize("norm", ["batch", "support", "group", "none"])
def test_features_of_all_tasks_at_once_are_those_of_each(norm: str) -> None:
    algorithm, batch = built(Baseline, norm), tasks()
    support, query = algorithm.embed(batch)
    for task in range(3):
        apart = algorithm.backbone(batch.support_x[task]), algorithm.backbone(batch.query_x[task])
        both = algorithm.backbone(torch.cat([batch.support_x[task], batch.query_x[task]]), 6).split([6, 12])
        for one, other in zip((support[task], query[task]), both if norm == "support" else apart, strict=True):
            close(one, other)


# SimpleShot


def test_simpleshot_by_hand() -> None:
    algorithm, batch = built(SimpleShot), unbalanced()
    algorithm.mean += torch.rand(4, dtype=torch.float64)
    found, measured = algorithm.predict(batch), algorithm.measures(batch)
    for task in range(3):
        support, query = (algorithm.backbone(x[task]) - algorithm.mean for x in (batch.support_x, batch.query_x))
        support, query = (x / x.norm(dim=1, keepdim=True) for x in (support, query))
        centroids = torch.stack([support[batch.support_y[task] == way].mean(0) for way in range(3)])
        close(found[task], -(query[:, None] - centroids).square().sum(2))
        right = (found[task].argmax(1) == batch.query_y[task]).double().mean()
        assert measured["acc_cl2n"][task].item() == pytest.approx(right.item())
    assert measured.keys() == {"acc_un", "acc_l2n", "acc_cl2n"}


def test_simpleshots_measures_count_no_answer_as_wrong() -> None:
    """As its accuracy does."""
    algorithm, batch = built(SimpleShot), tasks()
    batch.support_x[0] = torch.nan
    assert all(found[0] == 0 for found in algorithm.measures(batch).values())


def test_simpleshots_other_transforms() -> None:
    batch = tasks()
    for transform in ("un", "l2n"):
        algorithm = built(SimpleShot, transform=transform)
        algorithm.mean += 1
        support, query = algorithm.embed(batch)
        if transform == "l2n":
            support, query = (x / x.norm(dim=2, keepdim=True) for x in (support, query))
        centroids = support.unflatten(1, (3, 2)).mean(2)
        close(algorithm.predict(batch), -(query[:, :, None] - centroids[:, None]).square().sum(3))


def test_the_mean_is_of_all_batches_and_then_of_the_latest() -> None:
    algorithm = built(SimpleShot, "group", mean_momentum=0.4)
    means = []
    for number in range(4):
        batch = Batch(*(x[3 * number : 3 * number + 3] for x in vars(images()).values()))
        loss, _ = algorithm.loss(batch, number)
        close(loss, Baseline.loss(algorithm, batch, number)[0])
        means.append(algorithm.features_of(batch.x).mean(0).detach())
    assert not algorithm.mean.requires_grad
    wanted = 0.6 * (0.6 * (means[0] + means[1]) / 2 + 0.4 * means[2]) + 0.4 * means[3]
    close(algorithm.mean, wanted)


# Meta-Baseline


def test_meta_baseline_by_hand() -> None:
    algorithm, batch = built(MetaBaseline, temperature=3.0), unbalanced()
    found = algorithm.predict(batch)
    for task in range(3):
        support, query = (algorithm.backbone(x[task]) for x in (batch.support_x, batch.query_x))
        centroids = torch.stack([support[batch.support_y[task] == way].mean(0) for way in range(3)])
        close(found[task], 3 * F.cosine_similarity(query[:, None], centroids[None], dim=2))


def test_meta_baselines_temperature_learns_unless_told_not_to() -> None:
    batch = tasks()
    for learns in (True, False):
        algorithm = built(MetaBaseline, learn_temperature=learns)
        loss, _ = algorithm.loss(batch, 0)
        loss.backward()
        assert (algorithm.temperature.grad is not None) == learns
        assert algorithm.temperature.item() == 10


# RFS


@pytest.mark.parametrize(
    ("ways", "size", "cost"), [(3, 6, 1.0), (5, 40, 1.0), (4, 9, 100.0), (20, 100, 1.0), (5, 25, 1e4)]
)
def test_logistic_regression_is_scikit_learns(ways: int, size: int, cost: float) -> None:
    torch.manual_seed(0)
    labels = torch.stack([torch.cat([torch.arange(ways), torch.randint(ways, (size - ways,))]) for _ in range(2)])
    centres = torch.randn(ways, 16, dtype=torch.float64)
    support = F.normalize(centres[labels] + torch.randn(2, size, 16, dtype=torch.float64), dim=-1)
    query = F.normalize(torch.randn(2, 30, 16, dtype=torch.float64), dim=-1)
    found = logistic(support, F.one_hot(labels, ways), query, cost)
    for task in range(2):
        fitted = LogisticRegression(C=cost, tol=1e-12, max_iter=10_000, solver="newton-cg")
        fitted.fit(support[task].numpy(), labels[task].numpy())
        wanted = torch.from_numpy(fitted.predict_log_proba(query[task].numpy()))
        torch.testing.assert_close(found[task].log_softmax(1), wanted, rtol=1e-6, atol=1e-6)


def test_two_classes_have_weights_each() -> None:
    """As in the official code's multinomial regression: the conditions of its optimum hold."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(1, 8, 5, dtype=torch.float64), dim=-1)
    y = F.one_hot(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), 2).double()
    error = y - logistic(x, y, x, 2.0).softmax(-1)
    weights = 2.0 * x.mT @ error  # [1, 5, 2]
    close(error.sum(1), torch.zeros(1, 2, dtype=torch.float64))
    logits = x @ weights
    offset = (logistic(x, y, x, 2.0) - logits).squeeze(0)
    close(offset, offset[:1].expand_as(offset))


def test_rfs_is_logistic_regression_on_unit_features() -> None:
    algorithm, batch = built(RFS), unbalanced()
    found = algorithm.predict(batch).log_softmax(-1)
    for task in range(3):
        support, query = (
            F.normalize(algorithm.backbone(x[task]), dim=1).detach() for x in (batch.support_x, batch.query_x)
        )
        fitted = LogisticRegression(tol=1e-12, max_iter=10_000).fit(support.numpy(), batch.support_y[task].numpy())
        wanted = torch.from_numpy(fitted.predict_log_proba(query.numpy()))
        torch.testing.assert_close(found[task], wanted, rtol=1e-6, atol=1e-6)


def test_distillation() -> None:
    student, teacher, batch = built(RFS, distill=True, alpha=0.3, beta=0.6), built(RFS), images()
    for value in teacher.parameters():
        value.data += 0.3 * torch.randn_like(value)
    with pytest.raises(UserError, match=r"algo\.distill=true: needs a teacher"):
        student.loss(batch, 0)
    with pytest.raises(UserError, match=r"algo\.distill=true: needs a teacher"):
        student.check(64, earlier=None)  # before anything is written
    student.check(64, earlier=teacher)
    student.inherit(teacher)
    student.train()
    assert not student.teacher["backbone"].training
    loss, _ = student.loss(batch, 0)
    loss.backward()
    logits, told = student.classify(batch.x), teacher.classify(batch.x)
    assert (logits - told).abs().max() > 0.1
    p, q = (told / 4).softmax(1), (logits / 4).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    close(loss, 0.3 * F.cross_entropy(logits, batch.y) + 0.6 * 16 * divergence)
    for name, value in student.named_parameters():
        assert (value.grad is None) == name.startswith("teacher.")
    third = built(RFS, distill=True)
    third.teach(student.state_dict())  # born again
    close(third.teacher["head"].weight, student.head.weight)
    third.load_state_dict(student.state_dict())
    assert third.taught


@pytest.mark.parametrize(
    ("kind", "settings"), [(Baseline, {"cosine": True}), (MetaBaseline, {}), (RFS, {"outputs": CLASSES - 1})]
)
def test_what_is_no_linear_classifier_of_the_classes_teaches_nothing(
    kind: type[Algorithm], settings: dict[str, Any]
) -> None:
    student, earlier = built(RFS, distill=True), built(kind, **settings)
    told = rf"^algo\.distill=true: the teacher must be a linear classifier of {CLASSES} classes"
    with pytest.raises(UserError, match=told):
        student.check(64, earlier=earlier)
    with pytest.raises(UserError, match=told):
        student.inherit(earlier)
    built(RFS).check(64, earlier=earlier)


def test_without_distillation_a_stage_hands_on_its_backbone() -> None:
    one, other = built(RFS), built(Baseline)
    other.backbone.blocks[0].conv.weight.data += 1
    one.inherit(other)
    assert torch.equal(one.backbone.blocks[0].conv.weight, other.backbone.blocks[0].conv.weight)
    with pytest.raises(UserError, match=r"algo\.distill=false"):
        one.teach(other.state_dict())


# MTL


def transferred(norm: str = "running", **settings: object) -> MTL:
    algorithm = built(MTL, norm, outputs=3, inner_steps=2, inner_lr=0.5, **settings)
    assert isinstance(algorithm, MTL)
    return algorithm


def test_mtl_starts_as_its_frozen_backbone() -> None:
    algorithm, earlier, batch = transferred(), built(Baseline), images()
    earlier.backbone.blocks[0].conv.weight.data += 1
    algorithm.inherit(earlier)
    close(algorithm.backbone(batch.x), earlier.backbone(batch.x))
    assert algorithm.backbone.phi["blocks_1_conv_weight"].shape == (4, 4, 1, 1)
    assert algorithm.backbone.phi["blocks_1_conv_bias"].shape == (4,)
    again = transferred()
    again.backbone.phi["blocks_1_conv_weight"].data += 1
    other = transferred()
    other.inherit(again)
    close(other.backbone(batch.x), again.backbone(batch.x))


def test_mtl_scales_kernels_and_shifts_biases() -> None:
    algorithm, batch = transferred(scale_rate=0.1), images()
    plain = copy.deepcopy(algorithm.backbone.frozen)
    for name, change in algorithm.backbone.phi.items():
        change.data = torch.randn_like(change)
        value = plain.get_parameter(next(own for own, _ in plain.named_parameters() if own.replace(".", "_") == name))
        if value.ndim == 4:
            for out in range(value.shape[0]):
                for into in range(value.shape[1]):
                    value.data[out, into] *= 1 + 0.1 * change[out, into].item()
        else:
            value.data += 0.1 * change.data
    close(algorithm.backbone(batch.x), plain(batch.x))
    assert (algorithm.backbone(batch.x) - algorithm.backbone.frozen(batch.x)).abs().max() > 0.01


def test_mtl_leaves_the_frozen_weights_unchanged() -> None:
    algorithm = transferred().train()
    before = {name: value.clone() for name, value in algorithm.named_parameters()}
    optimizer = torch.optim.Adam([value for value in algorithm.parameters() if value.requires_grad], lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        algorithm.loss(tasks(), step)[0].backward()
        optimizer.step()
    for name, value in algorithm.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("backbone.frozen.")


@pytest.mark.parametrize("hard", [0, 1, 2])
def test_mtls_loss_by_hand(hard: int) -> None:
    algorithm, batch = transferred(hard_tasks=hard / 3 + 0.01), tasks()

    def solve(support: Tensor, query: Tensor) -> Tensor:
        """Losses `[3, 4]` of the queries of a task's three ways after two steps of the head."""
        labels = [torch.arange(3).repeat_interleave(n) for n in (2, 4)]
        weight, bias = algorithm.head.weight, algorithm.head.bias
        for _ in range(2):
            inner = F.cross_entropy(F.linear(support.detach(), weight, bias), labels[0])
            of_weight, of_bias = torch.autograd.grad(inner, (weight, bias))
            weight, bias = weight - 0.5 * of_weight, bias - 0.5 * of_bias
        return F.cross_entropy(F.linear(query, weight, bias), labels[1], reduction="none").view(3, 4)

    features = [
        (algorithm.backbone(support), algorithm.backbone(query))
        for support, query in zip(batch.support_x, batch.query_x, strict=True)
    ]
    losses = [solve(*sets) for sets in features]
    order = []  # of (task, way)
    ranked = [sorted(range(3), key=lambda way, own=own: -own[way].mean().item()) for own in losses]
    for rank in range(3):
        level = [(task, ranked[task][rank]) for task in range(3)]
        order += sorted(level, key=lambda pair: -losses[pair[0]][pair[1]].mean().item())
    for number in range(hard):
        chosen = order[3 * number : 3 * number + 3]
        support = torch.cat([features[task][0][2 * way : 2 * way + 2] for task, way in chosen])
        query = torch.cat([features[task][1][4 * way : 4 * way + 4] for task, way in chosen])
        losses.append(solve(support, query))
    wanted = torch.stack(losses).mean()
    loss, _ = algorithm.loss(batch, 0)
    close(loss, wanted)
    learned = [value for value in algorithm.parameters() if value.requires_grad]
    for one, other in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(wanted, learned), strict=True):
        close(one, other)


def test_hard_tasks_have_the_worst_way_of_each_task_first() -> None:
    losses = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.8]])
    found, ways = hardest(losses, 2)
    assert torch.stack([found, ways], 2).tolist() == [[[1, 0], [0, 1], [1, 2]], [[0, 2], [1, 1], [0, 0]]]


def test_mtl_takes_vectors() -> None:
    torch.manual_seed(0)
    frozen = MLP(input_shape=(6,), hidden=[5], init_std=None)
    algorithm = MTL(frozen, Spec((6,), "classification", 2))
    x = torch.rand(3, 6)
    torch.testing.assert_close(algorithm.backbone(x), frozen(x))
    assert algorithm.backbone.phi["layers_0_weight"].shape == (5, 6)


def test_mtls_backbone_says_of_itself_what_the_frozen_one_says() -> None:
    """Whether its tasks can be vectorised, say: it is asked as any backbone is."""
    frozen = MLP(input_shape=(6,), hidden=[5], init_std=None)
    for name in ("reads_texts", "vectorizable", "draws", "channels_last", "pretrained"):
        setattr(frozen, name, not getattr(frozen, name))
    frozen.image_size = 224  # type: ignore[assignment]
    scaled = MTL(frozen, Spec((6,), "classification", 2)).backbone
    told = {name for name in vars(Backbone) | Backbone.__annotations__ if not name.startswith("_")}
    # What a scaled one is itself.
    told -= {
        "blocks",
        "identity",
        *(name for name in told if callable(getattr(Backbone, name, None))),
    }
    assert {name: getattr(scaled, name) for name in told} == {name: getattr(frozen, name) for name in told}
    assert scaled.image_size == 224


# Settings


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Baseline, {"scale": 0.0}, r"^algo\.scale=0: must be above 0"),
        (Baseline, {"label_smoothing": 1.0}, r"^algo\.label_smoothing=1: must be at least 0 and below 1"),
        (SimpleShot, {"mean_momentum": 0.0}, r"^algo\.mean_momentum=0: must be above 0 and at most 1"),
        (SimpleShot, {"transform": "cl2"}, r"^algo\.transform=cl2: is not one of un, l2n, cl2n"),
        (MetaBaseline, {"temperature": 0.0}, r"^algo\.temperature=0: must be above 0"),
        (RFS, {"cost": 0.0}, r"^algo\.cost=0: must be above 0"),
        (RFS, {"cost": 1e6}, r"^algo\.cost=1000000: must be above 0 and at most 100000"),
        (RFS, {"distill_temperature": 0.0}, r"^algo\.distill_temperature=0: must be above 0"),
        (MTL, {"scale_rate": 0.0}, r"^algo\.scale_rate=0: must be above 0"),
        (MTL, {"hard_tasks": 2.0}, r"^algo\.hard_tasks=2: must be from 0 to 1"),
    ],
)
def test_settings_out_of_range(kind: type[Algorithm], settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(kind, **settings)
