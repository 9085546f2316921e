"""What a launcher such as `torchrun` says of this process in the environment. Imports no torch."""

from __future__ import annotations

import os

from metarun.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets


def by_launcher() -> bool:
    """Whether a launcher started this process: one that sets all its variables, not a RANK that was left over."""
    return all(os.environ.get(name, "").strip() for name in VARIABLES)


def number(name: str, otherwise: int) -> int:
    """The number in an environment variable that a launcher sets.

    Args:
        name: `RANK`, say.
        otherwise: The number where the variable is not set, or empty.

    Raises:
        UserError: It is no number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return otherwise
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a number; a launcher sets it, and without one it is best unset")
    return int(text)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 without a launcher.

    Raises:
        UserError: They are no numbers, or there is no such rank.
    """
    if not by_launcher():
        return 0, 1
    rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; a launcher sets both")
    return rank, size
