"""A process of tests composes the same files thousands of times: what Hydra makes of files that stay as they are, it makes once.

To read and merge the files is most of what a command costs that is refused, and a third of what one costs that trains for a few
steps. The functions of Hydra's that do so give the same for the same arguments: each is carried out a first time, and what it gave is
copied later. What metarun adds to a config, the values of a command line and every check come after them, and are carried out each
time. A config with files besides those of `conf/`, as those of `--config-dir`, is never remembered.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import omegaconf._utils
import omegaconf.base
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parents[1] / "conf"
OURS = {("file", str(CONF)), ("pkg", "hydra.conf"), ("structured", "")}


class Recent:
    """What was made for the last few keys; the oldest goes first, so that a long session needs no more memory than a short one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[Hashable, Any] = {}
        self.lock = threading.RLock()  # runs may be started by several threads

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self.lock:
            value = self.values.pop(key) if key in self.values else make()
            self.values[key] = value
            if len(self.values) > self.size:
                del self.values[next(iter(self.values))]
            return value

    def copy(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made, as an object of the caller's own."""
        return pickle.loads(self(key, lambda: pickle.dumps(make())))


def _ours(repo: IConfigRepository) -> bool:
    return {(source.scheme(), source.path) for source in repo.get_sources()} <= OURS


def install() -> None:
    """Has this process remember; beneath what `metarun.config.completion` adds, which has to be imported later."""
    parse = functools.lru_cache(1024)(omegaconf.base.parse)
    omegaconf.base.parse = omegaconf._utils.parse = parse
    _overrides()
    _store()
    _copies()
    _interpolations()
    _files()
    _defaults()
    _merged()
    _commit()


def _overrides() -> None:
    read, recent = OverridesParser.parse_rule, Recent(1024)

    def parse_rule(self: OverridesParser, word: str, rule: str) -> Any:
        return recent.copy((word, rule), lambda: read(self, word, rule))

    OverridesParser.parse_rule = parse_rule


def _store() -> None:
    """The store of schemas stays one where Hydra copies what it looks files up in; what is loaded from it is a copy."""
    ConfigStore.__deepcopy__ = lambda self, memo: self


def _copies() -> None:
    """A config as a whole, of which Hydra makes three copies for a command, is copied by `pickle`, in a third of the time."""
    deep = DictConfig.__deepcopy__

    def copied(self: DictConfig, memo: dict[int, Any]) -> DictConfig:
        if memo or self._get_parent() is not None:
            return deep(self, memo)
        try:
            whole: DictConfig = pickle.loads(pickle.dumps(self))
        except (pickle.PicklingError, AttributeError, TypeError):  # of a class inside of a test
            return deep(self, memo)
        return whole

    DictConfig.__deepcopy__ = copied


def _interpolations() -> None:
    """What Hydra collects for every file, in case that one of its defaults is interpolated, is collected where one is."""
    collect = defaults_list._create_interpolation_map

    def create(overrides: Overrides, defaults: list[Any], self_added: bool) -> DictConfig:
        if any(default.is_interpolation() for default in defaults):
            return collect(overrides, defaults, self_added)
        return OmegaConf.create()

    defaults_list._create_interpolation_map = create


def _files() -> None:
    read, recent = ConfigRepository.load_config, Recent(512)

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        if not _ours(self):
            return read(self, config_path)
        return recent.copy(config_path, lambda: read(self, config_path))

    ConfigRepository.load_config = load_config


def _defaults() -> None:
    find, recent = config_loader_impl.create_defaults_list, Recent(512)

    def create_defaults_list(
        repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: bool
    ) -> DefaultsList:
        if not _ours(repo):
            return find(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
        values = Overrides(repo, overrides_list).config_overrides
        choices = [word for word in overrides_list if not any(word is value for value in values)]
        key = config_name, *(word.input_line for word in choices), *options.items()
        found = recent(key, lambda: find(repo=repo, config_name=config_name, overrides_list=choices, **options))
        return dataclasses.replace(found, config_overrides=values)

    config_loader_impl.create_defaults_list = create_defaults_list


def _merged() -> None:
    merge, recent = ConfigLoaderImpl._compose_config_from_defaults_list, Recent(32)

    def compose(self: ConfigLoaderImpl, defaults: list[Any], repo: IConfigRepository) -> Any:
        if not _ours(repo):
            return merge(self, defaults, repo)
        key = tuple(dataclasses.astuple(default) for default in defaults)
        return recent.copy(key, lambda: merge(self, defaults, repo))

    ConfigLoaderImpl._compose_config_from_defaults_list = compose


def _commit() -> None:
    """What git says of the checkout takes three processes for each run, and is the same for all of a session."""
    from metarun.runs import provenance  # which imports what has to come later than all of the above

    here, ask = provenance.__file__, provenance.git_commit
    known = functools.cache(ask)
    provenance.git_commit = lambda: known() if provenance.__file__ == here else ask()
