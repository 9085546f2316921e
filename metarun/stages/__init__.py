"""The stages that a recipe is a list of; README.md shows how to write one.

Each is imported when it is first asked for, since some need what others do not: exporting takes torch's tracer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarun.stages.base import Stage
    from metarun.stages.continual import Continual
    from metarun.stages.export import Export
    from metarun.stages.load import Load
    from metarun.stages.meta_test import MetaTest
    from metarun.stages.predict import Predict
    from metarun.stages.target_test import TargetTest
    from metarun.stages.train import Train
    from metarun.stages.transfer import Transfer

__all__ = ["Continual", "Export", "Load", "MetaTest", "Predict", "Stage", "TargetTest", "Train", "Transfer"]

_MODULES = {
    "Continual": "continual",
    "Export": "export",
    "Load": "load",
    "MetaTest": "meta_test",
    "Predict": "predict",
    "Stage": "base",
    "TargetTest": "target_test",
    "Train": "train",
    "Transfer": "transfer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
