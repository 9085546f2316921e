"""Whether a run's data, and the weights that it begins with, are those that it was made with.

Descriptions are kept in `data.json` and compared at each sitting.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun import files
from metarun.config import flat
from metarun.data.source import DataSource
from metarun.engine import checkpoint
from metarun.errors import MadeOtherwise, UserError
from metarun.runs import contents
from metarun.runs.result import CHECKPOINT_DATA, CONTENT
from metarun.text import shown_path

COUNTS = re.compile(r"(sets\.[^.]+\.)?(classes|images|parts)\.|input_shape")
NAMES = re.compile(r"(sets\.[^.]+\.)?class_names")  # digests of the names of all classes
PARTS = re.compile(r"(sets\.[^.]+\.)?parts\.")
# Of `data`, of `target` where there is one, of `test.data.NAME`, and of what a setting names weights by.
Descriptions = dict[str, dict[str, Any]]

AFRESH = "start over beside it with resume=false"
NOT_NOTED = "an earlier version of metarun, which made it, did not note how many items are for training and for testing"
OTHER_WEIGHTS = "the file has changed"
EMBEDDING = "unsupervised.embedding"  # by which tasks are made up; the description of the data tells of it
OTHERS = {  # how they are named
    "data": "data=folder data.root=...",
    "target": "target=folder target.data.root=...",
    EMBEDDING: "unsupervised=null",
}


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


def weights(config: DictConfig) -> Descriptions:
    """Describes the files that the backbone begins with, by the settings that name them.

    Weights that a library fetches have a name and no file, and of those that are not there nothing is told.

    Args:
        config: The whole config of a run that loads no checkpoint, whose weights would take the place of these.
    """
    found: dict[str, Path] = {}
    if origin := config.backbone.get("from"):
        with contextlib.suppress(UserError):
            found["backbone.from"] = checkpoint.weights_file("backbone.from", origin)
    if named := config.backbone.get("weights"):
        path = files.typed_path(named)
        found["backbone.weights"] = path / "model.safetensors" if path.is_dir() else path
    return {key: {"fingerprint": checkpoint.digest(path)} for key, path in found.items() if path.is_file()}


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
    path = next((path for name in (contents.DATA, contents.RESULT) if (path := folder / name).is_file()), None)
    if path is None:
        return {}
    found = files.read_json(path, AFRESH)
    try:
        if path.name == contents.RESULT:
            found = {"data": found.get("data", {}), "target": found.get(CONTENT, {})}
        return {role: dict(described) for role, described in found.items() if described.get("fingerprint")}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{shown_path(path)}: is damaged (what it says of the data is no description of any); {AFRESH}"
        ) from error


def differences(before: Descriptions, now: Descriptions) -> dict[str, str]:
    """Compares the data of two sittings, and the weights that they begin with, by their fingerprints.

    Args:
        before: The descriptions of the earlier sitting.
        now: Those of what is there.

    Returns:
        For each of `data`, `target`, `test.data.NAME` and the settings of weights that is described in both and differs, what differs:
        the numbers of classes and images before and now, as far as these tell the two apart; `NOT_NOTED` where the earlier description
        knows less than is compared.
    """
    old, new = _fingerprints(before), _fingerprints(now)
    changed = [role for role in old.keys() & new.keys() if old[role] != new[role]]
    changed += [
        role for role in before.keys() & now.keys() if role not in changed and _renamed(before[role], now[role])
    ]
    return {role: _difference(before.get(role, {}), now.get(role, {})) for role in sorted(changed)}


def _fingerprints(described: Descriptions) -> dict[str, Any]:
    """The fingerprint of each description, and that of the weights that the tasks of the data are made up by."""
    found = {role: each.get("fingerprint") for role, each in described.items()}
    made_by = described.get("data", {}).get("unsupervised", {}).get("sha256")
    return found | ({EMBEDDING: made_by} if made_by else {})


def _renamed(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether classes have other names; an earlier version did not note them."""
    old, new = flat(before), flat(now)
    return any(old[key] != new[key] for key in old if key in new and NAMES.fullmatch(key))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two descriptions, see `differences`."""
    if not before.keys() - {"fingerprint"}:
        return OTHER_WEIGHTS
    if before.get("fingerprint") == now.get("fingerprint") and _renamed(before, now):
        return "the same items, but other names of classes"
    if (encoded := before.get("before_encoding")) and encoded == now.get("before_encoding"):
        return "the same items, but vectors of an encoder with other weights or settings"
    old, new = flat(before), flat(now)
    changed = [
        f"{key} {old[key]} -> {new[key]}" for key in old if key in new and old[key] != new[key] and COUNTS.match(key)
    ]
    noted = all(key in old for key in new if PARTS.match(key))
    return ", ".join(changed) or ("as many classes and images as before, but other ones" if noted else NOT_NOTED)


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
            raise MadeOtherwise(
                f"{folder}: whether its {' and its '.join(found)} are those that are there cannot be told, for {NOT_NOTED}; "
                f"{AFRESH}"
            )
        kinds = " and ".join(sorted({"weights" if told == OTHER_WEIGHTS else "data" for told in found.values()}))
        raise MadeOtherwise(
            f"{folder} was made with other {kinds} ({'; '.join(f'{role}: {changed}' for role, changed in found.items())}); "
            f"bring these back, or {AFRESH}"
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
                else f"its {role} has changed since it was trained ({changed}); bring that back, or "
            )
            raise UserError(
                f"checkpoint={origin}: {told}name "
                f"those to test on ({OTHERS.get(role, 'test.data=[folder] test.data.folder.root=...')}, say)"
            )
    others = {role: before[role] for role in found if role in before}
    return {CHECKPOINT_DATA: others} if others else {}
