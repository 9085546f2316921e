"""Class means and distances to them, as the methods that compare queries with classes use them."""

from __future__ import annotations

from torch import Tensor

from metarun.ops.numerics import one_hot, squared_lengths


def class_sums(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Adds up the features of each class, `[..., N, D]`; the sums point where the class means do.

    Args:
        features: Features of labelled items, `[..., M, D]`.
        labels: Their classes in `[0, ways)`, int64 `[..., M]`, in any order and number a class, or probabilities
            `[..., M, N]`.
        ways: The number of classes N.
    """
    return one_hot(labels, ways, features.dtype).mT @ features


def class_means(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Averages the features of each class, `[..., N, D]`: the prototypes.

    Args:
        features: Features of labelled items, `[..., M, D]`.
        labels: Their classes in `[0, ways)`, int64 `[..., M]`, in any order and number a class, or probabilities
            `[..., M, N]`.
        ways: The number of classes N.

    Source:
        Snell, Swersky, Zemel (2017), equation 1.
    """
    members = one_hot(labels, ways, features.dtype)
    return members.mT @ features / members.sum(-2)[..., None]


def nearness(support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
    """Computes minus the squared distance of each query to the nearest class mean, `[..., M]` float64 on the CPU.

    Args:
        support: Features of labelled items, `[..., S, D]`.
        labels: Their classes in `[0, ways)`, int64 `[..., S]`.
        queries: Features `[..., M, D]`.
        ways: The number of classes.
    """
    # On the CPU, since Apple's GPU has no double precision.
    means = class_means(support.cpu().double(), labels.cpu(), ways)
    return negative_squared_distances(queries.cpu().double(), means).max(-1).values


def negative_squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Computes minus the squared Euclidean distances of points to centres, `[..., M, N]`.

    Its large terms nearly cancel, so autocast must be off around it (`metarun.ops.numerics.full_precision`).

    Args:
        points: Features `[..., M, D]`.
        centres: Class means, say, `[..., N, D]`.
    """
    return points @ (2 * centres).mT - squared_lengths(centres).mT - squared_lengths(points)
