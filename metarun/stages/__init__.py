"""The stages that a recipe is a list of; README.md shows how to write one.

Each is imported when it is first asked for, since some need what others do not: exporting takes torch's tracer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metarun.lazy import lazy_attributes

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

_HOMES = {
    "Continual": "metarun.stages.continual",
    "Export": "metarun.stages.export",
    "Load": "metarun.stages.load",
    "MetaTest": "metarun.stages.meta_test",
    "Predict": "metarun.stages.predict",
    "Stage": "metarun.stages.base",
    "TargetTest": "metarun.stages.target_test",
    "Train": "metarun.stages.train",
    "Transfer": "metarun.stages.transfer",
}

__getattr__ = lazy_attributes(__name__, _HOMES)
