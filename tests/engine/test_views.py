"""Test-time augmentation: predictions averaged over changed copies of a task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import episodes, hardware, toy_images
from shell import metarun

from metarun.algos.protonet import ProtoNet
from metarun.backbones.pixels import Pixels
from metarun.core import Spec, TaskShape
from metarun.engine.augmentation import augmented
from metarun.engine.evaluate import evaluate
from metarun.engine.views import Views

IMAGES = toy_images(signal=0.05)
TASK = TaskShape(3, 2, 4)
SPEC = Spec(IMAGES.input_shape, "classification", 3)


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


def views(count: int, seed: int = 0) -> Views:
    return Views(noisy, count, seed, hardware())


def test_predictions_are_the_mean_of_the_copies_probabilities() -> None:
    algorithm, batch = ProtoNet(Pixels(IMAGES.input_shape), SPEC).eval(), episodes(IMAGES, TASK, 3, "test")
    numbers, three = torch.tensor([5, 0, 9]), views(3)
    found = three.predict(algorithm, batch, numbers, [0])
    copies = [batch, three.changed(batch, numbers, 1), three.changed(batch, numbers, 2)]
    wanted = sum(algorithm.predict(copy).softmax(-1) for copy in copies) / 3
    torch.testing.assert_close(found[0].exp(), wanted)
    assert not torch.equal(copies[1].support_x, copies[2].support_x)
    assert not torch.equal(copies[1].query_x, batch.query_x)


def test_a_copy_is_a_function_of_the_seed_the_episode_and_its_number() -> None:
    batch, numbers = episodes(IMAGES, TASK, 3, "test"), torch.tensor([5, 0, 9])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    whole = views(2).changed(batch, numbers, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for place, task in enumerate(batch.split(1)):
        alone = views(4).changed(task, numbers[place : place + 1], 1)
        assert torch.equal(alone.query_x[0], whole.query_x[place])
    assert not torch.equal(views(2, seed=1).changed(batch, numbers, 1).query_x, whole.query_x)


@pytest.mark.parametrize("unlabelled", [0, 2])
def test_all_images_are_changed_in_training_and_in_a_copy_and_nothing_else(unlabelled: int) -> None:
    task = TaskShape(2, 1, 3, unlabelled=unlabelled, distractors=unlabelled // 2)
    sampler = IMAGES.sampler("test", task, 0, torch.device("cpu"))
    batch = episodes(IMAGES, task, 2, "test")
    images = ["support_x", "query_x", *(["unlabelled_x"] if unlabelled else [])]
    assert [name for name, value in batch.named_tensors.items() if name.endswith("_x")] == images
    for changed in (
        views(2).changed(batch, torch.tensor([4, 7]), 1),
        augmented(sampler, noisy, 0, hardware(), 2)(0, 2),
    ):
        assert changed.shape == batch.shape
        for name, before in batch.named_tensors.items():
            after = changed.named_tensors[name]
            assert (after != before).all() if name in images else torch.equal(after, before)
        noise = torch.cat([getattr(changed, name) - getattr(batch, name) for name in images], 1).flatten(0, 1)
        assert len(noise.flatten(1).mean(1).unique()) == len(noise)  # each image is changed by draws of its own


def test_a_query_still_depends_on_no_other() -> None:
    algorithm, batch = ProtoNet(Pixels(IMAGES.input_shape), SPEC).eval(), episodes(IMAGES, TASK, 1, "test")
    steady = Views(lambda x: x * 1.5 + 0.1, 2, 0, hardware())
    found = steady.predict(algorithm, batch, torch.tensor([0]), [0])
    other = batch.query_x.clone()
    other[:, 1:] = torch.rand_like(other[:, 1:])
    changed = steady.predict(algorithm, replace(batch, query_x=other), torch.tensor([0]), [0])
    torch.testing.assert_close(changed[:, :, 0], found[:, :, 0])


def test_one_copy_is_the_task_itself() -> None:
    algorithm = ProtoNet(Pixels(IMAGES.input_shape), SPEC)
    sampler = IMAGES.sampler("test", TASK, 0, torch.device("cpu"))
    plain = evaluate(algorithm, sampler, 40, hardware())
    one = evaluate(algorithm, sampler, 40, hardware(), views=views(1))
    assert torch.equal(plain.values, one.values)
    assert not torch.equal(evaluate(algorithm, sampler, 40, hardware(), views=views(3)).values, plain.values)


PLAIN = [
    "algo=protonet",
    "data=glyphs",
    "backbone=pixels",
    "train.steps=0",
    "test.episodes=3",
    "test.baseline_episodes=0",
]


def test_a_run_says_how_many_copies_it_tested(tmp_path: Path) -> None:
    words = [*PLAIN, "augment=standard", "test.views=2", "train.validate_episodes=2", f"outputs={tmp_path}"]
    done = metarun(*words)
    assert done.status == 0, done.err
    found = json.loads(next(tmp_path.rglob("result.json")).read_text(encoding="utf-8"))
    assert found["protocol"]["test_views"] == 2
    assert not found["protocol"]["transductive"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test.views=3"], "test.views=3: needs changes to average over; add augment=standard"),
        (["test.views=0"], "test.views=0: must be from 1 to 1000"),
        (
            ["test.views=2", "data=sinusoid", "algo=maml", "backbone=mlp", "task.ways=1"],
            "but the data are regression tasks",
        ),
    ],
)
def test_copies_that_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    done = metarun(*PLAIN, *words, f"outputs={tmp_path}")
    assert done.status == 2
    assert message in done.err
    assert not list(tmp_path.iterdir())
