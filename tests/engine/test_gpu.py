"""What only a CUDA device can show; `pytest -m gpu` runs these, and scripts/gpu_check.sh does on a machine that has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shell import SINUSOID, metarun, result, run_folder

pytestmark = pytest.mark.gpu

DIGITS = ["data=digits", "task.ways=2", "task.queries=2", "train.steps=4", "train.tasks_per_step=4", "train.validate_every=2",
          "train.validate_episodes=4", "test.episodes=8", "test.baseline_episodes=0", "backbone.channels=8"]  # fmt: skip


def scores(folder: Path) -> np.ndarray:
    with np.load(folder / "test_scores.npz") as stored:
        found: np.ndarray = stored["values"]
    return found


@pytest.mark.parametrize(
    "words", [SINUSOID, ["algo=maml", *DIGITS], ["algo=protonet", *DIGITS]], ids=["mlp", "maml", "protonet"]
)
def test_a_run_gives_what_it_gives_on_the_cpu(words: list[str], tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        outcome = metarun(*words, f"hardware={device}", f"outputs={tmp_path / device}")
        assert outcome.status == 0, outcome.err
    folders = [run_folder(tmp_path / device) for device in ("cuda", "cpu")]
    assert result(folders[0])["hardware"]["device"].startswith("cuda")
    assert result(folders[0])["peak_memory"]["cuda"] > 0
    kind = "test/mse" if "data=sinusoid" in words else "test/acc"
    first, second = (result(folder)[kind] for folder in folders)
    assert first == pytest.approx(second, rel=0.02, abs=0.1)


def test_a_captured_run_gives_what_the_plain_one_gives(tmp_path: Path) -> None:
    for record in ("true", "false"):
        words = ["algo=maml", *DIGITS, "hardware=cuda", f"hardware.record={record}", f"outputs={tmp_path / record}"]
        outcome = metarun(*words)
        assert outcome.status == 0, outcome.err
        assert "going on without a recording" not in outcome.err
    one, other = (scores(run_folder(tmp_path / record)) for record in ("true", "false"))
    assert np.abs(one - other).mean() < 0.1


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    words = ["algo=protonet", *DIGITS, "hardware=cuda", f"outputs={tmp_path}"]
    assert metarun(*words).status == 0
    folder = run_folder(tmp_path)
    first = scores(folder)
    (folder / "result.json").unlink()
    outcome = metarun(*words)
    assert outcome.status == 0, outcome.err
    assert "going on at step 4" in outcome.err
    assert np.array_equal(first, scores(folder))


def test_tf32_is_taken_where_it_is_asked_for_alone() -> None:
    from metarun.engine.hardware import allow_tf32

    x = torch.rand(512, 512, device="cuda")
    right = x.double() @ x.double()
    apart = {}
    for allowed in (False, True):
        allow_tf32(allowed)
        apart[allowed] = ((x @ x).double() - right).abs().max().item() / right.abs().max().item()
    allow_tf32(False)
    assert apart[False] < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        assert apart[True] > apart[False]
