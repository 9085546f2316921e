"""How long a training would take on this machine, by a few of its steps."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun.data.source import DataSource, Split
from metarun.encoders.encoded import encoded_members, stand_in
from metarun.engine.distributed import World
from metarun.engine.evaluate import evaluate
from metarun.engine.gradients import gradient_step
from metarun.errors import UserError
from metarun.runs.run import Run
from metarun.stages import MetaTest, Train

STEPS, SECONDS = 3, 3.0  # that are timed: at least so many, and for so long
EPISODES = 4  # whose validation is timed


def estimate(config: DictConfig, data: DataSource) -> dict[str, Any]:
    """Times some steps of the training that the config asks for, and of its validation; nothing is written.

    Behind an encoder the steps are timed on drawn vectors, and the encoding by a few batches of the items that have no vectors yet.

    Args:
        config: The whole config.
        data: What is trained on.

    Returns:
        JSON values: seconds the encoding, a step, a validation and a test take, and all of them together; or `problem`, why they cannot
        be. Those of the encoding are null without an encoder, and do not count other data sets that are tested on. A validation on
        held-out images, and the test beside it, are not timed: they are null then.
    """
    try:
        train = Train()
        run = Run(config, [train, MetaTest()], World(), Path(), stand_in(data), None)
        train.prepare(run)
    except UserError as error:
        return {"problem": str(error)}
    learner = train.learner
    hardware, settings = learner.hardware, learner.settings
    trained = learner.wrapper or learner.algorithm
    trained.train()
    tasks, taken, spent = settings.tasks_per_step, 0, 0.0
    if learner.sampler is None or not settings.steps:
        return {"problem": "train.steps=0: nothing is trained"}
    train.make_ready(run)
    while taken <= STEPS or spent < SECONDS:
        began = time.perf_counter()
        batch = learner.sampler(taken * tasks, (taken + 1) * tasks)
        sums = gradient_step(trained, batch, taken, 1.0, learner.seed, hardware)
        assert learner.optimizer is not None
        learner.optimizer.step()
        float(sums["loss"])  # waits for the device
        if taken:  # the first one warms up
            spent += time.perf_counter() - began
        taken += 1
    step = spent / (taken - 1)
    steps = settings.steps
    if settings.max_seconds is not None:  # which ends the training, and its validations with it
        steps = min(steps, math.ceil(settings.max_seconds / step))
    splits: tuple[Split, ...] = ("train", "val") if config.test.data else ("train", "val", "test")
    try:
        encoding = [each.encoding_seconds(hardware.device, splits) for each in encoded_members(data).values()]
    except UserError as error:
        return {"problem": str(error)}
    found: dict[str, Any] = {
        "encoding_seconds": math.fsum(encoding) if encoding else None,
        "steps": steps,
        "tasks_per_step": tasks,
        "step_seconds": step,
        "timed_steps": taken - 1,
        "hardware": str(hardware),
        "train_seconds": step * steps,
        "validation_seconds": None,
        "test_seconds": None,
    }
    if train.validation is not None:
        began = time.perf_counter()
        evaluate(learner.algorithm, train.validation, EPISODES, hardware)
        episode = (time.perf_counter() - began) / EPISODES
        validations = -(-steps // settings.validate_every)
        found["validation_seconds"] = episode * settings.validate_episodes * validations
        # Each data set has a test of its own, and one of the method as it was before its training.
        tests = len(config.test.data) or len(data.tested)
        found["test_seconds"] = episode * tests * (config.test.episodes + config.test.baseline_episodes)
    found["seconds"] = math.fsum(
        found[f"{part}_seconds"] or 0.0 for part in ("encoding", "train", "validation", "test")
    )
    return found
