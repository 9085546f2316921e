"""The one training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarun import files
from metarun.config import construct
from metarun.core import Algorithm, Episodes, MixedEpisodes, TaskShape
from metarun.engine import checkpoint
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware
from metarun.engine.platform import signal_name, stop_signals
from metarun.errors import Pruned, UserError
from metarun.ops import draws
from metarun.ops.running_averages import RunningAverages, keeps_averages
from metarun.runs.logger import RunLogger

if TYPE_CHECKING:
    from metarun.wrappers.base import Wrapper

log = logging.getLogger("metarun")

TAKE_LESS = "train.max_seconds=600 (ten minutes of training; validation and test stay as they are)"
SIGNALS = (signal.SIGINT, *stop_signals())

Sampler = Callable[[int, int], Any]  # the `Episodes` or the `Batch` from `start` to `stop`, on the device
Validate = Callable[[], tuple[float, dict[str, float]]]  # a score of the weights, higher is better, and what to log
Watch = Callable[[int, float], bool]  # of a validation's step and score: whether to give up


class Interrupted(KeyboardInterrupt):
    """A signal ended training after the checkpoint was saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal_name(number)} at step {step}")
        self.number = number


class Signals:
    """Notes a signal instead of dying of it, while it is entered; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def build_optimizer(
    algorithm: Algorithm | Wrapper, settings: Any
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser of the trainable parameters and its learning-rate schedule, from the config's `train`.

    Raises `UserError` where there are steps but nothing to train.
    """
    parameters = [value for value in algorithm.parameters() if value.requires_grad]
    if not parameters:
        if settings.steps:
            raise UserError(
                f"train.steps={settings.steps}: there is nothing to train in {type(algorithm).__name__} on this backbone; "
                "use train.steps=0"
            )
        parameters = [torch.nn.Parameter(torch.zeros(()))]  # an optimiser takes no empty list
    optimizer = construct(settings.optimizer, "train.optimizer", params=parameters)
    return optimizer, construct(settings.schedule, "train.schedule", optimizer=optimizer)


@dataclass
class Learner:
    """A method with everything that its training takes.

    Attributes:
        name: The name of the stage that trains it.
        algorithm: The method on its backbone.
        settings: The config's `train`, or that of an earlier stage.
        seed: The seed of the run.
        hardware: Where it is trained; the builder replaces it once all ranks have met.
        optimizer: The optimiser of the trainable parameters; None for a learner that is not trained.
        schedule: The schedule of the optimiser's learning rate.
        sampler: The `Episodes` or the `Batch` from `start` to `stop`.
        task: The shape of its training tasks; None where it trains on batches of images, or not at all.
        wrapper: Has the loss that is trained on in place of the method's; None for the method's own.
        fresh: Builds the same method anew, with the weights that it had before any training.
        seen: The images that it was trained on, which a checkpoint keeps (see `metarun.runs.seen`).
        selected_by: The rule that chose its weights, for `result.json`.
        built_from: The key of its method in the config; None for a backbone without a method.
    """

    name: str
    algorithm: Algorithm
    settings: Any
    seed: int
    hardware: Hardware
    optimizer: torch.optim.Optimizer | None = None
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    sampler: Sampler | None = None
    task: TaskShape | None = None
    wrapper: Wrapper | None = None
    fresh: Callable[[], Algorithm] | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    selected_by: str = ""
    built_from: str | None = None


@dataclass
class TrainState:
    """How far a training has come: what a checkpoint holds besides the weights, the optimiser and the schedule.

    Attributes:
        step: Steps taken.
        seconds: Seconds of training after the last step, validations included, over all sittings.
        best_score: The best validation score so far.
        best_step: The step of the best score.
        validated: The step of the last validation, -1 before the first.
        worse: Validations since the best one.
        sums: Sums of what the steps since the last line of the log returned.
        summed: The number of these steps.
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    best_step: int = 0
    validated: int = -1
    worse: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0

    @classmethod
    def restored(cls, saved: dict[str, Any], path: Path) -> TrainState:
        """The state that a checkpoint holds.

        Args:
            saved: The entry `state` of the checkpoint.
            path: The checkpoint's file, for the message of an error.

        Raises:
            UserError: The checkpoint was written by another version of metarun, which kept other things.
        """
        known = {item.name for item in fields(cls)}
        if saved.keys() != known:
            other = sorted(saved.keys() ^ known)[0]
            raise UserError(
                f"checkpoint {path}: was written by another version of metarun (state.{other}); start over beside it with "
                "resume=false"
            )
        return cls(**saved)


class Clock:
    """The seconds of training after each step.

    Where a budget of seconds decides on the learning rate and on the end of a training, a step's outcome depends on its
    second. A record then keeps the second of every step, and a step that is taken again after a kill gets the same one.
    """

    def __init__(self, state: TrainState, record: Path | None) -> None:
        """Starts to count at the step and the second of `state`.

        Args:
            state: Where the training goes on.
            record: The file of the record, `step seconds` a line; None keeps none.
        """
        self.record = record
        self._known: dict[int, float] = {}
        if record is not None:
            self._known = dict(self._read(record))
            lines = [f"{step} {seconds!r}\n" for step, seconds in self._known.items()]
            files.save_bytes(record, "".join(lines).encode())  # without a line that a kill cut off
        self._base, self._since = state.seconds, time.perf_counter()

    @staticmethod
    def _read(record: Path) -> Iterator[tuple[int, float]]:
        for line in record.read_text(encoding="utf-8").splitlines(keepends=True) if record.is_file() else ():
            with contextlib.suppress(
                ValueError
            ):  # a line that a kill cut off, or that a power failure filled with zeros
                step, seconds = line.split()
                if line.endswith("\n"):
                    yield int(step), float(seconds)

    def after(self, step: int) -> float:
        """The seconds of training at the end of `step` steps, of which this is the last one."""
        if (known := self._known.get(step)) is not None:
            self._base, self._since = known, time.perf_counter()
            return known
        seconds = self._base + time.perf_counter() - self._since
        if self.record is not None:
            with open(self.record, "a", encoding="utf-8") as file:
                file.write(f"{step} {seconds!r}\n")
        return seconds


@dataclass(frozen=True)
class Order:
    """What rank 0 says to all ranks in every step, within the message that sums the gradients."""

    seconds: float = 0.0  # of training so far: ranks must agree on the learning rate and on when to stop
    signal: int = 0  # that it received; 0 for none


class Training:
    """One training, phase by phase; `fit` puts the phases in their order."""

    def __init__(
        self, learner: Learner, validate: Validate | None, folder: Path, logger: RunLogger, watch: Watch | None
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
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        self.state = TrainState()

    def restore(self) -> None:
        """Goes on from `last.pt` if it is there; starts the clock, and forgets what was recorded after the checkpoint."""
        world = self.world
        # Rank 0 reads for all, so that all go on from the same state; loading copies it to each rank's device.
        saved = world.broadcast(checkpoint.load(self.last) if world.main and self.last.is_file() else None)
        if saved is not None:
            checkpoint.load_weights(self.algorithm, saved["model"], self.last)
            with checkpoint.fitting(self.last):
                if self.learner.wrapper is not None:
                    self.learner.wrapper.load_own_state(saved["wrapper"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.schedule.load_state_dict(saved["schedule"])
                self.state = TrainState.restored(saved["state"], self.last)
            if world.broadcast(
                world.main and self.best.is_file() and checkpoint.load(self.best).get("step", 0) > self.state.step
            ):
                # A crash came between the two files: that validation comes again, and its weights must be kept again.
                self.state.best_score = -math.inf
            log.info("going on at step %d", self.state.step)
        self.logger.rewind(self.state.step, self.state.validated)
        follows = self.settings.max_seconds is not None and world.main
        self.clock = Clock(self.state, self.folder / "clock.txt" if follows else None)
        self.started = self.saved_at = time.perf_counter()
        self.first_step = self.state.step

    def seconds_left(self) -> float | None:
        """The seconds of training that its budget leaves; None where there is none."""
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
            UserError: The loss or the gradient is not finite.
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
            raise UserError(
                f"training: the {what} is not finite at step {step}; {kept}; try a lower train.optimizer.lr or algo.inner_lr, "
                "or train.clip_norm=10"
            )
        self.optimizer.step()
        state.step, state.seconds = step + 1, order.seconds
        advance_schedule(self.schedule, self.settings, state.step, state.seconds)
        state.summed += 1
        for name, value in logged.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        return order.signal

    def log(self) -> None:
        """Records the means since the last line, and starts new ones."""
        state, tasks = self.state, self.settings.tasks_per_step
        scalars = {f"train/{name}": value / state.summed for name, value in state.sums.items()}
        scalars["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        elapsed = time.perf_counter() - self.started
        scalars["train/tasks_per_second"] = (state.step - self.first_step) * tasks / elapsed
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
                checkpoint.save(self.best, {**best, "seen": self.learner.seen})
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
        kept = {**modules, "state": asdict(self.state), "seen": self.learner.seen, "unchosen": not self.settings.steps}
        checkpoint.save(self.last, kept)
        self.saved_at = time.perf_counter()


def fit(
    learner: Learner, validate: Validate | None, folder: Path, logger: RunLogger, watch: Watch | None = None
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
        UserError: The loss or the gradient was not finite.
    """
    training = Training(learner, validate, folder, logger, watch)
    world, settings = learner.hardware.world, learner.settings
    training.restore()
    state = training.state
    training.trained.train()
    world.barrier()  # a signal is rank 0's alone to note from here on: all must be ready to do likewise
    with (
        Signals() as signals,
        logger.progress("training", settings.steps, state.step, training.seconds_left(), TAKE_LESS) as advance,
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
        "train/steps": state.step,
        "train/seconds": state.seconds,
        "train/tasks_per_second": state.step * settings.tasks_per_step / state.seconds if state.seconds else 0.0,
    }


def advance_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, settings: Any, step: int, seconds: float) -> None:
    """One step of the schedule a step; more if it spans all steps and the budget of seconds will end before them.

    So a learning rate that is to fall to zero at the end gets there on a slow machine too. A schedule of a length of its
    own (every 2,000 steps, say) keeps to the steps.
    """
    due = step
    length = getattr(schedule, "T_max", getattr(schedule, "total_iters", None))  # torch's cosine, and its other ramps
    if settings.max_seconds and length == settings.steps:
        due = max(step, min(settings.steps, int(settings.steps * seconds / settings.max_seconds)))
    while schedule.last_epoch < due:
        schedule.step()


def gradient_step(
    algorithm: Algorithm | Wrapper,
    episodes: Episodes | MixedEpisodes,
    step: int,
    weight: float,
    seed: int,
    hardware: Hardware,
    first_task: int = 0,
) -> dict[str, Tensor]:
    """Fills the gradients of `weight` times the mean loss over this process's tasks of a step.

    Goes chunk by chunk, so that one chunk's graph is held at a time; the tasks of a chunk have one shape. Random numbers
    depend on (seed, step, task) alone, and not on what was drawn before, on the chunks or on the processes
    (`metarun.ops.draws`). Running averages of norms are those of one process (`metarun.ops.running_averages`).

    Args:
        algorithm: The method, or its wrapper; its gradients are replaced.
        episodes: The tasks, of one shape or of several, or the batch of images.
        step: The number of the step, from 0.
        weight: The share of the step's tasks that these are.
        seed: The run's seed.
        hardware: What it is computed on.
        first_task: The number of the first task in the step, over all processes.

    Returns:
        The loss and what else to log, weighted; summed over the processes they are those of the step.
    """
    algorithm.zero_grad(set_to_none=True)
    size = None if algorithm.whole_batch else hardware.task_chunk
    if isinstance(episodes, MixedEpisodes) and keeps_averages(algorithm):
        size = 1  # in the order of the tasks, which running averages go by, and not shape by shape
    total = round(episodes.n_tasks / weight)
    world = hardware.world
    averages = RunningAverages(algorithm, world.rank, world.size, world.all_reduce) if world.size > 1 else None
    all_reduce, settle = (world.all_reduce, averages.settle) if averages else (None, None)
    sums: dict[str, Tensor] = {}
    for places, chunk in episodes.chunks(size):
        share = weight * chunk.n_tasks / episodes.n_tasks
        numbers = [first_task + place for place in places]
        hardware.seed(draws.mixed(seed, step, numbers[0]))
        with draws.StepShare(seed, step, numbers[0], chunk.n_tasks, total, all_reduce, settle, numbers).entered():
            loss, scalars = hardware.backward(algorithm, chunk, step, share)
        for name, value in {"loss": loss, **scalars}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value * share
    if averages:
        averages.settle()
    return sums


def share_gradients(
    algorithm: Algorithm | Wrapper,
    parameters: list[torch.nn.Parameter],
    sums: dict[str, Tensor],
    order: Order,
    weight: float,
    world: World,
) -> Order:
    """Sums the gradients and `sums` over the ranks, and averages the algorithm's buffers, all in one message.

    Args:
        algorithm: The method, whose buffers are averaged in place; running averages of norms are the same in all ranks.
        parameters: The trained parameters, whose gradients are summed in place.
        sums: What to log, summed in place.
        order: What rank 0 says; that of other ranks is ignored.
        weight: This rank's share of the tasks.
        world: The ranks.

    Returns:
        Rank 0's `order`.
    """
    if world.size == 1:
        return order
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    buffers = [buffer for buffer in algorithm.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        buffer.mul_(weight)
    said = torch.tensor([order.seconds, order.signal], dtype=torch.float64) * world.main
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    world.all_reduce([*gradients, *buffers, *sums.values(), said])
    return Order(said[0].item(), int(said[1].item()))


def clip(parameters: list[torch.nn.Parameter], norm: float | None, value: float | None) -> float:
    """Clips the gradients by value, then by their norm; returns the norm before that."""
    if value is not None:
        torch.nn.utils.clip_grad_value_(parameters, value)
    if norm is not None:
        return float(torch.nn.utils.clip_grad_norm_(parameters, norm))
    return float(
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    )
