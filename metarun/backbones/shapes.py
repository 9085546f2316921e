"""The shapes of items that backbones can take."""

from __future__ import annotations

from metarun.errors import UserError


def image_shape(
    name: str, input_shape: tuple[int, ...], *, smallest: int = 1, instead: str = "backbone=mlp"
) -> tuple[int, int, int]:
    """Checks that items are images which a backbone can take, and returns their shape.

    Args:
        name: The backbone, for messages.
        input_shape: The shape of the data's items.
        smallest: The least side of an image in pixels.
        instead: The words that a message recommends for smaller images.

    Returns:
        The channels, the height and the width.

    Raises:
        UserError: The items are vectors, or too small.
    """
    if len(input_shape) != 3:
        size = "×".join(map(str, input_shape))
        raise UserError(
            f"backbone: {name} needs images (C, H, W), but the data are vectors of {size}; try backbone=mlp"
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise UserError(
            f"backbone: {name} needs images of at least {smallest}×{smallest} pixels, but the data are {height}×{width}; try {instead}"
        )
    return channels, height, width
