"""Tasks with wrong labels, for methods that are to find them out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from metarun.core import Episodes
from metarun.data.sampler import uniforms
from metarun.data.source import EpisodeSampler
from metarun.errors import UserError


def noisy_tasks(seed: int, start: int, stop: int, share: float) -> np.ndarray:
    """Which of the training tasks from `start` to `stop` have wrong labels, bool `[stop - start]`: a share of them."""
    return uniforms(seed, "train/noisy", start, stop, 1)[:, 0] < share


def with_noise(sampler: EpisodeSampler, seed: int, tasks: float, labels: float) -> EpisodeSampler:
    """The tasks of `sampler`; in a share `tasks` of them, a share `labels` of the support examples change places.

    So their labels are wrong, while each class keeps its number of examples (in the style of the symmetric noise of Yao et
    al. 2021, ATS, section 5.1). Task i depends on (seed, i) alone.
    """

    if max(tasks, labels) > 1:
        raise UserError(f"train.noise: tasks={tasks} and labels={labels} are shares; they must be at most 1")

    def episodes(start: int, stop: int) -> Episodes:
        found = sampler(start, stop)
        size = found.support_x.shape[1]
        draws = uniforms(seed, "train/noise", start, stop, 2 * size)
        order = np.tile(np.arange(size), (stop - start, 1))
        for row in np.flatnonzero(noisy_tasks(seed, start, stop, tasks)):
            moved = np.flatnonzero(draws[row, :size] < labels)
            order[row, moved] = moved[draws[row, size:][moved].argsort()]
        places = torch.from_numpy(order).to(found.support_x.device)
        rows = torch.arange(stop - start, device=places.device)[:, None]
        return replace(found, support_x=found.support_x[rows, places])

    return episodes
