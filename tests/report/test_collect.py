"""What is compared with what in a report over many runs: which runs are found, read and grouped."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import GENERATOR, make_run, make_test, pair, sections, with_target

from metarun import files
from metarun.report import figures, listing, rendering, statistics, tables
from metarun.report.collect import collect, read
from metarun.report.run import subject as run_subject
from metarun.report.run import target_subject
from metarun.report.summary import summarise, target_points


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
    [{"fingerprint": "f1"}, {"ways": 20}, {"shots": 5}, {"config": {"data": {"within_alphabet": True}}},
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


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        (
            {"target": "digits", "transfer": "all", "approach": "fine_tuning", "algo": "baseline", "data": "glyphs"},
            "fine_tuning on digits, after baseline on glyphs\n",
        ),
        (
            {"target": "digits", "transfer": "linear_probe", "algo": "baseline", "data": "glyphs"},
            "linear_probe on digits, after baseline on glyphs\n",
        ),
        ({"target": "digits", "algo": "dann", "data": "glyphs"}, "dann on glyphs, tested on digits\n"),
        ({"algo": "maml", "data": "glyphs"}, ""),
    ],
)
def test_the_title_of_a_result_on_a_target_names_method_and_data(
    choices: dict[str, str], told: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", *(f"{key}={value}" for key, value in choices.items()), scores=[0.5, 1], choices=choices)
    assert target_subject(tmp_path / "run") == told


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


def test_weights_count_once_in_curves_however_often_they_were_tested(tmp_path: Path) -> None:
    """One was tested by two seeds, the other by one: the curves are of the mean that the table has."""
    for seed, (accuracy, tests) in enumerate(((0.4, (0, 1)), (0.8, (0,)))):
        trained = make_run(tmp_path / "trained" / str(seed), "algo=maml", seed=seed, choices={"algo": "maml"})
        points = [{"train_images": size, "acc": accuracy, "acc_ci95": accuracy / 4} for size in (5, 10)]
        found: dict[str, Any] = {"target/acc": accuracy, "target/acc_ci95": accuracy / 4, "target/over": "repeats"}
        found |= {"target/curve": points, "target/classes": ["a", "b"], "target/data": {"fingerprint": "f"}}
        found["test/curves"] = {"loss": {"mean": [accuracy], "ci95": [accuracy / 4]}}
        for test in tests:
            make_test(tmp_path / "tests" / f"{seed}{test}", trained, f"seed={test}", seed=test, result=found)
    (section,) = summarise(collect([tmp_path / "tests"], tmp_path / "report"))
    (row,) = section.rows
    assert (row.n, row.mean, row.episodes_half) == (2, pytest.approx(0.6), pytest.approx(0.15))
    for point in target_points(row.group).values():
        assert point[:2] == (pytest.approx(row.mean), pytest.approx(row.episodes_half))
    mean, half = figures._measured(row.group)["loss"]["loss"]
    assert (mean, half) == (pytest.approx(0.6), pytest.approx(math.hypot(0.1 / 4 + 0.2 / 2, 0.1 / 4)))


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


def test_how_far_a_run_is_stands_at_the_end_of_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "run", scores=[0.5, 1]) / "metrics.jsonl"
    (path.parent / "result.json").unlink()
    whole = "".join(f'{{"step": {step}, "é": 0.5}}\n' for step in range(1, 40))
    for end in ("", '{"step": 99', "\0\0\0\n", '{"loss": 1}\n', "x" * 100 + "\n"):
        path.write_text(whole + end, encoding="utf-8")
        for length in (1, 7, 64, 2**16):
            monkeypatch.setattr(files, "END", length)
            assert files.last_json_line(path) == files.read_json_lines(path)[0][-1]
    path.write_text("x\n")
    assert files.last_json_line(path) is None
    assert listing.described(path.parent).state == "begun"
    path.write_text(whole)
    monkeypatch.delattr(files, "read_json_lines")  # reads a million lines of a long training
    assert listing.described(path.parent).state.startswith("step 39")


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


def test_recipes_that_differ_are_never_one_run(tmp_path: Path) -> None:
    found = {
        "target/acc": 0.5,
        "target/acc_ci95": 0.1,
        "target/classes": ["a", "b"],
        "target/data": {"fingerprint": "f"},
    }
    for recipe in ("transfer", "target_only"):
        make_run(
            tmp_path / recipe,
            f"recipe={recipe}",
            "target=digits",
            "transfer=all",
            result=found,
            choices={"recipe": recipe, "target": "digits", "transfer": "all"},
        )
    collection = collect([tmp_path], tmp_path / "report")
    assert collection.problems == []
    assert [group.values for group in collection.groups] == [{"recipe": "target_only"}, {"recipe": "transfer"}]
