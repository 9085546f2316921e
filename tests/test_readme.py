"""README.md stays true: its commands run, its keys and files exist, its table and picture are what the scripts make."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from metarun import config as schema
from metarun.cli import CONF

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S))
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^(?:.*&& |srun )?metarun\b(.*)$", SHELL, re.M)]
TINY = ["train.steps=1", "train.validate_episodes=2", "task.queries=1", "test.episodes=2", "test.baseline_episodes=0"]
LONG = ("experiment=", "data=omniglot", "target=", "hydra/launcher=slurm", "hydra/sweeper=")
OTHER = [words for words in COMMANDS if "recipe=report" in words]
CHEAP = [words for words in COMMANDS if words not in OTHER and not any(word.startswith(LONG) for word in words)]
OWN_FILES = re.findall(r"`([\w./]+)`[^`]*:\n\n```(?:python|yaml)\n(.*?)^```", README, re.M | re.S)

sys.path.insert(0, str(ROOT / "scripts"))
import methods_table  # noqa: E402
import picture  # noqa: E402
import results_table  # noqa: E402
import transfer_table  # noqa: E402
from benchmark import readme as speed  # noqa: E402


def name(words: list[str]) -> str:
    return " ".join(words) or "metarun"


def metarun(*words: str, inside: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metarun", *words]
    done = subprocess.run(command, cwd=inside, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a reader of README.md would stand: its example method, some images, a finished run."""
    folder = tmp_path_factory.mktemp("reader")
    for path, text in OWN_FILES:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 2, 8, 8), np.uint8)
    for number, images in enumerate(pixels):
        (folder / "my_images" / f"class {number}").mkdir(parents=True)
        for position, image in enumerate(images):
            Image.fromarray(image).save(folder / "my_images" / f"class {number}" / f"{position}.png")
    metarun(*TINY, inside=folder)
    (made,) = (folder / "outputs" / "glyphs-protonet").iterdir()
    made.rename(made.with_name("default"))
    return folder


def test_there_are_commands_of_every_kind() -> None:
    assert len(COMMANDS) > 10
    assert [path for path, _ in OWN_FILES] == ["cosine.py", "my_conf/algo/cosine.yaml"]
    assert len(CHEAP) > 5
    assert any("-m" in words for words in CHEAP)
    assert any("recipe=test" in words for words in CHEAP)


@pytest.mark.parametrize("words", CHEAP, ids=name)
def test_command_runs(words: list[str], sandbox: Path) -> None:
    before = set(sandbox.glob("outputs/*/*/result.json"))
    printed = metarun(*words, *TINY, inside=sandbox)
    jobs = np.prod([word.count(",") + 1 for word in words]) if "-m" in words else 1
    assert len(set(sandbox.glob("outputs/*/*/result.json")) - before) == jobs
    assert printed.count("tensorboard --logdir outputs/") == (0 if "hydra/launcher=local" in words else jobs)


def test_report_runs(sandbox: Path) -> None:
    (words,) = OTHER
    metarun("-m", "hydra/launcher=local", "algo=maml,protonet", *TINY, inside=sandbox)
    assert "index.html" in metarun(*words, inside=sandbox)


@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in [*CHEAP, *OTHER]], ids=name)
def test_long_command_is_accepted(words: list[str]) -> None:
    words = words[: -words.count("--cfg") * 2 or None]
    first = [re.sub(r"=([\w.]+)(,[\w.]+)+$", r"=\1", word) for word in words if word != "-m"]  # of several choices
    overrides = [re.sub(r"=(tag.*|[^(\[,]*,.*)", "=1", word) for word in first]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        schema.check(hydra.compose("config", overrides=overrides))


def test_keys_exist() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=["algo=maml"])
    known = [*schema.flat(OmegaConf.to_container(composed)), *(path.name for path in CONF.iterdir() if path.is_dir())]
    rows = re.findall(
        r"^\| (`.*?) \|", README[README.index("| key |") : README.index("### What is in a run folder")], re.M
    )
    keys = [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]
    assert len(keys) > 20
    assert [key for key in keys if key not in known] == []


def test_files_exist() -> None:
    paths = re.findall(r"`((?:conf|metarun|scripts|tests)/[\w./]*)`", README) + re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_table_is_what_the_script_makes() -> None:
    assert results_table.rewritten(README) == README
    assert re.search(r"^\| ProtoNet \|.*± .*`metarun` \|$", README, re.M)


def test_table_of_methods_is_what_the_script_makes() -> None:
    assert methods_table.rewritten(README) == README
    results = [json.loads(path.read_text()) for path in methods_table.RESULTS.glob("*.json")]
    assert results
    for result in results:
        assert result["test/episodes"] == 1000
        assert result["train/seconds"] < 630
        assert result["data"]["split"] == "vinyals" if "split" in result["data"] else result["protocol"]["split"]
    shown = README[README.index(methods_table.START) : README.index(methods_table.END)]
    assert len(re.findall(r"^\| \[", shown, re.M)) == len(results)


def test_tables_of_transfer_are_what_the_script_makes() -> None:
    assert transfer_table.rewritten(README) == README
    results = transfer_table.load()
    rows = transfer_table.approaches(results)
    assert list(rows) == list(transfer_table.APPROACHES.values())
    for result in rows.values():
        assert result["target/repeats"] == 10
        assert [point["train_images"] for point in result["target/curve"]] == [5, 10, 20, 50, 100, 200]
        assert result["target/test_images"] == 50
        assert result["target/data"]["fingerprint"] == next(iter(rows.values()))["target/data"]["fingerprint"]
    adapted = [result for result in results if "target/curve" not in result]
    assert len(adapted) == 25  # five seeds of five
    assert all("source" in result["protocol"]["selected_by"] for result in adapted)


def test_picture_is_of_the_result_in_the_table() -> None:
    def words(svg: str) -> list[str]:
        return re.findall(r"\S+", html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", svg, flags=re.S)))

    drawn = words(picture.PICTURE.read_text())
    assert drawn == words(picture.svg())
    assert re.search(r"^\| ProtoNet \| built-in.*\*\*([\d.]+%)\*\*", README, re.M)[1] in drawn


def test_speed_tables_are_those_of_the_benchmarks_kept() -> None:
    assert speed.rewritten(README) == README
    kept = [json.loads(path.read_text()) for path in speed.RESULTS.glob("*.json")]
    rates = [line for result in kept for line in result["lines"].values() if line.get("unit") == "tasks/s"]
    assert len(rates) > 10
    for line in rates:
        assert f"| {line['title']} |" in README
        assert f"| {line['ratio']:.2f}× |" in README
