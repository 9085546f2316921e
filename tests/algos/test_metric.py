"""MatchingNet, RelationNet, FEAT and DN4 beside plain loops in double precision, and the feature maps of two."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from helpers import double, episodes, hardware, toy_images, with_
from shell import metarun, result, run_folder
from torch import Tensor, nn

from metarun.algos.dn4 import DN4
from metarun.algos.feat import FEAT
from metarun.algos.matchingnet import MatchingNet
from metarun.algos.protonet import ProtoNet
from metarun.algos.relationnet import RelationNet
from metarun.backbones import conv4, resnet12
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.backbones.pixels import Pixels
from metarun.backbones.resnet12 import ResNet12
from metarun.backbones.spatial import feature_maps, map_size
from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.engine.gradients import gradient_step
from metarun.engine.traced_step import TracedStep
from metarun.errors import UserError

Method = TypeVar("Method", bound=Algorithm)

IMAGES = toy_images()
SHAPE = (1, 16, 16)
SPEC = Spec(SHAPE, "classification", 5)
BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
TASKS = pytest.mark.parametrize("task", [TaskShape(5, 1, 2), TaskShape(3, 2, 2)], ids=["1 shot", "2 shots"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(kind: type[Method], norm: str = "batch", vectorize: bool = False, **settings: Any) -> Method:
    """In double precision, in evaluation mode, with weights away from zero biases and unit scales."""
    torch.manual_seed(1)
    algorithm = kind(Conv4(input_shape=SHAPE, channels=6, norm=norm), SPEC, **settings).double()
    for parameter in algorithm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    algorithm.vectorize = vectorize
    return algorithm.eval()


@pytest.mark.parametrize("kind", [ProtoNet, MatchingNet], ids=["euclidean", "cosine"])
def test_on_pixels_it_is_the_nearest_neighbour(kind: type[Algorithm]) -> None:
    """Of one shot, by each of the two measures."""
    algorithm = kind(Pixels(input_shape=SHAPE), SPEC)
    batch = batch_of(TaskShape(5, 1, 6), tasks=8)
    for task, scores in enumerate(algorithm.predict(batch)):
        support, queries = batch.support_x[task].flatten(1), batch.query_x[task].flatten(1)
        nearest = torch.cdist(queries, support).argmin(1)
        if kind is MatchingNet:
            nearest = F.cosine_similarity(queries[:, None], support, dim=-1).argmax(1)
        assert scores.argmax(-1).tolist() == batch.support_y[task][nearest].tolist()


def test_pixels_are_tested_and_not_trained(tmp_path: Path) -> None:
    words = ["algo=protonet", "data=glyphs", "backbone=pixels", "test.episodes=20", f"outputs={tmp_path}"]
    refused = metarun(*words, "train.steps=5")
    assert refused.status == 2
    assert refused.said == [
        "metarun: train.steps=5: there is nothing to train in ProtoNet on this backbone; use train.steps=0"
    ]
    assert not list(tmp_path.iterdir())
    assert metarun(*words, "train.steps=0").status == 0
    found = result(run_folder(tmp_path))
    assert found["test/acc"] > 0.3  # of five ways


TWO_SHOTS = TaskShape(3, 2, 2)


def batch_of(task: TaskShape = TWO_SHOTS, tasks: int = 2) -> Episodes:
    """Their support sets in any order."""
    batch = double(episodes(IMAGES, task, tasks))
    order = torch.randperm(batch.support_x.shape[1])
    return with_(batch, support_x=batch.support_x[:, order], support_y=batch.support_y[:, order])


def embeddings(algorithm: Algorithm, batch: Episodes, task: int) -> tuple[Tensor, Tensor]:
    """The backbone's features of one task's support images and of its queries."""
    n_support = batch.support_x.shape[1]
    both = algorithm.backbone(torch.cat([batch.support_x[task], batch.query_x[task]]), n_support)
    return both[:n_support], both[n_support:]


def maps_of(algorithm: Algorithm, batch: Episodes, task: int) -> tuple[Tensor, Tensor]:
    """Unpooled feature maps of one task's support images and of its queries."""
    n_support = batch.support_x.shape[1]
    images = torch.cat([batch.support_x[task], batch.query_x[task]])
    both = without_pools(algorithm.backbone, images, 2)
    return both[:n_support], both[n_support:]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# Feature maps


def without_pools(backbone: Backbone, images: Tensor, unpooled: int) -> Tensor:
    """The blocks one by one; the last `unpooled` with a pool over single values."""
    pool = F.max_pool2d
    blocks = list(backbone.blocks)
    for number, block in enumerate(blocks):
        with pytest.MonkeyPatch.context() as patch:
            if number >= len(blocks) - unpooled:
                for module in (conv4, resnet12):
                    patch.setattr(module.F, "max_pool2d", lambda x, size: pool(x, 1))
            images = block(images, None, None)
    return images


@pytest.mark.parametrize("unpooled", range(5))
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (17, 36)])
@pytest.mark.parametrize("kind", ["conv4", "resnet12"])
def test_maps_are_those_of_the_blocks_without_their_pools(kind: str, size: tuple[int, int], unpooled: int) -> None:
    shape = (1, *size)
    if kind == "conv4":
        backbone: Backbone = Conv4(input_shape=shape, channels=4).double()
    else:
        backbone = ResNet12(input_shape=shape, widths=[2, 3, 4, 5], readout="flatten").double()
    images = torch.rand(3, *shape, dtype=torch.float64)
    maps = feature_maps(backbone.eval(), images, unpooled=unpooled)
    assert torch.equal(maps, without_pools(backbone, images, unpooled))
    channels, height, width = map_size(backbone, shape, unpooled=unpooled)
    assert maps.shape == (3, channels, height, width)
    assert (height, width) == tuple(side // 2 ** (4 - unpooled) for side in size)
    if not unpooled:
        assert torch.equal(maps.flatten(1), backbone(images))


def test_maps_of_strides_and_of_vectors() -> None:
    backbone = Conv4(input_shape=(1, 28, 28), channels=4, downsample="stride")
    images = torch.rand(3, 1, 28, 28)
    maps = feature_maps(backbone, images)
    assert maps.shape == (3, 4, 2, 2)
    assert torch.equal(maps.flatten(1), backbone(images))
    assert map_size(Pixels(input_shape=(7,)), (7,), unpooled=0) == (7, 1, 1)  # of a backbone that has no weights
    vectors = MLP(input_shape=(7,), hidden=[6, 5])
    assert torch.equal(feature_maps(vectors, images[:, 0, 0, :7], unpooled=2)[..., 0, 0], vectors(images[:, 0, 0, :7]))


def test_finding_the_size_changes_nothing() -> None:
    backbone = Conv4(input_shape=SHAPE, channels=4, norm="running")
    before = copy.deepcopy(backbone.state_dict())
    state = torch.get_rng_state()
    assert map_size(backbone, SHAPE, unpooled=2) == (4, 4, 4)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", [RelationNet, DN4])
def test_backbones_without_such_maps_are_named(kind: type[Method]) -> None:
    def build(unpooled: int = 2, **settings: str) -> None:
        kind(Conv4(input_shape=SHAPE, channels=4, **settings), SPEC, unpooled=unpooled)

    with pytest.raises(UserError, match=r"^backbone.readout=mean: .* use backbone.readout=flatten$"):
        build(readout="mean")
    with pytest.raises(UserError, match=r"^algo.unpooled=2: backbone.downsample=stride .* use algo.unpooled=0"):
        build(downsample="stride")
    with pytest.raises(UserError, match=r"^algo.unpooled=5: must be from 0 to the backbone's 4 blocks$"):
        build(5)
    with pytest.raises(UserError, match=r"^algo.unpooled=-1: must be at least 0$"):
        build(-1)


# MatchingNet


@BOTH
@TASKS
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_attention_is_the_softmax_of_cosines(scale: float, task: TaskShape, vectorize: bool) -> None:
    algorithm, batch = tiny(MatchingNet, vectorize=vectorize, scale=scale), batch_of(task)
    attention, logits = algorithm.log_attention(batch).exp(), algorithm.predict(batch)
    close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    close(logits.exp().sum(-1), torch.ones_like(logits[..., 0]))
    for number in range(2):
        support, queries = embeddings(algorithm, batch, number)
        for row, query in enumerate(queries):
            cosines = torch.stack([query @ other / (query.norm() * other.norm()) for other in support])
            expected = (scale * cosines).exp() / (scale * cosines).exp().sum()
            close(attention[number, row], expected)
            for way in range(task.ways):
                close(logits[number, row, way].exp(), expected[batch.support_y[number] == way].sum())
    loss, logs = algorithm.loss(batch, 0)
    right = logits.gather(-1, batch.query_y[..., None])
    close(loss, -right.mean())
    assert logs["acc"].item() == pytest.approx((logits.argmax(-1) == batch.query_y).double().mean().item())


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_of_one_shot_it_is_the_nearest_neighbour_by_cosine(scale: float) -> None:
    algorithm, batch = tiny(MatchingNet, scale=scale), batch_of(TaskShape(5, 1, 4))
    for number in range(2):
        support, queries = embeddings(algorithm, batch, number)
        nearest = F.cosine_similarity(queries[:, None], support, dim=-1).argmax(1)
        assert torch.equal(algorithm.predict(batch)[number].argmax(-1), batch.support_y[number][nearest])


def lstm_step(cell: nn.Module, suffix: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    weights = [getattr(cell, f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    i, f, g, o = (weights[0] @ x + weights[1] @ h + weights[2] + weights[3]).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@BOTH
@TASKS
@pytest.mark.parametrize("steps", [1, 3])
def test_full_context_follows_the_appendix(steps: int, task: TaskShape, vectorize: bool) -> None:
    algorithm = tiny(MatchingNet, vectorize=vectorize, full_context=True, processing_steps=steps)
    batch = batch_of(task)
    found = algorithm.embed(batch)
    for number in range(2):
        support, queries = embeddings(algorithm, batch, number)
        expected = support.clone()
        for suffix, order in (("_l0", range(len(support))), ("_l0_reverse", reversed(range(len(support))))):
            h = c = torch.zeros_like(support[0])
            for row in order:
                h, c = lstm_step(algorithm.context.support, suffix, support[row], h, c)
                expected[row] += h
        close(found[0][number], expected)
        for row, query in enumerate(queries):
            h, c = query, torch.zeros_like(query)
            for _ in range(steps):
                weights = torch.stack([h @ other for other in expected]).softmax(0)
                read = sum(weight * other for weight, other in zip(weights, expected, strict=True))
                state, c = lstm_step(algorithm.context.query, "", torch.cat([query, read]), h, c)
                h = state + query
            close(found[1][number, row], h)


def test_context_is_the_support_set() -> None:
    """Another support image changes all other embeddings; without full context it does not."""
    batch = batch_of()
    other = with_(batch, support_x=torch.cat([batch.support_x[:, :-1], batch.support_x[:, :1]], dim=1))
    for full_context in (False, True):
        algorithm = tiny(MatchingNet, "none", full_context=full_context)
        for before, after in zip(algorithm.embed(batch), algorithm.embed(other), strict=True):
            changes = (before - after).abs().amax(-1)[:, :-1]
            assert (changes > 1e-9).all() if full_context else (changes < 1e-12).all()


def test_full_context_can_be_recorded() -> None:
    algorithm = tiny(MatchingNet, vectorize=True, full_context=True, processing_steps=1).train()
    batch, found = batch_of(TaskShape(2, 1, 1)), []
    for recorded in (None, TracedStep()):
        chosen = replace(hardware(vectorize=True), traced=recorded)
        gradient_step(algorithm, batch, 0, 1.0, 0, chosen)
        found.append({name: value.grad for name, value in algorithm.named_parameters()})
    assert recorded is not None
    assert None not in recorded.recordings.values()
    for name, value in found[0].items():
        close(found[1][name], value)


def test_matching_settings() -> None:
    assert tiny(MatchingNet).context is None
    with pytest.raises(UserError, match=r"^algo.scale=0: must be above 0"):
        tiny(MatchingNet, scale=0)
    with pytest.raises(UserError, match=r"^algo.processing_steps=0: must be at least 1"):
        tiny(MatchingNet, processing_steps=0)


# RelationNet


def relations(algorithm: RelationNet, batch: Episodes, task: int) -> Tensor:
    """Scores `[N*Q, N]`, with the two maps of each pair laid side by side as in the paper."""
    support, queries = maps_of(algorithm, batch, task)
    pairs = []
    for query in queries:
        for way in range(batch.ways):
            members = [image for image, y in zip(support, batch.support_y[task], strict=True) if y == way]
            pairs.append(torch.cat([sum(members), query]))
    g, x = algorithm.relation, torch.stack(pairs)
    for conv, norm in zip((g.first, g.second), g.norms, strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        if norm.kind == "batch":
            x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        x = F.max_pool2d(F.relu(x), 2)
    x = F.relu(F.linear(x.flatten(1), g.hidden.weight, g.hidden.bias))
    return F.linear(x, g.score.weight, g.score.bias).view(len(queries), batch.ways)


@BOTH
@TASKS
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_relations_of_queries_to_the_sums_of_shots(norm: str, task: TaskShape, vectorize: bool) -> None:
    algorithm, batch = tiny(RelationNet, norm, vectorize), batch_of(task)
    logits = algorithm.predict(batch)
    close(logits, torch.stack([relations(algorithm, batch, number) for number in range(2)]))
    assert logits.std() > 1e-4
    loss, logs = algorithm.loss(batch, 0)
    errors = [
        (1 / (1 + math.exp(-logits[number, row, way].item())) - float(batch.query_y[number, row] == way)) ** 2
        for number in range(2)
        for row in range(logits.shape[1])
        for way in range(task.ways)
    ]
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-9)
    assert logs["acc"].item() == pytest.approx((logits.argmax(-1) == batch.query_y).double().mean().item())


@pytest.mark.parametrize("norm", ["batch", "support", "none"])
def test_shots_of_a_class_in_another_order_change_nothing(norm: str) -> None:
    algorithm, batch = tiny(RelationNet, norm), double(episodes(IMAGES, TaskShape(3, 3, 2), 2))
    order = torch.tensor([2, 0, 1, 3, 5, 4, 8, 7, 6])  # within each class
    close(algorithm.predict(with_(batch, support_x=batch.support_x[:, order])), algorithm.predict(batch))
    swapped = algorithm.predict(with_(batch, support_x=batch.support_x[:, order.flip(0)]))  # between classes
    assert (swapped - algorithm.predict(batch)).abs().max() > 1e-4


def test_a_pair_of_the_support_set_gives_the_statistics_of_norm_support() -> None:
    """With the support images as queries too, `support` is `batch` over that half."""
    batch = batch_of()
    batch = with_(batch, query_x=batch.support_x, query_y=batch.support_y)
    close(tiny(RelationNet, "support").predict(batch), tiny(RelationNet, "batch").predict(batch))


def test_sizes_are_the_official_ones() -> None:
    def sizes(side: int, **settings: int) -> tuple[int, int]:
        backbone = Conv4(input_shape=(3, side, side))
        relation = RelationNet(backbone, Spec((3, side, side), "classification", 5), **settings).relation
        return relation.padding, relation.hidden.in_features

    assert sizes(28) == (1, 64)
    assert sizes(84) == (0, 64 * 3 * 3)
    assert sizes(28, unpooled=0) == (1, 64)
    with pytest.raises(UserError, match=r"^algo.hidden=0: must be at least 1"):
        sizes(28, hidden=0)


# FEAT


@BOTH
@TASKS
def test_feat_without_its_attention_is_protonet_with_a_temperature(task: TaskShape, vectorize: bool) -> None:
    algorithm, batch = tiny(FEAT, vectorize=vectorize, temperature=5.0, contrast_weight=0.0), batch_of(task)
    protonet = ProtoNet(copy.deepcopy(algorithm.backbone), SPEC)
    nn.init.zeros_(algorithm.adapt.output.weight)
    nn.init.zeros_(algorithm.adapt.output.bias)
    norm, algorithm.adapt.norm = algorithm.adapt.norm, nn.Identity()
    expected = protonet.predict(batch) / 5
    close(algorithm.predict(batch), expected)
    close(algorithm.loss(batch, 0)[0], F.cross_entropy(expected.flatten(0, 1), batch.query_y.flatten()))
    algorithm.adapt.norm = norm  # the prototypes are normalised, the queries are not
    for number in range(2):
        support, queries = embeddings(algorithm, batch, number)
        means = torch.stack([support[batch.support_y[number] == way].mean(0) for way in range(task.ways)])
        close(algorithm.predict(batch)[number], -torch.cdist(queries, norm(means)).square() / 5)


def set_to_set(algorithm: FEAT, members: list[Tensor]) -> list[Tensor]:
    """One after the other."""
    adapt, adapted = algorithm.adapt, []
    for member in members:
        scores = [(adapt.queries.weight @ member) @ (adapt.keys.weight @ other) for other in members]
        weights = (torch.stack(scores) / math.sqrt(len(member))).softmax(0)
        mixed = sum(weight * (adapt.values.weight @ other) for weight, other in zip(weights, members, strict=True))
        x = member + adapt.output.weight @ mixed + adapt.output.bias
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        adapted.append(x * adapt.norm.weight + adapt.norm.bias)
    return adapted


@BOTH
@TASKS
def test_feat_by_plain_loops(task: TaskShape, vectorize: bool) -> None:
    settings = {"temperature": 3.0, "contrast_temperature": 2.0, "contrast_weight": 0.7}
    algorithm, batch = tiny(FEAT, vectorize=vectorize, **settings), batch_of(task)
    logits, losses = algorithm.predict(batch), []
    for number in range(2):
        support, queries = embeddings(algorithm, batch, number)
        images = torch.cat([support, queries])
        labels = torch.cat([batch.support_y[number], batch.query_y[number]])
        means = [support[batch.support_y[number] == way].mean(0) for way in range(task.ways)]
        prototypes = set_to_set(algorithm, means)
        expected = torch.stack([-torch.stack([(q - p).square().sum() for p in prototypes]) / 3 for q in queries])
        close(logits[number], expected)
        classes = [set_to_set(algorithm, list(images[labels == way])) for way in range(task.ways)]
        centres = [sum(members) / len(members) for members in classes]
        contrast = torch.stack([-torch.stack([(x - c).square().sum() for c in centres]) / 2 for x in images])
        losses.append(F.cross_entropy(expected, batch.query_y[number]) + 0.7 * F.cross_entropy(contrast, labels))
    close(algorithm.loss(batch, 0)[0], torch.stack(losses).mean())


def test_classes_in_another_order_are_the_same_classes() -> None:
    algorithm, batch = tiny(FEAT), batch_of(TaskShape(5, 2, 2))
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = with_(batch, support_y=order[batch.support_y], query_y=order[batch.query_y])
    close(algorithm.predict(renamed)[..., order], algorithm.predict(batch))
    close(algorithm.loss(renamed, 0)[0], algorithm.loss(batch, 0)[0])


def test_feat_drops_in_training_alone() -> None:
    algorithm, batch = tiny(FEAT), batch_of()
    losses = [algorithm.train(training).loss(batch, 0)[0].item() for training in (False, False, True, True)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    kept = tiny(FEAT, dropout=0.0, attention_dropout=0.0).train()
    assert kept.loss(batch, 0)[0].item() == pytest.approx(losses[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0),
        ("contrast_temperature", -1),
        ("contrast_weight", -1),
        ("dropout", 1),
        ("attention_dropout", -0.1),
    ],
)
def test_feat_settings(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^algo.{key}={value}: must "):
        tiny(FEAT, **{key: value})


# DN4


@BOTH
@TASKS
@pytest.mark.parametrize("neighbors", [1, 3, 1000])
def test_dn4_sums_the_cosines_of_the_nearest_descriptors(neighbors: int, task: TaskShape, vectorize: bool) -> None:
    algorithm, batch = tiny(DN4, vectorize=vectorize, neighbors=neighbors), batch_of(task, tasks=1)
    (logits,) = algorithm.predict(batch)
    support, queries = (maps.flatten(2).mT for maps in maps_of(algorithm, batch, 0))
    assert queries.shape[1:] == (16, 6)
    for row, query in enumerate(queries):
        for way in range(task.ways):
            total = torch.zeros((), dtype=torch.float64)
            pool = torch.cat([image for image, y in zip(support, batch.support_y[0], strict=True) if y == way])
            for x in query:
                sizes = (x.norm() * pool.norm(dim=1)).clamp(min=1e-30)  # a descriptor may be zero
                cosines = (pool @ x / sizes).sort(descending=True).values
                total += cosines[:neighbors].sum()
            close(logits[row, way], total)
    loss, _ = algorithm.loss(batch, 0)
    close(loss, F.cross_entropy(logits, batch.query_y[0]))


def test_descriptors_of_zeros_have_finite_gradients() -> None:
    algorithm, batch = tiny(DN4, "none"), batch_of()
    nn.init.constant_(algorithm.backbone.blocks[-1].conv.bias, -1e6)  # nothing is left by the ReLU
    loss, _ = algorithm.loss(batch, 0)
    loss.backward()
    assert (algorithm.predict(batch) == 0).all()
    assert all(value.grad.isfinite().all() for value in algorithm.parameters())


def test_dn4_settings() -> None:
    with pytest.raises(UserError, match=r"^algo.neighbors=0: must be at least 1"):
        tiny(DN4, neighbors=0)


# All


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(ProtoNet, {}), (MatchingNet, {}), (MatchingNet, {"full_context": True}), (FEAT, {}), (DN4, {})],
)
def test_under_autocast_only_the_backbone_loses_digits(kind: type[Method], settings: dict[str, bool]) -> None:
    """Cosines and distances are those, in single precision, of the features in half precision."""
    algorithm = tiny(kind, **settings).float()
    batch = batch_of()
    batch = with_(batch, support_x=batch.support_x.float(), query_x=batch.query_x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = algorithm.predict(batch)
    real = type(algorithm.backbone).forward

    def halved(self: Backbone, *args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm.backbone), "forward", halved)
        expected = algorithm.predict(batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
