"""Published results, to be shown beside ours; they stand in `published.yaml`."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from metarun.config.folder import CONF
from metarun.config.task_schema import SIZES


class Published(NamedTuple):
    """A result as its paper writes it, and where; without a value, what the paper has instead."""

    value: str | None
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})" if self.value else f"none: {self.source}"


@functools.cache
def cited(algo: str) -> str:
    """A method's name and paper, `MAML (Finn et al. 2017)`, as the file of the choice begins; the choice itself where it has none."""
    path = CONF / "algo" / f"{algo}.yaml"
    told = path.read_text(encoding="utf-8") if re.fullmatch(r"[\w/]+", algo) and path.is_file() else ""
    found = re.search(r"^# ([^@(:;]+ \([^()]+ \d{4})(, [^()]*)?\)", told, re.MULTILINE)
    return f"{found[1]})" if found else algo


@functools.cache
def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    )
    return entries


def find(choices: dict[str, str], task: Mapping[str, Any]) -> Published | None:
    """Looks up what was published for a run.

    Args:
        choices: The run's choices of Hydra's groups.
        task: The test tasks as `result.json` describes them: `ways`, `shots`, and what else is not as usual.

    Returns:
        The first entry that fits; None where nothing was collected. A choice that an entry does not name may be any, but its
        tasks are those that it names, and else the usual ones: numbers of labelled items, the same in all tasks.
    """
    more = {name: value for name, value in task.items() if name not in SIZES}
    facts = {**choices, "ways": task["ways"], "shots": task["shots"]}
    for entry in _entries():
        tasks = entry.get("task", {})
        wanted = {key: value for key, value in entry.items() if key not in ("value", "source", "task")}
        # A number with labels is of another task, one of the method alone of another method.
        if any(choices.get(group) and group not in wanted for group in ("unsupervised", "wrapper")):
            continue
        if tasks == more and all(key in facts and facts[key] == value for key, value in wanted.items()):
            return Published(entry["value"], entry["source"])
    return None
