"""The stages that a recipe is a list of; README.md shows how to write one."""

from metarun.stages.base import Stage
from metarun.stages.export import Export
from metarun.stages.load import Load
from metarun.stages.meta_test import MetaTest
from metarun.stages.predict import Predict
from metarun.stages.target_test import TargetTest
from metarun.stages.train import Train
from metarun.stages.transfer import Transfer

__all__ = ["Export", "Load", "MetaTest", "Predict", "Stage", "TargetTest", "Train", "Transfer"]
