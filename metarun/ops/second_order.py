"""Batch normalisation whose second derivative costs about what its first does.

Torch's own passes a dozen times over memory. Here it is the first derivative once more and three sums a channel. Values are
torch's up to float order. Not for use under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises as `F.batch_norm` does with the statistics of `x` itself; the result can be differentiated twice.

    Args:
        x: Activations `[B, C]` or `[B, C, H, W]`.
        weight: The scale of each channel, `[C]`.
        bias: The shift of each channel, `[C]`.
        epsilon: The number that is added to the variance, above 0.

    Returns:
        The normalised activations, of the shape of `x`, and the mean and the biased variance of each channel, `[C]` each, as
        constants.
    """
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _BatchNorm.apply
    return apply(x, weight, bias, epsilon)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the mean and the biased variance of each channel of images whose channels are side by side in memory.

    On a CPU torch's batch norm adds all B*H*W values of a channel in single precision, one after the other, which leaves
    three digits of a large batch. Here each column of pixels has statistics of its own first, in the same time.

    Args:
        x: Activations `[B, C, H, W]` on a CPU, in torch's memory format `channels_last`.

    Returns:
        Both, `[C]` each, in float32 where `x` is in bfloat16.
    """
    count, channels, height, width = x.shape
    if x.dtype != torch.float32:
        if x.dtype == torch.float64:
            variance, mean = torch.var_mean(x, [0, 2, 3], correction=0)
            return mean, variance
        zeros = torch.zeros(channels)  # float32 averages, of which nothing is taken, say which type the result has
        mean, variance = torch.batch_norm_update_stats(x, zeros, torch.ones_like(zeros), 0.0)
        return mean, variance
    mean, variance = torch.batch_norm_update_stats(
        x.movedim(1, -1).reshape(count * height, width * channels), None, None, 0.0
    )
    mean, variance = mean.view(width, channels), variance.view(width, channels)
    return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if x.device.type == "cpu" and x.dtype == torch.float32 and channels_last:
            mean, variance = statistics(x)
            inverse = torch.rsqrt(variance + epsilon)
            y = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, epsilon)[0]
        else:
            y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, epsilon)
            variance = inverse.pow(-2) - epsilon
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        ctx.epsilon = epsilon
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        apply: Callable[..., tuple[Tensor, ...]] = _BatchNormGradient.apply
        return *apply(gradients[0], *ctx.saved_tensors, ctx.epsilon), None


class _BatchNormGradient(torch.autograd.Function):
    """The first derivative of batch normalisation, which can be differentiated once more.

    With n = (x - mean) s, s the inverse standard deviation, M values a channel, and means over a channel in bars:

    dx = w s (g - bar(g) - n bar(g n)),   dw = sum g n,   db = sum g.
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, epsilon: float
    ) -> tuple[Tensor, ...]:
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse, True, epsilon, [True, True, True]
        )
        ctx.save_for_backward(gradient, x, weight, mean, inverse, by_weight, by_bias)
        ctx.epsilon = epsilon
        return by_x, by_weight, by_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The second derivative.

        For a, b, q the channel means of h n, h and h g, where h is the gradient of dx, u that of dw and v that of db:

        by g: w s (h - b - n a) + u n + v,
        by x: -w s^2 (c h + a g + n (q - b bar(g) - 3 a c) - b c - a bar(g)) + u s (g - bar(g) - n c),  c = bar(g n),
        by w: M s (q - b bar(g) - a c).
        """
        g, x, weight, mean, s, by_weight, by_bias = ctx.saved_tensors
        h, u, v = gradients
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1]
        by_g, a, b = torch.ops.aten.native_batch_norm_backward(
            h, x, weight, None, None, mean, s, True, ctx.epsilon, [True, True, True]
        )
        a, b, c, g_bar = a / count, b / count, by_weight / count, by_bias / count
        product = (h * g).sum([0, *range(2, x.ndim)], dtype=a.dtype) / count
        by_w = count * s * (product - b * g_bar - a * c)

        def channels(value: Tensor) -> Tensor:
            return value.view(shape).to(x.dtype)

        by_g = torch.addcmul(by_g, x, channels(u * s)).add_(channels(v - u * s * mean))
        k = -weight * s.square()
        of_n = k * (product - b * g_bar - 3 * a * c) - u * s * c
        rest = -k * (b * c + a * g_bar) - u * s * g_bar
        by_x = torch.addcmul(channels(rest - of_n * s * mean), x, channels(of_n * s))
        by_x.addcmul_(h, channels(k * c)).addcmul_(g, channels(k * a + u * s))
        return by_g, by_x, by_w.to(weight.dtype), None, None, None
