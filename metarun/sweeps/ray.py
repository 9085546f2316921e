"""Jobs on a Ray cluster, or on a Ray of this machine's own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from metarun.sweeps.jobs import Job, Outcome, exporting, perform
from metarun.sweeps.plan import Ended


def in_ray(arguments: Sequence[str], folder: str) -> Outcome:
    """A job, in a process of Ray's that does nothing else."""
    os.chdir(folder)
    return perform(arguments)


def carry_out(jobs: Sequence[Job], address: str | None, resources: dict[str, Any]) -> Iterator[Ended]:
    """Runs the jobs on the Ray at `address` (None: a new one here), each with `resources` (num_cpus, num_gpus, memory)."""
    started = time.monotonic()
    with exporting():
        ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        try:
            remote = ray.remote(max_calls=1, max_retries=0, **resources)(in_ray)
            waiting = {remote.remote(job.arguments, os.getcwd()): job for job in jobs}
            while waiting:
                (ready, *_), _ = ray.wait(list(waiting))
                job = waiting.pop(ready)
                try:
                    outcome = ray.get(ready)
                except ray.exceptions.RayError as error:
                    outcome = Outcome(1, str(error).strip().splitlines()[0])
                yield job, outcome, time.monotonic() - started
        finally:
            ray.shutdown()
