"""A run that is a trial of a search: what a sweep keeps beside the run's folder, and the watcher that may end the trial early."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from metarun import files
from metarun.errors import UserError, first_line
from metarun.text import printable, shown_path

DAMAGED = "delete it, and start the search again"  # advice about a mark


def beside(folder: Path, kind: str) -> Path:
    """The file in which a sweep keeps something of the run in `folder`: `log` its output, `slurm` its name in Slurm, `outcome`, `trial`."""
    return folder.parent / ".jobs" / f"{folder.name}.{kind}"


def database(path: Path) -> str:
    """Writes the address of a SQLite file as Optuna takes it, whatever characters are in its path."""
    return f"sqlite:///file:{quote(os.path.abspath(path))}?uri=true"


@contextlib.contextmanager
def readable(storage: str) -> Iterator[None]:
    """Uses a study in its storage; whatever SQLAlchemy, the driver of a database and Optuna raise is a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        of_file = "; a damaged file can be deleted: the search begins anew, and finished runs count at once"
        raise UserError(
            f"the search's trials in {printable(storage)} cannot be read ({first_line(error)})"
            f"{of_file if storage.startswith('sqlite') else ''}"
        ) from error


def mark(folder: Path, storage: str | Path, study: str, number: int, prune: bool) -> None:
    """Tells the run in `folder` which trial it is.

    Args:
        folder: The run's.
        storage: Where the study is kept: an URL as Optuna takes it, or a SQLite file, which is found again where both were moved.
        study: The name of the study.
        number: The number of the trial.
        prune: Whether the trial ends early if it promises little.
    """
    path = beside(folder, "trial")
    path.parent.mkdir(parents=True, exist_ok=True)
    where = (
        {"storage": storage}
        if isinstance(storage, str)
        else {"database": Path(os.path.relpath(storage, path.parent)).as_posix()}
    )
    files.save_json(path, {**where, "study": study, "trial": number, "prune": prune})


def unmark(folder: Path) -> None:
    """Notes that the run in `folder` is no trial any more."""
    beside(folder, "trial").unlink(missing_ok=True)


def watcher(folder: Path) -> Callable[[int, float], bool] | None:
    """Returns what reports a step's validation score of the run in `folder`, if that is a trial; it gives True if the trial is to end.

    The mark of a search that was killed outlives its study, or the trial; the run is none then.

    Raises:
        UserError: The mark or the study is damaged.
    """
    mark = beside(folder, "trial")
    if not mark.is_file():
        return None
    note = files.read_json(mark, DAMAGED)
    types: dict[str, type] = {"database" if "database" in note else "storage": str, "study": str, "trial": int}
    if wrong := [key for key, kind in types.items() if not isinstance(note.get(key), kind)]:
        raise UserError(f"{shown_path(mark)}: is damaged (it says no {wrong[0]}); {DAMAGED}")
    file = mark.parent / note["database"] if "database" in note else None
    if file is not None and not file.is_file():  # which opening it would make
        return None
    storage = note["storage"] if file is None else database(file)
    found = _trial(storage, note["study"], note["trial"])
    if found is None:
        return None

    def watch(step: int, score: float) -> bool:
        with readable(storage):
            found.report(score, step)
            return bool(note.get("prune")) and bool(found.should_prune())

    return watch


def _trial(storage: str, study_name: str, number: int) -> Any:
    """The trial of a study that is at work; None where there is no such study or trial any more."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with readable(storage):
        try:
            study = optuna.load_study(storage=storage, study_name=study_name)
        except KeyError:  # Optuna's word for a study that is not there
            return None
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        frozen = next((trial for trial in study.get_trials(deepcopy=False) if trial.number == number), None)
        if frozen is None or frozen.state.is_finished():
            return None
        return optuna.trial.Trial(study, frozen._trial_id)
