"""The page of a report, and the files beside it."""

from __future__ import annotations

import html.parser
import ntpath
import os
import re
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from reported import grid, make_run, make_test

from metarun import report
from metarun.report import figures
from metarun.report import page as report_page


def test_files(written: Path) -> None:
    stems = ("cost", "inner_steps", "learning_curves")
    pictures = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert {path.name for path in written.iterdir()} == pictures | {"index.html", "table.csv", "table.md", "table.tex"}


class Page(html.parser.HTMLParser):
    """The elements of a page, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "index.html").read_text())


def test_page_is_whole_in_itself(written: Path, page: Page) -> None:
    """Every address is a file beside it, a run folder, or a place in the page; nothing is fetched."""
    assert page.open == []
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items()
        if name.rpartition(":")[2] in ("href", "src", "srcset", "data", "action", "poster")
    ]  # fmt: skip
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    assert sum(not (address or "").startswith("#") for address in addresses) >= 3 + 6 + 8
    for address in addresses:
        assert address is not None
        if address.startswith("#"):
            assert address[1:] in ids
        else:
            assert (written / unquote(address)).exists(), address
    text = (written / "index.html").read_text()
    assert set(re.findall(r"url\(#?([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"@import|https?://|<script|<link|<img", text)
    assert {tag for tag, _ in page.elements} >= {"svg", "table", "main"}


def test_page_follows_the_readers_colours(page: Page, written: Path) -> None:
    text = (written / "index.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert figures.INK not in text
    assert text.count("currentColor") > 20
    drawn = {colour for colour in re.findall(r"(?:fill|stroke): (#\w+)", text) if colour not in figures.COLOURS}
    assert drawn <= {figures.FAINT}
    assert sum(tag == "svg" for tag, _ in page.elements) == 3


def test_page_tells_everything(page: Page) -> None:
    words = re.sub(r"\s+", " ", " ".join(page.texts))
    for part in (
        "a <grid> & more", "8 finished runs in 4 groups, 1 not finished", "unfinished run", "commit 0123456789ab",
        "torch 2.9.0", "metarun algo=maml task.shots=5 seed=1", "98.8 % (Snell et al. 2017, table 1)", "Holm-adjusted",
        "of these trained weights", "the method with this budget", "minus the best, over seeds (points)",
    ):  # fmt: skip
        assert part in words, part


def test_a_run_on_several_data_sets_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the numbers of runs and of facts, in the commands, and where another replaces it."""
    task = {"ways": 5, "shots": 1, "queries": 15}
    for name, algo, torch in (("a", "maml", "2.9.0"), ("b", "protonet", "2.9.1"), ("b~2", "protonet", "2.9.1")):
        protocol: dict[str, Any] = {"norm": "batch", "transductive": False, "test": task, "split": None, "sets": {}}
        found: dict[str, Any] = {"test/acc": 0.5, "test/acc_ci95": 0.1, "protocol": protocol, "test/sets": {}}
        for one in ("cub", "fungi"):
            protocol["sets"][one] = {"task": task, "classes": "all"}
            found["test/sets"][one] = {"fingerprint": one, "classes": {"test": 2}}
            found |= {f"test/{one}/acc": 0.5, f"test/{one}/acc_ci95": 0.1}
        found["versions"] = {"torch": torch}
        folder = make_run(tmp_path / name, f"algo={algo}", choices={"algo": algo}, result=found)
        os.utime(folder / "result.json", (1000, 1000 + len(name)))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("seed: 0\n")
    made = report.write([tmp_path], tmp_path / "report", "sets")
    assert made is not None
    told, page = capsys.readouterr(), made.read_text()
    assert "not finished (at work, stopped, pruned or failed): 1 of 4 runs" in told.out
    assert told.err.count("left out, ") == 1
    assert "2 finished runs in 4 groups, 1 not finished." in page
    assert "torch 2.9.0 (1 run), 2.9.1 (1 run)" in page
    assert page.count("<li><code>metarun algo=maml seed=0</code></li>") == 1


def test_commands_that_go_on_with_another_run_say_which(tmp_path: Path) -> None:
    """They stand behind those that need nothing, and none of them is said to start from an empty folder."""
    trained = make_run(tmp_path / "runs" / "b", "algo=maml", scores=[0.5, 1], choices={"algo": "maml"})
    make_test(tmp_path / "runs" / "a", trained, scores=[0.4, 1], shots=5)
    config = {"encoder": {"from": str(trained)}, "backbone": {"from": None}}
    make_run(tmp_path / "runs" / "c", "encoder=run", scores=[0.5, 1], choices={"encoder": "run"}, config=config)
    made = report.write([tmp_path / "runs"], tmp_path / "report", "commands")
    assert made is not None
    alone, _, further = (
        made.read_text().partition("from an empty folder:")[2].partition("goes on with what another run left")
    )
    assert re.findall(r"<li><code>(.*?)</code>", alone) == ["metarun algo=maml seed=0"]
    assert re.findall(r"<li><code>metarun (\S+).*?</code> needs <code>(.*?)</code>", further) == [
        ("encoder=run", str(trained)), ("recipe=test", str(trained)),
    ]  # fmt: skip


def test_page_escapes_what_runs_are_called(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    for value in (bad, "x"):
        config = {"data": {"root": value}}
        make_run(tmp_path / f"a&{len(value)}", f"data.root={value}", scores=[0.5, 1], config=config, curve=[0.1, 0.2])
    found = report.write([tmp_path], tmp_path / "report", bad)
    assert found is not None
    text = found.read_text()
    assert "<script" not in text
    assert Page(text).open == []
    assert "&lt;script" in (tmp_path / "report" / "table.md").read_text()


def test_a_later_report_leaves_no_figure_of_an_earlier_one(tmp_path: Path) -> None:
    grid(tmp_path, seeds=1)
    report.write([tmp_path], tmp_path / "report", "first")
    assert (tmp_path / "report" / "inner_steps.svg").is_file()
    for name in figures.NAMES:  # of which an earlier report may have had each
        (tmp_path / "report" / f"{name}.png").touch()
    for folder in tmp_path.glob("algo=maml*"):
        (folder / "result.json").unlink()
    report.write([tmp_path], tmp_path / "report", "second")
    assert not list((tmp_path / "report").glob("inner_steps*"))
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"cost", "learning_curves"}
    assert (tmp_path / "report" / "cost.svg").is_file()


def test_one_seed_and_one_run_have_no_nan(tmp_path: Path) -> None:
    make_run(tmp_path / "only", scores=[0.5, 0.5], curve=[0.5])
    found = report.write([tmp_path], tmp_path / "report", "only")
    assert found is not None
    for name in ("index.html", "table.md", "table.tex", "table.csv"):
        assert not re.search(r"\bnan\b|\binf\b|None", (found.parent / name).read_text())
    assert "one seed" in found.read_text()


@pytest.mark.parametrize(
    ("page", "link"), [(r"C:\my runs\report", "../a/seed-1/"), (r"D:\report", "file:///C:/my%20runs/a/seed-1/")]
)
def test_runs_are_linked_on_windows(page: str, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "os", SimpleNamespace(path=ntpath))
    monkeypatch.setattr(report_page, "Path", PureWindowsPath)
    assert report_page._link(PureWindowsPath(r"C:\my runs\a\seed-1"), PureWindowsPath(page)) == link
