"""The check of a config before anything is built from it. It imports torch only where a `_target_` does."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import typing
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any

from hydra.utils import get_class, get_method
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun.config.schema import Config
from metarun.config.values import to_container
from metarun.errors import UserError, nearest, reason

# What the builder hands in, and a config therefore must not name.
GIVEN = {
    "data": set(),
    "backbone": {"input_shape"},
    "algo": {"backbone", "spec"},
    "around": {"method", "validation"},
    "train.optimizer": {"params"},
    "train.schedule": {"optimizer"},
    "augment": set(),
    "pretrain.algo": {"backbone", "spec"},
    "pretrain.train.optimizer": {"params"},
    "pretrain.train.schedule": {"optimizer"},
    "target.data": set(),
    "finetune": {"learner", "source"},
}


RANGES = {
    "train.steps": 0, "train.max_seconds": 0, "train.tasks_per_step": 1, "train.validate_every": 1, "train.validate_episodes": 1,
    "train.patience": 1, "train.noise.tasks": 0,
    "train.noise.labels": 0, "train.log_every": 1, "train.save_every": 1, "train.save_seconds": 0, "train.clip_norm": 0,
    "train.clip_value": 0, "test.episodes": 2, "test.baseline_episodes": 0, "hardware.threads": 1, "hardware.processes": 1,
    "hardware.task_chunk": 1, "seed": 0,
    "target.test_images": 1, "target.repeats": 1, "target.subset_seed": 0,
    "task.ways": 1, "task.shots": 1, "task.queries": 1, "train.task.ways": 1, "train.task.shots": 1, "train.task.queries": 0,
    "test.task.ways": 1, "test.task.shots": 1, "test.task.queries": 1,
    "algo.inner_steps": 0, "algo.test_inner_steps": 0, "algo.inner_batch": 1, "algo.test_inner_batch": 1,  # of any inner loop
}  # fmt: skip
RANGES |= {f"pretrain.{key}": least for key, least in RANGES.items() if key.startswith("train.") and ".task" not in key}
CHOICES: dict[str, list[str | None]] = {
    "hardware.device": ["auto", "cpu", "cuda"],
    "hardware.autocast": [None, "bfloat16"],
    "train.validate_on": ["episodes", "images"],
    "pretrain.train.validate_on": ["episodes", "images"],
}


def check(config: DictConfig) -> None:
    """Holds every node with a `_target_` against the signature it names, and the rest against its range.

    Raises `UserError` that names the key, the reason and the nearest right one; converts nothing. An interpolation that
    leads nowhere is an error of omegaconf's.
    """
    check_keys(config, Config)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key}: must be given ({key}=...)")
    to_container(config)
    for path, given in GIVEN.items():
        node = OmegaConf.select(config, path)
        if node:
            check_target(node, path, given)
    for key, least in RANGES.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, int | float) and value < least:
            raise UserError(f"{key}={value}: must be at least {least}")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in choices:
            names = [str(choice) for choice in choices if choice]
            raise UserError(f"{key}={value}: is not one of {', '.join(names)}{nearest(str(value), names)}")
    check_sizes(config.target.train_images)
    for name, value in config.pretrain.backbone.items():
        if config.backbone.get(name) != value:
            raise UserError(
                f"backbone.{name}={config.backbone.get(name)}: the pretraining asks for {value} on the same backbone; set one "
                f"like the other (backbone.{name}={value}, or pretrain.backbone.{name}={config.backbone.get(name)})"
            )
    if "/" in (config.name or ""):
        raise UserError(f"name={config.name}: must be a name without /; outputs= is the folder that runs lie in")
    for stage in config.recipe.stages:
        try:
            get_method(stage)
        except Exception as error:
            raise UserError(f"recipe.stages: {stage} cannot be imported ({reason(error)})") from error


def check_sizes(value: Any) -> None:
    """That `target.train_images` is null, a number of images, or a list of different ones."""
    sizes = list(value) if isinstance(value, ListConfig) else [value]
    right = all(size is None or (type(size) is int and size >= 1) for size in sizes)
    if not right or not sizes or len(set(sizes)) < len(sizes) or (len(sizes) > 1 and None in sizes):
        raise UserError(
            f"target.train_images={value}: must be a number of images, or a list of different ones, or null"
        )


def check_keys(node: DictConfig, schema: type, prefix: str = "") -> None:
    """That `node` has no key but those of the dataclass `schema` (Hydra lets `+key=value` past it)."""
    known: dict[str, Any] = {item.name: item.default_factory for item in fields(schema)}
    for key in map(str, node):
        if key not in known:
            raise UserError(f"{prefix}{key}: there is no such key{nearest(key, known)}")
        if is_dataclass(known[key]):
            check_keys(node[key], known[key], f"{prefix}{key}.")


def check_target(node: DictConfig, path: str, given: set[str]) -> None:
    """`node`'s keys and values against the signature of its `_target_`."""
    target = node.get("_target_")
    if not target:
        raise UserError(f"{path}: has no _target_ (the class that it configures)")
    try:
        cls = get_class(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target}: cannot be imported ({reason(error)})") from error
    signature = inspect.signature(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return
    hints = typing.get_type_hints(inspect.unwrap(cls.__init__))  # type: ignore[misc]
    known = [name for name in signature.parameters if name not in given and name != "self"]
    apart = {"_target_", "from"} if path == "backbone" else {"_target_"}
    values: dict[str, Any] = {str(key): node._get_node(key) for key in node if key not in apart}
    for name in values:
        if name not in known:
            raise UserError(
                f"{path}.{name}: {cls.__name__} has no such setting"
                f"{nearest(name, known) or '; it has ' + (', '.join(known) or 'none')}"
            )
    for name in known:
        if signature.parameters[name].default is inspect.Parameter.empty and (
            name not in values or values[name]._is_missing()
        ):
            raise UserError(f"{path}.{name}: must be given ({path}.{name}=...)")
    for name, value in values.items():
        check_value(f"{path}.{name}", value, hints.get(name, Any))


def check_value(key: str, value: Any, hint: Any) -> None:
    """A value against a type hint, where omegaconf knows the type (a float may be written as an integer)."""
    if typing.get_origin(hint) is typing.Literal:
        if value._value() not in typing.get_args(hint):
            names = [str(choice) for choice in typing.get_args(hint)]
            raise UserError(
                f"{key}={value._value()}: is not one of {', '.join(names)}{nearest(str(value._value()), names)}"
            )
        return
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # Of torch's `float | Tensor` a config can hold a float.
        parts = [part for part in typing.get_args(hint) if not getattr(part, "__module__", "").startswith("torch")]
        hint = functools.reduce(operator.or_, parts) if parts else Any
    try:
        structured = OmegaConf.structured(make_dataclass("Value", [("value", hint, field(default=MISSING))]))
    except OmegaConfBaseException:
        return  # a type that no config can hold is the constructor's own business
    plain = (
        OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value._value()
    )
    try:
        structured.value = plain
    except OmegaConfBaseException as error:
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise UserError(f"{key}={'null' if plain is None else plain}: must be of type {expected}") from error
