"""What several test files share: toy images, composed configs, built algorithms."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor

from metarun import config as schema
from metarun.config.folder import CONF
from metarun.core import Algorithm, Episodes, TaskShape
from metarun.data.image_source import ImageSource
from metarun.data.source import DataSource, Split
from metarun.data.table import Table
from metarun.engine.cuda_graph import Compute
from metarun.engine.hardware import Hardware
from metarun.stages.learning import build_algorithm
from metarun.target.target import Target

CPU = torch.device("cpu")


def choices(group: str) -> list[str]:
    """Every choice of a config group, so that a new file is tested without an edit here."""
    folder = Path(CONF) / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


@functools.cache
def class_of(algo: str) -> Any:
    """The class that `conf/algo/<algo>.yaml` names: what a test must know of a method before it composes a config."""
    (target,) = re.findall(r"^  _target_: (\S+)$", (Path(CONF) / "algo" / f"{algo}.yaml").read_text(), re.MULTILINE)
    return get_class(target)


def _chooses(override: str) -> bool:
    """Whether an override is a choice of a config group, as Hydra tells it from a value."""
    return (Path(CONF) / override.lstrip("+~").partition("=")[0].partition("@")[0]).is_dir()


@functools.cache
def _chosen(*choices: str) -> bytes:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return pickle.dumps(hydra.compose("config", overrides=["~preset", *choices]))


@functools.cache
def _composed(*overrides: str) -> bytes:
    config = pickle.loads(_chosen(*filter(_chooses, overrides)))
    values = [override for override in overrides if not _chooses(override)]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return pickle.dumps(config)


def compose(*overrides: str) -> DictConfig:
    """The config that a command line makes, without the presets of particular data.

    To merge the files costs far more than to set values in what they make, which is what Hydra does last: a process merges once what
    the same choices make. Each config is a copy, made by `pickle`, which takes a fraction of what `copy.deepcopy` does.
    """
    assert schema.Config  # its import registers the schema
    composed: DictConfig = pickle.loads(_composed(*overrides))
    return composed


def table(images: np.ndarray, sizes: list[int], groups: list[str] | None = None) -> Table:
    """`images` uint8 [M, C, H, W] as classes of the given sizes, in order."""
    names = [f"class {number}" for number in range(len(sizes))]
    return Table(images, np.cumsum([0, *sizes]), names, groups or [""] * len(sizes), fingerprint="toy")


def toy_images(*, signal: float = 1.0, classes: int = 12, per_class: int = 20, rotations: bool = False) -> ImageSource:
    """16x16 grey images: `signal` times a pattern of each class, and noise. All three splits have all classes."""
    generator = np.random.default_rng(0)
    patterns = np.kron(generator.integers(0, 2, (classes, 4, 4)) - 0.5, np.ones((4, 4)))
    noise = generator.normal(size=(classes, per_class, 16, 16))
    images = (128 + 100 * signal * patterns[:, None] + 25 * noise).clip(0, 255).astype(np.uint8)
    everything = range(classes)
    splits: dict[Split, range] = {"train": everything, "val": everything, "test": everything}
    return ImageSource(table(images.reshape(-1, 1, 16, 16), [per_class] * classes), splits, rotations=rotations)


def episodes(source: DataSource, task: TaskShape, tasks: int, split: Split = "train", start: int = 0) -> Episodes:
    """`tasks` episodes of `source`."""
    found = source.sampler(split, task, 0, CPU)(start, start + tasks)
    assert isinstance(found, Episodes)
    return found


def build(config: DictConfig, source: DataSource, vectorize: bool = False) -> Algorithm:
    """The untrained algorithm of `config`, as a run builds it."""
    target = None
    if getattr(get_class(config.algo._target_), "uses_target", "no") != "no" and source.kind == "classification":
        target = Target(source, schema.TargetSettings(test_images=None))
    algorithm = build_algorithm(config, source, schema.task_of(config, "train"), target)
    algorithm.vectorize = vectorize
    return algorithm


def hardware(*, vectorize: bool = False, task_chunk: int | None = None, bfloat16: bool = False) -> Hardware:
    """The CPU, one thread."""
    dtype = torch.bfloat16 if bfloat16 else None
    return Hardware(device=CPU, autocast_dtype=dtype, vectorize=vectorize, task_chunk=task_chunk, threads=1)


class Replays:
    """In place of `metarun.engine.cuda_graph.cuda_graph`, on any device: the memory of the outputs stays, and each replay fills it anew."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, compute: Compute) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        outputs = compute()

        def replay() -> None:
            self.count += 1
            for held, value in zip(outputs, compute(), strict=True):
                held.copy_(value)

        return outputs, replay


def double(episodes: Episodes) -> Episodes:
    """The same episodes with float64 inputs and targets; labels stay integers."""
    tensors = episodes.named_tensors.values()
    return episodes.with_tensors(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors)


def alone(source: DataSource, task: TaskShape, tasks: int, split: Split = "train") -> list[Episodes]:
    """The first `tasks` episodes of `source`, each drawn by itself, in double precision."""
    draw = source.sampler(split, task, 0, CPU)
    return [double(one) for number in range(tasks) for one in draw(number, number + 1).split(1)]


def with_(episodes: Episodes, **changes: Tensor) -> Episodes:
    """Episodes with some tensors changed."""
    return dataclasses.replace(episodes, **changes)


def block(module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a module before the installed one of its name that cannot be imported, as a broken installation cannot."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    (folder / f"{module}.py").write_text('raise ImportError("blocked")')
    monkeypatch.syspath_prepend(folder)
