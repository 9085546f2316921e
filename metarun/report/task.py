"""A picture of a test task with what was predicted, for TensorBoard and a report."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metarun.core import Episodes
from metarun.ops.metrics import undefined

CELL, FRAME, LEFT = 44, 3, 20  # pixels of an image with its frame, of the frame, and of a row's number
SHOWN = 10  # images of a set in a row
ROWS = 20  # classes, at most
RIGHT, WRONG, BEFORE, AFTER, BLACK = (34, 139, 34), (200, 30, 30), (150, 150, 150), (26, 99, 184), (0, 0, 0)
WIDTH, HEIGHT = 480, 320


def task_picture(task: Episodes, before: Tensor, after: Tensor) -> bytes | None:
    """A PNG of the first of `task` with the predictions of its queries, and a caption; None where a task cannot be drawn.

    Args:
        task: Tasks of images, or of functions of one number.
        before: What is predicted before the inner steps, as `Algorithm.predict` returns it; the same as `after` where there are none.
        after: What is predicted after them.
    """
    if task.support_x.ndim == 5:
        return _images(task, after[0].argmax(-1).masked_fill(undefined(after[0]), -1).cpu().numpy())
    if task.support_y.is_floating_point() and task.support_x.shape[-1] == task.support_y.shape[-1] == 1:
        return _function(task, before[0], after[0])
    return None


def _images(task: Episodes, predicted: np.ndarray) -> bytes:
    """A row a class: its number, its support images, its queries in a green frame, or in a red one with the number predicted.

    Where -1 stands in `predicted`, nothing was, and a red frame has no number.
    """
    support_y, query_y = task.support_y[0].cpu().numpy(), task.query_y[0].cpu().numpy()
    ways = min(task.ways, ROWS)
    rows = [(np.flatnonzero(support_y == way)[:SHOWN], np.flatnonzero(query_y == way)[:SHOWN]) for way in range(ways)]
    support, queries = (
        _pixels(x[0], np.concatenate([row[part] for row in rows]))
        for part, x in enumerate((task.support_x, task.query_x))
    )
    most = max(len(own) for own, _ in rows)
    gap = LEFT + most * CELL + FRAME * 2
    right = gap + max(len(own) for _, own in rows) * CELL
    caption = [
        f"A row a class{'' if ways == task.ways else f' ({ways} of {task.ways})'}: its support images, then its queries.",
        f"Green: predicted rightly ({int((predicted == query_y).sum())} of all {len(query_y)}).",
        "Red: wrongly, with the row that was predicted.",
    ]
    picture = Image.new("RGB", (max(right + FRAME, 330), ways * CELL + 16 * len(caption) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for way, (examples, asked) in enumerate(rows):
        top = way * CELL
        draw.text((4, top + CELL / 2 - 6), f"{way + 1}", fill="black")
        for place, item in enumerate(examples):
            picture.paste(support[item], (LEFT + place * CELL + FRAME, top + FRAME))
        for place, item in enumerate(asked):
            x, found = gap + place * CELL, int(predicted[item])
            draw.rectangle((x, top, x + CELL - 2, top + CELL - 2), fill=RIGHT if found == way else WRONG)
            picture.paste(queries[item], (x + FRAME, top + FRAME))
            if found not in (way, -1):
                draw.rectangle((x, top, x + 8 + 6 * len(str(found + 1)), top + 13), fill=WRONG)
                draw.text((x + 4, top + 1), f"{found + 1}", fill="white")
    return _png(picture, caption, ways * CELL + 4)


def _pixels(images: Tensor, chosen: np.ndarray) -> dict[int, Image.Image]:
    """Those `chosen` of normalised images `[n, C, H, W]`, as pictures of one size that share their darkest and brightest values."""
    if not len(chosen):  # all queries may be of classes that are not shown
        return {}
    values = images[torch.from_numpy(chosen).to(images.device)].float().cpu().numpy()
    values = (values - values.min()) / max(float(values.max() - values.min()), 1e-6)
    channels = values[:, :3] if values.shape[1] >= 3 else values[:, :1].repeat(3, 1)
    side = CELL - 2 * FRAME - 1
    pictures = (
        Image.fromarray((255 * each.transpose(1, 2, 0)).astype(np.uint8)).resize((side, side)) for each in channels
    )
    return dict(zip(chosen.tolist(), pictures, strict=True))


def _function(task: Episodes, before: Tensor, after: Tensor) -> bytes:
    """The points of the support set, the queries' true values, and what was predicted of them before and after adaptation."""
    sets = [(task.support_x[0], task.support_y[0]), *((task.query_x[0], y) for y in (task.query_y[0], before, after))]
    # In double precision: what a method predicts that diverged may have no range in single precision.
    points = [np.stack([each.detach().flatten().cpu().double().numpy() for each in one], 1) for one in sets]
    known, *curves = [each[np.argsort(each[:, 0])] for each in points]
    whole = np.concatenate(points)
    whole = whole[np.isfinite(whole).all(1)]
    low, span = whole.min(0), np.maximum(np.ptp(whole, 0), 1e-6)

    def place(point: np.ndarray) -> tuple[float, float]:
        x, y = (point - low) / span
        return 10 + float(x) * (WIDTH - 20), HEIGHT - 10 - float(y) * (HEIGHT - 20)

    same = np.array_equal(curves[1], curves[2])
    caption = [
        "Dots: the support set. Black: the truth.",
        f"Blue: predicted{'' if same else ' after adaptation. Grey: before it'}.",
        f"x from {low[0]:.3g} to {low[0] + span[0]:.3g}, y from {low[1]:.3g} to {low[1] + span[1]:.3g}.",
    ]
    picture = Image.new("RGB", (WIDTH, HEIGHT + 16 * len(caption) + 8), "white")
    draw = ImageDraw.Draw(picture)
    colours: list[tuple[int, int, int]] = [BLACK, BEFORE, AFTER]
    for curve, colour in zip(curves, colours, strict=True):
        finite = curve[np.isfinite(curve).all(1)]
        draw.line([place(point) for point in finite], fill=colour, width=2)
    for point in known:
        x, y = place(point)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="black")
    return _png(picture, caption, HEIGHT + 4)


def _png(picture: Image.Image, caption: list[str], top: int) -> bytes:
    ImageDraw.Draw(picture).multiline_text((4, top), "\n".join(caption), fill="black")
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    return whole.getvalue()
