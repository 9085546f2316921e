"""The cache of tables: built once, whole or not at all, and honest about why not."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun.data import table
from metarun.data.table import ClassImages, cached
from metarun.errors import UserError

ROOT = Path(__file__).parents[2]

# A process that builds a table: says in a file that it began, takes its time, prints the table's sum and fingerprint.
SLOW_BUILD = """
import sys, time
import numpy as np
from metarun.data.table import ClassImages, cached
marker, seconds = sys.argv[1], float(sys.argv[2])
def build(notes):
    yield ClassImages("first", "", np.full((3, 1, 64, 64), 7, np.uint8))
    with open(marker, "a") as file:
        file.write("began\\n")
    time.sleep(seconds)
    yield ClassImages("second", "", np.full((2, 1, 64, 64), 9, np.uint8))
found = cached("slow", {}, build)
print(int(found.images.sum(dtype=np.int64)), found.fingerprint)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("METARUN_CACHE", str(folder))
    return folder


def test_a_build_that_takes_long_says_how_far_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "metarun")
    monkeypatch.setattr(table, "SECONDS_OF_SILENCE", 0.0)
    cached("long", {}, two_classes)
    began, first, second, _ = caplog.messages
    assert began.startswith("data long: building its table")
    assert [line.split(" after ")[0] for line in (first, second)] == ["data long: 3 images", "data long: 5 images"]


def start(marker: Path, seconds: float) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(marker), str(seconds)],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def two_classes(notes: dict[str, Any]) -> Iterator[ClassImages]:
    notes["skipped"] = 4
    yield ClassImages("a", "left", np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2))
    yield ClassImages("b", "right", np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2) + 100)


def never(notes: dict[str, Any]) -> Iterator[ClassImages]:
    raise AssertionError("built although the table is there")


def tables(root: Path) -> list[str]:
    """What lies in the cache, but for the locks."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


def test_table_holds_what_was_built(root: Path) -> None:
    built = cached("pair", {"size": 2}, two_classes)
    found = cached("pair", {"size": 2}, never)
    for one in (built, found):
        assert one.images.shape == (5, 1, 2, 2)
        assert one.images.dtype == np.uint8
        assert one.images[2].ravel().tolist() == [8, 9, 10, 11]
        assert one.images[3].ravel().tolist() == [100, 101, 102, 103]
        assert one.offsets.tolist() == [0, 3, 5]
        assert one.sizes.tolist() == [3, 2]
        assert (one.names, one.groups, one.metadata) == (["a", "b"], ["left", "right"], {"skipped": 4})
    assert built.fingerprint == found.fingerprint


def test_another_key_is_another_table(root: Path) -> None:
    def darker(notes: dict[str, Any]) -> Iterator[ClassImages]:
        for name, group, images in two_classes(notes):
            yield ClassImages(name, group, images // 2)

    first = cached("pair", {"size": 2}, two_classes)
    second = cached("pair", {"size": 3}, darker)
    assert second.images[3, 0, 0, 0] == 50
    assert first.images[3, 0, 0, 0] == 100
    assert first.fingerprint != second.fingerprint
    assert len(tables(root)) == 2


def test_fingerprint_tells_how_images_are_divided_into_classes(root: Path) -> None:
    def split_elsewhere(notes: dict[str, Any]) -> Iterator[ClassImages]:
        images = np.concatenate([images for _, _, images in two_classes(notes)])
        yield ClassImages("a", "left", images[:2])
        yield ClassImages("b", "right", images[2:])

    assert cached("one", {}, two_classes).fingerprint != cached("other", {}, split_elsewhere).fingerprint


def test_building_is_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metarun")
    cached("pair", {}, two_classes)
    cached("pair", {}, two_classes)
    first, last = caplog.messages
    assert first.startswith("data pair: building its table in ")
    assert last.startswith("data pair: built 5 images of 2 classes in ")
    assert last.endswith(" s")


def test_two_processes_build_one_table(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    processes = [start(marker, 1.0) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed[0] == printed[1]
    assert printed[0].split()[0] == str((3 * 7 + 2 * 9) * 64 * 64)
    assert marker.read_text() == "began\n"
    assert len(tables(root)) == 1


def test_killed_build_leaves_no_table_and_does_not_block_the_next(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    process = start(marker, 60)
    try:
        give_up = time.monotonic() + 60
        while not (marker.exists() and marker.read_text()):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert [name.endswith(".unfinished") for name in tables(root)] == [True]

    after = start(marker, 0)
    printed = after.communicate(timeout=60)[0]
    assert after.returncode == 0
    assert printed.split()[0] == str((3 * 7 + 2 * 9) * 64 * 64)
    assert [name.endswith(".unfinished") for name in tables(root)] == [False]
    assert marker.read_text() == "began\n" * 2


@pytest.mark.parametrize("error", [RuntimeError("bad"), KeyboardInterrupt(), UserError("mend this")])
def test_failed_build_leaves_nothing_and_its_error_unchanged(root: Path, error: BaseException) -> None:
    def fails(notes: dict[str, Any]) -> Iterator[ClassImages]:
        yield from two_classes(notes)
        raise error

    with pytest.raises(type(error)) as caught:
        cached("pair", {}, fails)
    assert caught.value is error
    assert tables(root) == []
    assert cached("pair", {}, two_classes).offsets.tolist() == [0, 3, 5]


def test_images_of_two_shapes_are_refused(root: Path) -> None:
    def mixed(notes: dict[str, Any]) -> Iterator[ClassImages]:
        yield from two_classes(notes)
        yield ClassImages("odd", "", np.zeros((1, 3, 2, 2), np.uint8))

    with pytest.raises(ValueError, match=r"class odd: uint8 \(3, 2, 2\), expected uint8 \(1, 2, 2\)"):
        cached("pair", {}, mixed)
    with pytest.raises(ValueError, match="no images"):
        cached("pair", {}, lambda notes: [])
    assert tables(root) == []


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UserError, match=r"data cache .*file/cache: cannot be written \(Not a directory\); set METARUN_CACHE"
    ):
        cached("pair", {}, two_classes)


@pytest.mark.parametrize("link", [False, True])
def test_a_cache_that_is_no_folder_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool) -> None:
    """The system says of it that it exists, which is no reason for anybody."""
    place = tmp_path / "place"
    if link:
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_text("in the way")
    monkeypatch.setenv("METARUN_CACHE", str(place))
    with pytest.raises(UserError, match=r"cannot be written \(.*place is no folder\); set METARUN_CACHE"):
        cached("pair", {}, two_classes)


def test_full_disk_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = path.open(mode)

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, block: memoryview) -> int:
            self.file.write(block[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(table, "open", FullDisk, raising=False)
        with pytest.raises(UserError, match=r"data cache .*: cannot be written \(No space left on device\)"):
            cached("pair", {}, two_classes)
    assert tables(root) == []
    assert cached("pair", {}, two_classes).offsets.tolist() == [0, 3, 5]


def test_unreadable_source_is_not_blamed_on_the_cache(root: Path) -> None:
    def source(notes: dict[str, Any]) -> Iterator[ClassImages]:
        yield from two_classes(notes)
        yield ClassImages("c", "", np.fromfile("/nowhere/archive.raw", np.uint8))

    with pytest.raises(UserError) as caught:
        cached("pair", {}, source)
    assert str(caught.value) == "data pair: /nowhere/archive.raw: cannot be read (No such file or directory)"
    assert tables(root) == []


def edit_json(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    description = json.loads((folder / "table.json").read_text())
    change(description)
    (folder / "table.json").write_text(json.dumps(description))


def flip(folder: Path, at: int, *, keep_time: bool = False) -> None:
    path = folder / "images.u8"
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


PIPES = [
    lambda folder, name=name: as_pipe(folder / name) for name in ("images.u8", "table.json") if hasattr(os, "mkfifo")
]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "images.u8", 19),
        lambda folder: os.truncate(folder / "images.u8", 0),
        lambda folder: (folder / "images.u8").write_bytes((folder / "images.u8").read_bytes() + b"\0\0\0\0"),
        lambda folder: (folder / "images.u8").unlink(),
        lambda folder: flip(folder, 7),
        lambda folder: flip(folder, 7, keep_time=True),
        lambda folder: (folder / "table.json").write_text("{"),
        lambda folder: (folder / "table.json").write_text("[]"),
        lambda folder: (folder / "table.json").write_text("[" * 100_000),
        lambda folder: edit_json(folder, lambda description: description.pop("checksum")),
        lambda folder: edit_json(folder, lambda description: description["names"].reverse()),
        lambda folder: edit_json(folder, lambda description: description.update(offsets=[0, 2, 5])),
        lambda folder: edit_json(folder, lambda description: description["metadata"].update(parts=None)),
        *PIPES,
    ],
)
def test_damaged_table_is_named(root: Path, damage: Callable[[Path], object]) -> None:
    cached("pair", {}, two_classes)
    (name,) = tables(root)
    damage(root / name)
    with pytest.raises(UserError, match=rf"^data cache .*{name}: the table cannot be read .*; delete this folder"):
        cached("pair", {}, two_classes)


def test_two_tables_that_were_renamed_into_each_other_are_noticed(root: Path) -> None:
    for number in (1, 2):
        cached("pair", {"root": number}, two_classes)
    one, other = (root / name for name in tables(root))
    one.rename(root / "third")
    other.rename(one)
    (root / "third").rename(other)
    for number in (1, 2):
        with pytest.raises(UserError, match=r"^data cache .*pair-.*: the table cannot be read \(it was made of other "):
            cached("pair", {"root": number}, never)


def test_a_touched_table_is_still_the_table(root: Path) -> None:
    cached("pair", {}, two_classes)
    (name,) = tables(root)
    os.utime(root / name / "images.u8", ns=(1, 1))
    assert cached("pair", {}, never).offsets.tolist() == [0, 3, 5]


def test_large_tables_are_compared_by_a_sample_and_whole_where_touched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "SAMPLED_BYTES", 64)
    monkeypatch.setattr(table, "SAMPLES", 4)

    def large(notes: dict[str, Any]) -> Iterator[ClassImages]:
        yield ClassImages("a", "", np.arange(4096, dtype=np.uint32).astype(np.uint8).reshape(16, 1, 16, 16))

    cached("large", {}, large)
    (name,) = tables(root)
    for at in (0, 4095):  # the first and the last byte are of every sample
        flip(root / name, at, keep_time=True)
        with pytest.raises(UserError, match=r"bytes of images\.u8 have changed"):
            cached("large", {}, never)
        flip(root / name, at, keep_time=True)
    cached("large", {}, never)
    flip(root / name, 100)  # of no sample, but the file's time is another
    with pytest.raises(UserError, match=r"bytes of images\.u8 have changed"):
        cached("large", {}, never)
    flip(root / name, 100)
    cached("large", {}, never)
