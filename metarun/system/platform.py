"""What operating systems do not have in common: signals, cores, memory, sessions and folders that can be synced.

Everything else asks here, and no other module names what Windows or macOS lack. What is lacking is left out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import getpass
import hashlib
import importlib
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metarun.errors import UserError

WINDOWS = os.name == "nt"
LIBUV = not WINDOWS  # whether torch is built with it, over which the stores where ranks meet listen
LONGEST_FOR_SOCKETS = 70  # bytes of a folder: multiprocessing adds 32, and the path of a socket has at most 103
SHORT = "/tmp"
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# What a file system says that cannot. The last two are one number on Linux and two on macOS, which says ENOTSUP.
SYNCS_NO_FOLDER = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def number_of(name: str, otherwise: int) -> int:
    """The number of a signal.

    Args:
        name: `SIGUSR1`, say.
        otherwise: The number that stands for it in an exit status where the system has no such signal.

    Returns:
        The system's own number, or `otherwise`.
    """
    return int(getattr(signal, name, otherwise))


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals besides ctrl-C at which a run saves and ends, as far as the system has them."""
    names = ("SIGTERM", "SIGUSR1", "SIGHUP")  # the last one where the terminal or the connection is closed
    return tuple(found for name in names if (found := getattr(signal, name, None)) is not None)


def heeded_signals() -> tuple[signal.Signals, ...]:
    """The signals of `stop_signals` that this process does not ignore: `nohup` has it ignore SIGHUP, and that stays."""
    return tuple(number for number in stop_signals() if signal.getsignal(number) is not signal.SIG_IGN)


def signal_name(number: int) -> str:
    """The name of a signal, `signal 64` where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def stop(process: int, number: int) -> None:
    """Sends a signal to a process that handles it. Windows knows none but the end of a process, and so sends nothing."""
    if process == os.getpid():
        signal.raise_signal(number) if WINDOWS else os.kill(process, number)
    elif not WINDOWS:
        os.kill(process, number)


def lives(process: int) -> bool:
    """Whether a process of this machine lives; Windows does not say, and its processes count as alive."""
    if WINDOWS:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@functools.cache
def process_space() -> str:
    """Names the space in which the number of a process is its own: this machine, or one of the containers on it."""
    try:
        own = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        own = ""
    return hashlib.sha256(f"{platform.node()} {own}".encode()).hexdigest()[:8]


def quota(control_groups: Path = CONTROL_GROUPS) -> int | None:
    """The cores whose time the limit of a container allows (`docker run --cpus`, a pod's `limits.cpu`), rounded up.

    Args:
        control_groups: Where the kernel shows the limits.

    Returns:
        At least 1; None where there is no limit.
    """
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of version 2, and of version 1
        try:
            most, period = map(
                int, " ".join((control_groups / name).read_text(encoding="utf-8") for name in names).split()
            )
        except (OSError, ValueError):  # not there, or without a limit: "max 100000"
            continue
        if most > 0 < period:
            return -(-most // period)
    return None


def _visible_cores() -> list[int]:
    """The cores that this process may run on; those of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> list[int]:
    """The cores that this process may use: where a container has the time of fewer than it sees, as many of them."""
    return _visible_cores()[: quota()]


def can_bind() -> bool:
    """Whether a process can be bound to cores; under a quota that is left to the kernel, since all containers see the first cores."""
    return hasattr(os, "sched_setaffinity") and len(cores()) == len(_visible_cores())


def bind(chosen: Sequence[int]) -> None:
    """Binds this process to these cores, where that can be done."""
    if can_bind():
        os.sched_setaffinity(0, chosen)


def peak_memory() -> int | None:
    """The most bytes of memory that this process has held so far; None where the system does not say."""
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def own_session() -> None:
    """Puts this process into a session of its own, so that the terminal's ctrl-C does not reach it."""
    if hasattr(os, "setsid"):
        os.setsid()


def in_own_session() -> dict[str, Any]:
    """The arguments of `subprocess.Popen` that do the same to a process that is started."""
    import subprocess  # here, as multiprocessing below: most of the time that this module takes, for sweeps alone

    return (
        {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        if WINDOWS
        else {"start_new_session": True}
    )


def name_user() -> None:
    """Gives the user a name where the system has none, as for a number without an entry among a container's users.

    Libraries name their folders of temporary files after it, and would end the run.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError, AttributeError):  # which it is depends on the version of Python
        os.environ["USER"] = f"user{os.getuid() if hasattr(os, 'getuid') else ''}"


def start_method() -> str:
    """How jobs become processes: forked from a server that has imported everything, else started anew."""
    import multiprocessing

    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@contextlib.contextmanager
def folder_for_sockets() -> Iterator[None]:
    """Has sockets that are made meanwhile lie where the system takes their paths, however long that of temporary files is.

    Raises:
        UserError: There is no such folder.
    """
    import tempfile

    before, usual = tempfile.tempdir, tempfile.gettempdir()
    if len(os.fsencode(usual)) > LONGEST_FOR_SOCKETS and not WINDOWS:
        if not os.access(SHORT, os.W_OK | os.X_OK):
            raise UserError(
                f"TMPDIR={usual}: is too long for the sockets by which jobs are started; set one of at most {LONGEST_FOR_SOCKETS} bytes"
            )
        tempfile.tempdir = SHORT
    try:
        yield
    finally:
        tempfile.tempdir = before


def sync_folder(folder: Path) -> None:
    """Has the names in a folder reach the disk. Windows opens no folder, and keeps its names safe by itself.

    So it is with file systems that sync files alone, as folders that a virtual machine shares and some network folders.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in SYNCS_NO_FOLDER:
            raise
    finally:
        os.close(opened)
