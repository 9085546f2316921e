"""Images of more than eight bits: the same pictures give the same pixels whatever their depth, and what is lost is said."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shell import metarun, result

from metarun.data.decoding import read
from metarun.data.folder import Folder
from metarun.errors import UserError

DEPTHS = {
    "8 bits": (lambda pixels: Image.fromarray(pixels.astype(np.uint8)), "png"),
    "16 bits, PNG": (lambda pixels: Image.fromarray(pixels.astype(np.uint16)), "png"),
    "16 bits, TIFF": (lambda pixels: Image.fromarray(pixels.astype("<u2")), "tiff"),
    "16 bits, other byte order": (lambda pixels: Image.fromarray(pixels.astype(">u2")), "tiff"),
    "32 bits": (lambda pixels: Image.fromarray(pixels.astype(np.int32)), "tiff"),
    "floats": (lambda pixels: Image.fromarray(pixels.astype(np.float32)), "tiff"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def pictures(root: Path, depth: str, *, high: int = 100, offset: int = 0, parts: tuple[str, ...] = ("",)) -> Path:
    """Four classes of two pictures whose values go from `offset` to `offset + high`, in each part."""
    make, kind = DEPTHS[depth]
    random = np.random.default_rng(0)
    for part in parts:
        for number in range(4):
            for image in range(2):
                pixels = random.integers(0, high + 1, (8, 8))
                pixels[0, :2] = 0, high
                path = root / part / f"c{number}" / f"{image}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                make(pixels + offset).save(path)
    return root


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("values", [[0, 255], [0, 100], [20, 60], "auto"])
def test_the_same_pictures_of_any_depth_are_the_same(tmp_path: Path, depth: str, values: Any) -> None:
    eight = Folder(root=str(pictures(tmp_path / "eight", "8 bits")), image_size=6, value_range=values)
    other = Folder(root=str(pictures(tmp_path / "other", depth)), image_size=6, value_range=values)
    assert np.array_equal(other.table.images, eight.table.images)
    assert other.describe()["fingerprint"] == eight.describe()["fingerprint"]
    assert other.describe()["values"]["mapped"] == (values if values != "auto" else [0, 100])


@pytest.mark.parametrize("values", [None, "auto"])
def test_white_is_zero_where_a_file_says_so(tmp_path: Path, values: Any) -> None:
    """In 16 bits as in 8, of which Pillow turns the values round itself."""
    tables = []
    for bits, scale in ((8, 1), (16, 257)):
        root = tmp_path / str(bits)
        for number in range(4):
            folder = root / f"c{number}"
            folder.mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8)) * scale
            pixels[0, :2] = 0, 255 * scale
            Image.fromarray(pixels.astype(f"u{bits // 8}")).save(path := folder / "0.tiff")
            content = bytearray(path.read_bytes())
            first = struct.unpack_from("<I", content, 4)[0]
            for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", content, first)[0], 12):
                if struct.unpack_from("<H", content, entry)[0] == 262:  # how values are to be shown
                    struct.pack_into("<H", content, entry + 8, 0)
            path.write_bytes(content)
            (folder / "1.tiff").write_bytes(content)
        tables.append(Folder(root=str(root), image_size=8, value_range=values).table.images)
    assert np.array_equal(tables[0], tables[1])
    assert tables[0][0, 0, 0, :2].tolist() == [255, 0]


def test_the_range_is_mapped_in_proportion_and_cut_off(tmp_path: Path) -> None:
    pictures(tmp_path / "ct", "32 bits", high=4000, offset=-1000)  # Hounsfield units
    pixels = Folder(root=str(tmp_path / "ct"), image_size=8, value_range=[-1000, 3000], channels=1).table.images
    window = Folder(root=str(tmp_path / "ct"), image_size=8, value_range=[-160, 240], channels=1).table.images
    truth = np.asarray(Image.open(tmp_path / "ct" / "c0" / "0.tiff"), dtype=np.float64)
    assert np.abs(pixels[0, 0] - (truth + 1000) / 4000 * 255).max() <= 0.5
    assert np.abs(window[0, 0] - ((truth + 160) / 400 * 255).clip(0, 255)).max() <= 0.5
    automatic = Folder(root=str(tmp_path / "ct"), image_size=8, value_range="auto")
    assert automatic.describe()["values"] == {
        "mapped": [-1000, 3000],
        "by": "the smallest and the largest value of the training images",
    }


@pytest.mark.parametrize(
    ("high", "offset", "warns"),
    [
        (100, 0, True),
        (4095, 0, True),
        (16000, 0, True),
        (60000, 0, False),
        (3000, -1000, True),
        (3000, 65000, True),
    ],
)
def test_a_small_part_of_the_range_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, high: int, offset: int, warns: bool
) -> None:
    root = str(pictures(tmp_path / "images", "32 bits", high=high, offset=offset))
    for _ in range(2):  # also of a table that is there
        caplog.clear()
        source = Folder(root=root, image_size=8)
        said = [message for message in caplog.messages if "data.value_range" in message]
        assert len(said) == warns
        if warns:
            assert f"values from {offset} to {high + offset:g}" in said[0]
            assert f"data.value_range=[{offset},{high + offset:g}]" in said[0]
    assert source.describe()["values"] == {
        "mapped": [0, 65535], "used": [offset, high + offset], "by": "the depth of 16 bits", "images": 8,
    }  # fmt: skip
    caplog.clear()
    Folder(root=root, image_size=8, value_range="auto")
    assert not [message for message in caplog.messages if "data.value_range" in message]


@pytest.mark.parametrize(
    ("depth", "values", "warns"),
    [
        ("32 bits", [0, 100], False),
        ("32 bits", [20, 60], False),  # a window, as of a CT
        ("32 bits", [2000, 4000], True),
        ("32 bits", [-500, -10], True),
        ("32 bits", [0, 4095], True),
        ("8 bits", [0, 100], False),
        ("8 bits", [0, 4095], True),
    ],
)
def test_a_range_that_leaves_little_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, depth: str, values: list[float], warns: bool
) -> None:
    root = str(pictures(tmp_path / "images", depth, high=100))
    for _ in range(2):  # also of a table that is there
        caplog.clear()
        source = Folder(root=root, image_size=8, value_range=values)
        told = f"data folder: images have values from 0 to 100, of which data.value_range=[{values[0]},{values[1]}] "
        assert [told in message for message in caplog.messages if "value_range" in message] == [True] * warns
    assert source.describe()["values"] == {"mapped": values, "used": [0, 100], "by": "data.value_range"}


def test_eight_bits_are_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Folder(root=str(pictures(tmp_path / "images", "8 bits", high=20)), image_size=8)
    assert source.table.images.max() == 20
    assert "values" not in source.describe()
    assert not [message for message in caplog.messages if "value_range" in message]


def test_no_test_image_decides_the_range(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", "16 bits, PNG", parts=("train", "val", "test"))
    before = Folder(root=str(root), image_size=8, value_range="auto")
    for part in ("val", "test"):
        for path in (root / part).rglob("*.png"):
            Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(path)
    after = Folder(root=str(root), image_size=8, value_range="auto")
    assert after.describe()["values"] == before.describe()["values"]
    own = after.labelled("train")
    assert np.array_equal(after.table.images[own.rows], before.table.images[before.labelled("train").rows])
    assert (after.table.images[after.labelled("test").rows] == 255).all()


def test_no_test_class_decides_the_range(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", "16 bits, PNG")
    before = Folder(root=str(root), image_size=8, value_range="auto")
    for number in before.splits["test"]:
        for path in (root / before.table.names[number]).iterdir():
            Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(path)
    after = Folder(root=str(root), image_size=8, value_range="auto")
    assert after.describe()["values"] == before.describe()["values"]
    with pytest.raises(UserError, match=r"^data.value_range=auto: .* train and test folders$"):
        after.labelled("test")  # of all classes, as a target has them: its images would be among those of the range
    assert len(after.labelled(None, "train"))
    for number in (2, 3):
        for path in (root / f"c{number}").iterdir():
            path.unlink()
        (root / f"c{number}").rmdir()
    with pytest.raises(UserError, match=r"^data.value_range=auto: .* give data.value_range=\[low,high\]"):
        Folder(root=str(root), image_size=8, value_range="auto")


def test_floats_need_a_range(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "floats")
    with pytest.raises(
        UserError,
        match=r"^data.root: \S+ has floating-point pixels, whose range is unknown; data.value_range=\[low,high\]",
    ):
        Folder(root=str(tmp_path / "images"))
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "images" / "c0" / "3.tiff")
    with pytest.raises(UserError, match=r"3.tiff is not a whole image \(a value that is not finite\)"):
        Folder(root=str(tmp_path / "images"), value_range=[0, 1])


def test_images_of_one_value_have_no_range(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "images" / f"c{number}").mkdir(parents=True)
        Image.new("L", (8, 8), 7).save(tmp_path / "images" / f"c{number}" / "1.png")
    with pytest.raises(UserError, match=r"^data.value_range=auto: the training images have no range, .* are 7$"):
        Folder(root=str(tmp_path / "images"), value_range="auto")


@pytest.mark.parametrize("values", [[0], [0, 1, 2], [3, 3], [5, 1], "full", [0, float("inf")], ["a", "b"], []])
def test_wrong_ranges(tmp_path: Path, values: Any) -> None:
    with pytest.raises(UserError, match=r"^data.value_range=.*: is not auto, nor two numbers \[low,high\]"):
        Folder(root=str(pictures(tmp_path / "images", "8 bits")), value_range=values)


def test_colours_are_mapped_too(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "images" / f"c{number}").mkdir(parents=True)
        Image.new("RGBA", (8, 8), (10, 20, 40, 255 * (number < 3))).save(tmp_path / "images" / f"c{number}" / "1.png")
    pixels = Folder(root=str(tmp_path / "images"), image_size=8, value_range=[0, 40]).table.images
    assert pixels[0, :, 0, 0].tolist() == [64, 128, 255]
    assert pixels[3, :, 0, 0].tolist() == [255, 255, 255]  # transparent


def sixteen_bit_colours(path: Path, value: int) -> None:
    """A PNG of 16 bits a colour, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + struct.pack(">3H", value, value, value) * 8) * 8
    path.parent.mkdir(parents=True, exist_ok=True)
    header = chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_sixteen_bits_a_colour(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        sixteen_bit_colours(tmp_path / "images" / f"c{number}" / "1.png", 257 * (10 + number))
    source = Folder(root=str(tmp_path / "images"), image_size=8)
    assert source.table.images[:, :, 0, 0].tolist() == [[10 + number] * 3 for number in range(4)]
    assert source.describe()["values"]["used"] == [2570, 257 * 13]
    assert [message for message in caplog.messages if "data.value_range" in message]
    with pytest.raises(UserError, match=r"16 bits a colour, of which Pillow reads the upper 8"):
        Folder(root=str(tmp_path / "images"), image_size=8, value_range=[0, 4000])


@pytest.mark.parametrize("form", ["P6", "P3", "sgi", "grey sgi"])
def test_sixteen_bits_of_other_formats_of_which_pillow_reads_eight(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        path = tmp_path / "images" / f"c{number}" / f"1.{form[-3:] if 'sgi' in form else 'ppm'}"
        path.parent.mkdir(parents=True)
        if "sgi" in form:
            pixels = np.full((8, 8) if form == "grey sgi" else (8, 8, 3), 10 + number, np.uint8)
            Image.fromarray(pixels).save(path, bpc=2)
        else:
            values = np.full((8, 8, 3), 257 * (10 + number), ">u2")
            content = values.tobytes() if form == "P6" else " ".join(map(str, values.flatten())).encode()
            path.write_bytes(f"{form}\n8 8\n65535\n".encode() + content)
    source = Folder(root=str(tmp_path / "images"), image_size=8)
    assert source.table.images[:, 0, 0, 0].tolist() == [10, 11, 12, 13]
    assert source.describe()["values"]["used"] == [2570, 257 * 13]
    assert [message for message in caplog.messages if "data.value_range" in message]
    with pytest.raises(UserError, match=r"16 bits a colour, of which Pillow reads the upper 8"):
        Folder(root=str(tmp_path / "images"), image_size=8, value_range=[0, 4000])


def test_a_run_says_how_its_values_were_mapped(tmp_path: Path) -> None:
    """What was chance from deep images is the accuracy of the same pictures in eight bits."""
    found = {}
    for depth in ("8 bits", "16 bits, PNG"):
        root = pictures(tmp_path / depth.replace(",", ""), depth)
        words = ["data=folder", f"data.root={root}", "data.image_size=8", "algo=protonet", "backbone=pixels", f"outputs={root}-runs",
                 "task.ways=2", "task.shots=1", "task.queries=1", "train.steps=0", "test.episodes=8", "test.baseline_episodes=0",
                 "train.validate_episodes=2", "data.ratios=[0.25,0.25,0.5]", "data.rotations=true"]  # fmt: skip
        for values in ("[0,100]", "auto"):
            outcome = metarun(*words, f"data.value_range={values}", f"name={'auto' if values == 'auto' else 'given'}")
            assert outcome.status == 0, outcome.err
        outcome = metarun(*words, "data.value_range=[7,2]")
        assert outcome.said == [
            "metarun: data.value_range=[7,2]: is not auto, nor two numbers [low,high] of which the second is larger"
        ]
        folders = sorted(Path(f"{root}-runs").glob("*/*/result.json"))
        found[depth] = [
            (one["test/acc"], one["data"]["values"]["mapped"]) for one in map(result, (path.parent for path in folders))
        ]
    assert found["8 bits"] == found["16 bits, PNG"]
    assert len(found["8 bits"]) == 2


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_large_image_is_copied_no_more_often_than_it_must(
    mode: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new(mode, (40, 30)).save(tmp_path / "1.png")
    copies, copy = list[tuple[int, int]](), Image.Image.copy

    def noted(image: Image.Image) -> Image.Image:
        copies.append(image.size)
        return copy(image)

    monkeypatch.setattr(Image.Image, "copy", noted)
    assert read(tmp_path / "1.png", 8, channels).pixels.shape == (channels, 8, 8)
    assert copies == [(40, 30)]
