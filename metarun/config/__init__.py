"""The config of a run: its schema, its validation, and the construction of what it names.

`schema.py` and `task_schema.py` hold the keys, `registration.py` makes Hydra know them, `types.py` holds the marks that a type can
carry, `ranges.py` reads these marks, `validation.py` checks a composed config, `building.py` constructs its nodes, and `values.py` gives
its plain values. `overrides.py` reads and writes the words of a command line, `shorthand.py` those that stand for others, `yaml_files.py`
the files of `conf/` and of the user's own folder (`folder.py`). `signature.py` reads constructors without importing them, `completion.py`
fills their defaults into a config, `checked.py` has them check their own settings, `hints.py` evaluates types once. `reference.py` joins
all of it into what a key means, and `help.py` prints that. None of them imports torch before a node is looked at.
"""

import metarun.config.registration  # noqa: F401  (Hydra knows the schema from here on)
from metarun.config.building import Node, construct, keyed, nodes_of, task_of
from metarun.config.schema import (
    Config,
    HardwareSettings,
    PretrainSettings,
    RecipeSettings,
    TargetSettings,
    TestSettings,
    TrainSettings,
)
from metarun.config.task_schema import Noise, Task, TaskChange
from metarun.config.validation import check, check_chosen, check_keys
from metarun.config.values import flat, to_container
from metarun.errors import UserError

__all__ = [
    "Config",
    "HardwareSettings",
    "Node",
    "Noise",
    "PretrainSettings",
    "RecipeSettings",
    "TargetSettings",
    "Task",
    "TaskChange",
    "TestSettings",
    "TrainSettings",
    "UserError",
    "check",
    "check_chosen",
    "check_keys",
    "construct",
    "flat",
    "keyed",
    "nodes_of",
    "task_of",
    "to_container",
]
