"""Search for good settings with Optuna: trials are runs, chosen on validation alone, and only the best is tested, once."""

from __future__ import annotations

import hashlib
import math
import time
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun import files
from metarun.config import Config, flat, to_container
from metarun.config.overrides import hint_of, key_of, quoted, varies
from metarun.config.ranges import parts
from metarun.errors import JobRefused, JobsFailed, UserError
from metarun.runs import trial
from metarun.runs.folder import FREE
from metarun.runs.result import SCORE
from metarun.sweeps import plan
from metarun.sweeps.jobs import MENDABLE, PRUNED, Job, Outcome, tests, validates
from metarun.sweeps.launcher import Launcher
from metarun.sweeps.study import Study, address, check_storage, corners, distribution
from metarun.text import shell_path
from metarun.trust import allow

DATABASE = "search.db"  # in the sweep's folder, where no other storage is given
# Parts of a config that act after the weights were chosen; of these a validation is of the second, and some methods train on `TARGET`.
AFTERWARDS, VALIDATED, TARGET = ("transfer", "test", "continual", "usual"), "test.task.", "target"
SHOWN = ("name", "train.log_every", "pretrain.train.log_every")  # what changes files and lines alone


@dataclass(frozen=True)
class Settings:
    """What a search is told, `hydra.sweeper.*`."""

    sampler: str  # how trials are drawn, a key of `study.SAMPLERS`
    trials: int
    prune: bool  # whether trials that promise little end early
    at_once: int  # the trials of a batch
    seed: int  # of the sampler
    storage: str | None  # where the trials are kept, an URL as Optuna takes it; None is a file in the sweep's folder
    params: Mapping[str, str]  # more keys and what they are searched in, from a file
    dry_run: bool  # whether the search is described and nothing is run


def lock(root: Path, words: Sequence[str]) -> Path:
    """The file that a search locks while it is at work: one for each set of words, as there is one study for each."""
    return root / f".search-{hashlib.sha256(' '.join(sorted(words)).encode()).hexdigest()[:12]}.lock"


def check_whole(item: Override, config: DictConfig) -> None:
    """Raises `UserError` where a key that takes whole numbers alone is searched in an interval of all numbers."""
    value = item.value()
    if not isinstance(value, IntervalSweep) or (isinstance(value.start, int) and isinstance(value.end, int)):
        return
    base, _ = parts(hint_of(item.key_or_group, lambda path: OmegaConf.select(config, path)))
    if {*(typing.get_args(base) or [base])} - {type(None)} == {int}:
        low, high = math.ceil(value.start or 0), math.floor(value.end or 0)
        raise UserError(
            f"{item.key_or_group}: takes whole numbers; search it in int(interval({low},{high})) or range({low},{high + 1})"
        )


def scored(config: DictConfig) -> dict[str, Any]:
    """The values by key that the validation score of a run can depend on: how it is trained and validated, on what."""
    methods = [get_class(node._target_) for node in (config.algo, config.pretrain.algo) if node]
    on_target = any(getattr(method, "uses_target", "no") != "no" for method in methods)
    parts = AFTERWARDS if on_target else (*AFTERWARDS, TARGET)
    return {
        key: value
        for key, value in flat(to_container(config)).items()
        if key not in (*FREE, *SHOWN) and (key.partition(".")[0] not in parts or key.startswith(VALIDATED))
    }


def check_scored(possible: Sequence[tuple[Job, Any]], space: Iterable[str]) -> None:
    """Checks that trials have a validation score, and that it depends on each key that is searched.

    Args:
        possible: Jobs of draws with their configs; each but the first differs from it in one key.
        space: The keys that are searched, as they are typed: with `+` and `@package`.

    Raises:
        UserError: The search would choose by nothing.
    """
    if not all(validates(config) for _, config in possible):
        raise UserError(
            "hydra/sweeper=optuna: a search chooses by the validation score, and no stage of this recipe validates; "
            "without hydra/sweeper=optuna the same words are a grid"
        )
    (first, config), *others = possible
    own, values_of = scored(config), dict[str, list[dict[str, Any]]]()
    for job, other in others:
        for key in map(key_of, {*job.overrides} - {*first.overrides}):
            values_of.setdefault(key, []).append(scored(other))
    for key in space:
        if (name := key_of(key)) in values_of and all(values == own for values in values_of[name]):
            raise UserError(
                f"{key}: is not searched, no validation score depends on it; sweep it over the best settings afterwards"
            )


def sweep(
    launcher: Launcher,
    loader: Any,
    config: DictConfig,
    arguments: Sequence[str],
    settings: Settings,
) -> None:
    """Runs the trials of a search, tests the weights of the best, once, unless each trial has a test, and writes the report.

    Args:
        launcher: What runs the trials.
        loader: Hydra's loader of configs.
        config: The config of the sweep's command line.
        arguments: The overrides as they were typed.
        settings: The search's own.

    Raises:
        UserError: There is nothing to search, or a trial cannot be run as it is.
        JobsFailed: Some trials did not succeed.
    """
    if settings.storage is not None:
        settings = replace(settings, storage=address(settings.storage))
    overrides = plan.read_words(loader, config, arguments, settings.params)
    name = plan.sweep_name(overrides, config)
    for item in overrides:
        check_whole(item, config)
    space = {item.get_key_element(): distribution(item) for item in overrides if varies(item)}
    if not space:
        raise UserError("hydra/sweeper=optuna: nothing to search; give a key several values or an interval(a,b)")
    said = [plan.fixed_word(item) for item in overrides if not varies(item)]
    fixed = list(said)
    drawn_from = [str(item.input_line) for item in overrides if varies(item)]
    if not any(item.key_or_group == "recipe" for item in overrides):
        fixed.append("recipe=train")
    fixed += [f"name={name}"] if name else []
    possible = plan.jobs_of(loader, config, [[*fixed, *drawn] for drawn in corners(space)])
    plan.check_jobs(possible, launcher.here)
    check_scored(possible, space)
    root = possible[0][0].folder.parent
    # The lock below keeps two searches from one study, and lies in the folder: where others may use the storage too, it is a part.
    identity = [*said, *drawn_from, *([f"in {root.absolute()}"] if settings.storage else [])]
    if settings.dry_run:
        print(
            f"search   {settings.trials} trials of {', '.join(space)}{plan.estimate(root, settings.trials)}\nfolder   {shell_path(root)}"
        )
        return
    plan.check_folders(job for job, _ in possible)
    if settings.storage is not None:
        check_storage(settings.storage)
    files.make_folder(root)
    waiting = (
        f"search: another process is at work on it in {shell_path(root)}, and this one goes on with what that leaves"
    )
    with files.locked(lock(root, identity), waiting, tell=plan.say):
        study = Study(settings.storage or root / DATABASE, identity, space, settings.sampler, settings.seed)
        ended = _carry_out(launcher, loader, config, study, fixed, settings)
        if ended is None:
            return
        if best := study.best():
            number, value, drawn = best
            job, chosen = _job(loader, config, study, [*fixed, *drawn])
            tested = tests(chosen)
            how = "its own run has the test" if tested else "testing it"
            plan.say(f"best on validation: trial {number}, {value:.4g}, {' '.join(drawn)}; {how}")
            if not tested:
                ended += _test(launcher, loader, config, _in_its_folder(study, number, job), chosen, root)
        more = "a trial that failed counts as done; a larger hydra.sweeper.trials tries others"
        plan.conclude(ended, more)
        if best is None:
            raise JobsFailed(f"search: none of its {settings.trials} trials has succeeded; {more}")


def _carry_out(
    launcher: Launcher,
    loader: Any,
    config: DictConfig,
    study: Study,
    fixed: Sequence[str],
    settings: Settings,
) -> list[plan.Ended] | None:
    """Runs the trials that a study lacks; returns those that ended and were not pruned, None where nobody waits for them."""
    ended: list[plan.Ended] = []
    began, first = time.monotonic(), study.ended
    while study.ended < settings.trials:
        drawn = study.next(min(settings.at_once, settings.trials - study.ended))
        for number in [number for number, words in drawn.items() if study.fails(words)]:
            plan.say(f"trial {number}: {' '.join(drawn.pop(number))} has failed before, and is not run again")
            study.tell(number, None, pruned=False, own_error=True)
        words_of = {number: [*fixed, *words] for number, words in drawn.items()}
        ended_before = study.ended
        for job, outcome, seconds in _run_trials(launcher, loader, config, study, words_of, settings):
            if outcome.status != PRUNED:
                ended.append((job, outcome, seconds))
            left = plan.time_left(time.monotonic() - began, study.ended - first, settings.trials - first)
            plan.say(plan.progress(job, outcome, seconds, study.ended, settings.trials) + left)
        if study.ended < ended_before + len(drawn):  # the launcher does not wait, and has said so
            return None
    return ended


def _run_trials(
    launcher: Launcher,
    loader: Any,
    config: DictConfig,
    study: Study,
    words_of: Mapping[int, Sequence[str]],
    settings: Settings,
) -> Iterator[plan.Ended]:
    """Runs trials, by number and words, together; each gets its end in the study before it is yielded."""
    jobs: dict[Path, tuple[Job, Any]] = {}
    numbers_of: dict[Path, list[int]] = {}  # several where the same was drawn twice, which is one run
    for number, words in words_of.items():
        job, whole = _job(loader, config, study, words)
        job = begun if (begun := _in_its_folder(study, number, job)).finished else job
        study.begin(number, job.folder.name)
        drawn = [word for word in words if word.partition("=")[0] in study.space]
        if job.folder not in jobs:
            jobs[job.folder] = replace(job, label=" ".join(drawn)), whole
        numbers_of.setdefault(job.folder, []).append(number)
    ended = [*plan.already_ended(jobs.values(), look_at_data=True)]
    for job, whole in [one for one in jobs.values() if one[0] not in [job for job, _, _ in ended]]:
        try:
            plan.check_jobs([(job, whole)])
        except JobRefused as error:
            ended.append((job, Outcome(MENDABLE, str(error), own_error=True), 0.0))
    left = [job for job, _ in jobs.values() if job not in [job for job, _, _ in ended]]
    for job in left:
        trial.mark(job.folder, study.storage, study.name, numbers_of[job.folder][0], settings.prune)
    for job, outcome, seconds in chain(ended, launcher.launch(left, config) if left else ()):
        trial.unmark(job.folder)
        score = job.result.get(SCORE) if outcome.status == 0 and job.finished else None
        if outcome.status == 0 and job.finished and score is None:
            outcome = Outcome(
                MENDABLE, "it has no finite validation score, so that it has failed as a trial", own_error=True
            )
        for number in numbers_of[job.folder]:
            study.tell(number, score, outcome.status == PRUNED, outcome.own_error)
        yield job, outcome, seconds


def _job(loader: Any, config: DictConfig, study: Study, words: Sequence[str]) -> tuple[Job, Any]:
    """A trial's job with its config, without those of its words for which other recipes of the search alone have a use."""
    ((job, whole),) = plan.jobs_of(
        loader, config, plan.without_unread(loader, config, [words], checked="recipe" in study.space)
    )
    return job, whole


def _in_its_folder(study: Study, number: int, job: Job) -> Job:
    """A trial's job, in the folder that the trial has had."""
    name = study.folder(number)
    return job if name is None else replace(job, folder=job.folder.parent / name)


def _test(
    launcher: Launcher, loader: Any, config: DictConfig, job: Job, chosen: DictConfig, root: Path
) -> Iterable[plan.Ended]:
    """Tests the weights of a trial, by its job and its config, in a run of its own below `root`."""
    allow(chosen)  # the trial is the user's own run, so whatever it names may be built again
    where = {"checkpoint": job.folder, "name": root.name}
    where |= {"outputs": root.parent} if chosen.outputs != Config.outputs else {}
    words = ["recipe=test", *(f"{key}={quoted(str(value))}" for key, value in where.items())]
    ((job, whole),) = plan.jobs_of(loader, config, [words])
    job = replace(job, label="the best trial, tested")
    return plan.already_ended([(job, whole)], look_at_data=True) or launcher.launch([job], config)
