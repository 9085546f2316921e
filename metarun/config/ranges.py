"""The one reader of types and ranges: what a value must be, in words, and whether it is."""

from __future__ import annotations

import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Literal

import annotated_types as marks
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun.config.types import Count, PathLike
from metarun.errors import UserError, nearest
from metarun.text import counted

LARGEST = 2**63  # no integer of torch's or NumPy's reaches it
BOUNDS = (
    (marks.Gt, "gt", operator.gt),
    (marks.Ge, "ge", operator.ge),
    (marks.Lt, "lt", operator.lt),
    (marks.Le, "le", operator.le),
)
SEQUENCES = (list, tuple, Sequence, Iterable)  # which a config writes as a list


class _WrongKind(UserError):
    """The value is of another type, or none of the choices: a member of a union that it was not meant for says so."""


def parts(hint: Any) -> tuple[Any, list[Any]]:
    """A hint without its marks, and the marks, groups of them (`Interval`, `Len`) taken apart.

    A type that omegaconf does not know is a mark of `Any`, `Annotated[Any, int | list[int]]`, and takes its place.
    """
    if typing.get_origin(hint) is not Annotated:
        return hint, []
    base, *found = typing.get_args(hint)
    if base is Any and (instead := next(filter(typing.get_origin, found), None)):
        found.remove(instead)
        base = instead
    base, inner = parts(base)
    for mark in found:
        # By its attribute, since `isinstance` of a protocol takes a fifth of the check of a config.
        inner.extend(mark if getattr(mark, "__is_annotated_types_grouped_metadata__", False) else [mark])
    return base, inner


def options(hint: Any) -> list[Any]:
    """The members of a union that a config can hold: of torch's `float | Tensor` the float; of another hint itself."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    return [part for part in typing.get_args(hint) if not getattr(part, "__module__", "").startswith("torch")]


def choices(hint: Any) -> list[Any]:
    """The values that a `Literal`, as the hint or as a mark of it, allows; an empty list without one."""
    base, found = parts(hint)
    literals = [one for one in (base, *found) if typing.get_origin(one) is Literal]
    return [value for one in literals for value in typing.get_args(one)]


def plain(hint: Any) -> Any:
    """The hint as omegaconf knows it: without marks, `Literal["a"]` as `str`, a sequence as a list."""
    base, _ = parts(hint)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin is Literal:
        return functools.reduce(operator.or_, {type(value) for value in arguments})
    if origin in (typing.Union, types.UnionType):
        members = [plain(part) for part in options(base)]
        return functools.reduce(operator.or_, members) if members else Any
    if origin in SEQUENCES and arguments:
        return list[plain(arguments[0])]  # type: ignore[misc]
    if origin in (dict, Mapping) and arguments:
        return dict[plain(arguments[0]), plain(arguments[1])]  # type: ignore[misc]
    return base


def check_value(key: str, value: Any, hint: Any) -> Any:
    """Checks a value against a type hint and its marks, where omegaconf knows the type.

    Args:
        key: What the message calls the value.
        value: A plain value, or a list or mapping of omegaconf's.
        hint: A type, a union, a `Literal` or an `Annotated` of these.

    Returns:
        The plain value as the type has it: an integer is a float where a float is asked for.

    Raises:
        UserError: The value is of another type, out of range, or none of the choices.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)

    def right(member: Any) -> Any:
        typed = value if choices(member) else _of_type(key, value, member, hint)
        _check_marks(key, typed, member)
        return typed

    return _first(key, value, hint, right)


def check_range(key: str, value: Any, hint: Any) -> None:
    """Checks a value against the ranges and choices of a type hint, but not against the type itself.

    Raises:
        UserError: The value is out of range, or none of the choices.
    """
    _first(key, value, hint, lambda member: _check_marks(key, value, member))


def _first(key: str, value: Any, hint: Any, check: Callable[[Any], Any]) -> Any:
    """What `check` returns for the first member of a union that it does not refuse."""
    base, outer = parts(hint)
    members = options(base)
    if value is None and type(None) in members:
        return None
    problems = []
    for member in members:
        if member is type(None):
            continue
        try:
            return check(Annotated[member, *outer] if outer else member)
        except UserError as problem:
            problems.append(problem)
    problems = [problem for problem in problems if not isinstance(problem, _WrongKind)] or problems
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError(f"{key}={shown(value)}: must be of type {type_name(hint)}")
    return value


@functools.cache
def _holder(kind: Any) -> type:
    return make_dataclass("Value", [("value", kind, field(default=MISSING))])


def _of_type(key: str, value: Any, member: Any, hint: Any) -> Any:
    if type(value) in (int, float, bool) and plain(member) is type(value):
        return value  # as omegaconf would return it, which takes a thousand times as long
    try:
        structured = OmegaConf.structured(_holder(plain(member)))
    except (OmegaConfBaseException, TypeError):
        return value  # a type that no config can hold is the constructor's own business
    try:
        structured.value = value
    except (OmegaConfBaseException, OverflowError) as error:
        raise _WrongKind(f"{key}={shown(value)}: must be of type {type_name(hint)}") from error
    right = structured.value
    return OmegaConf.to_container(right) if isinstance(right, DictConfig | ListConfig) else right


def _check_marks(key: str, value: Any, hint: Any) -> None:
    allowed = choices(hint)
    if allowed:
        if not any(type(value) is type(one) and value == one for one in allowed):
            names = [str(choice) for choice in allowed]
            raise _WrongKind(f"{key}={shown(value)}: is not one of {', '.join(names)}{nearest(str(value), names)}")
        return
    base, found = parts(hint)
    if count := count_mark(found):
        check_count(key, value, count)
        return
    if problem := _problem(value, base, found):
        raise UserError(f"{key}={shown(value)}: must {problem}")
    inner = typing.get_args(base)
    if isinstance(value, list | tuple) and typing.get_origin(base) in SEQUENCES and inner:
        for item in value:
            if choices(inner[0]):
                _check_marks(key, item, inner[0])
            elif problem := _problem(item, *parts(inner[0])):
                raise UserError(f"{key}={shown(value)}: each must {problem}")
    elif isinstance(value, dict) and typing.get_origin(base) in (dict, Mapping) and inner:
        for name, item in value.items():
            if choices(inner[0]) and name not in choices(inner[0]):
                names = list(map(str, choices(inner[0])))
                raise UserError(f"{key}.{name}: is not one of {', '.join(names)}{nearest(str(name), names)}")
            check_value(f"{key}.{name}", item, inner[1])


def count_mark(found: Sequence[Any]) -> Count | None:
    """The mark of a number that may be a range, if it is among the marks."""
    return next((mark for mark in found if isinstance(mark, Count)), None)


def check_count(key: str, value: Any, count: Count) -> None:
    """Checks that a value is a whole number, or a range: a list of the least and the largest.

    Raises:
        UserError: It is neither, the range is empty, or a number is out of bounds.
    """
    if value is None and count.optional:
        return
    ranged = isinstance(value, list | tuple)
    ends, wrong = list(value) if ranged else [value], f"{key}={shown(value)}"
    like = f"[{max(count.least, 1)},10]"
    if any(type(end) is not int for end in ends):
        raise UserError(f"{wrong}: must be a whole number, or a range such as {like}")
    if ranged and len(ends) != 2:
        raise UserError(f"{wrong}: a range has two numbers, the least and the largest, such as {like}")
    if ends[0] > ends[-1]:
        raise UserError(f"{wrong}: the range holds no number; its least comes first: [{ends[-1]},{ends[0]}]")
    if ends[0] < count.least:
        raise UserError(f"{wrong}: must be at least {count.least}")
    if ends[-1] >= 2**31:
        raise UserError(f"{wrong}: must be below 2**31")


def _problem(value: Any, base: Any, found: Sequence[Any]) -> str:
    """What a value must be and is not, to follow "must"; empty where all is well."""
    lengths = [mark for mark in found if isinstance(mark, marks.MinLen | marks.MaxLen)]
    if lengths and isinstance(value, list | tuple | dict | str):
        least = max((mark.min_length for mark in lengths if isinstance(mark, marks.MinLen)), default=0)
        most = min((mark.max_length for mark in lengths if isinstance(mark, marks.MaxLen)), default=math.inf)
        return "" if least <= len(value) <= most else f"have {length_text(found)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    text = range_text(found)
    if isinstance(value, float) and not math.isfinite(value):  # which no setting has a use for, torch's neither
        return f"be a finite number{f', {text}' if text else ''}"
    if any(not _holds(value, mark) for mark in found):
        return f"be {text}"
    if base in (int, float) and isinstance(value, int) and not -LARGEST <= value < LARGEST:
        return "be below 2**63" if value > 0 else "be at least -2**63"
    return ""


def _holds(value: float, mark: Any) -> bool:
    for kind, name, compare in BOUNDS:
        if isinstance(mark, kind):
            return bool(compare(value, getattr(mark, name)))
    return True


def range_text(found: Sequence[Any]) -> str:
    """The bounds among the marks in words: `at least 0 and below 1`, `from 0 to 1`; empty without any."""
    low = [mark for mark in found if isinstance(mark, marks.Gt | marks.Ge)]
    high = [mark for mark in found if isinstance(mark, marks.Lt | marks.Le)]
    if len(low) == len(high) == 1 and isinstance(low[0], marks.Ge) and isinstance(high[0], marks.Le):
        return f"from {number(low[0].ge)} to {number(high[0].le)}"
    words = {marks.Gt: "above", marks.Ge: "at least", marks.Lt: "below", marks.Le: "at most"}
    return " and ".join(
        f"{words[type(mark)]} {number(getattr(mark, type(mark).__name__.lower()))}" for mark in [*low, *high]
    )


def length_text(found: Sequence[Any]) -> str:
    """The bounds of a length among the marks in words: `4 values`, `at least 1 value`; empty without any."""
    least = max((mark.min_length for mark in found if isinstance(mark, marks.MinLen)), default=0)
    most = min((mark.max_length for mark in found if isinstance(mark, marks.MaxLen)), default=None)
    if most is None:
        return f"at least {counted(least, 'value')}" if least else ""
    return counted(most, "value") if least == most else f"from {least} to {most} values"


def number(value: Any) -> str:
    """A bound as a person writes it."""
    if isinstance(value, int) and value > 2**31 and value & (value - 1) == 0:
        return f"2**{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def type_name(hint: Any) -> str:
    """The type in words: `int`, `float or null`, `list of int`, `path`."""
    base, found = parts(hint)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if count := count_mark(found):
        return f"int or [int,int]{' or null' * count.optional}"
    if base is type(None):
        return "null"
    if base is Any:
        return "any value"
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in options(base))
    if origin in SEQUENCES and arguments:
        return f"list of {type_name(arguments[0])}"
    if origin in (dict, Mapping) and arguments:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if any(isinstance(mark, PathLike) for mark in found):
        return "path"
    return base.__name__ if isinstance(base, type) else str(base).replace("typing.", "")


def limits(hint: Any) -> Iterator[str]:
    """The ranges and choices of a hint and of what it holds, in words."""
    base, found = parts(hint)
    if allowed := choices(hint):
        yield f"one of {', '.join(map(str, allowed))}"
        return
    count = count_mark(found)
    for text in (range_text(found), length_text(found), f"at least {count.least}" if count else ""):
        if text:
            yield text
    arguments = typing.get_args(base)
    if typing.get_origin(base) in (typing.Union, types.UnionType):
        for part in options(base):
            yield from limits(part)
    elif typing.get_origin(base) in SEQUENCES and arguments:
        yield from (f"each {text}" for text in limits(arguments[0]))
    elif typing.get_origin(base) in (dict, Mapping) and arguments:
        yield from (f"each {text}" for text in limits(arguments[1]))


def shown(value: Any) -> str:
    """A value as the command line writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # -1 is what was typed, even where a float is asked for
    return str(value)
