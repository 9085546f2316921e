"""Linear classifiers fitted exactly, many at once, as differentiable functions of their examples.

A problem is S examples x, `[..., S, D]`, and their targets, `[..., S, N]`. Its solution are the coefficients of the examples
in the weights, `[..., S, N]`: W = x^T coefficients, and the scores of other points X are (X x^T) coefficients. The systems
are of size S, for many features D; they are made and solved in double precision, in which no kernel x x^T is indefinite.
Logistic regression alone has no such coefficients, for its bias, and scores the other points itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ITERATIONS = 200  # at most; about ten are usual
TOLERANCE = 1e-13  # by which the mean complementarity falls from its start
JITTER = 1e-9  # of a kernel's mean diagonal, added to it in Newton steps: one of few features is singular
LOGISTIC_ITERATIONS = 20_000  # at most; some dozens are usual, some thousands at the weakest penalty
LOGISTIC_TOLERANCE = 1e-12  # of the largest score


def ridge(examples: Tensor, targets: Tensor, penalty: float | Tensor) -> Tensor:
    """Coefficients of min_W |x W - targets|^2 + penalty |W|^2: (x x^T + penalty I)^-1 targets.

    Args:
        examples: The examples x, `[..., S, D]`.
        targets: Their targets, `[..., S, N]`.
        penalty: The weight of the squared weights, above 0.

    Returns:
        The coefficients, `[..., S, N]`, of the type of `examples`.

    Source:
        Bertinetto, Henriques, Torr, Vedaldi (2019), equation 4 (the Woodbury form).
    """
    coefficients: Tensor = torch.linalg.solve(_kernel(examples, penalty), targets.double())
    return coefficients.to(examples.dtype)


def support_vectors(examples: Tensor, targets: Tensor, cost: float, diagonal: float = 0.0) -> Tensor:
    """Coefficients of the multi-class support vector machine.

    min_W 1/2 |W|^2 + cost * sum_i (max_k (w_k.x_i + [k != y_i]) - w_(y_i).x_i). The coefficients of its dual are
    cost * (targets - p), with p_i a point of the probability simplex for each example i.

    Args:
        examples: The examples x, `[..., S, D]`.
        targets: Their classes, one-hot, `[..., S, N]`.
        cost: The weight of the margins that are not kept, above 0.
        diagonal: The number that is added to the diagonal of the kernel x x^T, at least 0.

    Returns:
        The coefficients, `[..., S, N]`, of the type of `examples`.

    Source:
        Crammer and Singer (2001); Lee, Maji, Ravichandran, Soatto (2019), section 3.2.
    """
    targets = targets.double()
    simplex: Callable[[Tensor, Tensor], Tensor] = _Simplex.apply
    return (cost * (targets - simplex(cost * _kernel(examples, diagonal), targets))).to(examples.dtype)


def logistic(examples: Tensor, targets: Tensor, points: Tensor, cost: float) -> Tensor:
    """Scores of other points by multinomial logistic regression with a bias that is not penalised.

    The Hessian of the cross-entropy is at most half the identity (Böhning 1992). So with the scores z at hand, and p their
    probabilities, the regression is bounded by the ridge regression towards z + 2 (y - p) with penalty 2 / C, whose
    matrix is the same each time; the solution is where that stays. Steps towards it are extrapolated.

    Args:
        examples: The examples x, `[T, S, D]`.
        targets: Their targets y, one-hot, `[T, S, N]`.
        points: The points that are scored, `[T, Q, D]`.
        cost: C, the inverse penalty.

    Returns:
        The scores, whose softmax are probabilities, float64 `[T, Q, N]`.

    Source:
        Böhning (1992), Multinomial logistic regression algorithm; O'Donoghue and Candès (2015) for the extrapolation.
    """
    examples, points, y = examples.double(), points.double(), targets.double()
    mean = examples.mean(1, keepdim=True)
    x, asked = examples - mean, points - mean
    kernel = x @ x.mT + 2 / cost * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(kernel).L)
    share = torch.full_like(inverse, 1 / x.shape[1])  # what an unpenalised bias adds
    fitted, wanted = x @ x.mT @ inverse, asked @ x.mT @ inverse
    # Sums over classes stay zero, and the rows of x are centred: nothing but the mean is left to the bias.
    centre = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) - share
    fitted = fitted @ centre + share
    wanted = wanted @ centre + share[:, :1]
    z = ahead = torch.zeros_like(y)
    pace = torch.ones_like(y[..., :1, :1])
    for _ in range(LOGISTIC_ITERATIONS):
        goal = ahead + 2 * (y - ahead.softmax(-1))
        new = fitted @ goal
        if (new - ahead).abs().max() < LOGISTIC_TOLERANCE * new.abs().max().clamp(min=1):
            break
        # Nesterov's extrapolation, which each task starts anew where it leads uphill.
        uphill = ((ahead - new) * (new - z)).sum((-2, -1), keepdim=True) > 0
        pace = pace.masked_fill(uphill, 1.0)
        faster = (1 + (1 + 4 * pace**2).sqrt()) / 2
        ahead = new + ((pace - 1) / faster).masked_fill(uphill, 0.0) * (new - z)
        z, pace = new, faster.masked_fill(uphill, 1.0)
    return wanted @ goal


def _kernel(examples: Tensor, diagonal: float | Tensor) -> Tensor:
    x = examples.double()
    return x @ x.mT + diagonal * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)


class _Simplex(torch.autograd.Function):
    """argmin_p 1/2 tr(q^T Q q) - tr(y^T q) with q = y - p, rows of p in the probability simplex.

    The derivative, for a Q that stays symmetric, is that of the conditions of optimality at the solution: with z the
    multipliers of p >= 0, Q dp + (z / p) dp + dnu 1^T = dQ q and dp 1 = 0, the system of a Newton step.
    """

    @staticmethod
    def forward(ctx: Any, quadratic: Tensor, targets: Tensor) -> Tensor:
        p, z = _interior_point(quadratic, targets)
        ctx.save_for_backward(quadratic, targets, p, z)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        quadratic, targets, p, z = ctx.saved_tensors
        dp, _ = _Newton(quadratic, z / p).step(gradient, torch.zeros_like(p[..., :1]))
        return dp @ (targets - p).mT, None


class _Newton:
    """Solves Q dp + ratio * dp + dnu 1^T = right, dp 1 = sums, by one S x S matrix for each of the N columns."""

    def __init__(self, quadratic: Tensor, ratio: Tensor) -> None:
        jitter = JITTER * quadratic.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        blocks = quadratic[..., None, :, :] + torch.diag_embed(ratio.mT + jitter)
        # What is not finite shall come out, and end the training, instead of an error here.
        self.inverses = torch.cholesky_inverse(torch.linalg.cholesky_ex(blocks).L)
        self.schur = torch.linalg.cholesky_ex(self.inverses.sum(-3)).L

    def step(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """dp `[..., S, N]` and dnu `[..., S, 1]`."""
        free = (self.inverses @ right.mT[..., None])[..., 0].mT
        dnu = torch.cholesky_solve(free.sum(-1, keepdim=True) - sums, self.schur)
        return free - (self.inverses @ dnu[..., None, :, :])[..., 0].mT, dnu


def _length(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """How far along the steps of these (positive values, step) all of a problem's values stay positive, at most 1."""
    shrinking = torch.stack([(-step / value).amax((-2, -1), keepdim=True) for value, step in pairs])
    return 1 / shrinking.amax(0).clamp(min=1)


def _interior_point(quadratic: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mehrotra's predictor-corrector method (1992), each problem with steps of its own; p and the multipliers z of p >= 0."""
    # From the best point between the targets, where all weights are zero, and the centres of the simplices: so the scores
    # are of the size of the margins, whatever the kernel's, and so are the multipliers of p on the central path.
    inwards = 1 / targets.shape[-1] - targets
    curve = (inwards * (quadratic @ inwards)).sum((-2, -1), keepdim=True)
    share = (-(targets * inwards).sum((-2, -1), keepdim=True) / curve).clamp(max=0.9)
    p = targets + share * inwards
    mean = start = share / targets.shape[-1]
    z, nu = mean / p, torch.zeros_like(p[..., :1])
    for _ in range(ITERATIONS):
        going = mean > TOLERANCE * start
        if not going.any():
            break
        newton = _Newton(quadratic, z / p)
        unmet = quadratic @ (targets - p) - targets + z - nu
        sums = 1 - p.sum(-1, keepdim=True)
        dp, _ = newton.step(unmet - z, sums)
        dz = -z - z * dp / p
        length = _length((p, dp), (z, dz))
        reached = ((p + length * dp) * (z + length * dz)).mean((-2, -1), keepdim=True)
        excess = p * z + dp * dz - (reached / mean) ** 3 * mean
        dp, dnu = newton.step(unmet - excess / p, sums)
        dz = -(excess + z * dp) / p
        length = torch.where(going, 0.99 * _length((p, dp), (z, dz)), 0)
        p, z, nu = p + length * dp, z + length * dz, nu + length * dnu
        mean = (p * z).mean((-2, -1), keepdim=True)
    return p, z
