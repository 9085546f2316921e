"""A classifier of images or texts by scikit-learn's conventions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from metarun.config.hints import hints_of
from metarun.config.ranges import check_range
from metarun.config.types import PositiveInt, Seed
from metarun.core import Batch
from metarun.data.source import Split
from metarun.data.table_source import item_digest
from metarun.errors import InputError, UserError, first_line, lacks, no_memory
from metarun.files import given_path
from metarun.inference import arrays, store
from metarun.inference.arrays import Images
from metarun.inference.items import How, Listed, examples, listed, warn_of_two_classes, word
from metarun.inference.labels import checked_labels, checked_weights, is_text, label_text, number_text
from metarun.inference.learner import Learner, turn
from metarun.inference.preprocessing import Preprocessing
from metarun.ops import calibration, draws
from metarun.ops.certainty import MAX_PROBABILITY, NAMES, PROTOTYPE, certainties
from metarun.ops.metrics import undefined
from metarun.progress import progress_bar
from metarun.target import base
from metarun.text import shown_path

Progress = Callable[[int], None]


class Scored(NamedTuple):
    """What a classifier's network says of images; NaN for files nobody can read.

    Attributes:
        scores: The largest is that of the predicted class, float64 `[n, classes]`.
        nearness: Minus the squared distance to the nearest class mean of the examples, `[n]`; None where it is not asked for.
        learned: Which of them are examples that the classifier learned from, by their content, bool `[n]`.
    """

    scores: np.ndarray
    nearness: np.ndarray | None
    learned: np.ndarray


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Classifies images, or texts, by what a learner learns from examples.

    Of a learner that was trained on texts, texts are what is called images here: a list of str, or a file of them. Threads may share
    a classifier: they read images at the same time, and take turns at the network.

    Attributes:
        classes_: The classes, sorted where `fit` found them.
        network_: The fitted function of network inputs to scores.
        examples_: The files that it learned from, if it learned from files.
        labels_: The class of each example, as a place in `classes_`.
        calibration_: How far its probabilities can be trusted.
        digests_: Those of the examples' content, by which they are known again wherever they lie.

    Args:
        learner: What learns, from `metarun.load`.
        unknown: Which images are of none of the classes: `off` for none; a certainty, `max_probability`, `energy` or
            `prototype_distance`, for those below the threshold that the run chose for it; `auto` for the certainty that told
            them best; or the largest probability, in 0 to 1, below which an image is.
        batch_size: The images that go through the network together, which bounds the memory.
        seed: The seed of what `fit` draws.
    """

    def __init__(
        self, learner: Learner, *, unknown: str | float = "off", batch_size: PositiveInt = 256, seed: Seed = 0
    ) -> None:
        self.learner = learner
        self.unknown = unknown
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, images: Images, labels: Any = None) -> Classifier:
        """Learns the classes from examples.

        Args:
            images: Paths, PIL images, numpy arrays or tensors; or, without labels, a folder of class folders or a table (CSV)
                of file and label.
            labels: The class of each image.

        Raises:
            UserError: The images are none, a class is alone, the method cannot serve so many classes, or a setting is wrong. The
                classifier is then what it was before.
        """
        self._check_settings()
        images, labels = self._labelled(images, labels)
        files = self._listed(images)
        number = len(files.paths) if files else arrays.count(images)
        classes, places = np.unique(checked_labels(labels, number, word(self._how)), return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"labels: have one class alone ({classes[0]}); there is nothing to tell apart")
        self.learner.method.check(len(classes))
        parts = [(content, x) for _, content, x in self._placed(files, images)]
        if files and files.unreadable:
            path, reason = next(iter(files.unreadable.items()))
            raise UserError(f"{path} cannot be read ({reason}), and an example must be")
        order = places.argsort(kind="stable")  # examples are class-major
        with turn(), draws.untouched(self.learner.device), self._autocast():
            x = torch.cat([x for _, x in parts])
            y = torch.from_numpy(places[order]).to(x.device)
            torch.manual_seed(self.seed)
            batch = Batch(x[torch.from_numpy(order).to(x.device)], y, torch.ones_like(y))
            network = self.learner.method.fit(batch, len(classes))
        self.classes_, self.network_, self.labels_ = classes, network, places[order]
        self.examples_ = [str(files.paths[place]) for place in order] if files else []
        held = self.learner.held.calibration
        self.calibration_ = store.Calibration() if held.of_classes else held
        digests = [item_digest(item) for content, _ in parts for item in content]
        self.digests_ = set(filter(None, digests))
        warn_of_two_classes(digests, classes[places], files, self._how)
        return self

    def restored(self) -> Classifier:
        """Returns this classifier with the classes that its learner was stored with."""
        held = self.learner.held
        assert held.classes is not None
        self.classes_, self.labels_ = np.array(held.classes), np.array([], dtype=np.int64)
        state = {name: value.to(self.learner.device) for name, value in held.state.items()}
        try:
            with turn(), draws.untouched(self.learner.device):  # a head is drawn before its weights are loaded
                blank = self.learner.method.restore(state, len(held.classes))
                self.network_ = blank.to(self.learner.device).eval()
        except (*store.MALFORMED, RuntimeError) as error:
            raise self._damaged(lacks(error)) from error
        self.examples_, self.digests_, self.calibration_ = list(held.examples), set(held.digests), held.calibration
        return self

    def scored(self, images: Images, progress: Progress | None = None) -> Scored:
        """Runs the network on images.

        Args:
            images: Paths, PIL images, numpy arrays or tensors, a folder, or `ImageFiles`.
            progress: Is told how many images are done; None shows a bar on a terminal or in a notebook.

        Raises:
            UserError: Nothing was learned yet, an image cannot be read, or scores are not finite.
        """
        network = self._fitted()
        self._check_settings()
        files = self._listed(images)
        total = len(files.paths) if files else arrays.count(images)
        found = np.full((total, len(self.classes_)), np.nan)
        learned = np.zeros(total, dtype=bool)
        near = np.full(total, np.nan) if threshold(self.unknown, self.learner)[0] == PROTOTYPE else None
        shown = contextlib.nullcontext(progress) if progress else progress_bar("classifying", total)
        with shown as advance:
            for rows, content, x in self._placed(files, images, whole=network.transductive):
                learned[rows] = self.learned_from(content)
                with turn(), torch.no_grad():
                    scores = self._scores(network, x)
                    if undefined(scores).any():
                        raise UserError(
                            "images: what was learned of the examples gives scores that are not finite; inner steps may diverge on such "
                            "examples, and a method without them (algo=protonet, say) does not"
                        )
                    found[rows] = scores.numpy()
                    if near is not None:
                        distances = network.nearness(x)
                        assert distances is not None  # a threshold was chosen for them
                        near[rows] = distances.cpu().numpy()
                advance(int(rows[-1]) + 1)
        return Scored(found, near, learned)

    def learned_from(self, content: Iterable[Any]) -> np.ndarray:
        """Marks the texts, or images as pixels, that are examples it learned from or the same as one, bool `[n]`."""
        self._fitted()
        return np.array([item_digest(item) in self.digests_ for item in content], dtype=bool)

    def log_probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Computes the logarithms of the calibrated probabilities `[n, classes]` of scores."""
        logs = self._fitted().log_probabilities(torch.from_numpy(scores)).numpy()
        return calibration.tempered(logs, self.calibration_.temperature or 1.0)

    def predict(self, images: Images) -> np.ndarray:
        """Predicts the most probable class of each image, `[n]`."""
        scores = self._readable(images).scores
        found: np.ndarray = self.classes_[scores.argmax(1)]
        return found

    def predict_proba(self, images: Images) -> np.ndarray:
        """Predicts the probability of each class, `[n, classes]`, in the order of `classes_`; each row sums to 1."""
        found: np.ndarray = np.exp(self.log_probabilities(self._readable(images).scores))
        return found

    def score(self, images: Images, labels: Any = None, sample_weight: Any = None) -> float:
        """Computes the accuracy on labelled images.

        Args:
            images: What `fit` takes; of class folders or a table that are divided into train and test the latter.
            labels: The class of each image; None where `images` are class folders or a table.
            sample_weight: How much each image counts; None for all alike.

        Raises:
            UserError: The images cannot be read, there is not one label for each, or the weights are none.
        """
        images, labels = self._labelled(images, labels, "test")
        predicted = self.predict(images)
        known = checked_labels(labels, len(predicted), word(self._how))
        if is_text(predicted) != is_text(known):  # a classifier's file has names alone: 3 became "3"
            predicted, known = (
                np.array([number_text(label_text(label)) for label in values]) for values in (predicted, known)
            )
        weights = None if sample_weight is None else checked_weights(sample_weight, len(known))
        return float(np.average(predicted == known, weights=weights))

    def is_unknown(self, images: Images) -> np.ndarray:
        """Whether each image is of none of the classes, bool `[n]`, by the setting `unknown`."""
        return self.judged_unknown(self._readable(images))

    def judged_unknown(self, scored: Scored) -> np.ndarray:
        """Whether images of which the network said this are of none of the classes, bool `[n]`."""
        name, least = threshold(self.unknown, self.learner)
        if name is None:
            return np.zeros(len(scored.scores), dtype=bool)
        logs = self.log_probabilities(scored.scores)
        found: np.ndarray = certainties(scored.scores, logs, scored.nearness)[name] < least
        return found

    def nearest_examples(self, images: Images, predicted: np.ndarray) -> np.ndarray | None:
        """Finds for each image the nearest example of the class that was predicted, as a place in `examples_`, int64 `[n]`.

        Returns:
            The places; None where the classifier compares images with no examples, or its examples are not at hand.
        """
        self._fitted()
        known = self._embedded(self.examples_) if self.examples_ and len(self.labels_) else None
        asked = self._embedded(images) if known is not None else None
        if known is None or asked is None:
            return None
        distances = torch.cdist(asked, known)
        others = torch.from_numpy(self.labels_[None] != predicted[:, None])
        return distances.masked_fill(others, torch.inf).argmin(1).numpy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a classifier file, which `metarun.load` and `recipe=predict` read."""
        held, network = self.learner.held, self._fitted()
        kept = store.Stored(
            held.blueprint,
            held.preprocessing,
            store.tensors(self.learner.algorithm),
            held.autocast,
            self.calibration_,
            held.origin,
            self.names,
            {name: value.detach().cpu() for name, value in network.state_dict().items()},
            self.examples_,
            sorted(self.digests_),
        )
        store.save(given_path(path, "path"), kept)

    @property
    def names(self) -> list[str]:
        """The classes as texts, as a classifier's file has them."""
        self._fitted()
        return [label_text(label) for label in self.classes_]

    def _scores(self, network: base.TargetClassifier, x: Tensor) -> Tensor:
        """The scores of network inputs, float64 `[n, classes]` on the CPU; `UserError` where parts of a file give none."""
        try:
            scores: Tensor = network(x).cpu().double()
        except RuntimeError as error:
            if len(self.labels_) or no_memory(error):  # learned here, of no file
                raise
            raise self._damaged(first_line(error)) from error
        if scores.shape[1] != len(self.classes_):
            raise self._damaged(f"{scores.shape[1]} scores for {len(self.classes_)} classes")
        return scores

    def _damaged(self, why: str) -> UserError:
        """What is told where the parts of a classifier's file do not fit each other."""
        return UserError(
            f"{shown_path(self.learner.held.origin)}: is damaged, its parts do not fit ({why}); train again"
        )

    def _check_settings(self) -> None:
        """Checks the settings; by scikit-learn's conventions not where they are set."""
        _ = self._how  # which needs a learner
        threshold(self.unknown, self.learner)
        hints = hints_of(Classifier)
        for name in ("batch_size", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise InputError(f"{name}={value!r}: must be a whole number")
            check_range(name, int(value), hints[name])

    @property
    def _how(self) -> How:
        if not isinstance(self.learner, Learner):
            raise InputError(f"learner: {type(self.learner).__name__} is none; give what metarun.load returns")
        return self.learner.held.preprocessing

    def _labelled(self, images: Images, labels: Any, part: Split = "train") -> tuple[Images, Any]:
        """Images and their labels, which class folders or a table bring along: of divided ones those of a part."""
        if labels is not None:
            return images, labels
        if not isinstance(images, str | os.PathLike):
            raise InputError("labels: must be given, one for each image; a folder of class folders needs none")
        return examples(images, self._how, "images", part)

    def _listed(self, images: Images) -> Listed | None:
        return listed(images, self._how)

    def _fitted(self) -> base.TargetClassifier:
        if not hasattr(self, "network_"):
            raise NotFittedError("this Classifier has learned no classes yet; call fit(images, labels) first")
        return self.network_

    def _readable(self, images: Images) -> Scored:
        files = self._listed(images)
        scored = self.scored(files or images)
        if files and files.unreadable:
            path, reason = next(iter(files.unreadable.items()))
            raise UserError(f"images: {path} cannot be read ({reason})")
        return scored

    def _embedded(self, images: Images) -> Tensor | None:
        parts = []
        for x in self._inputs(images):
            with turn(), torch.no_grad():
                part = self._fitted().embedding(x)
            if part is None:
                return None
            parts.append(part.float().cpu())
        return torch.cat(parts)

    def _inputs(self, images: Images) -> Iterator[Tensor]:
        return (x for _, _, x in self._placed(self._listed(images), images))

    def _placed(
        self, files: Listed | None, images: Images, whole: bool = False
    ) -> Iterator[tuple[Any, np.ndarray, Tensor]]:
        """The places of at most `batch_size` images, their pixels and network inputs; of all images at once if `whole`."""
        how, device = self.learner.held.preprocessing, self.learner.device

        def parts() -> Iterator[tuple[list[int], np.ndarray]]:
            if files:
                yield from files.batches(how, self.batch_size)  # type: ignore[arg-type]  # they are of the kind that `how` reads
                return
            start = 0
            assert isinstance(how, Preprocessing)  # texts are listed, wherever they are
            for pixels in arrays.batches(images, how, self.batch_size):
                yield list(range(start, start + len(pixels))), pixels
                start += len(pixels)

        found: Iterable[tuple[list[int], np.ndarray]] = parts()
        if whole and (every := list(found)):
            rows = [row for part, _ in every for row in part]
            found = [(rows, np.concatenate([pixels for _, pixels in every]))]
        for rows, pixels in found:
            with turn():
                x = how.inputs(pixels, device)
            yield rows, pixels, x

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        name = self.learner.held.autocast
        if name is None:
            return contextlib.nullcontext()
        return torch.autocast(self.learner.device.type, dtype=getattr(torch, name), cache_enabled=False)


def threshold(unknown: str | float, learner: Learner) -> tuple[str | None, float]:
    """The certainty that tells images of no known class, and the value below which it does.

    Args:
        unknown: The setting of `Classifier`.
        learner: What learned, whose run may have chosen a threshold.

    Returns:
        The name of the certainty, or None for `off`, and the threshold.

    Raises:
        UserError: It is none of these; or the run chose no threshold.
    """
    if isinstance(unknown, str) and unknown not in ("off", "auto", *NAMES):
        with contextlib.suppress(ValueError):
            unknown = float(unknown)
    if isinstance(unknown, str) and unknown == "off":  # an array is compared with a text number by number
        return None, 0.0
    if isinstance(unknown, str) and unknown in ("auto", *NAMES):
        held = learner.held.calibration
        name = held.certainty if unknown == "auto" else unknown
        if name is None or name not in held.thresholds:
            raise UserError(
                f"unknown={unknown}: the run chose no threshold; train it with test.unknown_ways=5, say, and so that its predictions "
                "are numbers, or give the least probability of a known class, unknown=0.7"
            )
        return name, held.thresholds[name]
    if not isinstance(unknown, int | float | np.number) or isinstance(unknown, bool) or not 0 <= unknown <= 1:
        raise UserError(f"unknown={unknown}: must be auto, off, {', '.join(NAMES)}, or a probability from 0 to 1")
    return MAX_PROBABILITY, float(unknown)
