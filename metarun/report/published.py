"""Published results, to be shown beside ours; they stand in `published.yaml`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]


class Published(NamedTuple):
    """A result as its paper writes it, and where."""

    value: str
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


@functools.cache
def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    return entries


def find(choices: dict[str, str], ways: int, shots: int) -> Published | None:
    """What was published for these choices of Hydra's groups and these test tasks; None where nothing is known.

    A group that an entry does not name may have any choice.
    """
    for entry in _entries():
        groups = {name: entry[name] for name in ("algo", "data", "backbone") if name in entry}
        if (entry["ways"], entry["shots"]) == (ways, shots) and groups.items() <= choices.items():
            return Published(entry["value"], entry["source"])
    return None
