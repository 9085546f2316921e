"""Search for good settings with Optuna: trials are runs, chosen on validation alone, and only the best is tested, once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig

from metarun import files
from metarun.config.overrides import quoted, varies
from metarun.errors import JobsFailed, UserError, first_line
from metarun.runs.result import SCORE
from metarun.sweeps import plan
from metarun.sweeps.jobs import PRUNED, Job, beside
from metarun.sweeps.launcher import Launcher
from metarun.text import printable, shell_path
from metarun.trust import allow

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}


def distribution(override: Override) -> Any:
    """Translates the sweep of a key into what Optuna draws the key from.

    Args:
        override: `KEY=choice(a,b)` or `KEY=a,b`, `range(1,9)`, `interval(1e-4,1e-1)`, `tag(log,interval(...))`,
            `int(interval(1,8))`.

    Raises:
        UserError: The key is the seed, which is no setting.
    """
    key, value = override.key_or_group, override.value()
    if key == "seed":
        raise UserError("seed: is not searched, every trial has the same; sweep it over the best settings afterwards")
    try:
        return _distribution(value, override)
    except (ValueError, OverflowError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) and "index" not in str(error) else "it has no value"
        raise UserError(
            f"{key}: cannot be searched in {str(override.input_line).partition('=')[2]} ({reason})"
        ) from error


def _distribution(value: Any, override: Override) -> Any:
    """The distribution of an override's values; raises the errors of Python and of Optuna."""
    from optuna import distributions

    if isinstance(value, IntervalSweep):
        if not all(math.isfinite(float(end or 0)) for end in (value.start, value.end)):
            raise ValueError("its ends must be finite")
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return distributions.IntDistribution(value.start, value.end, log=log)
        return distributions.FloatDistribution(float(value.start or 0), float(value.end or 0), log=log)
    if isinstance(value, RangeSweep) and all(isinstance(part, int) for part in (value.start, value.stop, value.step)):
        values = range(int(value.start or 0), int(value.stop or 0), int(value.step))
        return distributions.IntDistribution(values[0], values[-1], step=values.step)
    assert isinstance(value, ChoiceSweep | RangeSweep)
    return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def database(path: Path) -> str:
    """The address of a SQLite file as Optuna takes it, whatever characters are in its path."""
    return f"sqlite:///file:{quote(os.path.abspath(path))}?uri=true"


def lock(root: Path, words: Sequence[str]) -> Path:
    """The file that a search locks while it is at work: one for each set of words, as there is one study for each."""
    return root / f".search-{hashlib.sha256(' '.join(sorted(words)).encode()).hexdigest()[:12]}.lock"


def corners(space: dict[str, Any]) -> list[list[str]]:
    """Words of a few draws that between them have every choice of a list, and both ends of every range."""
    ends = {key: list(getattr(drawn, "choices", None) or (drawn.low, drawn.high)) for key, drawn in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    return [_words(first), *(_words({**first, key: value}) for key, values in ends.items() for value in values[1:])]


class Study:
    """An Optuna study in its storage: one for each set of words, so that the same command goes on with its own."""

    def __init__(
        self, storage: str, words: Sequence[str], space: dict[str, Any], sampler: str, prune: bool, seed: int
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.space, self.prune, self.seed = storage, space, prune, seed
        self.make_sampler = getattr(optuna.samplers, SAMPLERS[sampler])
        try:
            self.study = optuna.create_study(
                storage=storage, study_name=" ".join(sorted(words)), direction="maximize", load_if_exists=True
            )
            self.study.get_trials(deepcopy=False)
        except Exception as error:  # whatever SQLAlchemy and the driver of a database raise
            raise UserError(
                f"the search's trials in {printable(storage)} cannot be read ({first_line(error)}); a damaged file can be deleted: "
                "the search begins anew, and finished runs count at once"
            ) from error
        self.states = optuna.trial.TrialState

    @property
    def ended(self) -> int:
        """Trials that need not run any more."""
        return sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def next(self, count: int) -> dict[int, list[str]]:
        """The words of up to `count` trials by number: those that a killed search left at work, then new ones.

        A new trial's draw depends on the seed, its number and the trials before it, so that a search that was killed goes on
        as it would have.
        """
        left = self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,))
        for trial in left:
            if trial.params.keys() != self.space.keys():  # of an earlier version, killed while it drew
                self.tell(trial.number, None, pruned=False)
        whole = [trial for trial in left if trial.params.keys() == self.space.keys()]
        trials = {trial.number: trial.params for trial in whole[:count]}
        while len(trials) < count:
            number, params = self._draw()
            trials[number] = params
        return {number: _words(params) for number, params in trials.items()}

    def _draw(self) -> tuple[int, dict[str, Any]]:
        """A new trial's number and its values, which enter the storage together with it.

        Optuna's own `ask` writes one after the other, and a kill in between would leave a trial without some of its values.
        So they are drawn on a copy of the study in memory.
        """
        import optuna

        known = self.study.get_trials(deepcopy=False)
        copy = optuna.create_study(direction="maximize", sampler=self.make_sampler(seed=self.seed + len(known)))
        copy.add_trials(known)
        params = copy.ask(self.space).params
        drawn = optuna.trial.create_trial(state=self.states.RUNNING, params=params, distributions=self.space)
        self.study.add_trial(drawn)
        return len(known), params

    def tell(self, number: int, score: float | None, pruned: bool) -> None:
        """Ends a trial: with its validation score, or pruned, or failed."""
        state = self.states.PRUNED if pruned else self.states.COMPLETE if score is not None else self.states.FAIL
        self.study.tell(number, None if state is not self.states.COMPLETE else score, state=state)

    def best(self) -> tuple[int, float, list[str]] | None:
        """The number, the validation score and the words of the best trial, if any has succeeded."""
        if not self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,)):
            return None
        best = self.study.best_trial
        return best.number, self.study.best_value, _words(best.params)

    def mark(self, folder: Path, number: int) -> None:
        """Tells the run in `folder` which trial it is, so that it can be pruned."""
        beside(folder, "trial").parent.mkdir(parents=True, exist_ok=True)
        note = {"storage": self.storage, "study": self.study.study_name, "trial": number, "prune": self.prune}
        beside(folder, "trial").write_text(json.dumps(note), encoding="utf-8")


def _words(params: dict[str, Any]) -> list[str]:
    return [f"{key}={f'{value:.6g}' if isinstance(value, float) else value}" for key, value in params.items()]


def unmark(folder: Path) -> None:
    """The run in `folder` is no trial any more."""
    beside(folder, "trial").unlink(missing_ok=True)


def watcher(folder: Path) -> Callable[[int, float], bool] | None:
    """For the run in `folder`, if it is a trial: reports a step's validation score; True if the trial is to end there."""
    mark = beside(folder, "trial")
    if not mark.is_file():
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    note = files.read_json(mark, "delete it, and start the search again")
    study = optuna.load_study(storage=note["storage"], study_name=note["study"])
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    frozen = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == note["trial"])
    trial = optuna.trial.Trial(study, frozen._trial_id)

    def watch(step: int, score: float) -> bool:
        trial.report(score, step)
        return bool(note["prune"]) and trial.should_prune()

    return watch


def score(job: Job) -> float:
    """The validation score of a finished job; 0.0 of one that only tested."""
    return float(job.result.get(SCORE, 0.0))


def sweep(
    launcher: Launcher,
    loader: Any,
    config: DictConfig,
    arguments: Sequence[str],
    *,
    sampler: str,
    trials: int,
    prune: bool,
    at_once: int,
    seed: int,
    storage: str | None,
    params: Mapping[str, str],
    dry_run: bool,
) -> None:
    """Runs the trials of a search, tests the weights of the best, once, and writes the report.

    Args:
        launcher: What runs the trials.
        loader: Hydra's loader of configs.
        config: The config of the sweep's command line.
        arguments: The overrides as they were typed.
        sampler: How trials are drawn, a key of `SAMPLERS`.
        trials: The trials of the search.
        prune: Whether trials that promise little end early.
        at_once: The trials of a batch.
        seed: The seed of the sampler.
        storage: Where the trials are kept, an URL as Optuna takes it; None is a file in the sweep's folder.
        params: More keys and what they are searched in, from a file.
        dry_run: Whether the search is described and nothing is run.

    Raises:
        UserError: There is nothing to search, or a trial cannot be run as it is.
        JobsFailed: Some trials did not succeed.
    """
    overrides = plan.read_words(loader, config, arguments, params)
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
    root = possible[0][0].folder.parent
    # The lock below keeps two searches from one study, and lies in the folder: where others may use the storage too, it is a part.
    identity = [*said, *drawn_from, *([f"in {root.absolute()}"] if storage else [])]
    if dry_run:
        print(
            f"search   {trials} trials of {', '.join(space)}{plan.estimate(root, trials)}\nfolder   {shell_path(root)}"
        )
        return
    files.make_folder(root)
    waiting = (
        f"search: another process is at work on it in {shell_path(root)}, and this one goes on with what that leaves"
    )
    with files.locked(lock(root, identity), waiting, tell=plan.say):
        study = Study(storage or database(root / "search.db"), identity, space, sampler=sampler, prune=prune, seed=seed)
        ended = _carry_out(launcher, loader, config, study, fixed, trials, at_once)
        if ended is None:
            return
        if best := study.best():
            number, value, drawn = best
            plan.say(f"best on validation: trial {number}, {value:.4g}, {' '.join(drawn)}; testing it")
            ended += _test(launcher, loader, config, [*fixed, *drawn], root)
        more = "a trial that failed counts as done; a larger hydra.sweeper.trials tries others"
        plan.conclude(ended, more)
        if best is None:
            raise JobsFailed(f"search: none of its {trials} trials has succeeded; {more}")


def _carry_out(
    launcher: Launcher, loader: Any, config: DictConfig, study: Study, fixed: Sequence[str], trials: int, at_once: int
) -> list[plan.Ended] | None:
    """Runs the trials that a study lacks; returns those that ended and were not pruned, None where nobody waits for them."""
    ended: list[plan.Ended] = []
    began, first = time.monotonic(), study.ended
    while study.ended < trials:
        words_of = {
            number: [*fixed, *drawn] for number, drawn in study.next(min(at_once, trials - study.ended)).items()
        }
        before = study.ended
        for job, outcome, seconds in _run_trials(launcher, loader, config, study, words_of):
            if outcome.status != PRUNED:
                ended.append((job, outcome, seconds))
            left = plan.time_left(time.monotonic() - began, study.ended - first, trials - first)
            plan.say(plan.progress(job, outcome, seconds, study.ended, trials) + left)
        if study.ended == before:  # the launcher does not wait, and has said so
            return None
    return ended


def _run_trials(
    launcher: Launcher, loader: Any, config: DictConfig, study: Study, words_of: Mapping[int, Sequence[str]]
) -> Iterator[plan.Ended]:
    """Runs trials, by number and words, together; each gets its end in the study before it is yielded."""
    jobs: dict[Path, Job] = {}
    numbers_of: dict[Path, list[int]] = {}  # several where the same was drawn twice, which is one run
    for number, words in words_of.items():
        ((job, _),) = plan.jobs_of(loader, config, [words])
        drawn = [word for word in words if word.partition("=")[0] in study.space]
        if job.folder not in jobs:
            jobs[job.folder] = replace(job, label=" ".join(drawn))
            study.mark(job.folder, number)
        numbers_of.setdefault(job.folder, []).append(number)
    for job, outcome, seconds in launcher.launch(list(jobs.values()), config):
        unmark(job.folder)
        done = outcome.status == 0 and job.finished
        for number in numbers_of[job.folder]:
            study.tell(number, score(job) if done else None, outcome.status == PRUNED)
        yield job, outcome, seconds


def _test(
    launcher: Launcher, loader: Any, config: DictConfig, words: Sequence[str], root: Path
) -> Iterator[plan.Ended]:
    """Tests the weights of the trial with these words, in a run of its own below `root`."""
    ((job, chosen),) = plan.jobs_of(loader, config, [words])
    allow(chosen)  # the trial is the user's own run, so whatever it names may be built again
    where = {"checkpoint": job.folder, "name": root.name, "outputs": root.parent}
    ((job, _),) = plan.jobs_of(
        loader, config, [["recipe=test", *(f"{key}={quoted(str(value))}" for key, value in where.items())]]
    )
    return launcher.launch([replace(job, label="the best trial, tested")], config)
