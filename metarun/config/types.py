"""The marks that the type of a setting can carry, in the schema and in the signature of any constructor.

`Annotated[int, Ge(1)]` and the other bounds of annotated-types are ranges, `Literal["pool", "stride"]` is a choice. In the
schema, whose types omegaconf reads, a choice is a mark too: `Annotated[str, Literal["cpu", "cuda"]]`. One checker,
`metarun.config.ranges`, reads them all, and `metarun help` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Len, Lt, Unit
from annotated_types import doc as Doc

__all__ = [
    "Count",
    "Doc",
    "DropRate",
    "Example",
    "FilePath",
    "Ge",
    "Given",
    "Gt",
    "Interval",
    "Le",
    "Len",
    "Lt",
    "NameOrPath",
    "NonNegativeFloat",
    "NonNegativeInt",
    "NormKind",
    "PathLike",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "Share",
    "Unit",
]


@dataclass(frozen=True)
class PathLike:
    """The value names a file or a folder; it is taken literally, whatever characters it has, but for `~`, and made absolute.

    Args:
        or_name: Whether it may also be a name or an address, which stay as they are.
    """

    or_name: bool = False


@dataclass(frozen=True)
class Given:
    """The node names a class, to which its builder hands `names`; a config must not set them.

    Args:
        names: Parameters of the class's constructor.
        beside: Keys of the node that its builder reads itself, with their types.
        defaults: What these keys are where no file sets them.
        many: Whether the key holds a mapping of names to such nodes.
    """

    names: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    many: bool = False


@dataclass(frozen=True)
class Example:
    """What `metarun help` shows as an example, where the usual one would be refused.

    Args:
        value: The value as the command line writes it; empty for the usual one.
        beside: The words that the key needs beside it, in which {section} stands for the key without its last part.
    """

    value: str = ""
    beside: str = ""


@dataclass(frozen=True)
class Count:
    """The value is a whole number, or a list of the least and the largest of a range that each task draws from.

    Args:
        least: The least number that is allowed.
        optional: Whether null is allowed.
    """

    least: int
    optional: bool = False


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]  # a part of a whole
DropRate = Annotated[float, Interval(ge=0, lt=1)]  # the share that dropout leaves out
Seed = Annotated[int, Interval(ge=0, lt=2**63)]  # what torch and NumPy take
FilePath = Annotated[str, PathLike()]
NameOrPath = Annotated[str, PathLike(or_name=True)]
NormKind = Literal["batch", "support", "running", "group", "none"]
