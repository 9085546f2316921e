"""Libraries of others that some algorithms and data sets drive, imported where they are asked for and nowhere else."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

from metarun.errors import UserError, not_imported

_schemas: torch.library.Library | None = None  # the operators are gone when the object is


def torchvision(extra: str = "torchvision") -> ModuleType:
    """The module torchvision, also one whose compiled operators do not fit the torch that is installed.

    A torchvision built for CUDA beside a torch built for the CPU leaves its own operators out and then fails to describe
    two of them. Their schemas are defined here in that case; transforms, models and data sets need no more. Raises
    `UserError` where it is missing or broken, which names `extra`.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise UserError(f"{not_imported('torchvision', error)}: pip install 'metarun[{extra}]'") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left
    global _schemas
    _schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


@functools.cache
def learn2learn() -> ModuleType:
    """The module learn2learn, without the notice that gym is unmaintained; raises `UserError` where it is missing."""
    try:
        importlib.import_module("gym_notices.notices").notices.clear()  # gym prints what it finds there
        torchvision()
        return importlib.import_module("learn2learn")
    except (ImportError, UserError) as error:
        raise UserError(
            f"learn2learn cannot be imported ({error}); from a clone of metarun, scripts/install_learn2learn.sh installs it "
            "and what it imports, which the extra metarun[learn2learn] names"
        ) from error
