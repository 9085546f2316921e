"""scripts/same_numbers.py: what is the same in two trees, what differs, and what fails, on a toy that stands in for metarun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shell import ROOT

sys.path.insert(0, str(ROOT))

from scripts import same_numbers
from scripts.same_numbers import Made, differences, digests, numbers

# Writes what a run of metarun leaves: `name` is the folder that it makes, and `accuracy` its one number.
TOY = """
import json, pathlib
import numpy as np

def run(*words, outputs):
    words = dict(word.partition("=")[::2] for word in words)
    if "fails" in words:
        raise ValueError("it failed")
    if "dies" in words:
        raise SystemExit
    print("a table")
    folder = pathlib.Path(outputs, words["name"], "default")
    folder.mkdir(parents=True)
    found = {"test/acc": ACCURACY, "train/seconds": id(words), "said": words.get("checkpoint", "")}
    (folder / "result.json").write_text(json.dumps(found))
    np.savez(folder / "test_scores.npz", values=np.array(WEIGHTS))
"""


def clone(folder: Path, accuracy: str = "0.5", weights: str = "[1.0]") -> Path:
    """A clone whose one commit is a toy with `accuracy` 0.5 and `weights` [1.0], and whose files may say something else."""
    package = folder / "metarun"
    package.mkdir(parents=True)
    for values in (("0.5", "[1.0]"), (accuracy, weights)):
        text = TOY.replace("ACCURACY", values[0]).replace("WEIGHTS", values[1])
        (package / "__init__.py").write_text(text)
        if not (folder / ".git").exists():
            author = ["-c", "user.name=n", "-c", "user.email=e@x"]
            for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "toy"]):
                subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


@pytest.mark.parametrize(
    ("changes", "runs", "status", "said"),
    [
        ({}, {"one": [], "two": ["checkpoint=one"]}, 0, "2 of 2 runs are the same"),
        ({"accuracy": "0.5000000001"}, {"one": []}, 1, "test/acc: 0.5 is now 0.5000000001"),
        ({"weights": "[1.0 + 2**-52]"}, {"one": []}, 1, "test_scores.npz: "),
        ({}, {"one": ["fails=1"], "two": []}, 2, "before: ValueError: it failed"),
        ({}, {"one": ["dies=1"], "two": []}, 2, "now: its process ended"),
    ],
    ids=["same", "number", "weights", "failed", "died"],
)
def test_two_trees_are_compared(
    changes: dict[str, str],
    runs: dict[str, list[str]],
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert same_numbers.compare(clone(tmp_path, **changes), "HEAD", runs) == status
    assert said in capsys.readouterr().out


def test_what_an_hour_or_a_machine_decides_is_left_out() -> None:
    found = dict(
        numbers(
            {
                "train/seconds": 3.0,
                "stages": {"pretrain": {"reused": True, "acc": 1}},
                "a": [1, {"b": None, "c": "text"}],
                "hardware": {"threads": 2},
            }
        )
    )
    assert found == {"stages.pretrain.acc": 1, "a[0]": 1}


def test_a_file_is_its_tensors_and_not_its_bytes_or_its_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one" / "made" / "a-1", tmp_path / "other" / "made" / "a-2"
    weights = {"a": torch.ones(3), "b": {"c": torch.arange(2)}}
    for folder, state in ((one, weights), (other, dict(reversed(weights.items())))):
        folder.mkdir(parents=True)
        kept = {"model": state, "state": {"step": 1, "seconds": folder.stat().st_ino}, "made_by": f"digest of {folder}"}
        torch.save(kept, folder / "best.pt")
    stage = tmp_path / "one" / "stages" / "pretrain-0123456789abcdef"
    stage.mkdir(parents=True)
    torch.save(weights, stage / "best.pt")
    assert digests(tmp_path / "one").keys() == {"best.pt", "pretrain/best.pt"}
    assert digests(tmp_path / "one")["best.pt"] == digests(tmp_path / "other")["best.pt"]
    torch.save(
        {"model": {**weights, "a": torch.tensor([1.0, 1.0, 1.0000001])}, "state": {"step": 1}}, other / "best.pt"
    )
    assert digests(tmp_path / "one")["best.pt"] != digests(tmp_path / "other")["best.pt"]


def test_a_run_brings_those_whose_weights_it_takes() -> None:
    assert list(same_numbers.chosen(["test_continual", "tim", "test"])) == [
        "maml",
        "tim",
        "test",
        "continual",
        "test_continual",
    ]
    assert same_numbers.chosen([]) == same_numbers.RUNS


def test_what_is_gone_differs_and_what_is_new_does_not() -> None:
    before, now = Made({"a": float("nan"), "b": 1}), Made({"a": float("nan"), "c": 2})
    assert differences(before, now) == ["b: gone"]
    assert differences(now, before) == ["c: gone"]


def test_an_unknown_run_or_commit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["HEAD", "proto"], "proto: there is no such run"), (["nowhere", "demo"], "nowhere")):
        with pytest.raises(SystemExit) as ended:
            same_numbers.main(words, clone(tmp_path / message[:3]))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
