"""Files that must survive a kill at any instruction: written aside, synced, renamed."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from metarun.errors import UserError


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes in the place of `path`, all or nothing; a full disk is a `UserError`, `path` as it was."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        kept = "; the previous one is untouched" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint: tensors, numbers, strings, lists and dicts."""
    whole = io.BytesIO()  # torch would hide the reason of a failed write
    torch.save(state, whole)
    replace(path, lambda file: file.write(whole.getbuffer()))


def save_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file for people: indented, in the order given."""
    replace(path, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of `save`; a missing, truncated or foreign file is a `UserError`. Runs no code from the file."""
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"checkpoint {path}: cannot be read, it is truncated or no checkpoint of metarun") from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"checkpoint {path}: holds no model of metarun")
    return state


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """`weights` into `module`; names or shapes that differ are a `UserError` that shows the first one."""
    own = module.state_dict()
    for name in [*own, *weights]:
        here, there = (tuple(state[name].shape) if name in state else "absent" for state in (own, weights))
        if here != there:
            raise UserError(
                f"checkpoint {path}: is of another architecture: {name} is {there} in the file and {here} in this model"
            )
    module.load_state_dict(weights)
