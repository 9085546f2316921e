"""The shapes that flow through metarun.

T tasks (the meta-batch), N ways, K shots, Q queries per way; C, H, W an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """A meta-batch of T tasks of equal size; the sets are class-major (all of way 0, all of way 1, ...).

    Args:
        support_x: The support sets, float `[T, N*K, C, H, W]`; in regression `[T, K, D]`.
        support_y: Their labels, int64 `[T, N*K]` in `[0, N)`; in regression values, float `[T, K, outputs]`.
        query_x: The queries, `[T, N*Q, C, H, W]`; in regression `[T, Q, D]`.
        query_y: Their labels `[T, N*Q]`, or in training probabilities `[T, N*Q, N]`; in regression `[T, Q, outputs]`.
        ways: N, the classes of a task; 1 in regression.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    ways: int
    shots: tuple[int, ...] | None = None  # support images of each way, the same in all tasks; None: equally many

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four sets, each with the task axis first, as `Algorithm.over_tasks` takes them."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    @property
    def n_tasks(self) -> int:
        """T, the number of tasks, which a training step counts."""
        return self.support_x.shape[0]

    def split(self, size: int) -> Iterator[Episodes]:
        """Splits the meta-batch.

        Args:
            size: The most tasks of a chunk, at least 1.

        Yields:
            The tasks in their order, as views.
        """
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
    """B labelled images in no order; each domain has its own labels.

    Args:
        x: The images, float `[B, C, H, W]`.
        y: Their labels, int64 `[B]`; -1 where a label is not known.
        domain: Where they are from, int64 `[B]`; 0 is the source, 1 the target.
    """

    x: Tensor
    y: Tensor
    domain: Tensor

    @property
    def n_tasks(self) -> int:
        """B: a training step counts images here, and tasks in `Episodes`."""
        return len(self.x)

    def split(self, size: int) -> Iterator[Batch]:
        """Splits the batch.

        Args:
            size: The most images of a chunk, at least 1.

        Yields:
            The images in their order, as views.
        """
        for x, y, domain in zip(*(tensor.split(size) for tensor in (self.x, self.y, self.domain)), strict=True):
            yield Batch(x, y, domain)


Tasks = TypeVar("Tasks", Episodes, Batch)


def joined(parts: Sequence[Tasks]) -> Tasks:
    """Several meta-batches or batches as one, in their order; what is no tensor is that of the first."""
    first = parts[0]
    names = [item.name for item in fields(first) if isinstance(getattr(first, item.name), Tensor)]
    whole: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **whole)


@dataclass(frozen=True)
class TaskShape:
    """The size of a task.

    Args:
        ways: N, its classes; 1 in regression.
        shots: K, the support examples of each class.
        queries: Q, the queries of each class.
    """

    ways: int
    shots: int
    queries: int


@dataclass(frozen=True)
class Spec:
    """What a method must know of its data before it is built.

    Args:
        input_shape: The shape of an item: `(C, H, W)`, or `(D,)`.
        kind: Whether labels or values are predicted.
        outputs: The ways of a training task, the classes of labelled training images, or the dimensions of a regression target.
        target_outputs: The classes of the target, for a method that trains on the target's images too.
        shots: The shots of a training task.
    """

    input_shape: tuple[int, ...]
    kind: Literal["classification", "regression"]
    outputs: int
    target_outputs: int | None = None
    shots: int = 1
