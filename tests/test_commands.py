"""What is typed: paths as they are, refusals before anything is made, and stored commands that make the same config again."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import yaml
from shell import ROOT, SINUSOID, environment, make_images, metarun, metarun_in, one_line, result, run_folder

from metarun.config import validation
from metarun.config.overrides import canonical
from metarun.config.validation import check_name
from metarun.errors import UserError
from metarun.runs.folder import folder_name

TINY = ["task.ways=3", "task.queries=2", "train.steps=1", "test.episodes=2", "train.validate_episodes=2",
        "test.baseline_episodes=0", "backbone.channels=2", "data.image_size=16"]  # fmt: skip
ODD = [
    "résultats",
    "run=1",
    "out#1",
    "my results (1)",
    "it's",
    "a,b",
    "o?2",
    "josé & co",
    "100%",
    "[x]",
    "$HOME",
    "01",
    "true",
]


def config(*words: str) -> dict[str, Any]:
    """What `--cfg job` shows."""
    done = metarun(*words, "--cfg", "job")
    assert done.status == 0, done.err
    return yaml.safe_load(done.out)


def stored(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize("name", ODD)
def test_outputs_of_any_name_in_the_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for there in (False, True):
        if there:
            (tmp_path / name).mkdir()
        assert config(f"outputs={name}")["outputs"] == str(tmp_path / name)


@pytest.mark.parametrize("name", ["résultats, (1)", "run=1 #'o?2"])
def test_outputs_of_any_name_on_the_line_and_in_a_yaml(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the folder is new or there; what is printed can be pasted into a shell and given back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump({"outputs": f"~/yaml/{name}"}, allow_unicode=True)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    done = metarun(*SINUSOID, f"outputs={name}")
    assert done.status == 0, done.err
    folder = run_folder(tmp_path / name)
    assert stored(folder)["outputs"] == str(tmp_path / name)
    (printed,) = re.findall(r"^results  (.*)$", done.out, re.M)
    shown = subprocess.run(["bash", "-c", f"printf %s {printed}"], capture_output=True, text=True, check=True).stdout
    assert Path(shown) == folder.relative_to(tmp_path)
    assert "finished before" in metarun(*SINUSOID, f"outputs={name}").out  # which is there now
    assert "finished before" in metarun(*SINUSOID, f"outputs=~/{name}").out
    tested = metarun("recipe=test", f"checkpoint={shown}", "test.episodes=3", f"outputs={name}")
    assert tested.status == 0, tested.err
    assert metarun("--config-dir", "conf", *SINUSOID, "experiment=mine").status == 0
    assert (tmp_path / "yaml" / name).is_dir()
    report = metarun("recipe=report", f"runs={name}")
    assert report.status == 0, report.err
    assert (tmp_path / name / "report" / "index.html").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["~/images", "~/my images (1)", "bilder=é"])
def test_data_root_is_literal_absolute_and_serves_from_another_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    root = tmp_path / name.removeprefix("~/")
    make_images(root)
    done = metarun("data=folder", f"data.root={name}", *TINY, "outputs=out")
    assert done.status == 0, done.err
    folder = run_folder(tmp_path / "out")
    assert stored(folder)["data"]["root"] == str(root)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", folder.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = metarun("recipe=test", f"checkpoint={folder}", "test.episodes=3")
    assert again.status == 0, again.err


def test_the_environment_s_folders_are_literal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metarun.data.roots import cache_root, data_root

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("METARUN_CACHE", "~/c=1 é")
    monkeypatch.setenv("METARUN_DATA", "d,1")
    monkeypatch.chdir(tmp_path)
    assert cache_root() == tmp_path / "c=1 é"
    assert data_root() == tmp_path / "d,1"


MINE = '''
from pathlib import Path

from metarun.data.glyphs import Glyphs


class Mine(Glyphs):
    """A user's own data set, whose signature types a path."""

    def __init__(self, *, photos: Path, tags: list[str] | None = None) -> None:
        assert isinstance(photos, Path)
        self.photos, self.tags = photos, tags
        super().__init__()
'''


def test_a_users_own_data_set_has_paths_and_text_by_its_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own_data.py").write_text(MINE)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("_target_: own_data.Mine\nphotos: ???\ntags: null\n")
    words = ["--config-dir", "conf", "data=mine", "data.photos=~/a=b (1)", "data.tags=[日本語,true,01]", "outputs=o",
             "train.steps=1", "test.episodes=2", "train.validate_episodes=2", "test.baseline_episodes=0",
             "backbone.channels=2"]  # fmt: skip
    done = metarun(*words)
    assert done.status == 0, done.err
    found = stored(run_folder(tmp_path / "o"))["data"]
    assert found["photos"] == str(tmp_path / "a=b (1)")
    assert found["tags"] == ["日本語", "true", "01"]


def test_names_of_classes_are_text() -> None:
    shown = config("data=folder", "data.root=x", "data.test_classes=[日本語,true,01]")
    assert shown["data"]["test_classes"] == ["日本語", "true", "01"]


def commands(*words: str, inside: Path) -> dict[str, Any]:
    """A run's stored command and config, and what the command composes in an empty folder."""
    done = metarun_in(inside, *words)
    assert done.status == 0, done.err
    (folder,) = {path.parent for path in inside.rglob("result.json")}
    empty = inside / "empty folder"
    empty.mkdir()
    command = result(folder)["command"]
    again = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m {command} --cfg job --resolve"], cwd=empty,
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert not list(empty.iterdir())
    return {"result": result(folder), "config": stored(folder), "again": yaml.safe_load(again.stdout)}


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "my conf", "algo=mine", "outputs=o (1)"],
        ["--config-dir=my conf", "+experiment/own=mine", "outputs=o"],
        [
            "outputs=o",
            "name=it's 1e3",
            "train.optimizer.lr=1e-3",
            "+train.optimizer.amsgrad=true",
        ],
        ["outputs=~/o,1", "hydra.job.name=x", "seed=3", "test={episodes: 2, baseline_episodes: 0}"],
    ],
    ids=["config-dir", "own group", "quotes", "home"],
)
def test_stored_command_composes_the_same_config_in_an_empty_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "in side"
    monkeypatch.setenv("HOME", str(inside))
    (inside / "my conf" / "algo").mkdir(parents=True)
    (inside / "my conf" / "algo" / "mine.yaml").write_text("defaults:\n  - protonet\n")
    (inside / "my conf" / "experiment" / "own").mkdir(parents=True)
    (inside / "my conf" / "experiment" / "own" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    few = [
        "train.steps=1",
        "test.episodes=2",
        "train.validate_episodes=2",
        "test.baseline_episodes=0",
        "backbone.channels=2",
    ]
    found = commands(*words, *few, inside=inside)
    differing = {key for key in found["config"] if found["config"][key] != found["again"].get(key) and key != "name"}
    assert differing == set()
    overrides = found["result"]["overrides"]
    assert isinstance(overrides, list)
    assert shlex.split(found["result"]["command"])[-len(overrides) :] == overrides


def test_every_command_of_a_report_composes(tmp_path: Path) -> None:
    done = metarun("-m", "algo.inner_steps=1,2", *SINUSOID, f"outputs={tmp_path / 'a b'}")
    assert done.status == 0, done.err
    (page,) = tmp_path.rglob("index.html")
    import html

    printed = [shlex.split(html.unescape(line)) for line in re.findall(r"^metarun .*$", page.read_text(), re.M)]
    printed = printed or [
        shlex.split(html.unescape(text)) for text in re.findall(r">(metarun [^<]*)<", page.read_text())
    ]
    folders = {path.parent for path in tmp_path.rglob("result.json")}
    assert len(printed) >= len(folders) == 2
    configs = [config(*words[1:]) for words in printed]
    for folder in folders:
        expected = stored(folder)
        assert any(all(shown[key] == expected[key] for key in expected if key != "name") for shown in configs)


def test_folders_are_one_to_one_with_what_was_overridden() -> None:
    """Even where the readable part is the same."""
    words = ["data.root=/x/1", "data.root=/x_1", "data.root=/X_1", "data.root=/y/x/1", "data.root=x,1", "data.root=x=1", "data.root=x 1",
             "data.root=é", "data.root=e", "data.root=", "+data.root=e", "~data.root", "data.root=x__seed-1",
             "data.root=_x", "data.root=x_",
             "data.root=a.b", "data.root=A.b", "data.root=[a.b]", "data.root=~a", "data.root='a'"]  # fmt: skip
    sets = [[word] for word in words] + [["data.root=x", "seed=1"], [], ["seed=1"], ["seed=-1"], ["a=1", "b=2"], ["a=1__b-2"],
            ["a=" + "long" * 60], ["a=" + "long" * 61], ["a=x", "b=default"], ["a=12345678"]]  # fmt: skip
    names = [folder_name(each, True) for each in sets]
    assert len({name.lower() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) and len(name) <= 72 for name in names), (
        names
    )
    assert not any(re.search(r"__\d{1,5}$", name) for name in names)  # as repeats are called
    assert folder_name(["seed=1", "seed=2"], True) == folder_name(["seed=2"], True)
    assert folder_name(["algo=maml", "seed=1"], False) == folder_name(["seed=1"], False)
    assert folder_name(["algo@pretrain=maml", "seed=1"], False) != folder_name(["seed=1"], False)


def test_run_folder_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    words = [*SINUSOID, "seed=1", f"outputs={tmp_path}"]
    assert metarun(*words).status == 0
    folder = run_folder(tmp_path)
    assert len(folder.name) <= 72
    first = "backbone=mlp,seed=1,test.baseline_episodes=0,test.episodes=8,train.steps=6"
    second = "backbone-mlp__seed-1__test.baseline_episodes-0__test.episodes-8__train.steps-6"  # names could be longer
    before = folder
    for name in (second, first):
        older = folder.with_name(name)
        before.rename(older)
        assert "finished before" in metarun(*words).out
        assert [path.name for path in older.parent.iterdir()] == [older.name]
        before = older
    assert metarun(*words, "resume=false").status == 0
    assert sorted(path.name for path in older.parent.iterdir()) == sorted([older.name, f"{folder.name}__2"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["hydra.run.dir=x"], "hydra.run.dir=x: decides on no folder here; outputs= says"),
        (["hydra.run.dir=~/my x"], "hydra.run.dir=~/my x: decides on no folder here; outputs= says"),
        (["hydra={run:{dir:x}}"], "hydra.run.dir=x: "),
        (["hydra.output_subdir=.hydra"], "hydra.output_subdir=.hydra: "),
        (["hydra.sweep.dir=x", "-m", "seed=0,1"], "hydra.sweep.dir=x: "),
        (["hydra.sweep={dir:x}", "-m", "seed=0"], "hydra.sweep.dir=x: "),
        (["name=.."], "name=..: must be the name of a folder"),
        (["name=."], "name=.: must be the name of a folder"),
        (
            ["outputs=a${b}"],
            "outputs: ${b} stands for the value of a key b, and there is none; no path or text can have ${",
        ),
        (["name=/"], "name=/: must be a name, and no path"),
        (["name="], "name=: must be the name of a folder"),
        (["name=a\x1b[31mb"], r"name=a\x1b[31mb: has a control character"),
        (["-m", "seed=0,1\x07"], r"seed=0,1\x07: has a control character"),
        (["--package", "algo"], "--package: shows a part of the config; add --cfg job"),
        (
            ["--cfg", "job", "-p", "nope"],
            "--package nope: is no part of the config, or null; metarun --cfg job shows all",
        ),
        (["--experimental-rerun", "x"], "--experimental-rerun: metarun keeps no such file"),
        (["hydra.searchpath=[file:///x]", "preset=own"], "hydra.searchpath: is not looked through here; --config-dir"),
        (["hydra={searchpath:['file:///x']}"], "hydra.searchpath: is not looked through here"),
        (["--dry-run"], "--dry-run: lists the jobs of a sweep (-m)"),
        (["--no-such-option"], "--no-such-option"),
        (["--config-dir"], "--config-dir"),
    ],
    ids=str,
)
def test_refused_in_one_line(words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = metarun(*SINUSOID, *words)
    assert (done.status, done.out, len(done.said)) == (2, "", 1), done
    assert expected in done.said[0]
    assert "\x1b" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("run: {dir: x/y}", "hydra.run.dir=x/y: "),
        ("job: {chdir: true}", "hydra.job.chdir=True: "),
        ("mode: MULTIRUN\n  sweep: {subdir: x}", "hydra.sweep.subdir=x: "),
    ],
)
def test_an_experiment_decides_on_no_folder_of_hydras(
    setting: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c" / "experiment").mkdir(parents=True)
    (tmp_path / "c" / "experiment" / "e.yaml").write_text(f"# @package _global_\nhydra:\n  {setting}\n")
    monkeypatch.chdir(tmp_path)
    one_line(metarun("--config-dir", "c", "experiment=e", *SINUSOID), told)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", [r"a\..\..\b", r"a\b", "C:b", "a/b"])
def test_a_name_is_no_path_on_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_name("a-b.c")
    monkeypatch.setattr(validation, "Path", PureWindowsPath)
    with pytest.raises(UserError, match="must be a name, and no path"):
        check_name(name)


def test_options_may_stand_between_overrides(tmp_path: Path) -> None:
    done = metarun("algo=maml", "-m", "seed=0,1", *SINUSOID[1:], "--dry-run", f"outputs={tmp_path}")
    assert done.status == 0, done.err
    assert "2 jobs: 0 finished before, 2 to run" in done.out


def test_version_is_metaruns() -> None:
    from metarun import __version__

    done = metarun("--version")
    assert (done.status, done.out) == (0, f"metarun {__version__}\n")


def test_checkpoint_of_a_folder_of_runs_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        assert metarun(*SINUSOID, f"seed={seed}", "outputs=o").status == 0
    runs = sorted(path.parent for path in Path("o").glob("*/*/config.yaml"))
    for given in ("o", "o/sinusoid-maml"):
        done = metarun("recipe=test", f"checkpoint={given}")
        assert done.status == 2
        assert done.said[0].endswith(f"give one of them: {', '.join(map(str, runs))}")
    done = metarun("recipe=test", f"checkpoint={runs[0] / 'result.json'}")
    assert done.status == 2
    assert done.said[0].endswith(f"holds no weights; give the run's folder, {runs[0]}")
    for word in ("o", "runs=o"):
        assert metarun("runs", word).out.count("sinusoid-maml") >= 2


def test_users_files_stand_in_for_no_library(tmp_path: Path) -> None:
    """The working folder comes last, with `python -m`, in processes of one run, and in jobs of a sweep."""
    for name in ("statistics", "calendar", "random", "yaml", "selectors", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    for words in ([*SINUSOID, "train.tasks_per_step=2", "hardware.processes=2"], ["-m", "seed=0,1", *SINUSOID]):
        done = subprocess.run(
            [sys.executable, "-m", "metarun", *words, "outputs=o"], cwd=tmp_path,
            env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("o/*/*/result.json"))) == 3


def test_words_are_stored_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import compose

    monkeypatch.chdir(tmp_path)
    words = ["data=folder", "data.root='a b'", "outputs=o", "seed=3", "backbone.from='x=1'"]
    assert canonical(words, compose("data=folder", "data.root=x")) == [
        "data=folder", f"data.root={tmp_path}/a b", f"outputs={tmp_path}/o", "seed=3", f"backbone.from={tmp_path}/x=1",
    ]  # fmt: skip
    assert json.dumps(os.fspath(tmp_path))


def test_several_folders_of_runs_are_listed_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert metarun(*SINUSOID, f"name={name}", f"outputs={tmp_path}").status == 0
    listed = metarun("runs", str(tmp_path / "a"), str(tmp_path / "b"))
    assert listed.status == 0, listed.err
    assert listed.out.count("finished") == 2


def test_help_refuses_a_folder_of_configs_that_is_not_there(tmp_path: Path) -> None:
    for words in (["--config-dir", str(tmp_path / "nope")], [f"--config-dir={tmp_path / 'nope'}"], ["--config-dir"]):
        done = metarun("help", *words)
        assert done.status == 2
        assert "there is no such folder" in done.said[-1]


def test_a_run_is_not_called_as_the_folder_of_reports(tmp_path: Path) -> None:
    done = metarun(*SINUSOID, "name=report", f"outputs={tmp_path}")
    assert done.status == 2
    assert "name=report: is the folder that reports go to" in done.said[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("schedule=null", "schedule=null: a run has one"),
        ("~schedule", "train.schedule: has no _target_"),
        ("-m hydra.launcher=null", "hydra.launcher=null: a sweep has one"),
        ("-m hydra.sweeper=null", "Hydra sweeper is not configured"),
        ("-m hydra.sweeper._target_=os.system", "Invalid plugin 'os.system'"),
        ("+train.optimizer.betas=[0.9]", "train.optimizer: list index out of range"),
        ("+train.optimizer.foreach=true", "train.optimizer: `fused` and `foreach` cannot be `True` together"),
        ("+train.optimizer.differentiable=true", "train.optimizer: `fused` does not support `differentiable`"),
    ],
)
def test_a_part_that_is_missing_or_refuses_its_settings_is_one_line(words: str, told: str, tmp_path: Path) -> None:
    one_line(metarun(*words.split(), *SINUSOID, f"outputs={tmp_path / 'o'}"), told)
    assert not (tmp_path / "o").exists()
