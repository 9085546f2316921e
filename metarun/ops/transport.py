"""Optimal transport with an entropy term, for many small problems at once."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 1000  # at most
TOLERANCE = 1e-6  # of the rows' sums


def sinkhorn(scores: Tensor) -> Tensor:
    """The matrix r_i exp(scores_ij) c_j whose rows add up to 1 and whose columns are all alike, by turns of rows and columns.

    Each problem ends by itself: what it comes to depends on no other of the batch.

    Args:
        scores: `[..., Q, N]`, minus the costs over the temperature; in double precision, if they vary widely.

    Returns:
        Its logarithms, `[..., Q, N]`; the columns add up to Q / N exactly, the rows to 1 within 1e-6, unless 1000 rounds were too few.

    Source:
        Cuturi (2013), algorithm 1.
    """
    each = scores.shape[-2] / scores.shape[-1]
    plan = (scores - scores.amax(-1, keepdim=True)).exp()  # the rows' factors are free
    going = torch.ones_like(plan[..., :1, :1], dtype=torch.bool)
    for _ in range(ROUNDS):
        balanced = plan / plan.sum(-1, keepdim=True)
        plan = torch.where(going, balanced * (each / balanced.sum(-2, keepdim=True)), plan)
        going = (plan.sum(-1, keepdim=True) - 1).abs().amax(-2, keepdim=True) > TOLERANCE
        if not going.any():
            break
    return plan.log()
