"""The console command: find `conf/`, let Hydra compose, hand over to `metarun.recipes.run`; errors become one line."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun import config as schema
from metarun.errors import UserError, nearest

_inside = Path(__file__).parent / "conf"  # in a wheel
CONF = _inside if _inside.is_dir() else Path(__file__).parents[1] / "conf"  # beside the package in a checkout


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _run(config: DictConfig) -> float:
    job = HydraConfig.get()
    try:
        schema.check(config)  # before the expensive imports of the run itself
        from metarun.recipes import run

        overrides = list(job.overrides.task)
        added = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
        options = [word for path in added for word in ("--config-dir", path)]
        return run(
            config, overrides, dict(job.runtime.choices), [sys.executable, "-m", "metarun", *options, *overrides]
        )
    except UserError as error:
        if job.mode == RunMode.MULTIRUN:
            raise
        raise Refused(error) from error  # past Hydra, which would print lines of its own


class Refused(BaseException):
    """A `UserError` on its way through Hydra."""


def main() -> None:
    """The `metarun` command. Exit status: 0, 2 for what the user can mend, 128 + n for signal n."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises, so that one line can be printed here
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a `_target_` in the user's own file
    try:
        _run()
    except (Refused, UserError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("METARUN_TRACEBACK"):
            raise
        print(f"metarun: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(
            f"metarun: interrupted{f' by {interrupt}' if str(interrupt) else ''}; the same command goes on",
            file=sys.stderr,
        )
        sys.exit(128 + getattr(interrupt, "number", 2))


def one_line(error: BaseException) -> str:
    """What went wrong, and the nearest right name where a name is wrong."""
    if isinstance(error, Refused | UserError):
        return str(error)
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if found := re.search(r"[Cc]ould not find '([^']+)'", chain) or re.search(
        r"In '[^']*': Could not find '([^']+)'", chain
    ):
        return _unknown_choice(found[1])
    if found := re.search(r"Could not override '([^']+)'", chain):
        reason = re.search(r"(?:Value|Cannot|Unsupported|Invalid|Incompatible)[^\n]*", chain)
        return f"{found[1]}: {reason[0]}" if reason else _unknown_key(found[1])
    if found := re.search(r"full_key: (\S+)", chain):
        if "not in" in chain or "is not in struct" in chain:
            return _unknown_key(found[1])
        return f"{found[1]}: {text.splitlines()[0]}"
    return text.splitlines()[0]


def _unknown_choice(name: str) -> str:
    """`algo/mmal` is no file of that group."""
    group, _, choice = name.rpartition("/")
    folder = CONF / group
    choices = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if not group or not choices:
        groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
        return f"{name}: there is no such group{nearest(name, groups)}"
    return f"{group}={choice}: there is no such choice{nearest(choice, choices) or '; there are ' + ', '.join(choices)}"


def _unknown_key(key: str) -> str:
    """A key that the config does not have, wherever it was written."""
    GlobalHydra.instance().clear()
    groups = [
        word
        for word in sys.argv[1:]
        if re.fullmatch(r"[\w/]+=[\w/.-]+", word) and (CONF / word.partition("=")[0]).is_dir()
    ]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            known = list(schema.flat(OmegaConf.to_container(hydra.compose("config", overrides=groups))))
    except Exception:  # the groups themselves are at fault: the schema alone must do
        known = list(schema.flat(OmegaConf.to_container(OmegaConf.structured(schema.Config))))
    groups_known = [path.name for path in CONF.iterdir() if path.is_dir()]
    return f"{key}: there is no such key{nearest(key, known + groups_known)}"
