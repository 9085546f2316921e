"""Fine-tuning of a small part of a backbone that is there already: its biases, or its norms' scales and shifts.

BitFit (Ben Zaken, Ravfogel, Goldberg 2022), https://arxiv.org/abs/2106.10199: the biases of all layers, norms' shifts among them, and a new
head are trained, and nothing else. LN-tuning (Qi et al. 2022, https://arxiv.org/abs/2211.08682): the scales and shifts of the layer norms;
here of norms of any kind, as Frankle, Schwab, Morcos (2021, https://arxiv.org/abs/2003.00152) train batch norms alone.

Differences from the papers: the backbone stays in evaluation mode, so that a batch norm's averages are those of the source; the head
starts at zero; there is no dropout; the rate rises over a tenth of the steps and falls along a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from metarun.config.types import DropRate, PositiveInt
from metarun.core import Algorithm, Backbone, Batch
from metarun.errors import UserError
from metarun.ops.batch_norm import Norm
from metarun.target.base import TargetMethod, Tuned, keep_statistics, restored
from metarun.target.prompts import Tuning, frozen

NORMS = (Norm, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class PartialTuning(TargetMethod):
    """A new linear head on the learner's backbone, of which one kind of parameter is trained too; the last weights count.

    Args:
        optimizer: The optimiser of these parameters and of the head.
        part: What of the backbone is trained: the biases of all layers, or the scales and shifts of its norms.
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
        part: Literal["biases", "norms"] = "biases",
        steps: PositiveInt = 200,
        batch_size: PositiveInt = 32,
        warm_up: DropRate = 0.1,
    ) -> None:
        super().__init__(learner)
        self.part = part
        if not chosen(learner.backbone, part):
            raise UserError(
                f"transfer.part={part}: the backbone {type(learner.backbone).__name__} has no {part}; use transfer=all, or "
                "another backbone (backbone.norm=running has norms)"
            )
        self.training = Tuning(optimizer, steps, batch_size, warm_up)

    def fit(self, train: Batch, classes: int) -> Tuned:
        backbone = frozen(self.learner.backbone)
        parameters = chosen(backbone, self.part)
        for value in parameters:
            value.requires_grad_()
        head = self.training(backbone, parameters, train, self.augment, classes)
        keep_statistics(backbone, train.x)
        return Tuned(backbone, head)

    def restore(self, state: Mapping[str, Tensor], classes: int) -> Tuned:
        return restored(frozen(self.learner.backbone), state, classes)


def chosen(backbone: Backbone, part: str) -> list[nn.Parameter]:
    """The parameters of a backbone that are biases, or of norms; each once."""
    if part == "biases":
        return [value for name, value in backbone.named_parameters() if name.endswith("bias")]
    of_norms = (module for module in backbone.modules() if isinstance(module, NORMS))
    return [value for module in of_norms for value in module.parameters(recurse=False)]
