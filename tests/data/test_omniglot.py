"""Omniglot from the real archives, and what is said of broken ones."""

from __future__ import annotations

import hashlib
import http.server
import io
import logging
import os
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import compose
from PIL import Image
from shell import ARCHIVE_HARMS, harm_archive

from metarun.config import construct
from metarun.core import TaskShape
from metarun.data import download as download_module
from metarun.data import omniglot
from metarun.data.archives import content_of
from metarun.data.download import download
from metarun.data.omniglot import Omniglot
from metarun.errors import UserError


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archives() -> Path:
    return Path(os.environ["METARUN_DATA"]) / "omniglot"


def classes(source: Omniglot) -> dict[str, list[str]]:
    return {split: [source.table.names[index] for index in indices] for split, indices in source.splits.items()}


def test_table_has_all_characters() -> None:
    source = Omniglot()
    assert source.input_shape == (1, 28, 28)
    assert source.table.sizes.tolist() == [20] * 1623
    assert len(set(source.table.groups)) == 50
    assert source.table.names[0] == "Alphabet_of_the_Magi/character01"
    assert source.table.groups[0] == "Alphabet_of_the_Magi"
    assert source.table.names[964] == "Angelic/character01"
    assert source.table.names[-1] == "ULOG/character26"
    assert source.describe()["classes"] == {"train": 4112, "val": 688, "test": 1692}
    assert source.describe()["images"] == {"train": 20560, "val": 3440, "test": 8460}


@pytest.mark.parametrize(("name", "drawing"), [("Greek/character07", 3), ("Tibetan/character42", 19)])
def test_ink_is_bright_and_each_image_is_of_its_class(name: str, drawing: int) -> None:
    part = "background" if name.startswith("Greek") else "evaluation"
    with zipfile.ZipFile(archives() / f"images_{part}.zip") as archive:
        members = sorted(member for member in archive.namelist() if f"/{name}/" in member)
        original = np.asarray(Image.open(io.BytesIO(archive.read(members[drawing]))))
    ink = (~original).astype(np.float64)  # the original is 1-bit, with ink 0
    assert 0 < ink.mean() < 0.2
    table = Omniglot().table
    image = table.images[table.offsets[table.names.index(name)] + drawing, 0] / 255.0
    assert image.mean() == pytest.approx(ink.mean(), rel=0.1)
    coarse = ink.reshape(7, 15, 7, 15).mean((1, 3)), image.reshape(7, 4, 7, 4).mean((1, 3))
    assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.98


def test_vinyals_split_is_the_published_one() -> None:
    found = classes(Omniglot())
    for split, names in found.items():
        lines = (archives() / "splits" / "vinyals" / f"{split}.txt").read_text().split()
        rotated = [f"{name}/rot{degrees:03}" for name in names for degrees in (0, 90, 180, 270)]
        assert sorted(lines) == sorted(rotated)


def test_lake_split_is_by_alphabet() -> None:
    source = Omniglot(split="lake", rotations=False)
    alphabets = {split: sorted({name.split("/")[0] for name in names}) for split, names in classes(source).items()}
    assert {split: len(names) for split, names in alphabets.items()} == {"train": 25, "val": 5, "test": 20}
    assert alphabets["val"] == [
        "Ojibwe_(Canadian_Aboriginal_Syllabics)",
        "Sanskrit",
        "Syriac_(Estrangelo)",
        "Tagalog",
        "Tifinagh",
    ]
    assert source.describe()["classes"] == {"train": 813, "val": 151, "test": 659}


def test_random_split_follows_its_own_seed() -> None:
    first, again, other = (Omniglot(split="random", split_seed=seed) for seed in (0, 0, 1))
    assert classes(first) == classes(again) != classes(other)
    found = classes(first)
    assert {split: len(names) for split, names in found.items()} == {"train": 1100, "val": 100, "test": 423}
    assert len({name for names in found.values() for name in names}) == 1623
    assert first.describe()["fingerprint"] == again.describe()["fingerprint"] != other.describe()["fingerprint"]


def test_episodes_within_one_alphabet() -> None:
    source = Omniglot(within_alphabet=True, rotations=False)
    sampler = source.sampler("test", TaskShape(ways=5, shots=1, queries=2), 0, torch.device("cpu"))
    episodes = sampler(0, 20)
    assert episodes.query_x.shape == (20, 10, 1, 28, 28)
    row_of = {image.tobytes(): row for row, image in enumerate(source.table.images)}
    for task in range(20):
        drawings = (episodes.support_x[task] * 255).round().to(torch.uint8).numpy()
        classes = (
            np.searchsorted(source.table.offsets, [row_of[drawing.tobytes()] for drawing in drawings], "right") - 1
        )
        assert len(set(classes)) == 5
        assert len({source.table.groups[number] for number in classes}) == 1


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(
        UserError, match=r"data.split=vinyal: is not one of vinyals, lake, random; did you mean vinyals\?$"
    ):
        Omniglot(split="vinyal")
    with pytest.raises(UserError, match=r"data.image_size=0: must be at least 1"):
        Omniglot(image_size=0)


# A release of 5 characters, for what can be wrong with the archives


def drawing(number: int = 0, side: int = 105) -> bytes:
    file = io.BytesIO()
    image = Image.new("1", (side, side), 1)
    image.paste(0, (number, number, number + 30, number + 10))
    image.save(file, "PNG")
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)


def members(part: str, names: list[str]) -> dict[str, bytes]:
    return {f"images_{part}/{name}/{n:02}.png": drawing(n + 20 * i) for i, name in enumerate(names) for n in range(20)}


BACKGROUND = members("background", ["Elvish/character01", "Elvish/character02", "Runes/character01"])
EVALUATION = members("evaluation", ["Signs/character01", "Signs/character02"])


@pytest.fixture
def tiny(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of both archives."""
    listing = tmp_path / "splits.txt"
    listing.write_text("background Elvish train 1-2\nbackground Runes val 1-1\nevaluation Signs test 1-2\n")
    monkeypatch.setattr(omniglot, "_SPLIT_FILE", listing)
    folder = tmp_path / "tiny"
    folder.mkdir()
    pack(folder / "images_background.zip", BACKGROUND)
    pack(folder / "images_evaluation.zip", EVALUATION)
    return folder


def test_unpacked_folder_gives_the_same_table(tiny: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Omniglot(root=str(tiny), download=False).table
    assert packed.images.shape == (100, 1, 28, 28)
    for part in ("background", "evaluation"):
        archive = tiny / f"images_{part}.zip"
        zipfile.ZipFile(archive).extractall(tiny)
        archive.unlink()
    (tiny / "images_evaluation" / "Signs" / "character01" / "._00.png").write_bytes(b"litter of macOS")
    (tiny / "images_evaluation" / "Signs").rename(tiny.parent / "Signs")  # an alphabet on another disk
    (tiny / "images_evaluation" / "Signs").symlink_to(tiny.parent / "Signs")
    monkeypatch.setenv("METARUN_CACHE", str(own_cache / "other"))
    unpacked = Omniglot(root=str(tiny), download=False).table
    assert unpacked.names == packed.names
    assert unpacked.fingerprint == packed.fingerprint


def test_table_serves_without_the_archives(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_DATA", str(tiny.parent))
    (tiny.parent / "omniglot").symlink_to(tiny)
    first = Omniglot(download=False)
    (tiny.parent / "omniglot").unlink()
    assert Omniglot(download=False).describe() == first.describe()


def test_missing_characters_are_named(tiny: Path) -> None:
    pack(tiny / "images_evaluation.zip", {name: raw for name, raw in EVALUATION.items() if "character02" not in name})
    with pytest.raises(UserError) as caught:
        Omniglot(root=str(tiny), download=False)
    assert (
        str(caught.value)
        == f"data omniglot: {tiny}/images_evaluation.zip: 1 of 2 characters are missing: Signs/character02"
    )


def test_empty_folder_is_named(tiny: Path) -> None:
    (tiny / "images_background.zip").unlink()
    (tiny / "images_background").mkdir()
    with pytest.raises(
        UserError, match=f"data omniglot: {tiny}/images_background: 3 of 3 characters are missing: Elvish/"
    ):
        Omniglot(root=str(tiny), download=False)


def of_pixels(side: int, png: bytes) -> bytes:
    """The same file, whose header says that it is of so many pixels in height and width."""
    header = png[12:16] + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def test_bad_drawings_are_named(tiny: Path, own_cache: Path) -> None:
    first = next(iter(BACKGROUND))
    pack(tiny / "images_background.zip", {name: raw for name, raw in BACKGROUND.items() if name != first})
    with pytest.raises(UserError, match=r"images_background.zip has 19 drawings instead of 20 of Elvish/character01$"):
        Omniglot(root=str(tiny))
    for raw, complaint in (
        (drawing(side=28), "has 28x28 pixels, expected 105x105"),
        (drawing()[:60], "cannot be decoded"),
        (of_pixels(20_000, drawing()), "cannot be decoded"),
        (b"text", "cannot be decoded"),
    ):
        pack(tiny / "images_background.zip", {**BACKGROUND, first: raw})
        with pytest.raises(UserError, match=rf"images_background.zip: {first} {complaint}"):
            Omniglot(root=str(tiny))
    assert not [name for name in own_cache.iterdir() if name.suffix != ".lock"]


@pytest.mark.parametrize("harm", ["truncated", "corrupted"])
def test_broken_archive_is_named(tmp_path: Path, own_cache: Path, harm: str) -> None:
    path = tmp_path / "images_background.zip"
    raw = (archives() / "images_background.zip").read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if harm == "truncated" else raw[:5000] + bytes(5000) + raw[10000:])
    with pytest.raises(
        UserError, match=rf"data omniglot: {path} is not a whole zip archive \(.*\); get it again from https://"
    ):
        Omniglot(root=str(tmp_path))


def test_a_member_of_more_bytes_than_its_header_says_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(10**7))
    path.write_bytes(path.read_bytes().replace((10**7).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    tracemalloc.start()
    try:
        with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
            content_of(archive, "a", 1000)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("harm", ARCHIVE_HARMS)
def test_an_archive_that_cannot_be_unpacked_is_named(tiny: Path, harm: str) -> None:
    path = tiny / "images_background.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA if harm == "lzma" else zipfile.ZIP_DEFLATED) as archive:
        for name, raw in BACKGROUND.items():
            archive.writestr(name, raw + bytes(2000))
    harm_archive(path, harm)
    with pytest.raises(UserError, match=r"images_background.zip is not a whole zip archive \(.+\); get it again"):
        Omniglot(root=str(tiny))


def test_missing_archive_without_download(tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"images_background.zip is missing; put it there from https://.*, or set data.download=true"
    ):
        Omniglot(root=str(tmp_path), download=False)


# Downloads, from a server of our own


class Handler(http.server.BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        raw = self.files.get(self.path.removeprefix("/cut"))
        if raw is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if self.path.startswith("/cut") else raw)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    Handler.files = {"/file.zip": b"contents" * 100_000}
    Handler.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


MD5 = hashlib.md5(b"contents" * 100_000, usedforsecurity=False).hexdigest()


def test_download_brings_the_file_once(address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metarun")
    path = tmp_path / "new" / "file.zip"
    for _ in range(2):
        assert download(f"{address}/file.zip", path, checksum=MD5) == path
    assert path.read_bytes() == Handler.files["/file.zip"]
    assert Handler.requests == ["/file.zip"]
    assert caplog.messages == ["downloading file.zip (0.8 MB)"]


def test_download_shows_progress_on_a_terminal(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sha256 = hashlib.sha256(Handler.files["/file.zip"]).hexdigest()
    download(f"{address}/file.zip", tmp_path / "file.zip", checksum=sha256)
    assert "800.0/800.0 kB" in capsys.readouterr().err


def test_an_archive_as_the_folder_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"PK")
    told = f"^data root {tmp_path}/archive: is a file; give the folder that it lies in, {tmp_path}$"
    missing = ("omniglot", "mnist", "pneumoniamnist", "caltech101")  # which could be downloaded, and may not
    for choice, *words in (
        *((name, "data.download=false") for name in missing),
        ("omniglot",),
        ("cifar_fs",),
        ("clinc150",),
    ):
        with pytest.raises(UserError, match=told):
            construct(compose(f"data={choice}", f"data.root={tmp_path}/archive", *words).data, "data")


@pytest.mark.parametrize(
    ("page", "checksum", "complaint"),
    [
        ("/file.zip", "0" * 32, rf"brought another file than the published one \(MD5 {MD5}, expected 0+\)"),
        ("/cut/file.zip", MD5, "broke off after 400000 of 800000 bytes"),
        ("/other.zip", MD5, r"failed \(Not Found\)"),
    ],
)
def test_failed_download_leaves_nothing(address: str, tmp_path: Path, page: str, checksum: str, complaint: str) -> None:
    path = tmp_path / "file.zip"
    with pytest.raises(UserError, match=rf"download of {address}{page} {complaint}; .*put the file by hand at {path}"):
        download(address + page, path, checksum=checksum)
    assert [found.name for found in tmp_path.iterdir()] in ([], ["file.zip.lock"])


def test_no_network_names_the_address_and_the_place(
    address: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        nobody = f"http://127.0.0.1:{closed.server_port}/"
    monkeypatch.setattr(omniglot, "ADDRESS", nobody)
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    place = tmp_path / "data" / "omniglot" / "images_background.zip"
    with pytest.raises(
        UserError, match=rf"download of {nobody}images_background.zip failed \(.*refused.*\); .* by hand at {place}"
    ):
        Omniglot()


def test_data_root_that_cannot_be_written(
    address: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(omniglot, "ADDRESS", address)
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(
        UserError, match=r"data root .*file/data/omniglot: cannot be written \(Not a directory\).*METARUN_DATA"
    ):
        Omniglot()
    assert Handler.requests == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "link"))
    with pytest.raises(UserError, match=r"data/?.*omniglot: cannot be written \(.*link is no folder\).*METARUN_DATA"):
        Omniglot()


def test_disk_that_fills_during_a_download(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module.os, "fsync", full)
    with pytest.raises(UserError, match=r"data root .*: cannot be written \(No space left on device\)"):
        download(f"{address}/file.zip", tmp_path / "file.zip", checksum=MD5)
    assert not (tmp_path / "file.zip").exists()
    assert not (tmp_path / "file.zip.part").exists()


def test_omniglot_downloads_what_is_missing(address: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Omniglot(root=str(tiny), download=False)
    for part in ("background", "evaluation"):
        raw = (tiny / f"images_{part}.zip").read_bytes()
        Handler.files[f"/images_{part}.zip"] = raw
        monkeypatch.setitem(omniglot.CHECKSUMS, part, hashlib.md5(raw, usedforsecurity=False).hexdigest())
    monkeypatch.setattr(omniglot, "ADDRESS", f"{address}/")
    folder = tiny.parent / "omniglot"
    folder.mkdir()
    (folder / "images_evaluation.zip").symlink_to(tiny / "images_evaluation.zip")
    monkeypatch.setenv("METARUN_DATA", str(tiny.parent))
    assert Omniglot().table.fingerprint == here.table.fingerprint
    assert Handler.requests == ["/images_background.zip"]
    assert (folder / "images_background.zip").read_bytes() == Handler.files["/images_background.zip"]
