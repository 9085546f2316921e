"""What differs between a CPU and a GPU where work is measured: when it has ended, and the memory that it took."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

SELF = Path("/proc/self")  # Linux; `getrusage` there has the peak of the process that started this one, too


def finish(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def growth(work: Callable[[], object], device: torch.device) -> int:
    """Bytes between what is taken before `work` and the peak while it runs.

    Of a CPU's work that is this process's resident memory, of a GPU's the tensors on it, without what torch keeps in reserve.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident("VmRSS")
    (SELF / "clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (SELF / "status").read_text(encoding="utf-8"), re.M)
    assert found
    return int(found[1]) * 1024
