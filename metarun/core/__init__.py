"""What everything else is built on: the shapes that flow, and the contracts of a method and of a backbone."""

from metarun.core.algorithm import Algorithm
from metarun.core.backbone import ActivationHook, Backbone
from metarun.core.episodes import Batch, Episodes, Spec, TaskShape, joined

__all__ = ["ActivationHook", "Algorithm", "Backbone", "Batch", "Episodes", "Spec", "TaskShape", "joined"]
