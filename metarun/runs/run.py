"""What the stages of a run share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from metarun import files
from metarun.config import construct, task_of
from metarun.core import Algorithm, TaskShape
from metarun.data.shared import shared_classes
from metarun.data.source import DataSource, EpisodeSampler, Split
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware, worthwhile_processes
from metarun.engine.learner import Trainable
from metarun.engine.train import Watch
from metarun.errors import UserError
from metarun.runs import contents, result, seen
from metarun.runs.logger import RunLogger
from metarun.target.target import Target

if TYPE_CHECKING:
    from metarun.stages.base import Stage

log = logging.getLogger("metarun")


@dataclass
class Run:
    """A run: its config, what was built from it, and the result so far.

    Attributes:
        config: The whole config.
        stages: The stages, in order.
        world: The ranks.
        folder: The run's folder, which `prepare` of a stage does not touch.
        data: The source, or the target's data set where the recipe has no source.
        tests: What a meta-test tests on, by name: the source's own test classes, without a name, or several data sets.
        target: The target, where a stage needs one.
        learners: The learner of each stage that trains or loads one, by the stage's name, in order.
        result: What `result.json` will hold.
        logger: Curves and lines of the run's folder.
        watch: Is asked after each validation whether to give up.
    """

    config: DictConfig
    stages: Sequence[Stage]
    world: World
    folder: Path
    data: DataSource
    target: Target | None
    tests: Mapping[str, DataSource] = field(default_factory=dict)
    learners: dict[str, Trainable] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    logger: RunLogger = field(default_factory=lambda: RunLogger(None))
    watch: Watch | None = None
    _samplers: dict[tuple[Split, TaskShape, str], EpisodeSampler] = field(default_factory=dict)

    @property
    def learner(self) -> Trainable:
        """The learner of the last stage that trains or loads one."""
        return list(self.learners.values())[-1]

    @property
    def algorithm(self) -> Algorithm:
        """The method of `learner`."""
        return self.learner.algorithm

    @property
    def hardware(self) -> Hardware:
        """The hardware of `learner`."""
        return self.learner.hardware

    @property
    def trained(self) -> list[Trainable]:
        """The learners that the stages so far train."""
        return [learner for learner in self.learners.values() if learner.sampler is not None and learner.settings.steps]

    def worthwhile_processes(self) -> int:
        """The processes that the run is best shared among: as many as serve each of its trainings, and as its stages allow."""
        if any(stage.one_process for stage in self.stages):
            return 1
        return min(map(worthwhile_processes, self.trained), default=1)

    @property
    def test_task(self) -> TaskShape:
        """The shape of validation and test tasks."""
        shape: TaskShape = task_of(self.config, "test")
        return shape

    @property
    def training_split(self) -> Split | None:
        """The split whose classes a training stage may see; None for all classes.

        All classes serve a recipe that ends on a target alone. The test classes of the source are kept for a meta-test: of
        this run, or of a later one that tests its weights.
        """
        open_to_all = any(stage.needs_target for stage in self.stages) and not any(
            stage.meta_tests for stage in self.stages
        )
        return None if open_to_all else "train"

    @property
    def target_scores(self) -> str:
        """The file with the scores on the target: a meta-test of the same run has the usual one for those of its episodes."""
        return contents.scores_file(result.TARGET if any(stage.meta_tests for stage in self.stages) else "")

    @cached_property
    def augment(self) -> Callable[[Any], Any] | None:
        """The augmentation of training images, where the config has one."""
        return construct(self.config.augment, "augment") if self.config.augment else None

    def augment_of(self, source: DataSource) -> Callable[[Any], Any] | None:
        """The augmentation of a data set's images, where the config has one; raises `UserError` where its items are no images."""
        if self.augment is not None and source.item != "image":
            raise UserError(f"augment: changes images, but the items are {source.item}s; leave augment out")
        return self.augment

    @property
    def trained_on_tests(self) -> str:
        """In words that training has seen images of classes that are tested on, as where there are too few to divide; else empty.

        Where nothing is meta-tested, validation tasks are what is meant.
        """
        validated = any(split == "val" for split, _, _ in self._samplers)
        found = [
            (name, shared)
            for name, data in (self.tests or (self.data.tested if validated else {})).items()
            for images in data.members.values()
            for learner in self.learners.values()
            if any(shared := shared_classes(learner.seen, images, images.undivided))
        ]
        if not found:
            return ""
        names = dict.fromkeys(name for name, _ in found)
        of = f"{', '.join(names)}: " if any(names) else ""
        tested = "tests" if self.tests else "validation tasks"
        if any(shared.by_images for _, shared in found):
            return f"{of}too few classes to divide; training and {tested} have the same ones, and the same images"
        return f"{of}too few classes to divide; training and {tested} have classes of the same names, and perhaps the same images"

    def wrote(self, *names: str) -> None:
        """Notes what files of the run's folder hold, which are whole by now, so that numbers are never shown beside others."""
        digests = {name: files.sha256(self.folder / name) for name in names}
        self.result[result.FILES] = self.result.get(result.FILES, {}) | digests

    def add(self, name: str, learner: Trainable) -> None:
        """Makes `learner` the one that the stages after this one use.

        Raises:
            UserError: Another stage has the same name.
        """
        if name in self.learners:
            raise UserError(f"recipe.stages: two stages have the name {name}; give one of them another name")
        self.learners[name] = learner

    def later(self, stage: Stage) -> list[Stage]:
        """Returns the stages after `stage`."""
        return list(self.stages[list(self.stages).index(stage) + 1 :]) if stage in self.stages else []

    def episodes(self, split: Split, task: TaskShape, device: torch.device, name: str = "") -> EpisodeSampler:
        """Returns the sampler of a split, with the same episodes for every stage that asks.

        Args:
            split: The classes that the episodes are drawn from.
            task: Their shape.
            device: Where they lie.
            name: The data set of `tests` that they are of; empty for the source.

        Raises:
            UserError: The split cannot serve such tasks; or it is the test split, and a learner of this run was trained on
                images of its classes.
        """
        data = self.tests[name] if name else self.data
        if split == "test":
            for learner in self.learners.values():
                seen.refuse_test_classes(learner.seen, data, f"stage {learner.name}")
        if (split, task, name) not in self._samplers:
            self._samplers[split, task, name] = data.sampler(split, task, self.config.seed, device)
        return self._samplers[split, task, name]
