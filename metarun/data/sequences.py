"""Training tasks of online learning: images of a few classes one after the other, and images of all classes to remember."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from metarun.core import Episodes, TaskShape
from metarun.data.image_batches import Labelled
from metarun.data.sampler import distinct, uniforms
from metarun.errors import UserError
from metarun.text import counted, printable


def sequences(
    images: Labelled, task: TaskShape, remembered: int, seed: int, device: torch.device, key: str = "train.task"
) -> Callable[[int, int], Episodes]:
    """Sequences of images with the labels that they have among all training classes.

    The support set of a task are `task.shots` images of each of `task.ways` classes, class after class. Its queries are
    `task.queries` further images of each of these, and `remembered` images drawn from all classes.

    Args:
        images: The training images.
        task: The size of a sequence; one way is allowed.
        remembered: The images of all classes among the queries.
        seed: The run's seed; task i is a function of (seed, i) alone.
        device: Where the tasks shall lie.
        key: What errors are about.

    Returns:
        A function of (start, stop), which yields these tasks. Their labels are in `[0, len(images.names))`.

    Raises:
        UserError: There are fewer classes than a sequence has, or a class has too few images.
    """
    counts = images.counts
    offsets = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(images.labels, kind="stable")
    many, shots, queried = task.numbers
    needed = shots + queried
    if many > len(counts):
        raise UserError(f"{key}.ways={many}: is above the {len(counts)} training classes")
    if needed > counts.min():
        name = printable(images.names[int(counts.argmin())])
        enough = (counts >= needed).sum() >= many
        raise UserError(
            f"{key}: shots + queries = {shots} + {queried} = {needed} is above the {counted(int(counts.min()), images.item)} of the class "
            f"{name}; lower {key}.shots or {key}.queries{f', or leave small classes out: task.min_items={needed}' if enough else ''}"
        )
    if queried * many + remembered < 1:
        raise UserError(f"{key}.queries=0: leaves nothing to learn from; set it, or algo.remembered, above 0")
    read = images.reader(device, images.reference)

    def places(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the trajectories' images `[T, N, K + Q]` and of those to remember `[T, R]`."""
        tasks, each = stop - start, many * needed
        draws = uniforms(seed, "train/sequences", start, stop, 2 * many + 2 * each + remembered)
        ways = distinct(draws[:, :many], draws[:, many : 2 * many], np.full(tasks, len(counts), dtype=np.int64))
        rest = draws[:, 2 * many : 2 * many + 2 * each].reshape(tasks, 2, many, needed)
        members = distinct(
            rest[:, 0].reshape(-1, needed), rest[:, 1].reshape(-1, needed), counts[ways].reshape(-1)
        ).reshape(tasks, many, needed)
        remember = (draws[:, draws.shape[1] - remembered :] * len(order)).astype(np.int64)
        return order[members + offsets[ways][..., None]], order[remember]

    def batch(chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.change(read(images.rows[chosen].reshape(-1, 1), images.rotations[chosen].reshape(-1))[:, 0])
        return x.unflatten(0, chosen.shape), torch.from_numpy(images.labels[chosen]).to(device)

    def episodes(start: int, stop: int) -> Episodes:
        trajectory, remember = places(start, stop)
        tasks = stop - start
        support = trajectory[:, :, :shots].reshape(tasks, -1)
        queries = np.concatenate([trajectory[:, :, shots:].reshape(tasks, -1), remember], 1)
        return Episodes(*batch(support), *batch(queries), ways=len(counts))

    return episodes
