"""Processes that share the tasks of a step: one rank each, equal weights, and sums over all of them.

`hardware.processes=N` starts N - 1 further processes of the same command on this machine. Rank 0 is the process that the
user started: it decides, writes and prints. The others do the same run on their share of the tasks.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from metarun.errors import UserError

FOLDER = "METARUN_RUN_FOLDER"  # tells a further process which run it belongs to
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
    if is_further_process() is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes), RANK="0")
        environment = {**os.environ, FOLDER: str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for rank in range(1, processes):
            # A session of its own: the terminal's ctrl-C is for rank 0, which tells the others.
            children.append(subprocess.Popen(command, env={**environment, "RANK": str(rank)}, start_new_session=True))
    rank = int(os.environ["RANK"])
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=processes, timeout=PATIENCE)
        yield World(rank, processes)
        torch.distributed.destroy_process_group()
    finally:
        for child in children:
            if sys.exc_info()[0] is not None:
                child.kill()
            child.wait()
