"""Processes that share the tasks of a step: the same numbers as one process, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm
from helpers import build, compose, toy_images
from shell import SINUSOID, environment, lines, metarun, result, run_folder, start

from metarun import run as metarun_in_python
from metarun.config import task_of
from metarun.data.regression import Linear
from metarun.engine import distributed
from metarun.engine.distributed import PeerLost, World, place
from metarun.engine.hardware import choose, worthwhile_processes
from metarun.engine.learner import Trainable
from metarun.errors import UserError
from metarun.runs import building
from metarun.runs import run as run_module
from metarun.runs.folder import folder_name
from metarun.runs.run import Run
from metarun.stages import MetaTest
from metarun.system.launched import VARIABLES as LAUNCHED

# Five tasks cannot be halved: the shares differ in size.
SHORT = [*SINUSOID, "train.tasks_per_step=5", "train.log_every=1", "train.validate_every=5", "hardware.threads=1"]
SHARED = [word.replace("train.steps=6", "train.steps=20") for word in SHORT]
LONG = [word.replace("train.steps=6", "train.steps=1000000") for word in SHORT] + ["train.save_every=5"]


LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def torchrun(*words: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str] | warm.Process:
    """`metarun words...` in two processes of torch's launcher."""
    return start(*words, launcher=LAUNCHER, cwd=cwd, **variables)


def said(process: subprocess.Popen[str] | warm.Process) -> list[str]:
    """What metarun printed as errors, in whichever process, when all have ended."""
    _, err = process.communicate(timeout=240)
    return [line for line in err.splitlines() if line.startswith("metarun: ")]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank(pid: int) -> int:
    """What a launcher has told a process."""
    variables = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return int(variables["RANK"])


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Returns as soon as `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shares_cover_everything_once() -> None:
    for size in range(1, 8):
        ends = [World(rank, size).share(5) for rank in range(size)]
        assert [task for start, stop in ends for task in range(start, stop)] == list(range(5))


# The same numbers


def assert_close(one: Path, other: Path) -> None:
    """The losses of every step, the validations, and the score of every test episode, to 1e-5."""
    left, right = lines(one), lines(other)
    assert len(left) == len(right) >= 20
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"train/items_per_second", "train/tasks_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
    with np.load(one / "test_scores.npz") as a, np.load(other / "test_scores.npz") as b:
        assert a["values"].shape[1] == 8
        np.testing.assert_array_equal(a["steps"], b["steps"])
        np.testing.assert_allclose(b["values"], a["values"], rtol=1e-5)
    numbers = [
        {name: value for name, value in result(folder).items() if name.startswith(("test/", "val/"))}
        for folder in (one, other)
    ]
    after = [found.pop("test/after_inner_steps") for found in numbers]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5)
    for step, scores in after[0].items():
        assert after[1][step] == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("algo", ["maml", "reptile"])  # gradients alone, and with buffers and whole meta-batches
def test_one_process_two_and_torchrun_give_the_same_numbers(algo: str, tmp_path: Path) -> None:
    words = [f"algo={algo}", *SHARED[1:], "task.shots=5"]
    assert metarun(*words, f"outputs={tmp_path / 'one'}").status == 0
    one = run_folder(tmp_path / "one")
    two = tmp_path / "two" / one.relative_to(tmp_path / "one")
    processes = {two: start(*words, "hardware.processes=2", f"outputs={tmp_path / 'two'}")}
    if algo == "maml":  # in a folder beside, which one rank would find made by another
        beside = one.with_name(f"{one.name}__2")
        processes[beside] = torchrun(*words, "resume=false", f"outputs={tmp_path / 'one'}")
    for folder, process in processes.items():
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert err.count("run folder: ") == err.count("hardware: ") == out.count("results  ") == 1
        assert_close(one, folder)
        assert result(folder)["hardware"]["processes"] == 2
        assert written(folder) == written(one)
    assert sorted(tmp_path.glob("*/*/*")) == sorted([one, *processes])


def written(folder: Path) -> list[str]:
    """What a run folder holds; TensorBoard's files have a time and a process in their names."""
    return sorted(path.name.partition(".")[0] for path in folder.iterdir())


STAGE = """
import os, signal
from metarun import stages

class Train(stages.Train):
    def execute(self, run):
        def watch(step, score):
            if step == int(os.environ.get("STOP", 0)):
                os.kill(os.getpid(), signal.SIGUSR1)
            return step == int(os.environ.get("PRUNE", 0))

        run.watch = watch if run.world.main else None
        super().execute(run)
"""


def test_run_goes_on_with_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "staged.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    words = [*SHARED, "recipe.stages=[staged.Train,metarun.stages.MetaTest]"]
    assert metarun(*words, "outputs=whole").status == 0
    there = Path("mixed", "sinusoid-maml")

    def move(*to: str) -> None:
        """The folder is named by the overrides."""
        run_folder(Path("mixed")).rename(there / folder_name([*words, *to], named=False))

    monkeypatch.setenv("STOP", "5")
    assert metarun(*words, "outputs=mixed").status == 128 + signal.SIGUSR1
    move("hardware.processes=2")
    two = start(*words, "hardware.processes=2", "outputs=mixed", STOP="10")
    assert said(two) == ["metarun: interrupted by SIGUSR1 at step 11; the same command goes on"]
    assert two.returncode == 128 + signal.SIGUSR1
    move()
    assert said(torchrun(*words, "outputs=mixed", STOP="15")) == [
        "metarun: interrupted by SIGUSR1 at step 16; the same command goes on"
    ]
    monkeypatch.setenv("STOP", "0")
    last = metarun(*words, "outputs=mixed")
    assert last.status == 0
    assert "going on at step 16" in last.err
    assert_close(run_folder(Path("whole")), run_folder(Path("mixed")))


def test_search_prunes_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "staged.py").write_text(STAGE)
    words = [*LONG, "recipe.stages=[staged.Train]", "hardware.processes=2", "outputs=out"]
    process = start(*words, cwd=tmp_path, PRUNE="10")
    _, err = process.communicate(timeout=240)
    assert process.returncode
    assert err.count("pruned at step 10") == 1, err
    folder = run_folder(tmp_path / "out")
    assert torch.load(folder / "last.pt", weights_only=True)["state"]["step"] == 10
    assert not (folder / "result.json").exists()


# What rank 0 decides


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 4),
        (["train.tasks_per_step=3", "train.steps=100000"], 3),
        (["train.steps=100"], 1),  # too short
        (["task.queries=60"], 1),  # tasks that keep several threads busy
        (["algo=reptile"], 1),  # makes its step of all tasks
        (["backbone=mlp", "backbone.norm=none"], 1),  # by vmap
    ],
)
def test_long_trainings_on_small_tasks_are_shared_by_themselves(words: list[str], expected: int) -> None:
    config = compose(
        "algo=maml", "data=glyphs", "train.tasks_per_step=32", "train.steps=10000", "hardware.threads=4", *words
    )
    before = torch.get_num_threads()
    algorithm = build(config, toy_images())
    try:
        chosen = choose(config.hardware, algorithm, World())
    finally:
        torch.set_num_threads(before)
    learner = Trainable("train", algorithm, config.train, 0, chosen, task=task_of(config, "train"))
    assert worthwhile_processes(learner) == expected


def test_a_run_takes_the_processes_that_are_worthwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build_data = [], building.build_data
    monkeypatch.setattr(building, "build_data", lambda *given: built.append(given) or build_data(*given))
    monkeypatch.setattr(Run, "worthwhile_processes", lambda self: 2)
    found = metarun_in_python(*SHORT, outputs=tmp_path)
    assert found["hardware"]["processes"] == 2
    assert len(built) == 1  # the stages are prepared anew, on the same data
    alone = metarun_in_python(*SHORT, "hardware.processes=1", outputs=tmp_path / "alone")
    assert alone["hardware"]["processes"] == 1
    assert found["test/mse"] == pytest.approx(alone["test/mse"], rel=1e-4)


@pytest.mark.parametrize("spared", ["steps", "max_seconds"])
def test_a_training_without_a_step_is_no_matter_of_processes(
    spared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Baseline's batch, normalised as a whole, could not be shared: but the numbers are chosen for the trainings that take steps."""
    monkeypatch.setattr(building, "build_data", lambda *given: (toy_images(), None))
    words = ["algo=maml", "data=glyphs", "train.steps=10000", "train.tasks_per_step=4", "hardware.threads=2"]
    none = [f"pretrain.train.{spared}=0", "pretrain.train.tasks_per_step=1", "hardware.device=cpu"]
    config = compose("recipe=pretrain_meta", *words, *none)
    before = torch.get_num_threads()
    try:
        run = building.prepare(config, tmp_path, World())
        assert run.worthwhile_processes() == 2
        assert len(building.prepare(config, tmp_path, World(0, 2, 0, 2), run).learners) == 2
    finally:
        torch.set_num_threads(before)


def test_a_stage_for_one_process_is_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaTest, "one_process", True)
    monkeypatch.setattr(run_module, "worthwhile_processes", lambda learner: 2)
    config = compose("data=linear", "backbone=mlp", "algo=maml", "train.steps=10", "hardware.device=cpu")
    run = building.prepare(config, tmp_path, World())
    assert run.worthwhile_processes() == 1
    with pytest.raises(
        UserError, match=r"^hardware.processes=2: MetaTest is carried out by one process; leave it at 1"
    ):
        building.prepare(config, tmp_path, World(0, 2, 0, 2), run)


def test_more_processes_than_tasks_is_refused(tmp_path: Path) -> None:
    outcome = metarun(*SHARED, "hardware.processes=6", f"outputs={tmp_path}")
    assert outcome.status == 2
    assert outcome.said == [
        "metarun: hardware.processes=6: processes share the tasks of a step, and train.tasks_per_step=5; use at most "
        "hardware.processes=5"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stesp=6", "train.stesp: there is no such key"),  # every rank meets it
        # Rank 0.
        (
            "train.tasks_per_step=1",
            "hardware.processes=2: processes share the tasks of a step, and train.tasks_per_step=1; use at most hardware.processes=1",
        ),
    ],
)
def test_error_in_the_input_is_said_once_under_torchrun(word: str, message: str, tmp_path: Path) -> None:
    words = [given for given in SHORT if given.split("=")[0] != word.split("=")[0]]
    process = torchrun(*words, word, f"outputs={tmp_path}")
    out, err = process.communicate(timeout=240)
    (line,) = (line for line in err.splitlines() if line.startswith("metarun: "))
    assert line.startswith(f"metarun: {message}")
    assert (process.returncode, out) == (1, "")  # torchrun's own status
    assert err.count("Traceback") == 1  # torchrun's own
    cause = err.partition("Root Cause")[2]
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : 2 " in cause
    assert not list(tmp_path.iterdir())


def test_finished_run_is_shown_once_under_torchrun(tmp_path: Path) -> None:
    words = [*SHORT, f"outputs={tmp_path}"]
    alone = metarun(*words)
    folder = run_folder(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = torchrun(*words)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert set(alone.out.splitlines()) <= set(out.splitlines())
    assert out.count("finished before") == 1
    assert "Traceback" not in err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


# Ranks that end early


@pytest.mark.parametrize(
    ("victim", "number", "status"),
    [("further", signal.SIGKILL, 2), ("main", signal.SIGTERM, 128 + signal.SIGTERM), ("main", signal.SIGKILL, -9)],
)
def test_no_process_outlives_the_others(victim: str, number: int, status: int, tmp_path: Path) -> None:
    process = start(*LONG, "hardware.processes=2", f"outputs={tmp_path}")
    wait_for(lambda: list(tmp_path.glob("*/*/last.pt")))
    (child,) = children(process.pid)
    os.kill(child if victim == "further" else process.pid, number)
    printed = said(process)
    assert process.returncode == status, printed
    wait_for(lambda: gone(child))
    if victim == "further":
        assert printed == [
            "metarun: hardware.processes: rank 1 of 2 ended early (killed by SIGKILL); the same command goes on"
        ]


def test_rank_that_dies_before_they_meet_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    os.write(2, b'no memory\\n'); os._exit(3)\n"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    process = start(*SHORT, "hardware.processes=2", f"outputs={tmp_path / 'out'}", PYTHONPATH=path)
    how = "exit status 3; its message stands above"
    assert said(process) == [f"metarun: hardware.processes: rank 1 of 2 ended early ({how}); the same command goes on"]
    assert process.returncode == 2


@pytest.mark.parametrize(("code", "how"), [(0, "exit status 0"), (3, "exit status 3; its message stands above")])
def test_a_message_is_pointed_at_only_where_there_is_one(code: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BLAME_SECONDS", 0.0)
    store, child = SimpleNamespace(check=lambda names: False), SimpleNamespace(poll=lambda: code)
    assert distributed._blame(store, 2, [child]) == f"rank 1 of 2 ended early ({how})"


def test_ranks_meet_where_torch_is_built_without_libuv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for Windows, where its own default is refused."""
    asked: list[Any] = []
    child = SimpleNamespace(kill=lambda: None, communicate=lambda: None)

    def store(*given: Any, use_libuv: bool = True, **options: Any) -> Any:
        asked.append(use_libuv)
        return SimpleNamespace(port=29400)

    def started(command: Any, env: dict[str, str], **options: Any) -> Any:
        asked.append(env["USE_LIBUV"])
        return child

    def lost(*given: Any) -> None:
        raise PeerLost("enough")

    monkeypatch.setattr(distributed, "LIBUV", False)
    monkeypatch.setattr(distributed, "_meet", lost)
    monkeypatch.setattr(torch.distributed, "TCPStore", store)
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda name, base: base)
    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(PeerLost, match="enough"), distributed.process_group(World(0, 2, 0, 2), ["metarun"]):
        pass
    assert asked == [False, "0"]


def test_ranks_wait_for_one_that_works_for_days() -> None:
    """It learns a target, say; torch takes the milliseconds in 32 bits at places."""
    assert 7 < distributed.PEER_TIMEOUT / timedelta(days=1) < 2**31 / 86_400_000


@pytest.mark.parametrize("launch", ["own", "torchrun"])
def test_rank_that_alone_meets_an_error_is_named_with_it(launch: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import os\nfrom metarun.backbones.mlp import MLP\nfrom metarun.errors import UserError\n\n"
        "class Odd(MLP):\n    def forward(self, x, n_support=None):\n        if os.environ.get('RANK') == '1':\n"
        "            raise UserError('no disk on this machine')\n        return super().forward(x, n_support)\n"
    )
    words = [*SHORT, "backbone._target_=odd.Odd", "outputs=out"]
    run = start if launch == "own" else torchrun
    process = run(*words, *(["hardware.processes=2"] if launch == "own" else []), cwd=tmp_path)
    assert said(process) == [
        "metarun: hardware.processes: rank 1 of 2 ended early (no disk on this machine); the same command goes on"
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_of_torchrun_ends_the_run_and_the_same_command_goes_on(victim: int, tmp_path: Path) -> None:
    words = [*LONG, f"outputs={tmp_path}"]
    process = torchrun(*words)
    wait_for(lambda: list(tmp_path.glob("*/*/last.pt")))
    ranks = {rank(pid): pid for pid in children(process.pid)}
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"rank      : {victim} (local_rank: {victim})\n  exitcode  : -9 " in err
    assert err.count("Traceback") == 1  # torchrun's own
    assert all(gone(pid) for pid in ranks.values())
    if victim == 0:
        return
    assert "metarun: " in err  # that another ended early, or the SIGTERM that torchrun sends
    again = torchrun(*words)
    folder = run_folder(tmp_path)
    wait_for(lambda: (folder / "metarun.log").read_text().count("going on at step "))
    ranks = {rank(pid): pid for pid in children(again.pid)}
    again.terminate()
    (line,) = said(again)
    assert line.startswith("metarun: interrupted by SIGTERM")
    assert all(gone(pid) for pid in ranks.values())


# Devices, and what a launcher says


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two CUDA devices, for what only asks after them; those that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_each_rank_takes_a_device_of_its_own(two_devices: list[torch.device]) -> None:
    config = compose("data=linear", "backbone=mlp", "algo=maml", "hardware.threads=1")
    algorithm = build(config, Linear())
    for world in (World(), World(0, 2, 0, 2), World(1, 2, 1, 2), World(3, 4, 1, 2, launched=True)):
        chosen = choose(config.hardware, algorithm, world)
        assert chosen.device == two_devices[-1] == torch.device("cuda", world.local_rank)
        assert chosen.world is world
    with pytest.raises(
        UserError, match=r"^hardware.processes=3 on this machine: .* there are 2; use hardware.processes=2"
    ):
        choose(config.hardware, algorithm, World(0, 3, 0, 3))
    config.hardware.device = "cpu"
    assert choose(config.hardware, algorithm, World(0, 3, 0, 3)).device == torch.device("cpu")
    assert len(two_devices) == 4


@pytest.fixture
def tf32() -> Iterator[Callable[[], tuple[bool, bool]]]:
    """Whether products and convolutions may be in TF32; as it was, afterwards."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (products.allow_tf32, convolutions.allow_tf32)
    yield lambda: (products.allow_tf32, convolutions.allow_tf32)
    products.allow_tf32, convolutions.allow_tf32 = before


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_tf32_only_where_the_config_says_so(
    two_devices: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    tf32: Callable[[], tuple[bool, bool]],
    allowed: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    config = compose("data=linear", "backbone=mlp", "algo=maml", "hardware.threads=1", f"hardware.tf32={allowed}")
    algorithm = build(config, Linear())
    chosen = choose(config.hardware, algorithm, World())
    assert tf32() == (allowed, allowed)  # torch's own default is (False, True)
    assert chosen.describe()["tf32"] is allowed
    assert ("TF32" in str(chosen)) is allowed


def test_tf32_is_refused_where_there_is_none() -> None:
    config = compose("data=linear", "backbone=mlp", "algo=maml", "hardware=cpu", "hardware.tf32=true")
    with pytest.raises(UserError, match=r"^hardware\.tf32=true: only CUDA devices"):
        choose(config.hardware, build(config, Linear()), World())


def test_messages_go_by_way_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, torch.dtype, Any]] = []

    def all_reduce(message: torch.Tensor, group: Any = None) -> None:
        sent.append((message.device.type, message.dtype, group))
        if message.device.type == "cpu":
            message.mul_(2)  # as if the other rank had the same

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    values = [torch.ones(2, dtype=torch.float32), torch.full((1, 1), 3.0, dtype=torch.float64)]
    World(0, 2).all_reduce(values)
    assert [value.tolist() for value in values] == [[2, 2], [[6]]]
    assert sent == [("cpu", torch.float64, None)]
    sent.clear()
    with pytest.raises(NotImplementedError):  # nothing comes back from torch's device without memory
        World(0, 2, device=torch.device("meta"), group="nccl").all_reduce(values)
    assert sent == [("cpu", torch.float32, None), ("meta", torch.float64, "nccl")]  # are all here? then the message


def test_ranks_must_have_found_devices_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    others = 0.0
    groups: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda message, group=None: message.add_(others))
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: groups.append(backend) or backend)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    world = World(0, 2, launched=True)
    assert world.to(cpu) is world
    with pytest.raises(UserError, match=r"^hardware.device: 1 of the 2 processes found a CUDA device"):
        world.to(cuda)
    others = 1.0
    with pytest.raises(UserError, match=r"^hardware.device: 1 of the 2"):
        world.to(cpu)
    met = world.to(cuda)
    assert (met.device, met.group, groups) == (cuda, "nccl", ["nccl"])


def test_place_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place(3) == World(0, 3, 0, 3)
    monkeypatch.setenv("RANK", "1")  # of something else
    assert place(1) == World()
    for name, value in zip(LAUNCHED, ("5", "8", "node1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert place(1) == place(8) == World(5, 8, 1, 4, launched=True)
    with pytest.raises(UserError, match=r"^hardware.processes=4: this command was launched as one of 8"):
        place(4)
