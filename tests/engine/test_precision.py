"""Mixed precision on a CPU that has no instructions for it: what it costs is measured, and told before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shell import SINUSOID, metarun

from metarun.engine import precision

CPU = torch.device("cpu")


def test_a_format_is_measured_against_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.times_as_slow(torch.bfloat16) > 0
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: 6.0, torch.float32: 2.0}.__getitem__)
    assert precision.times_as_slow(torch.bfloat16) == 3


def test_the_cost_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "times_as_slow", lambda dtype: 6.4)
    assert "6 times as long on this CPU as in float32; hardware=cpu is faster here" in precision.cost(
        CPU, torch.bfloat16
    )
    assert not precision.cost(CPU, None)
    assert not precision.cost(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(precision, "times_as_slow", lambda dtype: 0.6)
    assert not precision.cost(CPU, torch.bfloat16)


def test_a_run_tells_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "times_as_slow", lambda dtype: 6.4)
    words = [*(word for word in SINUSOID if not word.startswith("hardware=")), f"outputs={tmp_path}"]
    assert metarun(*words, "hardware=amp", "hardware.device=cpu").err.count("hardware.autocast=bfloat16: ") == 1
    assert "hardware.autocast" not in metarun(*words, "hardware=cpu").err
