"""Pictures made of stored results: the terminal of README.md, scripts/assets/demo.svg, and the learning curves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from metarun.report import run as report
from metarun.report.target import learning_curve
from metarun.runs import contents
from metarun.runs.result import ACCURACY, COMMAND, TARGET_CHANCE, TARGET_CURVE, TARGET_VALUES, half_of

from .rows import DATA, Table
from .tables import ITEMS, Made, half_of_draws, mean_of, sizes_of, stored

RESULT = DATA / "main" / "glyphs_protonet.json"
PICTURE = Path(__file__).parents[1] / "assets" / "demo.svg"


def svg() -> str:
    """What the command prints at its end, with the terminal's colours, as a picture."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}),
    ):
        report.show(Path("outputs/glyphs-protonet/default"), result)
    console = Console(record=True, width=92, file=io.StringIO())
    console.print(Text(f"$ {result[COMMAND]}", style="bold"))
    console.print(Text.from_ansi(printed.getvalue().rstrip()))
    drawn = console.export_svg(title="metarun", theme=MONOKAI, unique_id="demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # no fonts from elsewhere


def draw() -> None:
    """Writes the picture of the terminal."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(), encoding="utf-8")


def draw_curves(table: Table, data: Path = DATA) -> None:
    """Writes the learning curves of a table of approaches, as the table has them: means over the seeds, intervals over the draws."""
    found = {row.label: runs for row in table.rows if (runs := stored(row, data))}
    if found:
        curves = {label: curve_of(runs) for label, runs in found.items()}
        chance = next(iter(found.values()))[0].result[TARGET_CHANCE]
        drawn = learning_curve(curves, chance=chance, items=table.options.get("items", ITEMS))
        (data / table.name / contents.LEARNING_CURVE).write_bytes(drawn)


def curve_of(runs: list[Made]) -> list[dict[str, Any]]:
    """The learning curve of a row: that of its run, or the means over its runs, whose intervals are over the draws."""
    first = runs[0].result[TARGET_CURVE]
    if len(runs) > 1 and not all(TARGET_VALUES in made.result for made in runs):
        return list(first)
    return [
        point | {ACCURACY: mean_of(runs, size, ACCURACY), half_of(ACCURACY): half_of_draws(runs, size, ACCURACY)}
        for point in first
        if (size := point["train_images"]) in sizes_of(runs)
    ]
