"""Which code made a result."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from metarun.config.folder import CONF


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("metarun", "torch", "numpy", "hydra-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a bare clone
            from metarun import __version__

            found[package] = __version__
    return found


def git_commit() -> str | None:
    """Finds the commit of the checkout that metarun runs from, with `+` if its code or configuration has changes or new files.

    Outside of a checkout there is none.
    """
    here = Path(__file__).resolve().parent
    # A stored result beside them changes no number.
    deciding = [str(folder) for folder in (here.parent, CONF.resolve())]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            encoding="utf-8",
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__):
            return git("rev-parse", "HEAD") + (
                "+" if git("status", "--porcelain", "--untracked-files=all", "--", *deciding) else ""
            )
    except (OSError, subprocess.SubprocessError):
        pass
    return None
