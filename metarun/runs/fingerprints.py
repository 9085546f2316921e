"""Whether a run's data are those that it was made with: descriptions are kept in `data.json` and compared at each sitting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarun import files
from metarun.config import flat
from metarun.data.source import DataSource
from metarun.errors import UserError
from metarun.runs import contents
from metarun.runs.result import CHECKPOINT_DATA, CONTENT

COUNTS = re.compile(r"(sets\.[^.]+\.)?(classes|images|parts)\.|input_shape")
PARTS = re.compile(r"(sets\.[^.]+\.)?parts\.")
Descriptions = dict[str, dict[str, Any]]  # of `data`, of `target` where there is one, of `test.data.NAME`


NOT_NOTED = "an earlier version of metarun, which made it, did not note how many items are for training and for testing"
OTHERS = {"data": "data=folder data.root=...", "target": "target=folder target.data.root=..."}  # how they are named


def descriptions(
    data: DataSource, target: DataSource | None = None, tests: Mapping[str, DataSource] | None = None
) -> Descriptions:
    """Describes the data of a run.

    Args:
        data: The source.
        target: The target's data set, where the recipe has a target.
        tests: The data sets of `test.data` by name, where there are any.

    Returns:
        What `DataSource.describe` says of each, as JSON values.
    """
    found = {"data": data.describe(), **({"target": target.describe()} if target is not None else {})}
    found |= {f"test.data.{name}": each.describe() for name, each in (tests or {}).items()}
    plain: Descriptions = json.loads(json.dumps(found))
    return plain


def keep(folder: Path, found: Descriptions) -> None:
    """Keeps the descriptions of the data in a run folder, unless it has them already."""
    if not (folder / contents.DATA).is_file():
        files.save_json(folder / contents.DATA, found)


def kept(folder: Path) -> Descriptions:
    """Reads the descriptions of the data that a run was made with.

    Args:
        folder: The run folder. One of an older version has them in its result alone.

    Returns:
        The descriptions; none where the run had not yet looked at its data.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        if (folder / contents.DATA).is_file():
            found = files.parsed((folder / contents.DATA).read_text(encoding="utf-8"))
        elif (folder / contents.RESULT).is_file():
            result = files.parsed((folder / contents.RESULT).read_text(encoding="utf-8"))
            found = {"data": result.get("data", {}), "target": result.get(CONTENT, {})}
        else:
            return {}
        return {role: dict(described) for role, described in found.items() if described.get("fingerprint")}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder}: what it says of its data cannot be read ({error}); start over beside it with resume=false"
        ) from error


def differences(before: Descriptions, now: Descriptions) -> dict[str, str]:
    """Compares the data of two sittings by their fingerprints.

    Args:
        before: The descriptions of the earlier sitting.
        now: Those of the data that are there.

    Returns:
        For each of `data`, `target` and `test.data.NAME` that is described in both and differs, what differs: the numbers of classes and
        images before and now, as far as these tell the two apart; `NOT_NOTED` where the earlier description knows less than is compared.
    """
    found = {}
    for role in before.keys() & now.keys():
        if before[role]["fingerprint"] != now[role].get("fingerprint"):
            old, new = flat(before[role]), flat(now[role])
            changed = [
                f"{key} {old[key]} -> {new[key]}"
                for key in old
                if key in new and old[key] != new[key] and COUNTS.match(key)
            ]
            noted = all(key in old for key in new if PARTS.match(key))
            unclear = "as many classes and images as before, but other ones" if noted else NOT_NOTED
            found[role] = ", ".join(changed) or unclear
    return dict(sorted(found.items()))


def refuse_other_data(folder: Path, now: Descriptions) -> None:
    """Compares the data that are there with those that a run was made with.

    Args:
        folder: The run folder.
        now: The descriptions of the data that are there.

    Raises:
        UserError: They differ.
    """
    if found := differences(kept(folder), now):
        if set(found.values()) == {NOT_NOTED}:
            raise UserError(
                f"{folder}: whether its {' and its '.join(found)} are those that are there cannot be told, for {NOT_NOTED}; "
                "start over beside it with resume=false"
            )
        raise UserError(
            f"{folder} was made with other data ({'; '.join(f'{role}: {changed}' for role, changed in found.items())}); "
            "bring these back, or start over beside it with resume=false"
        )


def tested_on_others(origin: Path, now: Descriptions, overrides: list[str]) -> dict[str, Any]:
    """Compares the data of a test with those of the run whose weights are tested.

    Args:
        origin: The folder of that run.
        now: The descriptions of the data to test on.
        overrides: The words of the command line. One that names the data makes other data what the user wants.

    Returns:
        Entries of `result.json`: `checkpoint/data`, the descriptions of that run's data that differ; none where the data
        are the same.

    Raises:
        UserError: The data differ although the command line does not name them.
    """
    before = kept(origin)
    found = differences(before, now)
    keys = [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]
    for role, changed in found.items():
        prefix = role
        if not any(key == prefix or key.startswith(f"{prefix}.") or prefix.startswith(f"{key}.") for key in keys):
            told = (
                f"whether its {role} has changed since it was trained cannot be told, for {NOT_NOTED}; "
                if changed == NOT_NOTED
                else f"its {role} has changed since it was trained ({changed}); bring the data back, or "
            )
            raise UserError(
                f"checkpoint={origin}: {told}name "
                f"those to test on ({OTHERS.get(role, 'test.data=[folder] test.data.folder.root=...')}, say)"
            )
    return {CHECKPOINT_DATA: {role: before[role] for role in found}} if found else {}
