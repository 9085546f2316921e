"""What a search draws its trials from, and the Optuna study that remembers them."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from metarun.errors import UserError, first_line
from metarun.runs.trial import database, readable
from metarun.text import printable

SEEDS = 2**32  # the seeds that Optuna's samplers take
OWN_ERROR = "own_error"  # marks a failed trial that would fail again
FOLDER = "folder"  # of a trial's run, by its name in the sweep's folder
TRIES, WAIT = 5, 0.2  # to make the tables of a storage that another search is making, with so many seconds in between
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

    tags: set[str] = getattr(value, "tags", set())
    if unknown := sorted(tags - {"log"}):
        raise ValueError(f"{unknown[0]} is no tag of a search; tag(log,...) draws by the logarithm")
    log = "log" in tags
    if log and not isinstance(value, IntervalSweep):
        raise ValueError("tag(log,...) is for an interval, of whole numbers tag(log,int(interval(1,8)))")
    if isinstance(value, IntervalSweep):
        if not all(math.isfinite(float(end or 0)) for end in (value.start, value.end)):
            raise ValueError("its ends must be finite")
        if isinstance(value.start, int) and isinstance(value.end, int):
            return distributions.IntDistribution(value.start, value.end, log=log)
        return distributions.FloatDistribution(float(value.start or 0), float(value.end or 0), log=log)
    if isinstance(value, RangeSweep) and all(isinstance(part, int) for part in (value.start, value.stop, value.step)):
        values = range(int(value.start or 0), int(value.stop or 0), int(value.step))
        return distributions.IntDistribution(values[0], values[-1], step=values.step)
    assert isinstance(value, ChoiceSweep | RangeSweep | Glob)
    return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def corners(space: dict[str, Any]) -> list[list[str]]:
    """Words of a few draws that between them have every choice of a list, and both ends and a point inside of every range."""
    ends = {key: list(getattr(drawn, "choices", None) or _points(drawn)) for key, drawn in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    return [words_of(first), *(words_of({**first, key: value}) for key, values in ends.items() for value in values[1:])]


def _points(drawn: Any) -> tuple[float, ...]:
    """Both ends of a range; of an interval, whose ends may be whole numbers where all else in it is none, a point inside too."""
    if isinstance(drawn.low, int):
        return drawn.low, drawn.high
    return drawn.low, drawn.high, drawn.low + (drawn.high - drawn.low) / math.pi


def address(url: str) -> str:
    """The address of a storage, in which the `~` of a SQLite file is expanded; raises `UserError` for what is no URL."""
    if "://" not in url:
        path = os.path.expanduser(url)
        written = database(Path(path)) if "?" in path else f"sqlite:///{path}"  # which begins what follows an address
        raise UserError(f"{_given(url)}: is no URL; a file is written {printable(shlex.quote(written))}")
    before, mark, path = url.partition(":///")
    return f"{before}{mark}{os.path.expanduser(path)}" if before.startswith("sqlite") else url


def _given(url: str) -> str:
    return f"hydra.sweeper.storage={printable(url)}"


def check_storage(url: str) -> None:
    """Checks that a storage is there, or can be made; makes no tables in it.

    Raises:
        UserError: Its driver is not installed, or it cannot be opened.
    """
    import sqlalchemy

    try:
        sqlalchemy.create_engine(url).connect().close()
    except Exception as error:  # whatever SQLAlchemy and the driver of a database raise
        raise UserError(f"{_given(url)}: cannot be opened ({first_line(error)})") from error


class Study:
    """An Optuna study in its storage: one for each set of words, so that the same command goes on with its own.

    Args:
        storage: Where it is kept: an URL as Optuna takes it, or a SQLite file.
        words: Those of the search, which name the study.
        space: What each key is drawn from.
        sampler: How trials are drawn, a key of `SAMPLERS`.
        seed: The seed of the sampler.

    Raises:
        UserError: The storage cannot be read.
    """

    def __init__(
        self, storage: str | Path, words: Sequence[str], space: dict[str, Any], sampler: str, seed: int
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.space, self.seed = storage, space, seed
        self.name = " ".join(sorted(words))
        self.make_sampler = getattr(optuna.samplers, SAMPLERS[sampler])
        url = storage if isinstance(storage, str) else database(storage)
        with readable(url):
            self.study = self._made(url)
            self.study.get_trials(deepcopy=False)
        self.states = optuna.trial.TrialState

    def _made(self, url: str) -> Any:
        """The study; made anew where another search makes the tables of the same storage at this moment, and one of them fails."""
        import optuna
        from sqlalchemy import exc

        for left in reversed(range(TRIES)):
            try:
                return optuna.create_study(storage=url, study_name=self.name, direction="maximize", load_if_exists=True)
            except (exc.IntegrityError, exc.OperationalError, exc.ProgrammingError):  # what it made is there by now
                if not left:
                    raise
                time.sleep(WAIT)
        raise AssertionError

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
        return {number: words_of(params) for number, params in trials.items()}

    def _draw(self) -> tuple[int, dict[str, Any]]:
        """A new trial's number and its values, which enter the storage together with it.

        Optuna's own `ask` writes one after the other, and a kill in between would leave a trial without some of its values.
        So they are drawn on a copy of the study in memory.
        """
        import optuna

        known = self.study.get_trials(deepcopy=False)
        copy = optuna.create_study(
            direction="maximize", sampler=self.make_sampler(seed=(self.seed + len(known)) % SEEDS)
        )
        copy.add_trials(known)
        params = copy.ask(self.space).params
        drawn = optuna.trial.create_trial(state=self.states.RUNNING, params=params, distributions=self.space)
        self.study.add_trial(drawn)
        return len(known), params

    def fails(self, words: Sequence[str]) -> bool:
        """Whether a trial of these words has failed by its own error, as another of them would."""
        failed = self.study.get_trials(deepcopy=False, states=(self.states.FAIL,))
        return any(trial.user_attrs.get(OWN_ERROR) and words_of(trial.params) == list(words) for trial in failed)

    def tell(self, number: int, score: float | None, pruned: bool, own_error: bool = False) -> None:
        """Ends a trial: with its validation score, or pruned, or failed.

        Args:
            number: The trial's.
            score: Its validation score; None where it has none.
            pruned: Whether it was ended early.
            own_error: Whether it failed by what its words lead to, and not by what happened to its process.
        """
        if own_error:
            self._mark(number, OWN_ERROR, True)
        state = self.states.PRUNED if pruned else self.states.COMPLETE if score is not None else self.states.FAIL
        self.study.tell(number, None if state is not self.states.COMPLETE else score, state=state)

    def _numbered(self, number: int) -> Any:
        return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def _mark(self, number: int, name: str, value: Any) -> None:
        import optuna

        optuna.trial.Trial(self.study, self._numbered(number)._trial_id).set_user_attr(name, value)

    def begin(self, number: int, folder: str) -> None:
        """Keeps the name of the folder of a trial's run, which `resume=false` would name otherwise the next time."""
        self._mark(number, FOLDER, folder)

    def folder(self, number: int) -> str | None:
        """The name of the folder of a trial's run; None before it has begun, and of trials of earlier versions.

        What leads out of the sweep's folder is none either: others may have written the storage.
        """
        found = self._numbered(number).user_attrs.get(FOLDER)
        is_name = isinstance(found, str) and found not in ("", ".", "..") and os.path.basename(found) == found
        return found if is_name else None

    def best(self) -> tuple[int, float, list[str]] | None:
        """The number, the validation score and the words of the best trial, if any has succeeded."""
        if not self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,)):
            return None
        best = self.study.best_trial
        return best.number, self.study.best_value, words_of(best.params)


def words_of(params: dict[str, Any]) -> list[str]:
    """The words of a draw."""
    return [f"{key}={f'{value:.6g}' if isinstance(value, float) else value}" for key, value in params.items()]
