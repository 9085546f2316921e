"""The config of a run: its schema, its validation, and the construction of what it names.

`schema.py` and `task_schema.py` hold the keys, `registration.py` makes Hydra know them, `types.py` holds the marks that a type can
carry, `ranges.py` reads these marks, `validation.py` checks a composed config, `building.py` constructs its nodes, and `values.py` gives
its plain values. None of them imports torch before a node is looked at.
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
from metarun.config.validation import check, check_keys
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
    "check_keys",
    "construct",
    "flat",
    "keyed",
    "nodes_of",
    "task_of",
    "to_container",
]
