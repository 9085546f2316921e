"""What is wrong with a YAML file of the user's own is told in one line that names it, by a run and by `metarun help`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shell import SINUSOID, done, metarun, one_line

HEADER = b"# @package _global_\n"
DAMAGED = {
    "another encoding": (HEADER + "# café\n".encode("latin-1"), "is no text in UTF-8"),
    "two bytes a letter": ("# @package _global_\n".encode("utf-16"), "is no text in UTF-8"),
    "a circle": (HEADER + b"name: &a [*a]\n", "has an alias (*) inside of what it stands for"),
    "depth": (HEADER + b"name: " + 600 * b"[", "has brackets inside of brackets"),
    "digits": (HEADER + b"seed: " + 5000 * b"9", "a number has more digits than any setting takes"),
    "syntax": (HEADER + b"seed: [1\n", "mine.yaml, line 3: expected"),
    "characters": (HEADER + b"name: \x07\n", "special characters are not allowed"),
}
REFUSED_IN_A_RUN = {
    "params": (b"hydra: {sweeper: {params: abc}}", "hydra.sweeper.params=abc: must be of type mapping"),
    "sweeper": (b"hydra: {sweeper: 5}", "hydra.sweeper=5: has settings of its own"),
    "stage": (b"recipe: {stages: [{_target_: 5}]}", "recipe.stages[0]._target_=5: is no dotted path of a class"),
    "null": (b"train: {null: 5}", "experiment/mine.yaml: has null for a key"),
}
NO_MAPPING = {
    "list": (b"- 1\n", "is no mapping of keys to values"),
    "text": (b"hello\n", "is no mapping of keys to values"),
    "defaults": (b"defaults: 5\n", "its defaults are no list"),
}


def written(content: bytes) -> tuple[str, ...]:
    """Writes the user's experiment below the current folder; the words that choose it."""
    Path("own/experiment").mkdir(parents=True)
    Path("own/experiment/mine.yaml").write_bytes(content)
    return ("--config-dir", "own", "experiment=mine")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, told = DAMAGED[damage]
    words = written(content)
    for command in (words, ("help", *words)):
        one_line(metarun(*command), "own/experiment/mine.yaml", told)
    assert not Path("outputs").exists()


@pytest.mark.parametrize("mistake", REFUSED_IN_A_RUN)
def test_what_no_run_can_use_is_told(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, told = REFUSED_IN_A_RUN[mistake]
    one_line(metarun(*written(HEADER + content)), told)


@pytest.mark.parametrize("mistake", NO_MAPPING)
def test_help_tells_of_a_file_without_keys(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, told = NO_MAPPING[mistake]
    one_line(metarun("help", *written(HEADER + content)), "own/experiment/mine.yaml: ", told)


def test_what_is_no_file_is_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(HEADER)
    Path("own/experiment/folder.yaml").mkdir()
    os.mkfifo("own/experiment/pipe.yaml")
    out = done("help", "experiment", "--config-dir", "own").out
    assert "mine" in out
    assert "pipe" not in out


def test_a_mark_of_utf_8_hides_no_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = written((HEADER + b"train: {steps: 7}\n").decode().encode("utf-8-sig"))
    assert "  steps: 7\n" in done(*words, *SINUSOID[:3], "--cfg", "job").out
    done("help", *words)
