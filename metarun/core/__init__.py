"""What everything else is built on.

`episodes.py` has the shapes that flow, `algorithm.py` and `backbone.py` are the contracts of a method and of a backbone.
"""

from metarun.core.algorithm import Algorithm
from metarun.core.backbone import ActivationHook, Backbone
from metarun.core.episodes import (
    Batch,
    Count,
    Episodes,
    MixedEpisodes,
    Spec,
    TaskShape,
    count_text,
    largest,
    least,
    together,
)

__all__ = [
    "ActivationHook",
    "Algorithm",
    "Backbone",
    "Batch",
    "Count",
    "Episodes",
    "MixedEpisodes",
    "Spec",
    "TaskShape",
    "count_text",
    "largest",
    "least",
    "together",
]
