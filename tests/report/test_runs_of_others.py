"""Runs of others in a report: what may not be read, what a terminal would obey, and what nothing can compute with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reported import make_run
from rights import kept_out
from shell import result as stored_result

from metarun import report
from metarun.errors import UserError
from metarun.report import listing
from metarun.report.collect import collect, read, run_folders
from metarun.report.run import show, show_stored
from metarun.runs import result
from metarun.runs.folder import stored_config
from metarun.sweeps.jobs import Job
from metarun.sweeps.plan import state


@pytest.mark.parametrize(
    ("kept_from", "rights", "left", "state"),
    [
        ("r1", 0o000, ["r0", "r2"], "cannot be read"),
        ("r1", 0o444, ["r0", "r2"], "cannot be read"),
        ("r1/result.json", 0o000, ["r0", "r2"], "cannot be read"),
        ("r1/config.yaml", 0o000, ["r0", "r2"], "cannot be read"),
        ("r1/metrics.jsonl", 0o000, ["r0", "r1", "r2"], "finished"),
        (".", 0o300, [], "cannot be read"),
    ],
)
def test_what_may_not_be_read_costs_no_other_run(
    kept_from: str, rights: int, left: list[str], state: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    for name in ("r0", "r1", "r2"):
        make_run(root / name, scores=[0.5, 1], seed=int(name[1]), curve=[0.1, 0.2])
    path = root / kept_from
    before = path.stat().st_mode
    path.chmod(rights)
    try:
        with kept_out():
            found = collect([root], root / "report")
            drawn = [[*run.curve(["val/acc"])[0]] for run in found.runs]
            lines = [listing.described(folder) for folder in run_folders([root], root / "report")]
    finally:
        path.chmod(before)
    assert [run.folder.name for run in found.runs] == left
    (problem,) = found.problems
    assert problem.startswith(str(path if kept_from != "." else root))
    assert "Permission denied" in problem
    assert drawn == [[10, 20] if path.name != "metrics.jsonl" or name != "r1" else [] for name in left]
    assert lines[len(lines) // 2].state == state


def test_a_sweep_takes_no_run_that_may_not_be_read_for_a_finished_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", scores=[0.5, 1])
    job = Job((), (), folder, "")
    assert job.finished
    folder.chmod(0)
    try:
        with kept_out():
            assert not job.finished
            assert state(job) == "to run"
    finally:
        folder.chmod(0o755)


def test_the_checkpoint_of_a_run_may_lie_where_nobody_may_look(tmp_path: Path) -> None:
    make_run(tmp_path / "hidden" / "trained", scores=[0.5, 1])
    make_run(tmp_path / "test", scores=[0.5, 1], config={"checkpoint": str(tmp_path / "hidden" / "trained")})
    (tmp_path / "hidden").chmod(0)
    try:
        with kept_out():
            assert read(tmp_path / "test").origin is None
    finally:
        (tmp_path / "hidden").chmod(0o755)


def untrained(folder: Path) -> dict[str, Any]:
    """The result of a run that trained nothing."""
    return {name: value for name, value in stored_result(folder).items() if not name.startswith(("train/", "val/"))}


OBEYED = "x\x1b]0;owned\x07\x1b[31m"

SHOWN = r"x\x1b]0;owned\x07\x1b[31m"


def test_characters_that_a_terminal_obeys_are_shown_wherever_a_run_of_others_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    for name in ("a", "b"):
        make_run(
            root / name, f"algo={name}{OBEYED}", scores=[[0.5, 1], [0.4, 1]], curve=[0.1, 0.2],
            choices={"data": f"data{OBEYED}", "algo": f"{name}{OBEYED}"}, result={"git_commit": OBEYED},
        )  # fmt: skip
    make_run(root / OBEYED, scores=[0.5, 1])
    (root / OBEYED / "result.json").unlink()
    report.write([root], root / "report", f"title {OBEYED}")
    show(root / "a", untrained(root / "a") | {"test/of_mine": 0.5, "test/of_mine_ci95": 0.1})
    told = capsys.readouterr()
    texts = [told.out, told.err, *(path.read_text() for path in (root / "report").iterdir() if path.suffix != ".png")]
    assert len(texts) > 6
    for text in texts:
        assert not {"\x1b", "\x07"} & {*text}
    assert SHOWN in told.out
    assert SHOWN in (root / "report" / "index.html").read_text()


@pytest.mark.parametrize("name", ["[/red]", "[link=http://here]x[/link]", ":smile:"])
def test_what_looks_like_markup_is_shown_as_it_stands(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", scores=[0.5, 1], choices={"algo": name})
    found = untrained(folder)
    show(folder, found | {"protocol": {**found["protocol"], "norm": name}})
    told = capsys.readouterr().out
    assert f"{name} on omniglot" in " ".join(told.split())
    assert f"norm {name}" in " ".join(told.split())


def test_one_data_set_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = untrained(make_run(tmp_path / "run", scores=[0.5, 1]))
    told = {"own": {"task": {"ways": 5, "shots": 1, "queries": 15}}}
    own = {f"test/own/{name.removeprefix('test/')}": value for name, value in found.items() if name.startswith("test/")}
    show(tmp_path / "run", found | own | {"protocol": {**found["protocol"], "sets": told}})
    assert "1 data set, 15 queries a class" in " ".join(capsys.readouterr().out.split())


def test_data_sets_with_queries_of_their_own_each_have_theirs_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = untrained(make_run(tmp_path / "run", scores=[0.5, 1]))
    queries = {"one": 15, "two": 5}
    told = {name: {"task": {"ways": 5, "shots": 1, "queries": number}} for name, number in queries.items()}
    numbers = {name.removeprefix("test/"): value for name, value in found.items() if name.startswith("test/")}
    own = {f"test/{name}/{number}": value for name in told for number, value in numbers.items()}
    show(tmp_path / "run", found | own | {"protocol": {**found["protocol"], "sets": told}})
    shown = " ".join(capsys.readouterr().out.split())
    assert "queries a class" not in shown
    assert "5-way 1-shot, 15 queries" in shown
    assert "5-way 1-shot, 5 queries" in shown


def test_a_result_of_others_that_cannot_be_shown_is_damaged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", scores=[0.5, 1])
    with pytest.raises(UserError, match=r"result\.json: is damaged \(it has no train/tasks_per_second\); delete it"):
        show_stored(folder)


def test_errors_of_tasks_that_diverged_fit_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"mse": 3.21e24, "mse_ci95": 6.4e24, "mse_median": 2.5e11, "diverged": 600}
    task = {"ways": 1, "shots": 10, "queries": 10}
    found: dict[str, Any] = {"protocol": {"norm": "none", "transductive": False, "test": task, "test_inner_steps": 10}}
    found |= {"test/mse": 3.21e24, "test/episodes": 600, "test/after_inner_steps": {"10": numbers}}
    show(Path("run"), found)
    printed = capsys.readouterr().out
    assert "│ 3.21e+24 │ ± 6.4e+24 │ 2.5e+11 │" in re.sub(" +", " ", printed)
    assert max(map(len, printed.splitlines())) <= 80


def test_a_config_with_an_alias_is_damaged(tmp_path: Path) -> None:
    """Of aliases a few lines make billions of values."""
    root = tmp_path / "runs"
    for name in ("r0", "r1"):
        path = make_run(root / name, scores=[0.5, 1]) / "config.yaml"
    path.write_text(path.read_text() + "more: &a {x: 1}\nagain: *a\n")
    found = collect([root], root / "report")
    assert [run.folder.name for run in found.runs] == ["r0"]
    assert "r1/config.yaml: cannot be used (it has an alias (*)" in found.problems[0]
    with pytest.raises(
        UserError, match=r"r1/config\.yaml: is damaged \(it has an alias \(\*\), which no run stores\); test another"
    ):
        stored_config(path, "test another")


@pytest.mark.parametrize("steps", ["null", "'???'", "[1]"])
def test_an_unfinished_run_whose_steps_are_no_number_has_begun(steps: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    assert listing.described(tmp_path).state == "begun"


DEEP = '{"a":' * 600 + "1" + "}" * 600


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("result.json", f', "zz": {DEEP}}}'),
        ("result.json", f', "test/acc": {10**400}}}'),
        ("config.yaml", "seed: .inf\n"),
        ("config.yaml", f"seed: {10**400}\n"),
    ],
)
def test_values_that_nothing_can_compute_with_cost_no_other_run(
    file: str, change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    for name in ("r0", "r1"):
        make_run(root / name, "test.task.ways=5", scores=[0.5, 1], seed=int(name[1]))
    path = root / "r1" / file
    path.write_text(path.read_text().rstrip("}") + change if file == "result.json" else path.read_text() + change)
    assert report.write([root], root / "report", "") is not None
    assert "runs/r0" in json.dumps([str(run.folder) for run in collect([root], root / "report").runs])
    listing.show([listing.described(folder) for folder in run_folders([root], root / "report")])
    if file == "result.json":
        assert "r1/result.json: cannot be used (" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"result\.json: is damaged \("):
            result.stored(root / "r1")
