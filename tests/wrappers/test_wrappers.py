"""What wraps a method: mixed queries, chosen tasks, and the tasks with wrong labels that are shown to both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, choices, class_of, compose, double, episodes, hardware, toy_images
from omegaconf import DictConfig, OmegaConf
from shell import make_images, metarun, one_line, result, run_folder
from torch import Tensor

from metarun.algos.protonet import ProtoNet
from metarun.backbones.minilm import MiniLM
from metarun.config import construct, task_of
from metarun.core import Algorithm, Episodes, Spec, TaskShape
from metarun.data.noise import noisy_tasks, with_noise
from metarun.data.regression import Sinusoid
from metarun.data.source import DataSource
from metarun.engine import checkpoint
from metarun.engine.gradients import gradient_step
from metarun.engine.learner import build_optimizer
from metarun.errors import UserError
from metarun.ops.metrics import accuracy
from metarun.wrappers.ats import Scheduler
from metarun.wrappers.base import Wrapper
from metarun.wrappers.metamix import MetaMix

IMAGES = toy_images()
TASK = TaskShape(5, 1, 4)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def config_of(*words: str, algo: str = "protonet", backbone: str = "mlp") -> DictConfig:
    small = {
        "mlp": ["backbone=mlp", "backbone.hidden=[16,16]", "backbone.init_std=null"],
        "conv4": ["backbone=conv4", "backbone.channels=4"],
        "pixels": ["backbone=pixels"],
    }
    task = ["task.ways=5", "task.shots=1", "task.queries=4", "train.task.ways=null", "train.task.queries=null"]
    return compose(f"algo={algo}", *small[backbone], "backbone.norm=batch", *task, *words)


def wrap(config: DictConfig, source: DataSource = IMAGES) -> Wrapper:
    method = build(config, source)
    validation = source.sampler("val", task_of(config, "test"), 0, CPU)
    wrapper = construct(config.wrapper, "wrapper", method=method, validation=validation)
    assert isinstance(wrapper, Wrapper)
    return wrapper


class Listener(Algorithm):
    """Keeps the episodes that it is given, and predicts from features alone."""

    def __init__(self, method: Algorithm) -> None:
        super().__init__(method.backbone, method.spec)
        self.heard: list[Episodes] = []
        self.features: list[Tensor] = []

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.heard.append(episodes)
        self.backbone(episodes.support_x[0])
        self.features = [self.backbone(episodes.query_x[0])]
        return self.features[0].sum(), {}

    def predict(self, episodes: Episodes) -> Tensor:
        raise AssertionError


def batch_of(tasks: int, start: int = 0, source: DataSource = IMAGES) -> Episodes:
    return episodes(source, TASK, tasks, start=start)


# The base: at test time the method is alone.


SMALL = ["data=folder", "data.image_size=16", "backbone=conv4", "backbone.channels=4", "task.ways=4", "task.queries=2",
         "task.shots=2", "train.steps=3", "train.tasks_per_step=4", "train.validate_every=3", "train.validate_episodes=4",
         "test.episodes=4", "test.baseline_episodes=0", "hardware=cpu"]  # fmt: skip


def chosen(wrapper: str) -> list[str]:
    """Its choice, with tasks that it has something to do with."""
    return [f"wrapper={wrapper}", *(["task.unlabelled=1"] if wrapper == "self_training" else [])]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("pictures"))


def done(*words: str, outputs: Path) -> Path:
    ended = metarun(*words, f"outputs={outputs}")
    assert ended.status == 0, ended.err
    return run_folder(outputs)


def test_a_wrapper_that_prepares_tasks_is_known_by_that() -> None:
    class Unchanged(Wrapper):
        def preparation(self) -> Callable[[Algorithm, Episodes], Episodes]:
            return lambda method, tasks: tasks

        def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            return self.method.loss(episodes, step)

    assert Unchanged.prepares
    assert not MetaMix.prepares


def test_what_changes_training_alone_is_refused_beside_a_checkpoint(pictures: Path, tmp_path: Path) -> None:
    """A report would show the same weights as those of MetaMix too."""
    few = ["train.steps=1", "test.baseline_episodes=0", f"data.root={pictures}", "algo=protonet"]
    plain, mixed = (
        done(*SMALL, *few, *words, outputs=tmp_path / name)
        for name, words in (("plain", []), ("mixed", ["wrapper=metamix"]))
    )
    out = f"outputs={tmp_path / 'out'}"
    for run, word in (
        (plain, "wrapper=metamix"),
        (plain, "wrapper=ats"),
        (mixed, "wrapper=metamix"),
        (plain, "augment=standard"),
    ):
        one_line(
            metarun("recipe=test", f"checkpoint={run}", word, out),
            f"{word}: this recipe has no use for it; it takes the weights",
        )
    assert not (tmp_path / "out").exists()
    done("recipe=test", f"checkpoint={plain}", "augment=standard", "test.views=2", outputs=tmp_path / "views")
    done("recipe=test", f"checkpoint={mixed}", "test.episodes=2", outputs=tmp_path / "again")


def test_no_wrapper_is_a_choice_too(pictures: Path, tmp_path: Path) -> None:
    """Self-training changes tests; `wrapper=null` tests the same weights without it, and takes back what an experiment chose."""
    words = ["task.unlabelled=2", "task.queries=2", "task.ways=2", "train.steps=1", "test.baseline_episodes=0"]
    run = done(
        *SMALL, f"data.root={pictures}", "algo=protonet", "wrapper=self_training", *words, outputs=tmp_path / "made"
    )
    found = metarun("recipe=test", f"checkpoint={run}", "wrapper=null", f"outputs={tmp_path / 'plain'}")
    assert found.status == 0, found.err
    plain = run_folder(tmp_path / "plain")
    assert OmegaConf.load(plain / "config.yaml").wrapper == {}
    assert OmegaConf.load(run / "config.yaml").wrapper != {}
    assert "wrapper=null" in result(plain)["overrides"]
    again = metarun("recipe=test", f"checkpoint={run}", "wrapper=null", f"outputs={tmp_path / 'plain'}")
    assert "This run had finished before" in again.out
    swept = metarun("-m", "--dry-run", "wrapper=null,metamix", "augment=null", f"data.root={pictures}", *SMALL)
    assert swept.status == 0, swept.err
    assert [line.split()[2] for line in swept.out.splitlines()[:2]] == ["wrapper=null", "wrapper=metamix"]


@pytest.mark.parametrize("wrapper", choices("wrapper"))
def test_the_method_stays_the_algorithm_of_the_run(wrapper: str, pictures: Path, tmp_path: Path) -> None:
    """`best.pt` is the method's alone: it is tested as such, and as a run without a wrapper would be."""
    words = [*SMALL, f"data.root={pictures}", "algo=maml", *chosen(wrapper), "train.save_every=1"]
    run = done(*words, outputs=tmp_path / "run")
    alone = build(OmegaConf.load(run / "config.yaml"), toy_images(classes=4))  # type: ignore[arg-type]
    for name in ("best.pt", "last.pt"):
        assert list(checkpoint.load(run / name)["model"]) == list(alone.state_dict())
    own = checkpoint.load(run / "last.pt")["wrapper"]
    assert not any(name.startswith("method.") for name in own)
    assert bool(own) == (wrapper == "ats")
    for name in ("best.pt", "last.pt"):
        again = done("recipe=test", f"checkpoint={run / name}", outputs=tmp_path / name)
        assert result(again)["test/acc"] == result(run)["test/acc"]  # both are of step 3
    assert result(run)["parameters"] == sum(
        value.numel() for value in checkpoint.load(run / "best.pt")["model"].values()
    )


@pytest.mark.parametrize("wrapper", choices("wrapper"))
def test_a_resumed_run_has_what_the_wrapper_learned(
    wrapper: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, f"data.root={pictures}", "algo=protonet", *chosen(wrapper), "train.save_every=1"]
    whole = done(*words, "train.optimizer.lr=0.01", outputs=tmp_path / "whole")
    saved, count = checkpoint.save, itertools.count()

    def dies(path: Path, state: dict[str, Any]) -> None:
        saved(path, state)
        if next(count) == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            metarun(*words, "train.optimizer.lr=0.01", f"outputs={tmp_path / 'cut'}")
    resumed = done(*words, "train.optimizer.lr=0.01", outputs=tmp_path / "cut")
    for part in ("model", "wrapper"):
        one, other = (checkpoint.load(run / "last.pt")[part] for run in (whole, resumed))
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def takes(algo: str, wrapper: str) -> bool:
    """Whether the wrapper makes nothing that the method says it cannot learn from; such a pair is refused."""
    method = class_of(algo)
    makes_what_it_takes = {"metamix": method.soft_labels, "self_training": not method.equal_classes}
    return makes_what_it_takes.get(wrapper, True)


INHERITING = ["mamlplusplus", "mtl"]


@pytest.mark.parametrize(("algo", "wrapper"), [(a, w) for a in INHERITING for w in choices("wrapper") if takes(a, w)])
def test_the_method_inherits_as_it_does_without_a_wrapper(
    algo: str, wrapper: str, pictures: Path, tmp_path: Path
) -> None:
    """Of no training step of its own: what is tested is what each method makes of the pretrained weights."""
    words = [*SMALL, f"data.root={pictures}", "recipe=pretrain_meta", f"algo={algo}", "algo.inner_steps=3",
             "pretrain.train.steps=8", "pretrain.train.optimizer.lr=0.05", "pretrain.train.tasks_per_step=8", "train.steps=0",
             "pretrain.train.validate_every=8", "pretrain.train.validate_episodes=4"]  # fmt: skip
    alone = done(*words, outputs=tmp_path / "alone")
    wrapped = done(*words, *chosen(wrapper), outputs=tmp_path / "wrapped")
    one, other = (checkpoint.load(checkpoint.weights_file("checkpoint", str(run)))["model"] for run in (alone, wrapped))
    for name in one:
        assert torch.equal(one[name], other[name]), name
    if algo == "mamlplusplus":
        scales = [value for name, value in one.items() if "later_norms" in name and "weight" in name]
        assert scales
        assert all((value - 1).abs().max() > 1e-3 for value in scales)


def test_what_the_method_asks_of_a_run_is_asked_with_a_wrapper(pictures: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={pictures}", "wrapper=ats", f"outputs={tmp_path / 'none'}"]
    for more, said in (
        (["algo=maml", "test.task.ways=3"], "test.task.ways=3: MAML's head has"),
        (["algo=maml", "hardware.record=true"], "hardware.record=true: ATS cannot be recorded"),
    ):
        ended = metarun(*words, *more)
        assert ended.status == 2
        assert said in ended.said[0]
    assert not (tmp_path / "none").exists()


# Precision


def test_in_bfloat16_a_reward_is_that_of_the_step_that_was_tried() -> None:
    """Autocast keeps its first cast of a weight, for as long as it may: rewards would be those of no step at all."""
    config = config_of(
        "wrapper=ats", "wrapper.step_size=1", "wrapper.validation_tasks=8", algo="protonet", backbone="conv4"
    )
    wrapper = wrap(config).train()
    rewards: dict[bool, list[float]] = {}
    for bfloat16 in (False, True):
        rewards[bfloat16] = []
        for number in range(8):
            with hardware(bfloat16=bfloat16).autocast():
                wrapper.method.loss(batch_of(1), 0)  # casts every weight
                generator = torch.Generator().manual_seed(number)
                away = {
                    name: torch.randn(value.shape, generator=generator)
                    for name, value in wrapper.method.named_parameters()
                }
                rewards[bfloat16].append(wrapper.reward(away, 0).item())
    assert np.std(rewards[False]) > 0.01
    assert np.corrcoef(rewards[False], rewards[True])[0, 1] > 0.9


# MetaMix


def on_episodes(algo: str) -> bool:
    """Methods on batches have no queries; a run refuses to wrap them (tests/target/test_transfer.py)."""
    return class_of(algo).trains_on == "episodes"


@pytest.mark.parametrize("algo", list(filter(on_episodes, choices("algo"))))
def test_probabilities_of_one_class_are_that_class(algo: str) -> None:
    """Methods that say so learn from labels of queries that are probabilities; MetaMix refuses the others."""
    config = config_of("wrapper=metamix", algo=algo, backbone="conv4")
    method = build(config, IMAGES).train()
    batch = batch_of(2)
    if not method.soft_labels:
        with pytest.raises(UserError, match="takes no mixed labels"):
            wrap(config)
        return
    soft = replace(batch, query_y=F.one_hot(batch.query_y, 5).float())
    found = []
    for each in (batch, soft):
        torch.manual_seed(1)
        loss, shown = method.loss(each, 0)
        found.append((loss.item(), {name: value.item() for name, value in shown.items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_queries_are_mixed_with_support_examples_and_so_are_their_labels() -> None:
    wrapper = wrap(config_of("wrapper=metamix", "wrapper.layers=[0]"))
    wrapper.method = listener = Listener(wrapper.method)
    batch = double(batch_of(1))
    wrapper.double().loss(batch, 0)
    (mixed,) = listener.heard
    torch.testing.assert_close(mixed.query_y.sum(-1), torch.ones(1, 20))
    assert torch.equal(mixed.support_x, batch.support_x)
    for row in range(20):
        own = int(batch.query_y[0, row])
        share = mixed.query_y[0, row, own].item()
        other = int(mixed.query_y[0, row].clone().index_fill(0, torch.tensor(own), 0).argmax())
        partner = own if math.isclose(share, 1) else other
        weight = share if partner != own else None
        if weight is not None:
            expected = weight * batch.query_x[0, row] + (1 - weight) * batch.support_x[0, partner]
            torch.testing.assert_close(mixed.query_x[0, row], expected, rtol=1e-5, atol=1e-6)
    assert len({round(value, 5) for value in mixed.query_y.max(-1).values.flatten().tolist()}) > 1


def test_a_backbone_without_blocks_has_its_input_mixed() -> None:
    wrapper = wrap(config_of("wrapper=metamix", algo="maml", backbone="pixels"))
    assert wrapper.layers == [0]
    wrapper.method = listener = Listener(wrapper.method)
    wrapper.loss(batch_of(1), 0)
    assert not torch.equal(listener.heard[0].query_x, batch_of(1).query_x)
    with pytest.raises(UserError, match="the backbone has 0"):
        wrap(config_of("wrapper=metamix", "wrapper.layers=[1]", algo="maml", backbone="pixels"))


@pytest.mark.parametrize("backbone", ["conv4", "mlp"])
def test_at_a_hidden_layer_it_is_the_activations_that_are_mixed(backbone: str) -> None:
    """One share for all, so from the listened labels the mixture before the last block is computed again by hand."""
    config = config_of("wrapper=metamix", backbone=backbone, algo="protonet")
    method = build(config, IMAGES).double()
    last = len(method.backbone.blocks) - 1
    listener = Listener(method)
    wrapper = MetaMix(listener, None, layers=[last])  # type: ignore[arg-type]
    batch = double(batch_of(1))
    torch.manual_seed(3)
    wrapper.loss(batch, 0)
    torch.manual_seed(3)
    share = torch.distributions.Beta(2.0, 2.0).sample().item()
    torch.randint(1, ())
    partner = torch.randint(5, (20,))
    seen: list[Tensor] = []
    handle = method.backbone.blocks[last].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.backbone(torch.cat([batch.query_x[0], batch.support_x[0, partner]]))
    handle.remove()
    mixed = share * seen[0][:20] + (1 - share) * seen[0][20:]
    replaced = method.backbone.blocks[last].register_forward_pre_hook(lambda module, inputs: (mixed, *inputs[1:]))
    expected = method.backbone(batch.query_x[0])
    replaced.remove()
    torch.testing.assert_close(listener.features[0], expected)
    assert not method.backbone.blocks[last]._forward_pre_hooks


@pytest.mark.parametrize("algo", ["maml", "protonet"])
@pytest.mark.parametrize("norm", ["batch", "support", "group"])
@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
def test_it_trains_methods_of_any_kind_at_any_layer(algo: str, norm: str, vectorize: bool) -> None:
    wrapper = wrap(config_of("wrapper=metamix", f"backbone.norm={norm}", algo=algo, backbone="conv4"))
    wrapper.vectorize = vectorize
    for step in range(6):
        logged = gradient_step(wrapper.train(), batch_of(2), step, 1.0, 0, hardware())
        assert logged["loss"].isfinite()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in wrapper.parameters())


def test_what_cannot_be_mixed_is_refused_in_one_line() -> None:
    for words, line in (
        (["wrapper.alpha=0"], r"wrapper\.alpha=0: must be above 0"),
        (["wrapper.layers=[]"], r"wrapper\.layers=\[\]: must have at least 1 value"),
        (["wrapper.layers=[7]"], r"wrapper\.layers=\[7\]: the backbone has 0, 1"),
    ):
        with pytest.raises(UserError, match=line):
            wrap(config_of("wrapper=metamix", *words))
    wrapper = wrap(config_of("wrapper=metamix", "wrapper.layers=[1]"))
    wrapper.check_tasks(TaskShape(5, 4, 3), TaskShape(5, 1, 1))
    for task in (TaskShape(5, 4, 2), TaskShape(5, (1, 4), 3)):
        with pytest.raises(UserError, match=r"add wrapper\.layers=\[0\]"):
            wrapper.check_tasks(task, TaskShape(5, 1, 1))
    few = wrap(config_of("wrapper=metamix", "wrapper.layers=[1]", algo="semi_protonet"))
    few.check_tasks(TaskShape(5, 4, 1), TaskShape(5, 1, 1))
    with pytest.raises(UserError, match=r"the support set is as large \(20 items\)"):
        few.check_tasks(TaskShape(5, 4, 1, unlabelled=2), TaskShape(5, 1, 1))


def test_queries_that_nothing_is_learned_from_are_not_mixed() -> None:
    with pytest.raises(UserError, match=r"^wrapper=metamix: L2L takes no mixed labels of queries"):
        wrap(config_of("wrapper=metamix", algo="l2l"))
    batch = batch_of(2)
    wrapper = wrap(config_of("wrapper=metamix", "wrapper.layers=[0]", "algo.objective=query", algo="l2l"))
    assert not torch.isclose(wrapper.loss(batch, 0)[0], wrapper.method.loss(batch, 0)[0])


def test_word_pieces_are_not_mixed() -> None:
    method = ProtoNet(MiniLM((4,), weights=None), Spec((4,), "classification", 5))
    with pytest.raises(UserError, match=r"^wrapper=metamix: .* word pieces have numbers that mean no place"):
        MetaMix(method, None)  # type: ignore[arg-type]


def test_unlabelled_items_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = wrap(config_of("wrapper=metamix", "wrapper.layers=[1]", "backbone.norm=none", algo="semi_protonet"))
    given: list[tuple[Any, ...]] = []
    logits = wrapper.method.logits
    monkeypatch.setattr(wrapper.method, "logits", lambda *each: given.append(each) or logits(*each))
    batch = episodes(IMAGES, TaskShape(5, 1, 4, unlabelled=3), 2)
    wrapper.method.loss(batch, 0)
    assert wrapper.loss(batch, 0)[0].isfinite()
    (support, _, queries, unlabelled, _), mixed = given
    assert unlabelled.shape[1] == 15
    for plain, found in ((support, mixed[0]), (unlabelled, mixed[3])):
        torch.testing.assert_close(found, plain)
    assert queries.shape == mixed[2].shape
    assert not torch.isclose(queries, mixed[2]).all(-1).any()


def test_sinusoids_are_mixed_too() -> None:
    config = config_of("wrapper=metamix", "data=sinusoid", "task.ways=1", "task.shots=5", algo="maml")
    wrapper = wrap(config, Sinusoid())
    assert wrapper.loss(episodes(Sinusoid(), TaskShape(1, 5, 4), 2), 0)[0].isfinite()


# ATS


def test_the_gradient_is_that_of_the_chosen_tasks() -> None:
    config = config_of("wrapper=ats", algo="maml", backbone="conv4")
    wrapper = wrap(config).double()
    batch = double(batch_of(6))
    found: dict[str, Tensor] = {}
    chosen: list[int] = []
    draw = torch.multinomial

    def multinomial(probabilities: Tensor, count: int) -> Tensor:
        picked = draw(probabilities, count)
        chosen.extend(picked.tolist())
        return picked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        wrapper.validation = lambda start, stop: double(episodes(IMAGES, TASK, stop - start, "val", start))
        before = {name: value.clone() for name, value in wrapper.method.state_dict().items()}
        loss, _ = wrapper.train().loss(batch, 0)
    for name, value in wrapper.method.state_dict().items():  # the step that was tried out is taken back
        assert torch.equal(value, before[name])
    loss.backward()
    found = {name: value.grad.clone() for name, value in wrapper.method.named_parameters()}
    wrapper.zero_grad()
    parts = list(batch.split(1))
    expected = torch.stack([wrapper.method.loss(parts[i], 0)[0] for i in chosen]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item())
    for name, value in wrapper.method.named_parameters():
        torch.testing.assert_close(found[name], value.grad)


@pytest.mark.parametrize("reward", [1.0, -1.0, 0.0])
def test_what_paid_is_drawn_more_often(reward: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """REINFORCE: the scheduler's gradient is that of the log-probability of the draw, times what the reward fell short by."""
    wrapper = wrap(config_of("wrapper=ats", "wrapper.chosen=1"))
    heard: list[Tensor] = []
    probabilities = wrapper.probabilities

    def listen(*arguments: Any) -> Tensor:
        heard.append(probabilities(*arguments))
        return heard[-1]

    monkeypatch.setattr(wrapper, "probabilities", listen)
    monkeypatch.setattr(wrapper, "reward", lambda along, step: torch.tensor(reward))
    monkeypatch.setattr(torch, "multinomial", lambda p, count: torch.tensor([2]))
    loss, shown = wrapper.loss(batch_of(4), 0)
    parameters = list(wrapper.scheduler.parameters())
    of_draw = torch.autograd.grad(heard[0][2].log(), parameters, retain_graph=True, materialize_grads=True)
    loss.backward()
    for value, gradient in zip(parameters, of_draw, strict=True):
        torch.testing.assert_close(value.grad, -reward * gradient)
    assert any(gradient.abs().max() > 0 for gradient in of_draw)
    assert wrapper.average.item() == pytest.approx(reward)
    assert shown["reward"].item() == reward


def test_the_reward_is_the_accuracy_on_validation_tasks_that_select_no_weights() -> None:
    """The training validates on the first tasks; those of the scheduler begin a million later, and each step has others."""
    images = toy_images(signal=0.1)  # which an untrained network tells apart in part
    wrapper = wrap(config_of("wrapper=ats", "wrapper.validation_tasks=3"), images).train()
    asked: list[tuple[int, int]] = []

    def validation(start: int, stop: int) -> Episodes:
        asked.append((start, stop))
        return episodes(images, TASK, stop - start, "val", start)

    wrapper.validation = validation
    still = {name: torch.zeros_like(value) for name, value in wrapper.method.named_parameters()}
    firsts = {step: 10**6 + 3 * step for step in (0, 1, 7)}
    rewards = {step: wrapper.reward(still, step).item() for step in firsts}
    assert asked == [(first, first + 3) for first in firsts.values()]
    wrapper.method.eval()
    for step, first in firsts.items():
        tasks = episodes(images, TASK, 3, "val", first)
        assert rewards[step] == pytest.approx(accuracy(wrapper.method.predict(tasks), tasks.query_y).mean().item())


def test_an_answer_that_is_no_number_earns_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The greatest of logits that are no numbers is said to be the first, which is right for one query in five."""
    wrapper = wrap(config_of("wrapper=ats"))
    monkeypatch.setattr(
        wrapper.method, "predict", lambda tasks: torch.full((*tasks.query_y.shape, tasks.ways), torch.nan)
    )
    still = {name: torch.zeros_like(value) for name, value in wrapper.method.named_parameters()}
    assert wrapper.reward(still, 0).item() == 0


@pytest.mark.parametrize("tensors", [1, 6])
def test_scheduler_scores_follow_their_tasks(tensors: int) -> None:
    scheduler = Scheduler(tensors).double()
    losses, norms, cosines = torch.rand(7).double(), torch.rand(7, tensors).double(), torch.rand(7, tensors).double()
    scores = scheduler(losses, norms, cosines, 3)
    order = torch.randperm(7)
    torch.testing.assert_close(scheduler(losses[order], norms[order], cosines[order], 3), scores[order])
    assert scores.shape == (7,)
    assert scores.std() > 0


def test_noisy_tasks_lose_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pool half have wrong labels: after some training they are hardly drawn any more."""
    learning = ["train.optimizer.lr=0.01", "wrapper.step_size=1", "wrapper.validation_tasks=8"]
    config = config_of("wrapper=ats", *learning, "train.steps=80")
    wrapper = wrap(config)
    train = with_noise(lambda task: IMAGES.sampler("train", task, 0, CPU), TASK, 0, 0.5, 1.0)
    optimizer, _ = build_optimizer(wrapper, config.train)
    odds: list[float] = []  # of a noisy task against another
    probabilities = wrapper.probabilities

    def listen(losses: Tensor, query: Any, support: Any, step: int) -> Tensor:
        found = probabilities(losses, query, support, step)
        wrong = torch.from_numpy(noisy_tasks(0, 8 * step, 8 * step + 8, 0.5))
        if 0 < wrong.sum() < 8:
            odds.append((found[wrong].mean() / found[~wrong].mean()).item())
        return found

    monkeypatch.setattr(wrapper, "probabilities", listen)
    wrapper.train()
    for step in range(80):
        gradient_step(wrapper, train(8 * step, 8 * step + 8), step, 1.0, 0, hardware())
        optimizer.step()
    assert sum(odds[:5]) / 5 > 0.7
    assert sum(odds[-20:]) / 20 < 0.2


def test_a_task_that_was_all_but_ruled_out_may_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two draws one must be of it; its probability, 0 in single precision, would have no logarithm."""
    wrapper = wrap(config_of("wrapper=ats", "wrapper.chosen=2"))
    certain = torch.nn.Parameter(torch.tensor([20.0, 0.0, 0.0, 0.0]))
    monkeypatch.setattr(wrapper.scheduler, "forward", lambda *_: certain)
    loss, _ = wrapper.loss(batch_of(4), 500)
    loss.backward()
    assert loss.isfinite()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_ats_leaves_it_to_the_loop_to_say_that_a_training_diverges() -> None:
    wrapper = wrap(config_of("wrapper=ats"))
    for value in wrapper.method.parameters():
        value.data.fill_(torch.nan)
    assert gradient_step(wrapper.train(), batch_of(4), 0, 1.0, 0, hardware())["loss"].isnan()


def test_ats_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"^wrapper=ats: .* TIM on this backbone has none; leave the wrapper out$"):
        wrap(compose("wrapper=ats", "algo=tim", "backbone=identity", "task.ways=5", "task.queries=4"))
    with pytest.raises(UserError, match=r"^wrapper=ats: .* Reptile learns from no queries$"):
        wrap(config_of("wrapper=ats", algo="reptile"))
    with pytest.raises(UserError, match=r"train\.tasks_per_step=2"):
        wrap(config_of("wrapper=ats")).loss(batch_of(2), 0)
    with pytest.raises(UserError, match=r"wrapper\.chosen=0"):
        wrap(config_of("wrapper=ats", "wrapper.chosen=0"))
    with pytest.raises(UserError, match=r"wrapper\.temperature=0"):
        wrap(config_of("wrapper=ats", "wrapper.temperature=0"))


# Wrong labels


def numbered(task: TaskShape, per_class: int) -> Callable[[int, int], Episodes]:
    """Tasks whose pixels number the images of each class, of which there are `per_class`; a sampler that refuses larger ones."""
    if task.shots + task.queries > per_class:
        raise UserError("too few images")

    def sampler(start: int, stop: int) -> Episodes:
        tasks = stop - start
        images = (torch.arange(task.ways)[:, None] * per_class + torch.arange(task.shots + task.queries)).float()
        x = images.expand(tasks, -1, -1)[..., None]
        parts = x[:, :, : task.shots], x[:, :, task.shots :]
        y = [torch.arange(task.ways).repeat_interleave(part.shape[2]).expand(tasks, -1) for part in parts]
        return Episodes(parts[0].flatten(1, 2), y[0], parts[1].flatten(1, 2), y[1], ways=task.ways)

    return sampler


@pytest.mark.parametrize("labels", [0.1, 0.8, 1.0])
@pytest.mark.parametrize(
    ("ways", "shots", "spare"),
    [(2, 1, 9), (2, 5, 9), (3, 2, 0), (5, 1, 4), (5, 1, 0), (5, 3, 20), (20, 1, 2)],
)
def test_each_label_is_wrong_by_itself_with_its_probability(ways: int, shots: int, spare: int, labels: float) -> None:
    """Whatever the room for further images; the pixels of an image tell its class."""
    tasks, queries = 1000, 2
    shape, images = TaskShape(ways, shots, queries), shots + queries + spare
    plain = numbered(shape, images)(0, tasks)
    noisy = with_noise(lambda task: numbered(task, images), shape, 3, tasks=1.0, labels=labels)(0, tasks)
    for name in ("support_y", "query_x", "query_y"):
        assert torch.equal(getattr(noisy, name), getattr(plain, name))
    truth, told = noisy.support_x[..., 0].long() // images, noisy.support_y
    wrong = truth != told
    assert torch.equal(noisy.support_x[~wrong], plain.support_x[~wrong])
    deviation = (labels * (1 - labels) / tasks) ** 0.5
    assert (wrong.double().mean(0) - labels).abs().max() <= 4.5 * deviation
    # Labels are independent: their number has the variance of a binomial distribution, and so has each pair of them.
    number = wrong.double().sum(1)
    expected = ways * shots * labels * (1 - labels)
    assert abs(number.var().item() - expected) <= 0.25 * expected + 1e-9
    # Among the wrong ones each class that it is not is as frequent: chi-square against equal counts.
    counts = torch.zeros(ways, ways).index_put((told[wrong], truth[wrong]), torch.tensor(1.0), accumulate=True)
    others = counts[~torch.eye(ways, dtype=torch.bool)]
    expect = others.mean()
    assert (((others - expect) ** 2 / expect).sum() - len(others) + 1).abs() < 5 * (2 * len(others)) ** 0.5 + 4
    own = torch.cat([noisy.support_x, noisy.query_x], 1)[..., 0]
    if (ways, shots, spare) in ((2, 1, 9), (2, 5, 9), (5, 1, 4)):  # there is room for all: no image is in a task twice
        assert (own.sort(1).values.diff(dim=1) > 0).all()


def test_noise_of_a_task_depends_on_the_task_alone() -> None:
    shape = TaskShape(5, 3, 2)

    def sampler(task: TaskShape) -> Callable[[int, int], Episodes]:
        return IMAGES.sampler("train", task, 0, CPU)

    clean = with_noise(sampler, shape, 7, tasks=0.4, labels=0.0)
    noisy = with_noise(sampler, shape, 7, tasks=0.4, labels=0.8)
    before, after = clean(0, 200), noisy(0, 200)
    assert before.support_x.shape[1] == 15
    assert before.query_x.shape[1] == 10
    wrong = torch.from_numpy(noisy_tasks(7, 0, 200, 0.4))
    assert 0.3 < wrong.double().mean() < 0.5
    moved = (before.support_x != after.support_x).flatten(2).any(-1)
    assert not moved[~wrong].any()
    assert moved[wrong].any(1).all()
    for name in ("support_y", "query_x", "query_y"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert torch.equal(noisy(150, 160).support_x, after.support_x[150:160])


def test_noise_that_cannot_be() -> None:
    shape = TaskShape(5, 3, 2)

    def plain(task: TaskShape) -> Callable[[int, int], Episodes]:
        return IMAGES.sampler("train", task, 0, CPU)

    with pytest.raises(UserError, match=r"^train\.noise\.tasks=1\.5: must be from 0 to 1$"):
        with_noise(plain, shape, 0, tasks=1.5, labels=0.5)
    with pytest.raises(UserError, match=r"^train\.noise\.labels=-0\.1: must be from 0 to 1$"):
        with_noise(plain, shape, 0, tasks=1.0, labels=-0.1)

    def one_way(start: int, stop: int) -> Episodes:
        x, y = torch.rand(stop - start, 3, 1, 4, 4), torch.zeros(stop - start, 3, dtype=torch.int64)
        return Episodes(x, y, x, y, ways=1)

    with pytest.raises(UserError, match=r"^train\.noise: .* one way alone$"):
        with_noise(lambda task: one_way, TaskShape(5, 3, 3), 0, tasks=1.0, labels=0.5)
