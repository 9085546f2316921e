"""A process that has imported what a run imports, and forks for every command that a test starts.

A new interpreter takes seconds to import torch, and many tests kill, interrupt or join processes at work, to which it does not matter
how these came to be. All that the server does is to import. A command that is forked from it is a process of its own: with its own
arguments, environment, folder and output, and with the end that an interpreter has.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from metarun.sweeps.local import PRELOADED

CAN = hasattr(os, "pidfd_open")  # where it cannot be, commands have interpreters of their own


class Process:
    """A forked command, with what tests use of `subprocess.Popen`: it is the server's child, which tells how it ended."""

    def __init__(self, connection: socket.socket, stdout: IO[str], stderr: IO[str]) -> None:
        self.connection, self.stdout, self.stderr = connection, stdout, stderr
        self.returncode: int | None = None
        self.pid = int(connection.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(64))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, when nobody holds its output any more, and it has ended."""
        read = ["", ""]

        def take(place: int, stream: IO[str]) -> None:
            with stream:
                read[place] = stream.read()

        threads = [
            threading.Thread(target=take, args=each, daemon=True) for each in enumerate((self.stdout, self.stderr))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        self.wait(timeout)
        return read[0], read[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def read_at_start(env: dict[str, str]) -> dict[str, str]:
    """The variables that an interpreter, or a library that it imports, reads once and for all: the server has read them."""
    names = ("PYTHON", "OMP_", "OPENBLAS_", "MKL_", "TORCH")
    return {name: value for name, value in env.items() if name.startswith(names)}


def start(words: Sequence[str], env: dict[str, str], cwd: str | Path | None, start_new_session: bool) -> Process:
    """`python -m words...` as a process of its own, forked from a server that has read such an environment at its start."""
    connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    asked = {"words": list(words), "env": env, "cwd": str(cwd or os.getcwd()), "session": start_new_session}
    given = [theirs.fileno(), to_out, to_err]
    socket.send_fds(_server(tuple(read_at_start(env).items())), [json.dumps(asked).encode()], given)
    theirs.close()
    os.close(to_out)
    os.close(to_err)
    return Process(connection, open(out), open(err))


@functools.cache
def _server(variables: tuple[tuple[str, str], ...]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], env={**os.environ, **dict(variables)},
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip  # pipes, as those that take their places
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _serve(channel: socket.socket) -> list[str] | None:
    """Forks for what is asked, and tells how it ended. Returns in each child, with its words, and when nobody can ask any more."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # so that children share what no collection of theirs need look at
    at_work: dict[int, tuple[int, socket.socket]] = {}  # what tells that a child has ended; its number, and who asks
    while True:
        for ready in select.select([channel, *at_work], [], [])[0]:
            if ready is channel:
                message, given, _, _ = socket.recv_fds(channel, 1 << 20, 3, socket.MSG_CMSG_CLOEXEC)
                if not message:
                    return None
                asking, (out, err) = socket.socket(fileno=given[0]), given[1:]
                pid = os.fork()
                if pid == 0:
                    for other in (channel, asking, *(other for _, other in at_work.values())):
                        other.close()
                    for descriptor in at_work:
                        os.close(descriptor)
                    return _become(json.loads(message), out, err)
                os.close(out)
                os.close(err)
                asking.send(str(pid).encode())
                at_work[os.pidfd_open(pid)] = pid, asking
            else:
                os.close(ready)
                pid, asking = at_work.pop(ready)
                with asking, contextlib.suppress(BrokenPipeError):  # of a test that does not ask how it ended
                    asking.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def _become(asked: dict[str, Any], out: int, err: int) -> list[str]:
    for given, output in ((out, 1), (err, 2)):
        os.dup2(given, output)
        os.close(given)
    if asked["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[0] = os.getcwd()  # as `python -m` has it
    words: list[str] = asked["words"]
    return words


if __name__ == "__main__":
    command = _serve(socket.socket(fileno=int(sys.argv[1])))
    if command:
        sys.argv = command
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
