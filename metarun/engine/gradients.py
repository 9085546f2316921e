"""The gradient of a step: of this process's tasks, and of all processes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metarun.core import Algorithm, Episodes, MixedEpisodes
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware
from metarun.ops import draws
from metarun.ops.running_averages import RunningAverages, keeps_averages

if TYPE_CHECKING:
    from metarun.wrappers.base import Wrapper


@dataclass(frozen=True)
class Order:
    """What rank 0 says to all ranks in every step, within the message that sums the gradients."""

    seconds: float = 0.0  # training has taken these: ranks must agree on the learning rate and on when to stop
    signal: int = 0  # the number of the one that rank 0 received; 0 for none


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
        parameters: The trained parameters, whose gradients are replaced by their sums.
        sums: What to log, summed in place.
        order: What rank 0 says; that of other ranks is ignored.
        weight: This rank's share of the tasks.
        world: The ranks.

    Returns:
        Rank 0's `order`.
    """
    if world.size == 1:
        return order
    # A parameter without a gradient in any rank has none afterwards: an optimiser leaves it alone, as in one process.
    found = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float64)
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
    buffers = [buffer for buffer in algorithm.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        buffer.mul_(weight)
    said = torch.tensor([order.seconds, order.signal], dtype=torch.float64) * world.main
    world.all_reduce([*gradients, found, *buffers, *sums.values(), said])
    for parameter, gradient, ranks in zip(parameters, gradients, found.tolist(), strict=True):
        parameter.grad = gradient if ranks else None
    return Order(said[0].item(), int(said[1].item()))


def clip(parameters: list[torch.nn.Parameter], norm: float | None, value: float | None) -> float:
    """Clips the gradients by value, then by their norm; returns the norm that they had in between."""
    if value is not None:
        torch.nn.utils.clip_grad_value_(parameters, value)
    if norm is not None:
        return float(torch.nn.utils.clip_grad_norm_(parameters, norm))
    return float(
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    )
