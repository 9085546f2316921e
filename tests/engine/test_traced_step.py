"""A recorded gradient is the plain one, and is there only where it can be."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers import Replays, build, choices, class_of, compose, double, episodes, hardware, toy_images
from torch import Tensor

from metarun.config import task_of
from metarun.core import Algorithm, Episodes
from metarun.data.regression import Sinusoid
from metarun.engine import traced_step
from metarun.engine.cuda_graph import Compute, CudaGraph, cuda_graph
from metarun.engine.distributed import World
from metarun.engine.gradients import gradient_step
from metarun.engine.hardware import Hardware, choose
from metarun.engine.traced_step import TracedStep
from metarun.errors import UserError
from metarun.ops import pooled_norm

IMAGES = toy_images()
MLP = ["backbone=mlp", "backbone.hidden=[16]", "backbone.init_std=null", "task.queries=4"]


def learner(name: str, *words: str, source: object = IMAGES, tasks: int = 6) -> tuple[Algorithm, list[Episodes]]:
    """An untrained algorithm, and two batches of its training tasks."""
    config = compose(f"algo={name}", *MLP, "backbone.norm=batch", "train.task.ways=5", "train.task.queries=4", *words)
    if "inner_steps" in config.algo:
        config.algo.inner_steps = 2  # what a recording of more steps would only repeat
    if "solver_steps" in config.algo:
        config.algo.solver_steps = 2
    task = task_of(config, "train")
    return build(config, source, vectorize=True), [episodes(source, task, tasks, start=start) for start in (0, 100)]


def gradients(algorithm: Algorithm, batch: Episodes, step: int, chosen: object) -> dict[str, Tensor]:
    logged = gradient_step(algorithm.train(), batch, step, 1.0, 0, chosen)
    found = {name: value.grad for name, value in algorithm.named_parameters() if value.grad is not None}
    return {**logged, **found}


RECORDABLE = [name for name in choices("algo") if class_of(name).recordable]


def test_some_are_recordable() -> None:
    assert {"maml", "fomaml", "protonet"} <= set(RECORDABLE)


@pytest.mark.parametrize(("name", "chunk"), [("maml", None), *((name, 4) for name in RECORDABLE)])
def test_played_back_it_is_the_plain_gradient(name: str, chunk: int | None) -> None:
    """On other tasks than it was recorded on, at another step, with other weights, and added up over unequal chunks."""
    algorithm, batches = learner(name)
    algorithm.double()
    plain = hardware(vectorize=True, task_chunk=chunk)
    recorded = replace(plain, traced=TracedStep())
    for step, batch in zip((0, 10**6), map(double, batches), strict=True):
        expected = gradients(algorithm, batch, step, plain)
        found = gradients(algorithm, batch, step, recorded)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            for value in algorithm.parameters():
                value += 0.1 * torch.randn_like(value)
    assert recorded.traced is not None
    assert len(recorded.traced.recordings) == (1 if chunk is None else 2)
    assert None not in recorded.traced.recordings.values()


def test_a_loss_that_is_no_number_is_the_same_when_played_back(caplog: pytest.LogCaptureFixture) -> None:
    """The training tells of it; that the recording differs would not be true."""
    algorithm, (batch, _) = learner("maml")
    with torch.no_grad():
        for value in algorithm.parameters():
            value.fill_(torch.nan)
    recorded = replace(hardware(vectorize=True), traced=TracedStep())
    assert gradients(algorithm, batch, 0, recorded)["loss"].isnan()
    assert caplog.text == ""


def test_captured_it_is_the_plain_gradient() -> None:
    """As on a CUDA device, but for the device: the memory of inputs and outputs stays, and each replay fills it anew."""
    replays = Replays()
    algorithm, batches = learner("maml")
    algorithm.double()
    plain = hardware(vectorize=True, task_chunk=2)  # three chunks, whose gradients add up
    recorded = replace(plain, traced=TracedStep(replays))
    earlier = None
    for step, batch in enumerate(map(double, batches)):
        expected, found = gradients(algorithm, batch, step, plain), gradients(algorithm, batch, step, recorded)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)
        if earlier is not None:  # what was returned does not change with the next replay
            assert all(torch.equal(*pair) for pair in earlier)
        earlier = [(value, value.clone()) for value in found.values() if isinstance(value, Tensor)]
    assert replays.count == 1 + 6


def test_what_a_replay_reads_stays_where_it_was() -> None:
    """A CUDA graph knows the addresses of a recording's constants, and does not hold them."""

    class Recording:
        def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x + 1,)

    def capture(compute: Compute) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        return compute(), lambda: None

    recording = Recording()
    alive = weakref.ref(recording)
    graph = CudaGraph(recording, [torch.ones(2)], capture)
    del recording
    assert alive() is not None
    assert graph(torch.ones(2))[0].tolist() == [2, 2]


def test_cuda_graphs_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """While any of them lives, and on one stream: torch uses memory again on the same stream alone."""
    used: list[tuple[int | None, object]] = []

    class Graph:
        def pool(self) -> int:
            return 7

        def replay(self) -> None:
            """Nothing is computed here."""

    def captured(graph: Graph, pool: int | None, stream: object) -> AbstractContextManager[None]:
        used.append((pool, stream))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    graphs = [cuda_graph(tuple), cuda_graph(tuple)]
    assert [pool for pool, _ in used] == [None, 7]
    assert used[0][1] is used[1][1]
    graphs.clear()
    cuda_graph(tuple)
    assert used[2][0] is None


def test_one_that_changes_from_step_to_step_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    algorithm, batches = learner("protonet")
    honest = type(algorithm).loss

    class Fickle(type(algorithm)):  # type: ignore[misc]
        calls = 0

        def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            self.calls += 1
            loss, shown = honest(self, episodes, step)
            return loss * self.calls, shown

    algorithm.__class__ = Fickle
    with caplog.at_level(logging.WARNING, logger="metarun"):
        gradients(algorithm, batches[0], 0, replace(hardware(vectorize=True), traced=TracedStep()))
    assert "it does not give the same gradient" in caplog.text


def chosen(*words: str, name: str = "maml") -> object:
    config = compose(f"algo={name}", "hardware=cpu", *words)
    source = Sinusoid() if "data=sinusoid" in words else IMAGES
    return choose(config.hardware, build(config, source), World())


def test_small_networks_are_recorded_after_few_steps_and_others_after_more() -> None:
    sinusoids = ["data=sinusoid", "backbone=mlp", "task.ways=1"]
    assert 0 < chosen(*sinusoids).traced.patience < chosen("backbone.norm=batch").traced.patience
    assert chosen(*sinusoids, "hardware.record=true").traced.patience == 0
    assert chosen(*sinusoids, name="reptile").traced is None
    assert chosen(*sinusoids, "hardware.record=false").traced is None
    assert chosen("backbone.norm=batch", "hardware.record=true").traced.patience == 0
    running = chosen("backbone.norm=running", "backbone=mlp", name="protonet")
    assert running.traced.patience == chosen("backbone.norm=batch").traced.patience


def test_where_it_cannot_be_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"hardware\.record=true: .*its network draws random numbers"):
        chosen("hardware.record=true", "backbone=resnet12", "backbone.drop_rate=0.1", name="protonet")
    with pytest.raises(UserError, match="its operations change"):
        chosen("hardware.record=true", name="reptile")


def convolutions(name: str, norm: str, *words: str) -> tuple[Algorithm, list[Episodes], Hardware]:
    config = compose(f"algo={name}", "backbone.channels=4", f"backbone.norm={norm}", "task.queries=2", *words)
    source = IMAGES
    algorithm = build(config, source)
    plain = replace(hardware(task_chunk=1), channels_last=True)
    plain.place(algorithm)
    return algorithm, [episodes(source, task_of(config, "train"), 3, start=start) for start in (0, 100)], plain


@pytest.mark.parametrize("name", ["maml", "protonet"])
@pytest.mark.parametrize(
    ("norm", "least"),
    [("batch", 0), ("batch", 2**16), ("running", 0), ("running", 2**16), ("support", 0), ("group", 0)],
)
def test_convolutions_are_played_back_to_the_bit(
    name: str, norm: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever they are recorded, gradients, scalars and running averages are those of the plain steps.

    Values from `least` on are normalised and pooled at once.
    """
    monkeypatch.setattr(pooled_norm, "LEAST", least)
    monkeypatch.setattr(traced_step, "_faster", lambda one, other: True)
    algorithm, batches, plain = (
        convolutions(name, norm, "algo.inner_steps=2") if name == "maml" else convolutions(name, norm)
    )
    other = copy.deepcopy(algorithm)
    recorded = replace(plain, traced=TracedStep(patience=4))
    for step, batch in enumerate(batches):
        expected, found = gradients(algorithm, batch, step, plain), gradients(other, batch, step, recorded)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
        assert all(torch.equal(*pair) for pair in zip(algorithm.buffers(), other.buffers(), strict=True))
        assert recorded.describe()["record"] == (step == 1)  # four chunks are computed plainly, three of them in step 0


def test_a_recording_that_is_slower_is_not_played_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_step, "_faster", lambda one, other: False)
    algorithm, batches, plain = convolutions("protonet", "batch")
    recorded = replace(plain, traced=TracedStep(patience=1))
    gradients(algorithm, batches[0], 0, recorded)
    assert list(recorded.traced.recordings.values()) == [None]
    assert not recorded.describe()["record"]


def test_a_recording_that_differs_in_a_bit_is_not_played_back_unasked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, batches, plain = convolutions("protonet", "batch")
    honest = traced_step._streamlined

    def dishonest(recording: object) -> object:
        play = honest(recording)
        return lambda *inputs: tuple(value * (1 + 1e-6) for value in play(*inputs))

    monkeypatch.setattr(traced_step, "_streamlined", dishonest)
    with caplog.at_level(logging.WARNING, logger="metarun"):
        for patience, played in ((0, True), (1, False)):
            recorded = replace(plain, traced=TracedStep(patience=patience))
            gradients(algorithm, batches[0], 0, recorded)
            assert recorded.describe()["record"] is played
    assert not caplog.text
