"""The contract of a wrapper: a training loss that is made of any method's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.core import Algorithm, Episodes

METHOD = "method."  # what the names of the method's weights begin with among the wrapper's


class Wrapper(Checked, nn.Module, ABC):
    """Holds a method and replaces its training loss, and nothing else of it.

    The method stays the algorithm of the run: validation, tests, later stages and `best.pt` have it alone. What a wrapper
    learns itself is trained with the method's weights, and lies in `last.pt` beside them.

    Built from the config's `wrapper`, with `method` and `validation`, the sampler of validation tasks, handed in.

    Args:
        method: The method that is trained.
    """

    configured_by = "wrapper"
    recordable = False  # whether `loss` does the same operations in every step, none of them random
    couples_tasks = False  # whether `loss` needs all tasks of a step at once, as tasks of one shape

    def __init__(self, method: Algorithm) -> None:
        super().__init__()
        self.method = method
        self.whole_batch = method.whole_batch  # whether `loss` needs all tasks of a step at once

    def check(self, tasks: int) -> None:
        """Checks that it can train on steps of so many tasks, before anything is trained; raises `UserError` if it cannot."""

    @abstractmethod
    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is trained on instead of the method's.

        Args:
            episodes: The training tasks.
            step: The number of the training step, from 0.

        Returns:
            The mean loss over the tasks (scalar), and detached scalars to log.
        """

    def own_state(self) -> dict[str, Tensor]:
        """The parameters and buffers of the wrapper itself, without the method's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(METHOD)}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `own_state` gave."""
        self.load_state_dict({**state, **{f"{METHOD}{key}": value for key, value in self.method.state_dict().items()}})
