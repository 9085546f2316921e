"""Tasks of several shapes and of unlabelled items: functions of (seed, split, i), drawn as they should be, clear where they cannot be."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, compose, table, toy_images
from PIL import Image
from scipy.stats import chisquare, kstest

from metarun.config import check, task_of
from metarun.core import Episodes, MixedEpisodes, TaskShape, together
from metarun.data.folder import Folder
from metarun.data.image_source import ImageSource
from metarun.data.noise import with_noise
from metarun.data.regression import Sinusoid
from metarun.data.varied import Drawn, VariedSampler, meta_dataset_sizes, uniform_sizes
from metarun.errors import UserError

SIZES = [20, 7, 9, 20, 8, 12, 20, 7, 30, 11]
OFFSETS = np.cumsum([0, *SIZES])
RANGES = TaskShape((2, 6), (1, 4), (1, 3))
EACH = replace(RANGES, balanced=False)
PAPER = TaskShape((5, 50), (1, 100), (1, 10), protocol="meta_dataset")
UNLABELLED = TaskShape(3, 1, 2, unlabelled=2, distractors=2)
SHARED = replace(UNLABELLED, labelled_share=0.5)
SHAPES = {
    "ranges": RANGES,
    "each": EACH,
    "meta_dataset": replace(PAPER, ways=(3, 9)),
    "unlabelled": UNLABELLED,
    "shared": SHARED,
    "all": replace(EACH, ways=(2, 4), shots=(1, 2), queries=1, unlabelled=1, distractors=1, labelled_share=0.5),
}
EVERY = pytest.mark.parametrize("shape", SHAPES)


def sampler(task: TaskShape, **more: Any) -> VariedSampler:
    known = {"offsets": OFFSETS, "classes": np.arange(len(SIZES)), "seed": 0, "split": "train"}
    return VariedSampler(task=task, **(known | more))


def same(one: list[Drawn], other: list[Drawn]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and np.array_equal(a.rows, b.rows) and np.array_equal(a.turns, b.turns)
        for a, b in zip(one, other, strict=True)
    )


def likely(counts: Any) -> None:
    assert chisquare(counts).pvalue > 1e-4


def as_images(sizes: list[int]) -> ImageSource:
    """A table whose one pixel is the number of its image, and of three splits that are the same."""
    images = np.arange(sum(sizes), dtype=np.uint8).reshape(-1, 1, 1, 1)
    everything = range(len(sizes))
    return ImageSource(table(images, sizes), {"train": everything, "val": everything, "test": everything})


@EVERY
@pytest.mark.parametrize("rotations", [1, 4])
def test_a_task_is_a_function_of_seed_split_and_number(shape: str, rotations: int) -> None:
    chosen = sampler(SHAPES[shape], rotations=rotations)
    whole = chosen.draw(0, 60)
    for start, stop in [(0, 1), (3, 5), (17, 17), (50, 60)]:
        assert same(chosen.draw(start, stop), whole[start:stop])
    assert same([chosen.draw(i, i + 1)[0] for i in range(60)], whole)
    far = 10**9
    assert same(chosen.draw(far, far + 3)[1:], chosen.draw(far + 1, far + 3))
    for other in ({"seed": 1}, {"split": "test"}):
        assert not same(sampler(SHAPES[shape], rotations=rotations, **other).draw(0, 5), whole[:5])


@EVERY
def test_items_are_of_their_classes_and_no_one_comes_twice(shape: str) -> None:
    task = SHAPES[shape]
    for one in sampler(task).draw(0, 200):
        classes = np.searchsorted(OFFSETS, one.rows, side="right") - 1
        assert len(set(one.classes)) == one.ways
        assert len(set(one.rows)) == len(one.rows)
        support, queries = (np.repeat(one.classes, sizes) for sizes in (one.shots, one.queries))
        labelled = np.concatenate([support, queries])
        assert np.array_equal(classes[: len(labelled)], labelled)
        rest = classes[len(labelled) :]
        assert len(rest) == one.unlabelled == task.unlabelled * (one.ways + task.distractors)
        kinds, counts = np.unique(rest, return_counts=True)
        assert (counts == task.unlabelled).all()
        if task.unlabelled:
            assert set(one.classes) <= set(kinds)
            assert len(kinds) == one.ways + task.distractors


def test_unlabelled_items_come_in_no_order() -> None:
    """The first of them is as often of the first class as of any other."""
    first = [np.searchsorted(OFFSETS, one.rows[9], side="right") - 1 for one in sampler(UNLABELLED).draw(0, 3000)]
    of_way = [
        np.flatnonzero(one.classes == number)
        for one, number in zip(sampler(UNLABELLED).draw(0, 3000), first, strict=True)
    ]
    ways = np.array([found[0] if len(found) else 3 for found in of_way])
    likely(np.bincount(ways, minlength=4) / np.array([1, 1, 1, 2]))


def test_the_same_items_have_labels_in_all_tasks() -> None:
    labelled, unlabelled = set[int](), set[int]()
    for one in sampler(SHARED).draw(0, 3000):
        count = sum(one.shots) + sum(one.queries)
        labelled |= set(one.rows[:count].tolist())
        unlabelled |= set(one.rows[count:].tolist())
    assert not labelled & unlabelled
    assert labelled | unlabelled == set(range(OFFSETS[-1]))
    shares = np.bincount(np.searchsorted(OFFSETS, sorted(labelled), side="right") - 1)
    assert shares.tolist() == [size // 2 for size in SIZES]


def test_numbers_are_uniform_in_their_ranges() -> None:
    large = {"offsets": np.arange(13) * 50, "classes": np.arange(12)}
    tasks = sampler(TaskShape((2, 12), (1, 10), (3, 7)), **large).draw(0, 6000)
    likely(np.bincount([one.ways for one in tasks])[2:])
    likely(np.bincount([one.shots[0] for one in tasks])[1:])
    likely(np.bincount([one.queries[0] for one in tasks])[3:])
    pairs = np.bincount([one.shots[0] * 5 + one.queries[0] - 3 for one in tasks])[5:]
    likely(pairs)  # one number says nothing of the other
    assert all(len(set(one.shots)) == len(set(one.queries)) == 1 for one in tasks)
    classes = np.bincount(np.concatenate([one.classes for one in tasks]))
    likely(classes)


def test_each_class_draws_its_own_where_tasks_are_not_balanced() -> None:
    large = {"offsets": np.arange(13) * 50, "classes": np.arange(12)}
    tasks = sampler(TaskShape(2, (1, 6), (1, 4), balanced=False), **large).draw(0, 6000)
    likely(np.bincount([(one.shots[0] - 1) * 6 + one.shots[1] - 1 for one in tasks], minlength=36))
    likely(np.bincount([(one.queries[0] - 1) * 4 + one.queries[1] - 1 for one in tasks], minlength=16))


def test_a_small_class_makes_the_range_shorter() -> None:
    """Classes of 4 and of 50: in a task with the small one no class has more than what it has."""
    few = {"offsets": np.array([0, 4, 54, 104]), "classes": np.arange(3)}
    tasks = sampler(TaskShape(2, (1, 10), (1, 5)), **few).draw(0, 4000)
    small = [one for one in tasks if 0 in one.classes]
    shots = np.array([one.shots[0] for one in small])
    likely(np.bincount(shots)[1:])
    assert shots.max() == 3
    for number in (1, 2):
        queries = [one.queries[0] for one in small if one.shots[0] == number]
        likely(np.bincount(queries)[1:])
        assert max(queries) == 4 - number
    others = [one.shots[0] for one in tasks if 0 not in one.classes]
    likely(np.bincount(others)[1:])
    assert max(others) == 10
    each = sampler(TaskShape(2, (1, 10), (1, 5), balanced=False), **few).draw(0, 500)
    beside = [max(one.shots) for one in each if 0 in one.classes]
    assert max(beside) == 10  # the other class has its own


def test_meta_dataset_draws_what_its_equations_say() -> None:
    """Against the equations of section 3.2, item by item, for random classes and draws."""
    random = np.random.default_rng(0)
    for _ in range(200):
        ways = int(random.integers(5, 51))
        sizes = random.integers(2, 700, ways)
        beta, alpha = float(random.random()), random.random(ways)
        shots, queries = meta_dataset_sizes(PAPER, beta, alpha, sizes)
        q = min(10, *(size // 2 for size in sizes.tolist()))
        contributions = [min(100, size - q) for size in sizes.tolist()]
        support = min(500, sum(math.floor(beta * c + 1) for c in contributions))
        weights = [
            size * math.exp(math.log(0.5) + a * math.log(4)) for size, a in zip(sizes.tolist(), alpha, strict=True)
        ]
        expected = [
            min(math.floor(weight / sum(weights) * (support - ways) * (1 + 1e-12)) + 1, size - q)
            for weight, size in zip(weights, sizes.tolist(), strict=True)
        ]
        assert queries.tolist() == [q] * ways
        assert np.abs(shots - expected).max() <= 1  # where rounding decides
        assert (shots != expected).mean() < 0.05
        assert shots.sum() <= 500
        assert (shots + queries <= sizes).all()


def test_meta_dataset_ways_and_support_are_uniform() -> None:
    many = {"offsets": np.arange(61) * 30, "classes": np.arange(60)}
    tasks = sampler(PAPER, **many).draw(0, 1200)
    likely(np.bincount([one.ways for one in tasks])[5:])
    assert {one.queries[0] for one in tasks} == {10}
    small = [one for one in tasks if one.ways <= 12]  # whose support is never cut at 500
    sums = np.array([sum(one.shots) / one.ways for one in small])
    assert kstest((sums - sums.min()) / (sums.max() - sums.min()), "uniform").pvalue > 1e-4


def test_meta_dataset_tasks_of_very_unequal_classes() -> None:
    """A large class gets more than the 100 shots that it adds to the size of the support set; ways are those that there are."""
    sizes = [2, 3, 5, 8, 13, 21, 55, 300]
    offsets = np.cumsum([0, *sizes])
    tasks = sampler(replace(PAPER, ways=(2, 50)), offsets=offsets, classes=np.arange(len(sizes))).draw(0, 400)
    assert {one.ways for one in tasks} == set(range(2, 9))
    assert max(max(one.shots) for one in tasks) > 100
    for one in tasks:
        assert len(one.rows) == len(set(one.rows)) == sum(one.shots) + sum(one.queries)
        classes = np.searchsorted(offsets, one.rows, side="right") - 1
        owners = np.concatenate([np.repeat(one.classes, one.shots), np.repeat(one.classes, one.queries)])
        assert np.array_equal(classes, owners)
    with pytest.raises(UserError, match="ways = 9 is above the 8 classes"):
        sampler(replace(PAPER, ways=(9, 50)), offsets=offsets, classes=np.arange(len(sizes)))


@pytest.mark.parametrize(
    ("shots", "queries", "items"), [((5, 100), (1, 10), 9), ((1, 100), (3, 10), 6), ((4, 9), (2, 10), 7)]
)
def test_meta_dataset_gives_no_class_fewer_than_asked(
    shots: tuple[int, int], queries: tuple[int, int], items: int
) -> None:
    """Queries take at most half of a class, and shots what remains: the smallest class must have room for the least of both."""
    task = replace(PAPER, ways=3, shots=shots, queries=queries)
    with pytest.raises(
        UserError, match=rf"of at most half of a class for queries, = {items} is above the .*task\.min_items={items}$"
    ):
        as_images([items - 1, 40, 40, 40]).sampler("test", task, 0, CPU)
    for one in sampler(task, offsets=np.cumsum([0, items, 40, 40]), classes=np.arange(3)).draw(0, 200):
        assert min(one.shots) >= shots[0]
        assert min(one.queries) >= queries[0]


def test_meta_dataset_takes_a_number_as_it_is() -> None:
    sizes = np.array([30, 12, 40])
    fixed = TaskShape(3, 5, (1, 10), protocol="meta_dataset")
    shots, queries = meta_dataset_sizes(fixed, 0.5, np.full(3, 0.5), sizes)
    assert shots.tolist() == [5, 5, 5]
    assert queries.tolist() == [7, 7, 7]  # what the smallest class has beside its shots
    assert fixed.equal_classes
    assert not PAPER.equal_classes


def test_groups_keep_the_ways_of_a_task_together() -> None:
    groups = np.array([0] * 3 + [1] * 7)
    tasks = sampler(TaskShape((2, 6), 1, 1), groups=groups).draw(0, 500)
    for one in tasks:
        assert len({int(groups[number]) for number in one.classes}) == 1
    ways = {number: {one.ways for one in tasks if groups[one.classes[0]] == number} for number in (0, 1)}
    assert ways == {0: {2, 3}, 1: {2, 3, 4, 5, 6}}


def test_episodes_have_the_images_that_were_drawn() -> None:
    source = as_images(SIZES)
    given = source.sampler("train", EACH, 0, CPU)(0, 40)
    assert isinstance(given, MixedEpisodes)
    assert given.n_tasks == 40
    drawn = sampler(EACH).draw(0, 40)
    for one, expected in zip(given.split(1), drawn, strict=True):
        x = torch.cat([one.support_x, one.query_x], 1).flatten()
        assert (x * 255).round().int().tolist() == expected.rows.tolist()
        assert one.support_sizes == list(expected.shots)
        assert one.query_sizes == list(expected.queries)
        assert one.support_y[0].bincount(minlength=one.ways).tolist() == list(expected.shots)
        assert (one.support_y.diff() >= 0).all()  # class-major
        assert (one.query_y.diff() >= 0).all()
    places = sorted(place for group, _ in given.chunks() for place in group)
    assert places == list(range(40))
    assert all(tasks.n_tasks <= 2 for _, tasks in given.chunks(2))


def test_equal_tasks_are_one_meta_batch_and_a_range_of_one_number_is_that_number() -> None:
    source = as_images(SIZES)
    whole = source.sampler("train", replace(UNLABELLED, distractors=0), 0, CPU)(0, 6)
    assert isinstance(whole, Episodes)
    assert whole.unlabelled_x is not None
    assert whole.unlabelled_x.shape == (6, 6, 1, 1, 1)
    assert whole.shots is whole.queries is None
    config = compose("task.ways=[5,5]", "task.shots=[1,4]", "train.task.queries=[3,3]")
    assert task_of(config, "train") == TaskShape(5, (1, 4), 3)


def test_meta_batches_are_put_together_by_shape() -> None:
    source = as_images(SIZES)
    parts = [source.sampler("train", TaskShape(2, shots, 1), 0, CPU)(0, 2) for shots in (1, 2, 1)]
    whole = together(parts)  # type: ignore[arg-type]
    assert isinstance(whole, MixedEpisodes)
    assert whole.places == ((0, 1, 4, 5), (2, 3))
    for one, other in zip(whole.split(1), (task for part in parts for task in part.split(1)), strict=True):
        torch.testing.assert_close(one.support_x, other.support_x)
    assert isinstance(together(parts[:1]), Episodes)  # type: ignore[arg-type]


def test_regression_tasks_have_as_many_points_as_they_draw() -> None:
    draw = Sinusoid().sampler("train", TaskShape(1, (2, 5), (1, 3)), 0, CPU)
    whole = list(draw(0, 400).split(1))
    likely(np.bincount([one.support_x.shape[1] for one in whole])[2:])
    likely(np.bincount([one.query_x.shape[1] for one in whole])[1:])
    (single,) = draw(7, 8).split(1)
    torch.testing.assert_close(single.support_y, whole[7].support_y)
    most = Sinusoid().sampler("train", TaskShape(1, 5, 3), 0, CPU)(7, 8)
    size = single.support_x.shape[1]
    torch.testing.assert_close(single.support_x, most.support_x[:, :size])  # type: ignore[union-attr]


def test_noise_keeps_the_sizes_of_classes() -> None:
    sizes = [60] * 4
    source = as_images(sizes)
    shape = TaskShape(3, (1, 4), (1, 3), balanced=False)
    draw = with_noise(lambda task: source.sampler("train", task, 0, CPU), shape, 0, tasks=1.0, labels=0.5)
    clean = with_noise(lambda task: source.sampler("train", task, 0, CPU), shape, 0, tasks=0.0, labels=0.5)
    wrong, total = 0, 0
    for noisy, right in zip(draw(0, 300).split(1), clean(0, 300).split(1), strict=True):
        assert noisy.shape == right.shape
        torch.testing.assert_close(noisy.query_x, right.query_x)
        numbers = (noisy.support_x.flatten() * 255).round().int()
        own = (right.support_x.flatten() * 255).round().int() // 60
        asked = set((noisy.query_x.flatten() * 255).round().int().tolist())
        assert not asked & set(numbers.tolist())
        assert len(set(numbers.tolist())) == len(numbers)
        wrong += int((numbers // 60 != own).sum())
        total += len(numbers)
    assert abs(wrong / total - 0.5) < 4 * 0.5 / math.sqrt(total)
    (single,) = draw(11, 12).split(1)
    torch.testing.assert_close(single.support_x, list(draw(0, 300).split(1))[11].support_x)


NOISY = {
    "shots": TaskShape(5, (1, 10), 5),
    "queries": TaskShape(3, 2, (1, 10), protocol="meta_dataset"),
    "each": TaskShape(3, (1, 6), (1, 6), balanced=False),
    "unlabelled": TaskShape(2, (1, 4), (1, 4), unlabelled=3),
    "shared": TaskShape(2, (1, 4), (1, 4), unlabelled=3, labelled_share=0.5),
}


@pytest.mark.parametrize("case", NOISY)
def test_noise_changes_no_number_that_is_drawn(case: str) -> None:
    """Of classes that have hardly more than the largest task: their sizes are spread as those of tasks without noise."""
    shape, source = NOISY[case], as_images([20] * 6)

    def draw(task: TaskShape) -> Any:
        return source.sampler("train", task, 0, CPU)

    def sizes(whole: Episodes | MixedEpisodes) -> list[list[int]]:
        return [one.support_sizes + one.query_sizes for one in whole.split(1)]

    clean, noisy = draw(shape)(0, 400), with_noise(draw, shape, 0, tasks=1.0, labels=0.5)(0, 400)
    seen, found = np.array(sizes(clean)), np.array(sizes(noisy))
    for number in range(seen.shape[1]):
        both = [np.bincount(part[:, number], minlength=12) for part in (seen, found)]
        assert both[0].astype(bool).tolist() == both[1].astype(bool).tolist()
        assert abs(seen[:, number].mean() - found[:, number].mean()) <= 4 * seen[:, number].std() * (2 / 400) ** 0.5
    wrong = total = reused = 0
    for one in noisy.split(1):
        assert one.spare is None
        support, asked = ((part.flatten() * 255).round().int() for part in (one.support_x, one.query_x))
        assert not {*support.tolist()} & {*asked.tolist()}
        (queried,) = one.query_y
        own = {int(label): int(image) // 20 for image, label in zip(asked, queried, strict=True)}
        assert all(int(image) // 20 == own[int(label)] for image, label in zip(asked, queried, strict=True))
        right = [int(image) // 20 == own[int(label)] for image, label in zip(support, one.support_y[0], strict=True)]
        wrong += right.count(False)
        total += len(support)
        reused += len(support) - len({*support.tolist()})
    assert abs(wrong / total - 0.5) < 5 * 0.5 / math.sqrt(total)
    assert reused / total < 0.1  # a class that has hardly more than its task gives some of its images twice


BAD = {
    "task.shots=[10,1]": r"^task\.shots=\[10, 1\]: the range holds no number; its least comes first: \[1,10\]$",
    "task.ways=[0,5]": r"^task\.ways=\[0, 5\]: must be at least 1$",
    "task.shots=0": r"^task\.shots=0: must be at least 1$",
    "task.shots=[]": r"^task\.shots=\[\]: a range has two numbers, the least and the largest, such as \[1,10\]$",
    "task.queries=[1,2,3]": r"^task\.queries=\[1, 2, 3\]: a range has two numbers",
    "task.shots=1.5": r"^task\.shots=1\.5: must be a whole number, or a range such as \[1,10\]$",
    "task.shots=[1,2.5]": r"^task\.shots=\[1, 2\.5\]: must be a whole number",
    "task.ways=many": r"^task\.ways=many: must be a whole number",
    "task.ways=null": r"^task\.ways=null: must be a whole number",
    "test.task.ways=[3]": r"^test\.task\.ways=\[3\]: a range has two numbers",
    "train.task.queries=[-1,2]": r"^train\.task\.queries=\[-1, 2\]: must be at least 0$",
    "task.ways=true": r"^task\.ways=true: must be a whole number",
    "task.protocol=metadataset": r"^task\.protocol=metadataset: is not one of uniform, meta_dataset; did you mean meta_dataset",
    "task.distractors=5": r"^task\.distractors=5: are further classes of unlabelled items, and tasks have none",
    "test.task.distractors=5": r"^test\.task\.distractors=5: are further classes .* add test\.task\.unlabelled=5$",
    "task.protocol=meta_dataset task.balanced=true": r"^task\.balanced=true: Meta-Dataset's sampler draws the shots of each class; leave",
    "test.task.protocol=meta_dataset task.balanced=true": r"^task\.balanced=true: .* or set test\.task\.balanced=false$",
    "task.protocol=meta_dataset test.task.balanced=true": r"^test\.task\.balanced=true: Meta-Dataset's sampler",
    "task.balanced=false": r"^task\.balanced=false: .* both are numbers; give a range \(task\.shots=\[1,5\], say\), or leave it null$",
    "task.balanced=false task.shots=[2,2]": r"^task\.balanced=false: has each class draw",
    "task.shots=[1,5] test.task.shots=1 test.task.balanced=false": r"^test\.task\.balanced=false: .* \(test\.task\.shots=\[1,5\], say\)",
    "task.labelled_share=0": r"^task\.labelled_share=0: must be above 0 and at most 1",
}


@pytest.mark.parametrize("word", BAD)
def test_a_bad_size_is_one_line(word: str) -> None:
    with pytest.raises(UserError, match=BAD[word]):
        check(compose(*word.split()))


def test_ranges_are_good_wherever_a_number_is() -> None:
    words = ["task.shots=[1,10]", "train.task.ways=[2,5]", "test.task.queries=[1,3]", "train.task.queries=[0,2]"]
    config = compose(*words, "test.task.balanced=false")
    check(config)
    assert task_of(config, "train") == TaskShape((2, 5), (1, 10), (0, 2))
    assert task_of(config, "test") == TaskShape(5, (1, 10), (1, 3), balanced=False)
    assert task_of(config, "test").describe() == {
        "ways": 5,
        "shots": [1, 10],
        "queries": [1, 3],
        "balanced": False,
    }
    assert task_of(compose(), "test").describe() == {"ways": 5, "shots": 1, "queries": 15}


def test_a_protocol_brings_its_own_ranges() -> None:
    assert task_of(compose("task.protocol=meta_dataset"), "test") == PAPER
    fixed = task_of(compose("task.protocol=meta_dataset", "task.ways=20", "task.queries=[1,5]"), "train")
    assert fixed == replace(PAPER, ways=20, queries=(1, 5))
    config = compose("test.task.protocol=meta_dataset", "test.task.ways=[5,9]")
    assert task_of(config, "test") == replace(PAPER, ways=(5, 9))
    assert task_of(config, "train") == TaskShape(5, 1, 15)
    for word in (
        "task.balanced=false",
        "task.balanced=true task.shots=3",
        "train.task.balanced=true train.task.protocol=uniform",
    ):
        check(compose("task.protocol=meta_dataset", *word.split()))
    check(compose("task.balanced=false", "train.task.shots=[1,5]"))  # the tests draw nothing
    with pytest.raises(UserError, match=r"ways=600: Meta-Dataset's support sets have at most 500 items"):
        check(compose("task.protocol=meta_dataset", "task.ways=600"))


def test_a_split_that_cannot_serve_a_range_says_why() -> None:
    source = as_images([12, 3, 12])

    def refused(task: TaskShape, match: str) -> None:
        with pytest.raises(UserError, match=match):
            source.sampler("test", task, 0, CPU)

    refused(
        TaskShape((2, 4), 1, 1),
        r"^task: ways = 4 is above the 3 classes of the test split; every split has the same ones, so that no test is of new "
        r"classes\. To tell these 3 classes themselves apart: recipe=target_only target=folder target\.data\.root=FOLDER$",
    )
    refused(TaskShape((1, 3), 1, 1), r"^test\.task\.ways=\[1,3\]: a task of one class has one answer")
    refused(
        TaskShape(2, (2, 5), (2, 5)),
        r"^task: shots \+ queries = 2 \+ 2 = 4 is above the 3 images of the smallest class of the test split, class 1; lower "
        r"test\.task\.shots or test\.task\.queries, or leave small classes out",
    )
    refused(
        TaskShape(2, 1, 5),
        r"smallest class of the test split, class 1; lower .*, or let each task draw what its classes have: "
        r"test\.task\.queries=\[1,5\], or leave small classes out: task\.min_items=6$",
    )
    refused(
        TaskShape(2, 1, 1, unlabelled=2),
        r"shots \+ queries \+ unlabelled = 1 \+ 1 \+ 2 = 4 is above the 3 images.*class 1",
    )
    refused(
        TaskShape(2, 1, 1, unlabelled=1, distractors=2), r"^test\.task\.distractors=2: with 2 ways they are above the 3"
    )
    refused(
        TaskShape(2, 1, 1, labelled_share=0.5),
        r"= 2 is above the 1 labelled image \(task\.labelled_share=0\.5\) of the smallest class of the test split, class 1; .*"
        r"raise test\.task\.labelled_share$",
    )
    refused(
        TaskShape(2, 1, 1, unlabelled=2, labelled_share=0.7),
        r"unlabelled = 2 is above the 1 image without labels.*class 1",
    )
    refused(TaskShape(2, (2, 5), (2, 5)), r"or leave small classes out: task\.min_items=4$")
    refused(
        TaskShape(2, 1, 1, unlabelled=2, labelled_share=0.4), r"class 1; leave small classes out: task\.min_items=5$"
    )
    least = r"^task\.min_items=%d: leaves %d of the 3 classes for the test, and a task needs %d; take test\.task\.min_items=%d$"
    refused(TaskShape(3, 1, 1, min_items=4), least % (4, 2, 3, 3))
    refused(TaskShape(2, 1, 1, min_items=13), least % (13, 0, 2, 12))
    refused(TaskShape(2, 1, 1, unlabelled=1, distractors=1, min_items=4), least % (4, 2, 3, 3))
    refused(TaskShape(4, 1, 1, min_items=4), r"^task: ways = 4 is above the 2 classes of the test split")
    large = source.sampler("test", TaskShape(2, 1, 5, min_items=6), 0, CPU)(0, 30)
    assert isinstance(large, Episodes)
    pixels = (torch.cat([large.support_x, large.query_x], 1) * 255).round().int()
    assert not ((pixels >= 12) & (pixels < 15)).any()  # the images of class 1
    source.sampler("test", TaskShape(2, (1, 50), (1, 50)), 0, CPU)(0, 5)  # the range allows the small class
    toy_images().sampler("test", replace(PAPER, ways=(5, 12)), 0, CPU)(0, 1)


NOTHING = "too few classes of this split have enough for any such task. To tell these 4 classes themselves apart: recipe=target_only "
DRAW = "let each task draw what its classes have: test.task.queries=[1,15]"


@pytest.mark.parametrize(
    ("learned", "tested", "task", "advice"),
    [
        # No class of one image can be made to serve, and without it too few are left.
        ([19, 17], [1, 14], TaskShape(2, 1, 15), NOTHING),
        ([19, 17], [1, 14], TaskShape(2, 1, 15, min_items=16), NOTHING),
        ([19, 17], [16, 14], TaskShape(2, 1, 15), f"lower test.task.queries, or {DRAW}"),
        ([19, 17], [1, 4, 4], TaskShape(3, 1, 1, min_items=2), "take test.task.ways=2"),
        ([19, 17], [1, 4, 4, 4], TaskShape((2, 4), 1, 1, min_items=2), "take test.task.ways=[2,3]"),
        ([19, 17], [1, 4, 4], TaskShape(3, 1, 1), "take test.task.ways=2 and test.task.min_items=2"),
        ([19, 17], [16, 3], TaskShape(2, (1, 10), 15), f"lower test.task.queries, or {DRAW}"),
        ([19, 17], [16, 3], TaskShape(2, 1, 15, unlabelled=1), f"lower test.task.queries or test.task.unlabelled, or {DRAW}"),
        ([19, 17], [16, 3], TaskShape(2, 1, 15, min_items=4), f"{DRAW}, and leave small classes out: test.task.min_items=2"),
        ([19, 17], [16, 3, 18], TaskShape(2, 1, 15), f"lower test.task.queries, or {DRAW}, or leave small classes out: task.min_items=16"),
        ([19, 17], [1, 16, 14], TaskShape(2, 1, 1), "leave small classes out: task.min_items=2"),
        ([19, 1], [1, 16, 14], TaskShape(2, 1, 1), "leave small classes out: test.task.min_items=2"),
        ([19, 17], [14, 16, 18], TaskShape(2, 1, 1, min_items=18), "take test.task.min_items=16"),
        ([19, 17], [4, 4], TaskShape(2, 1, 3, query_dirichlet=2.0), "lower test.task.queries or test.task.shots"),
    ],
)  # fmt: skip
def test_what_is_advised_for_small_classes_leads_on(
    learned: list[int], tested: list[int], task: TaskShape, advice: str
) -> None:
    sizes = [*learned, *tested]
    tests = range(2, len(sizes))
    images = np.zeros((sum(sizes), 1, 1, 1), np.uint8)
    source = ImageSource(table(images, sizes), {"train": [0, 1], "val": tests, "test": tests})
    with pytest.raises(UserError) as caught:
        source.sampler("test", task, 0, CPU)
    said = str(caught.value).partition("; ")[2]
    assert said.startswith(advice)
    assert advice == NOTHING or said == advice


def test_ways_that_are_advised_leave_room_for_distractors() -> None:
    source = toy_images()
    source.splits = {"train": np.arange(5), "val": np.arange(5, 8), "test": np.arange(8, 12)}
    task = TaskShape((2, 9), 1, 1, unlabelled=1, distractors=1)
    with pytest.raises(UserError, match=r"ways = 9 is above the 4 classes of the test split.*; take task.ways=2 "):
        source.sampler("test", task, 0, CPU)
    source.sampler("val", replace(task, ways=2), 0, CPU)


def test_balanced_sizes_are_what_the_smallest_class_can_have() -> None:
    random = np.random.default_rng(0)
    for balanced in (True, False):
        task = TaskShape(4, (1, 9), (2, 6), balanced=balanced)
        for _ in range(300):
            sizes = random.integers(3, 20, 4)
            shots, queries = uniform_sizes(task, random.random((2, 4)), sizes)
            assert (shots + queries <= sizes).all()
            assert ((shots >= 1) & (shots <= 9) & (queries >= 2) & (queries <= 6)).all()
            assert not balanced or len(set(shots)) == len(set(queries)) == 1


def test_a_config_without_these_keys_is_one_of_equal_tasks() -> None:
    """Runs of a version that did not know them go on, since all that is new is off."""
    config = compose()
    new = [name for name in config.task if name not in ("ways", "shots", "queries")]
    assert not any(config.task[name] for name in new)
    assert task_of(compose("test.task.protocol=uniform", "task.ways=7"), "test") == TaskShape(7, 1, 15)
    assert task_of(compose("task.protocol=meta_dataset", "test.task.protocol=uniform"), "test") == TaskShape(5, 1, 15)
    drawn = "task.shots=[1,2]"
    assert task_of(compose("task.balanced=false", drawn, "test.task.balanced=true"), "test").balanced
    assert not task_of(compose("task.balanced=false", drawn), "test").balanced
    assert task_of(compose("task.balanced=false"), "test") == TaskShape(5, 1, 15)  # nothing is drawn
    fixed = compose("task.protocol=meta_dataset", "task.ways=4", "task.shots=2", "task.queries=3")
    assert task_of(fixed, "test") == TaskShape(4, 2, 3)


def test_the_command_for_the_classes_of_a_folder_names_that_folder(tmp_path: Path) -> None:
    root = tmp_path / "my images"
    for number in range(4):
        (root / f"{number}").mkdir(parents=True)
        for item in range(3):
            Image.new("L", (4, 4), 50 * number + item).save(root / f"{number}" / f"{item}.png")
    with pytest.raises(
        UserError,
        match=f"themselves apart: recipe=target_only target=folder target.data.root='{re.escape(str(root))}' target.data.image_size=4$",
    ):
        Folder(root=str(root), image_size=4).sampler("train", TaskShape(5, 1, 1), 0, CPU)


def test_the_command_for_the_classes_of_a_folder_reads_its_images_as_this_one_does(tmp_path: Path) -> None:
    """Without `skip_bad` the command would be refused at the very file that was left out here."""
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
        for item in range(3):
            Image.new("L", (4, 4), 50 * number + item).save(tmp_path / f"{number}" / f"{item}.png")
    (tmp_path / "0" / "bad.png").write_bytes(b"no image")
    folder = Folder(root=str(tmp_path), channels=3, value_range=[0, 200], skip_bad=True)
    settings = "target.data.channels=3 'target.data.value_range=[0,200]' target.data.skip_bad=true"
    with pytest.raises(UserError, match=rf"target\.data\.root={re.escape(str(tmp_path))} {re.escape(settings)}$"):
        folder.sampler("train", TaskShape(5, 1, 1), 0, CPU)
