"""Every method of `conf/algo` on a small backbone, with tasks for it, as several test files want it."""

from __future__ import annotations

import inspect

import torch
from helpers import CPU, build, choices, class_of, compose, episodes, toy_images
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from metarun.config import task_of
from metarun.core import ActivationHook, Algorithm, Backbone, Batch, Episodes, Spec
from metarun.data.image_batches import BatchSampler, batches
from metarun.data.source import DataSource

SEPARABLE = toy_images()
BACKBONES = {
    "conv4": ["backbone=conv4", "backbone.channels=8"],
    "mlp": ["backbone=mlp", "backbone.hidden=[32]", "backbone.init_std=null"],
}
ALGOS = choices("algo")
VECTORIZABLE = [name for name in ALGOS if class_of(name).vectorizable]


def config_of(name: str, *overrides: str, backbone: str = "conv4", norm: str | None = "batch") -> DictConfig:
    """conf/algo/<name>.yaml with its own shots and optimiser, on a small backbone, five ways and four queries."""
    small = ["task.ways=5", "task.queries=4", "train.task.ways=null", "train.task.queries=null"]
    norms = [] if norm is None else [f"backbone.norm={norm}"]
    config = compose(f"algo={name}", *BACKBONES[backbone], *norms, *small, *overrides)
    if config.algo.get("test_inner_steps"):
        config.algo.test_inner_steps = 8  # for speed
    return config


def brief(name: str, config: DictConfig) -> DictConfig:
    """The config with few inner steps: what holds of three, of which each goes on from the one before, holds of more."""
    for setting, count in {"steps": 30, "updates": 3, "epochs": 3, "head_epochs": 3}.items():  # TIM's steps are tiny
        if setting in inspect.signature(class_of(name)).parameters:
            OmegaConf.update(config, f"algo.{setting}", count, force_add=True)
    if config.algo.get("inner_steps"):
        config.algo.inner_steps = min(config.algo.inner_steps, 3)
    if config.algo.get("test_inner_steps"):
        config.algo.test_inner_steps = 4
    return config


def learner(
    name: str, tasks: int, *overrides: str, source: DataSource = SEPARABLE, vectorize: bool = False, **more: str | None
) -> tuple[Algorithm, Episodes]:
    """An untrained algorithm of few inner steps, and episodes of its training tasks."""
    config = brief(name, config_of(name, *overrides, **more))
    return build(config, source, vectorize), episodes(source, task_of(config, "train"), tasks)


def stream(algorithm: Algorithm, source: DataSource) -> BatchSampler:
    """Labelled images as a method that trains on batches is given them; the source is its own target."""
    images = source.labelled(None, "train")
    target = None if algorithm.uses_target == "no" else images
    return batches(images, 0, CPU, target, target_labels=algorithm.uses_target == "labels")


def fed(algorithm: Algorithm, batch: Episodes) -> Episodes | Batch:
    """What the method's loss takes: these episodes, or as many labelled images."""
    if algorithm.trains_on != "batches":
        return batch
    found = stream(algorithm, SEPARABLE)(0, batch.support_y.numel() + batch.query_y.numel())
    return Batch(found.x.to(batch.support_x.dtype), found.y, found.domain)


class MeanOfWords(Backbone):
    """The mean of word vectors: its items are numbers of word pieces, `[B, 4]`."""

    norm = "none"
    reads_texts = True
    spec = Spec((4,), "classification", 3)

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.features, self.widths = 8, []

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        return self.words(x).mean(1)


def texts() -> Episodes:
    """Two tasks of three texts, each of four words of its own; the queries are the same."""
    x = torch.stack([torch.arange(12), torch.arange(8, 20)]).view(2, 3, 4)
    y = torch.arange(3).expand(2, 3)
    return Episodes(x, y, x, y, 3)


def steps_of(algorithm: Algorithm) -> list[int]:
    """Numbers of inner steps to look at, the last of which is that of `predict`."""
    return sorted({0, min(1, algorithm.test_steps), algorithm.test_steps})


def gradients(algorithm: Algorithm) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in algorithm.named_parameters() if value.requires_grad}
    return {name: value for name, value in found.items() if value is not None}
