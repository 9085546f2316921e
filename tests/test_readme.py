"""The READMEs stay true: their commands run, their keys and files exist, tables and pictures are what the scripts make."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from shell import make_ratings, metarun_in

from metarun import config as schema
from metarun import stages
from metarun.config.folder import CONF
from metarun.config.shorthand import expanded
from metarun.runs.continuation import unread

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "conf").rglob("*.md"), *(ROOT / "metarun").rglob("*.md"),
                 *(ROOT / "scripts").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)  # fmt: skip
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXTS["README.md"]
ROOMS = ["algos", "backbones", "data", "encoders", "engine", "export", "inference", "report", "runs", "stages", "sweeps", "target",
         "unsupervised", "wrappers"]  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """The words of every metarun command in the blocks of shell."""
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    lines = re.findall(r"^(?:.*&& |srun )?metarun\b(.*)$", shell, re.M)
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [(page, words) for page, text in TEXTS.items() for words in commands(text)]
TINY = ["train.steps=1", "train.validate_episodes=2", "task.queries=1", "test.episodes=2", "test.baseline_episodes=0"]
# How words begin that these recipes refuse.
NOT_USED = {
    "recipe=test": "train.",
    "recipe=predict": "t",
    "recipe=export": "t",
}
LONG = ("experiment=", "data=omniglot", "target=", "hydra/launcher=slurm", "hydra/sweeper=", "algo=learn2learn")
OTHER = [(page, words) for page, words in COMMANDS if "recipe=report" in words or "help" in words[:1]]
OWN = [(page, words) for page, words in COMMANDS if "--config-dir" in words]  # run by the tests of the guides
LATER = [
    (page, words)
    for page, words in COMMANDS
    if (any(word.startswith(LONG) for word in words) or "--dry-run" in words) and (page, words) not in OWN
]
CHEAP = {" ".join(words): (page, words) for page, words in COMMANDS if (page, words) not in [*OTHER, *OWN, *LATER]}

sys.path.insert(0, str(ROOT))
from scripts.benchmark import readme as speed  # noqa: E402
from scripts.results import picture, rows, tables  # noqa: E402

RESULTS = TEXTS["scripts/results/README.md"]
SPEED = TEXTS["scripts/benchmark/README.md"]
TABLES = rows.load()


def name(one: object) -> str:
    return " ".join(map(str, one)) or "metarun" if isinstance(one, list) else str(one)


def metarun(*words: str, inside: Path) -> str:
    """What a command prints, without what the jobs of a sweep print for themselves."""
    done = metarun_in(inside, *words)
    assert done.status == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a reader would stand: some images, texts and ratings, and a finished run."""
    folder = tmp_path_factory.mktemp("reader")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8), np.uint8)
    for number, images in enumerate(pixels):
        (folder / "my_images" / f"class {number}").mkdir(parents=True)
        for position, image in enumerate(images):
            Image.fromarray(image).save(folder / "my_images" / f"class {number}" / f"{position}.png")
    texts = [f"text {number} of class {name},class {name}" for name in range(32) for number in range(2)]
    (folder / "my_texts.csv").write_text("\n".join(["text,label", *texts, ""]), encoding="utf-8")
    make_ratings(folder / "ml-100k", films=120, rated=120)  # of cold films, too, enough for a task
    metarun(*TINY, inside=folder)
    (made,) = (folder / "outputs" / "glyphs-protonet").iterdir()
    made.rename(made.with_name("default"))
    return folder


def test_the_front_page_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.encode()) <= 10_000
    first = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)[0]
    assert [line.split()[0] for line in first.splitlines()] == ["scripts/demo.sh", "scripts/test.sh"]
    assert len(commands(README)) == 10
    assert "](scripts/assets/report.png)" in README
    (table,) = re.findall(r"<!-- made by .*?-->\n(.*?)<!-- end", README, re.S)
    assert len(table.splitlines()) == 2 + 5


def test_the_front_page_leads_to_every_other() -> None:
    linked = re.findall(r"\]\(([^)#:]+\.md)", README)
    assert set(PAGES) - {"README.md"} <= set(linked)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_page(room: str) -> None:
    assert f"metarun/{room}/README.md" in TEXTS


def test_every_page_of_a_room_is_looked_at() -> None:
    assert {path.parent.name for path in (ROOT / "metarun").glob("*/README.md")} == set(ROOMS)
    assert [page for page, text in TEXTS.items() if re.search(r"^```(bash|shell|console|zsh)", text, re.M)] == []


def test_the_table_of_a_room_has_all_that_there_is() -> None:
    assert [
        one for one in stages.__all__ if one != "Stage" and f"| `{one}` |" not in TEXTS["metarun/stages/README.md"]
    ] == []
    for group in ("backbone", "encoder"):
        choices = [path.stem for path in (CONF / group).glob("*.yaml")]
        text = TEXTS[f"metarun/{group}s/README.md"]
        assert [one for one in choices if f"={one}" not in text and f"`{one.partition('_')[2]}`" not in text] == []


def test_the_picture_of_a_report_is_small() -> None:
    picture_file = ROOT / "scripts" / "assets" / "report.png"
    with Image.open(picture_file) as image:
        assert image.format == "PNG"
        assert image.width >= 800
    assert picture_file.stat().st_size < 200_000


def test_there_are_commands_of_every_kind() -> None:
    assert len(COMMANDS) > 30
    assert len(CHEAP) > 5
    assert any("-m" in words for _, words in CHEAP.values())
    assert any("recipe=test" in words for _, words in CHEAP.values())
    assert {page for page, _ in OWN} <= {f"metarun/{room}/README.md" for room in ROOMS}


@pytest.mark.parametrize(("page", "words"), CHEAP.values(), ids=name)
def test_command_runs(page: str, words: list[str], sandbox: Path) -> None:
    """Once if it stands in several pages."""
    outputs = sandbox / page.replace("/", "-")
    before = results(outputs)
    for _ in range(1 + ("checkpoint=" in " ".join(words))):  # once made, a result is shown
        printed = metarun(*words, *tiny(words), f"outputs={outputs}", inside=sandbox)
    if "-m" in words:  # whose jobs print for themselves
        jobs = int(np.prod([word.count(",") + 1 for word in words]))
        assert len(results(outputs) - before) == jobs
    else:
        assert len(re.findall(r"^results  ", printed, re.M)) == 1


def tiny(words: list[str]) -> list[str]:
    """What makes a command quick, of what its recipe uses."""
    refused = tuple(start for recipe, start in NOT_USED.items() if recipe in words)
    return [word for word in TINY if not word.startswith(refused)]


def results(outputs: Path) -> set[Path]:
    return set(outputs.glob("*/*/result.json"))


@pytest.mark.parametrize(("page", "words"), OTHER, ids=name)
def test_command_explains_or_reports(page: str, words: list[str], sandbox: Path) -> None:
    if "recipe=report" in words:
        metarun("-m", "hydra/launcher=local", "algo=maml,protonet", *TINY, inside=sandbox)
    printed = metarun(*words, inside=sandbox)
    assert ("index.html" if "recipe=report" in words else words[-1]) in printed


@pytest.mark.parametrize(("page", "words"), LATER, ids=name)
def test_long_command_is_accepted(page: str, words: list[str]) -> None:
    kept = [word for word in words if word not in ("-m", "--cfg", "job", "--dry-run")]
    first = [re.sub(r"=([\w./]+)(,[\w./]+)+$", r"=\1", word) for word in kept]  # of several choices
    overrides = [re.sub(r"=(tag.*|[^(\[,]*,.*)", "=1", word) for word in first]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", overrides=overrides)
    schema.check(config)
    assert not (config.recipe.stages and unread(config, overrides))


def test_keys_exist() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=["algo=maml"])
    known = [*schema.flat(OmegaConf.to_container(composed)), *(path.name for path in CONF.iterdir() if path.is_dir())]
    text = TEXTS["conf/README.md"]
    typed = text[text.index("The keys that are typed most") : text.index("Your own files")]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", typed, re.M) for key in re.findall(r"`([\w.]+)`", row)]
    assert len(keys) > 20
    assert [key for key in keys if key not in known] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    paths = [ROOT / path for path in re.findall(r"`((?:conf|metarun|scripts|tests)/[\w./]+)`", text)]
    paths += [(ROOT / page).parent / path for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    assert [str(path) for path in paths if not path.exists() and path.stem != "NAME"] == []


@pytest.mark.parametrize("page", PAGES)
def test_places_in_pages_exist(page: str) -> None:
    """A link to a heading finds it."""
    for path, place in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", TEXTS[page]):
        there = ((ROOT / page).parent / path if path else ROOT / page).read_text()
        headings = [
            re.sub(r"[^\w\- ]", "", line).replace(" ", "-").lower() for line in re.findall(r"^#+ (.*)$", there, re.M)
        ]
        assert place in headings


@pytest.mark.parametrize("room", ["metarun", *(f"metarun/{room}" for room in ROOMS)])
def test_a_room_s_page_names_files_that_are_there(room: str) -> None:
    text = re.sub(r"^```.*?^```", "", TEXTS[f"{room}/README.md"], flags=re.M | re.S)
    named = re.findall(r"`((?:[a-z_]+/)?[a-z_0-9]+\.py)`", text)
    own = set(re.findall(r"^`([\w./]+)`[^`]*:\n\n```", TEXTS[f"{room}/README.md"], re.M))
    there = [ROOT, ROOT / "metarun", ROOT / room]
    examples = set(re.findall(r"`([\w./]+\.py)`[^`]*:\n\n```python", TEXTS[f"{room}/README.md"])) | own
    assert [file for file in named if file not in examples and not any((at / file).exists() for at in there)] == []


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
            config = hydra.compose("config", overrides=expanded(row.runs[0].arguments))
            schema.check(config)
            assert not unread(config, row.runs[0].arguments)


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
    assert speed.rewritten(SPEED) == SPEED
    kept = [json.loads(path.read_text()) for path in speed.RESULTS.glob("*.json")]
    rates = [line for result in kept for line in result["lines"].values() if line.get("unit") == "tasks/s"]
    assert len(rates) > 10
    for line in rates:
        assert f"| {line['title']} |" in SPEED
        assert f"| {line['ratio']:.2f}× |" in SPEED
