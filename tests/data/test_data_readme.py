"""The page about data sets: its example is complete and runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from shell import metarun, result, run_folder

from metarun.data import file_names, label_files

PAGE = (Path(__file__).parents[2] / "metarun" / "data" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_runs_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "home"
    home.mkdir()
    for text in (*blocks("python"), *blocks("yaml")):
        first, rest = text.split("\n", 1)
        path = home / first.removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rest)
    monkeypatch.chdir(home)
    (command,) = (one for one in blocks("sh") if "--config-dir" in one)
    words = shlex.split(command)
    assert words[0] == "metarun"
    try:
        outcome = metarun(*words[1:])
        assert outcome.status == 0, outcome.err
        found = result(run_folder(home / "outputs"))
        assert found["data"]["classes"] == {"train": 8, "val": 2, "test": 2}
        assert found["test/acc"] > 0.6  # of two kinds of rings
        assert "nothing was computed" in metarun(*words[1:]).out
    finally:
        sys.modules.pop("rings", None)


def test_the_page_names_what_tables_may_call_their_columns() -> None:
    for name in re.findall(r"a column `file` \(or (.*?), \.\.\.\)", PAGE)[0].split(", "):
        assert name.strip("`") in label_files.FILE_COLUMNS
    for name in re.findall(r"a column `label` \(or (.*?), \.\.\.\)", PAGE)[0].split(", "):
        assert name.strip("`") in label_files.LABEL_COLUMNS
    for name in ("training", "valid", "validation", "dev", "testing"):
        assert f"`{name}`" in PAGE
        assert file_names.part_of(name)
