"""Random numbers of training: a function of (seed, step, task), whichever process, chunk or form of the task axis computes them.

The loop enters a `StepShare` around each chunk of tasks. Below it `rand`, `randn` and `dropout` draw from a generator of each
task, `over_tasks` seeds torch's global generator anew for each task of its loop, and `of_the_step` is for what all tasks of
a step have in common. Outside of a step all of them draw from torch's global generator.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from metarun.errors import UserError

AllReduce = Callable[[Sequence[Tensor]], None]
Array = np.ndarray[Any, np.dtype[np.float32]]
Kind = Callable[[np.random.Generator, tuple[int, ...]], Array]

# The classes of modules that draw from torch's global generator, besides torch's dropouts, and the names that their rates may have.
DRAWING = {
    "MultiheadAttention", "StochasticDepth", "DropPath", "DropBlock2d", "PatchDropout", "PatchDropoutWithIndices",
}  # fmt: skip
RATES = ("p", "drop_prob", "prob", "dropout")

_share: ContextVar[StepShare | None] = ContextVar("share", default=None)
_task: ContextVar[int | Tensor | None] = ContextVar("task", default=None)  # within the share; a tensor under vmap


def mixed(*numbers: int) -> int:
    """Mixes numbers into a seed from 0 to 2^63 - 1 that hardly any other `numbers` have."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_globals(number: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device`.

    `torch.manual_seed` would format a stack trace each time.

    Args:
        number: The seed, at least 0 and below 2**63.
        device: The device.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def states(device: torch.device) -> list[Tensor]:
    """The states of the generators that `seed_globals` seeds, uint8 `[n]` each, the CPU's first."""
    found = [torch.default_generator.get_state()]
    if device.type == "cuda":
        found.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        found.append(torch.mps.get_rng_state())
    return found


def set_states(found: Sequence[Tensor], device: torch.device) -> None:
    """Puts these generators in states of `states`."""
    torch.default_generator.set_state(found[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(found[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(found[1])


class StepShare:
    """The tasks of a training step that one pass computes: `first` to `first + count` of `total`.

    Args:
        seed: The run's seed.
        step: The number of the step, from 0.
        first: The first task's number in the step.
        count: The number of tasks (images, for methods on batches) of this pass.
        total: The number of tasks of the step, over all processes.
        all_reduce: Sums tensors over the processes in place; None where there is one process.
        settle: Gives all processes the running averages that one would have by now; None where there is one process.
        numbers: The tasks' numbers in the step; None where these are `first` and the ones that follow it.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        first: int,
        count: int,
        total: int,
        all_reduce: AllReduce | None = None,
        settle: Callable[[], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.numbers = range(first, first + count) if numbers is None else numbers
        self.seed, self.step, self.first, self.count, self.total = seed, step, first, count, total
        self.all_reduce, self.settle = all_reduce, settle
        self.passes = 0  # of `over_tasks`, so that each draws other numbers from the global generator
        self.generators: dict[int, np.random.Generator] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Makes the draws within belong to these tasks."""
        token, inner = _share.set(self), _task.set(None)
        try:
            yield
        finally:
            _task.reset(inner)
            _share.reset(token)

    @contextmanager
    def task(self, number: int | Tensor) -> Iterator[None]:
        """Makes the draws within belong to one task; a tensor is the number under `vmap`."""
        token = _task.set(number)
        try:
            yield
        finally:
            _task.reset(token)

    def seed_global(self, number: int, device: torch.device) -> None:
        """Seeds torch's global generators for a task, so that modules which draw from them (`nn.Dropout`) do so by task."""
        seed_globals(mixed(self.seed, self.step, self.numbers[number], self.passes), device)

    def generator(self, number: int) -> np.random.Generator:
        """Returns the generator of a task. It is numpy's: the same numbers on every device, and `vmap` does not take hold of it."""
        if number not in self.generators:
            seed = mixed(self.seed, self.step, self.numbers[number])
            self.generators[number] = np.random.Generator(np.random.PCG64(seed))
        return self.generators[number]

    def draw(self, kind: Kind, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Draws random numbers by task: of one task's shape in `over_tasks`, else with the tasks along the first axis.

        Args:
            kind: Draws a float32 array of a shape from a generator.
            shape: Of the result.
            device: Where the result lies.
            dtype: Of the result.

        Raises:
            UserError: The shape is neither of one task nor of all.
        """
        number = _task.get()
        if isinstance(number, int):
            return torch.from_numpy(kind(self.generator(number), tuple(shape))).to(device, dtype)
        if number is None and (not shape or shape[0] != self.count):
            raise UserError(
                f"training: random numbers of shape {tuple(shape)} are drawn for {self.count} tasks or images; draw them in "
                "over_tasks, or with the tasks along the first axis"
            )
        each = tuple(shape) if number is not None else tuple(shape[1:])
        whole = np.stack([kind(self.generator(t), each) for t in range(self.count)])
        drawn = torch.from_numpy(whole).to(device, dtype)
        return drawn if number is None else drawn[number]


def current() -> StepShare | None:
    """Returns the share of the step that is being computed; None outside of a step."""
    return _share.get()


def inside_a_task() -> bool:
    """Whether `over_tasks` is at one of the tasks of the current share."""
    return _task.get() is not None


def rand(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws uniform random numbers in [0, 1) that belong to their tasks.

    Args:
        *shape: Of one task's tensor inside `over_tasks`; else with the tasks along the first axis.
        device: Where the result lies. The numbers are the same on every device.
        dtype: Of the result.
    """
    share = _share.get()
    return share.draw(_uniform, shape, device, dtype) if share else torch.rand(*shape, device=device).to(dtype)


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws standard normal random numbers that belong to their tasks; the arguments are those of `rand`."""
    share = _share.get()
    return share.draw(_normal, shape, device, dtype) if share else torch.randn(shape, device=device, dtype=dtype)


def _uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.asarray(generator.random(shape, np.float32))


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.asarray(generator.standard_normal(shape, np.float32))


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Drops elements as `F.dropout` does, by draws that belong to their tasks.

    Args:
        x: One task's tensor inside `over_tasks`; else with the tasks along the first axis.
        rate: The probability with which an element becomes 0; the others are divided by `1 - rate`.
        training: Whether anything is dropped.
    """
    if not training or not rate:
        return x
    if _share.get() is None:
        return F.dropout(x, rate)
    kept = rand(*x.shape, device=x.device) >= rate
    return x * kept.to(x.dtype) / (1 - rate)


@contextmanager
def of_the_step() -> Iterator[None]:
    """Seeds torch's global generator of the CPU, within, by (seed, step) alone: what is drawn is the same for all tasks."""
    share = _share.get()
    if share is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed(share.seed, share.step))
        yield


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Puts the global generators of the CPU and of `device` back afterwards, whatever is drawn within."""
    before = states(device)
    try:
        yield
    finally:
        set_states(before, device)


@contextmanager
def at_task(number: int) -> Iterator[None]:
    """Makes one task of the current share a step of its own, within, with the random numbers that belong to it."""
    share = _share.get()
    if share is None:
        yield
        return
    with StepShare(share.seed, share.step, share.numbers[number], 1, 1).entered():
        yield


def gather(x: Tensor) -> Tensor:
    """Collects every task's part of a step in every process, for methods whose loss needs all tasks at once (`whole_batch`).

    What a process goes on to compute of the result must be the same in all processes, and enter its loss as it would in one
    process. The gradients, summed over the processes with their weights, are then those of one process.

    Args:
        x: This process's tasks `[count, ...]`, floating.

    Returns:
        All tasks `[total, ...]`, in their order. Its gradient reaches the own part of each process.
    """
    share = _share.get()
    if share is None or share.all_reduce is None:
        return x
    gather: Callable[..., Tensor] = _Gather.apply
    return gather(x, share)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes of the step."""
    share = _share.get()
    if share is not None and share.all_reduce is not None:
        share.all_reduce(tensors)


def settle_averages() -> None:
    """Gives all processes of the step the running averages that one process would have by now, before they are used."""
    share = _share.get()
    if share is not None and share.settle is not None:
        share.settle()


def part() -> tuple[int, int, int]:
    """Returns the first task and the number of tasks that this process computes of the step, and the number of all its tasks.

    Outside of a step (0, 0, 0).
    """
    share = _share.get()
    return (share.first, share.count, share.total) if share else (0, 0, 0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: StepShare) -> Tensor:
        ctx.own, ctx.weight = slice(share.first, share.first + share.count), share.count / share.total
        whole = x.new_zeros(share.total, *x.shape[1:])
        whole[ctx.own] = x
        assert share.all_reduce is not None
        share.all_reduce([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # The loop weighs the loss of each process by its share of the tasks; here all have the gradient of the same loss.
        return gradient[ctx.own] / ctx.weight, None


def drawing(module: nn.Module) -> list[nn.Module]:
    """Lists the parts of a module that in training draw from torch's global generator: dropouts of torch, torchvision and timm."""

    def rate(part: nn.Module) -> float:
        if not isinstance(part, _DropoutNd) and type(part).__name__ not in DRAWING:
            return 0.0
        return float(next((getattr(part, name) for name in RATES if hasattr(part, name)), 1.0))

    return [part for part in module.modules() if rate(part)]


def snapshot(device: torch.device) -> Callable[[], Any]:
    """Notes what the next random numbers will be, to draw them again.

    Args:
        device: Whose global generator is noted beside the CPU's.

    Returns:
        A function that returns a context: within it the same numbers are drawn, and after it all is as before.
    """
    share, number = _share.get(), _task.get()
    noted = states(device)
    generators = copy.deepcopy(share.generators) if share else {}

    @contextmanager
    def again() -> Iterator[None]:
        with untouched(device):
            set_states(noted, device)
            if share is None:
                yield
                return
            parts = (share.seed, share.step, share.first, share.count, share.total, share.all_reduce)
            replay = StepShare(*parts, numbers=share.numbers)
            replay.generators = copy.deepcopy(generators)
            with replay.entered():
                token = _task.set(number)
                try:
                    yield
                finally:
                    _task.reset(token)

    return again
