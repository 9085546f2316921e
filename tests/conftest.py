"""Where tests find data and keep caches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remembered

ROOT = Path(__file__).parents[1]

if hasattr(
    signal, "SIGHUP"
):  # what `nohup pytest` has it ignore, runs would go on ignoring, and tests could not see them heed it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
remembered.install()
# A disk takes milliseconds for each, dozens of times a run, for the sake of a power cut, which no test can make. Commands that tests
# start as processes of their own wait for it as ever.
os.fsync = os.fstat
# Sums of several threads have another order, so that what runs in this process would differ from processes of its own, and workers
# beside each other would have more threads than there are cores. It is read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The library by which Python reads lines sets it for the processes that are started after it was imported, workers among them.
os.environ.pop("COLUMNS", None)
os.environ.setdefault("METARUN_DATA", str(ROOT.parent / "shared" / "data"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole stretches of the tests, and later of each other's, unless `--dist` asks otherwise.

    What the tests of a file share is then made by one worker, and not by each that is dealt one of them.
    """
    if config.getoption("dist") != "load":  # which `-n` alone means
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tables for the whole session, so that no data set is built twice."""
    base = tmp_path_factory.getbasetemp()  # a worker of pytest-xdist has its own inside the session's
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "metarun-tables"
    os.environ["METARUN_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A test that has torch compute with more threads leaves them to no test after it: together workers would have more than cores."""
    import torch  # not by the process that only hands out the tests

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
