"""Device, precision and the form of the task axis, as the config's `hardware` names them."""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metarun.errors import UserError

log = logging.getLogger("metarun")


@dataclass(frozen=True)
class Hardware:
    """What the run computes on."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    vectorize: bool
    task_chunk: int | None  # tasks whose graph is held at once in training; None: all
    threads: int

    @property
    def test_chunk(self) -> int:
        """Tasks that are evaluated together."""
        return self.task_chunk if self.task_chunk and self.vectorize else 32

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of a forward pass; bfloat16 needs no loss scaling, which second-order methods could not use."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def describe(self) -> dict[str, Any]:
        """JSON values for `result.json`."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        precision = str(self.autocast_dtype).removeprefix("torch.") if self.autocast_dtype else "float32"
        return {
            "device": self.device.type,
            "gpu": gpu,
            "precision": precision,
            "threads": self.threads,
            "vectorize": self.vectorize,
        }


def choose(
    device: str,
    autocast: str | None,
    threads: int | None,
    vectorize: bool | None,
    task_chunk: int | None,
    model: nn.Module,
) -> Hardware:
    """The hardware of the config's `hardware` node for `model`. Raises `UserError` where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: torch finds no CUDA device here; use hardware=cpu or hardware=auto")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if threads:
        torch.set_num_threads(threads)
    if vectorize is None:
        # On a CPU vmap is slower than a loop for convolutions and many times faster for small MLPs.
        vectorize = chosen.type == "cuda" or not any(isinstance(module, nn.Conv2d) for module in model.modules())
    if task_chunk is None and not vectorize:
        task_chunk = 1
    hardware = Hardware(chosen, torch.bfloat16 if autocast else None, vectorize, task_chunk, torch.get_num_threads())
    shown = hardware.describe()
    log.info(
        "hardware: %s, %s, %d threads, tasks %s", shown["gpu"] or shown["device"], shown["precision"], shown["threads"],
        "by vmap" if vectorize else "in a loop",
    )  # fmt: skip
    return hardware
