"""The contract of a backbone: items in, features out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.ops import batch_norm

ActivationHook = Callable[[int, Tensor], Tensor]  # (block number, activations) -> the activations that replace them


class Backbone(Checked, nn.Module):
    """Images `[B, C, H, W]` (or vectors `[B, D]`) to features `[B, features]`.

    `forward(x, n_support=None, activation_hook=None)`: with the norm `support`, the statistics of the first `n_support` rows
    normalise all. `activation_hook(number, activations)` may change the activations of each block, `[B, widths[number], ...]`, where
    they have been normalised and have not yet gone through the nonlinearity that ends the block.
    """

    configured_by = "backbone"
    features: int
    widths: list[int]  # the channels of each block
    blocks: Any  # the blocks in order (a sequence of modules), each with what goes on from the one before as its first input
    norm: str  # a kind of `metarun.ops.batch_norm`
    pretrained: bool = False  # whether it brings weights from elsewhere: of a file, a library or an earlier run
    draws: bool = False  # whether it draws random numbers in training
    channels_last: bool = False  # the memory order of images between its layers; set from `hardware.channels_last`

    @property
    def couples_rows(self) -> bool:
        """Whether, in training, the features of an image depend on the other images of the batch."""
        return self.norm in ("batch", "running")

    def embed_sets(self, support_x: Tensor, query_x: Tensor, *, shared_batch: bool = True) -> tuple[Tensor, Tensor]:
        """Features of one task's two sets: the one place that decides which of them share the statistics of a norm.

        With the norm `support` both go through together, since the support set's statistics normalise the queries.

        Args:
            support_x: The support set, `[N*K, ...]`.
            query_x: The queries, `[N*Q, ...]`.
            shared_batch: Whether both sets are one batch for the norms `batch` and `running`; else each is its own.

        Returns:
            The features `[N*K, features]` and `[N*Q, features]`.
        """
        if not shared_batch and self.norm in ("batch", "running"):
            return self(support_x), self(query_x)
        return batch_norm.both_sets(self, support_x, query_x)

    def to_memory_order(self, images: Tensor) -> Tensor:
        """The same images `[B, C, H, W]`, the channels of a pixel side by side in memory if that is the chosen order.

        An image of one channel is both orders at once by its strides, which convolutions then take for the slower one:
        here its strides say the order. (`contiguous(memory_format=...)` leaves them as they are.)
        """
        if not self.channels_last:
            return images
        pixels = images.movedim(1, -1)
        side_by_side: Tensor = pixels.flatten(1).unflatten(1, pixels.shape[1:])
        return side_by_side.movedim(-1, 1)
