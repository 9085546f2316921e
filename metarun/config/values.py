"""The plain values of a config."""

from __future__ import annotations

import typing
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf


def to_container(config: DictConfig) -> dict[str, Any]:
    """Plain, resolved values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def without(node: DictConfig, keys: Collection[str]) -> DictConfig:
    """A node without some of its keys. It is resolved, since a part that stands alone finds no other key of the config."""
    values = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    return OmegaConf.create({key: value for key, value in values.items() if key not in keys})


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 100, ...}` of nested mappings."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }
