"""What Hydra sees of metarun's launchers and sweepers: it takes only plugins whose module lies in `hydra_plugins`."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from metarun.config.overrides import quoted, varies
from metarun.config.types import Given, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from metarun.config.validation import check_target
from metarun.errors import UserError
from metarun.sweeps import plan
from metarun.sweeps.jobs import PRUNED, Job, Outcome
from metarun.text import shell_path
from metarun.trust import allow


class Commands(Launcher):
    """A launcher whose jobs are commands."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        check_target(config.hydra.launcher, "hydra.launcher", Given())
        self.check()

    def check(self) -> None:
        """Raises `UserError` where the settings are wrong or an extra is missing."""

    @abstractmethod
    def carry_out(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[plan.Ended]:
        """Runs the jobs of a sweep whose own config is `config`; yields each as it ends."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """For the sweepers of others: the validation scores, or the errors, in the order of the jobs."""
        jobs = [job for job, _ in plan.jobs_of(self.loader, self.config, job_overrides)]
        outcomes = {job: outcome for job, outcome, _ in self.carry_out(jobs, self.config)}
        returns = []
        for job in jobs:
            failed = outcomes[job].status != 0
            status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            returns.append(JobReturn(overrides=list(job.overrides), status=status))
            returns[-1].return_value = UserError(outcomes[job].message) if failed else score(job)
        return returns


def needs(module: str, what: str, extra: str) -> None:
    """Raises `UserError` that names the extra if `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what}: needs {module}, which is not installed; pip install 'metarun[{extra}]'")


def score(job: Job) -> float:
    """The validation score of a finished job; 0.0 of one that only tested."""
    return float(job.result.get("val/score", 0.0))


def launched(launcher: Launcher, jobs: Sequence[Job], config: DictConfig) -> Iterator[plan.Ended]:
    """The jobs as they end, by a launcher of ours or of others."""
    if not jobs:
        return
    if isinstance(launcher, Commands):
        yield from launcher.carry_out(jobs, config)
    else:
        for job, done in zip(jobs, launcher.launch([job.overrides for job in jobs], 0), strict=True):
            failed = done.status is not JobStatus.COMPLETED
            yield job, Outcome(2, str(done._return_value)) if failed else Outcome(), 0.0


class Local(Commands):
    """Processes on this machine, side by side.

    Args:
        at_once: The jobs at once; null is one a GPU, else as many as there are cores for hardware.processes times
            hardware.threads.
    """

    def __init__(self, *, at_once: PositiveInt | None = None) -> None:
        self.at_once = at_once

    def carry_out(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[plan.Ended]:
        from metarun.sweeps import local

        cores = config.hardware.processes * (config.hardware.threads or 1)
        return local.carry_out(jobs, self.at_once, cores, use_gpus=config.hardware.device != "cpu")


class Slurm(Commands):
    """One array of a Slurm cluster.

    Args:
        partition: The partition; null is the cluster's own choice.
        minutes: The time limit of each job in minutes.
        cpus: The cores of each job.
        gpus: The GPUs of each job.
        memory_gb: The memory of each job in gigabytes.
        at_once: The jobs that run at the same time.
        save_before: The seconds before its time is over at which a job saves and goes back into the queue.
        wait: Whether the command waits; otherwise the same command later waits, or shows how far the jobs are.
        poll_seconds: The seconds from one look at the queue to the next.
        options: Any other option of sbatch: {account: mine, qos: long}.
        setup: Lines of shell before each job: [module load cuda].
    """

    def __init__(
        self,
        *,
        partition: str | None = None,
        minutes: PositiveInt = 240,
        cpus: PositiveInt = 4,
        gpus: NonNegativeInt = 0,
        memory_gb: PositiveInt = 8,
        at_once: PositiveInt = 64,
        save_before: NonNegativeInt = 60,
        wait: bool = True,
        poll_seconds: PositiveFloat = 5.0,
        options: dict[str, Any] = {},  # noqa: B006
        setup: list[str] = [],  # noqa: B006
    ) -> None:
        self.wait, self.poll_seconds = wait, poll_seconds
        self.parameters = {
            "job_name": "metarun",
            "partition": partition,
            "time": minutes,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus or None,
            "mem": f"{memory_gb}GB",
            "array_parallelism": at_once,
            "signal_delay_s": save_before,
            "additional_parameters": {"requeue": True, "open_mode": "append", **options},
            "setup": list(setup) or None,
        }

    def check(self) -> None:
        needs("submitit", "hydra/launcher=slurm", "slurm")

    def carry_out(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[plan.Ended]:
        from metarun.sweeps import slurm

        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        return slurm.carry_out(jobs, parameters, self.wait, self.poll_seconds)


class Ray(Commands):
    """Ray, on a cluster or on this machine.

    Args:
        address: The address of the cluster (auto, ray://host:10001); null starts a Ray of this machine's own.
        cpus: The cores of each job.
        gpus: The GPUs of each job.
    """

    def __init__(self, *, address: str | None = None, cpus: NonNegativeFloat = 1, gpus: NonNegativeFloat = 0) -> None:
        self.address, self.resources = address, {"num_cpus": cpus, "num_gpus": gpus}

    def check(self) -> None:
        needs("ray", "hydra/launcher=ray", "ray")

    def carry_out(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[plan.Ended]:
        from metarun.sweeps import ray

        return ray.carry_out(jobs, self.address, self.resources)


class Search(Sweeper):
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
        self.dry_run = dry_run
        self.trials, self.at_once, self.storage, self.params = trials, at_once, storage, params or {}
        self.settings: dict[str, Any] = {"sampler": sampler, "prune": prune, "seed": seed}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        needs("optuna", "hydra/sweeper=optuna", "optuna")
        check_target(config.hydra.sweeper, "hydra.sweeper", Given())
        self.loader: Any = hydra_context.config_loader
        self.master: DictConfig = config
        self.started: Launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        from metarun.sweeps import search

        words = [*plan.read_params(self.params, self.master), *arguments]
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
        space = {item.key_or_group: search.distribution(item) for item in overrides if varies(item)}
        if not space:
            raise UserError("hydra/sweeper=optuna: nothing to search; give a key several values or an interval(a,b)")
        name = plan.sweep_name(overrides, dict(self.master.hydra.runtime.choices), self.master.recipe.source)
        fixed = [plan.fixed_word(item) for item in overrides if not varies(item)]
        identity = [*fixed, *(str(item.input_line) for item in overrides if varies(item))]
        if not any(item.key_or_group == "recipe" for item in overrides):
            fixed.append("recipe=train")
        fixed += [f"name={name}"] if name else []
        possible = plan.jobs_of(self.loader, self.master, [[*fixed, *drawn] for drawn in search.corners(space)])
        plan.check_jobs(possible)
        root = possible[0][0].folder.parent
        if self.dry_run:
            print(f"search   {self.trials} trials of {', '.join(space)}\nfolder   {shell_path(root)}")
            return
        if self.storage is None:
            root.mkdir(parents=True, exist_ok=True)
        study = search.Study(self.storage or search.database(root / "search.db"), identity, space, **self.settings)
        ended: list[plan.Ended] = []
        while study.ended < self.trials:
            batch = study.next(min(self.at_once, self.trials - study.ended))
            jobs = {}
            for number, drawn in batch.items():
                ((job, _),) = plan.jobs_of(self.loader, self.master, [[*fixed, *drawn]])
                jobs[number] = replace(job, label=" ".join(drawn))
                study.mark(job.folder, number)
            by_folder = {job.folder: number for number, job in jobs.items()}
            ended_before = study.ended
            for job, outcome, seconds in launched(self.started, list(jobs.values()), self.master):
                search.unmark(job.folder)
                pruned = outcome.status == PRUNED
                done = outcome.status == 0 and job.finished
                study.tell(by_folder[job.folder], score(job) if done else None, pruned)
                if not pruned:
                    ended.append((job, outcome, seconds))
                plan.say(plan.progress(job, outcome, seconds, study.ended, self.trials))
            if study.ended == ended_before:  # a launcher that does not wait has said so
                return
        if best := study.best():
            number, value, drawn = best
            ((job, config),) = plan.jobs_of(self.loader, self.master, [[*fixed, *drawn]])
            allow(config)  # its own run, so whatever it names may be built again
            plan.say(f"best on validation: trial {number}, {value:.4g}, {' '.join(drawn)}; testing it")
            where = {"checkpoint": job.folder, "name": root.name, "outputs": root.parent}
            words = ["recipe=test", *(f"{key}={quoted(str(value))}" for key, value in where.items())]
            ((job, _),) = plan.jobs_of(self.loader, self.master, [words])
            ended += launched(self.started, [replace(job, label="the best trial, tested")], self.master)
        plan.conclude(ended)


class Grid(BasicSweeper):
    """Every combination of the values on the command line; only what is missing or unfinished is run.

    Args:
        params: More keys and their values, for an experiment file that is a sweep: {algo: "maml,protonet"}.
        dry_run: Whether the jobs are listed and nothing is run; --dry-run is this.
    """

    def __init__(self, *, params: dict[str, str] | None = None, dry_run: bool = False) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.dry_run = dry_run

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        loader = self.hydra_context.config_loader
        words = [*plan.read_params(self.params, self.config), *arguments]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
        for item in overrides:
            if item.is_interval_sweep():
                raise UserError(f"{item.key_or_group}: an interval is for a search; add hydra/sweeper=optuna")
        name = plan.sweep_name(overrides, dict(self.config.hydra.runtime.choices), self.config.recipe.source)
        (batch,) = self.split_arguments(overrides, None)
        named = [[*words, f"name={name}"] if name else words for words in batch]
        jobs = plan.jobs_of(loader, self.config, named)
        ended = plan.already_ended(jobs)
        before = {job for job, _, _ in ended}
        plan.check_jobs([(job, config) for job, config in jobs if job not in before])
        to_run = [job for job, _ in jobs if job not in before]
        if self.dry_run:
            for job, _ in jobs:
                print(f"{plan.state(job):10}{job.label}  {shell_path(job.folder)}")
            print(f"{plan.counted(len(jobs))}: {len(before)} finished before, {len(to_run)} to run; nothing was run")
            return
        plan.say(f"{plan.counted(len(jobs))}: {len(before)} finished before, {len(to_run)} to run")
        for number, (job, outcome, seconds) in enumerate(launched(self.launcher, to_run, self.config), 1):
            ended.append((job, outcome, seconds))
            plan.say(plan.progress(job, outcome, seconds, number, len(to_run)))
        plan.conclude(ended)
