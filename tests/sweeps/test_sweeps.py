"""Sweeps: folders, what runs again and what does not, failures, kills, isolation, launchers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from helpers import block
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from shell import SINUSOID, environment, lines, make_images, metarun, one_line, result, run_folder, start

from metarun.errors import JobsFailed, UserError
from metarun.runs.folder import choose_folder
from metarun.sweeps import local, ray
from metarun.sweeps.jobs import Job, Outcome, how_it_ended
from metarun.sweeps.launcher import Launcher, needs
from metarun.sweeps.plan import conclude, progress, sweep_name

GRID = ["-m", "algo=maml,fomaml", "seed=0,1", *SINUSOID[1:]]


def runs(outputs: Path, pattern: str = "*/*/result.json") -> dict[str, Path]:
    """The finished runs by folder name."""
    return {path.parent.name: path.parent for path in outputs.glob(pattern)}


def sittings(folder: Path) -> int:
    """How often a run was started."""
    return (folder / "metarun.log").read_text().count("run folder: ")


def same(one: Path, other: Path) -> bool:
    """Whether two runs came to the same numbers, on every test episode and at every validation."""
    curves = [[line["val/mse"] for line in lines(folder) if "val/mse" in line] for folder in (one, other)]
    names = ("test/mse", "test/after_inner_steps", "val/score", "train/steps")
    return curves[0] == curves[1] and all(result(one)[name] == result(other)[name] for name in names)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["algo=maml,protonet"], "glyphs-sweep"),
        (["data=glyphs,omniglot"], "maml-sweep"),
        (["seed=0,1"], None),
        (["name=mine", "algo=maml,protonet"], None),
        (["experiment=a,b"], "sweep"),
        (["target=digits", "transfer=all,prompts"], "glyphs-maml-digits-sweep"),
        (["target=digits", "algo=maml,protonet"], "glyphs-digits-all-sweep"),
        (["target=digits,mnist"], "glyphs-maml-all-sweep"),
        (["target=digits", "approach=scratch,mtl"], "glyphs-digits-sweep"),
        (["target=digits", "recipe=transfer,meta_transfer"], "glyphs-digits-all-sweep"),
        (["recipe=target_only", "target=digits", "transfer=all,l2_sp"], "digits-sweep"),
    ],
)
def test_runs_of_a_sweep_share_a_folder_named_after_what_is_the_same(words: list[str], name: str | None) -> None:
    overrides = OverridesParser.create().parse_overrides(words)
    choices = {"data": "glyphs", "algo": "maml"}
    if any("target" in word for word in words):
        choices |= {"target": "digits", "transfer": "all", "recipe": "transfer"}
    choices |= {one.key_or_group: str(one.value()) for one in overrides if not one.is_sweep_override()}
    source = choices.get("recipe") != "target_only"
    config = OmegaConf.create({"hydra": {"runtime": {"choices": choices}}, "recipe": {"source": source}, "data": {}})
    assert sweep_name(overrides, config) == name


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["approach=pretrained_probe,pretrained_fine_tuning"], "digits-sweep"),  # without a source
        (["approach=scratch,linear_probe"], "glyphs-digits-sweep"),
        (["recipe=target_only", "transfer=all,lora"], "digits-sweep"),
        (["recipe=target_only", "transfer=all", "seed=0,1"], "digits-all"),
    ],
)
def test_a_sweep_whose_jobs_use_no_source_is_not_named_after_one(words: list[str], name: str, tmp_path: Path) -> None:
    shown = metarun("-m", "--dry-run", "target=digits", *words, f"outputs={tmp_path}")
    assert shown.status == 0, shown.err
    assert {Path(line.split()[-1]).parent.name for line in shown.out.splitlines()[:-1]} == {name}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"test/acc": 0.5, "test/acc_ci95": 0.125, "val/score": 0.7}, "test 50.00% ± 12.50%"),
        ({"target/acc": 0.5, "target/acc_ci95": None}, "target 50.00% (too few for an interval)"),
        ({"test/mse": 1.23456, "test/mse_ci95": 0.0123}, "test 1.235 ± 0.012"),
        ({"val/score": 0.123456}, "validation 0.1235"),
        ({"predict/labelled": 3}, "done"),
    ],
)
def test_the_line_of_a_job_has_its_main_number(found: dict[str, object], told: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(found))
    job = Job((), (), tmp_path, "seed=1")
    assert progress(job, Outcome(), 2.0, 1, 3) == f"[1/3] 2 s  seed=1  {told}"
    assert progress(job, Outcome(1, "failed"), 2.0, 1, 3) == "[1/3] 2 s  seed=1  failed"


def test_only_what_is_missing_runs_again(tmp_path: Path) -> None:
    words = [*GRID, f"outputs={tmp_path}"]
    done = metarun(*words)
    assert done.status == 0, done.err
    assert "4 jobs: 0 finished before, 4 to run" in done.err
    made = runs(tmp_path)
    assert len(made) == 4
    assert {folder.parent.name for folder in made.values()} == {"sinusoid-sweep"}
    assert all(name.startswith(("algo-maml__", "algo-fomaml__")) and "__seed-" in name for name in made)
    before = {name: (folder / "result.json").read_bytes() for name, folder in made.items()}
    gone = sorted(made)[2]
    (made[gone] / "result.json").unlink()
    again = metarun(*words)
    assert again.status == 0
    assert "4 jobs: 3 finished before, 1 to run" in again.err
    assert {name: sittings(folder) for name, folder in made.items()} == {name: 1 + (name == gone) for name in made}
    assert all((made[name] / "result.json").read_bytes() == before[name] for name in made if name != gone)
    assert (tmp_path / "sinusoid-sweep" / "report" / "index.html").is_file()


def test_a_job_is_the_run_that_one_would_start_alone(tmp_path: Path) -> None:
    """In a process of its own, whatever ran before it: nothing leaks from job to job."""
    assert metarun("-m", "seed=0,1,2", *SINUSOID, f"outputs={tmp_path / 'sweep'}").status == 0
    swept = runs(tmp_path / "sweep")
    for seed in (0, 1, 2):
        assert metarun(*SINUSOID, f"seed={seed}", f"outputs={tmp_path / str(seed)}").status == 0
        alone = run_folder(tmp_path / str(seed))
        assert alone.parent.name == "sinusoid-maml"
        assert same(alone, swept[alone.name])
    resumed = metarun("-m", "seed=0,1,2", *SINUSOID, f"outputs={tmp_path / '1'}")
    assert "3 jobs: 1 finished before, 2 to run" in resumed.err


@pytest.mark.parametrize("launcher", ["serial", "local"])
def test_failed_jobs_are_listed_and_the_others_run(launcher: str, tmp_path: Path) -> None:
    words = ["-m", f"hydra/launcher={launcher}", "algo=protonet,maml", "seed=0,1", *SINUSOID[1:], f"outputs={tmp_path}"]
    done = metarun(*words)
    assert done.status == 1
    reason = "algo: ProtoNet only classifies, but the data are regression tasks; try algo=maml"
    *_, listed = done.err.partition("\nfailed:\n")
    for seed in (0, 1):
        assert f"  algo=protonet seed={seed}\n    {reason}\n" in listed
    assert listed.endswith("metarun: 2 of 4 jobs failed, listed above; the same command runs them again\n")
    assert "Traceback" not in done.err
    assert all(name.startswith("algo-maml__") for name in runs(tmp_path))
    assert len(runs(tmp_path)) == 2


@pytest.mark.parametrize("words", [["hydra/launcher=local"], ["hydra/sweeper=optuna"], []], ids=str)
def test_a_folder_that_takes_no_jobs_is_told_before_the_first(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinusoid-maml").mkdir()
    (tmp_path / "sinusoid-maml" / ".jobs").touch()
    given = ["-m", *words, "algo.inner_lr=0.1,0.2", *SINUSOID, f"outputs={tmp_path}"]
    one_line(
        metarun(*given), "sinusoid-maml/.jobs: cannot be written, for ", ".jobs is no folder; choose another outputs="
    )
    (tmp_path / "sinusoid-maml" / ".jobs").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode, **settings: False)  # another user's
    one_line(metarun(*given), "sinusoid-maml: nothing can be written there by this user; choose another outputs=")
    assert not list((tmp_path / "sinusoid-maml").iterdir())


def test_a_job_whose_output_cannot_be_written_has_failed(tmp_path: Path) -> None:
    (tmp_path / ".jobs").touch()
    running = local.Running(Job(("--version",), (), tmp_path / "run", ""), ([0], None), quiet=True)
    assert running.outcome() == Outcome(2, f"{tmp_path / '.jobs'}: File exists")


def test_failed_jobs_are_listed_where_no_report_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise UserError("the report cannot be written")

    monkeypatch.setattr("metarun.report.write", refuse)
    job = Job((), (), tmp_path / "run", "seed=1")
    with pytest.raises(JobsFailed, match="1 of 1 job failed, listed above"):
        conclude([(job, Outcome(1, "it crashed"), 0.0)])
    assert capsys.readouterr().err == "\nthe report cannot be written\n\nfailed:\n  seed=1\n    it crashed\n"
    with pytest.raises(UserError, match="the report cannot be written"):
        conclude([(job, Outcome(), 0.0)])


def test_a_result_of_another_config_is_a_failure_and_stays(tmp_path: Path) -> None:
    words = ["-m", "seed=0,1", *SINUSOID, f"outputs={tmp_path}"]
    assert metarun(*words).status == 0
    folder = runs(tmp_path)[min(runs(tmp_path))]
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 6", "steps: 7"))
    done = metarun(*words)
    assert done.status == 1
    assert "was made with another config (train.steps 7 -> 6)" in done.err
    assert all(sittings(folder) == 1 for folder in runs(tmp_path).values())


def test_mistake_in_a_sweep_stops_it_before_the_first_job(tmp_path: Path) -> None:
    done = metarun("-m", "algo=maml,mmal", *SINUSOID[1:], f"outputs={tmp_path / 'outputs'}")
    assert done.status == 2
    assert done.err == "metarun: algo=mmal: there is no such choice; did you mean maml, imaml, fomaml?\n"
    assert not (tmp_path / "outputs").exists()


BREAKING = '''
import os
from metarun.algos.maml import MAML


class Breaking(MAML):
    """Ends its process in the way that it is told."""

    def __init__(self, backbone, spec, *, how: str) -> None:
        super().__init__(backbone, spec, inner_steps=1, inner_lr=0.1)
        if how == "raise":
            raise RuntimeError("first line\\nsecond line")
        if how == "die":
            os.kill(os.getpid(), 9)
'''


def test_crashed_and_killed_jobs_do_not_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaking.py").write_text(BREAKING)
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    (tmp_path / "mine" / "algo" / "breaking.yaml").write_text(
        "# @package _global_\nalgo: {_target_: breaking.Breaking, how: work}\n"
    )
    done = metarun("--config-dir", "mine", "-m", "algo=breaking", "algo.how=raise,die,work", *SINUSOID[1:])
    assert done.status == 1
    assert "  algo.how=raise\n    RuntimeError: first line\n" in done.err
    assert "  algo.how=die\n    killed by SIGKILL (out of memory?)\n" in done.err
    assert [result(folder)["train/steps"] for folder in runs(tmp_path / "outputs").values()] == [6]


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (
            ["hardware.threads=1,2"],
            {},
            "hardware.threads=2: changes no number, so that hardware.threads=1 is the same run",
        ),
        (
            ["seed=0,1"],
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "-m: a sweep starts its own processes; torchrun is for a single run",
        ),
        (
            ["recipe=report", "runs=a,b"],
            {},
            "recipe=report: makes no run, and is for no sweep; without -m, runs=[a,b] takes several folders",
        ),
        (["recipe=inspect", "seed=0,1"], {}, "recipe=inspect: makes no run, and is for no sweep (in the job seed=0)"),
    ],
)
def test_sweeps_that_make_no_sense(
    words: list[str], variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = metarun("-m", *words, *SINUSOID, f"outputs={tmp_path / 'none'}")
    assert done.status == 2
    assert done.err.startswith(f"metarun: {expected}")
    assert not (tmp_path / "none").exists()


def test_exit_codes_in_words() -> None:
    assert how_it_ended(-11).message == "killed by SIGSEGV"
    assert how_it_ended(-11).status == 139
    assert how_it_ended(7).message == "ended with exit status 7"
    assert how_it_ended(0).status == 1  # it should have told its outcome


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert local.places(1, 1, []) == [(list(range(8)), None)]
    assert local.places(None, 1, []) == [([core], None) for core in range(8)]
    assert local.places(None, 4, []) == [([0, 1, 2, 3], None), ([4, 5, 6, 7], None)]
    assert local.places(None, 16, []) == [(list(range(8)), None)]
    assert local.places(3, 1, []) == [([0, 1], None), ([2, 3, 4], None), ([5, 6, 7], None)]
    assert local.places(None, 1, ["0", "1"]) == [([0, 1, 2, 3], "0"), ([4, 5, 6, 7], "1")]
    assert [gpu for _, gpu in local.places(3, 1, ["0", "1"])] == ["0", "1", "0"]
    assert next(cores for cores, _ in local.places(9, 1, [])) == [0]  # more places than cores
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert local.gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus() == []


def kill_group(process: subprocess.Popen[str] | warm.Process) -> None:
    """SIGKILL to a sweep and all that it started."""
    victims, waiting = [process.pid], [process.pid]
    while waiting:
        pid = waiting.pop()
        try:
            below = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            continue
        victims += below
        waiting += below
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


LONGER = [
    *(word for word in SINUSOID[1:] if not word.startswith("train.steps")),
    "train.steps=150",
    "train.save_every=10",
]


KILLED = ["-m", "algo=maml,fomaml", "seed=0,1", *LONGER, "hardware.threads=1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of the sweep that others are killed in."""
    outputs = tmp_path_factory.mktemp("whole")
    done = metarun(*KILLED, f"outputs={outputs}")
    assert done.status == 0, done.err
    return runs(outputs)


@pytest.mark.parametrize("launcher", ["serial", "local"])
def test_killed_sweep_goes_on_and_runs_no_finished_job_twice(
    launcher: str, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    words = [*KILLED, f"hydra/launcher={launcher}"]
    if launcher == "local":
        words.append("hydra.launcher.at_once=2")  # also where all four could end at once
    moments = random.Random(launcher)
    finished: set[str] = set()
    at_work = 0
    for _ in range(2):
        process = start(*words, f"outputs={tmp_path / 'killed'}")
        deadline = time.monotonic() + 300
        while len(runs(tmp_path / "killed")) <= len(finished) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.6))
        at_work += process.poll() is None
        kill_group(process)
        finished = set(runs(tmp_path / "killed"))
    assert at_work  # or nothing was killed
    logs = {name: (runs(tmp_path / "killed")[name] / "metarun.log").read_text() for name in finished}
    done = metarun(*words, f"outputs={tmp_path / 'killed'}")
    assert done.status == 0, done.err
    assert f"4 jobs: {len(finished)} finished before, {4 - len(finished)} to run" in done.err
    made = runs(tmp_path / "killed")
    assert undisturbed.keys() == made.keys()
    for name, folder in made.items():
        assert same(folder, undisturbed[name])
        # What was finished trains no step more. (A kill may have come after a last step and before its state was
        # saved, so that a job which was not finished may well log that step twice.)
        trained = (folder / "metarun.log").read_text().count("step 150/150")
        assert trained == logs[name].count("step 150/150") if name in logs else trained >= 1
    assert sum(sittings(made[name]) for name in finished) <= len(finished) + 2 * 2


def test_recipes_that_are_swept_are_given_the_words_that_each_has_a_use_for(tmp_path: Path) -> None:
    words = [*SINUSOID, "recipe=train,continual", "continual.orders=2", f"outputs={tmp_path}"]
    jobs = [line.split()[-1] for line in metarun("-m", *words, "--dry-run").out.splitlines()[:2]]
    assert ["continual.orders-2" in job for job in jobs] == [False, True]
    alone = metarun("-m", *SINUSOID, "recipe=train,meta", "continual.orders=2", f"outputs={tmp_path}", "--dry-run")
    one_line(alone, "continual.orders=2: this recipe has no use for it")
    several = metarun("-m", *SINUSOID, "recipe=train,meta", "continual.orders=2,3", f"outputs={tmp_path}", "--dry-run")
    one_line(several, "continual.orders=2: this recipe has no use for it")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["recipe=meta,transfer"],
            "recipe: its stage Transfer needs a target; add target=pneumoniamnist, say (in the job recipe=tr",
        ),
        (
            ["target=null,digits"],
            "target: this recipe has no use for one; add recipe=transfer, say (in the job target=digits)",
        ),
        (["checkpoint=null,nowhere"], "nowhere: is for testing a finished run; add recipe=test"),
        (
            ["recipe=test", "checkpoint={run},nowhere"],
            "checkpoint=nowhere: there is no such run folder or file (in the job ch",
        ),
        (["images=null,nowhere"], "this recipe has no use for it"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_the_last_job_cannot_be_is_told_before_the_first_runs(words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    words = [word.format(run=tmp_path / "run") for word in words]
    if any(word.startswith("checkpoint=/") for word in words):
        assert metarun(*SINUSOID, f"outputs={tmp_path / 'made'}").status == 0
        shutil.copytree(run_folder(tmp_path / "made"), tmp_path / "run", dirs_exist_ok=True)
    done = metarun("-m", *([] if words[0] == "recipe=test" else SINUSOID), *words, f"outputs={tmp_path / 'out'}")
    one_line(done, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_interrupted_sweep_saves_its_jobs_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    words = [
        "-m",
        "hydra/launcher=local",
        "hydra.launcher.at_once=2",  # also where there is one core
        "seed=0,1",
        "algo=maml",
        *LONGER[:-2],
        "train.steps=100000",
        "hardware.threads=1",
    ]
    process = start(*words, "train.save_seconds=1000", f"outputs={tmp_path}")
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("*/*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1] == f"metarun: interrupted by {number.name}; the same command goes on"
    assert len(list(tmp_path.glob("*/*/last.pt"))) == 2


def test_a_sweep_one_by_one_says_once_that_it_was_interrupted(tmp_path: Path) -> None:
    words = ["-m", "hydra/launcher=local", "hydra.launcher.at_once=1", "seed=0,1", "algo=maml", *LONGER[:-2]]
    process = start(*words, "train.steps=100000", "hardware.threads=1", f"outputs={tmp_path}")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert [line for line in err.splitlines() if "interrupted" in line] == [
        "metarun: interrupted by SIGTERM; the same command goes on"
    ]


def test_jobs_end_with_a_sweep_that_was_killed(tmp_path: Path) -> None:
    process = start("-m", "seed=0,1", "algo=maml", *LONGER[:-2], "train.steps=1000000", f"outputs={tmp_path}")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    _, err = process.communicate()  # returns when nobody holds its output any more
    assert list(tmp_path.glob("*/*/last.pt"))
    assert "Traceback" not in err


def test_what_jobs_are_forked_from_has_imported_what_an_optimiser_needs(tmp_path: Path) -> None:
    """The hundreds of modules that torch imports for the first one of its own would take each job more than a second."""
    code = "import sys, torch\nfrom metarun.ops.optimizers import uncompiled\nknown = {*sys.modules}\n"
    code += "uncompiled(torch.optim.Adam)([torch.zeros(1)]).step()\n"
    (tmp_path / "optimiser.py").write_text(f"{code}print(len({{*sys.modules}} - known))\n")
    out, err = warm.start(["optimiser"], environment(), tmp_path, start_new_session=False).communicate(timeout=240)
    assert err == ""
    assert int(out) < 20


def test_many_tiny_jobs_cost_little_and_leave_no_memory(tmp_path: Path) -> None:
    """A job after the first takes less than the first, which starts the program; the parent does not grow after the 10th."""
    watch = (
        "import sys, time\n"
        "began = time.monotonic()\n"
        "from metarun.sweeps import plan\n"
        "from metarun.cli import main\n"
        "say, times = plan.say, []\n"
        "def noting(line):\n"
        "    if line.startswith('['):\n"
        "        pages = int(open('/proc/self/statm').read().split()[1])\n"
        "        times.append((time.monotonic(), pages * 4096))\n"
        "    say(line)\n"
        "plan.say = noting\n"
        "sys.argv[0] = 'metarun'\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    later = (times[-1][0] - times[0][0]) / (len(times) - 1)\n"
        "    print('PER JOB', later / (times[0][0] - began), times[-1][1] - times[9][1])\n"
    )
    words = [*SINUSOID, "hydra/launcher=local", "hardware.threads=1", "seed=range(0,14)", f"outputs={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", watch, "-m", *words], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("PER JOB")]
    share, growth = map(float, told.split()[2:])
    assert len(runs(tmp_path)) == 14
    assert share < 1
    assert growth < 10e6


def test_ray(tmp_path: Path) -> None:
    words = ["-m", "hydra/launcher=ray", "algo=protonet,maml", *SINUSOID[1:], f"outputs={tmp_path}"]
    process = start(*words, PYTHONWARNINGS="ignore", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert "  algo=protonet\n    algo: ProtoNet only classifies" in err
    assert metarun(*SINUSOID, f"outputs={tmp_path / 'alone'}").status == 0
    (swept,) = runs(tmp_path).values()
    assert same(run_folder(tmp_path / "alone"), swept)


def test_an_address_without_a_ray_is_one_line(tmp_path: Path) -> None:
    words = ["-m", "hydra/launcher=ray", "hydra.launcher.address=x", "seed=0,1", *SINUSOID]
    one_line(metarun(*words, f"outputs={tmp_path / 'none'}"), "hydra.launcher.address=x: no Ray can be used there (")
    assert not (tmp_path / "none").exists()


def test_without_an_address_a_ray_is_started_and_a_signal_means_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of itself Ray would take one that runs here, and have SIGTERM end the sweep by an exit status of its own."""
    before, asked = signal.getsignal(signal.SIGTERM), list[str | None]()

    def init(address: str | None, **options: object) -> None:
        asked.append(address)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    spec = SimpleNamespace(origin="here")  # by which it counts as installed
    stands_for = SimpleNamespace(__spec__=spec, init=init, nodes=list, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", stands_for)
    try:
        with pytest.raises(UserError, match="this machine has 0 for a job"):
            next(ray.carry_out([], None, {"num_cpus": 1, "num_gpus": 0}))
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == ["local"]


def test_what_no_node_of_ray_has_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 1.0}}]
    ray.tell_what_is_lacking(nodes, {"num_cpus": 4, "num_gpus": 0}, None)
    with pytest.raises(UserError, match=r"hydra.launcher.cpus=8: this machine has 4 for a job"):
        ray.tell_what_is_lacking(nodes, {"num_cpus": 8, "num_gpus": 0}, None)
    ray.tell_what_is_lacking(nodes, {"num_cpus": 4, "num_gpus": 0.5}, "auto")
    assert capsys.readouterr().err == (
        "hydra.launcher.gpus=0.5: no node of auto has more than 0; jobs wait for one that has\n"
    )


@pytest.mark.parametrize(
    ("word", "module", "extra"),
    [
        ("hydra/launcher=slurm", "submitit", "slurm"),
        ("hydra/launcher=ray", "ray", "ray"),
        ("hydra/sweeper=optuna", "optuna", "optuna"),
    ],
)
def test_missing_extra_is_named(
    word: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = metarun("-m", word, "seed=0,1", *SINUSOID, f"outputs={tmp_path / 'none'}")
    assert done.status == 2
    assert done.said == [f"metarun: {word}: needs {module}, which is not installed; pip install 'metarun[{extra}]'"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("word", "module", "extra"), [("hydra/launcher=ray", "ray", "ray"), ("hydra/sweeper=optuna", "optuna", "optuna")]
)
def test_an_extra_that_cannot_be_imported_is_named(
    word: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(module, tmp_path, monkeypatch)
    done = metarun("-m", word, "seed=0,1", *SINUSOID, f"outputs={tmp_path / 'none'}")
    assert done.status == 2
    told = f"{module} cannot be imported (blocked); pip install 'metarun[{extra}]'"
    assert done.said[-1] == f"metarun: {word}: needs {module}, but {told}"


def test_a_folder_of_its_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library_that_is_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^a=b: needs library_that_is_a_folder, which is not installed; pip install"):
        needs("library_that_is_a_folder", "a=b", "extra")


def test_fixed_words_apply_to_every_job_and_the_message_names_the_job_that_lacks_the_key(tmp_path: Path) -> None:
    words = ["-m", *SINUSOID[1:], "algo.inner_lr=0.1", f"outputs={tmp_path}", "--dry-run"]
    done = metarun("algo=maml,fomaml", *words)
    assert done.status == 0, done.err
    assert "2 jobs: 0 finished before, 2 to run" in done.out
    lacking = metarun("algo=maml,protonet", *words)
    assert lacking.status == 2
    (line,) = lacking.said
    assert line.startswith("metarun: algo.inner_lr: there is no such key; it is a key of algo=anil, ")
    assert line.endswith(" more (metarun help algo.inner_lr) (in the job algo=protonet)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("algo.inner_lr=0.1,abc", "algo.inner_lr=abc: must be of type float"),
        ("task.shots=5,0", "task.shots=0: must be at least 1"),
        ("algo.inner_lr=interval(0,1)", "algo.inner_lr: an interval is for a search; add hydra/sweeper=optuna"),
    ],
)
def test_every_job_is_checked_before_the_first_runs(word: str, expected: str, tmp_path: Path) -> None:
    done = metarun("-m", "algo=maml", *SINUSOID[1:], word, f"outputs={tmp_path / 'o'}")
    assert done.status == 2
    assert len(done.said) == 1
    assert done.said[0].startswith(f"metarun: {expected}")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data=folder", "data.root=IMAGES,IMAGSE"], "data.root: there is no file or folder IMAGSE; did you mean images?"),
        (["seed=0,1", "test.data=[folder]", "test.data.folder.root=IMAGSE"], "test.data.folder.root: there is no file or folder IMAGSE;"),
        (["seed=0,1", "data=[a:folder,b:glyphs]", "data.sets.a.root=IMAGSE"], "data.sets.a.root: there is no file or folder IMAGSE;"),
        (["backbone.from=null,IMAGSE"], "backbone.from=IMAGSE: there is no such run folder or file"),
        (["encoder=run", "encoder.from=IMAGSE", "seed=0,1"], "encoder.from=IMAGSE: there is no such run folder or file"),
        (["augment=null,standard"], "augment: "),
    ],
)  # fmt: skip
def test_what_a_job_lacks_on_this_machine_is_told_before_the_first_runs(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kornia", "kornia.augmentation"):
        monkeypatch.setitem(sys.modules, module, None)
    make_images(tmp_path / "images")
    words = [w.replace("IMAGES", f"{tmp_path}/images").replace("IMAGSE", f"{tmp_path}/imagse") for w in words]
    done = metarun("-m", *words, f"outputs={tmp_path / 'o'}")
    assert done.status == 2, done.err
    assert len(done.said) == 1
    assert expected.replace("IMAGSE", f"{tmp_path}/imagse") in done.said[0]
    assert not (tmp_path / "o").exists()


def test_lists_of_named_data_sets_can_be_swept(tmp_path: Path) -> None:
    done = metarun(
        "-m",
        "data=[one:glyphs,other:glyphs],glyphs",
        "test.data=[x:glyphs],[glyphs,y:glyphs]",
        "--dry-run",
        f"outputs={tmp_path}",
    )
    assert done.status == 0, done.err
    assert "data=[one:glyphs,other:glyphs] test.data=[x:glyphs]" in done.out
    assert "data=glyphs test.data=[glyphs,y:glyphs]" in done.out


def test_data_that_only_the_nodes_of_a_cluster_have_are_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", "data=folder", "data.root=/scratch/a,/scratch/b", "--dry-run", f"outputs={tmp_path}"]
    one_line(metarun(*words), "data.root: there is no file or folder /scratch/a")
    monkeypatch.setattr(local.Local, "here", Launcher.here)  # as every launcher but those of this machine
    there = metarun(*words)
    assert there.status == 0, there.err
    assert "2 jobs: 0 finished before, 2 to run" in there.out


def test_dry_run_lists_jobs_and_what_is_finished(tmp_path: Path) -> None:
    words = ["-m", "seed=0,1", *SINUSOID, f"outputs={tmp_path / 'my runs'}"]
    assert metarun(*SINUSOID, "seed=1", f"outputs={tmp_path / 'my runs'}").status == 0
    done = metarun(*words, "--dry-run")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert [line.split()[:1] for line in lines[:2]] == [["to"], ["finished"]]
    assert "seed=0" in lines[0]
    assert f"'{tmp_path}/my runs/sinusoid-maml/" in lines[0]
    estimate = r" \(about \d+ s one after the other\)"  # by what the finished one took
    assert re.fullmatch(rf"2 jobs: 1 finished before, 1 to run{estimate}; nothing was run", lines[2])
    search = metarun(*words[:1], "hydra/sweeper=optuna", *SINUSOID, "algo.inner_lr=0.1,0.2", *words[-1:], "--dry-run")
    assert re.match(rf"search   20 trials of algo.inner_lr{estimate}\n", search.out)
    assert len(list(tmp_path.rglob("config.yaml"))) == 1
    one = metarun("-m", "seed=5", *SINUSOID, f"outputs={tmp_path}", "--dry-run")
    assert one.out.endswith("1 job: 0 finished before, 1 to run; nothing was run\n")


def test_roots_that_look_alike_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local.Local, "here", False)  # nobody looks for these paths
    done = metarun("-m", "data=folder", "data.root=x/1,x_1,~/x 1", "outputs=o", "--dry-run")
    assert done.status == 0, done.err
    folders = {line.split()[-1] for line in done.out.splitlines()[:3]}
    assert len(folders) == 3
    assert all(re.fullmatch(r"o/folder-protonet/data\.root-[A-Za-z0-9._-]+", folder) for folder in folders)


def test_experiments_can_be_swept(tmp_path: Path) -> None:
    """Each has a folder of its own, also below a name that they share; one that an earlier version made is gone on with."""
    words = ["-m", "experiment=omniglot_maml,omniglot_protonet", "--dry-run", f"outputs={tmp_path}"]
    for name, more in (("sweep", []), ("mine", ["name=mine"])):
        done = metarun(*words, *more)
        assert done.status == 0, done.err
        for experiment in ("omniglot_maml", "omniglot_protonet"):
            assert f"{tmp_path}/{name}/experiment-{experiment}\n" in done.out
    config = OmegaConf.create({"outputs": str(tmp_path), "name": "mine", "resume": True})
    (tmp_path / "mine" / "seed-1").mkdir(parents=True)
    given = ["name=mine", "experiment=omniglot_maml"]
    assert choose_folder(config, [*given, "seed=1"]).name == "seed-1"
    assert choose_folder(config, [*given, "seed=2"]).name == "experiment-omniglot_maml__seed-2"
    assert choose_folder(config, ["experiment=omniglot_maml", "seed=2"]).name == "seed-2"


def test_a_path_with_a_space_or_a_colon_is_the_same_in_a_sweep(tmp_path: Path) -> None:
    for name in ("my images", "a:b", "plain"):
        images = make_images(tmp_path / name)
        words = [
            "data=folder",
            f"data.root={images}",
            "data.image_size=16",
            "task.ways=2",
            "task.queries=2",
            f"outputs={tmp_path / 'out'}",
        ]
        listed = metarun("-m", *words, "seed=0", "--dry-run")
        assert listed.status == 0, listed.err
        assert "\\" not in listed.out.replace(str(tmp_path), "")


def test_what_is_typed_goes_before_what_an_experiment_searches(tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\n# Mine\nhydra:\n  sweeper:\n    params:\n      train.steps: choice(3,4)\n"
        "      train.optimizer.lr: interval(0.001,0.01)\n"
    )
    words = [
        "--config-dir",
        str(own.parent),
        "experiment=mine",
        "hydra/sweeper=optuna",
        *SINUSOID,
        f"outputs={tmp_path / 'out'}",
    ]
    listed = metarun("-m", *words, "train.steps=2", "--dry-run")
    assert listed.status == 0, listed.err
    assert "of train.optimizer.lr" in listed.out
    assert "train.steps" not in listed.out


def test_a_list_of_test_sets_takes_no_sweep_over_data_away(tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\n# Mine\nhydra:\n  sweeper:\n    params:\n      data: glyphs,omniglot\n"
    )
    words = ["--config-dir", str(own.parent), "experiment=mine", "test.data=[glyphs]", f"outputs={tmp_path / 'out'}"]
    listed = metarun("-m", *words, "--dry-run")
    assert listed.status == 0, listed.err
    assert "2 jobs: 0 finished before, 2 to run" in listed.out
    one_line(metarun(*words), "data: the experiment sweeps over it (data=glyphs,omniglot); add -m")
    alone = metarun("-m", *words, "data=omniglot", "--dry-run")
    assert "1 job: 0 finished before, 1 to run" in alone.out


@pytest.mark.parametrize(
    "swept",
    [
        ["seed=range(0,2)"],
        ["optimizer=glob(a*)"],
        ["recipe=pretrain_meta", "optimizer@pretrain.train.optimizer=adam,sgd"],
    ],
    ids=str,
)
@pytest.mark.parametrize("root", ["~/images", "/x/bücher", "/x/a=b"])
def test_ranges_stand_beside_paths_that_hydra_cannot_read(
    swept: list[str], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a path has the config composed for its type, in which what is swept has its first value."""
    monkeypatch.setattr(local.Local, "here", False)  # nobody looks for these paths
    listed = metarun("-m", *swept, "data=folder", f"data.root={root}", f"outputs={tmp_path}", "--dry-run")
    assert listed.status == 0, listed.err
    assert "2 jobs: " in listed.out


def test_a_single_run_leaves_out_nothing_that_its_experiment_sweeps_over(tmp_path: Path) -> None:
    ran = metarun("experiment=omniglot_table", "algo=maml", f"outputs={tmp_path / 'out'}")
    assert ran.status == 2
    assert "task.shots, task.ways: the experiment sweeps over them (task.shots=1,5); add -m" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_finished_job_of_other_data_is_no_finished_job(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    words = ["data=folder", f"data.root={images}", "data.image_size=16", "backbone.channels=4", "task.ways=2", "task.queries=2",
             "train.steps=0", "test.episodes=4", "test.baseline_episodes=0", "seed=0", f"outputs={tmp_path / 'out'}"]  # fmt: skip
    assert metarun(*words).status == 0
    again = metarun("-m", *words)
    assert again.status == 0, again.err
    shutil.rmtree(min((images / "test").iterdir()))
    changed = metarun("-m", *words)
    assert changed.status == 1
    assert "was made with other data" in changed.out + changed.err
    refused = "listed above; the same command refuses them again, until what is said there is done\n"
    assert changed.err.endswith(refused)
    (run_folder(tmp_path / "out") / "result.json").unlink()  # so that the job itself meets the data
    assert metarun("-m", *words).err.endswith(refused)


def test_jobs_that_are_refused_are_told_from_those_that_run_again(tmp_path: Path) -> None:
    job = Job((), (), tmp_path / "none", "a")
    failed = [(job, Outcome(2, "x"), 0.0), (job, Outcome(2, "other data", refused=True), 0.0), (job, Outcome(), 0.0)]
    with pytest.raises(
        JobsFailed, match=r"^2 of 3 jobs failed, listed above; .* again, but for the 1 that it refuses until"
    ):
        conclude(failed)


def test_no_more_places_are_listed_than_jobs_can_use() -> None:
    many = local.places(10**12, 1, [], 3)
    assert len(many) == 3
    assert local.places(8, 1, ["0", "1"], 3) == local.places(8, 1, ["0", "1"])[:3]
