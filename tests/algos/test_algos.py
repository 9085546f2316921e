"""What every algorithm in conf/algo inherits, and what MAML, Reptile and ProtoNet each must equal."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CONF, CPU, build, class_of, compose, double, episodes, hardware, toy_images, with_
from learners import (
    ALGOS,
    SEPARABLE,
    VECTORIZABLE,
    MeanOfWords,
    brief,
    config_of,
    fed,
    gradients,
    learner,
    steps_of,
    stream,
    texts,
)
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.algos.protonet import ProtoNet
from metarun.algos.reptile import Reptile
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.config import task_of
from metarun.core import Algorithm, Batch, Episodes, Spec, TaskShape
from metarun.data.regression import Sinusoid
from metarun.engine import checkpoint
from metarun.engine.gradients import gradient_step
from metarun.engine.interruption import Interrupted
from metarun.engine.learner import Trainable, build_optimizer
from metarun.engine.train import fit
from metarun.errors import UserError
from metarun.ops.batch_norm import KINDS
from metarun.ops.metrics import accuracy
from metarun.runs.logger import RunLogger

NOISE = toy_images(signal=0.0, per_class=30)
EVERY = pytest.mark.parametrize("name", ALGOS)
# L2L's optimisees are random networks, of which there are no running averages: it refuses them.
NORMED = [(name, norm) for name in ALGOS for norm in KINDS if (name, norm) != ("l2l", "running")]
EVERY_FORM = pytest.mark.parametrize(
    ("name", "vectorize"), [*((name, False) for name in ALGOS), *((name, True) for name in VECTORIZABLE)]
)
BOTH = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def exact(algorithm: Algorithm, batch: Episodes) -> tuple[Algorithm, Episodes]:
    return algorithm.double(), double(batch)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


# Inherited by every conf/algo/*.yaml


@EVERY
def test_shapes(name: str) -> None:
    algorithm, batch = learner(name, 3)
    algorithm.eval()
    steps = steps_of(algorithm)
    predictions, after = algorithm.predict(batch), algorithm.predict_after(batch, steps)
    assert predictions.shape == (3, 20, 5)
    assert after.shape == (len(steps), 3, 20, 5)
    assert torch.equal(after[-1], predictions)
    assert after.isfinite().all()
    for number, step in enumerate(steps):
        torch.testing.assert_close(algorithm.predict_after(batch, [step])[0], after[number])


@EVERY
def test_test_tasks_may_have_other_shots_queries_and_ways(name: str) -> None:
    algorithm, _ = learner(name, 1)
    algorithm.eval()
    for ways in (5,) if algorithm.fixed_ways else (5, 2, 9):
        other = episodes(SEPARABLE, TaskShape(ways, 3, 2), 2)
        assert algorithm.predict(other).shape == (2, 2 * ways, ways)


@EVERY
def test_loss_is_a_scalar_and_its_logs_are_detached(name: str) -> None:
    algorithm, batch = learner(name, 3)
    loss, logs = algorithm.train().loss(fed(algorithm, batch), 0)
    assert loss.shape == ()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    for value in logs.values():
        assert value.shape == ()
        assert not value.requires_grad
    loss.backward()
    found = gradients(algorithm)
    assert found.keys() == {key for key, value in algorithm.named_parameters() if value.requires_grad}
    assert all(value.isfinite().all() for value in found.values())
    assert any(value.abs().max() > 0 for value in found.values())


@EVERY
def test_queries_labels_are_not_read(name: str) -> None:
    algorithm, batch = learner(name, 3)
    algorithm.eval()
    steps = steps_of(algorithm)
    honest = algorithm.predict_after(batch, steps)
    garbage = with_(batch, query_y=torch.full_like(batch.query_y, -(2**40)))
    assert torch.equal(algorithm.predict_after(garbage, steps), honest)


@EVERY
def test_accuracy_is_at_chance_where_images_tell_nothing(name: str) -> None:
    """Of noise only a leak (of labels, or of the order of the queries) could tell more, and training would only widen it."""
    config = brief(name, config_of(name))
    algorithm = build(config, NOISE)
    train(algorithm, config, episodes(NOISE, task_of(config, "train"), 4), steps=5)
    unseen = episodes(NOISE, TaskShape(5, 1, 20), 20, "test")
    with torch.no_grad():
        score = accuracy(algorithm.eval().predict(unseen), unseen.query_y).mean().item()
    assert abs(score - 0.2) < 4.5 * math.sqrt(0.2 * 0.8 / (20 * 100))


@EVERY
def test_predictions_follow_their_queries(name: str) -> None:
    """Queries in another order get the same predictions in that order."""
    algorithm, batch = exact(*learner(name, 2))
    algorithm.eval()
    order = torch.randperm(20)
    with torch.no_grad():
        straight, shuffled = algorithm.predict(batch), algorithm.predict(with_(batch, query_x=batch.query_x[:, order]))
    close(shuffled, straight[:, order])


@EVERY
def test_tasks_do_not_see_each_other(name: str) -> None:
    """At test time a task's predictions are the same whatever it is tested with, and the same every time."""
    algorithm, batch = exact(*learner(name, 4))
    algorithm.eval()
    with torch.no_grad():
        together = algorithm.predict(batch)
        torch.manual_seed(99)
        assert torch.equal(algorithm.predict(batch), together)
        for size in (1, 3):
            close(torch.cat([algorithm.predict(part) for part in batch.split(size)]), together)


@pytest.mark.parametrize(("name", "norm"), NORMED)
def test_transductive_says_whether_queries_see_each_other(name: str, norm: str) -> None:
    algorithm, batch = exact(*learner(name, 2, norm=norm))
    algorithm.train().loss(fed(algorithm, batch), 0)  # running averages that are no longer at their start
    algorithm.eval()
    other = with_(batch, query_x=torch.cat([batch.query_x[:, :1], 3 * torch.rand_like(batch.query_x[:, 1:])], dim=1))
    with torch.no_grad():
        before, after = algorithm.predict(batch)[:, 0], algorithm.predict(other)[:, 0]
    if algorithm.transductive:
        assert (before - after).abs().max() > 1e-6
    else:
        close(before, after)


def forms() -> list[tuple[str, str, str]]:
    """Methods with backbones and norms: a method with every norm on convolutions and with one on vectors, these in turn."""
    norms = ["batch", "support", "group", "none"]
    turns = [(name, "mlp", norms[turn % len(norms)]) for turn, name in enumerate(VECTORIZABLE)]
    return [(name, "conv4", norm) for name in VECTORIZABLE for norm in norms] + turns


@pytest.mark.parametrize(("name", "backbone", "norm"), forms())
def test_vmap_equals_loop(name: str, backbone: str, norm: str) -> None:
    loop, batch = exact(*learner(name, 2, backbone=backbone, norm=norm))
    vmapped = copy.deepcopy(loop)
    vmapped.vectorize = True
    results = []
    for algorithm in (loop, vmapped):
        torch.manual_seed(1)
        loss, logs = algorithm.train().loss(fed(algorithm, batch), 0)
        loss.backward()
        after = algorithm.eval().predict_after(batch, steps_of(algorithm))
        results.append((loss, logs, gradients(algorithm), dict(algorithm.named_buffers()), after))
    for one, other in zip(*results, strict=True):
        if isinstance(one, Tensor):
            close(one.detach(), other.detach())
        else:
            assert one.keys() == other.keys()
            for key in one:
                close(one[key].double(), other[key].double())
    assert loss.dtype == torch.float64


@EVERY_FORM
def test_bfloat16_autocast(name: str, vectorize: bool) -> None:
    """The gradients point where those in single precision do, if inner steps are few: each adds to the difference."""
    found = []
    for bfloat16 in (False, True):
        algorithm, batch = learner(name, 4, vectorize=vectorize)
        gradient_step(algorithm.train(), fed(algorithm, batch), 0, 1.0, 0, hardware(bfloat16=bfloat16))
        assert all(value.dtype == torch.float32 for value in gradients(algorithm).values())
        found.append(torch.cat([value.flatten() for value in gradients(algorithm).values()]))
    with hardware(bfloat16=True).autocast(), torch.no_grad():
        assert algorithm.eval().predict(batch).isfinite().all()
    assert F.cosine_similarity(*found, dim=0).item() > 0.8


@EVERY
def test_chunks_of_tasks_give_the_same_step(name: str) -> None:
    results = []
    for size in (None, 1, 3):
        algorithm, batch = exact(*learner(name, 4))
        logged = gradient_step(algorithm.train(), fed(algorithm, batch), 0, 1.0, 0, hardware(task_chunk=size))
        results.append(logged | gradients(algorithm))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            close(other[key].double(), value.double())


@EVERY
def test_random_numbers_come_from_the_seeded_global_generator(name: str) -> None:
    losses = []
    for _ in range(2):
        algorithm, batch = learner(name, 2)
        torch.manual_seed(1)
        losses.append(algorithm.train().loss(fed(algorithm, batch), 0)[0])
    assert torch.equal(*losses)


def train(algorithm: Algorithm, config: DictConfig, batch: Episodes, steps: int) -> list[float]:
    """`steps` steps on one batch with the configured optimiser; the losses."""
    settings = OmegaConf.merge(config.train, {"steps": 10 * steps})  # so that a schedule does not end the training
    optimizer, schedule = build_optimizer(algorithm, settings)
    algorithm.train()
    losses = []
    for step in range(steps):
        logged = gradient_step(algorithm, fed(algorithm, batch), step, 1.0, 0, hardware())
        losses.append(logged["loss"].item())
        optimizer.step()
        schedule.step()
    return losses


@EVERY
def test_overfits_one_batch(name: str) -> None:
    """The loss falls below half, and nine in ten queries are right, within 120 steps at a rate fit for so few."""
    config = config_of(name)
    rate = config.train.optimizer.lr
    config.train.optimizer.lr = max(rate, min(0.01, 10 * rate))
    if config.algo.get("inner_steps"):
        config.algo.inner_steps = min(config.algo.inner_steps, 16)
    algorithm = build(config, SEPARABLE)
    batch = episodes(SEPARABLE, task_of(config, "train"), 2)
    optimizer, _ = build_optimizer(algorithm, config.train)
    losses: list[float] = []
    score = 0.0
    while len(losses) < 120 and (score < 0.9 or losses[-1] > 0.5 * losses[0]):
        algorithm.train()
        for _ in range(10):
            losses.append(
                gradient_step(algorithm, fed(algorithm, batch), len(losses), 1.0, 0, hardware())["loss"].item()
            )
            optimizer.step()
        with torch.no_grad():
            score = accuracy(algorithm.eval().predict(batch), batch.query_y).mean().item()
    assert score >= 0.9
    assert losses[-1] < 0.5 * losses[0]


@EVERY
def test_training_keeps_no_graph_and_no_memory(name: str) -> None:
    algorithm, batch = learner(name, 2)
    algorithm.train()
    alive = []
    gc.freeze()  # what is there already need not be searched each time
    for step in range(4):
        gradient_step(algorithm, fed(algorithm, batch), step, 1.0, 0, hardware())
        algorithm.zero_grad(set_to_none=True)
        gc.collect()
        alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    gc.unfreeze()
    assert alive[2] == alive[1]
    assert alive[3] == alive[1]
    for module in algorithm.modules():
        kept = [value for key, value in vars(module).items() if isinstance(value, Tensor)]
        for tensor in (*module.buffers(recurse=False), *kept):
            assert not tensor.requires_grad
            assert tensor.grad_fn is None


@EVERY
def test_weights_make_the_round_trip(name: str, tmp_path: Path) -> None:
    config = brief(name, config_of(name, norm=None))
    algorithm = build(config, SEPARABLE)
    batch = episodes(SEPARABLE, task_of(config, "train"), 2)
    train(algorithm, config, batch, steps=2)
    checkpoint.save(tmp_path / "weights.pt", {"model": algorithm.state_dict()})
    again = build(config, SEPARABLE)
    loaded = checkpoint.load(tmp_path / "weights.pt")["model"]  # with weights_only
    checkpoint.load_weights(again, loaded, tmp_path / "weights.pt")
    assert again.state_dict().keys() == algorithm.state_dict().keys()
    for key, value in algorithm.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with torch.no_grad():
        assert torch.equal(again.eval().predict(batch), algorithm.eval().predict(batch))


@EVERY
def test_resumed_training_is_bit_for_bit_that_never_interrupted(name: str, tmp_path: Path) -> None:
    norm = "running" if (name, "running") in NORMED else "batch"  # with running averages there is more to carry on
    settings = ["train.steps=4", "train.tasks_per_step=2", "train.validate_every=3", "train.log_every=1"]
    config = brief(name, config_of(name, *settings, norm=norm))

    def sitting(folder: Path, interrupted_at: int | None = None) -> dict[str, object]:
        folder.mkdir(exist_ok=True)
        algorithm = build(config, SEPARABLE)
        draw = SEPARABLE.sampler("train", task_of(config, "train"), 0, CPU)
        images = stream(algorithm, SEPARABLE)
        unseen = episodes(SEPARABLE, TaskShape(5, 1, 4), 2, "val")

        def sampler(start: int, stop: int) -> Episodes | Batch:
            if start // 2 == interrupted_at:
                signal.raise_signal(signal.SIGTERM)
            return draw(start, stop) if algorithm.trains_on != "batches" else images(24 * start, 24 * stop)

        def validate() -> tuple[float, dict[str, float]]:
            with torch.no_grad():
                score = -algorithm.eval().predict(unseen).square().mean().item()
            algorithm.train()
            return score, {"val/score": score}

        logger = RunLogger(folder)
        try:
            built = build_optimizer(algorithm, config.train)
            learner = Trainable("train", algorithm, config.train, config.seed, hardware(), *built, sampler)
            fit(learner, validate, folder, logger)
        finally:
            logger.close()
        saved = {key: checkpoint.load(folder / f"{key}.pt") for key in ("last", "best")}
        saved["last"]["state"].pop("seconds")
        return saved

    straight = sitting(tmp_path / "straight")
    with pytest.raises(Interrupted, match=r"step 2$"):
        sitting(tmp_path / "resumed", interrupted_at=1)
    resumed = sitting(tmp_path / "resumed")
    assert_same(resumed, straight)


def assert_same(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@EVERY_FORM
def test_regression_is_learned_or_refused(name: str, vectorize: bool) -> None:
    config = config_of(name, "task.ways=1", backbone="mlp", norm="none")
    source = Sinusoid()
    if not class_of(name).regression:
        with pytest.raises(UserError, match=r"^algo: \w+ only classifies, but the data are regression tasks"):
            build(config, source, vectorize)
        return
    if "inner_lr" in config.algo:
        config.algo.inner_lr = 0.001  # for sums of squares
    algorithm = build(config, source, vectorize)
    batch = episodes(source, TaskShape(1, 5, 7), 3)
    loss, logs = algorithm.train().loss(fed(algorithm, batch), 0)
    assert loss.isfinite()
    assert "acc" not in logs
    steps = steps_of(algorithm)
    assert algorithm.eval().predict_after(batch, steps).shape == (len(steps), 3, 7, 1)
    assert algorithm.predict(batch).shape == (3, 7, 1)
    assert not algorithm.transductive


@EVERY
def test_yaml_is_documented_and_complete(name: str) -> None:
    """Its first comment says what it is and the command that runs it; every setting of the class stands in it."""
    text = (Path(CONF) / "algo" / f"{name}.yaml").read_text().splitlines()
    assert text[0] == "# @package _global_"
    assert text[1].startswith("# ")
    assert f"algo={name}" in text[1].partition("; metarun ")[2].split()
    settings = compose(f"algo={name}").algo
    signature = set(inspect.signature(class_of(name)).parameters) - {"backbone", "spec"}
    assert set(settings) - {"_target_"} == signature


# MAML


def tiny_maml(norm: str, settings: dict[str, str], inner_steps: int, vectorize: bool, **more: bool) -> MAML:
    backbone = Conv4(input_shape=(1, 16, 16), channels=4, norm=norm, **settings)
    algorithm = MAML(
        backbone, Spec((1, 16, 16), "classification", 3), inner_steps=inner_steps, inner_lr=0.3, **more
    ).double()
    for parameter in algorithm.parameters():  # away from zero biases and unit scales
        parameter.data += 0.1 * torch.randn_like(parameter)
    algorithm.vectorize = vectorize
    return algorithm.train()


def tiny_episodes() -> Episodes:
    return double(episodes(SEPARABLE, TaskShape(3, 2, 2), 2))


def slope(algorithm: Algorithm, batch: Episodes, direction: list[Tensor], size: float) -> float:
    """The central difference of the loss along `direction`."""
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(algorithm)
        for parameter, part in zip(moved.parameters(), direction, strict=True):
            parameter.data += sign * size * part
        values.append(moved.loss(batch, 0)[0].item())
    return (values[0] - values[1]) / (2 * size)


FORMS = [(norm, vectorize) for norm in KINDS for vectorize in (False, True) if (norm, vectorize) != ("running", True)]
OFFICIAL = [{"downsample": "pool"}, {"downsample": "stride", "readout": "mean"}]


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
@pytest.mark.parametrize("settings", OFFICIAL, ids=["pool", "stride"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_meta_gradient_is_that_of_finite_differences(
    norm: str, vectorize: bool, settings: dict[str, str], inner_steps: int
) -> None:
    algorithm, batch = tiny_maml(norm, settings, inner_steps, vectorize), tiny_episodes()
    loss, _ = algorithm.loss(batch, 0)
    found = torch.autograd.grad(loss, list(algorithm.parameters()))
    length = math.sqrt(sum(part.square().sum().item() for part in found))
    for number in range(3):
        torch.manual_seed(number)
        direction = [torch.randn_like(part) for part in found]
        if number == 0:
            direction = [part.clone() for part in found]  # the steepest
        norm_of_direction = math.sqrt(sum(part.square().sum().item() for part in direction))
        direction = [part / norm_of_direction for part in direction]
        expected = sum((one * other).sum().item() for one, other in zip(found, direction, strict=True))
        assert slope(algorithm, batch, direction, 1e-6) == pytest.approx(expected, rel=1e-6, abs=1e-6 * length)


def test_running_norm_cannot_be_vectorised() -> None:
    with pytest.raises(UserError, match=r"backbone.norm=running: .* set hardware.vectorize=false"):
        tiny_maml("running", OFFICIAL[0], 1, True).loss(tiny_episodes(), 0)


@BOTH
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_fomaml_is_the_gradient_at_the_adapted_weights(inner_steps: int, vectorize: bool) -> None:
    """Section 5.2, by a loop of nothing but torch; and it is not MAML's gradient."""
    algorithm = tiny_maml("batch", OFFICIAL[0], inner_steps, vectorize, first_order=True)
    batch = tiny_episodes()
    algorithm.loss(batch, 0)[0].backward()
    expected = {name: torch.zeros_like(value) for name, value in algorithm.named_parameters()}
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        fast = copy.deepcopy(algorithm)
        descent = torch.optim.SGD(fast.parameters(), lr=0.3)
        for _ in range(inner_steps):
            descent.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            descent.step()
        descent.zero_grad()
        F.cross_entropy(fast(query_x), query_y).backward()
        for name, value in fast.named_parameters():
            expected[name] += value.grad / 2
    for name, value in algorithm.named_parameters():
        close(value.grad, expected[name])
    second = tiny_maml("batch", OFFICIAL[0], inner_steps, vectorize)
    second.load_state_dict(algorithm.state_dict())
    second.loss(batch, 0)[0].backward()
    pairs = zip(gradients(algorithm).values(), gradients(second).values(), strict=True)
    assert max((one - other).abs().max().item() for one, other in pairs) > 1e-3


@pytest.mark.parametrize(("norm", "vectorize"), FORMS)
def test_maml_trains_on_what_it_predicts(norm: str, vectorize: bool) -> None:
    """The training loss is that of the predictions after the training steps, whatever the query set is normalised with."""
    algorithm, batch = tiny_maml(norm, OFFICIAL[0], 2, vectorize), tiny_episodes()
    predictions = algorithm.predict(batch)
    loss, logs = algorithm.loss(batch, 0)
    close(loss.detach(), F.cross_entropy(predictions.flatten(0, 1), batch.query_y.flatten()))
    assert logs["acc"].item() == pytest.approx(accuracy(predictions, batch.query_y).mean().item())


def graph_size(loss: Tensor) -> int:
    """Nodes of the autograd graph behind `loss`."""
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return len(seen)


@BOTH
def test_fomaml_builds_no_second_order_graph(vectorize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    for first_order in (True, False):
        for inner_steps in (1, 3):
            algorithm = tiny_maml("batch", OFFICIAL[0], inner_steps, vectorize, first_order=first_order)
            sizes[first_order, inner_steps] = graph_size(algorithm.loss(tiny_episodes(), 0)[0])
    # The graph of the query set, and one subtraction for each weight and inner step: no graph of an inner gradient.
    weights = len(list(algorithm.parameters())) * (1 if vectorize else tiny_episodes().n_tasks)
    assert sizes[True, 3] - sizes[True, 1] == 2 * weights
    assert sizes[False, 3] > 2 * sizes[False, 1] > 2 * sizes[True, 1]

    asked: list[bool] = []
    real = torch.autograd.grad

    def recorded(*args, create_graph: bool = False, **more) -> tuple[Tensor, ...]:
        asked.append(create_graph)
        return real(*args, create_graph=create_graph, **more)

    if not vectorize:  # torch.func.grad always passes create_graph, which counts for the levels around it only
        monkeypatch.setattr(torch.autograd, "grad", recorded)
        tiny_maml("batch", OFFICIAL[0], 3, False, first_order=True).loss(tiny_episodes(), 0)
        assert asked == [False] * 6


@BOTH
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_predicts_with_weights_that_descended(first_order: bool, vectorize: bool) -> None:
    algorithm = tiny_maml("batch", OFFICIAL[1], 1, vectorize, first_order=first_order).eval()
    batch = tiny_episodes()
    after = algorithm.predict_after(batch, [0, 2, 5])
    assert not after.requires_grad
    for task, (support_x, support_y, query_x, _) in enumerate(zip(*batch.tensors, strict=True)):
        fast = copy.deepcopy(algorithm)
        descent = torch.optim.SGD(fast.parameters(), lr=0.3)
        for step in range(6):
            if step in (0, 2, 5):
                close(after[[0, 2, 5].index(step), task], fast(query_x).detach())
            descent.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            descent.step()


def test_maml_settings() -> None:
    backbone, spec = MLP(input_shape=(1,)), Spec((1,), "regression", 1)
    assert MAML(backbone, spec, inner_steps=3).test_steps == 3
    assert MAML(backbone, spec, inner_steps=3, test_inner_steps=10).test_steps == 10
    assert MAML(backbone, spec, inner_steps=3, test_inner_steps=0).test_steps == 0


def test_maml_learns_sinusoids() -> None:
    """Three hundred meta-steps: one inner step takes the error well below that of each task's best constant."""
    config = compose("algo=maml", "data=linear", "backbone=mlp", "algo.inner_lr=0.02")
    source = Sinusoid()
    algorithm = build(config, source, vectorize=True)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.005)
    draw = source.sampler("train", TaskShape(1, 10, 10), 0, CPU)
    for step in range(300):
        optimizer.zero_grad()
        algorithm.loss(draw(25 * step, 25 * step + 25), step)[0].backward()
        optimizer.step()
    unseen = episodes(source, TaskShape(1, 10, 50), 100, "test")
    before, after = ((algorithm.predict_after(unseen, [0, 1]) - unseen.query_y).square().mean((1, 2, 3))).tolist()
    spread = (unseen.query_y - unseen.query_y.mean(1, keepdim=True)).square().mean().item()
    assert after < 0.75 * spread
    assert after < 0.9 * before


# Reptile


def tiny_reptile(vectorize: bool = False, norm: str = "batch", **settings: float) -> Reptile:
    backbone = Conv4(input_shape=(1, 16, 16), channels=4, norm=norm)
    algorithm = Reptile(backbone, Spec((1, 16, 16), "classification", 3), **settings).double()
    algorithm.vectorize = vectorize
    return algorithm.train()


def inner_adam(
    algorithm: Reptile, support_x: Tensor, support_y: Tensor, positions: Tensor, moments: dict[str, Tensor], taken: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The adapted copy and Adam's second moments, by torch's own Adam that goes on from `moments` after `taken` steps."""
    fast = copy.deepcopy(algorithm)
    adam = torch.optim.Adam(fast.parameters(), lr=algorithm.inner.lr, betas=(0.0, algorithm.inner_beta2), eps=1e-8)
    names = [name for name, _ in fast.named_parameters()]
    blank = adam.state_dict()
    blank["state"] = {
        number: {
            "step": torch.tensor(float(taken)),
            "exp_avg": torch.zeros_like(moments[name]),
            "exp_avg_sq": moments[name].clone(),
        }
        for number, name in enumerate(names)
    }
    adam.load_state_dict(blank)
    for rows in positions:
        adam.zero_grad()
        F.cross_entropy(fast(support_x[rows]), support_y[rows]).backward()
        adam.step()
    return fast, {name: adam.state[value]["exp_avg_sq"] for name, value in fast.named_parameters()}


@BOTH
def test_reptile_pulls_towards_what_torchs_adam_reaches(vectorize: bool) -> None:
    """The gradient is phi - mean_i U_i(phi), step after step, with the second moments carried on."""
    algorithm = tiny_reptile(vectorize, inner_steps=4, inner_lr=0.01, inner_batch=4)
    batch = double(episodes(SEPARABLE, TaskShape(3, 3, 0), 2))
    outer = torch.optim.SGD(algorithm.parameters(), lr=0.5)
    moments = {name: torch.zeros_like(value) for name, value in algorithm.named_parameters()}
    for step in range(3):
        torch.manual_seed(step)
        positions = algorithm.positions(9, 4, 4)
        found = [
            inner_adam(algorithm, support_x, support_y, positions, moments, 4 * step)
            for support_x, support_y in zip(batch.support_x, batch.support_y, strict=True)
        ]
        outer.zero_grad()
        torch.manual_seed(step)
        loss, _ = algorithm.loss(batch, step)
        loss.backward()
        moments = {name: sum(second[name] for _, second in found) / 2 for name in moments}
        for name, value in algorithm.named_parameters():
            fast = sum(dict(learner.named_parameters())[name].detach() for learner, _ in found) / 2
            close(value.grad, value.detach() - fast)
            close(getattr(algorithm.moments, name.replace(".", "_")), moments[name])
        assert algorithm.taken.item() == 4 * (step + 1)
        outer.step()


def test_reptile_learns_from_texts_as_torchs_adam_does() -> None:
    """Whose items are whole numbers, which the corrections of Adam's moments are not."""
    algorithm, batch = Reptile(MeanOfWords(), MeanOfWords.spec, inner_steps=3, inner_lr=0.01).double(), texts()
    blank = {name: torch.zeros_like(value) for name, value in algorithm.named_parameters()}
    torch.manual_seed(0)
    positions = algorithm.positions(3, 3, 3)
    found = [inner_adam(algorithm, x, y, positions, blank, 0)[0] for x, y in zip(*batch.tensors[:2], strict=True)]
    torch.manual_seed(0)
    algorithm.loss(batch, 0)[0].backward()
    for name, value in algorithm.named_parameters():
        fast = sum(learner.get_parameter(name).detach() for learner in found) / 2
        close(value.grad, value.detach() - fast)
    assert algorithm.backbone.words.weight.grad.abs().max() > 1e-3


def test_reptile_of_one_sgd_like_step_is_first_order_gradient_descent() -> None:
    """With moments so large and so slow that Adam's divisor is 1, one inner step moves by rate times gradient."""
    algorithm = tiny_reptile(inner_steps=1, inner_lr=0.1, inner_batch=100, inner_beta2=1 - 1e-12)
    for moment in algorithm.moments.buffers():
        moment.fill_(1.0)
    algorithm.taken.fill_(1e15)  # no correction left
    batch = double(episodes(SEPARABLE, TaskShape(3, 3, 0), 2))
    algorithm.loss(batch, 0)[0].backward()
    joint = copy.deepcopy(algorithm)
    joint.zero_grad()
    losses = [F.cross_entropy(joint(x), y) for x, y in zip(batch.support_x, batch.support_y, strict=True)]
    torch.stack(losses).mean().backward()
    for (_, value), (_, other) in zip(algorithm.named_parameters(), joint.named_parameters(), strict=True):
        torch.testing.assert_close(value.grad, 0.1 * other.grad, rtol=1e-6, atol=1e-9)


def test_outer_rate_of_one_lands_on_the_mean_of_the_adapted_weights() -> None:
    algorithm = tiny_reptile(inner_steps=3, inner_lr=0.01)
    batch = double(episodes(SEPARABLE, TaskShape(3, 3, 0), 1))
    torch.manual_seed(0)
    blank = {name: torch.zeros_like(value) for name, value in algorithm.named_parameters()}
    positions = algorithm.positions(9, 10, 3)
    expected, _ = inner_adam(algorithm, batch.support_x[0], batch.support_y[0], positions, blank, 0)
    torch.manual_seed(0)
    algorithm.loss(batch, 0)[0].backward()
    torch.optim.SGD(algorithm.parameters(), lr=1.0).step()
    for value, other in zip(algorithm.parameters(), expected.parameters(), strict=True):
        close(value, other)


def test_reptile_shows_the_loss_of_the_last_mini_batch() -> None:
    algorithm = tiny_reptile(inner_steps=1, inner_batch=100)
    batch = double(episodes(SEPARABLE, TaskShape(3, 3, 0), 2))
    losses = [F.cross_entropy(algorithm(x), y) for x, y in zip(batch.support_x, batch.support_y, strict=True)]
    loss, logs = algorithm.loss(batch, 0)
    close(loss.detach(), torch.stack(losses).mean().detach())
    assert logs == {}


@pytest.mark.parametrize(
    ("size", "batch", "steps"), [(9, 4, 9), (9, 9, 5), (9, 100, 3), (5, 1, 5), (5, 2, 1), (4, 3, 0)]
)
def test_mini_batches_are_passes_over_the_support_set(size: int, batch: int, steps: int) -> None:
    positions = Reptile.positions(size, batch, steps)
    assert positions.shape == (steps, min(batch, size))
    for one_pass in positions.flatten().split(size):
        assert len(one_pass.unique()) == len(one_pass)
        if len(one_pass) == size:
            assert sorted(one_pass.tolist()) == list(range(size))
    assert steps == 0 or 0 <= positions.min() <= positions.max() < size


def test_mini_batches_are_shuffled_anew() -> None:
    passes = Reptile.positions(20, 20, 3)
    assert len({tuple(one_pass) for one_pass in passes.tolist()}) == 3
    assert not torch.equal(Reptile.positions(20, 20, 3), passes)
    fixed = [Reptile.positions(20, 20, 3, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*fixed)


def test_reptile_predicts_with_torchs_adam_and_leaves_its_state_alone() -> None:
    algorithm = tiny_reptile(inner_steps=2, test_inner_steps=6, test_inner_batch=2, inner_lr=0.01)
    batch = double(episodes(SEPARABLE, TaskShape(3, 2, 2), 2))
    algorithm.loss(batch, 0)  # leaves moments behind, from which test tasks start
    algorithm.eval()
    before = copy.deepcopy(algorithm.state_dict())
    generator_state = torch.get_rng_state()
    after = algorithm.predict_after(batch, [0, 3, 6])
    assert not after.requires_grad
    assert torch.equal(torch.get_rng_state(), generator_state)
    for key, value in algorithm.state_dict().items():
        assert torch.equal(value, before[key])
    moments = {name: getattr(algorithm.moments, name.replace(".", "_")) for name, _ in algorithm.named_parameters()}
    positions = Reptile.positions(6, 2, 6, torch.Generator().manual_seed(0))
    for number, steps in enumerate((0, 3, 6)):
        for task in range(2):
            fast, _ = inner_adam(
                algorithm, batch.support_x[task], batch.support_y[task], positions[:steps], moments, taken=2
            )
            close(after[number, task], fast(batch.query_x[task]).detach())


def test_reptile_settings() -> None:
    backbone, spec = MLP(input_shape=(1,)), Spec((1,), "regression", 1)
    assert Reptile(backbone, spec).test_steps == 50
    assert Reptile(backbone, spec, inner_steps=7, test_inner_steps=None, test_inner_batch=None).test_steps == 7
    assert Reptile(backbone, spec, inner_batch=7, test_inner_batch=None).test_inner_batch == 7


# ProtoNet


def prototypes(algorithm: ProtoNet, batch: Episodes, task: int) -> tuple[Tensor, Tensor]:
    """The class means [N, features] and the queries' features [N*Q, features], by hand."""
    both = algorithm.backbone(torch.cat([batch.support_x[task], batch.query_x[task]]), batch.support_x.shape[1])
    support, queries = both.split([batch.support_x.shape[1], batch.query_x.shape[1]])
    means = [support[batch.support_y[task] == way].mean(0) for way in range(batch.ways)]
    return torch.stack(means), queries


@BOTH
@pytest.mark.parametrize("task", [TaskShape(5, 1, 3), TaskShape(3, 4, 2), TaskShape(9, 2, 1)])
def test_protonet_is_minus_the_squared_distance_to_the_class_means(task: TaskShape, vectorize: bool) -> None:
    backbone = Conv4(input_shape=(1, 16, 16), channels=8)
    algorithm = ProtoNet(backbone, Spec((1, 16, 16), "classification", 5)).double()
    algorithm.vectorize = vectorize
    batch = double(episodes(SEPARABLE, task, 3))
    order = torch.randperm(task.ways * task.shots)  # the support set in any order
    batch = with_(batch, support_x=batch.support_x[:, order], support_y=batch.support_y[:, order])
    logits = algorithm.predict(batch)
    expected = torch.stack([-torch.cdist(*reversed(prototypes(algorithm, batch, i))).square() for i in range(3)])
    close(logits, expected)
    loss, logs = algorithm.loss(batch, 0)
    close(loss, F.cross_entropy(expected.flatten(0, 1), batch.query_y.flatten()))
    assert logs["acc"].item() == pytest.approx((expected.argmax(-1) == batch.query_y).double().mean().item())


def test_protonet_trains_on_more_ways_than_it_is_tested_on() -> None:
    config = config_of("protonet", "train.task.ways=10", norm="running")
    algorithm = build(config, SEPARABLE)
    assert not algorithm.fixed_ways
    train(algorithm, config, episodes(SEPARABLE, TaskShape(10, 1, 4), 2), steps=20)
    unseen = episodes(SEPARABLE, TaskShape(3, 1, 5), 20, "test", start=500)
    with torch.no_grad():
        assert accuracy(algorithm.eval().predict(unseen), unseen.query_y).mean().item() > 0.9


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"^algo: ProtoNet only classifies.*; try algo=maml$"):
        ProtoNet(MLP(input_shape=(1,)), Spec((1,), "regression", 1))
