"""Images whose classes a table names, as competitions publish them, and layouts that are no classes."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image
from shell import metarun, result, run_folder

from metarun.data.class_folders import by_folders, by_labels
from metarun.data.folder import Folder
from metarun.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def competition(root: Path, classes: int = 4, per_class: int = 3) -> Path:
    """Folders train and test of images numbered through; the pixels of image i of train are i, of class i % classes."""
    for part, count in {"train": classes * per_class, "test": 2}.items():
        (root / part).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), number + (200 if part == "test" else 0)).save(root / part / f"{number}.png")
    return root


def rows(classes: int = 4, per_class: int = 3, name: str = "{}.png") -> list[tuple[str, str]]:
    return [(name.format(number), f"kind {number % classes}") for number in range(classes * per_class)]


def write(path: Path, header: str, lines: list[tuple[str, ...]], delimiter: str = ",", encoding: str = "utf-8") -> None:
    text = "\n".join([header, *(delimiter.join(line) for line in lines)]) + "\n"
    path.write_bytes(text.encode(encoding))


def check(source: Folder) -> None:
    assert source.table.names == [f"kind {number}" for number in range(4)]
    assert source.table.images[:, 0, 0, 0].tolist() == [0, 4, 8, 1, 5, 9, 10, 2, 6, 11, 3, 7]  # by name
    assert sorted(len(found) for found in source.splits.values()) == [1, 1, 2]


@pytest.mark.parametrize(
    ("header", "name", "delimiter", "encoding"),
    [
        ("file,label", "{}.png", ",", "utf-8"),
        ("filename,class", "train/{}.png", ",", "utf-8"),
        ("id,label", "{}", ",", "utf-8-sig"),
        ("Image_ID\tTarget", "{}", "\t", "utf-8"),
        ("image;category", "{}.png", ";", "utf-16"),
        ('"image", "label"', '"{}.png"', ",", "utf-8"),
        ("image_name,label", "train\\{}.png", ",", "utf-8"),
        ("img,class_id", "{}", ",", "utf-8"),
        ("Image_Path;ClassId", "train/{}.png", ";", "utf-8"),
        ("path,label", "/home/somebody/competition/train/{}.png", ",", "utf-8"),
    ],
)
def test_every_kind_of_table(tmp_path: Path, header: str, name: str, delimiter: str, encoding: str) -> None:
    root = competition(tmp_path / "images")
    write(root / "train.csv", header, rows(name=name), delimiter, encoding)
    check(Folder(root=str(root), labels="train.csv", image_size=8))
    check(Folder(root=str(root), labels=str(root / "train.csv"), image_size=8))


def test_further_columns_blank_lines_and_order_say_nothing(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    lines = [(label, "12", file, "a, b") for file, label in reversed(rows())]
    text = "label,age,file,remark\n\n" + "\n".join(
        f'{label},{age},{file},"{remark}"' for label, age, file, remark in lines
    )
    (root / "train.csv").write_text(text + "\n\n,,,\n")
    check(Folder(root=str(root), labels="train.csv", image_size=8))


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("file,diagnosis", {}),  # of two columns one is known
        ("picture,label", {}),
        ("picture,Diagnosis", {"file_column": "picture"}),
        ("picture,Diagnosis", {"label_column": "diagnosis"}),
        ("label,file", {"file_column": "label", "label_column": "file"}),  # against the usual names
    ],
)
def test_columns_of_other_names(tmp_path: Path, header: str, columns: dict[str, str]) -> None:
    root = competition(tmp_path / "images")
    write(root / "train.csv", header, rows())
    check(Folder(root=str(root), labels="train.csv", image_size=8, **columns))


def test_of_many_columns_the_named_ones_count(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    lines = [("lesion", file, label, "histology") for file, label in rows()]
    write(root / "train.csv", "lesion_id,image_id,dx,dx_type", lines)
    check(Folder(root=str(root), labels="train.csv", image_size=8, label_column="dx"))
    with pytest.raises(
        UserError,
        match=r"^data.label_column=dx_typ: .*/train.csv has no such column; did you mean dx_type\?; it has lesion_id, ",
    ):
        Folder(root=str(root), labels="train.csv", label_column="dx_typ")
    with pytest.raises(UserError, match=r"^data.label_column=dx: is of a table of labels, and data.labels names none$"):
        Folder(root=str(root), label_column="dx")


@pytest.mark.parametrize(("one", "zero"), [("1", "0"), ("1.0", "0.0")])
def test_a_column_of_zeros_and_ones_for_each_class(tmp_path: Path, one: str, zero: str) -> None:
    root = competition(tmp_path / "images")
    lines = [
        (file.removesuffix(".png"), *(one if label == f"kind {kind}" else zero for kind in range(4)))
        for file, label in rows()
    ]
    write(root / "train.csv", "image,kind 0,kind 1,kind 2,kind 3", lines)
    check(Folder(root=str(root), labels="train.csv", image_size=8))


def test_a_column_may_divide_the_images(tmp_path: Path) -> None:
    root = competition(tmp_path / "images", classes=2, per_class=6)
    parts = ["train", "train", "Training", "valid", "test", "testing"]
    lines = [(file, label, parts[number // 2]) for number, (file, label) in enumerate(rows(2, 6, "train/{}.png"))]
    write(root / "all.csv", "file,label,split", lines)
    source = Folder(root=str(root), labels="all.csv", image_size=8, normalize=False)
    for part, count in {"train": 3, "val": 1, "test": 2}.items():
        assert source.labelled(part).counts.tolist() == [count, count]  # type: ignore[arg-type]
    pixels = source.labelled("test").whole(torch.device("cpu")).x[:, 0, 0, 0] * 255
    assert sorted(pixels.round().int().tolist()) == [8, 9, 10, 11]


def test_a_column_that_is_named_as_the_label_divides_nothing(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    write(root / "all.csv", "file,part", rows(name="train/{}.png"))
    check(Folder(root=str(root), labels="all.csv", label_column="Part", image_size=8))


def test_several_tables_are_parts(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for part, first in {"train": 0, "valid": 4, "test": 6}.items():
        competition(root / part, classes=1, per_class=1)  # folders within, of the same names
        kinds = range(first, first + (4 if part == "train" else 2))
        for kind in kinds:
            Image.new("L", (8, 8), kind).save(root / part / f"{part}{kind}.png")
        write(root / f"{part}.csv", "filename,label", [(f"{part}{kind}.png", f"n{kind}") for kind in kinds])
    source = Folder(root=str(root), labels=["train.csv", "valid.csv", "test.csv"], image_size=8)
    assert {split: [source.table.names[i] for i in found] for split, found in source.splits.items()} == {
        "train": ["n0", "n1", "n2", "n3"],
        "val": ["n4", "n5"],
        "test": ["n6", "n7"],
    }


def test_another_label_makes_another_table(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    write(root / "train.csv", "file,label", rows())
    before = Folder(root=str(root), labels="train.csv", image_size=8).describe()["fingerprint"]
    changed = rows()
    changed[0], changed[1] = (changed[0][0], "kind 1"), (changed[1][0], "kind 0")
    write(root / "train.csv", "file,label", changed)
    after = Folder(root=str(root), labels="train.csv", image_size=8)
    assert after.describe()["fingerprint"] != before
    assert after.table.images[:, 0, 0, 0].tolist()[:3] == [1, 4, 8]


def test_images_that_change_their_classes_make_another_table(tmp_path: Path) -> None:
    """Equal names, sizes and times in two folders, as after unpacking: only the folder tells which image is of which class."""
    root = tmp_path / "images"
    for folder, shade in {"a": 10, "b": 200}.items():
        (root / folder).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), shade).save(root / folder / f"{number}.bmp")
            os.utime(root / folder / f"{number}.bmp", (1, 1))
    for dark, light in ("ab", "ba"):
        lines = [
            (f"{folder}/{number}.bmp", kind)
            for folder, kind in ((dark, "dark"), (light, "light"))
            for number in range(3)
        ]
        write(root / "all.csv", "file,label", lines)
        source = Folder(root=str(root), labels="all.csv", image_size=8)
        shades = source.table.images[:, 0, 0, 0].tolist()
        assert shades == ([10] * 3 + [200] * 3 if dark == "a" else [200] * 3 + [10] * 3)


def test_an_image_that_is_missing_in_its_folder_is_taken_from_no_other(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    (root / "more").mkdir()
    Image.new("L", (8, 8), 9).save(root / "more" / "lost.png")
    write(root / "all.csv", "file,label", [*rows(name="train/{}.png"), ("train/lost.png", "kind 0")])
    with pytest.raises(UserError, match=r"there is no image train/lost\.png"):
        Folder(root=str(root), labels="all.csv", image_size=8)
    write(root / "all.csv", "file,label", [("nowhere/lost.png", "kind 0"), *rows(name="train/{}.png")])
    # Of a folder that is not there.
    assert len(Folder(root=str(root), labels="all.csv", image_size=8).table.images) == 13


def test_of_several_images_of_the_name_one_is_not_told_to_be_the_only_one(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    (root / "b").mkdir()
    (root / "train" / "1.png").rename(root / "b" / "1.png")
    write(root / "all.csv", "file,label", [("b/0.png", "kind 0")])
    with pytest.raises(
        UserError, match=r"there is no image b/0\.png in .*/images, only test/0\.png, and 1 more of that name$"
    ):
        Folder(root=str(root), labels="all.csv", image_size=8)


@pytest.mark.parametrize("train", ["train", "train_images", "train/train"])
@pytest.mark.parametrize("table", ["train.csv", "train_labels.csv"])
def test_a_table_of_one_part_means_the_images_of_that_part(tmp_path: Path, train: str, table: str) -> None:
    """Competitions number the images of each part from 0."""
    root = competition(tmp_path / "images")
    if train != "train":
        (root / "train").rename(root / "aside")
        (root / train).parent.mkdir(exist_ok=True)
        (root / "aside").rename(root / train)
    write(root / table, "file,label", rows())
    check(Folder(root=str(root), labels=table, image_size=8))
    (root / train / "1.png").unlink()
    with pytest.raises(UserError, match=r"line 3: there is no image 1\.png in .*/images, only test/1\.png$"):
        Folder(root=str(root), labels=table, image_size=8)


def test_validation_images_may_lie_among_those_of_training(tmp_path: Path) -> None:
    root = competition(tmp_path / "images", classes=2, per_class=4)
    write(root / "train.csv", "file,label", rows(2, 2))
    write(root / "val.csv", "file,label", rows(2, 4)[4:])
    assert [(entry.part, len(entry.paths)) for entry in by_labels(root, ["train.csv", "val.csv"])] == [
        ("train", 2), ("train", 2), ("val", 2), ("val", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("below", ["", "photos"])
def test_an_image_is_taken_from_no_other_class_folder_where_folders_of_another_machine_are_left_away(
    tmp_path: Path, below: str
) -> None:
    root = tmp_path / "images"
    for kind in range(4):
        for number in range(2 + (kind == 3)):  # the last class has an image more
            path = root / below / f"kind {kind}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 10 * kind + number).save(path)
    lines = [(f"/home/me/kind {kind}/{number}.png", f"kind {kind}") for kind in range(4) for number in range(2)]
    write(root / "all.csv", "file,label", lines)
    source = Folder(root=str(root), labels="all.csv", image_size=8)
    assert source.table.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21, 30, 31]
    write(root / "all.csv", "file,label", [*lines, ("/home/me/kind 0/2.png", "kind 0")])  # which lies in `kind 3` alone
    with pytest.raises(UserError, match=r"line 10: there is no image /home/me/kind 0/2\.png in"):
        Folder(root=str(root), labels="all.csv", image_size=8)


ACCENTS = ("NFC", "NFD")  # an accent in its letter, and apart from it, as macOS has names of files


@pytest.mark.parametrize("files", ACCENTS)
@pytest.mark.parametrize("table", ACCENTS)
@pytest.mark.parametrize("name", ["é{}.png", "Bühne/é{}", "/home/me/Bühne/é{}.png"])
def test_an_accent_is_written_in_two_ways_and_is_one(tmp_path: Path, files: str, table: str, name: str) -> None:
    root = tmp_path / unicodedata.normalize(files, "Fotos von Zoë")
    for number in range(8):
        path = root / unicodedata.normalize(files, f"Bühne/é{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)
    lines = [
        (unicodedata.normalize(table, name.format(n)), unicodedata.normalize(ACCENTS[n // 4], f"ä{n % 4}"))
        for n in range(8)
    ]
    write(root / "all.csv", unicodedata.normalize(table, "file,catégorie,more"), [(*line, "x") for line in lines])
    source = Folder(
        root=str(root), labels="all.csv", label_column=unicodedata.normalize(files, "catégorie"), image_size=8
    )
    assert source.table.names == [f"ä{n}" for n in range(4)]
    assert source.table.images[:, 0, 0, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_names_that_look_the_same_are_told_apart_by_their_bytes_or_refused(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    for number, form in enumerate(ACCENTS):
        Image.new("L", (8, 8), 100 + number).save(root / f"{unicodedata.normalize(form, 'é')}.png")
    lines = [*rows(name="train/{}.png"), ("e\u0301.png", "new")]
    write(root / "all.csv", "file,label", lines)
    source = Folder(root=str(root), labels="all.csv", image_size=8)
    assert source.table.images[-1, 0, 0, 0] == 101
    write(root / "all.csv", "file,label", [*lines[:-1], ("e\u0301", "new")])
    with pytest.raises(UserError, match=r"may be either of two files of .* whose names look the same"):
        Folder(root=str(root), labels="all.csv", image_size=8)


@pytest.mark.parametrize(
    "written", ["{}/other/train/0.png", "../other/train/0.png", "{}/other/train/0", "other/train/0.png"]
)
@pytest.mark.parametrize("home", ["images", "images/lists"])
def test_an_image_outside_the_root_is_refused_and_none_of_its_name_taken(
    tmp_path: Path, written: str, home: str
) -> None:
    root = competition(tmp_path / "images")
    competition(tmp_path / "other")
    (tmp_path / home).mkdir(exist_ok=True)
    up = "../" if home.endswith("lists") and written.startswith("..") else ""
    file = up + written.format(tmp_path.as_posix())
    write(tmp_path / home / "all.csv", "file,label", [(file, "kind 0"), *rows(name="train/{}.png")[1:]])
    with pytest.raises(UserError, match=f"line 2: {re.escape(file)} lies outside .*/images, below which all"):
        Folder(root=str(root), labels=str(tmp_path / home / "all.csv"), image_size=8)
    (tmp_path / "other" / "train" / "0.png").unlink()  # the path is one of another machine
    check(Folder(root=str(root), labels=str(tmp_path / home / "all.csv"), image_size=8))


@pytest.mark.parametrize("whole", [True, False])
def test_an_image_to_which_a_link_below_the_root_leads_is_not_outside(tmp_path: Path, whole: bool) -> None:
    competition(tmp_path / "other")
    root = tmp_path / "images"
    if whole:
        root.mkdir()
        (root / "linked").symlink_to(tmp_path / "other")
    else:
        (root / "own").mkdir(parents=True)
        for number in range(12):
            (root / "own" / f"{number}.png").symlink_to(tmp_path / "other" / "train" / f"{number}.png")
    write(root / "all.csv", "file,label", rows(name=f"{tmp_path}/other/train/{{}}.png"))
    check(Folder(root=str(root), labels="all.csv", image_size=8))


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("lists/all.csv", "../train/{}.png"),
        ("lists/all.csv", "..\\train\\{}"),
        ("all.csv", "../images/train/{}.png"),
        ("lists/all.csv", "./.././train/{}.png"),
        ("all.csv", "/train/{}.png"),
    ],
)
def test_a_path_by_the_folder_above_is_the_image_there(tmp_path: Path, table: str, name: str) -> None:
    root = competition(tmp_path / "images")
    (root / "lists").mkdir()
    write(root / table, "file,label", rows(name=name))
    check(Folder(root=str(root), labels=table, image_size=8))


def test_parts_without_training_are_refused_and_one_part_divides_nothing(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    found = rows(name="train/{}.png")
    write(
        root / "all.csv",
        "file,label,split",
        [(*row, "val" if place % 2 else "test") for place, row in enumerate(found)],
    )
    with pytest.raises(UserError, match="no image is for training, but for test and val"):
        Folder(root=str(root), labels="all.csv", image_size=8)
    write(root / "all.csv", "file,label,split", [(*row, "train") for row in found])
    source = Folder(root=str(root), labels="all.csv", image_size=8)
    assert not source.table.metadata.get("parts")
    assert sorted(len(numbers) for numbers in source.splits.values()) == [1, 1, 2]


@pytest.mark.parametrize("column", ["set", "fold", "usage"])
def test_a_column_that_names_a_part_in_each_row_divides_whatever_it_is_called(tmp_path: Path, column: str) -> None:
    root = competition(tmp_path / "images")
    parts = ["Validation", "test", "train", "train"]  # of the classes, which are not drawn so
    found = [(*row, parts[number % 4]) for number, row in enumerate(rows(name="train/{}.png"))]
    write(root / "all.csv", f"file,label,{column}", found)
    source = Folder(root=str(root), labels="all.csv", image_size=8)
    splits = {split: [source.table.names[number] for number in numbers] for split, numbers in source.splits.items()}
    assert splits == {"train": ["kind 2", "kind 3"], "val": ["kind 0"], "test": ["kind 1"]}
    write(root / "all.csv", f"file,label,{column}", [*found[:-1], (*found[-1][:-1], "something else")])
    assert {*Folder(root=str(root), labels="all.csv", image_size=8).table.groups} == {""}


def test_of_several_tables_each_stays_the_part_that_it_is_called(tmp_path: Path) -> None:
    """A column says of where an image was before."""
    root = competition(tmp_path / "images", classes=2, per_class=4)
    origins = ["train", "test", "train", "test"]
    write(
        root / "train.csv",
        "file,label,origin",
        [(*row, origin) for row, origin in zip(rows(2, 2), origins, strict=True)],
    )
    write(root / "val.csv", "file,label,origin", [(*row, "train") for row in rows(2, 4)[4:]])
    assert [(entry.part, len(entry.paths)) for entry in by_labels(root, ["train.csv", "val.csv"])] == [
        ("train", 2), ("train", 2), ("val", 2), ("val", 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,label\n0.png,a\n0.png,b\n", r"train.csv, line 3: 0.png has a label already, in line 2$"),
        ("file,label\n0.png,a\n0,a\n", r"line 3: 0 has a label already, in line 2$"),
        ("file,label\n0.png,a\nnone.png,b\n", r"line 3: there is no image none.png in .*/images"),
        ("file,label\n../../secret.png,b\n", r"line 2: there is no image ../../secret.png in .*/images"),
        ("file,label\n0.png\n", r"line 2: has 1 columns, the first line 2$"),
        ("file,label\n0.png,\n", r"line 2: has no label$"),
        ("file,label\n,a\n", r"line 2: has no file$"),
        ("file,label\n", r"train.csv has no rows$"),
        ("", r"train.csv has no rows$"),
        (
            "file,diagnosis,age\n0.png,a,40\n",
            r"has the columns file, diagnosis, age; the one of the label must be called label, class, .* data.label_column$",
        ),
        (
            "picture,label,age\n0.png,a,40\n",
            r"has the columns picture, label, age; the one of the file must be called file, filename, .* data.file_column$",
        ),
        ("picture,diagnosis\n0.png,a\n", r"has the columns picture, diagnosis; the one of the file must be called"),
        (
            "file,cat,dog\n0.png,1,0\n1.png,1,1\n",
            r"line 3: is of several classes \(cat, dog\); an image must be of one$",
        ),
        ("file,cat,dog\n0.png,1,0\n1.png,0.0,0\n", r"line 3: has no label$"),
        (
            "file,cat,dog\n0.png,1,0\n1.png,0.5,0.5\n",
            r"has the columns file, cat, dog; the one of the label must be called",
        ),
        ("file,label,label\n0.png,a,b\n", r"has several columns label$"),
        ('file,label\n"0.png,a\n', r"line 2: cannot be read \(a quote is opened and not closed\)$"),
        ('file,label\n0.png,"a\n1.png,"b"\n', r"line 2: cannot be read \(a quote is opened and not closed\)$"),
        pytest.param(
            'file,label\n0.png,a\n1.png,"a\n' + "2.png,a\n" * 20_000,
            r"line 3: cannot be read \(a quote is opened and not closed\)$",
            id="a quote before more than a cell may hold",
        ),
        ('file,label\n"0.png"x,a\n', r"line 2: cannot be read \(',' expected after '\"'\)$"),
        ("file,label,split\n0.png,a,holdout\n", r"line 2: 'holdout' is not train, val or test$"),
        ("file,label,split\n0.png,a,train\n1.png,b,\n", r"1.png is in no part, but other files are"),
        ("file,label\ntwice.png,a\n", r"line 2: twice.png may be test/twice.png or train/twice.png"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    root = competition(tmp_path / "images")
    for part in ("train", "test"):
        Image.new("L", (8, 8)).save(root / part / "twice.png")
    (root / "train.csv").write_text(text)
    if "twice" in text:
        (root / "train.csv").rename(root / "labels.csv")
    with pytest.raises(UserError, match=r"^data.labels: .*" + says) as caught:
        Folder(root=str(root), labels="labels.csv" if "twice" in text else "train.csv")
    assert "\n" not in str(caught.value)


def test_a_first_line_may_name_the_separator_and_zero_bytes_are_no_table(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    (root / "train.csv").write_text("sep=;\nfile;label\n0.png;a, b\n1.png;c\n")
    assert Folder(root=str(root), labels="train.csv").table.names == ["a, b", "c"]
    (root / "train.csv").write_bytes("file,label\n0.png,a\n".encode("utf-16-le"))
    with pytest.raises(
        UserError, match=r"train.csv is no text in UTF-8 \(it holds zero bytes, as UTF-16 does\); save it as"
    ):
        Folder(root=str(root), labels="train.csv")


def test_a_table_that_is_none(tmp_path: Path) -> None:
    root = competition(tmp_path / "images")
    write(root / "train.csv", "file,label", rows())
    with pytest.raises(UserError, match=r"^data.labels: there is no file .*/trian.csv; did you mean train.csv\?$"):
        Folder(root=str(root), labels="trian.csv")
    (root / "train.csv").write_bytes(b"file,label\n\xff\xfe\xfd,a\n")
    with pytest.raises(UserError, match=r"train.csv is no text in UTF-8"):
        Folder(root=str(root), labels="train.csv")
    write(root / "more.csv", "file,label", rows())
    with pytest.raises(UserError, match=r"^data.labels: of several tables each must be called train, val or test"):
        Folder(root=str(root), labels=["more.csv", "train.csv"])


# Layouts that are no classes


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "test"),
        ("Train", "Valid", "TEST"),
        ("training", "testing"),
        ("train", "dev"),
        ("train_images", "test_images"),
        ("Images Train", "images-val"),
        ("Training Set", "Test Set"),
        ("train", "test1"),
        ("train2017", "val2017"),
        ("trainset", "testset"),
        ("TrainImages", "TestImages"),
        ("stage1_train", "stage1_test"),
        ("train-jpg", "test-jpg-v2"),
        ("train", "test_stg1", "test_stg2"),
        ("train", "unlabeled"),
        ("labelled", "unlabelled"),
        ("images_training_rev1", "images_test_rev1"),
        ("training", "validation", "evaluation"),
        ("train", "test", "masks"),
        ("images", "masks"),
        ("train/images", "train/masks", "test/images"),
        ("train/train", "test/test"),
    ],
)
@pytest.mark.parametrize("table", [True, False])
def test_parts_are_no_classes(tmp_path: Path, parts: tuple[str, ...], table: bool) -> None:
    for part in parts:
        (tmp_path / "images" / part).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / part / "1.png")
    if table:
        (tmp_path / "images" / "train.csv").write_text("id,label\n1,a\n")
    advice = r"data.labels=train.csv$" if table else r"into a folder of its own, or name a table .* with data.labels$"
    with pytest.raises(UserError, match=r"^data.root: .*/images/.+ holds images but no class folders, .*" + advice):
        Folder(root=str(tmp_path / "images"))


@pytest.mark.parametrize("home", ["set", "set/Final_Test/Images"])
def test_a_table_beside_images_is_named(tmp_path: Path, home: str) -> None:
    (tmp_path / home).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / home / "1.ppm")
    write(tmp_path / home / "sample_submission.csv", "Filename,ClassId", [("1.ppm", "0")])
    write(tmp_path / home / "truth.csv", "Filename,ClassId", [("1.ppm", "7")])
    with pytest.raises(UserError, match=r"^data\.root: .*data\.labels=truth\.csv$"):
        by_folders(tmp_path / "set")


def test_the_tables_of_parts_without_class_folders_are_named(tmp_path: Path) -> None:
    root = tmp_path / "signs"
    for number in range(3):
        (root / "Train" / f"{number}").mkdir(parents=True)
        Image.new("L", (8, 8), number).save(root / "Train" / f"{number}" / "1.png")
    (root / "Test").mkdir()
    Image.new("L", (8, 8)).save(root / "Test" / "2.png")
    write(root / "Train.csv", "ClassId,Path", [(f"{number}", f"Train/{number}/1.png") for number in range(3)])
    write(root / "Test.csv", "ClassId,Path", [("0", "Test/2.png")])
    with pytest.raises(
        UserError, match=r"need a table: 'data\.labels=\[Train\.csv,Test\.csv\]' reads both; data\.root="
    ):
        by_folders(root)
    assert [(entry.part, entry.name) for entry in by_labels(root, ["Train.csv", "Test.csv"])] == [
        ("train", "0"), ("train", "1"), ("train", "2"), ("test", "0"),
    ]  # fmt: skip


def test_the_folder_that_holds_the_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances.json").write_text("{}")
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "1.png")
    with pytest.raises(UserError, match=r"/images holds images but no class folders"):
        by_folders(tmp_path)


@pytest.mark.parametrize("between", [" ", "   ", ",", "\t"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_list_of_images_and_labels_needs_no_names_of_columns(tmp_path: Path, between: str, turned: bool) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / "images" / f"{number}.JPG", "JPEG")
        row = (f"images/{number}.JPG", str(number % 2))
        rows.append(between.join(row[::-1] if turned else row))
    (tmp_path / "labels.txt").write_text("\n".join(rows) + "\n")
    assert [(entry.name, len(entry.paths)) for entry in by_labels(tmp_path, ["labels.txt"])] == [("0", 2), ("1", 2)]
    (tmp_path / "boxes.csv").write_text("0.JPG,1,2,cat\n1.JPG,1,2,dog\n")
    with pytest.raises(
        UserError, match=r"boxes\.csv begins with a row, of 0\.JPG; its first line must name the columns"
    ):
        by_labels(tmp_path, ["boxes.csv"])


def test_pieces_of_a_folder_are_no_classes_beside_a_table(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for piece in (1, 2):
        (root / f"HAM10000_images_part_{piece}").mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), number).save(root / f"HAM10000_images_part_{piece}" / f"{3 * piece + number}.png")
    assert len(by_folders(root)) == 2  # nothing says that they are not
    write(root / "metadata.csv", "image_id,dx", [(str(number), f"kind {number % 2}") for number in range(3, 9)])
    with pytest.raises(UserError, match=r"part_1 holds images but no class folders, .*data.labels=metadata.csv$"):
        by_folders(root)
    assert [entry.name for entry in by_labels(root, ["metadata.csv"])] == ["kind 0", "kind 1"]


@pytest.mark.parametrize(
    "names", [("train", "bus"), ("trains", "tests of blood"), ("train 1", "train 2"), ("retest", "latest")]
)
def test_classes_that_are_called_much_as_parts_are_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        for shade in range(3):
            Image.new("L", (8, 8), 40 * shade).save(tmp_path / name / f"{shade}.png")
    assert [entry.name for entry in by_folders(tmp_path)] == sorted(names)


def test_a_form_for_predictions_is_no_table_of_labels(tmp_path: Path) -> None:
    for part in ("train", "test1"):
        (tmp_path / part).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / part / "cat.0.png")
    (tmp_path / "sampleSubmission.csv").write_text("id,label\n1,0\n")
    with pytest.raises(UserError, match=r"name a table of file and label with data.labels$"):
        by_folders(tmp_path)


@pytest.mark.parametrize("name", ["images", "train"])
def test_one_folder_beside_a_table_is_no_class(tmp_path: Path, name: str) -> None:
    (tmp_path / "set" / name).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "set" / name / "1.png")
    (tmp_path / "set" / "labels.tsv").write_text("image\tlabel\n1\ta\n")
    with pytest.raises(UserError, match=rf"/set/{name} holds images but no class folders, .*data.labels=labels.tsv$"):
        Folder(root=str(tmp_path / "set"))


def test_a_test_folder_without_labels_is_said_so(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number in range(4):
        (root / "train" / f"c{number}").mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / "train" / f"c{number}" / "1.png")
    (root / "test").mkdir()
    Image.new("L", (8, 8)).save(root / "test" / "1.png")
    with pytest.raises(
        UserError, match=rf"no class folders in test, whose images have no labels; data.root={root}/train takes"
    ):
        Folder(root=str(root))
    assert Folder(root=str(root / "train")).table.names == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "valid", "testing")])
def test_parts_by_other_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for kind in ("ill", "well"):
            for number in range(3):
                path = tmp_path / "images" / name / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), len(name)).save(path)
    source = Folder(root=str(tmp_path / "images"), image_size=8, normalize=False)
    assert source.table.names == ["ill", "well"]
    pixels = source.labelled("test").whole(torch.device("cpu")).x * 255
    assert (pixels.round() == len(names[-1])).all()
    os.mkdir(tmp_path / "images" / "TEST")
    with pytest.raises(UserError, match=r"has both \w+ and \w+; remove one"):
        Folder(root=str(tmp_path / "images"))


def test_a_run_on_a_competitions_folder(tmp_path: Path) -> None:
    root = competition(tmp_path / "images", classes=6, per_class=6)
    write(root / "train.csv", "id,label", rows(6, 6, "{}"))
    words = ["data=folder", f"data.root={root}", "data.image_size=8", "algo=protonet", "backbone=pixels", f"outputs={tmp_path / 'runs'}",
             "task.ways=2", "task.queries=2", "train.steps=0", "test.episodes=4", "test.baseline_episodes=0",
             "train.validate_episodes=2", "data.ratios=[0.34,0.33,0.33]"]  # fmt: skip
    outcome = metarun(*words)
    assert outcome.status == 2
    assert outcome.said[0].endswith("data.labels=train.csv")
    outcome = metarun(*words, "data.labels=train.csv")
    assert outcome.status == 0, outcome.err
    assert result(run_folder(tmp_path / "runs"))["data"]["images"] == {"train": 12, "val": 12, "test": 12}
