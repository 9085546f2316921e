"""Classifying texts by what a run learned, from the shell and from Python."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from shell import metarun, result
from text_tables import table

from metarun.errors import UserError
from metarun.inference import items
from metarun.inference.learner import load
from metarun.inference.texts import TextPreprocessing, find_texts, text_examples

WORDS = ["apple", "brick", "cloud", "dream", "eagle", "flame", "grass", "house", "ivory", "jewel"]
TASK = [
    "backbone=identity",
    "task.ways=2",
    "task.shots=2",
    "task.queries=2",
    "test.episodes=4",
    "test.baseline_episodes=0",
]


def worded(words: list[str], each: int = 6) -> list[tuple[str, str]]:
    """Texts of which each has the word of its class."""
    return [(f"the {word} of number {number}", word) for word in words for number in range(each)]


@pytest.fixture(scope="module")
def episodic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nearest class means on TF-IDF."""
    root = tmp_path_factory.mktemp("episodic")
    path = table(root / "a.csv", worded(WORDS))
    outcome = metarun(
        "data=text", f"data.root={path}", "encoder=tfidf", "encoder.analyzer=char_wb", "algo=simpleshot", "train.steps=0", *TASK,
        f"outputs={root}", "name=made",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "support=FILE items=FILE" in outcome.out
    (found,) = root.glob("made/*/result.json")
    return found.parent


@pytest.fixture
def support(tmp_path: Path) -> Path:
    return table(tmp_path / "support.csv", worded(["river", "stone", "tower"], 2))


def predicted(root: Path) -> list[dict[str, str]]:
    (found,) = root.glob("predictions/*/predictions.csv")
    return list(csv.DictReader(io.StringIO(found.read_text())))


def test_texts_of_a_file_are_classified_by_examples_of_other_classes(
    tmp_path: Path, episodic: Path, support: Path
) -> None:
    texts = tmp_path / "new.txt"
    texts.write_text("a river\n\nsome tower\nthe stone, again\n")
    words = ["recipe=predict", f"checkpoint={episodic}", f"support={support}", f"items={texts}", f"outputs={tmp_path}"]
    outcome = metarun(*words)
    assert outcome.status == 0, outcome.err
    assert [(row["text"], row["class"]) for row in predicted(tmp_path)] == [
        ("a river", "river"), ("some tower", "tower"), ("the stone, again", "stone"),
    ]  # fmt: skip
    assert "1 without a text, left out" in outcome.out
    (page,) = tmp_path.glob("predictions/*/index.html")
    assert "a river" in page.read_text()
    assert "<img" not in page.read_text()
    again = metarun(*words)  # the same texts: the stored result is shown
    assert "classifying" not in again.err
    texts.write_text("a tower\n")
    assert metarun(*words, "resume=false").status == 0


def test_standard_input_is_text_in_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for raw, encoding in ((b"\xef\xbb\xbfcaf\xc3\xa9", "utf8"), (b"caf\xe9", "latin-1")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding=encoding))
        assert find_texts("-").paths == ["café"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match=r"^items=-: line 2 is no text in UTF-8; write it in UTF-8$"):
        find_texts("-")


def test_the_nearest_folder_that_is_called_like_a_class_labels_a_text(tmp_path: Path) -> None:
    (tmp_path / "river" / "2019").mkdir(parents=True)
    (tmp_path / "river" / "2019" / "0.txt").write_text("a river")
    assert find_texts(tmp_path, classes=["river", "tower"]).labels == ["river"]


def test_a_table_beside_texts_is_asked_about_or_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As at `data.root`: beside class folders it is left, and a text beside it may be its licence."""
    table(tmp_path / "data.csv", worded(["river"], 2))
    (tmp_path / "river").mkdir()
    (tmp_path / "river" / "0.txt").write_text("a river")
    with caplog.at_level(logging.WARNING, "metarun"):
        assert find_texts(tmp_path).paths == ["a river"]
    assert [record.getMessage() for record in caplog.records] == [
        f"items: of {tmp_path} only the .txt files are read, not data.csv; items={tmp_path / 'data.csv'} reads that file"
    ]
    (tmp_path / "LICENSE.txt").write_text("Permission is granted.")
    with pytest.raises(
        UserError, match=r"holds both data.csv and LICENSE.txt, .*; give the file itself, items=.*data.csv, or move"
    ):
        find_texts(tmp_path)


def test_a_column_of_texts_is_a_list_of_them() -> None:
    class Column:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            return np.array(["a river", "some tower"], dtype=object)

    found = items.listed(Column(), TextPreprocessing((8,)))
    assert found is not None
    assert found.paths == ["a river", "some tower"]


def test_advice_names_the_key_that_was_given(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        table(tmp_path / name, worded(["river", "tower"], 2))
    with pytest.raises(UserError, match=r"^support: .* give the file itself, support=\S+one.csv, or call"):
        text_examples(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "new.txt", tmp_path / "folder/new.txt"):
        path.write_bytes(b"caf\xe9\n")
    for origin in (tmp_path / "new.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=r"^items: .*new.txt, line 1: is no text in UTF-8; write it in UTF-8$"):
            find_texts(origin)
    with pytest.raises(UserError, match=r"there is no such file or folder; a text itself goes in by items=-$"):
        find_texts("a river and a stone " * 20 + "and/or")  # longer than the name of any file


@pytest.mark.parametrize("form", ["csv", "jsonl", "folder", "stdin"])
def test_texts_may_be_named_in_many_ways(tmp_path: Path, episodic: Path, support: Path, form: str) -> None:
    rows = [("a river", "river"), ("some tower", "tower"), ("stone\nbreak", "river")]
    labelled = form != "stdin"
    origin: str | Path = tmp_path / f"new.{form}"
    if form == "csv":
        table(Path(origin), rows)
    elif form == "jsonl":
        Path(origin).write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    elif form == "folder":
        for number, (text, label) in enumerate(rows):
            (Path(origin) / label).mkdir(parents=True, exist_ok=True)
            (Path(origin) / label / f"{number}.txt").write_text(text)
    else:
        origin = "-"
    with mock.patch("sys.stdin", io.StringIO("a river\nsome tower\nstone break\n")):
        outcome = metarun(
            "recipe=predict", f"checkpoint={episodic}", f"support={support}", f"images={origin}", f"outputs={tmp_path}"
        )
    assert outcome.status == 0, outcome.err
    found = predicted(tmp_path)
    assert sorted(row["class"] for row in found) == ["river", "stone", "tower"]
    if labelled:
        (folder,) = tmp_path.glob("predictions/*/result.json")
        assert result(folder.parent)["predict/acc"] == pytest.approx(2 / 3)
        assert "accuracy 66.67% of 3 labelled texts" in outcome.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["items=nowhere.txt"], ["items=nowhere.txt", "no such file", "items=-"]),
        (["items=EMPTY"], ["holds no text"]),
        (["items=BYTES"], ["no text", "bytes"]),
        (["items=ODD"], ["columns one, two, three", "text"]),
        ([], ["items: must be given"]),
        (["items=EMPTY", "images=EMPTY"], ["one of them"]),
        (["items=ODD", "support=ONE"], ["support=", "one class alone"]),
        (["items=ODD", "support=nowhere"], ["support: there is no file or folder"]),
    ],
)
def test_bad_texts_are_one_line(
    tmp_path: Path, episodic: Path, support: Path, words: list[str], told: list[str]
) -> None:
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BYTES").write_bytes(b"\x89PNG\0\xff\0")
    table(tmp_path / "odd.csv", [("a", "b", "c")], "one,two,three")  # type: ignore[list-item]
    table(tmp_path / "one.csv", worded(["river"]))
    places = {"EMPTY": "EMPTY", "BYTES": "BYTES", "ODD": "odd.csv", "ONE": "one.csv"}
    given = [
        f"{key}={tmp_path / places[value] if value in places else value}"
        for key, value in (w.split("=") for w in words)
    ]
    base = [f"support={support}"] if not any(word.startswith("support") for word in given) else []
    outcome = metarun("recipe=predict", f"checkpoint={episodic}", *base, *given, f"outputs={tmp_path}")
    assert outcome.status == 2
    (line,) = [line for line in outcome.said if line.startswith("metarun:")]
    assert all(word in line for word in told), line
    assert not [*tmp_path.glob("predictions/*/predictions.csv")]


def test_from_python(tmp_path: Path, episodic: Path, support: Path) -> None:
    learner = load(episodic)
    texts, labels = (list(column) for column in zip(*worded(["river", "stone"], 2), strict=True))
    classifier = learner.fit(texts, labels)
    assert classifier.predict(["a river", "a stone"]).tolist() == ["river", "stone"]
    assert classifier.predict(np.array(["a river"])).tolist() == ["river"]
    np.testing.assert_allclose(classifier.predict_proba(["a river", "x"]).sum(1), 1)
    assert classifier.score(texts, labels) == 1
    assert learner.fit(support).classes_.tolist() == ["river", "stone", "tower"]
    classifier.save(tmp_path / "classifier.pt")
    kept = load(tmp_path / "classifier.pt").classifier
    np.testing.assert_array_equal(kept.predict_proba(texts), classifier.predict_proba(texts))
    for wrong, told in (
        ("a river", "this is one text"),
        ("a river and a stone / " * 20, "this is one text"),  # longer than the name of any file
        (["a river", "cut \ud83d"], "item 1 holds half of a character"),
        ([b"a river"], "item 0 is bytes, not str"),
        (["a river", " "], "item 1 is empty"),
        ([], "there is none"),
        (3, "int is neither"),
    ):
        with pytest.raises(UserError, match=told):
            classifier.predict(wrong)


def test_a_transfer_run_keeps_a_classifier_of_its_texts(tmp_path: Path) -> None:
    for part in ("train", "test"):
        table(tmp_path / f"data/{part}.csv", [(f"{text} {part}", label) for text, label in worded(WORDS[:3])])
    outcome = metarun(
        "recipe=target_only", "target=text", f"target.data.root={tmp_path / 'data'}", "encoder=tfidf", "backbone=identity",
        "transfer=logistic_regression", "target.repeats=1", f"outputs={tmp_path}", "name=made",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (found,) = tmp_path.glob("made/*/result.json")
    assert result(found.parent)["target/acc"] == 1
    classifier = load(found.parent).classifier
    assert classifier.predict(["one apple", "a cloud"]).tolist() == ["apple", "cloud"]
    assert "items=FILE" in outcome.out
    assert "18 texts, 18 to test" in outcome.out
    assert "over the 18 test texts, Wilson" in outcome.out
    assert (found.parent / "predictions.csv").is_file()
    exported = metarun("recipe=export", f"checkpoint={found.parent}", f"outputs={tmp_path}")
    assert exported.status == 2
    assert "reads texts" in exported.err


def test_a_network_of_texts_is_kept_with_its_weights(tmp_path: Path) -> None:
    """MiniLM with drawn weights, trained a step: predicted again from the file it is the same."""
    for part in ("train", "test"):
        table(tmp_path / f"data/{part}.csv", [(f"{text} {part}", label) for text, label in worded(WORDS[:2], 2)])
    outcome = metarun(
        "recipe=target_only", "target=text", f"target.data.root={tmp_path / 'data'}", "backbone=minilm", "backbone.weights=null",
        "transfer=lora", "transfer.steps=1", "transfer.batch_size=2", "target.repeats=1", f"outputs={tmp_path}", "name=made",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (found,) = tmp_path.glob("made/*/result.json")
    classifier = load(found.parent).classifier
    rows = list(csv.DictReader(io.StringIO((found.parent / "predictions.csv").read_text())))
    assert [row["text"] for row in rows] == [f"{text} test" for text, _ in worded(WORDS[:2], 2)]
    assert classifier.predict([row["text"] for row in rows]).tolist() == [row["prediction"] for row in rows]
