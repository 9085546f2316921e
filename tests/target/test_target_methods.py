"""Subsets of a target, what is measured on them, and each way of learning from them."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, compose, hardware, table, toy_images
from omegaconf import OmegaConf
from scipy import stats
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score
from torch import nn

from metarun.algos.baseline import Baseline
from metarun.algos.protonet import ProtoNet
from metarun.backbones.mlp import MLP
from metarun.backbones.vit import ViT
from metarun.config import TargetSettings as Settings
from metarun.core import Backbone, Batch, Spec, TaskShape
from metarun.data.domains import Domains
from metarun.data.image_batches import Labelled, allot, batches, divide_images
from metarun.data.image_source import ImageSource
from metarun.engine.augmentation import augmented
from metarun.errors import UserError
from metarun.ops import metrics
from metarun.runs.logger import RunLogger
from metarun.target.base import Own, features
from metarun.target.features import LinearProbe, LogisticRegression, NearestCentroid
from metarun.target.finetuning import FineTuning, Shuffled
from metarun.target.target import Target
from metarun.unsupervised.instances import Instances

SOURCE = toy_images(classes=4, per_class=40)
ADAM = partial(torch.optim.Adam, lr=0.01)


@pytest.fixture
def learner() -> Baseline:
    config = compose("algo=baseline", "backbone.channels=4", "backbone.norm=running")
    algorithm = build(config, SOURCE)
    assert isinstance(algorithm, Baseline)
    with torch.no_grad():  # running averages that are no longer at their start
        algorithm.train().classify(SOURCE.labelled("train").whole(CPU).x)
    return algorithm.eval()


def images(part: str, count: int) -> Batch:
    return SOURCE.labelled(part).subset(count, "target.train_images", 0, 0).whole(CPU, domain=1)  # type: ignore[arg-type]


# Subsets


def key(chosen: Labelled) -> set[int]:
    return set(chosen.rows.tolist())


def test_parts_of_a_class_are_apart_and_all_of_it() -> None:
    parts = [SOURCE.labelled(part) for part in ("train", "val", "test")]  # type: ignore[arg-type]
    assert [part.counts.tolist() for part in parts] == [[32] * 4, [4] * 4, [4] * 4]
    assert sorted(row for part in parts for row in part.rows) == list(range(160))
    own = divide_images(np.array([0, 10, 30]), 1, {"train": [5, 12], "val": [2, 0], "test": [3, 8]})
    assert own["train"].tolist() == list(range(10, 22))
    assert own["val"].tolist() == []
    assert own["test"].tolist() == list(range(22, 30))


def test_the_images_of_many_classes_are_found_without_a_look_at_all_labels_for_each() -> None:
    compared = 0

    class Labels(np.ndarray):
        def __eq__(self, other: object) -> Any:
            nonlocal compared
            compared += 1
            return np.ndarray.__eq__(self, other)

    labels = np.random.default_rng(0).permutation(np.arange(200) % 20)
    names, rows = [*map(str, range(20))], np.arange(200)
    images = Labelled(rows, np.zeros_like(rows), labels.view(Labels), names, toy_images().reader)
    for number, members in enumerate(images.members):
        assert members.tolist() == np.flatnonzero(labels == number).tolist()
    train, test = images.divide_places(0, 0)
    assert sorted([*train, *test]) == [*range(200)]
    assert np.bincount(labels[images.subset(60, "target.train_images", 0, 0).rows]).tolist() == [3] * 20
    assert compared == 0


def test_subsets_are_stratified_grow_and_are_the_same_for_all() -> None:
    uneven = SOURCE.labelled("train")
    kept = np.flatnonzero((uneven.labels > 0) | (np.cumsum(uneven.labels == 0) <= 8))
    uneven = Labelled(uneven.rows[kept], uneven.rotations[kept], uneven.labels[kept], uneven.names, uneven.reader)
    assert uneven.counts.tolist() == [8, 32, 32, 32]
    sizes = [4, 5, 13, 26, 52, 104]
    drawn = [uneven.subset(size, "n", 0, 3) for size in sizes]
    assert [len(subset) for subset in drawn] == sizes
    assert drawn[0].counts.tolist() == [1, 1, 1, 1]
    assert drawn[4].counts.tolist() == [4, 16, 16, 16]
    assert drawn[5].rows.tolist() == uneven.rows.tolist()  # all of them, in their order
    for smaller, larger in itertools.pairwise(drawn):
        assert key(smaller) < key(larger)
    assert key(uneven.subset(26, "n", 0, 3)) == key(drawn[3])
    assert key(uneven.subset(26, "n", 0, 4)) != key(drawn[3])
    assert key(uneven.subset(26, "n", 1, 3)) != key(drawn[3])
    assert allot(10, np.array([1.0, 1.0, 1.0])).tolist() == [4, 3, 3]
    assert allot(5, np.array([90, 9, 1]), least=1).tolist() == [3, 1, 1]


def test_twice_as_many_images_are_never_fewer_of_a_class() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        sizes = draw.integers(3, 200, draw.integers(2, 9))
        counts = [allot(total, sizes, least=1) for total in (10, 20, 50, 100, 200) if total <= sizes.sum()]
        for smaller, larger in itertools.pairwise(counts):
            assert (smaller <= larger).all()
            assert larger.min() >= 1
            assert (larger <= sizes).all()
    paradox = np.array([131, 69, 126, 189, 76])  # of sizes that are closer `Labelled.subset` says that they may be
    assert [allot(total, paradox, least=1).tolist() for total in (10, 11)] == [[2, 1, 2, 3, 2], [3, 1, 2, 4, 1]]


def test_stream_is_epochs_in_orders_that_depend_on_the_seed_alone() -> None:
    part = SOURCE.labelled("test")
    stream = part.stream(0, "x")
    whole = stream(0, 48)
    assert len(part) == 16
    for epoch in range(3):
        assert sorted(whole[16 * epoch : 16 * epoch + 16]) == list(range(16))
    assert len({tuple(whole[16 * epoch : 16 * epoch + 16]) for epoch in range(3)}) == 3
    again = part.stream(0, "x")
    assert np.concatenate([again(30, 41), again(41, 48)]).tolist() == whole[30:].tolist()
    assert part.stream(1, "x")(0, 48).tolist() != whole.tolist()


@pytest.mark.parametrize("labels", [False, True])
def test_batches_alternate_between_the_domains(labels: bool) -> None:
    source, target = SOURCE.labelled("train"), SOURCE.labelled("test")
    sampler = batches(source, 0, CPU, target, target_labels=labels)
    whole = sampler(0, 9)
    assert whole.domain.tolist() == [0] * 5 + [1] * 4
    assert (whole.y[:5] >= 0).all()
    assert (whole.y[5:] >= 0).all() == labels
    parts = [sampler(0, 4), sampler(4, 9)]
    for domain in (0, 1):
        joined = torch.cat([part.x[part.domain == domain] for part in parts])
        assert torch.equal(joined, whole.x[whole.domain == domain])
    plain = batches(source, 0, CPU)(3, 8)
    assert torch.equal(plain.x, source.batch(source.stream(0, "source")(3, 8), CPU).x)


def test_what_a_target_cannot_be() -> None:
    with pytest.raises(UserError, match=r"^target: has one class alone \(class 0\)"):
        Target(toy_images(classes=1, per_class=10), Settings())
    with pytest.raises(
        UserError,
        match=r"^target: class class 0 has no (train|test) images; it has 2 in all, .* one to learn from and two to test on, "
        r"or leave small classes out: target.min_images=3$",
    ):
        Target(toy_images(classes=2, per_class=2), Settings())
    divided = toy_images(classes=2, per_class=9)
    divided.table.metadata["parts"] = {"train": [9, 5], "val": [0, 0], "test": [0, 4]}
    with pytest.raises(
        UserError, match=r"class 0 has no test images; all 9 are of other parts of the data set; move some, or"
    ):
        Target(divided, Settings())
    with pytest.raises(
        UserError, match=r"^target.min_images=11: leaves 0 of 2 classes; there is nothing to tell apart"
    ):
        Target(toy_images(classes=2, per_class=10), Settings(min_images=11))
    with pytest.raises(UserError, match=r"^target.train_images=3: is below the 4 classes, and each needs an image"):
        Target(SOURCE, Settings(train_images=[50, 3]))


def test_small_classes_of_a_target_are_left_out() -> None:
    """The others are numbered anew, in their order, and keep their images."""
    images = np.arange(36, dtype=np.uint8).reshape(-1, 1, 1, 1)
    everything = range(4)
    source = ImageSource(table(images, [10, 2, 20, 4]), {"train": everything, "val": everything, "test": everything})
    with pytest.raises(UserError, match=r"class 1 has no"):
        Target(source, Settings())
    target = Target(source, Settings(min_images=5))
    assert target.names == target.test.names == ["class 0", "class 2"]
    assert target.images is not None
    rows = [target.images.rows[target.images.labels == label] for label in range(2)]
    assert [each.tolist() for each in rows] == [list(range(10)), list(range(12, 32))]
    train, test = target.subset(6, 0)
    assert {*train.labels} == {*test.labels} == {0, 1}


def test_target_takes_the_shape_of_the_source() -> None:
    target = Target(SOURCE, Settings(train_images=8))
    wide = ImageSource(toy_images().table, {"train": [0], "val": [1], "test": [2]})
    wide.input_shape = (3, 24, 24)
    before = target.test.whole(CPU).x
    target.fit_to(wide)
    after = target.test.whole(CPU).x
    assert after.shape == (16, 3, 24, 24)
    assert torch.equal(after[:, 0], after[:, 2])
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=0.01)
    wide.input_shape = (1, 16, 16)
    target.fit_to(wide)  # nothing to do


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 24, 24)])
@pytest.mark.parametrize("normalized", [True, False])
def test_target_is_normalised_where_the_source_is(shape: tuple[int, int, int], normalized: bool) -> None:
    """And left in 0 to 1 where it is not, whichever its own data set says."""
    everything = {"train": range(12), "val": range(12), "test": range(12)}
    source, own = (ImageSource(toy_images().table, everything, normalize=one) for one in (normalized, not normalized))
    source.input_shape = shape
    target = Target(own, Settings(train_images=12))
    target.fit_to(source)
    refuse_other_pixels(target, normalized)


def refuse_other_pixels(target: Target, normalized: bool) -> None:
    """Checks that the pixels of the training images have the mean 0, or lie in 0 to 1."""
    pixels = target.train.whole(CPU).x
    assert (
        abs(pixels.mean().item()) < 0.01 if normalized else 0 <= pixels.min() < 0.3 < pixels.mean() < pixels.max() <= 1
    )


class Node:
    """In place of a node of a config that builds one data set."""

    def __init__(self, built: ImageSource) -> None:
        self.built, self.node = built, OmegaConf.create({"image_size": 16})

    def knows(self, name: str) -> bool:
        return False

    def build(self, **settings: Any) -> ImageSource:
        return self.built


@pytest.mark.parametrize("normalized", [True, False])
def test_target_is_normalised_where_several_sources_or_their_unlabelled_tasks_are(normalized: bool) -> None:
    everything = {"train": range(12), "val": range(12), "test": range(12)}
    one = ImageSource(toy_images().table, everything, normalize=normalized)
    nodes: Any = {"one": Node(one)}
    for source in (Instances(one, shift=0.2), Domains(sets=nodes, normalize=normalized)):
        target = Target(ImageSource(toy_images().table, everything, normalize=not normalized), Settings())
        target.fit_to(source)
        refuse_other_pixels(target, normalized)


# Measures


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_are_scikit_learn_s(classes: int) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, 60)
    scores = draw.normal(size=(60, classes)).round(1) + 0.5 * np.eye(classes)[labels]  # with ties
    found = metrics.classification(scores, labels)
    predicted = scores.argmax(1)
    assert found["acc"] == pytest.approx((predicted == labels).mean())
    assert found["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["confusion"] == confusion_matrix(labels, predicted).tolist()
    if classes == 2:
        assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    else:
        assert "auroc" not in found


def test_interval_over_repeats_is_student_s() -> None:
    values = [0.8, 0.9, 0.7, 0.85]
    repeats = [
        {"train_images": 5, "test_images": 9, "acc": v, "balanced_acc": v, "confusion": [[1, 2], [3, 4]]}
        for v in values
    ]
    found = metrics.over_repeats(repeats)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found["acc"] == pytest.approx((low + high) / 2)
    assert found["acc_ci95"] == pytest.approx((high - low) / 2)
    assert found["confusion"] == [[4, 8], [12, 16]]
    assert "auroc" not in found
    assert found["over"] == "repeats"


def numbers(confusion: list[list[int]], auroc: float) -> dict[str, Any]:
    """`metrics.classification`'s numbers of a confusion."""
    counts = np.array(confusion)
    sizes = {"train_images": 10, "test_images": int(counts.sum())}
    shares = {"acc": counts.trace() / counts.sum(), "balanced_acc": (counts.diagonal() / counts.sum(1)).mean()}
    return {**sizes, **shares, "macro_f1": metrics.macro_f1(counts)[0], "auroc": auroc, "confusion": confusion}


def test_all_intervals_of_repeats_have_the_basis_that_is_named() -> None:
    alike = metrics.over_repeats([numbers([[40, 10], [0, 50]], 0.95), numbers([[41, 9], [1, 49]], 0.951)])
    assert (alike["over"], alike["agree"]) == ("repeats", True)
    of_one = metrics.over_images(np.array(alike["confusion"]) / 2, alike["auroc"])
    assert {name: alike[f"{name}_ci95"] for name in of_one} == of_one
    assert alike["macro_f1_ci95"] > 0.05  # one of them alone has as much; the repeats' own, 0.002, is by chance
    apart = metrics.over_repeats([numbers([[40, 10], [0, 50]], 0.95), numbers([[45, 5], [1, 49]], 0.95)])
    assert (apart["over"], apart["agree"], apart["auroc_ci95"]) == ("repeats", False, None)


# Frozen features


def test_logistic_regression_is_scikit_learn_s_on_standardised_features(learner: Baseline) -> None:
    known, asked = images("train", 40), images("test", 16)
    scores = LogisticRegression(learner, inverse_penalty=0.1).predict(known, asked.x, 4)
    train, test = (features(learner.backbone, x).double().numpy() for x in (known.x, asked.x))
    mean, deviation = train.mean(0), train.std(0)
    alive = deviation > 1e-6
    train, test = ((x[:, alive] - mean[alive]) / deviation[alive] for x in (train, test))
    expected = Reference(C=0.1, max_iter=5000).fit(train, known.y.numpy()).predict_log_proba(test)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_nearest_centroid_by_hand(learner: Baseline) -> None:
    known, asked = images("train", 40), images("test", 16)
    train, test = (features(learner.backbone, x) for x in (known.x, asked.x))
    plain = NearestCentroid(learner, normalize=False).predict(known, asked.x, 4)
    centroids = torch.stack([train[known.y == label].mean(0) for label in range(4)])
    torch.testing.assert_close(plain, -((test[:, None] - centroids) ** 2).sum(-1), rtol=1e-3, atol=1e-3)
    mean = train.mean(0)
    unit = F.normalize(train - mean, dim=1)
    centroids = torch.stack([unit[known.y == label].mean(0) for label in range(4)])
    expected = -((F.normalize(test - mean, dim=1)[:, None] - centroids) ** 2).sum(-1)
    torch.testing.assert_close(NearestCentroid(learner).predict(known, asked.x, 4), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make", [LinearProbe, LogisticRegression, NearestCentroid, partial(FineTuning, optimizer=ADAM)]
)
def test_learns_the_target_and_leaves_the_learner_as_it_is(make: type, learner: Baseline) -> None:
    before = copy.deepcopy(learner.state_dict())
    asked = images("test", 16)
    torch.manual_seed(0)
    scores = make(learner).predict(images("train", 60), asked.x, 4)
    assert scores.shape == (16, 4)
    assert (scores.argmax(1) == asked.y).float().mean() > 0.8
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    torch.manual_seed(0)
    assert torch.equal(make(learner).predict(images("train", 60), asked.x, 4), scores)


@pytest.mark.parametrize(
    "make", [LinearProbe, LogisticRegression, NearestCentroid, partial(FineTuning, optimizer=ADAM)]
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_is_learned_is_seen_in_either_precision(
    make: type, bfloat16: bool, learner: Baseline, tmp_path: Path
) -> None:
    """Under autocast torch keeps the first cast of a weight, before any step: all images would get the scores of the start."""
    target = Target(SOURCE, Settings(train_images=60, repeats=2))
    logger = RunLogger(None)
    found = target.measure(make(learner), 0, hardware(bfloat16=bfloat16), tmp_path / "target", logger)
    assert found["target/acc"] > 0.8


@pytest.mark.parametrize("make", [LinearProbe, partial(NearestCentroid, normalize=False)])
def test_what_is_learned_of_features_is_in_single_precision(
    make: type, learner: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = images("train", 40)
    embedded = features(learner.backbone, known.x)
    monkeypatch.setattr("metarun.target.features.features", lambda backbone, x: embedded)
    whole = make(learner).fit(known, 4).state_dict()
    with hardware(bfloat16=True).autocast():
        found = make(learner).fit(known, 4).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_own_way_is_an_episode_in_the_order_of_classes(learner: Baseline) -> None:
    known, asked = images("train", 30), images("test", 16)
    proto = ProtoNet(learner.backbone, Spec((1, 16, 16), "classification", 4))
    scores = Own(proto).predict(known, asked.x, 4)
    train, test = (features(learner.backbone, x) for x in (known.x, asked.x))
    centroids = torch.stack([train[known.y == label].mean(0) for label in range(4)])
    torch.testing.assert_close(scores, -((test[:, None] - centroids) ** 2).sum(-1), rtol=1e-3, atol=1e-3)
    from metarun.algos.maml import MAML

    with pytest.raises(UserError, match=r"MAML's head has 5 outputs, and the target 4 classes; train with task.ways=4"):
        Own(MAML(learner.backbone, Spec((1, 16, 16), "classification", 5))).check(4)
    Own(proto).check(4)


# Fine-tuning


def test_frozen_blocks_stay_bit_for_bit_and_the_rest_moves(learner: Baseline) -> None:
    for layer in (0, 2, 4):
        torch.manual_seed(0)
        tuned = FineTuning(learner, optimizer=ADAM, steps=3, from_layer=layer).fit(images("train", 40), 4)
        backbone, head = tuned.backbone, tuned.head
        for number, (new, old) in enumerate(zip(backbone.blocks, learner.backbone.blocks, strict=True)):
            same = [
                torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values(), strict=True)
            ]
            assert all(same) == (number < layer)
        assert head.weight.abs().max() > 0


def test_head_learns_alone_first(learner: Baseline) -> None:
    tuned = FineTuning(learner, optimizer=ADAM, steps=4, head_steps=4).fit(images("train", 40), 4)
    backbone, head = tuned.backbone, tuned.head
    for new, old in zip(backbone.parameters(), learner.backbone.parameters(), strict=True):
        assert torch.equal(new, old)
    assert head.weight.abs().max() > 0
    backbone = FineTuning(learner, optimizer=ADAM, steps=5, head_steps=4).fit(images("train", 40), 4).backbone
    moved = [not torch.equal(a, b) for a, b in zip(backbone.parameters(), learner.backbone.parameters(), strict=True)]
    assert any(moved)


def test_layer_wise_rates(learner: Baseline) -> None:
    method = FineTuning(learner, optimizer=ADAM, layer_decay=0.5, from_layer=1)
    groups = method.groups(copy.deepcopy(learner.backbone), torch.nn.Linear(4, 2))
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    counted = sum(value.numel() for group in groups[1:] for value in group["params"])
    blocks = learner.backbone.blocks
    assert counted == sum(value.numel() for block in blocks[1:] for value in block.parameters())


def test_what_comes_after_a_block_is_trained_and_frozen_with_it() -> None:
    shape = (1, 14, 14)
    vit = ViT(shape, width=8, depth=2, heads=2)
    mlp = MLP(shape, hidden=[6, 5], norm="running")
    after: dict[Backbone, list[list[nn.Module]]] = {
        vit: [[vit.blocks[0]], [vit.blocks[1], vit.last_norm]],
        mlp: [[mlp.layers[0], mlp.norms[0]], [mlp.layers[1], mlp.norms[1]]],
    }
    train = Batch(torch.rand(12, *shape), torch.arange(12) % 3, torch.ones(12, dtype=torch.int64))
    for net, blocks in after.items():
        learner = ProtoNet(net, Spec(shape, "classification", 3))
        method = FineTuning(learner, optimizer=ADAM, layer_decay=0.5)
        rates = {id(value): group["lr"] for group in method.groups(net, nn.Linear(8, 3)) for value in group["params"]}
        for number, block in enumerate(blocks):
            values = [value for module in block for value in module.parameters()]
            assert values
            assert {rates[id(value)] for value in values} == {0.01 * 0.5 ** (2 - number)}
        before = {name: value.clone() for name, value in net.state_dict().items()}
        tuned = FineTuning(learner, optimizer=ADAM, steps=3, batch_size=6, from_layer=1).fit(train, 3).backbone
        moves = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
        names = {id(value): name for name, value in net.state_dict(keep_vars=True).items()}
        last = {names[id(value)] for module in blocks[1] for value in module.state_dict(keep_vars=True).values()}
        assert moves == last


def test_l2_sp_draws_to_the_start_and_not_to_zero(learner: Baseline) -> None:
    """One step of SGD with alpha: w1 = w0 - lr * g; the second has lr * alpha * (w1 - w0) on top of its gradient."""
    plain = partial(torch.optim.SGD, lr=0.1)
    found = {}
    for alpha in (0.0, 2.0):
        torch.manual_seed(0)
        method = FineTuning(learner, optimizer=plain, steps=2, batch_size=40, l2_sp=alpha)
        found[alpha] = method.fit(images("train", 40), 4).backbone
    torch.manual_seed(0)
    once = FineTuning(learner, optimizer=plain, steps=1, batch_size=40).fit(images("train", 40), 4).backbone
    second_rate = 0.1 * (1 + math.cos(math.pi / 2)) / 2
    for name, start in learner.backbone.named_parameters():
        free, drawn, first = (dict(net.named_parameters())[name] for net in (found[0.0], found[2.0], once))
        torch.testing.assert_close(drawn, free - second_rate * 2.0 * (first - start), rtol=1e-4, atol=1e-6)


def test_l2_head_draws_the_head_alone_and_to_zero(learner: Baseline) -> None:
    """The head begins at zero, so that the second step is the first with lr * beta * w1 on top of its gradient."""
    plain = partial(torch.optim.SGD, lr=0.1)

    def fitted(steps: int, beta: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        method = FineTuning(learner, optimizer=plain, steps=steps, batch_size=40, l2_head=beta)
        found = method.fit(images("train", 40), 4)
        return dict(found.head.named_parameters()), dict(found.backbone.named_parameters())

    (first, _), (free, body), (drawn, same) = fitted(1, 0.0), fitted(2, 0.0), fitted(2, 2.0)
    second_rate = 0.1 * (1 + math.cos(math.pi / 2)) / 2
    assert first["weight"].abs().max() > 1e-4
    for name, value in drawn.items():
        torch.testing.assert_close(value, free[name] - second_rate * 2.0 * first[name], rtol=1e-4, atol=1e-6)
    for name, value in same.items():
        torch.testing.assert_close(value, body[name])


def test_without_a_learning_rate_it_is_refused(learner: Baseline) -> None:
    with pytest.raises(UserError, match=r"^transfer\.optimizer\.lr: must be given \(transfer\.optimizer\.lr=0\.001\)$"):
        FineTuning(learner, optimizer=torch.optim.SGD).fit(images("train", 4), 4)


def test_batches_of_fine_tuning_are_epochs_without_a_single_image() -> None:
    draws = Shuffled(33, 16)
    sizes = [len(draws.next()) for _ in range(4)]
    assert sizes == [16, 17, 16, 17]
    draws = Shuffled(33, 16)
    assert sorted(torch.cat([draws.next(), draws.next()]).tolist()) == list(range(33))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"from_layer": 5}, r"transfer.from_layer=5: must be from 0 \(all\) to 4"),
        ({"from_layer": -1}, "transfer.from_layer=-1: must be at least 0"),
        ({"head_steps": -1}, "transfer.head_steps=-1: must be at least 0"),
        ({"head_steps": 900}, "transfer.head_steps=900: must be from 0 to transfer.steps=100"),
        ({"steps": 0}, "transfer.steps=0: must be at least 1"),
        ({"layer_decay": 0.0}, "transfer.layer_decay=0: must be above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], said: str, learner: Baseline) -> None:
    with pytest.raises(UserError, match=said):
        FineTuning(learner, optimizer=ADAM, **settings)  # type: ignore[arg-type]


# Augmentation


@pytest.mark.parametrize("of_tasks", [True, False])
def test_augmentation_is_of_seed_step_and_task(of_tasks: bool) -> None:
    """Neither the processes that share a step nor where a range begins changes the images of a task."""

    def noise(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(len(x), 1, 1, 1)

    tasks = SOURCE.sampler("train", TaskShape(3, 1, 2), 0, CPU)
    sampler = augmented(tasks if of_tasks else batches(SOURCE.labelled("train"), 0, CPU), noise, 0, hardware(), 6)
    names = ("support_x", "support_y", "query_x", "query_y") if of_tasks else ("x", "y", "domain")
    whole = [getattr(sampler(6, 12), name) for name in names]
    assert len({image.sum().item() for image in whole[0].flatten(0, -4)}) == len(whole[0].flatten(0, -4))
    for start, stop in ((6, 9), (9, 12), (6, 8), (8, 10), (11, 12)):
        found = sampler(start, stop)
        for name, expected in zip(names, whole, strict=True):
            assert torch.equal(getattr(found, name), expected[start - 6 : stop - 6])
    longer = sampler(3, 14)  # over several steps
    assert torch.equal(getattr(longer, names[0])[3:9], whole[0])
    other = augmented(tasks if of_tasks else batches(SOURCE.labelled("train"), 0, CPU), noise, 1, hardware(), 6)
    assert not torch.equal(getattr(other(6, 12), names[0]), whole[0])


def test_training_images_alone_are_changed_and_by_their_place(learner: Baseline) -> None:
    def noise(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(len(x), 1, 1, 1)

    plain = batches(SOURCE.labelled("train"), 0, CPU)
    changed = augmented(plain, noise, 0, hardware())
    one, again, other = changed(0, 8), changed(0, 8), changed(8, 16)
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, plain(0, 8).x)
    assert torch.equal(one.y, plain(0, 8).y)
    shift = [(batch.x - plain(start, start + 8).x).mean((1, 2, 3)) for batch, start in ((one, 0), (other, 8))]
    assert not torch.allclose(*shift)
    seen: list[int] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    method = FineTuning(learner, optimizer=ADAM, steps=2, batch_size=8)
    method.augment = counted
    method.predict(images("train", 16), images("test", 16).x, 4)
    assert seen == [8, 8]
