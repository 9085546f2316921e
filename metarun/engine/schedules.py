"""The schedule of learning rates that torch lacks."""

from __future__ import annotations

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


class Constant(LRScheduler):
    """Leaves the learning rate as it is. It has no setting, so that a preset or a command can put any other in its place."""

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of each group of parameters."""
        return [group["lr"] for group in self.optimizer.param_groups]
