"""Soft k-means around class means: prototypes that points without labels help to place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metarun.ops.numerics import one_hot
from metarun.ops.prototypes import negative_squared_distances


def soft_assignment(points: Tensor, prototypes: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Computes the share of each point in each cluster, `[..., M, N]`: the softmax of minus the squared distances.

    Args:
        points: Features of points, `[..., M, D]`.
        prototypes: The centres of the clusters, `[..., N, D]`.
        temperature: What the distances are divided by, above 0; the smaller, the harder is the assignment.

    Source:
        Ren et al. (2018), equation 3.
    """
    return (negative_squared_distances(points, prototypes) / temperature).softmax(-1)


def soft_k_means(
    support: Tensor,
    labels: Tensor,
    points: Tensor,
    prototypes: Tensor,
    *,
    steps: int = 1,
    assign: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Moves prototypes by steps of soft k-means, in which labelled items keep their classes.

        p_c <- (sum_i h_i z_ic + sum_j h_j z_jc) / (sum_i z_ic + sum_j z_jc)

    with i over the labelled items, whose z are their labels, and j over the points, whose z are their shares in the clusters
    of the step before. A cluster of no member stays where it was.

    Args:
        support: Features of labelled items, `[..., S, D]`.
        labels: Their classes in `[0, N)`, int64 `[..., S]`, or probabilities `[..., S, N]`.
        points: Features of items without labels, `[..., M, D]`: unlabelled ones, or the queries themselves, which makes a
            transductive method. M may be 0.
        prototypes: Where the clusters start, `[..., N, D]`: the class means, and further centres beside them.
        steps: How many steps are taken, at least 0.
        assign: A function of the prototypes and the number of the step that yields the shares of the points, `[..., M, N]`,
            which need not add up to 1; None is `soft_assignment`, whose shares are constants to the gradient.

    Returns:
        The prototypes, `[..., N, D]`.

    Source:
        Ren et al. (2018), equation 3; official code renmengye/few-shot-ssl-public, `kmeans_utils.py`, and `kmeans_refine_model.py`,
        which stops the gradient of the shares, unlike the models with a radius or a mask.
    """
    members = one_hot(labels, prototypes.shape[-2], support.dtype)
    for step in range(steps):
        shares = soft_assignment(points, prototypes).detach() if assign is None else assign(prototypes, step)
        sums = members.mT @ support + shares.mT @ points
        sizes = (members.sum(-2) + shares.sum(-2))[..., None]
        moved = sums / torch.where(sizes > 0, sizes, 1)
        prototypes = torch.where(sizes > 0, moved, prototypes)
    return prototypes
