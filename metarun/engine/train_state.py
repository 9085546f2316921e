"""How far a training has come, and the seconds of its steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from metarun import files
from metarun.errors import UserError


@dataclass
class TrainState:
    """How far a training has come: what a checkpoint holds besides the weights, the optimiser and the schedule.

    Attributes:
        step: Steps taken.
        seconds: Seconds of training after the last step, validations included, over all sittings.
        best_score: The best validation score so far.
        best_step: The step of the best score.
        validated: The step of the last validation, -1 before the first.
        worse: Validations since the best one.
        sums: Sums of what the steps since the last line of the log returned.
        summed: The number of these steps.
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    best_step: int = 0
    validated: int = -1
    worse: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0

    @classmethod
    def restored(cls, saved: dict[str, Any], path: Path) -> TrainState:
        """Reads the state that a checkpoint holds.

        Args:
            saved: The entry `state` of the checkpoint.
            path: The checkpoint's file, for the message of an error.

        Raises:
            UserError: The checkpoint was written by another version of metarun, which kept other things.
        """
        known = {item.name for item in fields(cls)}
        if saved.keys() != known:
            other = sorted(saved.keys() ^ known)[0]
            raise UserError(
                f"checkpoint {path}: was written by another version of metarun (state.{other}); start over beside it with "
                "resume=false"
            )
        return cls(**saved)


class Clock:
    """The seconds of training after each step.

    Where a budget of seconds decides on the learning rate and on the end of a training, a step's outcome depends on its
    second. A record then keeps the second of every step, and a step that is taken again after a kill gets the same one.
    """

    def __init__(self, state: TrainState, record: Path | None) -> None:
        """Starts to count at the step and the second of `state`.

        Args:
            state: Where the training goes on.
            record: The file of the record, `step seconds` a line; None keeps none.
        """
        self.record = record
        self._known: dict[int, float] = {}
        if record is not None:
            self._known = dict(self._read(record))
            lines = [f"{step} {seconds!r}\n" for step, seconds in self._known.items()]
            files.save_bytes(record, "".join(lines).encode())  # without a line that a kill cut off
        self._base, self._since = state.seconds, time.perf_counter()

    @staticmethod
    def _read(record: Path) -> Iterator[tuple[int, float]]:
        text = record.read_text(encoding="utf-8", errors="replace") if record.is_file() else ""
        for line in text.splitlines(keepends=True):
            with contextlib.suppress(
                ValueError
            ):  # a line that a kill cut off, or that a power failure filled with zeros
                step, seconds = line.split()
                if line.endswith("\n") and math.isfinite(float(seconds)):
                    yield int(step), float(seconds)

    def after(self, step: int) -> float:
        """Counts the seconds of training at the end of `step` steps, of which this is the last one."""
        # Time does not run backwards: a second below that of the step before is damage, and is counted anew.
        if (known := self._known.get(step)) is not None and known >= self._base:
            self._base, self._since = known, time.perf_counter()
            return known
        seconds = self._base + time.perf_counter() - self._since
        if self.record is not None:
            with open(self.record, "a", encoding="utf-8") as file:
                file.write(f"{step} {seconds!r}\n")
        return seconds
