"""A single run composes its config once; Hydra would do so a first time only to read `hydra.mode`, which says whether it sweeps.

The two configs differ in `hydra.mode` alone, which Hydra adds to the words of a command where nothing says it. So the first one is
composed as a single run has it, and kept for the run. What no single run has, such as the ranges of a sweep, Hydra composes.
"""

from __future__ import annotations

import functools
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig

from metarun.config.validation import check_hydra

SINGLE = "hydra.mode=RUN"  # the word that Hydra adds


def install() -> None:
    """Makes Hydra compose a single run once; more than one call changes nothing."""
    find_mode = Hydra.get_mode
    if hasattr(find_mode, "__wrapped__"):
        return

    @functools.wraps(find_mode)
    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        words = list(overrides)
        found: DictConfig | Exception
        try:
            found = self.compose_config(config_name, words, RunMode.RUN)
            mode = found.hydra.mode
        except Exception as error:  # which the run meets again, unless it is one of a single run alone
            found, mode = error, find_mode(self, config_name, words)
        else:
            check_hydra(found.hydra)
        _keep(self.config_loader, words, found)
        return mode

    Hydra.get_mode = get_mode  # type: ignore[method-assign]


def _keep(loader: Any, words: list[str], found: DictConfig | Exception) -> None:
    """Has the next call of the loader give what is found, if it is for the single run of these words."""
    load = loader.load_configuration

    def once(config_name: str | None, overrides: list[str], run_mode: RunMode, **options: Any) -> DictConfig:
        del loader.load_configuration  # the class's own again
        added = overrides[len(words) :]
        if run_mode != RunMode.RUN or overrides[: len(words)] != words or added not in ([], [SINGLE]):
            return load(config_name, overrides, run_mode, **options)  # type: ignore[no-any-return]
        if isinstance(found, Exception):
            raise found
        if added:
            found.hydra.mode = RunMode.RUN
            found.hydra.overrides.hydra.append(SINGLE)
        return found

    loader.load_configuration = once
