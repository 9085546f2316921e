"""The marks that the type of a setting can carry, in the schema and in the signature of any constructor.

`Annotated[int, Ge(1)]` and the other bounds of annotated-types are ranges, `Literal["cpu", "cuda"]` is a choice. The marks
here say what else the value is. `Doc` and `Unit` come from annotated-types too, so that one import serves a signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval, Le, Len, Lt, Unit
from annotated_types import doc as Doc

__all__ = ["Doc", "FilePath", "Ge", "Given", "Gt", "Interval", "Le", "Len", "Lt", "PathLike", "Seed", "Share", "Unit"]


@dataclass(frozen=True)
class PathLike:
    """The value names a file or a folder; it is taken literally, whatever characters it has."""


@dataclass(frozen=True, init=False)
class Given:
    """The node names a class, and its builder hands in the first positional parameters, which are called `names`."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


FilePath = Annotated[str, PathLike()]  # a file or a folder
Share = Annotated[float, Interval(ge=0, le=1)]  # a part of a whole
Seed = Annotated[int, Interval(ge=0, lt=2**63)]  # what torch and NumPy take
