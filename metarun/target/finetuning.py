"""Fine-tuning: the whole network, or a part of it, goes on learning from the target's images.

Layer-wise rates: Howard and Ruder 2018 (https://arxiv.org/abs/1801.06146), section 3.2. Head first and then all: Kumar et al.
2022 (https://arxiv.org/abs/2202.10054). L2-SP: Li, Grandvalet, Davoine 2018 (https://arxiv.org/abs/1802.01483), equation 3:

    Omega(w) = alpha/2 * ||w_S - w_S^0||^2 + beta/2 * ||w_head||^2

Differences from the papers:
- The rate falls along one cosine. Kumar et al. train the head to its end first, on fixed features, and then all anew;
  here a norm has its batch's statistics while the head learns alone, and its averages move.
- Howard and Ruder divide the rate by 2.6 from layer to layer, and thaw the layers one by one; here by 1 unless told.
- L2-SP draws all parameters of the unfrozen blocks, biases and a norm's too. AdamW scales its gradient like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import Ge, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from metarun.core import Algorithm, Backbone, Batch
from metarun.errors import UserError
from metarun.target.base import TargetMethod, Tuned, copied, keep_statistics, new_head, restored


class FineTuning(TargetMethod):
    """A new linear head on the learner's backbone, both trained on shuffled batches for `steps`; the last weights count.

    `optimizer` makes the optimiser of parameter groups; the rate falls to zero along a cosine. The blocks before
    `from_layer` stay frozen, running averages too. For the first `head_steps` the head learns alone. The rate of each block
    is `layer_decay` times that of the one after it, that of the last block `layer_decay` times the head's. `l2_sp` (alpha)
    draws the backbone to its weights at the start, `l2_head` (beta) the head to zero.

    Args:
        optimizer: The optimiser of the head and of the blocks that are not frozen.
        steps: The steps of training.
        batch_size: The images of a step.
        from_layer: The first block that is trained; those before it stay frozen. 0 trains all.
        head_steps: The steps at the start in which the head learns alone.
        layer_decay: The factor of the learning rate from each block to the one before it; 1 is the same rate
            for all.
        l2_sp: The weight of the distance to the backbone's weights at the start (alpha of L2-SP).
        l2_head: The weight of the squares of the head's weights (beta of L2-SP).
    """

    def __init__(
        self,
        learner: Algorithm,
        source: object = None,
        *,
        optimizer: Callable[..., Any],
        steps: PositiveInt = 100,
        batch_size: Annotated[int, Ge(2)] = 32,
        from_layer: NonNegativeInt = 0,
        head_steps: NonNegativeInt = 0,
        layer_decay: PositiveFloat = 1.0,
        l2_sp: NonNegativeFloat = 0.0,
        l2_head: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(learner)
        blocks = len(learner.backbone.blocks)
        if from_layer > blocks:
            raise UserError(
                f"transfer.from_layer={from_layer}: must be from 0 (all) to {blocks}, the backbone's blocks (none)"
            )
        if head_steps > steps:
            raise UserError(f"transfer.head_steps={head_steps}: must be from 0 to transfer.steps={steps}")
        self.optimizer, self.steps, self.batch_size = optimizer, steps, batch_size
        self.from_layer, self.head_steps, self.layer_decay = from_layer, head_steps, layer_decay
        self.l2_sp, self.l2_head = l2_sp, l2_head

    def restore(self, state: Mapping[str, Tensor], classes: int) -> Tuned:
        backbone = copied(self.learner.backbone)
        assert isinstance(backbone, Backbone)
        return restored(backbone, state, classes)

    def fit(self, train: Batch, classes: int) -> Tuned:
        backbone = copied(self.learner.backbone)
        assert isinstance(backbone, Backbone)
        head = new_head(backbone.features, classes, train.x.device)
        groups = self.groups(backbone, head)
        optimizer = self.optimizer(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        body = [value for group in groups[1:] for value in group["params"]]
        start = [value.detach().clone() for value in body]
        backbone.train()
        for block in backbone.whole_blocks[: self.from_layer]:
            for module in block:
                module.eval()
        draws = Shuffled(len(train.x), self.batch_size)
        for step in range(self.steps):
            rows = draws.next().to(train.x.device)
            embedded = backbone(self.augment(train.x[rows]))
            if step < self.head_steps:
                embedded = embedded.detach()
            loss = F.cross_entropy(head(embedded).float(), train.y[rows])
            if self.l2_sp and step >= self.head_steps:
                loss = loss + self.l2_sp / 2 * sum((w - w0).square().sum() for w, w0 in zip(body, start, strict=True))
            if self.l2_head:
                loss = loss + self.l2_head / 2 * (head.weight.square().sum() + head.bias.square().sum())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        keep_statistics(backbone, train.x)
        return Tuned(backbone, head)

    def groups(self, backbone: Backbone, head: nn.Module) -> list[dict[str, Any]]:
        """Makes the parameter groups: the head, then each unfrozen block from the last to the first, each with its rate."""
        rate = _rate(self.optimizer)
        groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "lr": rate}]
        blocks = [[value for module in block for value in module.parameters()] for block in backbone.whole_blocks]
        for number, parameters in reversed(list(enumerate(blocks))):
            if number < self.from_layer:
                for value in parameters:
                    value.requires_grad_(False)
            elif parameters:
                groups.append({"params": parameters, "lr": rate * self.layer_decay ** (len(blocks) - number)})
        known = {id(value) for group in groups for value in group["params"]}
        rest = [value for value in backbone.parameters() if value.requires_grad and id(value) not in known]
        if rest:  # they come before the first block, and go with it
            frozen = self.from_layer > 0
            for value in rest:
                value.requires_grad_(not frozen)
            if not frozen:
                groups.append({"params": rest, "lr": rate * self.layer_decay ** len(blocks)})
        return groups


class Shuffled:
    """Batches of shuffled epochs over n things, from the global generator; the last of an epoch may be smaller, but not 1."""

    def __init__(self, n: int, size: int) -> None:
        self.n, self.size = n, size
        self.waiting: list[Tensor] = []

    def next(self) -> Tensor:
        """Returns the positions of the next batch."""
        if not self.waiting:
            parts = list(torch.randperm(self.n).split(self.size))
            if len(parts) > 1 and len(parts[-1]) == 1:  # batch statistics of one image are none
                parts[-2:] = [torch.cat(parts[-2:])]
            self.waiting = parts[::-1]
        return self.waiting.pop()


def _rate(optimizer: Callable[..., Any]) -> float:
    rate = getattr(optimizer, "keywords", {}).get("lr")
    if rate is None:
        raise UserError("transfer.optimizer.lr: must be given (transfer.optimizer.lr=0.001)")
    return float(rate)
