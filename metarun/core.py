"""The shapes that flow through metarun, and the contract that a method fulfils.

T tasks (the meta-batch), N ways, K shots, Q queries per way; C, H, W an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun import functional
from metarun.backbones import norm
from metarun.errors import UserError


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


Between = Callable[[int, Tensor], Tensor]  # of a block's number and activations: what goes on in their place


class Backbone(nn.Module):
    """Images `[B, C, H, W]` (or vectors `[B, D]`) to features `[B, features]`.

    `forward(x, n_support=None, between=None)`: with the norm `support`, the statistics of the first `n_support` rows
    normalise all. `between(number, activations)` may change the activations of each block, `[B, widths[number], ...]`, where
    they have been normalised and have not yet gone through the nonlinearity that ends the block.
    """

    features: int
    widths: list[int]  # the channels of each block
    norm: str  # a kind of `metarun.backbones.norm`
    channels_last: bool = False  # the memory order of images between its layers; set from `hardware.channels_last`

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The blocks in order, each a module whose first input is what goes on from the one before."""
        return list(self.get_submodule("blocks").children())

    def ordered(self, images: Tensor) -> Tensor:
        """The same images `[B, C, H, W]`, the channels of a pixel side by side in memory if that is the chosen order.

        An image of one channel is both orders at once by its strides, which convolutions then take for the slower one:
        here its strides say the order. (`contiguous(memory_format=...)` leaves them as they are.)
        """
        if not self.channels_last:
            return images
        pixels = images.movedim(1, -1)
        return pixels.flatten(1).unflatten(1, pixels.shape[1:]).movedim(-1, 1)


class Algorithm(nn.Module, ABC):
    """A method: a batch of episodes (or of labelled images) in, a loss out; a batch of test episodes in, predictions out.

    It owns no optimiser, no device and no loop. Its keyword-only `__init__` arguments are its configuration:
    typed, with the paper's values as defaults. `backbone` and `spec` are handed in by the builder.
    """

    trains_on: Literal["episodes", "batches"] = "episodes"  # what `loss` is given: `Episodes`, or a `Batch`
    uses_target: Literal["no", "images", "labels"] = "no"  # what of a target a method sees that trains on batches
    regression: bool = False  # whether it can learn regression tasks
    fixed_ways: bool = False  # whether test tasks need the ways that it was trained with
    whole_batch: bool = False  # whether `loss` needs all tasks of a step at once
    needs_queries: bool = True  # whether training tasks need a query set
    vectorizable: bool = True  # whether its tasks can run by vmap
    soft_labels: bool = True  # whether the labels of training queries may be probabilities, [T, N*Q, N]
    recordable: bool = False  # whether `loss` does the same operations in every step, none of them random
    vectorize: bool = False  # tasks by vmap instead of a loop; set by the builder from `hardware.vectorize`

    def __init__(self, backbone: Backbone, spec: Spec) -> None:
        super().__init__()
        if spec.kind == "regression" and not self.regression:
            raise UserError(
                f"algo: {type(self).__name__} only classifies, but the data are regression tasks; try algo=maml"
            )
        self.backbone = backbone
        self.spec = spec

    @property
    def transductive(self) -> bool:
        """Whether the prediction for a query depends on the other queries."""
        return norm.transductive(self.backbone.norm)

    @abstractmethod
    def loss(self, episodes: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the tasks (scalar), and detached scalars to log (`acc`, say), for step `step` of training.

        Of `Episodes`, or of a `Batch` where `trains_on` says so.
        """

    @abstractmethod
    def predict(self, episodes: Episodes) -> Tensor:
        """Logits `[T, N*Q, N]` (regression: values `[T, Q, outputs]`) for the queries; reads no `query_y`."""

    def inherit(self, earlier: Algorithm) -> None:
        """Takes over what an earlier stage learned: the weights of its backbone, which is built as this one is."""
        self.backbone.load_state_dict(earlier.backbone.state_dict())

    def classify(self, x: Tensor) -> Tensor:
        """Logits `[B, classes]` of images for the classes that it was trained with: the target's, if it saw their labels."""
        raise NotImplementedError(f"{type(self).__name__} has no classes of its own")

    @property
    def test_steps(self) -> int:
        """Inner steps that `predict` takes at test time; 0 for a method without an inner loop."""
        return 0

    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        """Predictions after each of the given numbers of inner steps, `[len(steps), T, N*Q, N]`.

        The base class serves methods without an inner loop, for which `steps` is `[0]`.
        """
        return self.predict(episodes)[None]

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """What the method's paper reports beside the score of `predict`: values `[T]`, or curves `[T, points]`.

        Asked at meta-testing alone; the means over the episodes go to `result.json` under `test/`, with their intervals.
        """
        return {}

    def over_tasks(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """`function` of one task's tensors, for every task along the first axis; results are stacked."""
        return functional.over_tasks(function, *tensors, vectorize=self.vectorize)

    def task_loss(self, prediction: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy, with `smoothing` of the labels over all classes, or mean squared error for regression."""
        if self.spec.kind == "regression":
            return F.mse_loss(functional.precise(prediction), target)
        labels = target.flatten(0, -2) if target.is_floating_point() else target.flatten()  # probabilities, or classes
        return F.cross_entropy(functional.precise(prediction).flatten(0, -2), labels, label_smoothing=smoothing)

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What to log beside the loss: the query accuracy of a classification step."""
        if self.spec.kind == "regression":
            return {}
        target = target.argmax(-1) if target.is_floating_point() else target
        right = prediction.detach().argmax(-1) == target
        return {"acc": right.to(functional.precise(prediction).dtype).mean()}
