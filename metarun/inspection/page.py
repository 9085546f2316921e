"""The page of an inspection: whole in itself, it opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import metarun
from metarun.core import TaskShape
from metarun.data.image_source import ImageSource
from metarun.data.source import Split
from metarun.inspection import facts
from metarun.inspection.words import asked, class_line, duplicate_lines, text_lines, time_lines
from metarun.templates import embedded, template
from metarun.text import bytes_text, shape_text

SIDE = 84  # pixels of a small image
BAD, CLASSES = 200, 500  # files and classes that the page lists


def page(found: list[dict[str, Any]], time: dict[str, Any], tasks: dict[Split, TaskShape], command: str) -> str:
    """The HTML of what was found.

    Args:
        found: Of each data set what `facts.inspect` told.
        time: What `timing.estimate` told.
        tasks: The tasks that were asked for.
        command: The command that found it.
    """
    return template(Path(__file__).parent, "inspection.html").render(
        sets=[_one(one, tasks) for one in found],
        time=[line.removeprefix("time").strip() for line in time_lines(time)],
        command=command,
        version=metarun.__version__,
    )


def _one(one: dict[str, Any], tasks: dict[Split, TaskShape]) -> dict[str, Any]:
    source, told = one.get("source"), {**one}
    told.setdefault("files", None)
    files = told["files"]
    told |= {"bytes": bytes_text(files["bytes"]) if files else "", "bad": files["unreadable"][:BAD] if files else []}
    told |= {"note": one.get("note", ""), "sheet": [], "pairs": [], "rule": "", "pixels": []}
    if one["problem"] or source is None:
        return {**told, "usable": False}
    told |= {"usable": True, "asked": asked(one, tasks), "twice": duplicate_lines(one.get("duplicates"))}
    told["class_line"] = class_line(one)
    told["items"] = text_lines(one.get("texts")) or ["An item is " + shape_text(one["input_shape"])]
    told["samples"] = one.get("texts", {}).get("samples", [])
    told["listed"] = one["classes"][:CLASSES]
    told["more"] = len(one["classes"]) - len(told["listed"])
    if isinstance(source, ImageSource):
        told["pixels"] = [f"{m:.4f} ± {d:.4f}" for m, d in zip(one["mean"], one["deviation"], strict=True)]
        told["sheet"] = [
            {**row, "images": [_picture(source, number) for number in row["rows"]]}
            for row in facts.sheet(source, one["as_target"])
        ]
        told["rule"] = one["duplicates"]["rule"]
        told["pairs"] = [
            {**pair, "images": [_picture(source, row) for row in pair["rows"]]} for pair in one["duplicates"]["pairs"]
        ]
    return told


def _picture(source: ImageSource, row: int) -> str:
    """A small image as an address that holds it."""
    (pixels,) = source.table.read(row, row + 1)
    if source.inverted:
        pixels = 255 - pixels
    image = Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
    image.thumbnail((SIDE, SIDE))
    return embedded(image)
