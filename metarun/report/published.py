"""Published results, to be shown beside ours; they stand in `published.yaml`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]


class Published(NamedTuple):
    """A result as its paper writes it, and where; without a value, what the paper has instead."""

    value: str | None
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})" if self.value else f"none: {self.source}"


@functools.cache
def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    )
    return entries


def find(choices: dict[str, str], ways: int, shots: int) -> Published | None:
    """Looks up what was published for a run.

    Args:
        choices: The run's choices of Hydra's groups.
        ways: Classes of a test task.
        shots: Support examples of a class.

    Returns:
        The first entry that fits; None where nothing was collected. A key that an entry does not name may have any value.
    """
    facts = {**choices, "ways": ways, "shots": shots}
    for entry in _entries():
        wanted = {key: value for key, value in entry.items() if key not in ("value", "source")}
        if choices.get("unsupervised") and "unsupervised" not in wanted:  # a number with labels is of another task
            continue
        if wanted.items() <= facts.items():
            return Published(entry["value"], entry["source"])
    return None
