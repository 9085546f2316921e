"""Presets: what applies by itself, the papers' own settings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from helpers import CONF, choices
from omegaconf import DictConfig
from shell import SINUSOID, metarun, result

from metarun.config import schema
from metarun.config.shorthand import expanded, folded
from metarun.config.validation import check
from metarun.config.values import values_of_task

QUICK = ["maml", "fomaml", "anil", "metasgd", "reptile", "protonet"]  # of the methods that people try first


def compose(*words: str) -> DictConfig:
    """The config of a command line, with presets."""
    assert schema.Config  # its import registers the schema
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=expanded(words))


@pytest.mark.parametrize("data", ["omniglot", "glyphs"])
@pytest.mark.parametrize("algo", QUICK)
def test_methods_that_are_tried_first_have_presets(algo: str, data: str) -> None:
    preset = compose(f"algo={algo}", f"data={data}")
    without = compose(f"algo={algo}", f"data={data}", "~preset")
    check(preset)
    assert preset.train != without.train


def test_preset_sets_the_schedule_and_the_network_where_they_were_not_chosen() -> None:
    def config(*words: str) -> DictConfig:
        return compose("algo=maml", "data=omniglot", *words)

    assert config().train.schedule._target_.endswith("CosineAnnealingLR")
    assert config("train.steps=7").train.schedule.T_max == 7
    assert config("schedule=step").train.schedule.step_size == 2000
    constant = {"_target_": "metarun.engine.schedules.Constant"}
    assert config("schedule=constant").train.schedule == config("~preset").train.schedule == constant
    assert config().backbone.downsample == "stride"
    assert config("backbone.downsample=pool").backbone.downsample == "pool"
    check(config("backbone=mlp"))  # the preset names no setting of a network that was not chosen


@pytest.mark.parametrize("name", ["oml", "anml", "protonet"])
def test_a_trial_cuts_the_classes_that_arrive_too(name: str) -> None:
    """Of 600 classes in ten orders, and six rates, the online head takes a quarter of an hour."""
    config = compose(f"experiment=continual/{name}", "debug=fast")
    check(config)
    assert config.continual.orders * config.continual.classes * config.continual.images <= 100


@pytest.mark.parametrize("name", [name for name in choices("preset") if name.startswith("paper/")])
def test_settings_of_papers(name: str) -> None:
    algo, _, data = name.removeprefix("paper/").partition("_")
    typed = [f"algo={algo}", f"data={data}", "preset=paper"]
    config = compose(*typed)
    check(config)
    assert config.train.steps >= 50_000
    assert folded(expanded(typed)) == typed
    assert expanded(expanded(typed)) == expanded(typed)


def test_rates_of_a_paper() -> None:
    """Finn et al. step by 0.4 along the gradient of a sum over five ways, which is 2.0 along that of their mean."""
    config = compose("algo=maml", "data=omniglot", "preset=paper")
    assert (config.algo.inner_lr, config.algo.test_inner_steps, config.train.tasks_per_step) == (0.4 * 5, 3, 32)


@pytest.mark.parametrize("algo", ["maml", "fomaml"])
def test_tasks_of_a_paper_have_as_many_queries_as_shots(algo: str) -> None:
    """Finn et al.'s code draws `update_batch_size * 2` images of a class, half of them for the outer loss."""
    for words, shots in (
        (["task.shots=1"], 1),
        (["task.shots=5"], 5),
        (["train.task.shots=5"], 5),
        (["task.shots=5", "train.task.shots=2"], 2),
        (["train.task.shots=[1,10]"], (1, 10)),
    ):
        config = compose(f"algo={algo}", "data=omniglot", "preset=paper", *words)
        check(config)
        task = values_of_task(config, "train")
        assert (task["queries"], task["shots"]) == (shots, shots)
        assert config.test.task.queries is None


@pytest.mark.parametrize(
    ("words", "shots", "queries"),
    [
        ([], 5, 100),
        (["task.shots=7"], 7, 100),
        (["task.shots=7", "test.task.shots=3"], 3, 100),
        (["task.queries=4"], 5, 4),
    ],
)
def test_a_word_for_all_tasks_is_of_test_tasks_whatever_a_preset_says_of_these(
    words: list[str], shots: int, queries: int, tmp_path: Path
) -> None:
    outcome = metarun(*SINUSOID, *words, f"outputs={tmp_path}")
    assert outcome.status == 0, outcome.err
    (folder,) = tmp_path.glob("*/*/result.json")
    assert result(folder.parent)["protocol"]["test"] == {"ways": 1, "shots": shots, "queries": queries}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["algo=snail", "data=omniglot", "preset=paper"], "preset=paper: there is none for algo=snail on data=omniglot, only for"),
        (["preset=proton_glyphs"], "preset=proton_glyphs: there is no such choice; did you mean protonet_glyphs"),
        (["preset=learn2learn/maml_sinusoi"], "there is no such choice; did you mean learn2learn/maml_sinusoid"),
        (["-m", "algo=maml,snail", "data=omniglot", "preset=maml_omniglot,paper"], "preset=paper: there is none for algo=snail"),
    ],
)  # fmt: skip
def test_presets_that_are_not_there(words: list[str], told: str, tmp_path: Path) -> None:
    done = metarun(*words, f"outputs={tmp_path / 'outputs'}")
    assert done.status == 2
    assert told in done.err
    assert len(done.said) == 1
    assert not (tmp_path / "outputs").exists()


def test_sweep_over_a_preset_and_the_papers(tmp_path: Path) -> None:
    done = metarun(
        "-m", "algo=maml,fomaml", "data=omniglot", "preset=maml_omniglot,paper", "--dry-run", f"outputs={tmp_path}"
    )
    assert done.status == 0
    assert "preset=paper" in done.out
    assert "${" not in done.out


@pytest.mark.parametrize("algo", QUICK)
def test_a_preset_carries_a_run_out(algo: str, tmp_path: Path) -> None:
    few = ["train.validate_episodes=2", "test.episodes=2", "test.baseline_episodes=2"]
    done = metarun(f"algo={algo}", "debug=fast", *few, "hardware=cpu", "backbone.channels=4", f"outputs={tmp_path}")
    assert done.status == 0, done.err
