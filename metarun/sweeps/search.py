"""Search for good settings with Optuna: trials are runs, chosen on validation alone, and only the best is tested, once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun import files
from metarun.config import Config
from metarun.config.overrides import quoted, varies
from metarun.errors import JobsFailed, UserError
from metarun.runs import trial
from metarun.runs.result import SCORE
from metarun.sweeps import plan
from metarun.sweeps.jobs import MENDABLE, PRUNED, Job, Outcome, validates
from metarun.sweeps.launcher import Launcher
from metarun.sweeps.study import Study, corners, distribution
from metarun.text import shell_path
from metarun.trust import allow

DATABASE = "search.db"  # in the sweep's folder, where no other storage is given
# Keys that begin so, and not as one of the second, act after the weights were chosen, or on how the chosen ones are tested.
UNSCORED, SCORED = ("transfer.", "test."), ("test.task.",)


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


def check_scored(possible: Sequence[tuple[Job, Any]], space: Iterable[str]) -> None:
    """Checks that trials have a validation score, and that it depends on what is searched.

    Args:
        possible: Jobs of draws, which between them have every choice, with their configs.
        space: The keys that are searched.

    Raises:
        UserError: The search would choose by nothing.
    """
    if not all(validates(config) for _, config in possible):
        raise UserError(
            "hydra/sweeper=optuna: a search chooses by the validation score, and no stage of this recipe validates; "
            "without hydra/sweeper=optuna the same words are a grid"
        )
    for key in space:
        if f"{key}.".startswith(UNSCORED) and not f"{key}.".startswith(SCORED):
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
    """Runs the trials of a search, tests the weights of the best, once, and writes the report.

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
    overrides = plan.read_words(loader, config, arguments, settings.params)
    name = plan.sweep_name(overrides, config)
    space = {item.key_or_group: distribution(item) for item in overrides if varies(item)}
    if not space:
        raise UserError("hydra/sweeper=optuna: nothing to search; give a key several values or an interval(a,b)")
    said = [plan.fixed_word(item) for item in overrides if not varies(item)]
    fixed = list(said)
    drawn_from = [str(item.input_line) for item in overrides if varies(item)]
    if not any(item.key_or_group == "recipe" for item in overrides):
        fixed.append("recipe=train")
    fixed += [f"name={name}"] if name else []
    possible = plan.jobs_of(loader, config, [[*fixed, *drawn] for drawn in corners(space)])
    plan.check_jobs(possible)
    check_scored(possible, space)
    root = possible[0][0].folder.parent
    # The lock below keeps two searches from one study, and lies in the folder: where others may use the storage too, it is a part.
    identity = [*said, *drawn_from, *([f"in {root.absolute()}"] if settings.storage else [])]
    if settings.dry_run:
        print(
            f"search   {settings.trials} trials of {', '.join(space)}{plan.estimate(root, settings.trials)}\nfolder   {shell_path(root)}"
        )
        return
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
            plan.say(f"best on validation: trial {number}, {value:.4g}, {' '.join(drawn)}; testing it")
            ended += _test(launcher, loader, config, [*fixed, *drawn], root)
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
        before = study.ended
        for number in [number for number, words in drawn.items() if study.fails(words)]:
            plan.say(f"trial {number}: {' '.join(drawn.pop(number))} has failed before, and is not run again")
            study.tell(number, None, pruned=False, own_error=True)
        words_of = {number: [*fixed, *words] for number, words in drawn.items()}
        for job, outcome, seconds in _run_trials(launcher, loader, config, study, words_of, settings):
            if outcome.status != PRUNED:
                ended.append((job, outcome, seconds))
            left = plan.time_left(time.monotonic() - began, study.ended - first, settings.trials - first)
            plan.say(plan.progress(job, outcome, seconds, study.ended, settings.trials) + left)
        if study.ended == before:  # the launcher does not wait, and has said so
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
    jobs: dict[Path, Job] = {}
    numbers_of: dict[Path, list[int]] = {}  # several where the same was drawn twice, which is one run
    for number, words in words_of.items():
        ((job, _),) = plan.jobs_of(loader, config, [words])
        drawn = [word for word in words if word.partition("=")[0] in study.space]
        if job.folder not in jobs:
            jobs[job.folder] = replace(job, label=" ".join(drawn))
            trial.mark(job.folder, study.storage, study.name, number, settings.prune)
        numbers_of.setdefault(job.folder, []).append(number)
    for job, outcome, seconds in launcher.launch(list(jobs.values()), config):
        trial.unmark(job.folder)
        score = job.result.get(SCORE) if outcome.status == 0 and job.finished else None
        if outcome.status == 0 and job.finished and score is None:
            outcome = Outcome(MENDABLE, "it has no finite validation score, so that it has failed as a trial")
        for number in numbers_of[job.folder]:
            study.tell(number, score, outcome.status == PRUNED, outcome.status == MENDABLE)
        yield job, outcome, seconds


def _test(
    launcher: Launcher, loader: Any, config: DictConfig, words: Sequence[str], root: Path
) -> Iterator[plan.Ended]:
    """Tests the weights of the trial with these words, in a run of its own below `root`."""
    ((job, chosen),) = plan.jobs_of(loader, config, [words])
    allow(chosen)  # the trial is the user's own run, so whatever it names may be built again
    where = {"checkpoint": job.folder, "name": root.name}
    where |= {"outputs": root.parent} if chosen.outputs != Config.outputs else {}
    ((job, _),) = plan.jobs_of(
        loader, config, [["recipe=test", *(f"{key}={quoted(str(value))}" for key, value in where.items())]]
    )
    return launcher.launch([replace(job, label="the best trial, tested")], config)
