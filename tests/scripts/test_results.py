"""The script of the results: which runs it makes, what it stores, and which rows it marks as of older code."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun.report.published import find

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from scripts.results import __main__ as command  # noqa: E402
from scripts.results import picture, rows, short_runs, store, tables  # noqa: E402
from scripts.results.changed import Checkout, meaning  # noqa: E402

FILES = {
    "conf/config.yaml": "seed: 0\n",
    "conf/recipe/meta.yaml": "stages: [metarun.stages.train]\n",
    "conf/algo/a.yaml": "# A\nalgo: {_target_: metarun.algos.a.A}\n",
    "conf/algo/b.yaml": "# B\nalgo: {_target_: metarun.algos.b.B}\n",
    "conf/experiment/base.yaml": "lr: 1\n",
    "conf/experiment/one.yaml": "defaults:\n  - /experiment/base\n  - /data@test.data.x: x\n  - override /algo: a\n",
    "conf/data/x.yaml": "_target_: metarun.data.x.X\n",
    "conf/data/y.yaml": "_target_: metarun.data.y.Y\n",
    "metarun/__init__.py": "",
    "metarun/stages.py": '"""Stages."""\nfrom metarun.engine import fit\nfrom metarun import report\n',
    "metarun/report.py": "shown = 1\n",
    "metarun/engine/__init__.py": "",
    "metarun/engine/fit.py": "from ..ops import loss\n\nsteps = 1\n",
    "metarun/ops.py": "def loss(x):\n    return x\n",
    "metarun/data/x.py": "X = 1\n",
    "metarun/data/y.py": "Y = 1\n",
    "metarun/runs/building.py": "from metarun.runs import logger\n\nbuilt = 1\n",
    "metarun/runs/logger.py": "said = 1\n",
    "metarun/algos/__init__.py": "",
    "metarun/algos/a.py": "def A():\n    from metarun.algos.shared import x\n    return x\n",
    "metarun/algos/b.py": "B = 1\n",
    "metarun/algos/shared.py": "x = 1\n",
    "README.md": "text\n",
}
CHOICES = {"algo": "a", "recipe": "meta", "experiment": "one", "target": None}


def git(root: Path, *words: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *names, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root: Path, files: dict[str, str]) -> str:
    """Writes and commits files; returns the commit."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "c", "--allow-empty")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def clone(tmp_path: Path) -> tuple[Path, str]:
    """A small project in git, and its first commit."""
    git(tmp_path, "init", "-q", ".")
    return tmp_path, commit(tmp_path, FILES)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("conf/config.yaml", "seed: 1\n"),
        ("conf/algo/a.yaml", "algo: {_target_: metarun.algos.a.A, steps: 2}\n"),
        ("conf/experiment/base.yaml", "lr: 2\n"),
        ("metarun/algos/a.py", FILES["metarun/algos/a.py"].replace("return x", "return -x")),
        ("metarun/algos/shared.py", "x = 2\n"),
        ("metarun/engine/fit.py", FILES["metarun/engine/fit.py"].replace("1", "2")),
        ("metarun/ops.py", "def loss(x):\n    return 2 * x\n"),
        ("conf/data/x.yaml", "_target_: metarun.data.x.X\nsize: 2\n"),  # which the experiment brings to the test
        ("metarun/data/x.py", "X = 2\n"),
        ("metarun/runs/building.py", "from metarun.runs import logger\n\nbuilt = 2\n"),  # which no config names
    ],
)
def test_a_change_of_what_the_choices_lead_to_is_seen(clone: tuple[Path, str], path: str, text: str) -> None:
    root, first = clone
    assert Checkout(root).since(first, CHOICES) == []
    commit(root, {path: text})
    assert Checkout(root).since(first, CHOICES) == [path]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("README.md", "other\n"),
        ("conf/algo/b.yaml", "algo: {}\n"),
        ("metarun/algos/b.py", "B = 2\n"),
        ("metarun/report.py", "shown = 2\n"),
        ("metarun/runs/logger.py", "said = 2\n"),
        ("metarun/data/y.py", "Y = 2\n"),
        ("conf/algo/a.yaml", "# Another comment\n" + FILES["conf/algo/a.yaml"]),
        ("metarun/ops.py", 'def loss(x):\n    """Says what."""\n    return x  # so it is\n'),
    ],
)
def test_a_change_of_something_else_is_not(clone: tuple[Path, str], path: str, text: str) -> None:
    root, first = clone
    commit(root, {path: text})
    assert Checkout(root).since(first, CHOICES) == []


def test_a_moved_module_is_the_same_while_it_says_the_same(clone: tuple[Path, str]) -> None:
    root, first = clone
    body = "\n".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(9))
    second = commit(root, {"metarun/algos/shared.py": f"x = 1\n{body}"})
    git(root, "mv", "metarun/algos/shared.py", "metarun/algos/common.py")
    commit(root, {"metarun/algos/a.py": FILES["metarun/algos/a.py"].replace("shared", "common")})
    assert Checkout(root).since(second, CHOICES) == ["metarun/algos/a.py"]  # its import alone
    assert Checkout(root).since(first, CHOICES) == ["metarun/algos/a.py", "metarun/algos/common.py"]


def test_a_commit_that_is_not_there_counts_as_changed(clone: tuple[Path, str]) -> None:
    root, _ = clone
    (said,) = Checkout(root).since("0" * 40, CHOICES)
    assert "does not have" in said


def test_a_dirty_tree_is_refused(clone: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    root, _ = clone
    assert Checkout(root).dirty() == []
    (root / "metarun" / "new.py").write_text("")
    (root / "README.md").write_text("changed\n")
    assert Checkout(root).dirty() == ["README.md", "metarun/new.py"]
    monkeypatch.setattr(command, "Checkout", lambda: Checkout(root))
    monkeypatch.setattr(command, "make", pytest.fail)
    assert command.main(["--only", "main/glyphs_protonet"]) == 2
    assert "uncommitted changes (README.md, metarun/new.py)" in capsys.readouterr().err


def test_code_is_named_alike_while_only_texts_change(clone: tuple[Path, str]) -> None:
    root, _ = clone
    before = Checkout(root).code()
    commit(root, {"README.md": "other\n"})
    assert Checkout(root).code() == before
    commit(root, {"metarun/ops.py": "def loss(x):\n    return 3\n"})
    assert Checkout(root).code() != before


def test_a_docstring_is_no_meaning_but_its_function_is() -> None:
    assert meaning(".py", '"""A."""\nx = 1\n') == meaning(".py", "x = 1  # one\n")
    assert meaning(".py", "x = 1\n") != meaning(".py", "x = 2\n")
    assert meaning(".yaml", "a: 1  # one\n") == meaning(".yaml", "a: 1\n")


def result(words: str, **more: Any) -> dict[str, Any]:
    base = {"command": f"metarun {words}", "git_commit": "a" * 40, "choices": CHOICES, "peak_memory": {"host": 1}}
    return {**base, "hardware": {"precision": "float32"}, **more}


def test_what_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    stages = {"train": {"folder": "/home/me/outputs/stages/train-1", "reused": True, "git_commit": "b" * 40}}
    made = result(
        "algo=a name=x outputs=/home/me seed=3", stages=stages, made_by="1", **{"target/curve": [{"acc": 0.5}]}
    )
    made["overrides"] = ["algo=a", "name=x", "outputs=/home/me", "seed=3"]
    (folder / "result.json").write_text(json.dumps(made))
    np.savez(folder / "test_scores.npz", values=np.array([[0.25, 0.5]]))
    kept = store.keep(folder, tmp_path / "data" / "t" / "r.json")
    assert kept == store.load(tmp_path / "data" / "t" / "r.json")
    assert kept["command"] == "metarun algo=a seed=3"
    assert kept["overrides"] == ["algo=a", "seed=3"]
    assert kept["target/values"] == [[0.25, 0.5]]
    assert kept["stages"]["train"]["folder"] == "train-1"
    assert not {"peak_memory", "made_by"} & kept.keys()
    assert "/home" not in (tmp_path / "data" / "t" / "r.json").read_text()


def test_a_data_set_of_a_list_is_a_choice_whose_code_is_looked_at(clone: tuple[Path, str], tmp_path: Path) -> None:
    """Hydra's choices, as a result keeps them, have no word of `test.data=[NAME:CHOICE]`."""
    root, first = clone
    made = result("'test.data=[mine:y,x]'", overrides=["test.data=[mine:y,x]"], **{"test/mse": None})
    (tmp_path / "r.json").write_text(json.dumps(made))
    kept = store.load(tmp_path / "r.json")
    assert kept is not None
    assert kept["choices"] == {**CHOICES, "data@test.data.mine": "y", "data@test.data.x": "x"}
    assert kept["test/mse"] == math.inf
    commit(root, {"metarun/data/y.py": "Y = 2\n"})
    assert Checkout(root).since(first, CHOICES) == []
    assert Checkout(root).since(first, kept["choices"]) == ["metarun/data/y.py"]


@pytest.mark.parametrize("stored", [{}, {"overrides": ["seed=1", "train.steps=4", "algo=a", "name=n"]}])
def test_a_result_is_of_a_command_whatever_the_order_of_its_words(stored: dict[str, Any]) -> None:
    made = result("algo=a train.steps=4 seed=1 outputs=x", **stored)
    assert store.is_of(made, ["train.steps=4", "algo=a"])
    assert not store.is_of(made, ["train.steps=5", "algo=a"])
    assert not store.is_of(made, ["algo=a"])


def test_marks_name_commits_of_stages_and_of_uncommitted_trees(clone: tuple[Path, str]) -> None:
    root, first = clone
    run = rows.Run(rows.Row("t", "r", ("algo=a",)), None)
    mark = tables.marks(Checkout(root))
    assert mark(tables.Made(run, result("algo=a", git_commit=first))) == f"`{first[:7]}`"
    assert mark(tables.Made(run, result("algo=a", git_commit=f"{first}+"))) == f"`{first[:7]}`{tables.UNCOMMITTED}"
    assert mark(tables.Made(run, result("algo=b", git_commit=first))) == f"`{first[:7]}`{tables.OTHER_COMMAND}"
    stage = {"train": {"folder": "s", "git_commit": "0" * 40}}
    changed = tables.Made(run, result("algo=a", git_commit=first, stages=stage))
    assert mark(changed) == f"`{first[:7]}`{tables.CHANGED}"
    assert tables.unmarked(mark(changed)) == tables.marks(None)(changed)


def test_published_values_are_found_by_choices_and_tasks_or_said_to_be_missing() -> None:
    omniglot = {"data": "omniglot", "backbone": "conv4"}
    assert str(find({"algo": "snail", **omniglot}, {"ways": 5, "shots": 1})).startswith(
        "99.07 ± 0.16 % (Mishra et al. 2018, table 1"
    )
    assert find({"algo": "snail", **omniglot}, {"ways": 5, "shots": 5}) != find(
        {"algo": "snail", **omniglot}, {"ways": 20, "shots": 5}
    )
    assert find({"algo": "snail", **omniglot}, {"ways": 7, "shots": 1}) is None
    assert find({"algo": "snail", "data": "omniglot", "backbone": "resnet12"}, {"ways": 5, "shots": 1}) is None
    missing = find({"algo": "leo", **omniglot}, {"ways": 5, "shots": 1})
    assert missing is not None
    assert (missing.value, str(missing)) == (None, f"none: {missing.source}")


def test_of_every_row_of_test_tasks_it_was_looked_up_what_is_published() -> None:
    for table in rows.load().values():
        if table.kind in ("tasks", "methods", "domains"):
            assert "none collected" not in tables.KINDS[table.kind](table, tables.marks(None))


def test_rows_have_a_run_for_each_seed_and_patterns_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "rows.yaml"
    file.write_text(
        "one:\n  kind: tasks\n  rows:\n    a: metarun\n    b: {command: metarun x.root=$HERE/y, seeds: [0, 1]}\n"
        "two:\n  kind: adaptation\n  control: a\n  seeds: [4]\n  rows:\n    a: metarun algo=b\n"
    )
    found = rows.load(file)
    assert [run.id for run in rows.selected(found, [])] == ["one/a", "one/b.seed0", "one/b.seed1", "two/a.seed4"]
    assert [run.id for run in rows.selected(found, ["one/b", "two"])] == ["one/b.seed0", "one/b.seed1", "two/a.seed4"]
    monkeypatch.setenv("HERE", "/there")
    run = rows.selected(found, ["one/b.seed1"])[0]
    assert run.command == "metarun x.root=$HERE/y seed=1"
    assert run.arguments == ["x.root=/there/y", "seed=1"]
    file.write_text("one:\n  kind: tasks\n  rows:\n    a: python x.py\n")
    with pytest.raises(SystemExit, match="begins with python, not with metarun"):
        rows.load(file)


def adapted(data: Path, name: str, values: list[float]) -> None:
    for seed, value in enumerate(values):
        made = result(f"algo={name}", **{"target/acc": value, "target/confusion": [[3, 0], [1, 0]]})
        (data / "t").mkdir(parents=True, exist_ok=True)
        (data / "t" / f"{name}.seed{seed}.json").write_text(json.dumps(made))


def test_differences_from_the_control_are_paired_by_seed(tmp_path: Path) -> None:
    """Two methods with the same mean: one is better than the control on every seed, of the other nothing is known."""
    adapted(tmp_path, "c", [0.2, 0.4, 0.6])
    adapted(tmp_path, "m", [0.31, 0.5, 0.69])
    adapted(tmp_path, "n", [0.69, 0.5, 0.31])
    entries = {name: f"metarun algo={name}" for name in "cmn"}
    listed = [rows.row("t", name, entry, (0, 1, 2)) for name, entry in entries.items()]
    table = rows.Table("t", "adaptation", listed, {"control": "c"})
    lines = tables.adaptation(table, tables.marks(None), tmp_path).splitlines()[2:]
    cells = {line.split(" | ")[4].strip("`"): line.split(" | ") for line in lines[1:]}
    assert "**75.0%**" in lines[0]  # the commonest class
    assert cells["metarun algo=c"][3] == ""
    assert cells["metarun algo=m"][1].startswith("**50.0%** ±")
    assert cells["metarun algo=m"][3] == "+10.0 ± 2.5 points (3 pairs)"
    assert cells["metarun algo=n"][3] == "+10.0 ± 96.9 points (3 pairs)"


def test_seeds_are_averaged_before_the_interval_over_draws(tmp_path: Path) -> None:
    """Two source seeds far apart whose mean is the same in every draw: too few draws for an interval that is not 0."""
    for seed, values in enumerate(([0.5, 0.7], [0.9, 0.7])):
        point = {"train_images": 9, "acc": float(np.mean(values)), "acc_ci95": 1.0, "balanced_acc": 0.5, "auroc": 0.5}
        made = result("algo=a", **{"target/curve": [point], "target/values": [values], "target/chance": 0.6,
                                   "target/classes": ["a", "b"], "train/steps": 10 + seed, "target/test_images": 5,
                                   "target/data": {"images": {"train": 9, "test": 5}}})  # fmt: skip
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / f"scratch.seed{seed}.json").write_text(json.dumps(made))
    table = rows.Table(
        "t", "approaches", [rows.row("t", "scratch", {"command": "metarun algo=a", "label": "L"}, (0, 1))], {}
    )
    text = tables.approaches(table, tables.marks(None), tmp_path)
    assert "70.0% (too few for an interval)" in text
    assert "| the commonest class |  | 60.0% | 50.0% | 50.0% |" in text
    made.pop("target/values")
    del made["target/curve"][0]["auroc"]  # as of three classes
    (tmp_path / "t" / "scratch.seed1.json").write_text(json.dumps(made))
    assert "AUROC" not in tables.approaches(table, tables.marks(None), tmp_path)
    assert "train: 10, 11 steps, 2 seeds" in text


def approach(data: Path, name: str, curve: dict[int, float]) -> rows.Row:
    """A row whose one run has these accuracies, by number of training images, in each of two draws but for 0.1."""
    points = [
        {"train_images": size, "acc": acc, "acc_ci95": 0.1, "balanced_acc": acc, "balanced_acc_ci95": 0.1}
        for size, acc in curve.items()
    ]
    made = result(f"algo={name}", **{"target/curve": points, "target/values": [[acc, acc + 0.1] for acc in curve.values()],
                                     "target/chance": 0.5, "target/classes": ["a", "b", "c"], "target/interval": "",
                                     "target/test_images": 5, "target/data": {"images": {"train": 9, "test": 5}}})  # fmt: skip
    (data / "t").mkdir(exist_ok=True)
    (data / "t" / f"{name}.json").write_text(json.dumps(made))
    return rows.row("t", name, {"command": f"metarun algo={name}", "label": name}, ())


def test_a_number_stands_below_its_own_number_of_images(tmp_path: Path) -> None:
    """Of rows that were made before and after the sizes were changed."""
    listed = [approach(tmp_path, "scratch", {10: 0.3, 40: 0.5}), approach(tmp_path, "a", {10: 0.4, 20: 0.6})]
    lines = tables.approaches(rows.Table("t", "approaches", listed, {}), tables.marks(None), tmp_path).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells[0][2:5] == ["10 images", "20 images", "40 images"]
    assert cells[3][2:5] == ["30.0% ± 10.0%", "", "**50.0% ± 10.0%**"]
    assert cells[4][2:7] == ["**40.0% ± 10.0%**", "**60.0% ± 10.0%**", "", "", ""]  # no difference with 40 either
    mixed = [made for row in listed for made in tables.stored(row, tmp_path)]
    assert [point["train_images"] for point in picture.curve_of(mixed)] == [10]


def test_a_marker_may_name_some_rows(tmp_path: Path) -> None:
    listed = [approach(tmp_path, name, {10: acc}) for name, acc in (("scratch", 0.3), ("a", 0.4), ("b", 0.5))]
    table = rows.Table("t", "approaches", listed, {})
    start, end = tables.markers("t a")
    text = tables.rewritten(f"{start}\n{end}", {"t": table}, tables.marks(None), tmp_path)
    assert [line.split(" | ")[0] for line in text.splitlines()[3:-1]] == ["| the commonest class", "| a"]
    assert "+10.0" in text  # above scratch, which is not shown, and not the best
    assert "**" not in text
    with pytest.raises(SystemExit, match="t/nothing, which"):
        tables.rewritten(text.replace(" a -->", " nothing -->"), {"t": table}, tables.marks(None), tmp_path)


def test_a_curve_of_texts_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(picture, "learning_curve", lambda curves, **more: asked.update(more) or b"")
    listed = [approach(tmp_path, "a", {10: 0.4})]
    for options, items in (({}, "images"), ({"items": "texts"}, "texts")):
        picture.draw_curves(rows.Table("t", "approaches", listed, options), tmp_path)
        assert asked["items"] == items


def test_a_row_s_curve_is_the_mean_over_its_seeds() -> None:
    """With the interval over the draws, the seeds averaged first, and widened for test images that draws share."""
    run = rows.row("t", "r", "metarun", ()).runs[0]
    point = {"train_images": 9, "acc": 0.4, "acc_ci95": 0.3, "repeats": 2}
    told = {"target/curve": [point], "target/test_images": 2, "target/data": {"images": {"all": 10}}}
    of_seeds = [
        tables.Made(run, {**told, "target/interval": "95%, Student's t", "target/values": [values]})
        for values in ([0.3, 0.5], [0.7, 0.7])
    ]
    (found,) = picture.curve_of(of_seeds)
    assert (found["train_images"], found["acc"]) == (9, 0.4)
    # Student's t of two draws, 0.5 and 0.6, that test 2 of 10 images each
    assert found["acc_ci95"] == pytest.approx(12.706 * 0.1 / math.sqrt(2) * math.sqrt(1 / 2 + 2 / 8), rel=1e-3)
    (alone,) = picture.curve_of(of_seeds[:1])
    assert alone == {**point, "acc_ci95": pytest.approx(0.3 * math.sqrt(1 + 2 * 2 / 8))}  # as if they shared none
    newer = tables.Made(run, {**of_seeds[0].result, "target/interval": "95%, Student's t, corrected for shared ones"})
    assert picture.curve_of([newer]) == [point]


def test_each_data_set_has_a_column_and_other_ways_are_said(tmp_path: Path) -> None:
    """A method that was not tested on a set leaves its cell empty."""
    tested = {"a": {"cifar_fs": 0.5, "digits": 0.75}, "b": {"cifar_fs": 0.25}}
    for name, scores in tested.items():
        sets = {each: {"task": {"ways": 2 if each == "digits" else 5, "shots": 1, "queries": 15}} for each in scores}
        protocol = {"sets": sets, "test": sets["cifar_fs"]["task"], "transductive": False}
        numbers = {f"test/{each}/{measure}": value for each, value in scores.items() for measure in ("acc", "acc_ci95")}
        made = result(f"algo={name}", protocol=protocol, choices={"algo": "protonet", "data": "cifar_fs"}, **numbers)
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / f"{name}.json").write_text(json.dumps(made))
    listed = [rows.row("t", name, {"command": f"metarun algo={name}", "label": name}, ()) for name in tested]
    lines = tables.domains(rows.Table("t", "domains", listed, {}), tables.marks(None), tmp_path).splitlines()
    cells = [line.strip("| ").split(" | ")[:4] for line in lines if not line.startswith("| ---")]
    task = "5-way 1-shot, 15 queries a class"
    assert cells[0] == ["Method", "Tasks", "cifar_fs", "digits"]
    assert cells[1] == ["a", task, "**50.00%** ± 50.00%", "**75.00%** ± 75.00%, 2-way"]
    assert cells[2] == ["b", task, "**25.00%** ± 25.00%", ""]
    assert tables.domains(rows.Table("t", "domains", [], {}), tables.marks(None), tmp_path) == tables.NOTHING_YET


def test_a_run_that_fails_is_named_and_stores_nothing(tmp_path: Path) -> None:
    run = rows.Run(rows.Row("t", "r", ("algo=nothing",)), None)
    with pytest.raises(SystemExit, match="t/r ended with exit status"):
        command.make(run, tmp_path / "out", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_path_of_this_machine_is_stored_as_the_row_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "/home/me")
    run = rows.row("t", "r", "metarun algo=a x.root=$HERE/y", ()).runs[0]
    (tmp_path / "result.json").write_text(json.dumps(result("algo=a x.root=/home/me/y", data={"root": "/home/me/y"})))
    kept = store.keep(tmp_path, run.stored(tmp_path), run.places)
    assert kept["data"] == {"root": "$HERE/y"}
    monkeypatch.setenv("HERE", "/elsewhere")
    assert store.is_of(kept, run.words)
    assert "/home" not in run.stored(tmp_path).read_text()


def test_a_run_is_made_once_and_stored_as_its_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = "metarun algo=maml data=sinusoid backbone=mlp train.steps=2 train.validate_episodes=2 test.episodes=2 test.baseline_episodes=0"
    run = rows.row("t", "r", words, (3,)).runs[0]
    first = command.make(run, tmp_path / "out", tmp_path / "data")
    assert store.is_of(first, run.arguments)
    assert first["command"].split() == run.command.split()
    assert str(tmp_path) not in run.stored(tmp_path / "data").read_text()
    capfd.readouterr()
    assert command.make(run, tmp_path / "out", tmp_path / "data") == first
    assert "finished before" in capfd.readouterr().out


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "nothing/at_all"]) == 2
    assert "no row matches nothing/at_all" in capsys.readouterr().err
    assert command.main(["--list", "--only", "main", "mian"]) == 2
    assert "no row matches mian;" in capsys.readouterr().err


SHORT = """import json, pathlib, sys

def main():
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    folder = pathlib.Path(words["outputs"], words["name"], "r")
    folder.mkdir(parents=True)
    steps = int(words["train.steps"])
    (folder / "result.json").write_text(json.dumps({"test/acc": 0.5, "test/acc_ci95": WIDTH, "seconds": WIDTH, "train/steps": steps}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": LOSS}) + "\\n")
    print("done")
"""


def door(loss: str, width: str = "0.1") -> dict[str, str]:
    """A small version of metarun, whose runs have this loss."""
    return {"metarun/cli.py": SHORT.replace("LOSS", loss).replace("WIDTH", width)}


@pytest.mark.parametrize(
    ("now", "said", "marked"),
    [
        ("0.25", "the same to the last bit", "short run the same at"),
        ("0.2500001", "the same but for rounding", "short run the same but for rounding at"),
        ("0.26", "loss of step 1 was 0.25 and is 0.26", "short run differs at"),
        ("1 / 0", "not compared: now ZeroDivisionError: division by zero", ""),
    ],
)
def test_a_short_run_tells_whether_changed_code_moves_numbers(
    clone: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory, now: str, said: str, marked: str
) -> None:
    root, _ = clone
    first = commit(root, door("0.25"))
    changed = {"metarun/ops.py": "def loss(x):\n    return 2 * x\n"}
    head = commit(root, door(now, width="0.2") | changed)  # what only few tasks or an hour decide is not compared
    folder = tmp_path_factory.mktemp("short")
    run = rows.Run(rows.Row("t", "r", ("algo=a",)), None)
    run.stored(folder).parent.mkdir()
    made = result("algo=a", git_commit=first, **{"train/steps": 5000, "test/acc": 0.9, "test/episodes": 1000})
    run.stored(folder).write_text(json.dumps(made))
    kept = short_runs.ShortRuns(folder / short_runs.FILE)
    verdict = kept.compare(run, first, head, folder / "work", root)
    assert verdict.text == said
    assert verdict.numbers == (3 if marked else 0)  # accuracy, steps, loss
    again = short_runs.ShortRuns(folder / short_runs.FILE)
    mark = tables.marks(Checkout(root), again)(tables.Made(run, made))
    expected = f", {marked} `{head[:7]}`" if marked else ""
    assert again.mark(run, {first}) == expected
    assert again.mark(run, {first, "b" * 40}) == ""  # a stage of another commit was not compared
    uncommitted = tables.Made(run, made | {"git_commit": f"{first}+"})  # what made it is in no commit
    assert tables.marks(Checkout(root), again)(uncommitted) == f"`{first[:7]}`{tables.UNCOMMITTED}{tables.CHANGED}"
    assert mark == f"`{first[:7]}`{tables.CHANGED}{expected}"
    assert tables.unmarked(mark) == tables.marks(None)(tables.Made(run, made))


def test_a_short_run_has_few_steps_tasks_and_draws_of_what_the_run_has() -> None:
    curve = [{"train_images": 50}, {"train_images": 20}]
    trained = result("algo=a", **{"train/steps": 5000, "untrained/acc": 0.3, "test/omniglot/episodes": 1000})
    assert short_runs.shortened(trained) == [
        "train.steps=4",
        "train.validate_every=2",
        "train.validate_episodes=4",
        "train.log_every=1",
        "test.episodes=8",
        "test.baseline_episodes=4",
    ]
    probe = result("algo=a", **{"pretrain/steps": 600, "target/curve": curve})
    assert short_runs.shortened(probe)[-2:] == ["target.repeats=2", "target.train_images=[20]"]
    assert short_runs.shortened(probe)[0] == "pretrain.train.steps=4"
    sequence = result("algo=a", **{"test/episodes": 10}) | {"choices": {"recipe": "continual"}}
    assert short_runs.shortened(sequence) == ["continual.orders=2"]


def test_what_was_compared_is_not_compared_again(
    clone: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = clone
    first = commit(root, door("0.25"))
    commit(root, {"metarun/ops.py": "def loss(x):\n    return 2 * x\n"})
    runs = [rows.Run(rows.Row("t", "r", ("algo=a",), (0, 1)), seed) for seed in (0, 1)]
    data, work = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("work")
    for run in runs:
        run.stored(data).parent.mkdir(exist_ok=True)
        made = result(f"algo=a seed={run.seed}", git_commit=first, **{"train/steps": 9})
        run.stored(data).write_text(json.dumps(made))
    command.compare(runs, Checkout(root), work, data)
    assert capsys.readouterr().out.count("the same to the last bit") == 1  # of one seed
    command.compare(runs, Checkout(root), work, data)
    assert capsys.readouterr().out == ""
    commit(root, {"metarun/ops.py": "def loss(x):\n    return 3 * x\n"})
    command.compare(runs, Checkout(root), work, data)
    assert "t/r.seed0" in capsys.readouterr().out
    runs[0].stored(data).write_text(json.dumps(made | {"git_commit": "0" * 40}))  # as in a clone without it
    command.compare(runs[:1], Checkout(root), work, data)
    assert "0000000: not compared: " in capsys.readouterr().out
