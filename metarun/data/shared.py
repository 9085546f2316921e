"""Classes of one data set that another has too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

GENERIC = {"category", "char", "character", "class", "cluster", "group", "label", "letter", "set", "type"}


class ClassIndex:
    """Classes, to be found again by the items that they begin and end with.

    One shared item and the same name make two classes the same, and so do all of these items under any name.

    Args:
        classes: Of each class its key, its name and the digests of its items, see `TableSource.digests`.
    """

    def __init__(self, classes: Iterable[tuple[int, str, Sequence[str]]]) -> None:
        self._named: dict[tuple[str, str], int] = {}
        self._items: dict[frozenset[str], int] = {}
        for key, name, digests in classes:
            self._named |= {(name, digest): key for digest in digests}
            if digests:
                self._items[frozenset(digests)] = key

    def find(self, name: str, digests: Sequence[str]) -> int | None:
        """The key of a class; None where it is none of these, or has no item by which that could be told."""
        for digest in digests:
            if (name, digest) in self._named:
                return self._named[name, digest]
        return self._items.get(frozenset(digests)) if digests else None


def says_what_it_is(name: str) -> bool:
    """Whether the name of a class means the same in any data set, as `n01532829` and `robin` do, and `0`, `a` or `class_3` do not."""
    words = re.findall(r"[^\W\d_]{3,}", name)
    return any(word.lower() not in GENERIC for word in words) or bool(re.search(r"[^\W\d_]\d{6}", name))
