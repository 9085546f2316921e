"""Weights from files into networks: what fits is loaded and said, and the first thing that does not fit is an error."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun import files
from metarun.core import Backbone
from metarun.data.pickles import GLOBALS
from metarun.engine import checkpoint
from metarun.errors import UserError, nearest, not_imported

SHOWN = 6  # names of tensors in a line
POSITIONS = ("pos_embed", "pos_embedding")  # the ends of their names in timm and torchvision
COUNTER = "num_batches_tracked"  # of torch's batch norm, which old files lack and nothing reads

# What trainings keep beside tensors and holds no code: their settings, and numbers of numpy, under the names of its versions, by what
# stands for its own constructors: a state that a file makes up has these read beyond their memory.
PLAIN: list[Any] = [argparse.Namespace, *((stands_for, ".".join(name)) for name, stands_for in GLOBALS.items())]
OBJECT = r"(?:GLOBAL |but got <class ')([\w.]{1,80})|(an array of type \w{1,80})"  # in torch's message on an object that it does not load

log = logging.getLogger("metarun")


def read_tensors(path: Path, key: str, extra: str = "timm") -> dict[str, Tensor]:
    """The tensors of a file of safetensors, or of what `torch.save` wrote of a `state_dict`, by name, on the CPU.

    Which of both a file is its content says, not its name. What dicts within dicts hold gets the names of these before its own:
    `state_dict.module.conv1.weight`. Runs no code from the file.

    Args:
        path: The file.
        key: What errors are about.
        extra: What of metarun brings the library that reads safetensors.

    Raises:
        UserError: The file cannot be read, is a TorchScript program, or holds no tensor by name.
    """
    files.check_opens(path, f"{key}: {path}")
    if _is_program(path):
        raise UserError(
            f"{key}: {path} is a TorchScript program, whose weights are not read; save the network's state_dict, "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    try:
        state: Any
        if _is_safetensors(path):
            state = importlib.import_module("safetensors.torch").load_file(path)
        else:
            files.check_archive(path)
            # Of an open file torch does not go by the name.
            with torch.serialization.safe_globals(PLAIN), open(path, "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{key}: {not_imported('safetensors', error)}: pip install 'metarun[{extra}]'") from error
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(OBJECT, str(error))):
            named = found[1] or found[2]
            raise UserError(
                f"{key}: {path} holds Python objects beside its tensors ({named}), which are not loaded, since they may run code; "
                "save the network's state_dict alone, torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(f"{key}: {path} cannot be read; it is truncated, or no file of weights") from error
    tensors = dict(_flat(state)) if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{key}: {path} holds no weights by name (a state_dict)")
    return tensors


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as those of safetensors do: the length of its header in 8 bytes, and the header, a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _is_program(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`, which has constants beside the tensors."""
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False


def _flat(values: dict[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield f"{before}{name}", value
        elif isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")


def network_tensors(
    module: nn.Module, tensors: dict[str, Tensor], origin: str, prefix: str | None = None
) -> dict[str, Tensor]:
    """Those tensors of a file that are of a network, by the network's own names.

    Args:
        module: The network.
        tensors: What `read_tensors` read.
        origin: What messages begin with.
        prefix: What stands before the network's own names, such as `teacher.backbone`; None takes what most tensors fit
            after: whatever wrappers the file has. Where several fit alike, averaged weights (`ema`, `teacher`) go first.

    Returns:
        The tensors below the prefix, without it.

    Raises:
        UserError: No tensor stands below `prefix`.
    """
    # Averages often lack the counters, and are the network's all the same.
    own = {name: value for name, value in module.state_dict().items() if not name.endswith(COUNTER)}
    fits: dict[str, int] = {}
    for name, value in tensors.items():
        parts = name.split(".")
        for place in range(len(parts)):
            last = ".".join(parts[place:])
            if last in own:
                before = name[: len(name) - len(last)]
                fits[before] = fits.get(before, 0) + (own[last].shape == value.shape)
    if prefix is not None:
        chosen = f"{prefix.rstrip('.')}." if prefix else ""
        if not any(name.startswith(chosen) for name in tensors):
            known = sorted((before.rstrip(".") for before in fits if 2 * fits[before] >= len(own)), key=len)
            raise UserError(
                f"{origin}: no tensor stands below weights_prefix={prefix}"
                f"{nearest(prefix, known) or ('; the network stands below ' + _listed(known) if known else '')}"
            )
    else:
        best = max(fits.values(), default=0)
        alike = [before for before, count in fits.items() if count == best and 2 * best >= len(own)]
        chosen = min(alike, key=lambda before: _rank(before, alike.index(before)), default="")
        if len(alike) > 1:
            others = _listed([before.rstrip(".") or "(none)" for before in alike if before != chosen])
            log.info("%s: took the weights below %s; weights_prefix= can name others: %s", origin, chosen, others)
    found = {name.removeprefix(chosen): value for name, value in tensors.items() if name.startswith(chosen)}
    if left := [name for name in tensors if not name.startswith(chosen)]:
        log.info("%s: the network stands below %s; left out %s", origin, chosen.rstrip("."), _listed(left))
    return found


def with_positions(module: nn.Module, tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The tensors with position embeddings for the size of images that a vision transformer has, resampled from another one's.

    Args:
        module: The network.
        tensors: What `network_tensors` found.
        origin: What messages begin with.
    """
    own, found = module.state_dict(), dict(tensors)
    for name in found:
        if not name.endswith(POSITIONS) or name not in own or own[name].shape == found[name].shape:
            continue
        resampled = resampled_positions(found[name], own[name].shape)
        if resampled is not None:
            log.info("%s: resampled %s %s to %s", origin, name, tuple(found[name].shape), tuple(own[name].shape))
            found[name] = resampled
    return found


def _rank(prefix: str, place: int) -> tuple[bool, bool, int]:
    words = prefix.lower().replace("_", ".").split(".")
    return "ema" not in words, "teacher" not in words, place


def resampled_positions(positions: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Position embeddings of a vision transformer for another number of patches, bicubically, as timm does.

    Args:
        positions: `[1, prefix + G * G, D]`, with or without those of class tokens before those of the patches.
        shape: What they are to become, `[1, prefix + H * H, D]`.

    Returns:
        The embeddings; None where the two shapes are not those of square grids with the same tokens before them.
    """
    if positions.ndim != 3 or len(shape) != 3 or positions.shape[2] != shape[2]:
        return None
    for before in (1, 0, 2, 5):
        old, new = (math.isqrt(max(count - before, 0)) for count in (positions.shape[1], shape[1]))
        if old and new and before + old**2 == positions.shape[1] and before + new**2 == shape[1]:
            grid = positions[:, before:].float().unflatten(1, (old, old)).movedim(-1, 1)
            grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True).flatten(2).mT
            return torch.cat([positions[:, :before], grid.to(positions.dtype)], 1)
    return None


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], origin: str, spare: Sequence[str] = ()) -> None:
    """`tensors` into `module`, all or none, and a line of the log on what was loaded and what was not.

    Every tensor of the module must be among them with its shape and with numbers of its kind, and each of them must be the module's,
    but for those below the names `spare` (a head, say), which are left out. Raises a `UserError` that begins with `origin` and names
    the first that differs and how many do fit.
    """
    own = module.state_dict()
    fit = [name for name in own if name in tensors and _fits(tensors[name], own[name])]
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


def _fits(there: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file can become one of a network: torch copies whole numbers, which may be a quantised network's, too."""
    plain = there.layout == torch.strided and not there.is_meta and not there.is_complex()
    return plain and there.shape == own.shape and (there.is_floating_point() or not own.is_floating_point())


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
    if here == there:
        found = tensors[name]
        kind = found.dtype if found.layout == torch.strided else found.layout
        told = "has no values" if found.is_meta else f"is of {kind}"
        return f"{name} {told} in the file, and this network's is of {own[name].dtype}"
    reason = f"{name} is {there} in the file and {here} in this network"
    if len(here) == len(there) == 4 and here[:1] + here[2:] == there[:1] + there[2:]:
        reason += f", that is for images or maps of {there[1]} channels, not {here[1]}"
    return reason


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def load_backbone(backbone: Backbone, path: str | Path, setting: str = "backbone.from") -> None:
    """The backbone's weights of a metarun run (its folder, or a checkpoint in it) into `backbone`, and a line of the log.

    A folder means the weights that were best on validation, `best.pt`. The run's method and its head do not matter. `setting`
    is the key of the config, for messages. Raises `UserError` where there is no such file, and where the architecture, the
    normalisation or the images' channels differ.
    """
    key, file = f"{setting}={path}", checkpoint.weights_file(setting, str(path))
    state = checkpoint.load(file)["model"]
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not tensors:
        raise UserError(f"{key}: {file} holds no backbone; its first tensor is {next(iter(state), 'none')}")
    load_tensors(backbone, tensors, key)
