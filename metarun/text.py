"""Text that came from elsewhere, on its way to a terminal, a table or a shell."""

from __future__ import annotations

import codecs
import csv
import errno
import io
import os
import re
import shlex
import shutil
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

WIDTH, NARROWEST = 80, 20
# Control characters, halves of characters (bytes that are no UTF-8), and what ends a line or turns its direction.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

SPELLED = {"±": "+-", "×": "x", "→": "->", "…": "...", "–": "-", "—": "-", "│": "|", "─": "-"}


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """For characters that an output's encoding lacks: letters that say the same, or the number of the character."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    told = "".join(SPELLED.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking)
    return told, error.end


codecs.register_error("metarun.spelled", _spelled)


class Outlasting(io.TextIOWrapper):
    """An output whose errors name it; once a terminal is closed what is written to it is lost, and the run is not.

    A run that was started with `nohup`, or disowned, goes on without its terminal, and one that SIGHUP ends has still to save.
    """

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        with self._outlasting():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Has the terminal show what was written."""
        with self._outlasting():
            super().flush()

    @contextmanager
    def _outlasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO or not _is_device(self):
                error.filename = "standard output" if self.fileno() == 1 else "standard error"
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def outlasting(stream: Any) -> Any:
    """An output that spells what its encoding lacks, names itself in its errors, and outlasts the terminal that it goes to.

    Args:
        stream: `sys.stdout` or `sys.stderr`; None where the shell has closed it.

    Returns:
        The stream to use in its place, often the same.
    """
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not hasattr(stream, "reconfigure"):
        return stream
    stream.reconfigure(errors="metarun.spelled")
    of_process = stream is sys.__stdout__ or stream is sys.__stderr__  # which nobody else may close
    if isinstance(stream, Outlasting) or not (of_process or _is_device(stream)):
        return stream
    stream.flush()
    return Outlasting(
        stream.buffer,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _is_device(stream: io.TextIOWrapper) -> bool:
    """Whether a stream is to a terminal, also to one that is closed, which is no tty any more."""
    try:
        return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except OSError:  # it has no file
        return False


def has_control(text: str) -> bool:
    """Whether a text has characters that a terminal would obey instead of showing them."""
    return any(unicodedata.category(character) in UNPRINTABLE or character in TURNING for character in text)


def printable(text: str) -> str:
    r"""The text with control characters as escapes (`\x1b`), so that a terminal shows them and does not obey."""
    if not has_control(text):
        return text
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode() if has_control(character) else character
        for character in text
    )


def all_printable(values: Any) -> Any:
    """JSON values with every text in them, names too, as `printable` has it: what others wrote, before it is shown anywhere."""
    if isinstance(values, dict):
        return {all_printable(name): all_printable(value) for name, value in values.items()}
    if isinstance(values, list):
        return [all_printable(value) for value in values]
    return printable(values) if isinstance(values, str) else values


def shown_path(path: Path | str) -> str:
    """A path as a message shows it: relative where it lies below here."""
    whole = os.path.abspath(path)
    below = os.path.relpath(whole) if whole.startswith(os.getcwd().rstrip(os.sep) + os.sep) else whole
    return printable(f"./{below}" if below.startswith("-") else below)


def shell_path(path: Path | str) -> str:
    """A path that can be pasted into a command of bash or zsh: as a message shows it, in quotes where it needs them."""
    return shlex.quote(shown_path(path))


def below_here(text: str) -> str:
    """A message in which paths below the working folder are relative, as they were most likely typed."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed, and nothing lies below it
        return text
    if here == os.path.dirname(here):
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(printable(here) + os.sep)}(?=[^\s/-])", "", text)


def shape_text(shape: Iterable[int]) -> str:
    """A shape as people write it: `3x84x84`."""
    return "x".join(map(str, shape))


def composed(text: str) -> str:
    """The one way to write what looks the same (NFC): file systems of macOS take an accent apart from its letter, tables seldom do."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def separator_named(text: str) -> tuple[str | None, str]:
    """Finds the separator of a table that its first line names, `sep=;`, as spreadsheets write and read it.

    Args:
        text: The table.

    Returns:
        The separator, None where none is named; and the text with that line left empty, so that others keep their numbers.
    """
    found = re.match(r'\s*"?sep=([^\w\s"]|\t)"?[ \t]*(?=\r?\n)', text, re.IGNORECASE)
    return (found[1], "\n" * found[0].count("\n") + text[found.end() :]) if found else (None, text)


def csv_line(cells: Sequence[object]) -> str:
    """A line of a table. Python leaves a carriage return without quotes where lines end otherwise, and readers end a line at it."""

    def written(quoting: Literal[0, 1]) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n", quoting=quoting).writerow(cells)
        return line.getvalue()

    line = written(csv.QUOTE_MINIMAL)
    return written(csv.QUOTE_ALL) if "\r" in line else line


def lines_of(text: str) -> list[str]:
    """The lines of a file's text. `splitlines` takes characters of a line too for its end: the NEL of Latin-1, U+2028, and more."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def listed(names: Iterable[object], width: int = 160) -> str:
    """Names between commas, as many as two lines of a terminal hold, and how many more there are."""
    every = [printable(str(name)) for name in names]
    shown: list[str] = []
    while len(shown) < len(every) and (
        not shown or sum(len(name) + 2 for name in shown) + len(every[len(shown)]) <= width
    ):
        shown.append(every[len(shown)])
    left = len(every) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")


def counted(count: int, one: str, several: str = "") -> str:
    """A number of things: `1 image`, `1,200 images`.

    Args:
        count: How many.
        one: What one is called.
        several: What several are called; empty for `one` with an s.
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def text_width() -> int:
    """The columns that running text takes: 80, or as many as a narrower terminal has."""
    if not sys.stdout.isatty():
        return WIDTH
    return max(NARROWEST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def duration(seconds: float) -> str:
    """A time in the unit that people would say: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, length, below in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < below:
            return f"{seconds / length:.0f} {unit}" if unit != "h" else f"{seconds / length:.1f} h"
    return f"{seconds / 86400:.1f} days"


def bytes_text(count: int) -> str:
    """A number of bytes in the unit that people would say."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
