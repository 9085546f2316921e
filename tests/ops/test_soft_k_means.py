"""Soft k-means of labelled and unlabelled points: against sums one by one, and its limits."""

from __future__ import annotations

import math

import torch

from metarun.ops.prototypes import class_means
from metarun.ops.soft_k_means import soft_assignment, soft_k_means


def drawn(points: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    support, others = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (6, points))
    return support, torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 2]]), others


def test_a_step_is_a_mean_weighted_by_shares() -> None:
    support, labels, points = drawn()
    means = class_means(support, labels, 3)
    found = soft_k_means(support, labels, points, means, steps=2)
    for task in range(2):
        centres = means[task].tolist()
        for _ in range(2):
            sums = [[0.0] * 3 for _ in range(3)]
            sizes = [0.0] * 3
            for x, label in zip(support[task].tolist(), labels[task].tolist(), strict=True):
                sums[label] = [a + b for a, b in zip(sums[label], x, strict=True)]
                sizes[label] += 1
            for x in points[task].tolist():
                scores = [math.exp(-sum((a - b) ** 2 for a, b in zip(x, c, strict=True))) for c in centres]
                for label, score in enumerate(scores):
                    share = score / sum(scores)
                    sums[label] = [a + share * b for a, b in zip(sums[label], x, strict=True)]
                    sizes[label] += share
            centres = [[a / size for a in one] for one, size in zip(sums, sizes, strict=True)]
        torch.testing.assert_close(found[task], torch.tensor(centres, dtype=torch.float64), atol=1e-12, rtol=0)


def test_shares_of_the_plain_way_are_constants_to_the_gradient() -> None:
    """By hand: a point moves its prototypes by its shares of the last step alone, and the prototypes before are no part of it."""
    support, labels, points = drawn()
    means = class_means(support, labels, 3)
    weights = torch.randn(means.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps in (1, 2):
        shares = soft_assignment(points, soft_k_means(support, labels, points, means, steps=steps - 1))
        members = torch.nn.functional.one_hot(labels, 3).double()
        pulls = weights / (members.sum(1) + shares.sum(1))[..., None]
        given = [value.clone().requires_grad_() for value in (support, points, means)]
        found = (soft_k_means(given[0], labels, given[1], given[2], steps=steps) * weights).sum()
        of_support, of_points, of_means = torch.autograd.grad(found, given, allow_unused=True)
        torch.testing.assert_close(of_support, members @ pulls, atol=1e-12, rtol=0)
        torch.testing.assert_close(of_points, shares @ pulls, atol=1e-12, rtol=0)
        assert of_means is None or not of_means.any()


def test_shares_of_another_way_have_a_gradient() -> None:
    support, labels, points = drawn()

    def moved(support: torch.Tensor, points: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        return soft_k_means(
            support, labels, points, means, steps=2, assign=lambda at, step: soft_assignment(points, at, 2)
        )

    given = [value.requires_grad_() for value in (support, points, class_means(support, labels, 3).detach())]
    assert torch.autograd.gradcheck(moved, given)


def test_without_points_or_steps_the_prototypes_stay() -> None:
    support, labels, points = drawn(0)
    means = class_means(support, labels, 3)
    torch.testing.assert_close(soft_k_means(support, labels, points, means, steps=3), means, atol=1e-12, rtol=0)
    assert soft_k_means(support, labels, drawn()[2], means, steps=0) is means


def test_a_cold_assignment_is_that_of_k_means() -> None:
    support, labels, points = drawn()
    means = class_means(support, labels, 3)
    nearest = torch.cdist(points, means).argmin(-1)
    shares = soft_assignment(points, means, 1e-6)
    torch.testing.assert_close(shares, torch.nn.functional.one_hot(nearest, 3).double(), atol=1e-9, rtol=0)
    moved = soft_k_means(support, labels, points, means, assign=lambda at, step: soft_assignment(points, at, 1e-6))
    whole = class_means(torch.cat([support, points], 1), torch.cat([labels, nearest], 1), 3)
    torch.testing.assert_close(moved, whole, atol=1e-9, rtol=0)


def test_a_cluster_without_members_stays_and_has_a_gradient() -> None:
    support, labels, points = drawn()
    points.requires_grad_()
    means = torch.cat([class_means(support, labels, 3), torch.full((2, 1, 3), 50.0, dtype=torch.float64)], 1)
    empty = soft_k_means(support, labels, points, means, assign=lambda at, step: 0 * soft_assignment(points, at))
    torch.testing.assert_close(empty[:, 3], means[:, 3], atol=0, rtol=0)
    empty.sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()
