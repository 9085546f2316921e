"""Learning one class after the other: online steps, sequences, OML and ANML, and the stage that measures all of it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, build, compose, hardware, toy_images
from PIL import Image
from shell import done, events, make_images, metarun, one_line, result, run_folder
from torch import nn

from metarun.core import Episodes, TaskShape
from metarun.data.sequences import sequences
from metarun.data.source import Split
from metarun.engine.sequence import ClassSequence, linear_probe, online, prototypes
from metarun.errors import UserError
from metarun.ops.online import online_head, with_new_rows
from metarun.report import figures
from metarun.report.collect import collect
from metarun.report.summary import summarise
from metarun.report.tables import explained, section_table
from metarun.runs import contents
from metarun.stages import continual
from metarun.stages.continual import Continual

IMAGES = toy_images(per_class=12)


def stepped(weight: torch.Tensor, bias: torch.Tensor, z: torch.Tensor, y: torch.Tensor, lr: float) -> tuple[Any, Any]:
    """The head after one step on each example, by plain differentiation."""
    for k in range(len(z)):
        loss = F.cross_entropy(F.linear(z[k : k + 1], weight, bias), y[k : k + 1])
        dw, db = torch.autograd.grad(loss, [weight, bias], create_graph=True)
        weight, bias = weight - lr * dw, bias - lr * db
    return weight, bias


def test_the_head_that_is_never_built_is_that_of_the_steps() -> None:
    torch.manual_seed(0)
    z, q = torch.randn(7, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    w, b = torch.randn(5, 3).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    y, asked = torch.tensor([0, 0, 2, 2, 4, 4, 0]), torch.tensor([0, 2, 4, 1])
    rate = torch.tensor(0.3).double().requires_grad_()
    ours = online_head(w, b, z, y, q, rate)
    plain = F.linear(q, *stepped(w, b, z, y, rate))
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        torch.autograd.grad(F.cross_entropy(ours, asked), [w, b, z, q, rate]),
        torch.autograd.grad(F.cross_entropy(plain, asked), [w, b, z, q, rate]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(online_head(w, b, z[:0], y[:0], q, 0.3), F.linear(q, w, b))


def test_new_rows_are_those_of_a_classs_first_place() -> None:
    weight = torch.zeros(4, 2, requires_grad=True)
    rows = torch.arange(6.0).reshape(3, 2)
    found = with_new_rows(weight, torch.tensor([2, 2, 0]), rows)
    assert found.tolist() == [[4, 5], [0, 0], [0, 1], [0, 0]]
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0, 1, 0, 1]


def test_a_sequence_has_labels_among_all_classes() -> None:
    images = IMAGES.labelled(None, "train")
    draw = sequences(images, TaskShape(2, 3, 4), 5, 0, CPU)
    found = draw(0, 6)
    assert found.support_x.shape == (6, 6, 1, 16, 16)
    assert found.query_x.shape == (6, 13, 1, 16, 16)
    assert found.ways == 12
    known = {
        image.numpy().tobytes(): int(label) for image, label in zip(images.whole(CPU).x, images.labels, strict=True)
    }
    for support_x, support_y, query_x, query_y in zip(*found.tensors, strict=True):
        assert support_y.tolist() == [*[support_y[0]] * 3, *[support_y[3]] * 3]
        assert support_y[0] != support_y[3]
        assert query_y[:8].tolist() == [*[support_y[0]] * 4, *[support_y[3]] * 4]
        for x, y in zip([*support_x, *query_x], [*support_y, *query_y], strict=True):
            assert known[x.numpy().tobytes()] == y
        shown = [x.numpy().tobytes() for x in [*support_x, *query_x[:8]]]
        assert len(set(shown)) == len(shown)
    assert len(set(found.query_y[:, 8:].flatten().tolist())) > 6
    for number, part in enumerate(found.split(1)):
        for one, other in zip(part.tensors, draw(number, number + 1).tensors, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("task", "remembered", "message"),
    [
        (TaskShape(13, 1, 1), 0, r"train.task.ways=13: is above the 12 training classes"),
        (TaskShape(2, 9, 4), 0, "shots \\+ queries = 9 \\+ 4 = 13 is above the 12 images of the class class 0"),
        (TaskShape(1, 3, 0), 0, "train.task.queries=0: leaves nothing to learn from"),
    ],
)
def test_sequences_that_cannot_be(task: TaskShape, remembered: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sequences(IMAGES.labelled(None, "train"), task, remembered, 0, CPU)


def method(name: str, *words: str) -> Any:
    config = compose(f"algo={name}", "backbone.channels=4", "backbone.norm=group", *words)
    return build(config, IMAGES).double()


def double(found: Episodes) -> Episodes:
    return Episodes(*(t.double() if t.is_floating_point() else t for t in found.tensors), ways=found.ways)


def sequence() -> Episodes:
    return double(sequences(IMAGES.labelled(None, "train"), TaskShape(2, 2, 2), 4, 0, CPU)(0, 2))


@pytest.mark.parametrize("words", [["algo=oml"], ["algo=anml", "algo.adapt_body=false", "algo.replayed=false"]])
def test_omls_loss_is_that_after_steps_of_the_head(words: list[str]) -> None:
    algorithm = method(words[0].removeprefix("algo="), *words[1:], "algo.reset=false", "algo.inner_lr=0.5")
    nn.init.normal_(algorithm.head.weight)
    found = sequence()
    loss, _ = algorithm.loss(found, 0)
    plain = []
    for support_x, support_y, query_x, query_y in zip(*found.tensors, strict=True):
        z, q = algorithm.features_of(support_x), algorithm.features_of(query_x)
        head = stepped(algorithm.head.weight, algorithm.head.bias, z, support_y, 0.5)
        plain.append(F.cross_entropy(F.linear(q, *head), query_y))
    torch.testing.assert_close(loss, torch.stack(plain).mean())
    weights = [value for value in algorithm.parameters() if value.requires_grad]
    for one, other in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(torch.stack(plain).mean(), weights), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("first_order", [False, True])
def test_anmls_inner_steps_move_the_body_and_leave_the_modulation(first_order: bool) -> None:
    words = [
        "algo.reset=false",
        "algo.inner_lr=0.2",
        "algo.replayed=false",
        f"algo.first_order={first_order}",
        "algo.adapt_body=true",
    ]
    algorithm = method("anml", *words)
    nn.init.normal_(algorithm.head.weight, std=0.1)
    found = sequence()
    loss, _ = algorithm.loss(found, 0)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*found.tensors, strict=True):
        weights = dict(algorithm.named_parameters())
        for x, y in zip(support_x, support_y, strict=True):
            moved = {name: value for name, value in weights.items() if name.startswith(("backbone.", "head."))}
            inner = F.cross_entropy(torch.func.functional_call(algorithm, weights, (x[None],)), y[None])
            found_ = torch.autograd.grad(inner, list(moved.values()), create_graph=not first_order)
            weights |= {n: v - 0.2 * g for (n, v), g in zip(moved.items(), found_, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(algorithm, weights, (query_x,)), query_y))
    plain = torch.stack(losses).mean()
    torch.testing.assert_close(loss, plain)
    trained = list(algorithm.parameters())
    for one, other in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_a_trajectorys_classes_are_drawn_anew_before_it() -> None:
    algorithm, found = method("oml", "algo.inner_lr=0.5"), sequence()
    nn.init.normal_(algorithm.head.weight)
    torch.manual_seed(1)
    drawn = algorithm.new_rows(found)
    torch.manual_seed(1)
    loss, _ = algorithm.loss(found, 0)
    plain = []
    for support_x, support_y, query_x, query_y, rows in zip(*found.tensors, drawn, strict=True):
        weight = algorithm.head.weight.detach().clone()
        for place in (0, 2):  # where the first image of a class is
            weight[support_y[place]] = rows[place]
        z, q = algorithm.features_of(support_x), algorithm.features_of(query_x)
        head = stepped(weight.requires_grad_(), algorithm.head.bias, z, support_y, 0.5)
        plain.append(F.cross_entropy(F.linear(q, *head), query_y))
    torch.testing.assert_close(loss, torch.stack(plain).mean())


def test_replayed_images_are_asked_about_too() -> None:
    algorithm, found = method("anml", "algo.reset=false"), sequence()
    nn.init.normal_(algorithm.head.weight)
    loss, _ = algorithm.loss(found, 0)
    algorithm.replayed = False
    x, y = torch.cat([found.query_x, found.support_x], 1), torch.cat([found.query_y, found.support_y], 1)
    torch.testing.assert_close(loss, algorithm.loss(Episodes(found.support_x, found.support_y, x, y, found.ways), 0)[0])
    assert loss != algorithm.loss(found, 0)[0]


def test_predictions_are_of_a_new_head_that_saw_each_image_once() -> None:
    algorithm = method("oml", "algo.inner_lr=0.1").eval()
    found = double(IMAGES.sampler("test", TaskShape(3, 2, 2), 0, CPU)(0, 2))
    before = copy.deepcopy(algorithm.state_dict())
    logits = algorithm.predict(found)
    nn.init.normal_(algorithm.head.weight)
    assert torch.equal(algorithm.predict(found), logits)
    swapped = Episodes(found.support_x.flip(1), found.support_y.flip(1), found.query_x, found.query_y, ways=3)
    assert not torch.allclose(algorithm.predict(swapped), logits)
    assert before.keys() == algorithm.state_dict().keys()
    assert np.isfinite(logits.numpy()).all()


# Classes one after the other


def classes(count: int = 6, apart: float = 4.0) -> ClassSequence:
    random = torch.Generator().manual_seed(0)
    centres = apart * torch.randn(count, 1, 8, generator=random)
    return ClassSequence(
        centres + torch.randn(count, 5, 8, generator=random), centres + torch.randn(count, 3, 8, generator=random)
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_online_head_takes_one_step_on_each_item(optimizer: str) -> None:
    sequence, points = classes(apart=1.0), [2, 4, 6]
    unseen, learned, so_far = online(sequence, points, 0.05, optimizer, 3)
    head = nn.Linear(8, 6)
    head.weight.data = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)) * 0.5  # sqrt(2 / 8)
    head.bias.data.zero_()
    descent = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](head.parameters(), lr=0.05)
    expected: tuple[list[float], list[float]] = ([], [])
    among: list[float] = []
    for number in range(6):
        for z in sequence.learned[number]:
            descent.zero_grad()
            F.cross_entropy(head(z[None]), torch.tensor([number])).backward()
            descent.step()
        if number + 1 in points:
            for items, found in zip((sequence.asked, sequence.learned), expected, strict=True):
                right = head(items[: number + 1]).argmax(-1) == torch.arange(number + 1)[:, None]
                found.append(right.double().mean().item())
            guesses = head(sequence.asked[: number + 1])[..., : number + 1].argmax(-1)
            among.append((guesses == torch.arange(number + 1)[:, None]).double().mean().item())
    assert (unseen, learned) == expected
    assert so_far == among
    assert so_far[-1] == unseen[-1]
    starts = [online(sequence, points, 1e-6, optimizer, seed) for seed in range(4)]
    # No answer is one that has yet to come.
    assert sum(sum(one[2]) for one in starts) > sum(sum(one[0]) for one in starts)
    assert len(set(unseen)) > 1


def test_class_means_forget_nothing_and_a_probe_sees_all() -> None:
    far = classes(apart=20.0)
    assert prototypes(far, [2, 6]) == linear_probe(far, [2, 6]) == [1.0, 1.0]
    near = classes(apart=0.7)
    found = prototypes(near, [3, 6])
    for count, share in zip([3, 6], found, strict=True):
        distances = torch.cdist(near.asked[:count].flatten(0, 1), near.learned[:count].mean(1))
        right = distances.argmin(1) == torch.arange(count).repeat_interleave(3)
        assert share == pytest.approx(right.double().mean().item())
    assert 1 / 6 < linear_probe(near, [6])[0] <= 1


def test_a_head_that_diverges_is_one_line() -> None:
    with pytest.raises(UserError, match=r"continual.rates: the head is not finite at 1e\+38"):
        online(classes(), [6], 1e38, "sgd", 0)


def stage_of_places(tmp_path: Path) -> tuple[Continual, Any]:
    """The stage before its orders, and its run: classes 4 to 7 validate, 8 to 11 test, and the feature of an image is its row."""
    config = compose(
        "recipe=continual", "continual.rates=[1,0.1,0.01,0.001]", "continual.images=3", "continual.test_images=2"
    )
    stage = Continual()
    every: dict[Split, range] = {"val": range(4, 8), "test": range(8, 12)}
    source = IMAGES.divided({"train": range(4), **every})
    stage.images = {split: source.labelled(None, split) for split in every}
    stage.features = {split: torch.from_numpy(images.rows).double()[:, None] for split, images in stage.images.items()}
    stage.classes = 3
    (tmp_path / contents.CONTINUAL).mkdir()
    return stage, SimpleNamespace(config=config, hardware=hardware(), folder=tmp_path)


def rows_of(sequence: ClassSequence) -> torch.Tensor:
    """The rows of the images of each class, `[C, K + Q]`."""
    return torch.cat([sequence.learned, sequence.asked], 1)[..., 0].long()


@pytest.mark.parametrize(("split", "classes"), [("val", range(4, 8)), ("test", range(8, 12))])
def test_a_sequence_is_of_classes_of_its_split_and_asks_for_images_that_it_does_not_learn(
    split: Split, classes: range, tmp_path: Path
) -> None:
    stage, run = stage_of_places(tmp_path)
    found = [stage._sequence(run, split, number, 3) for number in range(5)]
    assert {(one.learned.shape, one.asked.shape) for one in found} == {((3, 3, 1), (3, 2, 1))}
    for sequence in found:
        rows = rows_of(sequence)
        assert len(rows.unique()) == rows.numel()
        shown = rows // 12  # the images of a class
        assert (shown == shown[:, :1]).all()
        assert len(shown[:, 0].unique()) == 3
        assert set(shown[:, 0].tolist()) <= set(classes)
    assert len({tuple(rows_of(one)[:, 0].tolist()) for one in found}) == 5
    assert torch.equal(stage._sequence(run, split, 3, 3).learned, found[3].learned)


def test_the_learning_rate_is_the_one_that_is_best_on_other_images_of_validation_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with which a head diverges is none; what was tried is kept."""
    stage, run = stage_of_places(tmp_path)
    shown: set[int] = set()

    def tried(sequence: ClassSequence, points: list[int], rate: float, *_: Any) -> tuple[list[float], ...]:
        assert points == [3]  # at the end of a sequence
        shown.update((rows_of(sequence) // 12).flatten().tolist())
        if rate == 1:
            raise UserError("continual.rates: the head is not finite at 1")
        return [{0.1: 0.5, 0.01: 0.75, 0.001: 0.25}[rate]], [1 - rate], [rate]

    monkeypatch.setattr(continual, "online", tried)
    assert stage._rate(run) == (0.01, 0.75)
    assert shown == {4, 5, 6, 7}
    monkeypatch.setattr(continual, "online", pytest.fail)
    assert stage._rate(run) == (0.01, 0.75)


PIXELS = ["recipe=continual", "algo=protonet", "backbone=pixels", "train.steps=0", "test.episodes=2",
          "continual.orders=2", "continual.classes=6",
          "continual.points=2", "continual.rates=[0.003,0.001]", "continual.images=4", "continual.test_images=2"]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["test.data=[digits,glyphs]"],
        ["test.views=3", "augment=standard"],
        ["test.unknown_ways=2"],
    ],
)
def test_settings_of_a_test_on_episodes_are_refused(tmp_path: Path, words: list[str]) -> None:
    key = words[0].partition("=")[0]
    one_line(
        metarun(*PIXELS, *words, f"outputs={tmp_path / 'out'}"), f"{key}: this recipe has no meta-test; use recipe=meta"
    )
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_test_data_is_shown_classes_of_its_source(tmp_path: Path) -> None:
    images = ["data=folder", f"data.root={make_images(tmp_path / 'images')}", "data.image_size=8", "test.data=[digits]"]
    trained = ["algo=protonet", "backbone=pixels", "train.steps=0", "test.episodes=2", "test.baseline_episodes=0"]
    done(*trained, *images, "task.ways=2", "task.queries=2", f"outputs={tmp_path / 'trained'}")
    words = ["recipe=test_continual", f"checkpoint={run_folder(tmp_path / 'trained')}", *PIXELS[5:]]
    one_line(
        metarun(*words, "test.data=[digits]", f"outputs={tmp_path / 'out'}"), "test.data: this recipe has no meta-test"
    )
    done(*words, "continual.classes=4", f"outputs={tmp_path / 'out'}")
    found = result(run_folder(tmp_path / "out"))
    assert found["continual"]["classes"] == 4
    assert not any(
        "digits" in str(value) for key, value in found.items() if key not in ("command", "overrides", "choices")
    )


def test_the_stage_leaves_a_curve_a_picture_and_orders_to_go_on_with(tmp_path: Path) -> None:
    words = [*PIXELS, f"outputs={tmp_path}"]
    assert metarun(*words).status == 0
    folder = run_folder(tmp_path)
    first = result(folder)
    told = first["continual"]
    assert first["test/points"] == {"at": [3, 6], "name": "classes so far"}
    assert first["test/acc"] == told["online"]["acc"] == first["test/curves"]["acc_online"]["mean"][-1]
    assert (
        first["interval"]
        == "95%, over 2 orders (the classes, their order, their images, the start of the head), Student's t"
    )
    assert first["protocol"]["test"] == {"ways": 6, "shots": 4, "queries": 2}
    assert told["prototypes"]["acc"] > told["online"]["acc"]
    assert told["linear_probe"]["acc"] > 1 / 6
    assert told["online_so_far"] == told["online"]  # after the last class all choose among the same
    assert "of the others it is one of the classes so far" in first["protocol"]["continual"]
    with Image.open(folder / "continual.png") as picture:
        assert picture.size[0] > 300
    assert events(folder).Images("test/continual")
    orders = sorted((folder / "continual").glob("order-*.json"))
    kept = [json.loads(path.read_text()) for path in orders]
    assert len({json.dumps(one) for one in kept}) == 2
    means = np.mean([one["online"] for one in kept], axis=0)
    np.testing.assert_allclose(first["test/curves"]["acc_online"]["mean"], means)
    # Killed in the second order: what is there is kept, the rest comes out the same.
    (folder / "result.json").unlink()
    orders[1].unlink()
    before = orders[0].stat().st_mtime_ns
    assert metarun(*words).status == 0
    assert orders[0].stat().st_mtime_ns == before
    again = result(folder)
    for key in ("test/acc", "test/curves", "continual"):
        assert again[key] == first[key]
    (section,) = summarise(collect([tmp_path], tmp_path / "report"))
    assert figures._points(section.rows[0].group) == ("classes so far", [3, 6])
    assert section.title == "glyphs, 6 classes one after the other, 4 images each, 2 to test"
    assert (section.setting.over, section.setting.target, section.rows[0].over) == ("orders", False, "orders")
    heading = "± over orders"
    assert explained([table := section_table(section)])[heading].startswith(
        "95% interval of the same mean over the orders"
    )
    assert heading in table.headings
    # What has tasks of as many classes and images is another thing, and compared with it by nothing.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    found = result(other)
    del found["continual"], found["protocol"]["continual"]
    (other / "result.json").write_text(json.dumps(found))
    assert len(summarise(collect([tmp_path], tmp_path / "report"))) == 2


def test_orders_that_other_weights_left_are_not_taken(tmp_path: Path) -> None:
    """The run may have gone on since the test of it was killed."""
    assert metarun(*PIXELS, f"outputs={tmp_path / 'runs'}").status == 0
    run = run_folder(tmp_path / "runs")
    words = ["recipe=test_continual", f"checkpoint={run}", f"outputs={tmp_path / 'tests'}"]
    done = metarun(*words)
    assert done.status == 0, done.err
    folder = run_folder(tmp_path / "tests")
    (folder / "result.json").unlink()  # as killed in the second order
    (folder / "continual" / "order-1.json").unlink()
    assert metarun(*words).status == 0  # by the same weights
    (folder / "result.json").unlink()
    (folder / "continual" / "order-1.json").unlink()
    last = torch.load(run / "last.pt", weights_only=True)
    torch.save({**last, "step": 17}, run / "last.pt")
    done = metarun(*words)
    assert done.status == 2
    assert "was made with other weights (checkpoint: the file has changed)" in done.said[-1]
    assert metarun(*words, "resume=false").status == 0


def test_no_method_is_transductive_where_each_image_is_answered_by_its_features_alone(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", classes=9, per_class=4)
    words = [
        "recipe=continual",
        "algo=bdcspn",
        "data=folder",
        f"data.root={images}",
        "data.image_size=8",
        "backbone=pixels",
    ]
    small = ["train.steps=0", "task.queries=2", "continual.classes=2", "continual.images=1", "continual.test_images=1"]
    assert metarun(*words, *small, "continual.orders=2", "continual.rates=[0.1]", f"outputs={tmp_path}").status == 0
    protocol = result(run_folder(tmp_path))["protocol"]
    assert protocol["transductive"] is False
    assert "assumes_balanced_queries" not in protocol


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["continual.classes=5000"], "continual.classes=5000: is above the"),
        (["continual.images=30"], "continual: images + test_images = 30 + 2 = 32 is above the 20 images of the class"),
        (["algo=baseline", "train.validate_on=images", "test.task.min_items=21"],
         "recipe=continual: task.min_items=21 leaves 0 of the 289 classes of the test split; lower it"),
        (["algo=oml", "backbone=conv4", "train.task.min_items=21"], "task.min_items=21: leaves 0 of the 1,035 training classes; lower it"),
        (["continual.rates=[]"], "continual.rates=[]: must have at least 1 value"),
        (["continual.rates=[0.1,0]"], "continual.rates=[0.1, 0]: each must be above 0"),
        (["continual.orders=1"], "continual.orders=1: must be at least 2"),
        (["backbone=conv4", "backbone.norm=batch", "backbone.channels=4"], "backbone.norm=batch: normalises by a set of images"),
        (["algo=maml", "data=sinusoid", "backbone=mlp"],
         "recipe=continual: shows classes one after the other, but the data are regression tasks; try data=omniglot"),
        (["algo=oml", "backbone=conv4", "train.steps=1", "train.noise.tasks=0.5"], "train.noise.tasks: is of training tasks, but OML"),
        (["algo=oml", "backbone=conv4", "unsupervised=umtra"], "unsupervised: withholds the labels"),
    ],
)  # fmt: skip
def test_what_the_stage_refuses(words: list[str], said: str, tmp_path: Path) -> None:
    done = metarun(*PIXELS, *words, f"outputs={tmp_path / 'out'}")
    assert done.status == 2
    assert said in " ".join(done.said)
    assert not (tmp_path / "out").exists()


def test_small_classes_are_left_out_of_the_sequences_of_training_and_test(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", classes=4, per_class=6)
    for split in ("train", "val", "test"):
        for number in range(3, 6):
            (images / split / f"{split}1" / f"{number}.png").unlink()
    words = [
        "recipe=continual", "algo=oml", "data=folder", f"data.root={images}", "data.image_size=16", "backbone.channels=4", "task.ways=2",
        "task.queries=2", "train.steps=1", "train.task.shots=2", "train.validate_episodes=2", "continual.orders=2", "continual.images=3",
        "continual.test_images=2", f"outputs={tmp_path / 'runs'}",
    ]  # fmt: skip
    for further, said, fits in (
        (
            "train.task.queries=2",
            "train.task: shots + queries = 2 + 2 = 4 is above the 3 images of the class train1; lower train.task.shots or "
            "train.task.queries",
            4,
        ),
        (
            "train.task.queries=1",
            "= 3 + 2 = 5 is above the 3 images of the class test1; lower continual.images or continual.test_images",
            5,
        ),
    ):
        refused = metarun(*words, further)
        assert refused.status == 2
        assert refused.said[0].endswith(f"{said}, or leave small classes out: task.min_items={fits}")
    done = metarun(*words, "train.task.queries=1", "task.min_items=5")
    assert done.status == 0, done.err
    found = result(run_folder(tmp_path / "runs"))
    assert found["continual"]["classes"] == 3
    assert found["protocol"]["test"]["min_items"] == found["protocol"]["train"]["min_items"] == 5


def test_features_that_were_learned_without_labels_can_be_measured(tmp_path: Path) -> None:
    words = ["unsupervised=umtra", "unsupervised.validation=labels", f"outputs={tmp_path}"]
    done = metarun(*PIXELS, *words)
    assert done.status == 0, done.err
