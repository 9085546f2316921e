"""Processes that share the tasks of a step: one rank each, equal weights, and sums over all of them.

`hardware.processes=N` starts N - 1 further processes of the same command on this machine. Rank 0 is the process that the
user started: it decides, writes and prints. The others do the same run on their share of the tasks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from metarun.errors import UserError

FOLDER = "METARUN_RUN_FOLDER"  # tells a further process which run it belongs to
RANK, PORT = "METARUN_RANK", "METARUN_PORT"  # its number, and where rank 0 listens on this machine
MEETING = timedelta(minutes=3)  # within which all ranks must have loaded their data and built their models
PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others, who may be testing


@dataclass(frozen=True)
class World:
    """The processes of a run. A world of one needs no communication, and all of its methods return at once."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """The start and stop of this rank's part of `count` things."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError as error:
            raise UserError(
                f"hardware.processes: one of the {self.size} processes ended early; its message stands above; the same command goes on"
            ) from error
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.sum([torch.zeros(1)])


def is_further_process() -> Path | None:
    """The run folder, in a process that `starting` started; None in the user's own."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


@contextmanager
def starting(processes: int, command: Sequence[str], folder: Path) -> Iterator[World]:
    """The world of this process. In the user's own process, starts the further ones and ends them with the block."""
    if processes == 1:
        yield World()
        return
    children: list[subprocess.Popen[bytes]] = []
    further = is_further_process() is not None
    rank, port = (int(os.environ[RANK]), int(os.environ[PORT])) if further else (0, 0)
    store = torch.distributed.TCPStore("127.0.0.1", port, processes, is_master=not further, wait_for_workers=False)
    try:
        if further:
            threading.Thread(target=_end_with_rank_0, daemon=True).start()
        environment = {**os.environ, FOLDER: str(folder), PORT: str(store.port)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        for number in range(1, processes) if not further else ():
            environment[RANK] = str(number)
            # A session of its own: the terminal's ctrl-C is for rank 0, which tells the others.
            children.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True))
        store.set(str(rank), "here")
        try:
            store.wait([str(number) for number in range(processes)], MEETING)
        except RuntimeError as error:
            raise UserError(
                f"hardware.processes: the {processes} processes did not meet within {MEETING}; what kept them stands above"
            ) from error
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=PATIENCE)
        yield World(rank, processes)
        torch.distributed.destroy_process_group()
    finally:
        for child in children:
            if sys.exc_info()[0] is not None:
                child.kill()
            child.communicate()


def _end_with_rank_0() -> None:
    """Ends this process when rank 0, which holds the other end of its input, is gone: killed, perhaps, before they met."""
    while os.read(0, 1):
        pass
    os._exit(1)
