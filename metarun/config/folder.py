"""Where the files of `conf/` lie."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_IN_A_WHEEL = _PACKAGE / "conf"
CONF = _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else _PACKAGE.parent / "conf"  # in a checkout it lies beside the package
