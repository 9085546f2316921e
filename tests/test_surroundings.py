"""What surrounds a run: left-over variables, poor outputs, users without a name or a home, locks, full disks."""

from __future__ import annotations

import contextlib
import errno
import getpass
import io
import multiprocessing
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.progress
import torch
from rich.table import Table
from rich.text import Text
from shell import SINUSOID, environment, metarun, one_line, run_folder

from metarun import cli, files, progress
from metarun.engine import distributed
from metarun.engine.interruption import Signals
from metarun.errors import UserError
from metarun.report import listing
from metarun.runs import logger as logger_module
from metarun.runs.logger import RunLogger
from metarun.sweeps import jobs, local
from metarun.system import launched, platform
from metarun.terminal import PIPED, Terminal
from metarun.text import bytes_text, counted, duration, listed, outlasting

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCHER, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"RANK": ""}, {"RANK": "x"}, {"WORLD_SIZE": "4"}, {**LAUNCHER, "RANK": ""}]
)
def test_a_variable_that_was_left_over_changes_nothing(left: dict[str, str], bare: pytest.MonkeyPatch) -> None:
    for name, value in left.items():
        bare.setenv(name, value)
    assert launched.rank_and_size() == (0, 1)
    assert distributed.place(1) == distributed.World()
    refused = metarun("train.step=1")
    assert refused.status == 2  # and says so, which another rank than 0 does not
    assert "train.step" in refused.err


@pytest.mark.parametrize("value", ["0", "", "1", "no"])
def test_a_variable_of_hydras_changes_nothing_of_a_refusal(value: str, bare: pytest.MonkeyPatch) -> None:
    bare.setenv("HYDRA_FULL_ERROR", value)
    one_line(metarun("algo=mmal"), "algo=mmal: there is no such choice", "maml")


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "one"}, {"RANK": "-1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "1.5"}, {"LOCAL_RANK": "x"}],
)
def test_a_launchers_wrong_variables_are_told_in_one_line(wrong: dict[str, str], bare: pytest.MonkeyPatch) -> None:
    for name, value in {**LAUNCHER, **wrong}.items():
        bare.setenv(name, value)
    with pytest.raises(UserError, match=next(iter(wrong))):
        distributed.place(1)


def test_an_output_without_these_characters_spells_them() -> None:
    raw = io.BytesIO()
    ascii_only = io.TextIOWrapper(raw, encoding="ascii", errors="metarun.spelled")
    ascii_only.write("52.1% ± 3.0%, 3 × 4, 日本")
    ascii_only.flush()
    assert raw.getvalue() == b"52.1% +- 3.0%, 3 x 4, \\u65e5\\u672c"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "metarun.spelled")


class Full(io.RawIOBase):
    """A file on a full disk that standard output was redirected to."""

    def __init__(self, error: int) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, content: Any) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_output_to_a_file_is_named_where_it_cannot_be_written(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by an error that a closed terminal would have: a file is on a disk, and what is lost there is told."""
    monkeypatch.setattr("metarun.text._is_device", lambda stream: False)
    monkeypatch.setattr(sys, "__stdout__", io.TextIOWrapper(io.BufferedWriter(Full(error), 1)))
    stream = outlasting(sys.__stdout__)
    with pytest.raises(OSError, match=os.strerror(error)) as caught:
        print("what nobody can keep", file=stream, flush=True)
    assert caught.value.filename == "standard output"


def test_a_terminal_of_any_width_shows_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    table = Table("", "accuracy", "95% interval", "episodes", title="maml on glyphs\n5-way 1-shot", min_width=60)
    table.add_row("test", "52.12%", "± 3.04%", "1000")
    table.add_row(Text("untrained"), "20.00%", "", "")
    table.caption = "a caption of more than twenty columns"
    Terminal().show(table)
    assert [line.rstrip() for line in out.getvalue().split("\n")] == [
        "maml on glyphs", "5-way 1-shot", "", "test", "accuracy 52.12%", "95% interval ± 3.04%", "episodes 1000", "",
        "untrained", "accuracy 20.00%", "", "a caption of more", "than twenty columns", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("0", PIPED), ("wide", PIPED), ("", PIPED)])
def test_what_is_piped_has_the_width_that_is_asked_for(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert Terminal().width == width


def test_the_listing_of_runs_fits_the_width_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listing.show([listing.Entry(Path("x"), "glyphs-protonet", "train.steps=5 " * 9, "98.21% ± 0.30%", "finished", 0.0)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def _piped(tmp_path: Path, **streams: Any) -> tuple[int, str]:
    """The exit status of a run whose reader is gone, and its other output."""
    reader, writer = os.pipe()
    os.close(reader)
    kept = tmp_path / "kept"
    with open(kept, "w") as file:
        process = subprocess.run(
            [sys.executable, "-m", "metarun", *SINUSOID, f"outputs={tmp_path / 'out'}"], env=environment(), check=False,
            **{"stdout": file, "stderr": file, **{name: writer for name in streams}},
        )  # fmt: skip
    os.close(writer)
    return process.returncode, kept.read_text()


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_an_output_that_nobody_reads_ends_the_run_quietly(closed: str, tmp_path: Path) -> None:
    status, other = _piped(tmp_path, **{closed: None})
    assert status == 141
    assert not [word for word in ("Broken", "Traceback", "Error") if word in other]
    again = metarun(*SINUSOID, f"outputs={tmp_path / 'out'}")  # which finds nothing harmed
    assert again.status == 0, again.err
    assert (run_folder(tmp_path / "out") / "result.json").is_file()


def _on_a_terminal_that_is_closed(folder: Path, ignored: bool) -> int:
    """The exit status of a training whose terminal is closed when it has begun; `ignored` as `nohup` has it."""
    steps = [
        "train.steps=300" if ignored else "train.steps=1000000",
        "train.validate_every=5",
        "train.save_seconds=1000",
    ]
    words = [*SINUSOID[:-1], *steps, f"outputs={folder}"]
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execve(sys.executable, [sys.executable, "-m", "metarun", *words], environment())
    while not any(path.stat().st_size for path in folder.glob("*/*/metrics.jsonl")):
        assert os.read(terminal, 4096)  # the run ends early where this raises
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_run_whose_terminal_is_closed_saves_and_goes_on(tmp_path: Path) -> None:
    assert _on_a_terminal_that_is_closed(tmp_path, ignored=False) == 128 + signal.SIGHUP
    (saved,) = tmp_path.glob("*/*/last.pt")
    assert torch.load(saved, weights_only=True)["state"]["step"] > 5
    assert not (saved.parent / "result.json").exists()


def test_a_run_that_ignores_the_end_of_its_terminal_goes_on_without_it(tmp_path: Path) -> None:
    assert _on_a_terminal_that_is_closed(tmp_path, ignored=True) == 0
    assert (run_folder(tmp_path) / "result.json").is_file()


def test_what_is_ignored_from_the_start_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == signal.SIGUSR1
        monkeypatch.setattr(cli, "_outcome_of", lambda words: os.kill(os.getpid(), signal.SIGHUP) or jobs.Outcome())
        assert cli.attempt(["seed=1"]) == jobs.Outcome()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_an_output_that_the_shell_has_closed_is_none(closed: str, tmp_path: Path) -> None:
    number = {"stdout": 1, "stderr": 2}[closed]
    code = f"import os, sys; os.close({number}); os.execv(sys.executable, [sys.executable, '-m', 'metarun', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, *SINUSOID, f"outputs={tmp_path}"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (run_folder(tmp_path) / "result.json").is_file()


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    import pwd

    def unknown(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    platform.name_user()
    assert getpass.getuser() == f"user{os.getuid()}"


@pytest.mark.parametrize("variable", ["METARUN_DATA", "METARUN_CACHE"])
def test_a_user_without_a_home_is_told_what_to_set(variable: str, tmp_path: Path) -> None:
    code = f"""
import os, pwd
def unknown(*number): raise KeyError("no entry")
pwd.getpwuid = pwd.getpwnam = unknown
for name in ("HOME", "XDG_CACHE_HOME", "METARUN_DATA", "METARUN_CACHE"): os.environ.pop(name, None)
from metarun.data import roots
from metarun.errors import UserError
function = roots.data_root if {variable!r} == "METARUN_DATA" else roots.cache_root
try:
    print(function())
except UserError as error:
    print("refused:", error)
os.environ[{variable!r}] = "here"
print(function())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    refused, given = done.stdout.splitlines()
    assert refused.startswith("refused: ")
    assert variable in refused
    assert given == str(tmp_path / "here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [NotImplementedError("FileSystem does not appear to support flock"), OSError(errno.ENOLCK, "No locks available")],
)
def test_a_folder_that_takes_no_locks_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: Any, *given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("filelock.BaseFileLock.acquire", none)
    done = metarun(*SINUSOID, f"outputs={tmp_path / 'out'}")
    assert done.status == 2
    assert "takes no locks" in done.err
    assert str(tmp_path) in done.err
    assert "outputs=" in done.err
    with pytest.raises(UserError, match="takes no locks"), files.locked(tmp_path / "lock", "waits"):
        pass


def test_a_folder_that_takes_no_locks_gets_no_mark_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """filelock would put one there by itself, which a kill leaves behind."""

    def none(*given: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(UserError, match="takes no locks"), files.locked(tmp_path / "lock", "waits"):
        pass


@pytest.mark.parametrize(
    "word",
    ["seed=18446744073709551616", "seed=-1", "test.episodes=99999999999999999999", "task.ways=9223372036854775808"],
)
def test_numbers_beyond_64_bits_are_refused(word: str, tmp_path: Path) -> None:
    done = metarun(*SINUSOID, word, f"outputs={tmp_path / 'out'}")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A disk that is full once `now` is true, as TensorBoard's thread meets it."""
    from tensorboard.summary.writer import record_writer

    state = {"now": False}
    write = record_writer.RecordWriter.write

    def checked(self: Any, data: bytes) -> None:
        if state["now"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", checked)
    return state


@pytest.mark.parametrize("at", ["start", "later"])
def test_a_full_disk_in_tensorboards_thread_is_one_line(
    at: str, full: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    logger = RunLogger(tmp_path)
    if at == "later":
        logger.rewind(0)
    full["now"] = True
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); the same command goes on"):
        logger.scalars(1, {"train/loss": 1.0})
    logger.close()
    assert not told  # no traceback of the thread


def test_other_errors_of_threads_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    RunLogger(tmp_path).rewind(0)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert [type(ended.exc_value) for ended in told] == [ZeroDivisionError]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> SimpleNamespace:
    """The time that a training's log goes by, `now`; what it tells is captured."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(logger_module.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(logger_module.log, "propagate", True)
    caplog.set_level("INFO", "metarun")
    return clock


def test_how_long_training_takes_is_told_after_ten_steps(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())

    def take(steps: int, total: int, seconds: float | None = None, settings: str = "train") -> str:
        caplog.clear()
        clock.now = 0.0
        with RunLogger(tmp_path).progress("training", total, 100, seconds, settings) as advance:
            for step in range(101, 101 + steps):
                clock.now += 20.0 if step == 101 else 2.0  # the first one compiles
                advance(step)
        return caplog.text

    assert "training: 110 of 1900 in 38 s, so about 60 min more; to take less, add train.max_seconds=600 (10 min" in (
        take(30, 1900)
    )
    assert take(9, 1900) == ""
    assert take(30, 135) == ""  # half a minute
    assert "so about 4 min more" in take(30, 1900, seconds=300.0)
    for seconds in (
        61.0,
        100.0,
        180.0,
        300.0,
        700.0,
        2000.0,
    ):  # what is proposed takes less, and is a key that there is
        text = take(30, 1900, seconds=seconds + 38, settings="pretrain.train")
        (limit,) = set(re.findall(r"add pretrain\.train\.max_seconds=(\d+) ", text))
        assert seconds / 5 <= int(limit) <= seconds / 2


def test_a_bar_of_slow_steps_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bars = SimpleNamespace(now=0.0), []

    class Bar(rich.progress.Progress):
        def __init__(self, *columns: Any, **settings: Any) -> None:
            super().__init__(*columns, **settings, get_time=lambda: clock.now, disable=True)
            bars.append(self)

    monkeypatch.setattr("rich.progress.Progress", Bar)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    with progress.progress_bar("target", 4) as advance:
        for done in (1, 2):
            clock.now += 120.0
            advance(done)
        assert bars[0].tasks[0].time_remaining == 240


def test_where_there_is_no_bar_a_line_now_and_then_says_how_far_long_work_is(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.progress_bar("encoding", 60_000, 100) as advance:
        for done in range(100, 60_001, 100):
            advance(done)
            clock.now += 5.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:3] == [
        "encoding: 300 of 60000 in 10 s, so about 50 min more",
        "encoding: 500 of 60000 in 20 s, so about 50 min more",
        "encoding: 900 of 60000 in 40 s, so about 49 min more",
    ]
    assert lines[6:] == [
        "encoding: 12900 of 60000 in 11 min, so about 39 min more",
        "encoding: 24900 of 60000 in 21 min, so about 29 min more",  # no silence is longer than ten minutes
        "encoding: 36900 of 60000 in 31 min, so about 19 min more",
        "encoding: 48900 of 60000 in 41 min, so about 9 min more",
    ]
    caplog.clear()
    with progress.progress_bar("training", 10, lines=False) as advance:
        for done in range(11):
            advance(done)
            clock.now += 60.0
    assert not caplog.records


def test_a_line_of_training_fits_into_80_columns(
    clock: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunLogger(tmp_path)
    numbers = {"loss": 0.39251, "acc": 0.87532, "learning_rate": 0.001, "tasks_per_second": 0.79441}
    with logger.progress("training", 60_000):
        clock.now = 2000.0
        logger.scalars(38_000, {f"train/{name}": value for name, value in numbers.items()}, always=True)
    logger.close()
    (line,) = set(caplog.messages)  # whoever else listens
    assert line == "step 38000/60000  loss 0.3925  acc 0.8753  lr 0.001  tasks/s 0.7944  19 min left"
    assert len(line) <= 80


def test_durations_as_people_say_them() -> None:
    told = [duration(seconds) for seconds in (0.4, 42, 89, 600, 3 * 3600, 100 * 3600)]
    assert told == ["0 s", "42 s", "89 s", "10 min", "3.0 h", "4.2 days"]


def test_a_long_list_of_names_has_an_end() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == ""
    assert listed(["x" * 500, "y"]) == f"{'x' * 500} and 1 more"
    told = listed(f"name{number}" for number in range(1000))
    assert len(told) < 200
    assert told.endswith(f" and {1000 - told.count('name')} more")


def test_numbers_of_things_as_people_say_them() -> None:
    assert [counted(number, "step") for number in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
    sizes = [bytes_text(count) for count in (999, 47_300, 1_234_000, 2_500_000_000)]
    assert sizes == ["999 bytes", "47.3 kB", "1.23 MB", "2.5 GB"]


def test_a_working_folder_that_cannot_be_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path would stand in the stored config, whose text is UTF-8."""
    for name in (b"r\xe9s", b"a\nb", b"a\x1b[31m"):
        inside = tmp_path / os.fsdecode(name)
        inside.mkdir()
        monkeypatch.chdir(inside)
        done = metarun(*SINUSOID)
        assert (done.status, len(done.said), done.out) == (2, 1, ""), done
        assert "this folder's path has a control character, or bytes that are no UTF-8" in done.said[0]
        assert not list(inside.iterdir())
        assert metarun("--version").status == 0


def test_a_working_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "gone"
    inside.mkdir()
    monkeypatch.chdir(inside)
    inside.rmdir()
    for words in (SINUSOID, ["--help"]):
        done = metarun(*words)
        assert (done.status, done.out) == (2, "")
        assert done.err == "metarun: the folder that this was started in has been removed; change to another\n"
    started = subprocess.run([sys.executable, "-m", "metarun"], env=environment(), capture_output=True, text=True)
    assert (started.returncode, started.stderr) == (2, done.err)


@pytest.mark.parametrize("variable", ["METARUN_CACHE", "METARUN_DATA"])
def test_folders_of_the_environment_that_cannot_be_printed(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, os.fsdecode(b"/tmp/c\xe9"))
    done = metarun("data=omniglot", "debug=fast")
    assert done.status == 2
    assert done.said == [f"metarun: {variable}: /tmp/c\\udce9 has a control character, or bytes that are no UTF-8"]


def test_help_works_in_a_pipe() -> None:
    piped = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m metarun help | head -1"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (piped.stdout.splitlines(), piped.stderr) == (
        ["metarun help GROUP           what a group chooses, and its choices"],
        "",
    )


def test_help_onto_a_full_disk_is_one_line() -> None:
    words = [sys.executable, "-m", "metarun", "help", "seed"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "metarun: standard output: No space left on device\n")


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_error_where_its_file_system_syncs_none(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def of_files(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(reason, os.strerror(reason))
        sync(opened)

    monkeypatch.setattr(os, "fsync", of_files)
    (tmp_path / "x").write_bytes(b"before")
    refused = pytest.raises(UserError, match=r"cannot be written \(Input/output error\)$")  # it is not untouched
    with contextlib.nullcontext() if reason == errno.EINVAL else refused:
        files.save_bytes(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_long_folder_of_temporary_files_does_not_keep_jobs_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delitem(multiprocessing.process.current_process()._config, "tempdir", raising=False)
    server = forkserver.ForkServer()
    monkeypatch.setattr(forkserver, "ensure_running", server.ensure_running)
    local.start_server()
    assert len(server._forkserver_address) < 104
    assert tempfile.gettempdir() == str(long)
    server._stop()
    monkeypatch.setattr(platform, "SHORT", str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"^TMPDIR=\S+: is too long for the sockets by which jobs are started; set one of"
    ):
        local.start_server()
