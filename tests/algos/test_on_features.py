"""Methods on features: each against a plain computation of one task in double precision, and limits in which they are another."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import double, episodes, table, toy_images
from shell import done, metarun, result, run_folder
from torch import Tensor

from metarun.algos.bdcspn import BDCSPN
from metarun.algos.caml import CAML, elmes
from metarun.algos.deepbdc import DeepBDC, distance_matrices
from metarun.algos.frn import FRN, overlap
from metarun.algos.laplacianshot import LaplacianShot
from metarun.algos.protonet import ProtoNet
from metarun.algos.ptmap import PTMAP
from metarun.algos.simpleshot import SimpleShot
from metarun.algos.soft_k_means import SoftKMeans
from metarun.algos.tim import TIM
from metarun.algos.tip_adapter import TipAdapter
from metarun.algos.transductive_fine_tuning import TransductiveFineTuning
from metarun.algos.transformed import TransformedFeatures
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.backbones.pixels import Pixels
from metarun.core import Algorithm, Episodes, Spec, TaskShape, together
from metarun.data.image_source import ImageSource
from metarun.data.imbalanced import cut_short, dirichlet, divided
from metarun.errors import UserError
from metarun.ops.transport import sinkhorn

D, WAYS = 6, 3
TRANSDUCTIVE = [BDCSPN, LaplacianShot, PTMAP, SoftKMeans, TIM, TransductiveFineTuning]
IMAGES = toy_images()


def on_vectors(kind: type[Algorithm], **settings: object) -> Algorithm:
    """A method on vectors of length D as they are, which are centred by a mean that is not zero."""
    torch.manual_seed(0)
    algorithm = kind(Pixels((D,)), Spec((D,), "classification", WAYS), **settings).double().eval()
    if isinstance(algorithm, TransformedFeatures):
        algorithm.mean.copy_(torch.rand(D) / 4)
    return algorithm


def vectors(count: int = 4, sizes: tuple[int, ...] = (4, 7, 2)) -> Episodes:
    """Tasks with 1, 2 and 3 support vectors of the classes, in an order of each task's own, and unequal queries."""
    torch.manual_seed(1)
    centres = 2 * torch.rand(count, WAYS, D, dtype=torch.float64)
    support_y = torch.stack([torch.tensor([0, 1, 1, 2, 2, 2])[torch.randperm(6)] for _ in range(count)])
    query_y = torch.arange(WAYS).repeat_interleave(torch.tensor(sizes)).expand(count, -1)

    def near(labels: Tensor) -> Tensor:
        return (centres.gather(1, labels[..., None].expand(-1, -1, D)) + 0.6 * torch.randn(*labels.shape, D)).abs()

    return Episodes(near(support_y), support_y, near(query_y), query_y, WAYS)


def features(algorithm: Algorithm, batch: Episodes, task: int) -> tuple[Tensor, Tensor, Tensor]:
    """A task's support vectors, their labels and its queries, transformed."""
    x, q = batch.support_x[task], batch.query_x[task]
    transform = getattr(algorithm, "transform", "un")
    if transform == "cl2n":
        x, q = x - algorithm.mean, q - algorithm.mean
    if transform != "un":
        x, q = x / x.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
    return x, batch.support_y[task], q


def means(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x[y == way].mean(0) for way in range(WAYS)])


def distances(points: Tensor, centres: Tensor) -> Tensor:
    return (points[:, None] - centres[None]).square().sum(2)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def compare(algorithm: Algorithm, reference: object, tolerance: float = 1e-9) -> None:
    """The logits of all tasks at once, and those of `reference` for each task, which count up to a number of each query."""
    batch = vectors()
    found = algorithm.predict(batch).log_softmax(-1)
    for task in range(batch.n_tasks):
        close(found[task], reference(*features(algorithm, batch, task)).log_softmax(-1), tolerance)  # type: ignore[operator]


# Transductive methods


@pytest.mark.parametrize("steps", [1, 3])
def test_soft_k_means_by_hand(steps: int) -> None:
    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        prototypes = means(x, y)
        for _ in range(steps):
            shares = (-distances(q, prototypes)).exp()
            shares = shares / shares.sum(1, keepdim=True)
            for way in range(WAYS):
                total = x[y == way].sum(0) + (shares[:, way, None] * q).sum(0)
                prototypes[way] = total / ((y == way).sum() + shares[:, way].sum())
        return -distances(q, prototypes)

    compare(on_vectors(SoftKMeans, refinements=steps), reference)


def test_soft_k_means_of_no_step_is_protonet() -> None:
    found = on_vectors(SoftKMeans, refinements=0)
    assert not found.transductive
    assert torch.equal(found.predict(vectors()), on_vectors(ProtoNet).predict(vectors()))


def by_bdcspn(x: Tensor, y: Tensor, q: Tensor, epsilon: float) -> Tensor:
    """Prototypes, class by class."""
    start = F.normalize(means(x, y), dim=1)
    shifted = q + x.mean(0) - q.mean(0)
    nearest = F.cosine_similarity(shifted[:, None], start[None], dim=2).argmax(1)
    found = []
    for way in range(WAYS):
        members = torch.cat([x[y == way], shifted[nearest == way]])
        weights = (epsilon * F.cosine_similarity(members, start[way][None], dim=1)).exp()
        found.append((weights[:, None] * members).sum(0) / weights.sum())
    return torch.stack(found)


def test_bdcspn_by_hand() -> None:
    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return 7 * F.cosine_similarity(q[:, None], by_bdcspn(x, y, q, 7.0)[None], dim=2)

    compare(on_vectors(BDCSPN, epsilon=7.0), reference)


def test_bdcspn_without_a_shift_and_with_queries_that_are_the_support_set_is_the_nearest_mean() -> None:
    """One vector of each class, which is its own prototype."""
    batch = vectors()
    first = torch.stack([(labels[:, None] == torch.arange(WAYS)).double().argmax(0) for labels in batch.support_y])
    x = batch.support_x.gather(1, first[..., None].expand(-1, -1, D))
    labels = torch.arange(WAYS).expand(len(x), -1)
    found = on_vectors(BDCSPN).predict(Episodes(x, labels, x, labels, WAYS))
    unit = F.normalize(x - on_vectors(BDCSPN).mean, dim=-1)
    close(found, 10 * unit @ unit.mT)


@pytest.mark.parametrize("rectify", [False, True])
def test_laplacianshot_by_hand(rectify: bool) -> None:
    """As the official code: its distances, and its neighbours, are those of the queries that its rectification shifted."""

    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        gallery, query = (by_bdcspn(x, y, q, 10.0) if rectify else means(x, y)).numpy(), q.numpy()
        if rectify:
            query = query + (x.numpy().mean(0) - query.mean(0))[None]
        unary = np.linalg.norm(query[:, None] - gallery[None], axis=-1) ** 2
        between = np.linalg.norm(query[:, None] - query[None], axis=-1)
        kernel = np.zeros_like(between)
        np.put_along_axis(kernel, between.argsort(1)[:, 1:4], 1.0, axis=1)  # the first is the query itself
        logits = -unary
        for _ in range(5):
            shares = np.exp(logits - logits.max(1)[:, None])
            logits = -unary + 0.9 * kernel.dot(shares / shares.sum(1)[:, None])
        return torch.from_numpy(logits)

    compare(on_vectors(LaplacianShot, smoothness=0.9, neighbors=3, updates=5, rectify=rectify), reference)


def test_laplacianshot_of_no_smoothness_is_the_nearest_mean() -> None:
    plain = on_vectors(LaplacianShot, smoothness=0.0, rectify=False)
    close(plain.predict(vectors()), on_vectors(SimpleShot).predict(vectors()))


def tims_loss(
    x: Tensor, y: Tensor, q: Tensor, w: Tensor, tau: float, weights: tuple[float, ...], alpha: float
) -> Tensor:
    of_support = (-tau / 2 * distances(x, w)).log_softmax(1)
    p = (-tau / 2 * distances(q, w)).softmax(1)

    def entropy(shares: Tensor) -> Tensor:
        if alpha == 1:
            return -(shares * shares.log()).sum(-1)
        return (1 - shares.pow(alpha).sum(-1)) / (alpha - 1)

    cross = F.nll_loss(of_support, y)
    return weights[0] * cross - weights[1] * entropy(p.mean(0)) + weights[2] * entropy(p).mean()


@pytest.mark.parametrize("alpha", [1.0, 2.0, 7.0, 0.5])
def test_tim_by_hand(alpha: float) -> None:
    """Against automatic differentiation of the paper's loss."""

    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        w = means(x, y).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=0.05)
        for _ in range(8):
            optimizer.zero_grad()
            tims_loss(x, y, q, w, 4.0, (0.3, 0.9, 0.2), alpha).backward()
            optimizer.step()
        return -2 * distances(q, w.detach())

    settings = {"steps": 8, "learning_rate": 0.05, "temperature": 4.0, "support_weight": 0.3}
    algorithm = on_vectors(TIM, **settings, marginal_weight=0.9, conditional_weight=0.2, alpha=alpha)
    compare(algorithm, reference, 1e-7)


def test_tim_without_weights_of_the_queries_is_inductive() -> None:
    """It then descends the support set's cross-entropy alone."""
    settings = {"steps": 5, "learning_rate": 0.05, "temperature": 4.0, "support_weight": 1.0}
    algorithm = on_vectors(TIM, **settings, marginal_weight=0.0, conditional_weight=0.0)
    assert not algorithm.transductive
    batch = vectors()
    fewer = Episodes(batch.support_x, batch.support_y, batch.query_x[:, :1], batch.query_y[:, :1], WAYS)
    close(algorithm.predict(fewer), algorithm.predict(batch)[:, :1])

    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        w = means(x, y).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(-2 * distances(x, w), y).backward()
            optimizer.step()
        return -2 * distances(q, w.detach())

    compare(algorithm, reference, 1e-7)


def test_alpha_tim_goes_to_tim() -> None:
    settings = {"steps": 20, "learning_rate": 0.01}
    tim, near = on_vectors(TIM, **settings), on_vectors(TIM, **settings, alpha=1 + 1e-7)
    close(near.predict(vectors()), tim.predict(vectors()), 1e-5)
    far = on_vectors(TIM, **settings, alpha=2.0)
    assert (far.predict(vectors()) - tim.predict(vectors())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("sizes", "alpha"), [((1, 1, 1), 2), ((2, 2, 2), 5), ((4, 1, 7), 5), ((5, 5, 5), 7), ((1, 1, 60), 7)]
)
def test_alpha_goes_by_the_shots_as_in_the_official_code(sizes: tuple[int, ...], alpha: float) -> None:
    batch = vectors()
    y = torch.arange(WAYS).repeat_interleave(torch.tensor(sizes)).expand(batch.n_tasks, -1)
    batch = replace(batch, support_x=torch.rand(*y.shape, D, dtype=torch.float64), support_y=y)
    settings = {"steps": 20, "learning_rate": 0.01}
    found, told, other = (
        on_vectors(TIM, **settings, alpha=order).predict(batch) for order in (None, float(alpha), 3.0)
    )
    assert torch.equal(found, told)
    assert (found - other).abs().max() > 1e-6
    assert not on_vectors(TIM, **settings, alpha=None).assumes_balanced_queries


def test_sinkhorn_has_its_marginals_and_each_problem_its_own_end() -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 14, 4, dtype=torch.float64) * torch.tensor([0.1, 1, 2, 4, 8.0])[:, None, None]
    plans = sinkhorn(scores).exp()
    close(plans.sum(1), torch.full((5, 4), 14 / 4, dtype=torch.float64))
    close(plans.sum(2), torch.ones(5, 14, dtype=torch.float64), 2e-6)
    ratios = plans.log() - scores  # of the form r_i + c_j
    close(ratios - ratios[:, :1] - ratios[:, :, :1] + ratios[:, :1, :1], torch.zeros_like(scores), 1e-8)
    for number in range(5):
        assert torch.equal(sinkhorn(scores[number : number + 1]), sinkhorn(scores)[number : number + 1])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, None])
def test_tim_tells_classes_that_no_query_is_near(alpha: float | None) -> None:
    """A class's share of the queries can be too small for a number, and its logarithm is not."""
    torch.manual_seed(0)
    centres = 6 * torch.eye(3, D)
    support, query = centres + 0.1 * torch.randn(3, D), centres[[0, 0, 1, 1, 0]] + 0.1 * torch.randn(5, D)
    for dtype in (torch.float32, torch.float64):
        algorithm = on_vectors(TIM, transform="un", alpha=alpha).to(dtype)
        labels = torch.zeros(1, 5, dtype=torch.long)
        batch = Episodes(support[None].to(dtype), torch.arange(3)[None], query[None].to(dtype), labels, WAYS)
        found = algorithm.predict(batch)
        assert found.isfinite().all()
        assert found.argmax(-1).tolist() == [[0, 0, 1, 1, 0]]


def test_ptmap_of_one_query_at_any_temperature() -> None:
    torch.manual_seed(1)
    support, query = 2 * torch.rand(1, 6, D).double(), 2 * torch.rand(1, 1, D).double()
    labels = torch.tensor([[0, 1, 1, 2, 2, 2]])
    found = on_vectors(PTMAP, regularization=1000.0).predict(
        Episodes(support, labels, query, torch.zeros(1, 1, dtype=torch.long), WAYS)
    )
    close(found.exp(), torch.full((1, 1, WAYS), 1 / WAYS, dtype=torch.float64), 1e-6)


def test_ptmap_by_hand() -> None:
    def transformed(x: Tensor) -> Tensor:
        x = (x + 1e-6) ** 0.5
        x = x / x.norm(dim=1, keepdim=True)
        x = x - x.mean(0)
        return x / x.norm(dim=1, keepdim=True)

    def transported(q: Tensor, centres: Tensor) -> Tensor:
        plan = (-10 * distances(q, centres)).exp()
        for _ in range(3000):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan * (len(q) / WAYS) / plan.sum(0)
        return plan

    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        x, q = transformed(x), transformed(q)
        centres = means(x, y)
        for _ in range(4):
            plan = transported(q, centres)
            for way in range(WAYS):
                total = x[y == way].sum(0) + (plan[:, way, None] * q).sum(0)
                mean = total / ((y == way).sum() + plan[:, way].sum())
                centres[way] += 0.3 * (mean - centres[way])
        return transported(q, centres).log()

    compare(on_vectors(PTMAP, updates=4, rate=0.3), reference, 1e-4)


def test_ptmaps_power_is_of_the_offset_where_a_feature_is_zero() -> None:
    """As where it is not; ReLUs leave many zeros."""
    torch.manual_seed(0)
    x = torch.rand(1, 5, D).double() * (torch.rand(1, 5, D) > 0.5)
    wanted = F.normalize((x + 1e-6) ** 0.1, dim=-1)
    wanted = F.normalize(wanted - wanted.mean(1, keepdim=True), dim=-1)
    close(on_vectors(PTMAP, power=0.1).powered(x), wanted)


def test_ptmap_gives_every_class_equally_many_queries() -> None:
    shares = on_vectors(PTMAP).predict(vectors()).exp()
    close(shares.sum(1), torch.full((4, WAYS), 13 / WAYS, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_transductive_fine_tuning_by_hand(weight: float) -> None:
    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        w = F.normalize(means(x.clamp(min=0), y), dim=1).requires_grad_()  # means of features that have their lengths
        x, q = (F.normalize(each.clamp(min=0), dim=1) for each in (x, q))
        b = torch.zeros(WAYS, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([w, b], lr=0.02)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(x @ w.T + b, y).backward()
            optimizer.step()
            if weight:
                optimizer.zero_grad()
                p = (q @ w.T + b).softmax(1)
                (-weight * (p * p.log()).sum(1).mean()).backward()
                optimizer.step()
        return (q @ w.T + b).detach()

    algorithm = on_vectors(TransductiveFineTuning, epochs=6, learning_rate=0.02, entropy_weight=weight)
    assert algorithm.transductive == (weight > 0)
    compare(algorithm, reference, 1e-7)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_whole_network_is_tuned_for_each_task_by_itself(vectorize: bool) -> None:
    def built(**settings: object) -> Algorithm:
        torch.manual_seed(0)
        backbone = MLP(input_shape=(D,), hidden=[5], init_std=None)
        settings |= {"epochs": 3, "learning_rate": 0.01}
        spec = Spec((D,), "classification", WAYS)
        return TransductiveFineTuning(backbone, spec, whole_network=True, **settings).double().eval()

    algorithm, batch = built(), vectors()
    algorithm.vectorize = vectorize
    before = [value.clone() for value in algorithm.parameters()]
    found = algorithm.predict(batch)
    assert all(map(torch.equal, before, algorithm.parameters()))
    for task in range(batch.n_tasks):
        own = built()
        x, y, q = batch.support_x[task], batch.support_y[task], batch.query_x[task]

        def unit(items: Tensor, own: Algorithm = own) -> Tensor:
            return F.normalize(own.backbone(items), dim=1)

        w = F.normalize(means(own.backbone(x), y), dim=1).detach().requires_grad_()
        b = torch.zeros(WAYS, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([*own.backbone.parameters(), w, b], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(unit(x) @ w.T + b, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            logs = (unit(q) @ w.T + b).log_softmax(1)
            (-(logs.exp() * logs).sum(1).mean()).backward()
            optimizer.step()
        close(found[task], (unit(q) @ w.T + b).detach(), 1e-7)


@pytest.mark.parametrize(
    ("kind", "settings", "balanced"),
    [
        (BDCSPN, {}, True),
        (LaplacianShot, {}, True),
        (LaplacianShot, {"rectify": False}, False),
        (PTMAP, {}, True),
        (SoftKMeans, {}, False),
        (TIM, {}, True),
        (TIM, {"alpha": 2.0}, False),
        (TransductiveFineTuning, {}, False),
    ],
)
def test_a_method_says_whether_it_supposes_balanced_queries(
    kind: type[Algorithm], settings: dict[str, object], balanced: bool
) -> None:
    algorithm = on_vectors(kind, **settings)
    assert algorithm.transductive
    assert algorithm.assumes_balanced_queries == balanced


# Inductive methods


@pytest.mark.parametrize("settings", [{"smoothness": 0.0}, {"updates": 0}])
def test_laplacianshot_without_what_queries_share_is_inductive(settings: dict[str, object]) -> None:
    assert not on_vectors(LaplacianShot, rectify=False, **settings).transductive
    assert on_vectors(LaplacianShot, **settings).transductive


@pytest.mark.parametrize("steps", [0, 4])
def test_tip_adapter_by_hand(steps: int) -> None:
    def logits(x: Tensor, keys: Tensor, y: Tensor, classes: Tensor) -> Tensor:
        values = F.one_hot(y, WAYS).double()
        return 0.7 * (-3.0 * (1 - x @ keys.T)).exp() @ values + 2.0 * x @ classes.T

    def reference(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        keys, classes = x.clone().requires_grad_(), F.normalize(means(x, y), dim=1)
        optimizer = torch.optim.AdamW([keys], lr=0.05, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(logits(x, keys, y, classes), y).backward()
            optimizer.step()
            schedule.step()
        return logits(q, keys, y, classes).detach()

    settings = {"sharpness": 3.0, "cache_weight": 0.7, "prototype_scale": 2.0, "tune_steps": steps, "tune_lr": 0.05}
    algorithm = on_vectors(TipAdapter, **settings)
    assert not algorithm.transductive
    compare(algorithm, reference, 1e-7)


def mapped(kind: type[Algorithm], **settings: object) -> tuple[Algorithm, Episodes]:
    """A method on maps of 4 channels at 2x2 places, and tasks of it."""
    torch.manual_seed(0)
    shape = IMAGES.input_shape
    backbone = Conv4(input_shape=shape, channels=4, norm="none")
    algorithm = kind(backbone, Spec(shape, "classification", WAYS), unpooled=1, **settings).double().eval()
    return algorithm, double(episodes(IMAGES, TaskShape(WAYS, 2, 3), 2))


def maps(algorithm: Algorithm, images: Tensor) -> Tensor:
    """`[images, 4, 4]`: channels, places."""
    *convolutions, last = [block.conv for block in algorithm.backbone.blocks]
    for convolution in convolutions:
        images = F.max_pool2d(convolution(images).relu(), 2)
    return last(images).relu().flatten(2)


@pytest.mark.parametrize("downscale", [False, True])
def test_frn_by_hand(downscale: bool) -> None:
    """The other form of the ridge regression, S^T (S S^T + lambda I)^-1 S, class by class."""
    algorithm, batch = mapped(FRN, downscale=downscale)
    with torch.no_grad():
        for value, new in ((algorithm.log_penalty, 0.4), (algorithm.log_rescaling, -0.2), (algorithm.scale, 1.7)):
            value.fill_(new)
    found = algorithm.predict(batch)
    for task in range(2):
        support, queries = (
            maps(algorithm, x[task]).mT / (2 if downscale else 1) for x in (batch.support_x, batch.query_x)
        )
        for way in range(WAYS):
            s = support[batch.support_y[task] == way].reshape(-1, 4)
            penalty = len(s) / 4 * math.exp(0.4) + 1e-6
            inner = torch.linalg.inv(s @ s.T + penalty * torch.eye(len(s), dtype=torch.float64))
            rebuilt = math.exp(-0.2) * queries @ (s.T @ inner @ s)
            close(found[task, :, way], -1.7 * (rebuilt - queries).square().sum(2).mean(1))


def test_frn_of_a_class_that_spans_all_features_and_no_penalty_rebuilds_every_query() -> None:
    algorithm, _ = mapped(FRN)
    algorithm.log_penalty.data.fill_(-40.0)
    torch.manual_seed(0)
    support, members = torch.randn(2, 4, 4).double(), torch.tensor([[1.0, 0], [0, 1]]).double()
    support[1, :, 3] = 0  # the other class spans three of the four
    queries = torch.randn(3, 4, 4).double()
    close(algorithm.logits(support, members, queries)[:, 0], torch.zeros(3).double(), 1e-4)
    wanted = -queries[:, :, 3].square().mean(1)
    close(algorithm.logits(support, members, queries)[:, 1], wanted, 1e-4)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("places", [2, 12])
def test_frn_of_large_features_is_right_in_single_precision(scale: float, places: int) -> None:
    """A class spans some of the features, or all; in the eigenvectors of S^T S nothing is singular."""
    torch.manual_seed(0)
    support, queries = scale * torch.rand(6, places, 16), scale * torch.rand(4, places, 16)
    members = F.one_hot(torch.arange(6) // 2, WAYS).float()
    algorithm = FRN(Conv4((1, 32, 32), channels=16), Spec((1, 32, 32), "classification", WAYS))
    for rescaling in (0.0, -0.1):
        algorithm.log_rescaling.data.fill_(rescaling)
        found = algorithm.logits(support, members, queries)
        assert found.dtype == torch.float32
        rho, q = math.exp(algorithm.log_rescaling.item()), queries.double()
        for way in range(WAYS):
            squares, vectors = torch.linalg.svd(
                support[members[:, way] > 0].double().flatten(0, 1), full_matrices=True
            )[1:]
            squares = F.pad(squares.square(), (0, 16 - len(squares)))
            penalty = 2 * places / 16 + 1e-6
            left = ((rho - 1) - rho * penalty / (squares + penalty)) * (q @ vectors.mT)
            torch.testing.assert_close(found[:, way].double(), -left.square().sum(2).mean(1), rtol=1e-4, atol=0)


def test_frn_of_features_without_bound_has_no_error() -> None:
    algorithm, _ = mapped(FRN)
    support, members = torch.full((2, 4, 4), 1e9).double(), torch.tensor([[1.0, 0], [0, 1]]).double()
    assert algorithm.logits(support, members, support).isfinite().all()
    support[0, 0, 0] = torch.inf
    assert not algorithm.logits(support, members, support).isfinite().all()


def test_frns_auxiliary_loss_counts_each_pair_of_classes_once() -> None:
    torch.manual_seed(0)
    support, labels = torch.randn(6, 2, 5).double(), torch.tensor([0, 1, 1, 2, 2, 0])
    unit = support / support.norm()  # of the whole support set, as the official code's norm(2) of a tensor is
    wanted = sum(
        (unit[labels == one].reshape(-1, 5) @ unit[labels == other].reshape(-1, 5).T).square().sum()
        for one in range(WAYS)
        for other in range(one)
    )
    close(overlap(support, F.one_hot(labels, WAYS).double()), wanted)
    algorithm, batch = mapped(FRN, auxiliary_weight=0.5)
    plain = F.cross_entropy(algorithm.predict(batch).flatten(0, 1), batch.query_y.flatten())
    overlaps = [
        overlap(maps(algorithm, batch.support_x[task]).mT, F.one_hot(batch.support_y[task], WAYS).double())
        for task in range(2)
    ]
    close(algorithm.loss(batch, 0)[0], plain + 0.5 * torch.stack(overlaps).mean())


def test_frn_compares_no_pairs_of_places_where_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow with the square of the support set."""
    algorithm, batch = mapped(FRN)
    wanted = algorithm.compared(batch, overlap)[0]

    def refuse(*args: object) -> None:
        raise AssertionError("pairs of places")

    monkeypatch.setattr("metarun.algos.frn.overlap", refuse)
    assert torch.equal(algorithm.predict(batch), wanted)
    with pytest.raises(AssertionError, match="pairs of places"):
        algorithm.loss(batch, 0)


def test_deepbdc_matrices_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9).double()
    found = distance_matrices(x, 0.3)
    for image in range(2):
        between = torch.zeros(4, 4).double()
        for k in range(4):
            for other in range(4):
                between[k, other] = math.sqrt(0.3 * (x[image, k] - x[image, other]).square().sum() + 1e-5)
        centring = torch.eye(4).double() - 1 / 4
        matrix = centring @ between @ centring
        close(found[image], torch.cat([matrix[k, k:] for k in range(4)]))
    # Brownian distance covariance of independent channels is that of their distances alone: a shift of all changes nothing.
    close(distance_matrices(x + 3.0, 0.3), found)


@pytest.mark.parametrize("shots", [1, 2])
def test_deepbdc_by_hand(shots: int) -> None:
    algorithm, _ = mapped(DeepBDC)
    assert algorithm.log_scale.item() == pytest.approx(-math.log(2 * 4))
    batch = double(episodes(IMAGES, TaskShape(WAYS, shots, 3), 2))
    found = algorithm.predict(batch)
    for task in range(2):
        s, q = (distance_matrices(maps(algorithm, x[task]), 1 / 8) for x in (batch.support_x, batch.query_x))
        classes = means(s, batch.support_y[task])
        close(found[task], q @ classes.T if shots == 1 else -distances(q, classes))


def test_deepbdc_can_take_channels_down() -> None:
    algorithm, batch = mapped(DeepBDC, reduce_dim=3)
    support, _ = algorithm.embed(batch)
    assert support.shape == (2, 6, 6)
    reduced = torch.einsum("oc,bcp->bop", algorithm.reduction.weight[:, :, 0, 0], maps(algorithm, batch.support_x[0]))
    close(support[0], distance_matrices(reduced.relu(), 1 / 8))


def test_deepbdc_leaves_channels_that_are_as_many_as_asked_for() -> None:
    algorithm, batch = mapped(DeepBDC, reduce_dim=4)
    assert algorithm.reduction is None
    close(algorithm.embed(batch)[0][0], distance_matrices(maps(algorithm, batch.support_x[0]), 1 / 8))


def test_elmes_are_of_equal_length_and_maximally_equiangular() -> None:
    torch.manual_seed(0)
    codes = elmes(5, 12).double()
    wanted = torch.full((5, 5), -1 / 4).double()
    close(codes @ codes.T, wanted.fill_diagonal_(1.0), 1e-6)


def test_caml_reads_sequences_without_order_and_each_query_alone() -> None:
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "width": 16, "label_width": 6, "hidden": 20}
    algorithm = CAML(Pixels((D,)), Spec((D,), "classification", WAYS), **sizes).double().eval()
    batch = vectors()
    found = algorithm.predict(batch)
    assert not algorithm.transductive
    order = torch.randperm(6)
    turned = Episodes(
        batch.support_x[:, order], batch.support_y[:, order], batch.query_x[:, 3:4], batch.query_y[:, 3:4], WAYS
    )
    close(algorithm.predict(turned), found[:, 3:4])


def test_caml_by_hand() -> None:
    """One query of one task, through torch's own attention."""
    torch.manual_seed(0)
    sizes = {"layers": 1, "heads": 2, "width": 16, "label_width": 6, "hidden": 20}
    algorithm = CAML(Pixels((D,)), Spec((D,), "classification", WAYS), **sizes).double().eval()
    with torch.no_grad():
        algorithm.unknown.normal_()
        algorithm.label_scale.fill_(1.3)
    batch, block = vectors(), algorithm.blocks[0]
    known = torch.cat([algorithm.project(batch.support_x[1]), 1.3 * algorithm.codes[batch.support_y[1]]], dim=1)
    asked = torch.cat([algorithm.project(batch.query_x[1, 2]), algorithm.unknown])
    tokens = torch.cat([asked[None], known])[None]
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    attention.in_proj_weight.data, attention.in_proj_bias.data = block.attention.weight.data, block.attention.bias.data
    attention.out_proj.load_state_dict(block.output.state_dict())
    normed = F.layer_norm(tokens, [16], block.norms[0].weight, block.norms[0].bias, 1e-6)
    tokens = tokens + attention(normed, normed, normed)[0]
    tokens = tokens + block.hidden(F.layer_norm(tokens, [16], block.norms[1].weight, block.norms[1].bias, 1e-6))
    last = F.layer_norm(tokens[0, 0], [16], algorithm.norm.weight, algorithm.norm.bias, 1e-6)
    close(algorithm.predict(batch)[1, 2], algorithm.head.weight @ last)


def test_a_frozen_backbone_of_caml_learns_nothing() -> None:
    spec = Spec((D,), "classification", WAYS)
    algorithm = CAML(MLP(input_shape=(D,), hidden=[5], norm="running"), spec, frozen=True).train()
    assert not algorithm.backbone.training
    algorithm.loss(Episodes(*(x.float() if x.is_floating_point() else x for x in vectors().tensors), WAYS), 0)[
        0
    ].backward()
    assert all(value.grad is None for value in algorithm.backbone.parameters())
    assert algorithm.project.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30}, r"^algo\.width=30: must be a multiple of algo\.heads=4"),
        ({"label_width": 2}, r"^algo\.label_width=2: must be at least the 3 ways, and below algo\.width=256"),
    ],
)
def test_sizes_that_do_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        on_vectors(CAML, **settings)


# Queries of unequal classes

TASK = TaskShape(5, 2, 4, query_dirichlet=2.0)


def test_dirichlet_queries_are_a_function_of_the_seed_and_the_number_alone() -> None:
    source = toy_images(per_class=40)
    whole = episodes(source, TASK, 6, "test")
    assert whole.query_x.shape == (6, 20, 1, 16, 16)
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        part = episodes(source, TASK, stop - start, "test", start)
        for one, other in zip(part.tensors, whole.tensors, strict=True):
            assert torch.equal(one, other[start:stop])
    again = source.sampler("test", TASK, 1, torch.device("cpu"))(0, 6)
    assert not torch.equal(again.query_y, whole.query_y)


def test_dirichlet_queries_are_of_the_classes_of_the_support_set_and_none_is_in_both() -> None:
    """Of images whose values say which they are, some of them turned."""
    images = np.arange(6 * 30, dtype=np.uint8).reshape(180, 1, 1, 1) + np.zeros((1, 1, 2, 2), np.uint8)
    source = ImageSource(
        table(images, [30] * 6), {"train": range(6), "val": range(6), "test": range(6)}, rotations=True
    )
    found = episodes(source, TASK, 30, "test")
    support, queries = ((255 * x[:, :, 0, 0, 0]).round().long() for x in (found.support_x, found.query_x))
    for task in range(30):
        rows = [*support[task].tolist(), *queries[task].tolist()]
        labels = [*found.support_y[task].tolist(), *found.query_y[task].tolist()]
        assert len({*zip(rows, labels, strict=True)}) == 30  # a class turned is another class of the same images
        for way in range(5):
            assert len({row // 30 for row, label in zip(rows, labels, strict=True) if label == way}) == 1


def test_shares_have_dirichlets_moments() -> None:
    draws = np.random.default_rng(0).random((40_000, 5))
    for concentration in (0.5, 2.0):
        shares = dirichlet(draws, concentration)
        assert shares.sum(1) == pytest.approx(1)
        assert shares.mean(0) == pytest.approx(np.full(5, 0.2), abs=0.005)
        variance = 0.2 * 0.8 / (5 * concentration + 1)
        assert shares.var(0) == pytest.approx(np.full(5, variance), rel=0.05)


def test_counts_add_up_and_keep_to_what_classes_have() -> None:
    shares = dirichlet(np.random.default_rng(0).random((500, 5)), 0.3)
    free = divided(shares, 75, 75)
    assert (free.sum(1) == 75).all()
    assert np.abs(free - 75 * shares).max() < 1
    capped = divided(shares, 75, 18)
    assert (capped.sum(1) == 75).all()
    assert capped.max() == 18
    assert divided(np.array([[0.9, 0.05, 0.05]]), 10, 4).tolist() == [[4, 3, 3]]
    assert divided(np.array([[0.9, 0.1, 1e-12]]), 12, 4).tolist() == [[4, 4, 4]]


def test_it_is_said_how_often_classes_are_cut_short() -> None:
    """Where it happens in more than one of a thousand classes; the probability is that of the shares that are drawn."""
    task = TaskShape(5, 1, 15, query_dirichlet=2.0)
    shares = dirichlet(np.random.default_rng(0).random((40_000, 5)), 2.0)
    assert cut_short(task, 19) == pytest.approx((75 * shares > 19).mean(), abs=0.005)
    assert toy_images(per_class=20).describe_tasks("test", task)["queries_at_most"] == 19
    assert toy_images(per_class=70).describe_tasks("test", task) == task.describe()


def test_tasks_that_divide_their_queries_say_so_however_many_they_are() -> None:
    draw = toy_images(per_class=40).sampler("test", TASK, 0, torch.device("cpu"))
    one, several = draw(0, 1), draw(0, 6)
    assert isinstance(one, Episodes)
    assert isinstance(several, Episodes)
    assert one.divided
    assert several.divided
    assert one.query_sizes == torch.bincount(one.query_y[0], minlength=5).tolist()
    with pytest.raises(ValueError, match="no sizes in common"):
        several.query_sizes  # noqa: B018
    assert isinstance(together([one, several]), Episodes)


def test_no_image_of_a_class_is_counted_where_classes_have_unequally_many(tmp_path: Path) -> None:
    """`acc_by_instance` of MANN, in chunks of several tasks and in a last one of a single task."""
    words = ["algo=mann", "data=glyphs", "backbone=pixels", "task.queries=3", "train.steps=0", "test.episodes=3"]
    words += ["test.baseline_episodes=0", "train.validate_episodes=2", "hardware.task_chunk=2"]
    for value, there in (("1", False), ("null", True)):
        done(*words, f"test.task.query_dirichlet={value}", f"outputs={tmp_path / value}")
        assert ("acc_by_instance" in result(run_folder(tmp_path / value)).get("test/curves", {})) == there


def test_a_run_says_how_queries_were_divided(tmp_path: Path) -> None:
    words = [
        "algo=tim",
        "data=glyphs",
        "backbone=pixels",
        "train.steps=0",
        "test.episodes=4",
        "test.baseline_episodes=0",
    ]
    words += ["train.validate_episodes=2", "test.task.query_dirichlet=2", f"outputs={tmp_path}"]
    done = metarun(*words)
    assert done.status == 0, done.err
    found = json.loads(next(tmp_path.rglob("result.json")).read_text(encoding="utf-8"))
    assert found["protocol"]["test"]["query_dirichlet"] == 2
    assert found["protocol"]["test"]["queries_at_most"] == 19
    told = r"test\.task\.query_dirichlet=2: the smallest class has 19 images beside its shots; the 29\.2% of shares that are larger are cut"
    assert re.search(told, " ".join((done.out + done.err).split()))
    assert found["protocol"]["transductive"]
    assert found["protocol"]["assumes_balanced_queries"]
    shown = " ".join(done.out.split())
    assert "15 queries a class, divided by Dirichlet(2) shares of at most 19" in shown
    assert "transductive, supposes balanced queries" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test.task.query_dirichlet=0"], "test.task.query_dirichlet=0: must be above 0"),
        (["test.task.query_dirichlet=2", "task.shots=[1,3]"], "divides the queries of tasks of one shape"),
        (
            ["test.task.query_dirichlet=2", "task.shots=5", "task.queries=15"],
            "leaves no shares to draw: the smallest class",
        ),
        (["test.task.query_dirichlet=2", "data=sinusoid", "algo=maml", "backbone=mlp", "task.ways=1"], "is of classes"),
    ],
)
def test_divisions_that_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    plain = ["algo=protonet", "data=glyphs", "backbone=pixels", "train.steps=0"]
    done = metarun(*plain, *words, f"outputs={tmp_path}")
    assert done.status == 2
    assert message in done.err
    assert not list(tmp_path.iterdir())


# On vectors as they are


@pytest.mark.parametrize("kind", [*TRANSDUCTIVE, SimpleShot, TipAdapter, ProtoNet])
def test_nothing_is_computed_task_by_task_on_vectors(kind: type[Algorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = on_vectors(kind)

    def refuse(*args: object) -> None:
        raise AssertionError("a task by itself")

    monkeypatch.setattr(algorithm, "over_tasks", refuse)
    assert algorithm.predict(vectors()).shape == (4, 13, WAYS)
