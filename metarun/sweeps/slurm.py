"""Jobs as one array of a Slurm cluster, through submitit.

A job that gets SIGUSR1, which Slurm sends it some time before its limit, saves and puts itself back into the queue; a job
that Slurm preempts is put back by Slurm. Either way the same command runs again and goes on from `last.pt`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun import files
from metarun.config.types import NonNegativeInt, PositiveFloat, PositiveInt
from metarun.errors import UserError
from metarun.runs.trial import beside
from metarun.sweeps.jobs import REQUEUED, Job, Outcome, exporting, perform
from metarun.sweeps.launcher import Launcher, imported, needs
from metarun.sweeps.plan import Ended, say
from metarun.text import counted, printable

SIGNAL = "USR1"  # the one that `metarun` saves and ends at
# Reasons to wait that pass by themselves.
PASSING = {
    "None",
    "Priority",
    "Resources",
    "BeginTime",
    "JobArrayTaskLimit",
    "Dependency",
    "Prolog",
    "Cleaning",
}
# Options of sbatch, and the settings that say them here: given twice, one would be taken for the other.
SAID = {
    "array": "at_once",
    "cpus-per-task": "cpus",
    "gpus-per-node": "gpus",
    "mem": "memory_gb",
    "partition": "partition",
    "signal": "save_before",
    "time": "minutes",
}
LATE = 3  # polls after which a job that left the queue without a word is given up: shared file systems are slow


class Slurm(Launcher):
    """One array of a Slurm cluster.

    Args:
        partition: The partition; null is the cluster's own choice.
        minutes: The time limit of each job in minutes.
        cpus: The cores of each job.
        gpus: The GPUs of each job.
        memory_gb: The memory of each job in gigabytes.
        at_once: The jobs that run at the same time.
        save_before: The seconds before its time is over at which a job saves and goes back into the queue.
        wait: Whether the command waits; otherwise the same command later waits, or shows how far the jobs are.
        poll_seconds: The seconds from one look at the queue to the next.
        options: Any other option of sbatch: {account: mine, qos: long}.
        setup: Lines of shell before each job: [module load cuda].
    """

    def __init__(
        self,
        *,
        partition: str | None = None,
        minutes: PositiveInt = 240,
        cpus: PositiveInt = 4,
        gpus: NonNegativeInt = 0,
        memory_gb: PositiveInt = 8,
        at_once: PositiveInt = 64,
        save_before: NonNegativeInt = 60,
        wait: bool = True,
        poll_seconds: PositiveFloat = 5.0,
        options: dict[str, Any] = {},  # noqa: B006
        setup: list[str] = [],  # noqa: B006
    ) -> None:
        if save_before >= 60 * minutes:
            raise UserError(
                f"hydra.launcher.save_before={save_before}: a job of {minutes} min would save and end as it begins; "
                f"must be less than {60 * minutes}"
            )
        for name in options:
            if said := SAID.get(name.replace("_", "-")):
                raise UserError(f"hydra.launcher.options.{name}: is what hydra.launcher.{said} says; leave it out here")
        self.wait, self.poll_seconds = wait, poll_seconds
        self.parameters = {
            "job_name": "metarun",
            "partition": partition,
            "time": minutes,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus or None,
            "mem": f"{memory_gb}GB",
            "array_parallelism": at_once,
            "signal_delay_s": save_before,
            "additional_parameters": {"requeue": True, "open_mode": "append", **options},
            "setup": list(setup) or None,
        }

    def check(self) -> None:
        """Checks that submitit is installed; raises `UserError` otherwise."""
        needs("submitit", "hydra/launcher=slurm", "slurm")

    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        """Submits the jobs that are not in the queue yet, and waits for all where `wait` is set."""
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        return carry_out(jobs, parameters, self.wait, self.poll_seconds)


def in_slurm(arguments: Sequence[str], note: Path) -> None:
    """A job, in the process that Slurm started for it; leaves in the file `note` how it ended."""
    outcome = perform(arguments)
    if outcome.status == REQUEUED:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        time.sleep(600)  # Slurm ends this process
    if outcome.status > 128:  # cancelled or preempted: no result, since the same job may be run again
        raise SystemExit(outcome.status)
    files.save_json(note, asdict(outcome))


def queued() -> dict[str, str] | None:
    """The jobs of this user that wait or run; None if Slurm does not answer.

    Returns:
        By the name in Slurm, `<array>_<task>` or `<job>`, why the job waits; an empty string where it will not wait for ever.
    """
    answer = subprocess.run(
        ["squeue", "--me", "-h", "-r", "-o", "%i|%t|%r"], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    if answer.returncode:
        return None
    listed = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return {name: reason if state == "PD" and reason not in PASSING else "" for name, state, reason in listed}


class Stuck:
    """Tells once why jobs wait that may wait for ever."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, names: Collection[str], listed: Mapping[str, str]) -> None:
        """Says for each new reason how many of the jobs with these names wait for it, and how to end that."""
        reasons = {name: reason for name in names if (reason := listed.get(name))}
        for reason in sorted({*reasons.values()} - self._said):
            held = [name for name in reasons if reasons[name] == reason]
            say(
                f"{counted(len(held), 'job')} may wait for ever: Slurm gives the reason {printable(reason)}; scancel "
                f"{' '.join(_arrays(held))}, and give the command with other settings of hydra.launcher"
            )
            self._said.add(reason)


def carry_out(jobs: Sequence[Job], parameters: dict[str, Any], wait: bool, poll_seconds: float) -> Iterator[Ended]:
    """Submits the jobs that are not in the queue yet; of those that failed while no command waited, tells that instead.

    Args:
        jobs: The jobs.
        parameters: Those of submitit for sbatch.
        wait: Whether their ends are waited for; otherwise the same command later does.
        poll_seconds: The seconds from one look at the queue to the next.

    Yields:
        Each job with its outcome and the seconds since the start, as it ends.

    Raises:
        UserError: There is no Slurm here, or it refuses the jobs.
    """
    started = time.monotonic()
    if not shutil.which("squeue"):
        raise UserError("hydra/launcher=slurm: there is no squeue here; run it on a login node of the cluster")
    listed = queued()
    if listed is None:
        raise UserError("hydra/launcher=slurm: squeue does not answer; is the cluster's controller up?")
    known = {job: note for job in jobs if (note := _noted(job))}
    waiting = {job: name for job, (name, _) in known.items() if name in listed}
    left = {job: outcome for job in known if job not in waiting and (outcome := _outcome_of(job))}
    failed = {job: outcome for job, outcome in left.items() if outcome.status}
    for job, outcome in failed.items():
        _left(job).unlink(missing_ok=True)  # told once: the next command runs the job again
        yield job, outcome, time.monotonic() - started
    new = [job for job in jobs if job not in waiting and job not in failed]
    if not new and not waiting:
        return
    already = len(waiting)
    stuck = Stuck()
    tell_other_settings({name: known[job][1] for job, name in waiting.items()}, parameters)
    if new:
        waiting |= submit(new, parameters)
    say(f"{counted(len(new), 'job')} submitted, {already} were in the queue")
    stuck.tell(waiting.values(), listed)
    if not wait:
        say("not waiting for them (hydra.launcher.wait=false); the same command shows how far they are")
        return
    absent: dict[Job, int] = {}
    try:
        while waiting:
            listed = queued()
            if listed is None:  # it will answer again
                time.sleep(poll_seconds)
                continue
            stuck.tell(waiting.values(), listed)
            for job, name in list(waiting.items()):
                if name in listed:
                    absent.pop(job, None)
                    continue
                absent[job] = absent.get(job, 0) + 1
                outcome = _outcome_of(job)
                if outcome is None and absent[job] < LATE:
                    continue
                del waiting[job]
                _left(job).unlink(missing_ok=True)
                lost = Outcome(1, f"Slurm job {name} ended without a result: cancelled, or out of time or memory")
                yield job, outcome or lost, time.monotonic() - started
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        arrays = " ".join(_arrays(waiting.values()))
        say(f"left in Slurm's queue: {counted(len(waiting), 'job')}; scancel {arrays} ends them")
        raise


def submit(jobs: Sequence[Job], parameters: dict[str, Any]) -> dict[Job, str]:
    """Submits one array with these jobs.

    Args:
        jobs: The jobs, at least one.
        parameters: Those of submitit for sbatch.

    Returns:
        The name that each has in Slurm, which is noted beside its log.

    Raises:
        UserError: Slurm refuses them.
    """
    folder = jobs[0].log.parent / "slurm"
    before = {*folder.iterdir()} if folder.is_dir() else set()
    absent = [path for path in (folder, *folder.parents) if not path.is_dir()]
    with exporting(SUBMITIT_PREEMPT_SIGNAL=SIGNAL):  # read here when it is imported, and by the jobs
        submitit = imported("submitit", "hydra/launcher=slurm", "slurm")

        try:
            executor = submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(**parameters, stderr_to_stdout=True)
            for job in jobs:
                _left(job).unlink(missing_ok=True)
            submitted = executor.map_array(in_slurm, [job.arguments for job in jobs], [_left(job) for job in jobs])
        except (RuntimeError, ValueError, submitit.core.utils.FailedJobError) as error:
            _remove(folder, before, absent)
            raise UserError(f"hydra/launcher=slurm: {str(error).strip().splitlines()[-1]}") from error
    for job, theirs in zip(jobs, submitted, strict=True):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        files.save_bytes(_note(job), f"{theirs.job_id}\n{json.dumps(parameters)}\n".encode())
        job.log.unlink(missing_ok=True)
        job.log.symlink_to(os.path.relpath(theirs.paths.stdout, job.log.parent))
    return {job: theirs.job_id for job, theirs in zip(jobs, submitted, strict=True)}


def tell_other_settings(queue: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Any]) -> None:
    """Says which jobs in the queue keep settings that the command line no longer has.

    Args:
        queue: By the name of a job in Slurm, what it was submitted with; nothing where that is not known.
        parameters: Those of this command line.
    """
    others = {name: given for name, given in queue.items() if given and given != parameters}
    kept = {
        f"{key}={given.get(key)}"
        for given in others.values()
        for key in {*given, *parameters}
        if given.get(key) != parameters.get(key)
    }
    if others:
        say(
            f"in the queue with other settings: {counted(len(others), 'job')} ({printable(', '.join(sorted(kept)))}); "
            f"scancel {' '.join(_arrays(others))}, and the same command submits them anew"
        )


def _note(job: Job) -> Path:
    return beside(job.folder, "slurm")


def _noted(job: Job) -> tuple[str, dict[str, Any]] | None:
    """The name of a job in Slurm, and the parameters that it was submitted with, where these are known."""
    try:
        name, _, given = _note(job).read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    try:
        parameters = files.parsed(given)
    except ValueError:
        parameters = {}
    return name.strip(), parameters if isinstance(parameters, dict) else {}


def _remove(folder: Path, but: Collection[Path], made: Sequence[Path]) -> None:
    """Removes what was written to a folder for jobs that Slurm has not taken, and the folders that were made for it, inner ones first."""
    for path in {*folder.iterdir()} - {*but} if folder.is_dir() else ():
        path.unlink()
    with contextlib.suppress(OSError):  # one in which others have written meanwhile
        for path in made:
            path.rmdir()


def _left(job: Job) -> Path:
    """Where a job leaves how it ended: data, no pickle, since others may write in the folder."""
    return beside(job.folder, "outcome").absolute()


def _outcome_of(job: Job) -> Outcome | None:
    """The outcome that the job left, if it did."""
    try:
        left = files.parsed(_left(job).read_text(encoding="utf-8"))
        marks = {mark: left.get(mark) is True for mark in ("own_error", "refused")}
        return Outcome(int(left["status"]), str(left["message"]), **marks)
    except (OSError, ValueError, TypeError, KeyError):
        return Outcome() if job.finished else None


def _arrays(names: Any) -> list[str]:
    return sorted({name.partition("_")[0] for name in names})
