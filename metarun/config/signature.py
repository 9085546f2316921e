"""Constructors read from their source, without importing it: settings, types, defaults and meanings.

A method's module imports torch, which takes seconds; its settings are needed while a config is composed and for
`metarun help`. A signature is therefore read from the text of the class.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import pathlib
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import annotated_types

from metarun.config import types

ABSENT: Any = inspect.Parameter.empty
UNKNOWN: Any = object()  # a default that is no literal
FOLLOWED = 8  # imports or base classes on the way from a name to its class


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor.

    Args:
        name: Its name.
        hint: Its type with its marks, or the text of a type that only its module can evaluate.
        default: Its default; `ABSENT` without one, `UNKNOWN` where it is no literal.
        keyword_only: Whether it is a setting rather than what the builder hands in.
    """

    name: str
    hint: Any
    default: Any
    keyword_only: bool


@dataclass(frozen=True)
class Signature:
    """The constructor of a class, or a function.

    Args:
        name: The name of the class.
        parameters: Its parameters, without `self`.
        summary: The first paragraph of the docstring.
        meanings: What the `Args:` section of the docstring says of each parameter.
        takes_any: Whether it takes further keywords, of which its source does not tell the names.
    """

    name: str
    parameters: tuple[Parameter, ...]
    summary: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    takes_any: bool = False

    @property
    def settings(self) -> tuple[Parameter, ...]:
        """What a config sets: the keyword-only parameters.

        A constructor with a default, other than None, of a positional parameter does not tell settings from what it is handed;
        such a one is another library's, and its node holds what the YAML says.
        """
        return () if self.mixes else tuple(one for one in self.parameters if one.keyword_only)

    @property
    def mixes(self) -> bool:
        """Whether it does not tell settings from what it is handed."""
        return any(not one.keyword_only and one.default not in (ABSENT, None) for one in self.parameters)


@cache
def read(target: str) -> Signature | None:
    """The signature of what a `_target_` names; None where its source cannot be found or read."""
    module, _, name = target.rpartition(".")
    try:
        return _signature(module, name, FOLLOWED) if module else None
    except (OSError, SyntaxError, ValueError, ImportError):
        return None


def _signature(module: str, name: str, follow: int) -> Signature | None:
    source = _source(module)
    if source is None or not follow:
        return None
    block = _block(source, name)
    if block is None:
        if origin := _imported(source, module).get(name):
            return _signature(*origin, follow - 1)
        return None
    names = _Names(source, module)
    documented = ast.get_docstring(block) or ""
    if isinstance(block, ast.FunctionDef):
        found, takes_any = _parameters(block.args, names, False), block.args.kwarg is not None
        return Signature(name, found, summary_of(documented), arguments_of(documented), takes_any)
    constructor = next((one for one in block.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if constructor:
        found = _parameters(constructor.args, names, True)
        documented = f"{documented}\n\n{ast.get_docstring(constructor) or ''}"
        takes_any = constructor.args.kwarg is not None
        own = Signature(name, found, summary_of(documented), arguments_of(documented), takes_any)
        return _extended(own, _handed_on(constructor), _inherited(block, source, module, follow)) if takes_any else own
    if inherited := _inherited(block, source, module, follow):  # the constructor is that of a base class
        meanings = {**inherited.meanings, **arguments_of(documented)}
        return replace(inherited, name=name, summary=summary_of(documented), meanings=meanings)
    return Signature(name, (), summary_of(documented), arguments_of(documented))


def _inherited(block: ast.ClassDef, source: str, module: str, follow: int) -> Signature | None:
    """The constructor of the first base class that has parameters; None where no source tells of one.

    Where several base classes have constructors, each may hand keywords on to the next, and it takes any.
    """
    found = list[Signature]()
    for base in block.bases:
        inherited = None
        if isinstance(base, ast.Name):
            inherited = _signature(module, base.id, follow - 1)
        elif isinstance(base, ast.Attribute):
            path = ast.unparse(base).split(".")
            above = _imported(source, module).get(path[0])
            inherited = above and _signature(".".join([*filter(None, above), *path[1:-1]]), path[-1], follow - 1)
        if inherited and (inherited.parameters or inherited.takes_any):
            found.append(inherited)
    first = next((one for one in found if one.parameters), found[0] if found else None)
    return replace(first, takes_any=True) if first and len(found) > 1 else first


def _handed_on(constructor: ast.FunctionDef) -> ast.Call | None:
    """The call `super().__init__(..., **settings)` by which a constructor hands on its `**settings`; None without one.

    Settings that it looks at, takes out or adds to elsewhere, or hands on beside others, are not the base class's alone.
    """
    rest = constructor.args.kwarg
    uses = [one for one in ast.walk(constructor) if isinstance(one, ast.Name) and rest and one.id == rest.arg]
    for call in ast.walk(constructor):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            unpacked = [one.value for one in call.keywords if one.arg is None]
            if len(uses) == 1 and unpacked == uses:
                return call
    return None


def _extended(own: Signature, call: ast.Call | None, base: Signature | None) -> Signature:
    """A signature with those parameters of the base class's that it may be given to hand on: what `call` does not give itself."""
    if call is None or base is None or base.mixes:
        return own
    positional = [one.name for one in base.parameters if not one.keyword_only]
    given = positional[: sum(not isinstance(one, ast.Starred) for one in call.args)]
    known = {*given, *(one.arg for one in call.keywords), *(one.name for one in own.parameters)}
    others = [one for one in base.parameters if one.name not in known]
    parameters = sorted([*own.parameters, *others], key=lambda one: one.keyword_only)
    meanings = {**base.meanings, **own.meanings}
    return replace(own, parameters=tuple(parameters), meanings=meanings, takes_any=base.takes_any)


def _parameters(arguments: ast.arguments, names: _Names, method: bool) -> tuple[Parameter, ...]:
    positional = [*arguments.posonlyargs, *arguments.args]
    absent = [None] * (len(positional) - len(arguments.defaults))
    found = [
        Parameter(one.arg, ast.unparse(one.annotation) if one.annotation else Any, names.value(default), False)
        for one, default in zip(positional, [*absent, *arguments.defaults], strict=True)
    ][1 if method else 0 :]
    found += [
        Parameter(one.arg, names.hint(one.annotation), names.value(default), True)
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return tuple(found)


@cache
def _source(module: str) -> str | None:
    """The text of a module, found as an import finds it, but not executed."""
    path: Any = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        if path is None:
            spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
        else:
            spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


def _block(source: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The definition of one class or function; of a long file only its own lines are parsed."""
    start = re.search(rf"^(?:class|def) {re.escape(name)}\b", source, re.M)
    if not start:
        return None
    end = re.compile(r"^(?![ \t\n#)\]}\"'])", re.M).search(source, start.end())
    parsed = ast.parse(source[start.start() : end.start() if end else None]).body[0]
    return parsed if isinstance(parsed, ast.ClassDef | ast.FunctionDef) else None


@cache
def _imported(source: str, module: str) -> dict[str, tuple[str, str]]:
    """What each imported name of a module stands for: the module it is in, and its name there."""
    found = {}
    for match in re.finditer(r"^(?:from|import) [^(\n]*(?:\([^)]*\))?", source, re.M):
        try:
            (statement,) = ast.parse(match[0]).body
        except (SyntaxError, ValueError):
            continue
        if isinstance(statement, ast.Import):
            found.update({one.asname or one.name.partition(".")[0]: ("", one.name) for one in statement.names})
        elif isinstance(statement, ast.ImportFrom):
            origin = statement.module or ""
            if statement.level:
                package = module.split(".")
                above = package[: len(package) - statement.level + (1 if _is_package(module) else 0)]
                origin = ".".join([*above, *filter(None, [origin])])
            found.update({one.asname or one.name: (origin, one.name) for one in statement.names})
    return found


def _is_package(module: str) -> bool:
    return (spec := _spec_of(module)) is not None and spec.submodule_search_locations is not None


def _spec_of(module: str) -> ModuleSpec | None:
    parent, _, _ = module.rpartition(".")
    if not parent:
        return getattr(sys.modules.get(module), "__spec__", None) or importlib.util.find_spec(module)
    above = _spec_of(parent)
    return PathFinder.find_spec(module, above.submodule_search_locations) if above else None


class _Names(dict[str, Any]):
    """The names that a module's annotations and defaults use, evaluated on demand where they are literals or types."""

    def __init__(self, source: str, module: str) -> None:
        super().__init__()
        self.source, self.module = source, module

    def __missing__(self, name: str) -> Any:
        for known in (builtins, typing, types, annotated_types, pathlib):
            if hasattr(known, name):
                return getattr(known, name)
        if value := re.search(rf"^{re.escape(name)}(?:: [^=\n]+)? = ", self.source, re.M):
            tree = ast.parse(_statement(self.source, value.start())).body[0]
            assert isinstance(tree, ast.Assign | ast.AnnAssign)
            assert tree.value is not None
            return eval(compile(ast.Expression(tree.value), self.module, "eval"), {"__builtins__": {}}, self)
        if origin := _imported(self.source, self.module).get(name):
            if origin[0] == "collections.abc":
                return getattr(typing, name)
            source = _source(origin[0]) if origin[0] else None
            if source is not None:
                return _Names(source, origin[0])[origin[1]]
        raise NameError(name)

    def hint(self, annotation: ast.expr | None) -> Any:
        """A type with its marks, or its text where a name in it is known to its module alone."""
        if annotation is None:
            return Any
        try:
            return eval(compile(ast.Expression(annotation), self.module, "eval"), {"__builtins__": {}}, self)
        except Exception:
            return ast.unparse(annotation)

    def value(self, default: ast.expr | None) -> Any:
        """A default: `ABSENT` without one, `UNKNOWN` where it is no literal."""
        if default is None:
            return ABSENT
        try:
            value = eval(compile(ast.Expression(default), self.module, "eval"), {"__builtins__": {}}, self)
        except Exception:
            return UNKNOWN
        return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return UNKNOWN if UNKNOWN in items else items
    return value if value is None or isinstance(value, bool | int | float | str | dict) else UNKNOWN


def _statement(source: str, start: int) -> str:
    """The whole assignment that begins at `start`, over as many lines as it takes."""
    lines = source[start:].splitlines()
    for count in range(1, len(lines) + 1):
        text = "\n".join(lines[:count])
        try:
            ast.parse(text)
        except SyntaxError:
            continue
        return text
    raise ValueError(f"{lines[0]}: is no statement")


def summary_of(documented: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return re.sub(r"\s+", " ", inspect.cleandoc(documented).partition("\n\n")[0]).strip()


def arguments_of(documented: str) -> dict[str, str]:
    """The `Args:` section of a docstring in Google style: each parameter's meaning, on one line."""
    found: dict[str, str] = {}
    for section in re.finditer(r"^Args:\n((?:[ \t]+.*\n?|\n(?=[ \t]))*)", inspect.cleandoc(documented), re.M):
        name = ""
        for line in inspect.cleandoc(f"\n{section[1]}").splitlines():
            if entry := re.match(r"(\w+)(?: \([^)]*\))?: ?(.*)", line):
                name, found[entry[1]] = entry[1], entry[2]
            elif name:
                found[name] = f"{found[name]} {line.strip()}"
    return found
