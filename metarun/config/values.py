"""The plain values of a config."""

from __future__ import annotations

import typing
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metarun.config.task_schema import PROTOCOLS, SIZES


def to_container(config: DictConfig) -> dict[str, Any]:
    """Plain, resolved values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def without(node: DictConfig, keys: Collection[str]) -> DictConfig:
    """A node without some of its keys. It is resolved, since a part that stands alone finds no other key of the config."""
    values = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    return OmegaConf.create({key: value for key, value in values.items() if key not in keys})


def values_of_task(config: DictConfig, part: str) -> dict[str, Any]:
    """The keys of a task by name, those of `task` with what one part of the config changes; null where nobody says it.

    A protocol that `task` does not have brings its own ranges. Ranges are as they are typed, but one of one number is that number.

    Args:
        config: The whole config.
        part: The key of the part: `train`, `pretrain.train` or `test`.
    """
    change = OmegaConf.select(config, part).task
    found: dict[str, Any] = {str(name): value for name, value in config.task.items()}
    if change.protocol not in (None, found["protocol"] or "uniform"):
        found |= PROTOCOLS[change.protocol]
    found |= {name: value for name, value in change.items() if value is not None}
    for name in SIZES:
        if not isinstance(found[name], int):
            low, high = found[name]
            found[name] = low if low == high else (low, high)
    return found


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 100, ...}` of nested mappings."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }
