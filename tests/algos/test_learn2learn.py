"""learn2learn as an oracle: on the same weights and episodes it must compute what our own methods compute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import torch
from helpers import CONF, block, double, episodes, toy_images
from shell import SINUSOID, environment, metarun, result, run_folder
from torch import Tensor, nn

from metarun import optional as peers
from metarun.algos import learn2learn
from metarun.algos.anil import ANIL
from metarun.algos.maml import MAML
from metarun.algos.metasgd import MetaSGD
from metarun.algos.protonet import ProtoNet
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.config import HardwareSettings, to_container
from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.data.regression import Sinusoid
from metarun.engine.distributed import World
from metarun.engine.hardware import choose
from metarun.errors import UserError
from metarun.ops.batch_norm import KINDS

ROOT = Path(__file__).parents[2]
PAIRS = {
    "maml": (MAML, learn2learn.MAML, {}),
    "fomaml": (MAML, learn2learn.MAML, {"first_order": True}),
    "metasgd": (MetaSGD, learn2learn.MetaSGD, {}),
    "first-order metasgd": (MetaSGD, learn2learn.MetaSGD, {"first_order": True}),
    "anil": (ANIL, learn2learn.ANIL, {}),
    "first-order anil": (ANIL, learn2learn.ANIL, {"first_order": True}),
}


def pair(name: str, norm: str | None, inner_steps: int) -> tuple[Algorithm, Algorithm]:
    """Our method and learn2learn's, with the same random weights (and rates); `norm=None` is the MLP of sinusoids."""
    torch.manual_seed(0)
    both = []
    for method in PAIRS[name][:2]:
        backbone: Backbone
        if norm is None:
            backbone, spec = MLP(input_shape=(1,), hidden=[8, 8]), Spec((1,), "regression", 1)
        else:
            backbone = Conv4(input_shape=(1, 16, 16), channels=8, norm=norm)
            spec = Spec((1, 16, 16), "classification", 3)
        both.append(method(backbone, spec, inner_steps=inner_steps, inner_lr=0.2, **PAIRS[name][2]).double().train())
    for one, other in matched(*both):
        one.data += 0.1 * torch.randn_like(one)  # away from zero biases and equal rates
        other.data.copy_(one.data)
    return both[0], both[1]


def matched(ours: Algorithm, theirs: Algorithm) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both, weights and then rates; ours keeps its rates in another order, by name."""
    weights = {name: value for name, value in ours.named_parameters() if not name.startswith("rates.")}
    rates = [ours.rates[name.replace(".", "_")] for name in weights] if hasattr(ours, "rates") else []
    return list(zip([*weights.values(), *rates], theirs.parameters(), strict=True))


def tasks(norm: str | None) -> Episodes:
    if norm is None:
        return double(episodes(Sinusoid(), TaskShape(1, 5, 7), 2))
    return double(episodes(toy_images(), TaskShape(3, 2, 4), 2))


def equal(one: Tensor, other: Tensor, least: float = 1e-3) -> None:
    """To 1e-9 of the largest value, or of `least` if all are smaller (a bias before a norm has no gradient)."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * max(least, other.abs().max().item()))


def same_step(ours: Algorithm, theirs: Algorithm, batch: Episodes) -> None:
    """The loss, what is logged, and the gradient of every parameter."""
    (loss, logs), (expected, their_logs) = ours.loss(batch, 0), theirs.loss(batch, 0)
    equal(loss.detach(), expected.detach())
    assert logs == their_logs
    loss.backward()
    expected.backward()
    largest = max(other.grad.abs().max().item() for other in theirs.parameters())
    assert largest > 1e-3
    for parameter, other in matched(ours, theirs):
        equal(parameter.grad, other.grad, least=1e-3 * largest)


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("norm", [*KINDS, None])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_and_predictions_are_those_of_learn2learn(name: str, norm: str | None, inner_steps: int) -> None:
    ours, theirs = pair(name, norm, inner_steps)
    batch = tasks(norm)
    same_step(ours, theirs, batch)
    predictions = ours.eval().predict_after(batch, [0, 1, 4]), theirs.eval().predict_after(batch, [0, 1, 4])
    equal(*predictions)
    assert not predictions[1].requires_grad
    equal(ours.predict(batch), theirs.predict(batch))


@pytest.mark.parametrize("norm", KINDS)
def test_prototypes_are_those_of_learn2learn(norm: str) -> None:
    torch.manual_seed(0)
    spec = Spec((1, 16, 16), "classification", 3)
    ours, theirs = (
        method(Conv4(input_shape=(1, 16, 16), channels=8, norm=norm), spec).double().train()
        for method in (ProtoNet, learn2learn.ProtoNet)
    )
    theirs.load_state_dict(ours.state_dict())
    batch = tasks(norm)
    same_step(ours, theirs, batch)
    equal(ours.eval().predict(batch), theirs.eval().predict(batch))


@pytest.mark.parametrize("name", ["maml", "metasgd", "anil", "protonet"])
@pytest.mark.parametrize("data", ["glyphs", "omniglot", "sinusoid"])
def test_both_run_with_the_same_settings(name: str, data: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        ours, theirs = (
            to_container(hydra.compose("config", overrides=[f"algo={algo}", f"data={data}"]))
            for algo in (name, f"learn2learn/{name}")
        )
    algo, their_algo = ours.pop("algo"), theirs.pop("algo")
    assert ours == theirs
    assert their_algo.pop("_target_") != algo["_target_"]
    assert their_algo == {key: algo[key] for key in their_algo}


def test_a_run_is_that_of_our_own(tmp_path: Path) -> None:
    """A command line from end to end: adaptation at test time, presets, and a choice with a slash in the folder's name."""
    numbers = {}
    for algo in ("maml", "learn2learn/maml"):
        words = [f"algo={algo}", *SINUSOID[1:], "algo.inner_lr=0.01"]
        outputs = tmp_path / algo
        assert metarun(*words, f"outputs={outputs}").status == 0
        folder = run_folder(outputs)
        assert folder.parent.name == f"sinusoid-{algo.replace('/', '-')}"
        numbers[algo] = result(folder)
    ours, theirs = numbers.values()
    assert theirs["test/mse"] == pytest.approx(ours["test/mse"], rel=1e-4)
    assert theirs["hardware"]["vectorize"] is False
    assert theirs["parameters"] == ours["parameters"]


def test_tasks_are_not_vectorised() -> None:
    settings = HardwareSettings(device="cpu")
    for ours, theirs in (pair("maml", None, 1), pair("anil", None, 1)):
        assert choose(settings, ours, World()).vectorize
        assert not choose(settings, theirs, World()).vectorize
        with pytest.raises(UserError, match=r"^hardware.vectorize=true: metarun.algos.learn2learn.(MAML|ANIL) takes"):
            choose(HardwareSettings(device="cpu", vectorize=True), theirs, World())


@pytest.fixture
def forgotten() -> Iterator[None]:
    """learn2learn counts as not imported, before and afterwards."""
    peers.learn2learn.cache_clear()
    yield
    peers.learn2learn.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_library_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block("learn2learn", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"^learn2learn cannot be imported \(blocked\); from a clone"):
        peers.learn2learn()


@pytest.mark.parametrize("missing", ["learn2learn", "torchvision", "gym_notices.notices"])
@pytest.mark.usefixtures("forgotten")
def test_a_missing_library_is_one_line(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    done = metarun("algo=learn2learn/maml", *SINUSOID[1:], f"outputs={tmp_path}")
    assert done.status == 2
    (line,) = done.said
    assert line.startswith("metarun: learn2learn cannot be imported (")
    assert missing in line
    assert "scripts/install_learn2learn.sh" in line
    assert "metarun[learn2learn]" in line
    assert not list(tmp_path.iterdir())
    for method in (learn2learn.MetaSGD, learn2learn.ANIL, learn2learn.ProtoNet):
        with pytest.raises(UserError, match=missing):
            method(MLP(input_shape=(1,)), Spec((1,), "classification", 5))


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(words, env=environment(PATH=path), capture_output=True, text=True, check=True)


def test_it_is_imported_where_it_is_asked_for_and_says_nothing() -> None:
    modules = (
        "metarun.cli, metarun.runs.carry_out, metarun.algos.maml, metarun.algos.learn2learn, metarun.backbones.conv4"
    )
    code = f"""import sys, {modules}
print({{'learn2learn', 'torchvision', 'gym'}} & set(sys.modules))
print(metarun.optional.learn2learn().__version__)"""
    done = run(sys.executable, "-W", "error", "-c", code)
    assert done.stdout == "set()\n0.2.0\n"
    assert done.stderr == ""


def test_installing_it_again_does_nothing() -> None:
    done = run(ROOT / "scripts" / "install_learn2learn.sh")
    assert done.stdout.startswith("learn2learn 0.2.0 with torchvision ")
    assert done.stdout.endswith(" is installed already\n")
    assert done.stderr == ""
