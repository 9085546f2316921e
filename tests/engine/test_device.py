"""What runs on the CPU runs on another device as well, with the same numbers: nothing is left behind, or made in the wrong place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
import second_device
import torch
from helpers import CONF, Replays, choices, hardware
from learners import ALGOS, VECTORIZABLE, fed, gradients, learner, steps_of
from omegaconf import OmegaConf
from shell import make_images, metarun, result, run_folder
from torch import Tensor

from metarun.config.signature import read
from metarun.core import Batch, Episodes, TaskShape
from metarun.engine import hardware as chosen
from metarun.engine.evaluate import evaluate
from metarun.engine.gradients import gradient_step
from metarun.engine.hardware import choose
from metarun.engine.probabilities import Observed, known_and_unknown, validation_temperature
from metarun.engine.traced_step import TracedStep
from metarun.ops.metrics import squared_error
from metarun.runs.contents import OF_REPEATS

second_device.device()

Tensors = TypeVar("Tensors", Episodes, Batch)


def moved(batch: Tensors, device: torch.device) -> Tensors:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


def test_devices_do_not_mix() -> None:
    with second_device.present() as device:
        there, here = torch.ones(2, device=device), torch.ones(2)
        with pytest.raises(RuntimeError, match="some tensors are on stand_in:0, others on cpu"):
            there + here
        with pytest.raises(RuntimeError, match="some tensors are on stand_in:0, others on cpu"):
            there[:1].lerp_(here[:1], 0.5)
        total = (there + here.to(device) + torch.tensor(1.0))[[0, 1]]
        assert total.device == device
        assert total.cpu().tolist() == [3, 3]
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("name", ALGOS)
def test_every_method_stays_on_its_device(name: str) -> None:
    """Gradients of the training loss, predictions, and what it measures; in the form of the task axis that a GPU gets."""

    def found(device: torch.device) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        algorithm, batch = learner(name, 2, vectorize=name in VECTORIZABLE)
        given = moved(fed(algorithm, batch), device)
        algorithm.to(device)
        logged = gradient_step(algorithm.train(), given, 0, 1.0, 0, dataclasses.replace(plain, device=device))
        slopes = gradients(algorithm)
        algorithm.eval()
        with torch.no_grad():
            predicted = algorithm.predict_after(moved(batch, device), steps_of(algorithm))
            measured = algorithm.measures(moved(batch, device))
        values = {"logged": logged, "gradients": slopes, "predicted": {"": predicted}, "measured": measured}
        assert all(value.device == device for kind in values.values() for value in kind.values())
        return [{key: value.cpu() for key, value in kind.items()} for kind in values.values()]

    plain = hardware(vectorize=name in VECTORIZABLE, task_chunk=None)
    expected = found(torch.device("cpu"))
    with second_device.present() as device:
        for on_device, on_cpu in zip(found(device), expected, strict=True):
            assert on_device.keys() == on_cpu.keys()
            for key, value in on_cpu.items():
                torch.testing.assert_close(on_device[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_scores_take_no_double_precision_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPU has none."""

    def single(tensor: second_device.There, held: Tensor) -> None:
        assert held.dtype != torch.float64
        tensor.held = held

    monkeypatch.setattr(second_device.There, "__init__", single)
    algorithm, batch = learner("protonet", 2)
    with second_device.present() as device:
        algorithm.to(device)
        there = dataclasses.replace(hardware(), device=device)

        def tasks(start: int, stop: int) -> Episodes:
            return moved(batch, device)

        observed = Observed(2, None)
        scores = evaluate(algorithm, tasks, 2, there, measure=True, observe=observed)
        assert scores.final.dtype == torch.float64
        assert observed.before.totals[0] == batch.query_y.numel()
        validation_temperature(algorithm, tasks, 2, TaskShape(5, 1, 4), there)
        known, _ = known_and_unknown(algorithm, tasks, 2, TaskShape(4, 1, 4), 1, None, there)
        assert "prototype_distance" in known
        assert squared_error(batch.query_x.flatten(2).to(device), torch.zeros(2, 1, 1, device=device)).shape == (2,)


def test_a_captured_step_stays_on_its_device() -> None:
    plain = hardware(vectorize=True, task_chunk=None)
    algorithm, batch = learner("maml", 2, vectorize=True)
    gradient_step(algorithm.train(), batch, 0, 1.0, 0, plain)
    expected = gradients(algorithm)
    with second_device.present() as device:
        algorithm.to(device)
        replays = Replays()
        recorded = dataclasses.replace(plain, device=device, traced=TracedStep(replays))
        for _ in range(2):
            gradient_step(algorithm, moved(batch, device), 0, 1.0, 0, recorded)
        assert replays.count == 3  # and one of the check
        for key, value in gradients(algorithm).items():
            torch.testing.assert_close(value.cpu(), expected[key])


SMALL = ["data=folder", "data.image_size=16", "task.ways=3", "task.queries=2", "train.steps=2", "train.tasks_per_step=4",
         "train.validate_every=2", "train.validate_episodes=4", "test.episodes=4", "test.baseline_episodes=4"]  # fmt: skip
CONV4 = "backbone.channels=4"
# The loss does not depend on the bias of a convolution before a batch norm: its gradient is rounding errors alone. Adam divides
# by their size, and so would make another network of another order of sums; SGD leaves such a bias where it is.
TARGET = ["recipe=transfer", "target=folder", "target.data.image_size=16", "target.train_images=24",
          "target.test_images=12", "target.repeats=2", "optimizer=sgd", "train.optimizer.lr=0.1"]  # fmt: skip
CLOSE = 1e-5  # of probabilities
VIT = ["backbone=vit", "backbone.patch_size=4", "backbone.width=8", "backbone.depth=1"]


def few_steps(name: str) -> list[str]:
    """A network that this kind of fine-tuning takes, and few steps of it."""
    settings = OmegaConf.load(Path(CONF) / "transfer" / f"{name}.yaml")
    # Boosting turns the order of float sums into other votes; a few rounds of it do not.
    few = {"steps": 6, "rounds": 3, "head_steps": 4 if settings.get("head_steps") else 0}
    signature = read(settings._target_)
    assert signature is not None
    known = {setting.name for setting in signature.settings}
    steps = [f"transfer.{key}={number}" for key, number in few.items() if key in known]
    return [*steps, *(VIT if name in ("prompts", "lora") else [CONV4])]


RUNS = [
    ["algo=maml", "backbone.norm=running", CONV4],
    ["algo=maml", "wrapper=metamix", CONV4],
    ["algo=anil", "wrapper=ats", CONV4],
    ["algo=baseline", "augment=standard", CONV4],
    ["recipe=pretrain_meta", "pretrain.train.steps=2", CONV4],
    [
        "recipe=domain_adaptation",
        "algo=dann",
        "target=folder",
        "target.data.image_size=16",
        "train.tasks_per_step=16",
        CONV4,
    ],
    *([*TARGET, f"transfer={name}", *few_steps(name)] for name in choices("transfer")),
]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_whole_run_on_a_device(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    images = make_images(tmp_path / "images")
    roots = [f"data.root={images}", *([f"target.data.root={images}"] if "target=folder" in words else [])]

    def run(outputs: str) -> Path:
        done = metarun(*SMALL, *words, *roots, f"outputs={tmp_path / outputs}")
        assert done.status == 0, done.err
        return run_folder(tmp_path / outputs)

    def there(*arguments: Any) -> Any:
        return dataclasses.replace(choose(*arguments), device=device)

    here = run("cpu")
    with second_device.present() as device, mock.patch.object(chosen, "choose", there):
        away = run("device")
    expected, found = result(here), result(away)
    assert found["hardware"]["device"] == second_device.NAME
    scores = [key for key in expected if key.startswith(("test/", "target/", "train/loss", "val/"))]
    scores = [key for key in scores if isinstance(expected[key], float) and "second" not in key]
    # An interval over two repeats is twelve times as wide as they differ: it would magnify what is allowed below.
    scores = [key for key in scores if not (key.startswith("target/") and key.endswith("_ci95"))]
    assert scores
    tied = False
    repeats = sorted(file.name for file in (here / OF_REPEATS).glob("*.npz"))
    assert bool(repeats) == ("recipe=transfer" in words)
    for name in repeats:
        on_cpu, on_device = (np.load(run / OF_REPEATS / name) for run in (here, away))
        shares = np.exp(on_cpu["log_probabilities"])
        np.testing.assert_allclose(np.exp(on_device["log_probabilities"]), shares, rtol=0, atol=CLOSE)
        best, second = np.sort(shares, 1)[:, :-3:-1].T
        other = on_cpu["classes"] != on_device["classes"]
        assert (best - second)[other].max(initial=0) <= 2 * CLOSE
        tied |= bool(other.any())
    for key in scores:
        # Where two classes tie in float order, a prediction may fall the other way, and what counts predictions with it.
        if not (tied and key.startswith("target/")):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=0.05, nan_ok=True), key
