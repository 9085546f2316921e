"""metarun: meta-learning experiments from the shell, and from Python.

result = metarun.run("algo=protonet", "data=glyphs", "train.steps=20", outputs="runs")
learner = metarun.load("runs/RUN")
classifier = learner.fit("my_classes")
classifier.predict("my_photos")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metarun.errors import UserError
from metarun.lazy import lazy_attributes

if TYPE_CHECKING:
    from metarun.api import run
    from metarun.inference.classifier import Classifier
    from metarun.inference.learner import Learner, load

__version__ = "0.2.0"
__all__ = ["Classifier", "Learner", "UserError", "__version__", "load", "run"]

_HOMES = {
    "Classifier": "metarun.inference.classifier",
    "Learner": "metarun.inference.learner",
    "load": "metarun.inference.learner",
    "run": "metarun.api",
}


__getattr__ = lazy_attributes(__name__, _HOMES)  # so that the command starts without torch


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
