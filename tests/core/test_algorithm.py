"""The contract of a method: what its base class computes, and what it asks of a class that fulfils it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.backbones.mlp import MLP
from metarun.core import Algorithm, Episodes, Spec
from metarun.ops.inner_loop import InnerLoop


class Counting(Algorithm):
    """Predicts the number of inner steps that it takes, for every query and way."""

    inner = InnerLoop(steps=2, lr=0.1, test_steps=5)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def predict_after(self, episodes: Episodes, steps: Any) -> Tensor:
        return torch.tensor(steps)[:, None, None, None].expand(-1, *episodes.query_y.shape, episodes.ways)


def made() -> Counting:
    return Counting(MLP(input_shape=(1,)), Spec((1,), "classification", 5))


def test_a_method_without_predictions_is_no_class() -> None:
    with pytest.raises(TypeError, match=r"^Silent must define predict, or predict_after if it has inner steps$"):
        type("Silent", (Algorithm,), {})


def test_a_prediction_takes_the_inner_steps_of_a_test() -> None:
    x, y = torch.zeros(1, 5, 1), torch.arange(5)[None]
    assert (made().predict(Episodes(x, y, x, y, 5)) == 5).all()


def test_a_test_takes_the_inner_steps_of_training_unless_it_has_its_own() -> None:
    method = made()
    assert method.test_steps == 5
    method.inner = InnerLoop(steps=2, lr=0.1)
    assert method.test_steps == 2
    method.inner = None
    assert method.test_steps == 0


def test_a_method_on_episodes_has_no_classes_of_its_own() -> None:
    with pytest.raises(NotImplementedError, match=r"^Counting has no classes of its own$"):
        made().classify(torch.zeros(1, 1))


def test_single_precision_is_kept_and_double_is_not_lost() -> None:
    algorithm = made()
    labels, targets = torch.arange(5).repeat(4), torch.rand(20, 5, dtype=torch.float64)
    logits = torch.randn(20, 5, dtype=torch.float64)
    assert algorithm.task_loss(logits, labels).item() == F.cross_entropy(logits, labels).item()
    assert algorithm.task_loss(logits.bfloat16(), labels).dtype == torch.float32
    algorithm.spec = Spec((1,), "regression", 5)
    assert algorithm.task_loss(logits, targets).item() == F.mse_loss(logits, targets).item()
    assert algorithm.task_loss(logits.bfloat16(), targets.float()).dtype == torch.float32


def test_probabilities_are_labels_too() -> None:
    algorithm, logits, labels = made(), torch.randn(2, 10, 5), torch.arange(5).repeat(2, 2)
    for target in (labels, F.one_hot(labels).float()):
        loss, scores = algorithm.loss_and_scores(logits, target)
        assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-6)
        assert scores["acc"].item() == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
