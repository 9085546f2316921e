"""`scripts/fuzz/faults.py`: that it sees what it is there to see, and a few of its kills, crashes and full disks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from shell import ROOT, environment

from scripts.fuzz import faults


def test_a_few_of_them_lose_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.fuzz.faults", "kills", "crashes", "--times", "2", "--step", "17", "--scene", "regression"],
        env=environment(TMPDIR=str(tmp_path)), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for what, line in zip(("kills", "crashes"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{what}, regression: ")
        assert " of them, 0 bad" in line
        assert ": 0 of them" not in line
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")]  # torch's own cache


class Stub:
    """A command whose next ends are given."""

    def __init__(self, place: Path, *ends: faults.Ended) -> None:
        self.place, self.ends = place, list(ends)

    def run(self) -> faults.Ended:
        return self.ends.pop(0)


def wrong(stub: Stub, whole: dict[str, Any]) -> list[str]:
    return [bad.what for bad in faults.same(cast(faults.Command, stub), whole, "a crash")]


def test_other_numbers_left_over_files_and_failures_are_seen(tmp_path: Path) -> None:
    fine = faults.Ended(0, "", "")
    (tmp_path / "result.json").write_text('{"test/acc": 0.5, "seconds": 3, "train/seconds": 2}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 3}\n')
    torch.save({"model": {"a": torch.ones(2)}, "seconds": 1.0}, tmp_path / "best.pt")
    (tmp_path / "metarun.log").write_text("12:00")
    whole = faults.numbers(tmp_path)
    assert whole.keys() == {"result.json", "metrics.jsonl", "best.pt"}
    (tmp_path / "result.json").write_text('{"test/acc": 0.5, "seconds": 9, "train/seconds": 8}')
    assert wrong(Stub(tmp_path, fine), whole) == []
    assert "ended with 2" in wrong(Stub(tmp_path, faults.Ended(2, "", "metarun: no")), whole)[0]
    assert "4 lines of message" in wrong(Stub(tmp_path, faults.Ended(0, "", "metarun: no\n" * 4)), whole)[0]
    for name in ("best.pt.writing", "table.unfinished", "search.db-journal"):
        (tmp_path / name).touch()
        assert wrong(Stub(tmp_path, fine), whole) == [f"half made: {name}"]
        (tmp_path / name).unlink()
    assert "ended with 0" in wrong(Stub(tmp_path, faults.Ended(0, "", "Traceback (most recent call last)")), whole)[0]
    (tmp_path / "result.json").write_text('{"test/acc": 0.25}')
    torch.save({"model": {"a": torch.tensor([1.0, 2.0])}}, tmp_path / "best.pt")
    (tmp_path / ".best.pt.left").write_text("half")
    (told,) = wrong(Stub(tmp_path, fine), whole)
    assert "/result.json/test/acc: 0.5 became 0.25" in told
    assert "/best.pt/model/a: " in told
    assert "/.best.pt.left: is left over" in told
    (tmp_path / "metrics.jsonl").unlink()
    assert any("/metrics.jsonl: is lacking" in line for line in faults.differences(whole, faults.numbers(tmp_path)))


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        (faults.Ended(2, "", "metarun: x.pt: cannot be written (No space left on device)"), None),
        (faults.Ended(0, "", ""), None),
        (faults.Ended(1, "Traceback (most recent call last)", ""), "a traceback"),
        (faults.Ended(-9, "", ""), "exit status -9"),
        (faults.Ended(2, "", ""), "0 lines of message"),
        (faults.Ended(2, "", "metarun: no\n" * 4), "4 lines of message"),
        (faults.Ended(2, "", "metarun: something is wrong"), "the reason is not told"),
    ],
)
def test_how_a_full_disk_is_told(ended: faults.Ended, told: str | None) -> None:
    found = list(faults.refused_badly(ended))
    assert found == [] if told is None else found[0].startswith(told)


def test_a_crash_comes_before_the_call_with_its_number(tmp_path: Path) -> None:
    """Of what changes files below a folder, and nothing else."""
    code = f"""
import os
from pathlib import Path
from scripts.fuzz.faults import counting
place = Path({str(tmp_path)!r})
counting(place, 4, lambda seen: print(seen, flush=True))()
open(os.devnull, "w")
open(place / "a", "w").close()
open(place / "a").close()
os.rename(place / "a", place / "b")
(place / "c").mkdir()
(place / "b").unlink()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (137, "1\n2\n3\n"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
