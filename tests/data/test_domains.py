"""Several data sets at once: their shares of the tasks, one shape for all, tests on each, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, compose, table
from omegaconf import OmegaConf
from PIL import Image
from shell import metarun, result
from shell import run_folder as only_run
from tiny_encoder import Squares

import metarun as package
from metarun.config.shorthand import expanded, folded, folded_choices
from metarun.core import TaskShape
from metarun.data import shared, table_source
from metarun.data.domains import Domains
from metarun.data.folder import Folder
from metarun.data.image_source import ImageSource
from metarun.data.origin import Origin
from metarun.data.shared import says_what_it_is
from metarun.data.source import Split
from metarun.data.table_source import TableSource
from metarun.data.test_sets import fit_to_network, rule
from metarun.data.varied import VariedSampler
from metarun.encoders import EncodedSource, Encoding
from metarun.encoders.building import encoded_as
from metarun.encoders.encoded import saw_of
from metarun.errors import UserError
from metarun.files import digest
from metarun.inference.preprocessing import Preprocessing
from metarun.ops import metrics
from metarun.report.collect import collect
from metarun.report.summary import summarise
from metarun.report.tables import overview, section_table
from metarun.runs import contents, seen
from metarun.runs.building import normalize_as_trained, used_as_trained
from metarun.stages import training_data
from metarun.stages.scores import over_sets

TASK = TaskShape(ways=2, shots=1, queries=2)


class Toy:
    """In place of a node of a config: builds a set of images, whose pixels all are `value`, with the settings it is given."""

    def __init__(self, value: int, channels: int, side: int, classes: int = 9, names: str = "class") -> None:
        self.value, self.channels, self.classes, self.names = value, channels, classes, names
        self.node = OmegaConf.create({"image_size": side})

    def knows(self, name: str) -> bool:
        return name == "image_size"

    def build(self, image_size: int | None = None) -> ImageSource:
        side = image_size or self.node.image_size
        images = np.full((self.classes * 4, self.channels, side, side), self.value, np.uint8)
        held = table(images, [4] * self.classes)
        held.names[:] = [f"{self.names} {self.value} {number}" for number in range(self.classes)]
        third = self.classes // 3
        splits: dict[Split, range] = {
            "train": range(third),
            "val": range(third, 2 * third),
            "test": range(2 * third, self.classes),
        }
        return ImageSource(held, splits, normalize=True)


class Built(Toy):
    """In place of a node of a config: a set of images that is there."""

    def __init__(self, source: ImageSource) -> None:
        super().__init__(0, 1, 6)
        self.source = source

    def build(self, image_size: int | None = None) -> ImageSource:
        return self.source


def encoded(source: TableSource, views: int) -> EncodedSource:
    return EncodedSource(source, Squares(), Encoding("float32", views, 8, "un", None))


def three(**settings: Any) -> Domains:
    sets: Any = {"dark": Toy(10, 1, 8), "grey": Toy(110, 1, 6), "light": Toy(250, 3, 4)}
    return Domains(sets=sets, **settings)


def values(found: Domains, split: Split, start: int, stop: int, seed: int = 0) -> np.ndarray:
    """The pixel value of each task, by which its set is known."""
    episodes = found.sampler(split, TASK, seed, CPU)(start, stop)
    assert episodes.support_x.shape[1:] == (2, 3, 8, 8)
    flat = torch.cat([episodes.support_x, episodes.query_x], 1).flatten(1)
    assert (flat.max(1).values - flat.min(1).values).max() < 1e-4
    return flat[:, 0].numpy().round(3)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_task_is_a_function_of_seed_split_and_number(split: Split) -> None:
    whole = three(normalize=False).sampler(split, TASK, 3, CPU)(0, 20)
    again = three(normalize=False).sampler(split, TASK, 3, CPU)
    for place in (0, 7, 19):
        assert torch.equal(again(place, place + 1).support_x[0], whole.support_x[place])
    assert torch.equal(again(5, 13).query_x, whole.query_x[5:13])


def test_too_few_classes_of_one_set_name_the_key_of_its_division() -> None:
    with pytest.raises(UserError, match=r"^data: dark: task: ways = 7 .* division \(data\.sets\.dark\.ratios, where"):
        three().sampler("train", replace(TASK, ways=7), 0, CPU)


def test_any_stretch_of_tasks_has_the_sets_in_their_shares() -> None:
    found = three(shares=[2, 1, 1])
    for seed, start in ((0, 0), (1, 1000), (2, 10**9)):
        counts = np.bincount(found.domains(seed, "train", start, start + 40), minlength=3)
        assert np.abs(counts - [20, 10, 10]).max() <= 2
    assert list(found.shares.values()) == [0.5, 0.25, 0.25]
    assert not np.array_equal(found.domains(0, "train", 0, 40), found.domains(0, "val", 0, 40))
    assert not np.array_equal(found.domains(0, "train", 0, 40), found.domains(1, "train", 0, 40))


def test_all_images_have_one_shape_and_one_normalisation() -> None:
    found = three(shares=[2, 1, 1])
    assert found.input_shape == (3, 8, 8)
    mean = (2 * 10 + 110 + 250) / 4 / 255
    deviation = np.sqrt((2 * 10**2 + 110**2 + 250**2) / 4 / 255**2 - mean**2)
    assert np.allclose(found.statistics_of(None), [[mean] * 3, [deviation] * 3])
    expected = {round((value / 255 - mean) / deviation, 3) for value in (10, 110, 250)}
    assert sorted(set(values(found, "train", 0, 12))) == pytest.approx(sorted(expected), abs=1e-3)
    assert three(image_size=5, channels=1).input_shape == (1, 5, 5)
    described = json.loads(json.dumps(found.describe()))
    assert "3x8x8" in described["rule"]
    assert described["shares"] == {"dark": 0.5, "grey": 0.25, "light": 0.25}
    assert described["classes"] == {"train": 9, "val": 9, "test": 9}
    assert described["fingerprint"] != three().describe()["fingerprint"]


def test_labelled_images_of_all_sets_are_told_apart() -> None:
    found = three(normalize=False)
    images = found.labelled(None, "train")
    assert images.names[0] == "dark/class 10 0"
    assert len(images.names) == 9
    batch = images.batch(np.array([0, len(images) - 1, 13]), CPU)
    assert batch.x.shape == (3, 3, 8, 8)
    assert [round(float(x.mean()) * 255) for x in batch.x] == [10, 250, 110]
    assert batch.y.tolist() == [0, 8, 3]
    assert images.identities[-1] == "light/class 250 2/3"


@pytest.mark.parametrize(
    ("build", "saying"),
    [
        (lambda: three(shares=[1, 2]), r"data.shares=\[1, 2\]: has 2 numbers for the 3 data sets dark, grey, light"),
        (lambda: Domains(sets={}), "names no data set"),
        (lambda: three().sampler("train", TaskShape(4, 1, 1), 0, CPU), "data: dark: task: ways = 4 is above the 3"),
        (lambda: three().sampler("train", TaskShape(2, 3, 2), 0, CPU), "data: dark: task: shots .* lower train.task"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(build: Callable[[], Any], saying: str) -> None:
    with pytest.raises(UserError, match=saying):
        build()


# Tests on several data sets


def test_a_test_set_has_all_classes_unless_it_is_trained_on() -> None:
    trained = three(shares=[2, 1, 1])
    sets: Any = {"grey": Toy(110, 1, 6), "new": Toy(40, 3, 12)}
    found = fit_to_network(sets, trained)
    assert found["grey"].splits["test"].tolist() == [6, 7, 8]
    assert found["new"].splits["test"].tolist() == list(range(9))
    assert rule(found["new"], whole=True) == {"classes": "all 9 classes", "images": "3x8x8"}
    assert rule(found["grey"], whole=True)["images"] == "1x8x8 brought to 3x8x8"
    mean, deviation = trained.statistics_of(None)
    x = found["new"].sampler("test", TASK, 0, CPU)(0, 2).support_x
    assert x.shape == (2, 2, 3, 8, 8)
    assert x.mean().item() == pytest.approx((40 / 255 - mean[0]) / deviation[0], abs=1e-5)


def test_weights_that_saw_a_test_set_are_refused() -> None:
    sets: Any = {"new": Toy(40, 3, 12)}
    found = fit_to_network(sets, three())
    known = seen.classes(Toy(40, 3, 12).build(), "train")
    with pytest.raises(UserError, match="3 of the 9 classes that the meta-test is on"):
        seen.refuse_test_classes(known, found["new"], "checkpoint=x")


def test_the_same_classes_in_another_order_are_the_same_classes() -> None:
    """As CIFAR-FS and FC100, which divide the same 100 classes, each in an order of its own."""
    source, other = three(), Toy(110, 1, 6).build()
    other.table.names.reverse()
    (tested,) = fit_to_network({"other": Built(other)}, source).values()  # type: ignore[dict-item]
    assert [tested.table.names[number] for number in tested.splits["test"]] == [f"class 110 {n}" for n in (6, 7, 8)]
    known = seen.classes(Toy(110, 1, 6).build(), "train")
    assert seen.trained_on(known, other, range(9)) == {6, 7, 8}  # the names 0, 1 and 2
    with pytest.raises(UserError, match="3 of the 9 classes"):
        seen.refuse_test_classes(known, other.divided({"train": [], "val": [], "test": range(9)}), "checkpoint=x")


def test_sets_that_divide_the_same_images_otherwise_are_refused() -> None:
    other = Toy(110, 1, 6).build()
    other.table.names.reverse()
    with pytest.raises(
        UserError, match=r"grey and again are the same images, divided otherwise: 3 classes \(class 110 0, say\)"
    ):
        Domains(sets={"grey": Toy(110, 1, 6), "again": Built(other)})  # type: ignore[dict-item]
    assert len(Domains(sets={"grey": Toy(110, 1, 6), "again": Toy(110, 1, 6)}).sets) == 2  # type: ignore[dict-item]


def of_classes(
    numbers: range, side: int = 6, order: int = 1, names: str = "bird", seed: int = 0, places: Sequence[int] = range(5)
) -> ImageSource:
    """Some of 12 classes of 5 images each, a third of them in each split, in their order or the other way round.

    The images are drawn by `seed`, and lie in a class in the order of `places`, which may leave out some.
    """
    draw = np.random.default_rng(seed)
    every = draw.integers(0, 256, (12, 5, 1, side, side), np.uint8)[:, list(places)]
    chosen = list(numbers)[::order]
    held = table(every[chosen].reshape(-1, 1, side, side), [len(places)] * len(chosen))
    held.names[:] = [f"{names} {number}" for number in chosen]
    third = len(chosen) // 3
    splits: dict[Split, range] = {
        "train": range(third),
        "val": range(third, 2 * third),
        "test": range(2 * third, len(chosen)),
    }
    return ImageSource(replace(held, fingerprint=digest([*chosen, side, seed, *places])), splits)


def test_classes_that_two_sets_share_are_known_one_by_one() -> None:
    """By an image and the name or by the images alone; other images, or a name alone, are no proof."""
    source, other = of_classes(range(12)), of_classes(range(9))
    known = seen.classes(source, "train")  # 0 to 3
    assert seen.trained_on(known, other, range(9)) == {0, 1, 2, 3}
    renamed = of_classes(range(9), names="x")
    assert seen.trained_on(known, renamed, range(9)) == {0, 1, 2, 3}
    resized = of_classes(range(9), side=8)
    assert seen.trained_on(known, resized, range(9)) == set()
    assert seen.namesakes(known, resized, range(9)) == ["bird 0", "bird 1", "bird 2", "bird 3"]
    assert seen.namesakes(known, renamed, range(9)) == []
    assert seen.namesakes(known, source, range(12)) == []  # of its own division there is nothing to tell
    everything: Any = {"train": [], "val": [], "test": range(9)}
    with pytest.raises(UserError, match="4 of the 9 classes that the meta-test is on"):
        seen.refuse_test_classes(known, other.divided(everything), "checkpoint=x")
    blank = Toy(40, 1, 6).build()
    assert seen.trained_on(seen.classes(Toy(40, 1, 6, classes=12).build(), None), blank, range(9)) == set()


def test_classes_of_one_name_in_several_splits_are_told_apart() -> None:
    """As those that a library numbers from 0 in each split."""
    source = of_classes(range(12))
    source.table.names[:] = [f"{number % 4}" for number in range(12)]
    known = seen.classes(source, "train")
    assert seen.trained_on(known, source, range(12)) == {0, 1, 2, 3}
    assert seen.namesakes(known, source, range(12)) == []
    seen.refuse_test_classes(known, source, "stage train")
    (found,) = fit_to_network({"again": Built(source)}, source).values()  # type: ignore[dict-item]
    assert {split: numbers.tolist() for split, numbers in found.splits.items()} == {
        split: numbers.tolist() for split, numbers in source.splits.items()
    }


def test_what_older_checkpoints_say_of_seen_classes_is_read() -> None:
    source = of_classes(range(12))
    new = seen.classes(source, "train")
    names = sorted(source.table.names)
    for key in (shared.key(source), shared.key(source).partition("/")[0]):
        old = {key: [0, 1]}
        assert {source.table.names[number] for number in seen.trained_on(old, source, range(12))} == set(names[:2])
    assert seen.trained_on(old, of_classes(range(9)), range(9)) == set()
    both = seen.merged({shared.key(source): [0, 1]}, new)
    assert both == seen.merged(new, {shared.key(source): [0, 1]})
    assert seen.trained_on(both, of_classes(range(9)), range(9)) == {0, 1, 2, 3}


def test_classes_of_a_test_set_that_are_trained_on_are_left_out() -> None:
    sets: Any = {"part": Built(of_classes(range(9, -1, -1)))}
    source = of_classes(range(12))
    (found,) = fit_to_network(sets, source).values()
    names = {split: {found.table.names[number] for number in numbers} for split, numbers in found.splits.items()}
    assert names == {
        "train": {f"bird {number}" for number in range(4)},
        "val": {f"bird {number}" for number in range(4, 8)},
        "test": {"bird 8", "bird 9"},
    }
    told = rule(found, True, source)["classes"]
    assert told == "2 of its 10 classes, since the images of the others are trained or validated on too"
    assert rule(source, True, source)["classes"] == "its 4 test classes, since it is trained on too"


def test_sets_that_share_a_class_on_both_sides_of_a_test_are_refused() -> None:
    sets: Any = {"one": Built(of_classes(range(12))), "two": Built(of_classes(range(9), order=-1))}
    with pytest.raises(UserError, match=r"one and two share images, divided otherwise: 4 classes \(bird 0, say\)"):
        Domains(sets=sets)
    apart: Any = {"one": Built(of_classes(range(6))), "two": Built(of_classes(range(6, 12)))}
    assert len(Domains(sets=apart).sets) == 2


def test_other_images_under_the_same_names_are_other_classes() -> None:
    """As MNIST and the digits of scikit-learn, or photos and sketches of the same things: their names warn, and no more."""
    source, other = of_classes(range(12)), of_classes(range(12), order=-1, seed=1)
    (found,) = fit_to_network({"other": Built(other)}, source).values()  # type: ignore[dict-item]
    assert len(found.splits["test"]) == 12
    assert rule(found, True, source)["classes"] == "all 12 classes"
    known = seen.classes(source, "train")
    seen.refuse_test_classes(known, found, "checkpoint=x")
    assert shared.shared_classes(known, other) == (set(), set())
    assert seen.namesakes(known, other, range(12)) == [f"bird {number}" for number in range(4)]
    generic = of_classes(range(12), names=""), of_classes(range(12), names="", seed=1)
    assert len(seen.namesakes(seen.classes(generic[0], "train"), generic[1], range(12))) == 4
    both = Domains(sets={"photo": Built(source), "sketch": Built(other)})  # type: ignore[dict-item]
    known = seen.classes(both, "train")
    assert len(known) == 2  # though all names are the same
    for images in both.tested.values():
        seen.refuse_test_classes(known, images, "stage train")


def test_the_same_images_are_known_again_in_another_order() -> None:
    """Another division of the images into parts gives their classes other ends."""
    known = seen.classes(of_classes(range(12)), "train")
    again = of_classes(range(12), places=[2, 0, 3, 4, 1])
    assert shared.shared_classes(known, again) == ({0, 1, 2, 3}, set())
    with pytest.raises(UserError, match="are the same images, divided otherwise: 4 classes"):
        Domains(sets={"one": Built(of_classes(range(12))), "two": Built(of_classes(range(12), order=-1))})  # type: ignore[dict-item]


@pytest.mark.parametrize("places", [[1, 2, 4], [4, 1, 3, 0], [2, 0, 3, 4, 1]])
def test_a_part_of_the_same_images_is_known_again_under_other_names(places: list[int]) -> None:
    source, part = of_classes(range(12)), of_classes(range(12), places=places, names="other")
    assert shared.shared_classes(seen.classes(source, "train"), part) == ({0, 1, 2, 3}, set())
    (found,) = fit_to_network({"part": Built(part)}, source).values()  # type: ignore[dict-item]
    assert {split: numbers.tolist() for split, numbers in found.splits.items()} == {
        split: numbers.tolist() for split, numbers in source.splits.items()
    }


def test_of_a_large_table_some_images_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_source, "COMPARED_BYTES", 0)
    source, copied = of_classes(range(12)), of_classes(range(12), names="other", order=-1)
    monkeypatch.delattr(TableSource, "every_digest")  # which would read the table whole
    assert shared.shared_classes(seen.classes(source, "train"), copied) == ({8, 9, 10, 11}, set())


def test_one_image_in_two_classes_of_other_names_makes_them_not_the_same() -> None:
    """It may be a placeholder, or lie in a wrong class."""
    source, other = of_classes(range(12)), of_classes(range(12), seed=1, names="other")
    other.table.images[0] = source.table.images[0]
    assert shared.shared_classes(seen.classes(source, "train"), other) == (set(), set())


def test_names_count_where_images_cannot_be_compared_and_a_line_says_so() -> None:
    """Of another size, which a later run's images may have; or of a checkpoint that says nothing of them."""
    source, larger = of_classes(range(12)), of_classes(range(12), side=8)
    known = seen.classes(source, "train")
    whole = larger.divided({"train": [], "val": [], "test": range(12)})
    reasons = {
        "they were 1x6x6 and are 1x8x8 here": known,
        "they are not noted": {shared.key(source).partition("/")[0]: [0, 1]},
    }
    for reason, before in reasons.items():
        with pytest.raises(
            UserError, match=rf"with the names of \d of the 12 classes .*cannot be told, since {reason}"
        ):
            seen.refuse_test_classes(before, whole, "checkpoint=x")
    assert seen.namesakes(known, larger, range(12)) == []  # they are refused instead
    encoder = Squares()
    encoder.seen, encoder.pretrained = known, False
    told = EncodedSource(whole, encoder, Encoding("float32", 1, 8, "un", None)).saw("test")
    assert told["saw_these_classes"] == "yes"
    assert told["saw"] == "the training images of an earlier run (compared by the names of classes alone)"


@pytest.mark.parametrize(
    ("target", "trained", "brought"),
    [
        (of_classes(range(12), seed=1), {}, {}),  # other images, as many of each class
        (of_classes(range(12)), {"test_images_trained_on": 2}, {"target_classes_trained_on": 4}),
        (
            of_classes(range(12), places=[4, 3, 2, 1, 0]),
            {"test_images_trained_on": 2},
            {"target_classes_trained_on": 4},
        ),
        (
            of_classes(range(12), side=8),
            {"test_images_perhaps_trained_on": 2},
            {"target_classes_named_as_trained_on": 4},
        ),
    ],
)
def test_a_target_s_images_are_known_among_those_of_training(
    target: ImageSource, trained: dict[str, int], brought: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = of_classes(range(12))
    monkeypatch.setattr(training_data, "_training_parts", lambda run, reads_source: [(source, {0, 1, 2, 3, 4, 5})])
    run: Any = SimpleNamespace(
        target=SimpleNamespace(source=target),
        learner=SimpleNamespace(origins=[Origin("backbone.from=x", seen.classes(source, "train"))]),
    )
    # Of these the first two are trained on, if they are the same images.
    tested: Any = SimpleNamespace(rows=np.array([0, 4, 59]), item="image")
    assert training_data.warn_trained_on(run, tested) == trained
    assert training_data.warn_brought(run) == brought


class Sized(Toy):
    """In place of a node of a config: classes of one name in any set, at the size and with the channels that are asked for."""

    def __init__(self, seed: int, channels: int, split_seed: int) -> None:
        super().__init__(seed, channels, 6)
        self.split_seed = split_seed

    def knows(self, name: str) -> bool:
        return name in ("image_size", "channels")

    def build(self, image_size: int | None = None, channels: int | None = None) -> ImageSource:
        draw = np.random.default_rng(self.value)
        images = draw.integers(0, 256, (9 * 4, 3, 6, 6), np.uint8)[:, : channels or self.channels]
        order = np.random.default_rng(self.split_seed).permutation(9)
        splits: dict[Split, Any] = {"train": order[:3], "val": order[3:6], "test": order[6:]}
        held = replace(table(np.ascontiguousarray(images), [4] * 9), fingerprint=digest([self.value, images.shape]))
        return ImageSource(held, splits)


@pytest.mark.parametrize("channels", [1, 3])
def test_sets_of_the_same_names_are_compared_at_one_size(channels: int) -> None:
    """Photos in colour and drawings in grey are other images; the same ones in grey are not."""
    sets: Any = {"photo": Sized(0, 3, 0), "drawing": Sized(1, channels, 1)}
    both = Domains(sets=sets)
    for images in both.tested.values():  # which a run's own check does not take for the same ones either
        seen.refuse_test_classes(seen.classes(both, "train"), images, "stage train")
    sets["drawing"] = Sized(0, channels, 1)
    with pytest.raises(UserError, match="photo and drawing are the same images, divided otherwise"):
        Domains(sets=sets)


@pytest.mark.parametrize(
    ("name", "says"),
    [("n01532829", True), ("robin", True), ("Latin/character03", True), ("001.Albatross", True), ("0", False), ("a", False),
     ("c07", False), ("class_12", False), ("00000012", False)],
)  # fmt: skip
def test_a_name_says_what_a_class_is_or_does_not(name: str, says: bool) -> None:
    assert says_what_it_is(name) is says


def test_changed_copies_of_several_sets_are_trained_on_as_those_of_one() -> None:
    one = encoded(Toy(110, 1, 6).build(), views=3)
    assert one.labelled(None, "train").views == 3
    images = three().each(lambda source: encoded(source, views=3)).labelled(None, "train")
    assert images.views == 3
    assert len(images.with_views()) == 3 * len(images)


# Lists on the command line


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        (["data=[a,b]"], ["data=domains", "+data@data.sets.a=a", "+data@data.sets.b=b"]),
        (["data=[a]"], ["data=a"]),
        (["data=[x:a, y:a]"], ["data=domains", "+data@data.sets.x=a", "+data@data.sets.y=a"]),
        (["test.data=[a,b]", "seed=1"], ["+data@test.data.a=a", "+data@test.data.b=b", "seed=1"]),
        (["test.data=[a]", "test.data.a.ways=2"], ["+data@test.data.a=a", "+test.data.a.ways=2"]),
        (["data=[a,b],c", "test.data=a,b"], ["data=[a,b],c", "test.data=a,b"]),
        (["data=glyphs", "transfer.targets=[a,b]"], ["data=glyphs", "transfer.targets=[a,b]"]),
    ],
)
def test_a_list_becomes_nodes_and_these_the_list_again(typed: list[str], given: list[str]) -> None:
    assert expanded(typed) == given
    assert expanded(given) == given
    spaced = [word.replace(", ", ",") for word in typed]
    assert folded(given) == (given if typed == ["data=[a]"] else spaced)


def test_a_run_is_named_after_its_data_sets_in_their_order() -> None:
    words = expanded(["data=[omniglot,glyphs]"])
    config = compose(*words)
    assert folded_choices(
        {"data": "domains", "data@data.sets.glyphs": "glyphs", "data@data.sets.omniglot": "omniglot"}, config
    ) == {"data": "omniglot,glyphs"}


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["data=[glyphs,omnglot]"], "data=omnglot: there is no such choice; did you mean omniglot?"),
        (["data=[glyphs,sinusoid]"], "data: sinusoid: brings tasks of its own shape, as regression does"),
        (["test.data=[glyphs,linear]"], "test.data: linear: brings tasks of its own shape, as regression does"),
        (["data=[glyphs,glyphs]"], "glyphs is named twice"),
        (["data=[]"], "names no data set"),
        (["data=[a/b]"], "a/b is no name"),
        (["test.data.digits.ways=2"], "write test.data=[digits]"),
        (["data=[glyphs,digits]", "data.sets.digits.sise=3"], "data.sets.digits.sise: there is no such key"),
        (["data=sinusoid", "backbone=mlp", "algo=maml", "test.data=[digits]"], "is trained on regression tasks"),
        (
            ["recipe=transfer", "data=digits", "target=digits", "test.data=[digits]"],
            "test.data: this recipe has no meta-test",
        ),
    ],
)
def test_a_wrong_list_is_one_line(words: list[str], saying: str, tmp_path: Path) -> None:
    outcome = metarun(*words, f"outputs={tmp_path / 'out'}")
    assert outcome.status == 2
    assert len(outcome.said) == 1
    assert saying in outcome.said[0]
    assert not (tmp_path / "out").exists()


def test_the_interval_of_the_mean_over_sets_covers_the_truth_where_tasks_vary() -> None:
    """Task i has the same ways in every set, so that one with many is hard in all: 19 intervals in 20 hold the truth nevertheless."""
    task, offsets, others = TaskShape(ways=(2, 20), shots=1, queries=5), np.arange(31) * 10, np.arange(41) * 12
    samplers = [VariedSampler(own, np.arange(len(own) - 1), task, 0, "test") for own in (offsets, others)]
    one, other = ([drawn.ways for drawn in sampler.draw(0, 20)] for sampler in samplers)
    assert one == other
    draw = np.random.default_rng(0)
    hard = draw.integers(2, 21, (1000, 1, 60)) / 40
    scores = torch.from_numpy(1 - hard + draw.normal(0, 0.3, (1000, 3, 60)))
    halves = [metrics.interval(over_sets(list(each)), shares=True)[1] for each in scores]
    held = [abs(each.mean().item() - (1 - 11 / 40)) <= (half or 0) for each, half in zip(scores, halves, strict=True)]
    assert np.mean(held) == pytest.approx(0.945, abs=0.015)


# From the shell


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders of class folders, of other sizes and channels."""
    draw, found = np.random.default_rng(0), {}
    for name, side, mode in (("left", 12, "L"), ("right", 10, "RGB")):
        found[name] = tmp_path_factory.mktemp(name)
        for number in range(12 if name == "left" else 11):
            folder = found[name] / f"{name}{number}"
            folder.mkdir()
            for image in range(5):
                shape = (side, side) if mode == "L" else (side, side, 3)
                pixels = draw.integers(0, 50, shape) + 20 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    return found


SMALL = ["backbone.channels=4", "task.ways=2", "task.queries=2", "train.steps=2", "train.validate_every=2",
         "train.validate_episodes=2", "test.episodes=6", "test.baseline_episodes=2"]  # fmt: skip


def test_a_run_leaves_out_shared_classes_and_tells_of_shared_names(folders: dict[str, Path], tmp_path: Path) -> None:
    """Ten of the twelve classes again: those of the same images are left out; of other images with the same names it is told."""
    root = tmp_path / "part"
    for number in range(10):
        shutil.copytree(folders["left"] / f"left{number}", root / f"left{number}")
    words = ["data=folder", f"data.root={folders['left']}", "data.image_size=16", *SMALL]
    sets = ["test.data=[same:folder,large:folder]", *(f"test.data.{name}.root={root}" for name in ("same", "large"))]
    for path in root.glob("*/*.png"):
        (tmp_path / "large" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(90).save(tmp_path / "large" / path.parent.name / path.name)
    sets[-1] = f"test.data.large.root={tmp_path / 'large'}"
    outcome = metarun(*words, *sets, f"outputs={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err
    told = result(only_run(tmp_path / "out"))["protocol"]["sets"]
    assert "of its 10 classes, since the images of the others" in told["same"]["classes"]
    assert "named_as_trained_on" not in told["same"]
    assert told["large"]["classes"] == "all 10 classes"
    namesakes = told["large"]["named_as_trained_on"]
    assert namesakes["count"] == len(namesakes["names"]) > 0
    assert f"large: {namesakes['count']} test class" in outcome.err


def test_classes_are_known_again_at_another_size_behind_an_encoder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder takes images of any size, and the same images of two sizes have other pixels."""
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    root = tmp_path / "part"
    for number in range(10):
        shutil.copytree(folders["left"] / f"left{number}", root / f"other{number}")
    encoder = ["++encoder._target_=tiny_encoder.Squares", "backbone=identity", "task.ways=2", "task.queries=2"]
    words = ["data=folder", f"data.root={folders['left']}", "data.image_size=16", "test.episodes=6"]
    sets = ["test.data=[small:folder]", f"test.data.small.root={root}", "test.data.small.image_size=8"]
    outcome = metarun(*words, *encoder, *sets, f"outputs={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err
    told = result(only_run(tmp_path / "out"))["protocol"]["sets"]
    assert "of its 10 classes, since the images of the others" in told["small"]["classes"]


def test_several_sets_behind_an_encoder_are_told_of_as_one_is(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the encoder saw, whose vectors weights are for, and how files are read."""
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    encoder = ["++encoder._target_=tiny_encoder.Squares", "++encoder.transform=cl2n", "backbone=mlp"]
    small = [word for word in SMALL if not word.startswith("backbone")]
    sets = ["data=[left:folder,right:folder]", *(f"data.sets.{name}.root={root}" for name, root in folders.items())]
    sizes = [f"data.sets.{name}.image_size=12" for name in folders]
    outcome = metarun(*sets, *sizes, *encoder, *small, f"outputs={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err
    folder = only_run(tmp_path / "out")
    told = result(folder)
    assert told["protocol"]["encoder"] == {"name": "Squares", "saw": None, "saw_these_classes": "not known"}
    assert told["data"]["rule"] == "all items are vectors of 4"
    nodes: Any = {name: Folder(root=str(root), image_size=12) for name, root in folders.items()}
    same: Any = {name: Built(source) for name, source in nodes.items()}
    assert told["data"]["before_encoding"] == Domains(sets=same, image_size=12).describe()["fingerprint"]
    preprocessing = package.load(folder).held.preprocessing
    assert (preprocessing.channels, preprocessing.image_size, preprocessing.input_shape) == (3, 12, (4,))
    again = ["recipe=test", f"checkpoint={folder}", "data=folder", f"data.root={folders['left']}"]
    refused = metarun(*again, *encoder, "++encoder.side=2", "++encoder.scale=2", f"outputs={tmp_path / 'out'}")
    assert refused.status == 2
    assert "was trained on the vectors of an encoder, Squares, which has other weights or settings now" in refused.err


def test_a_further_file_is_read_as_all_sets_read_theirs() -> None:
    built = [of_classes(range(12), seed=seed, names=name) for seed, name in enumerate(("bird", "fish"))]
    nodes: Any = {str(number): Built(one) for number, one in enumerate(built)}
    for one in built:
        one.mapped, one.inverted = (0.0, 4095.0), True
    found = Domains(sets=nodes)
    preprocessing = Preprocessing.of(found, found.input_shape)
    assert preprocessing is not None
    assert (preprocessing.values, preprocessing.inverted) == ((0.0, 4095.0), True)
    built[0].mapped, built[0].inverted = None, False
    found = Domains(sets=nodes)
    assert (found.mapped, found.inverted) == (None, False)


@pytest.mark.parametrize("trained", [True, False])
def test_other_data_for_a_run_are_normalised_where_its_own_were(trained: bool, tmp_path: Path) -> None:
    own, other = (ImageSource(of_classes(range(12)).table, {"train": [0], "val": [1], "test": [2]}) for _ in "ab")
    own.normalize, other.normalize = trained, not trained
    preprocessing = Preprocessing.of(own, own.input_shape)
    assert preprocessing is not None
    told = {"learner": {"preprocessing": preprocessing.describe()}}
    (tmp_path / contents.RESULT).write_text(json.dumps(told))
    normalize_as_trained(other, str(tmp_path / contents.BEST), "data")
    assert other.normalize is trained
    (tmp_path / contents.RESULT).unlink()
    normalize_as_trained(own, str(tmp_path), "data")
    assert own.normalize is trained


@pytest.mark.parametrize(
    ("words", "origin"),
    [
        (["recipe=test", "checkpoint=a"], "a"),
        (["recipe=target_only", "target=digits", "+backbone.from=b"], "b"),
        (["recipe=target_only", "target=digits", "backbone=efficientnet_lite0", "+backbone.from=b"], None),
        (["recipe=transfer", "target=digits", "+backbone.from=b"], None),
        (["recipe=target_only", "target=digits"], None),
        ([], None),
    ],
)
def test_weights_that_are_used_as_they_were_trained(words: list[str], origin: str | None) -> None:
    assert used_as_trained(compose(*words)) == origin


def test_a_set_that_is_tested_on_is_centred_by_all_sets_in_their_shares() -> None:
    """And not by the first of them."""
    encoder, how = Squares(side=1), Encoding("float32", 1, 8, "cl2n", None)
    tested = three(normalize=False).own["light"]
    means = []
    for order in (("dark", "grey"), ("grey", "dark")):
        shares = {"dark": 3, "grey": 1}
        built = {name: Toy({"dark": 10, "grey": 110}[name], 1, 8).build() for name in order}
        for name, images in built.items():
            images.table = replace(images.table, fingerprint=name)
        sets: Any = {name: Built(images) for name, images in built.items()}
        source = Domains(sets=sets, shares=[shares[name] for name in order], normalize=False)
        trained = source.each(lambda member: EncodedSource(member, encoder, how))
        found = encoded_as(tested, trained)
        assert isinstance(found, EncodedSource)
        means.append(found.mean().item() * 255)
    assert means == pytest.approx([35, 35], rel=1e-3)


def test_an_encoder_saw_what_is_tested_on_if_it_saw_one_of_the_sets() -> None:
    sources = [
        EncodedSource(of_classes(range(6)), Squares(), Encoding("float32", 1, 8, "un", "imagenet")) for _ in "abc"
    ]
    for source, known in zip(sources, (("imagenet",), None, ()), strict=True):
        source.source.classes_in = known
    told = [saw_of(part, "test") for part in (sources, sources[1:], sources[2:], [])]
    assert [each and each["saw_these_classes"] for each in told] == ["yes", "not known", "no", None]


def test_each_set_says_whether_the_encoder_saw_its_own_classes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What holds of one of them holds of the command, and not of the others."""
    monkeypatch.setenv("METARUN_ALLOW", "tiny_encoder")
    monkeypatch.setattr(Folder, "classes_in", ("imagenet",))
    encoder = ["++encoder._target_=tiny_encoder.Squares", "++encoder.saw=imagenet", "backbone=identity"]
    words = ["data=folder", f"data.root={folders['left']}", "test.data=[digits,right:folder]"]
    words += [f"test.data.right.root={folders['right']}", *encoder, "task.ways=2", "task.queries=2", "test.episodes=6"]
    outcome = metarun(*words, "test.task.query_dirichlet=1", f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    assert "2 queries a class, divided by Dirichlet(1) shares" in " ".join(outcome.out.split())
    protocol = result(only_run(tmp_path))["protocol"]
    assert protocol["encoder"]["saw_these_classes"] == "yes"
    assert {name: told["saw_these_classes"] for name, told in protocol["sets"].items()} == {
        "digits": "no",
        "right": "yes",
    }
    tables = [section_table(section) for section in summarise(collect([tmp_path], tmp_path / "none"))]
    assert ["pretrained on these classes" in table.headings for table in tables] == [False, True]


def test_one_command_tests_on_many_sets_and_a_report_ranks_methods(folders: dict[str, Path], tmp_path: Path) -> None:
    roots = [f"data.sets.{name}.root={root}" for name, root in folders.items()]
    words = ["data=[left:folder,right:folder]", *roots, "data.image_size=16", *SMALL]
    first = metarun(*words, f"outputs={tmp_path}", "name=sweep")
    assert first.status == 0, first.err
    run = only_run(tmp_path)
    found = result(run)
    sets = ["left", "right"]
    assert found["protocol"]["sets"].keys() == set(sets)
    assert found["test/acc"] == pytest.approx(np.mean([found[f"test/{name}/acc"] for name in sets]))
    scores = np.mean([np.load(run / contents.scores_file(name))["values"][-1] for name in sets], axis=0)
    assert found["test/acc_ci95"] == pytest.approx(metrics.interval(torch.from_numpy(scores), shares=True)[1])
    assert found["untrained/acc_ci95"] > 0
    assert found["untrained/right/episodes"] == 2
    assert found["choices"]["data"] == "left,right"
    assert found["overrides"][0] == "data=[left:folder,right:folder]"
    assert found["data"]["input_shape"] == [3, 16, 16]
    for name in sets:
        with np.load(run / contents.scores_file(name)) as stored:
            assert stored["values"][-1].mean() == pytest.approx(found[f"test/{name}/acc"])
    assert "mean" in first.out
    assert "left/acc" not in first.out  # which stands in the table
    assert max(map(len, first.out.split("episodes each")[0].splitlines())) <= 80
    again = metarun(*words, f"outputs={tmp_path}", "name=sweep")
    assert "nothing was computed" in again.out

    new = ["test.data=[digits,left:folder]", f"test.data.left.root={folders['left']}", "test.data.digits.ways=3"]
    tested = metarun("recipe=test", f"checkpoint={run}", *new, "test.baseline_episodes=0",
                     f"outputs={tmp_path / 'new'}")  # fmt: skip
    assert tested.status == 0, tested.err
    assert "before" in first.out
    assert "before" not in tested.out  # where nothing was tested before training
    other = result(only_run(tmp_path / "new"))
    assert other["protocol"]["sets"]["digits"]["task"] == {"ways": 3, "shots": 1, "queries": 2}
    assert other["chance/digits/acc"] == pytest.approx(1 / 3)
    assert other["protocol"]["sets"]["digits"]["classes"] == "all 10 classes"
    assert "since it is trained on" in other["protocol"]["sets"]["left"]["classes"]

    assert metarun(*words, "algo=maml", f"outputs={tmp_path}", "name=sweep").status == 0
    collection = collect([tmp_path / "sweep"], tmp_path / "none")
    sections = summarise(collection)
    assert [section.setting.data for section in sections] == sets
    assert all(any(row.on_episodes for row in section.rows) for section in sections)
    table = overview(sections)
    assert table is not None
    assert table.headings == ["algo", "left", "right", "mean", "mean rank"]
    ranks = [float(row[-1]) for row in table.rows]
    assert sum(ranks) == pytest.approx(3)


def test_images_of_several_sets_can_be_augmented(folders: dict[str, Path], tmp_path: Path) -> None:
    words = [
        f"data=[{','.join(f'{name}:folder' for name in folders)}]",
        *(f"data.sets.{name}.root={root}" for name, root in folders.items()),
    ]
    outcome = metarun(*words, "augment=standard", *SMALL, f"outputs={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err


def test_a_sweep_takes_a_list_as_one_value(folders: dict[str, Path], tmp_path: Path) -> None:
    outcome = metarun(
        "-m",
        "data=[glyphs,digits],glyphs",
        "algo=protonet",
        "test.data=[digits,omniglot]",
        "--dry-run",
        f"outputs={tmp_path}",
    )
    assert outcome.status == 0, outcome.err
    assert "2 jobs" in outcome.out
    assert "data=[glyphs,digits]" in outcome.out
    assert not set(outcome.out) & set("'\"{}@")
    named = metarun("-m", "data=[glyphs,digits]", "algo=protonet,maml", "--dry-run", f"outputs={tmp_path}")
    assert "glyphs-digits-sweep/" in named.out
