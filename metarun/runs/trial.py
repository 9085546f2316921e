"""A run that is a trial of a search: what a sweep keeps beside the run's folder, and the watcher that may end the trial early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from metarun import files


def beside(folder: Path, kind: str) -> Path:
    """The file in which a sweep keeps something of the run in `folder`: `log` its output, `slurm` its name in Slurm, `outcome`, `trial`."""
    return folder.parent / ".jobs" / f"{folder.name}.{kind}"


def mark(folder: Path, storage: str, study: str, number: int, prune: bool) -> None:
    """Tells the run in `folder` which trial it is.

    Args:
        folder: The run's.
        storage: Where the study is kept, an URL as Optuna takes it.
        study: The name of the study.
        number: The number of the trial.
        prune: Whether the trial ends early if it promises little.
    """
    beside(folder, "trial").parent.mkdir(parents=True, exist_ok=True)
    note = {"storage": storage, "study": study, "trial": number, "prune": prune}
    beside(folder, "trial").write_text(json.dumps(note), encoding="utf-8")


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
