"""What is wrong with a YAML file of the user's own is told in one line that names it, by a run and by `metarun help`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shell import SINUSOID, done, metarun, one_line

from metarun.terminal import Terminal

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
    "number among defaults": (b"defaults: [1]", "own/experiment/mine.yaml: Unsupported type in defaults"),
    "loop": (b"defaults: [mine]", "experiment/mine: its defaults lead back to itself"),
    "dots": (b"train.steps: 5", "experiment/mine: train.steps: a file says this without a dot: steps stands further"),
    "preset": (
        b"defaults: [{override /preset: protonet_glyph}]",
        "preset=protonet_glyph: there is no such choice; did you",
    ),
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


def test_a_file_that_one_of_metaruns_own_hides_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own/algo").mkdir(parents=True)
    Path("own/algo/maml.yaml").write_text("inner_lr: 1\n")
    one_line(
        metarun("--config-dir", "own", "algo=maml"), "own/algo/maml.yaml: is not read, since metarun has algo/maml.yaml"
    )


def test_help_tells_of_a_folder_that_cannot_be_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(metarun("help", "--config-dir", 300 * "x"), "File name too long")


def test_the_value_of_an_option_is_no_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    Path("outputs").mkdir()
    shown = metarun("runs", "--config-dir", "own", "outputs", "--cfg", "job")
    assert shown.status == 0
    assert f"runs: {tmp_path / 'outputs'}" in shown.out.replace("\n- ", " ")


def test_a_key_that_is_not_there_is_told_before_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(metarun("data.root=~/photos"), "data.root: there is no such key")


def test_a_width_of_zero_hides_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert Terminal().width > 0
