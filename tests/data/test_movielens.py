"""Ratings, a task a user: what the files must be, who is cold, and what is measured."""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, compose, episodes
from shell import ARCHIVE_HARMS, done, harm_archive, make_ratings, metarun, result, run_folder

from metarun.core import TaskShape
from metarun.data.movielens import MovieLens
from metarun.data.regression import Sinusoid
from metarun.errors import UserError
from metarun.ops.metrics import ndcg

TASK = TaskShape(1, 4, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ratings(tmp_path_factory.mktemp("ratings"))


def told(root: Path) -> dict[tuple[int, int], int]:
    """The rating of each user and film, read anew."""
    rows = [line.split("\t") for line in (root / "u.data").read_text().splitlines()]
    return {(int(user), int(film)): int(rating) for user, film, rating, _ in rows}


@pytest.mark.parametrize("cold", ["users", "items", "both"])
def test_both_axes_are_divided(root: Path, cold: Any) -> None:
    data = MovieLens(root=str(root), cold=cold)
    for known in (data.users, data.films):
        parts = [set(known[split]) for split in ("train", "val", "test")]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert [len(part) for part in parts] == ([28, 4, 8] if known is data.users else [35, 5, 10])
    ratings = told(root)
    for split in ("train", "val", "test"):
        users = set(data.users[split if cold != "items" else "train"])
        films = set(data.films[split if cold != "users" else "train"])
        expected = {(user, film): rating for (user, film), rating in ratings.items() if user in users and film in films}
        found = {(user, int(film)): int(rating) for user, rated in data.tasks[split] for film, rating in rated}
        assert found == expected


def test_a_task_is_one_users_and_a_function_of_its_number(root: Path) -> None:
    data = MovieLens(root=str(root))
    whole = episodes(data, TASK, 8)
    assert whole.support_x.shape == (8, 4, 20 + 2 + 3)
    assert whole.query_y.shape == (8, 3, 1)
    x, y = torch.cat([whole.support_x, whole.query_x], 1), torch.cat([whole.support_y, whole.query_y], 1)
    assert torch.equal(x[:, :, 20:], x[:, :1, 20:].expand(-1, 7, -1))
    films, users = data._vectors
    ratings = told(root)
    for task in range(8):
        (user,) = [one for one in data.users["train"] if np.array_equal(users[one], x[task, 0, 20:].numpy())]
        seen = set()
        for item, value in zip(x[task], y[task, :, 0], strict=True):
            rated = {film for film in films if np.array_equal(films[film], item[:20].numpy())}
            assert round(value.item() + data.mean) in {ratings[user, film] for film in rated if (user, film) in ratings}
            seen |= rated
        assert len(seen) >= 7
    again = episodes(MovieLens(root=str(root)), TASK, 1, start=5)
    for one, other in zip(again.tensors, whole.tensors, strict=True):
        assert torch.equal(one[0], other[5])
    train = [
        rating for user in data.users["train"] for film in data.films["train"] if (rating := ratings.get((user, film)))
    ]
    assert data.mean == pytest.approx(np.mean(train))


def test_an_archive_is_read_where_it_lies(root: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        for name in ("u.data", "u.item", "u.user"):
            archive.write(root / name, f"ml-100k/{name}")
    plain = MovieLens(root=str(root)).describe()
    assert MovieLens(root=str(tmp_path)).describe() == MovieLens(root=str(tmp_path / "ml-100k.zip")).describe() == plain
    assert MovieLens(root=str(root), split_seed=1).describe()["fingerprint"] != plain["fingerprint"]
    assert sum(plain["users"].values()) == 40


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("u.data", "1\t2\t3", "u.data, line 1: has 3 fields and not 4"),
        ("u.data", "1,2,3,0", "u.data, line 1: has 1 field and not 4, apart by tabs"),
        ("u.item", "1;A", "u.item, line 1: has 1 field and not 24, apart by bars"),
        ("u.item", "1|A|01-Jan-95||http://x|" + "|".join(["0"] * 19), "line 1: the year 95 is not from 1870 to 2100"),
        ("u.data", f"1\t2\t{'9' * 5000}\t0", "line 1: the rating has 5000 digits, more than any number here"),
        ("u.data", "1\t2\t6\t0", "line 1: the rating 6 is not from 1 to 5"),
        ("u.data", "1\t2\tx\t0", "line 1: the rating 'x' is no whole number"),
        ("u.data", "99\t2\t3\t0", "line 1: there is no user 99 in u.user"),
        ("u.data", "1\t99\t3\t0", "line 1: there is no film 99 in u.item"),
        ("u.data", "", "u.data is empty"),
        ("u.item", "1|A|01-Jan-1990||http://x|" + "|".join(["2"] * 19), "line 1: the genres must be 19 flags"),
        ("u.data", "1\t2\t3\t0\n\n1\t2\t5\t9", "u.data, line 3: a rating of film 2 by user 1 is in line 1 already"),
        (
            "u.item",
            "\n".join(["1|A|01-Jan-1990||http://x|" + "|".join(["0"] * 19)] * 2),
            "line 2: film 1 is in line 1 already",
        ),
        ("u.user", "1|20|M|none|0\n01|30|F|none|0", "line 2: user 01 is in line 1 already"),
        ("u.user", "1_0|20|M|none|0", "line 1: the user '1_0' is no whole number"),
        ("u.user", "1|old|M|none|0", "line 1: the age 'old' is no whole number"),
        ("u.user", "1|-5|M|none|0", "line 1: the age -5 is not from 1 to 120"),
        ("u.user", "1|20|x|none|0", "line 1: the gender 'x' is not M or F"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(root: Path, tmp_path: Path, name: str, line: str, message: str) -> None:
    for one in ("u.data", "u.item", "u.user"):
        (tmp_path / one).write_bytes((root / one).read_bytes())
    (tmp_path / name).write_text(line + "\n")
    with pytest.raises(UserError, match="data.root: .*" + message):
        MovieLens(root=str(tmp_path))


def test_a_title_may_hold_any_byte_but_the_end_of_a_line(root: Path, tmp_path: Path) -> None:
    for one in ("u.data", "u.item", "u.user"):
        (tmp_path / one).write_bytes((root / one).read_bytes())
    titles = (root / "u.item").read_bytes()
    first = titles.split(b"|")[1]
    (tmp_path / "u.item").write_bytes(titles.replace(b"|" + first + b"|", b"|Wait\x85 \x1c\x1d\x1e\x0b\x0c|", 1))
    plain, other = MovieLens(root=str(root)), MovieLens(root=str(tmp_path))
    assert other.describe()["ratings"] == plain.describe()["ratings"]
    assert all(np.array_equal(film, plain._vectors[0][number]) for number, film in other._vectors[0].items())


def test_shares_that_do_not_sum_to_1_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"^data.ratios=\[1.0, 0.5, 0.5\]: must sum to 1, but the sum is 2$"):
        MovieLens(root=str(root), ratios=[1.0, 0.5, 0.5])


@pytest.mark.parametrize("harm", ARCHIVE_HARMS)
def test_a_damaged_archive_is_one_line(root: Path, tmp_path: Path, harm: str) -> None:
    path = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA if harm == "lzma" else zipfile.ZIP_DEFLATED) as archive:
        for name in ("u.data", "u.item", "u.user"):
            archive.write(root / name, f"ml-100k/{name}")
    harm_archive(path, harm)
    with pytest.raises(UserError, match=r"^data.root: .*ml-100k.zip: cannot be read \(.+\)$"):
        MovieLens(root=str(path))


def test_what_is_not_there_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no u.data in .*; get ml-100k.zip from https"):
        MovieLens(root=str(tmp_path))
    (tmp_path / "ml-100k.zip").write_text("no archive")
    with pytest.raises(UserError, match=r"ml-100k.zip: cannot be read"):
        MovieLens(root=str(tmp_path))
    data = MovieLens(root=str(root), cold="both")
    with pytest.raises(
        UserError, match=r"= 40 is above the \d+ ratings that any user of the test .*lower test.task.shots"
    ):
        data.sampler("test", TaskShape(1, 30, 10), 0, CPU)
    with pytest.raises(UserError, match=r"set task\.ways=1"):
        data.sampler("train", TaskShape(5, 1, 1), 0, CPU)
    with pytest.raises(
        UserError, match=r"^train\.task\.queries=\[1,3\]: a task of ratings has a fixed number of queries"
    ):
        data.sampler("train", TaskShape(1, 1, (1, 3)), 0, CPU)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"min_items": 45}, "task.min_items=45: is of classes"),
        ({"protocol": "meta_dataset"}, "task.protocol=meta_dataset: is of classes"),
        ({"balanced": False}, "task.balanced=false: is of classes"),
        ({"unlabelled": 2}, "task.unlabelled=2: is of classes"),
        ({"query_dirichlet": 2.0}, "task.query_dirichlet=2: is of classes"),
    ],
)
def test_what_is_of_classes_is_refused_of_values(root: Path, more: dict[str, Any], message: str) -> None:
    for source in (MovieLens(root=str(root)), Sinusoid()):
        with pytest.raises(UserError, match=f"^{re.escape(message)}, but a .* has none; leave it out$"):
            source.sampler("test", TaskShape(1, (1, 3), 3, **more), 0, CPU)


def test_where_tasks_are_from_is_told_of_users_and_of_films(root: Path) -> None:
    """What is not cold is of training, in a test too."""
    told = {cold: MovieLens(root=str(root), cold=cold).tasks_of("test") for cold in ("users", "items", "both")}  # type: ignore[arg-type]
    assert told == {
        "users": "ratings by users of the test of films of training",
        "items": "ratings by users of training of films of the test",
        "both": "ratings by users of the test of films of the test",
    }
    with pytest.raises(UserError, match=r"that any user of training has of films of the test \(data\.cold=items\)"):
        MovieLens(root=str(root), cold="items").sampler("test", TaskShape(1, 30, 10), 0, CPU)


def test_ndcg_by_hand() -> None:
    relevance = torch.tensor([[3.0, 5.0, 1.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    prediction = torch.tensor([[2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    gained = (2**1 - 1) / math.log2(2) + (2**3 - 1) / math.log2(3) + (2**5 - 1) / math.log2(4)
    best = (2**5 - 1) / math.log2(2) + (2**3 - 1) / math.log2(3) + (2**1 - 1) / math.log2(4)
    assert ndcg(prediction, relevance, 5).tolist() == pytest.approx([gained / best, 1, 1])
    assert ndcg(prediction, relevance, 1)[0].item() == pytest.approx(1 / 31)
    assert ndcg(relevance, relevance, 2).tolist() == [1, 1, 1]
    alike = torch.tensor([5.0] + [1.0] * 19)  # so many that an order of equals by chance would be another
    assert ndcg(torch.zeros(20), alike, 1).item() == 1
    assert ndcg(torch.zeros(20), alike.flip(0), 1).item() == pytest.approx(1 / 31)
    nothing = torch.tensor([[2.0, math.nan, 3.0], [math.inf, 2.0, 3.0], [math.nan] * 3])
    worst = ndcg(-relevance, relevance, 2).tolist()
    assert ndcg(nothing, relevance, 2).tolist() == pytest.approx(worst)


def test_measures_are_on_the_scale_of_ratings(root: Path) -> None:
    data = MovieLens(root=str(root))
    target = torch.tensor([[[1.0], [5.0]]]) - data.mean
    found = data.measures(torch.tensor([[[9.0], [4.0]]]) - data.mean, target)
    assert found["mae"].tolist() == pytest.approx([(4 + 1) / 2])  # 9 is cut to 5
    gained, best = (2**1 - 1) + (2**5 - 1) / math.log2(3), (2**5 - 1) + (2**1 - 1) / math.log2(3)
    assert found["ndcg5"].tolist() == pytest.approx([gained / best])
    assert data.measures(target, target)["mae"].tolist() == pytest.approx([0])


def test_ridge_regression_of_values_in_closed_form(root: Path) -> None:
    data = MovieLens(root=str(root))
    config = compose("algo=r2d2", "data=movielens", f"data.root={root}", "backbone=pixels", "algo.regularization=0.3")
    algorithm = build(config, data).double()
    algorithm.bias.data.fill_(0.25)
    found = episodes(data, TASK, 3)
    x, y, asked = found.support_x.double(), found.support_y.double(), found.query_x.double()
    predicted = algorithm.predict(type(found)(x, y, asked, found.query_y.double(), ways=1))
    for task in range(3):
        known, new = (F.pad(one[task], (0, 1), value=1.0) for one in (x, asked))
        weights = torch.linalg.solve(known.T @ known + 4 * 0.3 * torch.eye(26), known.T @ (y[task] - 0.25))
        torch.testing.assert_close(predicted[task], new @ weights + 0.25, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("algo", ["maml", "cnp", "r2d2"])
def test_a_run_reports_what_the_data_measure(algo: str, root: Path, tmp_path: Path) -> None:
    small = [
        "train.steps=3",
        "train.validate_every=3",
        "train.validate_episodes=4",
        "test.episodes=12",
        "test.baseline_episodes=4",
    ]
    words = [
        f"algo={algo}",
        "data=movielens",
        f"data.root={root}",
        "backbone=mlp",
        f"outputs={tmp_path}",
        "data.cold=both",
    ]
    done = metarun(*words, *small, "task.shots=[1,3]", "task.queries=1")
    assert done.status == 0, done.err
    found = result(run_folder(tmp_path))
    assert 0 < found["test/mae"] < 4
    assert found["test/mae_ci95"] > 0
    assert 0 < found["test/ndcg5"] <= 1
    assert "mae " in done.out
    assert found["protocol"]["seen"]["train"].startswith("ratings by users of training of films of training")


def test_predictions_that_are_no_numbers_are_no_good_ranking(root: Path, tmp_path: Path) -> None:
    """The means are of the tasks that have a value, their number is said, and `result.json` is JSON that any reader takes."""
    words = ["algo=maml", "data=movielens", f"data.root={root}", "backbone=mlp", f"outputs={tmp_path}", "train.steps=0"]
    words += [
        "algo.inner_lr=1e6",
        "algo.inner_steps=10",
        "test.episodes=6",
        "test.baseline_episodes=0",
    ]
    outcome = done(*words, "task.shots=3", "task.queries=5", "train.validate_episodes=2")
    text = (run_folder(tmp_path) / "result.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"result.json has {name}"))
    assert found["test/not_finite"] == found["test/mae_not_finite"] == 6
    assert found["test/mse"] is found["test/mae"] is None
    assert 0 < found["test/ndcg5"] < 0.9
    assert "mae no number (6 tasks of no number left out)" in " ".join(outcome.out.split())
    again = done(*words, "task.shots=3", "task.queries=5", "train.validate_episodes=2")
    assert " inf " in again.out


def test_with_a_range_a_user_learns_from_all_ratings_but_the_queries(root: Path) -> None:
    data = MovieLens(root=str(root))
    whole = data.sampler("train", TaskShape(1, (2, 20), 3), 0, CPU)(0, 12)
    assert whole.n_tasks == 12
    counts = {len(rated) for _, rated in data.tasks["train"]}
    sizes = [tasks.support_x.shape[1] for tasks in whole.split(1)]
    assert set(sizes) <= {min(20, count - 3) for count in counts}
    assert len(set(sizes)) > 1
    for number, tasks in enumerate(whole.split(1)):
        assert tasks.query_x.shape[1] == 3
        alone = data.sampler("train", TaskShape(1, (2, 20), 3), 0, CPU)(number, number + 1)
        for one, other in zip(tasks.tensors, next(iter(alone.split(1))).tensors, strict=True):
            assert torch.equal(one, other)
