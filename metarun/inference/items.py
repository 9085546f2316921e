"""What a learner classifies, images or texts, found and read as its preprocessing says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarun.data.source import Split
from metarun.data.text_rows import shortened
from metarun.inference import arrays, image_files, texts
from metarun.inference.image_files import ImageFiles
from metarun.inference.preprocessing import Preprocessing
from metarun.inference.texts import TextItems, TextPreprocessing
from metarun.text import printable, shown_path

log = logging.getLogger("metarun")

How = Preprocessing | TextPreprocessing
Listed = ImageFiles | TextItems


class Examples(NamedTuple):
    """Labelled examples: files of images, or texts; and the class of each."""

    items: list[Any]
    labels: list[str]

    @property
    def files(self) -> list[Path]:
        """The files among them."""
        return [item for item in self.items if isinstance(item, Path)]


def warn_of_two_classes(
    digests: Sequence[str | None], labels: Sequence[Any] | np.ndarray, files: Listed | None, how: How
) -> None:
    """Warns where one item is an example of two classes.

    Args:
        digests: Of each example's content; None of one that may look like others.
        labels: The class of each.
        files: What the examples are, where they were named; None for images in memory.
        how: What their kind is called by.
    """
    first: dict[str, int] = {}
    twice = [
        (first[digest], place)
        for place, digest in enumerate(digests)
        if digest and labels[first.setdefault(digest, place)] != labels[place]
    ]
    if not twice:
        return
    kind = word(how).removesuffix("s")

    def named(place: int) -> str:
        item = files.paths[place] if files else f"{kind} {place}"
        shown = shown_path(item) if isinstance(item, Path) else shortened(item)
        return f"{shown} of {printable(str(labels[place]))}"

    one, other = map(named, twice[0])
    more = f" (and {len(twice) - 1} more such)" if len(twice) > 1 else ""
    log.warning("support: %s is the same %s as %s, and one is of one class%s", other, kind, one, more)


def word(how: How) -> str:
    """What the items are called."""
    return "texts" if isinstance(how, TextPreprocessing) else "images"


def listed(items: Any, how: How) -> Listed | None:
    """The items that are named one by one; None for images in memory."""
    items = arrays.plain(items)
    return texts.as_texts(items) if isinstance(how, TextPreprocessing) else arrays.as_files(items)


def found(origin: str | os.PathLike[str], how: How, key: str, classes: Iterable[str] = ()) -> Listed:
    """The items of a file, a folder, a pattern or standard input; see `find_images` and `find_texts`."""
    find: Any = texts.find_texts if isinstance(how, TextPreprocessing) else image_files.find_images
    named: Listed = find(origin, key, classes)
    return named


def support(origin: str | None, how: How) -> Examples:
    """The labelled examples that a command names by `support=`; none where it names nothing."""
    return examples(origin, how) if origin else Examples([], [])


def examples(origin: str | os.PathLike[str], how: How, key: str = "support", part: Split = "train") -> Examples:
    """The labelled examples of a folder or a table; see `image_files.examples` and `text_examples`."""
    if isinstance(how, TextPreprocessing):
        rows = texts.text_examples(origin, key, part)
        return Examples([row.text for row in rows], [row.label for row in rows])
    classes = image_files.examples(origin, key, part)
    pairs = [(path, entry.name) for entry in classes for path in entry.paths]
    return Examples([path for path, _ in pairs], [name for _, name in pairs])
