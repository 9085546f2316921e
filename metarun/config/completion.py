"""A composed config holds every setting: what the YAML leaves unsaid is filled in from the signatures that it names.

Hydra merges the files of a config and then closes it, so that an override may only change what is there. In between, each
node with a `_target_` gets the keyword-only parameters of its class that no file has set, at their defaults. A default is
thus written once, in the signature, and `--cfg job`, an override such as `algo.inner_lr=0.1`, shell completion and the
stored `config.yaml` all know it. Hydra 1.3 has no hook between the two steps: a `ConfigSource` sees single files, before
other files change `_target_`, and a callback sees the config after its overrides. So the step of Hydra's loader that
merges the files is extended.
"""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Mapping
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from metarun.config.signature import ABSENT, UNKNOWN, read


def complete(config: DictConfig) -> None:
    """Fills every node of `config` that has a `_target_` from the signature that it names, in place.

    Args:
        config: The config; a key that is there already keeps its value. A setting without a default is missing (`???`).
    """
    for key in list(config):
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if isinstance(config[key], DictConfig):
            complete(config[key])
    if "_target_" not in config or OmegaConf.is_interpolation(config, "_target_"):
        return
    signature = read(str(config["_target_"]))
    if signature is None or not signature.settings:
        return
    known = {
        one.name: MISSING if one.default is ABSENT else copy.deepcopy(one.default)
        for one in signature.settings
        if one.default is not UNKNOWN  # its class gives it
    }
    given = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    others = {key: value for key, value in given.items() if key not in known}
    with open_dict(config):
        for key in given:
            del config[key]
        for key, value in {**others, **known, **given}.items():  # the settings in the order of the signature
            config[key] = value
            if isinstance(known.get(key), dict):  # whose keys are the user's own
                OmegaConf.set_struct(typing.cast(DictConfig, config._get_node(key)), False)


def install(shared: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes Hydra complete what it composes; more than one call changes nothing.

    Args:
        shared: Of nodes that hold keys for whoever builds their class, besides the settings of the class, the defaults of
            these keys.
    """
    merge_files = ConfigLoaderImpl._compose_config_from_defaults_list
    if hasattr(merge_files, "__wrapped__"):
        return

    @functools.wraps(merge_files)
    def merge_and_complete(self: ConfigLoaderImpl, *arguments: Any, **options: Any) -> DictConfig:
        config = merge_files(self, *arguments, **options)
        complete(config)
        for key, defaults in shared.items():
            node = OmegaConf.select(config, key)
            if node and "_target_" in node:
                with open_dict(node):
                    node.update({name: value for name, value in defaults.items() if name not in node})
        return config

    ConfigLoaderImpl._compose_config_from_defaults_list = merge_and_complete  # type: ignore[method-assign]
