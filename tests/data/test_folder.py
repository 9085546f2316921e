"""Images in folders: every kind of image, every kind of split, every kind of mistake."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.core import TaskShape
from metarun.data import folder as folders
from metarun.data.class_folders import by_folders
from metarun.data.folder import Folder
from metarun.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (10, 10), (200, 100, 0))).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten classes c0 to c9 of three images; the pixels of image i of class c are 20c + i."""
    for number in range(10):
        for i in range(3):
            save(tmp_path / "images" / f"c{number}" / f"{i}.png", Image.new("L", (8, 8), 20 * number + i))
    return tmp_path / "images"


def names(source: Folder) -> dict[str, list[str]]:
    return {split: [source.table.names[index] for index in indices] for split, indices in source.splits.items()}


def the_image(root: Path, size: int = 8, **settings: object) -> np.ndarray:
    """The pixels of the first image of class `a`, beside two classes more that give the splits something."""
    for name in ("b", "c"):
        if not (root / name).exists():
            save(root / name / "1.png", Image.new("L", (8, 8), 50))
    return Folder(root=str(root), image_size=size, **settings).table.images[0]  # type: ignore[arg-type]


# Tables


def test_the_files_of_a_class_are_looked_up_and_not_searched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    found = [entry._replace(name=Name(entry.name)) for entry in folders.classes_of(str(root), None, None, None)]
    monkeypatch.setattr(folders, "classes_of", lambda *asked: found)
    source = Folder(root=str(root), image_size=8)
    assert source.files == [f"c{number}{os.sep}{i}.png" for number in range(10) for i in range(3)]
    assert source.table.images[:, 0, 0, 0].tolist() == [20 * number + i for number in range(10) for i in range(3)]
    assert compared <= 2 * len(source.files)  # a search of the ten classes for each would be 100 each time


def test_table_is_by_class_and_name(root: Path) -> None:
    save(root / "c1" / "10.png", Image.new("L", (8, 8), 99))
    source = Folder(root=str(root), image_size=4)
    assert source.table.names == [f"c{number}" for number in range(10)]
    assert source.table.sizes.tolist() == [3, 4, *[3] * 8]
    assert source.table.images.shape == (31, 1, 4, 4)
    assert source.table.images[:8, 0, 0, 0].tolist() == [0, 1, 2, 20, 21, 99, 22, 40]
    assert (source.table.images == source.table.images[:, :, :1, :1]).all()
    assert "skipped" not in source.describe()


def test_episodes_are_normalized_by_the_training_classes(root: Path) -> None:
    source = Folder(root=str(root), image_size=4)
    train = np.concatenate([20.0 * index + np.arange(3) for index in source.splits["train"]])
    episodes = source.sampler("train", TaskShape(2, 1, 2), 0, torch.device("cpu"))(0, 50)
    values = episodes.query_x[..., 0, 0].flatten() * train.std() + train.mean()
    assert set(values.round().int().tolist()) == set(train.astype(int).tolist())
    raw = Folder(root=str(root), image_size=4, normalize=False)
    pixels = raw.sampler("train", TaskShape(2, 1, 2), 0, torch.device("cpu"))(0, 50).query_x[..., 0, 0].flatten()
    torch.testing.assert_close(pixels * 255, values)


def test_hidden_files_and_folders_are_ignored(root: Path) -> None:
    clean = Folder(root=str(root)).table
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (root / "c0" / name).write_bytes(b"litter")
    for name in (".git", "__MACOSX", "c0/@eaDir"):
        (root / name).mkdir()
    (root / "README.txt").write_text("about these images")
    littered = Folder(root=str(root)).table
    assert littered.names == clean.names
    assert littered.fingerprint == clean.fingerprint


@pytest.mark.parametrize(
    "name", ["GT-00000.csv", "list.TSV", "notes.txt", "boxes.json", "licence.pdf", "a.xml", "README.md"]
)
def test_lists_and_texts_in_a_class_folder_are_no_images(root: Path, name: str) -> None:
    """As benchmarks have them: a table of annotations lies beside the images of each class."""
    clean = Folder(root=str(root)).table
    for folder in root.iterdir():
        (folder / name).write_text("Filename;Width;Height;ClassId\n0.png;8;8;0\n")
    found = Folder(root=str(root)).table
    assert found.names == clean.names
    assert found.fingerprint == clean.fingerprint


def test_a_class_folder_without_images_says_what_it_holds(root: Path) -> None:
    for path in (root / "c4").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(UserError, match=r"^data.root: the class folder .*/images/c4 holds no image, but 0.txt$"):
        Folder(root=str(root))


def test_class_folders_that_lie_deeper_are_named(root: Path, tmp_path: Path) -> None:
    top = tmp_path / "signs"
    (top / "Final_Training").mkdir(parents=True)
    root.rename(top / "Final_Training" / "Images")
    save(top / "Final_Test" / "Images" / "00000.png")
    with pytest.raises(UserError, match=rf"images alone; {top}/Final_Training/Images has 10 class folders$"):
        Folder(root=str(top))


@pytest.mark.parametrize("change", ["touch", "edit", "rename", "remove", "add"])
def test_any_change_makes_a_new_table(root: Path, own_cache: Path, change: str) -> None:
    def tables() -> int:
        return len([path for path in own_cache.iterdir() if path.suffix != ".lock"])

    def open_twice() -> Folder:
        Folder(root=str(root))
        return Folder(root=str(root))

    before = open_twice()
    assert tables() == 1
    path = root / "c0" / "1.png"
    if change == "touch":
        os.utime(path, ns=(1, 1))
    elif change == "edit":
        save(path, Image.new("L", (8, 8), 17))
    elif change == "rename":
        path.rename(root / "c0" / "9.png")
    elif change == "remove":
        path.unlink()
    else:
        save(root / "c0" / "3.png", Image.new("L", (8, 8), 17))
    after = open_twice()
    assert tables() == 2
    assert (after.table.fingerprint == before.table.fingerprint) == (change == "touch")


# Images


def test_colour_makes_three_channels_of_all(root: Path) -> None:
    assert Folder(root=str(root)).input_shape == (1, 84, 84)
    save(root / "c9" / "3.jpg", Image.new("RGB", (8, 8), (255, 0, 0)), quality=100)
    source = Folder(root=str(root), image_size=8)
    assert source.input_shape == (3, 8, 8)
    assert source.table.images[3, :, 0, 0].tolist() == [20, 20, 20]
    assert source.table.images[-1, :, 4, 4] == pytest.approx([255, 0, 0], abs=4)
    assert Folder(root=str(root), image_size=8, channels=1).table.images[-1, :, 4, 4] == pytest.approx([76], abs=4)


def test_channels_may_be_forced_to_three(root: Path) -> None:
    assert Folder(root=str(root), channels=3).input_shape == (3, 84, 84)


def sixteen_bits(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 120, 250])
    return image


@pytest.mark.parametrize(
    ("make", "kind", "expected"),
    [
        (lambda: Image.new("1", (8, 8), 1), "png", [255]),
        (lambda: Image.new("L", (8, 8), 77), "bmp", [77]),
        (lambda: sixteen_bits(65535), "png", [255]),
        (lambda: sixteen_bits(257 * 100), "tiff", [100]),
        (lambda: Image.fromarray(np.full((8, 8), 257 * 100, ">u2")), "tiff", [100]),
        (lambda: Image.new("I", (8, 8), 257 * 100), "tiff", [100]),
        (lambda: Image.new("LA", (8, 8), (100, 0)), "png", [255]),
        (lambda: Image.new("LA", (8, 8), (100, 255)), "png", [100]),
        (lambda: Image.new("RGB", (8, 8), (1, 2, 3)), "webp", [1, 2, 3]),
        (lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "png", [255, 255, 255]),
        (lambda: Image.new("RGBA", (8, 8), (200, 0, 0, 51)), "png", [244, 204, 204]),
        (palette, "png", [10, 120, 250]),
        (palette, "gif", [10, 120, 250]),
        (lambda: Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "tiff", [0, 255, 255]),
    ],
)
def test_every_kind_of_image(tmp_path: Path, make: Callable[[], Image.Image], kind: str, expected: list[int]) -> None:
    options = {"lossless": True} if kind == "webp" else {}
    save(tmp_path / "images" / "a" / f"1.{kind}", make(), **options)
    pixels = the_image(tmp_path / "images")
    assert pixels.shape == (len(expected), 8, 8)
    assert pixels[:, 3, 3] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparent_palette_entry_is_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = palette()
    image.paste(0, (0, 0, 4, 8))
    save(tmp_path / "images" / "a" / "1.png", image, transparency=transparency)
    pixels = the_image(tmp_path / "images")
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 7].tolist() == [10, 120, 250]


def test_file_names_say_nothing_of_the_kind(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a" / "1.png", Image.new("L", (8, 8), 9)).rename(tmp_path / "images" / "a" / "scan")
    assert the_image(tmp_path / "images")[0, 0, 0] == 9


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    save(tmp_path / "images" / "a" / "1.png", image, exif=exif)
    pixels = the_image(tmp_path / "images")[0]
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_central_square_is_kept(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.zeros(shape, np.uint8)
    rows, columns = ((side - 24) // 2 for side in shape)
    pixels[rows : rows + 24, columns : columns + 24] = 200
    save(tmp_path / "images" / "a" / "1.png", Image.fromarray(pixels))
    found = the_image(tmp_path / "images", 6)[0]
    assert np.abs(found - 200.0).max() < 15  # the filter sees a little of what lies beside


# Bad files


def truncated(path: Path) -> None:
    save(path, Image.effect_noise((64, 64), 50))
    path.write_bytes(path.read_bytes()[:1000])


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere.png"))


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # an address may be 108 bytes long
        server.bind(path.name)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "truncated"),
        (dangling, "no such file"),
        (lambda path: path.write_text("notes"), "no image that Pillow knows"),
        (os.mkfifo, "it is a pipe, and no file"),
        (listening, "it is a socket, and no file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, and no file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
    ],
)
def test_bad_files_are_named_or_skipped(
    root: Path, own_cache: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    bad = root / "c4" / "4.png"
    spoil(bad)
    with pytest.raises(
        UserError, match=rf"^data.root: {bad} is not a whole image \(.*{reason}.*\); .*data.skip_bad=true$"
    ):
        Folder(root=str(root))
    assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"]
    source = Folder(root=str(root), skip_bad=True)
    assert source.describe()["skipped"] == 1
    assert source.table.sizes.tolist() == [3] * 10


def test_a_link_in_a_circle_that_is_no_image_is_left(root: Path) -> None:
    (root / "c4" / "notes.txt").symlink_to("notes.txt")
    (root / "around").symlink_to("around")
    assert Folder(root=str(root)).table.sizes.tolist() == [3] * 10


def test_an_image_of_unknown_range_is_named_or_skipped(root: Path) -> None:
    odd = root / "c4" / "4.png"
    save(odd, Image.new("F", (8, 8), 0.5), format="TIFF")
    with pytest.raises(
        UserError, match=rf"^data.root: {odd} has floating-point pixels.*; data.value_range=\[low,high\] "
    ):
        Folder(root=str(root))
    assert Folder(root=str(root), skip_bad=True).describe()["skipped"] == 1


def test_names_that_are_no_utf_8_are_names(root: Path, tmp_path: Path) -> None:
    """A class, a file and the folder that they lie in; what is printed and stored has the bytes spelled."""
    (root / "c4").rename(root / os.fsdecode(b"c\xe9"))
    (root / "c5" / "1.png").rename(root / "c5" / os.fsdecode(b"\xff.png"))
    elsewhere = tmp_path / os.fsdecode(b"r\xe9s")
    root.rename(elsewhere)
    source = Folder(root=str(elsewhere))
    assert source.table.sizes.tolist() == [3] * 10
    assert os.fsdecode(b"c\xe9") in source.table.names


def test_class_of_bad_files_alone(root: Path) -> None:
    for path in (root / "c4").iterdir():
        path.write_text("notes")
    with pytest.raises(UserError, match=r"all files of the class folder .*/images/c4 are bad images"):
        Folder(root=str(root), skip_bad=True)


def test_disk_errors_are_never_skipped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Image.Image:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(UserError, match=r"^data folder: .*images/c0/0.png: cannot be read \(Input/output error\)$"):
        Folder(root=str(root), skip_bad=True, channels=1)


# Splits


def test_seeded_ratios(root: Path) -> None:
    first, again, other = (names(Folder(root=str(root), split_seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert {split: len(found) for split, found in first.items()} == {"train": 6, "val": 2, "test": 2}
    assert sorted(name for found in first.values() for name in found) == [f"c{number}" for number in range(10)]
    uneven = names(Folder(root=str(root), ratios=[0.1, 0.05, 0.85]))
    assert {split: len(found) for split, found in uneven.items()} == {"train": 1, "val": 1, "test": 8}


def test_split_of_three_classes(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "images" / name / "1.png")
    found = names(Folder(root=str(tmp_path / "images"), ratios=[0.98, 0.01, 0.01]))
    assert sorted(map(len, found.values())) == [1, 1, 1]


def test_class_lists(root: Path) -> None:
    source = Folder(root=str(root), train_classes=["c3", "c1"], val_classes=["c0"], test_classes=["c9"])
    assert names(source) == {"train": ["c3", "c1"], "val": ["c0"], "test": ["c9"]}


def test_a_class_folder_is_found_however_its_accent_is_written(tmp_path: Path) -> None:
    apart = [unicodedata.normalize("NFD", name) for name in ("é1", "é2", "é3")]
    for number, name in enumerate([*apart, "b", "c"]):
        save(tmp_path / "images" / name / "0.png", Image.new("L", (8, 8), number))
    lists = {"train_classes": ["b", apart[2]], "val_classes": ["c"], "test_classes": ["é1", apart[1]]}
    source = Folder(root=str(tmp_path / "images"), image_size=8, **lists)  # type: ignore[arg-type]
    assert names(source) == {"train": ["b", "é3"], "val": ["c"], "test": ["é1", "é2"]}
    save(tmp_path / "images" / "é1" / "0.png")
    with pytest.raises(
        UserError, match=r"two class folders have names that look the same \('e\\u03011' and '\\xe91'\)"
    ):
        Folder(root=str(tmp_path / "images"), image_size=8)


def test_an_accent_changes_no_division_however_it_is_written(tmp_path: Path) -> None:
    found = []
    for form in ("NFC", "NFD"):  # an archive that was made on a Mac has the latter
        for number, name in enumerate(("é", "f", "z")):
            for i, file in enumerate(("é", "f")):
                path = tmp_path / form / unicodedata.normalize(form, name) / f"{unicodedata.normalize(form, file)}.png"
                save(path, Image.new("L", (8, 8), 2 * number + i))
        found.append(Folder(root=str(tmp_path / form), image_size=8))
    assert names(found[0]) == names(found[1])
    assert found[0].table.fingerprint == found[1].table.fingerprint


def test_class_lists_without_validation(root: Path) -> None:
    found = names(Folder(root=str(root), train_classes=["c0", "c1", "c2", "c3", "c4"], test_classes=["c9"]))
    assert (len(found["train"]), len(found["val"]), found["test"]) == (4, 1, ["c9"])
    assert sorted(found["train"] + found["val"]) == ["c0", "c1", "c2", "c3", "c4"]


@pytest.mark.parametrize("validation", [True, False])
def test_split_folders(tmp_path: Path, validation: bool) -> None:
    for split, classes in {"train": "abcde", "val": "fg" if validation else "", "test": "hi"}.items():
        for name in classes:
            save(tmp_path / "images" / split / name / "1.png")
    source = Folder(root=str(tmp_path / "images"))
    found = names(source)
    assert found["test"] == ["h", "i"]
    if validation:
        assert (found["train"], found["val"]) == (["a", "b", "c", "d", "e"], ["f", "g"])
    else:
        assert (len(found["train"]), len(found["val"])) == (4, 1)
        assert sorted(found["train"] + found["val"]) == ["a", "b", "c", "d", "e"]
    assert source.table.groups[source.table.names.index("h")] == "test"


def test_folders_beside_split_folders_are_said_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a", "train/b", "test/c", "notes/d"):
        save(tmp_path / "images" / name / "1.png")
    assert Folder(root=str(tmp_path / "images")).table.names == ["a", "b", "c"]
    assert caplog.messages[0] == f"data folder: of {tmp_path}/images only train, test are read, not notes"


def test_classes_whose_names_differ_in_capitals_alone_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/Cat", "train/Dog", "train/owl", "train/A", "test/cat", "test/dog", "test/a"):
        save(tmp_path / "images" / name / "1.png")
    assert len(Folder(root=str(tmp_path / "images"), image_size=8).table.names) == 7
    assert caplog.messages[0] == (
        "data folder: Cat and cat, whose names differ in capitals alone, and 1 more such, are two classes; if they are one, call them "
        "alike"
    )


def test_further_pages_of_a_tiff_file_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate("abc"):
        pages = [Image.new("L", (8, 8), value) for value in (number, 200, 201)]
        for form in ("tiff", "gif"):
            save(tmp_path / "images" / name / f"1.{form}", pages[0], save_all=True, append_images=pages[1:])
        save(tmp_path / "images" / name / "2.tiff", pages[0])
    for _ in range(2):  # the table is built, and then there
        caplog.clear()
        source = Folder(root=str(tmp_path / "images"), image_size=8)
        assert source.table.images.max() < 200
        assert "data folder: of 3 files of several pages (TIFF) only the first page is read" in caplog.messages
        assert source.describe()["files_of_several_pages"] == 3


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    for name in ("train", "bus", "test"):
        save(tmp_path / "images" / name / "1.png")
    assert Folder(root=str(tmp_path / "images")).table.names == ["bus", "test", "train"]


# Mistakes


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"channels": 2}, r"data.channels=2: is not one of 1, 3"),
        ({"image_size": 0}, r"data.image_size=0: must be at least 1"),
        ({"ratios": [0.5, 0.5]}, r"data.ratios=\[0.5, 0.5\]: must have 3 values"),
        ({"ratios": [0.5, 0.5, 0.0]}, r"data.ratios=\[0.5, 0.5, 0\]: each must be above 0"),
        ({"ratios": [0.5, 0.4, 0.4]}, r"data.ratios=\[0.5, 0.4, 0.4\]: must sum to 1, but the sum is 1.3"),
        (
            {"train_classes": ["c1", "cc2"], "test_classes": ["c3"]},
            r"data.train_classes: .*/images has no class folder cc2; did you mean ",
        ),
        ({"train_classes": ["c1"]}, r"data.test_classes: names no class, but class lists need both"),
        ({"val_classes": ["c1"]}, r"data.train_classes: names no class, but class lists need both"),
        (
            {"train_classes": ["c1", "c2"], "test_classes": ["c2"]},
            r"data.test_classes: class c2 is in data.train_classes already",
        ),
        (
            {"train_classes": ["c1"], "test_classes": ["c2"]},
            r"gives no validation classes, and for training 1 class; at least 2",
        ),
    ],
)
def test_wrong_settings(root: Path, settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Folder(root=str(root), **settings)  # type: ignore[arg-type]


def test_missing_root_names_the_nearest_folder(root: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^data.root: there is no folder {root.parent}/imagse; did you mean images\?$"
    ):
        Folder(root=str(root.parent / "imagse"))
    with pytest.raises(UserError, match=r"^data.root: there is no folder /no/such$"):
        Folder(root="/no/such")
    with pytest.raises(UserError, match=r"c0/0.png is a file; it must be a folder with one folder per class$"):
        Folder(root=str(root / "c0" / "0.png"))


def test_a_table_of_labels_as_the_root_names_the_right_keys(tmp_path: Path) -> None:
    (tmp_path / "my labels.csv").write_text("file,label\n")
    with pytest.raises(
        UserError, match=rf"; of a table of labels: data\.root={tmp_path} data\.labels='my labels\.csv'$"
    ):
        Folder(root=str(tmp_path / "my labels.csv"))


def test_roots_without_classes(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(UserError, match=rf"^data.root: folder {folder} is empty$"):
        Folder(root=str(folder))
    save(folder / "1.png")
    with pytest.raises(UserError, match=r"/images holds files but no class folders"):
        Folder(root=str(folder))
    save(folder / "a" / "1.png")
    save(folder / "b" / "1.png")
    assert names(Folder(root=str(folder))) == {split: ["a", "b"] for split in ("train", "val", "test")}  # a target
    with pytest.raises(UserError, match=r"data.train_classes: /.*/images has no class folder c"):
        Folder(root=str(folder), train_classes=["c"], test_classes=["a"])


def test_empty_class_folder_and_folder_in_class_folder(root: Path) -> None:
    (root / "c10").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*/images/c10 is empty"):
        Folder(root=str(root))
    save(root / "c10" / "more" / "1.png")
    with pytest.raises(UserError, match=r"/images/c10/more is a folder inside a class folder"):
        Folder(root=str(root))


def test_an_archive_as_the_root_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"photos\.zip is a file; .*; unpack photos\.zip first$"):
        Folder(root=str(tmp_path / "photos.zip"))


def test_the_images_of_a_class_may_lie_in_its_folder_of_images(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for name in ("ill", "well"):
        save(root / name / "images" / "1.png")
        save(root / name / "masks" / "1.png")
        (root / name / "boxes.txt").write_text("1.png 0 0 8 8\n")
    source = Folder(root=str(root), image_size=8)
    assert (source.table.names, source.table.sizes.tolist()) == (["ill", "well"], [1, 1])
    shutil.rmtree(root / "well")
    with pytest.raises(UserError, match="is a folder inside a class folder"):  # one such folder is no class
        Folder(root=str(root))


def test_folders_that_each_class_has_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path / "birds"
    for name in ("finch", "wren", "owl"):
        for year in ("2024", "2025"):
            save(root / name / year / "1.png")
    with pytest.raises(
        UserError, match=r"inside a class folder; .*hold images alone; a table of file and label .*data\.labels$"
    ):
        Folder(root=str(root))
    (root / "owl").rename(tmp_path / "owl")
    (tmp_path / "owl").rename(tmp_path / "birds" / "deep")
    save(root / "deep" / "2026" / "1.png")
    with pytest.raises(UserError, match=r"; .*/birds/deep has 3 class folders$"):
        Folder(root=str(root))


def test_a_divided_folder_further_below_is_named_whole(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / "set" / "data" / part / name / "1.png")
    with pytest.raises(UserError, match=r"; .*/set/data is divided into test, train$"):
        Folder(root=str(tmp_path / "set"))


def test_files_that_are_called_as_masks_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("benign", "normal"):
        save(tmp_path / "scans" / name / "scan (1).png")
        save(tmp_path / "scans" / name / "gas mask.png")  # no `gas.png` is beside it
    Folder(root=str(tmp_path / "scans"), image_size=8)
    assert "masks" not in caplog.text
    save(tmp_path / "scans" / "benign" / "scan (1)_mask.png")
    save(tmp_path / "scans" / "benign" / "scan (1)_mask_2.png")
    Folder(root=str(tmp_path / "scans"), image_size=8)
    assert "2 files are called as masks of images beside them, benign/scan (1)_mask.png say" in caplog.text


def test_what_systems_leave_behind_is_no_class(root: Path) -> None:
    for name in ("$RECYCLE.BIN", "System Volume Information", "lost+found"):
        (root / name).mkdir()
    (root / "c0" / "ehthumbs.db").write_bytes(b"x")
    (root / "c0" / "Icon\r").write_bytes(b"")
    assert [entry.name for entry in by_folders(root)] == sorted(path.name for path in root.glob("c*"))
    assert all(path.suffix == ".png" for path in by_folders(root)[0].paths)


def test_split_folders_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    save(folder / "train" / "a" / "1.png")
    alone = rf"; data\.root={folder}/train takes these alone$"
    with pytest.raises(
        UserError, match=rf"/images is divided into train, but there are no class folders in test{alone}"
    ):
        Folder(root=str(folder))
    (folder / "train").rename(folder / "val")
    with pytest.raises(UserError, match=r"no class folders in train; data\.root=.*/images/val takes these alone$"):
        Folder(root=str(folder))
    save(folder / "train" / "a" / "1.png")
    with pytest.raises(
        UserError, match=r"no class folders in test; call val test, or data\.root=.*/train takes the others"
    ):
        Folder(root=str(folder))
    shutil.rmtree(folder / "val")
    save(folder / "test" / "a" / "1.png")
    save(folder / "test" / "c" / "1.png")
    with pytest.raises(
        UserError,
        match=r"/images: class a is in both train and test, but c in test without train; splits of classes must not overlap, and "
        "parts of images must have the classes of train$",
    ):
        Folder(root=str(folder))
    shutil.rmtree(folder / "test" / "c")
    (folder / "test" / "a").rename(folder / "test" / "b")
    with pytest.raises(UserError, match=r"gives no validation classes, and for training 1 class; at least 2"):
        Folder(root=str(folder))
    save(folder / "train" / "c" / "1.png")
    with pytest.raises(UserError, match=r"divided by its train and test folders already"):
        Folder(root=str(folder), train_classes=["a"], test_classes=["b"])
    (folder / "val").mkdir()
    with pytest.raises(UserError, match=r"divided into train, val, test, but there are no class folders in val$"):
        Folder(root=str(folder))


@pytest.mark.parametrize("by", ["folders", "table"])
def test_a_rare_class_may_lack_in_some_parts(tmp_path: Path, by: str) -> None:
    root = tmp_path / "images"
    held = {"train": "abc", "val": "ab", "test": "bc"}
    for part, classes in held.items():
        for name in classes:
            for number in range({"train": 3, "val": 1, "test": 2}[part]):
                save(root / part / name / f"{part}{name}{number}.png", Image.new("L", (8, 8), ord(name) + number))
    rows = [f"{path.relative_to(root)},{path.parent.name},{path.parts[-3]}" for path in root.glob("*/*/*.png")]
    (tmp_path / "all.csv").write_text("\n".join(["file,label,split", *rows]))
    source = Folder(root=str(root), labels=str(tmp_path / "all.csv") if by == "table" else None, image_size=8)
    assert source.table.names == ["a", "b", "c"]
    for part, counts in {"train": [3, 3, 3], "val": [1, 1, 0], "test": [0, 2, 2]}.items():
        assert source.labelled(part).counts.tolist() == counts  # type: ignore[arg-type]
    assert source.training_rows.tolist() == [
        row for c in source.splits["train"] for row in range((0, 4, 10)[c], (0, 4, 10)[c] + 3)
    ]


def test_sub_folders_of_the_same_classes_divide_the_images(tmp_path: Path) -> None:
    """Two classes, too few to be divided: a target."""
    for split, count in {"train": 4, "test": 3, "val": 2}.items():
        for name in ("ill", "well"):
            for number in range(count):
                save(tmp_path / "images" / split / name / f"{number}.png", Image.new("L", (8, 8), 10 * count))
    source = Folder(root=str(tmp_path / "images"), normalize=False, image_size=8)
    assert source.table.names == ["ill", "well"]
    assert names(source) == {split: ["ill", "well"] for split in ("train", "val", "test")}
    for part, count in {"train": 4, "val": 2, "test": 3}.items():
        images = source.labelled(part)  # type: ignore[arg-type]
        assert images.counts.tolist() == [count, count]
        pixels = images.whole(torch.device("cpu")).x * 255
        assert (pixels.round() == 10 * count).all()
    assert len(source.labelled(None)) == 18
    assert source.describe()["parts"] == {"train": 8, "val": 4, "test": 6}


TEXT_FOR_A_NUMBER = bytes.fromhex(  # orientation 6, and a resolution as the text "72"
    "4578696600004d4d002a000000080002011200030000000100060000011a0002000000033732000000000000"
)


@pytest.mark.parametrize(("exif", "turned"), [(TEXT_FOR_A_NUMBER, True), (b"Exif\0\0garbage", False)])
def test_a_flaw_in_exif_data_spoils_no_image(tmp_path: Path, exif: bytes, turned: bool) -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # the upper half
    save(tmp_path / "images" / "a" / "1.png", image, exif=exif)
    pixels = the_image(tmp_path / "images")[0]
    bright, dark = (pixels[:, 4:], pixels[:, :4]) if turned else (pixels[:4], pixels[4:])
    assert (bright == 255).all()
    assert (dark == 0).all()
