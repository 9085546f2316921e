"""The sweepers as Hydra sees them: it takes only plugins whose module lies in `hydra_plugins`.

The work is done in `metarun.sweeps`, which is imported by a sweep alone: Hydra looks for plugins at the start of every run. A
launcher needs no plugin (`metarun.sweeps.launcher`).
"""

from __future__ import annotations

from typing import Any, Literal

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from metarun.config.types import Given, PositiveInt, Seed
from metarun.config.validation import check_hydra, check_target


class Sweep(Sweeper):
    """A sweeper whose jobs are run by a launcher of metarun's."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Checks the settings of the sweeper, and builds the launcher; Hydra calls it once, before `sweep`."""
        from metarun.sweeps.launcher import build

        check_hydra(config.hydra)
        check_target(config.hydra.sweeper, "hydra.sweeper", Given())
        self.loader: Any = hydra_context.config_loader
        self.master = config
        self.job_launcher = build(hydra_context, task_function, config)


class Grid(Sweep):
    """Every combination of the values on the command line; only what is missing or unfinished is run.

    Args:
        params: More keys and their values, for an experiment file that is a sweep: {algo: "maml,protonet"}.
        dry_run: Whether the jobs are listed and nothing is run; --dry-run is this.
    """

    def __init__(self, *, params: dict[str, str] | None = None, dry_run: bool = False) -> None:
        self.params, self.dry_run = params or {}, dry_run

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the sweep of these overrides."""
        from metarun.sweeps import grid

        grid.sweep(self.job_launcher, self.loader, self.master, arguments, params=self.params, dry_run=self.dry_run)


class Search(Sweep):
    """Trials by Optuna, each a run without a test; then the weights of the best on validation are tested, once.

    Args:
        sampler: How trials are drawn.
        trials: The trials of the search.
        prune: Whether a trial ends whose validation score is below the median of the earlier ones at the same step.
        at_once: The trials of a batch, which the launcher runs together.
        seed: The seed of the sampler, not of the runs.
        storage: Where the trials are kept, an URL as Optuna takes it; null is search.db in the sweep's folder.
        params: More keys and what they are searched in: {train.optimizer.lr: "tag(log,interval(1e-4,1e-1))"}.
        dry_run: Whether the search is described and nothing is run; --dry-run is this.
    """

    def __init__(
        self,
        *,
        sampler: Literal["tpe", "random"] = "tpe",
        trials: PositiveInt = 20,
        prune: bool = True,
        at_once: PositiveInt = 1,
        seed: Seed = 0,
        storage: str | None = None,
        params: dict[str, str] | None = None,
        dry_run: bool = False,
    ) -> None:
        self.settings: dict[str, Any] = {
            "sampler": sampler,
            "trials": trials,
            "prune": prune,
            "at_once": at_once,
            "seed": seed,
            "storage": storage,
            "params": params or {},
            "dry_run": dry_run,
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Checks that Optuna is there, then as any sweeper."""
        from metarun.sweeps.launcher import imported

        imported("optuna", "hydra/sweeper=optuna", "optuna")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search in the space of these overrides."""
        from metarun.sweeps import search

        search.sweep(self.job_launcher, self.loader, self.master, arguments, search.Settings(**self.settings))
