"""Draws the terminal picture of README.md, scripts/assets/demo.svg, from the result of the demo that is kept in scripts/results/."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # so that a bare clone will do
from metarun.report import run as report  # noqa: E402

RESULT = HERE / "results" / "glyphs-protonet.json"
PICTURE = HERE / "assets" / "demo.svg"


def svg() -> str:
    """What the command prints at its end, with the terminal's colours, as a picture."""
    result = json.loads(RESULT.read_text())
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}),
    ):
        report.show(Path("outputs/glyphs-protonet/default"), result)
    console = Console(record=True, width=92, file=io.StringIO())
    console.print(Text(f"$ {result['command']}", style="bold"))
    console.print(Text.from_ansi(printed.getvalue().rstrip()))
    drawn = console.export_svg(title="metarun", theme=MONOKAI, unique_id="demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # no fonts from elsewhere


def draw() -> None:
    """Writes the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg())


if __name__ == "__main__":
    draw()
