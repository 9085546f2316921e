"""The numbers of a report: means, intervals over seeds and episodes, and paired tests."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from reported import GENERATOR, make_run, pair, sections

from metarun import files
from metarun.report import page, rendering, statistics, tables
from metarun.report.collect import read
from metarun.report.summary import pooled


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
        assert section.rows[0].median == (math.inf if name == "tested" else None)  # it is of all three


@pytest.mark.parametrize("tested", [True, False])
def test_of_equal_rows_each_is_the_best(tested: bool, tmp_path: Path) -> None:
    for algo, accuracy in (("anil", 0.5), ("maml", 0.75), ("protonet", 0.75)):
        found = {} if tested else {"val/score": accuracy}
        scores = np.full(8, accuracy) if tested else None
        make_run(tmp_path / algo, f"algo={algo}", choices={"algo": algo}, scores=scores, result=found)
    (section,) = sections(tmp_path)
    assert {row.label for row in section.rows if row.best} == {"maml", "protonet"}
    table = tables.section_table(section)
    assert len(table.best) == 2
    if tested:
        at = table.headings.index("minus the best, over episodes (points)")
        assert [cells[at] for cells in table.rows] == ["−25.00 in all, p 0.016", "the best", "+0.00 in all, p 1.000"]


def test_rows_that_are_equal_but_for_rounding_are_held_against_the_first(tmp_path: Path) -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.0])
    for algo, values in (("anil", scores[::-1]), ("maml", scores), ("protonet", scores - 0.05)):
        make_run(tmp_path / algo, f"algo={algo}", choices={"algo": algo}, scores=values)
    (section,) = sections(tmp_path)
    means = {row.label: row.mean for row in section.rows}
    assert means["anil"] < means["maml"]  # by rounding: both have the same scores
    assert {row.label for row in section.rows if row.best} == {"anil", "maml"}
    table = tables.section_table(section)
    at = table.headings.index("minus the best, over episodes (points)")
    assert table.rows[0][at] == "the best"
    assert "p 1.000" in table.rows[1][at]


def test_the_time_of_training_is_that_of_all_stages(tmp_path: Path) -> None:
    stages = {"stages": {"pretrain": {}}, "pretrain/seconds": 600.0}
    made = make_run(tmp_path / "run", scores=[0.5, 1], result=stages)  # of which the last stage took 60 s
    (section,) = sections(tmp_path)
    assert section.rows[0].seconds == 660
    assert page._run(read(made), "", section, tmp_path)["seconds"] == "660 s"


def test_scores_of_another_shape_are_none(tmp_path: Path) -> None:
    pair(tmp_path, GENERATOR.random(5), GENERATOR.random(5))
    np.savez(tmp_path / "maml0" / "test_scores.npz", values=np.zeros(5))
    (section,) = sections(tmp_path)
    assert all(row.on_episodes is None for row in section.rows)


def test_seeds_that_were_tested_on_the_same_draws_lessen_no_interval() -> None:
    """The images of a target are drawn without the run's seed: a second seed repeats the same draws."""
    assert statistics.over_same_draws([0.3, 0.5]) == pytest.approx(0.4)
    assert statistics.over_same_draws([0.3, None]) is None
    once, twice = np.array([0.1, 0.3, -0.1]), [np.array([0.1, 0.3, -0.1])] * 2
    assert statistics.paired(pooled(twice, same_draws=True)) == statistics.paired(once)
    assert statistics.paired(pooled(twice, same_draws=False)).half < statistics.paired(once).half  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("images", "shared"), [({"all": 60}, 12 / 48), ({"train": 48, "test": 12}, 0.0), ({}, 0.0)], ids=str
)
def test_repeats_of_a_target_that_test_the_same_images_are_not_compared_as_independent(
    images: dict[str, int], shared: float, tmp_path: Path
) -> None:
    """Of 60 images each repeat tests 12: the variance of their mean is s^2 (1 / n + 12 / 48) (Nadeau and Bengio 2003)."""
    ours, theirs = GENERATOR.normal(0.5, 0.05, 10), GENERATOR.normal(0.9, 0.05, 10)
    for algo, scores in (("maml", ours), ("protonet", theirs)):
        found = {"acc": scores.mean(), "acc_ci95": 0.1, "classes": ["a", "b"], "over": "repeats", "train_images": 48,
                 "test_images": 12, "data": {"fingerprint": "f", "images": images}}  # fmt: skip
        make_run(
            tmp_path / algo, f"algo={algo}", scores=scores, choices={"algo": algo, "target": "digits"},
            result={f"target/{name}": value for name, value in found.items()},
        )  # fmt: skip
    (section,) = sections(tmp_path)
    (test,) = [row.on_episodes for row in section.rows if row.on_episodes]
    mean, error = (ours - theirs).mean(), (ours - theirs).std(ddof=1) * math.sqrt(1 / 10 + shared)
    assert (test.mean, test.pairs) == (pytest.approx(mean), 10)
    assert test.half == pytest.approx(scipy.stats.t.ppf(0.975, 9) * error)
    assert test.p == pytest.approx(2 * scipy.stats.t.sf(abs(mean) / error, 9))


def test_a_seed_most_of_whose_tasks_diverged_is_in_the_median(tmp_path: Path) -> None:
    for seed in range(3):
        scores = 1 + GENERATOR.random(5)
        scores[: 3 * (seed == 2)] = math.inf
        make_run(tmp_path / str(seed), "algo=maml", seed=seed, measure="mse", scores=scores)
    (row,) = sections(tmp_path)[0].rows
    assert (row.counted, row.median) == (3, math.inf)
