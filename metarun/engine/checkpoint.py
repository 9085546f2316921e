"""Weights and all else that a run carries on, in files."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metarun import files
from metarun.errors import UserError, lacks, nearest
from metarun.files import typed_path
from metarun.runs import contents
from metarun.runs.result import DAMAGED, MADE_BY, STAGES
from metarun.text import shell_path, shown_path

NAMED = 8  # runs of a folder are listed by a message, at most


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint, all or nothing.

    Args:
        path: The file.
        state: Tensors, numbers, strings, lists and dicts, by name.

    Raises:
        UserError: The file cannot be written.
    """
    whole = io.BytesIO()  # torch would hide the reason of a failed write
    torch.save(state, whole)
    files.replace(path, lambda file: file.write(whole.getbuffer()))


def load(path: Path, device: torch.device | str = "cpu", made_by: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint of `save`; runs no code from the file.

    Args:
        path: The file.
        device: Where its tensors are put.
        made_by: The digest of the training that it must be of, which one of an earlier version does not have; None for that of the
            finished training whose folder it lies in, or for any where there is none, or one of an earlier version.

    Returns:
        The state that was saved.

    Raises:
        UserError: The file is missing, may not be read, or is truncated, no checkpoint of metarun, or of another training.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    files.check_opens(path, f"checkpoint {path}")
    try:
        files.check_archive(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        damage = "it is empty" if not path.stat().st_size else "it is truncated or damaged, or no checkpoint of metarun"
        raise UserError(f"checkpoint {path}: cannot be read, {damage}; {_advice(path)}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"checkpoint {path}: holds no model of metarun; {_advice(path)}")
    made_by = _trained_here(path.parent) if made_by is None else made_by
    if made_by is not None and state.get(MADE_BY, made_by) != made_by:
        raise UserError(
            f"checkpoint {path}: is of another training, with other settings or data; bring the right file back, or "
            f"{_advice(path)}"
        )
    return state


def _trained_here(folder: Path) -> str | None:
    """The digest of the finished training, of a run or of a stage, whose folder this is; None where none says it."""
    again = f"delete {shown_path(folder)} to have it trained again"
    for name, advice in ((contents.RESULT, DAMAGED), (contents.STAGE, again)):
        if (folder / name).is_file():
            made_by = files.read_json(folder / name, advice).get(MADE_BY)
            return made_by if isinstance(made_by, str) else None
    return None


def _advice(path: Path) -> str:
    """Says what to do about a checkpoint that is damaged."""
    if (path.parent / contents.STAGE).is_file():
        return f"delete {shown_path(path.parent)} to have this stage trained again"
    if path.name != contents.LAST:
        return "take others: the run's last.pt, or training it again with resume=false, gives them"
    # Of a finished run the same command shows the result, and trains nothing.
    if (path.parent / contents.RESULT).is_file():
        return "take others: the run's best.pt, or training it again with resume=false, gives them"
    return "delete it to train from the start, or start beside it with resume=false"


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Takes what a checkpoint holds; what is missing in it, or does not fit, is a `UserError` that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"checkpoint {path}: does not fit this run ({lacks(error)}); {_advice(path)}") from error


def digest(path: Path) -> str:
    """Computes the SHA-256 of a file, 64 hexadecimal digits; an unchanged file is read once in a process.

    Args:
        path: The file.
    """
    now = path.stat()
    return _digest(path, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: Path, *_: int) -> str:
    return files.sha256(path)


def chosen(folder: Path) -> Path:
    """Finds the weights that a training in `folder` ended with: `best.pt`, or `last.pt` where no step was taken to choose among.

    It need not be there.
    """
    best, last = folder / contents.BEST, folder / contents.LAST
    return last if last.is_file() and not best.is_file() and load(last).get("unchosen") else best


def way_to(origin: str | Path, folder: Path) -> str | None:
    """Writes the way from a run's folder to what it uses, which still holds when both were moved; None where they are on two drives."""
    try:
        return Path(os.path.relpath(origin, folder)).as_posix()
    except ValueError:
        return None


def moved(origin: str, way: str | None, folder: Path) -> Path:
    """Says where to look for what a run uses: `origin`, or, where that is gone, what `way_to` leads to, if that is there."""
    path = Path(origin)
    if path.exists() or way is None:
        return path
    now = Path(os.path.normpath(folder / way))
    return now if now.exists() else path


def weights_file(key: str, origin: str) -> Path:
    """Finds the file of weights that a setting means.

    Args:
        key: The setting, for errors.
        origin: A file, or a run folder, whose weights may be those of its last stage that was trained apart.

    Raises:
        UserError: There is no such file or folder, or no weights in it.
    """
    path = typed_path(origin)
    if path.is_dir():
        result = path / contents.RESULT
        finished = files.read_json(result, "give the file with the weights, best.pt") if result.is_file() else {}
        stages = finished.get(STAGES, {})
        if stages and not chosen(path).is_file():
            try:
                last = list(stages.values())[-1]
                path = moved(last["folder"], last.get("from_run"), path)
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{shown_path(result)}: is damaged (its stages have no folders); give the file with the weights, best.pt"
                ) from error
            if not chosen(path).is_file():
                raise UserError(
                    f"{key}={shown_path(origin)}: its weights are those of {shown_path(path)}, where none are any more; give the "
                    "folder that has them"
                )
        path = chosen(path)
        if (path.parent / contents.CONFIG).is_file() and not path.is_file():
            reason = (
                "has finished, and holds no weights; give the folder of a run that trained some"
                if finished
                else "has no best.pt yet, its first validation was not reached"
            )
            raise UserError(f"{key}={shown_path(origin)}: {reason}")
    if not path.is_file():
        raise UserError(f"{key}={shown_path(origin)}: {_instead(typed_path(origin))}")
    if path.suffix != ".pt" and (path.parent / contents.CONFIG).is_file():
        raise UserError(
            f"{key}={shown_path(origin)}: holds no weights; give the run's folder, {shell_path(path.parent)}"
        )
    return path


def folder_of(key: str, origin: str) -> Path:
    """Finds the folder of the run that a setting means, whose weights may lie in that of a stage; the arguments are `weights_file`'s."""
    path = typed_path(origin)
    return path if path.is_dir() else weights_file(key, origin).parent


def _instead(path: Path) -> str:
    """Says why `path` has no weights, and what to give."""
    if kind := files.special(path):
        return f"is {kind}, and neither a run folder nor a file"
    if path.is_symlink() and not path.exists():
        return f"is a link to {shown_path(os.readlink(path))}, which leads to no file"
    if not path.is_dir() and (matched := _matching(path)):
        return f"is a pattern, and one is meant: {', '.join(map(shell_path, matched[:NAMED]))}{_more(matched)}"
    if not path.is_dir():
        beside = [shell_path(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"there is no such run folder or file{nearest(shell_path(path), beside)}"
    runs = sorted(found.parent for found in path.glob("*/config.yaml"))
    if not runs:
        runs = sorted(found.parent for found in path.glob("*/*/config.yaml"))
    if not runs:
        return "there is no such run folder or file; this folder has neither weights nor a run in it"
    named = ", ".join(map(shell_path, runs[:NAMED]))
    return f"there is no such run folder or file, but a folder of runs; give one of them: {named}{_more(runs)}"


def _matching(path: Path) -> list[Path]:
    """What a path matches that is a pattern, which the shell leaves as it is in `checkpoint=outputs/*/*`."""
    try:
        return sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(str(path)) else []
    except (OSError, re.error):
        return []


def _more(paths: Sequence[Path]) -> str:
    return f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""


def _shape(state: dict[str, Any], name: str) -> object:
    """The shape of a tensor, or why there is none that could be loaded."""
    if name not in state:
        return "absent"
    found = state[name]
    if not isinstance(found, torch.Tensor):
        return "no tensor"
    if found.is_meta or found.layout != torch.strided or found.is_complex():
        return f"a tensor {'without values' if found.is_meta else f'of {found.dtype}, {found.layout}'}"
    return tuple(found.shape)


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Loads weights into a module.

    Args:
        module: The module.
        weights: Its `state_dict`.
        path: The file that they are from, for the message.

    Raises:
        UserError: A name or a shape differs; the message shows the first one.
    """
    own = module.state_dict()
    for name in [*own, *weights]:
        here, there = (_shape(state, name) for state in (own, weights))
        if here != there:
            raise UserError(
                f"checkpoint {path}: is of another architecture: {name} is {there} in the file and {here} in this model"
            )
    module.load_state_dict(weights)
