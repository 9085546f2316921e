"""A frozen backbone with a few numbers that learn: visual prompts, and low-rank changes of its weights.

Visual Prompt Tuning (Jia et al. 2022), https://arxiv.org/abs/2203.12119, equations 4 to 8: p tokens go through a vision transformer
beside the image's. Shallow: they are added before the first block. Deep: every block has its own, which take the place of
what became of the ones before. They start uniform in +-sqrt(6 / (3 P^2 + D)) for patches of P pixels and tokens of D channels;
SGD with momentum 0.9, linear warm-up over a tenth of the steps, then a cosine to zero. Differences from the official code
(kmnp/vpt): the prompts stand at the end of the sequence instead of behind the class token, which is the same, for attention
knows no order and prompts have no positions; the last layer norm does not see them, which is the same for what is read out; the
head starts at zero, and weight decay takes in its bias; rate and weight decay are settings, there chosen on validation
images from a grid; the rate changes with the steps, there with the epochs, of which there are 100, of batches of 128.

LoRA (Hu et al. 2021), https://arxiv.org/abs/2106.09685, equation 3: W becomes W + alpha/r B A, with B [out, r] at zero and A [r, in]
uniform below 1/sqrt(in) in size at first, as in the official code (microsoft/LoRA). A convolution's W is taken as a matrix
of its filters, one a row; the code's change of it has rank r times the kernel's size. Without `targets` all such
weights change, in the paper those of attention alone (mostly queries and values). Queries, keys and values in one
matrix share A; in the code each has its own. There is no dropout, the code's default; its runs with GPT-2 have 0.1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from metarun.config.types import DropRate, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Backbone, Batch
from metarun.errors import UserError
from metarun.target.base import TargetMethod, Tuned, keep_statistics, loaded, new_head, restored
from metarun.target.finetuning import Shuffled

MATRICES: list[tuple[type[nn.Module], str]] = [
    (nn.Linear, "weight"),
    (nn.Conv2d, "weight"),
    (nn.MultiheadAttention, "in_proj_weight"),
]


class Prompts(TargetMethod):
    """`prompts` learned tokens, at the input or (`deep`) at every block of a frozen vision transformer, and a new linear head.

    For the backbone vit, and the plain vision transformers of torchvision and timm. The backbone stays in evaluation mode.

    Args:
        optimizer: The optimiser of the prompts and of the head.
        prompts: The learned tokens.
        deep: Whether every block has tokens of its own; otherwise the input alone has them.
        steps: The steps of training.
        batch_size: The images of a step.
        warm_up: The share of the steps over which the rate rises from zero.
    """

    def __init__(
        self,
        learner: Algorithm,
        source: object = None,
        *,
        optimizer: Callable[..., Any],
        prompts: PositiveInt = 10,
        deep: bool = True,
        steps: PositiveInt = 200,
        batch_size: PositiveInt = 32,
        warm_up: DropRate = 0.1,
    ) -> None:
        super().__init__(learner)
        token_blocks(learner.backbone)
        self.prompts, self.deep = prompts, deep
        self.training = Tuning(optimizer, steps, batch_size, warm_up)

    def fit(self, train: Batch, classes: int) -> Prompted:
        backbone = frozen(self.learner.backbone)
        prompts = add_prompts(backbone, self.prompts, deep=self.deep)
        head = self.training(backbone, [prompts], train, self.augment, classes)
        keep_statistics(backbone, train.x)
        return Prompted(backbone, head, prompts)

    def restore(self, state: Mapping[str, Tensor], classes: int) -> Prompted:
        backbone = frozen(self.learner.backbone)
        head = new_head(backbone.features, classes, state["head.bias"].device)
        return loaded(Prompted(backbone, head, add_prompts(backbone, self.prompts, deep=self.deep)), state)


class LoRA(TargetMethod):
    """A change of rank `rank`, times `alpha / rank`, of each weight matrix of a frozen backbone, and a new linear head.

    Any backbone; it stays in evaluation mode. `targets`: the matrices whose names contain one of these words (`[qkv]`, the
    projections of attention, say); null is all linear and convolution weights.

    Args:
        optimizer: The optimiser of the low-rank changes and of the head.
        rank: The rank of the change of a weight matrix.
        alpha: The change is multiplied by alpha / rank.
        targets: Words, one of which the name of a matrix must contain to be changed ([qkv]); null is all linear
            and convolution weights.
        steps: The steps of training.
        batch_size: The images of a step.
        warm_up: The share of the steps over which the rate rises from zero.
    """

    def __init__(
        self,
        learner: Algorithm,
        source: object = None,
        *,
        optimizer: Callable[..., Any],
        rank: PositiveInt = 4,
        alpha: PositiveFloat = 8.0,
        targets: list[str] | None = None,
        steps: PositiveInt = 200,
        batch_size: PositiveInt = 32,
        warm_up: DropRate = 0.1,
    ) -> None:
        super().__init__(learner)
        matrices(learner.backbone, targets)
        self.rank, self.alpha, self.targets = rank, alpha, targets
        self.training = Tuning(optimizer, steps, batch_size, warm_up)

    def fit(self, train: Batch, classes: int) -> Tuned:
        backbone = frozen(self.learner.backbone)
        changes = add_low_rank(backbone, self.rank, self.alpha, self.targets)
        head = self.training(backbone, changes, train, self.augment, classes)
        keep_statistics(backbone, train.x)
        return Tuned(backbone, head)

    def restore(self, state: Mapping[str, Tensor], classes: int) -> Tuned:
        backbone = frozen(self.learner.backbone)
        add_low_rank(backbone, self.rank, self.alpha, self.targets)
        return restored(backbone, state, classes)


class Tuning:
    """How the few parameters and a new head are trained; the last weights count.

    `optimizer` makes the optimiser of parameters; its rate rises linearly for a share `warm_up` of the `steps` and then
    falls to zero along a cosine. Batches of `batch_size` come from shuffled epochs.
    """

    def __init__(self, optimizer: Callable[..., Any], steps: int, batch_size: int, warm_up: float) -> None:
        self.optimizer, self.steps, self.batch_size, self.warm_up = optimizer, steps, batch_size, warm_up

    def rate(self, step: int) -> float:
        """Computes what the learning rate is multiplied by in `step`, from 0."""
        rising = round(self.warm_up * self.steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        # A share of a few steps may be all of them; the rate after the last one is asked for too.
        falling = max(self.steps - rising, 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / falling))

    def __call__(
        self,
        backbone: Backbone,
        parameters: Sequence[nn.Parameter],
        train: Batch,
        augment: Callable[[Tensor], Tensor],
        classes: int,
    ) -> nn.Linear:
        """Trains the backbone in these parameters, in place, and a new linear head, which is returned."""
        head = new_head(backbone.features, classes, train.x.device)
        optimizer = self.optimizer([*parameters, *head.parameters()])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        draws = Shuffled(len(train.x), self.batch_size)
        for _ in range(self.steps):
            rows = draws.next().to(train.x.device)
            loss = F.cross_entropy(head(backbone(augment(train.x[rows]))).float(), train.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        return head


class Prompted(Tuned):
    """A backbone with prompts, which its hooks read, and a linear head."""

    def __init__(self, backbone: Backbone, head: nn.Linear, prompts: nn.Parameter) -> None:
        super().__init__(backbone, head)
        self.prompts = prompts


def frozen(backbone: Backbone) -> Backbone:
    """Makes a copy in evaluation mode, none of whose parameters takes gradients."""
    return copy.deepcopy(backbone).requires_grad_(False).eval()


def token_blocks(backbone: Backbone) -> list[nn.Module]:
    """Finds the blocks that prompts can go through.

    Raises:
        UserError: The backbone is no plain vision transformer.
    """
    blocks = getattr(backbone, "token_blocks", None)
    if not blocks:
        raise UserError(
            f"transfer=prompts: needs a plain vision transformer, and {type(backbone).__name__} is none; use backbone=vit, or "
            "backbone=pretrained backbone.name=timm:vit_small_patch16_224"
        )
    return list(blocks)


def add_prompts(backbone: Backbone, count: int, *, deep: bool) -> nn.Parameter:
    """Puts `count` tokens into `backbone` itself, by hooks; returns them, `[1 or blocks, count, width]`."""
    blocks = token_blocks(backbone)
    width = next(module for module in blocks[0].modules() if isinstance(module, nn.LayerNorm)).normalized_shape[0]
    patches = next(module for module in backbone.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    limit = math.sqrt(6 / (patches.weight[0].numel() + width))
    start = torch.empty(len(blocks) if deep else 1, count, width, device=patches.weight.device)
    prompts = nn.Parameter(start.uniform_(-limit, limit))

    def insert(number: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens = inputs[0] if number == 0 else inputs[0][:, :-count]
            return (
                torch.cat([tokens, prompts[number].expand(tokens.shape[0], -1, -1).to(tokens.dtype)], dim=1),
                *inputs[1:],
            )

        return hook

    for number in range(len(prompts)):
        blocks[number].register_forward_pre_hook(insert(number))
    blocks[-1].register_forward_hook(lambda block, inputs, tokens: tokens[:, :-count])
    return prompts


class LowRank(nn.Module):
    """A weight W `[out, ...]` to W + scale B A, of W's shape."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        inputs = weight[0].numel()
        limit = 1 / math.sqrt(inputs)
        self.scale = scale
        self.a = nn.Parameter(
            torch.empty(rank, inputs, dtype=weight.dtype, device=weight.device).uniform_(-limit, limit)
        )
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a).view_as(weight)


def matrices(backbone: Backbone, targets: Sequence[str] | None) -> list[tuple[nn.Module, str]]:
    """Finds the modules with weight matrices, and these weights' names in them.

    Args:
        backbone: The network.
        targets: Words, of which a weight's name must hold one; None for all weights.

    Raises:
        UserError: There are no weights, or none has such a name.
    """
    found = [
        (path, module, name)
        for path, module in backbone.named_modules()
        for kind, name in MATRICES
        if isinstance(module, kind) and getattr(module, name) is not None
    ]
    chosen = [
        (module, name)
        for path, module, name in found
        if targets is None or any(word in f"{path}.{name}" for word in targets)
    ]
    if not found:
        raise UserError(
            f"transfer: {type(backbone).__name__} has no weight matrices to change; take a backbone that has, or transfer=linear_probe"
        )
    if not chosen:
        names = ", ".join(f"{path}.{name}" for path, _, name in found[:6])
        raise UserError(
            f"transfer.targets={targets}: are in no name of the backbone's weight matrices, which begin {names}"
        )
    return chosen


def add_low_rank(backbone: Backbone, rank: int, alpha: float, targets: Sequence[str] | None) -> list[nn.Parameter]:
    """Adds low-rank changes to the weights of `backbone` itself; returns their parameters."""
    changes = []
    for module, name in matrices(backbone, targets):
        change = LowRank(getattr(module, name), rank, alpha / rank)
        register_parametrization(module, name, change)
        changes += list(change.parameters())
    return changes
