"""`recipe=inspect`: what is told of a data set, and what it costs."""

from __future__ import annotations

import html
import io
import json
import re
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import table
from labelled_files import cifar_fs, data_and_labels
from PIL import Image
from shell import metarun, one_line

from metarun.core import TaskShape
from metarun.data import decoding
from metarun.data.fewshot import RELEASES
from metarun.data.image_source import ImageSource
from metarun.inspection import duplicates, facts, words
from metarun.inspection.facts import fits
from metarun.inspection.image_files import depth, survey
from metarun.text import bytes_text


def photographs(count: int, side: int = 24, seed: int = 0) -> np.ndarray:
    """Images uint8 `[n, 3, side, side]` with coarse structure, each of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 6))
    return np.kron(coarse, np.ones((1, 1, side // 6, side // 6))).astype(np.uint8)


def pnm(kind: str, largest: int, dtype: str, channels: int) -> bytes:
    return f"{kind}\n8 8\n{largest}\n".encode() + np.zeros((8, 8, channels), dtype).tobytes()


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


SIZE = struct.pack(">8I", 8, 8, 0, 0, 8, 8, 0, 0) + b"\0\3"  # what stands before the depth in a JPEG 2000 file


def looked(images: np.ndarray, groups: list[int], classes: list[int] | None = None) -> duplicates.Duplicates:
    sides = {"splits": np.array(groups)}
    return duplicates.find(lambda start, stop: images[start:stop], sides, np.array(classes or [0] * len(images)))


def across(found: duplicates.Duplicates) -> tuple[int, int, int, int]:
    return found.exact, found.exact_across["splits"], found.near, found.near_across["splits"]


def test_twins_are_found_whether_exact_or_nearly_so() -> None:
    images = photographs(40)
    images[31] = images[3]  # the same
    noise = np.random.default_rng(1).integers(-3, 4, images[5].shape)
    images[35] = (images[5].astype(int) + noise).clip(0, 255)  # nearly the same
    images[7] = 200  # blank images are all alike, and say nothing
    images[8] = 201
    found = looked(images, [0] * 30 + [2] * 10, [*range(40)])
    assert across(found) == (2, 2, 2, 2)
    assert found.other_class == 4
    assert {(a, b, exact) for a, b, exact in found.pairs} == {(3, 31, True), (5, 35, False)}
    same = looked(images, [0] * 40)
    assert across(same)[:2] == (2, 0)
    none = looked(images, [-1] * 40)
    assert across(none)[2:] == (2, 0)


def test_every_pair_within_the_threshold_shares_a_band() -> None:
    draw = np.random.default_rng(0)
    first = draw.integers(0, 2**63, (200, 2)).astype(np.uint64)
    bits = np.unpackbits(first.view(np.uint8), axis=1)
    for row in bits:
        row[draw.permutation(128)[: duplicates.BITS]] ^= 1
    both = np.concatenate([first, np.packbits(bits, axis=1).view(np.uint64)])
    pairs = {frozenset(pair) for a, b, _ in duplicates.candidates(both) for pair in zip(a, b, strict=True)}
    assert all(frozenset((row, row + 200)) in pairs for row in range(200))


def test_the_pairs_of_a_crowd_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "PAIRS", 10_000)
    alike = np.zeros((500, 2), dtype=np.uint64)
    parts = list(duplicates.candidates(alike))
    assert sum(len(a) for a, _, _ in parts) <= 500 * duplicates.CROWDED * duplicates.BANDS
    assert any(crowded for _, _, crowded in parts)


@pytest.mark.parametrize("number", [2, duplicates.CROWDED, duplicates.CROWDED + 1, 300])
def test_of_a_folder_of_photos_all_pairs_are_compared(number: int) -> None:
    """Their plain backgrounds are alike, and so are bands of their hashes."""
    parts = list(duplicates.candidates(np.zeros((number, 2), dtype=np.uint64)))
    pairs = {frozenset(pair) for a, b, _ in parts for pair in zip(a.tolist(), b.tolist(), strict=True)}
    assert len(pairs) == number * (number - 1) // 2
    assert not any(crowded for _, _, crowded in parts)


def test_a_thumbnail_is_the_mean_of_parts() -> None:
    ramp = np.broadcast_to(np.arange(18, dtype=np.uint8)[None, None, None], (1, 3, 18, 18))
    assert duplicates.thumbnails(ramp)[0, 0].tolist() == [round(2 * n + 0.5) for n in range(9)]
    rising = duplicates.perceptual(np.rint(np.linspace(0, 200, 9))[None, None].repeat(9, 1).astype(np.uint8))
    assert np.unpackbits(rising.view(np.uint8)).tolist() == [1] * 64 + [0] * 64
    assert duplicates.thumbnails(np.zeros((2, 1, 4, 4), np.uint8)).shape == (2, 9, 9)  # smaller than the thumbnail


def test_the_twins_that_are_elsewhere_are_among_the_twins() -> None:
    """An image that has an exact twin at home and a near one elsewhere counts as exact alone."""
    images = photographs(6)
    images[1] = images[0]
    images[4] = images[0]
    images[4, :, 0, 0] ^= 3  # nearly the same
    found = looked(images, [0, 0, 0, 2, 2, 2])
    assert across(found) == (2, 0, 1, 1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pnm("P6", 65535, ">u2", 3), "16 bits, colour"),
        (pnm("P6", 255, "u1", 3), "8 bits, colour"),
        (pnm("P5", 65535, ">u2", 1), "16 bits, grey"),
        (pnm("P5", 4095, ">u2", 1), "12 bits, grey"),
        (saved(Image.new("I;16", (8, 8)), "TIFF"), "16 bits (I;16)"),
        (saved(Image.new("I", (8, 8)), "TIFF"), "32 bits, grey"),
        (saved(Image.new("LAB", (8, 8)), "TIFF"), "8 bits (LAB)"),
        (saved(Image.new("1", (8, 8)), "PPM"), "1 bit"),
        (b"P1 8 1 0 1 0 1 0 1 0 1", "1 bit"),
        (saved(Image.new("RGBA", (8, 8)), "SGI", bpc=2), "16 bits, colour, transparent"),
        (saved(Image.new("L", (8, 8)), "SGI", bpc=2), "16 bits, grey"),
        (saved(Image.new("L", (8, 8)), "SGI"), "8 bits, grey"),
        (saved(Image.new("RGB", (8, 8)), "JPEG2000"), "8 bits, colour"),
        (saved(Image.new("RGB", (8, 8)), "JPEG2000").replace(SIZE + b"\7", SIZE + b"\17"), "16 bits, colour"),
    ],
)  # fmt: skip
def test_the_depth_is_the_file_s(content: bytes, told: str) -> None:
    """Of which Pillow may read less."""
    with Image.open(io.BytesIO(content)) as file:
        assert depth(file) == told


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traffic signs as their benchmark has them: PPM of all sizes in folders of numbers, a table in each, one file cut off."""
    root, draw = tmp_path_factory.mktemp("signs"), np.random.default_rng(0)
    for number in range(10):
        folder = root / f"{number:05d}"
        folder.mkdir()
        rows = ["Filename;Width;Height;ClassId"]
        for image, pixels in enumerate(photographs(8, 24, number)):
            width, height = draw.integers(18, 40, 2).tolist()
            name = f"00000_{image:05d}.ppm"
            Image.fromarray(pixels.transpose(1, 2, 0)).resize((width, height)).save(folder / name)
            rows.append(f"{name};{width};{height};{number}")
        (folder / f"GT-{number:05d}.csv").write_text("\n".join(rows))
    (root / "00003" / "00000_00099.ppm").write_bytes(b"P6\n20 20\n255\nxx")
    (root / "00004" / "00000_00098.ppm").write_bytes((root / "00001" / "00000_00001.ppm").read_bytes())
    return root


SMALL = ["data.image_size=16", "backbone.channels=4", "task.ways=2", "task.queries=2", "train.steps=10",
         "train.validate_episodes=2", "test.episodes=10"]  # fmt: skip


def test_the_files_of_a_folder_are_surveyed(signs: Path) -> None:
    found: Any = survey(signs)
    assert found["count"] == 82
    assert found["formats"] == {"PPM": 81}
    assert found["depths"] == {"8 bits, colour": 81}
    assert found["unreadable_count"] == 1
    assert found["unreadable"][0]["file"] == "00003/00000_00099.ppm"
    assert "truncated" in found["unreadable"][0]["reason"]
    assert 18 <= found["width"][0] <= found["width"][1] < 40
    assert bytes_text(found["bytes"]).endswith("kB")


def test_files_behind_links_are_surveyed_once(signs: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(signs)
    (tmp_path / "again").symlink_to(signs)
    (tmp_path / "up").symlink_to(tmp_path.parent)
    found: Any = survey(tmp_path)
    assert (found["count"], found["unreadable"][0]["file"]) == (82, "again/00003/00000_00099.ppm")


def test_inspect_tells_of_everything_and_fits_the_terminal(
    signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarun.inspection.timing.SECONDS", 0.0)
    outcome = metarun("recipe=inspect", "data=folder", f"data.root={signs}", *SMALL, f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    for word in ("PPM (81)", "truncated", "twin that is the same", "time     about", "2-way 1-shot"):
        assert word in outcome.out
    said = [line for line in outcome.out.splitlines() if str(tmp_path) not in line and str(signs) not in line]
    assert max(map(len, said)) <= 80
    (page,) = tmp_path.glob("inspect/*/index.html")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|inspection\.json)", text)  # it opens offline
    assert "prefers-color-scheme: dark" in text
    assert text.count("data:image/jpeg") > 20
    told = json.loads((page.parent / "inspection.json").read_text(encoding="utf-8"))
    (one,) = told["data_sets"]
    assert sum(split["classes"] for split in one["splits"].values()) == 10
    assert sum(split["items"] for split in one["splits"].values()) == 81
    assert one["duplicates"]["exact"] == 2
    assert one["duplicates"]["other_class"] == 2
    assert one["splits"]["train"]["largest_shots_and_queries"] == 8
    assert told["time"]["seconds"] == pytest.approx(
        sum(told["time"][f"{part}_seconds"] for part in ("train", "validation", "test"))
    )


def test_a_limit_of_seconds_ends_validations_too(signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metarun.inspection.timing.SECONDS", 0.0)
    words = [*SMALL, "train.steps=1000000", "train.validate_every=1", "train.max_seconds=0.000001"]
    words.append("test.baseline_episodes=0")
    outcome = metarun("recipe=inspect", "data=folder", f"data.root={signs}", *words, f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    (told,) = tmp_path.glob("inspect/*/inspection.json")
    time = json.loads(told.read_text(encoding="utf-8"))["time"]
    assert time["steps"] == 1
    assert time["train_seconds"] == time["step_seconds"]
    # A test of ten episodes, and one validation of two.
    assert time["validation_seconds"] == pytest.approx(time["test_seconds"] / 5)


def test_the_time_of_a_test_is_that_of_each_data_set_and_of_the_untrained_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarun.inspection.timing.SECONDS", 0.0)
    words = [*SMALL, "train.validate_every=10", "test.baseline_episodes=5", "test.data=[one:digits,two:digits]"]
    outcome = metarun("recipe=inspect", "data=digits", *words, f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    (told,) = tmp_path.glob("inspect/*/inspection.json")
    time = json.loads(told.read_text(encoding="utf-8"))["time"]
    # One validation of two episodes; on two data sets ten of the trained method and five of the untrained one.
    assert time["test_seconds"] == pytest.approx(time["validation_seconds"] / 2 * 2 * (10 + 5))


def test_what_was_not_timed_does_not_take_no_time() -> None:
    told = {"seconds": 9.0, "train_seconds": 9.0, "validation_seconds": None, "test_seconds": None, "steps": 3,
            "step_seconds": 3.0, "timed_steps": 3, "hardware": "cpu"}  # fmt: skip
    (line,) = words.time_lines(told)
    assert "(9 s), validation and test not timed; by 3 steps" in line


def test_what_cannot_be_used_is_told_with_what_can_be_said(signs: Path, tmp_path: Path) -> None:
    words = [
        "recipe=inspect",
        "data=folder",
        f"data.root={signs}",
        *SMALL,
        "data.test_classes=[nothing]",
        "data.train_classes=[00001]",
    ]
    outcome = metarun(*words, f"outputs={tmp_path}")
    assert outcome.status == 1
    assert "PROBLEM" in outcome.out
    assert "PPM (81)" in outcome.out
    assert "has no class folder nothing" in outcome.err
    asked = metarun(*words[:-2], "data.skip_bad=true", "task.ways=9", "train.steps=0", f"outputs={tmp_path}")
    assert asked.status == 0, asked.err
    assert "does not fit: task: ways = 9 is above the" in " ".join(asked.out.split())
    assert "not measured" in asked.out


@pytest.mark.parametrize("data", ["sinusoid", "movielens"])
def test_data_without_items_are_refused_and_have_no_fault(data: str, tmp_path: Path) -> None:
    told = metarun("recipe=inspect", f"data={data}", f"outputs={tmp_path / 'out'}")
    one_line(told, f"data: {data} has regression tasks and no items that could be looked at")
    assert not (tmp_path / "out").exists()


def test_target_and_test_sets_are_looked_at_too(tmp_path: Path) -> None:
    words = ["recipe=inspect", "data=digits", "target=digits", "test.data=[digits]", "train.steps=0", "task.ways=2"]
    outcome = metarun(*words, f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    told = json.loads((tmp_path / "inspect" / "digits-digits-digits" / "inspection.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in told["data_sets"]] == ["digits", "digits (target)", "digits (test)"]
    outcome = metarun("recipe=inspect", "target=digits", f"outputs={tmp_path}/alone")
    told = json.loads(next(tmp_path.glob("alone/inspect/*/inspection.json")).read_text(encoding="utf-8"))
    # And not the usual data set, which nobody named.
    assert [one["name"] for one in told["data_sets"]] == ["digits (target)"]
    assert "not measured: no data= is named beside the target" in outcome.out


def test_of_a_benchmark_files_that_no_image_has_the_name_of_are_not_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archives, pickles and a README lie beside the images, or instead of them."""
    classes = {"train": 4, "val": 2, "test": 3}
    monkeypatch.setitem(RELEASES, "cifar_fs", RELEASES["cifar_fs"]._replace(classes=(4, 2, 3)))
    cifar_fs(tmp_path / "folders", classes)
    data_and_labels(tmp_path / "pickles", "CIFAR_FS_{}.pickle", classes)
    for folder in ("folders", "pickles"):
        for name in ("README", "cifar.tar.gz", "cifar.hdf5", "test.h5"):
            (tmp_path / folder / name).write_bytes(b"\x89HDF\r\n\x1a\n")
        words = ["data=cifar_fs", f"data.root={tmp_path / folder}", "data.image_size=6", "train.steps=0", "task.ways=2"]
        outcome = metarun("recipe=inspect", *words, f"outputs={tmp_path}/o")
        assert outcome.status == 0, outcome.err
        assert not re.search(r"^(bad|sizes    $)", outcome.out, re.MULTILINE)
        assert ("files    18 images" in outcome.out) == (folder == "folders")


def test_of_a_competitions_folder_only_the_files_of_the_table_are_read(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for part, count in (("train", 40), ("test", 3)):
        (root / part).mkdir(parents=True)
        for number, pixels in enumerate(photographs(count)):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(root / part / f"{part}{number}.png")
    (root / "train.csv").write_text("\n".join(["id,label", *(f"train{n},k{n % 5}" for n in range(40))]))
    (root / "test" / "empty.png").write_bytes(b"")
    words = ["recipe=inspect", "data=folder", f"data.root={root}", "data.labels=train.csv", *SMALL, "train.steps=0"]
    outcome = metarun(*words, f"outputs={tmp_path}/o")
    assert outcome.status == 0, outcome.err
    assert "files    40 images" in outcome.out
    assert "and 4 image files of no class, not read" in outcome.out
    assert not re.search("^(bad|note)", outcome.out, re.MULTILINE)
    (page,) = tmp_path.glob("o/inspect/*/index.html")
    assert "4 image files beside them are of no class" in page.read_text(encoding="utf-8")
    (root / "train" / "train7.png").write_bytes(b"")
    outcome = metarun(*words, f"outputs={tmp_path}/p")
    assert re.search("^bad +1 file cannot be read", outcome.out, re.MULTILINE)
    assert "a run refuses them unless data.skip_bad=true" in " ".join(outcome.out.split())


def test_a_folder_of_bad_files_has_no_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "my images" / "a").mkdir(parents=True)
    (tmp_path / "my images" / "a" / "0").write_bytes(b"no image")
    words = ["recipe=inspect", "data=folder", f"data.root={tmp_path}/my images", f"outputs={tmp_path}/o"]
    outcome = metarun(*words)
    assert "1 file cannot be read" in outcome.out
    assert not re.search(r"^(sizes|depths|formats)", outcome.out, re.MULTILINE)
    (page,) = tmp_path.glob("o/inspect/*/index.html")
    told = page.read_text(encoding="utf-8")
    assert "0 pixels wide" not in told
    (command,) = re.findall("<code>(metarun .*?)</code>", told)
    assert shlex.split(html.unescape(command)) == ["metarun", *words]  # it can be pasted


def test_of_a_target_nothing_is_said_of_tasks_and_the_page_has_its_name(signs: Path, tmp_path: Path) -> None:
    words = ["recipe=inspect", "target=folder", f"target.data.root={signs}", "target.data.skip_bad=true"]
    outcome = metarun(*words, "target.data.image_size=16", f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    assert "tasks    " not in outcome.out
    (page,) = tmp_path.glob("inspect/*/index.html")
    assert page.parent.name == f"folder-{signs.name}"
    assert "-way" not in page.read_text(encoding="utf-8")


def test_texts_are_told_of_as_texts(tmp_path: Path) -> None:
    """Their files are no bad images; some of each class are shown, as text and not as markup."""
    for split, classes in {"train": "abc", "valid": "de", "test": "fg"}.items():
        rows = [
            {"sentence": f"{name} <b>{number}</b> words here", "label": name} for name in classes for number in range(9)
        ]
        rows.append(rows[0])  # which its class has already
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "data=text",
        f"data.root={tmp_path}",
        "train.steps=0",
        "task.ways=2",
        "task.queries=2",
        f"outputs={tmp_path}/o",
    ]
    outcome = metarun("recipe=inspect", *words)
    assert outcome.status == 0, outcome.err
    assert "bad " not in outcome.out
    assert "4 words each (median), 4 at most" in outcome.out
    assert "left out: 3 that their class has already" in outcome.out
    assert outcome.err.count("left out 3 texts") == 1  # the data set is read once
    (page,) = tmp_path.glob("o/inspect/*/index.html")
    assert "f &lt;b&gt;0&lt;/b&gt; words here" in page.read_text(encoding="utf-8")


def test_every_copy_of_an_image_counts_that_another_split_or_class_has() -> None:
    images = photographs(6)
    images[1:4] = images[0]
    found = looked(images, [0, 0, 0, 2, 0, 2], [0, 0, 0, 1, 2, 3])
    assert (*across(found)[:2], found.other_class) == (4, 4, 4)


def test_parts_of_images_are_compared_beside_splits_of_classes() -> None:
    """A target is trained and tested on the parts, whatever its number of classes; of a source both may matter."""
    images = photographs(24)
    images[[7, 8]] = images[[0, 1]]  # of two classes that are in other splits, in one part
    images[5] = images[2]  # of one class, in the training and in the test part
    held = replace(table(images, [6] * 4), metadata={"parts": {"train": [3] * 4, "val": [0] * 4, "test": [3] * 4}})
    source = ImageSource(held, {"train": [0, 2], "val": [3], "test": [1]})
    told = facts.twins(source, lambda done: None, as_target=False)
    assert told["exact_across"] == {"splits of classes": 4, "parts of images": 2}
    assert {tuple(pair["sides"]) for pair in told["pairs"]} == {
        ("train classes, train images", "train classes, test images"),
        ("train classes, train images", "test classes, train images"),
    }
    of_target = facts.twins(source, lambda done: None, as_target=True)
    assert of_target["exact_across"] == {"parts of images": 2}
    assert words.duplicate_lines(of_target)[0].endswith("2 of them in another of the parts of images")
    counted = facts.counts(source, {}, as_target=True)
    assert counted["splits"] == {}
    assert words.class_line(counted) == "4, of 6 items, 24 in all"


def test_a_pipe_among_images_is_told_of_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipe.png").touch()
    monkeypatch.setattr(decoding, "special", lambda path: "a pipe")
    (bad,) = survey(tmp_path)["unreadable"]
    assert bad == {"file": "pipe.png", "reason": "it is a pipe, and no file"}


def test_ranges_and_classes_that_are_left_out_fit_as_they_do_in_a_run() -> None:
    images = np.zeros((16, 1, 4, 4), np.uint8)
    source = ImageSource(table(images, [2, 7, 7]), {"train": range(3), "val": range(3), "test": range(3)})
    assert "shots + queries = 2 + 3 = 5 is above the 2 images of the smallest class" in fits(
        source, "train", TaskShape(2, 2, 3)
    )
    assert not fits(source, "train", TaskShape(2, (1, 10), (1, 10)))
    assert not fits(source, "train", TaskShape(2, 2, 3, min_items=5))
    assert "task.min_items=5: leaves 2 of the 3 classes" in fits(source, "train", TaskShape(3, 2, 3, min_items=5))
    assert "unlabelled" in fits(source, "train", TaskShape(2, 1, 1, min_items=5, unlabelled=6))
    assert not fits(source, "train", TaskShape(2, 1, 1, min_items=5, unlabelled=5))
    assert "distractors" in fits(source, "train", TaskShape(2, 1, 1, unlabelled=0, distractors=2))


def test_every_class_is_in_the_numbers_that_the_page_leaves_out() -> None:
    every, images = range(2100), np.zeros((2100, 1, 1, 1), np.uint8)
    source = ImageSource(table(images, [1] * 2100), {"train": every, "val": every, "test": every})
    assert len(facts.counts(source, {}, as_target=False)["classes"]) == 2100
