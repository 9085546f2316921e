"""Weights from files into networks: what fits is loaded and said, and the first thing that does not fit is an error."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metarun.core import Backbone
from metarun.engine import checkpoint
from metarun.errors import UserError

SHOWN = 6  # names of tensors in a line
COUNTER = "num_batches_tracked"  # of torch's batch norm, which old files lack and nothing reads

log = logging.getLogger("metarun")


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of what `torch.save` wrote of a `state_dict`, by name, on the CPU.

    A dict that holds the `state_dict` under that name or `model` is looked into, and the prefix `module.` of data-parallel
    training is taken off. Runs no code from the file. `key` is what the `UserError` of an unreadable file begins with.
    """
    try:
        state: Any
        if path.suffix == ".safetensors":
            state = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: safetensors is not installed: pip install 'metarun[timm]'") from error
    except Exception as error:
        raise UserError(f"{key}: {path} cannot be read; it is truncated, or no file of weights") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    items = state.items() if isinstance(state, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{key}: {path} holds no weights by name (a state_dict)")
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], origin: str, spare: Sequence[str] = ()) -> None:
    """`tensors` into `module`, all or none, and a line of the log on what was loaded and what was not.

    Every tensor of the module must be among them with its shape, and each of them must be the module's, but for those below
    the names `spare` (a head, say), which are left out. Raises a `UserError` that begins with `origin` and names the first
    that differs and how many do fit.
    """
    own = module.state_dict()
    fit = [name for name in own if name in tensors and tensors[name].shape == own[name].shape]
    extra = [name for name in tensors if name not in own and not name.startswith(tuple(f"{head}." for head in spare))]
    absent = [name for name in own if name not in tensors and name.rsplit(".", 1)[-1] == COUNTER]
    for name in [*own, *extra]:
        if name not in fit and name not in absent:
            raise UserError(
                f"{origin}: {_difference(name, own, tensors)}; {len(fit)} of the network's {len(own)} tensors fit"
            )
    module.load_state_dict({name: tensors[name] for name in fit}, strict=False)
    left = [name for name in tensors if name not in own]
    rest = f"; left out {_listed(left)}" if left else ""
    log.info(
        "%s: loaded %d of %d tensors%s%s",
        origin, len(fit), len(tensors), rest, f"; not in the file: {_listed(absent)}" if absent else "",
    )  # fmt: skip


def _difference(name: str, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> str:
    """In what the tensor `name` differs, for a message."""
    if name not in tensors:
        reason = f"has no {name}; its first tensor is {next(iter(tensors), 'none')}"
        statistics = name.endswith(("running_mean", "running_var"))
        return reason + ("; these weights were trained with another backbone.norm than running" if statistics else "")
    there = tuple(tensors[name].shape)
    if name not in own:
        return f"has a {name} {there}, which this network has not"
    here = tuple(own[name].shape)
    reason = f"{name} is {there} in the file and {here} in this network"
    if len(here) == len(there) == 4 and here[:1] + here[2:] == there[:1] + there[2:]:
        reason += f", that is for images or maps of {there[1]} channels, not {here[1]}"
    return reason


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def load_backbone(backbone: Backbone, path: str | Path) -> None:
    """The backbone's weights of a metarun run (its folder, or a checkpoint in it) into `backbone`, and a line of the log.

    A folder means the weights that were best on validation, `best.pt`. The run's method and its head do not matter. Raises
    `UserError` where there is no such file, and where the architecture, the normalisation or the images' channels differ.
    """
    key, file = f"backbone.from={path}", checkpoint.weights_file("backbone.from", str(path))
    state = checkpoint.load(file)["model"]
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not tensors:
        raise UserError(f"{key}: {file} holds no backbone; its first tensor is {next(iter(state), 'none')}")
    load_tensors(backbone, tensors, key)
