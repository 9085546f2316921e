"""Tests on the vectors of a frozen encoder, ours and easyfsl's: drawing tasks, reading their vectors, predicting, and the accuracy.

The vectors are made, as many as mini-ImageNet's test classes have: 20 classes of 600, of 640 numbers. easyfsl 1.5 is not installed by
any extra, and brings a package `scripts` that would hide this one: pip install --no-deps --target PEER easyfsl==1.5.0 pandas
python-dateutil; rm -r PEER/scripts; PYTHONPATH=PEER python -m scripts.benchmark --only features_protonet features_tim.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun import optional
from metarun.config import construct, task_of
from metarun.core import Spec
from metarun.data.source import Split
from metarun.data.table import Table
from metarun.data.table_source import TableSource
from metarun.encoders.base import Encoding
from metarun.encoders.encoded import EncodedSource
from metarun.encoders.vectors import VectorTable
from metarun.engine.distributed import World
from metarun.engine.evaluate import evaluate
from metarun.engine.hardware import allow_tf32, choose, keep_freed_memory
from metarun.errors import UserError
from metarun.stages.learning import build_backbone

from .lines import Line

CLASSES, ITEMS, FEATURES = 20, 600, 640
CHECKED = 64  # tasks whose predictions are compared


def vectors() -> np.ndarray:
    """Unit vectors, float32 `[classes, items, features]`, not negative, as those of a network that ends in a ReLU."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(CLASSES, 1, FEATURES))
    found = (centres + 4 * draw.normal(size=(CLASSES, ITEMS, FEATURES))).clip(0)
    unit: np.ndarray = (found / np.linalg.norm(found, axis=2, keepdims=True)).astype(np.float32)
    return unit


class InMemory(VectorTable):
    """The vectors as a table that was made."""

    def __init__(self) -> None:
        self._made, self._on_device = vectors().reshape(-1, 1, FEATURES), {}

    def is_whole(self, rows: np.ndarray) -> bool:
        """All rows are there."""
        return True

    def with_rows(self, rows: np.ndarray) -> np.ndarray:
        """The table, `[M, 1, D]`."""
        return self._made


class Vectors(EncodedSource):
    """The vectors as a data set that was encoded."""

    def __init__(self) -> None:
        names = [str(number) for number in range(CLASSES)]
        nothing = np.zeros((0, 1, 1, 1), np.uint8)
        table = Table(nothing, np.arange(CLASSES + 1) * ITEMS, names, [""] * CLASSES, fingerprint="benchmark")
        everything: dict[Split, range] = {"train": range(CLASSES), "val": range(CLASSES), "test": range(CLASSES)}
        TableSource.__init__(self, table, everything)
        self.encoding, self.input_shape = Encoding("float32", 1, 256, "un", None), (FEATURES,)
        self._drawn, self._means, self.vectors = None, {}, InMemory()

    @property
    def called(self) -> str:
        """There is nothing that they were made of."""
        return "vector"

    def mean(self, reference: np.ndarray | None = None) -> np.ndarray:
        """Nothing is taken off."""
        return np.zeros(FEATURES, np.float32)


class Ours:
    """One rank of the processes that share the tasks."""

    def __init__(self, line: Line, world: World) -> None:
        config = line.config(**{"hardware.processes": world.size})
        self.line, task = line, task_of(config, "test")
        source = Vectors()
        backbone = build_backbone(config, source)
        spec = Spec(source.input_shape, "classification", CLASSES)
        self.algorithm = construct(config.algo, "algo", backbone=backbone, spec=spec)
        self.hardware = choose(config.hardware, self.algorithm, world)
        self.sampler = source.sampler("test", task, config.seed, self.hardware.device)

    def run(self, steps: int) -> float:
        """Seconds for the tests of so many steps."""
        self.hardware.world.barrier()
        started = time.perf_counter()
        evaluate(self.algorithm, self.sampler, steps * self.line.tasks, self.hardware)
        return time.perf_counter() - started

    def check(self, path: str) -> dict[str, Any]:
        """Writes tasks and what is predicted for them to `path`; describes the hardware."""
        (tasks,) = (found for _, found in self.sampler(0, CHECKED).chunks())
        predicted = self.algorithm.eval().predict(tasks).argmax(-1)
        if self.hardware.world.main:
            torch.save({"tasks": tasks.tensors[:3], "predicted": predicted}, path)
        return self.hardware.describe()

    def convolutions(self) -> int:
        """0: there are none."""
        return 0


class Peer:
    """easyfsl's methods, in its own evaluation on its own data set of features."""

    def __init__(self, line: Line) -> None:
        keep_freed_memory()  # as on our side
        config = line.config()
        self.line, self.device, task = line, str(config.hardware.device), task_of(config, "test")
        allow_tf32(config.hardware.tf32)  # as on our side
        try:
            optional.torchvision()
            # Its sampler calls a constructor that torch's has no longer.
            torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None  # type: ignore[method-assign,misc]
            parts = [
                importlib.import_module(f"easyfsl.{name}") for name in ("datasets", "samplers", "methods", "utils")
            ]
        except ImportError as error:
            raise UserError(
                f"easyfsl cannot be imported ({error}); scripts/benchmark/features.py says how it is installed"
            ) from error
        datasets, self.samplers, methods, self.utils = parts
        named = {str(name): torch.from_numpy(each) for name, each in enumerate(vectors())}
        self.features, self.shape = datasets.FeaturesDataset.from_dict(named), (task.ways, task.shots, task.queries)
        kinds: dict[str, Callable[..., Any]] = {"protonet": methods.PrototypicalNetworks, "tim": methods.TIM}
        steps = {"fine_tuning_steps": config.algo.steps} if "steps" in config.algo else {}
        self.method = kinds[line.algo](torch.nn.Identity(), **steps)

    def run(self, steps: int, threads: int) -> float:
        """Seconds for the tests of so many steps, with so many threads an operation."""
        torch.set_num_threads(threads)
        sampler = self.samplers.TaskSampler(self.features, *self.shape, steps * self.line.tasks)
        loader: Any = torch.utils.data.DataLoader(
            self.features, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn
        )
        started = time.perf_counter()
        self.utils.evaluate(self.method, loader, device=self.device, use_tqdm=False)
        return time.perf_counter() - started

    def check(self, path: str) -> dict[str, dict[str, float]]:
        """The share of queries that both sides give to different classes."""
        found = torch.load(path)
        other: list[Tensor] = []
        for support_x, support_y, query_x, predicted in zip(*found["tasks"], found["predicted"], strict=True):
            self.method.process_support_set(support_x, support_y)
            with torch.no_grad():
                other.append(self.method(query_x).argmax(1) != predicted)
        return {f"features_{self.line.algo}": {"differing_predictions": torch.stack(other).double().mean().item()}}
