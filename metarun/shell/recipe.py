"""From the config that words made to the function that carries its recipe out, for the shell and for Python alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig

from metarun.config.overrides import canonical
from metarun.config.ranges import check_value
from metarun.config.shorthand import check_preset, folded_choices, keys_of
from metarun.errors import UserError, no_memory, reason

LESS_MEMORY = (
    "hardware.task_chunk=1, fewer train.tasks_per_step or task.queries, or smaller images or networks take less"
)


def carried_out(
    config: DictConfig,
    words: Sequence[str],
    choices: Mapping[str, str],
    params: Mapping[str, str],
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Carries out the recipe of a config.

    Args:
        config: As Hydra composed it, without Hydra's own part.
        words: The overrides that made it, as Hydra was given them.
        choices: Hydra's, of groups.
        params: The keys that a sweep would give values, and these; a single run has to give each one.
        options: What else is typed to compose the same config.

    Returns:
        What `result.json` holds; nothing for a recipe that leaves none.

    Raises:
        UserError: The words, or what they name, cannot be carried out.
    """
    overrides = canonical(words, config)
    command = [sys.executable, "-m", "metarun", *options, *overrides]
    if not config.checkpoint:  # whose run has a method and data of its own, and its preset with them
        check_preset(words, choices)
    check_swept(words, params)
    function = _function(str(config.recipe.run))
    try:
        found: dict[str, Any] = function(config, overrides, folded_choices(choices, config), command)
    except Exception as error:
        if lacking := no_memory(error):
            raise UserError(f"{lacking}; {LESS_MEMORY}") from error
        raise
    return found


def swept(sweeper: Any) -> Mapping[str, str]:
    """The keys that a sweep gives values, and these, of `hydra.sweeper`, which a file may have set.

    Raises:
        UserError: It is no mapping, or these are none.
    """
    if not isinstance(sweeper, DictConfig):
        raise UserError(
            f"hydra.sweeper={sweeper}: has settings of its own, and is no single value; metarun help hydra/sweeper"
        )
    params = sweeper.get("params")
    check_value("hydra.sweeper.params", params, dict[str, Any] | None)
    return params or {}


def check_swept(words: Sequence[str], params: Mapping[str, str]) -> None:
    """Checks that a single run leaves out nothing that its experiment sweeps over, since Hydra passes `params` over without `-m`.

    Args:
        words: The overrides, as Hydra was given them.
        params: Keys and the values that a sweep gives them, from a file.

    Raises:
        UserError: A key has no value on the command line.
    """
    if left := sorted(params.keys() - keys_of(words)):
        raise UserError(
            f"{', '.join(left)}: the experiment sweeps over {'them' if len(left) > 1 else 'it'} "
            f"({left[0]}={params[left[0]]}); add -m for all its runs, or give a value to each for one run"
        )


def _function(path: str) -> Any:
    """The function that a recipe names to carry it out."""
    try:
        return get_method(path)
    except Exception as error:  # whatever importing a module provokes
        raise UserError(f"recipe.run={path}: is no function that can be imported ({reason(error)})") from error
