"""What `scripts/fuzz` has found, and the generator itself: bad input of every kind ends in a line or two, and leaves nothing."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from shell import metarun, one_line

from scripts.fuzz import commands, damage, files
from scripts.fuzz.choices import begun_in_vain, fuzz_choices
from scripts.fuzz.scenes import SCENES, Scene
from scripts.fuzz.words import fuzz_words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipe.run=-1347"], "recipe.run=-1347: is no function that can be imported (No module named '-1347')"),
        (["recipe.run=os"], "recipe.run=os: is no function that can be imported"),
        (["-m", "hydra.verbose=-nan", "--dry-run"], "a setting of hydra.* is of another type than Hydra takes"),
        (["hydra.verbose=1.5"], "a setting of hydra.* is of another type than Hydra takes"),
        (["--", "-x"], "unrecognized arguments: -x "),
        (["-m", "--", "seed=1", "--config-dir", "--dry-run"], "argument --config-dir/-cd: expected one argument; "),
        (["seed=18446744073709551616"], "seed=18446744073709551616: "),
        (["seed=" + "1" * 5000], "a number has more digits than any setting takes"),
        (["task.queries=" + str(2**63)], "task.queries=9223372036854775808: "),
        (["train.tasks_per_step=1e400"], "train.tasks_per_step"),
        (["train.max_seconds=nan"], "train.max_seconds=nan: "),
        (["-m", "train.max_seconds=1,nan"], "train.max_seconds=nan: must"),
        (["algo.inner_lr=inf"], "algo.inner_lr=inf: "),
        (["hardware.threads=100000"], "hardware.threads=100000: "),
        (["recipe.stages=cpu"], "recipe.stages"),
        (["recipe.stages=[{a: 1}]"], "recipe.stages"),
        (["hydra/sweeper=optuna", "-m", "algo.inner_lr=interval(1,1e999)"], "algo.inner_lr: cannot be searched"),
        (["hydra/sweeper=optuna", "-m", "algo.inner_lr=interval(2,1)"], "algo.inner_lr: cannot be searched"),
        (["-m", "hydra.sweeper.trials=3", "seed=1"], "hydra.sweeper.trials: "),
        (["-m", "seed=range(1,1)"], "-m: the sweep has no job; one of its ranges has no value"),
        (["+algo._partial_=true"], "algo._partial_: "),
        (["++train.optimizer={_target_: builtins.exec}"], "train.optimizer"),
        (["algo._target_=builtins.exec"], "algo._target_=builtins.exec: "),
        (["train.schedule._target_=torch.load"], "train.schedule._target_=torch.load: cannot be imported"),
        (["data={a: 1}"], "data"),
        (["~train"], "train"),
        (["~"], "~: cannot be read"),
        (["="], "=: cannot be read"),
        (["a=b=c=(["], ""),
        (["--cfg"], "argument --cfg/-c: invalid choice"),
        (["--cfg", "jobb"], "argument --cfg/-c: invalid choice"),
        (["--config-name", "nowhere"], "nowhere"),
        (["--info", "nowhere"], "argument --info/-i: invalid choice"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_words_are_one_line_and_leave_nothing(words: list[str], told: str, tmp_path: Path) -> None:
    done = metarun(*commands.BASE, *words, f"outputs={tmp_path / 'outputs'}")
    one_line(done, told)
    assert not (tmp_path / "outputs").exists()


def test_the_generator_makes_commands_and_tells_what_must_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of its commands, of a fixed seed; and a fault of each kind is a finding."""
    tried, findings = fuzz_words(0.1, 3, examples=5)
    assert tried >= 5
    assert findings == 0
    monkeypatch.setattr(commands.cli, "main", lambda: 1 / 0)
    with pytest.raises(commands.Finding, match=r"(?s)traceback.*ZeroDivisionError"):
        commands.check(["seed=1"], tmp_path / "outputs")

    def refuses(lines: int, leaves: bool) -> None:
        import sys

        print("metarun: no\n" * lines, file=sys.stderr)
        if leaves:
            (tmp_path / "outputs" / "half").mkdir(parents=True)
        sys.exit(2)

    monkeypatch.setattr(commands.cli, "main", lambda: refuses(5, False))
    with pytest.raises(commands.Finding, match="5 lines of message"):
        commands.check(["seed=1"], tmp_path / "outputs")
    monkeypatch.setattr(commands.cli, "main", lambda: refuses(1, True))
    with pytest.raises(commands.Finding, match="something is left"):
        commands.check(["seed=1"], tmp_path / "outputs")


def test_choices_are_combined_and_what_is_refused_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, findings = fuzz_choices(0.1, 27)  # whose first command needs no table of characters of another size
    assert tried >= 1
    assert findings == 0

    def begins_and_refuses(reason: str) -> None:
        import sys

        print(f"run folder: outputs\nmetarun: {reason}", file=sys.stderr)
        sys.exit(2)

    monkeypatch.setattr(commands.cli, "main", lambda: begins_and_refuses("no such thing"))
    with pytest.raises(commands.Finding, match="refused after it has begun"):
        begun_in_vain(["seed=1"], tmp_path / "outputs")
    monkeypatch.setattr(commands.cli, "main", lambda: begins_and_refuses("the loss is not finite"))
    assert begun_in_vain(["seed=1"], tmp_path / "outputs") == 2

    def is_stopped() -> None:
        raise SystemExit(128 + 15)

    monkeypatch.setattr(commands.cli, "main", is_stopped)
    with pytest.raises(commands.Finding, match="does not end"):
        begun_in_vain(["seed=1"], tmp_path / "outputs")


def test_words_vary_the_commands_of_all_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_up(scene: Scene, here: Path) -> list[list[str]]:
        here.mkdir(parents=True)
        return [list(words) for words in scene.commands]

    monkeypatch.setattr(files, "set_up", set_up)
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "tables"))
    bases = files.Scenes(tmp_path).all_whole()
    for name in files.Scenes(tmp_path).names:
        assert any(list(words) in bases for words in SCENES[name].commands), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("finished")
    assert metarun(*commands.BASE, "name=run", f"outputs={outputs}").status == 0
    return outputs


@pytest.mark.parametrize(
    "mutation", ["[" * 5000, "[]", "null", "a: &a [*a]\n", "\0" * 50, ""], ids=lambda text: repr(text[:9])
)
@pytest.mark.parametrize("name", ["data.json", "result.json", "config.yaml"])
def test_a_damaged_file_of_a_run_is_named(name: str, mutation: str, finished: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(finished, outputs)
    (run,) = outputs.glob("run/*")
    (run / name).write_text(mutation)
    if name != "result.json":
        (run / "result.json").unlink()
    done = metarun(*commands.BASE, "name=run", f"outputs={outputs}")
    one_line(done, "resume=false" if name != "result.json" else "result.json")


def test_every_mutation_changes_bytes_and_can_be_repeated() -> None:
    content = bytes(range(48, 123)) * 20
    for name, mutate in damage.MUTATIONS.items():
        assert mutate(content, random.Random(1)) == mutate(content, random.Random(1)) != content, name


def test_a_yaml_text_is_parsed_once_and_given_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    load = yaml.load

    def counted(stream: str, Loader: Any) -> Any:
        parsed.append(stream)
        return load(stream, Loader)

    monkeypatch.setattr(yaml, "load", counted)
    with commands.texts_parsed_once():
        one, other = yaml.safe_load("a: [1]"), yaml.safe_load(io.StringIO("a: [1]"))
        one["a"].append(2)
        assert other == yaml.safe_load("a: [1]") == {"a": [1]}
        assert parsed == ["a: [1]"]
        for _ in range(2):
            with pytest.raises(yaml.YAMLError):
                yaml.safe_load("a: [")
    assert yaml.load is counted
