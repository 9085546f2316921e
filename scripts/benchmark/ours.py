"""Our side: metarun's own pieces, put together as a training run puts them together."""

from __future__ import annotations

import copy
import functools
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metarun.config import construct, task_of
from metarun.core import Algorithm, Episodes
from metarun.engine.distributed import World
from metarun.engine.gradients import Order, clip, gradient_step, share_gradients
from metarun.engine.hardware import choose
from metarun.engine.learner import build_optimizer
from metarun.stages.learning import build_algorithm

from .device import finish, growth
from .limit import Convolutions
from .lines import Line

EXACT_TASKS = 2  # in double precision, which is slow


def written(algorithm: Algorithm, episodes: Episodes, sums: dict[str, Tensor]) -> dict[str, Any]:
    """A loss with its gradients, the weights and the tasks that it is of."""
    named = dict(algorithm.named_parameters())
    return {
        "loss": sums["loss"].item(),
        "tasks": episodes.tensors,
        "weights": {name: value.detach().contiguous() for name, value in named.items()},
        "gradients": {name: value.grad for name, value in named.items()},
    }


def doubled(episodes: Episodes) -> Episodes:
    """The same in double precision; labels stay integers."""
    tensors = (tensor.double() if tensor.is_floating_point() else tensor for tensor in episodes.tensors)
    support_x, support_y, query_x, query_y = tensors
    return Episodes(support_x, support_y, query_x, query_y, episodes.ways)


class Ours:
    """One rank of the processes that share the tasks of a step."""

    def __init__(self, line: Line, world: World) -> None:
        config = line.config(**{"hardware.processes": world.size})
        self.line, self.config = line, config
        self.data = construct(config.data, "data")
        task = task_of(config, "train")
        self.algorithm = build_algorithm(config, self.data, task)
        if config.hardware.record is None and config.hardware.device == "cpu":
            config.hardware.record = self.algorithm.recordable  # at once, as a training does after its first steps
        hardware = choose(config.hardware, self.algorithm, world)
        hardware.place(self.algorithm).train()
        self.hardware = replace(hardware, world=world.to(hardware.device))
        self.sampler = self.data.sampler("train", task, config.seed, hardware.device)
        self.optimizer, _ = build_optimizer(self.algorithm, config.train)
        self.parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self.convolves = any(isinstance(module, torch.nn.Conv2d) for module in self.algorithm.modules())
        self.first, self.end = world.share(line.tasks)
        self.kept: Episodes | None = None
        self.steps = 0
        # Away from zero biases, unit scales and a head that knows nothing: a loss near that of chance would show little.
        torch.manual_seed(1)
        with torch.no_grad():
            for value in self.parameters:
                value += 0.02 * torch.randn(value.shape).to(value.device)

    def gradients(self, episodes: Episodes) -> dict[str, Tensor]:
        """Fills the gradients of all ranks' tasks, from this rank's `episodes`; what to log."""
        weight = (self.end - self.first) / self.line.tasks
        sums = gradient_step(self.algorithm, episodes, self.steps, weight, self.first, self.hardware)
        share_gradients(self.algorithm, self.parameters, sums, Order(), weight, self.hardware.world)
        return sums

    def step(self) -> None:
        """A step as `metarun.train.fit` takes it, but for its signals and records."""
        start = self.steps * self.line.tasks if self.line.draw != "once" else 0
        episodes = self.kept or self.sampler(start + self.first, start + self.end)
        if self.line.draw == "once":
            self.kept = episodes
        if self.line.draw != "only":
            sums = self.gradients(episodes)
            for value in sums.values():
                value.item()
            clip(self.parameters, None, None)
            self.optimizer.step()
        self.steps += 1

    def run(self, steps: int) -> float:
        """Seconds for so many steps."""
        return self._timed(self.step, steps)

    def _timed(self, work: Any, times: int) -> float:
        self.hardware.world.barrier()
        started = time.perf_counter()
        for _ in range(times):
            work()
        finish(self.hardware.device)
        self.hardware.world.barrier()
        return time.perf_counter() - started

    def check(self, path: str) -> dict[str, Any]:
        """Writes to `path` what the peer shall come to, and from what; describes the hardware.

        That is the loss of the first step, as it is measured; loss and gradients of its first tasks in double precision, in
        which the two sides differ by nothing but the order of sums; and some images of the data set.
        """
        found: dict[str, Any] = {}
        if self.line.draw != "only":
            sums = self.gradients(self.sampler(self.first, self.end))
            found[self._precision()] = written(self.algorithm, self.sampler(0, self.line.tasks), sums)
            exact, tasks = copy.deepcopy(self.algorithm).double(), doubled(self.sampler(0, EXACT_TASKS))
            plain = replace(self.hardware, autocast_dtype=None)
            found["float64"] = written(exact, tasks, gradient_step(exact, tasks, 0, 1.0, 0, plain))
        if self.line.draw != "once":  # one character's drawings, of which the peer finds its own
            stop = int(self.data.table.offsets[1])
            drawings = torch.tensor(self.data.table.images[:stop]) / 255
            found["images"] = {"character": self.data.table.names[0], "drawings": drawings}
        if self.hardware.world.main:
            torch.save(found, path)
        return self.hardware.describe()

    def _precision(self) -> str:
        precision = str(self.hardware.describe()["precision"])
        return "tf32" if self.hardware.tf32 and precision == "float32" else precision

    def convolutions(self) -> int:
        """Floating-point operations of a task's convolutions; 0 where none are learned."""
        return 0 if self.line.draw == "only" or not self.convolves else self.limit.operations

    def convolve(self, steps: int) -> float:
        """Seconds for nothing but the convolutions of so many steps."""
        return self._timed(lambda: self.limit.run(self.end - self.first), steps)

    @functools.cached_property
    def limit(self) -> Convolutions:
        """The convolutions of the line alone."""
        dtype = self.hardware.autocast_dtype or torch.float32
        return Convolutions(self.config, self.line.algo, dtype, self.hardware.device, self.end - self.first)

    def memory(self) -> int:
        """Bytes by which one step, the first of this process, raises its memory at the peak."""
        self.kept = self.sampler(self.first, self.end)
        return growth(self.step, self.hardware.device)
