"""A grid: every combination of the values on the command line is a job, and only what has no result yet is run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig

from metarun.errors import UserError
from metarun.sweeps import plan
from metarun.sweeps.launcher import Launcher
from metarun.text import counted, shell_path


def sweep(
    launcher: Launcher,
    loader: Any,
    config: DictConfig,
    arguments: Sequence[str],
    *,
    params: Mapping[str, str],
    dry_run: bool,
) -> None:
    """Runs every combination, and writes the report.

    Args:
        launcher: What runs the jobs.
        loader: Hydra's loader of configs.
        config: The config of the sweep's command line.
        arguments: The overrides as they were typed.
        params: More keys and their values, from a file.
        dry_run: Whether the jobs are listed and nothing is run.

    Raises:
        UserError: A job cannot be run as it is.
        JobsFailed: Some jobs did not succeed.
    """
    overrides = plan.read_words(loader, config, arguments, params)
    for item in overrides:
        if item.is_interval_sweep():
            raise UserError(f"{item.key_or_group}: an interval is for a search; add hydra/sweeper=optuna")
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    name = plan.sweep_name(overrides, config, plan.uses_source(loader, config, batch))
    named = [[*words, f"name={name}"] if name else words for words in batch]
    if not named:
        raise UserError("-m: the sweep has no job; one of its ranges has no value")
    jobs = plan.jobs_of(loader, config, named)
    ended = plan.already_ended(jobs, look_at_data=not dry_run)
    before = {job for job, _, _ in ended}
    plan.check_jobs([(job, config) for job, config in jobs if job not in before], launcher.here)
    to_run = [job for job, _ in jobs if job not in before]
    if dry_run:
        for job, _ in jobs:
            print(f"{plan.state(job):10}{job.label}  {shell_path(job.folder)}")
        left = plan.estimate(jobs[0][0].folder.parent, len(to_run))
        print(
            f"{counted(len(jobs), 'job')}: {len(before)} finished before, {len(to_run)} to run{left}; nothing was run"
        )
        return
    plan.check_folders(to_run)
    plan.say(f"{counted(len(jobs), 'job')}: {len(before)} finished before, {len(to_run)} to run")
    began = time.monotonic()
    for number, (job, outcome, seconds) in enumerate(launcher.launch(to_run, config) if to_run else (), 1):
        ended.append((job, outcome, seconds))
        left = plan.time_left(time.monotonic() - began, number, len(to_run))
        plan.say(plan.progress(job, outcome, seconds, number, len(to_run)) + left)
    plan.conclude(ended)
