"""The benchmark against learn2learn: that both sides do the same, that it would notice if not, and what it leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import mmap
import os
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shell import SINUSOID
from torch.utils.flop_counter import FlopCounterMode

from metarun.engine.distributed import World

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark.__main__ as command  # noqa: E402
from benchmark import encoding, features, measure, readme  # noqa: E402
from benchmark.device import growth  # noqa: E402
from benchmark.limit import Convolutions, Layer, needed  # noqa: E402
from benchmark.lines import LINES, MEMORY, Line  # noqa: E402
from benchmark.peer import Peer  # noqa: E402
from benchmark.predicting import Work, predicting  # noqa: E402
from benchmark.worker import Worker  # noqa: E402

CPU = torch.device("cpu")
TINY = {"data": "glyphs", "backbone.channels": 4, "task.ways": 3, "task.queries": 2, "train.tasks_per_step": 2}
IMAGES = Line("images", "MAML on glyphs", TINY | {"algo.inner_steps": 2, "algo.inner_lr": 0.01}, "once")
CURVES = dataclasses.replace(next(line for line in LINES if line.name == "sinusoid_maml"), name="curves")


def works(*lines: Line) -> dict[str, command.Measurement]:
    return {line.name: partial(measure.throughput, line) for line in lines}


def run(target: Path, measured: dict[str, command.Measurement]) -> tuple[int, dict[str, Any]]:
    """The command's exit status, and the JSON that it wrote."""
    status = command.main(["--rounds", "3", "--seconds", "0.01", "--json", str(target)], lambda hardware: measured)
    return status, json.loads(target.read_text())


def test_a_line_times_both_sides_after_they_were_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run(tmp_path / "new" / "benchmark.json", works(IMAGES, CURVES))
    assert status == 0
    assert result["rounds"] == 3
    assert result["machine"]["cores"] == measure.cores()
    assert list(result["lines"]) == ["images", "curves"]
    for line in result["lines"].values():
        for side in (line["ours"], line["peer"]):
            assert len(side["values"]) == 3
            assert 0 < side["min"] <= side["median"] <= side["max"]
        assert line["ratio"] == line["ours"]["median"] / line["peer"]["median"]
        assert line["peer"]["threads"] in (1, measure.cores())
        assert all(value["median"] <= line["peer"]["median"] for value in line["peer_slower"].values())
        assert {"float32", "float64"} == line["check"].keys()
        for precision, values in line["check"].items():
            assert values["loss_difference"] <= values["loss_difference_allowed"], precision
            assert values["loss_ours"] == pytest.approx(values["loss_peer"], rel=1e-4)
    images, curves = result["lines"]["images"], result["lines"]["curves"]
    assert images["ours"]["hardware"]["processes"] == min(2, measure.cores())
    assert curves["ours"]["hardware"]["vectorize"]
    share = images["machine"]["fraction_ours"]
    assert share == images["ours"]["median"] / images["machine"]["median"]
    assert "machine" not in curves
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("MAML on glyphs", "sinusoids", f"{images['ratio']:.2f}×", f"{share:.0%}"))


def test_a_line_whose_sides_differ_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(rounds: int, seconds: float) -> dict[str, Any]:
        return measure.verify({"float32": {"loss_difference": 0.5}})

    def measured(rounds: int, seconds: float) -> dict[str, Any]:
        return {"unit": "s"}

    status, result = run(tmp_path / "benchmark.json", {"bad": differs, "good": measured})
    assert status == 1
    assert "do not compute the same" in result["lines"]["bad"]["error"]
    assert result["lines"]["good"]["unit"] == "s"
    assert "bad: the sides do not compute the same: float32, loss difference 0.5" in capsys.readouterr().err


def test_every_promised_line_is_there() -> None:
    names = {
        "omniglot_maml_q15", "omniglot_maml_q15_bf16", "omniglot_maml_q1", "omniglot_maml_5steps_q15", "omniglot_fomaml_q15",
        "omniglot_anil_q15", "compute_maml_q15", "compute_protonet", "sinusoid_maml", "episode_sampling", "startup",
        "peak_memory", "predict", "encoding", "encoding_memory",
    }  # fmt: skip
    assert names <= command.works(["cpu"]).keys()
    for line in [*LINES, MEMORY]:
        config = line.config()
        assert config.train.tasks_per_step == line.tasks
        assert config.hardware.autocast == ("bfloat16" if line.name.endswith("bf16") else None)


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Worker, Worker]]:
    line = command.on(["cpu", "record=false", "vectorize=true"], IMAGES)
    with Worker("ours", line, 1) as ours, Worker("peer", line, 1) as peer:
        yield ours, peer


@pytest.mark.parametrize(
    ("precision", "name", "change"),
    [("float64", "backbone.blocks.1.conv.weight", 1e-6), ("float32", "head.weight", 1.0)],
)
def test_other_weights_are_noticed(
    sides: tuple[Worker, Worker], tmp_path: Path, precision: str, name: str, change: float
) -> None:
    ours, peer = sides
    path = tmp_path / "check.pt"
    ours.ask("check", path=str(path))
    measure.verify(peer.ask("check", path=str(path)))
    written = torch.load(path)
    written[precision]["weights"][name].view(-1)[0] += change
    torch.save(written, path)
    with pytest.raises(measure.Differ, match=f"{precision}, .* difference .*, allowed"):
        measure.verify(peer.ask("check", path=str(path)))


def test_other_gradients_are_noticed(sides: tuple[Worker, Worker], tmp_path: Path) -> None:
    ours, peer = sides
    path = tmp_path / "check.pt"
    ours.ask("check", path=str(path))
    written = torch.load(path)
    written["float64"]["gradients"]["head.weight"] *= 1 + 1e-6
    torch.save(written, path)
    with pytest.raises(measure.Differ, match=r"float64, gradient difference .*, allowed 1e-09"):
        measure.verify(peer.ask("check", path=str(path)))


def test_what_is_missing_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = dataclasses.replace(IMAGES, words=IMAGES.words | {"task.ways": 10_000})
    status = command.main(["--json", str(tmp_path / "b.json")], lambda hardware: works(line))
    assert status == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("benchmark: ")]
    assert "ways = 10000 is above" in said


@pytest.mark.parametrize("words", [{}, {"algo.inner_steps": 3}, {"algo": "fomaml", "algo.inner_steps": 2}])
def test_the_convolutions_counted_are_those_that_the_method_needs(words: dict[str, Any]) -> None:
    """Against what torch calls, which in second order has one more a step: an image's gradient, that nobody needs."""
    line = Line("", "", TINY | words)
    config = line.config()
    weights = [torch.randn(4, 4 if depth else 1, 3, 3, requires_grad=True) for depth in range(4)]

    def loss(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = F.max_pool2d(F.conv2d(x, weight, padding=1).tanh(), 2)
        return x.square().mean()

    second = line.algo == "maml"
    support, query = torch.randn(3, 1, 28, 28), torch.randn(6, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        adapted = weights
        for _ in range(config.algo.inner_steps):
            slopes = torch.autograd.grad(loss(adapted, support), adapted, create_graph=second)
            adapted = [weight - 0.1 * slope for weight, slope in zip(adapted, slopes, strict=True)]
        loss(adapted, query).backward()
    unneeded = config.algo.inner_steps * Layer(3, 1, 4, 28).operations if second else 0
    found = sum(layer.operations * sum(times) for layer, times in needed(config, line.algo))
    assert found == counter.get_total_flops() - unneeded
    convolutions = Convolutions(config, line.algo, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        convolutions.run(2)
    assert counter.get_total_flops() == 2 * found


def test_peak_memory_is_that_of_the_work_alone() -> None:
    size = 50 * 2**20

    def fill() -> None:
        with mmap.mmap(-1, size) as block:  # from the system: the C library may have so much to spare from other tests
            for _ in range(50):
                block.write(b"1" * 2**20)

    assert growth(fill, CPU) == pytest.approx(size, rel=0.1)
    assert growth(lambda: None, CPU) < size / 10


def test_the_sides_tell_the_memory_of_a_step(sides: tuple[Worker, Worker], tmp_path: Path) -> None:
    ours, peer = sides
    ours.ask("check", path=str(tmp_path / "check.pt"))
    assert ours.ask("memory") >= 0
    assert peer.ask("memory", path=str(tmp_path / "check.pt")) >= 0


def test_predicting_is_held_against_the_bare_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = {"_target_": "metarun.backbones.mlp.MLP", "hidden": [4]}
    work = Work(images=300, size=16, backbone=timed, light={"_target_": "metarun.backbones.conv4.Conv4", "channels": 1})
    status, result = run(tmp_path / "benchmark.json", {"predict": partial(predicting, work)})
    assert status == 0
    line = result["lines"]["predict"]
    shares = [ours / bare for ours, bare in zip(line["ours"]["values"], line["bare"]["values"], strict=True)]
    assert line["share"]["values"] == pytest.approx(shares)
    assert (line["title"], line["growth_with"]) == ("MLP on 16x16 JPEGs", "Conv4")
    for shown in (capsys.readouterr().out, readme.table(result)):
        assert f"{line['share']['median']:.0%}" in shown
    assert "| MB, 300 images by Conv4 |" in readme.table(result)


def test_the_first_step_is_seen_on_disk() -> None:
    assert measure.first_step_seconds(*SINUSOID) > 0
    with pytest.raises(measure.UserError, match="before its first training step"):
        measure.first_step_seconds("train.stepz=1")


def test_the_peer_draws_tasks_from_the_files_of_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a release of all characters, but two drawings each, whose grey says the character."""
    monkeypatch.setenv("METARUN_DATA", str(tmp_path))
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "omniglot").mkdir()
    for part, first, stop in (("images_background", 0, 964), ("images_evaluation", 964, 1623)):
        with zipfile.ZipFile(tmp_path / "omniglot" / f"{part}.zip", "w") as archive:
            for number in range(first, stop):
                file = io.BytesIO()
                Image.fromarray(np.full((105, 105), number % 250, np.uint8)).save(file, "png")
                for drawing in ("01", "02"):
                    name = f"{part}/Alphabet/character{number:04}/{number:04}_{drawing}.png"
                    archive.writestr(name, file.getvalue())
    peer = Peer(Line("", "", {"task.queries": 1, "train.tasks_per_step": 3}, "only"))
    support_x, support_y, query_x, query_y = peer.draw(0)
    assert support_x.shape == query_x.shape == (5, 1, 28, 28)
    assert sorted(support_y.tolist()) == [0, 1, 2, 3, 4]
    assert support_y.tolist() == query_y.tolist()
    torch.testing.assert_close(support_x, query_x)
    assert len(support_x[:, 0, 14, 14].unique()) == 5
    number = round(255 * (1 - peer.drawings("Alphabet/character0007")[0].mean().item()))
    assert number == 7
    assert peer.run(1, threads=1) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cuda"], "--hardware cuda: torch finds no CUDA device here; leave it out"),
        (["tpu"], "--hardware tpu: the first word is cpu or cuda"),
        (["cpu", "recrd=true"], "hardware.recrd: there is no such key; did you mean hardware.record?"),
    ],
)
def test_hardware_that_is_not_there_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = command.main(["--hardware", *words, "--json", str(tmp_path / "new" / "b.json")])
    assert status == 2
    assert capsys.readouterr().err == f"benchmark: {said}\n"
    assert not (tmp_path / "new").exists()


def test_keys_of_the_hardware_reach_our_side(sides: tuple[Worker, Worker], tmp_path: Path) -> None:
    """Those that `sides` has are others than a run of its line has by itself."""
    assert command.on(["cuda", "record=true"], CURVES).config().hardware.device == "cuda"
    described = sides[0].ask("check", path=str(tmp_path / "check.pt"))
    assert (described["record"], described["vectorize"]) == (False, True)


def test_tf32_has_a_limit_of_its_own() -> None:
    with pytest.raises(measure.Differ, match=r"tf32, loss difference 0\.02, allowed 0\.01"):
        measure.verify({"tf32": {"loss_difference": 0.02}})


def test_vectors_are_tested_as_a_run_tests_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our side of the lines against easyfsl, whose accuracies are those of distances computed here; its own is not installed."""
    monkeypatch.setattr(features, "ITEMS", 25)
    monkeypatch.setattr(features, "FEATURES", 64)
    monkeypatch.setattr(features, "CHECKED", 3)
    lines = [line for line in LINES if line.features]
    assert [line.algo for line in lines] == ["protonet", "tim"]
    line = dataclasses.replace(lines[0], words=lines[0].words | {"train.tasks_per_step": 4})
    ours = features.Ours(line, World())
    ours.check(str(tmp_path / "check.pt"))
    found = torch.load(tmp_path / "check.pt")
    for support_x, support_y, query_x, predicted in zip(*found["tasks"], found["predicted"], strict=True):
        means = torch.stack([support_x[support_y == way].mean(0) for way in range(5)])
        assert torch.equal(torch.cdist(query_x, means).argmin(1), predicted)
    assert ours.run(1) > 0
    monkeypatch.setattr(features.optional, "torchvision", lambda: None)
    monkeypatch.setitem(sys.modules, "easyfsl", None)
    with pytest.raises(
        measure.UserError, match=r"^easyfsl cannot be imported \(.*easyfsl.*\); scripts/benchmark/features.py says"
    ):
        features.Peer(line)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_sides_of_vectors_are_on_the_hardware_that_is_asked_for(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    methods = SimpleNamespace(PrototypicalNetworks=lambda network: network, TIM=None)
    parts = {
        "datasets": SimpleNamespace(FeaturesDataset=SimpleNamespace(from_dict=lambda named: [torch.zeros(1)])),
        "samplers": SimpleNamespace(TaskSampler=lambda *shape: SimpleNamespace(episodic_collate_fn=None)),
        "methods": methods,
        "utils": SimpleNamespace(evaluate=lambda method, loader, device, use_tqdm: given.append(device)),
    }
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"easyfsl.{name}", part)
    monkeypatch.setitem(sys.modules, "easyfsl", SimpleNamespace(**parts))
    monkeypatch.setattr(features.optional, "torchvision", lambda: None)
    monkeypatch.setattr(torch.utils.data.Sampler, "__init__", torch.utils.data.Sampler.__init__)  # the peer replaces it
    monkeypatch.setattr(features, "ITEMS", 1)
    line = command.on([device], next(line for line in LINES if line.name == "features_protonet"))
    features.Peer(line).run(1, threads=1)
    assert given == [device]


def test_the_tables_of_the_encoding_are_not_those_of_the_lines_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []

    def parts(count: int, image_size: int | None) -> Any:
        inside.append(os.environ["METARUN_CACHE"])
        raise measure.UserError("no further")

    monkeypatch.setenv("METARUN_CACHE", str(tmp_path))
    monkeypatch.setattr(encoding, "_parts", parts)
    with pytest.raises(measure.UserError, match="no further"):
        encoding.throughput(1, 0.0)
    assert inside != [os.environ["METARUN_CACHE"]] == [str(tmp_path)]
