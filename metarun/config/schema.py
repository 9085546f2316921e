"""The schema of a run: every key that a config can have, registered with Hydra. It imports no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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
    """The stages of a run, in order: functions of a `metarun.stages.Run`."""

    stages: list[str] = MISSING
    source: bool = (
        True  # whether a source (data=) is trained on; without one the backbone starts untrained on the target
    )
    run: str = "metarun.recipes.run"  # what carries the config out


@dataclass
class Config:
    """A run."""

    algo: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(
        default_factory=lambda: {"from": None}
    )  # from: a run whose backbone's weights to take
    around: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    pretrain: Pretrain = field(default_factory=Pretrain)
    target: Target = field(default_factory=Target)
    finetune: dict[str, Any] = field(default_factory=dict)
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
