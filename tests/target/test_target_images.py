"""A prediction about an image of a target depends on no other test image, whatever the norm, the method and the chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, choices, class_of, compose, hardware, table, toy_images
from torch import Tensor, nn

from metarun.algos.dn4 import DN4
from metarun.backbones.conv4 import Conv4
from metarun.config import TargetSettings as Settings
from metarun.config import construct
from metarun.core import Algorithm, Batch, Episodes, Spec
from metarun.data.image_batches import batches
from metarun.data.image_source import ImageSource
from metarun.engine import evaluate
from metarun.engine.evaluate import classified
from metarun.errors import UserError
from metarun.ops.batch_norm import KINDS, Norm, needs_reference
from metarun.target import base
from metarun.target.base import Own, SourceImages, TargetMethod
from metarun.target.target import Target

CLASSES = 4
SOURCE = toy_images(classes=CLASSES, per_class=40)
SHAPE = (1, 16, 16)
GROUP = "transfer"  # of target methods
CONVOLUTIONAL = [name for name in choices(GROUP) if name != "prompts"]
# Without norms there are none to tune, which is refused.
NORMED = [(name, norm) for name in CONVOLUTIONAL for norm in KINDS if (name, norm) != ("layer_norm", "none")]
CLASSIFIERS = [name for name in choices("algo") if class_of(name).trains_on == "batches"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def learner(norm: str, algo: str = "protonet") -> Algorithm:
    """Running averages are no longer at their start, and kernels differ in size from channel to channel."""
    algorithm = build(
        compose(f"algo={algo}", "backbone.channels=4", f"backbone.norm={norm}", f"task.ways={CLASSES}"), SOURCE
    )
    with torch.no_grad():
        for value in algorithm.backbone.parameters():
            value.add_(0.3 * torch.randn_like(value))
        algorithm.train().backbone(SOURCE.labelled("train").whole(CPU).x)
    return algorithm.eval()


def method(name: str, norm: str, algo: str = "protonet") -> TargetMethod:
    """As the YAML has it, but for few steps."""
    config = compose("recipe=transfer", "target=digits", f"{GROUP}={name}")
    given = {"learner": learner(norm, algo), "source": SourceImages(SOURCE, 0, CPU)}
    built: TargetMethod = construct(config[GROUP], GROUP, **given)
    for holder in (built, getattr(built, "training", None)):
        if hasattr(holder, "steps"):
            holder.steps = 4
    return built


def target(part: str, per_class: list[int]) -> Batch:
    images = SOURCE.labelled(part)  # type: ignore[arg-type]
    which = [np.flatnonzero(images.labels == label)[:count] for label, count in enumerate(per_class)]
    return images.take(np.concatenate(which)).whole(CPU, domain=1)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5)


# Target methods


@pytest.mark.parametrize(("name", "norm"), NORMED)
def test_order_chunks_and_other_test_images_change_nothing(
    name: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, train, test = method(name, norm), target("train", [9, 8, 7, 6]), target("test", [4] * CLASSES).x
    assert not tuned.transductive
    classifier = tuned.fit(train, CLASSES)
    assert not classifier.transductive
    whole = classifier(test)
    order = torch.randperm(len(test))
    close(classifier(test[order]), whole[order])
    close(torch.cat([classifier(part) for part in test.split(3)]), whole)
    close(classifier(torch.cat([test[:1], 5 * torch.rand_like(test[1:])]))[:1], whole[:1])
    monkeypatch.setattr(base, "IMAGES_AT_ONCE", 5)
    close(classifier(test), whole)


@pytest.mark.parametrize(("name", "norm"), NORMED)
def test_what_was_learned_is_kept_and_restored(name: str, norm: str) -> None:
    tuned, train, test = method(name, norm), target("train", [9, 8, 7, 6]), target("test", [4] * CLASSES).x
    before = {key: value.clone() for key, value in tuned.learner.state_dict().items()}
    classifier = tuned.fit(train, CLASSES)
    state = {key: value.clone() for key, value in classifier.state_dict().items()}
    scores = classifier(test)
    other = method(name, norm)  # of the same structure, but with other weights
    for value in other.learner.parameters():
        nn.init.normal_(value.data)
    again = other.restore(state, CLASSES)
    assert torch.equal(again(test), scores)
    shares = again.log_probabilities(scores).exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(len(test), dtype=torch.float64))
    assert torch.equal(shares.argmax(1), scores.argmax(1))
    assert all(torch.equal(value, before[key]) for key, value in tuned.learner.state_dict().items())


def test_prompts_are_kept_and_restored() -> None:
    small = ["backbone=vit", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "backbone.patch_size=4"]
    config = compose("recipe=transfer", "target=digits", f"{GROUP}=prompts", *small)
    train, test = target("train", [9, 8, 7, 6]), target("test", [4] * CLASSES).x

    def built() -> TargetMethod:
        found: TargetMethod = construct(config[GROUP], GROUP, learner=build(config, SOURCE), source=None)
        found.training.steps = 3  # type: ignore[attr-defined]
        return found

    classifier = built().fit(train, CLASSES)
    other = built()
    for value in other.learner.parameters():
        nn.init.normal_(value.data)
    whole = classifier(test)
    assert torch.equal(other.restore(classifier.state_dict(), CLASSES)(test), whole)
    close(torch.cat([classifier(part) for part in test.split(3)]), whole)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_kept_statistics_are_those_of_the_training_images(norm: str) -> None:
    """Of the images that they are of a network with kept statistics says what it said; every norm has its own."""
    plain = learner(norm).backbone
    train = target("train", [9, 8, 7, 6])
    kept = base.with_statistics(plain, train.x)
    assert kept is not plain
    assert (plain.norm, kept.norm) == (norm, "running")
    close(kept(train.x), plain(train.x))
    close(base.with_statistics(plain, train.x.flip(0))(train.x), plain(train.x))
    assert all(part.kind == norm for part in plain.modules() if isinstance(part, Norm))
    first = plain.blocks[0].conv(train.x)  # type: ignore[operator]
    close(kept.blocks[0].norm.running_mean, first.mean((0, 2, 3)))  # type: ignore[arg-type]
    assert base.with_statistics(learner("running").backbone, train.x).norm == "running"


def test_of_many_training_images_a_share_of_each_class_gives_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    plain = learner("batch").backbone
    monkeypatch.setattr(base.batch_norm, "REFERENCE_IMAGES", 10)
    honest = plain.forward
    monkeypatch.setattr(type(plain), "forward", lambda self, x, *more: seen.append(x) or honest(x, *more))
    base.keep_statistics(plain, torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 16, 16))
    places = seen[0][:, 0, 0, 0]
    assert len(places) == 10
    assert [int(count) for count in torch.histc(places, 4, 0, 40)] == [3, 2, 2, 3]


# Classes that the method was trained with


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("algo", CLASSIFIERS)
def test_classified_images_do_not_see_each_other(algo: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of held-out validation, and of the test of `recipe=domain_adaptation`."""
    algorithm, images = learner(norm, algo), SOURCE.labelled("test")
    uses = algorithm.uses_target != "no"
    own = SOURCE.labelled("train")
    training = batches(own, 0, CPU, own if uses else None, target_labels=algorithm.uses_target == "labels")
    before = {key: value.clone() for key, value in algorithm.state_dict().items()}
    algorithm.train()  # as in the midst of a training that is validated on images
    whole = classified(algorithm, images, hardware(), training)
    assert all(part.training for part in algorithm.modules())
    algorithm.eval()
    order = np.random.default_rng(0).permutation(len(images))
    close(classified(algorithm, images.take(order), hardware(), training), whole[order])
    close(classified(algorithm, images.take(order[:3]), hardware(), training), whole[order[:3]])
    monkeypatch.setattr(evaluate, "IMAGES_AT_ONCE", 3)
    close(classified(algorithm, images, hardware(), training), whole)
    assert algorithm.backbone.norm == norm
    assert all(torch.equal(value, before[key]) for key, value in algorithm.state_dict().items())
    if needs_reference(norm):
        with pytest.raises(UserError, match=rf"^backbone.norm={norm}: .*; use backbone.norm=running, or group"):
            classified(algorithm, images, hardware())


# Classes of unequal size


SIZES = [12, 2, 1, 3]
IN_ORDER = {"snail", "mann"}  # they read the support as a sequence
ONLINE = {"oml", "anml"}  # they take a step on each image in turn, class after class
# Of these the mini-batches of inner steps, or a random start, depend on the order of the support.
BY_PLACE = {"baseline", "baseline_plus_plus", "coral", "dann", "mmd", "multitask", "prototransfer", "reptile", "l2l"}


@pytest.mark.parametrize("name", [name for name in choices("algo") if not name.startswith("learn2learn")])
def test_images_count_for_their_own_class_where_classes_are_unequal(name: str) -> None:
    """Their order within a class changes nothing: taken for equally many a class, some would count for another."""
    algorithm, train = learner("group", name).double(), target("train", SIZES)
    test, x = target("test", [4] * CLASSES).x.double(), train.x.double()

    def scores(order: Tensor) -> Tensor:
        torch.manual_seed(1)
        return Own(algorithm).predict(Batch(x[order], train.y[order], train.domain), test, CLASSES)

    straight = torch.arange(len(x))
    found = scores(straight)
    assert found.shape == (len(test), CLASSES)
    assert found.isfinite().all()
    within = torch.cat([part[torch.randperm(len(part))] for part in straight.split(SIZES)])
    if name not in IN_ORDER | ONLINE | BY_PLACE:
        close(scores(within), found)
        close(scores(torch.randperm(len(x))), found)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", [name for name in choices("algo") if not name.startswith("learn2learn")])
def test_the_support_set_is_learned_once_for_all_batches(name: str, norm: str) -> None:
    """Of further images the network sees nothing but them, and says what it says of all at once."""
    own = Own(learner(norm, name))
    train, test = target("train", SIZES), target("test", [4] * CLASSES).x
    whole = own.fit(train, CLASSES)(test)
    classifier, rows = own.fit(train, CLASSES), list[int]()
    own.inductive.backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    first = classifier(test[:7])
    assert sum(rows) >= sum(SIZES) + 7
    rows.clear()
    others = torch.cat([classifier(part) for part in test[7:].split(4)])
    if own.transductive:  # each query may change what is made of the support set
        assert sum(rows) > len(others)
        return
    assert sum(rows) == len(others)
    close(torch.cat([first, others]), whole)
    assert not any("memor" in key for key in classifier.state_dict())
    state = {key: value.clone() for key, value in classifier.state_dict().items()}
    state["support_x"] += 1  # another support set is another classifier
    assert not torch.allclose(own.restore(state, CLASSES)(test), whole)


@pytest.mark.parametrize("sizes", [[18, 2], [1, 7, 3], [4, 4, 4]])
@pytest.mark.parametrize("neighbors", [1, 3, 40])
def test_dn4_of_unequal_classes_is_that_of_a_class_at_a_time(sizes: list[int], neighbors: int) -> None:
    backbone = Conv4(input_shape=SHAPE, channels=4, norm="group")
    dn4 = DN4(backbone, Spec(SHAPE, "classification", len(sizes)), neighbors=neighbors).double().eval()
    x = torch.rand(sum(sizes), *SHAPE, dtype=torch.float64)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    queries = torch.rand(5, *SHAPE, dtype=torch.float64)
    found = Own(dn4).predict(Batch(x, y, y), queries, len(sizes))
    columns = []
    for label in range(len(sizes)):  # a task of one way
        own = x[y == label]
        blank = torch.zeros(1, 5, dtype=torch.int64)
        columns.append(
            dn4.predict(Episodes(own[None], torch.zeros(1, len(own), dtype=torch.int64), queries[None], blank, 1))
        )
    torch.testing.assert_close(found, torch.cat(columns, dim=-1)[0])


@pytest.mark.parametrize("name", sorted(IN_ORDER))
def test_sequences_take_the_classes_in_turn(name: str) -> None:
    algorithm = learner("group", name).double()
    test = target("test", [4] * CLASSES).x.double()
    for sizes in ([3, 3, 3, 3], SIZES):
        train = target("train", sizes)
        found = Own(algorithm).predict(Batch(train.x.double(), train.y, train.domain), test, CLASSES)
        # By hand: one image of each class that has one left, until all are gone. Their order within a class stays.
        waiting = [list(part) for part in torch.arange(sum(sizes)).split(sizes)]
        order = []
        while any(waiting):
            order += [part.pop(0) for part in waiting if part]
        batch = Episodes(
            train.x.double()[None], train.y[None], test[None], torch.zeros(1, len(test), dtype=torch.int64), CLASSES
        )
        places = torch.stack(order)[None]
        expected = algorithm.logits(batch, places) if name == "snail" else algorithm.after(batch, places)[0]  # type: ignore[operator]
        torch.testing.assert_close(found, expected[0])


@pytest.mark.parametrize("name", sorted(ONLINE))
def test_online_methods_take_a_step_on_each_image_with_its_own_class(name: str) -> None:
    algorithm = learner("group", name).double()
    train, test = target("train", SIZES), target("test", [4] * CLASSES).x.double()
    x = train.x.double()
    mixed = torch.randperm(len(x))
    order = mixed[train.y[mixed].argsort(stable=True)]  # classes one after the other, each in the order that it has
    found = Own(algorithm).predict(Batch(x[mixed], train.y[mixed], train.domain), test, CLASSES)
    with torch.no_grad():
        features, asked = algorithm.features_of(x[order]), algorithm.features_of(test)  # type: ignore[operator]
    start = torch.randn(CLASSES, features.shape[1], generator=torch.Generator().manual_seed(0))
    head = nn.Linear(features.shape[1], CLASSES).double()
    nn.init.zeros_(head.bias)
    head.weight.data = start.double() * (2 / features.shape[1]) ** 0.5
    optimizer = torch.optim.SGD(head.parameters(), lr=algorithm.test_inner_lr)  # type: ignore[arg-type]
    for item, label in zip(features.split(1), train.y[order].split(1), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(head(item), label).backward()
        optimizer.step()
    close(found, head(asked).detach())


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_head_that_starts_at_prototypes_learns_each_image_with_its_own_class(epochs: int) -> None:
    algorithm = learner("group", "prototransfer").double()
    algorithm.head_epochs = epochs  # type: ignore[assignment]
    algorithm.head_lr = 0.1  # type: ignore[assignment]
    train, test = target("train", SIZES), target("test", [4] * CLASSES).x.double()
    found = Own(algorithm).predict(Batch(train.x.double(), train.y, train.domain), test, CLASSES)
    with torch.no_grad():
        features, asked = algorithm.backbone(train.x.double()), algorithm.backbone(test)
    means = torch.stack([features[train.y == label].mean(0) for label in range(CLASSES)])
    head = nn.Linear(features.shape[1], CLASSES).double()
    head.weight.data, head.bias.data = 2 * means, -means.square().sum(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(features), generator=draws).split(CLASSES):
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), train.y[chosen]).backward()
            optimizer.step()
    close(found, head(asked).detach())


# Pixel statistics


class Normalized(ImageSource):
    """Images of which each class has its own brightness, without parts of their own."""

    def __init__(self, pixels: np.ndarray, parts: dict[str, list[int]] | None = None) -> None:
        per_class = len(pixels) // 3
        made = replace(table(pixels, [per_class] * 3), metadata={"parts": parts} if parts else {})
        super().__init__(made, {"train": [0], "val": [1], "test": [2]}, normalize=True)


def bright(rows: np.ndarray | None = None) -> np.ndarray:
    """uint8 [60, 1, 8, 8]; `rows` are made white."""
    pixels = np.random.default_rng(0).integers(0, 100, (60, 1, 8, 8)).astype(np.uint8)
    if rows is not None:
        pixels[rows] = 255
    return pixels


@pytest.mark.parametrize("repeat", range(3))
def test_pixels_of_a_target_are_normalised_by_training_images_alone(repeat: int) -> None:
    """Replacing the test images changes no training image, and of test images their own pixels alone."""
    settings = Settings(test_images=None)
    plain = Target(Normalized(bright()), settings)
    train, test = plain.division(repeat)
    changed = Target(Normalized(bright(test.rows[1:])), settings)
    other_train, other_test = changed.division(repeat)
    assert np.array_equal(test.rows, other_test.rows)
    assert torch.equal(train.whole(CPU).x, other_train.whole(CPU).x)
    assert torch.equal(test.whole(CPU).x[0], other_test.whole(CPU).x[0])
    x = train.whole(CPU).x.double()
    assert x.mean().abs() < 1e-5
    assert abs(x.std(correction=0).item() - 1) < 1e-4


def test_parts_for_a_training_on_source_and_target_are_normalised_by_its_training_images() -> None:
    settings = Settings(test_images=None)
    plain = Target(Normalized(bright()), settings)
    changed = Target(Normalized(bright(np.concatenate([plain.test.rows[1:], plain.validation.rows]))), settings)
    assert torch.equal(plain.train.whole(CPU).x, changed.train.whole(CPU).x)
    assert torch.equal(plain.test.whole(CPU).x[0], changed.test.whole(CPU).x[0])


def test_a_test_part_of_the_data_sets_own_enters_no_statistic() -> None:
    parts = {"train": [12] * 3, "val": [2] * 3, "test": [6] * 3}
    settings = Settings(test_images=None)
    plain = Target(Normalized(bright(), parts), settings)
    changed = Target(Normalized(bright(plain.test.rows[1:]), parts), settings)
    assert torch.equal(plain.train.whole(CPU).x, changed.train.whole(CPU).x)
    assert torch.equal(plain.test.whole(CPU).x[0], changed.test.whole(CPU).x[0])


def test_images_that_are_not_normalised_stay_so() -> None:
    plain = ImageSource(table(bright(), [20] * 3), {"train": [0], "val": [1], "test": [2]})
    train, _ = Target(plain, Settings(test_images=None)).division(0)
    assert torch.equal((train.whole(CPU).x * 255).round(), torch.from_numpy(bright())[train.rows].float())


def test_a_subset_of_all_images_is_all_of_them_in_their_order() -> None:
    images = toy_images(classes=2, per_class=6).labelled(None)
    assert list(images.subset(12, "target.test_images", 0, 0).rows) == list(images.rows)
