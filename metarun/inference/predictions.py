"""What a classifier said of image files, as a table, as numbers and as lines of the terminal."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from metarun.data.text_rows import shortened
from metarun.errors import nearest
from metarun.inference.classifier import Classifier, Scored
from metarun.inference.items import Listed, word
from metarun.ops import metrics
from metarun.ops.calibration import Reliability
from metarun.ops.measures import ACCURACY
from metarun.runs import contents, result
from metarun.terminal import Terminal
from metarun.text import counted, csv_line, listed, printable, shell_path

LEAST_CERTAIN = 5  # images that the terminal names


class Predictions:
    """What a classifier said of image files.

    Attributes:
        classifier: What classified them.
        images: The files, or the texts.
        readable: Which files could be read, bool `[n]`; the arrays below are of the m that could.
        paths: Their paths.
        scored: What the network said of them.
        truth: The class of each as a place in the classifier's classes, int64 `[m]`; -1 where it is not known.
    """

    def __init__(self, classifier: Classifier, images: Listed, scored: Scored) -> None:
        self.classifier, self.images = classifier, images
        self.readable = ~np.isnan(scored.scores).all(1)
        self.paths: list[Any] = [path for path, is_read in zip(images.paths, self.readable, strict=True) if is_read]
        near = scored.nearness
        self.scored = Scored(
            scored.scores[self.readable],
            None if near is None else near[self.readable],
            scored.learned[self.readable],
        )
        places = {name: place for place, name in enumerate(classifier.names)}
        told = [label for label, is_read in zip(images.labels, self.readable, strict=True) if is_read]
        self.truth = np.array([-1 if label is None else places[label] for label in told], dtype=np.int64)

    @property
    def kind(self) -> str:
        """What was classified: `images` or `texts`."""
        return word(self.classifier.learner.held.preprocessing)

    @property
    def column(self) -> str:
        """What the first column of `predictions.csv` holds: `path` or `text`."""
        return "text" if self.kind == "texts" else "path"

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        return self.classifier.names

    @cached_property
    def log_probabilities(self) -> np.ndarray:
        """The logarithms of the probabilities, `[m, classes]`."""
        return self.classifier.log_probabilities(self.scored.scores)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The probability of each class, `[m, classes]`."""
        found: np.ndarray = np.exp(self.log_probabilities)
        return found

    @cached_property
    def predicted(self) -> np.ndarray:
        """The predicted class of each, int64 `[m]`."""
        found: np.ndarray = self.scored.scores.argmax(1)
        return found

    @cached_property
    def margin(self) -> np.ndarray:
        """The probability of the first class less that of the second, `[m]`."""
        first_two = np.sort(self.probabilities, axis=1)[:, -2:]
        found: np.ndarray = first_two[:, 1] - first_two[:, 0]
        return found

    @cached_property
    def unknown(self) -> np.ndarray:
        """Which are of none of the classes, bool `[m]`."""
        return self.classifier.judged_unknown(self.scored)

    @property
    def labelled(self) -> np.ndarray:
        """Of which the class is known, bool `[m]`."""
        found: np.ndarray = self.truth >= 0
        return found

    @property
    def assumes_balanced(self) -> bool:
        """Whether the method supposes that equally many of what it classifies are of each class."""
        classifier = self.classifier
        return classifier.network_.transductive and classifier.learner.algorithm.assumes_balanced_queries

    @property
    def tested(self) -> np.ndarray:
        """Of which the class is known and which it did not learn from, bool `[m]`: those that an accuracy can be told of."""
        found: np.ndarray = self.labelled & ~self.scored.learned
        return found

    @cached_property
    def reliability(self) -> Reliability:
        """The calibration on the images that were not learned from."""
        found = Reliability()
        found.add(self.log_probabilities[self.tested], self.truth[self.tested])
        return found

    def table(self) -> str:
        """Writes the content of `predictions.csv`: a line for each image that could be read."""
        names, truth = self.names, ["truth", "right"] if self.labelled.any() else []
        learned = ["learned_from"] if self.scored.learned.any() else []
        heading = [
            self.column, *truth, "class", *(f"probability of {name}" for name in names), "margin", "unknown", *learned
        ]  # fmt: skip
        lines = [csv_line(heading)]
        for place, path in enumerate(self.paths):
            own, chosen = self.truth[place], self.predicted[place]
            told = [names[own] if own >= 0 else "", int(own == chosen) if own >= 0 else ""] if truth else []
            shares = [f"{share:.6g}" for share in self.probabilities[place]]
            own_learned = [int(self.scored.learned[place])] if learned else []
            last = [f"{self.margin[place]:.6g}", int(self.unknown[place]), *own_learned]
            lines.append(csv_line([path, *told, names[chosen], *shares, *last]))
        return "".join(lines)

    def describe(self) -> dict[str, Any]:
        """Numbers for `result.json`."""
        order = np.argsort(self.margin, kind="stable")[:LEAST_CERTAIN]
        found: dict[str, Any] = {
            "images": len(self.paths),
            "kind": self.kind,
            "classes": self.names,
            "counts": np.bincount(self.predicted, minlength=len(self.names)).tolist(),
            "mean_probability": [
                float(self.probabilities[self.predicted == place, place].mean())
                if (self.predicted == place).any()
                else None
                for place in range(len(self.names))
            ],
            "unknown": int(self.unknown.sum()),
            "temperature": self.classifier.calibration_.temperature,
            result.TRANSDUCTIVE: self.classifier.network_.transductive,
            "assumes_balanced": self.assumes_balanced,
            "ignored": self.images.ignored,
            **({"others": self.images.others} if self.images.others else {}),
            "learned_from": int(self.scored.learned.sum()),
            "least_certain": [
                {
                    "path": str(self.paths[place]),
                    "class": self.names[self.predicted[place]],
                    "probability": float(self.probabilities[place].max()),
                    "margin": float(self.margin[place]),
                }
                for place in order
            ],
        }
        known = self.tested
        if known.any():
            found |= {
                "labelled": int(known.sum()),
                **metrics.classification(self.scored.scores[known], self.truth[known]),
            }
            found |= {**self.reliability.describe(), "bins": self.reliability.bins()}
        return found


def of_examples(found: dict[str, Any]) -> str:
    """How many of what was classified are examples that were learned from, or the same as one; empty where none is.

    Args:
        found: What `Predictions.describe` describes.
    """
    number = found.get("learned_from", 0)
    if not number:
        return ""
    of_all = f"{number} of {counted(found['images'], found['kind'].removesuffix('s'))}"
    what = "is an example that it learned from, or a copy of one"
    told = f"{of_all} {what if number == 1 else 'are examples that it learned from, or copies of these'}"
    return f"{told}, left out of the accuracy" if ACCURACY in found else f"{told}; of no other is the class known"


def of_others(found: dict[str, Any]) -> str:
    """What was left without a class though its folder, or its label, may be meant for one; empty where nothing was.

    Args:
        found: What `Predictions.describe` describes.
    """
    others, kind = found.get("others", {}), found.get("kind", "images")
    if not others:
        return ""
    near = next(((name, told) for name in others if (told := nearest(name, found["classes"]))), ("", ""))
    meant = f"{near[1].removesuffix('?')} by {printable(near[0])}?" if near[1] else ""
    number = counted(sum(others.values()), kind.removesuffix("s"))
    return (
        f"without a class: {number} with a folder or a label that is none of the classes ({listed(others, 100)}){meant}"
    )


def show(found: dict[str, Any], folder: Path) -> None:
    """Prints how many images each class has, the least certain ones, and where everything lies."""
    kind = found.get("kind", "images")
    one_kind = kind.removesuffix("s")
    shown = Table("class", title=counted(found["images"], one_kind), title_justify="left", min_width=60)
    for heading in (kind, "mean probability"):
        shown.add_column(heading, justify="right")
    for name, count, share in zip(found["classes"], found["counts"], found["mean_probability"], strict=True):
        shown.add_row(printable(name), str(count), "" if share is None else f"{share:.1%}")
    Terminal().show(shown)
    if sentence := of_examples(found):
        print(sentence)
    if ACCURACY in found:
        others = f"other labelled {one_kind}" if found.get("learned_from") else f"labelled {one_kind}"
        print(
            f"accuracy {found[ACCURACY]:.2%} of {counted(found['labelled'], others)}, "
            f"expected calibration error {found['ece']:.2%}"
        )
    if sentence := of_others(found):
        print(sentence)
    if found.get(result.TRANSDUCTIVE):
        print(f"the method is transductive: other {kind} beside them may change these predictions")
    if found.get("assumes_balanced"):
        print(f"the method supposes equally many {kind} of each class: of others it predicts some classes too often")
    if found["unknown"]:
        print(f"of no known class: {found['unknown']} of {found['images']}, marked in the column unknown")
    print("least certain, and how far each is ahead of its second class:")
    for one in found["least_certain"]:
        item = (shortened if kind == "texts" else printable)(one["path"])
        print(f"  {one['probability']:6.1%} {printable(one['class'])}, {one['margin']:.1%} ahead  {item}")
    if found["ignored"] and kind == "texts":
        print(f"{found['ignored']} without a text, left out")
    elif found["ignored"]:
        print(f"{counted(found['ignored'], 'other file')} in the folders, no images by their names")
    print(f"table    {shell_path(folder / contents.PREDICTIONS)}\npage     {shell_path(folder / contents.PAGE)}")
