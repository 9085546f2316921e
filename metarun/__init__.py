"""metarun: meta-learning experiments from the shell, and from Python.

result = metarun.run("algo=protonet", "data=glyphs", "train.steps=20", outputs="runs")
learner = metarun.load("runs/RUN")
classifier = learner.fit("my_classes")
classifier.predict("my_photos")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metarun.errors import UserError

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


def __getattr__(name: str) -> Any:
    """Imports what is offered when it is first used, so that the command starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
