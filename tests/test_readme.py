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
from benchmark import readme as speed  # noqa: E402
from results import picture, rows, tables  # noqa: E402

RESULTS = (ROOT / "scripts" / "results" / "README.md").read_text()
TABLES = rows.load()


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


@pytest.mark.parametrize("file", ["README.md", "scripts/results/README.md"])
def test_files_exist(file: str) -> None:
    text = (ROOT / file).read_text()
    paths = [ROOT / path for path in re.findall(r"`((?:conf|metarun|scripts|tests)/[\w./]*)`", text)]
    paths += [(ROOT / file).parent / path for path in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert len(paths) > 3
    assert [path for path in paths if not path.exists()] == []


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README.md", "scripts/results/README.md"])
def test_tables_are_what_the_script_makes_of_the_stored_results(text: str) -> None:
    assert "<!-- made by python -m scripts.results: main" in text
    assert tables.unmarked(tables.rewritten(text, TABLES, tables.marks(None))) == tables.unmarked(text)


def test_every_stored_result_has_a_row_and_every_table_a_place() -> None:
    runs = [run for table in TABLES.values() for row in table.rows for run in row.runs]
    stored = set(rows.DATA.glob("*/*.json"))
    assert stored
    assert stored <= {run.stored() for run in runs}
    assert {name for name in TABLES if all(line not in RESULTS for line in tables.markers(name))} == set()


def test_stored_results_know_their_commit_and_hold_what_their_tables_promise() -> None:
    for table in TABLES.values():
        for made in [made for row in table.rows for made in tables.stored(row)]:
            assert re.fullmatch(r"[0-9a-f]{40}\+?", made.result["git_commit"])
            if table.kind == "methods":
                assert made.result["test/episodes"] == 1000
                assert made.result["train/seconds"] < 630
            if table.kind == "adaptation":
                assert "source" in made.result["protocol"]["selected_by"]
            if table.kind == "approaches":
                assert made.result["target/repeats"] == 10


@pytest.mark.parametrize("table", TABLES)
def test_commands_of_the_rows_compose(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_DATA", "/data")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for row in TABLES[table].rows:
            schema.check(hydra.compose("config", overrides=row.runs[0].arguments))


def test_a_row_of_every_method_that_has_a_short_experiment() -> None:
    short = {path.stem for path in (CONF / "experiment" / "omniglot_short").glob("*.yaml")} - {"budget"}
    assert short <= {row.name for row in TABLES["methods"].rows}


def test_picture_is_of_the_result_in_the_table() -> None:
    def words(svg: str) -> list[str]:
        return re.findall(r"\S+", html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", svg, flags=re.S)))

    drawn = words(picture.PICTURE.read_text())
    assert drawn == words(picture.svg())
    assert re.search(r"^\| Prototypical networks \| glyphs.*\*\*([\d.]+%)\*\*", README, re.M)[1] in drawn


def test_speed_tables_are_those_of_the_benchmarks_kept() -> None:
    assert speed.rewritten(README) == README
    kept = [json.loads(path.read_text()) for path in speed.RESULTS.glob("*.json")]
    rates = [line for result in kept for line in result["lines"].values() if line.get("unit") == "tasks/s"]
    assert len(rates) > 10
    for line in rates:
        assert f"| {line['title']} |" in README
        assert f"| {line['ratio']:.2f}× |" in README
