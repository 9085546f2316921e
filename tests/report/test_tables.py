"""The tables of a report: sections, learning curves of targets, means over data sets and divisions, labels."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from reported import grid, make_run, sections, with_target

from metarun import report
from metarun.report import figures, tables


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


def test_as_many_right_answers_in_other_episodes_are_a_tie(tmp_path: Path) -> None:
    # The sum over episodes of as many right answers is rounded by where they are.
    for algo, sums in (
        ("maml", (0.5694444444444444, 0.4)),
        ("protonet", (0.5694444444444443, 0.4)),
        ("baseline", (0.3, 0.2)),
    ):
        task = {"ways": 5, "shots": 1, "queries": 15}
        protocol = {"norm": "batch", "transductive": False, "test": task, "split": None}
        protocol["sets"] = {one: {"task": task, "classes": "all"} for one in ("cub", "fungi")}
        found: dict[str, Any] = {"test/acc": 0.5, "test/acc_ci95": 0.1, "protocol": protocol}
        found["test/sets"] = {one: {"fingerprint": one, "classes": {"test": 2}} for one in ("cub", "fungi")}
        for one, accuracy in zip(("cub", "fungi"), sums, strict=True):
            found |= {f"test/{one}/acc": accuracy, f"test/{one}/acc_ci95": 0.1}
        make_run(tmp_path / algo, f"algo={algo}", choices={"algo": algo}, result=found, config={"task": task})
    table = tables.overview(sections(tmp_path))
    assert table is not None
    ranks = {row[0]: row[table.headings.index("mean rank")] for row in table.rows}
    assert ranks == {"maml": "1.50", "protonet": "1.50", "baseline": "3.00"}
    assert {(table.rows[row][0], table.headings[column]) for row, column in table.best} == {
        (algo, one) for algo in ("maml", "protonet") for one in ("cub", "fungi")
    }


def test_a_grid_has_a_table_across_its_settings(tmp_path: Path) -> None:
    table = tables.overview(sections(grid(tmp_path)))
    assert table is not None
    assert table.headings == ["algo", "5-way 1-shot", "5-way 5-shot"]
    assert [cells[0] for cells in table.rows] == ["maml", "protonet"]
    assert table.best == {(1, 1), (1, 2)}
    first = sections(tmp_path)[0].rows[0]
    assert table.rows[0][1] == f"{first.mean:.2%} ± {first.seeds_half:.2%}"
    assert tables.overview(sections(tmp_path)[:1]) is None


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
    (cost,) = figures.draw([section])
    assert (cost.name, cost.caption.partition(" of a run")[0]) == ("cost", "Seconds of training and peak memory")
    for row in section.rows:  # where nothing was trained
        row.seconds = None
    (cost,) = figures.draw([section])
    assert cost.caption.startswith("Peak memory of a run")


def test_what_accuracy_does_not_tell_of_a_target(tmp_path: Path) -> None:
    def told(wrong: int) -> dict[str, Any]:
        found = {
            "balanced_acc": 0.5 + wrong / 100,
            "balanced_acc_ci95": 0.1,
            "auroc": 0.75,
            "auroc_ci95": 0.05,
            "macro_f1": 0.4,
        }
        return {f"target/{name}": value for name, value in found.items()} | {
            "target/confusion": [[90 - wrong, 10 + wrong], [0, 10]], "target/classes": ["ill", "well"],
        }  # fmt: skip

    with_target(tmp_path, "maml", 0.4, 0.6, **told(0))
    with_target(tmp_path, "protonet", 0.5, 0.55, **told(10))
    (section,) = sections(tmp_path)
    table = tables.target_measures(section)
    assert table is not None
    assert table.headings == ["algo", "balanced accuracy", "AUROC", "mixed up most"]
    assert table.rows == [
        ["maml", "50.00% ± 10.00%", "75.00% ± 5.00%", "ill for well, 10.0%"],
        ["protonet", "60.00% ± 10.00%", "75.00% ± 5.00%", "ill for well, 20.0%"],
    ]
    assert {"balanced accuracy", "AUROC", "mixed up most"} <= set(tables.explained([table]))
    report.write([tmp_path], tmp_path / "report", "told")
    assert "ill for well, 20.0%" in (tmp_path / "report" / "index.html").read_text()


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


def test_texts_of_a_target_are_called_so(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        "target/train_images": 10,
        "target/test_images": 40,
        "target/data": {"fingerprint": "f", "items": "text"},
    }
    with_target(tmp_path, "maml", 0.4, 0.6, **numbers)
    (section,) = sections(tmp_path)
    assert section.title == "digits as the target, 10 training texts, 40 test texts"
    table = tables.target_curve(section)
    assert table is not None
    assert "accuracy by training texts" in table.title
    assert table.headings[1:] == ["5 texts", "10 texts"]
    (drawing,) = (each for each in figures.draw([section]) if each.name == "target_curves")
    assert "number of training texts" in drawing.caption
    assert ", up to 10 training texts" in drawing.caption
    assert "images" not in drawing.caption


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
    assert "supposes balanced" not in table.headings
    protocol["assumes_balanced_queries"] = True
    make_run(tmp_path / "c", "algo=tim", scores=[0.5, 1], choices={"algo": "tim"}, result={"protocol": protocol})
    table = tables.section_table(sections(tmp_path)[0])
    place = table.headings.index("supposes balanced")
    assert {cells[0]: cells[place] for cells in table.rows} == {"maml": "no", "protonet": "no", "tim": "yes"}
    assert "supposes balanced" in tables.explained([table])
