"""The contract of a launcher, which runs the jobs of a sweep, and how the one that a config names is built."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class
from omegaconf import DictConfig

from metarun.config import construct
from metarun.config.checked import Checked
from metarun.config.ranges import shown
from metarun.config.types import Given
from metarun.config.validation import check_target
from metarun.errors import Diverged, MadeOtherwise, UserError, not_imported
from metarun.sweeps.jobs import Job, Outcome
from metarun.sweeps.plan import Ended

HYDRAS = ("hydra_plugins.", "hydra.")  # modules of launchers that Hydra itself builds


class Launcher(Checked, ABC):
    """Runs the jobs of a sweep: somewhere, in any order, at most once each.

    A job is a command line (`Job.arguments`, to be given to `metarun.sweeps.jobs.perform` in a process of its own). The
    keyword-only arguments of the constructor are the launcher's settings, `hydra.launcher.*` on the command line.
    """

    configured_by = "hydra.launcher"
    here = False  # whether jobs run on this machine, so that what they lack here is told before the first

    def check(self) -> None:
        """Checks what the launcher needs, before anything runs.

        Raises:
            UserError: The settings do not go together, or a library or a program is missing.
        """

    @abstractmethod
    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        """Runs jobs.

        Args:
            jobs: The jobs, at least one; none of them has a result yet.
            config: The config of the command line that started the sweep, with the keys of every run.

        Yields:
            Each job as it ends, with its outcome and the seconds that it took. A launcher that does not wait yields
            nothing: the same command, given later, finds the results.
        """


class OfHydra(Launcher):
    """A launcher that was written for Hydra and knows nothing of metarun's jobs.

    Args:
        launcher: The launcher, set up for the sweep.
    """

    def __init__(self, launcher: HydraLauncher) -> None:
        self.launcher = launcher

    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        """Runs the jobs by their overrides, and yields all of them at the end."""
        for job, done in zip(jobs, self.launcher.launch([job.overrides for job in jobs], 0), strict=True):
            failed, returned = done.status is not JobStatus.COMPLETED, done._return_value
            marks = isinstance(returned, Diverged), isinstance(returned, MadeOtherwise)
            yield job, Outcome(2, str(returned), *marks) if failed else Outcome(), 0.0


def build(context: HydraContext, task: TaskFunction, config: DictConfig) -> Launcher:
    """Builds the launcher that `hydra.launcher` names, and checks it.

    Args:
        context: Hydra's, for a launcher of Hydra's.
        task: The function of a job, for a launcher of Hydra's.
        config: The config of the sweep's command line, Hydra's own keys included.

    Raises:
        UserError: The class is no launcher, a setting is wrong, or what the launcher needs is missing.
    """
    node = config.hydra.launcher
    if not isinstance(node, DictConfig) or not node:
        raise UserError(
            f"hydra.launcher={shown(node)}: a sweep has one; hydra/launcher=local, say, chooses it: metarun help hydra/launcher"
        )
    target = str(node.get("_target_"))
    if target.startswith(HYDRAS):
        return OfHydra(Plugins.instance().instantiate_launcher(context, task, config))
    check_target(node, "hydra.launcher", Given())
    if not issubclass(get_class(target), Launcher):
        raise UserError(
            f"hydra.launcher._target_={target}: is no launcher; it must be a class of metarun.sweeps.launcher.Launcher"
        )
    launcher: Launcher = construct(node, "hydra.launcher")
    launcher.check()
    return launcher


def needs(module: str, key: str, extra: str) -> None:
    """Checks that an optional library is installed.

    Args:
        module: The library's module.
        key: The words that need it, for the message: `hydra/launcher=ray`.
        extra: The extra of metarun that installs it.

    Raises:
        UserError: It is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:  # nothing, or a mere folder of that name in the working folder
        raise UserError(f"{key}: needs {module}, which is not installed; pip install 'metarun[{extra}]'")


def imported(module: str, key: str, extra: str) -> ModuleType:
    """An optional library; takes the arguments of `needs`.

    Raises:
        UserError: It is not installed, or broken.
    """
    needs(module, key, extra)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{key}: needs {module}, but {not_imported(module, error)}; pip install 'metarun[{extra}]'"
        ) from error
