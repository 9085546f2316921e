"""The check of a config before anything is built from it. It imports torch only where a `_target_` does."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from metarun.config import signature as signatures
from metarun.config.hints import fields_of, hints_of
from metarun.config.ranges import check_value, parts
from metarun.config.schema import Config
from metarun.config.task_schema import LARGEST_SUPPORT
from metarun.config.types import Given
from metarun.config.values import flat, to_container, values_of_task
from metarun.errors import UserError, nearest, reason
from metarun.renamed import renamed_key
from metarun.text import has_control, listed, printable


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
        elif node and given.many:
            check_nodes(node, key, given)
        elif node:
            check_target(node, key, given)
    check_sizes(config.target.train_images)
    check_tasks(config)
    for name, value in config.pretrain.backbone.items():
        if config.backbone.get(name) != value:
            raise UserError(
                f"backbone.{name}={config.backbone.get(name)}: the pretraining asks for {value} on the same backbone; set one "
                f"like the other (backbone.{name}={value}, or pretrain.backbone.{name}={config.backbone.get(name)})"
            )
    check_name(config.name)


def settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a schema's leaves, each with its type and marks."""
    hints = fields_of(schema)
    for item in fields(schema):
        hint, key = hints[item.name], f"{prefix}{item.name}"
        if is_dataclass(hint):
            yield from settings(typing.cast(type, hint), f"{key}.")
        else:
            yield key, hint


def given_to(hint: Any) -> Given | None:
    """What the builder hands to the class that a node names; None where the hint is of no such node."""
    return next((mark for mark in parts(hint)[1] if isinstance(mark, Given)), None)


# Hydra's settings of folders, with the values that have it make none; metarun's runs make their own.
FOLDERS_OF_HYDRA = {
    "run.dir": ".",
    "sweep.dir": "${outputs}",
    "sweep.subdir": ".",
    "output_subdir": None,
    "job.chdir": False,
}
NO_SEARCHPATH = "hydra.searchpath: is not looked through here; --config-dir FOLDER has choices of your own"


def check_hydra(hydra: DictConfig) -> None:
    """Checks that Hydra's own part of a config has it make, change to and look through no folder, wherever that was asked for.

    Raises:
        UserError: A setting of a folder is not as `conf/config.yaml` has it.
    """
    if hydra.get("searchpath"):
        raise UserError(NO_SEARCHPATH)
    written = flat(OmegaConf.to_container(hydra))
    for key, value in FOLDERS_OF_HYDRA.items():
        if written.get(key) != value:
            raise UserError(
                f"hydra.{key}={written.get(key)}: decides on no folder here; outputs= says where runs lie, and name= names one"
            )


def check_name(name: str | None) -> None:
    """Checks that `name` is null or the name of a folder of runs.

    Raises:
        UserError: It is none.
    """
    if name is None:
        return
    check_file_name(f"name={printable(name)}", name, "; outputs= is the folder that runs lie in")
    if name == "report":
        raise UserError(
            "name=report: is the folder that reports go to, in which no run is looked for; take another name"
        )


def check_file_name(what: str, name: str, hint: str = "") -> None:
    """Checks that a name can be one of a file: no path, not hidden, and nothing that a terminal would obey.

    Args:
        what: What messages begin with.
        name: The name.
        hint: What follows the message on a path.

    Raises:
        UserError: It cannot.
    """
    if name != "." and Path(name).name != name:  # as the system reads it: a\b and C:b are paths on Windows
        raise UserError(f"{what}: must be a name, and no path{hint}")
    if not name.strip() or name.startswith((".", "-")) or has_control(name):
        raise UserError(
            f"{what}: must be the name of a folder, without control characters and beginning with neither . nor -"
        )


def check_sizes(value: Any) -> None:
    """Checks that the numbers in a list of `target.train_images` differ, and that none is text, which omegaconf leaves text here.

    Raises:
        UserError: They do not, or one is.
    """
    sizes = list(value) if isinstance(value, ListConfig) else [value]
    if len(set(sizes)) < len(sizes) or any(isinstance(size, str) for size in sizes):
        raise UserError(
            f"target.train_images={value}: must be a number of images, or a list of different ones, or null"
        )


def check_tasks(config: DictConfig) -> None:
    """Checks that what is said of tasks goes together, of those of training and those of tests.

    Raises:
        UserError: It does not.
    """
    tasks = {part: values_of_task(config, part) for part in ("train", "pretrain.train", "test")}
    changes = {part: OmegaConf.select(config, part).task for part in tasks}
    balancing = {part: "task" if change.balanced is None else f"{part}.task" for part, change in changes.items()}
    drawing = {balancing[part] for part, task in tasks.items() if draws_items(task)}
    for part, found in tasks.items():
        change, key = changes[part], balancing[part]
        if found["balanced"] and found["protocol"] == "meta_dataset" and isinstance(found["shots"], tuple):
            raise UserError(
                f"{key}.balanced=true: Meta-Dataset's sampler draws the shots of each class; leave it null, or set "
                f"{part}.task.balanced=false"
            )
        if found["balanced"] is False and key not in drawing:
            raise UserError(
                f"{key}.balanced=false: has each class draw its shots and queries from ranges, and both are numbers; give a range "
                f"({key}.shots=[1,5], say), or leave it null"
            )
        if found["distractors"] and not found["unlabelled"]:
            key = "task" if change.distractors is None else f"{part}.task"
            raise UserError(
                f"{key}.distractors={found['distractors']}: are further classes of unlabelled items, and tasks have none; add "
                f"{key}.unlabelled=5"
            )
        ways = found["ways"] if isinstance(found["ways"], int) else found["ways"][-1]
        if found["protocol"] == "meta_dataset" and ways > LARGEST_SUPPORT:
            raise UserError(
                f"{part}.task.ways={ways}: Meta-Dataset's support sets have at most {LARGEST_SUPPORT} items; take fewer ways, "
                "or task.protocol=uniform"
            )


def draws_items(task: Mapping[str, Any]) -> bool:
    """Whether tasks of such values draw their shots, or their queries."""
    return isinstance(task["shots"], tuple) or isinstance(task["queries"], tuple)


def check_keys(node: DictConfig, schema: type, prefix: str = "") -> None:
    """Checks that `node` has no key but those of the dataclass `schema` (Hydra lets `+key=value` past it).

    Raises:
        UserError: It has another one.
    """
    known: dict[str, Any] = {item.name: item.default_factory for item in fields(schema)}
    for key in map(str, node):
        if key not in known:
            path = f"{prefix}{key}"
            raise UserError(renamed_key(path) or f"{path}: there is no such key{nearest(key, known, prefix[:-1])}")
        if is_dataclass(known[key]):
            check_keys(node[key], known[key], f"{prefix}{key}.")


def check_target(node: DictConfig, path: str, given: Given, nested: bool = False) -> None:
    """Checks a node's keys and values against the signature of its `_target_`.

    Args:
        node: The node of a config.
        path: Its dotted key, for messages.
        given: What the class's builder hands in, and which keys of the node it reads itself.
        nested: Whether the object is a setting of another, which may give it the rest of its arguments (`_partial_`).

    Raises:
        UserError: There is no such class, or a key or a value is not of its signature.
    """
    check_chosen(node, path)
    target = node["_target_"]
    try:
        cls = get_class(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target}: cannot be imported ({reason(error)})") from error
    values: dict[str, Any] = {str(key): node[key] for key in node if key != "_target_"}
    for name, hint in given.beside.items():
        if name in values:
            check_value(f"{path}.{name}", values.pop(name), hint)
    try:
        signature = inspect.signature(cls)
    except ValueError as error:  # of a class that is written in C
        raise UserError(
            f"{path}._target_={target}: does not say what settings it has, so a config cannot build it"
        ) from error
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    }
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if anything and (found := signatures.read(target)) and not found.takes_any:  # they are a base class's
        anything, defaults = False, {one.name: one.default for one in found.parameters}
    hints = {} if anything else hints_of(cls)
    check_nested(node, path, hints, nested)
    if anything:
        return
    partial = values.pop("_partial_", False)
    known = [name for name in defaults if name not in given.names and name != "self"]
    for name in values:
        if name not in known:
            raise UserError(
                renamed_key(f"{path}.{name}")
                or f"{path}.{name}: {cls.__name__} has no such setting"
                f"{nearest(name, known, path) or '; it has ' + (listed(known) or 'none')}"
            )
    for name in () if partial else known:
        if defaults[name] is inspect.Parameter.empty and name not in values:
            raise UserError(f"{path}.{name}: must be given (+{path}.{name}=...)")
    for name, value in values.items():
        if not (asks_for_object(hints.get(name)) and names_class(node._get_node(name))):  # which was checked above
            check_value(f"{path}.{name}", value, hints.get(name, Any))


def check_chosen(node: DictConfig | None, path: str) -> None:
    """Raises `UserError` for a node of the config, at the dotted key `path`, that names no class."""
    if not (node and node.get("_target_")):
        raise UserError(f"{path}: has no _target_ (the class that it configures); {chosen_by(path)}")


def chosen_by(path: str) -> str:
    """What chooses the class of a node, in words: a group, and for a pretraining the file of the recipe, which brings one.

    Args:
        path: The node's dotted key.
    """
    if path.startswith("hydra."):
        return f"{path.replace('.', '/')}=NAME chooses one"
    group = path.removesuffix(".data").rpartition(".")[2]  # target=NAME brings target.data
    if not path.startswith("pretrain."):
        return f"{group}=NAME chooses one"
    place = "pretrain" if group == "algo" else path
    return f"- /{group}@{place}: NAME, among the defaults of the recipe's file (# @package _global_), chooses one"


def check_nodes(nodes: DictConfig, path: str, given: Given, nested: bool = False) -> None:
    """Checks a mapping of names to nodes as `check_target` checks each.

    Raises:
        UserError: A node or its name is wrong, or a file brings keys of other parts of the config, which a node has no place for.
    """
    key = path.removesuffix(".sets")
    for name in map(str, nodes):
        check_file_name(f"{key}: {printable(name)}", name)  # as files of the run are named after it
        node = nodes[name]
        whole = node.get("data") if isinstance(node, DictConfig) and "_target_" not in node else None
        if isinstance(whole, DictConfig) and "_target_" in whole:
            raise UserError(
                f"{key}: {name}: brings tasks of its own shape, as regression does, and cannot stand beside sets of images; "
                f"data={name} has it alone"
            )
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(f"{path}.{name}: is none of the data sets that are named; write {key}=[{name}], say")
        check_target(node, f"{path}.{name}", given, nested)


def check_nested(node: DictConfig, path: str, hints: Mapping[str, Any], nested: bool) -> None:
    """Checks that objects are named only where the signature with these hints asks for one.

    Elsewhere a mapping is data, from wherever it comes, and a class named in it would be code.

    Raises:
        UserError: One is named elsewhere.
    """
    for name in map(str, node):
        key, value = f"{path}.{name}", node._get_node(name)
        if name.startswith("_") and name != "_target_" and (name != "_partial_" or not nested):
            raise UserError(f"{key}: is a word of Hydra's that no class here takes; give the settings by their names")
        if isinstance(value, DictConfig) and "_target_" not in value and asks_for_objects(hints.get(name)):
            check_nodes(value, key, Given(), nested=True)
            continue
        for item in value._iter_ex(resolve=False) if isinstance(value, ListConfig) else [value]:
            if isinstance(item, DictConfig) and "_target_" in item and asks_for_object(hints.get(name)):
                check_target(item, key, Given(), nested=True)
            elif names_class(item):
                raise UserError(f"{key}: holds a _target_, but this setting of {node._target_} takes no object")


def names_class(value: Any) -> bool:
    """Whether a mapping with a `_target_` lies anywhere in a value."""
    if isinstance(value, ListConfig):
        return any(map(names_class, value._iter_ex(resolve=False)))
    if not isinstance(value, DictConfig) or value._is_none() or value._is_missing() or value._is_interpolation():
        return False
    return "_target_" in value or any(names_class(value._get_node(key)) for key in value)


def asks_for_objects(hint: Any) -> bool:
    """Whether a hint is of a mapping of names to such objects."""
    base, _ = parts(hint)
    origin = typing.get_origin(base)
    if origin in (typing.Union, types.UnionType):
        return any(map(asks_for_objects, typing.get_args(base)))
    return isinstance(origin, type) and issubclass(origin, collections.abc.Mapping) and asks_for_object(base)


DATA = (str, int, float, bool, bytes, dict, list, tuple, set, object, Path, type(None))


def asks_for_object(hint: Any) -> bool:
    """Whether a hint is of objects that a config has to name a class for: of any class but those of plain data."""
    base, _ = parts(hint)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin is collections.abc.Callable or base is collections.abc.Callable:
        return True
    if origin in (typing.Union, types.UnionType) or (
        isinstance(origin, type) and issubclass(origin, collections.abc.Iterable)
    ):
        return any(map(asks_for_object, arguments))
    return isinstance(base, type) and base is not Any and base not in DATA
