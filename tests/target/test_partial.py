"""BitFit, tuning of norms, and the ensemble of logistic regressions on a target."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import CPU, build, choices, compose, toy_images
from sklearn.linear_model import LogisticRegression as Reference
from torch import Tensor, nn

from metarun.algos.rfs import RFS, logistic
from metarun.backbones.pixels import Pixels
from metarun.config import construct
from metarun.core import Algorithm, Batch, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.linear_head import Scaling
from metarun.ops.numerics import one_hot
from metarun.target.base import Bare, Tuned, features
from metarun.target.features import LogisticEnsemble, LogisticRegression
from metarun.target.partial import PartialTuning

SOURCE = toy_images(classes=4, per_class=40)
ADAM = partial(torch.optim.Adam, lr=0.05)


def learner(norm: str = "running", backbone: str = "conv4") -> Algorithm:
    sizes = (
        ["backbone.channels=4"] if backbone == "conv4" else ["backbone.width=8", "backbone.depth=2", "backbone.heads=2"]
    )
    extra = sizes if backbone == "conv4" else [*sizes, "backbone.patch_size=8"]
    algorithm = build(compose("algo=baseline", f"backbone={backbone}", *extra, f"backbone.norm={norm}"), SOURCE)
    with torch.no_grad():  # running averages that are no longer at their start
        algorithm.train().classify(SOURCE.labelled("train").whole(CPU).x)
    return algorithm.eval()


def images(part: str, count: int) -> Batch:
    return SOURCE.labelled(part).subset(count, "target.train_images", 0, 0).whole(CPU, domain=1)  # type: ignore[arg-type]


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    known = dict(before.named_parameters())
    return {name for name, value in after.named_parameters() if not torch.equal(value, known[name])}


@pytest.mark.parametrize(
    ("part", "names"),
    [("biases", ("conv.bias", "norm.bias")), ("norms", ("norm.weight", "norm.bias"))],
)
def test_what_is_tuned_and_nothing_else(part: str, names: tuple[str, ...]) -> None:
    own = learner()
    torch.manual_seed(0)
    tuned = PartialTuning(own, optimizer=ADAM, part=part, steps=100, batch_size=16).fit(images("train", 32), 4)
    found = moved(own.backbone, tuned.backbone)
    # A bias before a batch norm that has fixed averages moves too.
    assert found == {f"blocks.{number}.{name}" for number in range(4) for name in names}
    for one, other in zip(own.backbone.buffers(), tuned.backbone.buffers(), strict=True):
        assert torch.equal(one, other)
    train = images("train", 32)
    assert (tuned(train.x).argmax(1) == train.y).float().mean() > 0.8


def test_a_transformer_has_biases_and_norms() -> None:
    own = learner("none", "vit")
    for part in ("biases", "norms"):
        tuned = PartialTuning(own, optimizer=ADAM, part=part, steps=2, batch_size=8).fit(images("train", 8), 4)
        found = moved(own.backbone, tuned.backbone)
        assert found
        assert all("bias" in name if part == "biases" else "norm" in name or "ln" in name for name in found), found


def test_what_was_tuned_can_be_restored() -> None:
    own, train = learner(), images("train", 16)
    method = PartialTuning(own, optimizer=ADAM, part="norms", steps=3, batch_size=8)
    tuned = method.fit(train, 4)
    again = method.restore(tuned.state_dict(), 4)
    assert isinstance(again, Tuned)
    assert torch.equal(again(train.x), tuned(train.x))


def test_a_backbone_without_such_parameters_is_refused() -> None:
    pixels = Bare(Pixels((1, 16, 16)), Spec((1, 16, 16), "classification", 4))
    with pytest.raises(UserError, match=r"^transfer\.part=biases: the backbone Pixels has no biases; use transfer=all"):
        PartialTuning(pixels, optimizer=ADAM)
    with pytest.raises(UserError, match=r"^transfer\.part=norms: the backbone Conv4 has no norms"):
        PartialTuning(learner("none"), optimizer=ADAM, part="norms")


def test_the_built_in_choices_build() -> None:
    for name, kind in (
        ("bitfit", PartialTuning),
        ("layer_norm", PartialTuning),
        ("logistic_ensemble", LogisticEnsemble),
    ):
        assert name in choices("transfer")
        node = compose("recipe=target_only", "target=digits", f"transfer={name}").transfer
        assert isinstance(construct(node, "transfer", learner=learner(), source=None), kind)


@pytest.mark.parametrize("classes", [2, 4])
def test_an_ensemble_is_the_mean_of_its_members_probabilities(classes: int) -> None:
    own, train, test = learner(), images("train", 24), images("test", 8)
    kept = train.y < classes
    train = Batch(train.x[kept], train.y[kept], train.domain[kept])
    found = LogisticEnsemble(own, inverse_penalties=[0.01, 0.3]).fit(train, classes)
    known = features(own.backbone, train.x).double()
    scaling = Scaling(known)
    asked = scaling(features(own.backbone, test.x).double()).numpy()
    members = [Reference(C=c, max_iter=5000).fit(scaling(known).numpy(), train.y.numpy()) for c in (0.01, 0.3)]
    wanted = sum(torch.from_numpy(member.predict_proba(asked)) for member in members) / 2
    torch.testing.assert_close(found(test.x).double().exp(), wanted, rtol=1e-5, atol=1e-6)
    method = LogisticEnsemble(own, inverse_penalties=[0.01, 0.3])
    assert torch.equal(method.restore(found.state_dict(), classes)(test.x), found(test.x))
    alone = LogisticEnsemble(own, inverse_penalties=[0.3]).fit(train, classes)(test.x)
    torch.testing.assert_close(alone, LogisticRegression(own, inverse_penalty=0.3).fit(train, classes)(test.x))


def test_an_ensemble_computes_its_features_once() -> None:
    own, rows = learner(), list[int]()
    own.backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    LogisticEnsemble(own).fit(images("train", 24), 4)
    assert rows == [24]


def test_rfs_of_several_costs_is_the_mean_of_their_probabilities() -> None:
    torch.manual_seed(0)
    x, q = torch.rand(2, 6, 5), torch.rand(2, 7, 5)
    y = torch.tensor([0, 0, 1, 1, 2, 2]).expand(2, -1)
    batch = Episodes(x.double(), y, q.double(), torch.zeros(2, 7, dtype=torch.int64), 3)

    def built(**settings: object) -> Algorithm:
        return RFS(Pixels((5,)), Spec((5,), "classification", 3), **settings).double().eval()

    def by(cost: float) -> Tensor:
        support, queries = (nn.functional.normalize(each.double(), dim=2) for each in (x, q))
        return logistic(support, one_hot(y, 3), queries, cost).softmax(2)

    found = built(costs=[0.2, 1.0, 5.0]).predict(batch)
    torch.testing.assert_close(found.exp(), (by(0.2) + by(1.0) + by(5.0)) / 3)
    torch.testing.assert_close(built().predict(batch).softmax(2), by(1.0))
    with pytest.raises(UserError, match=r"^algo\.costs=\[\]: must "):
        built(costs=[])
    with pytest.raises(UserError, match=r"^algo\.costs=\[1, -1\]: each must be above 0"):
        built(costs=[1.0, -1.0])
