"""What is measured: one line of the table each, as overrides of metarun's own config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import hydra
from omegaconf import DictConfig

from metarun.config import check
from metarun.config.folder import CONF

# A conv4 of 64 channels on 28x28 images; the settings that learn2learn's own Omniglot example has, but for the queries.
WORDS: dict[str, Any] = {
    "algo": "maml", "algo.inner_steps": 1, "algo.inner_lr": 0.5, "data": "omniglot", "backbone": "conv4", "hardware": "cpu",
    "task.ways": 5, "task.shots": 1, "task.queries": 15, "train.tasks_per_step": 32,
}  # fmt: skip
# How far the sides may lie apart, by what they compute in. Single precision shows what the order of sums alone does.
ALLOWED = {
    "float64": {"loss_difference": 1e-9, "gradient_difference": 1e-9},
    "float32": {"loss_difference": 1e-3},
    "tf32": {"loss_difference": 1e-2},
    "bfloat16": {"loss_difference": 3e-2},
    "images": {"pixel_difference": 2 / 255},  # each side scales the drawings down itself
    "features_protonet": {"differing_predictions": 1e-3},
    "features_tim": {"differing_predictions": 0.1},  # easyfsl compares by cosines, ours by distances
}
SMALL_RATE = 0.01  # of several inner steps, which at 0.5 make much of what the order of sums alone does


@dataclass(frozen=True)
class Line:
    """One work that both sides do. `words` are the overrides that differ from `WORDS`; None leaves one out.

    `draw`: tasks are drawn `anew` from the data set in every step, or `once` before the clock runs (the computation
    alone), or they are `only` drawn and nothing is learned. `processes` are those of our side; None: one a core. With
    `features` methods are tested on vectors, and the peer is easyfsl (`features.py`).
    """

    name: str
    title: str
    words: dict[str, Any] = field(default_factory=dict)
    draw: Literal["anew", "once", "only"] = "anew"
    processes: int | None = None
    features: bool = False

    @property
    def overrides(self) -> dict[str, Any]:
        """The keys and choices of the line that are set."""
        return {key: value for key, value in (WORDS | self.words).items() if value is not None}

    @property
    def algo(self) -> str:
        """The choice of the method."""
        return str(self.overrides["algo"])

    @property
    def tasks(self) -> int:
        """Tasks of a step."""
        return int(self.overrides["train.tasks_per_step"])

    def config(self, **more: Any) -> DictConfig:
        """The checked config of a run of this work, without the presets of particular data."""
        words = ["~preset", *(f"{key}={value}" for key, value in (self.overrides | more).items())]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("config", overrides=words)
        check(config)
        return config


def _methods(prefix: str, suffix: str, draw: Literal["anew", "once"]) -> list[Line]:
    bf16, q1 = {"hardware.autocast": "bfloat16"}, {"task.queries": 1}
    five = {"algo.inner_steps": 5, "algo.inner_lr": SMALL_RATE}
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("maml_q15", "MAML, 1 step, 15 queries", {}),
        ("maml_q15_bf16", "MAML, 1 step, 15 queries, ours in bfloat16", bf16),
        ("maml_q1", "MAML, 1 step, 1 query", q1),
        ("maml_5steps_q15", "MAML, 5 steps, 15 queries", five),
        ("maml_5steps_q1", "MAML, 5 steps, 1 query", five | q1),
        ("fomaml_q15", "FOMAML, 1 step, 15 queries", {"algo": "fomaml"}),
        ("anil_q15", "ANIL, 1 step, 15 queries", {"algo": "anil"}),
    ]
    return [Line(f"{prefix}_{name}", f"{title}{suffix}", words, draw) for name, title, words in kinds]


LINES = [
    *_methods("omniglot", ", with data", "anew"),
    *_methods("compute", "", "once"),
    Line(
        "compute_protonet",
        "ProtoNet, 20-way 5-shot, 15 queries",
        {
            "algo": "protonet", "algo.inner_steps": None, "algo.inner_lr": None,
            "task.ways": 20, "task.shots": 5, "train.tasks_per_step": 8,
        },
        "once",
    ),
    Line(
        "sinusoid_maml",
        "MAML on sinusoids, 1 step",
        {
            "data": "sinusoid", "backbone": "mlp", "algo.inner_lr": 0.01,
            "task.ways": 1, "task.shots": 10, "task.queries": 10, "train.tasks_per_step": 25,
        },
        "once",
        processes=1,
    ),
    Line("episode_sampling", "Omniglot episodes, drawn only", draw="only"),
    *(
        Line(
            f"features_{algo}",
            f"{title} tested on vectors, 5-way 5-shot, against easyfsl 1.5",
            {
                "algo": algo, "algo.inner_steps": None, "algo.inner_lr": None, "data": "glyphs", "backbone": "identity",
                "task.shots": 5, "train.tasks_per_step": tasks, "train.steps": 0, **words,
            },
            features=True,
        )
        for algo, title, tasks, words in (
            ("protonet", "ProtoNet", 256, {}),
            ("tim", "TIM, 50 steps", 32, {"algo.steps": 50}),
        )
    ),
]  # fmt: skip
# Whose peak memory is measured, by inner steps: with a large support set, so that the inner steps count.
MEMORY = Line(
    "peak_memory",
    "MAML, 5-way 5-shot, 15 queries",
    {"task.shots": 5, "algo.inner_lr": SMALL_RATE, "train.tasks_per_step": 2},
    "once",
    processes=1,
)
MEMORY_STEPS = (1, 5, 10)
