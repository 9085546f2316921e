"""Where data sets and what is made of them lie: `METARUN_DATA` and `METARUN_CACHE`."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from metarun.errors import UserError
from metarun.files import typed_path
from metarun.text import has_control, printable


def data_root() -> Path:
    """Returns the folder where archives lie and are downloaded to: `METARUN_DATA`, or the user's cache folder."""
    return _folder("METARUN_DATA", "data")


def cache_root() -> Path:
    """Returns the folder where tables are kept: `METARUN_CACHE`, or the user's cache folder."""
    return _folder("METARUN_CACHE", "tables")


def _folder(variable: str, otherwise: str) -> Path:
    """The folder that an environment variable names, taken literally but for `~`, or one of the user's cache folder."""
    try:
        folder = typed_path(os.environ.get(variable) or user_cache_path("metarun") / otherwise)
    except RuntimeError as error:
        raise UserError(f"{variable}: this user has no home folder; set HOME, or {variable} to a folder") from error
    if has_control(str(folder)):
        raise UserError(f"{variable}: {printable(str(folder))} has a control character, or bytes that are no UTF-8")
    return folder.absolute()
