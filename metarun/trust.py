"""What a stored configuration may build: its file may come from anybody, and a class that it names is code that runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from metarun.config.folder import CONF
from metarun.errors import UserError
from metarun.text import printable

ALLOW = "METARUN_ALLOW"  # modules and classes, separated by commas
# What metarun's own class would have another library run: learn2learn loads pickles from the root of a data set.
PICKLED = {"_target_": "metarun.data.library.Library", "library": "learn2learn"}
SETTLED = ("torch.optim",)  # modules whose classes do nothing but optimise
TARGET = re.compile(r"\b_target_[\"']?:\s*[\"']?([\w.]+)")


def check_classes(stored: DictConfig, origin: Path, asked: DictConfig) -> None:
    """Raises `UserError` if a stored config names a class that is not to be trusted, or has its reader look something up.

    Trusted are the classes that metarun's own groups name, those that this command line or a YAML of its `--config-dir` names,
    and those that the user allows by name. A stored folder of pickles that learn2learn would run has to be allowed, too.

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
    allowed = (*SETTLED, *filter(None, (name.strip() for name in os.environ.get(ALLOW, "").split(","))))

    def is_allowed(target: str) -> bool:
        return any(target == name or target.startswith(f"{name}.") for name in allowed)

    for target in targets(stored):
        if target not in trusted and not is_allowed(target):
            module = target.rpartition(".")[0] or target
            raise UserError(
                f"{origin}: names {target}, which is no class of metarun's; if you trust this run, say so with "
                f"{ALLOW}={module}, or give the --config-dir that names the class"
            )
    for node in nodes(stored):
        if node.get("root") and node.items() >= PICKLED.items() and not is_allowed(PICKLED["_target_"]):
            raise UserError(
                f"{origin}: has learn2learn read {printable(str(node['root']))}, whose pickles can run code; if you trust this "
                f"folder, say so with {ALLOW}={PICKLED['_target_']}"
            )


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
        name
        for path in folder.rglob("*.yaml")
        for name in TARGET.findall(path.read_text(errors="replace", encoding="utf-8"))
    )
