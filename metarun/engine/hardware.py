"""Device, precision, memory order and the form of the task axis, as the config's `hardware` names them."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from metarun.core import Algorithm, Episodes, largest
from metarun.engine.cuda_graph import cuda_graph
from metarun.engine.distributed import World
from metarun.engine.traced_step import TracedStep
from metarun.errors import UserError
from metarun.ops.draws import drawing, seed_globals, states
from metarun.system import platform
from metarun.text import counted

if TYPE_CHECKING:
    from metarun.engine.learner import Trainable
    from metarun.wrappers.base import Wrapper

MOST_PROCESSES = 8  # are started where `hardware.processes` is null
LONG = 20_000  # tasks of a training, for which further processes are worth the seconds that they take to start
SMALL = 160  # images of a task, up to which one thread computes it better than several do together
# So many chunks are computed plainly first. A recording of convolutions takes the time of 40 to 90, one of a small network that of 50.
RECORD_AFTER = 500
RECORD_SMALL_AFTER = 50


@dataclass(frozen=True)
class Hardware:
    """The device of this rank, and how it computes.

    Args:
        device: The device.
        autocast_dtype: The type of mixed precision; None computes in float32.
        tf32: Whether float32 products on CUDA may round to 10 bits of mantissa.
        channels_last: Whether the channels of a pixel are side by side in memory.
        vectorize: Whether tasks are computed by `vmap` instead of a loop.
        task_chunk: The tasks whose graph is held at once in training; None is all.
        threads: The threads of a CPU operation.
        traced: What takes the gradients of `backward` from a traced step, if anything does.
        world: The ranks.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast_dtype: torch.dtype | None = None
    tf32: bool = False
    channels_last: bool = False
    vectorize: bool = False
    task_chunk: int | None = 1
    threads: int = 1
    traced: TracedStep | None = None
    world: World = field(default_factory=World)

    @property
    def test_chunk(self) -> int:
        """Tasks that are evaluated together."""
        return self.task_chunk if self.task_chunk and self.vectorize else 32

    def autocast(self) -> AbstractContextManager[Any]:
        """Opens the autocast context of a forward pass; bfloat16 needs no loss scaling, which second-order methods could not use.

        It casts weights anew for every pass, since they may move inside: by the steps of a target method, or where ATS tries
        a step out. (Otherwise torch keeps the first cast of a parameter until the context ends, and would not see the steps.)
        """
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=False)

    def seed(self, number: int) -> None:
        """Seeds the global generators of the CPU and of this device by a number that is at least 0 and below 2**63."""
        seed_globals(number, self.device)

    def random_state(self) -> torch.Tensor:
        """The state of the generators that `seed` seeds, uint8 `[n]`: it changes where a number is drawn."""
        return torch.cat(states(self.device))

    def backward(
        self, algorithm: Algorithm | Wrapper, episodes: Episodes, step: int, weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradients of a loss to the parameters' `grad`.

        Args:
            algorithm: The method, or the wrapper that holds it.
            episodes: The tasks, or a batch of images.
            step: The number of the step.
            weight: The factor of the mean loss over `episodes`.

        Returns:
            The loss without the factor, detached, and the scalars to log by name.
        """
        if self.traced and (done := self.traced(algorithm, episodes, step, weight, self.autocast)):
            return done
        with self.autocast():
            loss, scalars = algorithm.loss(episodes, step)
        (loss * weight).backward()
        return loss.detach(), scalars

    def place(self, algorithm: Algorithm) -> Algorithm:
        """Moves an algorithm to the device, in the memory order and with the form of the task axis chosen here."""
        algorithm.vectorize = self.vectorize
        algorithm.to(self.device)
        if self.channels_last:
            algorithm.backbone.channels_last = True
            algorithm.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return algorithm

    def peak_memory(self) -> dict[str, int]:
        """Reads the most bytes that this process has held so far: of the host's memory where the system says it, and of a GPU's."""
        host = platform.peak_memory()
        peak = {} if host is None else {"host": host}
        if self.device.type == "cuda":
            peak["cuda"] = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "mps":
            peak["mps"] = torch.mps.driver_allocated_memory()  # of now: torch keeps no peak here
        return peak

    def describe(self) -> dict[str, Any]:
        """Gives JSON values for `result.json`."""
        return {
            "device": self.device.type,
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "precision": str(self.autocast_dtype).removeprefix("torch.") if self.autocast_dtype else "float32",
            "tf32": self.tf32,
            "channels_last": self.channels_last,
            "processes": self.world.size,
            "threads": self.threads,
            "vectorize": self.vectorize,
            "record": self.traced is not None and self.traced.in_use,
        }

    def __str__(self) -> str:
        described = self.describe()
        tasks = "by vmap" if self.vectorize else "in a loop"
        device = f"{described['gpu'] or described['device']}, {described['precision']}{', TF32' if self.tf32 else ''}"
        processes = f"{counted(self.world.size, 'process', 'processes')} of {counted(self.threads, 'thread')}"
        return f"{device}, {processes}, tasks {tasks}"


def worthwhile_processes(learner: Trainable) -> int:
    """Chooses how many processes share the training of a learner, where `hardware.processes` is null.

    On a CPU the operations of a small task are too short for several threads, so that processes of one thread each take less
    time for the tasks of a step. They change no number beyond the order of sums.

    Args:
        learner: What is trained, prepared for one process.

    Returns:
        One a thread for a long training on small tasks of convolutions, at most 8; 1 for all else.
    """
    hardware, algorithm, task = learner.hardware, learner.algorithm, learner.task
    if task is None or algorithm.whole_batch or hardware.device.type != "cpu" or hardware.vectorize:
        return 1
    tasks: int = learner.settings.tasks_per_step
    images = largest(task.ways) * (largest(task.shots) + largest(task.queries))
    if not _convolves(algorithm) or images > SMALL or learner.settings.steps * tasks < LONG:
        return 1
    return min(hardware.threads, tasks, MOST_PROCESSES)


def _convolves(algorithm: Algorithm) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in algorithm.modules())


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next use, instead of giving large blocks back and fetching zeroed pages anew.

    Every layer frees and takes some megabytes, which on CPUs costs nearly as much time as the arithmetic. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the largest that is allowed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Computes as a new process does (`torchs_own_settings`), and puts back what a run sets: generators, threads, precision, TF32."""
    threads, products, convolutions = torch.get_num_threads(), torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = None
    # They cannot be read where the caller has set torch's `fp32_precision` instead.
    with contextlib.suppress(RuntimeError):
        allowed = products.allow_tf32, convolutions.allow_tf32, torch.get_float32_matmul_precision()
    # A process that has not used CUDA yet is not made to.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), torchs_own_settings():
            yield
    finally:
        torch.set_num_threads(threads)
        if allowed is not None:
            products.allow_tf32, convolutions.allow_tf32, precision = allowed
            torch.set_float32_matmul_precision(precision)  # of "medium", TF32 alone would make "high"


@contextlib.contextmanager
def torchs_own_settings() -> Iterator[None]:
    """Computes as a new process does, whatever the caller has set: float32, on the CPU, with gradients, without autocast.

    So a notebook's `torch.set_default_dtype`, `torch.set_grad_enabled(False)` or `np.seterr` changes no number. Afterwards they are as
    they were.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield


def allow_tf32(allowed: bool) -> None:
    """Lets CUDA devices take TF32 for float32 or not, in convolutions and matrix products alike.

    torch's own default is TF32 in convolutions and float32 in matrix products; here both are the same.

    Args:
        allowed: Whether they may.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def check_device(device: str) -> None:
    """Checks that a device is there, before anything is built.

    Args:
        device: The config's `hardware.device`.

    Raises:
        UserError: The device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: torch finds no CUDA device here; use hardware=cpu or hardware=auto")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("hardware.device=mps: torch finds no Apple GPU here; use hardware=cpu or hardware=auto")


def choose(settings: Any, algorithm: Algorithm, world: World, wrapper: Wrapper | None = None) -> Hardware:
    """Chooses the hardware of this rank, and sets this process up for it (`set_up_process`).

    Args:
        settings: The config's `hardware` node.
        algorithm: The method that is to be computed.
        world: The ranks.
        wrapper: What holds the method in training, if anything does.

    Raises:
        UserError: There is no such device, there are not enough of them, or the settings do not go with the method.
    """
    check_device(settings.device)
    device = _choose_device(settings, world)
    set_up_process(settings, world, device)
    convolves = _convolves(algorithm)
    vectorize = _choose_vectorize(settings.vectorize, algorithm, device, convolves)
    task_chunk = settings.task_chunk
    if task_chunk is None and not vectorize:
        task_chunk = 1
    dtype = torch.bfloat16 if settings.autocast else None
    # On a CPU it saves a third to a half of the time; vmap folds the task axis into the channels, where it is in the way.
    channels_last = settings.channels_last
    if channels_last is None:
        channels_last = device.type == "cpu" and convolves and not vectorize
    threads = torch.get_num_threads()
    traced = _traced(settings, wrapper or algorithm, device, convolves)
    return Hardware(device, dtype, settings.tf32, channels_last, vectorize, task_chunk, threads, traced, world)


def _choose_device(settings: Any, world: World) -> torch.device:
    """Chooses the device of this rank, of which each has a CUDA device of its own."""
    device = torch.device("mps" if settings.device == "mps" else "cpu")
    if settings.device in ("auto", "cuda") and torch.cuda.is_available():
        if world.local_size > (count := torch.cuda.device_count()):
            raise UserError(
                f"hardware.processes={world.local_size} on this machine: each takes a CUDA device of its own, and there are "
                f"{count}; use hardware.processes={count}, or hardware=cpu"
            )
        device = torch.device("cuda", world.local_rank)
    if device.type == "mps" and (settings.autocast or world.local_size > 1):
        wrong = "autocast" if settings.autocast else "processes"
        raise UserError(
            f"hardware.{wrong}={settings[wrong]}: Apple's GPU computes here in float32, for one process; leave it at its default"
        )
    if settings.tf32 and device.type != "cuda":
        raise UserError(
            f"hardware.tf32=true: only CUDA devices have TF32, and this run is on the {device.type.upper()}; leave it at false"
        )
    return device


def set_up_process(settings: Any, world: World, device: torch.device) -> None:
    """Sets what holds for all that this process computes: its CUDA device, TF32, the memory that it keeps, its threads.

    Args:
        settings: The config's `hardware` node.
        world: The ranks; those of one machine share its cores out.
        device: The device of this rank.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    allow_tf32(settings.tf32)
    keep_freed_memory()
    threads = settings.threads
    if threads is None and world.local_size > 1:
        threads = max(1, len(platform.cores()) // world.local_size)
    elif threads is None and platform.quota():
        # Torch does not know it, and takes a thread for every core that it sees.
        threads = min(torch.get_num_threads(), len(platform.cores()))
    if threads:
        torch.set_num_threads(threads)


def _choose_vectorize(wanted: bool | None, algorithm: Algorithm, device: torch.device, convolves: bool) -> bool:
    """Whether tasks are computed by vmap; raises `UserError` where that is wanted and cannot be."""
    reason = _against_vmap(algorithm)
    if wanted and reason:
        raise UserError(f"hardware.vectorize=true: {reason}; leave it at null, or set it false")
    if wanted is not None:
        return wanted
    # On a CPU vmap is slower than a loop for convolutions and many times faster for small MLPs.
    return (device.type == "cuda" or not convolves) and algorithm.backbone.norm != "running" and reason is None


def _against_vmap(algorithm: Algorithm) -> str | None:
    """Says why the tasks of a method cannot be computed by vmap; None where they can."""
    for module in (algorithm, algorithm.backbone):
        if not module.vectorizable:
            return f"{type(module).__module__}.{type(module).__name__} takes its tasks one by one"
    if drops := drawing(algorithm):
        return (
            f"{type(drops[0]).__name__} draws from torch's global generator, which by vmap does not do so task by task"
        )
    # A method on batches puts the images of many tasks through the network at once, as those of one batch.
    if algorithm.backbone.norm == "running" and algorithm.trains_on != "batches":
        return "the averages of backbone.norm=running are one state for all tasks, which vmap cannot keep"
    inner = algorithm.inner
    if inner is not None and inner.recompute and not inner.first_order:
        return "algo.recompute=true makes the graphs of inner steps anew task by task"
    return None


def _traced(settings: Any, algorithm: Algorithm | Wrapper, device: torch.device, convolves: bool) -> TracedStep | None:
    """Makes a traced step where `hardware.record` asks for one; if it is null, on a CPU wherever that changes no number.

    A step is recorded when a run has taken so many that a recording is worth its seconds (the table is in this room's README);
    at once where it is asked for.
    """
    draws = any(getattr(module, "draws", False) for module in algorithm.modules()) or drawing(algorithm)
    reason = None
    if not algorithm.recordable:
        reason = "its operations change from step to step"
    elif draws:
        reason = "its network draws random numbers"
    if settings.record and reason:
        raise UserError(
            f"hardware.record=true: {type(algorithm).__name__} cannot be recorded, since {reason}; leave it at null"
        )
    if reason or not (device.type == "cpu" if settings.record is None else settings.record):
        return None
    small = not convolves and next(algorithm.buffers(), None) is None
    patience = 0 if settings.record else RECORD_SMALL_AFTER if small else RECORD_AFTER
    return TracedStep(cuda_graph if device.type == "cuda" else None, patience)
