"""The shapes that flow through metarun.

T tasks (the meta-batch), N ways, K shots, Q queries per way; C, H, W an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """A meta-batch of T tasks of equal size; the sets are class-major (all of way 0, all of way 1, ...)."""

    support_x: Tensor  # [T, N*K, C, H, W] float  (regression: [T, K, D])
    support_y: Tensor  # [T, N*K] int64 in [0, N)  (regression: [T, K, outputs] float)
    query_x: Tensor  # [T, N*Q, C, H, W]
    query_y: Tensor  # [T, N*Q]
    ways: int  # N; 1 for regression
    shots: tuple[int, ...] | None = None  # support images of each way, the same in all tasks; None: equally many

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four sets, each with the task axis first, as `Algorithm.over_tasks` takes them."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    @property
    def n_tasks(self) -> int:
        return self.support_x.shape[0]

    def split(self, size: int) -> Iterator[Episodes]:
        """These tasks in chunks of at most `size` tasks."""
        parts = (tensor.split(size) for tensor in self.tensors)
        for support_x, support_y, query_x, query_y in zip(*parts, strict=True):
            yield Episodes(support_x, support_y, query_x, query_y, self.ways, self.shots)

    @property
    def support_sizes(self) -> list[int]:
        """The number of support images of each way; they are class-major."""
        return list(self.shots or [self.support_y.shape[1] // self.ways] * self.ways)

    def classes_in_turn(self) -> Tensor:
        """The places of the support images `[N*K]`, the first of each way, then the second of each that has one, and so on."""
        sizes = self.support_sizes
        firsts = [sum(sizes[:way]) for way in range(self.ways)]
        order = [first + n for n in range(max(sizes)) for first, size in zip(firsts, sizes, strict=True) if n < size]
        return torch.tensor(order, device=self.support_y.device)


@dataclass(frozen=True)
class Batch:
    """B labelled images, in no order, of one label space a domain."""

    x: Tensor  # [B, C, H, W] float
    y: Tensor  # [B] int64; -1 where the label is not known
    domain: Tensor  # [B] int64; 0 the source, 1 the target

    @property
    def n_tasks(self) -> int:
        """What a training step counts: images here, tasks of `Episodes`."""
        return len(self.x)

    def split(self, size: int) -> Iterator[Batch]:
        """These images in chunks of at most `size`."""
        for x, y, domain in zip(*(tensor.split(size) for tensor in (self.x, self.y, self.domain)), strict=True):
            yield Batch(x, y, domain)


@dataclass(frozen=True)
class TaskShape:
    """Ways, shots and queries of a task; a regression task has one way."""

    ways: int
    shots: int
    queries: int


@dataclass(frozen=True)
class Spec:
    """What a learner must know of its data before it is built."""

    input_shape: tuple[int, ...]  # (C, H, W), or (D,)
    kind: Literal["classification", "regression"]
    outputs: int  # ways of a training task, classes of labelled training images, or dimensions of a regression target
    target_outputs: int | None = None  # classes of the target, for a method that trains on its images too
    shots: int = 1  # of a training task
