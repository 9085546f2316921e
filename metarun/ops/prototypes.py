"""Class means and distances to them, as the methods that compare queries with classes use them."""

from __future__ import annotations

from torch import Tensor

from metarun.ops.numerics import one_hot


def class_sums(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Sums of the features of each class, `[..., N, D]`, which point where the class means do.

    Args:
        features: Features of labelled items, `[..., M, D]`.
        labels: Their classes in `[0, ways)`, int64 `[..., M]`, in any order and number a class, or probabilities
            `[..., M, N]`.
        ways: The number of classes N.
    """
    return one_hot(labels, ways, features.dtype).mT @ features


def class_means(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Means of the features of each class, `[..., N, D]`: the prototypes.

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


def soft_kmeans(support: Tensor, targets: Tensor, unlabelled: Tensor, steps: int) -> Tensor:
    """Class means that unlabelled items refine, each as far as it belongs to a class.

    A step gives each unlabelled item to the classes by the softmax of minus its squared distances to their means, and takes
    the means of all items anew, of which the labelled ones keep their classes. With no steps these are `class_means`.

    Args:
        support: Features of labelled items, `[..., S, D]`.
        targets: Their classes as probabilities, `[..., S, N]`.
        unlabelled: Features of unlabelled items, `[..., U, D]`.
        steps: The number of steps, at least 0.

    Returns:
        The refined means, `[..., N, D]`.

    Source:
        Ren et al. (2018), prototypical networks with soft k-means.
    """
    means = class_means(support, targets, targets.shape[-1])
    for _ in range(steps):
        shares = negative_squared_distances(unlabelled, means).softmax(-1)
        totals = targets.sum(-2) + shares.sum(-2)
        means = (targets.mT @ support + shares.mT @ unlabelled) / totals[..., None]
    return means


def negative_squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Minus the squared Euclidean distances of points to centres, `[..., M, N]`.

    Its large terms nearly cancel, so autocast must be off around it (`metarun.ops.numerics.full_precision`).

    Args:
        points: Features `[..., M, D]`.
        centres: Class means, say, `[..., N, D]`.
    """
    return 2 * points @ centres.mT - centres.square().sum(-1)[..., None, :] - points.square().sum(-1, keepdim=True)
