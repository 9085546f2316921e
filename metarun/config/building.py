"""What a config names is constructed here."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from metarun.config.hints import hints_of
from metarun.config.ranges import check_value
from metarun.config.validation import asks_for_object, check_chosen, names_class
from metarun.config.values import values_of_task, without
from metarun.errors import UserError, no_memory, reason


def task_of(config: DictConfig, split: str) -> Any:
    """The `TaskShape` of `train`, `pretrain.train` or `test`: `task`, with what that part of the config changes.

    Where no number is drawn, how it would be drawn makes no difference.
    """
    from metarun.core import TaskShape

    found = values_of_task(config, split)
    if not isinstance(found["shots"], tuple) and not isinstance(found["queries"], tuple):
        found["balanced"] = None
        found["protocol"] = found["protocol"] if isinstance(found["ways"], tuple) else None
    return TaskShape(**{name: value for name, value in found.items() if value is not None})


def construct(node: DictConfig, path: str, **given: Any) -> Any:
    """Builds what `node._target_` names from the node's values and from `given`.

    Args:
        node: A node of the config that has a `_target_`.
        path: The node's dotted key, for messages.
        given: What the builder hands in; the config does not name it.

    Raises:
        UserError: A value is of another type, is out of range, or is refused by the constructor.
    """
    check_chosen(node, path)
    build: Any = None
    try:
        build = instantiate(node, _partial_=True, _recursive_=False, _convert_="all")
        hints = hints_of(build.func)
        for name, value in build.keywords.items():
            hint = hints.get(name, Any)
            if asks_for_object(hint) and names_class(node._get_node(name)):
                given[name] = _objects(node[name], f"{path}.{name}")
            else:
                given[name] = check_value(f"{path}.{name}", value, hint)
        with keyed(path, hints):
            return _lean(build)(**given)
    except Exception as error:
        if lacking := no_memory(error):
            raise UserError(f"{path}: {lacking}; smaller sizes in {path}.* take less") from error
        name = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
        taken: Collection[str] = inspect.signature(build.func).parameters if name and build else {}
        if name and name[1] in node and name[1] not in taken:  # of a class whose `**settings` no check knows
            raise UserError(f"{path}.{name[1]}: {node._target_} has no such setting") from error
        # torch's optimisers index and compare what they are given before they look at it.
        if not isinstance(error, HydraException | ValueError) and not _of_torch(getattr(build, "func", None)):
            raise
        raise UserError(f"{path}: {reason(error)}") from error


def _lean(build: partial[Any]) -> partial[Any]:
    """What builds an object; of an optimiser, one that does not import torch's compiler."""
    kind: Any = build.func
    if not isinstance(kind, type) or not any(map(_of_torch, kind.__mro__)):
        return build
    from torch.optim import Optimizer

    from metarun.ops.optimizers import uncompiled

    if not issubclass(kind, Optimizer):
        return build
    lean: Any = uncompiled(typing.cast(Any, kind))
    return partial(lean, *build.args, **build.keywords)


def _of_torch(kind: Any) -> bool:
    """Whether this is an optimiser or a schedule of torch's."""
    return isinstance(kind, type) and f"{kind.__module__}.".startswith("torch.optim.")


@contextmanager
def keyed(path: str, settings: Collection[str]) -> Iterator[None]:
    """A class names its settings by its group, `data.root`; where it is built elsewhere, its errors name that place, `target.data.root`.

    Args:
        path: The dotted key of its node.
        settings: The names of its settings.
    """
    try:
        yield
    except UserError as error:
        *above, last = path.split(".")
        group = "data" if "data" in above else last  # of `test.data.omniglot` too
        if above and settings:
            names = "|".join(map(re.escape, settings))
            error.args = (re.sub(rf"(?<![\w./]){group}\.(?=(?:{names})\b)", f"{path}.", str(error)), *error.args[1:])
        raise


class Node:
    """A node of a config that names a class, to be built later, perhaps with other settings.

    Args:
        node: The node.
        path: Its dotted key, for messages.
    """

    def __init__(self, node: DictConfig, path: str) -> None:
        self.node, self.path = node, path

    def knows(self, name: str) -> bool:
        """Whether its class has a setting of this name."""
        return name in hints_of(get_class(self.node._target_))

    def build(self, **changes: Any) -> Any:
        """Builds it.

        Args:
            changes: Settings that take the place of its own.

        Raises:
            UserError: The class refuses them.
        """
        return construct(typing.cast(DictConfig, OmegaConf.merge(self.node, changes)), self.path)


def nodes_of(value: DictConfig, path: str, beside: Collection[str] = ()) -> dict[str, Node]:
    """The nodes of a mapping by name, without the keys `beside` of each, which its builder reads itself."""
    return {str(name): Node(without(value[name], beside), f"{path}.{name!s}") for name in value}


def _objects(value: Any, path: str) -> Any:
    """What a setting that takes objects names, built; with `_partial_` what builds it of further arguments.

    A mapping of names to nodes becomes one of names to `Node`s: the class that it is a setting of builds them.
    """
    if isinstance(value, DictConfig) and "_target_" not in value:
        return nodes_of(value, path)
    if isinstance(value, ListConfig):
        return [_objects(item, path) for item in value]
    if value.get("_partial_"):
        return _tried(instantiate(value, _recursive_=False, _convert_="all"), path)
    return construct(value, path)


def _tried(build: Any, path: str) -> Any:
    """What builds an optimiser later, after it has built one of a single parameter: its settings are found wrong now.

    Raises:
        UserError: The optimiser refuses them.
    """
    import torch

    kind = getattr(build, "func", None)
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        build = _lean(build)
        try:
            build([torch.nn.Parameter(torch.zeros(()))])
        except Exception as error:
            if not isinstance(error, ValueError | TypeError) and not _of_torch(kind):
                raise
            raise UserError(f"{path}: {reason(error)}") from error
    return build
