"""The training loop on a one-parameter algorithm whose every step is known beforehand."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, choices, compose, episodes, hardware
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.data.regression import Linear
from metarun.engine import checkpoint
from metarun.engine.gradients import clip, gradient_step
from metarun.engine.interruption import Interrupted, Signals
from metarun.engine.learner import Trainable, build_optimizer
from metarun.engine.train import advance_schedule, fit
from metarun.engine.train_state import Clock, TrainState
from metarun.errors import Pruned, UserError
from metarun.runs.logger import RunLogger
from metarun.system.platform import stop_signals

SLOPE = torch.tensor([3.0, -4.0])  # the constant gradient of `Ramp`: its norm is 5
TASK = TaskShape(1, 1, 1)


class Ramp(Algorithm):
    """The loss `slope * weight`, whatever the episodes; `change` may spoil it at some step."""

    regression = True

    def __init__(self, change: Callable[[Tensor, Tensor, int], Tensor] = lambda loss, weight, step: loss) -> None:
        super().__init__(Backbone(), Spec((1,), "regression", 1))
        self.backbone.norm = "none"
        self.weight = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("drawn", torch.zeros(()))
        self.change = change
        self.steps: list[int] = []
        self.modes: list[bool] = []

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps.append(step)
        self.modes.append(self.training)
        self.drawn += torch.rand(())  # as dropout would
        loss = (self.weight * SLOPE).sum()
        return self.change(loss, self.weight, step), {"first": episodes.support_x[:, 0, 0].mean()}

    def predict(self, episodes: Episodes) -> Tensor:
        raise NotImplementedError


class Fit:
    """Everything that `fit` needs, in `folder`."""

    def __init__(self, folder: Path, algorithm: Ramp | None = None, *overrides: str) -> None:
        defaults = ["optimizer=sgd", "train.optimizer.lr=1", "train.steps=8", "train.tasks_per_step=3"]
        self.config = compose("data=linear", "backbone=mlp", *defaults, *overrides)
        self.folder = folder
        self.algorithm = algorithm or Ramp()
        self.optimizer, self.schedule = build_optimizer(self.algorithm, self.config.train)
        self.scores: Iterator[float] | None = None
        self.validated: list[list[float]] = []
        self.drawn: list[tuple[int, int]] = []
        self.before: Callable[[int], None] = lambda step: None
        self.watch: Callable[[int, float], bool] | None = None
        self.made_by: str | None = "this run"

    def validate(self) -> tuple[float, dict[str, float]]:
        self.validated.append(self.algorithm.weight.tolist())
        score = float(len(self.validated)) if self.scores is None else next(self.scores)
        return score, {"val/score": score}

    def sampler(self, start: int, stop: int) -> Episodes:
        self.drawn.append((start, stop))
        self.before(start // self.config.train.tasks_per_step)
        return Linear().sampler("train", TASK, 0, CPU)(start, stop)

    def run(self) -> dict[str, Any]:
        folder = self.folder
        folder.mkdir(exist_ok=True)
        logger = RunLogger(folder)
        try:
            learner = Trainable(
                "train", self.algorithm, self.config.train, 7, hardware(), self.optimizer, self.schedule, self.sampler
            )
            learner.made_by = self.made_by
            return fit(learner, self.validate, folder, logger, self.watch)
        finally:
            logger.close()

    @property
    def last(self) -> dict[str, Any]:
        return checkpoint.load(self.folder / "last.pt")

    @property
    def best(self) -> dict[str, Any]:
        return checkpoint.load(self.folder / "best.pt")

    def lines(self) -> list[dict[str, float]]:
        """`metrics.jsonl`, but for the speed."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [
            {name: value for name, value in json.loads(line).items() if not name.endswith("s_per_second")}
            for line in text.splitlines()
        ]


# Optimiser, schedule, clipping


def test_every_step_is_the_optimisers_on_the_steps_own_episodes(tmp_path: Path) -> None:
    run = Fit(tmp_path)
    numbers = run.run()
    assert torch.equal(run.algorithm.weight, -8 * SLOPE)
    assert run.drawn == [(3 * step, 3 * step + 3) for step in range(8)]
    assert run.algorithm.steps == list(range(8))
    assert all(run.algorithm.modes)
    assert numbers["train/steps"] == 8
    assert numbers["train/tasks_per_second"] == pytest.approx(24 / numbers["train/seconds"])


@pytest.mark.parametrize("schedule", choices("schedule"))
def test_schedules(schedule: str, tmp_path: Path) -> None:
    """Every schedule of conf/, as applied: step k moves the weight by rate k times the slope."""
    small = {"step": ["train.schedule.step_size=3"]}.get(schedule, [])
    expected = {
        "constant": lambda k: 0.5,
        "usual": lambda k: 0.5,  # without a preset
        "linear": lambda k: 0.5 * (1 - k / 8),
        "cosine": lambda k: 0.25 * (1 + math.cos(math.pi * k / 8)),
        "step": lambda k: 0.5 * 0.5 ** (k // 3),
    }[schedule]
    weights: list[float] = []
    algorithm = Ramp()
    run = Fit(tmp_path, algorithm, f"schedule={schedule}", "train.optimizer.lr=0.5", *small)
    run.before = lambda step: weights.append(algorithm.weight[0].item())
    run.run()
    moved = torch.tensor([*weights, algorithm.weight[0].item()]).diff()
    torch.testing.assert_close(moved, -3 * torch.tensor([expected(k) for k in range(8)]))


def test_schedule_follows_the_clock_where_seconds_end_before_steps() -> None:
    config = compose(
        "optimizer=sgd", "train.optimizer.lr=1", "schedule=linear", "train.steps=100", "train.max_seconds=10"
    )
    optimizer, schedule = build_optimizer(Ramp(), config.train)
    rates = []
    for step, seconds in [(1, 0.05), (2, 1.0), (3, 1.0), (4, 5.02), (60, 5.5), (61, 9.99), (62, 12.0)]:
        optimizer.step()
        advance_schedule(schedule, config.train, step, seconds)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.99, 0.9, 0.9, 0.5, 0.4, 0.01, 0])
    config.train.max_seconds = None
    optimizer, schedule = build_optimizer(Ramp(), config.train)
    optimizer.step()
    advance_schedule(schedule, config.train, 1, 1e9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("overrides", "gradient"),
    [
        ([], [3, -4]),
        (["train.clip_norm=1"], [0.6, -0.8]),
        (["train.clip_norm=10"], [3, -4]),
        (["train.clip_value=3.5"], [3, -3.5]),
        (["train.clip_value=1", "train.clip_norm=1"], [0.5**0.5, -(0.5**0.5)]),
        (["train.clip_norm=0"], [0, 0]),
    ],
)
def test_clipping(overrides: list[str], gradient: list[float], tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.steps=1", *overrides)
    run.run()
    torch.testing.assert_close(
        run.algorithm.weight.detach(), -torch.tensor(gradient, dtype=torch.float32), rtol=1e-5, atol=1e-6
    )


def test_clip_returns_the_norm_before() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = SLOPE.clone()
    assert clip([parameter], None, None) == 5
    assert torch.equal(parameter.grad, SLOPE)
    assert clip([parameter], 1.0, None) == 5
    assert parameter.grad.norm().item() == pytest.approx(1)


def test_frozen_parameters_stay_out_of_the_optimiser() -> None:
    algorithm = Ramp()
    for name in choices("optimizer"):
        config = compose(f"optimizer={name}")
        optimizer, _ = build_optimizer(algorithm, config.train)
        assert [group["params"] for group in optimizer.param_groups] == [[algorithm.weight]]
        assert type(optimizer).__name__.lower() == name


def test_wrong_setting_of_an_optimiser_is_one_line() -> None:
    config = compose("train.optimizer.lr=-1")
    with pytest.raises(UserError, match=r"train.optimizer: Invalid learning rate: -1"):
        build_optimizer(Ramp(), config.train)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 100])
def test_chunks_of_tasks_sum_to_the_mean(chunk: int | None) -> None:
    class Square(Ramp):
        def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            self.sizes.append(episodes.n_tasks)
            value = (self.weight[0] * episodes.support_x - episodes.support_y).square().mean()
            return value, {"n": torch.tensor(float(episodes.n_tasks))}

    algorithm = Square()
    algorithm.sizes = []
    batch = episodes(Linear(), TASK, 5)
    algorithm.weight.grad = torch.full((2,), 99.0)  # of the step before
    logged = gradient_step(algorithm, batch, 0, 0.5, 0, hardware(task_chunk=chunk))
    weight = algorithm.weight.detach().clone().requires_grad_()
    loss = 0.5 * (weight[0] * batch.support_x - batch.support_y).square().mean()
    torch.testing.assert_close(algorithm.weight.grad, torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(logged["loss"], loss.detach())
    whole = min(chunk or 5, 5)
    assert algorithm.sizes == [whole] * (5 // whole) + [5 % whole] * bool(5 % whole)
    assert logged["n"].item() == pytest.approx(0.5 * sum(size * size for size in algorithm.sizes) / 5)


# What ends training


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_loss_that_is_not_finite_stops_and_names_the_step(what: str, saved: bool, tmp_path: Path) -> None:
    def spoil(loss: Tensor, weight: Tensor, step: int) -> Tensor:
        if step < 3:
            return loss
        return loss * math.nan if what == "loss" else loss + (weight - weight.detach()).sum().sqrt()

    run = Fit(tmp_path, Ramp(spoil), *(["train.save_every=1"] if saved else []))
    kept = r"last\.pt keeps the last finite weights" if saved else "nothing was saved yet"
    with pytest.raises(
        UserError, match=f"^training: the {what} is not finite at step 3; .*{kept}; try a lower"
    ) as error:
        run.run()
    assert "\n" not in str(error.value)
    assert "a lower train.optimizer.lr, or train.clip_norm=10" in str(error.value)  # it has no inner steps
    assert torch.equal(run.algorithm.weight, -3 * SLOPE)  # the spoilt step was not taken
    if saved:
        assert run.last["state"]["step"] == 3
        assert torch.equal(run.last["model"]["weight"], -3 * SLOPE)
    else:
        assert not (tmp_path / "last.pt").exists()


def test_divergence_leaves_finite_weights_behind(tmp_path: Path) -> None:
    """The weight grows beyond all bounds, and stops where the loss overflows."""
    run = Fit(
        tmp_path,
        Ramp(lambda loss, weight, step: (1 + weight).pow(4).sum()),
        "train.optimizer.lr=2",
        "train.steps=100",
        "train.save_every=1",
    )
    with pytest.raises(UserError, match=r"not finite at step \d+; .*last\.pt keeps the last finite weights"):
        run.run()
    assert run.last["model"]["weight"].abs().min() > 1e6
    assert run.last["model"]["weight"].isfinite().all()


def test_patience(tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.steps=100", "train.validate_every=2", "train.patience=3")
    run.scores = iter([0.3, 0.5, 0.5, 0.1, 0.6, 0.2, 0.6, math.nan, 9.0])
    numbers = run.run()
    assert numbers["train/steps"] == 16  # the third validation in a row that is not better: equal and NaN are not
    assert run.best["step"] == 10
    assert run.best["score"] == 0.6
    assert torch.equal(run.best["model"]["weight"], -10 * SLOPE)
    assert run.last["state"]["step"] == 16
    assert run.validated == [(-2 * k * SLOPE).tolist() for k in range(1, 9)]
    again = Fit(tmp_path, None, "train.steps=100", "train.validate_every=2", "train.patience=3")
    assert again.run()["train/steps"] == 16  # a run that lost patience has none left when it is resumed
    assert again.drawn == again.validated == []


def test_no_time_and_no_steps_still_leave_weights(tmp_path: Path) -> None:
    for name, override in (("time", "train.max_seconds=0"), ("steps", "train.steps=0")):
        run = Fit(tmp_path / name, None, override)
        assert run.run() == {"train/steps": 0, "train/seconds": 0.0, "train/tasks_per_second": 0.0}
        assert run.drawn == []
        assert run.validated == [[0, 0]]
        assert run.last["state"]["step"] == 0
        # Of no step there are no best weights, but those that were there.
        assert checkpoint.chosen(tmp_path / name).name == ("best.pt" if name == "time" else "last.pt")
        assert (tmp_path / name / "best.pt").exists() == (name == "time")


def test_seconds_end_training(tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.steps=20000", "train.max_seconds=0.2")
    numbers = run.run()
    assert 0 < numbers["train/steps"] < 20_000
    assert numbers["train/seconds"] >= 0.2
    assert run.best["step"] == run.last["state"]["step"] == numbers["train/steps"]
    again = Fit(tmp_path, None, "train.steps=20000", "train.max_seconds=0.2")
    assert again.run()["train/steps"] == numbers["train/steps"]  # the budget counts earlier sittings
    assert again.drawn == []


@pytest.mark.parametrize("score", [-math.inf, math.nan])
def test_hopeless_scores_still_leave_a_best(score: float, tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.validate_every=4")
    run.scores = iter([score, score])
    run.run()
    assert run.best["step"] == 4


def test_best_is_the_best_and_ties_go_to_the_first(tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.validate_every=1")
    run.scores = iter([-5.0, -2.0, -3.0, -2.0, -4.0, -4.0, -2.5, -6.0])
    run.run()
    assert (run.best["step"], run.best["score"]) == (2, -2.0)
    assert [line["val/score"] for line in run.lines() if "val/score" in line] == [-5, -2, -3, -2, -4, -4, -2.5, -6]


@pytest.mark.parametrize("at", [4, 6, 8])  # validations on the way, and that of the last step
def test_watch_gives_up_after_a_validation(at: int, tmp_path: Path) -> None:
    asked: list[tuple[int, float]] = []

    def watch(step: int, score: float) -> bool:
        assert Fit(tmp_path).last["state"]["validated"] == step  # what was validated is saved
        asked.append((step, score))
        return step == at

    run = Fit(tmp_path, None, f"train.validate_every={2 if at < 8 else 3}")
    run.scores = iter([0.5, math.nan, 0.2, 0.1])
    run.watch = watch
    with pytest.raises(Pruned, match=f"^pruned at step {at}$") as error:
        run.run()
    assert error.value.step == at == run.last["state"]["step"]
    every = [(2, 0.5), (4, -math.inf), (6, 0.2)] if at < 8 else [(3, 0.5), (6, -math.inf), (8, 0.2)]
    assert asked == [call for call in every if call[0] <= at]
    assert run.best["score"] == 0.5
    again = Fit(tmp_path)  # without a search the run goes on
    assert again.run()["train/steps"] == 8
    assert len(again.drawn) == 8 - at


def test_signal_is_not_lost_to_a_watch_that_gives_up(tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.validate_every=4")
    run.before = lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    run.watch = lambda step, score: True
    with pytest.raises(Interrupted, match=r"SIGTERM at step 4$"):
        run.run()


# RunLogger


def test_curves_are_means_since_the_last_line(tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.log_every=4", "train.validate_every=8")
    run.run()
    early, late, validation = run.lines()
    assert (early["step"], late["step"], validation["step"]) == (4, 8, 8)
    assert early["train/loss"] == pytest.approx(-25 * (0 + 1 + 2 + 3) / 4)
    assert late["train/loss"] == pytest.approx(-25 * (4 + 5 + 6 + 7) / 4)
    firsts = episodes(Linear(), TASK, 12).support_x[:, 0, 0]
    assert early["train/first"] == pytest.approx(firsts.mean().item(), rel=1e-5)
    assert early["train/learning_rate"] == 1
    assert validation["val/score"] == 1


# Signals and resuming


def state(run: Fit) -> dict[str, Any]:
    """All that a later step could depend on."""
    last = run.last
    progress = {name: value for name, value in last["state"].items() if name != "seconds"}
    return {"model": last["model"], "optimizer": last["optimizer"], "schedule": last["schedule"], "state": progress}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    else:
        assert one == other


SIGNALS = (signal.SIGINT, *stop_signals())
RESUMED = ["optimizer=adam", "schedule=linear", "train.log_every=3", "train.validate_every=4", "train.steps=11"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("at", [0, 3, 5])
def test_signal_saves_and_the_next_sitting_goes_on_bit_for_bit(number: signal.Signals, at: int, tmp_path: Path) -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    straight = Fit(tmp_path / "straight", None, *RESUMED)
    straight.run()

    broken = Fit(tmp_path / "broken", None, *RESUMED)
    broken.before = lambda step: signal.raise_signal(number) if step == at else None
    with pytest.raises(Interrupted, match=f"{number.name} at step {at + 1}$") as error:
        broken.run()
    assert isinstance(error.value, KeyboardInterrupt)  # nobody takes it for a failure
    assert error.value.number == number
    assert broken.last["state"]["step"] == at + 1
    assert [signal.getsignal(each) for each in SIGNALS] == handlers

    resumed = Fit(tmp_path / "broken", None, *RESUMED)
    resumed.validated = list(broken.validated)
    numbers = resumed.run()
    assert numbers["train/steps"] == 11
    assert resumed.algorithm.steps == list(range(at + 1, 11))
    assert_same(state(resumed), state(straight))
    assert_same(resumed.best, straight.best)
    assert resumed.lines() == straight.lines()
    assert straight.algorithm.drawn > 0


def test_lines_after_the_checkpoint_are_written_again_not_twice(tmp_path: Path) -> None:
    """A kill loses the steps since `last.pt`, whose lines stand in `metrics.jsonl`."""

    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 7:
            raise Killed

    straight = Fit(tmp_path / "straight", None, "train.log_every=1")
    straight.run()
    run = Fit(tmp_path / "killed", None, "train.log_every=1", "train.save_every=5")
    run.before = kill
    with pytest.raises(Killed):
        run.run()
    assert run.last["state"]["step"] == 5
    assert len(run.lines()) == 7
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "train/lo')  # cut off in the middle
    resumed = Fit(tmp_path / "killed", None, "train.log_every=1", "train.save_every=5")
    resumed.run()
    assert resumed.lines() == straight.lines()
    assert_same(state(resumed), state(straight))


class Killed(Exception):
    """Ends a sitting as a kill would: nothing more is saved."""


class SlowSteps:
    """A clock on which each step takes another time in every sitting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.now, self.draw = 100.0 * seed, random.Random(seed)
        monkeypatch.setattr("metarun.engine.train.time.perf_counter", lambda: self.now)

    def step(self) -> None:
        self.now += self.draw.uniform(0.2, 2.0)


def test_the_speed_of_a_sitting_is_of_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of those that an earlier one took."""
    for steps in (6, 8):
        clock, run = SlowSteps(monkeypatch, steps), Fit(tmp_path, None, f"train.steps={steps}", "train.log_every=2")
        began = clock.now
        run.before = lambda step, clock=clock: clock.step()  # type: ignore[misc]
        run.run()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 8
    assert last["train/tasks_per_second"] == pytest.approx(2 * 3 / (clock.now - began))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("killed_at", [(4,), (7,), (2, 9)], ids=str)
def test_under_a_budget_of_seconds_steps_that_are_taken_again_have_the_same_rates(
    schedule: str, killed_at: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate follows the clock, which is another one in each sitting: the record of the first is replayed."""
    words = [f"schedule={schedule}", "train.steps=60", "train.max_seconds=15", "train.log_every=1", "train.save_every=3",
             "train.validate_every=50"]  # fmt: skip
    before: list[dict[str, float]] = []
    weights: dict[int, list[float]] = {}

    def sitting(number: int, stop: int | None) -> Fit:
        clock, run = SlowSteps(monkeypatch, number), Fit(tmp_path / "run", None, *words)

        def hook(step: int) -> None:
            if step == stop:
                raise Killed
            now = run.algorithm.weight.tolist()
            assert weights.setdefault(step, now) == now
            clock.step()

        run.before = hook
        if stop is None:
            run.run()
        else:
            with pytest.raises(Killed):
                run.run()
        return run

    for number, stop in enumerate(killed_at):
        lines = sitting(number, stop).lines()
        assert len(lines) == stop
        assert lines[: len(before)] == before
        before = lines
    run = sitting(len(killed_at), None)
    lines = [line for line in run.lines() if "train/learning_rate" in line]
    assert lines[: len(before)] == before
    assert lines[-1]["train/learning_rate"] < 0.05  # it falls to the end of the time, not of the steps
    assert len(lines) < 60
    record = [line.split() for line in (tmp_path / "run" / "clock.txt").read_text().splitlines()]
    assert [int(step) for step, _ in record] == list(range(1, len(lines) + 1))
    seconds = [float(second) for _, second in record]
    assert seconds == sorted(seconds)
    assert run.last["state"]["seconds"] == seconds[-1] >= 15
    for line, second in zip(lines, seconds, strict=True):
        due = min(60, max(int(line["step"]), int(60 * second / 15)))
        expected = {"linear": 1 - due / 60, "cosine": (1 + math.cos(math.pi * due / 60)) / 2}[schedule]
        assert line["train/learning_rate"] == pytest.approx(expected, abs=1e-6)


def test_a_record_that_a_kill_cut_off_loses_its_last_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clock.txt").write_text("1 0.5\n2 1.25\n3 4.")
    SlowSteps(monkeypatch, 1)
    clock = Clock(TrainState(), tmp_path / "clock.txt")
    assert [clock.after(step) for step in (1, 2, 3)] == [0.5, 1.25, 1.25]
    assert (tmp_path / "clock.txt").read_text() == "1 0.5\n2 1.25\n3 1.25\n"


@pytest.mark.parametrize("line", [b"\xff\xfe 0.6", b"2 nan", b"2 1e999", b"2 -inf", b"2 0.25", b"2 0.75 1", b"\0\0"])
def test_a_record_with_a_damaged_line_has_the_others(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clock.txt").write_bytes(b"1 0.5\n" + line + b"\n3 0.75\n")
    SlowSteps(monkeypatch, 1)
    clock = Clock(TrainState(), tmp_path / "clock.txt")
    assert [clock.after(step) for step in (1, 2, 3)] == [0.5, 0.5, 0.75]


def test_without_a_budget_of_seconds_nothing_is_recorded(tmp_path: Path) -> None:
    Fit(tmp_path).run()
    assert not (tmp_path / "clock.txt").exists()


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    """One with the keys of today's version goes on, whether it says what was seen or not."""
    run = Fit(tmp_path, None, *RESUMED)
    run.before = lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None
    with pytest.raises(Interrupted):
        run.run()
    last = run.last
    del last["seen"]
    checkpoint.save(tmp_path / "last.pt", last)
    again = Fit(tmp_path, None, *RESUMED)
    assert again.run()["train/steps"] == 11
    assert again.algorithm.steps == list(range(5, 11))
    last["state"]["tempo"] = 1
    checkpoint.save(tmp_path / "last.pt", last)
    with pytest.raises(UserError, match=r"^checkpoint .*last.pt: was written by another version .*state.tempo"):
        Fit(tmp_path, None, *RESUMED).run()


def test_without_a_choice_the_last_weights_are_kept_without_a_score(tmp_path: Path) -> None:
    run = Fit(tmp_path, None, "train.steps=0")
    run.validate = None  # type: ignore[assignment, method-assign]
    assert run.run()["train/steps"] == 0
    assert not (tmp_path / "best.pt").exists()
    assert run.last["state"]["best_score"] == -math.inf
    assert run.lines() == []


def test_signal_during_the_last_validation_is_not_lost(tmp_path: Path) -> None:
    run = Fit(tmp_path)
    validate = run.validate

    def interrupted() -> tuple[float, dict[str, float]]:
        signal.raise_signal(signal.SIGTERM)
        return validate()

    run.validate = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM at step 8"):
        run.run()
    assert run.best["step"] == run.last["state"]["step"] == 8
    again = Fit(tmp_path)
    assert again.run()["train/steps"] == 8
    assert again.drawn == again.validated == []


def test_second_interrupt_from_the_keyboard_interrupts_at_once() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_last_of_another_architecture_is_refused(tmp_path: Path) -> None:
    Fit(tmp_path).run()
    other = Ramp()
    other.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"another architecture: weight is \(2,\) in the file and \(3,\) in this model"):
        Fit(tmp_path, other).run()


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_checkpoint_of_another_training_is_refused_and_one_without_a_name_is_not(name: str, tmp_path: Path) -> None:
    Fit(tmp_path).run()
    whole = (tmp_path / "last.pt").read_bytes(), (tmp_path / "best.pt").read_bytes()
    saved = checkpoint.load(tmp_path / name)
    checkpoint.save(tmp_path / name, {**saved, "made_by": "another run"})
    with pytest.raises(UserError, match=rf"^checkpoint .*{name}: is of another training, .*resume=false"):
        Fit(tmp_path).run()
    del saved["made_by"]
    checkpoint.save(tmp_path / name, saved)
    assert Fit(tmp_path).run()["train/steps"] == 8
    anyone = Fit(tmp_path)
    anyone.made_by = None
    for path, content in zip(("last.pt", "best.pt"), whole, strict=True):
        (tmp_path / path).write_bytes(content)
    assert anyone.run()["train/steps"] == 8


def test_checkpoints_hold_plain_values(tmp_path: Path) -> None:
    """So that they load without running code: `checkpoint.load` uses `weights_only`."""
    run = Fit(tmp_path, None, *RESUMED)
    run.run()
    assert set(run.last) == {"model", "optimizer", "schedule", "state", "seen", "unchosen", "made_by"}
    assert set(run.best) == {"model", "step", "score", "seen", "made_by"}
    config: DictConfig = OmegaConf.create({"state": run.last["state"]})
    assert config.state.step == 11


@pytest.mark.parametrize(
    ("schedule", "taken"),
    [
        (partial(CosineAnnealingLR, T_max=100), 50),  # spans all steps: half of the time is half of the cosine
        (partial(OneCycleLR, max_lr=1.0, total_steps=100), 50),
        (partial(CosineAnnealingLR, T_max=40), 10),  # of a length of its own: one step a step
        (partial(StepLR, step_size=100), 10),
    ],
)
def test_only_a_schedule_that_spans_all_steps_follows_the_budget_of_seconds(schedule: Any, taken: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    built = schedule(optimizer)
    settings = OmegaConf.create({"steps": 100, "max_seconds": 60.0})
    optimizer.step()
    for step in range(1, 11):
        advance_schedule(built, settings, step, seconds=3.0 * step)
    assert built.last_epoch == taken


@pytest.mark.parametrize(
    ("part", "node", "line"),
    [
        ("optimizer", {"_target_": "torch.optim.LBFGS"}, r"optimizer: the training loop cannot drive LBFGS, .* 'closure'\); "),
        ("optimizer", {"_target_": "torch.optim.SparseAdam"}, "optimizer: the training loop cannot drive SparseAdam, "),
        ("schedule", {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "drive ReduceLROnPlateau, .* 'metrics'"),
        ("schedule", {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.0, "total_steps": 3},
         r"schedule\.total_steps=3: OneCycleLR takes no further step than that, and train\.steps=8; give it as many$"),
    ],
)  # fmt: skip
def test_what_the_loop_cannot_drive_is_refused_before_it_begins(part: str, node: dict[str, Any], line: str) -> None:
    config = compose("data=linear", "backbone=mlp", "optimizer=sgd", "train.steps=8")
    OmegaConf.set_struct(config, False)
    config.train[part] = OmegaConf.create(node)
    with pytest.raises(UserError, match=rf"^train\..*{line}"):
        build_optimizer(Ramp(), config.train)
