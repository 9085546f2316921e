"""A learner at hand: built from a file or a run folder, ready to learn classes from a few examples."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from metarun.core import Algorithm
from metarun.engine.hardware import keep_freed_memory, torchs_own_settings
from metarun.errors import UserError, first_line
from metarun.files import given_path
from metarun.inference import store
from metarun.inference.store import Stored
from metarun.target.base import SourceImages, TargetMethod

if TYPE_CHECKING:
    from metarun.inference.classifier import Classifier


_COMPUTING = threading.RLock()


@contextmanager
def turn() -> Iterator[None]:
    """Threads take turns at computing, with torch's own settings.

    For a while a method may give a network, which several classifiers share, other weights, or seed the global generator.
    """
    with _COMPUTING, torchs_own_settings():
        yield


class Learner:
    """What a run trained, with all that using it on further images takes.

    `fit` learns classes from examples, `classifier` is what the run itself learned on its target.

    Attributes:
        held: What the file or the run folder holds.
        algorithm: The method on its backbone.
        method: The way with labelled examples: the method's own, or that of the run's `transfer=`.
        device: Where it computes.
    """

    def __init__(self, held: Stored, device: torch.device | str = "auto") -> None:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.held, self.device = held, _device(chosen)
        with turn():
            self.algorithm: Algorithm = held.blueprint.learner()
            store.load_tensors(self.algorithm, held.weights, held.origin)
            self.algorithm.to(self.device).eval()
            source = SourceImages(None, 0, self.device)
            self.method: TargetMethod = held.blueprint.method(self.algorithm, source)

    def __repr__(self) -> str:
        return f"Learner({type(self.algorithm).__name__}, {type(self.method).__name__}, {str(self.held.origin)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        """Returns itself: a classifier that scikit-learn clones goes on with the same learner, which nothing changes."""
        return self

    def fit(self, images: Any, labels: Any = None, **settings: Any) -> Classifier:
        """Learns classes from examples.

        Args:
            images: Paths, PIL images, numpy arrays or tensors; or, without labels, a folder of class folders or a table (CSV)
                of file and label.
            labels: The class of each image.
            settings: Those of `Classifier`.

        Raises:
            UserError: The images are none, a class is alone, or the method cannot serve so many classes.
        """
        from metarun.inference.classifier import Classifier

        return Classifier(self, **settings).fit(images, labels)

    @property
    def classifier(self) -> Classifier:
        """The classifier of the classes that the run learned.

        Raises:
            UserError: The run learned to learn, but no classes of its own.
        """
        from metarun.inference.classifier import Classifier

        if self.held.classes is None:
            raise UserError(
                f"{self.held.origin}: learned from episodes and has no classes of its own; give it examples, fit(images, labels)"
            )
        return Classifier(self).restored()


def load(origin: str | os.PathLike[str], *, device: torch.device | str = "auto") -> Learner:
    """Loads the learner of a run folder or of a classifier file.

    Args:
        origin: A finished run's folder, or a `classifier.pt`.
        device: Where it computes; `auto` takes CUDA where there is one.

    Raises:
        UserError: There is no such file or folder, or it cannot be used.
    """
    keep_freed_memory()
    path = given_path(origin, "checkpoint")
    with turn(), torch.random.fork_rng(devices=[]):  # a network that is an encoder is drawn before its weights are read
        held = store.load(path)
    return Learner(held, device)


def _device(name: torch.device | str) -> torch.device:
    """The device of a name; raises `UserError` where there is none."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except TypeError as error:
        raise UserError(f"device={name!r}: names no device; give auto, cpu or cuda") from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: there is no such device here ({first_line(error)}); try cpu") from error
    return found
