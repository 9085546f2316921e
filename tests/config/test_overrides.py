"""How words of the command line are read: text and paths literally, everything else by Hydra's grammar."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep

from metarun.config.overrides import (
    Reading,
    fixed,
    hint_of,
    is_free,
    quoted,
    read,
    reading,
    settled,
    split,
    unquoted,
    varies,
    written,
)
from metarun.config.types import FilePath, NameOrPath
from metarun.errors import UserError

TEXT, PATH = Reading(text=True), Reading(text=True, path=True)
NAMES = ["résultats", "run=1", "out#1", "my results (1)", "日本語", "it's", 'say "hi"', "a b", " x", "01", "1e3", "true", "null",
         "[a]", "{a}", "a:b", "back\\slash", "end\\", "\\'", "$HOME", "100%", "q?", "a;b", "a&b", "-x", "+x", "@x", "!x", "=",
         "a~b", "1_000", "nan", "x\\\\'y", "(", ")", "choice(1)x"]  # fmt: skip


def value(word: str) -> Any:
    """What Hydra makes of a word."""
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("name", NAMES)
def test_text_and_paths_are_taken_as_typed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they exist or not; reading again changes nothing, and what is written is read back."""
    monkeypatch.chdir(tmp_path)
    for there in (False, True):
        if there:
            (tmp_path / name).mkdir()
        for how, typed, expected in (
            (TEXT, name, name),
            (PATH, name, str(tmp_path / name)),
            (PATH, f"{tmp_path}/{name}/x", f"{tmp_path}/{name}/x"),
        ):
            word = read(f"k={typed}", how)
            assert value(word) == expected
            assert read(word, how) == word
            assert value(read(written(word, how), how)) == expected
            assert value(quoted(expected)[:0] + f"k={quoted(expected)}") == unquoted(quoted(expected)) == expected


def test_home_is_expanded_in_paths_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert value(read("k=~/my images", PATH)) == f"{tmp_path}/my images"
    assert value(read("k='~/my images'", PATH)) == f"{tmp_path}/my images"
    assert value(read("k=~", PATH)) == str(tmp_path)
    assert value(read("k=~/x", TEXT)) == "~/x"
    assert value(read("k=a~/x", PATH)) == os.path.abspath("a~/x")


@pytest.mark.parametrize("word", ["k=${oc.env:HOME}/x", "k=???", "k=", "~k", "k"])
def test_what_stays_as_it_is(word: str) -> None:
    assert read(word, PATH) == word


def test_null_is_text_where_the_key_must_be_given() -> None:
    optional = Reading(text=True, path=True, optional=True)
    assert value(read("k=null", optional)) is None
    assert value(read("k='null'", optional)) == os.path.abspath("null")
    assert value(read("k=null", PATH)) == os.path.abspath("null")


def test_a_name_or_address_stays_and_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.pth").touch()
    how = reading(NameOrPath | None)
    assert how == Reading(text=True, path=True, name=True, optional=True)
    for typed, expected in {
        "IMAGENET1K_V2": "IMAGENET1K_V2",
        "https://a.b/c?d=e": "https://a.b/c?d=e",
        "here.pth": str(tmp_path / "here.pth"),
        "sub/there.pth": str(tmp_path / "sub/there.pth"),
        "~/x": os.path.expanduser("~/x"),
    }.items():
        assert value(read(f"k={typed}", how)) == expected


def swept(word: str) -> list[Any]:
    parsed = OverridesParser.create().parse_override(word)
    return (
        [getattr(item, "text", item) for item in parsed._value.list]
        if isinstance(parsed._value, ChoiceSweep)
        else [parsed.value()]
    )


def test_a_comma_separates_in_a_sweep_unless_the_path_is_there_or_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert swept(read("k=a,b c,it's", PATH, sweep=True)) == [f"{here}/a", f"{here}/b c", f"{here}/it's"]
    assert swept(read("k='a,b',c", PATH, sweep=True)) == [f"{here}/a,b", f"{here}/c"]
    assert swept(read("k=choice(a,~x)", PATH, sweep=True)) == [f"{here}/a", f"{here}/~x"]
    assert value(read("k=a,b", PATH)) == f"{here}/a,b"
    (tmp_path / "a,b").mkdir()
    assert swept(read("k=a,b", PATH, sweep=True)) == [f"{here}/a,b"]
    for word in ("k=range(1,3)", "k=glob(*)"):
        assert read(word, PATH, sweep=True) == word


def test_lists_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, roots = reading(list[str] | None), reading(Annotated[Any, list[FilePath] | FilePath])
    assert value(read("k=[日本語,true,01, a b,'x,y']", names)) == ["日本語", "true", "01", "a b", "x,y"]
    assert value(read("k=cat,dog", names)) == ["cat", "dog"]
    assert value(read("k=[]", names)) == []
    assert swept(read("k=[a,b],[c]", names, sweep=True)) == [["a", "b"], ["c"]]
    assert value(read("k=[a,b]", roots)) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert value(read("k=a=1", roots)) == f"{tmp_path}/a=1"
    (tmp_path / "[a,b]").mkdir()
    assert value(read("k=[a,b]", roots)) == f"{tmp_path}/[a,b]"
    assert value(read("k=5,10", reading(int | list[int] | None))) == [5, 10]
    assert swept(read("k=5,10", reading(int | list[int] | None), sweep=True)) == [5, 10]


def test_readings_of_hints() -> None:
    assert reading(str) == TEXT
    assert reading(Path) == PATH
    assert reading(FilePath) == reading(Annotated[FilePath, "a comment"]) == PATH
    assert reading(Annotated[FilePath | None, "a comment"]) == Reading(text=True, path=True, optional=True)
    assert reading(Annotated[str, "a comment"]) == TEXT
    for hint in (int, float | None, int | str, bool, Any, Literal["a", "b"], dict[str, str], tuple[str, str]):
        assert reading(hint) == Reading()  # by Hydra's grammar
    assert reading(list[int]) == Reading(many=True)


@dataclass
class Inner:
    name: str = ""
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    data: dict[str, Any] = field(default_factory=dict)
    outputs: FilePath = "outputs"


class Mine:
    """A user's own data set."""

    def __init__(self, *, photos: Path, side: int = 3) -> None:
        pass


def test_hints_come_from_the_schema_and_from_signatures() -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.create({"_target_": f"{__name__}.Mine"})
    asked = []

    def nodes(path: str) -> Any:
        asked.append(path)
        return node

    hints = {
        key: hint_of(key, nodes, Outer)
        for key in ("outputs", "inner.name", "nowhere", "inner.nowhere", "a.b.c", "data.x.y")
    }
    assert hints == {"outputs": FilePath, "inner.name": str, **dict.fromkeys(list(hints)[2:], Any)}
    assert asked == ["data.x"]  # which may be a node of its own
    assert hint_of("data.photos", nodes, Outer) is Path
    assert hint_of("inner.own.side", nodes, Outer) is int
    assert asked == ["data.x", "data", "inner.own"]
    assert [is_free(key, Outer) for key in ("data.x", "inner.own.x", "outputs", "inner.name", "data.x.y", "data")] == [
        True, True, False, False, True, False,
    ]  # fmt: skip
    node._target_ = "nowhere.Mine"
    assert hint_of("data.photos", nodes, Outer) is Any


@pytest.mark.parametrize(
    "word", ["k=5", "k=-0.1", "k=true", "k=null", "k=abc", "k=/a/b-c.d", "k=[1,2]", "k='a b'", "k={a:1}"]
)
def test_what_hydra_reads_as_it_stands_needs_no_type(word: str) -> None:
    assert settled(word, False)


@pytest.mark.parametrize(
    "word", ["k=~/x", "k=1e3", "k=1_000", "k=é", "k=a,b", "k=a b(", "k=[1e3]", "k=a\\,b", "k=True"]
)
def test_what_hydra_reads_otherwise_needs_the_type(word: str) -> None:
    assert not settled(word, False)


def test_split() -> None:
    assert split("a, b,[c,d],'e,f',(g,h)") == ["a", "b", "[c,d]", "'e,f'", "(g,h)"]
    assert split("it's,b") == ["it's", "b"]
    assert split("['a,b','c'],'d\\',e'") == ["['a,b','c']", "'d\\',e'"]


def test_a_fixed_word_is_a_sweep_over_one_value() -> None:
    for word, expected in {"a.b=1": 1, "+a.b=[1,2]": [1, 2], "a.b='x, y'": "x, y", "a.b={c:d}": {"c": "d"}}.items():
        parsed = OverridesParser.create().parse_override(fixed(word))
        assert swept(fixed(word)) == [expected]
        assert not varies(parsed)
    for word in ("a.b=1,2", "a.b=range(1,3)"):
        assert fixed(word) == word
        assert varies(OverridesParser.create().parse_override(word))
    assert fixed("~a.b") == "~a.b"


def test_an_address_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("outputs=s3://bucket/runs", "outputs=file:///tmp/x"):
        with pytest.raises(UserError, match=r"://.*: is an address, where a file or a folder of this machine is meant"):
            read(word, Reading(text=True, path=True))
    assert read("weights=s3://bucket/x", Reading(text=True, path=True, name=True)) == "weights='s3://bucket/x'"
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    assert str(tmp_path / "s3:" / "bucket") in read("outputs=s3://bucket", Reading(text=True, path=True))
