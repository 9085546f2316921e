"""The schema of a run, its checks, and the construction of what a config names. Imports no torch until something is built."""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun.errors import UserError, nearest
from metarun.renamed import renamed_key


@dataclass
class Task:
    """Ways, shots and queries per way of every task; `train.task` and `test.task` may differ from it."""

    ways: int = 5
    shots: int = 1
    queries: int = 15


@dataclass
class TaskChange:
    """What differs from `task`; null is the same."""

    ways: int | None = None
    shots: int | None = None
    queries: int | None = None


@dataclass
class Noise:
    """Training tasks with wrong labels: a share of the tasks, and in these of the support examples."""

    tasks: float = 0.0
    labels: float = 0.8


@dataclass
class Train:
    """Meta-training: a budget in steps, or in seconds of training if `max_seconds` comes first."""

    steps: int = 1000
    max_seconds: float | None = None
    tasks_per_step: int = 1
    task: TaskChange = field(default_factory=TaskChange)
    noise: Noise = field(default_factory=Noise)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    clip_value: float | None = None
    validate_every: int = 200
    validate_episodes: int = 100
    validate_on: str = "episodes"  # of the validation classes; or images: held out of the classes that it trains on
    patience: int | None = None  # validations without a better one before training stops
    log_every: int = 20
    save_every: int | None = None  # steps
    save_seconds: float = 60.0


@dataclass
class Test:
    """Meta-testing, once, of the weights that were best on validation."""

    episodes: int = 1000
    baseline_episodes: int = 200  # for the same method untrained
    task: TaskChange = field(default_factory=TaskChange)


@dataclass
class Pretrain:
    """The method that trains the backbone before the run's own does, in recipes with such a stage."""

    algo: dict[str, Any] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    backbone: dict[str, Any] = field(default_factory=dict)  # what it asks of the run's backbone, which must be so


@dataclass
class Target:
    """Where what was learned is put to use: small labelled subsets of a data set, and test images apart from them."""

    data: dict[str, Any] = field(default_factory=dict)
    train_images: Any = None  # a number, or a list of them for a learning curve; null: all
    test_images: int | None = None  # null: all
    repeats: int = 10  # subsets drawn
    subset_seed: int = 0  # of the draw; not the run's seed, so that all runs meet the same subsets


@dataclass
class Hardware:
    """Where and how it is computed."""

    device: str = "auto"  # auto, cpu or cuda
    autocast: str | None = None  # bfloat16
    tf32: bool = False  # float32 products with 10 bits of mantissa, on a CUDA device
    channels_last: bool | None = None  # the memory order of images between layers; null: whichever is faster
    processes: int = 1  # that share the tasks of a step, on a CPU
    threads: int | None = None  # of a CPU operation; null: torch's choice, or the cores shared out among the processes
    vectorize: bool | None = None  # tasks by vmap; null: on CUDA and for backbones without convolutions
    record: bool | None = None  # gradients from a recording, on CUDA from a graph of it; null: for MLPs on CPUs
    task_chunk: int | None = None  # tasks whose graph is held at once; null: 1 in a loop, all by vmap


@dataclass
class Recipe:
    """The stages of a run, in order: a `metarun.stages.Stage` each, as a node or as the dotted path of its class."""

    stages: list[Any] = MISSING
    source: bool = (
        True  # whether a source (data=) is trained on; without one the backbone starts untrained on the target
    )
    run: str = "metarun.runs.carry_out.run"  # what carries the config out


@dataclass
class Config:
    """A run."""

    algo: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(
        default_factory=lambda: {"from": None}
    )  # from: a run whose backbone's weights to take
    wrapper: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    pretrain: Pretrain = field(default_factory=Pretrain)
    target: Target = field(default_factory=Target)
    transfer: dict[str, Any] = field(default_factory=dict)
    task: Task = field(default_factory=Task)
    train: Train = field(default_factory=Train)
    test: Test = field(default_factory=Test)
    hardware: Hardware = field(default_factory=Hardware)
    recipe: Recipe = field(default_factory=Recipe)
    name: str | None = None
    seed: int = 0
    resume: bool = True
    checkpoint: str | None = None
    runs: Any = None  # recipe=report: the folder of runs, or a list of them
    outputs: str = "outputs"


ConfigStore.instance().store(name="schema", node=Config)
# For each group that --help lists Hydra copies the whole store, of which it only ever hands out copies anyway: two thirds of
# the time that --help takes. A copy of the one store is the store.
ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
logging.getLogger("hydra").addHandler(logging.NullHandler())  # of a failed import one line is enough: ours

# What the builder hands in, and a config therefore must not name.
GIVEN = {
    "data": set(),
    "backbone": {"input_shape"},
    "algo": {"backbone", "spec"},
    "wrapper": {"method", "validation"},
    "train.optimizer": {"params"},
    "train.schedule": {"optimizer"},
    "augment": set(),
    "pretrain.algo": {"backbone", "spec"},
    "pretrain.train.optimizer": {"params"},
    "pretrain.train.schedule": {"optimizer"},
    "target.data": set(),
    "transfer": {"learner", "source"},
}


RANGES = {
    "train.steps": 0, "train.max_seconds": 0, "train.tasks_per_step": 1, "train.validate_every": 1, "train.validate_episodes": 1,
    "train.patience": 1, "train.noise.tasks": 0,
    "train.noise.labels": 0, "train.log_every": 1, "train.save_every": 1, "train.save_seconds": 0, "train.clip_norm": 0,
    "train.clip_value": 0, "test.episodes": 2, "test.baseline_episodes": 0, "hardware.threads": 1, "hardware.processes": 1,
    "hardware.task_chunk": 1, "seed": 0,
    "target.test_images": 1, "target.repeats": 1, "target.subset_seed": 0,
    "task.ways": 1, "task.shots": 1, "task.queries": 1, "train.task.ways": 1, "train.task.shots": 1, "train.task.queries": 0,
    "test.task.ways": 1, "test.task.shots": 1, "test.task.queries": 1,
    "algo.inner_steps": 0, "algo.test_inner_steps": 0, "algo.inner_batch": 1, "algo.test_inner_batch": 1,  # of any inner loop
}  # fmt: skip
RANGES |= {f"pretrain.{key}": least for key, least in RANGES.items() if key.startswith("train.")}
CHOICES: dict[str, list[str | None]] = {
    "hardware.device": ["auto", "cpu", "cuda"],
    "hardware.autocast": [None, "bfloat16"],
    "train.validate_on": ["episodes", "images"],
    "pretrain.train.validate_on": ["episodes", "images"],
}


def to_container(config: DictConfig) -> dict[str, Any]:
    """Plain, resolved values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 100, ...}` of nested mappings."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def check(config: DictConfig) -> None:
    """Holds every node with a `_target_` against the signature it names, and the rest against its range.

    Raises `UserError` that names the key, the reason and the nearest right one; converts nothing. An interpolation that
    leads nowhere is an error of omegaconf's.
    """
    check_keys(config, Config)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key}: must be given ({key}=...)")
    to_container(config)
    for path, given in GIVEN.items():
        node = OmegaConf.select(config, path)
        if node:
            check_target(node, path, given)
    for key, least in RANGES.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, int | float) and value < least:
            raise UserError(f"{key}={value}: must be at least {least}")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in choices:
            names = [str(choice) for choice in choices if choice]
            raise UserError(f"{key}={value}: is not one of {', '.join(names)}{nearest(str(value), names)}")
    check_sizes(config.target.train_images)
    for name, value in config.pretrain.backbone.items():
        if config.backbone.get(name) != value:
            raise UserError(
                f"backbone.{name}={config.backbone.get(name)}: the pretraining asks for {value} on the same backbone; set one "
                f"like the other (backbone.{name}={value}, or pretrain.backbone.{name}={config.backbone.get(name)})"
            )
    if "/" in (config.name or ""):
        raise UserError(f"name={config.name}: must be a name without /; outputs= is the folder that runs lie in")


def check_sizes(value: Any) -> None:
    """That `target.train_images` is null, a number of images, or a list of different ones."""
    sizes = list(value) if isinstance(value, ListConfig) else [value]
    right = all(size is None or (type(size) is int and size >= 1) for size in sizes)
    if not right or not sizes or len(set(sizes)) < len(sizes) or (len(sizes) > 1 and None in sizes):
        raise UserError(
            f"target.train_images={value}: must be a number of images, or a list of different ones, or null"
        )


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def check_keys(node: DictConfig, schema: type, prefix: str = "") -> None:
    """That `node` has no key but those of the dataclass `schema` (Hydra lets `+key=value` past it)."""
    known: dict[str, Any] = {item.name: item.default_factory for item in fields(schema)}
    for key in map(str, node):
        if key not in known:
            raise UserError(
                renamed_key(f"{prefix}{key}") or f"{prefix}{key}: there is no such key{nearest(key, known)}"
            )
        if is_dataclass(known[key]):
            check_keys(node[key], known[key], f"{prefix}{key}.")


def check_target(node: DictConfig, path: str, given: set[str]) -> None:
    """`node`'s keys and values against the signature of its `_target_`."""
    target = node.get("_target_")
    if not target:
        raise UserError(f"{path}: has no _target_ (the class that it configures)")
    try:
        cls = get_class(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target}: cannot be imported ({_reason(error)})") from error
    signature = inspect.signature(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return
    hints = typing.get_type_hints(inspect.unwrap(cls.__init__))  # type: ignore[misc]
    known = [name for name in signature.parameters if name not in given and name != "self"]
    apart = {"_target_", "from"} if path == "backbone" else {"_target_"}
    values: dict[str, Any] = {str(key): node._get_node(key) for key in node if key not in apart}
    for name in values:
        if name not in known:
            raise UserError(
                f"{path}.{name}: {cls.__name__} has no such setting"
                f"{nearest(name, known) or '; it has ' + (', '.join(known) or 'none')}"
            )
    for name in known:
        if signature.parameters[name].default is inspect.Parameter.empty and (
            name not in values or values[name]._is_missing()
        ):
            raise UserError(f"{path}.{name}: must be given ({path}.{name}=...)")
    for name, value in values.items():
        check_value(f"{path}.{name}", value, hints.get(name, Any))


def check_value(key: str, value: Any, hint: Any) -> None:
    """A value against a type hint, where omegaconf knows the type (a float may be written as an integer)."""
    if typing.get_origin(hint) is typing.Literal:
        if value._value() not in typing.get_args(hint):
            names = [str(choice) for choice in typing.get_args(hint)]
            raise UserError(
                f"{key}={value._value()}: is not one of {', '.join(names)}{nearest(str(value._value()), names)}"
            )
        return
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # Of torch's `float | Tensor` a config can hold a float.
        parts = [part for part in typing.get_args(hint) if not getattr(part, "__module__", "").startswith("torch")]
        hint = functools.reduce(operator.or_, parts) if parts else Any
    try:
        structured = OmegaConf.structured(make_dataclass("Value", [("value", hint, field(default=MISSING))]))
    except OmegaConfBaseException:
        return  # a type that no config can hold is the constructor's own business
    plain = (
        OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value._value()
    )
    try:
        structured.value = plain
    except OmegaConfBaseException as error:
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise UserError(f"{key}={'null' if plain is None else plain}: must be of type {expected}") from error


def task_of(config: DictConfig, split: str) -> Any:
    """The `TaskShape` of `train`, `pretrain.train` or `test`: `task`, with what that part of the config changes."""
    from metarun.core import TaskShape

    change = OmegaConf.select(config, split).task
    return TaskShape(
        **{name: config.task[name] if change[name] is None else change[name] for name in ("ways", "shots", "queries")}
    )


def construct(node: DictConfig, path: str, **given: Any) -> Any:
    """What `node._target_` names, built from its values and `given`; a value that its constructor refuses is a `UserError`."""
    try:
        build = instantiate(node, _partial_=True, _convert_="all")
        hints = typing.get_type_hints(inspect.unwrap(build.func.__init__))
        for name, value in build.keywords.items():
            if type(value) is int and hints.get(name) in (float, float | None):
                given[name] = float(value)  # `algo.inner_lr=1` means 1.0
        return build(**given)
    except (HydraException, ValueError) as error:
        raise UserError(f"{path}: {_reason(error)}") from error
