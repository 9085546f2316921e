"""What a config names is constructed here."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from metarun.errors import UserError, reason


def task_of(config: DictConfig, split: str) -> Any:
    """The `TaskShape` of `train` or `test`: `task`, with what that part of the config changes."""
    from metarun.core import TaskShape

    change = config[split].task
    return TaskShape(
        **{name: config.task[name] if change[name] is None else change[name] for name in ("ways", "shots", "queries")}
    )


def construct(node: DictConfig, path: str, **given: Any) -> Any:
    """What `node._target_` names, built from its values and `given`; a value that its constructor refuses is a `UserError`."""
    try:
        build = instantiate(node, _partial_=True, _convert_="all")
        hints = typing.get_type_hints(inspect.unwrap(build.func.__init__))
        for name, value in build.keywords.items():
            if type(value) is int and hints.get(name) in (float, float | None):
                given[name] = float(value)  # `algo.inner_lr=1` means 1.0
        return build(**given)
    except (HydraException, ValueError) as error:
        raise UserError(f"{path}: {reason(error)}") from error
