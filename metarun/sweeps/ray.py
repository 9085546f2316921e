"""Jobs on a Ray cluster, or on a Ray of this machine's own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from metarun.config.types import NonNegativeFloat
from metarun.errors import UserError, first_line
from metarun.sweeps.jobs import Job, Outcome, exporting, perform
from metarun.sweeps.launcher import Launcher, imported, needs
from metarun.sweeps.plan import Ended, say
from metarun.text import printable


class Ray(Launcher):
    """Ray, on a cluster or on this machine.

    Args:
        address: The address of the cluster (auto, ray://host:10001); null starts a Ray of this machine's own.
        cpus: The cores of each job.
        gpus: The GPUs of each job.
    """

    def __init__(self, *, address: str | None = None, cpus: NonNegativeFloat = 1, gpus: NonNegativeFloat = 0) -> None:
        self.address, self.resources = address, {"num_cpus": cpus, "num_gpus": gpus}

    def check(self) -> None:
        """Checks that Ray is installed; raises `UserError` otherwise."""
        needs("ray", "hydra/launcher=ray", "ray")

    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        """Runs the jobs as tasks of Ray, as many at once as its cores and GPUs allow."""
        return carry_out(jobs, self.address, self.resources)


def tell_what_is_lacking(nodes: Sequence[dict[str, Any]], resources: dict[str, Any], address: str | None) -> None:
    """Tells what no node has of what a job needs, for which Ray would wait without a word.

    Args:
        nodes: As Ray lists them.
        resources: What each job needs: num_cpus, num_gpus.
        address: That of the cluster, to which a node that has it may still come; None: of this machine alone.

    Raises:
        UserError: This machine alone lacks something.
    """
    for name, key in {"CPU": "num_cpus", "GPU": "num_gpus"}.items():
        most = max((node["Resources"].get(name, 0) for node in nodes if node["Alive"]), default=0)
        if resources[key] > most:
            setting = f"hydra.launcher.{key.removeprefix('num_')}={resources[key]:g}"
            if address is None:
                raise UserError(f"{setting}: this machine has {most:g} for a job")
            say(f"{setting}: no node of {printable(address)} has more than {most:g}; jobs wait for one that has")


def in_ray(arguments: Sequence[str], folder: str) -> Outcome:
    """A job, in a process of Ray's that does nothing else."""
    os.chdir(folder)
    return perform(arguments)


def carry_out(jobs: Sequence[Job], address: str | None, resources: dict[str, Any]) -> Iterator[Ended]:
    """Runs the jobs on the Ray at `address` (None: a new one here), each with `resources` (num_cpus, num_gpus, memory).

    Raises:
        UserError: There is no Ray, or it lacks what a job needs.
    """
    ray = imported("ray", "hydra/launcher=ray", "ray")  # takes a second

    started, on_sigterm = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with exporting():
        try:
            # Without an address Ray would use one that runs here, or that RAY_ADDRESS names.
            ray.init(address=address or "local", log_to_driver=False, include_dashboard=False, configure_logging=False)
        except Exception as error:  # whatever Ray and what it is made of raise, which depends on the address
            where = "hydra/launcher=ray" if address is None else f"hydra.launcher.address={address}"
            raise UserError(f"{where}: no Ray can be used there ({first_line(error)})") from error
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # for which Ray has put one of its own
        try:
            tell_what_is_lacking(ray.nodes(), resources, address)
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
