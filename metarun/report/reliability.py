"""The reliability diagram: accuracy against confidence, as a picture for TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

SIDE, EDGE = 360, 40  # pixels of the picture, and around the axes


def reliability_diagram(bins: Sequence[dict[str, float]]) -> bytes:
    """A PNG of the accuracy of predictions against their confidence, a point for each of `Reliability.bins`."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    span = SIDE - 2 * EDGE

    def place(x: float, y: float) -> tuple[float, float]:
        return EDGE + span * x, SIDE - EDGE - span * y

    draw.line([place(0, 1), place(0, 0), place(1, 0)], fill="black")
    draw.line([place(0, 0), place(1, 1)], fill="grey")
    for tick in (0.0, 0.5, 1.0):
        draw.text((place(tick, 0)[0] - 8, SIDE - EDGE + 6), f"{tick:g}", fill="black")
        draw.text((EDGE - 24, place(0, tick)[1] - 6), f"{tick:g}", fill="black")
    total = sum(one["count"] for one in bins) or 1
    for one in bins:
        x, y = place(one["confidence"], one["accuracy"])
        size = 3 + 9 * (one["count"] / total) ** 0.5
        draw.ellipse((x - size, y - size, x + size, y + size), outline=(26, 99, 184), width=2)
    draw.text((SIDE / 2 - 30, SIDE - 16), "confidence", fill="black")
    draw.text((4, 6), "accuracy", fill="black")
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    return whole.getvalue()
