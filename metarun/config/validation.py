"""The check of a config before anything is built from it. It imports torch only where a `_target_` does."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.utils import get_class, get_method
from omegaconf import DictConfig, ListConfig, OmegaConf

from metarun.config.ranges import check_value, parts
from metarun.config.schema import Config
from metarun.config.types import Given
from metarun.config.values import to_container
from metarun.errors import UserError, nearest, reason
from metarun.renamed import renamed_key


def check(config: DictConfig) -> None:
    """Checks every value of a config against the schema, and every node with a `_target_` against the signature it names.

    It converts nothing. An interpolation that leads nowhere is an error of omegaconf's.

    Raises:
        UserError: A key is unknown or missing, or a value is wrong; it names the key, the reason and the nearest right one.
    """
    check_keys(config, Config)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key}: must be given ({key}=...)")
    to_container(config)
    for key, hint in settings(Config):
        node = OmegaConf.select(config, key)
        given = given_to(hint)
        if given is None:
            check_value(key, node, hint)
        elif node:
            check_target(node, key, given)
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


def settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a schema's leaves, each with its type and marks."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for item in fields(schema):
        hint, key = hints[item.name], f"{prefix}{item.name}"
        if is_dataclass(hint):
            yield from settings(typing.cast(type, hint), f"{key}.")
        else:
            yield key, hint


def given_to(hint: Any) -> Given | None:
    """What the builder hands to the class that a node names; None where the hint is of no such node."""
    return next((mark for mark in parts(hint)[1] if isinstance(mark, Given)), None)


def check_sizes(value: Any) -> None:
    """Checks that `target.train_images` is null, a number of images, or a list of different ones."""
    sizes = list(value) if isinstance(value, ListConfig) else [value]
    right = all(size is None or (type(size) is int and 1 <= size < 2**63) for size in sizes)
    if not right or not sizes or len(set(sizes)) < len(sizes) or (len(sizes) > 1 and None in sizes):
        raise UserError(
            f"target.train_images={value}: must be a number of images, or a list of different ones, or null"
        )


def check_keys(node: DictConfig, schema: type, prefix: str = "") -> None:
    """Checks that `node` has no key but those of the dataclass `schema` (Hydra lets `+key=value` past it)."""
    known: dict[str, Any] = {item.name: item.default_factory for item in fields(schema)}
    for key in map(str, node):
        if key not in known:
            path = f"{prefix}{key}"
            raise UserError(renamed_key(path) or f"{path}: there is no such key{nearest(key, known)}")
        if is_dataclass(known[key]):
            check_keys(node[key], known[key], f"{prefix}{key}.")


def check_target(node: DictConfig, path: str, given: Given) -> None:
    """Checks a node's keys and values against the signature of its `_target_`.

    Args:
        node: The node of a config.
        path: Its dotted key, for messages.
        given: What the class's builder hands in, and which keys of the node it reads itself.
    """
    target = node.get("_target_")
    if not target:
        raise UserError(f"{path}: has no _target_ (the class that it configures)")
    try:
        cls = get_class(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target}: cannot be imported ({reason(error)})") from error
    values: dict[str, Any] = {str(key): node[key] for key in node if key != "_target_"}
    for name, hint in given.beside.items():
        if name in values:
            check_value(f"{path}.{name}", values.pop(name), hint)
    signature = inspect.signature(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return
    known = [name for name in signature.parameters if name not in given.names and name != "self"]
    for name in values:
        if name not in known:
            raise UserError(
                f"{path}.{name}: {cls.__name__} has no such setting"
                f"{nearest(name, known) or '; it has ' + (', '.join(known) or 'none')}"
            )
    for name in known:
        if signature.parameters[name].default is inspect.Parameter.empty and name not in values:
            raise UserError(f"{path}.{name}: must be given ({path}.{name}=...)")
    hints = hints_of(cls)
    for name, value in values.items():
        check_value(f"{path}.{name}", value, hints.get(name, Any))


def hints_of(cls: Any) -> Mapping[str, Any]:
    """The types of a constructor's parameters, with their marks."""
    constructor = cls.__init__ if isinstance(cls, type) else cls  # type: ignore[misc]
    return typing.get_type_hints(inspect.unwrap(constructor), include_extras=True)
