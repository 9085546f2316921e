"""How the terminal and the tables write numbers."""

from __future__ import annotations

TOO_FEW = "too few"  # for an interval


def half(value: float | None, form: str) -> str:
    """Half an interval as it stands behind its mean, `± 1.20%` say; None is one that there was too little for.

    Args:
        value: half the interval.
        form: a format of numbers, `.2%` say.
    """
    return f"({TOO_FEW} for an interval)" if value is None else f"± {value:{form}}"
