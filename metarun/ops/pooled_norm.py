"""Batch normalisation with the 2x2 max-pool behind it as one operation, for large batches on a CPU.

Either alone writes and reads again all values of the convolution before them, which costs more than their arithmetic. Here what is
pooled is the convolution's own output, since a norm keeps the order of a channel's values, or turns it round where its scale is
negative; only the quarter that remains is normalised. The derivatives add up over that quarter too, and are written block by
block while a block is in the processor's cache. Values are those of `metarun.ops.second_order.batch_norm` and
`torch.nn.functional.max_pool2d` up to float order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metarun.ops.second_order import statistics

LEAST = 2**16  # values; below, the calls of more operations cost what the passes over memory save
BLOCK = 2**19  # bytes of a block of images, of which the second-level cache of most processors holds two

aten = torch.ops.aten
WINDOW = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # kernel, stride, padding, dilation, and no rounding up


def worthwhile(x: Tensor) -> bool:
    """Whether `pooled_batch_norm` is faster than its two parts, by the shape of its input `[B, C, H, W]` alone."""
    images_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == "cpu" and images_last and x.numel() >= LEAST


def pooled_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises with the statistics of `x` itself, then takes the maxima of 2x2 positions; it can be differentiated twice.

    An odd last row or column counts in the statistics and is in no maximum. Not for use under `vmap`.

    Args:
        x: Activations `[B, C, H, W]` on a CPU, in torch's memory format `channels_last`.
        weight: The scale of each channel, `[C]`.
        bias: The shift of each channel, `[C]`.
        epsilon: The number that is added to the variance, above 0.

    Returns:
        The maxima `[B, C, H // 2, W // 2]`, and the mean and the biased variance of each channel, `[C]` each, as constants.
    """
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _PooledNorm.apply
    return apply(x, weight, bias, epsilon)


class _PooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = statistics(x)
        pooled, indices = _extremes(x, _channels(torch.where(weight < 0, -1.0, 1.0), x))
        y = torch.native_batch_norm(pooled, weight, bias, mean, variance, False, 0.0, epsilon)[0]
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + epsilon), pooled, indices)
        ctx.mark_non_differentiable(mean, variance)
        ctx.epsilon = epsilon
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        apply: Callable[..., tuple[Tensor, ...]] = _PooledNormGradient.apply
        return *apply(gradients[0], *ctx.saved_tensors, ctx.epsilon), None


class _PooledNormGradient(torch.autograd.Function):
    """The first derivative, which can be differentiated once more.

    It is that of batch normalisation (`metarun.ops.second_order`) for a gradient g that is 0 at all positions but those of the
    maxima. With n = (x - mean) s, s the inverse standard deviation, and means over a channel's M values in bars:

    dx = w s (g - bar(g) - n bar(g n)),   dw = sum g n,   db = sum g,

    where both sums go over the maxima alone, and dx is g w s at these, on top of a line in x everywhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        inverse: Tensor,
        pooled: Tensor,
        indices: Tensor,
        epsilon: float,
    ) -> tuple[Tensor, ...]:
        by_weight, by_bias = _sums(gradient, pooled, weight, mean, inverse, epsilon)
        count = x.numel() // x.shape[1]
        scale = weight * inverse
        slope = -scale * inverse * by_weight / count
        shift = -scale * by_bias / count - slope * mean
        by_x = _spread(gradient * _channels(scale, x), indices, x, [(x, slope)], shift)
        ctx.save_for_backward(gradient, x, weight, mean, inverse, pooled, indices, by_weight, by_bias)
        ctx.epsilon = epsilon
        return by_x, by_weight, by_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The second derivative: that of batch normalisation, with g as above, and of the gradient by g what stands at the maxima."""
        g, x, weight, mean, s, pooled, indices, by_weight, by_bias = ctx.saved_tensors
        h, u, v = gradients
        count = x.numel() // x.shape[1]
        a, b = (total / count for total in _sums(h, x, weight, mean, s, ctx.epsilon))
        c, g_bar = by_weight / count, by_bias / count
        h_pooled = _at(h, indices)
        product = (h_pooled * g).sum([0, 2, 3], dtype=a.dtype) / count
        by_w = count * s * (product - b * g_bar - a * c)

        scale = weight * s
        of_pooled = (u - scale * a) * s
        by_g = torch.addcmul(_channels(v - scale * b - of_pooled * mean, x), pooled, _channels(of_pooled, x))
        by_g.addcmul_(h_pooled, _channels(scale, x))

        k, us = -scale * s, u * s
        of_x = (k * (product - b * g_bar - 3 * a * c) - us * c) * s
        rest = -k * (b * c + a * g_bar) - us * g_bar - of_x * mean
        by_x = _spread(g * _channels(k * a + us, x), indices, x, [(h, k * c), (x, of_x)], rest)
        return by_g, by_x, by_w.to(weight.dtype), None, None, None, None, None


def _channels(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1).to(x.dtype)


def _sums(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sums of each channel's `gradient * n` and of its `gradient`."""
    _, of_products, of_values = aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, inverse, True, epsilon, [False, True, True]
    )
    return of_products, of_values


def _blocks(x: Tensor) -> Iterator[slice]:
    """Images, in blocks that stay in a cache."""
    length = max(1, BLOCK // (x[0].numel() * x.element_size()))
    return (slice(start, start + length) for start in range(0, len(x), length))


def _extremes(x: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of 2x2 positions where a channel's sign is 1, the minima where it is -1; and where in `x` they stand."""
    count, channels, height, width = x.shape
    pooled = torch.empty(count, height // 2, width // 2, channels, dtype=x.dtype).movedim(-1, 1)
    indices = torch.empty_like(pooled, dtype=torch.int64)
    for block in _blocks(x):
        aten.max_pool2d_with_indices.out(x[block] * signs, *WINDOW, out=pooled[block], indices=indices[block])
    return pooled.mul_(signs), indices


def _spread(values: Tensor, indices: Tensor, like: Tensor, lines: list[tuple[Tensor, Tensor]], shift: Tensor) -> Tensor:
    """`values` at the positions `indices` of a tensor such as `like`, plus `factor * tensor` of each line, plus `shift` everywhere."""
    spread = torch.empty_like(like)
    factors = [(tensor, _channels(factor, like)) for tensor, factor in lines]
    shift = _channels(shift, like)
    for block in _blocks(like):
        part = spread[block]
        aten.max_pool2d_with_indices_backward.grad_input(
            values[block], like[block], *WINDOW, indices[block], grad_input=part
        )
        for tensor, factor in factors:
            part.addcmul_(tensor[block], factor)
        part.add_(shift)
    return spread


def _at(x: Tensor, indices: Tensor) -> Tensor:
    """The values of `x` at the positions `indices`."""
    count, channels, height, width = x.shape
    positions = indices.movedim(1, -1).reshape(count, -1, channels)
    found = x.movedim(1, -1).reshape(count, height * width, channels).gather(1, positions)
    return found.view(count, *indices.shape[2:], channels).movedim(-1, 1)
