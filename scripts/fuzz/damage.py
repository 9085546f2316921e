"""What may happen to a file: its bytes, a node of what it holds, its place."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]


def _zeros(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, draw: b"",
    "cut": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "zeros": _zeros,
    "flipped": _flipped,
    "doubled": lambda content, draw: content + content,
    "text": lambda content, draw: draw.choice(
        [b"[]", b"{}", b"null", b"5", b"\xff\xfe", b"a: &a [*a]\n", b"a: b: c", b"[" * 5000, b"\n" * 50]
    ),
    "of a zip": lambda content, draw: b"PK\x03\x04" + content,
    "a pickle": lambda content, draw: b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x02hi\x85R.",
    "a number": lambda content, draw: content.replace(
        b"0", draw.choice([b"-1", b"1e999", b"NaN", b"null", b'"a"', str(2**70).encode()])
    ),
}


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "../x",
    "\0",
    [],
    {},
    [None],
    {"a": 1},
    [[]],
    "é" * 300,
]


def replaced(value: Any, draw: random.Random, odd: Sequence[Any] = ODD) -> Any:
    """A copy of nested lists and mappings with one node replaced by something odd, or gone."""
    value = copy.deepcopy(value)
    holders = list[tuple[Any, Any]]()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        holders += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    if not holders or draw.random() < 0.02:
        return draw.choice(odd)
    holder, key = draw.choice(holders)
    if isinstance(holder, dict) and draw.random() < 0.25:
        del holder[key]
    else:
        holder[key] = draw.choice(odd)
    return value


def _tensors(content: bytes, draw: random.Random) -> bytes:
    tensors = [
        torch.full((2,), float("nan")),
        torch.zeros(0),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1).to_sparse(),
    ]
    whole = io.BytesIO()
    torch.save(replaced(torch.load(io.BytesIO(content), weights_only=True), draw, [*ODD, *tensors]), whole)
    return whole.getvalue()


def _json(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(replaced(json.loads(content), draw)).encode()


def _json_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[:at], _json(lines[at], draw), *lines[at + 1 :], b""])


def _yaml(content: bytes, draw: random.Random) -> bytes:
    text = content.decode()
    heading = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return (heading + str(yaml.safe_dump(replaced(yaml.safe_load(text), draw), allow_unicode=True))).encode()


def _cells(content: bytes, draw: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = draw.choice(rows)
    cells = ["", "a,b", 'a"b', "\n", "é" * 50, "-1", "../../etc/passwd", "/dev/zero", "nan", "=1+1"]
    how = draw.randrange(4)
    if how == 0 and row:
        del row[draw.randrange(len(row))]
    elif how == 1:
        row.insert(draw.randrange(len(row) + 1), draw.choice(cells))
    else:
        row[draw.randrange(len(row))] = draw.choice(cells)
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json, ".jsonl": _json_lines, ".yaml": _yaml, ".pt": _tensors, ".pth": _tensors, ".csv": _cells,
}  # fmt: skip


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def _copied(path: Path, name: str) -> None:
    shutil.copy(path, path.with_name(name))


def _anothers(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.choice(sorted(path.parent.parent.rglob("*.*"))).read_bytes())


# What may happen to a file as a whole.
SWAPS: dict[str, Callable[[Path, random.Random], object]] = {
    "missing": lambda path, draw: path.unlink(),
    "a folder": lambda path, draw: _folder(path),
    "a pipe": lambda path, draw: _pipe(path),
    "a link to nothing": lambda path, draw: _linked(path, "nowhere"),
    "a link to itself": lambda path, draw: _linked(path, path.name),
    "a device": lambda path, draw: _linked(path, "/dev/zero"),
    "twice": lambda path, draw: _copied(
        path, draw.choice(["a b", "é", "a=1,b", "#x", "-x", "'q'", "$HOME", "a\tb", "%s", "{x}", "[1]", "A" * 200]) + path.suffix
    ),
    "another's": lambda path, draw: _anothers(path, draw),
}  # fmt: skip


def damaged(here: Path, draw: random.Random) -> str:
    """Damages one file below a folder, of a kind that is chosen first; returns which file, and how."""
    by_kind = dict[tuple[str, str], list[Path]]()
    for path in sorted(path for path in here.rglob("*") if path.is_file() and path.suffix != ".lock"):
        part = path.relative_to(here).parts[0]
        if "report" in path.relative_to(here).parts:  # which each report writes anew
            continue
        by_kind.setdefault((part, path.suffix if path.suffix in (".png", ".txt") else path.name), []).append(path)
    path = draw.choice(by_kind[draw.choice(sorted(by_kind))])
    ways: list[str] = [*MUTATIONS, *SWAPS]
    if path.suffix in STRUCTURED:
        ways += ["a node"] * len(ways)
    name = draw.choice(ways)
    try:
        if name in SWAPS:
            SWAPS[name](path, draw)
        else:
            mutate = STRUCTURED[path.suffix] if name == "a node" else MUTATIONS[name]
            path.write_bytes(mutate(path.read_bytes(), draw))
    except OSError as error:
        name = f"{name}, which failed ({error})"
    return f"{path.relative_to(here)}: {name}"
