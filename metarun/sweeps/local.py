"""Jobs on this machine, each in a process of its own, forked from one that has imported everything and done nothing.

A fork takes hundredths of a second where a new interpreter with torch takes two, and nothing of one job (memory, CUDA,
random generators, open files) can reach the next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess

from metarun.sweeps.jobs import Job, Outcome, exporting, how_it_ended, perform
from metarun.sweeps.plan import Ended, say

PRELOADED = ["metarun.cli", "metarun.runs.carry_out", "torch.utils.tensorboard"]
LAST_SAVE = 30.0  # seconds that a job may take to save and end when the sweep is interrupted


def gpus() -> list[str]:
    """The names of the GPUs that jobs may use, without loading CUDA here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def places(at_once: int | None, cores_per_job: int, devices: Sequence[str]) -> list[tuple[list[int], str | None]]:
    """The cores and the GPU of each place that a job can run in.

    `at_once` places; None: one a GPU, or as many as there are times `cores_per_job` cores. The cores are shared out, and
    where there are more places than cores they are used by several.
    """
    cores = sorted(os.sched_getaffinity(0))
    count = at_once or len(devices) or max(1, len(cores) // cores_per_job)
    return [
        (
            cores[len(cores) * place // count : len(cores) * (place + 1) // count] or [cores[place % len(cores)]],
            devices[place % len(devices)] if devices else None,
        )
        for place in range(count)
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
        arguments = (theirs, job.arguments, environment, os.getcwd(), cores, output)
        self.process: ForkServerProcess = multiprocessing.get_context("forkserver").Process(
            target=_in_child, args=arguments
        )
        self.process.start()
        theirs.close()

    def outcome(self) -> Outcome:
        """How it ended; waits for that."""
        told: Outcome | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            told = self.pipe.recv()
        self.process.join()
        outcome = told or how_it_ended(self.process.exitcode)
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
) -> None:
    import torch

    os.setsid()  # the terminal's ctrl-C is for the sweep, which passes it on once
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(min(len(cores), int(environment.get("OMP_NUM_THREADS", len(cores)))))
    if output is not None:
        os.makedirs(os.path.dirname(output), exist_ok=True)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    threading.Thread(target=_end_with_the_sweep, args=(pipe,), daemon=True).start()
    pipe.send(perform(arguments))


def _end_with_the_sweep(pipe: connection.Connection) -> None:
    """Saves and ends this job when the process of the sweep is gone, killed perhaps; nobody else would."""
    try:
        pipe.poll(None)  # nothing is ever sent
    except OSError:
        return
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SAVE)
    os._exit(1)


def start_server() -> None:
    """Starts the process that jobs are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with exporting(OPENBLAS_NUM_THREADS="1"):  # a process with threads must not fork
        forkserver.ensure_running()


def carry_out(jobs: Sequence[Job], at_once: int | None, cores_per_job: int, use_gpus: bool) -> Iterator[Ended]:
    """Runs the jobs; yields each with its outcome and its seconds as it ends.

    With one place the jobs print to the terminal, else each to a file of its own. An interruption is passed on to the
    jobs at work, which save and end, and then raised.
    """
    free = places(at_once, cores_per_job, gpus() if use_gpus else [])
    quiet = len(free) > 1
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
                os.kill(item.process.pid, number)
        deadline = time.monotonic() + LAST_SAVE
        for item in running:
            item.process.join(max(0.0, deadline - time.monotonic()))
            item.process.kill()
        raise
