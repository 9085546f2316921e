"""Methods on tasks of several shapes, and of classes of several sizes: against plain computations of one task after the other."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONF, CPU, alone, build, choices, class_of, compose, hardware, toy_images, with_
from omegaconf import OmegaConf
from ranks import assert_same, step_by
from torch import Tensor

from metarun.config import construct
from metarun.core import Algorithm, Episodes, MixedEpisodes, TaskShape, together
from metarun.data.regression import Sinusoid
from metarun.engine.evaluate import evaluate
from metarun.engine.gradients import gradient_step
from metarun.engine.learner import Trainable
from metarun.engine.probabilities import known_and_unknown, validation_temperature
from metarun.errors import UserError
from metarun.ops.calibration import fit_temperature
from metarun.stages.compatibility import check_test_task, check_train_task

IMAGES = toy_images()
SMALL = ["backbone=conv4", "backbone.channels=4"]
MLP = ["backbone=mlp", "backbone.hidden=[8]", "backbone.norm=none", "backbone.init_std=null"]


ALGOS = [name for name in choices("algo") if not name.startswith("learn2learn")]
EPISODIC = [name for name in ALGOS if class_of(name).trains_on == "episodes" and not class_of(name).couples_tasks]
TESTED = [name for name in ALGOS if class_of(name).uses_target == "no" and not class_of(name).equal_classes]


def shape_for(algorithm: Algorithm | type[Algorithm]) -> TaskShape:
    """Tasks that differ in all that the method allows to differ."""
    return TaskShape(4 if algorithm.fixed_ways else (2, 5), (1, 4), (1, 3), balanced=algorithm.equal_classes)


def made(name: str, *words: str, task: TaskShape | None = None, net: list[str] = SMALL) -> Algorithm:
    """A method in double precision, built for tasks of four ways and up to four shots."""
    task = task or shape_for(class_of(name))
    ways = task.ways if isinstance(task.ways, int) else task.ways[1]
    shots = task.shots if isinstance(task.shots, int) else task.shots[1]
    own = [f"task.ways={ways}", "train.task.ways=null", f"task.shots={shots}", "train.task.shots=null"]
    config = compose(f"algo={name}", *net, *own, *words)
    if config.algo.get("test_inner_steps"):
        config.algo.test_inner_steps = 3
    if config.algo.get("inner_steps", 0) and config.algo.inner_steps > 5:
        config.algo.inner_steps = 5
    torch.manual_seed(0)
    return build(config, IMAGES).double()


@pytest.mark.parametrize("name", EPISODIC)
def test_a_step_on_tasks_of_several_shapes_is_the_mean_of_the_steps_on_each(name: str) -> None:
    algorithm = made(name, "backbone.norm=support")
    tasks = alone(IMAGES, shape_for(algorithm), 4)
    assert len({task.shape for task in tasks}) > 1
    shown: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    each = copy.deepcopy(algorithm).train()
    for number, task in enumerate(tasks):
        sums = gradient_step(each, task, 3, 1 / len(tasks), 5, hardware(), number)
        for found, values in ((shown, sums), (gradients, dict(graded(each)))):
            for key, value in values.items():
                found[key] = found.get(key, torch.zeros_like(value)) + value
    sums = gradient_step(algorithm.train(), together(tasks), 3, 1.0, 5, hardware(task_chunk=None))
    for found, values in ((shown, sums), (gradients, dict(graded(algorithm)))):
        assert found.keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(
                value, found[key], rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )


def graded(algorithm: Algorithm) -> list[tuple[str, Tensor]]:
    return [(name, value.grad.clone()) for name, value in algorithm.named_parameters() if value.grad is not None]


@pytest.mark.parametrize("name", TESTED)
def test_every_episode_is_predicted_as_if_it_were_alone(name: str) -> None:
    algorithm = made(name, "backbone.norm=support").eval()
    shape = shape_for(algorithm)
    tasks = alone(IMAGES, shape, 5, "test")

    def given(start: int, stop: int) -> Episodes | MixedEpisodes:
        return together(tasks[start:stop])

    seen: list[Tensor] = []
    torch.manual_seed(0)
    scores = evaluate(
        algorithm, given, 5, hardware(), measure=True, observe=lambda rows, *_: seen.append(rows), curves=False
    )
    assert sorted(torch.cat(seen).tolist()) == list(range(5))
    losses = []
    for number, task in enumerate(tasks):
        with torch.no_grad():
            logits = algorithm.predict(task)
        assert logits.shape == (1, task.query_y.shape[1], task.ways)
        assert logits.isfinite().any(-1).all()
        right = (logits.argmax(-1) == task.query_y).double().mean()
        assert scores.final[number].item() == pytest.approx(right.item(), abs=1e-12)
        losses.append(algorithm.task_loss(logits, task.query_y).item())
    assert scores.loss == pytest.approx(float(np.mean(losses)), rel=1e-8)


def test_regression_tasks_of_several_sizes() -> None:
    source, shape = Sinusoid(), TaskShape(1, (2, 6), (1, 4))
    words = ["data=sinusoid", "task.ways=1", "train.task.ways=null", *MLP, "train.task.shots=null"]
    for name in ("maml", "cnp"):
        torch.manual_seed(0)
        algorithm = build(compose(f"algo={name}", *words), source).double()
        tasks = alone(source, shape, 5)
        sums = gradient_step(algorithm, together(tasks), 0, 1.0, 0, hardware())
        losses = [algorithm.loss(task, 0)[0].item() for task in tasks]
        assert sums["loss"].item() == pytest.approx(float(np.mean(losses)), rel=1e-8)


# Plain computations of one task, class by class, of the formulas of each paper. They get one task's tensors.


def features(algorithm: Algorithm, task: Episodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of both sets of a task, by a backbone whose norm looks at no other item."""
    with torch.no_grad():
        return (
            algorithm.backbone(task.support_x[0]),
            task.support_y[0],
            algorithm.backbone(task.query_x[0]),
            task.query_y[0],
        )


def means(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x[y == way].mean(0) for way in range(int(y.max()) + 1)])


def by_distance(queries: Tensor, centres: Tensor) -> Tensor:
    return torch.stack([-((queries - centre) ** 2).sum(1) for centre in centres], 1)


def protonet(algorithm: Any, task: Episodes) -> Tensor:
    support, y, queries, _ = features(algorithm, task)
    return by_distance(queries, means(support, y))


def r2d2(algorithm: Any, task: Episodes) -> Tensor:
    support, y, queries, _ = features(algorithm, task)
    x, z = (torch.cat([part, torch.ones(len(part), 1).double()], 1) for part in (support, queries))
    penalty = len(x) * algorithm.log_regularization.detach().exp()
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).double(), x.T @ F.one_hot(y).double())
    return algorithm.scale.detach() * z @ weights + algorithm.bias.detach()


def matchingnet(algorithm: Any, task: Episodes) -> Tensor:
    support, y, queries, _ = features(algorithm, task)
    cosines = torch.stack([torch.cosine_similarity(queries, one[None], dim=1) for one in support], 1)
    attention = (algorithm.scale * cosines).softmax(1)
    return torch.stack([attention[:, y == way].sum(1) for way in range(task.ways)], 1).log()


def feat(algorithm: Any, task: Episodes) -> Tensor:
    support, y, queries, _ = features(algorithm, task)
    with torch.no_grad():
        return by_distance(queries, algorithm.adapt(means(support, y))) / algorithm.temperature


def simpleshot(algorithm: Any, task: Episodes) -> Tensor:
    support, y, queries, _ = features(algorithm, task)
    support, queries = (F.normalize(part - algorithm.mean, dim=1) for part in (support, queries))
    return by_distance(queries, means(support, y))


def tim(algorithm: Any, task: Episodes) -> Tensor:
    """Adam on the loss of TIM itself, by autograd."""
    support, y, queries, _ = features(algorithm, task)
    support, queries = (F.normalize(part, dim=1) for part in (support, queries))
    weights = means(support, y).clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=algorithm.learning_rate)
    for _ in range(algorithm.steps):
        optimizer.zero_grad()
        own, others = (algorithm.temperature / 2 * by_distance(part, weights) for part in (support, queries))
        shares = others.softmax(1)
        marginal = shares.mean(0)
        loss = algorithm.support_weight * F.cross_entropy(own, y)
        loss = loss + algorithm.marginal_weight * (marginal * marginal.log()).sum()
        loss = loss - algorithm.conditional_weight * (shares * others.log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
    return algorithm.temperature / 2 * by_distance(queries, weights.detach())


def maml(algorithm: Any, task: Episodes) -> Tensor:
    """Plain gradient steps on a copy."""
    learner = copy.deepcopy(algorithm)
    for _ in range(learner.test_steps):
        loss = F.cross_entropy(learner(task.support_x[0]), task.support_y[0])
        for value, slope in zip(
            learner.parameters(), torch.autograd.grad(loss, list(learner.parameters())), strict=True
        ):
            value.data -= learner.inner.lr * slope
    return learner(task.query_x[0]).detach()


def protomaml(algorithm: Any, task: Episodes) -> Tensor:
    """Plain gradient steps on a copy of the body and a head that starts as ProtoNet."""
    body = copy.deepcopy(algorithm.backbone)
    centres = means(body(task.support_x[0]), task.support_y[0]).detach()
    weight, bias = (2 * centres).requires_grad_(), (-(centres**2).sum(1)).requires_grad_()
    learned = [*body.parameters(), weight, bias]
    for _ in range(algorithm.test_steps):
        loss = F.cross_entropy(body(task.support_x[0]) @ weight.T + bias, task.support_y[0])
        for value, slope in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            value.data -= algorithm.inner.lr * slope
    return (body(task.query_x[0]) @ weight.T + bias).detach()


REFERENCES = {
    "protonet": protonet,
    "r2d2": r2d2,
    "matchingnet": matchingnet,
    "feat": feat,
    "simpleshot": simpleshot,
    "tim": tim,
    "maml": maml,
    "protomaml": protomaml,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_method_is_its_formula_for_each_task_by_itself(name: str) -> None:
    words = ["algo.steps=20"] if name == "tim" else []
    algorithm = made(name, *words, net=MLP).eval()
    for value in algorithm.parameters():
        value.data += 0.05 * torch.randn_like(value)
    whole = IMAGES.sampler("test", shape_for(algorithm), 0, CPU)(0, 6)
    groups = [
        (places, tasks.with_tensors(x.double() if x.is_floating_point() else x for x in tasks.tensors))
        for places, tasks in whole.chunks()
    ]
    assert len(groups) > 1
    for _, tasks in groups:
        for task, found in zip(tasks.split(1), algorithm.predict(tasks), strict=True):
            expected = REFERENCES[name](algorithm, task)
            torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-8)


def test_the_contrast_of_feat_is_over_classes_of_any_size() -> None:
    algorithm: Any = made("feat", net=MLP).eval()
    for task in alone(IMAGES, TaskShape(3, (1, 4), (1, 3), balanced=False), 4):
        support, support_y, queries, query_y = features(algorithm, task)
        x, y = torch.cat([support, queries]), torch.cat([support_y, query_y])
        with torch.no_grad():
            centres = torch.stack([algorithm.adapt(x[y == way]).mean(0) for way in range(3)])
            sizes = [k + q for k, q in zip(task.support_sizes, task.query_sizes, strict=True)]
            found = algorithm.contrast(x[None], y[None], sizes)
        expected = F.cross_entropy(by_distance(x, centres) / algorithm.contrast_temperature, y)
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "norm"), [("protonet", "running"), ("feat", "support"), ("maml", "batch"), ("leo", "running")]
)
def test_processes_and_chunks_change_nothing_on_tasks_of_several_shapes(name: str, norm: str) -> None:
    tasks = alone(IMAGES, shape_for(class_of(name)), 5)
    # Shapes that came before: running averages go by the order of the tasks, and not of the shapes.
    tasks += [with_(task, support_x=1 - task.support_x, query_x=1 - task.query_x) for task in tasks[:3]]

    def algorithm() -> Algorithm:
        return made(name, f"backbone.norm={norm}")

    def batch_of(first: int, end: int) -> Episodes | MixedEpisodes:
        return together(tasks[first:end])

    one = step_by(algorithm, batch_of, 1)
    for processes, chunk in ((1, None), (3, 1), (2, 3)):
        assert_same(step_by(algorithm, batch_of, processes, chunk), one)


def test_tasks_of_one_shape_run_together_by_vmap() -> None:
    algorithm = made("maml", net=MLP)
    tasks = together(alone(IMAGES, TaskShape(4, (1, 2), 2), 8))
    slow = gradient_step(algorithm, tasks, 0, 1.0, 0, hardware())
    algorithm.vectorize = True
    fast = gradient_step(algorithm, tasks, 0, 1.0, 0, hardware(vectorize=True, task_chunk=None))
    assert len([group for group, _ in tasks.chunks()]) == 2
    assert fast["loss"].item() == pytest.approx(slow["loss"].item(), rel=1e-9)


def test_the_temperature_is_that_of_all_queries_together() -> None:
    algorithm = made("matchingnet", net=MLP).eval()
    shape = TaskShape((2, 5), (1, 4), (1, 3), balanced=False)
    tasks = alone(toy_images(signal=0.6), shape, 40, "val")
    rows, labels = [], []
    for task in tasks:
        rows.append(F.pad(algorithm.predict(task)[0].detach(), (0, 5 - task.ways), value=-torch.inf))
        labels.append(task.query_y[0])
    expected = fit_temperature(torch.cat(rows).numpy(), torch.cat(labels).numpy())
    found = validation_temperature(algorithm, lambda a, b: together(tasks[a:b]), 40, shape, hardware())
    assert found == expected is not None


def test_unknown_classes_of_tasks_of_several_shapes() -> None:
    algorithm = made("protonet", net=MLP).float()
    draw = IMAGES.sampler("test", TaskShape((4, 7), (1, 4), (1, 3), balanced=False), 0, CPU)
    known, unknown = known_and_unknown(
        algorithm, draw, 20, TaskShape((2, 5), (1, 4), (1, 3), balanced=False), 2, None, hardware()
    )
    sizes = [task.query_sizes for task in draw(0, 20).split(1)]
    assert {len(found) for found in known.values()} == {sum(sum(each[:-2]) for each in sizes)}
    assert {len(found) for found in unknown.values()} == {sum(sum(each[-2:]) for each in sizes)}
    assert known["prototype_distance"].mean() > unknown["prototype_distance"].mean()


def learner(name: str, task: TaskShape, *words: str, wrapper: str | None = None) -> Trainable:
    algorithm = made(name, task=task)
    around: Any = None
    if wrapper:
        node = OmegaConf.load(Path(CONF) / "wrapper" / f"{wrapper}.yaml")
        node = OmegaConf.merge(node, {"steps": 10} if wrapper == "ats" else {}, OmegaConf.from_dotlist(list(words)))
        around = construct(node, "wrapper", method=algorithm, validation=IMAGES.sampler("val", task, 0, CPU))  # type: ignore[arg-type]
    return Trainable(name, algorithm, OmegaConf.create({"steps": 1}), 0, hardware(), task=task, wrapper=around)


REFUSED = {
    "maml": (TaskShape((2, 5), 1, 1), r"^train\.task\.ways=\[2,5\]: MAML has one output for each way, so all tasks must have"),
    "mtl": (TaskShape(4, (1, 3), 1, balanced=False), r"^train\.task: its classes differ .* MTL needs equal classes; add "),
    "reptile": (TaskShape(4, (1, 3), 1), r"^train\.task: its ranges make tasks of several shapes, and Reptile \(algo\) learns from all"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_method_cannot_do_is_refused_in_one_line(name: str) -> None:
    task, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        check_train_task(learner(name, task), task, task)


def test_tests_and_wrappers_are_refused_too() -> None:
    varied = TaskShape(4, (1, 3), (1, 2))
    with pytest.raises(
        UserError,
        match=r"^test\.task: its classes differ.* MTL needs equal classes; add task\.protocol=uniform \(test\.task\.protocol, where",
    ):
        check_test_task(learner("mtl", TaskShape(4, 2, 1)), TaskShape(4, (1, 9), 1, protocol="meta_dataset"))
    with pytest.raises(UserError, match=r"^test\.task\.ways=\[2,5\]: MAML has one output for each way"):
        check_test_task(learner("maml", TaskShape(4, 2, 1)), TaskShape((2, 5), 2, 1))
    idle = r"^wrapper=self_training: learns from the unlabelled items of validation and test tasks, and they have none; add task\."
    with pytest.raises(UserError, match=idle):
        check_train_task(learner("protonet", varied, wrapper="self_training"), varied, varied)
    some = replace(varied, unlabelled=2)
    check_train_task(learner("protonet", varied, wrapper="self_training"), varied, some)
    within = learner("protonet", varied, "in_training=true", wrapper="self_training")
    check_train_task(within, some, varied)
    with pytest.raises(
        UserError, match=r"^wrapper\.in_training=true: .* of training tasks, and they have none; add train\.task\."
    ):
        check_train_task(within, varied, some)
    with pytest.raises(UserError, match=r"and ATS \(wrapper\) learns from all tasks of a step at once"):
        check_train_task(learner("protonet", varied, wrapper="ats"), varied, varied)
    with pytest.raises(UserError, match=r"^wrapper\.layers=\[0, 1, 2, 3\]: .*add wrapper\.layers=\[0\]$"):
        check_train_task(learner("protonet", varied, wrapper="metamix"), varied, varied)
    check_train_task(learner("protonet", varied, "layers=[0]", wrapper="metamix"), varied, varied)
    check_train_task(learner("protonet", replace(varied, ways=(2, 5), balanced=False)), varied, varied)


def test_metamix_mixes_tasks_of_several_shapes() -> None:
    task = TaskShape((2, 5), (1, 4), (1, 3), balanced=False)
    wrapper = learner("protonet", task, "layers=[0]", wrapper="metamix").wrapper
    assert wrapper is not None
    sums = gradient_step(wrapper.double(), together(alone(IMAGES, task, 5)), 0, 1.0, 0, hardware())
    assert sums["loss"].isfinite()
