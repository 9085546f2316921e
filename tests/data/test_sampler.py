"""Episodes as a pure function of (seed, split, i): uniform, without repetition, fast, and the pixels that they should be."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import CPU, table
from scipy.stats import chisquare, kstest

from metarun.core import Episodes, TaskShape
from metarun.data import sampler as drawn
from metarun.data.image_source import ImageSource
from metarun.data.sampler import ClassSampler, distinct, uniforms
from metarun.errors import UserError

SIZES = [20, 7, 9, 20, 8, 12, 20, 7, 30, 11]
OFFSETS = np.cumsum([0, *SIZES])


def sampler(
    ways: int = 3,
    shots: int = 2,
    queries: int = 4,
    *,
    classes: list[int] | None = None,
    groups: list[int] | None = None,
    rotations: int = 1,
    seed: int = 0,
    split: str = "train",
) -> ClassSampler:
    chosen = np.array(range(len(SIZES)) if classes is None else classes, dtype=np.int64)
    return ClassSampler(
        offsets=OFFSETS,
        classes=chosen,
        task=TaskShape(ways, shots, queries),
        seed=seed,
        split=split,
        rotations=rotations,
        groups=None if groups is None else np.array(groups),
    )


def uniform(counts: np.ndarray) -> None:
    """Counts of independent draws of equally likely values pass a chi-square test, one of about a hundred."""
    assert counts.size >= 2
    assert chisquare(counts.ravel()).pvalue > 1e-4


VARIANTS = pytest.mark.parametrize(
    "more",
    [
        {},
        {"rotations": 4},
        {"groups": [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]},
        {"groups": [0] * 5 + [1] * 5, "rotations": 4, "ways": 9},
        {"classes": [8, 1, 3, 5], "ways": 4},
        {"queries": 0, "shots": 7},
    ],
)


@VARIANTS
def test_an_episode_is_a_function_of_seed_split_and_number(more: dict) -> None:
    rows, turns = sampler(**more).draw(0, 300)
    for start, stop in [(0, 1), (3, 5), (17, 17), (0, 300), (250, 300)]:
        some_rows, some_turns = sampler(**more).draw(start, stop)
        assert np.array_equal(some_rows, rows[start:stop])
        assert np.array_equal(some_turns, turns[start:stop])
    apart = [sampler(**more).draw(i, i + 1)[0][0] for i in range(300)]
    assert np.array_equal(apart, rows)
    far = 10**9  # where a long run might be
    assert np.array_equal(sampler(**more).draw(far, far + 5)[0][3:], sampler(**more).draw(far + 3, far + 5)[0])


@VARIANTS
def test_blocks_have_the_episodes_of_single_draws_and_are_drawn_once(
    more: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, turns = sampler(**more).draw(0, 60)
    monkeypatch.setattr(drawn, "BLOCK_ITEMS", 20 * rows[0].size)
    calls: list[tuple[int, int]] = []
    draw_anew = ClassSampler.draw

    def counted(self: ClassSampler, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append((start, stop))
        return draw_anew(self, start, stop)

    monkeypatch.setattr(ClassSampler, "draw", counted)
    draw = sampler(**more).in_blocks()
    for start in range(0, 60, 4):  # as steps of a training ask
        found = draw(start, start + 4)
        assert np.array_equal(found[0], rows[start : start + 4])
        assert np.array_equal(found[1], turns[start : start + 4])
    assert calls == [(0, 20), (20, 40), (40, 60)]
    for start, stop in [(18, 22), (3, 57), (0, 20), (7, 7), (0, 0), (59, 60)]:
        found = draw(start, stop)
        assert np.array_equal(found[0], rows[start:stop])
        assert np.array_equal(found[1], turns[start:stop])


def test_a_task_larger_than_a_block_is_drawn_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "BLOCK_ITEMS", 1)
    assert np.array_equal(sampler().in_blocks()(5, 6)[0], sampler().draw(5, 6)[0])


def test_seeds_splits_and_numbers_give_different_episodes() -> None:
    def first(seed: int, split: str) -> np.ndarray:
        return sampler(seed=seed, split=split).draw(0, 50)[0]

    draws = [first(0, "train"), first(1, "train"), first(0, "val"), first(0, "test"), first(10, "train")]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert (one != other).mean() > 0.9
        assert len({episode.tobytes() for episode in one}) == 50


def test_episodes_are_those_of_every_version() -> None:
    """A change here changes every published result: tasks would be others for the same seed."""
    rows, turns = sampler(rotations=4, seed=7, split="test").draw(1000, 1002)
    assert rows.shape == (2, 3, 6)
    assert turns.shape == (2, 3)
    assert rows.dtype == turns.dtype == np.int64
    assert rows[0].tolist() == [[107, 126, 108, 130, 104, 122], [23, 25, 24, 21, 26, 22], [16, 0, 8, 5, 17, 9]]
    assert rows[1].tolist() == [[100, 99, 96, 102, 101, 98], [95, 92, 88, 91, 94, 78], [62, 59, 61, 60, 57, 63]]
    assert turns.tolist() == [[2, 0, 3], [2, 2, 2]]


@VARIANTS
def test_no_image_twice_and_no_class_twice(more: dict) -> None:
    chosen = sampler(**more)
    rows, turns = chosen.draw(0, 2000)
    task = chosen.task
    assert rows.shape == (2000, task.ways, task.shots + task.queries)
    for episode in rows.reshape(2000, task.ways, -1):
        for way in episode:
            assert len(set(way)) == len(way)  # support and query of a way are disjoint
    classes = np.searchsorted(OFFSETS, rows, side="right") - 1
    assert (classes == classes[..., :1]).all()  # all images of a way are of one class
    assert set(np.unique(classes)) == set(chosen.classes)  # of the split, and all of them
    assert (turns >= 0).all()
    assert set(np.unique(turns)) == set(range(chosen.rotations))
    ways = classes[..., 0] * 4 + turns
    assert (np.diff(np.sort(ways, axis=1)) > 0).all()  # no class twice, though perhaps in two rotations
    if chosen.rotations == 1:
        assert all(len(np.unique(episode)) == episode.size for episode in rows)
    else:
        assert any(len(set(episode)) < task.ways for episode in classes[..., 0])
    if chosen.groups is not None:
        groups = chosen.groups[classes[..., 0]]
        assert (groups == groups[:, :1]).all()


@pytest.mark.parametrize("rotations", [1, 4])
def test_classes_are_uniform_in_every_way(rotations: int) -> None:
    rows, turns = sampler(rotations=rotations).draw(0, 20_000)
    ways = (np.searchsorted(OFFSETS, rows[..., 0], side="right") - 1) * rotations + turns
    classes = len(SIZES) * rotations
    for way in range(3):
        uniform(np.bincount(ways[:, way], minlength=classes))
    pairs = np.zeros((classes, classes))
    np.add.at(pairs, (ways[:, 0], ways[:, 2]), 1)
    uniform(pairs[~np.eye(classes, dtype=bool)])


def test_images_are_uniform_in_support_and_query() -> None:
    rows, _ = sampler(classes=[1, 2, 4]).draw(0, 20_000)
    for number, size in ((1, 7), (2, 9), (4, 8)):
        images = rows[(rows >= OFFSETS[number]) & (rows < OFFSETS[number + 1])].reshape(-1, 6) - OFFSETS[number]
        for position in range(6):  # two shots, four queries
            uniform(np.bincount(images[:, position], minlength=size))
        pairs = np.zeros((size, size))
        np.add.at(pairs, (images[:, 0], images[:, 5]), 1)
        uniform(pairs[~np.eye(size, dtype=bool)])


def test_groups_are_uniform_and_those_too_small_are_left_out() -> None:
    groups = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    rows, _ = sampler(groups=groups).draw(0, 5000)
    found = np.array(groups)[np.searchsorted(OFFSETS, rows[:, 0, 0], side="right") - 1]
    counts = np.bincount(found, minlength=4)
    assert counts[[0, 3]].tolist() == [0, 0]
    uniform(counts[[1, 2]])


def test_uniforms() -> None:
    draws = uniforms(3, "val", 5, 2005, 7)
    assert draws.shape == (2000, 7)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert kstest(draws.ravel(), "uniform").pvalue > 0.001
    assert np.abs(np.corrcoef(draws.T) - np.eye(7)).max() < 0.1
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.1
    assert uniforms(3, "val", 5, 5, 7).shape == (0, 7)


def test_distinct_takes_all_of_a_set_in_random_order() -> None:
    draws = uniforms(0, "train", 0, 24_000, 8)
    orders = distinct(draws[:, :4], draws[:, 4:], np.full(24_000, 4))
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    uniform(np.unique(orders, axis=0, return_counts=True)[1])
    assert len(np.unique(orders, axis=0)) == 24
    highest = np.full((1, 3), np.nextafter(1, 0))
    assert distinct(highest, draws[:1, :3], np.array([1000])).max() == 999


def test_work_in_python_does_not_grow_with_the_number_of_episodes() -> None:
    """Episodes are drawn by numpy, all at once: as many calls for 2,048 of Omniglot's as for 32."""
    task = TaskShape(5, 1, 15)
    omniglot = ClassSampler(
        offsets=np.arange(0, 20 * 1201, 20), classes=np.arange(1200), task=task, seed=0, split="train", rotations=4
    )

    def calls(episodes: int) -> int:
        count = 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        gc.collect()
        gc.disable()  # what a collection finalises would count
        sys.setprofile(counted)
        try:
            omniglot.draw(0, episodes)
        finally:
            sys.setprofile(None)
            gc.enable()
        return count

    omniglot.draw(0, 1)  # whatever is made once
    assert calls(32) == calls(2048) < 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sampler(ways=11),
            r"^task: ways = 11 is above the 10 classes of the train split; lower train.task.ways$",
        ),
        (lambda: sampler(ways=41, rotations=4), "ways = 41 is above the 40 classes"),
        (lambda: sampler(ways=11, split="val"), "of the val split; lower test.task.ways"),
        (lambda: sampler(classes=[]), "ways = 3 is above the 0 classes"),
        (
            lambda: sampler(ways=5, groups=[0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
            "ways = 5 is above the 4 classes of the train split within one group",
        ),
        (
            lambda: sampler(shots=5, queries=15, split="test"),
            r"shots \+ queries = 5 \+ 15 = 20 is above the 7 images of the smallest class of the test split; "
            "lower test.task.shots or test.task.queries",
        ),
        (lambda: sampler(ways=0), r"^task.ways=0: must be at least 1$"),
        (lambda: sampler(shots=0), r"^task.shots=0: must be at least 1$"),
        (lambda: sampler(queries=-1), r"^task.queries=-1: must be at least 0$"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_limits_that_are_just_met() -> None:
    assert sampler(ways=10, shots=3, queries=4).draw(0, 3)[0].shape == (3, 10, 7)
    assert sampler(ways=40, rotations=4).draw(0, 3)[0].shape == (3, 40, 6)
    assert sampler(ways=1, queries=0).draw(0, 3)[0].shape == (3, 1, 2)


# Pixels

PER_CLASS = 8


def source(channels: int = 1, **more: bool) -> ImageSource:
    """Six classes of random images, no two alike; the groups are of three classes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 200, (6 * PER_CLASS, channels, 6, 6), dtype=np.uint8)
    images[:, -1] //= 2
    toy = table(images, [PER_CLASS] * 6, ["one"] * 3 + ["two"] * 3)
    return ImageSource(toy, {"train": [0, 1, 2, 3, 4], "val": [2, 3, 4, 5], "test": [5, 0, 4]}, **more)


def original(pixels: np.ndarray, toy: ImageSource, turns: int) -> tuple[int, int]:
    """The row of the table, and the quarter turns of `numpy.rot90`, that `pixels` in [0, 1] come from."""
    found = [
        (row, turn)
        for turn in range(turns)
        for row in np.flatnonzero(
            (np.abs(np.rot90(toy.table.images, turn, axes=(2, 3)) / 255 - pixels) < 1e-6).all(axis=(1, 2, 3))
        )
    ]
    assert len(found) == 1
    return found[0]


def ways_of(batch: Episodes, toy: ImageSource, turns: int) -> list[list[set[tuple[int, int]]]]:
    """For each task and way the (class, turns) of its support and query images; no row of the table comes up twice in a way."""
    tasks = []
    for task in range(batch.n_tasks):
        ways = []
        for way in range(batch.ways):
            x = torch.cat([
                batch.support_x[task][batch.support_y[task] == way],
                batch.query_x[task][batch.query_y[task] == way],
            ])  # fmt: skip
            origins = [original(pixels.numpy(), toy, turns) for pixels in x]
            assert len({row for row, _ in origins}) == len(x)
            ways.append({(row // PER_CLASS, turn) for row, turn in origins})
        tasks.append(ways)
    return tasks


@pytest.mark.parametrize("channels", [1, 3])
def test_rotations_are_numpys_and_classes_of_their_own(channels: int) -> None:
    toy = source(channels, rotations=True)
    batch = toy.sampler("train", TaskShape(8, 2, 3), 0, CPU)(0, 10)
    seen = set()
    for ways in ways_of(batch, toy, 4):
        assert all(len(way) == 1 for way in ways)
        assert len(set.union(*ways)) == 8
        seen |= set.union(*ways)
    assert seen == {(number, turn) for number in range(5) for turn in range(4)}
    rows, turns = ClassSampler(
        offsets=toy.table.offsets,
        classes=toy.splits["train"],
        task=TaskShape(8, 2, 3),
        seed=0,
        split="train",
        rotations=4,
    ).draw(0, 10)
    drawn = [
        [{(way[0] // PER_CLASS, turn)} for way, turn in zip(*task, strict=True)]
        for task in zip(rows, turns, strict=True)
    ]
    assert drawn == [ways for ways in ways_of(batch, toy, 4)]


def test_without_rotations_images_stay_upright_and_of_their_split() -> None:
    toy = source()
    for split, classes in toy.splits.items():
        batch = toy.sampler(split, TaskShape(3, 2, 3), 0, CPU)(0, 20)
        found = [way for ways in ways_of(batch, toy, 4) for way in ways]
        assert set.union(*found) == {(number, 0) for number in classes}


def test_within_group() -> None:
    toy = source(within_group=True, rotations=True)
    groups = {number: group for number, group in enumerate(toy.table.groups)}
    batch = toy.sampler("train", TaskShape(5, 1, 1), 0, CPU)(0, 20)
    per_task = [{groups[number] for way in ways for number, _ in way} for ways in ways_of(batch, toy, 4)]
    assert all(len(found) == 1 for found in per_task)
    assert set.union(*per_task) == {"one", "two"}
    with pytest.raises(UserError, match="ways = 13 is above the 12 classes of the train split within one group"):
        toy.sampler("train", TaskShape(13, 1, 1), 0, CPU)


def test_shapes_and_class_major_labels() -> None:
    batch = source(3).sampler("test", TaskShape(3, 2, 4), 0, CPU)(5, 9)
    assert (batch.n_tasks, batch.ways) == (4, 3)
    assert batch.support_x.shape == (4, 6, 3, 6, 6)
    assert batch.query_x.shape == (4, 12, 3, 6, 6)
    assert batch.support_x.dtype == torch.float32
    assert batch.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert batch.query_y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 4
    assert batch.query_y.dtype == torch.int64
    whole = source(3).sampler("test", TaskShape(3, 2, 4), 0, CPU)(0, 9)
    for part, all_of_it in zip(batch.tensors, whole.tensors, strict=True):
        assert torch.equal(part, all_of_it[5:])
    parts = list(whole.split(4))
    assert [part.n_tasks for part in parts] == [4, 4, 1]
    assert all(part.ways == 3 for part in parts)
    for number, tensor in enumerate(whole.tensors):
        assert torch.equal(torch.cat([part.tensors[number] for part in parts]), tensor)


def test_normalize_is_by_the_training_split() -> None:
    toy = source(3, normalize=True)
    training = toy.table.images[: 5 * PER_CLASS] / 255
    x = toy.sampler("test", TaskShape(3, 1, 7), 0, CPU)(0, 1).query_x[0].double().numpy()
    mean, deviation = training.mean((0, 2, 3), keepdims=True), training.std((0, 2, 3), keepdims=True)
    plain = source(3).sampler("test", TaskShape(3, 1, 7), 0, CPU)(0, 1).query_x[0].double().numpy()
    np.testing.assert_allclose(x, (plain - mean) / deviation, rtol=1e-4, atol=1e-5)


def test_description_tells_apart_data_and_splits() -> None:
    plain, turned = source().describe(), source(rotations=True).describe()
    assert plain["classes"] == {"train": 5, "val": 4, "test": 3}
    assert turned["classes"] == {"train": 20, "val": 16, "test": 12}
    assert plain["images"] == turned["images"] == {"train": 40, "val": 32, "test": 24}
    assert plain["input_shape"] == [1, 6, 6]
    toy = source()
    other = ImageSource(toy.table, toy.splits | {"test": [5, 0, 3]})
    assert plain["fingerprint"] != other.describe()["fingerprint"]
    assert plain["fingerprint"] == source().describe()["fingerprint"]


def test_the_table_is_never_written_to() -> None:
    toy = source(rotations=True)
    before = toy.table.images.copy()
    draw = toy.sampler("train", TaskShape(5, 2, 2), 0, CPU)
    first = draw(0, 3)
    first.support_x.zero_()
    for one, other in pairwise([draw(0, 3), draw(0, 3)]):
        assert torch.equal(one.query_x, other.query_x)
    assert draw(0, 3).support_x.any()
    assert np.array_equal(toy.table.images, before)
