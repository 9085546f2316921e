"""Jobs on this machine, each in a process of its own, forked from one that has imported everything and done nothing.

A fork takes hundredths of a second where a new interpreter with torch takes two, and nothing of one job (memory, CUDA,
random generators, open files) can reach the next.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

from omegaconf import DictConfig

from metarun.config.types import PositiveInt
from metarun.sweeps.jobs import MENDABLE, Job, Outcome, exporting, how_it_ended, perform
from metarun.sweeps.launcher import Launcher
from metarun.sweeps.plan import Ended, say
from metarun.system import platform

PRELOADED = ["metarun.cli", "metarun.runs.carry_out", "torch.utils.tensorboard"]
LAST_SAVE = 30.0  # seconds that a job may take to save and end when the sweep is interrupted


class Local(Launcher):
    """Processes on this machine, side by side.

    Args:
        at_once: The jobs at once; null is one a GPU, else as many as there are cores for hardware.processes times
            hardware.threads.
    """

    here = True

    def __init__(self, *, at_once: PositiveInt | None = None) -> None:
        self.at_once = at_once

    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        """Runs the jobs, `at_once` at a time, each on cores (and a GPU) of its own where there are enough."""
        cores = (config.hardware.processes or 1) * (config.hardware.threads or 1)
        return carry_out(jobs, self.at_once, cores, use_gpus=config.hardware.device != "cpu")


def gpus() -> list[str]:
    """The names of the GPUs that jobs may use, without loading CUDA here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = (name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, encoding="utf-8").stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def threads_asked(environment: Mapping[str, str]) -> int | None:
    """The threads that `OMP_NUM_THREADS` asks for, of a list (`4,2`) those of the outermost level; None where it is no number."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def places(
    at_once: int | None, cores_per_job: int, devices: Sequence[str], most: int | None = None
) -> list[tuple[list[int], str | None]]:
    """The cores and the GPU of each place that a job can run in.

    `at_once` places; None: one a GPU, or as many as there are times `cores_per_job` cores. The cores are shared out, and
    where there are more places than cores they are used by several. No more than the first `most` places are listed.
    """
    cores = platform.cores()
    count = at_once or len(devices) or max(1, len(cores) // cores_per_job)
    return [
        (
            cores[len(cores) * place // count : len(cores) * (place + 1) // count] or [cores[place % len(cores)]],
            devices[place % len(devices)] if devices else None,
        )
        for place in range(count if most is None else min(count, most))
    ]


class Running:
    """A job in its process."""

    def __init__(self, job: Job, place: tuple[list[int], str | None], quiet: bool) -> None:
        self.job, self.place, self.started = job, place, time.monotonic()
        self.pipe, theirs = multiprocessing.Pipe()
        environment = dict(os.environ)
        cores, gpu = place
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        output = str(job.log) if quiet else None
        heeded = platform.heeded_signals()
        arguments = (theirs, job.arguments, environment, os.getcwd(), cores, output, heeded)
        context: Any = multiprocessing.get_context(platform.start_method())
        self.process = context.Process(target=_in_child, args=arguments)
        self.process.start()
        theirs.close()

    def outcome(self) -> Outcome:
        """How it ended; waits for that."""
        received: Outcome | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            received = self.pipe.recv()
        self.process.join()
        outcome = received or how_it_ended(self.process.exitcode)
        self.pipe.close()
        self.process.close()
        return outcome


def _in_child(
    pipe: connection.Connection,
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: str,
    cores: list[int],
    output: str | None,
    heeded: Sequence[signal.Signals],
) -> None:
    import torch

    for number in heeded:  # which the server ignores
        signal.signal(number, signal.SIG_DFL)
    platform.own_session()  # the terminal's ctrl-C is for the sweep, which passes it on once
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    platform.bind(cores)
    torch.set_num_threads(min(len(cores), threads_asked(environment) or len(cores)))
    threading.Thread(target=_end_with_the_sweep, args=(pipe,), daemon=True).start()
    try:
        if output is not None:
            _print_to(output)
    except OSError as error:  # a full disk, say
        outcome = Outcome(MENDABLE, f"{error.filename or output}: {error.strerror}")
    else:
        outcome = perform(arguments, tell_of_signals=output is not None)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the sweep was killed, and nobody asks any more
        pipe.send(outcome)


def _print_to(output: str) -> None:
    """Has this process print to a file, which is begun anew."""
    os.makedirs(os.path.dirname(output), exist_ok=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _end_with_the_sweep(pipe: connection.Connection) -> None:
    """Saves and ends this job when the process of the sweep is gone, killed perhaps; nobody else would."""
    try:
        pipe.poll(None)  # nothing is ever sent
    except OSError:
        return
    platform.stop(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SAVE)
    os._exit(1)


def start_server() -> None:
    """Starts the process that jobs are forked from, where the system forks.

    It lives through the signals that `timeout` and clusters send to a whole group of processes: the sweep, which ends its
    jobs, learns from it when they have ended.
    """
    if platform.start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in platform.stop_signals()}
    try:
        with platform.folder_for_sockets(), exporting(OPENBLAS_NUM_THREADS="1"):  # a process with threads must not fork
            forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(jobs: Sequence[Job], at_once: int | None, cores_per_job: int, use_gpus: bool) -> Iterator[Ended]:
    """Runs the jobs; yields each with its outcome and its seconds as it ends.

    With one place the jobs print to the terminal, else each to a file of its own. An interruption is passed on to the
    jobs at work, which save and end, and then raised.
    """
    most = max(2, len(jobs))  # two of them say that jobs print aside, whatever their number
    free = places(at_once, cores_per_job, gpus() if use_gpus else [], most)
    quiet = len(free) > 1
    if quiet and not platform.can_bind():
        say("jobs share all cores: this system binds no process to some of them")
    waiting, running = list(reversed(jobs)), list[Running]()
    start_server()
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop()
                if not quiet:
                    job.log.unlink(missing_ok=True)  # of an earlier time, side by side
                    say(f"\n{job.label}")
                running.append(Running(job, free.pop(0), quiet))
            ready = connection.wait([item.pipe for item in running])
            for item in [item for item in running if item.pipe in ready]:
                running.remove(item)
                free.append(item.place)
                yield item.job, item.outcome(), time.monotonic() - item.started
    except BaseException as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        for item in running:
            if item.process.is_alive() and item.process.pid:
                platform.stop(item.process.pid, number)
            if platform.WINDOWS:  # where a job learns from its pipe that it shall end
                item.pipe.close()
        deadline = time.monotonic() + LAST_SAVE
        try:
            for item in running:
                item.process.join(max(0.0, deadline - time.monotonic()))
        finally:  # a second ctrl-C waits for no job, and leaves none behind
            for item in running:
                item.process.kill()
        raise
