"""Configs of others build only what is trusted, and no object where the signature asks for none."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from helpers import compose
from omegaconf import OmegaConf, open_dict
from shell import SINUSOID, metarun, one_line, result, run_folder

from metarun.config import check
from metarun.config.building import construct
from metarun.config.types import Given
from metarun.config.validation import asks_for_object, check_target
from metarun.encoders.trained import Trained
from metarun.errors import UserError
from metarun.inference.blueprint import Blueprint
from metarun.inference.encoding import EncoderStep
from metarun.runs.result import begun
from metarun.trust import check_classes

MARK = "from pathlib import Path\nPath('{mark}').touch()\nfrom metarun.algos.maml import MAML\nclass Evil(MAML): pass\n"


class Holder:
    """A user's own class, which asks for objects in some of its settings."""

    def __init__(self, *, options: dict[str, Any] | None = None, anything: Any = None, inner: Holder | None = None,
                 several: list[Holder] | None = None, make: Callable[..., Any] | None = None) -> None:  # fmt: skip
        self.options, self.anything, self.inner, self.several, self.make = options, anything, inner, several, make


NAME = f"{__name__}.Holder"


@pytest.mark.parametrize(
    "values",
    [
        {"options": {"_target_": "os.getcwd"}},
        {"options": {"deep": [{"er": {"_target_": "os.getcwd"}}]}},
        {"anything": {"_target_": "os.getcwd"}},
        {"inner": {"_target_": NAME, "options": {"_target_": "os.getcwd"}}},
        {"_args_": [1]},
        {"_recursive_": True},
        {"_partial_": True},
    ],
    ids=str,
)
def test_no_object_where_none_is_asked_for(values: dict[str, Any]) -> None:
    node = OmegaConf.create({"_target_": NAME, **values})
    with pytest.raises(UserError, match=r"holds a _target_|is a word of Hydra's"):
        check_target(node, "data", Given())
    built = construct(OmegaConf.create({"_target_": NAME, "options": {"_target_": "os.getcwd"}}), "data")
    assert built.options == {"_target_": "os.getcwd"}  # even unchecked it stays data


def test_objects_where_the_signature_asks_for_them() -> None:
    one = {"_target_": NAME, "anything": 3}
    node = OmegaConf.create({"_target_": NAME, "inner": one, "several": [one, one], "make": {"_partial_": True, **one}})
    check_target(node, "data", Given())
    built = construct(node, "data")
    assert built.inner.anything == 3
    assert [item.anything for item in built.several] == [3, 3]
    assert built.make(options={}).anything == 3
    assert not any(map(asks_for_object, (str, int | None, list[str], dict[str, Any], Any, Path | None)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("finished")
    assert metarun(*SINUSOID, f"outputs={outputs}").status == 0
    return run_folder(outputs)


@pytest.mark.parametrize("where", ["algo", "data", "nested"])
def test_code_named_in_anothers_run_does_not_run(
    where: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(MARK.format(mark=tmp_path / "ran"))
    shutil.copytree(finished, tmp_path / "theirs")
    stored = OmegaConf.load(tmp_path / "theirs" / "config.yaml")
    if where == "nested":
        OmegaConf.update(stored, "data.options", {"_target_": "evil.Evil"}, force_add=True)
    else:
        stored[where]._target_ = "evil.Evil"
    OmegaConf.save(stored, tmp_path / "theirs" / "config.yaml")
    done = metarun("recipe=test", "checkpoint=theirs", "outputs=o")
    assert (done.status, len(done.said)) == (2, 1), done
    assert "names evil.Evil, which is no class of metarun's" in done.said[0]
    assert "METARUN_ALLOW=evil" in done.said[0]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()


def test_pickles_that_anothers_run_names_are_not_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """learn2learn runs what a pickle in its root says."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "theirs")
    stored = OmegaConf.load(tmp_path / "theirs" / "config.yaml")
    node = {"_target_": "metarun.data.library.Library", "library": "learn2learn", "dataset": "MiniImagenet"}
    stored.data = {**node, "root": str(tmp_path / "theirs"), "image_size": 28}
    OmegaConf.save(stored, tmp_path / "theirs" / "config.yaml")
    (tmp_path / "theirs" / "mini-imagenet-cache-train.pkl").write_bytes(b"c__main__\nnothing\n.")
    done = metarun("recipe=test", "checkpoint=theirs", "outputs=o")
    one_line(done, "theirs/config.yaml: has learn2learn read", "METARUN_ALLOW=metarun.data.library.Library")
    origin, empty = Path("config.yaml"), OmegaConf.create({})
    check_classes(OmegaConf.create({"data": {**node, "root": None}}), origin, empty)
    check_classes(OmegaConf.create({"data": {**node, "root": "x", "library": "torchvision"}}), origin, empty)
    monkeypatch.setenv("METARUN_ALLOW", "metarun.data")
    check_classes(OmegaConf.create({"data": {**node, "root": "x"}}), origin, empty)


LOOKED_UP = [
    ("algo", "${oc.decode:'{_target_: evil.Evil}'}"),
    ("algo", "${oc.create:{_target_: evil.Evil}}"),
    ("algo.inner_lr", "${oc.env:SECRET}"),
    ("name", "${oc.env:SECRET}"),
    ("train.steps", "${nowhere:}"),
]


@pytest.mark.parametrize(("key", "value"), LOOKED_UP)
def test_nothing_in_anothers_run_is_looked_up_here(
    key: str, value: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver could make a node of any class, behind the back of what looks at classes, or show what is secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "opensesame")
    (tmp_path / "evil.py").write_text(MARK.format(mark=tmp_path / "ran"))
    shutil.copytree(finished, tmp_path / "runs" / "theirs")
    path = tmp_path / "runs" / "theirs" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    *nodes, last = key.split(".")
    functools.reduce(dict.__getitem__, nodes, stored)[last] = value
    path.write_text(yaml.safe_dump(stored))
    done = metarun("recipe=test", "checkpoint=runs/theirs", "outputs=o")
    one_line(done, "runs/theirs/config.yaml: is damaged (${", "is no value that a run stores")
    (path.parent / "result.json").unlink()
    listed = metarun("runs", "runs")
    assert "opensesame" not in done.err + listed.out + listed.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()
    with pytest.raises(UserError, match=r"classifier.pt: has \$\{oc"):
        check_classes(OmegaConf.create({"algo": LOOKED_UP[0][1]}), Path("classifier.pt"), OmegaConf.create({}))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("newer", 1, "runs/config.yaml: cannot be used (newer: "),
        ("recipe", {"stages": {"a": 1}}, "runs/config.yaml: cannot be used ("),
        (
            "backbone",
            {"_target_": "metarun.backbones.mlp.MLP", "newer": 1},
            "checkpoint=runs: its backbone.newer: MLP has no",
        ),
    ],
)
def test_a_config_of_another_version_is_named(
    key: str, value: object, told: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs")
    stored = yaml.safe_load(Path("runs/config.yaml").read_text())
    Path("runs/config.yaml").write_text(yaml.safe_dump({**stored, key: value}))
    one_line(metarun("recipe=test", "checkpoint=runs", "outputs=o"), told)
    assert not Path("o").exists()


def test_what_the_user_allows_or_names_is_built(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_allowed.py").write_text("from metarun.algos.maml import MAML\nclass Mine(MAML): pass\n")
    shutil.copytree(finished, tmp_path / "run")
    stored = OmegaConf.load(tmp_path / "run" / "config.yaml")
    stored.algo._target_ = "mine_allowed.Mine"
    OmegaConf.save(stored, tmp_path / "run" / "config.yaml")
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / "conf" / "algo" / "mine.yaml").write_text("_target_: mine_allowed.Mine\n")
    assert metarun("--config-dir", "conf", "recipe=test", "checkpoint=run", "outputs=one").status == 0
    monkeypatch.setenv("METARUN_ALLOW", "other, mine_allowed")
    done = metarun("recipe=test", "checkpoint=run", "outputs=two")
    assert done.status == 0, done.err
    assert result(run_folder(tmp_path / "two"))["test/mse"] == result(run_folder(tmp_path / "one"))["test/mse"]


# What torch's modules import is reached through them: files are emptied, commands run.
THROUGH_TORCH = [
    "torch.optim.adam.torch.hub.zipfile.ZipFile",
    "torch.optim.adam.torch._strobelight.cli_function_profiler.subprocess.Popen",
    "torch.optim.adam.Tensor",
    "torch.optim.swa_utils.AveragedModel",
    "torch.optim.Adam.step",
    "torch.optim.adam",
    "torch.optim.nothing.Nothing",
    "torch.optim",
    "torch.optimum.Adam",
]


@pytest.mark.parametrize("target", THROUGH_TORCH)
def test_no_more_of_torch_than_what_optimises(
    target: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("victim.txt").write_text("precious")
    optimizer = {"_target_": target, "_partial_": True, "file": "victim.txt", "mode": "w"}
    tuned = {"_target_": "metarun.target.finetuning.FineTuning", "optimizer": optimizer}
    spec = {"kind": "classification", "input_shape": [1, 8, 8], "outputs": 5}
    told = f"names {target}, which is no class of metarun's"
    with pytest.raises(UserError, match=told):
        Blueprint.stored({"algo": {}, "backbone": {}, "transfer": tuned, "spec": spec}, Path("classifier.pt"))
    with pytest.raises(UserError, match=told):
        EncoderStep.stored({"settings": tuned}, Path("result.json"), None)
    with pytest.raises(UserError, match=told):
        EncoderStep.stored({"blueprint": tuned}, Path("classifier.pt"), {})
    with pytest.raises(UserError, match=told):
        Trained(stored={"input_shape": [1, 8, 8], "backbone": tuned})
    if target == THROUGH_TORCH[0]:
        shutil.copytree(finished, "theirs")
        stored = OmegaConf.load("theirs/config.yaml")
        stored.train.optimizer = {"_target_": target, "file": "victim.txt", "mode": "w"}
        OmegaConf.save(stored, "theirs/config.yaml")
        one_line(metarun("recipe=test", "checkpoint=theirs", "outputs=o"), f"theirs/config.yaml: {told}")
    assert Path("victim.txt").read_text() == "precious"


@pytest.mark.parametrize("part", ["algo", "backbone", "transfer"])
def test_no_part_of_a_blueprint_is_a_text(part: str) -> None:
    """OmegaConf reads a text as YAML, so that it could name any class where nothing looks."""
    parts = {"algo": {}, "backbone": {}, "transfer": {}, part: "_target_: evil.Evil"}
    spec = {"kind": "classification", "input_shape": [1, 8, 8], "outputs": 5}
    with pytest.raises(TypeError, match=f"its {part} is no mapping of keys to values"):
        Blueprint.stored({**parts, "spec": spec}, Path("classifier.pt"))


@pytest.mark.parametrize("target", ["RMSprop", "adam.Adam", "lr_scheduler.StepLR", "lr_scheduler.ReduceLROnPlateau"])
def test_what_torch_optimises_with_is_trusted(target: str) -> None:
    check_classes(OmegaConf.create({"a": {"_target_": f"torch.optim.{target}"}}), Path("x"), OmegaConf.create({}))


def test_a_module_that_is_allowed_allows_what_it_defines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "allowed_ones"
    package.mkdir()
    (package / "__init__.py").write_text("import subprocess\nfrom allowed_ones.inner import Mine\n")
    (package / "inner.py").write_text("class Mine:\n    class Part: pass\ndef make(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def check(target: str, allowed: str) -> None:
        monkeypatch.setenv("METARUN_ALLOW", allowed)
        check_classes(OmegaConf.create({"a": {"_target_": target}}), Path("config.yaml"), OmegaConf.create({}))

    for target in ("allowed_ones.Mine", "allowed_ones.inner.Mine", "allowed_ones.Mine.Part", "allowed_ones.inner.make"):
        check(target, "allowed_ones")
        check(target, f"other,{target}")
    command = "allowed_ones.subprocess.Popen"
    for target in (command, "allowed_ones.inner.Mine.__class__", "allowed_ones.inner.Mine.__init__"):
        with pytest.raises(UserError, match=f"is not defined in allowed_ones, .* METARUN_ALLOW={target}"):
            check(target, "allowed_ones")
    check(command, command)
    with pytest.raises(UserError, match=r"names allowed_ones.other.X, which cannot be imported \("):
        check("allowed_ones.other.X", "allowed_ones")
    with pytest.raises(UserError, match="is no class of metarun's"):
        check("allowed_ones_too.Mine", "allowed_ones")


@pytest.mark.parametrize("name", ["x/../../pwn", "[/b]", "..", "x\x1b[31m"])
def test_a_set_to_test_on_has_a_name_that_files_can_have(name: str) -> None:
    config = compose("data=glyphs")
    with open_dict(config):
        config.test.data = {name: config.data}
    with pytest.raises(UserError, match=r"^test\.data: .*: must be (a name, and no path|the name of a folder, )"):
        check(config)
    with open_dict(config):
        config.test.data = {"my-set": config.data}
    check(config)


@pytest.mark.parametrize(
    ("command", "overrides", "begins"),
    [
        (
            "metarun --config-dir '/my conf' algo=maml seed=1",
            ["algo=maml", "seed=1"],
            "metarun --config-dir '/my conf'",
        ),
        ("metarun --config-dir /c --config-name mine", [], "metarun --config-dir /c --config-name mine"),
        ("rm -r /home algo=maml", ["algo=maml"], "metarun"),
        ("metarun 'seed=1", ["seed=1"], "metarun"),
        (7, ["seed=1"], "metarun"),
        ("metarun seed=1", 7, "metarun"),
        ("metarun", ["seed=1"] * 9, "metarun"),
    ],
)
def test_a_command_that_others_stored_is_not_what_is_proposed_next(command: Any, overrides: Any, begins: str) -> None:
    assert begun({"command": command, "overrides": overrides}) == begins
