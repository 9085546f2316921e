"""Processes that share the tasks of a step: one rank each, equal weights, and sums over all of them.

A launcher starts all ranks of a run with the same command and says by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT who is who: `torchrun`, a batch script, or, for `hardware.processes=N` on one machine, rank 0 itself. Rank 0
decides, reads and writes checkpoints, and prints. The others do the same run on their share of the tasks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from metarun.errors import UserError
from metarun.system.launched import by_launcher, number, rank_and_size
from metarun.system.platform import LIBUV, in_own_session, signal_name

CHILD = "METARUN_CHILD"  # set in a process that rank 0 itself started, and that must end with it
START_TIMEOUT = timedelta(minutes=3)  # within which all ranks must have started
# How long a rank waits for the others, of whom one may learn a target or wait for another run while the rest have nothing to do.
# That one of them has ended is seen at once, since its connections close.
PEER_TIMEOUT = timedelta(days=14)
# Bounds a message on a device, before which all ranks have said that they are there.
DEVICE_TIMEOUT = timedelta(minutes=30)
BLAME_SECONDS = 3.0  # the rank that ended a run early is looked for as long

T = TypeVar("T")
_numbers = itertools.count()  # number the process groups of this process: one launcher may carry out several runs


class PeerLost(UserError):
    """Another rank ended early, or never came."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen by one of them. In a world of one all methods return at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    local_size: int = 1
    launched: bool = False  # by a launcher; else rank 0 starts the others when it has found nothing wrong
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where messages between ranks lie
    group: Any = None  # of `device`, where it is no CPU
    store: Any = None  # what ranks tell each other while they meet, and when they fail
    blame: Callable[[], str] = lambda: ""  # which rank ended early, where it can be known

    @property
    def main(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """Computes the part of this rank.

        Args:
            count: How many things the ranks share.

        Returns:
            The start and the stop of this rank's part.
        """
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, in one message of float64.

        Args:
            tensors: Tensors of any device and floating type, of the same shapes in all ranks; changed in place.

        Raises:
            PeerLost: Another rank is gone.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device, torch.float64) for tensor in tensors])
        with self._together():
            if self.group is not None:
                # NCCL would wait for a rank that is gone, gloo does not: ask whether all are here.
                torch.distributed.all_reduce(torch.zeros(1))
            torch.distributed.all_reduce(flat, group=self.group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            with self._together():
                torch.distributed.all_reduce(torch.zeros(1))

    def broadcast(self, value: T) -> T:
        """Sends a value from rank 0 to all ranks.

        Args:
            value: What rank 0 sends, tensors on the CPU; other ranks may give anything of the type.

        Returns:
            Rank 0's value.

        Raises:
            PeerLost: Another rank is gone.
        """
        if self.size == 1:
            return value
        message = [value]
        with self._together():
            torch.distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        return message[0]

    def to(self, device: torch.device) -> World:
        """Returns this world with messages that lie on a device. Every rank calls it.

        Args:
            device: The device, of one type in all ranks.

        Raises:
            UserError: Some ranks have a CUDA device and others have none.
        """
        if self.size == 1:
            return self
        count = torch.tensor([float(device.type == "cuda")])
        self.all_reduce([count])
        if 0 < count < self.size:
            raise UserError(
                f"hardware.device: {int(count)} of the {self.size} processes found a CUDA device; use hardware=cpu, or as many "
                "processes as devices on each machine"
            )
        if device.type != "cuda":
            return self
        return replace(self, device=device, group=torch.distributed.new_group(backend="nccl", timeout=DEVICE_TIMEOUT))

    def report_failure(self, message: str) -> None:
        """Tells rank 0, which does not meet the same error, why this rank ends.

        Args:
            message: The reason, one line.
        """
        with contextlib.suppress(RuntimeError):  # rank 0 may be gone
            self.store.set(f"failed {self.rank}", message)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Opens a context for what all ranks do; raises `PeerLost` if one of them does not."""
        try:
            yield
        except RuntimeError as error:
            which = self.blame() or (
                f"one of the {self.size} processes ended early"
                if not self.launched
                else f"another of the {self.size} processes ended early; its launcher names it"
            )
            raise PeerLost(f"hardware.processes: {which}; the same command goes on") from error


def place(processes: int | None) -> World:
    """Finds this process's place among the ranks of its run.

    Args:
        processes: The config's `hardware.processes`, at least 1; None is as many as a launcher has, or 1.

    Returns:
        The world of the launcher that started this process; without one, rank 0 of `processes`.

    Raises:
        UserError: The launcher has another number of processes.
    """
    if not by_launcher():
        return World(0, processes or 1, 0, processes or 1)
    rank, size = rank_and_size()
    if processes not in (None, 1, size):
        raise UserError(
            f"hardware.processes={processes}: this command was launched as one of {size} (WORLD_SIZE); "
            "leave hardware.processes out"
        )
    local_rank = number("LOCAL_RANK", rank)
    return World(rank, size, local_rank, number("LOCAL_WORLD_SIZE", size), launched=size > 1)


@contextmanager
def process_group(world: World, command: Sequence[str] = ()) -> Iterator[World]:
    """Connects the ranks. At the end no rank that was started here is left.

    Args:
        world: The world of `place`.
        command: The command by which rank 0 starts the others, where no launcher does.

    Yields:
        The world, in which the ranks can send messages.

    Raises:
        PeerLost: A rank does not come.
    """
    if world.size == 1 or world.store is not None:
        yield world
        return
    children: list[subprocess.Popen[bytes]] = []
    try:
        if world.launched:
            if CHILD in os.environ:
                threading.Thread(target=_end_with_rank_0, daemon=True).start()
            base = _launchers_store()
        else:
            base = torch.distributed.TCPStore(
                "127.0.0.1", 0, world.size, is_master=True, wait_for_workers=False, use_libuv=LIBUV
            )
            children = [_start(command, number, world.size, base.port) for number in range(1, world.size)]
        store = torch.distributed.PrefixStore(f"metarun {next(_numbers) if world.launched else 0}", base)
        joined = replace(world, store=store, blame=functools.partial(_blame, store, world.size, children))
        _meet(joined, children)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=world.rank, world_size=world.size, timeout=PEER_TIMEOUT
        )
        joined.barrier()  # so that none leaves before all are here
        yield joined
    finally:
        if sys.exc_info()[0] is not None:
            for child in children:
                child.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for child in children:
            child.communicate()


def _start(command: Sequence[str], number: int, size: int, port: int) -> subprocess.Popen[bytes]:
    """Starts rank `number` on this machine, as a launcher would."""
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    environment = {**os.environ, **{name: str(value) for name, value in ranks.items()}, CHILD: "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "USE_LIBUV": str(int(LIBUV))}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}  # in this order
    # A session of its own: the terminal's ctrl-C is for rank 0, which tells the others.
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, **in_own_session())


@functools.cache  # a second server on its port would not find all ranks gone from the first
def _launchers_store() -> Any:
    """Opens the store in which the ranks of a launcher meet: its own server, or one that rank 0 keeps while it lives."""
    try:
        return next(torch.distributed.rendezvous("env://", timeout=START_TIMEOUT))[0]
    except (RuntimeError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        raise PeerLost(f"{where}: the processes cannot meet there ({str(error).splitlines()[0]})") from error


def _meet(world: World, children: list[subprocess.Popen[bytes]]) -> None:
    """Returns when all ranks are there; raises `PeerLost` as soon as a child has ended, or after `START_TIMEOUT`."""
    world.store.set(f"here {world.rank}", "")
    names = [f"here {rank}" for rank in range(world.size)]
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while not world.store.check(names):
        if any(child.poll() is not None for child in children):
            raise PeerLost(f"hardware.processes: {world.blame()}; the same command goes on")
        if time.monotonic() > deadline:
            raise PeerLost(f"hardware.processes: the {world.size} processes did not meet within {START_TIMEOUT}")
        time.sleep(0.02)


def _blame(store: Any, size: int, children: list[subprocess.Popen[bytes]]) -> str:
    """Says which rank ended early and how, by its own report or by its exit status if it is a child; empty if that is not known."""
    deadline = time.monotonic() + (BLAME_SECONDS if children else 0)
    while True:
        for rank in range(1, size):
            with contextlib.suppress(RuntimeError):  # the store may have gone with its process
                if store.check([f"failed {rank}"]):
                    return f"rank {rank} of {size} ended early ({store.get(f'failed {rank}').decode()})"
        codes = {rank: code for rank, child in enumerate(children, 1) if (code := child.poll()) is not None}
        # A rank that exited by itself may have done so because another was killed, so the search for that one goes on a while.
        last = time.monotonic() >= deadline
        for rank, code in codes.items():
            if code or last:
                how = f"killed by {signal_name(-code)}" if code < 0 else f"exit status {code}"
                how += "; its message stands above" if code > 0 else ""  # one that lost the others says nothing
                return f"rank {rank} of {size} ended early ({how})"
        if last:
            return ""
        time.sleep(0.02)


def _end_with_rank_0() -> None:
    """Ends this process when rank 0, which holds the other end of its input, is gone: killed, perhaps, before they joined."""
    while os.read(0, 1):
        pass
    os._exit(1)
