"""The contract of a stage: what a recipe is a list of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from metarun.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from metarun.engine.distributed import World
    from metarun.engine.learner import Trainable
    from metarun.runs.run import Run


TRAINING = ("train", "pretrain", "optimizer", "schedule")  # the parts and groups that only a stage that trains reads


class Stage(ABC):
    """One part of a run, which builds what it needs and then carries it out.

    Its keyword-only constructor arguments are its settings in the recipe. The class attributes say to the run what it must
    know before any stage is built.

    Attributes:
        gives_weights: Whether it trains or loads a learner, which the stages after it use.
        needs_weights: Whether it uses a learner of a stage before it. Unless it gives weights itself, none after it may give any:
            what a run uses is its last learner.
        needs_target: Whether it uses the target (`target=`).
        uses_transfer: Whether it learns the target in the way that `transfer=` names.
        needs_checkpoint: Whether it loads `checkpoint=`.
        continues_config: Whether it goes on with the config of the run of `checkpoint=`, instead of this command line's.
        needs_data: Whether it uses images of the source or of the target.
        one_process: Whether one process alone can carry it out.
        measures: What its main numbers in `result.json` begin with, `test` or `target`, which one stage of a run alone may fill;
            empty for other numbers.
        meta_tests: Whether it takes episodes of the test classes, of which no stage before it may then see an image.
        tests_source: Whether what it tests on is of the source alone, whatever `test.data` names, and by numbers of its own.
        asks_for_classes: Whether it asks a learner for the classes that it was trained with.
        reads: The keys beside the groups that this stage reads and most others do not, `support`, say. On the command line of a
            run none of whose stages reads them they are refused. After a checkpoint was loaded, the parts and groups of
            training count among them: a stage that goes on training the learner in a way of its own names `train`, say.
        learner: What a stage that gives weights trained or loaded, from `prepare` on; None of any other.
        shares_training: Whether runs often differ in this stage alone. The training before it is then kept apart from the
            run's folder, where all of them find it.
    """

    gives_weights: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    uses_transfer: ClassVar[bool] = False
    needs_checkpoint: ClassVar[bool] = False
    continues_config: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    one_process: ClassVar[bool] = False
    measures: ClassVar[str] = ""
    meta_tests: ClassVar[bool] = False
    tests_source: ClassVar[bool] = False
    asks_for_classes: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    shares_training: ClassVar[bool] = False
    learner: Trainable | None = None

    def check(self, config: DictConfig, world: World) -> None:
        """Checks what needs no data, before these are read, which may take minutes.

        Args:
            config: The whole config.
            world: The processes.

        Raises:
            UserError: The config cannot be carried out.
        """
        if self.one_process and world.size > 1:
            raise UserError(f"hardware.processes={world.size}: {self} is carried out by one process; leave it at 1")

    @property
    def takes_episodes(self) -> bool:
        """Whether it tests on episodes, of the data sets and in the numbers that `test` names."""
        return self.meta_tests and not self.tests_source

    @abstractmethod
    def prepare(self, run: Run) -> None:
        """Builds what the stage needs, in every rank; writes nothing.

        Args:
            run: The run, whose data are there, and the learners of the stages before.

        Raises:
            UserError: The config cannot be carried out. All stages are prepared before anything is computed or written.
        """

    @abstractmethod
    def execute(self, run: Run) -> None:
        """Carries the stage out, in every rank; adds its numbers to `run.result`.

        Args:
            run: The run, as it was given to `prepare`.
        """

    def trains_by(self) -> tuple[str, ...]:
        """Lists the parts and groups of the config, or keys in them, by which it trains: of a stage that does not say which, all."""
        return TRAINING if self.gives_weights and not self.needs_checkpoint else ()

    def depends_on(self, run: Run) -> dict[str, Any]:
        """Lists everything that the stage's outcome depends on, as JSON values: their digest names a stage that is kept apart.

        Args:
            run: The run, prepared.
        """
        return {}

    def protocol(self, run: Run) -> dict[str, Any]:
        """Gives what `protocol` of `result.json` says of the stage.

        Args:
            run: The run, carried out.

        Returns:
            JSON values by name; what several stages say under `seen` is put together.
        """
        return {}

    def is_current(self, folder: Path, config: DictConfig, stored: dict[str, Any]) -> bool:
        """Whether the stored result of a finished run is still that of its inputs; otherwise the stages are carried out anew.

        Args:
            folder: The run's folder.
            config: The whole config.
            stored: What `result.json` holds.
        """
        return True

    def conclude(self, folder: Path, stored: dict[str, Any]) -> str:
        """Shows what the stage found, at the end of a run and wherever its stored result is shown.

        Args:
            folder: The run's folder.
            stored: What `result.json` holds.

        Returns:
            What was bad in the input and so left out, for exit status 1; an empty string where nothing was.
        """
        return ""

    def next_steps(self, stored: dict[str, Any]) -> list[str]:
        """Lists commands that somebody is likely to want after this stage, beside those that follow any run with such a result.

        Args:
            stored: What `result.json` holds.
        """
        return []

    def __str__(self) -> str:
        """Names the stage for messages."""
        return type(self).__name__


def check_order(stages: list[Stage]) -> None:
    """Checks that every stage comes after what it needs, and that none takes the place of what another works on, or has found.

    Raises:
        UserError: There is no stage, one stands where it has nothing to work on, or where it would not use what it seems to, or two
            would write the same numbers.
    """
    if not stages:
        raise UserError(
            "recipe.stages: is empty, so there is nothing to do; recipe=meta has "
            "[metarun.stages.Train,metarun.stages.MetaTest]"
        )
    alone = next((stage for stage in stages if stage.needs_checkpoint and not stage.continues_config), None)
    other = next((stage for stage in stages if stage.needs_weights or stage.gives_weights), None)
    if alone and other:
        raise UserError(
            f"recipe.stages: {alone} uses what checkpoint= learned, and {other} a learner of this run; give each a recipe of its own"
        )
    given = ""
    for place, stage in enumerate(stages):
        later = next((other for other in stages[place + 1 :] if other.gives_weights), None)
        if stage.needs_weights and not given:
            reason = f"it must stand after {later}" if later else "add metarun.stages.Train before it"
            raise UserError(
                f"recipe.stages: {stage} uses a learner, but no stage before it trains or loads one; {reason}"
            )
        if later and not stage.gives_weights and (stage.needs_weights or stage.uses_transfer):
            raise UserError(
                f"recipe.stages: {stage} stands before {later}, whose learner it would not use; put it after"
            )
        if same := next((one for one in stages[:place] if stage.measures and one.measures == stage.measures), None):
            raise UserError(
                f"recipe.stages: {same} and {stage} would write the same numbers of result.json, {stage.measures}/*; give each a recipe "
                "of its own"
            )
        given = given or (str(stage) if stage.gives_weights else "")
