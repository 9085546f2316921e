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
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    "Reservation",
    "Licenses",
    # Limits on how many jobs run at once, which end as others do.
    "AssocGrpJobsLimit",
    "AssocMaxJobsLimit",
    "QOSGrpJobsLimit",
    "QOSJobLimit",
    "QOSMaxJobsPerUserLimit",
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
SILENT = "hydra/launcher=slurm: squeue does not answer; is the cluster's controller up?"
LOCK = ".slurm.lock"  # beside the notes of the jobs, held from the look at the queue to the last note
SUBMITTING = (
    "submitting-"  # begins the name of a submission, noted for each of its jobs until Slurm's name of it is known
)
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


def _answered(listed: dict[str, str] | None) -> dict[str, str]:
    """The jobs that `queued` found; raises `UserError` where Slurm did not answer."""
    if listed is None:
        raise UserError(SILENT)
    return listed


class Stuck:
    """Tells once why jobs wait that may wait for ever."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, names: Collection[str], listed: Mapping[str, str]) -> None:
        """Says for each new reason how many of the jobs with these names wait for it, and how to end that."""
        reasons = {name: reason for name in names if (reason := listed.get(name))}
        for reason in sorted({*reasons.values()} - self._said):
            held = " ".join(_and_no_others([name for name in reasons if reasons[name] == reason], listed))
            advice = (
                f"scontrol release {held} lets them go"
                if "held" in reason.lower()
                else f"scancel {held}, and give the command with other settings of hydra.launcher"
            )
            count = sum(other == reason for other in reasons.values())
            say(f"{counted(count, 'job')} may wait for ever: Slurm gives the reason {printable(reason)}; {advice}")
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
    _answered(queued())  # before anything is written
    with _alone(jobs[0].log.parent):
        listed = _answered(queued())
        failed, waiting = take_up(jobs, parameters, listed)
    for job, ended in failed.items():
        yield job, ended, time.monotonic() - started
    if not waiting:
        return
    stuck = Stuck()
    stuck.tell(waiting.values(), listed)
    if not wait:
        say("not waiting for them (hydra.launcher.wait=false); the same command shows how far they are")
        return
    absent: dict[Job, int] = {}
    try:
        while waiting:
            if (now := queued()) is None:  # it will answer again
                time.sleep(poll_seconds)
                continue
            listed = now
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
                _note(job).unlink(missing_ok=True)  # and not how it ended, which another command may wait for as well
                lost = Outcome(1, f"Slurm job {name} ended without a result: cancelled, or out of time or memory")
                yield job, outcome or lost, time.monotonic() - started
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        names = " ".join(_and_no_others(waiting.values(), listed))
        say(f"left in Slurm's queue: {counted(len(waiting), 'job')}; scancel {names} ends them")
        raise


def take_up(
    jobs: Sequence[Job], parameters: dict[str, Any], listed: Mapping[str, str]
) -> tuple[dict[Job, Outcome], dict[Job, str]]:
    """Submits the jobs that are not in the queue, but for those that have failed since they were submitted.

    Args:
        jobs: The jobs.
        parameters: Those of submitit for sbatch.
        listed: What is in the queue, as `queued` gives it.

    Returns:
        How those ended that failed, and the names in Slurm of those that are in the queue now.

    Raises:
        UserError: Slurm refuses the jobs, or does not answer.
    """
    known = {job: note for job in jobs if (note := _noted(job))}
    cancelled = cancel_half_submitted({name for name, _ in known.values() if name.startswith(SUBMITTING)})
    waiting = {job: name for job, (name, _) in known.items() if name in listed and _array_of(name) not in cancelled}
    left = {job: outcome for job in known if job not in waiting and (outcome := _outcome_of(job))}
    failed = {job: outcome for job, outcome in left.items() if outcome.status}
    for job in failed:
        _note(job).unlink(missing_ok=True)  # told once: the next command runs the job again
    new = [job for job in jobs if job not in waiting and job not in failed]
    # One that never began, or was cancelled for the sake of other settings, is no news.
    lost = [
        job for job in known if job in new and job not in left and job.log.is_file() and known[job][1] == parameters
    ]
    if lost:
        say(
            f"{counted(len(lost), 'job')} ended without a result while no command waited: cancelled, or out of time or memory; "
            f"submitted again: {', '.join(job.label for job in lost)}"
        )
    already = len(waiting)
    tell_other_settings({name: known[job][1] for job, name in waiting.items()}, parameters, listed)
    if new:
        waiting |= submit(new, parameters)
    if waiting:
        say(f"{counted(len(new), 'job')} submitted, {already} were in the queue")
    return failed, waiting


def cancel_half_submitted(submissions: Collection[str]) -> set[str]:
    """Cancels what Slurm took of submissions that were killed before its answer was noted: the jobs may lack their files.

    Args:
        submissions: The names of the submissions, as they were noted.

    Returns:
        The arrays that were cancelled.

    Raises:
        UserError: Slurm does not answer.
    """
    if not submissions:
        return set()
    answer = subprocess.run(
        ["squeue", "--me", "-h", "-r", "-o", "%F|%o"], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    if answer.returncode:
        raise UserError(SILENT)
    listed = [line.split("|", 1) for line in answer.stdout.splitlines()]
    # The command of an array is a script in the folder of its submission.
    arrays = {array for array, script in listed if {*submissions} & {*Path(script).parts}}
    if arrays:
        say(
            f"a command was killed while it submitted jobs; these are cancelled and submitted anew: {' '.join(sorted(arrays))}"
        )
        subprocess.run(["scancel", *sorted(arrays)], check=False, capture_output=True)
    return arrays


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other commands from submitting jobs whose notes lie in a folder; one made for that goes where the jobs are refused."""
    absent = [path for path in (folder, *folder.parents) if not path.is_dir()]
    files.make_folder(folder)
    try:
        with files.locked(folder / LOCK, "another command is submitting these jobs", tell=say):
            yield
    except UserError:
        if absent:
            (folder / LOCK).unlink(missing_ok=True)
            _remove(folder, [*folder.iterdir()], absent)
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
    submission = f"{SUBMITTING}{uuid.uuid4().hex[:8]}"
    folder = jobs[0].log.parent / "slurm" / submission
    absent = [path for path in (folder, *folder.parents) if not path.is_dir()]
    with exporting(SUBMITIT_PREEMPT_SIGNAL=SIGNAL):  # read here when it is imported, and by the jobs
        submitit = imported("submitit", "hydra/launcher=slurm", "slurm")

        try:
            executor = submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(**parameters, stderr_to_stdout=True)
            for job in jobs:
                _left(job).unlink(missing_ok=True)
                _note_down(job, submission, parameters)
            submitted = executor.map_array(in_slurm, [job.arguments for job in jobs], [_left(job) for job in jobs])
        except (RuntimeError, ValueError, submitit.core.utils.FailedJobError) as error:
            for job in jobs:
                _note(job).unlink(missing_ok=True)
            _remove(folder, (), absent)
            raise UserError(f"hydra/launcher=slurm: {str(error).strip().splitlines()[-1]}") from error
    for job, theirs in zip(jobs, submitted, strict=True):
        _note_down(job, theirs.job_id, parameters)
        job.log.unlink(missing_ok=True)
        job.log.symlink_to(os.path.relpath(theirs.paths.stdout, job.log.parent))
    return {job: theirs.job_id for job, theirs in zip(jobs, submitted, strict=True)}


def tell_other_settings(
    queue: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Any], listed: Iterable[str]
) -> None:
    """Says which jobs in the queue keep settings that the command line no longer has.

    Args:
        queue: By the name of a job in Slurm, what it was submitted with; nothing where that is not known.
        parameters: Those of this command line.
        listed: The names of all jobs in the queue.
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
            f"scancel {' '.join(_and_no_others(others, listed))}, and the same command submits them anew"
        )


def _note(job: Job) -> Path:
    return beside(job.folder, "slurm")


def _note_down(job: Job, name: str, parameters: Mapping[str, Any]) -> None:
    """Keeps the name of a job in Slurm, or of its submission, and the parameters that it is submitted with."""
    _note(job).parent.mkdir(parents=True, exist_ok=True)
    files.save_bytes(_note(job), f"{name}\n{json.dumps(parameters)}\n".encode())


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


def _array_of(name: str) -> str:
    return name.partition("_")[0]


def _and_no_others(names: Iterable[str], listed: Iterable[str]) -> list[str]:
    """What names these jobs to Slurm and none else: an array, where all of it that is in the queue is among them."""
    named = {*names}
    shared = {_array_of(name) for name in {*listed} - named}
    return sorted({name if _array_of(name) in shared else _array_of(name) for name in named})
