"""Run folders: named by what was overridden, without a time, so that the same command finds its own run again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metarun.config import flat, to_container
from metarun.errors import UserError

# Say where or how, not what. With `hardware.processes=2` a run that was begun by one process goes on.
UNNAMED = (
    "outputs",
    "resume",
    "name",
    "experiment",
    "hardware.processes",
    "hardware.threads",
    "train.save_every",
    "train.save_seconds",
)
LONGEST = 120  # characters of a folder's name
# What may differ between the two sittings of one run: it changes no number beyond float order.
FREE = (
    "outputs",
    "resume",
    "runs",
    "recipe.run",
    "hardware.device",
    "hardware.channels_last",
    "hardware.processes",
    "hardware.threads",
    "hardware.vectorize",
    "hardware.record",
    "hardware.task_chunk",
    "train.save_every",
    "train.save_seconds",
)


def folder_name(overrides: list[str], named: bool) -> str:
    """The overrides in alphabetical order, made safe for a file system; `default` without any.

    `named` tells that the run's name does not have the data and the algorithm in it.
    """
    left_out = UNNAMED if named else (*UNNAMED, "data", "algo", "target", "transfer")
    kept = sorted(override for override in overrides if override.lstrip("+~").split("=")[0] not in left_out)
    text = re.sub(r"[^\w.,=+~@-]+", "_", ",".join(kept).replace("'", "")) or "default"
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def quoted(word: str) -> str:
    """`key=path` with the path in quotes if it is there but has characters that mean something to Hydra, as run folders do."""
    key, equals, value = word.partition("=")
    path = os.path.expanduser(value)
    there = os.path.exists(path) or ("=" in path and os.path.isdir(os.path.dirname(path)))  # or a run folder mistyped
    if not equals or not there or re.fullmatch(r"[\w/.+-]*", path, re.ASCII):
        return word
    escaped = path.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def listed(word: str) -> str:
    """`target.train_images=5,10,20` as the list that it means outside of a sweep."""
    return re.sub(r"^(target\.train_images)=(\d+(?:,\d+)+)$", r"\1=[\2]", word)


def default_name(choices: Mapping[str, str], checkpoint: str | None = None) -> str:
    """The experiment's name, or `<data>-<algo>`; for a checkpoint that of the run that made it, if it has one."""
    if checkpoint:
        path = Path(checkpoint)
        stored = (path if path.is_dir() else path.parent) / "config.yaml"
        if stored.is_file():
            return str(OmegaConf.load(stored).name)
    return named_after(["experiment"] if choices.get("experiment") else name_parts(choices), choices)


def name_parts(choices: Mapping[str, str]) -> list[str]:
    """The groups that a run is named after: of the source, and of the target; a recipe without a source leaves its part out."""
    source = [] if choices.get("recipe") == "target_only" else ["data", "algo"]
    return [*source, "target", "transfer"]


def named_after(groups: Iterable[str], choices: Mapping[str, str]) -> str:
    """The choices of these groups, where there is one: `<data>-<algo>`, and with a target `<data>-<algo>-<target>-<transfer>`."""
    return "-".join(choices[group].replace("/", "-") for group in groups if choices.get(group))


def choose_folder(config: DictConfig, overrides: list[str]) -> Path:
    """`outputs/<name>/<overrides>`; `resume=false` takes the next free `...~2`, `...~3`, and later commands go on there."""
    named = any(override.split("=")[0] in ("name", "experiment", "checkpoint") for override in overrides)
    base = Path(config.outputs) / config.name / folder_name(overrides, named)
    last = 1
    while _attempt(base, last + 1).is_dir():
        last += 1
    if not config.resume and base.is_dir():
        last += 1
    return _attempt(base, last)


def _attempt(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}~{number}")


def create(folder: Path) -> None:
    """Makes a folder below `outputs`; where it cannot be made, a `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"outputs={folder}: cannot be written ({error.strerror}); choose another outputs=") from error


def refuse_other_config(folder: Path, config: DictConfig) -> None:
    """Raises `UserError` with the keys that differ if the folder was made with another config.

    A key that only one of them knows is of another version of metarun, and makes no difference while it is off.
    """
    stored = flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    asked = flat(to_container(config))
    missing: Any = "absent"

    def differs(key: str) -> bool:
        if key in stored and key in asked:
            return bool(stored[key] != asked[key])
        return bool(stored.get(key) or asked.get(key))

    differing = [
        f"{key} {stored.get(key, missing)} -> {asked.get(key, missing)}"
        for key in sorted({*stored, *asked})
        if key not in FREE and differs(key)
    ]
    if differing:
        raise UserError(
            f"{folder} was made with another config ({'; '.join(differing)}); "
            "give this run a name=, or start over beside it with resume=false"
        )
