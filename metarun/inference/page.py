"""The page of predictions: whole in itself, it opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import metarun
from metarun.data.decoding import UnreadableImage, read
from metarun.inference.items import How
from metarun.inference.predictions import Predictions, of_examples
from metarun.inference.texts import TextPreprocessing
from metarun.templates import embedded, template
from metarun.text import counted, printable

SHOWN = 400  # images, over all classes
SIDE = 96  # pixels of a small image


def page(found: Predictions, folder: Path) -> str:
    """Writes what a classifier said as HTML: for each class its images, wrong ones first, then the least certain.

    Args:
        found: The predictions.
        folder: Where the page will lie.
    """
    numbers = found.describe()
    return template(Path(__file__).parent, "predictions.html").render(
        numbers=numbers,
        of_examples=of_examples(numbers),
        kind=found.kind,
        counted=counted,
        names=[printable(name) for name in found.names],
        classes=_classes(found),
        origin=printable(str(found.classifier.learner.held.origin)),
        version=metarun.__version__,
        unreadable=[(printable(str(path)), reason) for path, reason in found.images.unreadable.items()],
        folder=printable(str(folder)),
        bins=numbers.get("bins", []),
    )


def _classes(found: Predictions) -> list[dict[str, Any]]:
    """Of each predicted class the images that the page shows, and how many there are."""
    how = found.classifier.learner.held.preprocessing
    sizes = np.bincount(found.predicted, minlength=len(found.names))
    most = _allotted(sizes, SHOWN)
    wrong = found.labelled & (found.truth != found.predicted)
    chosen = [
        sorted(
            np.flatnonzero(found.predicted == place).tolist(),
            key=lambda one: (not wrong[one], found.margin[one], one),
        )[: most[place]]
        for place in range(len(found.names))
    ]
    every = [one for places in chosen for one in places]
    reasons = _reasons(found, every, how)
    return [
        {
            "name": printable(found.names[place]),
            "count": int(sizes[place]),
            "images": [_image(found, one, bool(wrong[one]), reasons.get(one), how) for one in places],
        }
        for place, places in enumerate(chosen)
    ]


def _allotted(sizes: np.ndarray, total: int) -> list[int]:
    """How many images of each class are shown: all while there is room, else equally many of the larger classes."""
    limit = next((n for n in range(total, 0, -1) if np.minimum(sizes, n).sum() <= total), 1)
    found: list[int] = np.minimum(sizes, limit).tolist()
    return found


def _reasons(found: Predictions, shown: list[int], how: How) -> dict[int, dict[str, str]]:
    """The example that decided most for each image that is shown, where the classifier compares with examples."""
    texts = isinstance(how, TextPreprocessing)
    paths: list[Any] = [*found.classifier.examples_] if texts else [*map(Path, found.classifier.examples_)]
    if not shown or not paths or not (texts or all(path.is_file() for path in paths)):
        return {}
    nearest = found.classifier.nearest_examples([found.paths[one] for one in shown], found.predicted[shown])
    if nearest is None:
        return {}
    small = {int(place): _thumbnail(paths[place], how) for place in set(nearest.tolist())}
    return {
        one: {"source": small[int(place)], "name": _name(paths[place])}
        for one, place in zip(shown, nearest, strict=True)
    }


def _image(found: Predictions, one: int, wrong: bool, decided: dict[str, str] | None, how: How) -> dict[str, Any]:
    truth = found.truth[one]
    return {
        "source": _thumbnail(found.paths[one], how),
        "path": printable(str(found.paths[one])),
        "name": _name(found.paths[one]),
        "probability": f"{found.probabilities[one].max():.1%}",
        "truth": printable(found.names[truth]) if wrong else "",
        "unknown": bool(found.unknown[one]),
        "decided": decided,
    }


def _name(item: Path | str) -> str:
    """What the page calls an item: a file by its name, a text by itself."""
    return printable(item.name if isinstance(item, Path) else item)


def _thumbnail(path: Any, how: How) -> str:
    """A small image as an address that holds it; empty for a text, and if the file is gone by now."""
    if isinstance(how, TextPreprocessing):
        return ""
    try:
        pixels = read(path, SIDE, how.channels, how.values).pixels
    except (UnreadableImage, OSError):
        return ""
    return embedded(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
