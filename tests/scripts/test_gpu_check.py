"""scripts/gpu_check.sh: its parts keep to their budget, fail alone, and run in miniature on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import ROOT

sys.path.insert(0, str(ROOT))

from metarun import optional
from metarun.backbones import resnet12
from metarun.errors import UserError
from scripts import gpu_check
from scripts.gpu_check import PARTS, SECONDS, Part


def test_the_plan_takes_less_than_eight_minutes() -> None:
    assert SECONDS < 480
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert {"tests", "precision", "cuda_graph", "maml_rates", "learn2learn", "encoding", "omniglot"} < {
        part.name for part in PARTS
    }
    first = PARTS[: [part.name for part in PARTS].index("omniglot") + 1]
    assert sum(part.limit for part in first) < SECONDS  # whatever hangs before it, Omniglot has its two minutes


def test_parts_keep_to_the_budget_and_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, float]] = []

    def carry_out(part: Part, dry: bool, seconds: float) -> dict[str, Any]:
        given.append((part.name, seconds))
        now[0] += seconds
        return {"ok": part.name != "b", "seconds": seconds, "reason": "it broke"}

    now = [0.0]
    monkeypatch.setattr(gpu_check, "carry_out", carry_out)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    parts = [Part(name, name, 10, lambda dry: {}) for name in "abcd"]
    target = tmp_path / "new" / "check.json"
    found = gpu_check.check(parts, True, 23, target)
    assert given == [("a", 10), ("b", 10)]
    assert found == json.loads(target.read_text())
    assert [each["ok"] for each in found["parts"].values()] == [True, False, False, False]
    assert "budget" in found["parts"]["d"]["reason"]
    assert not found["ok"]


def test_a_part_is_a_process_whose_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "print('one'); print('it is broken'); raise SystemExit(3)"]
    opened = subprocess.Popen
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda *words, **options: opened(command, **options))
    part = Part("x", "x", 10, lambda dry: {})
    found = gpu_check.carry_out(part, True, 10)
    assert (found["ok"], found["reason"]) == (False, "it is broken")
    command[2] = "print('{\"a\": 1}')"
    assert gpu_check.carry_out(part, True, 10)["a"] == 1
    command[2] = "import time; print('waits', flush=True); time.sleep(60)"
    late = gpu_check.carry_out(part, True, 0.5)
    assert "ended after" in late["reason"]


@pytest.mark.parametrize("name", ["precision", "cuda_graph", "maml_rates"])
def test_parts_run_in_miniature(name: str) -> None:
    part = next(part for part in PARTS if part.name == name)
    found = json.loads(json.dumps(part.work(True)))
    if name == "precision":
        assert found["float32"]["loss_difference"] < 1e-5
        assert found["bfloat16"]["gradient_cosine"] > 0.8
    elif name == "cuda_graph":
        assert found["gradient_difference"] == {"first": 0.0, "other": 0.0}
    else:
        (ways,) = found.values()
        assert ways.keys() == {"plain", "recorded", "captured"}
        assert ways["plain"]["ratio"] == 1


def test_sides_that_differ_fail_the_part_and_a_peer_that_is_not_there_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--json") + 1]).write_text(
            '{"lines": {"compute_maml_q15": {"error": "they differ"}}}'
        )
        return subprocess.CompletedProcess(command, 1, "", "benchmark: compute_maml_q15: they differ\n")

    monkeypatch.setattr(gpu_check.subprocess, "run", differs)
    monkeypatch.setattr(optional, "learn2learn", lambda: None)
    with pytest.raises(RuntimeError, match="they differ"):
        gpu_check.learn2learn(False)

    def lacks() -> None:
        raise UserError("learn2learn cannot be imported")

    monkeypatch.setattr(optional, "learn2learn", lacks)
    assert gpu_check.learn2learn(False) == {"error": "learn2learn cannot be imported"}


def test_both_encoders_take_an_image_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As learn2learn's network does in evaluation mode."""
    made: list[torch.nn.Module] = []

    class Narrow(resnet12.ResNet12):
        def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
            super().__init__(shape, widths=[2, 2, 2, 2], **options)
            made.append(self)

    monkeypatch.setattr(resnet12, "ResNet12", Narrow)
    monkeypatch.setattr(optional, "learn2learn", lambda: 1 / 0)
    gpu_check.encoding(True)
    x = torch.rand(2, 3, 84, 84)
    with torch.no_grad():
        torch.testing.assert_close(made[0](x, 2)[:1], made[0](x[:1], 1))


@pytest.mark.parametrize("lacking", [[], ["pytest-timeout"]])
def test_wheels_are_installed_where_anything_that_is_needed_lacks(lacking: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"""
from importlib import metadata
version = metadata.version
def found(name):
    if name in {lacking}:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = found
""")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"""#!/bin/sh
case "$*" in *"-m pip install"*) echo installed ;; *scripts.gpu_check*) echo checked ;; *) exec {sys.executable} "$@" ;; esac
""")
    python.chmod(0o755)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    told = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", "--wheels", tmp_path, "--dry-run"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path)}, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert told == [*(["installed"] if lacking else []), "checked"]
