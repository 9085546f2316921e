"""What a stored configuration may build: its file may come from anybody, and a class that it names is code that runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from metarun.config.folder import CONF
from metarun.config.yaml_files import below
from metarun.errors import UserError, reason
from metarun.text import printable

ALLOW = "METARUN_ALLOW"  # modules and classes, separated by commas
# What metarun's own class would have another library run: learn2learn loads pickles from the root of a data set.
PICKLED = {"_target_": "metarun.data.library.Library", "library": "learn2learn"}
TARGET = re.compile(r"\b_target_[\"']?:\s*[\"']?([\w.]+)")


def check_classes(stored: DictConfig, origin: Path, asked: DictConfig) -> None:
    """Raises `UserError` if a stored config names a class that is not to be trusted, or has its reader look something up.

    Trusted are the classes that metarun's own groups name, torch's optimisers and schedules, those that this command line or a
    YAML of its `--config-dir` names, and those that the user allows by name. A stored folder of pickles that learn2learn would
    run has to be allowed, too.

    Args:
        stored: The config of another's run, perhaps.
        origin: Its file.
        asked: The config that this command line makes.
    """
    if found := next((text for text in interpolations(stored) if text not in set(interpolations(asked))), None):
        raise UserError(
            f"{origin}: has {printable(found)}, which would be looked up here; nothing that metarun stores does that"
        )
    trusted = {name for folder in (CONF, *_own_folders()) for name in _named_in(folder)} | set(targets(asked))
    allowed = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    for target in targets(stored):
        if target not in trusted and not optimises(target) and not _is_allowed(target, allowed, origin):
            module = target.rpartition(".")[0] or target
            raise UserError(
                f"{origin}: names {printable(target)}, which is no class of metarun's; if you trust this run, say so with "
                f"{ALLOW}={printable(module)}, or give the --config-dir that names the class"
            )
    for node in nodes(stored):
        if (
            node.get("root")
            and node.items() >= PICKLED.items()
            and not _is_allowed(PICKLED["_target_"], allowed, origin)
        ):
            raise UserError(
                f"{origin}: has learn2learn read {printable(str(node['root']))}, whose pickles can run code; if you trust this "
                f"folder, say so with {ALLOW}={PICKLED['_target_']}"
            )


def optimises(target: str) -> bool:
    """Whether a path names an optimiser or a schedule that torch defines, which does nothing but optimise.

    A module's names are also what it imports, from where a path leads anywhere; so the class itself has to be torch's.
    """
    module, _, name = target.rpartition(".")
    if not f"{module}.".startswith("torch.optim."):
        return False
    from torch.optim import Optimizer, lr_scheduler

    found = getattr(sys.modules.get(module), name, None)
    return (
        isinstance(found, type)
        and issubclass(found, Optimizer | lr_scheduler.LRScheduler)
        and f"{found.__module__}.".startswith("torch.optim.")
    )


def _is_allowed(target: str, allowed: Sequence[str], origin: Path) -> bool:
    """Whether the user allows what a path names: by this very path, or since it is defined in a module that is allowed.

    Raises:
        UserError: The path goes through what is allowed to what is defined elsewhere, or leads nowhere.
    """
    above = [name for name in allowed if target.startswith(f"{name}.")]
    if target in allowed or not above:
        return target in allowed
    try:
        found: Any = get_object(target)
    except Exception as error:  # whatever importing a module provokes
        raise UserError(f"{origin}: names {printable(target)}, which cannot be imported ({reason(error)})") from error
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', '')}"
    if not any(home.startswith(f"{name}.") for name in above):
        raise UserError(
            f"{origin}: names {printable(target)}, which is not defined in {above[0]}, that {ALLOW} has; if you trust this run, "
            f"say so with {ALLOW}={printable(target)}"
        )
    return True


def interpolations(config: Any) -> Iterator[str]:
    """Every text in a config that is looked up when it is read: `${oc.env:HOME}`, or a node that a resolver makes."""

    def visit(value: Any) -> Iterator[str]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from visit(item)
        elif isinstance(value, str) and "${" in value:
            yield value

    return visit(OmegaConf.to_container(config))


def allow(config: DictConfig) -> None:
    """Lets this process, and those that it starts, build what a config of the user's own names."""
    names = [name for name in os.environ.get(ALLOW, "").split(",") if name]
    os.environ[ALLOW] = ",".join(dict.fromkeys([*names, *targets(config)]))


def targets(config: Any) -> Iterator[str]:
    """Every `_target_` in a config, wherever it stands."""
    return (str(node["_target_"]) for node in nodes(config) if "_target_" in node)


def nodes(config: Any) -> Iterator[dict[Any, Any]]:
    """Every mapping in a config, wherever it stands, the outer ones first."""

    def visit(value: Any) -> Iterator[dict[Any, Any]]:
        if isinstance(value, dict):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from visit(item)

    return visit(OmegaConf.to_container(config))


def _own_folders() -> list[Path]:
    """The folders of YAML files that this command line added."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [
        Path(source.path)
        for source in sources
        if source.schema == "file" and source.provider in ("command-line", "main")
    ]


def _named_in(folder: Path) -> Iterable[str]:
    """The classes that the YAML files of a folder name."""
    return (
        name for path in below(folder) for name in TARGET.findall(path.read_text(errors="replace", encoding="utf-8"))
    )
