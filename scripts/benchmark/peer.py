"""The peer: learn2learn's wrappers, networks, data set and transforms, in the loop over tasks of its own examples.

Against those examples: support and query set go through the network one after the other for ANIL too, as on our side, and
no accuracy is computed.
"""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from metarun import optional as peers
from metarun.data.roots import cache_root, data_root
from metarun.engine.hardware import allow_tf32, keep_freed_memory

from .device import finish, growth
from .lines import Line

Task = tuple[Tensor, ...]  # support images and labels, query images and labels


class Perceptron(nn.Module):
    """What MAML's sinusoids are learned with, as torch's own layers."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.classifier = nn.Linear(widths[-1], 1)  # what learn2learn's networks call their last layer

    def forward(self, x: Tensor) -> Tensor:
        """Logits of vectors."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.classifier(x)


class Peer:
    """One process."""

    def __init__(self, line: Line) -> None:
        keep_freed_memory()  # as on our side: it is the C library's, not ours
        self.line, self.config = line, line.config()
        self.device = torch.device(self.config.hardware.device)
        allow_tf32(self.config.hardware.tf32)  # as on our side
        self.library = peers.learn2learn()
        random.seed(0)
        self.drawn = None if line.draw == "once" else self._tasks()
        self.kept: list[Task] = []
        self.loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def _tasks(self) -> Any:
        """The training tasks of its own Omniglot benchmark, read image by image from the files of the release."""
        task, root = self.config.task, cache_root() / "learn2learn"
        unpack(root / "omniglot-py")
        # It compares the archives' checksums, of which the unpacked files have none; our loader has counted the content.
        peers.torchvision().datasets.Omniglot._check_integrity = lambda self: True
        count = task.shots + task.queries
        sets = self.library.vision.benchmarks.get_tasksets(
            "omniglot", task.ways, count, task.ways, count, num_tasks=20000, root=str(root)
        )
        return sets.train

    def load(self, path: str, precision: str = "") -> dict[str, Any]:
        """Takes over the weights and tasks that our side wrote to `path`, of this precision or the first; all that is there."""
        found = torch.load(path)[precision] if precision else next(iter(torch.load(path).values()))
        weights = found["weights"]
        self.kept = list(zip(*found["tasks"], strict=True))
        if "backbone.layers.0.weight" in weights:
            layers = [value for name, value in weights.items() if name.startswith("backbone") and value.ndim == 2]
            model: nn.Module = Perceptron([layers[0].shape[1], *(len(layer) for layer in layers)])
            self.loss = F.mse_loss
        else:
            channels, inputs = weights["backbone.blocks.0.conv.weight"].shape[:2]
            ways, features = weights.get("head.weight", torch.empty(1, channels)).shape
            model = self.library.vision.models.CNN4(
                ways, hidden_size=channels, channels=inputs, max_pool=True, embedding_size=features
            )
        own = dict(model.to(next(iter(weights.values()))).named_parameters())  # to their device and precision
        self.own = {name: own[translated(name)] for name in weights}
        with torch.no_grad():
            for name, value in weights.items():
                self.own[name].copy_(value)
        self.body = getattr(model, "features", model)
        if self.line.algo != "protonet":
            self.learner = self.library.algorithms.MAML(
                model.classifier if self.line.algo == "anil" else model,
                lr=self.config.algo.inner_lr,
                first_order=self.line.algo == "fomaml",
            )
        self.optimizer = torch.optim.Adam(list(self.own.values()), lr=self.config.train.optimizer.lr)
        return found

    def draw(self, number: int) -> Task:
        """A task: one of the kept ones, or a new one, class by class, split into support and query set."""
        if self.line.draw == "once" or self.drawn is None:
            return self.kept[number]
        images, labels = self.drawn.sample()
        task = self.config.task
        support = torch.arange(len(labels)) % (task.shots + task.queries) < task.shots
        found = images[support], labels[support], images[~support], labels[~support]
        return tuple(value.to(self.device) for value in found)

    def error(self, task: Task) -> Tensor:
        """One task's loss on its queries."""
        support_x, support_y, query_x, query_y = task
        if self.line.algo == "protonet":
            embedded = self.body(torch.cat([support_x, query_x]))
            classifier = self.library.nn.PrototypicalClassifier(embedded[: len(support_x)], support_y)
            return self.loss(classifier(embedded[len(support_x) :]), query_y)
        learner = self.learner.clone()
        if self.line.algo == "anil":
            support_x, query_x = self.body(support_x), self.body(query_x)
        for _ in range(self.config.algo.inner_steps):
            learner.adapt(self.loss(learner(support_x), support_y))
        return self.loss(learner(query_x), query_y)

    def gradients(self, tasks: Iterable[Task]) -> float:
        """Fills the gradients of the mean loss over the tasks, which is returned."""
        self.optimizer.zero_grad()
        errors = []
        for task in tasks:
            error = self.error(task)
            error.backward()
            errors.append(error.item())
        for value in self.own.values():
            assert value.grad is not None
            value.grad.mul_(1 / len(errors))
        return statistics.fmean(errors)

    def step(self) -> None:
        """Takes one step of the outer loop."""
        tasks = (self.draw(number) for number in range(self.line.tasks))
        if self.line.draw == "only":
            for _ in tasks:
                pass
        else:
            self.gradients(tasks)
            self.optimizer.step()

    def run(self, steps: int, threads: int) -> float:
        """Seconds for so many steps, with so many threads an operation."""
        torch.set_num_threads(threads)
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        finish(self.device)
        return time.perf_counter() - started

    def check(self, path: str) -> dict[str, dict[str, float]]:
        """Both sides' numbers for the same weights and tasks, and how far they lie apart, relative; by precision.

        `images` is the largest difference between two pixels, which go from 0 to 1.
        """
        found: dict[str, dict[str, float]] = {}
        for precision in sorted(
            torch.load(path), key="float64".__ne__
        ):  # it comes before what is measured, which stays
            if precision == "images":
                continue
            theirs = self.load(path, precision)
            loss = self.gradients(self.kept)
            gradients = [
                [value.flatten() for value in side] for side in (theirs["gradients"].values(), self._gradients())
            ]
            ours, own = (torch.cat(side) for side in gradients)
            found[precision] = {
                "loss_ours": theirs["loss"],
                "loss_peer": loss,
                "loss_difference": abs(theirs["loss"] / loss - 1),
                "gradient_difference": ((ours - own).norm() / own.norm()).item(),
            }
        if "images" in (saved := torch.load(path)):
            own = self.drawings(saved["images"]["character"])
            found["images"] = {"pixel_difference": (saved["images"]["drawings"] - own).abs().max().item()}
        return found

    def _gradients(self) -> Iterator[Tensor]:
        for value in self.own.values():
            assert value.grad is not None
            yield value.grad

    def drawings(self, character: str) -> Tensor:
        """A character's drawings as its tasks have them, by their files' names."""
        assert self.drawn is not None
        images = self.drawn.dataset.dataset  # all of Omniglot: the background set first
        background = images.dataset.dataset.datasets[0]
        files = background._flat_character_images
        label = background._characters.index(character)
        rows = sorted((row for row, (_, number) in enumerate(files) if number == label), key=lambda row: files[row][0])
        return torch.stack([images[row][0] for row in rows])

    def memory(self, path: str) -> int:
        """Bytes by which one step, the first of this process, raises its memory at the peak."""
        self.load(path)
        return growth(self.step, self.device)


def translated(name: str) -> str:
    """learn2learn's name of one of our weights."""
    for ours, theirs in (
        ("backbone.blocks", "features"),
        ("backbone.", ""),
        (".norm.", ".normalize."),
        ("head", "classifier"),
    ):
        name = name.replace(ours, theirs)
    return name


def unpack(folder: Path) -> None:
    """Omniglot's two archives, or links to what is unpacked already, as torchvision expects them in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        for name in ("images_background", "images_evaluation"):
            source, aside = data_root() / "omniglot" / name, folder / f".{name}"
            if (folder / name).exists():
                continue
            if source.is_dir():
                (folder / name).symlink_to(source.absolute())
                continue
            shutil.rmtree(aside, ignore_errors=True)
            shutil.unpack_archive(source.with_suffix(".zip"), aside)
            (aside / name).rename(folder / name)
            aside.rmdir()
