"""The contract of a wrapper: a training loss that is made of any method's own, or tasks that are made of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.core import Algorithm, Episodes, MixedEpisodes, TaskShape

METHOD = "method."  # what the names of the method's weights begin with among the wrapper's


class Wrapper(Checked, nn.Module, ABC):
    """Holds a method and replaces its training loss, or the tasks that it is given, and nothing else of it.

    The method stays the algorithm of the run: validation, tests, later stages and `best.pt` have it alone. What a wrapper
    learns itself is trained with the method's weights, and lies in `last.pt` beside them. A wrapper that makes other tasks of
    the tasks (`preparation`) does so in validation and tests too, also in those of `recipe=test`.

    Built from the config's `wrapper`, with `method` and `validation`, the sampler of validation tasks, handed in.

    Args:
        method: The method that is trained.

    Attributes:
        prepares: Whether it defines a `preparation`; found by the class itself.
        trains: Whether it changes the training; of batches of images it could not.
        recordable: Whether `loss` does the same operations in every step, none of them random.
        couples_tasks: Whether `loss` needs all tasks of a step at once, as tasks of one shape.
        whole_batch: Whether `loss` needs all tasks of a step at once, of any shapes; as its method does.
    """

    configured_by = "wrapper"
    prepares: ClassVar[bool] = False
    trains: bool = True
    recordable = False
    couples_tasks = False

    def __init__(self, method: Algorithm) -> None:
        super().__init__()
        self.method = method
        self.whole_batch = method.whole_batch

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.prepares = cls.preparation is not Wrapper.preparation

    def preparation(self) -> Callable[[Algorithm, Episodes], Episodes | MixedEpisodes] | None:
        """What makes other tasks of tasks before a method predicts them: a function of the method and of tasks of one shape.

        It returns as many tasks, in their order and with the same queries, of any shapes. None leaves tasks as they are.
        """
        return None

    def check_tasks(self, task: TaskShape, test_task: TaskShape) -> None:
        """Checks that it can train on tasks of such shapes, and has something to do, before anything is trained.

        Args:
            task: The shapes of the training tasks.
            test_task: Those of validation and test tasks.

        Raises:
            UserError: It cannot.
        """

    def check(self, tasks: int) -> None:
        """Checks that it can train on steps of so many tasks, before anything is trained.

        Args:
            tasks: The tasks of a step, over all processes.

        Raises:
            UserError: It cannot.
        """

    @abstractmethod
    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is trained on instead of the method's.

        Args:
            episodes: The training tasks.
            step: The number of the training step, from 0.

        Returns:
            The mean loss over the tasks, a scalar with a graph; and detached scalars to log, by name.
        """

    def own_state(self) -> dict[str, Tensor]:
        """The parameters and buffers of the wrapper itself, without the method's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(METHOD)}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `own_state` gave.

        Args:
            state: Parameters and buffers by name.
        """
        self.load_state_dict({**state, **{f"{METHOD}{key}": value for key, value in self.method.state_dict().items()}})
