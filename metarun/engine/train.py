"""The one training loop."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarun.config import construct
from metarun.core import Algorithm, Episodes
from metarun.data.source import EpisodeSampler
from metarun.engine import checkpoint
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware
from metarun.engine.platform import signal_name, stop_signals
from metarun.errors import Pruned, UserError
from metarun.ops import draws
from metarun.runs.logger import RunLogger

if TYPE_CHECKING:
    from metarun.wrappers.base import Wrapper

log = logging.getLogger("metarun")

SIGNALS = (signal.SIGINT, *stop_signals())


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


def fit(
    algorithm: Algorithm,
    sampler: EpisodeSampler,
    validate: Callable[[], tuple[float, dict[str, float]]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: Any,
    seed: int,
    hardware: Hardware,
    folder: Path,
    logger: RunLogger,
    watch: Callable[[int, float], bool] | None = None,
    wrapper: Wrapper | None = None,
) -> dict[str, Any]:
    """Trains `algorithm` in place, by the loss of `wrapper` if there is one.

    Writes `last.pt` and `best.pt` to `folder`, and goes on from `last.pt` if it is there.

    `sampler` yields training episodes; `validate` a score of the current weights (higher is better) and what to log;
    `settings` is the config's `train`. `watch` is asked by rank 0 after every validation, with its step and score (minus
    infinity for NaN), whether to give up. Step k depends on (seed, k) and the state before it alone, so a resumed run equals
    one never interrupted. Returns numbers for `result.json`. Raises `Interrupted` after a signal, `Pruned` where `watch`
    gave up, `UserError` on a loss or gradient that is not finite.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    trained = wrapper or algorithm
    tasks, world = settings.tasks_per_step, hardware.world
    first_task, end_task = world.share(tasks)
    state: dict[str, Any] = {
        "step": 0, "seconds": 0.0, "best_score": -math.inf, "best_step": 0, "validated": -1, "worse": 0, "sums": {}, "summed": 0,
    }  # fmt: skip
    last = folder / "last.pt"
    # Rank 0 reads for all, so that all go on from the same state; loading copies it to each rank's device.
    saved = world.broadcast(checkpoint.load(last) if world.main and last.is_file() else None)
    if saved is not None:
        checkpoint.load_weights(algorithm, saved["model"], last)
        if wrapper is not None:
            wrapper.load_own_state(saved["wrapper"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        state = saved["state"]
        log.info("going on at step %d", state["step"])
    logger.rewind(state["step"], state["validated"])
    started = saved_at = time.perf_counter()
    before, first_step = state["seconds"], state["step"]

    def save() -> None:
        nonlocal saved_at
        if not world.main:
            return
        modules = {
            "model": algorithm.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        if wrapper is not None:
            modules["wrapper"] = wrapper.own_state()
        checkpoint.save(last, {**modules, "state": state})
        saved_at = time.perf_counter()

    def select() -> bool:
        """Validates, and keeps the weights if they are the best so far; whether `watch` gives up."""
        score, shown = validate()
        logger.scalars(state["step"], shown, always=True)
        score = -math.inf if math.isnan(score) else score
        better = score > state["best_score"] or state["validated"] < 0  # the first, however bad
        state["worse"] = 0 if better else state["worse"] + 1
        state["validated"] = state["step"]
        if better:
            state["best_score"], state["best_step"] = score, state["step"]
            if world.main:
                best = {"model": algorithm.state_dict(), "step": state["step"], "score": score}
                checkpoint.save(folder / "best.pt", best)
        save()
        return world.broadcast(watch is not None and world.main and watch(state["step"], score))

    def over() -> bool:
        patience, limit = settings.patience, settings.max_seconds
        return (
            state["step"] >= settings.steps
            or (patience is not None and state["worse"] >= patience)
            or (limit is not None and state["seconds"] >= limit)
        )

    trained.train()
    world.barrier()  # a signal is rank 0's alone to note from here on: all must be ready to do likewise
    with Signals() as signals, logger.progress("training", settings.steps, state["step"]) as advance:
        while not over():
            step = state["step"]
            batch = sampler(step * tasks + first_task, step * tasks + end_task)
            sums = gradient_step(trained, batch, step, (end_task - first_task) / tasks, seed, hardware, first_task)
            # Rank 0's clock and signals count: all ranks must agree on when to stop.
            clock = torch.tensor([time.perf_counter() - started, signals.received], dtype=torch.float64) * world.main
            share_gradients(trained, parameters, sums, clock, (end_task - first_task) / tasks, world)
            state["seconds"], stopped = before + clock[0].item(), int(clock[1].item())
            logged = {name: value.item() for name, value in sums.items()}
            norm = clip(parameters, settings.clip_norm, settings.clip_value)
            if not math.isfinite(logged["loss"] + norm):
                what = "gradient" if math.isfinite(logged["loss"]) else "loss"
                kept = f"{last} keeps the last finite weights" if last.exists() else "nothing was saved yet"
                raise UserError(
                    f"training: the {what} is not finite at step {step}; {kept}; try a lower train.optimizer.lr or algo.inner_lr, "
                    "or train.clip_norm=10"
                )
            optimizer.step()
            state["step"] = step = step + 1
            advance_schedule(schedule, settings, step, state["seconds"])
            state["summed"] += 1
            for name, value in logged.items():
                state["sums"][name] = state["sums"].get(name, 0.0) + value
            if step % settings.log_every == 0:
                shown = {f"train/{name}": value / state["summed"] for name, value in state["sums"].items()}
                shown["train/learning_rate"] = optimizer.param_groups[0]["lr"]
                shown["train/tasks_per_second"] = (step - first_step) * tasks / (time.perf_counter() - started)
                logger.scalars(step, shown)
                state["sums"], state["summed"] = {}, 0
            pruned = step % settings.validate_every == 0 and select()
            due = settings.save_every is not None and step % settings.save_every == 0
            if state["validated"] != step and (
                due or stopped or time.perf_counter() - saved_at >= settings.save_seconds
            ):
                save()
            advance(step)
            if stopped:
                raise Interrupted(stopped, step)
            if pruned:
                raise Pruned(step)
        pruned = state["validated"] != state["step"] and select()
        if stopped := world.broadcast(signals.received):  # during the last validation
            raise Interrupted(stopped, state["step"])
        if pruned:
            raise Pruned(state["step"])
    return {
        "train/steps": state["step"],
        "train/seconds": state["seconds"],
        "train/tasks_per_second": state["step"] * tasks / state["seconds"] if state["seconds"] else 0.0,
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
    episodes: Episodes,
    step: int,
    weight: float,
    seed: int,
    hardware: Hardware,
    first_task: int = 0,
) -> dict[str, Tensor]:
    """Fills the gradients of `weight` times the mean loss over this process's tasks of a step.

    Goes chunk by chunk, so that one chunk's graph is held at a time. Random numbers depend on (seed, step, task) alone, and
    not on what was drawn before, on the chunks or on the processes (`metarun.ops.draws`).

    Args:
        algorithm: The method, or its wrapper; its gradients are replaced.
        episodes: The tasks, or the batch of images.
        step: The number of the step, from 0.
        weight: The share of the step's tasks that these are.
        seed: The run's seed.
        hardware: What it is computed on.
        first_task: The number of the first task in the step, over all processes.

    Returns:
        The loss and what else to log, weighted; summed over the processes they are those of the step.
    """
    algorithm.zero_grad(set_to_none=True)
    size = episodes.n_tasks if algorithm.whole_batch else hardware.task_chunk or episodes.n_tasks
    total = round(episodes.n_tasks / weight)
    all_reduce = hardware.world.all_reduce if hardware.world.size > 1 else None
    sums: dict[str, Tensor] = {}
    for number, chunk in enumerate(episodes.split(size)):
        share = weight * chunk.n_tasks / episodes.n_tasks
        first = first_task + number * size
        hardware.seed(draws.mixed(seed, step, first))
        with draws.StepShare(seed, step, first, chunk.n_tasks, total, all_reduce).entered():
            loss, shown = hardware.backward(algorithm, chunk, step, share)
        for name, value in {"loss": loss, **shown}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value * share
    return sums


def share_gradients(
    algorithm: Algorithm | Wrapper,
    parameters: list[torch.nn.Parameter],
    sums: dict[str, Tensor],
    clock: Tensor,
    weight: float,
    world: World,
) -> None:
    """Sums the gradients, `sums` and `clock` over the ranks, and averages the algorithm's buffers."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    buffers = [buffer for buffer in algorithm.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        buffer.mul_(weight)
    world.all_reduce(
        [*(parameter.grad for parameter in parameters if parameter.grad is not None), *buffers, *sums.values(), clock]
    )


def clip(parameters: list[torch.nn.Parameter], norm: float | None, value: float | None) -> float:
    """Clips the gradients by value, then by their norm; returns the norm before that."""
    if value is not None:
        torch.nn.utils.clip_grad_value_(parameters, value)
    if norm is not None:
        return float(torch.nn.utils.clip_grad_norm_(parameters, norm))
    return float(
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    )
