"""Ranks as threads of one process, and a training step by so many of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers import hardware
from torch import Tensor, nn

from metarun.engine.distributed import World
from metarun.engine.gradients import Order, gradient_step, share_gradients

TASKS = 8


class Ranks:
    """Threads that take turns, and meet at every sum: the collectives of a `World` in one process."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, 0
        self.free = threading.Condition()
        self.parts: list[list[Tensor]] = [[] for _ in range(size)]
        self.errors: list[BaseException] = []

    @contextmanager
    def at(self, rank: int) -> Iterator[None]:
        """The turn of `rank`: no other runs, so that torch's global generator is its own."""
        with self.free:
            self.free.wait_for(lambda: self.turn == rank or self.errors)
        try:
            yield
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            self.next(rank)

    def next(self, rank: int) -> None:
        with self.free:
            self.turn = (rank + 1) % self.size
            self.free.notify_all()

    def all_reduce(self, rank: int, tensors: Sequence[Tensor]) -> None:
        self.parts[rank] = [tensor.detach().double().clone() for tensor in tensors]
        state = torch.get_rng_state()
        for arrived in (True, False):  # all have left their parts; then all have read the sums
            self.next(rank)
            with self.free:
                assert self.free.wait_for(lambda: self.turn == rank or self.errors, timeout=60)
            assert not self.errors
            if arrived:
                sums = [sum(parts[1:], parts[0]) for parts in zip(*self.parts, strict=True)]
                for tensor, total in zip(tensors, sums, strict=True):
                    tensor.detach().copy_(total)
        torch.set_rng_state(state)


@dataclass(frozen=True)
class FakeWorld(World):
    """A rank of `Ranks`."""

    ranks: Any = field(default=None)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        if self.size > 1:
            self.ranks.all_reduce(self.rank, tensors)


Step = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]  # what is logged, gradients, buffers


def step_by(
    make: Callable[[], nn.Module],
    batch_of: Callable[[int, int], Any],
    processes: int,
    task_chunk: int | None = 1,
    vectorize: bool = False,
) -> Step:
    """One training step of `TASKS` tasks by so many processes, as the loop takes it."""
    ranks, results = Ranks(processes), {}

    def carry_out(rank: int) -> None:
        with ranks.at(rank):
            trained = make().double().train()
            world = FakeWorld(rank, processes, ranks=ranks)
            own = replace(hardware(vectorize=vectorize, task_chunk=task_chunk), world=world)
            first, end = world.share(TASKS)
            weight = (end - first) / TASKS
            sums = gradient_step(trained, batch_of(first, end), 3, weight, 5, own, first)  # type: ignore[arg-type]
            values = [value for value in trained.parameters() if value.requires_grad]
            share_gradients(trained, values, sums, Order(), weight, world)  # type: ignore[arg-type]
            gradients = {name: value.grad for name, value in trained.named_parameters() if value.requires_grad}
            results[rank] = sums, gradients, dict(trained.named_buffers())

    threads = [threading.Thread(target=carry_out, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if ranks.errors:
        raise ranks.errors[0]
    return results[processes - 1]


def assert_same(one: Step, other: Step) -> None:
    for here, there in zip(one, other, strict=True):
        assert here.keys() == there.keys()
        for name in here:
            # None is no zero: an optimiser leaves a parameter without a gradient alone, and moves one of gradient 0.
            assert (here[name] is None) is (there[name] is None), name
            if here[name] is not None:
                torch.testing.assert_close(
                    here[name].double(), there[name].double(), rtol=1e-8, atol=1e-10,
                    msg=lambda text, name=name: f"{name}: {text}",
                )  # fmt: skip
