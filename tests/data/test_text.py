"""Labelled texts: files of every form and damage, their division, and the published sets."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from shell import make_images, metarun, result
from text_tables import many, table

from metarun.core import TaskShape
from metarun.data.banking77 import Banking77, Clinc150Banking77
from metarun.data.clinc150 import DOMAINS, Clinc150
from metarun.data.nusax import ADAPTED_TO, NusaX, NusaXLanguage
from metarun.data.text import Text, TextSource, apart
from metarun.data.text_files import LabelledText, TextColumns, labelled_texts
from metarun.data.text_rows import decoded
from metarun.engine.probabilities import UNKNOWN, with_unknown
from metarun.errors import UserError
from metarun.inference.texts import text_examples

ROWS = [("pay my bill", "pay"), ("say: hi, now", "greet"), ('a "quoted"\nsecond line', "greet"), ("grüße", "pay")]
CPU = torch.device("cpu")


def read(path: Path, **columns: str) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in labelled_texts(path, TextColumns(**columns)).rows]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_whatever_its_delimiter_and_mark(tmp_path: Path, delimiter: str, encoding: str) -> None:
    assert read(table(tmp_path / "a.csv", ROWS, delimiter=delimiter, encoding=encoding)) == ROWS


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;  "])
def test_a_first_line_may_name_the_separator(tmp_path: Path, first: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"{first}\r\ntext;label\r\npay, now;pay\r\nhi;greet\r\n".encode("utf-8-sig"))
    assert [(row.text, row.where.rpartition(" ")[2]) for row in labelled_texts(path).rows] == [
        ("pay, now", "3"),
        ("hi", "4"),
    ]
    path.write_text(f"{first}\ntext;label\npay;pay\nhi;you;greet\n")
    with pytest.raises(
        UserError, match=r"line 4: has 3 columns, the first line 2; a text with a semicolon in it needs quotes$"
    ):
        labelled_texts(path)


def test_utf_16_without_its_mark_is_told_of_and_read_where_it_is_named(tmp_path: Path) -> None:
    for name in ("utf-16-le", "utf-16-be"):
        path = table(tmp_path / f"{name}.csv", ROWS, encoding=name)
        with pytest.raises(
            UserError, match=rf"seems to be UTF-16 without its mark; name its encoding, data.encoding={name}$"
        ):
            labelled_texts(path)
        assert [row.text for row in labelled_texts(path, encoding=name).rows] == [text for text, _ in ROWS]
        path.write_bytes("\ufeff".encode(name) + path.read_bytes())
        assert [row.text for row in labelled_texts(path, encoding=name).rows] == [text for text, _ in ROWS]


def test_a_list_of_one_label_is_that_label_and_of_several_refused(tmp_path: Path) -> None:
    lines, cells = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_text('{"text": "a", "label": ["pay"], "tokens": ["a", "b"]}\n{"text": "b", "label": [3]}\n')
    cells.write_text('text,label\na,"[""pay""]"\nb,[3]\n')
    assert read(lines) == read(cells) == [("a", "pay"), ("b", "3")]
    for content in ('{"text": "b", "label": ["pay", "ask"]}', '{"text": "b", "labels": ["pay", "ask"], "other": 1}'):
        lines.write_text(content)
        with pytest.raises(
            UserError, match=r"a.jsonl, line 1: is of several classes \(pay, ask\); a text must be of one$"
        ):
            read(lines)
    cells.write_text("text,label\na,pay\nb,\"['pay', 'ask']\"\n")
    with pytest.raises(UserError, match=r"a.csv, line 3: is of several classes \(pay, ask\); a text must be of one$"):
        read(cells)
    lines.write_text('{"text": "b", "label": []}')
    with pytest.raises(UserError, match=r"line 1: has no label, the text is 'b'$"):
        read(lines)
    lines.write_text('{"text": "b", "label": "x"}\n{"text": ["b", "c"], "label": "x"}')
    with pytest.raises(UserError, match=r'line 2: its text is a list, \'\["b", "c"\]\'; it must be one text$'):
        read(lines)
    lines.write_text('{"text": "a", "labels": ["x", "y"], "intent": "ask"}')  # which is the label then
    assert read(lines) == [("a", "ask")]


def test_json_lines_and_a_json_list(tmp_path: Path) -> None:
    objects = [{"sentence": text, "intent": label, "meta": {"id": 1}} for text, label in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, objects), ""]), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(objects))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.json") == ROWS


def test_nan_is_nothing_and_equal_numbers_are_one_label(tmp_path: Path) -> None:
    lines = ['{"text": "a", "label": 1}', '{"text": "b", "label": 1.0}', '{"text": "c", "label": "1"}', '{"text": NaN, "label": 2}',
             '{"text": "d", "label": 1.5}', '{"text": "e", "label": true}', '{"text": "f", "label": -0.0}']  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl") == [("a", "1"), ("b", "1"), ("c", "1"), ("d", "1.5"), ("e", "True"), ("f", "0")]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, '{"text": "x", "label": NaN}']))
    with pytest.raises(UserError, match=r"b.jsonl, line 8: has no label, the text is 'x'$"):
        read(tmp_path / "b.jsonl")


def test_a_label_is_one_however_its_accent_is_written(tmp_path: Path) -> None:
    both = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    table(
        tmp_path / "a.csv",
        [(f"text {n} {both[1]}", both[n % 2] if n < 6 else "bc"[n % 2]) for n in range(12)],
        f"{both[0]},label",
    )
    source = Text(
        root=str(tmp_path / "a.csv"),
        text_column=both[1],
        train_classes=["b"],
        val_classes=["c"],
        test_classes=[both[1]],
    )
    assert (source.table.names, source.table.sizes.tolist()) == (["b", "c", "é"], [3, 3, 6])
    assert both[1] in source.texts.texts[-1]  # a text is what it is
    for name in both:
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "0.txt").write_text("text")
    with pytest.raises(UserError, match="two class folders have names that look the same"):
        read(tmp_path / "folders")


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\x1c", "\x0b"])
def test_a_line_ends_with_a_new_line_alone(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.csv").write_text(f"my{mark}text,label\na,x\nb,y\n", encoding="utf-8")
    assert read(tmp_path / "a.csv", text=f"my{mark}text") == [("a", "x"), ("b", "y")]
    (tmp_path / "names.txt").write_text(f"x{mark}y\r\nz\r", encoding="utf-8")
    table(tmp_path / "b.csv", many([f"x{mark}y", "z", "v"]))
    source = Text(root=str(tmp_path / "b.csv"), train_classes=str(tmp_path / "names.txt"), test_classes=["v"])
    assert sorted(source.table.names[c] for split in ("train", "val") for c in source.splits[split]) == [
        f"x{mark}y",
        "z",
    ]


def test_a_folder_of_text_files_for_each_class(tmp_path: Path) -> None:
    for number, (text, label) in enumerate(ROWS):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{number}.txt").write_text(text + "\n", encoding="utf-8")
    (tmp_path / ".DS_Store").write_bytes(b"\0\1")
    assert sorted(read(tmp_path)) == sorted(ROWS)


def test_tabs_with_quotes_that_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"unclosed, and\tpay\nfine\tgreet\n')
    assert read(tmp_path / "a.tsv") == [('"unclosed, and', "pay"), ("fine", "greet")]


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (  # a quote that another text closes swallows no rows
            ['"hello\ta', "second\ta", 'hi there"\tb', "foo\tb"],
            [('"hello', "a"), ("second", "a"), ('hi there"', "b"), ("foo", "b")],
        ),
        (['"a tab\tand', 'a line"\ta', "foo\tb"], [('"a tab', "and"), ('a line"', "a"), ("foo", "b")]),
        (['"a tab\tand\t', 'a line"\ta', "foo\tb"], [("a tab\tand\t\na line", "a"), ("foo", "b")]),
        (['"two', 'lines"\ta', "foo\tb"], [("two\nlines", "a"), ("foo", "b")]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_quote_goes_over_lines_with_tabs_only_where_these_are_no_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: list[str], rows: list[tuple[str, str]], newline: str
) -> None:
    (tmp_path / "a.tsv").write_text(newline.join(["text\tlabel", *lines, ""]), newline="")
    with caplog.at_level(logging.WARNING, "metarun"):
        assert read(tmp_path / "a.tsv") == [(text.replace("\n", newline), label) for text, label in rows]
    assert ["line 2: a quote ends in a later line" in record.getMessage() for record in caplog.records] == [True] * (
        rows[0][0][0] == '"'
    )


def test_a_header_in_quotes_says_that_quotes_are_no_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('"text"\t"label"\n"a tab\tand\na line"\t"a"\n')
    assert read(tmp_path / "a.tsv") == [("a tab\tand\na line", "a")]


@pytest.mark.parametrize(
    ("header", "columns", "wanted"),
    [
        ("text,category", {}, "text"),
        ("id,query,intent", {}, "query"),
        ("Utterance,Intent", {}, "Utterance"),
        ("anything,label", {}, "anything"),  # the only other column
        ("answer,question,intent", {"text": "answer"}, "answer"),
        ("a,b", {"text": "b", "label": "a"}, "b"),
        ("a,b,c", {"text": "B", "label": "c"}, "b"),
        ("title,passage", {"label": "title"}, "passage"),  # what is named is not the text, though it may be called so
        ("title,passage", {"label": "Title"}, "passage"),
        ("question,answer,score", {"label": "score", "group": "question"}, "answer"),
        (",text,mood", {}, "text"),  # as pandas writes its index
    ],
)
def test_columns_are_found_by_usual_names_or_named(
    tmp_path: Path, header: str, columns: dict[str, str], wanted: str
) -> None:
    cells = [(f"{name} of row" for name in header.split(",")) for _ in range(2)]
    found = labelled_texts(table(tmp_path / "a.csv", [tuple(row) for row in cells], header), TextColumns(**columns))
    assert {row.text for row in found.rows} == {f"{wanted} of row"}


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("text,label,topic,sentiment", {}),  # of what is called so nobody need ask
        ("text,label,topic", {"group": "topic"}),
        ("text,sentiment,topic", {"group": "topic", "label": "sentiment"}),
        ("text,sentiment,topic", {"group": "topic"}),  # the groups are no labels
    ],
)
def test_the_column_of_labels_is_asked_for_only_where_two_may_be_meant(
    tmp_path: Path, header: str, columns: dict[str, str]
) -> None:
    (row,) = labelled_texts(table(tmp_path / "a.csv", [tuple(header.split(","))], header), TextColumns(**columns)).rows
    assert (row.text, row.label) == tuple(header.split(",")[:2])


@pytest.mark.parametrize("what", ["text", "label", "group"])
def test_folders_of_texts_have_no_columns(tmp_path: Path, what: str) -> None:
    texts_in(tmp_path, many(["a", "b"], 2))
    with pytest.raises(UserError, match=rf"^data.{what}_column=some: .* folders of texts, which have no columns"):
        labelled_texts(tmp_path, TextColumns(**{what: "some"}))


@pytest.mark.parametrize("form", ["folders", "files"])
def test_what_is_beside_the_parts_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str) -> None:
    for part in ("train", "test", "extra"):
        if form == "folders" or part == "extra":
            texts_in(tmp_path / part, many([part + "a", part + "b"], 2))
        else:
            table(tmp_path / f"{part}.csv", many([part + "a", part + "b"], 2))
    (tmp_path / "pictures").mkdir()  # holds no texts
    with caplog.at_level(logging.WARNING, "metarun"):
        assert len(read(tmp_path)) == 8
    read_ones = "train, test" if form == "folders" else "train.csv, test.csv"
    assert [record.getMessage() for record in caplog.records] == [
        f"data: of {tmp_path} only {read_ones} are read, not extra"
    ]


def test_a_table_of_texts_alone(tmp_path: Path) -> None:
    """Without labels one column is enough where its name says that it is the texts'; a first text is not taken for a name."""
    path = tmp_path / "a.csv"
    path.write_text('\ufeff"Text"\nhello, you\n"two\nlines, quoted"\n')
    assert [row.text for row in labelled_texts(path, labels=False).rows] == ["hello, you", "two\nlines, quoted"]
    with pytest.raises(UserError, match=r"has one column; it must name the columns, as text,label$"):
        labelled_texts(path)
    path.write_text("hello you\nand you\n")
    with pytest.raises(
        UserError, match=r"'hello you', has one column; it must name the columns, as text or text,label$"
    ):
        labelled_texts(path, labels=False)


@pytest.mark.parametrize(
    ("content", "columns", "told"),
    [
        (b"text,label\nfine,pay\n\xe9t\xe9,pay\n", {}, ["line 3", "UTF-8", "data.encoding=cp1252"]),
        (b"\x89PNG\r\n\0\0\0\xff\0", {}, ["no text", "bytes"]),
        (b"text,label\na\0b,c\n", {}, ["no text"]),
        (b"", {}, ["no table"]),
        (b"text,label\n", {}, ["no rows"]),
        (b"text,label\n   ,pay\n", {}, ["no texts"]),
        (b"just a line\nand another\n", {}, ["one column", "text,label"]),
        (b"text,label\nhello, you,pay\n", {}, ["line 2", "3 columns", "comma", "quotes"]),
        (b'text,label\nfine,pay\n"open,pay\n', {}, ["line 3", "quote"]),
        (b"text,label\nfine,\n", {}, ["line 2", "no label", "fine"]),
        (b"text,label\na,b\n", {"text": "txet"}, ["data.text_column=txet", "did you mean text?"]),
        (b"question,answer,label\na,b,c\n", {}, ["question and answer", "data.text_column=question"]),
        (b"one,two,three\na,b,c\n", {}, ["one, two, three", "data.text_column"]),
        (b"question,reply,label\na,b,c\n", {"group": "question"}, ["question, reply, label", "data.text_column"]),
        (b"text,language\na,b\n", {"group": "language"}, ["text, language", "data.label_column"]),
        (b",text\n0,a\n", {}, ["the columns text;", "data.label_column"]),
        (b"text,other,more\na,b,c\n", {}, ["text, other, more", "data.label_column"]),
        (b"text,topic,sentiment\na,b,c\n", {}, ["topic and sentiment may be the label", "data.label_column=topic"]),
        (b"text,category,intent\na,b,c\n", {}, ["category and intent", "data.label_column=category"]),
        (b"text,label,language\na,b,en\nc,d,\n", {"group": "language"}, ["line 3", "no language", "c"]),
        (b"text,text,label\na,b,c\n", {}, ["several columns"]),
        (b"text,label,split\na,b,somewhere\n", {}, ["line 2", "somewhere", "train, val or test"]),
        (b"text,label,split\na,b,train\nc,d,\n", {}, ["line 3", "no part"]),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, content: bytes, columns: dict[str, str], told: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path, **columns)
    assert all(word in one_line(error) for word in told), str(error.value)


def test_columns_without_a_name_at_the_end_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As spreadsheets write them; a text that runs on into them is told of."""
    path = tmp_path / "spam.csv"
    path.write_bytes(b'label,text,,,\nham,see you,,,\nspam,win,"and win again",,\nham,late,,,\n')
    with caplog.at_level("WARNING", "metarun"):
        found = read(path)
    assert found == [("see you", "ham"), ("win", "spam"), ("late", "ham")]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "line 3: holds something in a column without a name, as no other row does" in said


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"text": "a", "label": "b"}', '{"text": "a", "lab'], ["line 2", "no JSON"]),
        (['{"text": "a", "label": "b"}', "", '{"text": "c"}'], ["line 3", "has no label", "it has text"]),
        (['{"text": "a", "label": "b"}', "[1]"], ["line 2", "no object"]),
        (['{"text": "a", "label": null}'], ["line 1", "no label"]),
        (['{"text": "a", "label": "b"}', "[" * 200_000], ["line 2", "no JSON (it is nested too deeply)"]),
    ],
)
def test_a_broken_line_of_json_lines_is_named(tmp_path: Path, lines: list[str], told: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.jsonl")
    assert all(word in one_line(error) for word in told), str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_one_object_is_told_from_rows(tmp_path: Path, name: str) -> None:
    rows = [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    columns = {"text": {"0": "a", "1": "c"}, "label": {"0": "b", "1": "d"}}
    path = tmp_path / name
    for content in ({"data": rows}, columns, {"text": ["a"], "label": ["b"]}, {}):
        path.write_text(json.dumps(content))
        with pytest.raises(
            UserError, match=r"is one object; give a list of objects, \[\{\"text\": .* or such an object a line$"
        ):
            read(path)
    path.write_text(json.dumps({"version": 1, "data": rows}, indent=2))
    with pytest.raises(UserError, match=r"is one object; give a list"):
        read(path)
    path.write_text('{"a": ["b"]}\n{"a": ["c"]}\n')
    with pytest.raises(
        UserError, match=r"its objects hold no text or number of their own, but lists, objects or nothing"
    ):
        read(path)
    for told in ({"version": 1}, {"title": "My texts", "licence": "MIT"}):
        path.write_text(json.dumps({**told, "data": rows}))
        for labels in (True, False):  # without labels the only column of a file is the text, which "version" is not
            with pytest.raises(
                UserError, match=r"is one object, whose data is a list of objects; give that list alone, \[\{"
            ):
                labelled_texts(path, labels=labels)
    path.write_text('{"text": "a", "label": "b", "tokens": ["a"]}')
    assert read(path) == [("a", "b")]
    path.write_text('{"text": "a", "label": "b", "spans": [{"text": "a", "start": 0}]}')
    assert read(path) == [("a", "b")]
    path.write_text('{"title": "a", "label": "b", "spans": [{"start": 0}]}')
    assert read(path, text="title") == [("a", "b")]


def test_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "label": "x"}\n{"text": "cut \\ud83d", "label": "y"}\n')
    with pytest.raises(UserError, match=r"line 2: text holds half of a character"):
        read(tmp_path / "a.jsonl")


def test_of_a_text_of_a_test_class_and_of_a_test_part_one_is_kept() -> None:
    rows = [
        LabelledText("same", "trained", "test", "", ""),
        LabelledText("same", "tested", "train", "", ""),
        LabelledText("other", "trained", "train", "", ""),
    ]
    kept, _ = apart(rows, {"train": ["trained"], "val": [], "test": ["tested"]}, "data")
    assert [row.label for row in kept] == ["tested", "trained"]


def test_folders_of_parts_that_hold_texts_are_no_classes(tmp_path: Path) -> None:
    for part in ("train", "test1"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "1.txt").write_text("a text")
    with pytest.raises(UserError, match=r"^data.root: .*/test1 holds texts but no class folders, .*, or give a table$"):
        labelled_texts(tmp_path)


def test_parts_without_training_texts_are_refused(tmp_path: Path) -> None:
    lines = [
        "text,label,split",
        *(f"{word} {kind},{kind},{part}" for word in "abc" for kind in "xyz" for part in ("val", "test")),
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="no text is for training, but for test and val"):
        Text(root=str(tmp_path / "a.csv"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_part_alone_divides_nothing(tmp_path: Path, part: str) -> None:
    rows = many(list("abcdef"))
    divided = Text(root=str(table(tmp_path / "a.csv", [(*row, part) for row in rows], "text,label,split")))
    plain = Text(root=str(table(tmp_path / "b.csv", rows)))
    for split in plain.splits:
        assert list(divided.splits[split]) == list(plain.splits[split])
    assert not divided.has_test_part
    assert divided.table.metadata.get("parts") == plain.table.metadata.get("parts")
    assert len(text_examples(tmp_path / "a.csv")) == len(rows)


def test_a_column_that_names_a_part_in_each_row_divides_whatever_it_is_called(tmp_path: Path) -> None:
    rows = [(*row, part) for part in ("train", "test") for row in many(list("abc"), mark=part)]
    named, other = (
        Text(root=str(table(tmp_path / f"{column}.csv", rows, f"text,label,{column}"))) for column in ("split", "set")
    )
    assert other.has_test_part
    assert other.table.metadata["parts"] == named.table.metadata["parts"]


def test_examples_for_validation_and_the_test_are_none_to_learn_from(tmp_path: Path) -> None:
    rows = [(*row, part) for part in ("val", "test") for row in many(["a", "b"], mark=part)]
    path = table(tmp_path / "a.csv", rows, "text,label,split")
    with pytest.raises(UserError, match=r"^support=.*a.csv: no text is for training, but for test and val$"):
        text_examples(path)


def test_an_encoding_that_is_named_is_used(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ROWS, encoding="cp1252")
    assert [row.text for row in labelled_texts(path, encoding="cp1252").rows] == [text for text, _ in ROWS]
    with pytest.raises(UserError, match=r"data.encoding=klingon: .* try utf-8"):
        labelled_texts(path, encoding="klingon")
    for named in ("utf-8", "UTF_8", "utf-8-sig"):  # nobody is told to name it again
        with pytest.raises(
            UserError, match=rf"is no text in {named}; name its encoding, data.encoding=cp1252 or latin-1"
        ):
            labelled_texts(path, encoding=named)
    with pytest.raises(UserError, match=r"is no text in ascii; name its encoding, data.encoding=utf-8, say"):
        labelled_texts(path, encoding="ascii")


def test_rows_without_a_text_are_left_out_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(tmp_path / "a.csv", [*many(["a", "b"]), ("", "a"), ("  ", "b")])
    with caplog.at_level(logging.WARNING, "metarun"):
        source = Text(root=str(path))
    assert [record.getMessage() for record in caplog.records] == [
        f"data: 2 rows without a text are left out, the first of {path}, line 14"
    ]
    assert source.describe()["empty"] == 2
    assert len(source.texts.texts) == 12


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    table(tmp_path / "intents.csv", ROWS)
    with pytest.raises(UserError, match=r"no file or folder .*/intent\.csv; did you mean intents.csv\?"):
        Text(root=str(tmp_path / "intent.csv"))


def test_one_label_alone_has_nothing_to_tell_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one label alone \(a\)"):
        Text(root=str(table(tmp_path / "a.csv", many(["a"]))))


def test_files_with_other_classes_each_are_the_splits(tmp_path: Path) -> None:
    """As the divisions of HWU64 come: a folder with a file for each split, and others beside them."""
    classes = {"train": ["a", "b", "c"], "valid": ["d", "e"], "test": ["f", "g"]}
    for part, own in classes.items():
        table(tmp_path / f"{part}.csv", many(own), "text,category")
    table(tmp_path / "train_5.csv", many(["a"], 1), "text,category")
    source = Text(root=str(tmp_path))
    named = {split: [source.table.names[number] for number in own] for split, own in source.splits.items()}
    assert named == {"train": classes["train"], "val": classes["valid"], "test": classes["test"]}
    assert not source.has_test_part
    with pytest.raises(UserError, match="divided by its parts already"):
        Text(root=str(tmp_path), train_classes=["a"], test_classes=["f"])


@pytest.mark.parametrize("form", ["files", "folders of files", "class folders", "column"])
def test_files_with_the_same_classes_are_parts_of_the_texts(tmp_path: Path, form: str) -> None:
    classes = ["a", "b", "c", "d", "e"]
    parts = {part: many(classes, mark=part) for part in ("train", "dev", "test")}
    for part, rows in parts.items():
        if form == "files":
            table(tmp_path / f"{part}.csv", rows)
        elif form == "folders of files":
            table(tmp_path / part / "data.csv", rows)
        elif form == "class folders":
            for number, (text, label) in enumerate(rows):
                (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
                (tmp_path / part / label / f"{number}.txt").write_text(text)
    if form == "column":
        table(tmp_path / "a.csv", [(*row, part) for part, rows in parts.items() for row in rows], "text,label,split")  # type: ignore[misc]
    source = Text(root=str(tmp_path))
    assert source.has_test_part
    for part in ("train", "val", "test"):
        labelled = source.labelled(part)  # type: ignore[arg-type]
        assert labelled.counts.tolist() == [6] * 5
        assert all(text.endswith("dev" if part == "val" else part) for text in labelled.identities)
    assert sorted(len(own) for own in source.splits.values()) == [1, 1, 3]


def test_parts_that_share_some_classes_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", many(["a", "b"]))
    table(tmp_path / "test.csv", many(["b", "c"], mark="!"))
    with pytest.raises(UserError, match=r"class b is in both train and test, but c in test without train"):
        Text(root=str(tmp_path))


def test_a_class_of_train_in_val_and_a_new_one_in_test_are_one_line(tmp_path: Path) -> None:
    for part, classes in {"train": ["a", "b"], "val": ["a"], "test": ["c"]}.items():
        table(tmp_path / f"{part}.csv", many(classes, mark=part))
    with pytest.raises(UserError, match=r"class a is in both train and val, but c in test without train"):
        Text(root=str(tmp_path))


def test_several_files_without_names_of_parts_are_refused(tmp_path: Path) -> None:
    for name in ("intents.csv", "more.csv"):
        table(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=r"holds intents.csv, more.csv, and nothing says which"):
        Text(root=str(tmp_path))


def texts_in(root: Path, rows: list[tuple[str, str]]) -> None:
    for number, (text, label) in enumerate(rows):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{number}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("stray", "content"),
    [("index.csv", "file,label\na/0.txt,x\nb/1.txt,y\n"), ("dataset_info.json", "{}"), ("labels.json", '["a", "b"]')],
)
@pytest.mark.parametrize("form", ["classes", "parts", "in a part", "parts of tables"])
def test_a_file_beside_folders_of_texts_is_told_of_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stray: str, content: str, form: str
) -> None:
    rows = many(["a", "b"], 2)
    for folder in [tmp_path] if form == "classes" else [tmp_path / "train", tmp_path / "test"]:
        if form == "parts of tables":
            table(folder / "data.csv", rows)
        else:
            texts_in(folder, rows)
    home = tmp_path / "train" if form == "in a part" else tmp_path
    (home / stray).write_text(content)
    with caplog.at_level(logging.WARNING, "metarun"):
        assert sorted(read(tmp_path)) == sorted(rows if form == "classes" else [*rows, *rows])
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"data: of {home} only the folders ")
    assert told.endswith(f" are read, not {stray}; give the file itself, {home / stray}, to have it read")


def test_a_file_beside_folders_that_are_no_data_set_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "data.csv", ROWS)
    texts_in(tmp_path, [("how it was made", "docs")])
    (tmp_path / "pictures").mkdir()
    with caplog.at_level(logging.WARNING, "metarun"):
        assert read(tmp_path) == ROWS
    assert not caplog.records
    texts_in(tmp_path, [("who may use it", "licenses")])
    with pytest.raises(
        UserError, match=r"holds both data\.csv and folders of texts, docs, licenses, but no texts in pictures; give "
    ):
        read(tmp_path)


def test_what_is_no_text_file_in_a_class_folder_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts_in(tmp_path, many(["a", "b", "c"], 2))
    texts_in(tmp_path / "a", [("deeper", "more")])
    (tmp_path / "b" / "page.html").write_text("hello")
    (tmp_path / "b" / ".DS_Store").write_bytes(b"\0")
    with caplog.at_level(logging.WARNING, "metarun"):
        source = Text(root=str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        f"data: left out 2 files or folders in class folders that are no .txt files; the first: {tmp_path / 'a' / 'more'}"
    ]
    assert source.describe()["unread"] == 2
    assert len(source.texts.texts) == 6


def test_classes_are_divided_by_lists_by_files_of_names_or_by_a_seed(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", many(list("abcdefghij")))
    listed = Text(root=str(path), train_classes=["a", "b", "c"], val_classes=["d"], test_classes=["e", "f"])
    for split, names in (("train", "abc"), ("valid", "d"), ("test", "ef")):
        (tmp_path / f"labels.{split}.txt").write_text("\n".join(names) + "\n")
    by_file = Text(
        root=str(path),
        train_classes="labels.train.txt",
        val_classes=str(tmp_path / "labels.valid.txt"),
        test_classes="labels.test.txt",
    )
    assert listed.describe() == by_file.describe()
    drawn = [Text(root=str(path), split_seed=seed) for seed in (0, 0, 1)]
    first, second, other = ({split: own.tolist() for split, own in source.splits.items()} for source in drawn)
    assert first == second != other
    assert [len(first[split]) for split in ("train", "val", "test")] == [6, 2, 2]
    for given in ("nowhere.txt", ", ".join(["one of many names"] * 20)):  # the latter is longer than any name of a file
        with pytest.raises(UserError, match=rf"data.train_classes={given}: is neither a list"):
            Text(root=str(path), train_classes=given)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(
        UserError, match=r"^data: .*latin.txt, line 1: is no text in UTF-8; name its encoding, data.encoding=cp"
    ):
        Text(root=str(path), train_classes="latin.txt")


def test_a_text_that_is_tested_on_is_left_out_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Between the classes of a division as between the parts of a class."""
    table(tmp_path / "classes/train.csv", [*many(["a", "b"]), ("the same", "a"), ("again", "b"), ("again", "b")])
    table(tmp_path / "classes/val.csv", [*many(["c"]), ("the same", "c"), ("val too", "c")])
    table(tmp_path / "classes/test.csv", [*many(["d"]), ("the same", "d")])
    table(tmp_path / "parts/train.csv", [*many(["a", "b"]), ("the same", "a"), ("twice", "a"), ("twice", "a")])
    table(tmp_path / "parts/test.csv", [*many(["a", "b"], mark="!"), ("the same", "b")])
    with caplog.at_level(logging.WARNING, "metarun"):
        sources = [Text(root=str(tmp_path / name)) for name in ("classes", "parts")]
    for source in sources:
        assert source.texts.texts.count("the same") == 1
    assert len(caplog.records) == 4
    assert "'the same'" in caplog.text
    assert "'again'" in caplog.text
    assert sources[0].describe()["repeated_in_a_later_split"] == 2
    assert sources[0].describe()["repeated"] == 1


def test_tasks_never_mix_groups_and_groups_are_divided_whole(tmp_path: Path) -> None:
    rows = [
        (f"{group} {label} {number}", label, group)
        for group in ("ban", "en", "id", "jv", "min")
        for label in ("good", "bad")
        for number in range(6)
    ]
    source = Text(root=str(table(tmp_path / "a.csv", rows, "text,label,language")), group_column="language")  # type: ignore[arg-type]
    homes = {split: {source.table.groups[number] for number in own} for split, own in source.splits.items()}
    assert not homes["train"] & homes["test"]
    assert sorted(map(len, homes.values())) == [1, 1, 3]
    items = np.array(source.texts.texts)
    # The sampler's rows stand for items: with rows for pieces an episode shows which texts it has.
    source.__dict__["pieces"] = torch.arange(len(items))[:, None].expand(-1, 256)
    drawn = source.sampler("train", TaskShape(2, 2, 3), 0, CPU)(0, 8)
    for support, queries in zip(drawn.support_x[:, :, 0], drawn.query_x[:, :, 0], strict=True):
        assert len({text.split()[0] for text in items[torch.cat([support, queries])]}) == 1


def test_a_column_that_is_named_is_no_part(tmp_path: Path) -> None:
    rows = [(f"{group} {label}", label, group) for group in ("books", "films") for label in ("good", "bad")]
    path = table(tmp_path / "a.csv", rows, "text,label,subset")
    found = labelled_texts(path, TextColumns(group="Subset")).rows
    assert [(row.part, row.group) for row in found] == [("", "books")] * 2 + [("", "films")] * 2
    assert {row.label for row in labelled_texts(path, TextColumns(label="subset")).rows} == {"books", "films"}


def test_classes_of_two_groups_with_one_name_are_refused(tmp_path: Path) -> None:
    rows = [(f"{group} {label}", label, group) for group, label in (("a", "b/c"), ("a/b", "c"), ("d", "c"))]
    path = table(tmp_path / "a.csv", rows, "text,label,domain")
    with pytest.raises(UserError, match="a class of group a and one of group a/b are both a/b/c"):
        Text(root=str(path), group_column="domain")


def test_clinc150_is_divided_by_domains() -> None:
    source = Clinc150()
    groups = {split: {source.table.groups[number] for number in own} for split, own in source.splits.items()}
    assert groups["val"] == {"kitchen_and_dining", "travel"}
    assert groups["test"] == {"banking", "credit_cards"}
    assert groups["train"] == DOMAINS.keys() - groups["val"] - groups["test"]
    assert {split: len(own) for split, own in source.splits.items()} == {"train": 90, "val": 30, "test": 30}
    counts = [len(source.labelled(part)) for part in ("train", "val", "test")]
    assert counts[2] == 4500
    assert sum(counts) == 22_500 - source.describe()["repeated_in_a_later_split"]
    drawn = Clinc150(division="drawn", split_seed=1)
    assert {split: len(own) for split, own in drawn.splits.items()} == {"train": 96, "val": 24, "test": 30}


def test_banking77_and_the_protocol_of_zhang_2022() -> None:
    source, joint = Banking77(), Clinc150Banking77()
    assert len(source.table.names) == 77
    assert len(source.labelled("test")) == 3079  # 3,080 questions, one of which is there twice
    names = {split: [joint.table.names[number] for number in own] for split, own in joint.splits.items()}
    assert {split: len(own) for split, own in names.items()} == {"train": 90, "val": 30, "test": 77}
    assert all(name.startswith("banking77/") for name in names["test"])
    assert not {f"clinc150/{intent}" for intent in DOMAINS["banking"].split()} & {*joint.table.names}


def test_nusax_tests_on_languages_and_texts_that_training_has_not() -> None:
    source = NusaX()
    texts = {
        split: [source.texts.texts[row] for c in own for row in range(*source.table.offsets[c : c + 2])]
        for split, own in source.splits.items()
    }
    assert [len(texts[split]) for split in ("train", "val", "test")] == [8 * 500, 8 * 100, 4 * 400]
    assert source.describe()["languages"]["test"] == list(ADAPTED_TO)
    language = NusaXLanguage(language="madurese")
    assert [len(language.labelled(part)) for part in ("train", "val", "test")] == [500, 100, 400]
    with pytest.raises(UserError, match=r"no language madures; did you mean madurese\?"):
        NusaX(test_languages=["madures"])
    with pytest.raises(UserError, match="english is trained on too"):
        NusaX(train_languages=["english"], test_languages=["english"])


@pytest.mark.parametrize("source", [Banking77, Clinc150])
def test_another_file_is_not_taken_for_the_published_one(tmp_path: Path, source: type[TextSource]) -> None:
    for name in ("train.csv", "test.csv"):
        table(tmp_path / name, ROWS)
    (tmp_path / "data_full.json").write_text('{"train": [["a", "b"]]}')
    with pytest.raises(UserError, match=r"get it again|not the published file"):
        source(root=str(tmp_path), download=False)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"is missing; put it there from https://"):
        source(root=str(tmp_path / "nowhere"), download=False)  # type: ignore[call-arg]


def test_word_pieces_travel_to_a_device_once(tmp_path: Path) -> None:
    source = Text(root=str(table(tmp_path / "texts.csv", many(["a", "b", "c"]))))
    moved = list[torch.device]()

    class Pieces:
        def to(self, device: torch.device) -> torch.Tensor:
            moved.append(device)
            return torch.arange(18)[:, None]

    source.__dict__["pieces"] = Pieces()
    known = source.labelled(None)
    for start in (0, 6, 12):
        batch = known.batch(np.arange(start, start + 6), torch.device("cpu"))
        assert batch.x[:, 0].tolist() == [*range(start, start + 6)]
    assert len(moved) == 1


def test_texts_need_an_encoder_or_a_backbone_that_reads_them(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", many(list("abcdef")))
    without = metarun("data=text", f"data.root={path}", f"outputs={tmp_path}")
    assert without.status == 2
    assert "add encoder=minilm or encoder=tfidf" in without.err
    pictures = make_images(tmp_path / "images")
    images = metarun(
        "data=folder", f"data.root={pictures}", "backbone=minilm", "backbone.weights=null", f"outputs={tmp_path}"
    )
    assert images.status == 2
    assert "reads texts, but the items of the data are images" in images.err
    assert not [*tmp_path.glob("*/*/config.yaml")]


@pytest.mark.parametrize("encoded", [False, True])
def test_too_few_classes_of_texts_lead_to_a_target_of_texts(encoded: bool, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", many(list("abcdef")))
    reads = ["encoder=tfidf", "backbone=mlp"] if encoded else ["backbone=minilm", "backbone.weights=null"]
    refused = metarun("data=text", f"data.root={path}", *reads, "task.ways=5", f"outputs={tmp_path}")
    assert refused.status == 2
    assert refused.said[-1].endswith(f"recipe=target_only target=text target.data.root={path}")
    (tmp_path / "b.csv").write_text(path.read_text().replace("text,", "words,", 1))
    columns = ["data.text_column=words", f"data.root={tmp_path / 'b.csv'}"]
    named = metarun("data=text", *columns, *reads, "task.ways=5", f"outputs={tmp_path}")
    assert named.said[-1].endswith("recipe=target_only target=text target.data.root=FILE")  # there are more words to it


def test_a_run_on_texts(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", many(list("abcdefghij"), 8))
    words = ["data=text", f"data.root={path}", "encoder=tfidf", "backbone=mlp", "algo=protonet"]
    task = [
        "task.ways=2",
        "task.shots=2",
        "task.queries=2",
        "train.steps=3",
        "train.validate_episodes=2",
        "test.episodes=4",
    ]
    outcome = metarun(*words, *task, "test.baseline_episodes=0", f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    (folder,) = tmp_path.glob("*/*/result.json")
    found = result(folder.parent)
    assert found["data"]["items"] == "text"
    assert found["protocol"]["encoder"]["fitted_to"] == "training items alone"
    assert "vectors of TfIdf, fitted to training items alone" in outcome.out
    again = [
        "recipe=test",
        f"checkpoint={folder.parent}",
        "test.task.queries=1",
        "test.episodes=2",
        f"outputs={tmp_path}",
    ]
    assert metarun(*again).status == 0
    other = table(tmp_path / "b.csv", many([letter * 3 for letter in "klmnopqrst"], 8))
    refused = metarun(*again, "data=text", f"data.root={other}")
    assert refused.status == 2
    assert "TfIdf, which is fitted to each data set anew" in refused.err
    assert found["data"]["encoder"]["class"] == "TfIdf"
    assert found["data"]["classes"] == {"train": 6, "val": 2, "test": 2}
    assert found["protocol"]["test"] == {"ways": 2, "shots": 2, "queries": 2}


def test_texts_are_called_texts_wherever_images_are_called_images(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", [*many(list("abcdefghij"), 8), ("alone", "k")])
    words = [
        "data=text", f"data.root={path}", "encoder=tfidf", "backbone=mlp", "task.ways=2", "task.shots=2", "task.queries=2",
        "train.steps=2", f"outputs={tmp_path}",
    ]  # fmt: skip
    small = ["data.train_classes=[a,b,k]", "data.val_classes=[e,f]", "data.test_classes=[c,d]"]
    refused = metarun(*words, "algo=protonet", *small)
    assert "= 4 is above the 1 text of the smallest class of the train split, k" in refused.err
    words += ["data.train_classes=[a,b,g]", "data.val_classes=[e,f]", "data.test_classes=[c,d]"]
    unequal = ["test.task.query_dirichlet=1", "test.task.shots=7", "test.task.queries=1"]
    few = metarun(*words, "algo=protonet", *unequal)
    assert "has 1 text beside its shots" in few.err
    continual = ["recipe=continual", "continual.orders=2"]
    seldom = metarun(*words, *continual, "algo=protonet", "continual.images=7", "continual.test_images=2")
    assert "= 9 is above the 8 texts of the class" in seldom.err
    continual += ["continual.images=6", "continual.test_images=2"]
    outcome = metarun(*words, *continual, "algo=baseline", "name=one")
    assert outcome.status == 0, outcome.err
    assert "6 texts each, 2 to test" in outcome.out
    assert "online head, each text once" in outcome.out
    (folder,) = tmp_path.glob("one/*/result.json")
    found = result(folder.parent)
    assert found["protocol"]["seen"]["train"].startswith("all texts of the training classes")
    assert "each text once" in found["protocol"]["continual"]
    reported = metarun("recipe=report", f"runs={tmp_path / 'one'}", f"outputs={tmp_path}")
    assert "6 texts each" in " ".join(reported.out.split())
    for told in (
        outcome.out.partition("results ")[0],
        json.dumps(found["protocol"]),
        found["interval"],
        refused.err,
        few.err,
    ):
        assert "image" not in told.replace("images_per_step", "")


def test_a_target_of_texts_is_told_of_as_texts(tmp_path: Path) -> None:
    """So is what an encoder saw of it that is fitted to a source with the same texts."""
    path = table(tmp_path / "a.csv", [*many(list("abcde"), 8), ("alone", "k")])
    words = [
        "recipe=transfer", "data=text", f"data.root={path}", "target=text", f"target.data.root={path}", "encoder=tfidf",
        "transfer=nearest_centroid", "target.repeats=2", "task.ways=2", "task.queries=2", "train.steps=2", "task.min_items=8",
        "data.train_classes=[a,b]", "data.val_classes=[c]", "data.test_classes=[d,e]", f"outputs={tmp_path}", "name=one",
    ]  # fmt: skip
    assert "class k has no test texts" in metarun(*words).err
    many_asked = metarun(*words, "target.min_images=4", "target.train_images=90")
    assert "target.train_images=90: there are only 30 texts to draw from" in many_asked.err
    outcome = metarun(*words, "target.min_images=4")
    assert outcome.status == 0, outcome.err
    assert "5 of 6 classes, of at least 4 texts each" in outcome.err
    (folder,) = tmp_path.glob("one/*/result.json")
    found = result(folder.parent)
    assert "division into training and test texts" in found["target/interval"]
    assert found["protocol"]["test_images_seen_unlabelled"] == 2 * 8
    assert found["protocol"]["transductive"]
    assert "the encoder, which is fitted to the source, sees" in outcome.err
    assert (folder.parent / "predictions.csv").read_text().startswith("repeat,train_images,text,truth")


def test_texts_that_an_encoder_reads_are_cut_into_no_word_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(texts: list[str]) -> None:
        raise AssertionError("word pieces are made")

    monkeypatch.setattr("metarun.data.text.as_pieces", refuse)
    path = table(tmp_path / "a.csv", many(list("abcdefghij"), 8))
    task = ["task.ways=2", "task.queries=2", "train.steps=2", f"outputs={tmp_path}"]
    outcome = metarun("recipe=inspect", "data=text", f"data.root={path}", "encoder=tfidf", "backbone=mlp", *task)
    assert outcome.status == 0, outcome.err
    assert "2-way 1-shot, 2 queries a class fits" in outcome.out


def test_a_target_of_texts_is_tested_on_texts(tmp_path: Path) -> None:
    for part, each in (("train", 4), ("val", 2), ("test", 3)):
        table(tmp_path / "texts" / f"{part}.csv", many(list("abc"), each, f" {part}"))
    words = [
        "recipe=domain_adaptation", "algo=mmd", "encoder=tfidf", "backbone=mlp", "data=text", f"data.root={tmp_path / 'texts'}",
        "target=text", f"target.data.root={tmp_path / 'texts'}", "train.steps=1", f"outputs={tmp_path}",
    ]  # fmt: skip
    outcome = metarun(*words)
    assert outcome.status == 0, outcome.err
    (folder,) = tmp_path.glob("*/*/result.json")
    assert result(folder.parent)["target/interval"] == "95%, over the 9 test texts, Wilson"


def test_out_of_scope_queries_are_the_unknown_ones() -> None:
    """Of the part of the split, in no task a query of a class; ordinary labels do not know them."""
    source = Clinc150(out_of_scope=True)
    plain = Clinc150()
    source.__dict__["pieces"] = torch.arange(len(source.texts.texts))[:, None].expand(-1, 256)
    for split, count in (("val", 100), ("test", 1000)):
        first, last = source.table.offsets[source.unknown[split] : source.unknown[split] + 2]  # type: ignore[index]
        assert last - first == count
        drawn = source.with_unknown(split, TaskShape(5, 2, 3), 4, 0, CPU)(0, 6)  # type: ignore[arg-type]
        assert drawn.ways == 9
        rows = drawn.query_x[:, :, 0].numpy()
        assert ((first <= rows[:, 15:]) & (rows[:, 15:] < last)).all()
        assert all(len({*row}) == 12 for row in rows[:, 15:])
        usual = source.sampler(split, TaskShape(5, 2, 3), 0, CPU)(0, 6)  # type: ignore[arg-type]
        torch.testing.assert_close(drawn.query_x[:, :15], usual.query_x)
        again = source.with_unknown(split, TaskShape(5, 2, 3), 4, 0, CPU)(3, 4)  # type: ignore[arg-type]
        torch.testing.assert_close(again.query_x[0], drawn.query_x[3])
    for task in (
        TaskShape((2, 4), (1, 3), (1, 3), balanced=False),
        TaskShape(3, 2, (1, 4)),
        TaskShape(3, 2, 2, labelled_share=0.5),
    ):
        first, last = source.table.offsets[source.unknown["test"] : source.unknown["test"] + 2]
        known = source.sampler("test", task, 0, CPU)
        drawn = source.with_unknown("test", task, 2, 0, CPU)
        for number, one in enumerate(drawn(0, 6).split(1)):
            (own,), (alone,) = known(number, number + 1).split(1), drawn(number, number + 1).split(1)
            assert torch.equal(one.query_x, alone.query_x)
            asked, kinds = with_unknown(one, 2)
            assert torch.equal(asked.support_x, own.support_x)
            assert torch.equal(asked.support_y, own.support_y)
            assert asked.support_sizes == own.support_sizes
            further = own.query_sizes[:2]  # as many as classes of this task have
            assert one.query_y[0].bincount().tolist() == [*own.query_sizes, *further] == one.query_sizes
            assert one.support_y[0].bincount().tolist() == one.support_sizes
            assert torch.equal(one.query_x[:, : own.query_x.shape[1]], own.query_x)
            rows = one.query_x[kinds == UNKNOWN][:, 0].numpy()
            assert ((first <= rows) & (rows < last)).all()
            assert len({*rows}) == sum(further)
    assert len(source.labelled(None)) == len(plain.labelled(None))
    assert source.labelled("test").names == plain.labelled("test").names
    with pytest.raises(
        UserError, match=r"unknown_ways=10: times test.task.queries=15 is above the 100 items of no class"
    ):
        source.with_unknown("val", TaskShape(5, 1, 15), 10, 0, CPU)


def test_a_pipe_among_texts_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    os.mkfifo(tmp_path / "one" / "x.txt")
    with pytest.raises(UserError, match=r"x.txt is a pipe, and no file"):
        decoded(tmp_path / "one" / "x.txt", "data", None)
