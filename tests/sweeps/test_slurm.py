"""A real Slurm of one node, where root and Debian's packages are to be had: arrays, signals, requeues."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout
from shell import ROOT, SINUSOID, metarun, start
from test_sweeps import runs, same, sittings

from metarun import files
from metarun.errors import UserError
from metarun.runs.trial import beside
from metarun.sweeps import slurm as launcher
from metarun.sweeps.jobs import PRUNED, Job, Outcome
from metarun.sweeps.slurm import Slurm, _remove

FEW = [word for word in SINUSOID[1:] if not word.startswith("train.steps")]
JOB = ["hydra/launcher=slurm", "hydra.launcher.cpus=1", "hydra.launcher.memory_gb=1", "hydra.launcher.poll_seconds=0.5"]


def answer(*words: str) -> str:
    """What a command of Slurm's prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One that runs already, or one of our own."""
    try:
        there = set(answer("sinfo", "-h", "-o", "%t").split())
    except (OSError, subprocess.CalledProcessError):
        there = set()
    if there & {"idle", "mix", "alloc"}:
        yield
        return
    folder = str(tmp_path_factory.mktemp("slurm"))
    script = [str(ROOT / "scripts" / "slurm_local.sh")]
    started = subprocess.run([*script, "start", folder], capture_output=True, text=True, check=False)
    if started.returncode:
        pytest.skip(f"no Slurm here: {started.stderr.strip()}")
    yield
    subprocess.run([*script, "stop", folder], check=False)


def wait_for(found: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running(outputs: Path) -> dict[str, str]:
    """The jobs of our array that run and have saved: names in Slurm, by run folder."""
    at_work = answer("squeue", "--me", "-h", "-r", "-t", "R", "-o", "%i").split()
    notes = {path.read_text().split()[0]: path.name.removesuffix(".slurm") for path in outputs.glob("*/.jobs/*.slurm")}
    saved = {path.parent.name for path in outputs.glob("*/*/last.pt")}
    return {notes[name]: name for name in at_work if notes.get(name) in saved}


def pending(name: str) -> bool:
    return bool(answer("squeue", "-h", "-r", "-j", name, "-t", "PD", "-o", "%i"))


def hurry(name: str) -> None:
    """Slurm lets a requeued job wait two minutes; not here."""
    wait_for(lambda: pending(name))
    answer("scontrol", "update", f"JobId={name}", "StartTime=now")


def test_signals_and_requeues_change_no_number(slurm: None, tmp_path: Path) -> None:
    words = ["-m", "algo=maml,fomaml", "seed=0,1,2", *FEW, "train.steps=800", "train.save_every=10", "train.log_every=20",
             "hardware.threads=1"]  # fmt: skip
    process = start(*words, *JOB, f"outputs={tmp_path / 'cluster'}")
    wait_for(lambda: running(tmp_path / "cluster"))
    ((saved, name), *_) = running(tmp_path / "cluster").items()
    # What Slurm sends before the time is over. The job requeues itself so fast that scancel takes that for an error and
    # tries again, for minutes, until it meets the job's second sitting.
    with subprocess.Popen(["scancel", "--signal=USR1", name], stderr=subprocess.DEVNULL) as signalling:
        wait_for(lambda: pending(name))
        signalling.kill()
    wait_for(lambda: running(tmp_path / "cluster").keys() - {saved})
    (preempted, *_) = running(tmp_path / "cluster").keys() - {saved}
    its_name = running(tmp_path / "cluster")[preempted]
    answer("scontrol", "requeue", its_name)
    hurry(name)
    hurry(its_name)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "6 jobs submitted, 0 were in the queue" in err
    made = runs(tmp_path / "cluster")
    assert {name: sittings(folder) for name, folder in made.items()} == {
        name: 1 + (name in (saved, preempted)) for name in made
    }
    assert "interrupted by SIGUSR1" in (made[saved].parent / ".jobs" / f"{saved}.log").read_text()
    whole = metarun("-m", *words[1:], "hydra/launcher=local", f"outputs={tmp_path / 'whole'}")
    assert whole.status == 0, whole.err
    expected = runs(tmp_path / "whole")
    assert len(made) == 6
    assert made.keys() == expected.keys()
    assert all(same(folder, expected[name]) for name, folder in made.items())


def test_submit_go_away_and_come_back(slurm: None, tmp_path: Path) -> None:
    words = ["-m", "seed=0,1", "algo=protonet,maml", *FEW, "train.steps=100", *JOB, f"outputs={tmp_path}"]
    submitted = metarun(*words, "hydra.launcher.wait=false")
    assert submitted.status == 0, submitted.err
    assert "4 jobs submitted, 0 were in the queue" in submitted.err
    notes = {path: path.read_text().split()[0] for path in tmp_path.glob("*/.jobs/*.slurm")}
    assert len(notes) == 4
    back = metarun(*words)
    assert back.status == 1
    assert "4 jobs submitted" not in back.err
    assert back.err.count(" algo=protonet\n    algo: ProtoNet only classifies") == 2
    assert len(runs(tmp_path)) == 2
    (array,) = {name.partition("_")[0] for name in notes.values()}
    logs = [path.readlink().name for path in tmp_path.glob("*/.jobs/*.log")]
    assert len(logs) == 4
    assert all(name.startswith(f"{array}_") for name in logs)  # none was submitted again


def test_a_cancelled_job_is_a_failure(slurm: None, tmp_path: Path) -> None:
    process = start(
        "-m", "seed=0,1", "algo=maml", *FEW, "train.steps=1000000", "train.save_every=10", *JOB, f"outputs={tmp_path}"
    )
    wait_for(lambda: running(tmp_path))
    arrays = {name.partition("_")[0] for name in running(tmp_path).values()}
    for array in arrays:
        answer("scancel", array)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.count("ended without a result: cancelled, or out of time or memory") == 4  # as it ends, and in the list
    assert err.endswith("metarun: 2 of 2 jobs failed, listed above; the same command runs them again\n")


def test_a_job_that_never_starts_is_told_and_keeps_its_settings(slurm: None, tmp_path: Path) -> None:
    words = [
        "-m",
        "seed=0,1",
        "algo=maml",
        *SINUSOID[1:],
        *JOB,
        "hydra.launcher.wait=false",
        f"outputs={tmp_path / 'out'}",
    ]
    submitted = metarun(*words, "hydra.launcher.cpus=1000", "hydra.launcher.options={comment: mine}")
    assert submitted.status == 0, submitted.err
    (name, *_) = next(tmp_path.glob("*/*/.jobs/*.slurm")).read_text().split()
    array = name.partition("_")[0]
    try:
        assert set(answer("squeue", "-h", "-r", "-j", array, "-o", "%k").split()) == {"mine"}
        wait_for(lambda: "PartitionConfig" in answer("squeue", "-h", "-j", array, "-o", "%r"))
        again = metarun(*words)
    finally:
        answer("scancel", array)
    assert again.status == 0, again.err
    assert "0 jobs submitted, 2 were in the queue" in again.err
    assert f"2 jobs may wait for ever: Slurm gives the reason PartitionConfig; scancel {array}, and" in again.err
    assert "in the queue with other settings: 2 jobs (" in again.err
    assert "cpus_per_task=1000" in again.err
    assert f"scancel {array}, and the same command submits them anew" in again.err


def test_what_slurm_refuses_leaves_nothing(slurm: None, tmp_path: Path) -> None:
    words = ["-m", "seed=0,1", *SINUSOID, *JOB, f"outputs={tmp_path / 'none'}"]
    done = metarun(*words, "hydra.launcher.partition=nowhere")
    assert done.status == 2
    assert "hydra/launcher=slurm: sbatch: error: Batch job submission failed" in done.err
    assert not (tmp_path / "none").exists()


def noted(job: Job, name: str) -> None:
    beside(job.folder, "slurm").parent.mkdir(parents=True, exist_ok=True)
    beside(job.folder, "slurm").write_text(f"{name}\n{{}}\n")


def two_jobs(tmp_path: Path) -> tuple[Job, Job]:
    zero, one = (
        Job((word,), (word,), tmp_path / "sweep" / word.replace("=", "-"), word) for word in ("seed=0", "seed=1")
    )
    return zero, one


def test_a_job_waits_its_turn_or_for_what_may_never_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ["7_0|PD|Priority", "7_1|PD|QOSMaxJobsPerUserLimit", "7_2|PD|QOSMaxCpuPerJobLimit", "7_3|R|None"]
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{os.linesep.join(states)}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert launcher.queued() == {"7_0": "", "7_1": "", "7_2": "QOSMaxCpuPerJobLimit", "7_3": ""}


def test_advice_names_the_jobs_that_are_meant_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    queue = {"7_0": "PartitionConfig", "7_1": "", "8_0": "JobHeldUser", "8_1": "JobHeldUser"}
    launcher.Stuck().tell(queue.keys(), queue)
    launcher.tell_other_settings({"7_1": {"mem": 1}}, {"mem": 2}, queue)
    said = capsys.readouterr().err
    assert "Slurm gives the reason PartitionConfig; scancel 7_0, and give the command with other settings" in said
    assert "2 jobs may wait for ever: Slurm gives the reason JobHeldUser; scontrol release 8 lets them go" in said
    assert "1 job (mem=1); scancel 7_1, and" in said


def test_a_submission_that_was_killed_is_cancelled_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its jobs would run beside those that the same command submits, and one of each two would fail."""
    zero, one = jobs = two_jobs(tmp_path)
    noted(zero, "9_0")  # killed between the notes of two jobs
    noted(one, "submitting-0a")
    for name, answer in {
        "squeue": "echo '9|/sweep/.jobs/slurm/submitting-0a/x.sh'; echo '8|/x.sh'",
        "scancel": "",
    }.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{answer}\necho "$@" >> {tmp_path}/{name}.said\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    submitted = list[Job]()

    def submit(jobs: Sequence[Job], parameters: dict[str, Any]) -> dict[Job, str]:
        submitted.extend(jobs)
        with pytest.raises(Timeout), files.locked(zero.log.parent / launcher.LOCK, "", 0.0):
            pass  # another command does not look at the queue meanwhile
        return dict.fromkeys(jobs, "10")

    monkeypatch.setattr(launcher, "queued", lambda: {"9_0": "", "9_1": ""})
    monkeypatch.setattr(launcher, "submit", submit)
    assert not [*launcher.carry_out(jobs, {}, wait=False, poll_seconds=1.0)]
    assert submitted == [*jobs]
    assert (tmp_path / "scancel.said").read_text() == "9\n"
    assert "these are cancelled and submitted anew: 9\n" in capsys.readouterr().err


def test_two_commands_that_wait_for_the_same_jobs_are_told_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = two_jobs(tmp_path)
    noted(job, "7")
    first, looks = list[Outcome](), iter([True, True, None, True, True, False, False, False, False])

    def queued() -> dict[str, str]:
        there = next(looks)
        if there is None:  # the second waits, and the first comes and sees the end before it
            beside(job.folder, "outcome").write_text(json.dumps(asdict(Outcome(2, "diverged"))))
            first.extend(outcome for _, outcome, _ in launcher.carry_out([job], {}, wait=True, poll_seconds=0.01))
        return {"7": ""} if there else {}

    monkeypatch.setattr(launcher, "queued", queued)
    monkeypatch.setattr(launcher.shutil, "which", str)
    second = [outcome for _, outcome, _ in launcher.carry_out([job], {}, wait=True, poll_seconds=0.01)]
    assert first == second == [Outcome(2, "diverged")]


def test_a_job_that_ended_without_a_word_is_told_before_it_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = two_jobs(tmp_path)
    for job in jobs:
        noted(job, "7")
    jobs[0].log.touch()  # the other never began
    monkeypatch.setattr(launcher, "queued", dict)
    monkeypatch.setattr(launcher, "submit", lambda jobs, parameters: dict.fromkeys(jobs, "8"))
    monkeypatch.setattr(launcher.shutil, "which", str)
    assert not [*launcher.carry_out(jobs, {}, wait=False, poll_seconds=1.0)]
    said = capsys.readouterr().err
    assert "1 job ended without a result while no command waited: cancelled, or out of time or memory" in said
    assert "submitted again: seed=0\n" in said


def test_what_failed_while_no_command_waited_is_told_before_it_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(("seed=0",), ("seed=0",), tmp_path / "sweep" / "seed-0", "seed=0")
    ended, submitted = Outcome(PRUNED, "pruned at step 4"), list[Job]()

    def submit(jobs: Sequence[Job], parameters: dict[str, Any]) -> dict[Job, str]:
        submitted.extend(jobs)
        return dict.fromkeys(jobs, "8")

    monkeypatch.setattr(launcher, "queued", dict)
    monkeypatch.setattr(launcher, "submit", submit)
    monkeypatch.setattr(launcher.shutil, "which", str)
    noted(job, "7")
    beside(job.folder, "outcome").write_text(json.dumps(asdict(ended)))
    told = [*launcher.carry_out([job], {}, wait=False, poll_seconds=1.0)]
    assert [(one, outcome) for one, outcome, _ in told] == [(job, ended)]
    assert not submitted
    assert not [*launcher.carry_out([job], {}, wait=False, poll_seconds=1.0)]
    assert submitted == [job]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    made = [tmp_path / "there" / "name", tmp_path / "there" / "name" / ".jobs"]
    for path in made:
        path.mkdir()
    (made[-1] / "script.sh").touch()
    _remove(made[-1], [], made[::-1])
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize(
    ("option", "setting"), [("array", "at_once"), ("cpus_per_task", "cpus"), ("gpus-per-node", "gpus")]
)
def test_an_option_that_a_setting_says_is_refused(option: str, setting: str) -> None:
    with pytest.raises(
        UserError, match=rf"hydra\.launcher\.options\.{option}: is what hydra\.launcher\.{setting} says"
    ):
        Slurm(options={option: "0-3"})


def test_jobs_without_time_to_run_are_refused(tmp_path: Path) -> None:
    """A job that saves as soon as it begins would go back into the queue for ever."""
    done = metarun("-m", "seed=0,1", *SINUSOID, *JOB, "hydra.launcher.minutes=1", f"outputs={tmp_path / 'none'}")
    assert done.status == 2
    assert (
        "hydra.launcher.save_before=60: a job of 1 min would save and end as it begins; must be less than 60"
        in done.err
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words", [["hydra.launcher.options={account: mine, qos: long}"], ["hydra.launcher.options.account=mine"]]
)
def test_settings_that_are_a_mapping_take_any_key(words: list[str]) -> None:
    shown = metarun("seed=0", "hydra/launcher=slurm", *words, "--cfg", "hydra", "--package", "hydra.launcher")
    assert shown.status == 0, shown.err
    assert "account: mine" in shown.out
    assert metarun("-m", "seed=0,1", "hydra/launcher=slurm", *words, "--dry-run").status == 0


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    path = os.environ["PATH"]
    os.environ["PATH"] = str(tmp_path)
    try:
        done = metarun("-m", "seed=0,1", *SINUSOID, *JOB, f"outputs={tmp_path / 'none'}")
    finally:
        os.environ["PATH"] = path
    assert done.status == 2
    assert done.err.endswith(
        "metarun: hydra/launcher=slurm: there is no squeue here; run it on a login node of the cluster\n"
    )
    assert not (tmp_path / "none").exists()
