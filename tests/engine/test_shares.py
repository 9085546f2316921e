"""Neither the number of processes nor that of the tasks computed together changes a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import CPU, build, choices, class_of, compose, double, episodes, toy_images
from ranks import TASKS, assert_same, step_by
from torch import Tensor, nn

from metarun.config import construct, task_of
from metarun.core import Algorithm, Batch, Episodes
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware, choose
from metarun.errors import UserError
from metarun.ops import batch_norm, draws
from metarun.ops.tasks import over_tasks
from metarun.stages.compatibility import check_training

IMAGES = toy_images()


def made(algo: str, *words: str) -> tuple[Callable[[], nn.Module], Callable[[int, int], Any]]:
    """What makes the method of the words, with its wrapper if they name one, and what gives the tasks of a step."""
    small = ["backbone=conv4", "backbone.channels=4", "backbone.norm=support"]
    task = ["task.ways=4", "task.shots=2", "task.queries=3", "train.task.ways=null", "train.task.queries=null"]
    config = compose(f"algo={algo}", *small, *task, *words)
    if class_of(algo).trains_on == "batches":
        config.backbone.norm = "group"  # the others are refused
    template = build(config, IMAGES)
    if getattr(template, "teacher", None) is not None:
        template.teach(template.state_dict())  # type: ignore[operator]
    shape = task_of(config, "train")

    def batch_of(first: int, end: int) -> Any:
        if template.trains_on != "batches":
            return double(episodes(IMAGES, shape, end - first, start=first))
        images = IMAGES.labelled("train").batch(torch.arange(0, 12 * TASKS, 12).numpy(), CPU)
        domain = torch.arange(TASKS) % 2 if template.uses_target != "no" else torch.zeros(TASKS, dtype=torch.int64)
        whole = Batch(images.x.double(), torch.where(domain == 1, images.y % 5, images.y), domain)
        return Batch(whole.x[first:end], whole.y[first:end], whole.domain[first:end])

    def make() -> nn.Module:
        method = copy.deepcopy(template)
        if not config.wrapper:
            return method
        validation = IMAGES.sampler("val", shape, 0, CPU)
        torch.manual_seed(0)  # of the scheduler's weights
        wrapped = construct(
            config.wrapper, "wrapper", method=method, validation=lambda start, stop: double(validation(start, stop))
        )
        assert isinstance(wrapped, nn.Module)
        return wrapped

    return make, batch_of


FEW = {
    "mtl": ["algo.inner_steps=3", "algo.hard_tasks=0.5"], "l2l": ["algo.inner_steps=3"],
    "lstmlearner": ["algo.inner_steps=2"], "imaml": ["algo.inner_steps=2"], "mann": ["algo.controller=8"],
}  # fmt: skip


def words_of(algo: str) -> list[str]:
    return FEW.get(algo, [])


@pytest.mark.parametrize("algo", choices("algo"))
def test_processes_and_chunks_change_nothing(algo: str) -> None:
    make, batch_of = made(algo, *words_of(algo))
    alone = step_by(make, batch_of, 1)
    assert any(value is not None and value.abs().max() > 0 for value in alone[1].values())
    assert_same(step_by(make, batch_of, 2), alone)
    assert_same(step_by(make, batch_of, 1, task_chunk=3), alone)


REFUSE_RUNNING = ("l2l",)


@pytest.mark.parametrize(
    "algo", [n for n in choices("algo") if class_of(n).trains_on != "batches" and n not in REFUSE_RUNNING]
)
def test_running_averages_are_those_of_one_process(algo: str) -> None:
    make, batch_of = made(algo, *words_of(algo), "backbone.norm=running")
    alone = step_by(make, batch_of, 1)
    moved = [name for name in alone[2] if name.endswith("running_mean") and alone[2][name].abs().max() > 0]
    assert moved
    assert_same(step_by(make, batch_of, 3), alone)  # whose shares differ in size
    assert_same(step_by(make, batch_of, 1, task_chunk=3), alone)


@pytest.mark.parametrize("words", [
    ["wrapper=ats", "wrapper.chosen=3"], ["wrapper=metamix", "wrapper.layers=[0]"],
    ["wrapper=self_training", "wrapper.in_training=true", "task.unlabelled=4"],
])  # fmt: skip
def test_running_averages_within_wrappers(words: list[str]) -> None:
    make, batch_of = made("protonet", *words, "backbone.norm=running")
    alone = step_by(make, batch_of, 1)
    for processes in (2, 3):
        assert_same(step_by(make, batch_of, processes), alone)
    assert_same(step_by(make, batch_of, 1, task_chunk=3), alone)


def test_a_parameter_without_a_gradient_has_none_in_any_process() -> None:
    """An optimiser moves one of gradient 0, by its momentum or a weight decay, and leaves alone one without a gradient."""

    class Partly(nn.Module):
        whole_batch = False

        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.of_one_task = (nn.Parameter(torch.ones(())) for _ in range(3))

        def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            first = draws.part()[0] == 0
            return self.used * episodes.query_x.mean() + (self.of_one_task if first else 0), {}

    _, batch_of = made("protonet")
    alone = step_by(Partly, batch_of, 1)
    assert [name for name, value in alone[1].items() if value is None] == ["unused"]
    for processes in (2, 8):
        assert_same(step_by(Partly, batch_of, processes), alone)


@pytest.mark.parametrize("momentum", [0.1, 0.003])
def test_running_averages_of_torchs_own_norms(momentum: float) -> None:
    """As networks of a library have them, and the number of batches that they count."""

    class Library(nn.Module):
        whole_batch = False

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.BatchNorm2d(1, momentum=momentum)

        def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            embedded = over_tasks(lambda s, q: self.norm(s).square().mean() + self.norm(q).mean(),
                                  episodes.support_x, episodes.query_x)  # fmt: skip
            return embedded.mean(), {}

    _, batch_of = made("protonet")
    alone = step_by(Library, batch_of, 1)
    assert alone[2]["norm.num_batches_tracked"] == 2 * TASKS
    for processes in (2, 3, 8):
        assert_same(step_by(Library, batch_of, processes), alone)


@pytest.mark.parametrize("algo", ["mtl", "snail", "leo", "coral"])
@pytest.mark.parametrize("processes", [3, 4, 8])
def test_more_processes_of_unequal_shares(algo: str, processes: int) -> None:
    make, batch_of = made(algo, *words_of(algo))
    assert_same(step_by(make, batch_of, processes), step_by(make, batch_of, 1))


@pytest.mark.parametrize(
    ("algo", "words"),
    [
        ("maml", ["wrapper=metamix"]),
        ("protonet", ["wrapper=metamix", "wrapper.layers=[0]"]),
        ("cnp", ["wrapper=metamix"]),
        ("protonet", ["wrapper=ats", "wrapper.chosen=3"]),
        ("mtl", ["wrapper=ats", "algo.inner_steps=3"]),
        ("leo", ["wrapper=ats", "wrapper.chosen=5"]),
        ("snail", ["wrapper=metamix"]),
    ],
)
def test_wrappers_alike(algo: str, words: list[str]) -> None:
    make, batch_of = made(algo, *words)
    alone = step_by(make, batch_of, 1)
    for processes in (2, 4):
        assert_same(step_by(make, batch_of, processes), alone)
    assert_same(step_by(make, batch_of, 1, task_chunk=3), alone)


@pytest.mark.parametrize("algo", ["maml", "protonet", "leo"])
def test_dropping_belongs_to_the_task(algo: str) -> None:
    """DropBlock and dropout inside the network, in a loop and by vmap."""
    dropping = ["backbone=resnet12", "backbone.widths=[4,4,4,4]", "backbone.drop_rate=0.3", "backbone.drop_ramp=2"]
    config = compose(f"algo={algo}", *dropping, "backbone.norm=support", "task.ways=3", "task.queries=2", "task.shots=1",
                     "train.task.ways=null", "train.task.queries=null")  # fmt: skip
    template, shape = build(config, IMAGES), task_of(config, "train")

    def make_with(vectorize: bool) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            method = copy.deepcopy(template)
            method.vectorize = vectorize
            return method

        return make

    def batch_of(first: int, end: int) -> Episodes:
        return double(episodes(IMAGES, shape, end - first, start=first))

    alone = step_by(make_with(False), batch_of, 1)
    without = copy.deepcopy(template)
    without.backbone.drop_rate = 0.0
    plain = step_by(lambda: copy.deepcopy(without), batch_of, 1)
    assert abs(plain[0]["loss"].item() - alone[0]["loss"].item()) > 1e-6
    assert_same(step_by(make_with(False), batch_of, 2), alone)
    assert_same(step_by(make_with(True), batch_of, 1, task_chunk=None, vectorize=True), alone)
    assert_same(step_by(make_with(True), batch_of, 2, task_chunk=3, vectorize=True), alone)


class Foreign(Algorithm):
    """A user's method, whose module draws from torch's global generator."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.drop = nn.Dropout(0.5)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.over_tasks(lambda x: self.drop(self.drop(self.backbone(x))).square().mean(), episodes.query_x)
        self.masks = self.over_tasks(lambda x: self.drop(torch.ones(99)), episodes.query_x)
        self.others = self.over_tasks(lambda x: self.drop(torch.ones(99)), episodes.query_x)
        return (found * (self.masks + 2 * self.others).mean(1)).mean(), {}

    def predict(self, episodes: Episodes) -> Tensor:
        raise AssertionError


def test_modules_that_draw_from_the_global_generator_do_so_by_task() -> None:
    template, batch_of = made("protonet")
    method = template()
    foreign = Foreign(method.backbone, method.spec)
    alone = step_by(lambda: copy.deepcopy(foreign), batch_of, 1)
    assert_same(step_by(lambda: copy.deepcopy(foreign), batch_of, 2), alone)
    assert_same(step_by(lambda: copy.deepcopy(foreign), batch_of, 1, task_chunk=5), alone)
    foreign.double()
    with draws.StepShare(0, 0, 0, TASKS, TASKS).entered():
        foreign.loss(batch_of(0, TASKS), 0)
    assert (foreign.masks != foreign.others).any(1).all()  # a second pass over the tasks draws anew


def test_modules_that_draw_are_not_vectorised() -> None:
    config, method = compose("algo=protonet"), made("protonet")[0]()
    assert isinstance(method, Algorithm)
    foreign = Foreign(method.backbone, method.spec)
    config.hardware.vectorize = True
    with pytest.raises(UserError, match=r"^hardware\.vectorize=true: Dropout draws from torch's global generator"):
        choose(config.hardware, foreign, World())
    config.hardware.vectorize = None
    assert not choose(config.hardware, foreign, World()).vectorize


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["algo=protonet", "backbone.norm=running"], "the averages of backbone.norm=running are one state"),
        (["algo=baseline", "backbone.norm=running"], None),  # the images of many tasks are one batch
        (
            ["algo=maml", "backbone.norm=batch", "algo.recompute=true"],
            "algo.recompute=true makes the graphs of inner steps",
        ),
        (["algo=fomaml", "backbone.norm=batch", "algo.recompute=true"], None),  # there is no graph to make again
        (["algo=maml", "backbone.norm=batch"], None),
    ],
)
def test_what_cannot_be_vectorised_is_refused_with_the_hardware(words: list[str], reason: str | None) -> None:
    """Before anything is written; left open, such tasks run in a loop."""
    config = compose(*words, "backbone=mlp", "backbone.hidden=[8]")
    method = build(config, IMAGES)
    assert choose(config.hardware, method, World()).vectorize is (reason is None and "running" not in words[1])
    config.hardware.vectorize = True
    if reason is None:
        assert choose(config.hardware, method, World()).vectorize
    else:
        with pytest.raises(UserError, match=f"^hardware.vectorize=true: {reason}"):
            choose(config.hardware, method, World())


@pytest.mark.parametrize("norm", sorted(batch_norm.KINDS))
def test_processes_share_no_batch_whose_rows_are_normalised_together(norm: str) -> None:
    """Nor one that a network drops from; a batch has no support set, so that the norm `support` takes all rows."""
    config = compose("algo=baseline", "backbone=conv4", "backbone.channels=4", f"backbone.norm={norm}")
    method = build(config, IMAGES)

    def check(processes: int) -> None:
        check_training(method, config.train, World(size=processes), "train", None)

    check(1)
    alone = norm in ("group", "none")
    with nullcontext() if alone else pytest.raises(UserError, match="normalises by the statistics of its whole batch"):
        check(2)
    method.backbone.drop = nn.Dropout(0.1)
    check(1)
    with pytest.raises(
        UserError, match=r"^hardware\.processes=2: Dropout in the network draws for the whole batch of Base"
    ):
        check(2)
    config.train.steps = 0  # shared by none
    check(2)
    method.backbone.drop.p, config.train.steps = 0.0, 1
    if alone:
        check(2)


def test_draws_are_of_seed_step_and_task() -> None:
    def drawn(seed: int, step: int, first: int, count: int, vectorize: bool = False) -> tuple[Tensor, Tensor]:
        with draws.StepShare(seed, step, first, count, 8).entered():
            inside = over_tasks(lambda x: draws.randn(3, device=CPU), torch.zeros(count, 1), vectorize=vectorize)
            return inside, draws.rand(count, 2, device=CPU)

    inside, outside = drawn(0, 0, 0, 8)
    assert len({tuple(row) for row in inside.tolist()}) == 8
    for first, count in ((0, 3), (3, 5), (7, 1)):
        for vectorize in (False, True):
            some = drawn(0, 0, first, count, vectorize)
            assert torch.equal(some[0], inside[first : first + count])
            assert torch.equal(some[1], outside[first : first + count])
    for other in ((1, 0), (0, 1)):
        assert not (drawn(*other, 0, 8)[0] == inside).any()


def test_the_generator_of_apples_gpu_is_seeded_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a dropout on it belongs to its task, and drops the same again where inner steps are recomputed."""
    there, device = torch.Generator(), torch.device("mps")
    for name, function in (
        ("manual_seed", there.manual_seed),
        ("get_rng_state", there.get_state),
        ("set_rng_state", there.set_state),
    ):
        monkeypatch.setattr(torch.mps, name, function)

    def drawn() -> list[float]:
        return [*torch.rand(2).tolist(), *torch.rand(2, generator=there).tolist()]

    def of_task(first: int, number: int) -> list[float]:
        draws.StepShare(0, 0, first, 2, 4).seed_global(number, device)
        return drawn()

    assert of_task(0, 1) == of_task(1, 0)
    again = draws.snapshot(device)
    expected = drawn()
    before = Hardware(device=device).random_state()
    with again():
        assert drawn() == expected
    assert torch.equal(Hardware(device=device).random_state(), before)
    with draws.untouched(device):
        drawn()
    assert torch.equal(Hardware(device=device).random_state(), before)


def test_draws_that_are_of_no_task_are_refused() -> None:
    with draws.StepShare(0, 0, 0, 4, 4).entered(), pytest.raises(UserError, match=r"shape \(3, 2\) are drawn for 4"):
        draws.rand(3, 2, device=CPU)


def test_gathering_has_the_gradient_of_one_process() -> None:
    """Of a function of all tasks, by their features and by what comes after them."""

    class Coupled(nn.Module):
        whole_batch = True

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.before, self.after = nn.Linear(256, 3), nn.Linear(3, 2)

        def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            features = draws.gather(self.before(episodes.query_x[:, 0].flatten(1)))
            found = self.after(features.sin())
            return (found @ found.T).exp().mean(), {}

    _, batch_of = made("protonet")
    alone = step_by(Coupled, batch_of, 1)
    for processes in (2, 3, 8):
        assert_same(step_by(Coupled, batch_of, processes), alone)
