"""What methods share that train on the images of a source and of a target together: enough of either in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from metarun.algos.baseline import Baseline
from metarun.core import Algorithm, Batch
from metarun.errors import UserError
from metarun.ops.draws import gather
from metarun.text import counted


class DomainAdaptation(Baseline):
    """A classifier of the source that sees images of the target in every step.

    Attributes:
        least: How many images of each domain its loss needs.
    """

    uses_target: Literal["no", "images", "labels"] = "images"
    least: int = 1

    def check(self, tasks: int, *, earlier: Algorithm | None) -> None:
        if tasks < 2 * self.least:  # the domains come by turns
            raise UserError(
                f"train.tasks_per_step={tasks}: {type(self).__name__} needs {counted(self.least, 'image')} of the source and of "
                f"the target in every step; use at least {2 * self.least} (128, say)"
            )

    def whole_step(self, batch: Batch) -> tuple[Tensor, Batch, Tensor, Tensor]:
        """The features of all images of a step, in every process: what couples images needs all of them.

        Args:
            batch: This process's images.

        Returns:
            The features `[B, D]` of all images of the step; their labels and domains, beside this process's own images; and
            which of them are the source's and which the target's, bool `[B]` each.

        Raises:
            UserError: The step has too few images of one of them.
        """
        labels, domain = (gather(values.double()).to(values.dtype) for values in (batch.y, batch.domain))
        source, target = domain == 0, domain == 1
        if min(source.sum(), target.sum()) < self.least:
            raise UserError(
                f"algo: {type(self).__name__} needs {counted(self.least, 'image')} of a source and of a target in every step, "
                f"not {source.sum()} and {target.sum()}; add recipe=domain_adaptation target=NAME, or raise train.tasks_per_step"
            )
        return gather(self.features_of(batch.x)), replace(batch, y=labels, domain=domain), source, target
