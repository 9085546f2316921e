"""One file of texts as rows: the characters that its bytes are, and the cells of a table, of lines of JSON or of a list of objects."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import math
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from metarun.errors import UserError
from metarun.files import parsed, special
from metarun.text import composed, lines_of, printable, separator_named

ROW = '{"text": "...", "label": "..."}'  # as an object of JSON has it
SHOWN = 60  # characters of a text in a message
HALF = "half of a character that UTF-16 writes as two (\\ud83d, say), which is no text; write the whole character, or leave it out"
_field_limit = threading.Lock()

log = logging.getLogger("metarun")


def shortened(text: str) -> str:
    """Shortens a text to its beginning, for a message."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def has_half(text: str) -> bool:
    """Whether a text holds `HALF`, of which neither bytes nor word pieces can be made."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def decoded(path: Path, key: str, encoding: str | None) -> str:
    """Decodes the text of a file.

    Args:
        path: The file.
        key: What errors begin with.
        encoding: Its encoding; None for UTF-8, or UTF-16 with its mark.

    Raises:
        UserError: It cannot be read, is no text, or is in another encoding.
    """
    if kind := special(path):
        raise UserError(f"{key}: {path} is {kind}, and no file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from error
    marked = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    chosen = encoding or ("utf-16" if marked else "utf-8-sig")
    is_utf8 = chosen.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")
    try:
        text = raw.decode("utf-8-sig" if is_utf8 else chosen)
    except LookupError as error:
        raise UserError(
            f"{key}.encoding={encoding}: Python knows no such encoding; try utf-8, cp1252 or latin-1"
        ) from error
    except UnicodeError as error:
        if b"\0" in raw[:4096] and not marked:
            raise _no_text(raw, path, key, encoding) from error
        place = getattr(error, "start", 0)
        line = raw.count(b"\n", 0, place) + 1
        other = "utf-8" if encoding and not is_utf8 else "cp1252 or latin-1"
        raise UserError(
            f"{key}: {path}, line {line}: is no text in {encoding or 'UTF-8'}; name its encoding, {key}.encoding={other}, say"
        ) from error
    if "\0" in text:
        raise _no_text(raw, path, key, encoding)
    return text.removeprefix("\ufeff")  # the mark, which UTF-16-LE and UTF-16-BE leave in


def _no_text(raw: bytes, path: Path, key: str, encoding: str | None) -> UserError:
    """The error of a file that holds zero bytes: every other one is such in UTF-16 without its mark, of most languages."""
    for form, zeros, others in (("utf-16-le", raw[1:4096:2], raw[:4096:2]), ("utf-16-be", raw[:4096:2], raw[1:4096:2])):
        if not encoding and zeros.count(0) > len(zeros) / 2 and 0 not in others:
            return UserError(
                f"{key}: {path} is no text in UTF-8, but seems to be UTF-16 without its mark; name its encoding, {key}.encoding={form}"
            )
    return UserError(f"{key}: {path} is no text, it holds bytes of another kind")


class Several(str):
    """A list as its object of JSON has it: no text, and a label where it has one value."""


Row = tuple[str, dict[str, str]]


def table_rows(text: str, path: Path, key: str, alone: Collection[str] = ()) -> list[Row]:
    """Reads the rows of a table with a header, by column, and where they are; a table of one column has one of the names `alone`.

    Raises:
        UserError: It is no table, or a row does not fit its header.
    """
    named, text = separator_named(text)
    first = next((line for line in lines_of(text) if line.strip()), "")
    delimiter = named or max("\t;,|", key=first.count)  # a tab where there is none: commas are then of the texts
    if not first.count(delimiter) and composed(first.strip().strip('"')).lower() not in alone:
        raise UserError(
            f"{key}: {path} is no table: its first line, {shortened(first)!r}, has one column; it must name the columns, as "
            f"{'text or ' if alone else ''}text,label"
        )
    try:
        rows = _parsed(text, path, key, delimiter, csv.QUOTE_MINIMAL)
    except UserError:
        if delimiter == "\t" and (plain := _unquoted(text, path, key)):
            return plain
        raise
    # A quote that is a character may be closed by that of a later text: the lines between are then within one cell.
    over_lines = (
        where for where, row in rows if any("\t" in cell and len(lines_of(cell)) > 1 for cell in row.values())
    )
    if delimiter == "\t" and (first := next(over_lines, "")):
        plain = _unquoted(text, path, key)
        if plain and list(plain[0][1]) == list(rows[0][1]):
            log.warning(
                "%s: %s: a quote ends in a later line; each line has all columns, so that quotes are read as characters of the texts; "
                "put a text with a tab and a new line into JSON lines (.jsonl)",
                key, first,
            )  # fmt: skip
            return plain
    return rows


def _unquoted(text: str, path: Path, key: str) -> list[Row]:
    """The rows of a table with tabs, in which a quote is often a character like any other; none where lines have other columns."""
    try:
        return _parsed(text, path, key, "\t", csv.QUOTE_NONE)
    except UserError:
        return []


def _parsed(text: str, path: Path, key: str, delimiter: str, quoting: Any) -> list[Row]:
    rows: list[Row] = []
    header: list[str] = []
    width = 0
    run_on: list[str] = []  # rows with something in columns without a name
    begins = 1
    with _field_limit:
        limit = csv.field_size_limit(2**31 - 1)  # a long text is one field
        try:
            reader = csv.reader(
                io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True
            )
            for cells in reader:
                where = f"{path}, line {begins}"
                begins = reader.line_num + 1
                if not any(cell.strip() for cell in cells):
                    continue
                if not header:
                    header = [composed(cell.strip()) for cell in cells]
                    width, header = len(header), _named_alone(header)
                    if double := next((name for name in header if header.count(name) > 1), None):
                        raise UserError(f"{key}: {path} has several columns {printable(double)!r}")
                    continue
                if len(cells) != width:
                    hint = f"; a text with a {_named(delimiter)} in it needs quotes" if len(cells) > width else ""
                    raise UserError(f"{key}: {where}: has {len(cells)} columns, the first line {width}{hint}")
                rows.append((where, dict(zip(header, (cell.strip() for cell in cells), strict=False))))
                if any(cell.strip() for cell in cells[len(header) :]):
                    run_on.append(where)
        except csv.Error as error:
            reason = "a quote is opened and not closed" if "unexpected end" in str(error) else str(error)
            raise UserError(f"{key}: {path}, line {begins}: cannot be read ({reason})") from error
        finally:
            csv.field_size_limit(limit)
    if run_on:
        log.warning(
            "%s: %s: holds something in a column without a name, as %s; the last columns have no names, and are left out",
            key, run_on[0], "no other row does" if len(run_on) == 1 else f"{len(run_on)} rows do",
        )  # fmt: skip
    return rows


def _named_alone(header: list[str]) -> list[str]:
    """The names of columns without the empty ones at the end, which spreadsheets write for columns that they had once."""
    named = max((place for place, name in enumerate(header, 1) if name), default=len(header))
    return header[:named]


def _named(delimiter: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}.get(delimiter, delimiter)


def _cell(value: str | float | None) -> str:
    """A value of JSON as a cell of a table: nothing for null and for NaN, which pandas writes for it; 1.0 and 1 are the same number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def listed_in(cell: str) -> list[str] | None:
    """The values of a cell that is a list, as JSON or Python writes it: `["a", "b"]`; None of any other cell."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    for read in (parsed, ast.literal_eval):
        try:
            found: Any = read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return [_cell(value) if isinstance(value, str | int | float) else str(value) for value in found]
    return None


def _one_object(text: str) -> dict[str, Any] | None:
    """The object that a file of JSON is as a whole; None where it is a list, or several objects, a line each."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        whole: dict[str, Any] = parsed(text)
    except ValueError:
        return None
    return whole


def list_within(text: str) -> str | None:
    """The name of the first list of objects in the one object that a file is; None where there is none."""
    lists = ((name, value) for name, value in (_one_object(text) or {}).items() if isinstance(value, list))
    return next((name for name, value in lists if any(isinstance(entry, dict) for entry in value)), None)


def _refuse_one_object(text: str, path: Path, key: str) -> None:
    """Raises `UserError` for a file that is one object and no row: over several lines, or of lists and objects alone."""
    whole = _one_object(text)
    if whole is None:
        return
    if all(isinstance(value, dict | list) for value in whole.values()) or "\n" in text.strip():
        raise UserError(f"{key}: {path}: is one object; give a list of objects, [{ROW}, ...], or such an object a line")


def json_rows(text: str, path: Path, key: str) -> Iterator[Row]:
    """Reads the objects of JSON lines, or of one JSON list of objects.

    Raises:
        UserError: The file is neither, or an object holds half a character.
    """
    _refuse_one_object(text, path, key)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            entries = list(enumerate(parsed(text), 1))
        except ValueError as error:
            raise UserError(f"{key}: {path}: is no JSON ({error})") from error
        unit = "entry"
    else:
        entries, unit = [], "line"
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other breaks than that
            if line.strip():
                try:
                    entries.append((number, parsed(line)))
                except ValueError as error:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise UserError(
                        f"{key}: {path}, line {number}: is no JSON ({reason}): {shortened(line)!r}"
                    ) from error
    for number, entry in entries:
        where = f"{path}, {unit} {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{key}: {where}: is no object such as {ROW}")
        row: dict[str, str] = {}
        for name, value in entry.items():
            name = composed(name)
            if isinstance(value, list):
                row[name] = Several(json.dumps(value, ensure_ascii=False))
            elif not isinstance(value, dict):  # an object is nobody's text or label
                row[name] = _cell(value)
                if has_half(row[name]):
                    raise UserError(f"{key}: {where}: {name} holds {HALF}")
        yield where, row
