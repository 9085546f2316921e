"""How far a piece of work raises the memory of this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

SELF = Path("/proc/self")  # Linux; `getrusage` there has the peak of the process that started this one, too


def growth(work: Callable[[], object]) -> int:
    """Bytes between what is resident before `work` and the peak while it runs."""
    before = _resident("VmRSS")
    (SELF / "clear_refs").write_text("5")  # the peak begins anew
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (SELF / "status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024
