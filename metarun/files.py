"""Files that must survive a kill at any instruction: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from metarun.errors import InputError, UserError
from metarun.system.platform import lives, process_space, sync_folder
from metarun.text import shown_path

MADE_AGAIN = "delete it to have it made again"  # advice where a stored file is damaged
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # two numbers on macOS, which says the last
MOST_BYTES = 2**31  # of the arrays in a file: the scores of a million episodes after each of a hundred steps have less
END = 2**16  # bytes of the end of a file of lines that are read first
LEVELS = 64  # of JSON within JSON: metarun writes ten, and what goes through values calls itself for each
TOO_DEEP = "it is nested too deeply"
SECONDS_LEFT_ASIDE = 86_400.0  # after which what is written aside is of a killed process, whoever has its number
_WRITERS: set[str] = set()  # of this process, at work now

log = logging.getLogger("metarun")


def sync(file: Any) -> None:
    """Has what was written to an open file reach the disk."""
    os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are not there, so that a power failure does not take them away again."""
    new = []
    above = folder
    while not above.is_dir():
        new.append(above)
        if above.parent == above:
            break
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        sync_folder(made.parent)


def unwritable(error: OSError) -> str:
    """Why a folder cannot be written; the system says of a file, or of a link to nowhere, in its place that it exists."""
    if isinstance(error, FileExistsError) and error.filename is not None:
        return f"{shown_path(error.filename)} is no folder"
    return error.strerror or str(error)


def typed_path(text: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded, or that of a file URL; one that begins with `~` and with no user's name is the name of a file."""
    text = os.fspath(text)
    if text.startswith(("file:///", "file://localhost/")):
        from urllib.request import url2pathname  # here: it takes long to import, and nearly nobody types such an URL

        return Path(url2pathname(text.removeprefix("file://").removeprefix("localhost")))
    return Path(os.path.expanduser(text))


def given_path(value: Any, key: str) -> Path:
    """The path that somebody gave; an empty one, which would be the working folder, names nothing.

    Args:
        value: The path, as text, bytes or a `Path`.
        key: What errors are about.

    Raises:
        InputError: It is empty, or no path.
    """
    if not isinstance(value, str | bytes | os.PathLike):
        raise InputError(f"{key}: {type(value).__name__} is no path")
    if not (path := os.fsdecode(value)):
        raise InputError(f"{key}: is empty, and names neither a file nor a folder; the working folder is .")
    return typed_path(path)


def walk(top: Path, keep: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all folders below it, those behind symbolic links too, each once, so that no circle of links has no end.

    What has a place without links is found there; then come the links, but for those to a folder that holds `top` itself.

    Args:
        top: The folder.
        keep: Whether a file or a folder of a name is looked at.

    Yields:
        A folder and the names of its files in order; folders in order.
    """
    own, seen, left = Path(os.path.realpath(top)), set[str](), [top]
    while left:
        start = left.pop(0)
        if seen and own.is_relative_to(os.path.realpath(start)):
            continue
        for folder, folders, names in os.walk(start):
            real = os.path.realpath(folder)
            folders[:] = sorted(filter(keep, folders)) if real not in seen else []
            if real in seen:
                continue
            seen.add(real)
            left += [Path(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
            yield Path(folder), sorted(filter(keep, names))


def special(path: Path) -> str | None:
    """What a path leads to that is neither a file nor a folder, and that a reader might wait for or read without end; else None."""
    try:
        mode = path.stat().st_mode
    except OSError:  # not there, which opening it tells better
        return None
    kinds: dict[str, Callable[[int], bool]] = {
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((kind for kind, has in kinds.items() if has(mode)), None)


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is none, or holds what nothing that reads on can take: more than `LEVELS` within each other, or a whole
            number that is beyond every float.
    """
    try:
        found = json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except OverflowError as error:
        raise ValueError("a number in it is too large") from error
    layer = [found]
    for _ in range(LEVELS + 1):
        if not (layer := [inner for one in layer for inner in values_in(one)]):
            return found
    raise ValueError(TOO_DEEP)


def _whole(digits: str) -> int:
    number = int(digits)
    float(number)  # raises OverflowError
    return number


def values_in(value: Any) -> Collection[Any]:
    """The values in a mapping or a list, as JSON and YAML have them; none in anything else."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(values: Any) -> str:
    """A short digest of JSON values, which names what is made of them: 16 hexadecimal digits, whatever the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def unread(path: Path, error: OSError, advice: str) -> UserError:
    """What is told of a file that the system does not let read.

    Args:
        path: The file.
        error: What the system says.
        advice: What to do about a file of the run that is bad; it does not help where the reader has no right to it.
    """
    more = "" if isinstance(error, PermissionError) else f"; {advice}"
    return UserError(f"{shown_path(path)}: cannot be read ({error.strerror or error}){more}")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Reads a JSON file that metarun wrote.

    Args:
        path: The file.
        advice: What to do where it is damaged, to follow a semicolon.

    Returns:
        The object in it.

    Raises:
        UserError: It cannot be read, or holds no object; it names the file, what is wrong, and `advice`.
    """
    try:
        values = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unread(path, error, advice) from error
    except ValueError as error:  # also bytes that are no UTF-8
        raise UserError(f"{shown_path(path)}: is damaged ({damage(path)}); {advice}") from error
    if not isinstance(values, dict):
        raise UserError(f"{shown_path(path)}: is damaged (it holds no JSON object); {advice}")
    return values


def check_opens(path: Path, what: str) -> None:
    """Checks that the system lets a file be read, before what a library says of it is taken for damage.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        UserError: It does not.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror or error})") from error


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads a file of JSON objects with a `step`, one a line, of which a kill or a power failure may have spoiled some.

    Args:
        path: The file.

    Returns:
        The objects; and how many lines are damaged. Half a line at the end, which a kill leaves, is none of either.
    """
    lines = path.read_text(errors="replace", encoding="utf-8").split("\n")[:-1]
    found = [values for line in lines if (values := _json_line(line)) is not None]
    return found, len(lines) - len(found)


def last_json_line(path: Path) -> dict[str, Any] | None:
    """Reads the last object that `read_json_lines` finds in a file, from its end: a long training has written a million lines.

    Args:
        path: The file.

    Returns:
        The object; None where there is none.
    """
    with open(path, "rb") as file:
        size, length = file.seek(0, os.SEEK_END), END
        while True:
            start = max(size - length, 0)
            file.seek(start)
            lines = file.read(size - start).decode(errors="replace").split("\n")[:-1]
            whole = lines if start == 0 else lines[1:]  # the first begins somewhere before
            found = next((values for line in reversed(whole) if (values := _json_line(line)) is not None), None)
            if found is not None or start == 0:
                return found
            length *= 2


def _json_line(line: str) -> dict[str, Any] | None:
    """The object of a line; None of a damaged one."""
    try:
        values: dict[str, Any] = parsed(line.strip("\0"))
        return values if isinstance(values["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def damage(path: Path) -> str:
    """What is wrong with a text file that cannot be read as what it should be."""
    content = path.read_bytes()
    if not content.strip():
        return "it is empty"
    if b"\0" in content:
        return "it has zero bytes, as after a power failure"
    return "it is truncated, or is not what metarun writes"


def check_archive(path: Path) -> None:
    """Compares what a zip archive holds, as `torch.save` writes it, with the checksums in it, which torch does not look at.

    A file that is no archive passes, and so do members without a checksum, which torch can be told to leave out.

    Raises:
        zipfile.BadZipFile: A member is damaged; or they hold more than the file, which torch, that compresses nothing, never writes, and
            which could be more than the memory holds.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("its members hold more than the file")
        for member in archive.infolist():
            if member.CRC:
                with archive.open(member) as content:
                    while content.read(1 << 20):
                        pass


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file, all or nothing; of several writers at once the last one's content is there in the end.

    Args:
        path: The file.
        write: Writes the new content into a file that is open.

    Raises:
        UserError: It cannot be written, as on a full disk; the file is as it was, unless its folder alone could not be synced.
    """
    writer = f"{process_space()}-{os.getpid()}-{os.urandom(4).hex()}"
    aside = path.with_name(f".{path.name}.{writer}.writing")
    replaced = False
    try:
        _remove_left_aside(path)
        _WRITERS.add(writer)
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            replaced = True
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        finally:
            _WRITERS.discard(writer)
        sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous one is untouched" if path.exists() and not replaced else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def _remove_left_aside(path: Path) -> None:
    """Removes what killed writers of a file left beside it; after a day where nobody sees their end: of other machines, on Windows."""
    named = re.compile(rf"\.{re.escape(path.name)}\.(?:(?P<writer>(\w+)-(\d+)-\w+)\.)?writing")
    for other in os.scandir(path.parent):
        if not (found := named.fullmatch(other.name)):
            continue
        writer, space, process = found.groups()  # no writer: of an earlier version of metarun
        with contextlib.suppress(OSError):  # another process removes it too
            at_work = writer is not None and time.time() - other.stat().st_mtime < SECONDS_LEFT_ASIDE
            if at_work and space == process_space():
                at_work = writer in _WRITERS if int(process) == os.getpid() else lives(int(process))
            if not at_work:
                Path(other).unlink()


def save_bytes(path: Path, content: bytes) -> None:
    """A file with this content."""
    replace(path, lambda file: file.write(content))


def json_text(values: Any, indent: int | None = None) -> str:
    """Values as JSON, which has no NaN and nothing infinite: such a number becomes null, as readers of any language expect.

    Args:
        values: What JSON can hold.
        indent: The spaces of a level; None is all in one line.
    """

    def held(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {name: held(one) for name, one in value.items()}
        return [held(one) for one in value] if isinstance(value, list | tuple) else value

    return json.dumps(held(values), indent=indent, allow_nan=False)


def save_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file for people: indented, in the order given."""
    save_bytes(path, (json_text(values, indent=2) + "\n").encode())


def save_arrays(path: Path, **arrays: Any) -> None:
    """A compressed `.npz` file."""
    import numpy as np  # not at the top: --help needs no arrays

    replace(path, lambda file: np.savez_compressed(file, **arrays))


def read_arrays(path: Path, advice: str, names: Sequence[str]) -> dict[str, Any]:
    """Reads an `.npz` file that `save_arrays` wrote; runs no code from it.

    Args:
        path: The file.
        advice: What to do where it is damaged, to follow a semicolon.
        names: The arrays that it must have.

    Returns:
        All its arrays, by name.

    Raises:
        UserError: It cannot be read, or is damaged; it names the file, what is wrong, and `advice`.
    """
    import numpy as np

    try:
        _check_size(path)
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            found = dict(stored)
    except OSError as error:
        raise unread(path, error, advice) from error
    except Exception as error:  # whatever numpy, zipfile and zlib raise, which depends on the byte that is wrong
        why = "it is truncated, or is not what metarun writes" if path.stat().st_size else "it is empty"
        raise UserError(f"{shown_path(path)}: is damaged ({why}); {advice}") from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{shown_path(path)}: is damaged (it has no {missing[0]}); {advice}")
    return found


def _check_size(path: Path) -> None:
    """Raises `zipfile.BadZipFile` for an `.npz` file whose arrays are to have more bytes than any that metarun writes.

    Nothing of it was unpacked then: a megabyte of it can hold a gigabyte.
    """
    with zipfile.ZipFile(path) as archive:
        if (size := sum(member.file_size for member in archive.infolist())) > MOST_BYTES:
            raise zipfile.BadZipFile(f"arrays of {size} bytes")


@contextlib.contextmanager
def locked(
    path: Path, holder: str, seconds: float | None = None, tell: Callable[[str], object] = log.info
) -> Iterator[None]:
    """Holds the lock of a file, which other processes of any machine respect.

    Args:
        path: The file.
        holder: Who may hold it, for the line that says that this process waits.
        seconds: How long it waits; None waits until the other ends.
        tell: Where that line goes.

    Raises:
        UserError: The folder takes no locks.
        Timeout: Another process held the lock all the time.
    """
    from filelock import FileLock, Timeout  # not at the top: --help locks nothing

    lock = FileLock(path, fallback_to_soft=False)  # which would stand in a mark, see `_takes_locks`
    with _takes_locks(path.parent):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(f"{holder}; waiting for it{'' if seconds is None else f', {seconds:.0f} s at most'}")
            lock.acquire(timeout=-1 if seconds is None else seconds)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _takes_locks(folder: Path) -> Iterator[None]:
    """A file system that knows no locks, as some network folders, is a `UserError` that names the folder.

    A mark beside the file could stand in for a lock, but one that a kill left behind would stop every later run.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise _refused(folder, error.strerror or str(error)) from error
    except NotImplementedError as error:
        raise _refused(folder, "its file system has none") from error


def _refused(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{shown_path(folder)}: takes no locks ({reason}), without which two runs could write there at once; choose a folder on "
        "another disk with outputs= (runs), METARUN_CACHE (tables) or METARUN_DATA (downloads)"
    )
