"""Words of the command line that were renamed. An old word is never obeyed: one line names the new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from metarun.errors import UserError

GROUPS = {"around": "wrapper", "finetune": "transfer"}  # and the keys of these names
ELSEWHERE = {"data.labels": "to train without labels take unsupervised=umtra, cactus or prototransfer"}  # unknown keys
CHOICES = {"recipe": {"adapt": "domain_adaptation", "finetune": "target_only"}}


def renamed_key(key: str) -> str | None:
    """One line about a key or a group that has another name now.

    Args:
        key: The key as it was typed, `around` or `around.chosen`, say.

    Returns:
        The line, or None where the key was not renamed.
    """
    if key in ELSEWHERE:
        return f"{key}: these data have no such setting; {ELSEWHERE[key]}"
    old, dot, tail = key.partition(".")
    if old not in GROUPS:
        return None
    return f"{key}: is called {GROUPS[old]}{dot}{tail} now"


def renamed_choice(group: str, choice: str) -> str | None:
    """One line about a choice of a group, or about its group, where one of them has another name now; else None."""
    current = GROUPS.get(group, group), CHOICES.get(group, {}).get(choice, choice)
    if current == (group, choice):
        return None
    return f"{group}={choice}: is called {current[0]}={current[1]} now"


def current_choices(choices: Mapping[str, str]) -> dict[str, str]:
    """The choices of Hydra's groups that an older run stored, in today's words."""
    return {GROUPS.get(group, group): CHOICES.get(group, {}).get(choice, choice) for group, choice in choices.items()}


def refuse_old_words(config: DictConfig, file: Path) -> None:
    """Takes keys that were renamed, and are off, out of a stored config.

    Args:
        config: The config of an older run; changed in place.
        file: Where it is stored.

    Raises:
        UserError: One of these keys is set: an older version has to go on with this run.
    """
    for old, new in GROUPS.items():
        if config.get(old):
            raise UserError(f"{file}: is of an older version of metarun: its key {old} is called {new} now")
        config.pop(old, None)
