"""Unlabelled items: the three semi-supervised ProtoNets against the equations of their paper, and self-training around methods."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, alone, build, compose, hardware, toy_images
from scipy.stats import kurtosis, skew
from shell import make_images, metarun, result, run_folder
from torch import Tensor

from metarun.algos.semi_protonet import statistics
from metarun.core import Algorithm, Episodes, MixedEpisodes, TaskShape, together
from metarun.data.varied import VariedSampler
from metarun.engine.evaluate import evaluate
from metarun.engine.gradients import gradient_step
from metarun.errors import UserError
from metarun.ops.prototypes import class_means
from metarun.wrappers.self_training import SelfTraining, self_trained, with_labels

IMAGES = toy_images()
TASK = TaskShape(4, 2, 3, unlabelled=3, distractors=2)
UNEQUAL = TaskShape((2, 4), (1, 3), (1, 3), balanced=False, unlabelled=2, distractors=1)
MLP = ["backbone=mlp", "backbone.hidden=[8]", "backbone.norm=none", "backbone.init_std=null"]
KINDS = pytest.mark.parametrize("kind", ["none", "cluster", "mask"])


def semi(kind: str, *words: str, net: list[str] = MLP) -> Any:
    torch.manual_seed(0)
    algorithm: Any = build(compose("algo=semi_protonet", *net, f"algo.distractors={kind}", *words), IMAGES).double()
    if kind == "mask":  # else all thresholds are alike
        for value in algorithm.thresholds.parameters():
            value.data += 0.2 * torch.randn_like(value)
    if kind == "cluster":
        algorithm.log_radius.data.fill_(math.log(1.3))
    return algorithm


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b) ** 2).sum())


def reference(algorithm: Any, task: Episodes, kind: str, steps: int) -> list[list[float]]:
    """The paper's equations, item by item: the scores of each query for each class."""
    assert task.unlabelled_x is not None
    with torch.no_grad():
        support, queries, others = (algorithm.backbone(x[0]) for x in (task.support_x, task.query_x, task.unlabelled_x))
    y, ways = task.support_y[0].tolist(), task.ways
    centres = [support[task.support_y[0] == way].mean(0) for way in range(ways)]
    radii = [1.0] * ways
    if kind == "cluster":
        centres.append(torch.zeros_like(centres[0]))
        radii.append(math.exp(algorithm.log_radius.item()))

    def score(x: Tensor, number: int) -> float:
        d = distance(x, centres[number])
        return -d / (2 * radii[number] ** 2) - math.log(radii[number]) if kind == "cluster" else -d

    outputs = None
    if kind == "mask":
        rows = []
        for centre in centres:
            d = np.array([distance(x, centre) for x in others])
            d = d / d.mean()
            rows.append([d.min(), d.max(), d.var(), skew(d), kurtosis(d)])
        outputs = algorithm.thresholds(torch.tensor(rows).double()).tolist()
    for step in range(steps):
        weights = []
        for x in others:
            scores = [math.exp(score(x, number)) for number in range(len(centres))]
            weights.append([one / sum(scores) for one in scores])
        if outputs is not None:
            for number in range(ways):
                mean = float(np.mean([distance(x, centres[number]) for x in others]))
                start, further, scale = outputs[number]
                beta = math.exp(start) + (step / (steps - 1) * further if steps > 1 else 0)
                for j, x in enumerate(others):
                    ratio = distance(x, centres[number]) / mean
                    weights[j][number] *= 1 / (1 + math.exp(-math.exp(scale) * (beta - ratio)))
        moved = []
        for number in range(len(centres)):
            own = [x for x, label in zip(support, y, strict=True) if label == number]
            total = sum(own, torch.zeros_like(centres[0])) + sum(
                w[number] * x for w, x in zip(weights, others, strict=True)
            )
            moved.append(total / (len(own) + sum(w[number] for w in weights)))
        centres = moved
    return [[score(x, number) for number in range(ways)] for x in queries]


@KINDS
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shape", ["equal", "unequal"])
def test_a_semi_supervised_protonet_is_what_its_equations_say(kind: str, steps: int, shape: str) -> None:
    algorithm = semi(kind, f"algo.refinements={steps}")
    for task in alone(IMAGES, TASK if shape == "equal" else UNEQUAL, 2):
        found = algorithm.predict(task)[0].tolist()
        assert np.allclose(found, reference(algorithm, task, kind, steps), rtol=1e-7, atol=1e-9)


@KINDS
def test_without_unlabelled_items_it_is_protonet(kind: str) -> None:
    algorithm, scale = semi(kind), 2 if kind == "cluster" else 1
    plain = build(compose("algo=protonet", *MLP), IMAGES).double()
    plain.load_state_dict(algorithm.state_dict(), strict=False)
    for task in alone(IMAGES, replace(TASK, unlabelled=0, distractors=0), 2):
        torch.testing.assert_close(scale * algorithm.predict(task), plain.predict(task))
        expected = F.cross_entropy(algorithm.predict(task)[0], task.query_y[0])
        torch.testing.assert_close(algorithm.loss(task, 0)[0], expected)


def test_statistics_are_those_of_scipy() -> None:
    distances = torch.rand(2, 9, 3).double()
    found = statistics(distances)
    for t in range(2):
        for n in range(3):
            d = distances[t, :, n].numpy()
            assert found[t, n].tolist() == pytest.approx([d.min(), d.max(), d.var(), skew(d), kurtosis(d)])
    assert statistics(torch.ones(1, 4, 2)).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2])
def test_the_gradient_of_the_plain_way_takes_shares_for_constants(steps: int) -> None:
    algorithm = semi("none", f"algo.refinements={steps}")
    (task,) = alone(IMAGES, replace(TASK, ways=3), 1)
    weights = list(algorithm.backbone.parameters())
    found = torch.autograd.grad(algorithm.loss(task, 0)[0], weights)
    assert task.unlabelled_x is not None
    support, queries, others = (algorithm.backbone(x[0]) for x in (task.support_x, task.query_x, task.unlabelled_x))
    members = F.one_hot(task.support_y[0], 3).double()
    centres = members.T @ support / members.sum(0)[:, None]
    for _ in range(steps):
        with torch.no_grad():
            shares = torch.tensor([[-distance(x, centre) for centre in centres] for x in others]).double().softmax(1)
        centres = (members.T @ support + shares.T @ others) / (members.sum(0) + shares.sum(0))[:, None]
    scores = -(queries[:, None] - centres).square().sum(-1)
    expected = torch.autograd.grad(F.cross_entropy(scores, task.query_y[0]), weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["cluster", "mask"])
def test_the_gradient_of_the_other_ways_goes_through_the_shares(kind: str) -> None:
    algorithm = semi(kind)
    if kind == "mask":  # no threshold of the statistics, which are constants
        algorithm.thresholds[2].weight.data.zero_()
    (task,) = alone(IMAGES, TaskShape(2, 1, 1, unlabelled=2, distractors=1), 1)
    with torch.no_grad():
        given = [x.double() for x in algorithm.embed_all(task)]
    assert torch.autograd.gradcheck(
        lambda support, queries, others: algorithm.logits(support, task.support_y, queries, others, 2),
        [x.requires_grad_() for x in given],
    )


@pytest.mark.parametrize("kind", ["cluster", "mask"])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    algorithm = semi(kind)
    (task,) = alone(IMAGES, replace(TASK, ways=3), 1)
    loss = algorithm.loss(task, 0)[0]
    loss.backward()
    learned = [
        (name, value) for name, value in algorithm.named_parameters() if "thresholds" in name or "radius" in name
    ]
    learned.append(next(iter(algorithm.backbone.named_parameters())))
    assert len(learned) == {"cluster": 2, "mask": 5}[kind]
    for name, value in learned:
        place = int(value.grad.abs().argmax())
        before = value.data.view(-1)[place].item()
        around = []
        for step in (1e-5, -1e-5):
            value.data.view(-1)[place] = before + step
            around.append(algorithm.loss(task, 0)[0].item())
        value.data.view(-1)[place] = before
        expected = (around[0] - around[1]) / 2e-5
        if name.startswith("thresholds") or name == "log_radius" or kind != "mask":
            # Of the backbone's weights the statistics of a mask are constants, and so not in the gradient.
            assert value.grad.view(-1)[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_unlabelled_items_help() -> None:
    """Noisy classes, one shot: many unlabelled items of the same classes make better prototypes."""
    task = TaskShape(5, 1, 5, unlabelled=10)
    source = toy_images(signal=0.2)
    semi_algorithm = build(
        compose("algo=semi_protonet", "backbone=pixels", "train.steps=0", "algo.refinements=3"), source
    )
    plain = build(compose("algo=protonet", "backbone=pixels", "train.steps=0"), source)
    draw = source.sampler("test", task, 0, CPU)
    better, before = (evaluate(one, draw, 60, hardware()).final for one in (semi_algorithm, plain))
    assert (better - before).mean() > 2 * (better - before).std() / 60**0.5


def test_unlabelled_items_flow_wherever_tasks_do() -> None:
    tasks = together(alone(IMAGES, TASK, 4))
    assert isinstance(tasks, Episodes)
    assert tasks.unlabelled_x is not None
    parts = [one.unlabelled_x for one in tasks.split(3)]
    torch.testing.assert_close(torch.cat(parts), tasks.unlabelled_x)  # type: ignore[arg-type]
    one, other = semi("none"), semi("none")
    whole = gradient_step(one, tasks, 0, 1.0, 0, hardware(task_chunk=None))
    pieces = gradient_step(other, tasks, 0, 1.0, 0, hardware())
    torch.testing.assert_close(whole["loss"], pieces["loss"])
    for value, same in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value.grad, same.grad)


# Self-training.


def wrapped(name: str, *words: str, **settings: Any) -> SelfTraining:
    torch.manual_seed(0)
    algorithm = build(compose(f"algo={name}", *MLP, "task.ways=4", "train.task.ways=null", *words), IMAGES).double()
    return SelfTraining(algorithm, IMAGES.sampler("val", TASK, 0, CPU), **settings)


def test_certain_items_join_their_class() -> None:
    (task,) = alone(IMAGES, TaskShape(3, (1, 3), 1, balanced=False, unlabelled=2), 1)
    assert task.unlabelled_x is not None
    shares = torch.tensor(
        [[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.0, 0.3, 0.7], [0.9, 0.1, 0.0], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]]
    )
    sizes = task.support_sizes
    for threshold, per_class, expected in (
        (0.0, None, [[3, 0, 1], [4], [2, 5]]),
        (0.65, None, [[3, 0], [4], [2]]),
        (0.0, 1, [[3], [4], [2]]),
        (0.95, None, [[], [], []]),
    ):
        found = with_labels(task, shares.double(), threshold, per_class)
        assert found.support_sizes == [size + len(more) for size, more in zip(sizes, expected, strict=True)]
        assert found.support_y[0].bincount(minlength=3).tolist() == found.support_sizes
        assert (found.support_y.diff() >= 0).all()
        start, first = 0, 0
        for size, more in zip(sizes, expected, strict=True):
            end = first + size + len(more)
            torch.testing.assert_close(
                found.support_x[0, first : first + size], task.support_x[0, start : start + size]
            )
            torch.testing.assert_close(found.support_x[0, first + size : end], task.unlabelled_x[0, more])
            start, first = start + size, end
        torch.testing.assert_close(found.query_x, task.query_x)


@pytest.mark.parametrize("name", ["protonet", "maml", "r2d2"])
def test_self_training_is_the_method_on_its_own_labels(name: str) -> None:
    """Step by step, task by task, for tasks of several shapes."""
    task = replace(UNEQUAL, ways=4) if name == "maml" else UNEQUAL
    wrapper = wrapped(name, rounds=2)
    method = wrapper.method.eval()
    tasks = alone(IMAGES, task, 4)
    prepare = wrapper.preparation()
    for _, group in together(tasks).chunks():
        found = list(prepare(method, group).split(1))
        for one, own in zip(found, group.split(1), strict=True):
            current = own
            assert own.unlabelled_x is not None
            for _ in range(2):
                blank = own.support_y.new_zeros(1, own.unlabelled_x.shape[1])
                asked = replace(current, query_x=own.unlabelled_x, query_y=blank, queries=None)
                labels = method.predict(asked)[0].argmax(-1)
                x = torch.cat([own.support_x[0], own.unlabelled_x[0]])
                y = torch.cat([own.support_y[0], labels])
                order = y.argsort(stable=True)
                current = own.with_support(x[order][None], y[order][None])
            torch.testing.assert_close(one.support_y, current.support_y)
            expected, predicted = method.predict(current), method.predict(one)
            torch.testing.assert_close(predicted, expected)  # the order within a class makes no difference


def test_no_label_is_certain_enough_and_the_method_is_alone() -> None:
    wrapper = wrapped("protonet", threshold=1.0)
    tasks = together(alone(IMAGES, TASK, 3))
    assert isinstance(tasks, Episodes)
    wrapper.method.backbone.requires_grad_(False)
    for value in wrapper.method.parameters():
        value.data *= 0.01  # so that nothing is certain
    found = self_trained(wrapper.method, tasks, rounds=1, threshold=1.0, per_class=None)
    assert isinstance(found, Episodes)
    torch.testing.assert_close(found.support_x, tasks.support_x)
    without = replace(tasks, unlabelled_x=None)
    assert self_trained(wrapper.method, without, rounds=1, threshold=0.0, per_class=None) is without


def test_right_labels_are_as_good_as_given_ones() -> None:
    """Classes that are easily told: self-training is the method with all the labels."""
    algorithm: Algorithm = build(compose("algo=protonet", "backbone=pixels", "train.steps=0"), IMAGES).eval()
    (task,) = IMAGES.sampler("test", TaskShape(4, 2, 3, unlabelled=3), 0, CPU)(0, 1).split(1)
    found = self_trained(algorithm, task, rounds=1, threshold=0.0, per_class=None)
    assert isinstance(found, Episodes)
    assert found.support_sizes == [5] * 4
    assert found.shots is None
    means = class_means(found.support_x.flatten(2), found.support_y, 4)
    assert torch.cdist(means, found.query_x.flatten(2)).argmin(1).eq(found.query_y).all()


def test_training_tasks_are_prepared_where_that_is_asked_for() -> None:
    tasks = together(alone(IMAGES, TASK, 3))
    assert isinstance(tasks, Episodes)
    plain, inside = wrapped("protonet"), wrapped("protonet", in_training=True)
    assert (
        gradient_step(plain, tasks, 0, 1.0, 0, hardware())["loss"]
        == gradient_step(plain.method, tasks, 0, 1.0, 0, hardware())["loss"]
    )
    prepared = self_trained(inside.method, tasks, rounds=1, threshold=0.0, per_class=None)
    losses = [inside.method.loss(task, 0)[0].item() for task in prepared.split(1)]
    found = gradient_step(inside, tasks, 0, 1.0, 0, hardware(task_chunk=None))
    assert found["loss"].item() == pytest.approx(float(np.mean(losses)), rel=1e-9)
    assert plain.trains is False
    assert inside.trains is True


def test_an_evaluation_is_of_prepared_tasks() -> None:
    wrapper = wrapped("r2d2")
    method = wrapper.method
    tasks = alone(IMAGES, UNEQUAL, 6, "test")

    def given(start: int, stop: int) -> Episodes | MixedEpisodes:
        return together(tasks[start:stop])

    method.prepare = wrapper.preparation()
    scores = evaluate(method, given, 6, hardware())
    for number, task in enumerate(tasks):
        (ready,) = method.prepared(task).split(1)
        right = (method.predict(ready).argmax(-1) == task.query_y).double().mean().item()
        assert scores.final[number].item() == pytest.approx(right)


def test_an_evaluation_predicts_what_a_preparation_gives() -> None:
    """Here each class gets the support images of another one, with which every query is wrong."""
    method: Algorithm = build(compose("algo=protonet", "backbone=pixels", "train.steps=0"), IMAGES).eval()
    tasks = alone(IMAGES, UNEQUAL, 6, "test")

    def given(start: int, stop: int) -> Episodes | MixedEpisodes:
        return together(tasks[start:stop])

    def moved_on(method: Algorithm, episodes: Episodes) -> Episodes | MixedEpisodes:
        found = []
        for task in episodes.split(1):
            labels = (task.support_y[0] + 1) % task.ways
            order = labels.argsort(stable=True)
            found.append(task.with_support(task.support_x[:, order], labels[order][None]))
        return together(found)

    assert evaluate(method, given, 6, hardware()).final.tolist() == [1.0] * 6
    method.prepare = moved_on
    assert evaluate(method, given, 6, hardware()).final.tolist() == [0.0] * 6


def test_what_cannot_be_trained_by_itself_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^wrapper=self_training: makes classes of different sizes, and MTL needs equal ones"
    ):
        wrapped("mtl")
    with pytest.raises(
        UserError, match=r"^wrapper\.in_training=true: makes tasks of different sizes, and Reptile learns"
    ):
        wrapped("reptile", in_training=True)
    wrapped("reptile")
    regression: Any = SimpleNamespace(spec=SimpleNamespace(kind="regression"), whole_batch=False)
    with pytest.raises(UserError, match=r"^wrapper=self_training: .* regression tasks; leave the wrapper out$"):
        SelfTraining(regression, lambda start, stop: pytest.fail("no task is drawn"))


@pytest.mark.parametrize("algo", ["baseline", "oml"])
def test_without_unlabelled_items_it_is_refused_for_methods_on_images_too(algo: str, tmp_path: Path) -> None:
    words = [f"algo={algo}", "data=folder", f"data.root={make_images(tmp_path / 'images')}", "data.image_size=16"]
    ended = metarun(*words, "backbone.channels=4", "wrapper=self_training", f"outputs={tmp_path / 'runs'}")
    assert ended.status == 2
    assert "wrapper=self_training: learns from the unlabelled items of validation and test tasks" in ended.said[0]


WORDS = [
    "algo=protonet", "data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=[2,3]", "task.shots=[1,2]",
    "task.queries=2", "task.balanced=false", "task.unlabelled=1", "task.distractors=1", "train.steps=2", "train.validate_every=4",
    "train.validate_episodes=3", "test.episodes=4", "test.baseline_episodes=0",
]  # fmt: skip


def test_runs_with_few_labels(tmp_path: Path) -> None:
    """A run with self-training, and `recipe=test` of its weights: on the same tasks, in the same way."""
    images = make_images(tmp_path / "images", classes=14)
    words = [
        *WORDS,
        "wrapper=self_training",
        f"data.root={images}",
        f"outputs={tmp_path}",
        "train.task.labelled_share=0.8",
    ]
    first = metarun(*words, "name=made")
    assert first.status == 0, first.err
    folder = run_folder(tmp_path)
    found = result(folder)
    tasks = {"ways": [2, 3], "shots": [1, 2], "queries": 2, "balanced": False, "unlabelled": 1, "distractors": 1}
    assert found["protocol"]["test"] == tasks
    assert found["protocol"]["train"] == {**tasks, "labelled_share": 0.8}
    assert found["protocol"]["uses_unlabelled"] is True
    assert 1 / 3 <= found["chance/acc"] <= 1 / 2
    assert "2–3-way 1–2-shot, 2 queries a class, drawn for each class, 1" in first.out
    with np.load(folder / "test_scores.npz") as stored:
        scores = stored["values"].copy()
    again = metarun("recipe=test", f"checkpoint={folder}", "name=again", f"outputs={tmp_path}")
    assert again.status == 0, again.err
    (tested,) = tmp_path.glob("again/*/test_scores.npz")
    with np.load(tested) as stored:
        assert np.array_equal(stored["values"], scores)


def test_a_run_on_tasks_of_several_shapes_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", classes=14)
    words = [
        *WORDS,
        f"data.root={images}",
        "train.steps=4",
        "train.tasks_per_step=2",
        "train.noise.tasks=0.5",
        "backbone.norm=running",
    ]
    assert metarun(*words, f"outputs={tmp_path}/straight").status == 0
    given, count = VariedSampler.draw, iter(range(10**6))

    def stopping(self: VariedSampler, start: int, stop: int) -> Any:
        if self.split == "train" and start == 4 and next(count) == 0:
            signal.raise_signal(signal.SIGTERM)
        return given(self, start, stop)

    monkeypatch.setattr(VariedSampler, "draw", stopping)
    stopped = metarun(*words, f"outputs={tmp_path}/stopped")
    assert stopped.status != 0
    done = metarun(*words, f"outputs={tmp_path}/stopped")
    assert done.status == 0, done.err
    assert "going on at step 3" in done.err
    one, other = (run_folder(tmp_path / name) for name in ("straight", "stopped"))
    assert result(one)["test/acc"] == result(other)["test/acc"]
    first, second = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (one, other))
    for name, value in first.items():
        assert torch.equal(value, second[name])
