"""Running averages of batch norms that several processes keep as one process would that computes all tasks of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metarun.ops.batch_norm import MOMENTUM, Norm
from metarun.ops.draws import AllReduce, current


class RunningAverages:
    """The running averages of a network, between two moments at which all processes have the same ones.

    Each batch in training mode moves an average by `r <- (1 - m) r + m s`, with s a statistic of the batch and m the momentum.
    n batches make `r <- (1 - m)^n r + b` of it, with b of their statistics alone. The tasks of a step lie in the order of the
    ranks, so one process would take the n_0 batches of rank 0 first, then those of rank 1, and so on:

        r <- (1 - m)^(n_0 + n_1 + ...) r + sum_i (1 - m)^(n_i+1 + n_i+2 + ...) b_i

    Args:
        module: What holds the norms: those of the kind `running`, and torch's batch norms with a momentum.
        rank: The number of this process.
        size: The number of processes.
        all_reduce: Sums tensors over the processes in place.
    """

    def __init__(self, module: nn.Module, rank: int, size: int, all_reduce: AllReduce) -> None:
        self.rank, self.size, self.all_reduce = rank, size, all_reduce
        self.norms = [part for part in module.modules() if _momentum(part)]
        self._start()

    def _start(self) -> None:
        self.before = [[average.clone() for average in _averages(norm)] for norm in self.norms]
        self.counts = [int(_batches(norm)) for norm in self.norms]

    @torch.no_grad()
    def settle(self) -> None:
        """Gives all processes the averages of one, of all batches since the last time. Every process calls it."""
        if self.size == 1 or not self.norms:
            return
        taken = torch.zeros(self.size, len(self.norms), dtype=torch.float64)
        taken[self.rank] = torch.tensor(
            [int(_batches(norm)) - n for norm, n in zip(self.norms, self.counts, strict=True)]
        )
        self.all_reduce([taken])
        own, later, whole = (part.tolist() for part in (taken[self.rank], taken[self.rank + 1 :].sum(0), taken.sum(0)))
        parts: list[Tensor] = []
        for norm, before, n, after in zip(self.norms, self.before, own, later, strict=True):
            kept = 1 - _momentum(norm)
            for average, start in zip(_averages(norm), before, strict=True):
                parts.append((average.double() - kept**n * start.double()) * kept**after)
        self.all_reduce(parts)
        found = iter(parts)
        for norm, before, count, n in zip(self.norms, self.before, self.counts, whole, strict=True):
            for average, start in zip(_averages(norm), before, strict=True):
                average.copy_((1 - _momentum(norm)) ** n * start.double() + next(found))
            _batches(norm).fill_(count + round(n))
        self._start()


class AveragesBefore:
    """The running averages of a network as they were when a step began, whatever tasks of it have moved them since.

    What a task of the step is made of then depends neither on the tasks before it nor on the process that computes it. Outside of
    a step they are those of now.

    Args:
        module: What holds the norms.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if _momentum(part)]
        self.step: int | None = None
        self.before: list[Tensor] = []

    def _now(self) -> list[Tensor]:
        return [average.clone() for norm in self.norms for average in _averages(norm)]

    def _put(self, values: list[Tensor]) -> None:
        averages = [average for norm in self.norms for average in _averages(norm)]
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the network these averages within, where it does not move them. The first call of a step comes before any of its losses."""
        share = current()
        step = share.step if share else None
        now = self._now()
        if step is None or step != self.step:
            self.step, self.before = step, now
        self._put(self.before)
        try:
            yield
        finally:
            self._put(now)


def keeps_averages(module: nn.Module) -> bool:
    """Whether a module holds norms that keep running averages, which go by the order of the batches."""
    return any(_momentum(part) for part in module.modules())


def _momentum(module: nn.Module) -> float:
    """The weight of the newest batch in the averages of a norm; 0 for a module that keeps none."""
    if isinstance(module, Norm):
        return MOMENTUM if module.kind == "running" else 0.0
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        return module.momentum or 0.0
    return 0.0


def _averages(norm: nn.Module) -> list[Tensor]:
    return [norm.get_buffer("running_mean"), norm.get_buffer("running_var")]


def _batches(norm: nn.Module) -> Tensor:
    """How many batches have moved the averages of a norm, int64. A copy of the norm may share it."""
    return norm.get_buffer("num_batches_tracked")
