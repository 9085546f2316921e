"""The report over many runs: what is compared with what, its numbers, its files, its page."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.stats
import yaml
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image
from rights import kept_out
from shell import ROOT, SINUSOID, environment, metarun
from shell import result as stored_result
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from metarun import files, report
from metarun.errors import UserError
from metarun.report import figures, listing, published, rendering, statistics, tables
from metarun.report.collect import collect, read, run_folders
from metarun.report.rendering import latex
from metarun.report.run import show, show_stored
from metarun.report.run import subject as run_subject
from metarun.report.summary import Section, pooled, summarise
from metarun.report.tables import ReportTable
from metarun.runs import result
from metarun.runs.logger import RunLogger
from metarun.sweeps.jobs import Job
from metarun.sweeps.plan import state

GENERATOR = np.random.default_rng(0)


def make_run(
    folder: Path,
    *words: str,
    scores: Any = None,
    seed: int = 0,
    measure: str = "acc",
    ways: int = 5,
    shots: int = 1,
    fingerprint: str = "f0",
    choices: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    curve: list[float] | None = None,
) -> Path:
    """A run folder as metarun leaves it, made of the test scores `[episodes]` or `[inner steps, episodes]`.

    `config` and `result` come on top of what is made up here.
    """
    folder.mkdir(parents=True)
    chosen = {"algo": "protonet", "data": "omniglot", "backbone": "conv4", "recipe": "meta", "experiment": None}
    task = {"ways": ways, "shots": shots, "queries": 15}
    stored: dict[str, Any] = {
        "seed": seed,
        "name": "made",
        "checkpoint": None,
        "task": task,
        "test": {"task": {"ways": None}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**stored, **(config or {})}))
    data = {"fingerprint": fingerprint} | ({} if measure == "mse" else {"classes": {"train": 8, "val": 4, "test": 4}})
    found: dict[str, Any] = {
        "train/steps": 100, "train/seconds": 60.0, "val/score": 0.5 if measure == "acc" else -0.5,
        "protocol": {"norm": "batch", "transductive": False, "test": task, "split": None},
        "data": data, "command": shlex.join(["metarun", *words, f"seed={seed}"]),
        "overrides": [*words, f"seed={seed}"], "choices": chosen | (choices or {}),
        "versions": {"torch": "2.9.0", "python": "3.11.7"}, "git_commit": "0123456789abcdef", "peak_memory": {"host": 2**30},
        "hardware": {"device": "cpu", "gpu": None, "precision": "float32"},
    }  # fmt: skip
    if scores is not None:
        values = np.atleast_2d(np.asarray(scores, dtype=float))
        np.savez_compressed(folder / "test_scores.npz", steps=np.arange(len(values)), values=values)
        after = {str(step): summary(row, measure) for step, row in enumerate(values)}
        found |= {f"test/{name}": value for name, value in summary(values[-1], measure).items()}
        found["test/episodes"] = values.shape[1]
        if len(values) > 1:
            found["test/after_inner_steps"] = after
    (folder / "result.json").write_text(json.dumps(found | (result or {})))
    if curve:
        name = "val/acc" if measure == "acc" else "val/mse_median"
        lines = [json.dumps({"step": 10 * (index + 1), name: value}) for index, value in enumerate(curve)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def summary(values: np.ndarray, measure: str) -> dict[str, float]:
    """The numbers of `result.json`."""
    finite = values[np.isfinite(values)]
    numbers = {measure: finite.mean(), f"{measure}_ci95": 1.96 * finite.std(ddof=1) / np.sqrt(len(finite))}
    if measure == "mse":
        numbers |= {"mse_median": float(np.median(values)), "diverged": int((~np.isfinite(values)).sum())}
    return numbers


def sections(root: Path) -> list[Section]:
    return summarise(collect([root], root / "report"))


def pair(root: Path, ours: np.ndarray, theirs: np.ndarray, seed: int = 0, **options: Any) -> None:
    """A run of maml and one of protonet."""
    for algo, scores in (("maml", ours), ("protonet", theirs)):
        make_run(root / f"{algo}{seed}", f"algo={algo}", scores=scores, seed=seed, choices={"algo": algo}, **options)


# What is compared.


def test_groups_are_what_was_swept_except_the_seed(tmp_path: Path) -> None:
    """Of what was overridden, only what differs; a key that only some runs override has its value in all."""
    words = [
        "data=omniglot",
        "outputs=/x",
        "name=made",
        "hardware.threads=1",
        "experiment=table",
        "+train.clip_norm=1",
    ]
    for algo in ("maml", "protonet"):
        for rate in (0.1, 0.5):
            for seed in (0, 1, 2):
                typed = [
                    f"algo={algo}",
                    *([f"algo.inner_lr={rate}"] if rate == 0.1 else []),
                    *words,
                    f"name={algo}{seed}",
                ]
                config = {"algo": {"inner_lr": rate}, "train": {"clip_norm": 1}, "hardware": {"threads": seed}}
                choices = {"algo": algo, "experiment": "table"}
                make_run(
                    tmp_path / f"{algo}{rate}{seed}", *typed, scores=[0.5, 1], seed=seed, choices=choices, config=config
                )
    found = collect([tmp_path], tmp_path / "report")
    assert found.columns == ["algo", "algo.inner_lr"]
    assert [tuple(group.values.values()) for group in found.groups] == [
        ("maml", 0.1), ("maml", 0.5), ("protonet", 0.1), ("protonet", 0.5),
    ]  # fmt: skip
    assert [[run.seed for run in group.runs] for group in found.groups] == [[0, 1, 2]] * 4
    assert found.problems == found.unfinished == []


def test_numbers_are_sorted_as_numbers_and_a_dict_names_its_keys(tmp_path: Path) -> None:
    for steps in (100, 20, 3):
        config = {"train": {"steps": steps, "tasks_per_step": 4}}
        make_run(tmp_path / str(steps), f"train={{steps: {steps}}}", scores=[0.5, 1], config=config)
    found = collect([tmp_path], tmp_path / "report")
    assert [group.values for group in found.groups] == [{"train.steps": 3}, {"train.steps": 20}, {"train.steps": 100}]


def test_experiments_that_differ_are_a_column(tmp_path: Path) -> None:
    for name in ("omniglot_maml", "omniglot_protonet"):
        make_run(tmp_path / name, f"experiment={name}", scores=[0.5, 1], choices={"experiment": name})
    assert collect([tmp_path], tmp_path / "report").columns == ["experiment"]


def test_runs_that_differ_without_a_word_are_not_averaged(tmp_path: Path) -> None:
    """The preset was edited between the two seeds."""
    for seed in (0, 1):
        config = {"train": {"steps": 10 + seed}, "outputs": f"o{seed}"}
        make_run(tmp_path / str(seed), "algo=maml", scores=[0.5, 1], seed=seed, config=config)
    found = collect([tmp_path], tmp_path / "report")
    assert found.columns == ["train.steps"]
    assert [len(group.runs) for group in found.groups] == [1, 1]


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "f1"}, {"ways": 20}, {"shots": 5}, {"config": {"data": {"within_group": True}}},
     {"result": {"data": {"fingerprint": "f0", "classes": {"train": 32, "val": 16, "test": 16}}}}],
    ids=["images", "ways", "shots", "alphabets", "rotations"],
)  # fmt: skip
def test_other_test_tasks_are_never_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    pair(tmp_path / "a", GENERATOR.random(50), GENERATOR.random(50))
    for algo in ("maml", "protonet"):
        make_run(tmp_path / f"b-{algo}", f"algo={algo}", scores=GENERATOR.random(50), choices={"algo": algo}, **other)
    found = sections(tmp_path)
    assert [len(section.rows) for section in found] == [2, 2]
    assert len({section.title for section in found}) == 2
    assert [sum(row.best for row in section.rows) for section in found] == [1, 1]
    assert all((row.on_episodes is None) == row.best for section in found for row in section.rows)


@pytest.mark.parametrize("kept", [True, False])
def test_a_tested_checkpoint_counts_as_the_method_it_was_trained_with(tmp_path: Path, kept: bool) -> None:
    """Also if the run that made it is gone; Hydra's choices of the testing command are the defaults."""
    for algo in ("maml", "protonet"):
        trained = tmp_path / "trained" / algo
        if kept:
            make_run(trained, f"algo={algo}", scores=[0.5, 1], choices={"algo": algo})
        config = {"checkpoint": str(trained), "algo": {"_target_": f"some.where.{algo.title()}"}}
        words = ["recipe=test", f"checkpoint={trained}", "task.shots=5"]
        make_run(
            tmp_path / "tested" / algo, *words, scores=[0.5, 1], shots=5, choices={"recipe": "test"}, config=config
        )
    found = collect([tmp_path / "tested"], tmp_path / "report")
    names = ["maml", "protonet"] if kept else ["Maml", "Protonet"]
    assert [group.values for group in found.groups] == [{"algo": name} for name in names]


def make_test(folder: Path, trained: Path, *words: str, result: dict[str, Any] | None = None, **options: Any) -> Path:
    """A test of the run in the folder `trained`; its choices are those of its own command line, and its seed by itself that run's."""
    words = ("recipe=test", f"checkpoint={trained}", *words)
    config = {"checkpoint": str(trained), "data": {"root": "here"}} | options.pop("config", {})
    found = {"checkpoint/sha256": trained.name} | (result or {})
    file = make_run(folder, *words, config=config, result=found, **options) / "result.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stored.items() if not key.startswith(("train/", "val/"))}))
    return folder


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_test_on_other_data_is_of_the_data_that_the_weights_were_trained_on(
    kept: bool, seed: int, tmp_path: Path
) -> None:
    """It is no seed of what was trained on the data of the test, replaces nothing there, and nothing was published of it."""
    trained = tmp_path / "trained"
    for name, fingerprint in (("omniglot", "f0"), ("glyphs", "f1")):
        make_run(
            trained / name, f"data={name}", "algo=protonet", scores=[0.5, 1], choices={"data": name}, fingerprint=fingerprint,
            config={"data": {"root": name}},
        )  # fmt: skip
    before = {"checkpoint/data": {"data": {"fingerprint": "f1", "classes": {"train": 9}}}}
    make_test(
        tmp_path / "tests" / "a", trained / "glyphs", "data=omniglot", scores=[0.2, 0.4], seed=seed, result=before,
        choices={"data": "omniglot"}, config={"algo": {"_target_": "a.protonet"}, "data": {"_target_": "a.Omniglot"}},
    )  # fmt: skip
    if not kept:
        (trained / "glyphs" / "result.json").unlink()
    collection = collect([trained / "omniglot", tmp_path / "tests"], tmp_path / "report")
    (section,) = summarise(collection)
    assert collection.problems == []
    source = "glyphs" if kept else "data f1"
    table = tables.section_table(section)
    assert table.headings[0] == "trained on"
    found = {row.label.partition(",")[0]: row for row in section.rows}
    assert {name: (round(row.mean or 0, 9), row.n) for name, row in found.items()} == {
        "omniglot": (0.75, 1),
        source: (0.3, 1),
    }
    assert found["omniglot"].published is not None
    assert found[source].published is None
    lines = list(csv.DictReader(io.StringIO(rendering.as_csv([section]))))
    assert sorted((line["data"], line["trained_on"]) for line in lines) == sorted(
        [("omniglot", "omniglot"), ("omniglot", source)]
    )


def test_weights_of_several_data_tested_on_one_are_a_row_each(tmp_path: Path) -> None:
    for name in ("glyphs", "omniglot"):
        make_run(tmp_path / "trained" / name, f"data={name}", scores=[0.5, 1], choices={"data": name})
        before = {"checkpoint/data": {"data": {"fingerprint": name}}}
        make_test(
            tmp_path / "tests" / name, tmp_path / "trained" / name, "data=digits", scores=[0.2, 0.4], result=before,
            choices={"data": "digits"},
        )  # fmt: skip
    (section,) = sections(tmp_path / "tests")
    assert [(row.label, row.n) for row in section.rows] == [("glyphs", 1), ("omniglot", 1)]


def test_a_key_of_the_data_that_is_typed_in_a_test_is_of_the_test(tmp_path: Path) -> None:
    """The same choice with another root is other data, and says so; what the weights were trained on stays as it was."""
    trained, config = tmp_path / "runs" / "trained", {"data": {"root": "a"}}
    make_run(trained, "data=folder", "data.root=a", scores=[0.5, 1], choices={"data": "folder"}, config=config)
    make_test(
        tmp_path / "runs" / "test", trained, "data.root=b", scores=[0.2, 0.4], fingerprint="f1", config={"data": {"root": "b"}},
        result={"checkpoint/data": {"data": {"fingerprint": "f0"}}},
    )  # fmt: skip
    collection = collect([tmp_path / "runs"], tmp_path / "report")
    assert [(run.value("data"), run.value("data.root"), run.of_test("data.root")) for run in collection.runs] == [
        ("folder", "a", "a"),
        ("folder", "a", "b"),
    ]
    assert collection.columns == ["data", "data.root"]
    for section in summarise(collection):
        assert tables.section_table(section).headings[:2] == ["trained on", "trained on data.root"]
        assert [row.published for row in section.rows] == [None]
    assert run_subject(tmp_path / "runs" / "test") == "protonet on folder, trained on folder\n"


def test_other_vectors_of_the_same_items_are_no_other_data(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "trained", "data=glyphs", scores=[0.5, 1], choices={"data": "glyphs"})
    items = {"fingerprint": "v0", "before_encoding": "f0"}
    made = make_test(tmp_path / "test", trained, scores=[0.5, 1], result={"checkpoint/data": {"data": items}})
    assert not read(made).elsewhere


def test_the_same_weights_tested_by_other_seeds_are_one_training(tmp_path: Path) -> None:
    """More episodes lessen the interval over episodes alone, whether the run that trained them is there or not."""
    root, scores = tmp_path / "runs", {seed: GENERATOR.random(40) for seed in (0, 1, 2)}
    trained = make_run(tmp_path / "trained", "algo=maml", scores=scores[0], choices={"algo": "maml"}, curve=[0.1, 0.2])
    steps = {seed: np.stack([values / 2, values]) for seed, values in scores.items()}
    for seed, values in steps.items():
        make_test(root / str(seed), trained, f"seed={seed}", scores=values, seed=seed)
    for roots in ([root], [root, trained]):
        (section,) = summarise(collect(roots, tmp_path / "report"))
        (row,) = section.rows
        assert (row.n, row.seeds_half) == (1, None)
        assert row.mean == pytest.approx(np.mean([*scores.values()]))
        halves = [1.96 * values.std(ddof=1) / math.sqrt(40) for values in scores.values()]
        assert row.episodes_half == pytest.approx(math.hypot(*halves) / 3)
        table = tables.section_table(section)
        assert "one seed" in table.rows[0]
        (line,) = csv.DictReader(io.StringIO(rendering.as_csv([section])))
        assert (line["seeds"], line["half_over_seeds"]) == ("0", "")
    band = figures._band(section.rows[0].group, lambda run: (np.array([0, 1]), np.array([run.seed, 1.0])))
    assert band is not None
    np.testing.assert_allclose(band, [[0, 1], [1, 1], [1, 1], [1, 1]])
    (trained / "result.json").unlink()
    (section,) = sections(root)
    assert [row.n for row in section.rows] == [1]


def test_trainings_that_are_tested_by_one_seed_are_several_on_the_same_episodes(tmp_path: Path) -> None:
    """Their interval over episodes is no narrower for being of several weights, and a paired test counts each episode once."""
    draws = {(algo, seed): GENERATOR.random(40) + (algo == "maml") for algo in ("maml", "protonet") for seed in (0, 1)}
    for (algo, seed), values in draws.items():
        trained = make_run(tmp_path / "trained" / f"{algo}{seed}", f"algo={algo}", seed=seed, choices={"algo": algo})
        make_test(tmp_path / "tests" / f"{algo}{seed}", trained, "seed=7", scores=values, seed=7)
    collection = collect([tmp_path / "tests"], tmp_path / "report")
    assert collection.problems == []
    (section,) = summarise(collection)
    maml, protonet = section.rows
    ours, theirs = ([draws[algo, seed] for seed in (0, 1)] for algo in ("protonet", "maml"))
    assert (maml.n, protonet.n, maml.best) == (2, 2, True)
    assert protonet.seeds_half == pytest.approx(statistics.over_seeds([values.mean() for values in ours]))
    assert protonet.episodes_half == pytest.approx(np.mean([1.96 * each.std(ddof=1) / math.sqrt(40) for each in ours]))
    assert protonet.on_episodes is not None
    assert protonet.on_episodes.pairs == 40
    assert protonet.on_episodes.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert protonet.on_seeds is not None
    assert (protonet.on_seeds.pairs, protonet.on_seeds.mean) == (2, pytest.approx(np.mean(ours) - np.mean(theirs)))


def test_folders_that_are_no_finished_runs(tmp_path: Path) -> None:
    """Unfinished runs are listed; hidden folders, the report's own, and what lies inside of a run are not looked at."""
    root, broken = tmp_path / "root", {}
    make_run(root / "deep" / "er" / "done", scores=[0.5, 1])
    for name in (".hidden", "report", "deep/er/done/inside"):
        make_run(root / name, scores=[0.5, 1])
    for name, text in {"cut": '{"test/acc": 0.', "list": "[]", "bare": "{}", "binary": "\udcff"}.items():
        broken[name] = make_run(root / "broken" / name, scores=[0.5, 1]) / "result.json"
        broken[name].write_text(text, errors="surrogateescape")
    (make_run(root / "no config", scores=[0.5, 1]) / "config.yaml").write_text("a: [")
    (root / "new").mkdir()
    (root / "new" / "config.yaml").write_text("seed: 0\n")
    found = collect([root, root / "deep"], root / "report")
    assert [run.folder.name for run in found.runs] == ["done"]
    assert [path.name for path in found.unfinished] == ["new"]
    named = [
        *(str(broken[name]) for name in ("bare", "binary", "cut", "list")),
        str(root / "no config" / "config.yaml"),
    ]
    assert [problem.partition(": cannot be used (")[0] for problem in found.problems] == named
    assert not any("\n" in problem for problem in found.problems)


def test_a_run_that_only_used_what_was_learned_is_finished_and_in_no_report(tmp_path: Path) -> None:
    make_run(tmp_path / "tested", "algo=maml", scores=[0.5, 1])
    folder = make_run(tmp_path / "predictions", "recipe=predict", choices={"data": "", "algo": ""})
    found = json.loads((folder / "result.json").read_text())
    del found["data"]
    (folder / "result.json").write_text(json.dumps(found))
    collection = collect([tmp_path], tmp_path / "report")
    assert collection.problems == []
    assert [run.folder.name for run in collection.runs] == ["tested"]
    assert {line.folder.name: line.state for line in listing.found([tmp_path])} == {
        "tested": "finished",
        "predictions": "finished",
    }


def test_of_two_runs_alike_the_later_counts(tmp_path: Path) -> None:
    for number, name in enumerate(("default~2", "default")):
        folder = make_run(tmp_path / name, scores=[0.5, number])
        os.utime(folder / "result.json", (1000 + number, 1000 + number))
    found = collect([tmp_path], tmp_path / "report")
    assert [run.folder.name for run in found.runs] == ["default"]
    (problem,) = found.problems
    assert problem.startswith(f"{tmp_path / 'default~2'}: left out, ")
    assert "has the same settings and seed" in problem
    trained = tmp_path / "default"
    for name in ("one", "other"):
        make_test(tmp_path / "tests" / name, trained, scores=[0.5, 1], result={"checkpoint/sha256": name})
    (problem,) = collect([tmp_path / "tests"], tmp_path / "report").problems
    assert "tests other weights by the same settings and seed" in problem


# The numbers.


def test_interval_over_seeds_is_students() -> None:
    values = [0.91, 0.94, 0.90, 0.97]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert statistics.over_seeds(values) == pytest.approx((high - low) / 2, rel=1e-12)
    assert statistics.over_seeds([0.9, 0.9]) is None
    assert statistics.over_seeds([0.9]) is None


def test_interval_over_episodes_is_that_of_all_episodes_together() -> None:
    """Of three seeds with the same spread around their own means: the pooled standard error."""
    scores = GENERATOR.normal(size=(3, 400))
    scores = (scores - scores.mean(1, keepdims=True)) / scores.std(1, ddof=1, keepdims=True) + [[0], [5], [9]]
    halves = [1.96 * row.std(ddof=1) / math.sqrt(len(row)) for row in scores]
    assert statistics.over_episodes(halves) == pytest.approx(1.96 / math.sqrt(1200), rel=1e-12)
    assert statistics.over_episodes([0.3]) == pytest.approx(0.3)


def test_paired_test_is_scipys() -> None:
    ours, theirs = GENERATOR.normal(0.1, 1, (2, 80))
    found, expected = statistics.paired(ours - theirs), scipy.stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(interval), rel=1e-9)
    assert found.pairs == 80


@pytest.mark.parametrize(("difference", "p"), [(0.0, 1.0), (0.3, 2.0**-29)])
def test_differences_all_alike_have_no_interval_and_the_sign_test(difference: float, p: float) -> None:
    theirs = GENERATOR.random(30)
    found = statistics.paired((theirs + difference) - theirs)  # alike but for rounding
    assert found is not None
    assert (found.half, found.p) == (None, p)
    assert statistics.paired(np.array([0.3])) is None


def test_holm_by_hand() -> None:
    """Smallest times 4, next times 3, ...; never below one that came before, never above 1."""
    assert statistics.holm([0.02, 0.01, 0.03, 0.6]) == pytest.approx([0.06, 0.04, 0.06, 0.6])
    assert statistics.holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert statistics.holm([]) == []


def test_pairing_finds_a_difference_that_the_unpaired_test_misses(tmp_path: Path) -> None:
    """Episodes differ much in difficulty, which both methods share; one is better by a point on each."""
    draw = np.random.default_rng(1)  # its own: that of the module has been used before, more or less
    hard = draw.normal(0.8, 0.1, 500)
    ours, theirs = hard - 0.01 + draw.normal(0, 0.02, 500), hard + draw.normal(0, 0.02, 500)
    pair(tmp_path, ours, theirs)
    assert scipy.stats.ttest_ind(ours, theirs).pvalue > 0.05
    (section,) = sections(tmp_path)
    maml, protonet = section.rows
    assert protonet.best
    assert maml.on_episodes is not None
    assert maml.on_episodes.p < 1e-6
    assert maml.on_episodes.mean == pytest.approx(-0.01, abs=0.003)
    assert maml.on_episodes.mean == pytest.approx((ours - theirs).mean(), rel=1e-9)
    assert maml.on_seeds is None


def test_pairs_are_common_seeds_and_common_episodes(tmp_path: Path) -> None:
    """One tested fewer episodes with seed 1, and only one has seed 2; order must not matter."""
    ours, theirs = GENERATOR.random((3, 40)), GENERATOR.random((3, 40)) + 1
    for seed in (0, 1):
        pair(tmp_path, ours[seed][: 40 - 10 * seed], theirs[seed], seed=seed)
    make_run(tmp_path / "more", "algo=maml", scores=ours[2], seed=2, choices={"algo": "maml"})
    maml, protonet = sections(tmp_path)[0].rows
    pairs = np.concatenate([ours[0] - theirs[0], ours[1][:30] - theirs[1][:30]])
    by_seed = np.array([(ours[0] - theirs[0]).mean(), (ours[1][:30] - theirs[1][:30]).mean()])
    assert protonet.best
    assert (maml.n, protonet.n) == (3, 2)
    assert maml.on_episodes is not None
    assert maml.on_seeds is not None
    assert maml.on_episodes.pairs == 70
    assert maml.on_episodes.mean == pytest.approx(pairs.mean())
    assert maml.on_episodes.p == pytest.approx(scipy.stats.ttest_1samp(pairs, 0).pvalue)
    assert maml.on_seeds.p == pytest.approx(scipy.stats.ttest_1samp(by_seed, 0).pvalue)
    assert maml.mean == pytest.approx((ours[0].mean() + ours[1][:30].mean() + ours[2].mean()) / 3)


def test_p_values_are_adjusted_over_the_whole_report(tmp_path: Path) -> None:
    """Two settings with one comparison each: the smaller p counts twice."""
    singles = []
    for shots in (1, 5):
        ours, theirs = GENERATOR.normal(0, 1, (2, 100))
        pair(tmp_path / str(shots), ours, theirs + 0.3, shots=shots)
        singles.append(scipy.stats.ttest_rel(ours, theirs + 0.3).pvalue)
    found = [row.on_episodes.p for section in sections(tmp_path) for row in section.rows if row.on_episodes]
    assert found == pytest.approx(statistics.holm(singles))
    assert sorted(found)[0] == pytest.approx(2 * min(singles))


@pytest.mark.parametrize("over", ["repeats", "test images"])
def test_intervals_of_a_target_say_what_they_are_over(tmp_path: Path, over: str) -> None:
    for algo in ("maml", "protonet"):
        found: dict[str, Any] = {"target/acc": 0.5, "target/acc_ci95": 0.1, "target/classes": ["a", "b"]}
        found |= {"target/data": {"fingerprint": "f"}, **({"target/curve": []} if over == "repeats" else {})}
        make_run(tmp_path / algo, f"algo={algo}", choices={"algo": algo, "target": "digits"}, result=found)
    (section,) = sections(tmp_path)
    table = tables.section_table(section)
    assert [heading for heading in table.headings if "over" in heading] == [
        "± over seeds",
        f"± over {over}",
        f"minus the best, over {over} (points)",
    ]
    assert {cells[-1] for cells in table.rows} == {"the best", f"no common {over}"}
    assert [term for term in tables.explained([table]) if "±" not in term] == [f"minus the best, over {over}", "p"]
    assert "episodes" not in str(tables.explained([table]))


@pytest.mark.parametrize("why", ["other seeds", "no file", "cut file"])
def test_without_common_episodes_there_is_no_test(tmp_path: Path, why: str) -> None:
    pair(tmp_path, np.full(9, 0.4), np.full(9, 0.5))
    scores = tmp_path / "maml0" / "test_scores.npz"
    if why == "other seeds":
        config = tmp_path / "maml0" / "config.yaml"
        config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    elif why == "no file":
        scores.unlink()
    else:
        scores.write_bytes(scores.read_bytes()[:-40])
    (section,) = sections(tmp_path)
    assert [row.on_episodes for row in section.rows] == [None, None]
    table = tables.section_table(section)
    at = table.headings.index("minus the best, over episodes (points)")
    assert [cells[at] for cells in table.rows] == ["no common episodes", "the best"]
    assert not any("over seeds (" in heading for heading in table.headings)


def test_regression_lower_is_better_and_tasks_that_diverged_are_told(tmp_path: Path) -> None:
    ours, theirs = GENERATOR.gamma(1, 0.5, 60), GENERATOR.gamma(1, 2.0, 60)
    theirs[3] = math.inf
    pair(tmp_path, ours, theirs, measure="mse", ways=1, shots=5)
    (section,) = sections(tmp_path)
    maml, protonet = section.rows
    assert maml.best
    assert protonet.mean == pytest.approx(theirs[np.isfinite(theirs)].mean())
    assert protonet.median == pytest.approx(np.median(theirs))
    assert protonet.on_episodes is not None
    assert protonet.on_episodes.pairs == 59
    assert protonet.on_episodes.mean > 0
    table = tables.section_table(section)
    assert dict(zip(table.headings, table.rows[1], strict=True))["diverged tasks"] == "1"


@pytest.mark.parametrize("written", [json.dumps, files.json_text])
def test_a_run_without_a_finite_error_is_last(tmp_path: Path, written: Callable[[Any], str]) -> None:
    """`result.json` then has null for them; earlier versions wrote Infinity and NaN."""
    pair(tmp_path, np.ones(5), np.full(5, 2.0), measure="mse")
    path = tmp_path / "maml0" / "result.json"
    lost = {"test/mse": math.inf, "test/mse_ci95": math.nan, "test/mse_median": math.inf, "test/diverged": 5}
    path.write_text(written(json.loads(path.read_text()) | lost))
    (section,) = sections(tmp_path)
    assert [row.best for row in section.rows] == [False, True]
    assert tables.section_table(section).rows[0][2:5] == ["–", "one seed", "–"]


def test_a_mean_of_fewer_seeds_says_so(tmp_path: Path) -> None:
    """Of errors where a test diverged, and of validation scores where a validation has no finite one."""
    lost = {"test/mse": math.inf, "test/mse_ci95": None, "test/mse_median": math.inf, "test/diverged": 5}
    for seed in range(3):
        made = {"seed": seed, "measure": "mse", "scores": 1 + GENERATOR.random(5)}
        make_run(tmp_path / "tested" / str(seed), "algo=maml", result=lost if seed == 2 else None, **made)
        trained = make_run(tmp_path / "trained" / str(seed), "algo=maml", seed=seed)
        if seed == 2:
            told = json.loads((trained / "result.json").read_text())
            del told["val/score"]
            (trained / "result.json").write_text(json.dumps(told))
    for name in ("tested", "trained"):
        (section,) = sections(tmp_path / name)
        table = tables.section_table(section)
        assert table.rows[0][table.headings.index("seeds")] == "2 of 3"
        assert any("2 of 3" in term for term in tables.explained([table]))
        (line,) = csv.DictReader(io.StringIO(rendering.as_csv([section])))
        assert line["seeds_in_mean"] == "2"


def test_scores_of_another_shape_are_none(tmp_path: Path) -> None:
    pair(tmp_path, GENERATOR.random(5), GENERATOR.random(5))
    np.savez(tmp_path / "maml0" / "test_scores.npz", values=np.zeros(5))
    (section,) = sections(tmp_path)
    assert all(row.on_episodes is None for row in section.rows)


def test_a_test_of_the_weights_that_were_trained_beside_it_tests_no_others(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "trained", "algo=maml", scores=GENERATOR.random(5), choices={"algo": "maml"})
    make_test(tmp_path / "again", trained, scores=GENERATOR.random(5))
    (problem,) = collect([tmp_path], tmp_path / "report").problems
    assert "has the same settings and seed" in problem


def test_a_key_that_an_older_version_lacks_and_that_is_off_tells_no_groups_apart(tmp_path: Path) -> None:
    for seed in range(4):
        config = {"algo": {"new_switch": False}} if seed > 1 else None
        make_run(tmp_path / f"maml{seed}", "algo=maml", scores=GENERATOR.random(5), seed=seed, config=config)
    (section,) = sections(tmp_path)
    assert [row.n for row in section.rows] == [4]
    make_run(tmp_path / "on", "algo=maml", scores=GENERATOR.random(5), seed=4, config={"algo": {"new_switch": True}})
    assert len(sections(tmp_path)[0].rows) == 2


# The tables.


def test_what_stands_in_brackets_is_shown_except_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["net (1)", "50.00%", "60.00% (Snell 2017)"], ["net (2)", "40.00%", "none"]]
    rendering.show([tables.ReportTable("a", ["backbone.weights", "accuracy", "published"], rows, 1)])
    shown = capsys.readouterr().out
    assert "net (1)" in shown
    assert "net (2)" in shown
    assert "Snell" not in shown


def test_several_data_sets_at_several_shots_have_a_mean_each(tmp_path: Path) -> None:
    for algo, better in (("maml", 0.1), ("protonet", 0.0)):
        for shots, accuracy in ((1, 0.3), (5, 0.8)):
            task = {"ways": 5, "shots": shots, "queries": 15}
            protocol = {"norm": "batch", "transductive": False, "test": task, "split": None}
            protocol["sets"] = {one: {"task": task, "classes": "all"} for one in ("cub", "fungi")}
            found: dict[str, Any] = {"test/acc": 0.5, "test/acc_ci95": 0.1, "protocol": protocol}
            found["test/sets"] = {one: {"fingerprint": one, "classes": {"test": 2}} for one in ("cub", "fungi")}
            for one in ("cub", "fungi"):
                found |= {f"test/{one}/acc": accuracy + better, f"test/{one}/acc_ci95": 0.1}
            config = {"task": task}
            words = [f"algo={algo}", f"task.shots={shots}"]
            make_run(tmp_path / f"{algo}{shots}", *words, choices={"algo": algo}, result=found, config=config)
    table = tables.overview(sections(tmp_path))
    assert table is not None
    across = {
        heading: [row[at] for row in table.rows] for at, heading in enumerate(table.headings) if "mean" in heading
    }
    assert across == {
        "5-way 1-shot: mean": ["40.00%", "30.00%"],
        "5-way 1-shot: mean rank": ["1.00", "2.00"],
        "5-way 5-shot: mean": ["90.00%", "80.00%"],
        "5-way 5-shot: mean rank": ["1.00", "2.00"],
    }


def grid(root: Path, seeds: int = 2) -> Path:
    """Two methods, of which protonet is better, times two settings; and an unfinished run."""
    for shots in (1, 5):
        for seed in range(seeds):
            hard = GENERATOR.normal(0.8, 0.05, 100)
            for algo, gain in (("maml", 0.0), ("protonet", 0.1)):
                steps = [hard - 0.5, hard - 0.1 + 0.01 * seed, hard + gain + 0.01 * seed]
                make_run(
                    root / f"algo={algo},shots={shots},seed={seed}", f"algo={algo}", f"task.shots={shots}",
                    scores=steps if algo == "maml" else steps[-1], shots=shots, seed=seed, choices={"algo": algo},
                    curve=[0.4, 0.6 + gain, 0.7 + gain + 0.01 * seed],
                )  # fmt: skip
    (root / "unfinished run").mkdir()
    (root / "unfinished run" / "config.yaml").write_text("seed: 9\n")
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report over `grid`."""
    root = grid(tmp_path_factory.mktemp("grid"))
    page = report.write([root], root / "report", "a <grid> & more")
    assert page == root / "report" / "index.html"
    return page.parent


def test_files(written: Path) -> None:
    stems = ("cost", "inner_steps", "learning_curves")
    pictures = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert {path.name for path in written.iterdir()} == pictures | {"index.html", "table.csv", "table.md", "table.tex"}


def test_a_grid_has_a_table_across_its_settings(tmp_path: Path) -> None:
    table = tables.overview(sections(grid(tmp_path)))
    assert table is not None
    assert table.headings == ["algo", "5-way 1-shot", "5-way 5-shot"]
    assert [cells[0] for cells in table.rows] == ["maml", "protonet"]
    assert table.best == {(1, 1), (1, 2)}
    first = sections(tmp_path)[0].rows[0]
    assert table.rows[0][1] == f"{first.mean:.2%} ± {first.seeds_half:.2%}"
    assert tables.overview(sections(tmp_path)[:1]) is None


def test_markdown(written: Path) -> None:
    text = (written / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| protonet")]
    assert len(rows) == 3
    assert all(row.count("**") == (4 if "the best" not in row else 2) for row in rows)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (4, 9)
    assert "98.8 % (Snell et al. 2017, table 1)" in text
    assert "unfinished run" in text


def test_markdown_shows_what_stands_there() -> None:
    table = tables.ReportTable(
        "a*b*", ["name", "train.max_seconds"], [["*x* `y` [z](u) <b> &lt; _v_ \\ ~~w~~ p|q", "1"]], 1, set()
    )
    text = rendering.markdown(table)
    assert "| \\*x\\* \\`y\\` \\[z\\](u) &lt;b> &amp;lt; \\_v\\_ \\\\ \\~\\~w\\~\\~ p\\|q | 1 |" in text
    assert "train.max_seconds" in text
    assert text.startswith("## a\\*b\\*\n")


def test_csv_has_every_digit(written: Path) -> None:
    with open(written / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [row for section in sections(written.parent) for row in section.rows]
    assert len(lines) == len(rows) == 4
    for line, row in zip(lines, rows, strict=True):
        assert (line["algo"], line["shots"], line["seeds"]) == (row.label, str(row.group.setting.shots), "0 1")
        for heading, value in {
            "mean": row.mean, "half_over_seeds": row.seeds_half, "half_over_episodes": row.episodes_half,
            "minus_best_over_episodes": row.on_episodes and row.on_episodes.mean,
            "p_holm_over_seeds": row.on_seeds and row.on_seeds.p,
        }.items():  # fmt: skip
            assert line[heading] == ("" if value is None else repr(value))


def test_latex_escapes_what_tex_takes_for_its_own(tmp_path: Path) -> None:
    for value in ("50%_of$a&b#{c}~^\\d", "plain"):
        make_run(tmp_path / str(len(value)), f"data.root={value}", scores=[0.5, 1], config={"data": {"root": value}})
    (section,) = sections(tmp_path)
    lines = rendering.latex(tables.section_table(section)).splitlines()
    (odd,) = [line for line in lines if line.startswith("50")]
    assert odd.startswith(r"50\%\_of\$a\&b\#\{c\}\textasciitilde{}\textasciicircum{}\textbackslash{}d & 1 & ")
    rows = [line for line in lines if line.endswith(r" \\")]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", "\n".join(lines))[1]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [len(columns) - 1] * 3
    assert [lines[at] for at in (4, 6, 9)] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert sum(row.count(r"\textbf{") for row in rows) == 1


def with_target(root: Path, algo: str, *accuracies: float, half: float | None = 0.1, **numbers: Any) -> None:
    """A run on a target that learned from 5, 10, ... images."""
    curve = [
        {"train_images": 5 * 2**n, "acc": each, "acc_ci95": half, "test_images": 40}
        for n, each in enumerate(accuracies)
    ]
    found = {f"target/{name}": value for name, value in curve[-1].items()} | {"target/curve": curve}
    found |= {"target/classes": ["a", "b"], "target/data": {"fingerprint": "f"}, "target/over": "repeats", **numbers}
    make_run(root / algo, f"algo={algo}", choices={"algo": algo, "target": "digits"}, result=found)


def test_approaches_to_a_target_have_a_joint_learning_curve(tmp_path: Path) -> None:
    with_target(tmp_path, "maml", 0.4, 0.6, 0.7)
    with_target(tmp_path, "protonet", 0.5, 0.55, 0.8, half=None)
    (section,) = sections(tmp_path)
    table = tables.target_curve(section)
    assert table is not None
    assert table.headings == ["algo", "5 images", "10 images", "20 images"]
    assert table.rows == [
        ["maml", "40.00% ± 10.00%", "60.00% ± 10.00%", "70.00% ± 10.00%"],
        ["protonet", "50.00%", "55.00%", "80.00%"],
    ]
    assert table.best == {(1, 1), (0, 2), (1, 3)}
    assert {"target_curves"} <= {drawing.name for drawing in figures.draw([section])}
    (root := tmp_path / "one").mkdir()
    with_target(root, "maml", 0.4)
    (section,) = sections(root)
    assert tables.target_curve(section) is None
    assert [drawing.name for drawing in figures.draw([section])] == ["cost"]


def test_an_interval_over_other_things_than_its_heading_says_so(tmp_path: Path) -> None:
    """Of repeats that all agree it is over the test images of one."""
    for algo, agree in (("maml", True), ("protonet", False)):
        same = {"acc": 0.5, "acc_ci95": 0.1, "test_images": 40, "over": "repeats"}
        curve = [{**same, "train_images": n, "agree": n == 10 and agree} for n in (5, 10)]
        last = {f"target/{name}": value for name, value in curve[-1].items()}
        with_target(tmp_path, algo, 0.5, **last, **{"target/curve": curve})
    (section,) = sections(tmp_path)
    table = tables.section_table(section)
    place = table.headings.index("± over repeats")
    assert [cells[place] for cells in table.rows] == ["10.00% over test images", "10.00%"]
    assert "agree, over the test images of one" in tables.explained([table])["± over repeats"]
    points = tables.target_curve(section)
    assert points is not None
    assert [cells[1:] for cells in points.rows] == [
        ["50.00% ± 10.00%", "50.00% ± 10.00% over test images"],
        ["50.00% ± 10.00%", "50.00% ± 10.00%"],
    ]
    (drawing,) = (each for each in figures.draw([section]) if each.name == "target_curves")
    assert ", up to 10 training images" in drawing.caption
    report.write([tmp_path], tmp_path / "report", "agree")
    page = (tmp_path / "report" / "index.html").read_text()
    for over in ("repeats", "test images"):  # in the list of runs
        assert page.count(f'<td class="number">10.00% over {over}</td>') == 1
    kept = re.findall(r'<th scope="col" class="number kept">([^<]*)</th>', page)
    assert kept == ["accuracy", "10 images"]  # in sight however narrow the page is


def test_runs_on_vectors_of_an_encoder_are_compared_with_those_on_the_items(tmp_path: Path) -> None:
    """Test images and repeats are the same; the encoder is a part of the method."""
    with_target(tmp_path / "target", "maml", 0.4, 0.6)
    vectors = {"fingerprint": "of vectors", "before_encoding": "f"}
    with_target(tmp_path / "target", "protonet", 0.5, 0.55, **{"target/data": vectors})
    assert [len(section.rows) for section in sections(tmp_path / "target")] == [2]
    for algo, data in (("maml", {}), ("protonet", {"before_encoding": "f", "fingerprint": "of vectors"})):
        data = {"fingerprint": "f", "classes": {"train": 3}, **data}
        make_run(
            tmp_path / "test" / algo, f"algo={algo}", scores=[0.5, 1], choices={"algo": algo}, result={"data": data}
        )
    assert [len(section.rows) for section in sections(tmp_path / "test")] == [2]


def divided(root: Path, divisions: dict[str, dict[str, float]], **more: Any) -> None:
    """Runs of methods on divisions of one data set, each with another fingerprint, in another order than that of their names."""
    for number, (name, methods) in enumerate(reversed(divisions.items())):
        for algo, mean in methods.items():
            words = [f"algo={algo}", f"data.root=texts/few_shot/{name}"]
            make_run(
                root / f"{number}-{algo}-{more.get('shots', 1)}", *words, scores=[mean - 0.1, mean + 0.1], fingerprint=f"f{number}",
                choices={"algo": algo}, config={"data": {"root": f"texts/few_shot/{name}"}}, **more,
            )  # fmt: skip


def test_divisions_of_a_data_set_have_their_names_and_a_mean_with_an_interval(tmp_path: Path) -> None:
    means = {
        "01": {"maml": 0.5, "protonet": 0.4},
        "02": {"maml": 0.6, "protonet": 0.7},
        "10": {"maml": 0.4, "protonet": 0.5},
    }
    divided(tmp_path, means)
    found = sections(tmp_path)
    assert [section.title.rpartition(", ")[2] for section in found] == ["root 01", "root 02", "root 10"]
    assert all(section.columns == ["algo"] for section in found)
    table = tables.overview(found)
    assert table is not None
    assert table.headings == ["algo", "root 01", "root 02", "root 10", "mean ± over divisions", "mean rank"]
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom
    assert table.rows[0] == ["maml", "50.00%", "60.00%", "40.00%", f"50.00% ± {half:.2%}", "1.67"]
    assert table.rows[1][-1] == "1.33"
    assert tables.DIVISIONS in tables.explained([table])


def test_a_method_that_lacks_a_division_has_no_mean(tmp_path: Path) -> None:
    divided(tmp_path, {"01": {"maml": 0.5, "protonet": 0.4}, "02": {"maml": 0.6}})
    table = tables.overview(sections(tmp_path))
    assert table is not None
    assert [row[-1] for row in table.rows] == [row[3] for row in table.rows]
    assert table.rows[1] == ["protonet", "40.00%", "", ""]
    assert table.rows[0][3].startswith("55.00% ± ")


def test_divisions_at_several_shots_have_a_mean_each(tmp_path: Path) -> None:
    for shots in (1, 5):
        divided(tmp_path, {"01": {"maml": 0.5}, "02": {"maml": 0.6 + shots / 50}}, shots=shots)
    table = tables.overview(sections(tmp_path))
    assert table is not None
    assert [cell.partition(" ± ")[0] for cell in table.rows[0][-2:]] == ["56.00%", "60.00%"]
    assert table.headings[-2:] == ["5-way 1-shot: mean ± over divisions", "5-way 5-shot: mean ± over divisions"]
    assert tables.DIVISIONS in tables.explained([table])


def test_divisions_that_no_key_tells_apart_are_numbered(tmp_path: Path) -> None:
    for number in (1, 2):
        make_run(tmp_path / str(number), "algo=maml", scores=[0.4, 0.6], fingerprint=f"f{number}")
    assert [section.title.rpartition(", ")[2] for section in sections(tmp_path)] == ["data 1", "data 2"]


def test_subsets_of_a_target_have_a_mean_and_numbers_of_repeats_are_apart(tmp_path: Path) -> None:
    """Also at several numbers of training images, given one by one."""
    for images in (10, 20):
        for subset, accuracy in ((0, 0.5), (1, 0.6)):
            found = {
                "target/acc": accuracy,
                "target/acc_ci95": 0.1,
                "target/classes": ["a", "b"],
                "target/over": "repeats",
            }
            found |= {"target/data": {"fingerprint": "f"}, "target/train_images": images, "target/test_images": 40}
            config = {"target": {"subset_seed": subset, "repeats": 2, "train_images": images}}
            words = [f"target.{key}={value}" for key, value in config["target"].items()]
            make_run(tmp_path / f"{images}{subset}", *words, choices={"target": "digits"}, config=config, result=found)
    config = {"target": {"subset_seed": 0, "repeats": 5, "train_images": 10}}
    words = [f"target.{key}={value}" for key, value in config["target"].items()]
    numbers = {**found, "target/train_images": 10}
    make_run(tmp_path / "more", *words, choices={"target": "digits"}, config=config, result=numbers)
    found = sections(tmp_path)
    assert [section.title for section in found] == [
        f"digits as the target, {images} training images, 40 test images, 2 repeats, subset_seed {subset}"
        for images in (10, 20) for subset in (0, 1)
    ][:2] + ["digits as the target, 10 training images, 40 test images, 5 repeats, subset_seed 0"] + [
        f"digits as the target, 20 training images, 40 test images, 2 repeats, subset_seed {subset}" for subset in (0, 1)
    ]  # fmt: skip
    assert {column for section in found for column in section.columns} == set()
    table = tables.overview(found)
    assert table is not None
    means = {heading: cell for heading, cell in zip(table.headings, table.rows[0], strict=True) if "over" in heading}
    assert [cell.partition(" ± ")[0] for cell in means.values()] == ["55.00%", "55.00%"]


def test_the_same_weights_have_one_colour_and_name_on_each_of_several_data_sets(tmp_path: Path) -> None:
    """A set that was trained on is tested on its held-out classes, and is another set of tasks than all of its classes."""
    classes = {"digits": ("all 10 classes", "its 2 test classes, since it is trained on too")}
    classes["glyphs"] = ("all 1472 classes", "its 289 test classes, since it is trained on too")
    task, bins = {"ways": 5, "shots": 1, "queries": 15}, [{"count": 20, "confidence": 0.5, "accuracy": 0.4}]
    for source in classes:
        protocol: dict[str, Any] = {"norm": "batch", "transductive": False, "test": task, "split": None, "sets": {}}
        found: dict[str, Any] = {"test/acc": 0.5, "test/acc_ci95": 0.1, "protocol": protocol, "test/sets": {}}
        for name, told in classes.items():
            protocol["sets"][name] = {"task": task, "classes": told[name == source]}
            found["test/sets"][name] = {"fingerprint": f"{name}{name == source}", "classes": {"test": 2}}
            found |= {f"test/{name}/acc": 0.5, f"test/{name}/acc_ci95": 0.1, f"test/{name}/calibration": {"bins": bins}}
        make_run(tmp_path / source, f"data={source}", choices={"data": source}, result=found)
    found_sections = sections(tmp_path)
    assert [section.title.rpartition(", ")[2] for section in found_sections] == [
        "all 10 classes", "its 2 test classes", "all 1472 classes", "its 289 test classes",
    ]  # fmt: skip
    assert [tables.section_table(section).headings[0] for section in found_sections] == ["trained on"] * 4
    lines = csv.DictReader(io.StringIO(rendering.as_csv(found_sections)))
    assert [(line["data"], line["trained_on"]) for line in lines] == [
        ("digits", "glyphs"), ("digits", "digits"), ("glyphs", "digits"), ("glyphs", "glyphs"),
    ]  # fmt: skip
    made = figures._reliability(found_sections)
    assert made is not None
    assert [text.get_text() for text in made[2].legends[0].get_texts()] == ["glyphs", "digits"]
    drawn = [axes.lines[0].get_color() for axes in made[2].axes]
    assert drawn == [figures.COLOURS[at] for at in (0, 1, 1, 0)]


def test_a_name_in_a_figure_is_of_the_same_settings_in_each_panel(tmp_path: Path) -> None:
    for shots, steps in ((1, 10), (5, 10), (5, 50)):
        words, config = [f"train.steps={steps}"], {"train": {"steps": steps}}
        make_run(tmp_path / f"{shots}{steps}", *words, scores=[0.5, 1], shots=shots, config=config, curve=[0.1, 0.2])
    made = figures._learning_curves(sections(tmp_path))
    assert made is not None
    assert sorted(text.get_text() for text in made[2].legends[0].get_texts()) == ["steps 10", "steps 50"]


def test_a_reliability_diagram_has_points_of_enough_predictions(tmp_path: Path) -> None:
    bins = [
        {"count": count, "confidence": n / 15 - 0.01, "accuracy": n / 20}
        for n, count in ((5, 6), (9, 6), (15, 30), (3, 2))
    ]
    merged = figures._merged({n: np.array([each["count"], 0.0, 0.0]) for n, each in enumerate(bins)})
    assert merged[:, 0].tolist() == [12, 32]
    assert figures._merged({3: np.array([2.0, 1, 1])}).tolist() == [[2, 1, 1]]
    with_target(tmp_path / "target", "maml", 0.5, **{"target/calibration": {"bins": bins}})
    make_run(tmp_path / "test" / "maml", "algo=maml", scores=[0.5, 1], result={"test/calibration": {"bins": bins}})
    for name in ("target", "test"):
        assert "reliability" in {drawing.name for drawing in figures.draw(sections(tmp_path / name))}


def test_labels_tell_groups_apart_in_few_words(tmp_path: Path) -> None:
    """What a method does not have, or all of a setting have alike, is not in its label; the table has the latter."""
    for shots, algo, rate in ((1, "maml", 0.1), (1, "maml", 0.5), (1, "protonet", None), (5, "protonet", None)):
        config = {"algo": {} if rate is None else {"inner_lr": rate}, "train": {"steps": 10 * shots}}
        words = [f"algo={algo}", f"train.steps={10 * shots}", *([f"algo.inner_lr={rate}"] if rate else [])]
        folder = tmp_path / f"{algo}{rate}{shots}"
        make_run(folder, *words, scores=[0.5, 1], shots=shots, choices={"algo": algo}, config=config)
    first, second = sections(tmp_path)
    assert [row.label for row in first.rows] == ["maml, inner_lr 0.1", "maml, inner_lr 0.5", "protonet"]
    assert first.columns == ["algo", "algo.inner_lr", "train.steps"]
    assert [cells[:3] for cells in tables.section_table(first).rows][1:] == [
        ["maml", "0.5", "10"],
        ["protonet", "–", "10"],
    ]
    assert second.columns == ["algo", "train.steps"]
    assert second.rows[0].label == "protonet, steps 50"


def test_what_a_group_lacks_is_not_in_the_labels_where_the_rest_tells(tmp_path: Path) -> None:
    """Of an approach without a source the table says so, and no legend names the source's settings."""
    for algo, steps in (("scratch", None), ("maml", 10), ("protonet", 10)):
        words = [f"algo={algo}", *([f"train.steps={steps}"] if steps else [])]
        config = {"train": {} if steps is None else {"steps": steps}}
        make_run(tmp_path / algo, *words, scores=[0.5, 1], choices={"algo": algo}, config=config)
    (section,) = sections(tmp_path)
    assert {row.label for row in section.rows} == {"scratch", "maml", "protonet"}
    assert section.columns == ["algo", "train.steps"]


def test_trained_only_runs_are_ranked_by_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trial in range(25):
        rate, score = trial / 10, -math.inf if trial == 7 else 0.5 + trial % 5 / 10 + trial / 1000
        config = {"algo": {"inner_lr": rate}}
        make_run(
            tmp_path / str(trial), f"algo.inner_lr={rate}", config=config, result={"val/score": score}, curve=[0.1, 0.5]
        )
    assert report.write([tmp_path], tmp_path / "report", "search") is not None
    printed = capsys.readouterr().out
    found = re.findall(r"│ ([\d.]+) +│ +1 │ +([\d.]+)% │", printed)
    assert [rate for rate, _ in found[:3]] == ["2.4", "1.9", "1.4"]
    assert [float(score) for _, score in found] == sorted((float(score) for _, score in found), reverse=True)
    assert "and 5 more" in printed
    (section,) = sections(tmp_path)
    assert [len(section.rows), section.rows[0].best, section.rows[-1].label] == [25, True, "inner_lr 0.7"]
    assert "inf" not in (tmp_path / "report" / "table.md").read_text()


def test_a_mixed_folder_has_both_kinds_of_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "tested", scores=[0.5, 1])
    make_run(tmp_path / "trained", measure="mse", fingerprint="f2")
    assert [tables.section_table(section).headings[2] for section in sections(tmp_path)] == [
        "accuracy",
        "validation error (median)",
    ]


def test_transductive_runs_are_marked_where_some_are(tmp_path: Path) -> None:
    protocol = {"transductive": True, "test": {"ways": 5, "shots": 1, "queries": 15}, "split": None}
    make_run(tmp_path / "a", "algo=maml", scores=[0.5, 1], choices={"algo": "maml"}, result={"protocol": protocol})
    make_run(tmp_path / "b", "algo=protonet", scores=[0.5, 1])
    table = tables.section_table(sections(tmp_path)[0])
    assert [cells[table.headings.index("transductive")] for cells in table.rows] == ["yes", "no"]


def test_a_narrow_screen_has_whole_words_of_what_tells_the_rows_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    headings = ["data", "approach", "train.max_seconds", "train.validate_episodes", "seeds", "accuracy", "± over seeds"]
    rows = [
        ["–", "scratch", "–", "–", "1", "88.89%", "one seed", "70.59%", "the best"],
        ["glyphs", "linear_probe", "3", "10", "1", "63.89%", "one seed", "35.30%", "−25.00 ± 105.89, p 0.410"],
        ["glyphs", "pretrained_probe", "3", "10", "1", "87.50%", "one seed", "88.24%", "−1.39 ± 17.65, p 0.500"],
    ]
    table = tables.ReportTable(
        "a", [*headings, "± over repeats", "minus the best, over repeats (points)"], rows, 4, {(0, 5)}
    )
    fitting, left_out = rendering.narrowed(table, 80)
    assert left_out == ["seeds", "± over seeds", "train.validate_episodes", "train.max_seconds"]
    assert [fitting.rows[row][column] for row, column in fitting.best] == ["88.89%"]
    assert rendering.narrowed(table, 200) == (table, [])
    assert (
        rendering.narrowed(table, 20)[0].headings[0] == "approach"
    )  # what tells rows apart stays, whatever the screen
    monkeypatch.setattr(rendering.sys, "stdout", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    rendering.show([table])
    shown = terminal.getvalue()
    for word in ("approach", "linear_probe", "pretrained_probe", "accuracy", "87.50%", "−25.00"):
        assert word in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert max(map(len, plain.splitlines()[:-1])) <= 80
    assert shown.endswith(
        "for want of room without seeds, ± over seeds, train.validate_episodes, train.max_seconds, which the files below have\n"
    )


def test_a_narrow_screen_has_no_column_in_which_nothing_was_published() -> None:
    def table(*last: str) -> tables.ReportTable:
        return tables.ReportTable("t", ["algo", "accuracy", "published"], [["a", "90%", cell] for cell in last], 1)

    assert rendering.without_unpublished(table("none: own data", "")).headings == ["algo", "accuracy"]
    assert rendering.without_unpublished(table("none: own data", "")).rows == [["a", "90%"]] * 2
    known = table("none: own data", "98.7 % (Finn et al. 2017)")
    assert rendering.without_unpublished(known) is known


def test_published_values_are_of_choices_that_exist_and_of_one_entry_each() -> None:
    entries = yaml.safe_load((ROOT / "metarun" / "report" / "published.yaml").read_text())
    keys = [
        json.dumps({key: entry[key] for key in sorted(entry) if key not in ("value", "source")}) for entry in entries
    ]
    assert len(set(keys)) == len(keys) > 38
    groups = {"algo", "data", "backbone", "encoder", "recipe", "unsupervised", "wrapper"}
    for entry in entries:
        assert entry["source"]
        assert {"data", "value"} <= entry.keys() <= {*groups, "ways", "shots", "task", "value", "source"}
        for group in groups & entry.keys():
            assert (ROOT / "conf" / group / f"{entry[group]}.yaml").is_file()
    choices = {"algo": "maml", "data": "omniglot", "backbone": "conv4", "recipe": "meta"}
    assert str(published.find(choices, {"ways": 20, "shots": 5})) == "98.9 ± 0.2 % (Finn et al. 2017, table 1)"
    assert published.find(choices, {"ways": 20, "shots": 4}) is None
    assert published.find({**choices, "backbone": "resnet12"}, {"ways": 20, "shots": 5}) is None


# The figures.


def test_line_colours_are_seen_on_both_grounds() -> None:
    """WCAG's contrast of at least 3 with white and with the dark ground of the page."""

    def luminance(colour: str) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
        return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))

    grounds = re.findall(r"--ground: (#\w+)", (ROOT / "metarun" / "report" / "style.html").read_text())
    assert len(grounds) == 2
    for colour in figures.COLOURS:
        for ground in grounds:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)
    assert len(set(figures.COLOURS)) == len(figures.MARKERS) == 10


def test_band_of_curves(tmp_path: Path) -> None:
    """The mean, lowest and highest of two seeds, of which one began later, stopped earlier and validated at other steps."""
    for seed, points in enumerate(({10: 0.2, 20: 0.4, 30: 0.6}, {15: 0.4, 20: 0.8})):
        folder = make_run(tmp_path / str(seed), seed=seed)
        lines = [json.dumps({"step": step, "val/acc": value, "train/loss": 1.0}) for step, value in points.items()]
        (folder / "metrics.jsonl").write_text(
            "\n".join([*lines, '{"step": 40, "val/acc": NaN}', '{"step": 50, "val/a'])
        )
    (group,) = collect([tmp_path], tmp_path / "report").groups
    band = figures._band(group, lambda run: run.curve(("val/acc",)))
    assert band is not None
    np.testing.assert_allclose(band, [[15, 20], [0.35, 0.6], [0.3, 0.4], [0.4, 0.8]])


def test_many_groups_keep_a_short_legend(tmp_path: Path) -> None:
    for number in range(14):
        config = {"algo": {"inner_lr": number}}
        make_run(tmp_path / str(number), f"algo.inner_lr={number}", scores=[0.5, 1], config=config, curve=[0.1, 0.2])
    made = figures._learning_curves(sections(tmp_path))
    assert made is not None
    shown = [text.get_text() for text in made[2].legends[0].get_texts()]
    assert len(shown) == 11
    assert shown[-1] == "others"
    assert len(made[2].axes[0].lines) == 14


def with_curves(folder: Path, *words: str, factor: float = 1.0, **options: Any) -> Path:
    """A tested run whose method measured two losses, of which one spans much, and an entropy."""
    curves = {
        "loss_learned": {"mean": [2.0 * factor, 0.2 * factor, 0.02 * factor], "ci95": [0.3, 0.1, 0.04]},
        "loss_sgd": {"mean": [2.0 * factor, 1.5 * factor, 1.0 * factor], "ci95": [0.3, 0.2, 0.1]},
        "entropy": {"mean": [1.0, math.nan, 3.0], "ci95": [0.1, math.nan, 0.1]},
    }
    return make_run(folder, *words, scores=[0.5, 1], result={"test/curves": curves}, **options)


def test_curves_of_a_method_have_a_panel_for_each_quantity(tmp_path: Path) -> None:
    """Lines and bands are those of result.json; the mean over two seeds, whose errors are independent."""
    for seed in (0, 1):
        with_curves(tmp_path / f"a{seed}", "algo=one", seed=seed, factor=1 + seed, choices={"algo": "one"})
    with_curves(tmp_path / "b", "algo=two", choices={"algo": "two"})
    make_run(tmp_path / "none", "algo=three", scores=[0.5, 1], choices={"algo": "three"})
    made = figures._test_curves(sections(tmp_path))
    assert made is not None
    panels = [axes for axes in made[2].axes if axes.get_visible()]
    assert [(axes.get_title(), axes.get_ylabel(), axes.get_yscale()) for axes in panels] == [
        ("one", "loss", "log"), ("one", "entropy", "linear"), ("two", "loss", "log"), ("two", "entropy", "linear"),
    ]  # fmt: skip
    assert [text.get_text() for text in made[2].legends[0].get_texts()] == ["learned", "sgd", "entropy"]
    learned, sgd = panels[0].lines
    np.testing.assert_allclose(learned.get_ydata(), [3, 0.3, 0.03])
    np.testing.assert_allclose(sgd.get_ydata(), [3, 2.25, 1.5])
    assert learned.get_color() == panels[2].lines[0].get_color() != sgd.get_color()
    band = panels[0].collections[1].get_paths()[0].vertices  # of sgd
    half = np.array([0.3, 0.2, 0.1]) / math.sqrt(2)
    for x in range(3):
        for edge in (sgd.get_ydata()[x] - half[x], sgd.get_ydata()[x] + half[x]):
            assert np.isclose(band[band[:, 0] == x][:, 1], edge).any()
    assert panels[0].get_ylim()[0] > 0


def test_curves_are_in_the_report_of_runs_that_have_them(tmp_path: Path) -> None:
    for number in range(9):
        config = {"algo": {"inner_lr": number}}
        with_curves(tmp_path / str(number), f"algo.inner_lr={number}", config=config)
    found = report.write([tmp_path], tmp_path / "report", "curves")
    assert found is not None
    assert "of 18 panels the first 8" in found.read_text()
    with Image.open(found.parent / "test_curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_files_of_figures(written: Path) -> None:
    for path in written.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 250
            assert np.asarray(picture.convert("L")).std() > 5
    for path in written.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("}svg")
        assert not list(root.iter("{http://www.w3.org/2000/svg}text"))  # paths: they need no font


# The page.


class Page(html.parser.HTMLParser):
    """The elements of a page, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "index.html").read_text())


def test_page_is_whole_in_itself(written: Path, page: Page) -> None:
    """Every address is a file beside it, a run folder, or a place in the page; nothing is fetched."""
    assert page.open == []
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items()
        if name.rpartition(":")[2] in ("href", "src", "srcset", "data", "action", "poster")
    ]  # fmt: skip
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    assert sum(not (address or "").startswith("#") for address in addresses) >= 3 + 6 + 8
    for address in addresses:
        assert address is not None
        if address.startswith("#"):
            assert address[1:] in ids
        else:
            assert (written / unquote(address)).exists(), address
    text = (written / "index.html").read_text()
    assert set(re.findall(r"url\(#?([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"@import|https?://|<script|<link|<img", text)
    assert {tag for tag, _ in page.elements} >= {"svg", "table", "main"}


def test_page_follows_the_readers_colours(page: Page, written: Path) -> None:
    text = (written / "index.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert figures.INK not in text
    assert text.count("currentColor") > 20
    drawn = {colour for colour in re.findall(r"(?:fill|stroke): (#\w+)", text) if colour not in figures.COLOURS}
    assert drawn <= {figures.FAINT}
    assert sum(tag == "svg" for tag, _ in page.elements) == 3


def test_page_tells_everything(page: Page) -> None:
    words = re.sub(r"\s+", " ", " ".join(page.texts))
    for part in (
        "a <grid> & more", "8 finished runs in 4 groups, 1 not finished", "unfinished run", "commit 0123456789ab",
        "torch 2.9.0", "metarun algo=maml task.shots=5 seed=1", "98.8 % (Snell et al. 2017, table 1)", "Holm-adjusted",
        "of these trained weights", "the method with this budget", "minus the best, over seeds (points)",
    ):  # fmt: skip
        assert part in words, part


def test_a_run_on_several_data_sets_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the numbers of runs and of facts, in the commands, and where another replaces it."""
    task = {"ways": 5, "shots": 1, "queries": 15}
    for name, algo, torch in (("a", "maml", "2.9.0"), ("b", "protonet", "2.9.1"), ("b~2", "protonet", "2.9.1")):
        protocol: dict[str, Any] = {"norm": "batch", "transductive": False, "test": task, "split": None, "sets": {}}
        found: dict[str, Any] = {"test/acc": 0.5, "test/acc_ci95": 0.1, "protocol": protocol, "test/sets": {}}
        for one in ("cub", "fungi"):
            protocol["sets"][one] = {"task": task, "classes": "all"}
            found["test/sets"][one] = {"fingerprint": one, "classes": {"test": 2}}
            found |= {f"test/{one}/acc": 0.5, f"test/{one}/acc_ci95": 0.1}
        found["versions"] = {"torch": torch}
        folder = make_run(tmp_path / name, f"algo={algo}", choices={"algo": algo}, result=found)
        os.utime(folder / "result.json", (1000, 1000 + len(name)))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("seed: 0\n")
    made = report.write([tmp_path], tmp_path / "report", "sets")
    assert made is not None
    told, page = capsys.readouterr(), made.read_text()
    assert "not finished (at work, stopped, pruned or failed): 1 of 4 runs" in told.out
    assert told.err.count("left out, ") == 1
    assert "2 finished runs in 4 groups, 1 not finished." in page
    assert "torch 2.9.0 (1 run), 2.9.1 (1 run)" in page
    assert page.count("<li><code>metarun algo=maml seed=0</code></li>") == 1


def test_commands_that_go_on_with_another_run_say_which(tmp_path: Path) -> None:
    """They stand behind those that need nothing, and none of them is said to start from an empty folder."""
    trained = make_run(tmp_path / "runs" / "b", "algo=maml", scores=[0.5, 1], choices={"algo": "maml"})
    make_test(tmp_path / "runs" / "a", trained, scores=[0.4, 1], shots=5)
    config = {"encoder": {"from": str(trained)}, "backbone": {"from": None}}
    make_run(tmp_path / "runs" / "c", "encoder=run", scores=[0.5, 1], choices={"encoder": "run"}, config=config)
    made = report.write([tmp_path / "runs"], tmp_path / "report", "commands")
    assert made is not None
    alone, _, further = (
        made.read_text().partition("from an empty folder:")[2].partition("goes on with what another run left")
    )
    assert re.findall(r"<li><code>(.*?)</code>", alone) == ["metarun algo=maml seed=0"]
    assert re.findall(r"<li><code>metarun (\S+).*?</code> needs <code>(.*?)</code>", further) == [
        ("encoder=run", str(trained)), ("recipe=test", str(trained)),
    ]  # fmt: skip


def test_page_escapes_what_runs_are_called(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    for value in (bad, "x"):
        config = {"data": {"root": value}}
        make_run(tmp_path / f"a&{len(value)}", f"data.root={value}", scores=[0.5, 1], config=config, curve=[0.1, 0.2])
    found = report.write([tmp_path], tmp_path / "report", bad)
    assert found is not None
    text = found.read_text()
    assert "<script" not in text
    assert Page(text).open == []
    assert "&lt;script" in (tmp_path / "report" / "table.md").read_text()


def test_a_later_report_leaves_no_figure_of_an_earlier_one(tmp_path: Path) -> None:
    grid(tmp_path, seeds=1)
    report.write([tmp_path], tmp_path / "report", "first")
    assert (tmp_path / "report" / "inner_steps.svg").is_file()
    for name in figures.NAMES:  # of which an earlier report may have had each
        (tmp_path / "report" / f"{name}.png").touch()
    for folder in tmp_path.glob("algo=maml*"):
        (folder / "result.json").unlink()
    report.write([tmp_path], tmp_path / "report", "second")
    assert not list((tmp_path / "report").glob("inner_steps*"))
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"cost", "learning_curves"}
    assert (tmp_path / "report" / "cost.svg").is_file()


def test_one_seed_and_one_run_have_no_nan(tmp_path: Path) -> None:
    make_run(tmp_path / "only", scores=[0.5, 0.5], curve=[0.5])
    found = report.write([tmp_path], tmp_path / "report", "only")
    assert found is not None
    for name in ("index.html", "table.md", "table.tex", "table.csv"):
        assert not re.search(r"\bnan\b|\binf\b|None", (found.parent / name).read_text())
    assert "one seed" in found.read_text()


# The command.


def test_command_needs_finished_runs(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "glyphs").mkdir(parents=True)
    (tmp_path / "outputs" / "glyphs" / "config.yaml").write_text("seed: 0\n")
    given = {
        "": "recipe=report: needs the folder of the runs to report on; add runs=outputs/NAME",
        f"runs={tmp_path}/outputs/glyps": (
            f"runs={tmp_path}/outputs/glyps: there is no such folder; did you mean {tmp_path}/outputs/glyphs?"
        ),
        f"runs={tmp_path}/outputs/glyphs": (
            f"runs={tmp_path}/outputs/glyphs: no finished test lies there, only 1 unfinished run"
        ),
    }
    for word, message in given.items():
        done = metarun("recipe=report", *([word] if word else []))
        assert (done.status, done.err, done.out) == (2, f"metarun: {message}\n", "")
    assert not list(tmp_path.rglob("report"))


def test_command_takes_several_folders_and_names_what_it_left_out(tmp_path: Path) -> None:
    for name in ("maml", "protonet"):
        make_run(tmp_path / name / "default", f"algo={name}", scores=GENERATOR.random(20), choices={"algo": name})
    (make_run(tmp_path / "maml" / "broken") / "result.json").write_text("{")
    done = metarun("recipe=report", f"runs=[{tmp_path}/maml,{tmp_path}/protonet]", f"outputs={tmp_path}")
    assert done.status == 0
    assert done.err.startswith(f"metarun: {tmp_path}/maml/broken/result.json: cannot be used (")
    assert done.err.count("\n") == 1
    assert re.search(r"│ maml +│ +1 │", done.out)
    assert re.search(r"│ protonet +│ +1 │", done.out)
    assert done.out.endswith(f"report   {tmp_path}/report/index.html\n")
    assert (tmp_path / "report" / "index.html").is_file()


def test_command_imports_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run", scores=[0.5, 1], curve=[0.1, 0.2])
    code = (
        "import sys; from metarun.cli import main\n"
        f"sys.argv = ['metarun', 'recipe=report', 'runs={tmp_path}']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(sorted({'torch', 'tensorboard', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("index.html\n[]\n")


def session_groups(logdir: Path) -> list[Any]:
    """What TensorBoard's hparams tab shows of a folder."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(logdir))))
    ctx = RequestContext()
    known, others = context.hparams_metadata(ctx, ""), context.hparams_from_data_provider(ctx, "", 1000)
    experiment = context.experiment_from_metadata(ctx, "", True, known, others)
    columns = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS], start_index=0, slice_size=100, col_params=columns
    )
    return list(list_session_groups.Handler(ctx, context, "", request).run().session_groups)


def test_toy_runs_from_the_command_to_the_report_and_to_tensorboard(tmp_path: Path) -> None:
    """Two methods, two seeds: the report's numbers are those of result.json, and the hparams tab shows the same runs."""
    for algo in ("maml", "fomaml"):
        for seed in (0, 1):
            words = [
                f"algo={algo}",
                *SINUSOID[1:],
                "train.validate_every=2",
                "train.validate_episodes=4",
                f"seed={seed}",
            ]
            assert metarun(*words, "name=toy", f"outputs={tmp_path}").status == 0
    done = metarun("recipe=report", f"runs={tmp_path}/toy")
    assert done.status == 0, done.err
    folders = sorted(path.parent for path in tmp_path.glob("toy/*/result.json"))
    assert len(folders) == 4
    with open(tmp_path / "toy" / "report" / "table.csv", newline="") as file:
        lines = {line["algo"]: line for line in csv.DictReader(file)}
    for algo in ("maml", "fomaml"):
        means = [stored_result(folder)["test/mse"] for folder in folders if folder.name.startswith(f"algo-{algo}_")]
        assert float(lines[algo]["mean"]) == pytest.approx(np.mean(means), rel=1e-12)
        assert lines[algo]["seeds"] == "0 1"
    best, other = sorted(lines.values(), key=lambda line: float(line["mean"]))
    assert (best["best"], best["pairs_over_episodes"], other["pairs_over_episodes"]) == ("1", "", "16")
    assert "| maml " in (tmp_path / "toy" / "report" / "table.md").read_text()
    sessions = {group.name: group for group in session_groups(tmp_path / "toy")}
    assert set(sessions) == {folder.name for folder in folders}
    for folder in folders:
        group = sessions[folder.name]
        assert group.hparams["seed"].number_value == int(re.search(r"seed-(\d)", folder.name)[1])
        metrics = {value.name.tag: value.value for value in group.metric_values}
        assert metrics["hparams/test"] == pytest.approx(stored_result(folder)["test/mse"], rel=1e-6)


def test_tensorboard_shows_runs_of_different_kinds(tmp_path: Path) -> None:
    """One trained only, with a setting that the other does not have: neither hides what the other has."""
    for name, settings, test, validation in (
        ("a", {"seed": 1, "algo.distance": "cosine", "train.patience": None, "resume": True}, None, 0.75),
        ("b", {"seed": 2, "algo.inner_lr": 0.5, "train.patience": 3, "resume": True}, 0.5, 0.625),
    ):
        logger = RunLogger(tmp_path / name)
        logger.hparams(settings, test, validation)
        logger.close()
        assert len(list((tmp_path / name).iterdir())) == 1
    first, second = sorted(session_groups(tmp_path), key=lambda group: str(group.name))
    assert first.hparams["algo.distance"].string_value == "cosine"
    assert second.hparams["algo.inner_lr"].number_value == 0.5
    assert first.hparams["resume"].string_value == "True"
    found = [{value.name.tag: value.value for value in group.metric_values} for group in (first, second)]
    assert found == [{"hparams/validation": 0.75}, {"hparams/test": 0.5, "hparams/validation": 0.625}]


def test_seeds_that_were_tested_on_the_same_draws_lessen_no_interval() -> None:
    """The images of a target are drawn without the run's seed: a second seed repeats the same draws."""
    assert statistics.over_same_draws([0.3, 0.5]) == pytest.approx(0.4)
    assert statistics.over_same_draws([0.3, None]) is None
    once, twice = np.array([0.1, 0.3, -0.1]), [np.array([0.1, 0.3, -0.1])] * 2
    assert statistics.paired(pooled(twice, same_draws=True)) == statistics.paired(once)
    assert statistics.paired(pooled(twice, same_draws=False)).half < statistics.paired(once).half  # type: ignore[union-attr]


def test_brackets_begin_no_length_in_latex() -> None:
    assert latex(ReportTable("", ["a"], [["[1, 5]"]], 1, set())).count(r"{[}1, 5{]}") == 1


def test_a_bar_is_a_bar_in_latex() -> None:
    assert latex(ReportTable("", ["a"], [["x|y"]], 1, set())).count(r"x\textbar{}y") == 1


def test_a_pair_of_dollars_in_a_name_is_no_mathematics(tmp_path: Path) -> None:
    for name in ("a_$x^{2$", "b_$x^{2$"):
        weights = {"backbone": {"weights": name}}
        words = [f"backbone.weights={name}"]
        make_run(tmp_path / name[0], *words, scores=GENERATOR.random(5), curve=[0.1, 0.2], config=weights)
    assert figures.draw(sections(tmp_path))


def test_names_in_letters_that_the_font_lacks_are_drawn_without_a_warning() -> None:
    figure = Figure()
    figure.suptitle("日本")
    assert figures._drawing("a", "", figure).svg


# Runs of others.


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


def test_a_result_of_others_that_cannot_be_shown_is_damaged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", scores=[0.5, 1])
    with pytest.raises(UserError, match=r"result\.json: is damaged \(it has no train/tasks_per_second\); delete it"):
        show_stored(folder)


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
