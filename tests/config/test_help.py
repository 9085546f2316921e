"""`metarun help`: every key of the schema and every choice of every group is explained, in 80 columns and without torch."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import compose
from omegaconf import OmegaConf
from shell import metarun

from metarun.config import check
from metarun.config.folder import CONF
from metarun.config.help import answer
from metarun.config.ranges import check_value, shown
from metarun.config.reference import Choice, Entry, Reference, sections, shared_keys
from metarun.config.schema import Config
from metarun.config.signature import ABSENT
from metarun.config.validation import settings
from metarun.errors import ELSEWHERE, nearest

REFERENCE = Reference([CONF])
CHOICES = [choice for choices in REFERENCE.groups.values() for choice in choices.values()]


def entries() -> Iterator[tuple[str, Entry]]:
    """Every key with where it is explained: the schema, or a choice."""
    yield from (("schema", entry) for entry in REFERENCE.keys.values())
    yield from ((f"{choice.group}={choice.name}", entry) for choice in CHOICES for entry in choice.entries())


def required(choice: Choice) -> list[str]:
    """The keys that must be given with a choice."""
    return [entry.key for entry in choice.entries() if entry.default is ABSENT]


def fits(text: str) -> None:
    """80 columns, no verbatim markup of Python, nothing missing."""
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"typing|Annotated|<class|object at|None\b|\bFalse\b|\bTrue\b", text), text


def test_every_file_of_a_group_is_a_choice() -> None:
    files = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")}
    assert {f"{choice.group}/{choice.name}" for choice in CHOICES} == files - {"config"}


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("preset=paper", "Takes the one of these that is for the method and the data"),
        ("algo=learn2learn", "A folder of choices"),
    ],
)
def test_a_folder_of_choices_lists_them(word: str, meaning: str) -> None:
    text = answer([word], REFERENCE)
    fits(text)
    assert text.startswith(f"{word}\n  {meaning}")
    group, _, name = word.partition("=")
    assert re.findall(rf"^  {group}=({name}/\S+)", text, re.M) == [
        choice for choice in REFERENCE.groups[group] if choice.startswith(f"{name}/")
    ]


@pytest.mark.parametrize("key", [*REFERENCE.keys, *sections()])
def test_every_key_of_the_schema_is_explained(key: str) -> None:
    text = answer([key], REFERENCE)
    fits(text)
    assert text.splitlines()[0] == key
    if key in REFERENCE.keys and key not in REFERENCE.groups:
        entry = REFERENCE.keys[key]
        assert entry.meaning
        assert entry.meaning[0].isupper()
        assert entry.meaning.endswith(".")


@pytest.mark.parametrize("word", sorted(word for word, named in ELSEWHERE.items() if {*named} & {*REFERENCE.words}))
def test_words_of_other_programs_lead_to_a_key(word: str) -> None:
    near = nearest(word.replace("_", "-"), REFERENCE.words)
    assert {*ELSEWHERE[word]} & {*re.findall(r"[\w./]+", near)}, near


def test_no_key_of_the_schema_is_missing() -> None:
    composed = OmegaConf.structured(Config)
    assert {key for key, _ in settings(Config)} <= set(REFERENCE.keys)
    for key in REFERENCE.keys.keys() - shared_keys().keys():
        parent, _, name = key.rpartition(".")
        assert name in list(OmegaConf.select(composed, parent) if parent else composed)


@pytest.mark.parametrize("group", REFERENCE.groups)
def test_every_group_is_explained_and_lists_its_choices(group: str) -> None:
    text = answer([group], REFERENCE)
    fits(text)
    assert REFERENCE.meaning(group).endswith(".")
    for choice in REFERENCE.groups[group].values():
        assert f"{group}={choice.name}" in text.split()


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.group}={choice.name}")
def test_every_choice_is_explained_with_every_setting(choice: Choice) -> None:
    text = answer([f"{choice.group}={choice.name}"], REFERENCE)
    fits(text)
    assert choice.meaning
    assert choice.command.startswith("metarun")
    words = text.split()
    for key, node, signature in choice.nodes:
        assert signature is not None
        names = {one.name for one in signature.settings} | {name for name in node if not name.startswith("_")}
        for name in names:
            if not isinstance(node.get(name), dict) or name == "rates":
                assert f"{key}.{name}" in words
    for entry in choice.entries():
        assert entry.meaning.endswith("."), entry.key
        assert entry.meaning[0].isupper(), entry.key


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.group}={choice.name}")
def test_every_setting_of_a_choice_can_be_asked_for(choice: Choice) -> None:
    for entry in choice.entries():
        text = answer([entry.key], REFERENCE)
        fits(text)
        assert choice.name in re.split(r"[\s,:=]+", text)


@pytest.mark.parametrize("where", ["schema", *(f"{choice.group}={choice.name}" for choice in CHOICES)])
def test_examples_are_values_that_the_checker_takes(where: str) -> None:
    for origin, entry in entries():
        if origin == where and not isinstance(entry.hint, str):
            check_value(
                entry.key, OmegaConf.to_container(OmegaConf.create(f"value: {entry.example}"))["value"], entry.hint
            )


def test_defaults_are_those_of_the_config() -> None:
    for words in (["algo=maml"], ["algo=fomaml"], ["data=omniglot"], ["algo=l2l"]):
        config = compose(*words)
        (word,) = words
        group, _, name = word.partition("=")
        for entry in REFERENCE.groups[group][name].entries():
            value = OmegaConf.select(config, entry.key)
            assert shown(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value) == shown(entry.default)


def test_a_key_says_meaning_type_unit_range_default_and_example() -> None:
    assert metarun("help", "train.validate_every").out.splitlines()[:7] == [
        "train.validate_every",
        "  The steps from one validation to the next.",
        "  Type                    int",
        "  Range                   at least 1",
        "  Unit                    steps",
        "  Default                 200",
        "  Example                 metarun train.validate_every=400",
    ]


@pytest.mark.parametrize(
    ("key", "example"),
    [
        ("test.views", "metarun augment=standard test.views=2"),
        ("encoder.views", "metarun encoder=efficientnet_lite0 encoder.views=2"),
        ("task.distractors", "metarun task.unlabelled=5 task.distractors=1"),
        ("train.validate_on", "metarun algo=baseline train.validate_on=images"),
        ("task.ways", "metarun task.ways='[2, 5]'"),  # a task of one way is refused
        ("target.repeats", "metarun recipe=transfer target=pneumoniamnist target.repeats=20"),
        ("continual.images", "metarun recipe=continual algo=oml data=omniglot continual.images=30"),
        ("int8", "metarun recipe=export checkpoint=outputs/RUN int8=true"),
    ],
)
def test_an_example_has_what_its_key_needs_beside_it(key: str, example: str) -> None:
    shown = " ".join(metarun("help", key).out.split())
    assert shown.endswith(f" Example {example}")
    composed = metarun(*shlex.split(example)[1:], "--cfg", "job")
    assert composed.status == 0, composed.err


def test_an_example_of_the_run_that_encodes_has_the_choice_that_takes_one() -> None:
    assert "metarun encoder=run encoder.from=outputs/RUN" in " ".join(answer(["encoder.from"], REFERENCE).split())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("data.labels", ["data=folder", "data.root=/path/to/images", "data.labels=NAME"]),
        ("data.value_range", ["data=folder", "data.root=/path/to/images", "data.value_range=[0, 255]"]),
        ("data.shares", [*shlex.split(REFERENCE.groups["data"]["domains"].command)[1:], "data.shares=[2, 1]"]),
        ("encoder.stored", ["encoder=run", "encoder.from=outputs/RUN", "data=caltech101", "encoder.stored={NAME: 1}"]),
        ("data.sets", shlex.split(REFERENCE.groups["data"]["domains"].command)[1:]),
        (
            "target.data.value_range",
            ["recipe=transfer", "target=folder", "target.data.root=/path/to/it", "target.data.value_range=[0, 255]"],
        ),
        ("pretrain.algo.cosine", ["recipe=pretrain_meta", "pretrain.algo.cosine=true"]),
    ],
)
def test_an_example_of_a_choices_key_would_run(key: str, words: list[str]) -> None:
    assert shlex.split(answer([key], REFERENCE).rpartition("Example: metarun ")[2]) == words


@pytest.mark.parametrize("choice", [one for one in CHOICES if required(one)], ids=lambda one: f"{one.group}={one.name}")
def test_an_example_gives_every_key_that_its_choice_needs(choice: Choice) -> None:
    """A key's example is of one choice that has it, so that a choice whose keys others have too may be in none."""
    keys = {entry.key for entry in choice.entries()}
    parted = [answer([key], REFERENCE).rpartition("\n  Example: metarun ") for key in keys]
    commands = [shlex.split(command) for _, told, command in parted if told]
    own = [words for words in commands if f"{choice.group}={choice.name}" in words]
    assert own or keys <= {entry.key for other in CHOICES if other is not choice for entry in other.entries()}
    for words in own:
        composed = compose(*words)
        check(composed)
        assert all(OmegaConf.select(composed, needed) for needed in required(choice)), words


def test_a_key_of_several_choices_says_what_it_is_in_each() -> None:
    text = metarun("help", "algo.inner_lr").out
    assert re.search(r"algo=.*fomaml, maml.*: float, at least 0, default 0.5", text)
    assert re.search(r"algo=protomaml: float, at least 0, default 0.01", text)
    assert "target.data.root" in metarun("help", "target.data.root").out
    assert "pretrain.algo.cost" in metarun("help", "pretrain.algo.cost").out


def test_the_overview_names_every_group_and_key() -> None:
    text = metarun("help").out
    fits(text)
    names = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()}
    assert set(REFERENCE.groups) <= names
    assert {key for key in REFERENCE.keys if not key.startswith("pretrain.train.")} <= names
    assert "metarun help" in metarun("--help").out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian.steps", "help trian.steps: there is no such key or group; did you mean train.steps"),
        ("inner_lr", "help inner_lr: there is no such key or group; did you mean algo.inner_lr?"),
        ("algo=mmal", "help algo=mmal: there is no such choice; did you mean maml"),
        ("algos=maml", "help algos=maml: there is no group algos; did you mean algo?"),
        ("tim", "help tim: there is no such key or group; did you mean algo=tim?"),
        ("mtl", "help mtl: there is no such key or group; did you mean algo=mtl or approach=mtl?"),
        ("wraper", "help wraper: there is no such key or group; did you mean wrapper"),
        ("finetune", "help finetune: is called transfer now"),
        ("recipe=adapt", "recipe=adapt: is called recipe=domain_adaptation now"),
        ("zzz", "help zzz: there is no such key or group"),
    ],
)
def test_an_unknown_word_gets_the_nearest(word: str, message: str) -> None:
    done = metarun("help", word)
    assert (done.status, done.out) == (2, "")
    (line,) = done.said
    assert line.startswith(f"metarun: {message}")


def test_several_words_and_a_value_are_answered() -> None:
    text = metarun("help", "seed", "train.steps=3").out
    assert text.startswith("seed\n")
    assert "\n\ntrain.steps\n" in text


def test_choices_of_the_users_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / "mine_to_explain.py").write_text(
        "from annotated_types import Gt\nfrom typing import Annotated\nimport nowhere\n\n\nclass Mine:\n"
        '    """Mine.\n\n    Args:\n        warmth: How warm it is.\n    """\n\n'
        "    def __init__(self, backbone, spec, *, warmth: Annotated[float, Gt(2)] = 3.0):\n        pass\n"
    )
    (tmp_path / "conf" / "algo" / "mine.yaml").write_text(
        "# @package _global_\n# A method of mine; metarun algo=mine\nalgo:\n  _target_: mine_to_explain.Mine\n"
    )
    monkeypatch.chdir(tmp_path)
    for words in (
        ["help", "--config-dir", "conf", "algo=mine"],
        ["help", "algo=mine", "--config-dir=conf"],
        ["--config-dir", "conf", "help", "algo=mine"],
        ["--config-dir=conf", "help", "algo=mine"],
    ):
        text = metarun(*words).out
        assert "A method of mine." in text
        assert "algo.warmth\n      How warm it is.\n      float, above 2, default 3\n" in text
    assert "algo=maml" in metarun("help", "--config-dir", "conf", "algo").out


def test_a_node_inside_of_a_choices_settings_lists_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / "nested_to_explain.py").write_text(
        'class Inner:\n    """Inner.\n\n    Args:\n        power: How strong.\n    """\n\n'
        "    def __init__(self, *, power: float = 2.0):\n        pass\n\n\n"
        'class Outer:\n    """Outer."""\n\n    def __init__(self, backbone, spec, *, inner: Inner):\n        pass\n'
    )
    (tmp_path / "conf" / "algo" / "nested.yaml").write_text(
        "# @package _global_\n# Nested\nalgo:\n  _target_: nested_to_explain.Outer\n  inner: {_target_: nested_to_explain.Inner}\n"
    )
    monkeypatch.chdir(tmp_path)
    text = metarun("--config-dir", "conf", "help", "algo.inner").out
    assert text == "algo.inner\n\n  algo.inner.power\n      How strong.\n      float, default 2\n"


def test_a_choice_of_the_users_needs_no_command_in_its_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "algo/warm.yaml": "# Warm MAML.\ndefaults:\n  - maml\n  - _self_\n",
        "algo/bare.yaml": "inner_lr: 1\n",
        "hydra/launcher/mine.yaml": "# Mine\n_target_: x.Y\n",
        "mood/good.yaml": "# @package _global_\n# A good one\nseed: 3\n",
    }.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    for choice, told in {
        "algo=warm": ["Warm MAML.", "It brings algo=maml.", "Example: metarun algo=warm"],
        "algo=bare": ["It sets algo.inner_lr=1.", "Example: metarun algo=bare"],
        "hydra/launcher=mine": ["Mine.", "Example: metarun -m hydra/launcher=mine"],
        "mood=good": ["A good one.", "It sets seed=3.", "Example: metarun +mood=good"],
    }.items():
        lines = metarun("--config-dir", "conf", "help", choice).out.splitlines()
        assert [line.strip() for line in lines if line.strip()] == [choice, *told]
    shown = metarun("--config-dir", "conf", "+mood=good", "--cfg", "job", "--package", "seed")
    assert shown.out.strip() == "3"


def test_the_page_of_the_configs_is_current() -> None:
    """`python -m scripts.config_reference` writes it; every group and key stands in it."""
    from scripts.config_reference import PAGE, page

    assert PAGE.read_text() == page(), "conf/README.md is not current: python -m scripts.config_reference"
    text = PAGE.read_text()
    assert all(f"`{key}`" in text for key in REFERENCE.keys if not key.startswith("pretrain.train."))
    assert all(f"| `{entry.key}` |" in text for _, entry in entries() if not entry.key.startswith("pretrain.train."))


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "most"), [("40", 40), ("200", 80), ("3", 20)])
def test_help_is_as_wide_as_a_narrow_terminal(columns: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", Screen())
    for words in ([], ["algo"], ["train.steps"]):
        lines = answer(words, REFERENCE).splitlines()
        whole = ("metarun ", "Groups (", "Keys (")  # a command, and headings
        broken = [line for line in lines if len(line) > most and len(line.split()) > 1 and not line.startswith(whole)]
        assert not broken
        assert max(map(len, lines)) > most - 10
