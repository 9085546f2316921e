"""Pictures made of stored results: the terminal of README.md, scripts/assets/demo.svg, and the learning curves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from metarun.report import run as report
from metarun.report.target import learning_curve
from metarun.runs.result import COMMAND, TARGET_CHANCE, TARGET_CURVE

from .rows import DATA, Table

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
    """Writes the learning curves of a table of approaches, each of its first seed, beside the results that they are of."""
    found = [(row.label, row.runs[0].stored(data)) for row in table.rows]
    results = {label: json.loads(path.read_text(encoding="utf-8")) for label, path in found if path.is_file()}
    if results:
        curves = {label: result[TARGET_CURVE] for label, result in results.items()}
        chance = next(iter(results.values()))[TARGET_CHANCE]
        (data / table.name / "learning_curve.png").write_bytes(learning_curve(curves, chance=chance))
