"""What the files of `conf/` refer to: the schema by its name, defaults from signatures, and three resolvers of values."""

from __future__ import annotations

import logging
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from metarun.config import completion, yaml_files
from metarun.config.schema import ENCODING_DEFAULTS, Config
from metarun.config.task_schema import PROTOCOLS


def _pixels_normalized(*, _root_: DictConfig) -> bool:
    """Whether the images that the backbone is built for come normalised: the source's, or the target's without a source."""
    source = OmegaConf.select(_root_, "recipe.source", default=True)
    return bool(OmegaConf.select(_root_, "data.normalize" if source else "target.data.normalize", default=False))


def _of_protocol(name: str, *, _root_: DictConfig) -> Any:
    """The ways, shots or queries of `task` where nobody says them: those of its protocol."""
    return PROTOCOLS.get(OmegaConf.select(_root_, "task.protocol"), PROTOCOLS["uniform"])[name]


def _in_training(name: str, *, _root_: DictConfig) -> Any:
    """The ways, shots or queries that training tasks are told to have, in `train.task` or else in `task`."""
    own = OmegaConf.select(_root_, f"train.task.{name}")
    return OmegaConf.select(_root_, f"task.{name}") if own is None else own


OmegaConf.register_new_resolver("in_training", _in_training, replace=True)
OmegaConf.register_new_resolver("of_protocol", _of_protocol, replace=True)
OmegaConf.register_new_resolver("pixels_normalized", _pixels_normalized, replace=True)
ConfigStore.instance().store(name="schema", node=Config)
yaml_files.install()
completion.install({"encoder": ENCODING_DEFAULTS})
logging.getLogger("hydra").addHandler(logging.NullHandler())  # of a failed import one line is enough: ours
