"""The one training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metarun.config.hints import hints_of
from metarun.engine import checkpoint
from metarun.engine.gradients import Order, clip, gradient_step, share_gradients
from metarun.engine.interruption import Interrupted, Signals
from metarun.engine.learner import Trainable
from metarun.engine.train_state import Clock, TrainState
from metarun.errors import Diverged, Pruned
from metarun.runs import contents, seen
from metarun.runs.logger import RunLogger
from metarun.runs.result import ITEMS_PER_SECOND, MADE_BY, TASKS_PER_SECOND, TRAIN_SECONDS, TRAIN_STEPS

log = logging.getLogger("metarun")

Validate = Callable[[], tuple[float, dict[str, float]]]  # a score of the weights, higher is better, and what to log
Watch = Callable[[int, float], bool]  # of a validation's step and score: whether to give up


class Training:
    """One training, phase by phase; `fit` puts the phases in their order."""

    def __init__(
        self, learner: Trainable, validate: Validate | None, folder: Path, logger: RunLogger, watch: Watch | None
    ) -> None:
        """Takes what `fit` takes."""
        self.learner, self.validate, self.folder, self.logger, self.watch = learner, validate, folder, logger, watch
        self.trained = learner.wrapper or learner.algorithm
        self.algorithm, self.settings, self.world = learner.algorithm, learner.settings, learner.hardware.world
        assert learner.optimizer is not None
        assert learner.schedule is not None
        assert learner.sampler is not None
        self.optimizer, self.schedule, self.sampler = learner.optimizer, learner.schedule, learner.sampler
        self.parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self.first_task, self.end_task = self.world.share(self.settings.tasks_per_step)
        self.last, self.best = folder / contents.LAST, folder / contents.BEST
        self.state = TrainState()

    def restore(self) -> None:
        """Goes on from `last.pt` if it is there; starts the clock, and forgets what was recorded after the checkpoint."""
        world = self.world
        # Rank 0 reads for all, so that all go on from the same state; loading copies it to each rank's device.
        made_by = self.learner.made_by
        found = world.main and self.last.is_file()
        saved = world.broadcast(checkpoint.load(self.last, made_by=made_by) if found else None)
        if saved is not None:
            checkpoint.load_weights(self.algorithm, saved["model"], self.last)
            with checkpoint.fitting(self.last):
                if self.learner.wrapper is not None:
                    self.learner.wrapper.load_own_state(saved["wrapper"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.schedule.load_state_dict(saved["schedule"])
                self.state = TrainState.restored(saved["state"], self.last)
            if world.broadcast(
                world.main
                and self.best.is_file()
                and checkpoint.load(self.best, made_by=made_by).get("step", 0) > self.state.step
            ):
                # A crash came between the two files: that validation comes again, and its weights must be kept again.
                self.state.best_score = -math.inf
            log.info("going on at step %d", self.state.step)
        self.logger.rewind(self.state.step, self.state.validated)
        follows = self.settings.max_seconds is not None and world.main
        self.clock = Clock(self.state, self.folder / contents.CLOCK if follows else None)
        self.started = self.saved_at = time.perf_counter()
        self.first_step = self.state.step

    @property
    def rate(self) -> str:
        """The key of what it takes a second: tasks, or labelled items."""
        return ITEMS_PER_SECOND if self.algorithm.trains_on == "batches" else TASKS_PER_SECOND

    def seconds_left(self) -> float | None:
        """Computes the seconds of training that its budget leaves; None where there is none."""
        limit = self.settings.max_seconds
        return None if limit is None else float(max(0.0, limit - self.state.seconds))

    def over(self) -> bool:
        """Whether the budget of steps or seconds is spent, or the patience with validations."""
        state, patience, limit = self.state, self.settings.patience, self.settings.max_seconds
        return (
            state.step >= self.settings.steps
            or (patience is not None and state.worse >= patience)
            or (limit is not None and state.seconds >= limit)
        )

    def step(self, signals: Signals) -> int:
        """Takes one step on the next episodes.

        Args:
            signals: What this process receives meanwhile.

        Returns:
            The signal that rank 0 received, 0 for none.

        Raises:
            Diverged: The loss or the gradient is not finite.
        """
        state, learner, world = self.state, self.learner, self.world
        tasks, step = self.settings.tasks_per_step, state.step
        batch = self.sampler(step * tasks + self.first_task, step * tasks + self.end_task)
        share = (self.end_task - self.first_task) / tasks
        sums = gradient_step(self.trained, batch, step, share, learner.seed, learner.hardware, self.first_task)
        order = Order(self.clock.after(step + 1) if world.main else 0.0, signals.received)
        order = share_gradients(self.trained, self.parameters, sums, order, share, world)
        logged = {name: value.item() for name, value in sums.items()}
        norm = clip(self.parameters, self.settings.clip_norm, self.settings.clip_value)
        if not math.isfinite(logged["loss"] + norm):
            what = "gradient" if math.isfinite(logged["loss"]) else "loss"
            kept = f"{self.last} keeps the last finite weights" if self.last.exists() else "nothing was saved yet"
            raise Diverged(f"training: the {what} is not finite at step {step}; {kept}; try {self._tamer()}")
        self.optimizer.step()
        state.step, state.seconds = step + 1, order.seconds
        advance_schedule(self.schedule, self.settings, state.step, state.seconds)
        state.summed += 1
        for name, value in logged.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        return order.signal

    def _tamer(self) -> str:
        """Says what to try against a loss that grows beyond all bounds, by the keys that this training has."""
        key, algo = self.learner.key, self.learner.built_from
        inner = f" or {algo}.inner_lr" if algo and "inner_lr" in hints_of(type(self.algorithm)) else ""
        return f"a lower {key}.optimizer.lr{inner}, or {key}.clip_norm=10"

    def log(self) -> None:
        """Records the means since the last line, and starts new ones."""
        state, tasks = self.state, self.settings.tasks_per_step
        scalars = {f"train/{name}": value / state.summed for name, value in state.sums.items()}
        scalars["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        elapsed = time.perf_counter() - self.started
        scalars[self.rate] = (state.step - self.first_step) * tasks / elapsed
        self.logger.scalars(state.step, scalars)
        state.sums, state.summed = {}, 0

    def select(self) -> bool:
        """Validates, keeps the weights if they are the best so far, and saves.

        Returns:
            Whether `watch` gives up.
        """
        state, watch, measured = self.state, self.watch, None
        if self.validate is not None:
            measured, scalars = self.validate()
            self.logger.scalars(state.step, scalars, always=True)
            measured = -math.inf if math.isnan(measured) else measured
        score = -math.inf if measured is None else measured
        better = score > state.best_score or state.validated < 0  # the first, however bad
        state.worse = 0 if better else state.worse + 1
        state.validated = state.step
        if better:
            state.best_score, state.best_step = score, state.step
            if self.world.main and self.settings.steps:
                best = {"model": self.algorithm.state_dict(), "step": state.step, "score": measured}
                checkpoint.save(self.best, {**best, **self._origin()})
        self.save()
        watched = watch is not None and measured is not None and self.world.main
        return self.world.broadcast(watched and watch(state.step, score) if watch is not None else False)

    def save_if_due(self, stopped: int) -> None:
        """Saves if an interval of steps or seconds has passed or a signal came, and the last validation did not save."""
        state, settings = self.state, self.settings
        due = settings.save_every is not None and state.step % settings.save_every == 0
        overdue = time.perf_counter() - self.saved_at >= settings.save_seconds
        if state.validated != state.step and (due or stopped or overdue):
            self.save()

    def save(self) -> None:
        """Writes `last.pt`, from which `restore` goes on."""
        if not self.world.main:
            return
        modules = {
            "model": self.algorithm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        self.logger.sync()  # first, since a run that goes on from here does not record these steps again
        if self.learner.wrapper is not None:
            modules["wrapper"] = self.learner.wrapper.own_state()
        kept = {**modules, "state": asdict(self.state), "unchosen": not self.settings.steps}
        checkpoint.save(self.last, {**kept, **self._origin()})
        self.saved_at = time.perf_counter()

    def _origin(self) -> dict[str, Any]:
        """Gives what both checkpoints say of where they come from."""
        made_by = self.learner.made_by
        return {seen.KEY: self.learner.seen, **({MADE_BY: made_by} if made_by is not None else {})}


def fit(
    learner: Trainable, validate: Validate | None, folder: Path, logger: RunLogger, watch: Watch | None = None
) -> dict[str, Any]:
    """Trains `learner` in place; writes `last.pt` and `best.pt` to `folder`; goes on from `last.pt` if it is there.

    A training of no step has no best weights, and leaves `last.pt` alone.

    Step k depends on (seed, k) and the state before it alone, so a resumed run equals one never interrupted. Under
    `train.max_seconds` it depends on the second of the step too, which `clock.txt` keeps for a step that is taken again.

    Args:
        learner: What is trained, and all that its training takes.
        validate: Gives a score of the current weights (higher is better) and what to log. None where there is nothing to
            choose from: the last weights are then `best.pt`, without a score.
        folder: Where the checkpoints lie.
        logger: Where curves and lines go.
        watch: Is asked by rank 0 after every validation, with its step and score (minus infinity for NaN), whether to give
            up.

    Returns:
        Numbers for `result.json`.

    Raises:
        Interrupted: A signal came; the checkpoint was saved.
        Pruned: `watch` gave up.
        Diverged: The loss or the gradient was not finite.
    """
    training = Training(learner, validate, folder, logger, watch)
    world, settings = learner.hardware.world, learner.settings
    training.restore()
    state = training.state
    training.trained.train()
    world.barrier()  # a signal is rank 0's alone to note from here on: all must be ready to do likewise
    with (
        Signals() as signals,
        logger.progress("training", settings.steps, state.step, training.seconds_left(), learner.key) as advance,
    ):
        while not training.over():
            stopped = training.step(signals)
            if state.step % settings.log_every == 0:
                training.log()
            pruned = state.step % settings.validate_every == 0 and training.select()
            training.save_if_due(stopped)
            advance(state.step)
            if stopped:
                raise Interrupted(stopped, state.step)
            if pruned:
                raise Pruned(state.step)
        pruned = state.validated != state.step and training.select()
        if stopped := world.broadcast(signals.received):  # during the last validation
            raise Interrupted(stopped, state.step)
        if pruned:
            raise Pruned(state.step)
    return {
        TRAIN_STEPS: state.step,
        TRAIN_SECONDS: state.seconds,
        training.rate: state.step * settings.tasks_per_step / state.seconds if state.seconds else 0.0,
    }


def advance_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, settings: Any, step: int, seconds: float) -> None:
    """Moves the schedule one step a step; more if it spans all steps and the budget of seconds will end before them.

    So a learning rate that is to fall to zero at the end gets there on a slow machine too. A schedule of a length of its
    own (every 2,000 steps, say) keeps to the steps.
    """
    due = step
    spans = ("T_max", "total_iters", "total_steps")  # of torch's cosine, its ramps, and its single cycle
    length = next((getattr(schedule, name) for name in spans if hasattr(schedule, name)), None)
    if settings.max_seconds and length == settings.steps:
        due = max(step, min(settings.steps, int(settings.steps * seconds / settings.max_seconds)))
    while schedule.last_epoch < due:
        schedule.step()
