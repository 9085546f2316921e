"""Normalisation by name: `norm` is a setting of every backbone, because it decides what a test query may know of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import UserError, nearest
from metarun.ops.numerics import precise
from metarun.ops.pooled_norm import pooled_batch_norm, worthwhile
from metarun.ops.second_order import batch_norm
from metarun.ops.support import of_support, remembering
from metarun.ops.tasks import vectorized
from metarun.text import counted

EPSILON = 1e-5  # added to the variance
MOMENTUM = 0.1  # weight of the newest batch in the running averages

KINDS = {
    "batch": "statistics of the current set, in training and at test alike (transductive)",
    "support": "statistics of the support rows, applied to all rows (inductive)",
    "running": "statistics of the batch while training, running averages afterwards (inductive)",
    "group": "statistics of each example's channel groups (inductive)",
    "none": "no normalisation, no parameters",
}
OF_A_SET = ("batch", "support")  # these kinds take the statistics of the set that goes through together, at test too
REFERENCE_IMAGES = 256  # training images, at most, whose statistics are kept for the classification of labelled images


def check_kind(kind: str) -> str:
    """Checks a kind of norm.

    Args:
        kind: A key of `KINDS`.

    Returns:
        The same.

    Raises:
        UserError: There is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"backbone.norm={kind}: is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return kind


def transductive(kind: str) -> bool:
    """Whether the features of a query depend, at test time, on the other queries of its set.

    Args:
        kind: A key of `KINDS`.
    """
    return check_kind(kind) == "batch"


def couples_rows(kind: str) -> bool:
    """Whether, in training, rows of one batch, none of them a support set's, are normalised by statistics of each other.

    Args:
        kind: A key of `KINDS`.
    """
    return check_kind(kind) == "running" or needs_reference(kind)


def needs_reference(kind: str) -> bool:
    """Whether features depend on the set of images that goes through together, at test too."""
    return check_kind(kind) in OF_A_SET


def labelled_rule(kind: str) -> str:
    """Says where the statistics come from when labelled images are classified, as `result.json` states it.

    No norm makes the prediction for a labelled image depend on other test images.
    """
    rules = {"running": "running averages of the training", "group": "each image's own", "none": "none"}
    return rules.get(kind, f"those of up to {REFERENCE_IMAGES} training images, kept for every test image")


def change_kind(module: nn.Module, kinds: Mapping[str, str]) -> None:
    """Gives the norms of a module other kinds, in place; the attribute `norm` of a backbone follows.

    Args:
        module: The module.
        kinds: The new kind of each old one; kinds that are not in it stay.
    """
    for part in module.modules():
        if isinstance(part, Norm):
            part.change_kind(kinds.get(part.kind, part.kind))
        elif isinstance(kind := getattr(part, "norm", None), str):
            part.norm = kinds.get(kind, kind)  # type: ignore[assignment]


@torch.no_grad()
def keep_statistics(module: nn.Module, forward: Callable[[], object]) -> None:
    """Fixes the statistics of the norms of kinds `batch` and `support` in `module`, in place.

    They become norms of the kind `running`, whose averages are the mean and the biased variance of the rows that reach them
    while `forward` runs. In evaluation mode `module` then gives these rows what it gave them before, and every other row
    what does not depend on the rows beside it.

    Args:
        module: What holds the norms; its weights stay as they are.
        forward: Passes the reference rows through `module`, all at once.
    """
    met: dict[Norm, tuple[Tensor, Tensor]] = {}

    def note(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(part, Norm)
        values = precise(inputs[0])
        axes = [0, *range(2, values.ndim)]
        met[part] = values.mean(axes), values.var(axes, correction=0)

    norms = [part for part in module.modules() if isinstance(part, Norm) and part.kind in OF_A_SET]
    handles = [part.register_forward_pre_hook(note) for part in norms]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    change_kind(module, dict.fromkeys(OF_A_SET, "running"))
    for part, (mean, variance) in met.items():
        part.running_mean.copy_(mean)
        part.running_var.copy_(variance)


_apart: ContextVar[bool] = ContextVar("apart", default=False)
_support: ContextVar[dict[Norm, tuple[Tensor, Tensor]] | None] = ContextVar("support", default=None)


@contextmanager
def sets_apart() -> Iterator[None]:
    """Opens a context in which `both_sets` sends the support set and the queries through a network one after the other.

    In evaluation mode the values are the same up to float order, for every kind but `batch`. What is computed of the support
    set then depends on no query, so that it has to be computed only once for a support set that is fixed.
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextmanager
def _shared(statistics: dict[Norm, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A context in which norms of kind `support` leave their statistics in `statistics`, or take those that are there."""
    token = _support.set(statistics)
    try:
        yield
    finally:
        _support.reset(token)


def both_sets(forward: Callable[[Tensor, int], Tensor], support: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Sends both sets of a task through a network as one batch, whose norms `support` have the statistics of the support set.

    Where predictions share a support set (`metarun.ops.support`) it goes through alone, once.

    Args:
        forward: The network: takes rows, and how many of the leading ones are the support set.
        support: The support set, `[N*K, ...]`.
        queries: The queries, `[N*Q, ...]`.

    Returns:
        What the network gives for the support set and for the queries.
    """
    if not (_apart.get() or remembering()):
        both = forward(torch.cat([support, queries]), len(support))
        return both[: len(support)], both[len(support) :]

    def alone() -> tuple[Tensor, dict[Norm, tuple[Tensor, Tensor]]]:
        statistics: dict[Norm, tuple[Tensor, Tensor]] = {}
        with _shared(statistics):
            # Of a traced set only its shape tells the length without fixing it.
            return forward(support, support.shape[0]), statistics

    known, statistics = of_support(alone)
    with _shared(statistics):
        return known, forward(queries, 0)


def group_count(channels: int) -> int:
    """Counts the groups of `group`: the largest divisor of `channels` up to 8 that leaves at least 4 channels a group, else 1."""
    return max(groups for groups in range(1, 9) if groups == 1 or (channels % groups == 0 and channels // groups >= 4))


class NoStatistics(UserError):
    """A norm has one value per channel, of which there is no deviation."""


class Norm(nn.Module):
    """Normalises each channel of `[B, C]` or `[B, C, H, W]`, then scales and shifts it by learned numbers (1 and 0 at first).

    The variance is the biased one, plus 1e-5. Kinds (`KINDS`):

    - `batch`: mean and variance over all B rows (and positions) of the very call, in training and at test alike, as in the
      official code of MAML (Finn et al. 2017): transductive wherever the rows are queries.
    - `support`: mean and variance over the first `n_support` rows (None: all rows), applied to every row. A query's
      features then do not depend on the other queries.
    - `running`: `torch.nn.BatchNorm2d` (Ioffe and Szegedy 2015): as `batch` while training, and running averages
      (momentum 0.1, unbiased variance) in evaluation mode.
    - `group`: group normalisation (Wu and He 2018) in `group_count(channels)` groups; no statistics across rows.
    - `none`: the identity.

    Raises `UserError` for an unknown kind, for `running` under `vmap` (whose running averages would need one copy a
    task), and where fewer than two values per channel are left to take a mean over.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.channels = channels
        self.kind = check_kind(kind)
        if kind != "none":
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))
        self.change_kind(kind)

    def change_kind(self, kind: str) -> None:
        """Makes this a norm of another kind with the same weights; running averages start at 0 and 1."""
        if kind == "running" and not hasattr(self, "running_mean"):
            weight = self.weight.detach()
            self.register_buffer("running_mean", torch.zeros_like(weight))
            self.register_buffer("running_var", torch.ones_like(weight))
            counted = torch.zeros((), dtype=torch.int64, device=weight.device)
            self.register_buffer("num_batches_tracked", counted, persistent=False)
        self.kind = kind

    def extra_repr(self) -> str:
        """Shows the channels and the kind where the module is printed."""
        return f"{self.channels}, {self.kind}"

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        """Normalises `x`, whose shape and type the result has; the kind `support` takes its statistics from the first `n_support` rows."""
        if self.kind == "none":
            return x
        if self.kind == "group":
            return self._group(x)
        if self.kind == "running":
            return self._running(x)
        if self.kind == "support" and (known := _support.get()) is not None:
            return self._of_support(x, known)
        reference = self._reference(x, n_support)
        self._check(reference, x)
        if reference >= len(x) and not vectorized():
            return batch_norm(x, self.weight, self.bias, EPSILON)[0]
        # Plain operations: the fused batch norm has wrong second derivatives under vmap, and fails there under autocast.
        values = precise(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        centred = values - values[:reference].mean(axes, keepdim=True)
        variance = centred[:reference].square().mean(axes, keepdim=True)
        scale = self.weight.view(shape) * torch.rsqrt(variance + EPSILON)
        return (centred * scale + self.bias.view(shape)).to(x.dtype)

    def pooled(self, x: Tensor, n_support: int | None = None) -> Tensor:
        """Normalises images `[B, C, H, W]` and takes the maxima of 2x2 positions, `[B, C, H // 2, W // 2]`.

        Large batches on a CPU go through both at once, where their own statistics are taken (`metarun.ops.pooled_norm`).
        """
        running = self.kind == "running" and self.training
        whole = self.kind in OF_A_SET and _support.get() is None and self._reference(x, n_support) >= len(x)
        watched = self._forward_pre_hooks or self._forward_hooks  # who waits for its call, as `keep_statistics` does
        if not (running or whole) or watched or vectorized() or not worthwhile(x):
            return F.max_pool2d(self(x, n_support), 2)
        self._check(len(x), x)
        maxima, mean, variance = pooled_batch_norm(x, self.weight, self.bias, EPSILON)
        if running:
            self._follow(x, mean, variance)
        return maxima

    def _reference(self, x: Tensor, n_support: int | None) -> int:
        """How many rows the statistics of a set are taken from."""
        return n_support if self.kind == "support" and n_support is not None else len(x)

    def _check(self, rows: int, x: Tensor) -> None:
        if rows * x[0, 0].numel() < 2:
            raise NoStatistics(
                f"backbone.norm={self.kind}: {counted(rows, 'row')} of one value per channel {'has' if rows == 1 else 'have'} no "
                "statistics; try backbone.norm=group"
            )

    def _running(self, x: Tensor) -> Tensor:
        if vectorized():
            raise UserError(
                "backbone.norm=running: cannot keep running averages with tasks vectorised; set hardware.vectorize=false"
            )
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON)
        self._check(len(x), x)
        normalised, mean, variance = batch_norm(x, self.weight, self.bias, EPSILON)
        self._follow(x, mean, variance)
        return normalised

    @torch.no_grad()
    def _follow(self, x: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Moves the running averages towards the statistics of a batch."""
        count = x.numel() // x.shape[1]
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
        self.running_var.lerp_(variance.to(self.running_var.dtype) * count / (count - 1), MOMENTUM)

    def _of_support(self, x: Tensor, known: dict[Norm, tuple[Tensor, Tensor]]) -> Tensor:
        """The support set, which comes first, leaves its statistics in `known`; the queries are normalised by them."""
        values = precise(x)
        if self not in known:
            self._check(x.shape[0], x)
            axes = [0, *range(2, x.ndim)]
            known[self] = values.mean(axes), values.var(axes, correction=0)
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, variance = (each.view(shape) for each in known[self])
        scale = self.weight.view(shape) * torch.rsqrt(variance + EPSILON)
        return ((values - mean) * scale + self.bias.view(shape)).to(x.dtype)

    def _group(self, x: Tensor) -> Tensor:
        groups = group_count(self.channels)
        if not vectorized():
            return F.group_norm(x, groups, self.weight, self.bias, EPSILON).to(x.dtype)
        values = precise(x).reshape(len(x), groups, -1)
        centred = values - values.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)
        shape = [1, -1] + [1] * (x.ndim - 2)
        return ((centred * scale).reshape(x.shape) * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)
