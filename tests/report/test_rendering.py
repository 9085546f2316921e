"""A report's tables as text of a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from reported import make_run, sections

from metarun.config.folder import CONF
from metarun.report import rendering, tables
from metarun.report.published import cited
from metarun.report.rendering import latex
from metarun.report.tables import ReportTable


def test_what_stands_in_brackets_is_shown_except_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["net (1)", "50.00%", "60.00% (Snell 2017)"], ["net (2)", "40.00%", "none"]]
    rendering.show([tables.ReportTable("a", ["backbone.weights", "accuracy", "published"], rows, 1)])
    shown = capsys.readouterr().out
    assert "net (1)" in shown
    assert "net (2)" in shown
    assert "Snell" not in shown


def test_markdown(written: Path) -> None:
    text = (written / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| protonet")]
    assert len(rows) == 3
    assert all(row.count("**") == (4 if "the best" not in row else 2) for row in rows)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (4, 9)
    assert "98.8 % (Snell et al. 2017, table 1)" in text
    assert "unfinished run" in text


def test_markdown_shows_what_stands_there() -> None:
    table = tables.ReportTable(
        "a*b*", ["name", "train.max_seconds"], [["*x* `y` [z](u) <b> &lt; _v_ \\ ~~w~~ p|q", "1"]], 1, set()
    )
    text = rendering.markdown(table)
    assert "| \\*x\\* \\`y\\` \\[z\\](u) &lt;b> &amp;lt; \\_v\\_ \\\\ \\~\\~w\\~\\~ p\\|q | 1 |" in text
    assert "train.max_seconds" in text
    assert text.startswith("## a\\*b\\*\n")


def test_csv_has_every_digit(written: Path) -> None:
    with open(written / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [row for section in sections(written.parent) for row in section.rows]
    assert len(lines) == len(rows) == 4
    for line, row in zip(lines, rows, strict=True):
        assert (line["algo"], line["shots"], line["seeds"]) == (row.label, str(row.group.setting.shots), "0 1")
        for heading, value in {
            "mean": row.mean, "half_over_seeds": row.seeds_half, "half_over_episodes": row.episodes_half,
            "minus_best_over_episodes": row.on_episodes and row.on_episodes.mean,
            "p_holm_over_seeds": row.on_seeds and row.on_seeds.p,
        }.items():  # fmt: skip
            assert line[heading] == ("" if value is None else repr(value))


def test_latex_escapes_what_tex_takes_for_its_own(tmp_path: Path) -> None:
    for value in ("50%_of$a&b#{c}~^\\d", "plain"):
        make_run(tmp_path / str(len(value)), f"data.root={value}", scores=[0.5, 1], config={"data": {"root": value}})
    (section,) = sections(tmp_path)
    lines = rendering.latex(tables.section_table(section), "tab:a").splitlines()
    (odd,) = [line for line in lines if line.startswith("50")]
    assert odd.startswith(r"50\%\_of\$a\&b\#\{c\}\textasciitilde{}\textasciicircum{}\textbackslash{}d & 1 & ")
    rows = [line for line in lines if line.endswith(r" \\")]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", "\n".join(lines))[1]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [len(columns) - 1] * 3
    assert [lines[at] for at in (4, 6, 9)] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert sum(row.count(r"\textbf{") for row in rows) == 2  # which are equal


def test_a_narrow_screen_has_whole_words_of_what_tells_the_rows_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    headings = ["data", "approach", "train.max_seconds", "train.validate_episodes", "seeds", "accuracy", "± over seeds"]
    rows = [
        ["–", "scratch", "–", "–", "1", "88.89%", "one seed", "70.59%", "the best"],
        ["glyphs", "linear_probe", "3", "10", "1", "63.89%", "one seed", "35.30%", "−25.00 ± 105.89, p 0.410"],
        ["glyphs", "pretrained_probe", "3", "10", "1", "87.50%", "one seed", "88.24%", "−1.39 ± 17.65, p 0.500"],
    ]
    table = tables.ReportTable(
        "a", [*headings, "± over repeats", "minus the best, over repeats (points)"], rows, 4, {(0, 5)}
    )
    fitting, left_out = rendering.narrowed(table, 80)
    assert left_out == ["seeds", "± over seeds", "train.validate_episodes", "train.max_seconds"]
    assert [fitting.rows[row][column] for row, column in fitting.best] == ["88.89%"]
    assert rendering.narrowed(table, 200) == (table, [])
    # What tells rows apart stays, whatever the screen.
    assert rendering.narrowed(table, 20)[0].headings[0] == "approach"
    monkeypatch.setattr(rendering.sys, "stdout", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    rendering.show([table])
    shown = terminal.getvalue()
    for word in ("approach", "linear_probe", "pretrained_probe", "accuracy", "87.50%", "−25.00"):
        assert word in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert max(map(len, plain.splitlines()[:-1])) <= 80
    assert shown.endswith(
        "for want of room without seeds, ± over seeds, train.validate_episodes, train.max_seconds, which the files below have\n"
    )


def test_a_narrow_screen_has_no_column_in_which_nothing_was_published() -> None:
    def table(*last: str) -> tables.ReportTable:
        return tables.ReportTable("t", ["algo", "accuracy", "published"], [["a", "90%", cell] for cell in last], 1)

    assert rendering.without_unpublished(table("none: own data", "")).headings == ["algo", "accuracy"]
    assert rendering.without_unpublished(table("none: own data", "")).rows == [["a", "90%"]] * 2
    known = table("none: own data", "98.7 % (Finn et al. 2017)")
    assert rendering.without_unpublished(known) is known


def test_brackets_begin_no_length_in_latex() -> None:
    assert latex(ReportTable("", ["a"], [["[1, 5]"]], 1, set()), "tab:a").count(r"{[}1, 5{]}") == 1


def test_a_bar_is_a_bar_in_latex() -> None:
    assert latex(ReportTable("", ["a"], [["x|y"]], 1, set()), "tab:a").count(r"x\textbar{}y") == 1


def test_methods_have_their_names_and_papers_in_latex() -> None:
    rows = [["protonet", "1"], ["learn2learn/maml", "2"], ["fomaml", "3"], ["my_own", "4"], ["../algo/maml", "5"]]
    lines = latex(ReportTable("t", ["algo", "seeds"], rows, 1, set()), "tab:a").splitlines()
    assert [line.split(" & ")[0] for line in lines if line.endswith(r" \\")] == [
        "algo", "Prototypical networks (Snell et al. 2017)", "learn2learn/maml", "FOMAML (Finn et al. 2017)",
        r"my\_own", "../algo/maml",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((CONF / "algo").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_has_a_paper(path: Path) -> None:
    assert re.search(r" \(.+ \d{4}\)$", cited(path.stem))


def test_every_table_in_latex_has_a_label_of_its_own() -> None:
    titles = ("omniglot, 5-way 1-shot", "digits", "omniglot: 5-way 1-shot", "日本", "omniglot, 5-way 1-shot 1")
    text = rendering.latex_file([ReportTable(title, ["a"], [["b"]], 1, set()) for title in titles])
    assert re.findall(r"\\caption\{.*\}\\label\{(.*)\}", text) == [
        "tab:omniglot-5-way-1-shot:1", "tab:digits", "tab:omniglot-5-way-1-shot:2", "tab:table", "tab:omniglot-5-way-1-shot-1",
    ]  # fmt: skip
