"""Optimal transport with an entropy term, for many small problems at once."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 1000  # at most
CHECKED = 10  # the sums are looked at once in so many rounds, since looking costs a round
TOLERANCE = 1e-6  # rows whose sums are within this of 1 are balanced


def sinkhorn(scores: Tensor) -> Tensor:
    """Scales exp(scores_ij) to r_i exp(scores_ij) c_j, rows and columns by turns, so that rows add up to 1 and all columns alike.

    Each problem ends by itself: what it comes to depends on no other of the batch.

    Args:
        scores: `[..., Q, N]`, minus the costs over the temperature; in double precision, if they vary widely.

    Returns:
        Its logarithms, `[..., Q, N]`; the columns add up to Q / N exactly, the rows to 1 within 1e-6, unless 1000 rounds were too few.

    Source:
        Cuturi (2013), algorithm 1.
    """
    kernel = (scores - scores.amax(-1, keepdim=True)).exp()  # the rows' factors are free
    kernel = kernel.clamp_min(torch.finfo(kernel.dtype).tiny)  # a column of zeros could not be filled
    transposed, each = kernel.mT.contiguous(), scores.shape[-2] / scores.shape[-1]
    columns = torch.ones_like(transposed[..., :1])
    going = torch.ones_like(columns[..., :1, :], dtype=torch.bool)
    for number in range(ROUNDS):
        rows = 1 / (kernel @ columns)
        balanced = each / (transposed @ rows)
        if number % CHECKED == 0:
            off = (rows * (kernel @ balanced) - 1).abs().amax(-2, keepdim=True)
            going = going & (off > TOLERANCE)
            if not going.any():
                break
        columns = torch.where(going, balanced, columns)
    rows = 1 / (kernel @ columns)
    return (kernel * rows * (each / (transposed @ rows)).mT).log()
