"""The contract of a backbone: items in, features out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from metarun.config.checked import Checked
from metarun.ops import batch_norm
from metarun.ops.support import of_support

IMAGES_AT_ONCE = 256  # so many images go through a network together where nothing is trained: memory stays bounded

ActivationHook = Callable[[int, Tensor], Tensor]  # (block number, activations) -> the activations that replace them


class Backbone(Checked, nn.Module):
    """Images `[B, C, H, W]` (or vectors `[B, D]`) to features `[B, features]`.

    `forward(x, n_support=None, activation_hook=None)` gets the items `x`. With the norm `support`, the statistics of the first
    `n_support` rows normalise all rows. `activation_hook(number, activations)` may change the activations of each block,
    `[B, widths[number], ...]`, after the normalisation and before the nonlinearity that ends the block.

    Attributes:
        features: D, the length of a feature vector.
        widths: The channels of each block.
        blocks: The blocks in order, a sequence of modules, each with the output of the one before as its first input.
        norm: The kind of normalisation, a key of `metarun.ops.batch_norm.KINDS`.
        pretrained: Whether it brings weights of a file, a library or an earlier run.
        saw: What the weights that it brings were pretrained on, by name; None where it is not known.
        draws: Whether it draws random numbers in training.
        identity: Whether its features are the items themselves, flattened, so that no set needs to go through it on its own.
        channels_last: The memory order of images between its layers, set from `hardware.channels_last`.
        reads_texts: Whether its items are the word pieces of texts, int64 `[B, L]`.
        vectorizable: Whether tasks can go through it by `vmap`.
    """

    configured_by = "backbone"
    features: int
    widths: list[int]
    blocks: Any
    norm: str
    pretrained: bool = False
    saw: str | None = None
    draws: bool = False
    identity: bool = False
    channels_last: bool = False
    reads_texts: bool = False
    vectorizable: bool = True

    @classmethod
    def check_installed(cls, settings: Mapping[str, Any]) -> None:
        """Checks that the libraries which a backbone of these settings needs are installed.

        Args:
            settings: Its node of the config.

        Raises:
            UserError: One is not; it names the extra.
        """

    @property
    def whole_blocks(self) -> Sequence[Sequence[nn.Module]]:
        """Of each block the modules that are trained, or frozen, together: itself, and those that come between it and the next.

        What comes after the last one is with the last. Parameters of none of them come before the first.
        """
        return [[block] for block in self.blocks]

    @property
    def couples_rows(self) -> bool:
        """Whether, in training, the features of an image depend on the other images of a batch that is no task."""
        return batch_norm.couples_rows(self.norm)

    def embed_sets(self, support_x: Tensor, query_x: Tensor, *, shared_batch: bool = True) -> tuple[Tensor, Tensor]:
        """Computes features of one task's two sets; here alone is decided which of them share the statistics of a norm.

        With the norm `support` both go through together, since the support set's statistics normalise the queries.

        Args:
            support_x: The support set, `[N*K, ...]`.
            query_x: The queries, `[N*Q, ...]`.
            shared_batch: Whether both sets are one batch for the norms `batch` and `running`; else each is its own.

        Returns:
            The features `[N*K, features]` and `[N*Q, features]`.
        """
        if not shared_batch and self.norm in ("batch", "running"):
            return of_support(lambda: self(support_x)), self(query_x)
        return batch_norm.both_sets(self, support_x, query_x)

    def to_memory_order(self, images: Tensor) -> Tensor:
        """Puts images in the chosen memory order: the channels of a pixel side by side, or not.

        An image of one channel is both orders at once by its strides, which convolutions then take for the slower one:
        here its strides say the order. (`contiguous(memory_format=...)` leaves them as they are.)

        Args:
            images: `[B, C, H, W]`.
        """
        if not self.channels_last:
            return images
        pixels = images.movedim(1, -1)
        side_by_side: Tensor = pixels.flatten(1).unflatten(1, pixels.shape[1:])
        return side_by_side.movedim(-1, 1)
