"""MANN and SNAIL, which read a task as a sequence: each against its equations written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import double, episodes, toy_images, with_
from torch import Tensor, nn

from metarun.algos.mann import MANN, by_instance
from metarun.algos.snail import SNAIL, AttentionBlock, DenseBlock
from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Episodes, Spec, TaskShape
from metarun.errors import UserError

SEPARABLE = toy_images()
SPEC = Spec((1, 16, 16), "classification", 3)
BOTH = pytest.mark.parametrize("kind", [MANN, SNAIL])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(kind: type, **settings: object) -> Algorithm:
    """In double precision, with weights away from their start, so that biases matter."""
    algorithm = kind(MLP(input_shape=(1, 16, 16), hidden=[6], init_std=None), SPEC, **settings).double().eval()
    for parameter in algorithm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return algorithm


def tiny_mann(**settings: float) -> MANN:
    return tiny(MANN, **{"memory_slots": 7, "memory_width": 3, "controller": 4, "reads": 2} | settings)


def batch_of(shots: int = 2, queries: int = 2) -> Episodes:
    return double(episodes(SEPARABLE, TaskShape(3, shots, queries), 2))


def sequence(length: int) -> tuple[Tensor, Tensor]:
    """Random features and labels of two tasks."""
    return torch.randn(2, length, 6, dtype=torch.float64), torch.randint(3, (2, length))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


class Legible(nn.Module):
    """Features that say which class an image of `marked` is of."""

    norm, features = "none", 6

    def forward(self, x: Tensor, n_support: int | None = None) -> Tensor:
        return x.mean((1, 2, 3))[:, None].expand(-1, 6)


def marked(algorithm: Algorithm, shots: int, queries: int) -> Episodes:
    """Episodes whose images have the value of their class, for an algorithm that is given them as they are."""
    algorithm.backbone = Legible()
    batch = batch_of(shots, queries)
    paint = [
        y[..., None, None, None].expand_as(x).double()
        for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y))
    ]
    return with_(batch, support_x=paint[0], query_x=paint[1])


# MANN


@torch.no_grad()
def written_out(mann: MANN, features: Tensor, labels: Tensor) -> Tensor:
    """The logits of one task's sequence, slot by slot and head by head, as the equations stand in the paper."""
    (slots, width), (size,), *_ = mann.shapes
    heads = mann.reads
    memory = [torch.zeros(width, dtype=torch.float64) for _ in range(slots)]
    cell, hidden = torch.zeros(2, size, dtype=torch.float64)
    read = torch.zeros(heads * width, dtype=torch.float64)
    used, w_read = [0.0] * slots, [[0.0] * slots for _ in range(heads)]
    label, logits = torch.zeros(3, dtype=torch.float64), []
    for x, y in zip(features, labels, strict=True):
        gates = mann.input.weight @ torch.cat([x, label]) + mann.input.bias
        forget, enter, leave, new = (gates + mann.recurrent.weight @ torch.cat([hidden, read])).split(size)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        keys = torch.tanh(mann.key.weight @ hidden + mann.key.bias).split(width)
        alpha = torch.sigmoid(mann.gate.weight @ hidden + mann.gate.bias).tolist()
        least = sorted(range(slots), key=lambda i: used[i])[:heads]
        w_write = [[alpha[h] * w_read[h][i] for i in range(slots)] for h in range(heads)]
        for h, slot in enumerate(least):
            w_write[h][slot] += 1 - alpha[h]
            memory[slot] = torch.zeros_like(memory[slot])
        for i in range(slots):
            memory[i] = memory[i] + sum(w_write[h][i] * keys[h] for h in range(heads))
        for h, key in enumerate(keys):
            cosines = [
                (mann.key_strength * key @ row / torch.sqrt(key @ key * (row @ row) + 1e-6)).item() for row in memory
            ]
            w_read[h] = [math.exp(c) / sum(map(math.exp, cosines)) for c in cosines]
        read = torch.cat([sum(w * row for w, row in zip(weights, memory, strict=True)) for weights in w_read])
        used = [0.95 * used[i] + sum(w[i] for w in w_read) + sum(w[i] for w in w_write) for i in range(slots)]
        logits.append(mann.head.weight @ torch.cat([hidden, read]) + mann.head.bias)
        label = F.one_hot(y, 3).double()
    return torch.stack(logits)


@pytest.mark.parametrize("strength", [1.0, 5.0])
def test_mann_is_its_equations(strength: float) -> None:
    """Over more steps than there are slots, so that slots are written anew."""
    mann = tiny_mann(key_strength=strength)
    features, labels = sequence(12)
    found, _ = mann.present(features, labels)
    close(found.detach(), torch.stack([written_out(mann, *task) for task in zip(features, labels, strict=True)]))


def test_each_head_writes_to_a_slot_of_its_own_among_the_least_used() -> None:
    """Equation 6: one where the usage is at most the n-th smallest; the first head's is the least used of all."""
    mann = tiny_mann(reads=3)
    usage = torch.rand(4, 7, dtype=torch.float64)
    least = mann.least_used(usage)
    nth = usage.sort(1).values[:, 2:3]
    assert torch.equal(least.sum(1), (usage <= nth).double())
    assert torch.equal(least.sum(2), torch.ones(4, 3, dtype=torch.float64))
    assert torch.equal(least[:, 0].argmax(1), usage.argmin(1))


def test_mann_writes_to_unused_slots_first() -> None:
    """With the gate shut nothing is added to what was read: each slot holds one key, the last step's among them."""
    mann = tiny_mann(memory_slots=8)
    nn.init.zeros_(mann.gate.weight)
    nn.init.constant_(mann.gate.bias, -50.0)
    features, labels = sequence(9)
    seen: list[Tensor] = []
    mann.key.register_forward_hook(lambda module, given, keys: seen.append(keys.tanh().unflatten(-1, (2, 3))))
    for length in (1, 2, 3, 4, 6, 9):
        seen.clear()
        _, (memory, *_) = mann.present(features[:, :length], labels[:, :length])
        full = memory.norm(dim=-1) > 1e-9
        assert full.sum(1).tolist() == [min(2 * length, 8)] * 2
        distances = torch.cdist(torch.cat(seen, 1), memory)
        assert distances.amin(1)[full].max() < 1e-9
        assert distances[:, -2:].amin(2).max() < 1e-9


def test_an_open_gate_writes_where_was_read() -> None:
    """Sigmoid(alpha) = 1: nothing was read before the first step, so nothing is ever written."""
    mann = tiny_mann()
    nn.init.zeros_(mann.gate.weight)
    nn.init.constant_(mann.gate.bias, 50.0)
    _, (memory, *_) = mann.present(*(part[:, :1] for part in sequence(3)))
    assert memory.abs().max() < 1e-9
    _, (memory, *_) = mann.present(*sequence(3))
    assert (memory.norm(dim=-1) > 1e-3).sum() > 4 * 2


@pytest.mark.parametrize("place", [0, 3])
def test_a_label_is_told_one_step_late(place: int) -> None:
    mann = tiny_mann()
    features, labels = sequence(6)
    before, _ = mann.present(features, labels)
    other = labels.clone()
    other[:, place] = (labels[:, place] + 1) % 3
    after, _ = mann.present(features, other)
    assert torch.equal(after[:, : place + 1], before[:, : place + 1])
    assert ((after - before)[:, place + 1].abs().amax(-1) > 1e-4).all()


def test_a_query_comes_right_after_the_support() -> None:
    """Each is predicted as the last image of a sequence of its own, and is told the label before it."""
    mann, batch = tiny_mann(), batch_of()
    found = mann.predict(batch)
    features = mann.normed_features(batch)
    order = [0, 2, 4, 1, 3, 5]  # two shots of three classes, one of each class and then again
    for query in range(6):
        images = torch.cat([features[:, order], features[:, 6 + query, None]], 1)
        labels = torch.cat([batch.support_y[:, order], torch.zeros(2, 1, dtype=torch.int64)], 1)
        close(found[:, query], mann.present(images, labels)[0][:, -1])


def test_accuracy_by_instance() -> None:
    labels = torch.tensor([[2, 0, 0, 1, 2, 1, 1, 0, 2], [0, 1, 2, 0, 1, 2, 0, 1, 2]])
    right = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[1, 2, 2], [0, 2, 3]]) / 3
    close(by_instance(right, labels, 3), expected)


@pytest.mark.parametrize(("shots", "queries", "points"), [(1, 15, 10), (2, 1, 3)])
def test_mann_reports_the_accuracy_by_instance(
    shots: int, queries: int, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle that says class 0 until it has seen a class is right on a third of the first instances, then on all."""
    mann = tiny_mann()
    batch = marked(mann, shots, queries)

    def oracle(features: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert torch.equal(features[..., 0], labels.double())  # every image with its own label
        assert not torch.equal(labels, labels.sort(1).values)  # in mixed order
        seen = F.one_hot(labels, 3).cumsum(1).gather(2, labels[..., None])[..., 0] > 1
        return F.one_hot(labels * seen, 3).double(), ()

    monkeypatch.setattr(mann, "present", oracle)
    found = mann.measures(batch)["acc_by_instance"]
    assert found.shape == (2, points)
    torch.testing.assert_close(found[:, 0], torch.full((2,), 1 / 3))
    assert (found[:, 1:] == 1).all()


def test_what_is_no_number_is_right_of_no_instance() -> None:
    mann, batch = tiny_mann(), batch_of()
    batch.support_x[0] = batch.query_x[0] = torch.nan
    assert (mann.measures(batch)["acc_by_instance"][0] == 0).all()


def test_mann_learns_from_every_step_of_a_mixed_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    mann = tiny_mann()
    batch = marked(mann, 1, 3)
    shown: list[Tensor] = []

    def present(features: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert torch.equal(features[..., 0], labels.double())
        shown.append(labels)
        return labels.double()[..., None] * torch.tensor([0.0, 1.0, 2.0]), ()

    monkeypatch.setattr(mann, "present", present)
    loss, _ = mann.loss(batch, 0)
    mann.loss(batch, 1)
    assert all(torch.equal(labels.sort(1).values, shown[0].sort(1).values) for labels in shown)
    assert not torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0][0], shown[0][1])
    logits = torch.arange(3.0).double()[:, None] * torch.tensor([0.0, 1.0, 2.0])  # each class comes four times
    close(loss, F.cross_entropy(logits, torch.arange(3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reads": 0}, r"algo.reads=0: must be at least 1"),
        ({"memory_slots": 1}, r"algo.memory_slots=1: must be at least algo.reads=2"),
        ({"usage_decay": 1.5}, r"algo.usage_decay=1.5: must be from 0 to 1"),
        ({"key_strength": -1.0}, r"algo.key_strength=-1: must be at least 0"),
    ],
)
def test_mann_refuses_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_mann(**settings)


# SNAIL


def conv_dense(block: DenseBlock, x: Tensor) -> Tensor:
    """A dense block on a whole sequence `[T, channels]`, by torch's dilated convolution."""
    kernel = torch.stack([block.before.weight, block.now.weight], -1)
    padded = F.pad(x.T[None], (block.dilation, 0))
    change, gate = F.conv1d(padded, kernel, block.now.bias, dilation=block.dilation)[0].T.chunk(2, -1)
    return torch.cat([x, torch.tanh(change) * torch.sigmoid(gate)], -1)


def loop_attention(block: AttentionBlock, x: Tensor) -> Tensor:
    """An attention block on a whole sequence `[T, channels]`, element by element."""
    query, key, value = block.query(x), block.key(x), block.value(x)
    rows = []
    for t in range(len(x)):
        scores = torch.stack([query[t] @ key[s] / math.sqrt(key.shape[1]) for s in range(t + 1)])
        rows.append((scores.exp() / scores.exp().sum()) @ value[: t + 1])
    return torch.cat([x, torch.stack(rows)], -1)


SMALL = {"filters": 4, "keys": [3, 4], "values": [2, 5]}


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_queries_read_together_are_sequences_of_their_own(shots: int) -> None:
    """All queries beside one support equal, for each query, a causal network over the support and that query."""
    snail = tiny(SNAIL, **SMALL)  # with blocks for one shot: other lengths go through as well
    features, labels = torch.randn(2, 3 * shots + 4, 6, dtype=torch.float64), torch.randint(3, (2, 3 * shots))
    found = snail.read(features, labels)
    for task in range(2):
        for query in range(4):
            image = features[task, 3 * shots + query]
            x = torch.cat([features[task, : 3 * shots], image[None]])
            x = torch.cat([x, F.pad(F.one_hot(labels[task], 3).double(), (0, 0, 0, 1))], -1)
            for block in snail.blocks:
                x = conv_dense(block, x) if isinstance(block, DenseBlock) else loop_attention(block, x)
            close(found[task, query], snail.head(x[-1]))


def test_an_element_depends_on_nothing_later() -> None:
    snail = tiny(SNAIL, **SMALL)
    x = torch.randn(9, 9, dtype=torch.float64)
    for place in range(9):
        other = x.clone()
        other[place] += 1
        before, after = x, other
        for block in snail.blocks:
            before, after = block(before, 6), block(after, 6)
        changed = ((before - after).abs().amax(-1) > 1e-9).tolist()
        # Six of the support, each seen by all that come later; three queries, each seen by none but itself.
        assert changed == [i == place or (place < 6 and i > place) for i in range(9)]


@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (3, 1), (5, 5), (2, 1), (7, 1)])
def test_dilations_double_until_they_cover_the_sequence(ways: int, shots: int) -> None:
    backbone = MLP(input_shape=(4,), hidden=[6])
    snail = SNAIL(backbone, Spec((4,), "classification", ways, shots=shots), filters=2, keys=[2] * 3, values=[2] * 3)
    blocks = [block for block in snail.blocks if isinstance(block, DenseBlock)]
    dilations = [block.dilation for block in blocks]
    assert len(dilations) % 2 == 0
    half = dilations[: len(dilations) // 2]
    assert half == dilations[len(half) :] == [2**i for i in range(len(half))]
    length = ways * shots + 1
    assert sum(half[:-1]) + 1 < length <= sum(half) + 1  # by kernels of two; one block less would not do
    x = torch.randn(length, blocks[0].now.in_features, requires_grad=True)
    y = x
    for block in blocks[: len(half)]:
        y = block(y, length - 1)
    (slope,) = torch.autograd.grad(y[-1].sum(), x)
    assert (slope.abs().amax(-1) > 0).all()


def test_attention_to_equal_keys_is_the_mean_of_what_came_before() -> None:
    block = AttentionBlock(4, 3, 2)
    nn.init.zeros_(block.key.weight)
    x = torch.randn(2, 5, 4)
    # Three of the support and two queries.
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]], dtype=torch.float32
    )
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(block.weights(x, 3), expected.expand(2, 5, 5))
    read = block(x, 3)
    torch.testing.assert_close(read[..., :4], x)
    torch.testing.assert_close(read[..., 4:], expected @ block.value(x))


def test_the_support_is_read_once() -> None:
    """Two images of support and four queries of three classes are 18 elements a task, not twelve sequences of seven."""
    snail = tiny(SNAIL, **SMALL)
    rows: list[torch.Size] = []
    for block in snail.blocks:
        block.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[:-1]))
    snail.predict(batch_of(2, 4))
    assert rows == [torch.Size([2, 18])] * len(snail.blocks)


def test_snail_shuffles_the_support_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    snail = tiny(SNAIL, **SMALL)
    batch = marked(snail, 2, 2)
    shown: list[Tensor] = []

    def read(features: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(features[:, :6, 0], labels.double())  # every image with its own label
        assert torch.equal(features[:, 6:, 0], batch.query_y.double())
        shown.append(labels)
        return features[:, 6:, :3]

    monkeypatch.setattr(snail, "read", read)
    for _ in range(2):
        snail.loss(batch, 0)
    assert not torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0][0], shown[0][1])
    snail.predict(batch)
    assert shown[2].tolist() == [[0, 1, 2, 0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": 0}, r"algo.filters=0: must be at least 1"),
        ({"keys": [], "values": []}, r"algo.keys=\[\]: must have at least 1 value"),
        ({"keys": [3, 4], "values": [2]}, r"algo.values=\[2\]: must be 2 sizes"),
    ],
)
def test_snail_refuses_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(SNAIL, **SMALL | settings)


@BOTH
def test_only_the_backbones_norm_makes_it_transductive(kind: type) -> None:
    algorithm = tiny(kind)
    assert not algorithm.transductive
    assert algorithm.fixed_ways
    assert not algorithm.recordable


def test_queries_apart_are_learned_as_they_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is that of each query right after a mixed support set; the support's own steps do not count."""
    mann, batch = tiny_mann(queries_apart=True), batch_of()
    images = batch.support_y.shape[1]
    order = torch.rand(batch.n_tasks, images).argsort(1)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: order.argsort(1).float())  # whose order is `order`
    loss, _ = mann.loss(batch, 0)
    features, labels = mann.normed_features(batch), batch.support_y.take_along_dim(order, 1)
    support = features[:, :images].take_along_dim(order[..., None], 1)
    losses = []
    for query in range(batch.query_y.shape[1]):
        sequence = torch.cat([support, features[:, [images + query]]], 1)
        logits = mann.present(sequence, torch.cat([labels, batch.query_y[:, [query]]], 1))[0][:, -1]
        losses.append(F.cross_entropy(logits, batch.query_y[:, query]))
    close(loss.detach(), torch.stack(losses).mean().detach())


@torch.no_grad()
def test_late_write_starts_as_the_key_of_the_step_before() -> None:
    """What a new MANN writes resembles its last key, and no other of the ones before, so it can be found by it."""
    mann = MANN(MLP(input_shape=(1, 16, 16), hidden=[40]), SPEC, late_write=True, reads=1, memory_slots=9).eval()
    keys, written = [], []
    assert mann.written is not None
    mann.key.register_forward_hook(lambda module, given, found: keys.append(found.tanh()))
    mann.written.register_forward_hook(lambda module, given, found: written.append(found.tanh()))
    mann.present(torch.randn(50, 8, 40), torch.randint(3, (50, 8)))
    alike = F.cosine_similarity(torch.stack(written)[:, None], torch.stack(keys)[None], dim=-1).mean(-1)
    assert torch.equal(alike[1:].argmax(1), torch.arange(7))
    assert alike.diagonal(-1).min() > 0.2
