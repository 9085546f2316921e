"""The config: ranges in signatures and schema, settings that YAML leaves unsaid, and signatures read from source."""

from __future__ import annotations

import inspect
import math
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
import pytest
import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from shell import metarun

from metarun import config as schema
from metarun.backbones.mlp import MLP
from metarun.cli import PLUGINS
from metarun.config.folder import CONF
from metarun.config.ranges import check_value, limits
from metarun.config.schema import Config
from metarun.config.signature import ABSENT, UNKNOWN, arguments_of, read
from metarun.config.types import DropRate, Ge, Given, Gt, Interval, Len, PositiveInt, Seed, Share
from metarun.config.validation import check_target, given_to, hints_of, settings
from metarun.core import Spec
from metarun.errors import UserError

YAMLS = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))


def compose(*overrides: str, config_dir: Path | None = None) -> DictConfig:
    """The config that a command line makes, with the choices of a folder besides ours."""
    search = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=[*search, *overrides])


def nodes(values: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes with a `_target_` in plain values, each with its dotted key."""
    if isinstance(values, dict):
        if isinstance(values.get("_target_"), str):
            yield path, values
        for key, value in values.items():
            yield from nodes(value, f"{path}.{key}".strip("."))


def targets() -> list[str]:
    """What the YAML files name, and can be configured by keyword-only settings."""
    named = {node["_target_"] for name in YAMLS for _, node in nodes(yaml.safe_load((CONF / name).read_text()))}
    return sorted(target for target in named if target.split(".")[0] in ("metarun", "hydra_plugins"))


# Ranges


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (0, Annotated[int, Ge(1)], "key=0: must be at least 1"),
        (-1, Annotated[float, Gt(0)], "key=-1: must be above 0"),
        (0.0, Annotated[float, Gt(0)], "key=0: must be above 0"),
        (1, DropRate, "key=1: must be at least 0 and below 1"),
        (1.5, Share, "key=1.5: must be from 0 to 1"),
        (1, Annotated[float, Interval(gt=0, lt=1)], "key=1: must be above 0 and below 1"),
        (math.nan, Share, "key=nan: must be a finite number, from 0 to 1"),
        (math.nan, float, "key=nan: must be a finite number"),
        (math.inf, Annotated[float, Ge(0)], "key=inf: must be a finite number, at least 0"),
        (-math.inf, Annotated[float, Ge(0)] | None, "key=-inf: must be a finite number, at least 0"),
        (2**63, Seed, r"key=9223372036854775808: must be at least 0 and below 2\*\*63"),
        (-1, Seed, "key=-1: must be at least 0 and below"),
        (2**63, int, r"key=9223372036854775808: must be below 2\*\*63"),
        (-(2**70), int, r"must be at least -2\*\*63"),
        (10**400, float, "must be of type float"),
        (True, PositiveInt, "key=true: must be of type int"),
        (2.5, PositiveInt, "key=2.5: must be of type int"),
        (None, Annotated[float, Gt(0)], "key=null: must be of type float"),
        ("many", PositiveInt | None, "key=many: must be of type int or null"),
        (0, PositiveInt | None, "key=0: must be at least 1"),
        ("pol", Literal["pool", "stride"], r"key=pol: is not one of pool, stride; did you mean pool\?"),
        ("pol", Annotated[str, Literal["pool", "stride"]], "key=pol: is not one of pool, stride"),
        (2, Literal[1, 3] | None, "key=2: is not one of 1, 3"),
        (True, Literal[1, 3], "key=true: is not one of 1, 3"),
        ([4, 0], list[PositiveInt], r"key=\[4, 0\]: each must be at least 1"),
        ([], Annotated[list[PositiveInt], Len(1)], r"key=\[\]: must have at least 1 value"),
        ([1, 2], Annotated[list[PositiveInt], Len(3, 3)], r"key=\[1, 2\]: must have 3 values"),
        (0, PositiveInt | Annotated[list[PositiveInt], Len(1)] | None, r"^key=0: must be at least 1$"),
        ([4, 0], Annotated[Any, PositiveInt | list[PositiveInt]], r"^key=\[4, 0\]: each must be at least 1$"),
        ("a", Annotated[Any, PositiveInt | list[PositiveInt]], "^key=a: must be of type int or list of int$"),
        ([1, "a"], list[int], r"key=\[1, a\]: must be of type list of int"),
        ({"adm": 1}, dict[Literal["sgd", "adam"], float], r"key.adm: is not one of sgd, adam; did you mean adam\?"),
        ({"sgd": -1}, dict[str, Annotated[float, Ge(0)]], "key.sgd=-1: must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_value("key", value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, Annotated[float, Gt(0)], 1.0),
        (0, Seed, 0),
        (2**63 - 1, Seed, 2**63 - 1),
        (None, PositiveInt | None, None),
        (1, Share, 1.0),
        ([1, 2.5], list[float], [1.0, 2.5]),
        ("support", Literal["support", "query"], "support"),
        (3, Literal[1, 3] | None, 3),
        ("x", Any, "x"),
    ],
)
def test_values_in_range_are_taken_as_their_type(value: Any, hint: Any, right: Any) -> None:
    found = check_value("key", value, hint)
    assert (found, type(found)) == (right, type(right))


def test_a_range_is_said_as_it_is_checked() -> None:
    assert list(limits(Share)) == ["from 0 to 1"]
    assert list(limits(Annotated[list[PositiveInt], Len(1)] | None)) == ["at least 1 value", "each at least 1"]
    assert list(limits(Literal["a", "b"])) == ["one of a, b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seed=-1", "seed=-1: must be at least 0"),
        ("seed=9223372036854775808", r"seed=9223372036854775808: must be at least 0 and below 2\*\*63"),
        ("train.max_seconds=nan", "train.max_seconds=nan: must be a finite number"),
        ("+train.optimizer.eps=inf", "train.optimizer.eps=inf: must be a finite number"),
        ("+train.optimizer.betas=[0.9,-inf]", r"train.optimizer.betas=\[0.9, -inf\]: each must be a finite number"),
        ("train.max_seconds=inf", "train.max_seconds=inf: must be a finite number"),
        ("train.noise.tasks=1.5", r"train.noise.tasks=1.5: must be from 0 to 1"),
        ("pretrain.train.steps=-1", "pretrain.train.steps=-1: must be at least 0"),
        ("algo=maml algo.inner_lr=-1", "algo.inner_lr=-1: must be at least 0"),
        ("algo=maml algo.inner_lr=nan", "algo.inner_lr=nan: must be a finite number"),
        ("algo=snail algo.keys=[64,0,512]", r"algo.keys=\[64, 0, 512\]: each must be at least 1"),
        ("recipe=distill pretrain.algo.cost=0", "pretrain.algo.cost=0: must be above 0"),
        ("train.steps=18446744073709551616", r"train.steps=18446744073709551616: must be below 2\*\*63"),
        ("data=mnist data.channels=2", "data.channels=2: is not one of 1, 3"),
        ("backbone.norm=btch", r"backbone.norm=btch: is not one of .*; did you mean batch\?"),
        ("recipe=transfer target=digits transfer.layer_decay=0", "transfer.layer_decay=0: must be above 0"),
    ],
)
def test_the_config_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        schema.check(compose(*words.split()))
    assert "\n" not in str(caught.value)


OWN = '''
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated, Literal
from annotated_types import Ge, Interval
from metarun.algos.protonet import ProtoNet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from metarun.core import Backbone, Spec
    from numpy import ndarray


class Mine(ProtoNet):
    """ProtoNet with a temperature.

    Args:
        temperature: What distances are divided by.
        mode: The way
            that is taken.
    """

    def __init__(self, backbone: Backbone, spec: Spec, *, temperature: Annotated[float, Interval(ge=1, lt=3)] = 2,
                 mode: Literal["one", "two"] = "one", count: Annotated[int, Ge(2)], bounds: Sequence[float] = (),
                 anything: ndarray = None):
        super().__init__(backbone, spec)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}.Mine"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("temperature=3", "algo.temperature=3: must be at least 1 and below 3"),
        ("mode=tow", r"algo.mode=tow: is not one of one, two; did you mean two\?"),
        ("count=1", "algo.count=1: must be at least 2"),
        # By what its module imports for type checkers alone.
        (
            "bounds=[a]",
            r"algo.bounds=\[a\]: must be of type list of float",
        ),
        ("cuont=3", r"algo.cuont: Mine has no such setting; did you mean algo\.count\?"),
        ("backbone=conv4", "algo.backbone: Mine has no such setting"),
    ],
)
def test_a_class_of_the_users_is_checked_by_its_signature(own: str, setting: str, message: str) -> None:
    words = [] if setting.startswith("count") else ["+algo.count=2"]
    with pytest.raises(UserError, match=f"^{message}"):
        schema.check(compose(f"algo._target_={own}", *words, f"+algo.{setting}"))


def test_a_choice_of_the_users_is_completed_by_its_signature(own: str, tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text(f"# @package _global_\nalgo:\n  _target_: {own}\n")
    found = compose("algo=mine", "algo.temperature=1.5", "algo.count=4", config_dir=tmp_path).algo
    rest = {"bounds": [], "anything": None}
    assert dict(found) == {"_target_": own, "temperature": 1.5, "mode": "one", "count": 4, **rest}
    with pytest.raises(UserError, match=r"^algo.count: must be given \(algo.count=...\)"):
        schema.check(compose("algo=mine", config_dir=tmp_path))
    assert own.split(".")[0] not in sys.modules or get_class(own)


def test_a_default_that_is_no_literal_is_left_to_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"computed_{tmp_path.name}"
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / f"{name}.py").write_text(
        "from metarun.algos.protonet import ProtoNet\n\n\ndef half():\n    return 0.5\n\n\nclass Turned(ProtoNet):\n"
        '    """ProtoNet.\n\n    Args:\n        angle: How far.\n        scale: How much.\n    """\n\n'
        "    def __init__(self, backbone, spec, *, angle: float = half(), scale: float = 2.0):\n"
        "        super().__init__(backbone, spec)\n        self.angle = angle\n"
    )
    (tmp_path / "conf" / "algo" / "turned.yaml").write_text(
        f"# @package _global_\n# Turned\nalgo:\n  _target_: {name}.Turned\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = compose("algo=turned", config_dir=tmp_path / "conf")
    assert dict(found.algo) == {"_target_": f"{name}.Turned", "scale": 2.0}
    assert schema.check(found) is None
    assert compose("algo=turned", "+algo.angle=1.5", config_dir=tmp_path / "conf").algo.angle == 1.5
    assert (
        "How far.\n      float, default that of the class\n"
        in metarun("--config-dir", "conf", "help", "algo=turned").out
    )


HANDED_ON = '''
from metarun.algos.maml import MAML
from metarun.config.types import PositiveInt


class Wide(MAML):
    """MAML with a width.

    Args:
        width: The width.
    """

    def __init__(self, backbone, spec, *, width: PositiveInt = 2, **settings):
        super().__init__(backbone, spec, first_order=True, **settings)


class Wider(Wide):
    def __init__(self, *args, height: PositiveInt = 3, **others):
        super().__init__(*args, **others)


class Open(MAML):
    def __init__(self, backbone, spec, **settings):
        super().__init__(backbone, spec)
        self.settings = settings


class Popping(MAML):
    def __init__(self, backbone, spec, **settings):
        self.width = settings.pop("width", 2)
        settings.setdefault("inner_steps", 7)
        super().__init__(backbone, spec, **settings)


class Beside(MAML):
    def __init__(self, backbone, spec, **settings):
        super().__init__(backbone, spec, **{"first_order": True}, **settings)


class Heir(Open):
    pass


class Anything:
    def __init__(self, *args, **settings):
        self.settings = settings


class HeirOfAnything(Anything):
    pass


class Left(MAML):
    def __init__(self, *args, left=1, **others):
        super().__init__(*args, **others)


class Right(MAML):
    def __init__(self, *args, right=1, **others):
        super().__init__(*args, **others)


class Both(Left, Right):
    pass


class Closed(MAML):
    def __init__(self, *args, height=3):
        super().__init__(*args)


class Mistaken(MAML):
    def __init__(self, *args, height=3):
        super().__init__(*args, height=height)
'''


@pytest.fixture
def handing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"handing_on_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(HANDED_ON)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_settings_that_a_class_hands_on_are_its_own_too(handing_on: str, tmp_path: Path) -> None:
    """But for `first_order`, which `Wide` gives itself."""
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "wider.yaml").write_text(
        f"# @package _global_\nalgo:\n  _target_: {handing_on}.Wider\n  width: 4\n"
    )
    found = compose("algo=wider", "algo.inner_steps=5", config_dir=tmp_path)
    rest = {"inner_lr": 0.5, "test_inner_steps": None, "recompute": False}
    assert dict(found.algo) == {
        "_target_": f"{handing_on}.Wider",
        "height": 3,
        "width": 4,
        "inner_steps": 5,
        **rest,
    }
    schema.check(found)
    signature = read(f"{handing_on}.Wider")
    assert signature is not None
    assert signature.meanings["width"] == "The width."
    assert signature.meanings["inner_lr"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("inner_stepz=3", r"algo.inner_stepz: Wider has no such setting; did you mean algo\.inner_steps"),
        ("first_order=true", "algo.first_order: Wider has no such setting"),
        ("inner_lr=fast", "algo.inner_lr=fast: must be of type float"),
        ("width=0", "algo.width=0: must be at least 1"),
    ],
)
def test_settings_that_a_class_hands_on_are_checked(handing_on: str, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        schema.check(compose(f"algo._target_={handing_on}.Wider", f"+algo.{setting}"))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("Open", "anything=3"),
        ("Popping", "width=3"),
        ("Beside", "inner_steps=3"),
        ("Heir", "anything=3"),
        ("HeirOfAnything", "anything=3"),
        ("Both", "right=3"),
        ("Closed", "height=4"),
    ],
)
def test_settings_that_go_elsewhere_are_not_guessed(handing_on: str, name: str, setting: str) -> None:
    schema.check(compose(f"algo._target_={handing_on}.{name}", f"+algo.{setting}"))


@pytest.mark.parametrize("name", ["Popping", "Beside"])
def test_a_class_that_changes_what_it_hands_on_keeps_its_own_defaults(handing_on: str, name: str) -> None:
    signature = read(f"{handing_on}.{name}")
    assert signature is not None
    assert signature.settings == ()


def test_a_setting_that_a_class_has_and_hands_on_wrongly_is_the_fault_of_the_class(handing_on: str) -> None:
    node = OmegaConf.create({"_target_": f"{handing_on}.Mistaken", "height": 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'height'"):
        schema.construct(node, "algo")


def refusing(**settings: Any) -> Any:
    """What an object of another library is built by, which says late what it does not know."""
    return MLP((2,), **settings)


def test_a_setting_that_a_library_does_not_know_is_refused() -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.refusing", "widht": 3})
    with pytest.raises(UserError, match=rf"^backbone.widht: {__name__}.refusing has no such setting"):
        schema.construct(node, "backbone")


def test_types_that_are_there_for_type_checkers_alone(own: str) -> None:
    hints = hints_of(get_class(own))
    assert (hints["bounds"], hints["backbone"], hints["anything"]) == (Sequence[float], Any, Any)
    assert hints["count"] == Annotated[int, Ge(2)]  # beside which all else is as it was
    backbone, spec = MLP(input_shape=(2,)), Spec((2,), "classification", 2)
    with pytest.raises(UserError, match="must be at least 2"):
        get_class(own)(backbone, spec, count=1)


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ({"milestones": [2, 4]}, ""),
        ({"milestones": [2.5]}, r"milestones=\[2.5\]: must be of type list of int"),
        ({}, r"milestones: must be given \(\+train.schedule.milestones=...\)"),  # the node has no such key yet
    ],
)
def test_a_schedule_whose_module_imports_types_for_type_checkers_alone(
    milestones: dict[str, Any], message: str
) -> None:
    node = OmegaConf.create({"_target_": "torch.optim.lr_scheduler.MultiStepLR", **milestones})
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_target(node, "train.schedule", Given(("optimizer",)))


@pytest.mark.parametrize(
    ("path", "saying"),
    [
        ("algo", "algo=NAME chooses one"),
        ("train.optimizer", "optimizer=NAME chooses one"),
        ("target.data", "target=NAME chooses one"),
        ("hydra.launcher", "hydra/launcher=NAME chooses one"),
        ("pretrain.algo", "- /algo@pretrain: NAME, among the defaults"),
    ],
)
@pytest.mark.parametrize("node", [{"steps": 1}, {"_target_": None}])
def test_a_node_without_a_class_is_told_what_chooses_one(path: str, saying: str, node: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: has no _target_ .*; {re.escape(saying)}"):
        check_target(OmegaConf.create(node), path, Given())


def test_a_class_that_does_not_say_its_settings_is_refused() -> None:
    with pytest.raises(UserError, match=r"^algo._target_=builtins.int: does not say what settings it has"):
        schema.check(compose("algo._target_=builtins.int"))


# One place for each fact


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_repeats_no_default(name: str) -> None:
    assert PLUGINS in sys.path  # where Hydra, and the reader of signatures, find the sweeper
    for path, node in nodes(yaml.safe_load((CONF / name).read_text())):
        signature = read(node["_target_"])
        assert signature is not None, node["_target_"]
        defaults = {one.name: one.default for one in signature.settings}
        same = [key for key, value in node.items() if key in defaults and value == defaults[key]]
        assert same == [], f"{path}: {', '.join(same)} only repeat the default of {signature.name}"


@pytest.mark.parametrize("target", targets())
def test_signatures_read_from_source_are_those_that_python_sees(target: str) -> None:
    signature, cls = read(target), get_class(target)
    assert signature is not None
    hints = hints_of(cls)
    found = inspect.signature(cls).parameters
    assert [one.name for one in signature.parameters] == list(found)
    for one in signature.parameters:
        default = found[one.name].default
        assert one.default == (list(default) if isinstance(default, tuple) else default)
        assert one.keyword_only == (found[one.name].kind is inspect.Parameter.KEYWORD_ONLY)
        if one.keyword_only and not isinstance(one.hint, str):
            assert list(limits(one.hint)) == list(limits(hints[one.name]))


@pytest.mark.parametrize("target", targets())
def test_settings_are_keyword_only_and_say_what_they_mean(target: str) -> None:
    """What the builder hands in is positional, without a default other than None; each setting has a default or is asked for."""
    signature = read(target)
    assert signature is not None
    assert signature.summary
    keyword_only = [one for one in signature.parameters if one.keyword_only]
    assert list(signature.settings) == keyword_only
    assert [one.name for one in keyword_only if one.default is UNKNOWN] == []
    assert {one.name for one in keyword_only} <= set(signature.meanings), f"{target}: Args: lacks a setting"
    assert all(signature.meanings[one.name].endswith((".", "...")) for one in keyword_only)
    stale = set(signature.meanings) - {one.name for one in signature.parameters}
    assert stale == set()


def test_numbers_have_ranges() -> None:
    """Every integer and float that can be configured, but for biases, which may be any number."""
    free = {"forget_bias", "input_bias"}
    unbounded = [
        f"{target}: {one.name}"
        for target in targets()
        for one in read(target).settings  # type: ignore[union-attr]
        if one.name not in free and not isinstance(one.hint, str)
        if typing.get_origin(one.hint) is None and one.hint in (int, float)
    ]
    assert unbounded == []


@pytest.mark.parametrize(
    "words",
    [f"{group}={path.relative_to(CONF / group).with_suffix('').as_posix()}"
     for group in ("algo", "backbone", "data", "wrapper", "augment", "transfer")
     for path in sorted((CONF / group).rglob("*.yaml"))],
)  # fmt: skip
def test_a_composed_config_holds_every_setting(words: str) -> None:
    config = compose(words)
    seen = 0
    for path, node in nodes(OmegaConf.to_container(config)):
        signature = read(node["_target_"])
        assert signature is not None
        assert {one.name for one in signature.settings} <= set(node), path
        seen += 1
    assert seen >= 4


def test_a_setting_that_no_yaml_names_can_be_overridden() -> None:
    assert "inner_lr" not in (CONF / "algo" / "maml.yaml").read_text()
    assert compose("algo=maml", "algo.inner_lr=0.1").algo.inner_lr == 0.1
    assert (
        compose("algo=maml").algo.inner_lr
        == inspect.signature(get_class("metarun.algos.maml.MAML")).parameters["inner_lr"].default
    )


def test_a_later_file_may_change_the_class(tmp_path: Path) -> None:
    """The settings of the class that is built are filled in, and none of the one that was named first."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nalgo:\n  _target_: metarun.algos.dn4.DN4\n  neighbors: 5\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose("experiment=mine", config_dir=tmp_path)
    assert dict(config.algo) == {"_target_": "metarun.algos.dn4.DN4", "neighbors": 5, "unpooled": 2}
    schema.check(config)


def test_defaults_are_copies() -> None:
    first = compose("algo=snail").algo
    first["keys"].append(7)
    assert list(compose("algo=snail").algo["keys"]) == [64, 256, 512]


def test_what_a_builder_hands_in_stands_with_its_key() -> None:
    """Every node that names a class says in the schema what its builder hands in, and each class takes that by position."""
    given = {key: mark.names for key, hint in settings(Config) if (mark := given_to(hint)) is not None}
    assert given["algo"] == given["pretrain.algo"] == ("backbone", "spec")
    for group in ("algo", "backbone", "data", "transfer"):
        for path in (CONF / group).rglob("*.yaml"):
            for node_path, node in nodes(yaml.safe_load(path.read_text())):
                if not node["_target_"].startswith("metarun.") or "optimizer" in node_path:
                    continue
                positional = [one.name for one in read(node["_target_"]).parameters if not one.keyword_only]  # type: ignore[union-attr]
                assert tuple(positional) == given[group], node["_target_"]


def test_args_of_a_docstring() -> None:
    found = arguments_of(
        "Adds.\n\nArgs:\n    one: The first.\n    two (int): The second,\n        and last.\n\nReturns:\n    x: no."
    )
    assert found == {"one": "The first.", "two": "The second, and last."}


def test_source_that_cannot_be_read_is_no_error() -> None:
    assert read("nowhere.Class") is None
    assert read("Class") is None
    assert read("math.sqrt") is None
    assert read("metarun.algos.maml.Nothing") is None


def test_another_librarys_class_is_left_alone() -> None:
    signature = read("torch.optim.Adam")
    assert signature is not None
    assert {"params", "lr", "betas"} <= {one.name for one in signature.parameters}
    assert signature.settings == ()
    assert set(compose().train.optimizer) == {"_target_", "lr", "weight_decay", "fused"}
    schedule = read("torch.optim.lr_scheduler.StepLR")
    assert schedule is not None
    assert next(one.default for one in schedule.parameters if one.name == "step_size") is ABSENT
