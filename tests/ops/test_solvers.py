"""R2-D2, MetaOptNet and `metarun.ops.solvers`, beside the same problems solved in other ways."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import double, episodes, toy_images
from sklearn.svm import LinearSVC
from torch import Tensor

from metarun.algos.metaoptnet import MetaOptNet
from metarun.algos.r2d2 import R2D2
from metarun.backbones.conv4 import Conv4
from metarun.core import Algorithm, Backbone, Episodes, Spec, TaskShape
from metarun.errors import UserError
from metarun.ops.solvers import ridge, support_vectors

SEPARABLE = toy_images()
METHODS = {"r2d2": (R2D2, {}), "svm": (MetaOptNet, {"head": "svm"}), "ridge": (MetaOptNet, {"head": "ridge"})}
EVERY = pytest.mark.parametrize("name", METHODS)
# Examples and features: more of one, more of the other.
SHAPES = pytest.mark.parametrize(("shots", "width"), [(1, 30), (4, 3)])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Flat(Backbone):
    """The images themselves are the features."""

    norm = "none"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.widths = features, []

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: object = None) -> Tensor:
        return x.flatten(1)


def of_features(name: str, width: int, **settings: object) -> Algorithm:
    """A method right on the features, in double precision."""
    kind, more = METHODS[name]
    return kind(Flat(width), Spec((width,), "classification", 3), **more, **settings).double()


def random_tasks(tasks: int, ways: int, shots: int, width: int, spread: float = 1.0) -> Episodes:
    """Features around centres that overlap, so that some support images are on the wrong side."""
    labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    queries = torch.arange(ways).repeat_interleave(2).expand(tasks, -1)
    centres = torch.randn(tasks, ways, width, dtype=torch.float64)
    support, query = (
        spread * (centres.repeat_interleave(count, 1) + torch.randn(tasks, ways * count, width, dtype=torch.float64))
        for count in (shots, 2)
    )
    return Episodes(support, labels, query, queries, ways)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def primal_ridge(x: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """The weights, from the system of feature size."""
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype), x.mT @ targets)


@EVERY
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    """Of everything that is trained: through the solution, to the body and the numbers beside it."""
    kind, settings = METHODS[name]
    backbone = Conv4(input_shape=(1, 16, 16), channels=4, norm="batch")
    algorithm = kind(backbone, Spec((1, 16, 16), "classification", 3), **settings).double().train()
    for parameter in algorithm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = double(episodes(SEPARABLE, TaskShape(3, 2, 2), 2))
    found = dict(zip(dict(algorithm.named_parameters()), grad(algorithm, batch), strict=True))
    assert all(found[part].abs() > 1e-4 for part in found.keys() & {"scale", "log_regularization"})
    assert found["backbone.blocks.0.conv.weight"].abs().max() > 1e-4
    for number in range(3):
        directions = {part: value if number == 0 else torch.randn_like(value) for part, value in found.items()}
        reach = math.sqrt(sum(value.square().sum().item() for value in directions.values()))
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(algorithm)
            for part, value in moved.named_parameters():
                value.data += sign * 1e-6 * directions[part] / reach
            ends.append(moved.loss(batch, 0)[0].item())
        expected = sum((found[part] * directions[part]).sum().item() for part in found) / reach
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-7)


def grad(algorithm: Algorithm, batch: Episodes) -> tuple[Tensor, ...]:
    return torch.autograd.grad(algorithm.loss(batch, 0)[0], list(algorithm.parameters()))


@EVERY
def test_autocast_does_not_reach_the_solution(name: str) -> None:
    """Of features in bfloat16 the logits are those of the same numbers in single precision."""
    algorithm, batch = of_features(name, 30).float(), random_tasks(2, 5, 2, 30)
    half = Episodes(batch.support_x.bfloat16(), batch.support_y, batch.query_x.bfloat16(), batch.query_y, 5)
    single = Episodes(half.support_x.float(), batch.support_y, half.query_x.float(), batch.query_y, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = algorithm.predict(half)
    assert found.dtype == torch.float32
    close(found, algorithm.predict(single), 1e-6)


# Ridge regression


@SHAPES
def test_r2d2_is_the_ridge_regression_of_its_primal_problem(shots: int, width: int) -> None:
    algorithm, batch = of_features("r2d2", width, scale=3.0), random_tasks(4, 3, shots, width)
    algorithm.log_regularization.data.fill_(math.log(0.7))
    algorithm.bias.data.fill_(0.3)
    n = 3 * shots
    weights = primal_ridge(
        with_ones(batch.support_x) / math.sqrt(n), F.one_hot(batch.support_y, 3).double() / math.sqrt(n), 0.7
    )
    close(algorithm.predict(batch), 3 * with_ones(batch.query_x) @ weights + 0.3)


@SHAPES
def test_metaoptnets_ridge_has_no_bias_and_the_penalty_as_it_is(shots: int, width: int) -> None:
    algorithm, batch = (
        of_features("ridge", width, regularization=0.7, scale=3.0),
        random_tasks(4, 3, shots, width),
    )
    weights = primal_ridge(batch.support_x, F.one_hot(batch.support_y, 3).double(), 0.7)
    close(algorithm.predict(batch), 3 * batch.query_x @ weights)


def test_much_regularisation_leaves_inner_products_with_the_class_means() -> None:
    batch = random_tasks(4, 3, 2, 30)
    found = of_features("r2d2", 30, regularization=1e9, scale=1e9).predict(batch)
    means = with_ones(batch.support_x).unflatten(1, (3, 2)).mean(2)
    close(found, with_ones(batch.query_x) @ means.mT / 3, 1e-5)


def test_regularisation_is_trained_only_where_asked_for() -> None:
    for learned in (True, False):
        algorithm = of_features("r2d2", 5, learn_regularization=learned)
        assert algorithm.log_regularization.exp().item() == pytest.approx(50)
        assert algorithm.log_regularization.requires_grad == learned


# The support vector machine


def margins(kernel: Tensor, targets: Tensor, cost: float, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """w_k.x_i + [k != y_i] - w_(y_i).x_i, whose maximum over k is the loss of example i, and what each is chosen with."""
    scores = kernel @ coefficients
    return scores + 1 - targets - (scores * targets).sum(-1, keepdim=True), targets - coefficients / cost


@pytest.mark.parametrize("cost", [0.003, 0.1, 10.0])
@SHAPES
def test_svm_is_that_of_liblinear(cost: float, shots: int, width: int) -> None:
    batch = random_tasks(3, 4, shots, width)
    algorithm = of_features("svm", width, cost=cost, diagonal=0.0, scale=2.0)
    for found, x, y, query in zip(
        algorithm.predict(batch), batch.support_x, batch.support_y, batch.query_x, strict=True
    ):
        svm = LinearSVC(multi_class="crammer_singer", fit_intercept=False, C=cost, tol=1e-10, max_iter=10**6)
        expected = 2 * torch.from_numpy(svm.fit(x.numpy(), y.numpy()).decision_function(query.numpy()))
        close(found.detach(), expected, 1e-6)


@pytest.mark.parametrize("spread", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize(("ways", "shots", "width"), [(5, 1, 64), (5, 5, 8), (2, 3, 10), (20, 1, 64)])
def test_svm_meets_the_conditions_of_optimality(ways: int, shots: int, width: int, spread: float) -> None:
    """Where one example is there twice and one is zero, too; and its primal and dual problems have one value."""
    batch = random_tasks(3, ways, shots, width, spread)
    x, targets = batch.support_x, F.one_hot(batch.support_y, ways).double()
    x[:, -1], x[:, 0] = x[:, -2].clone(), 0
    kernel, coefficients = x @ x.mT, support_vectors(x, targets, 0.1)
    margin, chosen = margins(kernel, targets, 0.1, coefficients)
    losses = margin.amax(-1, keepdim=True)
    assert chosen.min() >= 0
    close(chosen.sum(-1), torch.ones_like(chosen[..., 0]))
    assert (chosen * (losses - margin)).max() < 1e-9
    size = (coefficients * (kernel @ coefficients)).sum((-2, -1)) / 2
    primal, dual = size + 0.1 * losses.sum((-2, -1)), (coefficients * targets).sum((-2, -1)) - size
    close(primal, dual, 1e-9)


@pytest.mark.parametrize(("ways", "shots", "width"), [(3, 1, 6), (3, 3, 4), (4, 2, 20)])
def test_svms_gradient_is_that_of_finite_differences(ways: int, shots: int, width: int) -> None:
    """Of the queries' scores with respect to the support set's features."""
    batch = random_tasks(2, ways, shots, width)
    targets = F.one_hot(batch.support_y, ways).double()

    def scores(x: Tensor) -> Tensor:
        return batch.query_x @ x.mT @ support_vectors(x, targets, 0.2)

    chosen = targets - support_vectors(batch.support_x, targets, 0.2) / 0.2
    assert ((chosen > 0.01) & (chosen < 0.99)).any()  # else the solution stands still
    assert torch.autograd.gradcheck(scores, batch.support_x.requires_grad_(), rtol=1e-5, atol=1e-7, fast_mode=True)


def test_large_features_of_classes_that_cannot_be_separated() -> None:
    """Solved to the optimum, where primal and dual are equal: it takes more iterations than usual."""
    torch.manual_seed(0)
    y = torch.eye(5, dtype=torch.float64).repeat_interleave(15, 0)
    x = 300 * (0.5 * torch.randn(5, 3, dtype=torch.float64).repeat_interleave(15, 0) + torch.randn(75, 3).double())
    dual = support_vectors(x, y, 0.1)
    scores = x @ x.T @ dual
    norm = (dual * scores).sum()
    slack = (scores + 1 - y).amax(1) - (scores * y).sum(1)
    assert (norm / 2 + 0.1 * slack.sum()).item() == pytest.approx(((dual * y).sum() - norm / 2).item(), rel=1e-8)


def test_each_problem_is_solved_as_if_alone() -> None:
    """One that is not finite spoils no other."""
    batch = random_tasks(4, 5, 2, 20)
    x, targets = batch.support_x, F.one_hot(batch.support_y, 5).double()
    x[1] *= 100
    together = support_vectors(x, targets, 0.1)
    for number in range(4):
        close(together[number], support_vectors(x[number], targets[number], 0.1))
    x[2] = math.nan
    spoiled = support_vectors(x, targets, 0.1)
    assert spoiled[2].isnan().all()
    close(spoiled[[0, 1, 3]], together[[0, 1, 3]])


@pytest.mark.parametrize("spread", [1.0, 1000.0])
def test_solved_in_double_precision_whatever_that_of_the_features(spread: float) -> None:
    """In single precision a kernel of more examples than features would be indefinite."""
    batch = random_tasks(4, 5, 4, 3, spread)
    x, targets = batch.support_x.float(), F.one_hot(batch.support_y, 5)
    for found, expected in (
        (support_vectors(x, targets, 0.1), support_vectors(x.double(), targets, 0.1)),
        (ridge(x, targets, 0.1), ridge(x.double(), targets, 0.1)),
    ):
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        close(found, expected.float(), 1e-7)


def test_diagonal_is_added_to_the_kernel_of_the_support_set_alone() -> None:
    batch = random_tasks(2, 3, 2, 10)
    found = of_features("svm", 10, diagonal=0.5, cost=0.2).predict(batch)
    # The inner products of the support images, but not theirs with queries, feel features that each image has for itself.
    own = math.sqrt(0.5) * torch.eye(6, dtype=torch.float64).expand(2, -1, -1)
    support, query = torch.cat([batch.support_x, own], -1), torch.cat([batch.query_x, 0 * own], -1)
    wider = Episodes(support, batch.support_y, query, batch.query_y, 3)
    close(found, of_features("svm", 16, diagonal=0.0, cost=0.2).predict(wider))


def test_label_smoothing_of_an_eighth_is_the_official_tenth() -> None:
    """Which gives each of the four wrong classes a quarter of a tenth."""
    algorithm, batch = of_features("svm", 30, label_smoothing=0.125), random_tasks(3, 5, 2, 30)
    ones = F.one_hot(batch.query_y, 5).double()
    smooth = 0.9 * ones + 0.1 / 4 * (1 - ones)
    expected = -(smooth * algorithm.predict(batch).log_softmax(-1)).sum(-1).mean()
    close(algorithm.loss(batch, 0)[0], expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("r2d2", {"regularization": 0.0}, r"^algo.regularization=0: must be above 0$"),
        ("r2d2", {"scale": -1.0}, r"^algo.scale=-1: must be above 0"),
        ("svm", {"cost": 0.0}, r"^algo.cost=0: must be above 0$"),
        ("svm", {"diagonal": -1.0}, r"^algo.diagonal=-1: must be at least 0"),
        ("svm", {"scale": 0.0}, r"^algo.scale=0: must be above 0"),
        ("svm", {"label_smoothing": 1.0}, r"^algo.label_smoothing=1: must be at least 0 and below 1$"),
        ("ridge", {"regularization": -2.0}, r"^algo.regularization=-2: must be above 0$"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_features(name, 5, **settings)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"^algo.head=smv: is not one of svm, ridge; did you mean svm\?$"):
        MetaOptNet(Flat(5), Spec((5,), "classification", 3), head="smv")
