"""What Windows and macOS lack is left out: the same commands work without these names."""

from __future__ import annotations

import ast
import errno
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import compose
from shell import ROOT, SINUSOID, environment, metarun, result

from metarun import files
from metarun.engine.distributed import World
from metarun.engine.hardware import set_up_process
from metarun.sweeps import local
from metarun.system import platform

# By module, what one of the three systems does not have, or has with another meaning.
LACKING = {
    "os": [
        "fork",
        "forkpty",
        "getpgid",
        "getpgrp",
        "getppid_",
        "getuid",
        "geteuid",
        "killpg",
        "setsid",
        "setpgid",
        "sched_getaffinity",
        "sched_setaffinity",
        "mkfifo",
        "nice",
        "statvfs",
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "getloadavg",
        "pipe2",
        "posix_spawn",
        "wait4",
        "chown",
    ],
    "signal": [
        "SIGUSR1",
        "SIGUSR2",
        "SIGHUP",
        "SIGALRM",
        "SIGPIPE",
        "SIGQUIT",
        "SIGKILL",
        "SIGCHLD",
        "alarm",
        "pause",
        "setitimer",
        "pthread_kill",
    ],
    "socket": ["AF_UNIX", "socketpair"],
}
MODULES = ("resource", "fcntl", "pwd", "grp", "termios")

WITHOUT = """
import importlib, multiprocessing, os, signal, sys
for name in ("sched_getaffinity", "sched_setaffinity", "setsid", "setpgid", "killpg", "getpgid", "O_DIRECTORY", "getuid", "nice", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGPIPE", "SIGQUIT"):
    delattr(signal, name)
sys.modules["resource"] = None
multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""


def test_one_module_alone_names_what_systems_lack() -> None:
    found = []
    for path in sorted((ROOT / "metarun").rglob("*.py")):
        if path == Path(platform.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in LACKING.get(node.value.id, ()):
                    found.append(f"{path}:{node.lineno} {node.value.id}.{node.attr}")
            elif isinstance(node, ast.Import):
                found += [f"{path}:{node.lineno} {name.name}" for name in node.names if name.name in MODULES]
            elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
                found.append(f"{path}:{node.lineno} {node.module}")
            elif isinstance(node, ast.keyword) and node.arg in ("start_new_session", "preexec_fn"):
                found.append(f"{path}:{node.value.lineno} {node.arg}")
    assert not found


def test_a_run_a_sweep_and_a_resume_without_what_systems_lack(tmp_path: Path) -> None:
    """The names are missing in the processes of the sweep's jobs too, and these are started anew, as on Windows.

    The first of them goes on with the run.
    """
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    words = [*SINUSOID, "hardware=cpu", "outputs=out"]

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        paths = f"{tmp_path}{os.pathsep}{ROOT}"
        return subprocess.run(
            [sys.executable, "-m", "metarun", *words, *more],
            cwd=tmp_path, env=environment(PYTHONPATH=paths), capture_output=True, text=True, check=False,
        )  # fmt: skip

    first = command("seed=0")
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "out" / "sinusoid-maml").iterdir()
    assert "host" not in result(folder)["peak_memory"]
    (folder / "result.json").unlink()
    sweep = command("-m", "hydra/launcher=local", "hydra.launcher.at_once=2", "seed=0,1")
    assert sweep.returncode == 0, sweep.stderr
    assert "jobs share all cores" in sweep.stderr
    assert len(list(folder.parent.glob("*seed*/result.json"))) == 2
    assert "going on at step 6" in (folder.parent / ".jobs" / f"{folder.name}.log").read_text()


def test_what_is_lacking_gives_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    assert platform.cores() == list(range(os.cpu_count() or 1))[: platform.quota()]
    platform.bind([0])
    monkeypatch.setitem(sys.modules, "resource", None)
    assert platform.peak_memory() is None
    assert [number.name for number in platform.stop_signals()] == [
        name for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
    ]
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name, raising=False)
    assert platform.stop_signals() == (signal.SIGTERM,)
    assert platform.number_of("SIGUSR1", 10) == 10
    assert platform.signal_name(200) == "signal 200"
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    platform.sync_folder(Path("nowhere"))
    monkeypatch.delattr(os, "setsid", raising=False)
    platform.own_session()


def test_a_system_that_says_in_numbers_of_its_own_that_it_cannot_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOTSUP and EOPNOTSUPP are one number on Linux; macOS has two, and says the first of network folders."""
    monkeypatch.setattr(errno, "ENOTSUP", 45)
    assert 45 in runpy.run_path(platform.__file__)["SYNCS_NO_FOLDER"]
    assert 45 in runpy.run_path(files.__file__)["NO_LOCKS"]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused_in_one_line(device: str, tmp_path: Path) -> None:
    done = metarun(*SINUSOID, f"hardware={device}", f"outputs={tmp_path / 'out'}")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert f"hardware.device={device}: torch finds no" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1025, 100000, 0])
def test_threads_beyond_reason_are_refused(count: int, tmp_path: Path) -> None:
    for key in ("threads", "processes"):
        done = metarun(*SINUSOID, f"hardware.{key}={count}", f"outputs={tmp_path / 'out'}")
        assert done.status == 2
        assert f"hardware.{key}={count}: must be from 1 to 1024" in done.err


@pytest.mark.parametrize(
    ("text", "count"), [("4,2", 4), ("", None), (" 3 ", 3), ("x", None), ("0", None), ("-1", None)]
)
def test_threads_asked_of_the_environment(text: str, count: int | None) -> None:
    assert local.threads_asked({"OMP_NUM_THREADS": text}) == count
    assert local.threads_asked({}) is None


@pytest.mark.parametrize(
    ("text", "names"), [("-1", []), ("0,1", ["0", "1"]), ("1,-1,0", ["1"]), ("", []), ("GPU-a, 2", ["GPU-a", "2"])]
)
def test_gpus_as_cuda_reads_them(text: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert local.gpus() == names


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert platform.quota(tmp_path) == expected


def test_a_container_takes_as_many_cores_as_it_has_the_time_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, chosen: None, raising=False)
    monkeypatch.setattr(platform, "quota", lambda: 2)
    assert platform.cores() == [0, 1]
    assert not platform.can_bind()
    assert [len(cores) for cores, _ in local.places(None, 1, [])] == [1, 1]
    wished: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", wished.append)
    device = torch.device("cpu")
    set_up_process(composed := compose("hardware=cpu").hardware, World(), device)
    assert wished == [2]
    monkeypatch.setattr(platform, "quota", lambda: None)
    set_up_process(composed, World(), device)
    assert wished == [2]
    assert platform.cores() == list(range(8))
    assert platform.can_bind()
